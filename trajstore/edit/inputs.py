"""What a function that computes a derived column is given: columns of whole segments, trajectory by trajectory.

Invariant: a segment is read once, in the order of its rows, and no more of it is in memory than a chunk, or one trajectory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.errors import SelectionError
from trajstore.feed.fields import trajectory_values
from trajstore.format.manifest import SegmentEntry
from trajstore.names import nest
from trajstore.read.access import StoreAccess
from trajstore.read.segment import RowRange
from trajstore.read.selection import Selection
from trajstore.read.table import TrajectoryTable
from trajstore.schema import Column
from trajstore.stored import Array, to_user

_CHUNK_BYTES = 16 << 20  # of input columns that a thread has in memory, but for one trajectory at least
_VARIABLE_ROW_BYTES = 64  # about; of texts and lists
_PER_STEP = ("terminated", "truncated", "is_first", "is_last", "step")


@dataclass(frozen=True, eq=False)
class Part:
    """The trajectories of one segment, in the order of their rows, each once.

    Attributes:
        entry: The segment.
        rows: ``(n,)`` int64, of the table.
    """

    entry: SegmentEntry
    rows: Array


def parts_of(table: TrajectoryTable, lacking: str | None) -> list[Part]:
    """Segments, each once, with the trajectories in them; those that lack a column, or all."""
    numbers: dict[str, int] = {}
    number_of = np.array([numbers.setdefault(entry.uuid, len(numbers)) for entry in table.segments], np.int64)
    segments = number_of[table.segment]
    order = np.lexsort((table.start, segments))
    first = np.ones(len(order), bool)  # the same trajectory may be in a version several times
    first[1:] = (np.diff(segments[order]) != 0) | (np.diff(table.start[order]) != 0)
    order = order[first]
    bounds = np.searchsorted(segments[order], np.arange(len(numbers) + 1))
    has = np.ones(len(numbers), bool)
    entries: list[SegmentEntry | None] = [None] * len(numbers)
    for number, entry in zip(number_of.tolist(), table.segments, strict=True):
        has[number] &= lacking is not None and lacking in entry.all_columns
        entries[number] = entries[number] or entry
    return [
        Part(entry, order[bounds[number] : bounds[number + 1]])
        for number, entry in enumerate(entries)
        if entry is not None and not has[number]
    ]


class Inputs:
    """What the function gets of each trajectory.

    Args:
        table: The trajectories.
        access: Reads columns.
        path: Of the new column.
        names: Columns, metadata fields and virtual columns; None for all columns of fixed shape that a segment has.
        parts: Trajectories that will be read.
    """

    def __init__(
        self,
        table: TrajectoryTable,
        access: StoreAccess,
        path: str,
        names: Sequence[str] | None,
        parts: Sequence[Part],
    ) -> None:
        self.table = table
        self._readers = access.readers
        self._path = path
        self._named: list[Column] | None = None
        self._per_trajectory: dict[str, Array] = {}
        if names is None:
            return
        if isinstance(names, str):
            raise SelectionError(f"columns={names!r}, expected a list of names: columns=[{names!r}]")
        schema = table.schema
        selection = Selection(table, np.concatenate([part.rows for part in parts]))
        known = np.zeros(len(table), np.int64)
        known[selection.rows] = np.arange(len(selection))
        self._named = []
        for name in names:
            if name in schema.metadata or (name in _PER_STEP and name not in schema):
                values = trajectory_values(name, selection)
                self._per_trajectory[name] = values[known] if len(values) else values
            else:
                self._named += schema.select(name)
        for column in self._named:
            lacking = selection.lacking(column)
            if lacking or column.path == path:
                raise SelectionError(
                    f"column {column.path!r} is lacking from {lacking} of {len(selection)} trajectories that "
                    f"{path!r} is to be computed for; leave it out of columns="
                )

    def columns(self, entry: SegmentEntry) -> list[Column]:
        """Columns that are read of a segment."""
        if self._named is not None:
            return self._named
        there = set(entry.all_columns) - {self._path}
        return [c for c in self.table.schema if c.path in there and not c.is_variable]

    def row_bytes(self, entry: SegmentEntry) -> int:
        """Bytes of one step, about."""
        return sum(_VARIABLE_ROW_BYTES if c.is_variable else c.row_bytes for c in self.columns(entry)) or 1

    def nbytes(self, part: Part) -> int:
        """Bytes of a segment's trajectories, about."""
        return int(self.table.length[part.rows].sum()) * self.row_bytes(part.entry)

    def chunks(self, part: Part) -> Iterator[Array]:
        """Neighbours of a segment that are read together: rows of the table."""
        starts = self.table.start[part.rows]
        ends = starts + self.table.length[part.rows]
        most = max(_CHUNK_BYTES // self.row_bytes(part.entry), 1)
        first = 0
        while first < len(starts):
            stop = max(int(np.searchsorted(ends, starts[first] + most, side="right")), first + 1)
            yield part.rows[first:stop]
            first = stop

    def read(self, entry: SegmentEntry, rows: Array) -> Iterator[dict[str, Any]]:
        """What the function gets of each of some neighbours, nested: ``[T, ...]`` or ``[T + 1, ...]``."""
        table = self.table
        reader = self._readers.open(entry, table.schema)
        blocks = []
        for column in self.columns(entry):
            starts = table.start[rows] + (table.ordinal[rows] if column.extra else 0)
            stops = starts + table.length[rows] + column.extra
            data = to_user(column, reader.read(column.path, RowRange(int(starts[0]), int(stops[-1]))))
            blocks.append((column.path, data, (starts - starts[0]).tolist(), (stops - starts[0]).tolist()))
        for i, row in enumerate(rows.tolist()):
            flat = {path: data[lo[i] : hi[i]] for path, data, lo, hi in blocks}
            length = int(table.length[row])
            for name, values in self._per_trajectory.items():
                flat[name] = _per_step(name, values[row] if len(values) else None, length)
            yield nest(flat)


def _per_step(name: str, value: Any, length: int) -> Array:
    """``(length,)``: a virtual column as loaders show it, or a metadata field."""
    steps: Array = np.arange(length)
    if name in ("step", "is_first"):
        return steps if name == "step" else np.equal(steps, 0)
    if name in ("is_last", "terminated", "truncated"):
        return np.equal(steps, length - 1) & (True if value is None else bool(value))
    out = np.empty(length, object if isinstance(value, str | bytes | None) else np.asarray(value).dtype)
    out[:] = value
    return out
