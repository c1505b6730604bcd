"""Manifests: an immutable Parquet table, one row per trajectory, and the segments that it names.

Invariant: a manifest never changes. A fresh one has null ids, meaning ``first_id + row`` with the ``first_id`` of the
snapshot's entry, so losing a race changes the snapshot only; a merged one has its ids written out.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trajstore.errors import CorruptionError, MetadataError
from trajstore.format.pages import checksum
from trajstore.format.snapshot import ManifestEntry
from trajstore.stored import Array

_SEGMENTS_KEY = b"trajstore.segments"
_ROWS_PER_GROUP = 1 << 18
_SMALL_ROWS = 1024
_DECODED_BY_ONE = 1 << 20  # bytes; of fewer, threads take longer
_DISTINCT = ("uuid", "episode", "start", "reward_sum", "created_at")  # a dictionary of these would repeat them

# Table columns, in this order, before the user's metadata fields.
TABLE_FIELDS = (
    pa.field("uuid", pa.binary(16), nullable=False),
    pa.field("id", pa.int64()),  # null: first_id + row
    pa.field("segment", pa.int32(), nullable=False),  # number in the manifest's segment table
    pa.field("start", pa.int64(), nullable=False),  # first row of the trajectory in its segment
    pa.field("ordinal", pa.int64(), nullable=False),  # trajectories before it: a state's row is start + ordinal + step
    pa.field("length", pa.int64(), nullable=False),  # steps
    pa.field("episode", pa.binary(16)),  # null: the trajectory is the whole episode
    pa.field("first_step", pa.int64(), nullable=False),  # of the episode; 0 for a whole one
    pa.field("terminated", pa.bool_(), nullable=False),
    pa.field("truncated", pa.bool_(), nullable=False),
    pa.field("reward_sum", pa.float64()),  # null without a scalar numeric column "reward"
    pa.field("created_at", pa.timestamp("us", tz="UTC"), nullable=False),
)
INDEX_FIELDS = ("id", "segment", "start", "ordinal", "length")
_METADATA_ARROW = {
    "bool": pa.bool_(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "string": pa.string(),
    "bytes": pa.binary(),
    "timestamp": pa.timestamp("us", tz="UTC"),
}


@dataclass(frozen=True)
class SegmentEntry:
    """A segment as a manifest names it, with the layers that add derived columns to it.

    A layer is a segment of the same rows, in this store or in another; it has no layers itself, and a column is in one of
    them at most.
    """

    uuid: str
    steps: int
    trajectories: int
    nbytes: int  # stored bytes of all its objects
    columns: tuple[str, ...]
    zarr_sha256: str
    pages_sha256: str
    base: int | None = None  # None: this store; else the number of one of the snapshot's bases
    layers: tuple[SegmentEntry, ...] = ()

    @property
    def parts(self) -> tuple[SegmentEntry, ...]:
        """The segment itself and its layers."""
        return (self, *self.layers)

    @property
    def is_own(self) -> bool:
        """Whether it and all its layers lie in this store."""
        return all(part.base is None for part in self.parts)

    @property
    def all_columns(self) -> tuple[str, ...]:
        """Its columns and those of its layers."""
        return tuple(path for part in self.parts for path in part.columns) if self.layers else self.columns

    @property
    def total_bytes(self) -> int:
        """Stored bytes of it and its layers."""
        return sum(part.nbytes for part in self.parts)

    @property
    def key(self) -> tuple[str, ...]:
        """Tells it from the same segment with other layers."""
        return tuple(part.uuid for part in self.parts) if self.layers else (self.uuid,)

    def with_layer(self, layer: SegmentEntry) -> SegmentEntry:
        """With one layer more, in the place of those that have the same columns."""
        kept = tuple(other for other in self.layers if not set(other.columns) & set(layer.columns))
        return replace(self, layers=(*kept, layer))


@dataclass(frozen=True)
class TrajectoryRow:
    """One trajectory, where it lies and what is known about it."""

    uuid: bytes
    segment: str
    start: int
    ordinal: int
    length: int
    terminated: bool
    truncated: bool
    reward_sum: float | None
    created_at: dt.datetime
    metadata: Mapping[str, Any]
    episode: bytes | None = None
    first_step: int = 0


@dataclass(frozen=True, eq=False)
class Manifest:
    """A manifest read back: its rows as an Arrow table, and its segments."""

    table: pa.Table
    segments: tuple[SegmentEntry, ...]


def build_table(rows: Sequence[TrajectoryRow], segments: Sequence[SegmentEntry], fields: Mapping[str, str]) -> Manifest:
    """A fresh manifest.

    Args:
        rows: In the order of their future ids.
        segments: Every segment that a row names.
        fields: Metadata field -> type, of the schema.
    """
    number = {segment.uuid: n for n, segment in enumerate(segments)}
    columns: dict[str, list[Any]] = {
        "uuid": [r.uuid for r in rows],
        "id": [None] * len(rows),
        "segment": [number[r.segment] for r in rows],
        "start": [r.start for r in rows],
        "ordinal": [r.ordinal for r in rows],
        "length": [r.length for r in rows],
        "episode": [r.episode for r in rows],
        "first_step": [r.first_step for r in rows],
        "terminated": [r.terminated for r in rows],
        "truncated": [r.truncated for r in rows],
        "reward_sum": [r.reward_sum for r in rows],
        "created_at": [r.created_at for r in rows],
    }
    arrays = [pa.array(columns[f.name], f.type) for f in TABLE_FIELDS]
    arrays += [pa.array([r.metadata.get(name) for r in rows], _METADATA_ARROW[kind]) for name, kind in fields.items()]
    return Manifest(pa.Table.from_arrays(arrays, schema=table_schema(fields)), tuple(segments))


def table_schema(fields: Mapping[str, str]) -> pa.Schema:
    """The Arrow schema of the trajectory table with these metadata fields."""
    metadata = [pa.field(name, _METADATA_ARROW[kind]) for name, kind in fields.items()]
    return pa.schema([*TABLE_FIELDS, *metadata])


def merge_manifests(parts: Sequence[tuple[ManifestEntry, Manifest]], fields: Mapping[str, str]) -> Manifest:
    """Several committed manifests as one, ids written out, deleted rows dropped, in the same order."""
    tables = []
    segments: list[SegmentEntry] = []
    numbers: dict[tuple[str, int | None, tuple[SegmentEntry, ...]], int] = {}
    for entry, manifest in parts:
        table = live_rows(entry, manifest.table, table_schema(fields))
        renumber = np.empty(len(manifest.segments), np.int32)
        for n in np.unique(table["segment"].to_numpy()).tolist():  # of some segments, all trajectories may be deleted
            segment = manifest.segments[n]
            renumber[n] = numbers.setdefault((segment.uuid, segment.base, segment.layers), len(segments))
            if renumber[n] == len(segments):
                segments.append(segment)
        where = table.schema.get_field_index("segment")
        renumbered = pa.array(renumber[table["segment"].to_numpy()])
        tables.append(table.set_column(where, TABLE_FIELDS[where], renumbered))
    return Manifest(pa.concat_tables(tables).combine_chunks(), tuple(segments))


def live_rows(entry: ManifestEntry, table: pa.Table, schema: pa.Schema | None = None) -> pa.Table:
    """The rows of a manifest that its snapshot holds: ids filled in, deleted rows left out.

    Args:
        entry: The snapshot's entry of the manifest.
        table: All or some of the manifest's columns.
        schema: Also bring the table to this schema: metadata fields that the manifest lacks become null.
    """
    if "id" in table.column_names:
        where = table.schema.get_field_index("id")
        ids = table["id"].combine_chunks()
        if ids.null_count:
            ids = pa.array(np.arange(entry.first_id, entry.first_id + table.num_rows, dtype=np.int64))
        table = table.set_column(where, TABLE_FIELDS[1], ids)
    if entry.deleted:
        table = table.filter(pa.array(live_mask(entry)))
    if schema is None:
        return table
    known = set(table.column_names)
    return pa.Table.from_arrays(
        [as_type(table[f.name], f.type) if f.name in known else pa.nulls(table.num_rows, f.type) for f in schema],
        schema=schema,
    )


def as_type(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """The column cast to a type, or itself if it has that already (Arrow would look at each of its chunks)."""
    return column if column.type == kind else column.cast(kind)


def live_mask(entry: ManifestEntry) -> Array:
    """``(rows,)`` bool: the rows of a manifest that its snapshot holds."""
    live = np.ones(entry.rows, bool)
    for lo, hi in entry.deleted:
        live[lo:hi] = False
    return live


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of the Parquet file, with page checksums and the segment table in its key-value metadata."""
    segments = json.dumps(_segment_table(manifest.segments), separators=(",", ":")).encode()
    table = manifest.table.replace_schema_metadata({_SEGMENTS_KEY: segments})
    small = table.num_rows < _SMALL_ROWS
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        # A compressor per column takes longer to set up than a small manifest takes to write.
        compression="none" if small else "zstd",
        use_dictionary=[] if small else [f.name for f in table.schema if f.name not in _DISTINCT],
        write_statistics=not small,
        write_page_checksum=True,
        row_group_size=_ROWS_PER_GROUP,
        store_schema=True,
    )
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def manifest_entry(path: str, data: bytes, manifest: Manifest, first_id: int) -> ManifestEntry:
    """How a snapshot names a manifest just encoded."""
    lengths = manifest.table["length"]
    return ManifestEntry(
        path=path,
        footer_sha256=hashlib.sha256(parquet_footer(data)).hexdigest(),
        crc32c=checksum(data),
        nbytes=len(data),
        rows=manifest.table.num_rows,
        first_id=first_id,
        trajectories=manifest.table.num_rows,
        steps=int(np.sum(lengths.to_numpy())),
    )


