"""Rows of a segment, page by page.

Invariant: no byte is handed out unverified. The page index is held against the hash in the manifest, every page against its
checksum in the page index, and every error names the segment, the object and the page.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from trajstore.errors import CorruptionError, MissingObjectError, UnknownColumnError
from trajstore.format import layout
from trajstore.format.codecs import codec_named
from trajstore.format.manifest import SegmentEntry
from trajstore.format.pages import PageSource, checksum, decode_page_index, decode_record_batch
from trajstore.schema import Column, Schema
from trajstore.storage.filesystem import Buffer, ByteRange, Filesystem
from trajstore.storage.workers import Workers
from trajstore.stored import Array, Stored

_READ_AHEAD_BYTES = 32 * 1024 * 1024
# Decoding fewer bytes than this is not worth handing to another thread.
_PARALLEL_BYTES = 1 << 20
_RUN_BYTES = 8 << 20


@dataclass(frozen=True)
class RowRange:
    """Rows ``[start, stop)`` of a column of a segment."""

    start: int
    stop: int


class SegmentReader:
    """Reads columns of one segment.

    Args:
        entry: The segment as its manifest names it.
        schema: Of the store: dtypes and shapes of the columns.
        filesystem: Where the segment is.
        workers: Decode pages.
    """

    def __init__(self, entry: SegmentEntry, schema: Schema, filesystem: Filesystem, workers: Workers) -> None:
        self.entry = entry
        self._schema = schema
        self._filesystem = filesystem
        self._workers = workers
        key = layout.segment_key(entry.uuid, layout.PAGES_FILE)
        data = filesystem.read(key)
        if data is None:
            raise MissingObjectError(
                f"{key} in {filesystem.description} is not there, but a manifest names its segment; restore it from a copy"
            )
        if hashlib.sha256(data).hexdigest() != entry.pages_sha256:
            raise CorruptionError(
                f"{key} in {filesystem.description} does not match its manifest; restore it from a copy"
            )
        self.sources: dict[str, PageSource] = {}  # by column
        try:
            sources = decode_page_index(data)
        except CorruptionError as error:
            raise CorruptionError(f"{key} in {filesystem.description}: {error}") from error
        for source in sources:
            for path in source.columns:
                self.sources[path] = source

    def read(self, path: str, rows: RowRange, out: Array | None = None) -> Stored:
        """Rows of one column.

        Args:
            path: The column.
            rows: Of the column, so those of an ``extra=1`` column count the final observations.
            out: ``(rows, *shape)`` of the physical dtype, C-contiguous: filled and returned instead of a new array.

        Raises:
            UnknownColumnError: The segment lacks the column.
            CorruptionError: A page is not what was written.
        """
        source = self._source(path)
        if rows.start < 0 or rows.stop > source.rows:
            raise CorruptionError(f"{self._where(source)} has {source.rows} rows, its manifest says {rows.stop}")
        column = self._schema[path]
        if column.is_variable:
            return self._read_variable(source, path, rows)
        if out is None:
            out = np.empty((rows.stop - rows.start, *column.shape), column.physical_dtype)
        if rows.start == rows.stop:
            return out
        pages = range(rows.start // source.page_rows, -(-rows.stop // source.page_rows))
        if self._filesystem.overlaps_reads:
            for batch in _batches(source, pages, _READ_AHEAD_BYTES):
                stored = self._read_pages(source, batch)
                runs = self._runs(source, column, range(len(batch)))
                self._map(
                    lambda run, b=batch, d=stored: self._decode_run(  # type: ignore[misc]
                        source, column, rows, [b[i] for i in run], [d[i] for i in run], out
                    ),
                    runs,
                )
        else:
            runs = self._runs(source, column, pages)
            self._map(lambda run: self._decode_run(source, column, rows, run, self._read_pages(source, run), out), runs)
        return out

    def _runs(self, source: PageSource, column: Column, pages: range) -> list[range]:
        """Neighbours that one thread reads and decodes together."""
        page_bytes = source.page_rows * column.row_bytes
        if len(pages) * page_bytes < _PARALLEL_BYTES:
            return [pages]
        # More runs than threads, so that one slow run does not hold up the rest; small enough to stay in a cache.
        size = max(1, min(-(-len(pages) // (4 * self._workers.threads)), _RUN_BYTES // page_bytes))
        return [pages[i : i + size] for i in range(0, len(pages), size)]

    def _map(self, function: Callable[[range], None], runs: list[range]) -> None:
        if len(runs) == 1:
            function(runs[0])
        else:
            self._workers.map(function, runs)

    def _source(self, path: str) -> PageSource:
        try:
            return self.sources[path]
        except KeyError:
            raise UnknownColumnError(
                f"segment {self.entry.uuid} has no column {path!r}: its trajectories were appended without it"
            ) from None

    def _where(self, source: PageSource) -> str:
        return f"{layout.segment_key(self.entry.uuid, source.object)} in {self._filesystem.description}"

    def _read_pages(self, source: PageSource, pages: Sequence[int]) -> list[Buffer]:
        key = layout.segment_key(self.entry.uuid, source.object)
        ranges = [ByteRange(key, int(source.offsets[p]), int(source.offsets[p]) + int(source.nbytes[p])) for p in pages]
        return self._filesystem.read_ranges(ranges)

    def _decode_run(
        self,
        source: PageSource,
        column: Column,
        rows: RowRange,
        pages: Sequence[int],
        stored: Sequence[Buffer],
        out: Array,
    ) -> None:
        """Decode pages into their places in ``out``."""
        codec = codec_named(source.codec) if column.stored_in == "zarr" else None
        scratch: Array | None = None
        for page, data in zip(pages, stored, strict=True):
            first = page * source.page_rows
            lo, hi = max(rows.start, first), min(rows.stop, first + source.page_rows)
            target = out[lo - rows.start : hi - rows.start]
            self._verify(source, page, data)
            try:
                if codec is None:
                    target[...] = self._arrow_page(source, page, data)[column.path][lo - first : hi - first]
                elif hi - lo == source.page_rows:
                    codec.decode_into(data, target)
                else:
                    if scratch is None:
                        scratch = np.empty((source.page_rows, *column.shape), column.physical_dtype)
                    codec.decode_into(data, scratch)
                    target[...] = scratch[lo - first : hi - first]
            except CorruptionError as error:
                raise CorruptionError(f"page {page} of {self._where(source)}: {error}") from error

    def _read_variable(self, source: PageSource, path: str, rows: RowRange) -> pa.Array:
        column = self._schema[path]
        pages = range(rows.start // source.page_rows, max(-(-rows.stop // source.page_rows), 1))
        parts = []
        for page, stored in zip(pages, self._read_pages(source, pages), strict=True):
            self._verify(source, page, stored)
            first = page * source.page_rows
            try:
                whole = self._arrow_page(source, page, stored)[column.path]
            except CorruptionError as error:
                raise CorruptionError(f"page {page} of {self._where(source)}: {error}") from error
            parts.append(whole[max(rows.start - first, 0) : rows.stop - first])
        return pa.concat_arrays(parts)

    def _arrow_page(self, source: PageSource, page: int, stored: Buffer) -> dict[str, Stored]:
        columns = tuple(self._schema[path] for path in source.columns)
        batch = decode_record_batch(columns, stored, codec=source.codec)
        if any(len(data) != source.rows_of_page(page) for data in batch.values()):
            raise CorruptionError(f"it does not hold {source.rows_of_page(page)} rows")
        return batch

    def _verify(self, source: PageSource, page: int, stored: Buffer) -> None:
        if checksum(stored) != int(source.crc32c[page]):
            raise CorruptionError(
                f"page {page} of {self._where(source)} (column {', '.join(source.columns)}) does not match its checksum; "
                "restore the object from a copy"
            )


def _batches(source: PageSource, pages: range, limit_bytes: int) -> list[list[int]]:
    """Pages in runs of at most ``limit_bytes`` stored bytes, so that reading a long column takes bounded memory."""
    out: list[list[int]] = []
    held = 0
    for page in pages:
        size = int(source.nbytes[page])
        if not out or held + size > limit_bytes:
            out.append([])
            held = 0
        out[-1].append(page)
        held += size
    return out


class SegmentReaders:
    """The segments that a handle has opened.

    Args:
        schema: Of the store.
        filesystem: Where the store is.
        workers: Decode pages.
        keep: Most page indexes kept in memory.
    """

    def __init__(self, filesystem: Filesystem, workers: Workers, *, keep: int = 1024) -> None:
        self._filesystem = filesystem
        self._workers = workers
        self._keep = keep
        self._readers: dict[str, SegmentReader] = {}

    def open(self, entry: SegmentEntry, schema: Schema) -> SegmentReader:
        """The reader of a segment; its page index is read once."""
        reader: Any = self._readers.get(entry.uuid)
        if reader is None:
            reader = SegmentReader(entry, schema, self._filesystem, self._workers)
            while len(self._readers) >= self._keep:
                self._readers.pop(next(iter(self._readers)))
            self._readers[entry.uuid] = reader
        return reader  # type: ignore[no-any-return]
