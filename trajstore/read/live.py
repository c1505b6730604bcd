"""Trajectories that were appended through this handle and are not yet committed, readable at once.

Invariant: a trajectory is in the table only when all of its rows are in memory, and they stay there, in pages that nothing
evicts, until its commit; afterwards the pages are like any other, under the same segment, and need not be read back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from trajstore.errors import CacheTooSmallError, SchemaConflictError, UnknownColumnError
from trajstore.format.manifest import SegmentEntry, TrajectoryRow
from trajstore.format.pages import PageSource, arrow_type
from trajstore.read.arena import Need, group_name
from trajstore.read.cache import PageCache
from trajstore.read.leases import Reservation
from trajstore.read.pinning import PinnedRows
from trajstore.read.segment import RowRange, SegmentReaders
from trajstore.read.table import Growth, TrajectoryTable
from trajstore.schema import Column, Schema
from trajstore.storage.commit import Version
from trajstore.stored import Array, Stored

_UNKNOWN = 1 << 60  # steps of a segment that still grows


class LiveSegment:
    """A segment that is still being written, with the face of a ``SegmentReader``.

    Args:
        uuid: Of the segment, now and once committed.
        columns: That its trajectories have.
        page_rows: Rows per page of each group of columns.
        cache: Holds its pages.
        readers: Open it once it is committed.
    """

    def __init__(
        self,
        uuid: str,
        columns: Sequence[Column],
        page_rows: Mapping[str, int],
        cache: PageCache,
        readers: SegmentReaders,
    ) -> None:
        self.entry = SegmentEntry(uuid, _UNKNOWN, _UNKNOWN, 0, tuple(c.path for c in columns), "", "")
        self.by_group: dict[str, PageSource] = {}
        self.number = int(cache.number_segments([self.entry])[0])
        self.rows = {c.path: 0 for c in columns}
        self.closed = False  # there was no room for a trajectory: what follows it is not shown either
        self._columns = {c.path: c for c in columns}
        self._page_rows = page_rows
        self._pins = PinnedRows(cache)
        self._readers = readers
        self._schema = Schema(tuple(columns))
        self._variable: dict[str, list[pa.Array]] = {c.path: [] for c in columns if c.is_variable}
        self._final: SegmentEntry | None = None
        self._lock = threading.Lock()  # of the variable columns, which one thread adds to and another joins

    def page_rows_of(self, name: str) -> int:
        """Rows per page of a group of columns."""
        return self._page_rows.get(name, 1)

    def add(self, columns: Mapping[str, Stored]) -> bool:
        """Keep rows of one trajectory; False if there is no room for them."""
        groups: dict[str, dict[str, Array]] = {}
        for path, data in columns.items():
            column = self._columns[path]
            if column.is_variable:
                with self._lock:
                    self._variable[path].append(data)
            else:
                rows = (
                    np.ascontiguousarray(data)
                    .reshape(len(data), -1)
                    .view(np.uint8)
                    .reshape(len(data), column.row_bytes)
                )
                groups.setdefault(group_name(column), {})[path] = rows
        for name, parts in groups.items():
            first = self.rows[next(iter(parts))]
            if not self._pins.add(self.number, name, first, parts, page_rows=self._page_rows[name]):
                self.closed = True
                return False
        for path, data in columns.items():
            self.rows[path] += len(data)
        return True

    def settle(self, entry: SegmentEntry) -> None:
        """It is committed."""
        rows = {group_name(self._columns[path]): count for path, count in self.rows.items()}
        complete = not self.closed and entry.steps == max(
            (n for path, n in self.rows.items() if not self._columns[path].extra), default=0
        )
        self._pins.release(self.number, entry, rows if complete else None)
        self._final = entry

    def drop(self) -> None:
        """It will never be committed."""
        self._pins.release(self.number, self.entry, None)

    def read(self, path: str, rows: RowRange, out: Array | None = None) -> Stored:
        """As ``SegmentReader.read``."""
        if path not in self._columns:
            raise UnknownColumnError(
                f"segment {self.entry.uuid} has no column {path!r}: its trajectories were appended without it"
            )
        column = self._columns[path]
        if column.is_variable:
            return self.variable_page(path)[rows.start : rows.stop]
        if out is None:
            out = np.empty((rows.stop - rows.start, *column.shape), column.physical_dtype)
        flat = out.reshape(len(out), -1).view(np.uint8).reshape(len(out), column.row_bytes)
        if not len(out) or self._pins.copy(self.number, group_name(column), path, rows.start, flat):
            return out
        assert self._final is not None  # pages of a segment that is not committed are never evicted
        return self._readers.open(self._final, self._schema).read(path, rows, out)

    def variable_page(self, path: str) -> pa.Array:
        """All rows of a column of strings or lists."""
        with self._lock:
            parts = self._variable[path]
            if len(parts) > 1:
                parts[:] = [pa.concat_arrays(parts)]
            return parts[0] if parts else pa.array([], arrow_type(self._columns[path]))


class LiveTrajectories:
    """The trajectory table of a handle that also appends. Used by several threads.

    Args:
        table_of: Makes the table of a version.
        version: The latest that the handle knows.
        cache: Holds pages of what is not committed.
        readers: Learn of segments that are not committed.
    """

    def __init__(
        self,
        table_of: Callable[[Version], TrajectoryTable],
        version: Version,
        cache: PageCache,
        readers: SegmentReaders,
    ) -> None:
        self._table_of = table_of
        self.cache = cache
        self._readers = readers
        self._lock = threading.RLock()
        self._version = version  # that the next table is to show
        self._schema = version.snapshot.schema
        self._growth = Growth(table_of(version))
        self._segments: dict[str, LiveSegment] = {}
        self._reservation: Reservation | None = None

    def table(self) -> TrajectoryTable:
        """Everything committed as far as this handle knows, and everything that it appended since."""
        with self._lock:
            if self._growth.base.version.number != self._version.number:
                base = self._table_of(self._version)
                for entry in base.segments:  # it may show a batch whose commit is about to be told
                    self._settle(entry)
                waiting = [row for row in self._growth.rows if row.segment in self._segments]
                grown = Growth(base)
                for row in waiting:
                    grown.add(row, self._segments[row.segment].entry)
                self._growth = grown
            return self._growth.table(self._schema)

    def appended(
        self,
        rows: Sequence[TrajectoryRow],
        columns: Mapping[str, Stored],
        page_rows: Mapping[str, int],
        schema: Schema,
    ) -> bool:
        """Show trajectories; False if there is no room for them, so that they can be shown only once they are committed.

        Args:
            rows: The trajectories, neighbours in one segment.
            columns: Their rows, end to end.
            page_rows: Rows per page of each group of columns of their segment.
            schema: Of the store, with what these trajectories add.
        """
        with self._lock:
            self._schema = schema
            if not self.cache.admits(schema):
                return False
            segment = self._segments.get(rows[0].segment)
            if segment is None:
                present = [schema[path] for path in columns]
                try:
                    self._reserve(schema, page_rows)
                except CacheTooSmallError:
                    return False
                segment = LiveSegment(rows[0].segment, present, page_rows, self.cache, self._readers)
                self._segments[rows[0].segment] = segment
                self._readers.add_live(segment)
            if segment.closed or not segment.add(columns):
                return False
            for row in rows:
                self._growth.add(row, segment.entry)
            return True

    def committed(self, version: Version, entries: Sequence[SegmentEntry], ids: Mapping[bytes, int]) -> None:
        """A batch has landed.

        Args:
            version: That shows it.
            entries: Its segments.
            ids: Numbers of its trajectories, by uuid.
        """
        with self._lock:
            self._growth.know_ids(ids)
            for entry in entries:
                self._settle(entry)
            self.advance(version)

    def lost(self, segments: Sequence[str]) -> None:
        """A batch could not be committed: its trajectories leave later tables."""
        with self._lock:
            gone = [self._segments.pop(uuid) for uuid in segments if uuid in self._segments]
            for segment in gone:
                segment.drop()
                self._readers.remove_live(segment.entry.uuid)
            kept = [row for row in self._growth.rows if row.segment in self._segments]
            self._growth = Growth(self._growth.base)
            for row in kept:
                self._growth.add(row, self._segments[row.segment].entry)

    def advance(self, version: Version) -> None:
        """The store has a newer version."""
        with self._lock:
            if version.number > self._version.number:
                self._version = version
                committed = version.snapshot.schema
                try:
                    self._schema = committed.extended_by(self._schema) if self._segments else committed
                except SchemaConflictError:  # others have cleared the store: what waits will not be committed
                    self._schema = committed

    def _settle(self, entry: SegmentEntry) -> None:
        entry = replace(entry, layers=()) if entry.layers else entry  # which have come since, and are read beside it
        segment = self._segments.pop(entry.uuid, None)
        if segment is not None:
            self._growth.know_segment(entry)
            segment.settle(entry)
            self._readers.remove_live(entry.uuid)

    def _reserve(self, schema: Schema, page_rows: Mapping[str, int]) -> None:
        groups: dict[str, list[Column]] = {}
        for column in schema:
            if not column.is_variable and group_name(column) in page_rows:
                groups.setdefault(group_name(column), []).append(column)
        # How much will come is not known: equally many rows for all.
        rows = self.cache.nbytes // max(sum(c.row_bytes for columns in groups.values() for c in columns), 1)
        needs: dict[str, Any] = {name: Need(tuple(columns), 1, rows) for name, columns in groups.items()}
        before = self._reservation
        self._reservation = self.cache.reserve(needs, np.empty(0, np.int64), schema, page_rows=page_rows)
        if before is not None:
            before.release()