def parquet_footer(data: bytes) -> bytes:
    """Footer, footer length and magic of a Parquet file (apache/parquet-format, "File format")."""
    size = int.from_bytes(data[-8:-4], "little") + 8
    return data[-size:]


def most_rows(data: bytes) -> int:
    """How many rows a manifest has of which nothing is known; if it is damaged, how many it can have had."""
    try:
        return int(pq.read_metadata(pa.BufferReader(data)).num_rows)
    except (pa.ArrowException, OSError):
        return len(data)


def decode_manifest(entry: ManifestEntry, data: bytes, columns: Iterable[str] | None = None) -> Manifest:
    """Read a whole manifest file.

    Args:
        entry: The snapshot's entry.
        data: The file.
        columns: Only these columns; all if None.

    Raises:
        CorruptionError: Size or checksum differ from the snapshot's, or a layer is not there.
    """
    if len(data) != entry.nbytes or checksum(data) != entry.crc32c:
        raise CorruptionError(
            f"{entry.path} does not match the size and crc32c that its snapshot names; restore it from a copy"
        )
    # The whole file is verified: checking page checksums once more would only cost time.
    file = pq.ParquetFile(pa.BufferReader(data))
    schema = file.schema_arrow
    known = set(schema.names)
    wanted = None if columns is None else [c for c in columns if c in known]
    table = file.read(wanted, use_threads=len(data) > _DECODED_BY_ONE)
    described = json.loads(schema.metadata[_SEGMENTS_KEY])
    return Manifest(table.replace_schema_metadata(None), _segments_of(described, entry.path))


