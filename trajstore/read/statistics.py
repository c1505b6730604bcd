"""Statistics of a selection, in one pass over its columns and in bounded memory.

Invariant: what is found depends on the trajectories alone, not on threads, nor on how they lie in segments' pages; at most a
few pieces of one column are in memory, however long the view is.
"""

from __future__ import annotations

import collections
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from trajstore.errors import SelectionError
from trajstore.format.statistics import ColumnStatistics, Statistics
from trajstore.progress import byte_progress
from trajstore.read.accumulate import Accumulator, Moments, accumulator, is_measured
from trajstore.read.arena import group_name
from trajstore.read.kept_statistics import KeptStatistics
from trajstore.read.segment import RowRange, SegmentReaders
from trajstore.read.selection import Selection
from trajstore.schema import Column
from trajstore.storage.workers import Workers
from trajstore.stored import Array

QUANTILES = (0.01, 0.5, 0.99)
_PIECE_BYTES = 8 << 20
_MAX_THREADS = 8
_JOIN_S = 5.0


def view_statistics(
    selection: Selection,
    readers: SegmentReaders,
    kept: KeptStatistics,
    *,
    columns: Sequence[str] | None,
    quantiles: Sequence[float],
    progress: bool | None,
) -> Statistics:
    """Statistics of a view; ``View.statistics`` says what the arguments mean.

    Of a whole version, what was measured before is looked up; what is measured is kept beside it.
    """
    chosen = _chosen(selection, columns)
    asked = checked_quantiles(quantiles)
    version = selection.table.version if is_whole_version(selection) else None
    known = None if version is None else kept.find(version)
    missing = [c for c in chosen if known is None or not _covers(known.columns.get(c.path), asked)]
    if known is None or missing or not _covers(known.length, asked):
        # What was asked for earlier is measured again, so that both can be answered from now on.
        wanted = {c.path: _with_known(asked, None if known is None else known.columns.get(c.path)) for c in missing}
        found = measure(selection, readers, missing, wanted, progress=progress)
        of_trajectories = known
        if of_trajectories is None or not _covers(of_trajectories.length, asked):
            every = _with_known(asked, None if known is None else known.length)
            of_trajectories = _of_trajectories(selection, every)
        known = replace(of_trajectories, columns={**({} if known is None else known.columns), **found})
        if version is not None:
            kept.keep(version, known)
    return replace(
        known,
        columns={c.path: known.columns[c.path].with_quantiles(asked) for c in chosen},
        length=known.length.with_quantiles(asked),
        reward_sum=known.reward_sum.with_quantiles(asked),
    )


def measure(
    selection: Selection,
    readers: SegmentReaders,
    columns: Sequence[Column],
    quantiles: Mapping[str, Sequence[float]],
    *,
    progress: bool | None = None,
) -> dict[str, ColumnStatistics]:
    """Read columns, one after the other, and describe them.

    Args:
        selection: The trajectories, which have these columns.
        readers: Page indexes.
        columns: Those that ``is_measured`` allows.
        quantiles: For each of them.
        progress: Show bytes on standard error; None for only in a terminal, if there are many.
    """
    steps = int(selection.lengths.sum())
    total = sum((steps + c.extra * len(selection)) * c.row_bytes for c in columns)
    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    found: dict[str, ColumnStatistics] = {}
    workers = Workers(threads, name="trajstore-statistics")
    try:
        with byte_progress("Measuring", total, shown=progress) as advance:
            for column in columns:
                gathered = accumulator(column, quantiles[column.path], steps + column.extra * len(selection))
                under_way: collections.deque[tuple[Piece, Future[Any]]] = collections.deque()
                for piece in pieces(selection, readers, column):
                    if not piece.first:
                        gathered.begin(_read(selection, readers, column, piece.head()))
                    if len(under_way) > threads:
                        _take(under_way, gathered, column, advance)
                    task = workers.submit(_measured, selection, readers, gathered, piece)
                    under_way.append((piece, task))
                while under_way:
                    _take(under_way, gathered, column, advance)
                found[column.path] = gathered.result()
    finally:
        workers.close(_JOIN_S)
    return found


@dataclass(eq=False)
class Piece:
    """Rows of one segment that are read together.

    Attributes:
        segment: Number in the table.
        first: Number of its first row among all that are measured.
        runs: ``[start, stop)`` each, ascending and apart.
    """

    segment: int
    first: int
    runs: list[tuple[int, int]] = field(default_factory=list)

    @property
    def span(self) -> RowRange:
        """From the first to the last."""
        return RowRange(self.runs[0][0], self.runs[-1][1])

    @property
    def rows(self) -> int:
        """How many are measured."""
        return sum(stop - start for start, stop in self.runs)

    def head(self) -> Piece:
        """Its first row."""
        start = self.runs[0][0]
        return Piece(self.segment, self.first, [(start, start + 1)])


