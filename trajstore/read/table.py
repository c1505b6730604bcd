"""The trajectory table of one version: where every trajectory lies, as index arrays, and what is known of it, on demand.

Invariant: rows are in id order, deleted ones left out. Only the index columns are held; everything else is read again from
the manifests when somebody asks, so opening a million trajectories costs little more than reading their index.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow as pa

from trajstore.errors import UntrustedBaseError
from trajstore.format.manifest import INDEX_FIELDS, SegmentEntry, live_rows, table_schema
from trajstore.schema import Schema
from trajstore.storage.commit import History, Version
from trajstore.stored import Array


class TrajectoryTable:
    """All trajectories of a version."""

    def __init__(self, history: History, version: Version) -> None:
        self._history = history
        self.version = version
        parts = []
        self.segments: list[SegmentEntry] = []
        entries = version.snapshot.manifests
        for entry, manifest in zip(entries, history.read_manifests(entries, INDEX_FIELDS), strict=True):
            for segment in manifest.segments:
                if segment.base is not None:
                    base = version.snapshot.bases[segment.base]
                    raise UntrustedBaseError(
                        f"segment {segment.uuid} lies in another store, {base.url}, which this trajstore does not open; "
                        "upgrade trajstore, or make a self-contained copy of the store with the one that wrote it"
                    )
            table = live_rows(entry, manifest.table.select(INDEX_FIELDS))
            arrays = {name: table[name].to_numpy() for name in INDEX_FIELDS}
            arrays["segment"] = arrays["segment"].astype(np.int32) + np.int32(len(self.segments))
            self.segments += manifest.segments
            parts.append(arrays)
        self.id = _joined(parts, "id", np.int64)  # (n,) int64
        self.segment = _joined(parts, "segment", np.int32)  # (n,) int32, number in self.segments
        self.start = _joined(parts, "start", np.int64)  # (n,) int64, rows
        self.ordinal = _joined(parts, "ordinal", np.int64)  # (n,) int64, trajectories before it in its segment
        self.length = _joined(parts, "length", np.int64)  # (n,) int64, steps

    def __len__(self) -> int:
        return len(self.id)

    @property
    def schema(self) -> Schema:
        """Columns and metadata fields of the version."""
        return self.version.snapshot.schema

    def flags(self, name: str) -> Array:
        """``(n,)`` bool: ``"terminated"`` or ``"truncated"``; only this column is read."""
        entries = self.version.snapshot.manifests
        parts = [
            live_rows(entry, manifest.table.select([name]))[name].to_numpy()
            for entry, manifest in zip(entries, self._history.read_manifests(entries, [name]), strict=True)
        ]
        return np.concatenate(parts) if parts else np.empty(0, bool)

    @cached_property
    def full(self) -> pa.Table:
        """Every column of the table, metadata fields included; read on first use."""
        snapshot = self.version.snapshot
        schema = table_schema(snapshot.schema.metadata)
        manifests = self._history.read_manifests(snapshot.manifests)
        tables = [live_rows(e, m.table, schema) for e, m in zip(snapshot.manifests, manifests, strict=True)]
        return pa.concat_tables(tables) if tables else schema.empty_table()

    @cached_property
    def column_presence(self) -> dict[str, Array]:
        """For each column that some segment lacks, which segments have it: ``(segments,)`` bool."""
        presence: dict[str, Array] = {}
        for column in self.version.snapshot.schema:
            have = np.fromiter((column.path in s.columns for s in self.segments), bool, len(self.segments))
            if not have.all():
                presence[column.path] = have
        return presence


def _joined(parts: list[dict[str, Array]], name: str, dtype: type) -> Array:
    joined = np.concatenate([part[name] for part in parts]) if parts else np.empty(0)
    return joined.astype(dtype, copy=False)