def _segment_table(segments: Sequence[SegmentEntry]) -> dict[str, Any]:
    """Segments share a few sets of columns: each set is written once. Layers come after the segments that rows name."""
    sets: dict[tuple[str, ...], int] = {}
    layers = dict.fromkeys(layer for segment in segments for layer in segment.layers)
    rows = [
        {
            **vars(s),
            "columns": sets.setdefault(s.columns, len(sets)),
            "layers": [layer.uuid for layer in s.layers],
        }
        for s in (*segments, *layers)
    ]
    return {"column_sets": [list(names) for names in sets], "segments": rows}


def _segments_of(described: Mapping[str, Any], path: str) -> tuple[SegmentEntry, ...]:
    """The inverse of ``_segment_table``: the segments that rows name, with their layers."""
    sets = [tuple(names) for names in described["column_sets"]]
    rows = described["segments"]
    entries = [SegmentEntry(**{**row, "columns": sets[row["columns"]], "layers": ()}) for row in rows]
    layered = {name for row in rows for name in row["layers"]}
    if not layered:
        return tuple(entries)
    by_uuid = {entry.uuid: entry for entry in entries if entry.uuid in layered}
    found = []
    for entry, row in zip(entries, rows, strict=True):
        if entry.uuid not in layered:
            found.append(replace(entry, layers=tuple(_layer(entry, name, by_uuid, path) for name in row["layers"])))
    if any(entry.uuid in layered for entry in entries[: len(found)]):
        raise CorruptionError(f"{path}: layers stand before segments that rows name; restore it from a copy")
    return tuple(found)