def pieces(selection: Selection, readers: SegmentReaders, column: Column) -> Iterator[Piece]:
    """All rows of a column, in the order in which they lie; rows between those of the view are read over if they are few."""
    table, rows = selection.table, selection.rows
    starts = table.start[rows] + (table.ordinal[rows] if column.extra else 0)
    segments = table.segment[rows]
    order = np.lexsort((starts, segments))
    starts, segments = starts[order], segments[order]
    stops = starts + table.length[rows][order] + column.extra
    new = np.ones(len(order), bool)
    new[1:] = (segments[1:] != segments[:-1]) | (starts[1:] != stops[:-1])
    begin = np.flatnonzero(new)
    end = np.append(begin[1:], len(order)) - 1
    name, piece, first, page, limit = group_name(column), None, 0, 1, 1
    for segment, start, stop in zip(segments[begin].tolist(), starts[begin].tolist(), stops[end].tolist(), strict=True):
        if piece is None or piece.segment != segment:
            page = readers.open(table.segments[segment], selection.schema).page_rows_of(name)
            limit = max(_PIECE_BYTES // max(column.row_bytes, 1) // page, 1) * page
        while start < stop:
            if piece is not None and not _joins(piece, segment, start, page, limit):
                yield piece
                first += piece.rows
                piece = None
            if piece is None:
                piece = Piece(segment, first)
            origin = piece.runs[0][0] if piece.runs else start
            until = min(stop, (origin // page) * page + limit)  # whole pages
            piece.runs.append((start, until))
            start = until
    if piece is not None:
        yield piece


def is_whole_version(selection: Selection) -> bool:
    """Whether these are all trajectories of the committed version, in its order, and no others."""
    table, rows = selection.table, selection.rows
    base = table if table.growth is None else table.growth.base
    return (
        table.version.number > 0 and len(rows) == len(table) == len(base) and bool((rows == np.arange(len(rows))).all())
    )


def checked_quantiles(quantiles: Sequence[float]) -> tuple[float, ...]:
    """Fractions as given, each once.

    Raises:
        SelectionError: One is no number from 0 to 1.
    """
    try:
        found = tuple(dict.fromkeys(float(q) for q in quantiles))
    except (TypeError, ValueError):
        raise SelectionError(f"quantiles={quantiles!r}, expected fractions: quantiles=[0.01, 0.5, 0.99]") from None
    for q in found:
        if not 0 <= q <= 1:
            raise SelectionError(f"quantile {q}, expected a fraction from 0 to 1: 0.99 for the 99th percentile")
    return found


def _chosen(selection: Selection, names: Sequence[str] | None) -> list[Column]:
    if not len(selection):
        raise SelectionError("the view holds no trajectories, so there is nothing to measure; choose a wider view")
    if names is None:
        return [c for c in selection.common_columns if is_measured(c)]
    if isinstance(names, str):
        raise SelectionError(f"columns={names!r}, expected a list of names: columns=[{names!r}]")
    found = {column.path: column for name in names for column in selection.schema.select(name)}
    for column in found.values():
        if not is_measured(column):
            raise SelectionError(
                f"column {column.path!r} is {column.describe()}: statistics are of bools, integers and floating-point "
                "numbers of fixed shape; leave it out"
            )
        lacking = selection.lacking(column)
        if lacking:
            raise SelectionError(
                f"column {column.path!r} is lacking from {lacking} of {len(selection)} trajectories; select those that have "
                "it, or leave it out"
            )
    return list(found.values())


def _of_trajectories(selection: Selection, quantiles: tuple[float, ...]) -> Statistics:
    table = selection.table
    lengths = selection.lengths
    returns = table.values("reward_sum", selection.rows).to_numpy(zero_copy_only=False).astype(np.float64)
    return Statistics(
        {},
        _described("length", lengths.astype(np.int64), quantiles),
        _described("reward_sum", returns, quantiles),
        len(selection),
        int(lengths.sum()),
        table.version.number,
    )


def _described(name: str, values: Array, quantiles: tuple[float, ...]) -> ColumnStatistics:
    """Of numbers in memory, ``(n,)``."""
    gathered = Moments(Column(path=name, dtype=values.dtype.name), quantiles, len(values), sample=len(values))
    gathered.begin(values)
    gathered.add(gathered.measure(values, 0))
    return gathered.result()


def _covers(known: ColumnStatistics | None, quantiles: tuple[float, ...]) -> bool:
    return known is not None and all(q in known.quantiles for q in quantiles)


def _with_known(quantiles: tuple[float, ...], known: ColumnStatistics | None) -> tuple[float, ...]:
    return tuple(sorted({*quantiles, *(() if known is None else known.quantiles)}))


def _joins(piece: Piece, segment: int, start: int, page: int, limit: int) -> bool:
    """Whether rows from ``start`` on are read with a piece: they follow it closely, and it is not full."""
    span = piece.span
    room = (span.start // page) * page + limit
    return piece.segment == segment and span.stop <= start <= span.stop + page and start < room


def _measured(selection: Selection, readers: SegmentReaders, gathered: Accumulator, piece: Piece) -> Any:
    return gathered.measure(_read(selection, readers, gathered.column, piece), piece.first)


def _read(selection: Selection, readers: SegmentReaders, column: Column, piece: Piece) -> Array:
    """``(rows, *shape)`` stored bits."""
    reader = readers.open(selection.table.segments[piece.segment], selection.schema)
    span = piece.span
    rows: Array = reader.read(column.path, span)
    if len(piece.runs) == 1:
        return rows
    return np.concatenate([rows[start - span.start : stop - span.start] for start, stop in piece.runs])


def _take(
    under_way: collections.deque[tuple[Piece, Future[Any]]], gathered: Accumulator, column: Column, advance: Any
) -> None:
    piece, task = under_way.popleft()
    gathered.add(task.result())
    advance(math.prod((piece.rows, column.row_bytes)))
