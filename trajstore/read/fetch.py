"""Stored pages to their slots in memory: coalesced reads, all under way together, decoded in parallel.

Invariant: a slot is filled from verified bytes or the call raises; what a codec can write where it belongs is decoded there,
without memory of its own on the way.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from trajstore.errors import CorruptionError
from trajstore.format import layout
from trajstore.format.pages import PageSource
from trajstore.read.disk_cache import DiskCache, PageName
from trajstore.read.segment import SegmentReader
from trajstore.storage.filesystem import Buffer, ByteRange, Filesystem, ReadRun, coalesce
from trajstore.storage.workers import Workers
from trajstore.stored import Array, Stored


@dataclass(eq=False)
class PageRequest:
    """One page that is wanted.

    Attributes:
        segment: Its segment.
        source: The object in which it lies.
        page: Its number there.
        slots: Fixed-shape column -> ``(rows, row_bytes)`` uint8, to be filled; ``rows`` as ``source.rows_of_page`` says, for
            a tensor column those of a whole page.
        arrays: Variable-size columns of the page, once it has been fetched.
    """

    segment: SegmentReader
    source: PageSource
    page: int
    slots: Mapping[str, Array]
    variable: Sequence[str] = ()
    arrays: dict[str, Stored] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def decode(self, stored: Buffer) -> None:
        """Fill the slots."""
        with self.lock:
            self.arrays = self.segment.decode_page(self.source, self.page, stored, self.slots, self.variable)

    @property
    def plain_slot(self) -> Array | None:
        """The slot as ``(nbytes,)`` uint8, if the page is stored just as it is in memory."""
        if self.source.codec != "none" or self.variable or self.source.object.endswith(".arrow"):
            return None
        slot = self.slots.get(self.source.columns[0])
        return None if slot is None or slot.nbytes != int(self.source.nbytes[self.page]) else slot.reshape(-1)

    def revoke(self) -> None:
        """When this returns, nobody writes to the slots any more, whatever is still being read."""
        with self.lock:
            self.slots = {}


class PageFetcher:
    """Reads and decodes pages of a store, and of others that it refers to.

    Args:
        workers: Read, if a filesystem does not overlap reads itself, and decode.
        disk_cache: Keeps stored pages on a local disk; None to read them from the store every time.
    """

    def __init__(self, workers: Workers, disk_cache: DiskCache | None = None) -> None:
        self._workers = workers
        self.disk_cache = disk_cache

    def fetch(self, requests: Sequence[PageRequest]) -> None:
        """Fill the slots of all requests.

        Raises:
            CorruptionError: A page is not what was written.
            StorageError: The disk or bucket failed.
        """
        ordered = sorted(requests, key=_place)
        try:
            for filesystem, here in _by_filesystem(ordered):
                if filesystem.overlaps_reads:
                    for lot in _lots(here):
                        stored = self._read(lot)
                        pairs = list(zip(lot, stored, strict=True))
                        self._workers.map(self._decode, _split(pairs, self._workers.threads))
                else:
                    self._workers.map(self._read_and_decode, _split(here, 2 * self._workers.threads))
        except BaseException:
            # Ctrl-C ends the wait, not the reads; the caller is about to use the slots for other pages.
            for request in requests:
                request.revoke()
            raise

    def _read_and_decode(self, requests: Sequence[PageRequest]) -> None:
        for lot in _lots(requests, max_bytes=_LOCAL_LOT_BYTES):
            packed = [r for r in lot if self.disk_cache is not None or r.plain_slot is None]
            if len(packed) < len(lot):
                self._read_in_place([r for r in lot if r.plain_slot is not None])
            if packed:
                self._decode(list(zip(packed, self._read(packed), strict=True)))

    def _read_in_place(self, requests: Sequence[PageRequest]) -> None:
        """Pages that are stored as they are: neighbours by one read, straight into their slots."""
        ranges = [_range(request) for request in requests]
        for run in coalesce(ranges, max_gap_bytes=0, max_run_bytes=_LOCAL_LOT_BYTES):
            self._fill(run, [requests[i] for i in run.members])

    def _fill(self, run: ReadRun, requests: Sequence[PageRequest]) -> None:
        with contextlib.ExitStack() as held:
            for request in requests:
                held.enter_context(request.lock)  # against revoke
            slots = [slot for r in requests if (slot := r.plain_slot) is not None]
            if len(slots) < len(requests):
                return  # nobody wants them any more
            views = [memoryview(slot) for slot in slots]  # type: ignore[arg-type]
            requests[0].segment.filesystem.read_into(run.key, run.start, views)
            for request, slot in zip(requests, slots, strict=True):
                request.segment.check_page(request.source, request.page, slot)

    def _read(self, requests: Sequence[PageRequest]) -> list[Buffer]:
        cache, filesystem = self.disk_cache, requests[0].segment.filesystem
        if cache is None:
            return filesystem.read_ranges([_range(r) for r in requests])
        names = [_name(filesystem.url, r) for r in requests]
        stored: list[Buffer | None] = list(cache.get_many(names))
        absent = []
        for i, (request, data) in enumerate(zip(requests, stored, strict=True)):
            if data is None or not request.segment.is_intact(request.source, request.page, data):
                if data is not None:
                    cache.discard(names[i])
                absent.append(i)
        found = filesystem.read_ranges([_range(requests[i]) for i in absent]) if absent else []
        for i, data in zip(absent, found, strict=True):
            stored[i] = data
        if absent:
            cache.put_many([names[i] for i in absent], [bytes(data) for data in found])
        return [data for data in stored if data is not None]

    def _decode(self, pairs: Sequence[tuple[PageRequest, Buffer]]) -> None:
        for request, stored in pairs:
            request.decode(stored)


T = TypeVar("T")
_LOT_BYTES = 64 * 1024 * 1024
_LOCAL_LOT_BYTES = 2 * 1024 * 1024  # what is read is decoded while it is still in the processor's cache


def _by_filesystem(requests: Sequence[PageRequest]) -> list[tuple[Filesystem, list[PageRequest]]]:
    """Requests of each filesystem, in their order."""
    found: dict[int, tuple[Filesystem, list[PageRequest]]] = {}
    for request in requests:
        filesystem = request.segment.filesystem
        found.setdefault(id(filesystem), (filesystem, []))[1].append(request)
    return list(found.values())


def _place(request: PageRequest) -> tuple[str, str, int]:
    return request.segment.entry.uuid, request.source.object, request.page


def _range(request: PageRequest) -> ByteRange:
    source, page = request.source, request.page
    if not 0 <= page < len(source.offsets):
        raise CorruptionError(f"segment {request.segment.entry.uuid} has no page {page} of {source.object}")
    start = int(source.offsets[page])
    return ByteRange(
        layout.segment_key(request.segment.entry.uuid, source.object), start, start + int(source.nbytes[page])
    )


def _name(url: str, request: PageRequest) -> PageName:
    source, page = request.source, request.page
    return PageName(f"{url} {request.segment.entry.uuid}", source.object, page, int(source.nbytes[page]))


def _lots(requests: Sequence[PageRequest], max_bytes: int = _LOT_BYTES) -> list[Sequence[PageRequest]]:
    """Neighbours whose stored bytes fit in ``max_bytes``: reading many pages takes bounded memory."""
    lots: list[Sequence[PageRequest]] = []
    first = nbytes = 0
    for i, request in enumerate(requests):
        size = int(request.source.nbytes[request.page])
        if i > first and nbytes + size > max_bytes:
            lots.append(requests[first:i])
            first, nbytes = i, 0
        nbytes += size
    return [*lots, requests[first:]]


def _split(items: Sequence[T], parts: int) -> list[Sequence[T]]:
    """About equal runs of neighbours, none empty."""
    edges = [round(i * len(items) / parts) for i in range(parts + 1)]
    return [items[a:b] for a, b in itertools.pairwise(edges) if a < b]
