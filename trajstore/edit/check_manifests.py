"""Manifests held against the snapshots that name them, and against themselves.

Invariant: what a manifest says is believed only where its bytes are those that a snapshot names; each of its faults is told
once, however many versions share it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trajstore.errors import CorruptionError, TrajstoreError
from trajstore.format.manifest import (
    TABLE_FIELDS,
    Manifest,
    SegmentEntry,
    decode_manifest,
    parquet_footer,
    table_schema,
)
from trajstore.format.pages import checksum
from trajstore.format.schemas import validate
from trajstore.format.snapshot import ManifestEntry
from trajstore.schema import Schema
from trajstore.stored import Array

_SEGMENTS_KEY = b"trajstore.segments"
_UNREADABLE = (pa.ArrowException, TrajstoreError, OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(eq=False)
class ManifestIndex:
    """What is kept of a manifest while versions name it: 20 bytes per row.

    Attributes:
        segments: That it names.
        segment: ``(rows,)`` int32, of each row.
        ids: ``(rows,)`` int64; None if they are ``first_id + row``.
        steps: ``(rows + 1,)`` int64, of all rows before each.
    """

    segments: tuple[SegmentEntry, ...]
    segment: Array
    ids: Array | None
    steps: Array

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.segment)

    def id_range(self, entry: ManifestEntry, live: Array) -> tuple[int, int] | None:
        """First and last id of the live rows ``(rows,)`` bool; None if there are none."""
        rows = np.flatnonzero(live)
        if not len(rows):
            return None
        first, last = int(rows[0]), int(rows[-1])
        if self.ids is None:
            return entry.first_id + first, entry.first_id + last
        return int(self.ids[first]), int(self.ids[last])

    def live_steps(self, live: Array) -> int:
        """Steps of the live rows."""
        return int(np.diff(self.steps)[live].sum())

    def live_segments(self, live: Array) -> list[SegmentEntry]:
        """Segments of the live rows."""
        return [self.segments[n] for n in np.unique(self.segment[live]).tolist()]


def check_bytes(entry: ManifestEntry, data: bytes) -> str | None:
    """What is wrong with a manifest's bytes, or None."""
    wrong = []
    if len(data) != entry.nbytes:
        wrong.append(f"{len(data)} bytes instead of {entry.nbytes}")
    found = checksum(data)
    if found != entry.crc32c:
        wrong.append(f"crc32c {found} instead of {entry.crc32c}")
    if hashlib.sha256(parquet_footer(data)).hexdigest() != entry.footer_sha256:
        wrong.append("another footer than the one whose sha256 is named")
    if not wrong:
        return None
    return f"it has {', '.join(wrong)}; restore it from a copy, or restore a version that does not name it"


def read_index(entry: ManifestEntry, data: bytes, schema: Schema) -> tuple[ManifestIndex | None, list[str]]:
    """What to keep of a manifest whose bytes are right, and what its writer did wrong.

    Args:
        entry: The snapshot's entry.
        data: The file.
        schema: Of a version that names it.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        table = file.read()
        described = json.loads(file.schema_arrow.metadata[_SEGMENTS_KEY])
        if table.num_rows:
            validate(described, "segment-table")
        manifest = decode_manifest(entry, data)
    except _UNREADABLE as error:
        text = str(error) if isinstance(error, CorruptionError) else repr(error)
        return None, [f"it cannot be read ({text}); restore it from a copy"]
    problems = list(_fields(table, schema))
    if table.num_rows != entry.rows:
        problems.append(f"it has {table.num_rows} rows, the snapshot says {entry.rows}; restore it from a copy")
    if problems:
        return None, problems
    problems = list(_rows(manifest))
    if problems:
        return None, problems
    ids = manifest.table["id"].combine_chunks()
    lengths = manifest.table["length"].to_numpy()
    index = ManifestIndex(
        manifest.segments,
        manifest.table["segment"].to_numpy().astype(np.int32),
        None if ids.null_count else ids.to_numpy(),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    return index, []


def _fields(table: pa.Table, schema: Schema) -> Iterator[str]:
    known = {field.name: field for field in table_schema(schema.metadata)}
    for field in TABLE_FIELDS:
        if field.name not in table.column_names:
            yield f"it has no column {field.name!r}; restore it from a copy"
    for field in table.schema:
        if field.name not in known:
            yield f"its column {field.name!r} is no field of the snapshot's schema; restore it from a copy"
        elif field.type != known[field.name].type:
            yield f"its column {field.name!r} is {field.type}, expected {known[field.name].type}; restore it from a copy"
        elif not known[field.name].nullable and table[field.name].null_count:
            yield f"its column {field.name!r} has nulls; restore it from a copy"


def _rows(manifest: Manifest) -> Iterator[str]:
    """What the rows say against themselves and the segment table: the first row that breaks each rule."""
    table = manifest.table
    segment, start, ordinal, length = (
        table[name].to_numpy().astype(np.int64) for name in ("segment", "start", "ordinal", "length")
    )
    ids = table["id"].combine_chunks()
    if 0 < ids.null_count < len(ids):
        yield f"{ids.null_count} of {len(ids)} ids are null, expected all or none; restore it from a copy"
    elif not ids.null_count:
        yield from _first(np.diff(ids.to_numpy(), prepend=-1) <= 0, "its id is not above the one before")
    outside = (segment < 0) | (segment >= len(manifest.segments))
    yield from _first(outside, f"its segment is not one of the {len(manifest.segments)} named")
    if outside.any() or not len(segment):
        return
    steps = np.array([s.steps for s in manifest.segments], np.int64)[segment]
    trajectories = np.array([s.trajectories for s in manifest.segments], np.int64)[segment]
    wrong = (start < 0) | (length < 1) | (start + length > steps)
    yield from _first(wrong, "its steps are not within its segment")
    yield from _first((ordinal < 0) | (ordinal >= trajectories) | (ordinal > start), "its ordinal cannot be")
    yield from _overlaps(segment, start, ordinal, length)


def _overlaps(segment: Array, start: Array, ordinal: Array, length: Array) -> Iterator[str]:
    """Trajectories that share rows. The same one may be there several times: stores may be merged with themselves."""
    order = np.lexsort((ordinal, start, segment))
    segment, start, ordinal, length = (values[order] for values in (segment, start, ordinal, length))
    neighbours = segment[1:] == segment[:-1]
    same = neighbours & (start[1:] == start[:-1]) & (length[1:] == length[:-1]) & (ordinal[1:] == ordinal[:-1])
    gap = start[1:] - (start + length)[:-1]
    between = np.diff(ordinal) - 1  # trajectories that lie in the gap, of a step each at least
    wrong = np.zeros(len(order), bool)
    wrong[order[1:]] = neighbours & ~same & (gap < 0)
    yield from _first(wrong, "its steps are another trajectory's too")
    wrong[order[1:]] = neighbours & ~same & (gap >= 0) & ((between < 0) | (between > gap))
    yield from _first(wrong, "its ordinal does not follow that of the trajectory before it in its segment")


def _first(wrong: Array, what: str) -> Iterator[str]:
    rows = np.flatnonzero(wrong)
    if len(rows):
        more = f" (and {len(rows) - 1} rows more)" if len(rows) > 1 else ""
        yield f"row {rows[0]}: {what}{more}; restore it from a copy"
