"""The trajectory table of one version: where every trajectory lies, as index arrays, and what is known of it, on demand.

Invariant: rows are in id order, deleted ones left out. Only the index columns are held; everything else is read again from
the manifests when somebody asks, so opening a million trajectories costs little more than reading their index.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from trajstore.format.manifest import (
    INDEX_FIELDS,
    Manifest,
    SegmentEntry,
    TrajectoryRow,
    build_table,
    live_rows,
    table_schema,
)
from trajstore.schema import Schema
from trajstore.storage.commit import History, Version
from trajstore.stored import Array


class TrajectoryTable:
    """All trajectories of a version, and those that were appended to it and are not yet committed.

    Args:
        history: The store's versions.
        version: The version.
        whole: Hold every column from the beginning, for edits that copy rows: each manifest is read once.
    """

    def __init__(self, history: History, version: Version, *, whole: bool = False) -> None:
        self._history = history
        self.version = version
        self.schema = version.snapshot.schema
        self.growth: Growth | None = None
        parts = []
        self.segments: list[SegmentEntry] = []
        entries = version.snapshot.manifests
        manifests = history.read_manifests(entries, None if whole else INDEX_FIELDS)
        if whole:
            tables = self._live(manifests)
            self.full = self._joined_with_waiting(tables)
        else:
            tables = [live_rows(e, m.table.select(INDEX_FIELDS)) for e, m in zip(entries, manifests, strict=True)]
        for entry, manifest, table in zip(entries, manifests, tables, strict=True):
            arrays = {name: table[name].to_numpy() for name in INDEX_FIELDS}
            if entry.deleted:  # of some segments, nothing may be left
                used, arrays["segment"] = np.unique(arrays["segment"], return_inverse=True)
                manifest = replace(manifest, segments=tuple(manifest.segments[n] for n in used.tolist()))
            arrays["segment"] = arrays["segment"].astype(np.int32) + np.int32(len(self.segments))
            self.segments += manifest.segments
            parts.append(arrays)
        self.id = _joined(parts, "id", np.int64)  # (n,) int64; -1 while not committed
        self.segment = _joined(parts, "segment", np.int32)  # (n,) int32, number in self.segments
        self.start = _joined(parts, "start", np.int64)  # (n,) int64, rows
        self.ordinal = _joined(parts, "ordinal", np.int64)  # (n,) int64, trajectories before it in its segment
        self.length = _joined(parts, "length", np.int64)  # (n,) int64, steps

    def __len__(self) -> int:
        return len(self.id)

    @cached_property
    def full(self) -> pa.Table:
        """Every column of the table, metadata fields included; read on first use."""
        return self._joined_with_waiting(self._live(self._history.read_manifests(self.version.snapshot.manifests)))

    def _live(self, manifests: Sequence[Manifest]) -> list[pa.Table]:
        """Every column of the rows of each manifest that are in the version."""
        schema = table_schema(self.schema.metadata)
        entries = self.version.snapshot.manifests
        return [live_rows(e, m.table, schema) for e, m in zip(entries, manifests, strict=True)]

    def _joined_with_waiting(self, tables: list[pa.Table]) -> pa.Table:
        schema = table_schema(self.schema.metadata)
        waiting = self._waiting()
        if waiting:
            fresh = build_table(waiting, self.segments, self.schema.metadata).table
            ids = pa.array(self.id[len(self) - len(waiting) :])
            tables = [*tables, fresh.set_column(fresh.schema.get_field_index("id"), schema.field("id"), ids)]
        return pa.concat_tables(tables) if tables else schema.empty_table()

    @property
    def all_rows(self) -> Array:
        """``(n,)`` int64: every row."""
        if self.growth is not None:
            return self.growth.all_rows(len(self))
        return np.arange(len(self), dtype=np.int64)

    def flags(self, name: str, rows: Array) -> Array:
        """``"terminated"`` or ``"truncated"`` of some rows, ``(n,)`` bool; only this column is read."""
        fresh = self._fresh(rows)
        if fresh is not None:
            return np.array([getattr(row, name) for row in fresh], bool)
        entries = self.version.snapshot.manifests
        parts = [
            live_rows(entry, manifest.table.select([name]))[name].to_numpy()
            for entry, manifest in zip(entries, self._history.read_manifests(entries, [name]), strict=True)
        ]
        parts.append(np.array([getattr(row, name) for row in self._waiting()], bool))
        return np.concatenate(parts)[rows]

    def values(self, name: str, rows: Array) -> pa.Array:
        """A column or metadata field of some rows."""
        fresh = self._fresh(rows)
        if fresh is None or name not in self.schema.metadata:
            return self.full[name].take(rows).combine_chunks()
        kind = table_schema(self.schema.metadata).field(name).type
        return pa.array([row.metadata.get(name) for row in fresh], kind)

    @cached_property
    def column_presence(self) -> dict[str, Array]:
        """For each column that some segment lacks, which segments have it: ``(segments,)`` bool."""
        presence: dict[str, Array] = {}
        present = [segment.all_columns for segment in self.segments]
        for column in self.schema:
            have = np.fromiter((column.path in paths for paths in present), bool, len(present))
            if not have.all():
                presence[column.path] = have
        return presence

    def _fresh(self, rows: Array) -> list[TrajectoryRow] | None:
        """Rows that are not committed, if all of these are."""
        if self.growth is None or not len(rows) or int(rows.min()) < len(self.growth.base):
            return None
        return [self.growth.rows[row - len(self.growth.base)] for row in rows.tolist()]

    def _waiting(self) -> list[TrajectoryRow]:
        if self.growth is None:
            return []
        return self.growth.rows[: len(self) - len(self.growth.base)]


class Growth:
    """A table to which trajectories are added; tables taken before keep their rows, and learn ids of theirs with it.

    Args:
        base: What is committed.
    """

    def __init__(self, base: TrajectoryTable) -> None:
        self.base = base
        self.rows: list[TrajectoryRow] = []
        self.segments = list(base.segments)
        self._numbers: dict[str, int] = {}  # of segments added here
        self._places: dict[bytes, int] = {}  # of trajectories, by uuid
        self._arrays = {name: getattr(base, name) for name in INDEX_FIELDS}  # longer than what is in use
        self._former_ids: list[weakref.ref[Array]] = []  # of tables taken before there was more room
        self._used = len(base)
        self._all_rows = np.empty(0, np.int64)

    def add(self, row: TrajectoryRow, segment: SegmentEntry) -> None:
        """Add a trajectory at the end."""
        number = self._numbers.setdefault(segment.uuid, len(self.segments))
        if number == len(self.segments):
            self.segments.append(segment)
        if self._used == len(self._arrays["id"]):
            self._former_ids.append(weakref.ref(self._arrays["id"]))
            for name, array in self._arrays.items():
                room = np.zeros(max(64, len(array) // 8), array.dtype)
                self._arrays[name] = np.concatenate([array, room])
        for name, value in zip(INDEX_FIELDS, (-1, number, row.start, row.ordinal, row.length), strict=True):
            self._arrays[name][self._used] = value
        self._places[row.uuid] = self._used
        self._used += 1
        self.rows.append(row)

    def all_rows(self, count: int) -> Array:
        """``0 .. count - 1``, ``(count,)`` int64, of an array that is shared."""
        if len(self._all_rows) < count:
            self._all_rows = np.arange(len(self._arrays["id"]), dtype=np.int64)
        return self._all_rows[:count]

    def know_ids(self, ids: Mapping[bytes, int]) -> None:
        """Trajectories were committed: fill in their numbers."""
        self._former_ids = [former for former in self._former_ids if former() is not None]
        for uuid, number in ids.items():
            if uuid in self._places:
                for numbers in (self._arrays["id"], *(former() for former in self._former_ids)):
                    if numbers is not None and self._places[uuid] < len(numbers):
                        numbers[self._places[uuid]] = number

    def know_segment(self, entry: SegmentEntry) -> None:
        """A segment was committed."""
        if entry.uuid in self._numbers:
            self.segments[self._numbers[entry.uuid]] = entry

    def table(self, schema: Schema) -> TrajectoryTable:
        """Everything as it is now; costs nothing per trajectory."""
        table = copy.copy(self.base)
        for name in ("full", "column_presence"):
            table.__dict__.pop(name, None)
        table.growth, table.segments, table.schema = self, self.segments, schema
        for name, array in self._arrays.items():
            setattr(table, name, array[: self._used])
        return table


def _joined(parts: list[dict[str, Array]], name: str, dtype: type) -> Array:
    joined = np.concatenate([part[name] for part in parts]) if parts else np.empty(0)
    return joined.astype(dtype, copy=False)