def _layer(entry: SegmentEntry, name: str, by_uuid: Mapping[str, SegmentEntry], path: str) -> SegmentEntry:
    layer = by_uuid.get(name)
    if layer is None:
        raise CorruptionError(
            f"{path} names {name} as a layer of segment {entry.uuid} and does not describe it; restore it from a copy"
        )
    if (layer.steps, layer.trajectories) != (entry.steps, entry.trajectories):
        raise CorruptionError(
            f"{path}: layer {name} has {layer.steps} steps of {layer.trajectories} trajectories, its segment {entry.uuid} "
            f"has {entry.steps} of {entry.trajectories}; restore it from a copy"
        )
    return layer


def metadata_type(name: str, value: Any) -> tuple[str, Any]:
    """The type of a metadata value, and the value as it is stored.

    Raises:
        MetadataError: Not a bool, number, string, bytes or datetime.
    """
    if isinstance(value, np.generic):
        value = value.item() if not isinstance(value, np.datetime64) else value.astype("datetime64[us]").item()
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise MetadataError(f"metadata field {name!r}: {value} does not fit int64; pass it as a string")
        return "int64", value
    if isinstance(value, float):
        return "float64", value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise MetadataError(f"metadata field {name!r} holds text that UTF-8 cannot") from None
        return "string", value
    if isinstance(value, bytes):
        return "bytes", value
    if isinstance(value, dt.datetime):
        return "timestamp", value if value.tzinfo else value.replace(tzinfo=dt.UTC)
    raise MetadataError(
        f"metadata field {name!r} is a {type(value).__name__}; expected a bool, number, string, bytes or datetime "
        "(write anything else as JSON text)"
    )


def check_metadata(values: Mapping[str, Any], known: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Metadata as stored, and the fields that it adds to the known ones.

    Raises:
        MetadataError: A value that does not fit its field's type.
    """
    stored: dict[str, Any] = {}
    added: dict[str, str] = {}
    for name, value in values.items():
        if value is None:
            continue
        kind, plain = metadata_type(name, value)
        wanted = known.get(name)
        if wanted is None:
            added[name] = kind
        elif wanted == "float64" and kind == "int64" and float(plain) == plain:
            plain = float(plain)
        elif wanted != kind:
            raise MetadataError(
                f"metadata field {name!r} is {wanted} in this store, found {kind} {value!r}; convert it or use another name"
            )
        stored[name] = plain
    return stored, added
