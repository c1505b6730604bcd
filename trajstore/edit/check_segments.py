"""Segments held against the manifests that name them, and, if asked for, every page.

Invariant: pages are read in lots of bounded bytes by a bounded number of threads; a segment's objects are believed only as
far as their hashes hold, and what cannot be judged because of another fault is not told as one more.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from trajstore.edit.check_arrow import ends_problem, metadata_bytes
from trajstore.edit.check_versions import SegmentUse
from trajstore.edit.findings import Findings
from trajstore.edit.listing import Folder, list_segment, read_each
from trajstore.errors import CorruptionError, MissingObjectError, StorageError
from trajstore.format import layout
from trajstore.format.codecs import codec_named
from trajstore.format.pages import PageSource, checksum, decode_page_index, decode_record_batch
from trajstore.schema import Column
from trajstore.storage.filesystem import Buffer, ByteRange, Filesystem
from trajstore.storage.workers import Workers
from trajstore.stored import Array

_CHECKED_TOGETHER = 64
_LISTED_ONE_BY_ONE = 64
_LOT_BYTES = 8 << 20
_THREADS = max(4, 2 * (os.cpu_count() or 1))
_ENTRY_BYTES = 16  # of a page in a shard's index
_CRC_BYTES = 4


@dataclass
class SegmentCounts:
    """What was looked at, added up."""

    objects: int = 0
    nbytes: int = 0
    pages: int = 0
    pages_read: int = 0
    nbytes_read: int = 0
    abandoned: int = 0  # segments with rows that no manifest speaks of


@dataclass(frozen=True, eq=False)
class _Sound:
    """An object with pages whose place and size are right."""

    use: SegmentUse
    source: PageSource
    nbytes: int

    @property
    def key(self) -> str:
        return layout.segment_key(self.use.entry.uuid, self.source.object)

    @property
    def known_columns(self) -> tuple[Column, ...] | None:
        """Its columns; None if the schema does not know them all."""
        columns = tuple(column for path in self.source.columns if (column := self.use.schema.get(path)) is not None)
        return columns if len(columns) == len(self.source.columns) else None


@dataclass(frozen=True, eq=False)
class _Looked:
    """What was seen of some pages of an object.

    Attributes:
        wrong: By page; that of number -1 is the index of a shard, or the ends of an Arrow file.
        metadata: Of each page of an Arrow file, bytes before its body.
        ends: Of an Arrow file, with its last page: what is before its pages, and behind them.
    """

    wrong: dict[int, str]
    metadata: Sequence[int] = ()
    ends: tuple[bytes, bytes] | None = None


def check_segments(
    filesystem: Filesystem,
    uses: Sequence[SegmentUse],
    folders: Mapping[str, Folder] | None,
    found: Findings,
    counts: SegmentCounts,
    *,
    deep: bool,
    advance: Callable[[int], None],
) -> None:
    """Check segments of one store.

    Args:
        filesystem: Where they are.
        uses: The segments.
        folders: The store's objects; None to ask for them.
        found: Is added to.
        counts: Are added to.
        deep: Read every page.
        advance: Called with bytes that were read.
    """
    check = _Check(filesystem, _listed(filesystem, uses) if folders is None else folders, found, counts)
    if not deep:
        for _ in check.objects(uses):
            pass
        return
    workers = Workers(_THREADS, name="trajstore-verify")
    try:
        check.pages(workers, check.objects(uses), advance)
    finally:
        workers.close()


def _listed(filesystem: Filesystem, uses: Sequence[SegmentUse]) -> Mapping[str, Folder]:
    if len(uses) <= _LISTED_ONE_BY_ONE:
        return {use.entry.uuid: list_segment(filesystem, use.entry.uuid) for use in uses}
    wanted = {use.entry.uuid for use in uses}
    folders: dict[str, Folder] = {}
    for info in filesystem.list_objects(layout.SEGMENTS):
        segment = layout.segment_of(info.key)
        if segment in wanted and not info.key.endswith(".tmp"):
            name = info.key.removeprefix(layout.segment_folder(segment) + "/")
            folders.setdefault(segment, Folder()).add(name, info)
    return folders


class _Check:
    def __init__(
        self, filesystem: Filesystem, folders: Mapping[str, Folder], found: Findings, counts: SegmentCounts
    ) -> None:
        self._filesystem = filesystem
        self._folders = folders
        self._found = found
        self._counts = counts

    def objects(self, uses: Sequence[SegmentUse]) -> Iterator[_Sound]:
        """Everything but the pages; the objects whose pages can be read."""
        for first in range(0, len(uses), _CHECKED_TOGETHER):
            lot = uses[first : first + _CHECKED_TOGETHER]
            folders = [self._folder(use.entry.uuid) for use in lot]
            wanted = [
                (number, name)
                for number, folder in enumerate(folders)
                for name in folder
                if name == layout.PAGES_FILE or name.split("/")[-1] == layout.ZARR_METADATA
            ]
            keys = [layout.segment_key(lot[number].entry.uuid, name) for number, name in wanted]
            documents: list[dict[str, bytes | StorageError | None]] = [{} for _ in lot]
            for (number, name), data in zip(wanted, read_each(self._filesystem, keys), strict=True):
                documents[number][name] = data
            for use, folder, read in zip(lot, folders, documents, strict=True):
                yield from self._segment(use, folder, read)

    def _folder(self, segment: str) -> Mapping[str, int]:
        folder = self._folders.get(segment)
        # It may have been committed since the listing.
        return (list_segment(self._filesystem, segment) if folder is None else folder).sizes

    def _segment(
        self, use: SegmentUse, folder: Mapping[str, int], read: Mapping[str, bytes | StorageError | None]
    ) -> Iterator[_Sound]:
        self._counts.objects += len(folder)
        self._counts.nbytes += sum(folder.values())
        if not folder:
            self._error(use, "segment-missing", None, "none of its objects is there", "restore it from a copy")
            return
        expected = {layout.ZARR_METADATA, layout.PAGES_FILE}
        metadata = self._zarr_metadata(use, read)
        expected |= metadata or set()
        sources = self._page_index(use, read.get(layout.PAGES_FILE))
        if sources is None:
            return
        expected |= {source.object for source in sources}
        judged = metadata is not None  # only then is it known which objects there should be
        sound = []
        for source in sources:
            size = folder.get(source.object)
            if size is None:
                self._error(use, "object-missing", source.object, "it is not there", "restore it from a copy")
            elif self._size(use, source, size):
                sound.append(_Sound(use, source, size))
                continue
            judged = False
        judged = judged and expected <= folder.keys()
        nbytes = sum(size for name, size in folder.items() if name in expected)
        if judged and nbytes != use.entry.nbytes:
            self._error(
                use,
                "segment-size",
                None,
                f"its objects have {nbytes} bytes, its manifest says {use.entry.nbytes}",
                "restore it from a copy",
            )
        yield from sound

    def _zarr_metadata(self, use: SegmentUse, read: Mapping[str, bytes | StorageError | None]) -> set[str] | None:
        """Check the metadata for readers of Zarr; the names that it should have; None if that cannot be told."""
        data = read.get(layout.ZARR_METADATA)
        if not self._is_document(use, "zarr-metadata", layout.ZARR_METADATA, data, use.entry.zarr_sha256):
            return None
        assert isinstance(data, bytes)
        members = json.loads(data)["consolidated_metadata"]["metadata"]
        for path, member in members.items():
            name = f"{path}/{layout.ZARR_METADATA}"
            found = read.get(name)
            if isinstance(found, bytes) and not _is_json(found, member):
                self._error(
                    use,
                    "zarr-metadata",
                    name,
                    f"it does not say what the segment's {layout.ZARR_METADATA} says of {path!r}",
                    "restore it from a copy; trajstore reads its pages without it",
                )
            elif not isinstance(found, bytes):
                self._is_document(use, "zarr-metadata", name, found, "")
        return {f"{path}/{layout.ZARR_METADATA}" for path in members}

    def _page_index(self, use: SegmentUse, data: bytes | StorageError | None) -> list[PageSource] | None:
        name = layout.PAGES_FILE
        if not self._is_document(use, "page-index", name, data, use.entry.pages_sha256):
            return None
        assert isinstance(data, bytes)
        try:
            sources = decode_page_index(data)
        except CorruptionError as error:
            self._error(use, "page-index", name, str(error), "restore it from a copy")
            return None
        columns = [path for source in sources for path in source.columns]
        if sorted(columns) != sorted(use.entry.columns):
            listed = ", ".join(sorted(set(columns) ^ set(use.entry.columns)))
            self._error(
                use,
                "page-index",
                name,
                f"it and the manifest name different columns: {listed}",
                "restore both from a copy",
            )
        abandoned = False
        for source in sources:
            known = [column for path in source.columns if (column := use.schema.get(path)) is not None]
            named = use.entry.steps + (use.entry.trajectories if any(column.extra for column in known) else 0)
            abandoned |= source.rows > named and bool(known)
            if source.rows < named:
                self._error(
                    use,
                    "page-index",
                    name,
                    f"it gives {source.object} {source.rows} rows, the manifest says {named}",
                    "restore both from a copy",
                )
        self._counts.abandoned += abandoned
        self._counts.pages += sum(len(source.offsets) for source in sources)
        return sources

    def _is_document(
        self, use: SegmentUse, kind: str, name: str, data: bytes | StorageError | None, sha256: str
    ) -> bool:
        """Whether a small object is there and has this hash."""
        what = "restore it from a copy"
        if kind == "zarr-metadata":
            what += "; trajstore reads the pages without it, zarr does not"
        if isinstance(data, StorageError):
            self._error(use, "unreadable", name, str(data), "look again")
        elif data is None:
            self._error(use, "object-missing" if kind == "page-index" else kind, name, "it is not there", what)
        else:
            digest = hashlib.sha256(data).hexdigest()
            if digest == sha256:
                return True
            self._error(use, kind, name, f"its sha256 is {digest}, the manifest says {sha256}", what)
        return False

    def _size(self, use: SegmentUse, source: PageSource, size: int) -> bool:
        """Whether an object's pages lie apart from each other and within it."""
        ends = source.offsets + source.nbytes
        last = int(ends[-1]) if len(ends) else 0
        if (source.offsets < 0).any() or (source.nbytes < 0).any() or (source.offsets[1:] < ends[:-1]).any():
            self._error(
                use, "page-index", layout.PAGES_FILE, f"pages of {source.object} overlap", "restore it from a copy"
            )
            return False
        arrow = source.object.endswith(".arrow")
        expected = last if arrow else last + _ENTRY_BYTES * len(ends) + _CRC_BYTES
        if size < expected or (size > expected and not arrow):
            more = "at least " if arrow else ""
            self._error(
                use,
                "object-size",
                source.object,
                f"it has {size} bytes, its page index says {more}{expected}",
                "restore it from a copy",
            )
            return False
        return True

    def pages(self, workers: Workers, objects: Iterator[_Sound], advance: Callable[[int], None]) -> None:
        """Read every page of these objects, and what other readers find them by."""
        waiting: deque[tuple[_Sound, range, Future[_Looked]]] = deque()
        damaged: dict[int, str] = {}
        metadata: list[int] = []  # bytes of that of each page of an Arrow file
        tasks = ((sound, pages) for sound in objects for pages in _lots(sound.source))

        def take() -> None:
            sound, pages, future = waiting.popleft()
            looked = future.result()
            damaged.update(looked.wrong)
            metadata.extend(looked.metadata)
            nbytes = int(sound.source.nbytes[pages.start : pages.stop].sum())
            self._counts.pages_read += len(pages)
            self._counts.nbytes_read += nbytes
            advance(nbytes)
            if pages.stop == len(sound.source.offsets):
                columns = sound.known_columns
                if looked.ends is not None and columns is not None and not damaged:
                    problem = ends_problem(columns, sound.source, metadata, *looked.ends)
                    damaged.update({} if problem is None else {-1: problem})
                self._tell(sound, damaged)
                damaged.clear()
                metadata.clear()

        for sound, pages in tasks:
            waiting.append((sound, pages, workers.submit(self._read, sound, pages)))
            if len(waiting) >= 2 * _THREADS:
                take()
        while waiting:
            take()

    def _tell(self, sound: _Sound, damaged: Mapping[int, str]) -> None:
        """One error for all damaged pages of an object, and one for its index."""
        source, use = sound.source, sound.use
        column = f"column{'s' if len(source.columns) > 1 else ''} {', '.join(source.columns)}"
        unread = {page: why for page, why in damaged.items() if why.startswith(_UNREADABLE)}
        index = damaged.get(-1)
        for kind, numbers in (
            ("unreadable", sorted(unread)),
            ("page", sorted(damaged.keys() - unread.keys() - {-1})),
        ):
            if numbers:
                shown = _shown(numbers)
                self._error(
                    use,
                    kind,
                    f"{source.object} {shown}",
                    f"{shown} of {len(source.offsets)} ({column}): {damaged[numbers[0]]}",
                    "look again" if kind == "unreadable" else "restore the object from a copy",
                )
        if index is not None:
            kind, reader = ("arrow-file", "pyarrow") if source.object.endswith(".arrow") else ("shard-index", "zarr")
            self._error(
                use,
                kind,
                source.object,
                f"{index} ({column})",
                f"restore it from a copy; trajstore reads its pages without it, {reader} does not",
            )

    def _read(self, sound: _Sound, pages: range) -> _Looked:
        """Look at pages of an object, and with the last page at what is beside its pages."""
        source = sound.source
        offsets, nbytes = source.offsets.tolist(), source.nbytes.tolist()
        ranges = [ByteRange(sound.key, offsets[n], offsets[n] + nbytes[n]) for n in pages]
        is_last, is_arrow = pages.stop == len(offsets), source.object.endswith(".arrow")
        if is_last and is_arrow:
            ranges.append(ByteRange(sound.key, 0, offsets[0]))
        if is_last:
            ranges.append(ByteRange(sound.key, offsets[-1] + nbytes[-1], sound.nbytes))
        try:
            stored = self._filesystem.read_ranges(ranges)
        except (StorageError, CorruptionError) as error:
            lost = isinstance(error, MissingObjectError | CorruptionError)
            return _Looked(dict.fromkeys(pages, f"{error}" if lost else f"{_UNREADABLE}{error}"))
        wrong = {}
        scratch: Array | None = None
        for page, data in zip(pages, stored, strict=False):
            if checksum(data) != int(source.crc32c[page]):
                wrong[page] = "its bytes do not match its checksum"
                continue
            try:
                scratch = _decode(sound, page, data, scratch)
            except CorruptionError as error:
                wrong[page] = f"its bytes match its checksum, but {error}"
        if is_arrow:
            sizes = [metadata_bytes(bytes(data[:8])) for data in stored[: len(pages)]]
            return _Looked(wrong, sizes, (bytes(stored[-2]), bytes(stored[-1])) if is_last else None)
        if is_last and bytes(stored[-1]) != _shard_index(source):
            wrong[-1] = "the index at its end is not that of its pages"
        return _Looked(wrong)

    def _error(self, use: SegmentUse, kind: str, name: str | None, what: str, todo: str) -> None:
        segment = use.entry.uuid
        where = layout.segment_folder(segment) if name is None else layout.segment_key(segment, name)
        if use.base is not None:
            where += f" in {self._filesystem.description}"
        self._found.add("error", kind, where, f"{what}; {todo}", version=use.last, segment=segment)


