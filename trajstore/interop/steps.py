"""Columns of the steps of a selection, end to end, any range of them at a time.

Invariant: one row per step, in the order of the selection; of a column with ``extra=1`` the final observation is left out.
What is read besides is never more than a few megabytes at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from trajstore.errors import UnknownColumnError
from trajstore.format.pages import arrow_type
from trajstore.read.segment import RowRange, SegmentReaders
from trajstore.read.selection import Selection
from trajstore.schema import Column
from trajstore.stored import Array, Stored, to_user

# Rows between two trajectories are read along if they are cheaper than another look at the same page,
_GAP_BYTES = 128 * 1024
_GAP_ROWS = 64  # (of strings and lists, whose size nobody knows)
# and only so many in one go.
_SPAN_BYTES = 8 * 1024 * 1024


class StepReader:
    """Reads columns of the first steps of each trajectory of a selection.

    Args:
        selection: The trajectories.
        readers: Of their segments.
        counts: ``(n,)`` int64: steps wanted of each; by default all.
    """

    def __init__(self, selection: Selection, readers: SegmentReaders, counts: Array | None = None) -> None:
        self._selection = selection
        self._readers = readers
        self.counts = selection.lengths if counts is None else counts
        self._ends = np.cumsum(self.counts)  # (n,) int64, rows
        self.rows = int(self._ends[-1]) if len(self._ends) else 0

    def index(self, start: int, stop: int) -> tuple[Array, Array]:
        """Ids of trajectories and numbers of steps of rows ``[start, stop)``, ``(rows,)`` int64 each."""
        chosen, first, last = self._pieces(start, stop)
        ids = self._selection.table.id[self._selection.rows[chosen]]
        return np.repeat(ids, last - first), _ranges(first, last)

    def read(self, column: Column, start: int, stop: int) -> tuple[Stored, Array | None]:
        """Rows ``[start, stop)`` of a column.

        Returns:
            Stored bits, and ``(rows,)`` bool: those whose trajectory lacks the column (zero, or null); None if none.
        """
        chosen, first, last = self._pieces(start, stop)
        table, rows = self._selection.table, self._selection.rows[chosen]
        segments = table.segment[rows]
        begins = table.start[rows] + (table.ordinal[rows] if column.extra else 0) + first
        sizes = last - first
        presence = table.column_presence.get(column.path)
        have = np.ones(len(rows), bool) if presence is None else presence[segments]
        absent = None if have.all() else np.repeat(~have, sizes)
        if column.is_variable:
            return self._variable(column, segments, begins, sizes, have), absent
        out = np.zeros((stop - start, *column.shape), column.physical_dtype)
        places = np.cumsum(sizes) - sizes
        for run in _runs(column, segments, begins, sizes, have):
            begin, end = int(begins[run[0]]), int(begins[run[-1]] + sizes[run[-1]])
            place = int(places[run[0]])
            target = out[place : place + int(sizes[run].sum())]
            reader = self._readers.open(table.segments[int(segments[run[0]])], self._selection.schema)
            if end - begin == len(target):
                reader.read(column.path, RowRange(begin, end), target)
            else:
                read = reader.read(column.path, RowRange(begin, end))
                target[...] = read[_ranges(begins[run] - begin, begins[run] - begin + sizes[run])]
        return out, absent

    def values(self, column: Column) -> Any:
        """All rows of a column as people use them, as ``to_user`` gives them.

        Raises:
            UnknownColumnError: A trajectory lacks it.
        """
        stored, absent = self.read(column, 0, self.rows)
        if absent is not None:
            lacking = int(self.index(0, self.rows)[0][absent.argmax()])
            raise UnknownColumnError(
                f"trajectory {lacking} has no column {column.path!r}; leave it out, or take steps_arrow(), which has nulls "
                "there"
            )
        return to_user(column, stored)

    def _variable(self, column: Column, segments: Array, begins: Array, sizes: Array, have: Array) -> pa.Array:
        """As ``read``: each run of trajectories is read in one go, and cut."""
        kind = arrow_type(column)
        parts: list[pa.Array | None] = [None] * len(begins)
        for run in _runs(column, segments, begins, sizes, have):
            begin, end = int(begins[run[0]]), int(begins[run[-1]] + sizes[run[-1]])
            entry = self._selection.table.segments[int(segments[run[0]])]
            read = self._readers.open(entry, self._selection.schema).read(column.path, RowRange(begin, end))
            for piece in run.tolist():
                parts[piece] = read.slice(int(begins[piece]) - begin, int(sizes[piece]))
        whole = [pa.nulls(int(n), kind) if part is None else part for part, n in zip(parts, sizes, strict=True)]
        return pa.concat_arrays(whole) if whole else pa.array([], kind)

    def _pieces(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Trajectories (positions) that rows lie in, and which steps of each: from the first to before the last."""
        lo = int(np.searchsorted(self._ends, start, "right"))
        hi = int(np.searchsorted(self._ends, stop, "left")) + 1
        chosen = lo + np.flatnonzero(self.counts[lo:hi]) if start < stop else np.empty(0, np.int64)
        ends, counts = self._ends[chosen], self.counts[chosen]
        begins = ends - counts
        return chosen, np.maximum(start - begins, 0), np.minimum(stop - begins, counts)


def _runs(column: Column, segments: Array, begins: Array, sizes: Array, have: Array) -> list[Array]:
    """Pieces that are read together: numbers of neighbours in a segment, of which none lacks the column."""
    pieces = np.flatnonzero(have)
    if not len(pieces):
        return []
    segments, begins, ends = segments[pieces], begins[pieces], (begins + sizes)[pieces]
    gaps = begins[1:] - ends[:-1]
    most = _GAP_ROWS if column.is_variable else max(1, _GAP_BYTES // column.row_bytes)
    new = np.ones(len(pieces), bool)
    new[1:] = (segments[1:] != segments[:-1]) | (gaps < 0) | (gaps > most) | (np.diff(pieces) > 1)
    heads = np.maximum.accumulate(np.where(new, np.arange(len(pieces)), 0))
    lots = (begins - begins[heads]) * max(column.row_bytes, 1) // _SPAN_BYTES
    new[1:] |= (lots[1:] != lots[:-1]) & (gaps > 0)
    return np.split(pieces, np.flatnonzero(new)[1:])


def _ranges(first: Array, last: Array) -> Array:
    """``first[0] .. last[0] - 1``, ``first[1] .. last[1] - 1`` and so on, end to end."""
    sizes = last - first
    total = int(sizes.sum())
    jumps: Array = np.repeat(first - (np.cumsum(sizes) - sizes), sizes)
    return jumps + np.arange(total, dtype=np.int64)
