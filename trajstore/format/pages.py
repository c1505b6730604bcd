"""The page index of a segment (``pages.arrow``), and Arrow pages: one whole record-batch message each.

Invariant: everything needed to read any row of a segment with one ranged read per page run is in its page index (which
object, from where to where, which checksum, which codec, how many rows), so the metadata of Zarr and Arrow files is for
other readers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from trajstore.errors import CorruptionError
from trajstore.format.codecs import ARROW_CODECS, CODECS
from trajstore.schema import VARIABLE_DTYPES, Column
from trajstore.stored import Array, Stored

_METADATA_KEY = b"trajstore.sources"


@dataclass(frozen=True, eq=False)
class PageSource:
    """One object of a segment that holds pages: a shard of one column, or an Arrow file of several."""

    object: str  # name inside the segment
    columns: tuple[str, ...]
    rows: int
    page_rows: int  # of every page but the last
    codec: str
    offsets: Array  # (pages,) int64, bytes
    nbytes: Array  # (pages,) int64
    crc32c: Array  # (pages,) uint32, of the stored bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of all pages as stored."""
        return int(self.nbytes.sum())

    def rows_of_page(self, page: int) -> int:
        """Rows that a page holds; the last may hold fewer."""
        return min(self.page_rows, self.rows - page * self.page_rows)


def encode_page_index(sources: Sequence[PageSource]) -> bytes:
    """The bytes of ``pages.arrow``."""
    described = [
        {
            "object": s.object,
            "columns": list(s.columns),
            "rows": s.rows,
            "page_rows": s.page_rows,
            "codec": s.codec,
        }
        for s in sources
    ]
    counts = [len(s.offsets) for s in sources]
    table = pa.table(
        {
            "source": pa.array(np.repeat(np.arange(len(sources), dtype=np.int32), counts)),
            "offset": pa.array(np.concatenate([s.offsets for s in sources]).astype(np.int64)),
            "nbytes": pa.array(np.concatenate([s.nbytes for s in sources]).astype(np.int64)),
            "crc32c": pa.array(np.concatenate([s.crc32c for s in sources]).astype(np.uint32)),
        }
    ).replace_schema_metadata({_METADATA_KEY: json.dumps(described).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def decode_page_index(data: bytes) -> list[PageSource]:
    """The inverse of ``encode_page_index``.

    Raises:
        CorruptionError: Not a page index; the caller adds of which segment.
    """
    try:
        table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
        described = json.loads(table.schema.metadata[_METADATA_KEY])
        columns = {name: table[name].to_numpy() for name in ("source", "offset", "nbytes", "crc32c")}
        return [_page_source(fields, columns, columns["source"] == n) for n, fields in enumerate(described)]
    except CorruptionError:
        raise
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CorruptionError(f"the page index cannot be read: {error!r}") from error


def _page_source(fields: Mapping[str, Any], columns: Mapping[str, Array], mine: Array) -> PageSource:
    known = ARROW_CODECS if fields["object"].endswith(".arrow") else tuple(CODECS)
    if fields["codec"] not in known:
        raise CorruptionError(f"codec {fields['codec']!r} of {fields['object']} is not one of {', '.join(known)}")
    source = PageSource(
        fields["object"],
        tuple(fields["columns"]),
        fields["rows"],
        fields["page_rows"],
        fields["codec"],
        columns["offset"][mine],
        columns["nbytes"][mine],
        columns["crc32c"][mine],
    )
    if len(source.offsets) != -(-source.rows // source.page_rows):
        raise CorruptionError(f"{source.object} has {len(source.offsets)} pages for {source.rows} rows")
    return source


def checksum(stored: Any) -> int:
    """CRC-32C (RFC 3720) of a bytes-like object."""
    if not isinstance(stored, bytes):  # what the library takes: a copy of little, an array of much
        stored = bytes(stored) if len(stored) < 65536 else np.frombuffer(stored, np.uint8)
    return int(google_crc32c.value(stored))


def arrow_type(column: Column) -> pa.DataType:
    """The Arrow type in which a scalar, string or ragged column is stored."""
    element = _element_type(column)
    return pa.large_list(element) if column.ragged else element


def _element_type(column: Column) -> pa.DataType:
    if column.dtype in VARIABLE_DTYPES:
        return pa.large_string() if column.dtype == "string" else pa.large_binary()
    shape, dtype = column.shape, column.physical_dtype
    if dtype.kind == "c":
        shape, dtype = (*shape, 2), dtype.type(0).real.dtype
    element = pa.from_numpy_dtype(dtype)
    return pa.list_(element, int(np.prod(shape, dtype=np.int64))) if shape else element


def arrow_schema(columns: Sequence[Column]) -> pa.Schema:
    """The schema of an Arrow file of a segment."""
    return pa.schema([pa.field(c.path, arrow_type(c), nullable=False) for c in columns])


def ipc_options(codec: str) -> pa.ipc.IpcWriteOptions:
    """Write options for the body compression ``"none"``, ``"lz4"`` or ``"zstd"``.

    Arrow's own threads make a batch of three small buffers four times slower to write, and three times slower to read.
    """
    return pa.ipc.IpcWriteOptions(compression=None if codec == "none" else codec, use_threads=False)


def encode_record_batch(columns: Sequence[Column], rows: Mapping[str, Stored]) -> pa.RecordBatch:
    """One page of an Arrow file, before serialisation. Scalars come as NumPy, the rest as Arrow."""
    schema = arrow_schema(columns)
    arrays = []
    for field in schema:
        data = rows[field.name]
        arrays.append(pa.array(data, field.type) if isinstance(data, np.ndarray) else data)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def decode_record_batch(columns: tuple[Column, ...], stored: Any, *, codec: str) -> dict[str, Stored]:
    """The columns of one Arrow page: scalars as NumPy arrays, strings and lists as Arrow arrays.

    Args:
        columns: Of the file, in its order.
        stored: One record-batch message.
        codec: Body compression.

    Raises:
        CorruptionError: Not a record batch of these columns; the caller adds which page.
    """
    try:
        if codec == "none":
            batch = pa.ipc.read_record_batch(pa.py_buffer(stored), arrow_schema(columns))
        else:  # a stream takes options, read_record_batch does not
            source = pa.BufferReader(_schema_message(columns) + bytes(stored))
            options = pa.ipc.IpcReadOptions(use_threads=False)
            batch = pa.ipc.open_stream(source, options=options).read_next_batch()
        return {
            c.path: batch.column(i) if c.is_variable else batch.column(i).to_numpy(zero_copy_only=False)
            for i, c in enumerate(columns)
        }
    except (pa.ArrowException, OSError, EOFError, ValueError, StopIteration) as error:
        raise CorruptionError(f"it is not a record batch of {', '.join(c.path for c in columns)}: {error}") from error


@lru_cache(maxsize=256)
def _schema_message(columns: tuple[Column, ...]) -> bytes:
    return arrow_schema(columns).serialize().to_pybytes()  # type: ignore[no-any-return]
