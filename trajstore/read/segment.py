"""Rows of a segment, page by page.

Invariant: no byte is handed out unverified. The page index is held against the hash in the manifest, every page against its
checksum in the page index, and every error names the segment, the object and the page.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from trajstore.errors import CorruptionError, MissingObjectError, TrajstoreError, UnknownColumnError
from trajstore.format import layout
from trajstore.format.codecs import codec_named
from trajstore.format.manifest import SegmentEntry
from trajstore.format.pages import PageSource, arrow_type, checksum, decode_page_index, decode_record_batch
from trajstore.read.bases import LazyBase
from trajstore.schema import Column, Schema
from trajstore.storage.filesystem import Buffer, ByteRange, Filesystem
from trajstore.storage.workers import Workers
from trajstore.stored import Array, Stored

Key = TypeVar("Key")
_READ_AHEAD_BYTES = 32 * 1024 * 1024
# Decoding fewer bytes than this is not worth handing to another thread.
_PARALLEL_BYTES = 1 << 20
# Pages smaller than this are copied: what a checksum of a view costs besides is more than the copy.
_COPIED_BYTES = 1 << 16
_OPENED_TOGETHER = 256  # page indexes in memory at once


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
        data: The page index; None if it is not there.
    """

    def __init__(
        self, entry: SegmentEntry, schema: Schema, filesystem: Filesystem, workers: Workers, data: bytes | None
    ) -> None:
        self.entry = entry
        self.filesystem = filesystem
        self._schema = schema
        self._workers = workers
        key = layout.segment_key(entry.uuid, layout.PAGES_FILE)
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
            self._check_rows(source)
            for path in source.columns:
                self.sources[path] = source
        # Columns of an Arrow file share their pages; a tensor column has its own.
        self.by_group = {s.object if s.object.endswith(".arrow") else s.columns[0]: s for s in sources}
        self._layers: Mapping[str, SegmentReader] = {}  # by column

    def with_layers(self, entry: SegmentEntry, layers: Sequence[SegmentReader]) -> SegmentReader:
        """A reader of the same segment that also has the columns of its layers.

        Args:
            entry: The segment with these layers.
            layers: Readers of them.
        """
        whole = copy.copy(self)
        whole.entry = entry
        whole._layers = {path: layer for layer in layers for path in layer.sources}
        derived = {path: layer.sources[path] for path, layer in whole._layers.items()}
        whole.sources = {**self.sources, **derived}
        whole.by_group = {**self.by_group, **derived}
        return whole

    def holder(self, name: str) -> SegmentReader:
        """Who reads the pages of a column or group: the layer that has it, else this."""
        return self._layers.get(name, self)

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
        if path in self._layers:
            return self._layers[path].read(path, rows, out)
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
        if self.filesystem.overlaps_reads:
            for batch in _batches(source, pages):
                stored = self._read_pages(source, batch)
                self._map(
                    lambda run, first=batch.start, data=stored: self._decode_run(  # type: ignore[misc]
                        source, column, rows, run, data[run.start - first : run.stop - first], out
                    ),
                    self._runs(source, column, batch),
                )
        else:
            self._map(
                lambda run: self._decode_run(source, column, rows, run, self._read_pages(source, run), out),
                self._runs(source, column, pages),
            )
        return out

    def variable_page(self, path: str) -> pa.Array | None:  # noqa: ARG002 - a segment that is being written has it
        """All rows of a column of strings or lists, if they are in memory: never here."""
        return None

    def page_rows_of(self, name: str) -> int:
        """Rows of the largest page of a group of columns; 1 if the segment lacks it."""
        source = self.by_group.get(name)
        return 1 if source is None else max(1, min(source.page_rows, source.rows))

    def decoded_rows(self, source: PageSource, page: int) -> int:
        """Rows that a page decodes to: the last page of a tensor is filled up, because a Zarr chunk has its full shape."""
        return source.rows_of_page(page) if source.object.endswith(".arrow") else source.page_rows

    def is_intact(self, source: PageSource, page: int, stored: Buffer) -> bool:
        """Whether stored bytes are those of the page."""
        return len(stored) == int(source.nbytes[page]) and checksum(stored) == int(source.crc32c[page])

    def check_page(self, source: PageSource, page: int, stored: Any) -> None:
        """Hold a page's stored bytes against its checksum.

        Raises:
            CorruptionError: They are not what was written.
        """
        if checksum(stored) != int(source.crc32c[page]):
            raise self._mismatch(source, page)

    def decode_page(
        self, source: PageSource, page: int, stored: Buffer, slots: Mapping[str, Array], variable: Sequence[str] = ()
    ) -> dict[str, Stored]:
        """Decode one page into its slots.

        Args:
            source: The object that holds the page.
            page: Its number.
            stored: Its bytes.
            slots: Column of fixed size -> ``(rows, row_bytes)`` uint8, C-contiguous; columns that the segment lacks are
                left as they are. Of a tensor column all ``page_rows`` rows, of others ``source.rows_of_page(page)``.
            variable: Columns of variable size that are wanted.

        Returns:
            Rows of the columns named by ``variable``.

        Raises:
            CorruptionError: It is not what was written.
        """
        self.check_page(source, page, stored)
        try:
            if not source.object.endswith(".arrow"):
                codec_named(source.codec).decode_into(stored, slots[source.columns[0]].reshape(-1))
                return {}
            columns = self._arrow_page(source, page, stored)
        except CorruptionError as error:
            raise CorruptionError(f"page {page} of {self._where(source)}: {error}") from error
        for path, slot in slots.items():
            if path in columns:
                rows = columns[path]
                slot.reshape(-1).view(rows.dtype)[...] = rows
        return {path: columns[path] for path in variable}

    def _runs(self, source: PageSource, column: Column, pages: range) -> list[range]:
        """Neighbours that one thread reads and decodes together."""
        if len(pages) * source.page_rows * column.row_bytes < _PARALLEL_BYTES:
            return [pages]
        # A few per thread, so that one slow run does not hold up the rest; each more costs a task.
        size = -(-len(pages) // (4 * self._workers.threads))
        return [part for i in range(0, len(pages), size) for part in _batches(source, pages[i : i + size])]

    def _map(self, function: Callable[[range], None], runs: list[range]) -> None:
        if len(runs) == 1:
            function(runs[0])
        else:
            self._workers.map(function, runs)

    def _check_rows(self, source: PageSource) -> None:
        extra = any(column.extra for path in source.columns if (column := self._schema.get(path)) is not None)
        named = self.entry.steps + (self.entry.trajectories if extra else 0)
        if source.rows < named:
            raise CorruptionError(f"{self._where(source)} has {source.rows} rows, its manifest says {named}")

    def _source(self, path: str) -> PageSource:
        try:
            return self.sources[path]
        except KeyError:
            raise UnknownColumnError(
                f"segment {self.entry.uuid} has no column {path!r}: its trajectories were appended without it"
            ) from None

    def _where(self, source: PageSource) -> str:
        return f"{layout.segment_key(self.entry.uuid, source.object)} in {self.filesystem.description}"

    def _read_pages(self, source: PageSource, pages: range) -> list[Buffer]:
        """Neighbouring pages, which lie end to end in their object: one read."""
        key = layout.segment_key(self.entry.uuid, source.object)
        offsets = source.offsets[pages.start : pages.stop].tolist()
        sizes = source.nbytes[pages.start : pages.stop].tolist()
        run = ByteRange(key, offsets[0], offsets[-1] + sizes[-1])
        view = memoryview(self.filesystem.read_ranges([run])[0])
        found: list[Buffer] = []
        for offset, size in zip(offsets, sizes, strict=True):
            page = view[offset - run.start : offset - run.start + size]
            found.append(bytes(page) if size < _COPIED_BYTES else page)
        return found

    def _decode_run(
        self,
        source: PageSource,
        column: Column,
        rows: RowRange,
        pages: range,
        stored: Sequence[Buffer],
        out: Array,
    ) -> None:
        """Decode pages into their places in ``out``."""
        codec = codec_named(source.codec) if column.stored_in == "zarr" else None
        scratch: Array | None = None
        # Interpreter time per page counts several times: the threads take turns with it.
        flat = out.reshape(-1).view(np.uint8)
        page_bytes = source.page_rows * column.row_bytes
        before = rows.start * column.row_bytes
        checksums = source.crc32c[pages.start : pages.stop].tolist()
        for page, data, crc32c in zip(pages, stored, checksums, strict=True):
            if checksum(data) != crc32c:
                raise self._mismatch(source, page)
            start = page * page_bytes - before
            try:
                if codec is not None and start >= 0 and start + page_bytes <= len(flat):
                    codec.decode_into(data, flat[start : start + page_bytes])
                    continue
                first = page * source.page_rows
                lo, hi = max(rows.start, first), min(rows.stop, first + source.page_rows)
                target = out[lo - rows.start : hi - rows.start]
                if codec is None:
                    target[...] = self._arrow_page(source, page, data)[column.path][lo - first : hi - first]
                else:
                    if scratch is None:
                        scratch = np.empty((source.page_rows, *column.shape), column.physical_dtype)
                    codec.decode_into(data, scratch)
                    target[...] = scratch[lo - first : hi - first]
            except CorruptionError as error:
                raise CorruptionError(f"page {page} of {self._where(source)}: {error}") from error

    def _read_variable(self, source: PageSource, path: str, rows: RowRange) -> pa.Array:
        column = self._schema[path]
        if rows.start == rows.stop:
            return pa.array([], arrow_type(column))
        pages = range(rows.start // source.page_rows, -(-rows.stop // source.page_rows))
        parts = []
        for page, stored in zip(pages, self._read_pages(source, pages), strict=True):
            if checksum(stored) != int(source.crc32c[page]):
                raise self._mismatch(source, page)
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

    def _mismatch(self, source: PageSource, page: int) -> CorruptionError:
        return CorruptionError(
            f"page {page} of {self._where(source)} (column {', '.join(source.columns)}) does not match its checksum; "
            "restore the object from a copy"
        )


def _batches(source: PageSource, pages: range) -> list[range]:
    """Pages in lots of a bounded number of stored bytes, so that reading a long column takes bounded memory."""
    ends = np.cumsum(source.nbytes[pages.start : pages.stop])
    lots = ends // _READ_AHEAD_BYTES
    starts = [0, *(np.flatnonzero(np.diff(lots)) + 1).tolist(), len(pages)]
    return [pages[a:b] for a, b in itertools.pairwise(starts) if a < b]


class SegmentReaders:
    """The segments that a handle has opened, each part of one once, whatever layers it has in which version.

    Used by several threads.

    Args:
        filesystem: Where the store is.
        workers: Decode pages.
        keep: Most page indexes kept in memory, a few kilobytes each.
    """

    def __init__(self, filesystem: Filesystem, workers: Workers, *, keep: int = 16384) -> None:
        self._filesystem = filesystem
        self._workers = workers
        self._keep = keep
        self._lock = threading.Lock()
        self._readers: dict[str, SegmentReader] = {}  # of segments and of layers, alone
        self._layered: dict[tuple[str, ...], SegmentReader] = {}  # of segments with layers, by key
        self._live: dict[str, Any] = {}
        self._elsewhere: dict[str, LazyBase] = {}  # of segments that lie in other stores

    @property
    def any_elsewhere(self) -> bool:
        """Whether some segment lies in another store."""
        return bool(self._elsewhere)

    def place(self, entry: SegmentEntry, base: LazyBase | None) -> None:
        """Say in which other store a segment or layer lies, without regard to its layers; None for this one."""
        with self._lock:
            if self._elsewhere.get(entry.uuid) is base:
                return
            self._readers.pop(entry.uuid, None)
            self._layered.clear()
            self._elsewhere.pop(entry.uuid, None)
            if base is not None:
                self._elsewhere[entry.uuid] = base

    def out_of_reach(self, entries: Iterable[SegmentEntry]) -> dict[tuple[str, ...], TrajstoreError]:
        """Segments of which some part lies in a store that cannot be opened, by key, and why; each store is tried once."""
        if not self._elsewhere:
            return {}
        problems: dict[LazyBase, TrajstoreError | None] = {}
        found: dict[tuple[str, ...], TrajstoreError] = {}
        for entry in entries:
            for part in entry.parts:
                base = self._elsewhere.get(part.uuid)
                if base is None:
                    continue
                if base not in problems:
                    problems[base] = base.problem()
                problem = problems[base]
                if problem is not None:
                    found.setdefault(entry.key, problem)
        return found

    def open(self, entry: SegmentEntry, schema: Schema) -> SegmentReader:
        """The reader of a segment and its layers; their page indexes are read once."""
        if entry.layers:
            return self._layered.get(entry.key) or self.open_many([entry], schema)[0]
        live = self._live.get(entry.uuid)
        return live or self._readers.get(entry.uuid) or self.open_many([entry], schema)[0]

    def add_live(self, segment: Any) -> None:
        """A segment that is still being written: it has the face of a reader."""
        self._live[segment.entry.uuid] = segment

    def remove_live(self, uuid: str) -> None:
        """It is no longer written."""
        self._live.pop(uuid, None)

    def open_many(self, entries: Sequence[SegmentEntry], schema: Schema) -> list[SegmentReader]:
        """The readers of several segments; page indexes not yet known are read concurrently."""
        known = [self._layered.get(entry.key) if entry.layers else self._live.get(entry.uuid) for entry in entries]
        absent = [number for number, reader in enumerate(known) if reader is None]
        found = self._open_parts([part for number in absent for part in entries[number].parts], schema)
        layered = {}
        for number in absent:
            entry = entries[number]
            reader = found[entry.uuid]
            if entry.layers:
                reader = reader.with_layers(entry, [found[layer.uuid] for layer in entry.layers])
                layered[entry.key] = reader
            known[number] = reader
        self._remember(self._layered, layered)
        return [reader for reader in known if reader is not None]

    def _open_parts(self, entries: Sequence[SegmentEntry], schema: Schema) -> dict[str, SegmentReader]:
        """Readers of segments and of layers, without regard to the layers of the former, by uuid."""
        found = {entry.uuid: reader for entry in entries if (reader := self._readers.get(entry.uuid)) is not None}
        unknown = list({entry.uuid: entry for entry in entries if entry.uuid not in found}.values())
        fresh = {}
        for lot in (unknown[i : i + _OPENED_TOGETHER] for i in range(0, len(unknown), _OPENED_TOGETHER)):
            for filesystem, here in self._by_place(lot):
                indexes = filesystem.read_many([layout.segment_key(e.uuid, layout.PAGES_FILE) for e in here])
                for entry, data in zip(here, indexes, strict=True):
                    plain = replace(entry, layers=()) if entry.layers else entry
                    fresh[entry.uuid] = SegmentReader(plain, schema, filesystem, self._workers, data)
        self._remember(self._readers, fresh)
        return {**found, **fresh}

    def _by_place(self, entries: Sequence[SegmentEntry]) -> list[tuple[Filesystem, list[SegmentEntry]]]:
        if not self._elsewhere:
            return [(self._filesystem, list(entries))]
        places: dict[int, tuple[Filesystem, list[SegmentEntry]]] = {}
        for entry in entries:
            base = self._elsewhere.get(entry.uuid)
            filesystem = self._filesystem if base is None else base.filesystem()
            places.setdefault(id(filesystem), (filesystem, []))[1].append(entry)
        return list(places.values())

    def _remember(self, known: dict[Key, SegmentReader], fresh: Mapping[Key, SegmentReader]) -> None:
        if not fresh:
            return
        with self._lock:
            known.update(fresh)
            while len(known) > self._keep:
                known.pop(next(iter(known)))