_UNREADABLE = "it cannot be read: "


def _decode(sound: _Sound, page: int, data: Buffer, scratch: Array | None) -> Array | None:
    """Decode a page whose columns the schema knows, and throw it away; memory for the next one."""
    source, columns = sound.source, sound.known_columns
    if columns is None:
        return scratch
    if source.object.endswith(".arrow"):
        batch = decode_record_batch(columns, data, codec=source.codec)
        if any(len(rows) != source.rows_of_page(page) for rows in batch.values()):
            raise CorruptionError(f"it does not hold {source.rows_of_page(page)} rows")
        return None
    if scratch is None:
        scratch = np.empty(source.page_rows * columns[0].row_bytes, np.uint8)
    codec_named(source.codec).decode_into(data, scratch)
    return scratch


def _shard_index(source: PageSource) -> bytes:
    """What the end of a Zarr shard says: offset and size of every page, then the CRC-32C of that."""
    index = np.stack([source.offsets, source.nbytes], axis=1).astype("<u8").tobytes()
    return index + checksum(index).to_bytes(_CRC_BYTES, "little")


def _lots(source: PageSource) -> list[range]:
    """Pages in lots of bounded bytes, but for the first of each."""
    lots = np.cumsum(source.nbytes) // _LOT_BYTES
    starts = [0, *(np.flatnonzero(np.diff(lots)) + 1).tolist(), len(source.offsets)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def _is_json(data: bytes, expected: object) -> bool:
    try:
        return bool(json.loads(data) == expected)
    except (ValueError, RecursionError):
        return False


def _shown(pages: Sequence[int], most: int = 8) -> str:
    """Page numbers as people write them.

    >>> _shown([3]), _shown([3, 4, 5, 9])
    ('page 3', 'pages 3-5, 9')
    """
    runs: list[list[int]] = []
    for page in pages:
        if runs and page == runs[-1][1] + 1:
            runs[-1][1] = page
        else:
            runs.append([page, page])
    shown = [f"{lo}-{hi}" if hi > lo else f"{lo}" for lo, hi in runs]
    text = ", ".join(shown[:most]) + (f" and {len(shown) - most} runs more" if len(shown) > most else "")
    return f"page{'s' if len(pages) > 1 else ''} {text}"
