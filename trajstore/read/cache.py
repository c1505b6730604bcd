"""The page cache: decoded pages of a store, shared by all its views and loaders.

Invariant: a page that a lease covers is neither evicted nor moved. Nobody waits while holding a lease, except for reads that
are under way, so leases cannot wait for each other in a circle. Whoever waits for leases to end stands in line, and nobody
who comes later takes a lease before.

A look-up is one array operation per group of columns, whatever the number of windows. Pages that are missing are read
together. The least recently used pages go first, by the tick of the lease that used them last.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trajstore.deferred import torch
from trajstore.errors import CacheTooSmallError, CorruptionError, SchemaError, StorageTimeoutError, TrajstoreError
from trajstore.format.manifest import SegmentEntry
from trajstore.read.arena import ABSENT, LOADING, Geometry, Need, PageGroup, with_index
from trajstore.read.arenas import Arenas
from trajstore.read.extents import extent_rows
from trajstore.read.fetch import PageFetcher, PageRequest
from trajstore.read.leases import CacheStats, Claimed, Demand, DoesNotFitError, Lease, Pages, Reservation
from trajstore.read.segment import SegmentReader, SegmentReaders
from trajstore.read.variable import VariablePages
from trajstore.schema import Schema
from trajstore.stored import Array

DEFAULT_CACHE_BYTES = 1 << 30
# Page indexes that are read when a loader is made, to learn how large pages are: those of the longest segments.
_SEGMENTS_PROBED = 8
_WAIT_S = 600.0

# Raised with the books in order.
_EXPECTED = (DoesNotFitError, TrajstoreError)


class PageCache:
    """Decoded pages in memory.

    Args:
        nbytes: Hard bound of all arenas.
        readers: Page indexes of segments.
        fetcher: Reads pages.
        device: Where the arenas are.
    """

    def __init__(
        self, nbytes: int, readers: SegmentReaders, fetcher: PageFetcher, *, device: torch.device | str = "cpu"
    ) -> None:
        self.nbytes = nbytes
        self.device = with_index(device)
        self._fetcher = fetcher
        self._readers = readers
        self._lock = threading.RLock()  # entered by itself: Ctrl-C in a condition's own __exit__ would leave it locked
        self._condition = threading.Condition(self._lock)
        self._arenas = Arenas(nbytes, self.device)
        self._numbers: dict[tuple[str, ...], int] = {}  # of segments, by key
        self._variants: dict[str, list[int]] = {}  # numbers of a segment with one set of layers or another, by uuid
        self._entries: list[SegmentEntry] = []
        self._variable: VariablePages | None = None
        self._schema = Schema()  # every column seen so far: loaders of several versions share the cache
        self._types: dict[str, tuple[Any, ...]] = {}  # of all columns seen, by path
        self._admitted = self._schema
        self._tick = 0
        self._leases: dict[int, int] = {}  # ticks, and the threads that hold them: each at most one
        self._broken = False  # Ctrl-C broke off in the middle of the bookkeeping
        self._line: collections.deque[object] = collections.deque()  # of those who wait for leases to end
        self._stats = CacheStats()

    def stats(self) -> CacheStats:
        """The counters as they are now."""
        with self._lock:
            return replace(
                self._stats,
                evictions=self._arenas.evictions,
                used_bytes=self._arenas.used_bytes,
                capacity_bytes=self._arenas.capacity_bytes,
            )

    def variable_pages(self) -> VariablePages:
        """Pages of strings and lists, which have no arena; the first call sets a part of the cache aside for them."""
        with self._condition:
            if self._variable is None:
                self._variable = VariablePages(self._arenas.set_aside(), self._fetcher)
            return self._variable

    def group(self, name: str) -> PageGroup:
        """A group that is reserved."""
        return self._arenas.groups[name]

    def admits(self, schema: Schema) -> bool:
        """Whether no column has another type than the one of that name before it, so that they can share arenas."""
        with self._lock:
            if schema is not self._admitted:
                types = {c.path: (c.dtype, c.shape, c.extra, c.ragged) for c in schema}
                if any(self._types.get(path, kind) != kind for path, kind in types.items()):
                    return False
                self._types.update(types)
                self._admitted = schema
                self._schema = _with_columns_of(schema, self._schema)
            return True

    def number_segments(self, entries: Sequence[SegmentEntry]) -> Array:
        """The cache's numbers of segments, ``(n,)`` int64; new ones get the next."""
        with self._lock:
            for entry in entries:
                if entry.key not in self._numbers:
                    self._numbers[entry.key] = len(self._entries)
                    self._variants.setdefault(entry.uuid, []).append(len(self._entries))
                    self._entries.append(entry)
            for group in self._arenas.groups.values():
                group.know_segments(len(self._entries))
            return np.fromiter((self._numbers[entry.key] for entry in entries), np.int64, len(entries))

    def reserve(
        self,
        needs: Mapping[str, Need],
        segments: Array,
        schema: Schema,
        *,
        page_rows: Mapping[str, int] | None = None,
    ) -> Reservation:
        """Keep arenas for some groups of columns.

        Args:
            needs: Group name -> what one window needs of it.
            segments: Numbers of the segments that will be read.
            schema: Of the store.
            page_rows: Rows of pages that no page index tells of yet.

        Raises:
            CacheTooSmallError: One window needs more than the cache has; says how much.
        """
        probed = sorted(np.unique(segments).tolist(), key=lambda n: -self._entries[n].steps)[:_SEGMENTS_PROBED]
        readers = self._readers.open_many([self._entries[n] for n in probed], schema)
        with self._lock:
            self._schema = _with_columns_of(schema, self._schema)
            largest = _largest_extents(needs, readers)
            for name, rows in (page_rows or {}).items():
                largest[name] = max(largest.get(name, 1), extent_rows(rows))
            self._provide(needs, largest)
            self._arenas.begin_use(needs)
        reservation = Reservation(self, list(needs))
        try:
            self.open_segments(np.array(probed, np.int64))
        except BaseException:
            reservation.release()
            raise
        return reservation

    def open_segments(self, numbers: Array) -> None:
        """Read the page indexes of segments, so that their pages have numbers in every group.

        Raises:
            CacheTooSmallError: A segment has pages too large for the cache.
            CorruptionError: A page index does not agree with the manifest.
        """
        wanted = np.unique(numbers).tolist()
        readers = self._readers.open_many([self._entries[n] for n in wanted], self._schema)
        with self._lock:
            self._provide({}, _largest_extents(self._arenas.needs, readers))
            for number, reader in zip(wanted, readers, strict=True):
                for group in self._arenas.groups.values():
                    if group.base[number] < 0 and group.name in reader.by_group:
                        other = self._same_pages(group, number)
                        if other is None:
                            group.add_segment(number, _geometry(reader, group.name))
                        else:
                            group.share_segment(number, other)

    @property
    def pages_read(self) -> int:
        """Pages read so far."""
        return self._stats.pages_read

    def acquire(self, demands: Sequence[Demand], *, alone: bool = False, counted: bool = False) -> Lease:
        """Have pages resident, reading those that are not.

        Args:
            demands: What is wanted.
            alone: Evict everything else first, so that what fits in an empty cache fits.
            counted: Whether these look-ups are in the counters already.

        Raises:
            DoesNotFitError: They do not fit at once.
            CorruptionError: A page is not what was written.
            StorageError: The disk or bucket failed.
        """
        while True:
            claim: Claimed | None = None
            try:
                with self._lock:
                    claim = None if self._line or self._broken else self._claim(demands, alone=alone)
                    if claim is None:
                        claim = self._claim_in_turn(demands, alone=alone)
                    if not counted:
                        self._count(claim)
                        counted = True
                if claim.complete:
                    return Lease(self, claim.tick, claim.starts)
                self._load(claim)
                with self._lock:
                    while any((group.row_of_page[pages] == LOADING).any() for group, pages in claim.theirs):
                        self._wait("a page that another thread reads")
                    starts = [demand.group.row_of_page[demand.numbers()] for demand in demands]
                    if all(int(found.min()) >= 0 for found in starts):
                        return Lease(self, claim.tick, starts)
            except BaseException as error:
                self._give_up(claim, error)
                raise
            self._release(claim.tick)  # the other thread failed: try it here

    def clear(self) -> None:
        """Give all pages and their memory up."""
        with self._lock:
            self._arenas.clear()

    def _release(self, tick: int) -> None:
        with self._lock:
            self._leases.pop(tick, None)
            self._condition.notify_all()

    def _give_up(self, claim: Claimed | None, error: BaseException) -> None:
        with self._lock:
            for tick in [tick for tick, thread in self._leases.items() if thread == threading.get_ident()]:
                del self._leases[tick]
            if not (isinstance(error, _EXPECTED) if claim is None else claim.settled):
                self._broken = True
            self._condition.notify_all()

    def _unreserve(self, names: Sequence[str]) -> None:
        with self._lock:
            self._arenas.end_use(names)

    def _load(self, claim: Claimed) -> None:
        """Read pages into the extents that were taken for them; publish them, or give the extents back."""
        loaded = False
        nbytes = 0
        try:
            wanted = [(group, page) for group, pages in claim.mine for page in pages.tolist()]
            requests = [self._request(group, page) for group, page in wanted]
            self._fetcher.fetch(requests)
            if self.device.type != "cpu":
                for (group, page), request in zip(wanted, requests, strict=True):
                    group.upload(group.loading[page], request.slots)
            loaded = True
        finally:
            with self._lock:
                for group, pages in claim.mine:
                    for page in pages.tolist():
                        group.end_load(page, loaded=loaded)
                        nbytes += int(group.extent_of_page[page]) * group.row_bytes
                if loaded:
                    self._stats.pages_read += len(requests)
                    self._stats.bytes_read += sum(int(r.source.nbytes[r.page]) for r in requests)
                    self._stats.bytes_decoded += nbytes
                claim.settled = True
                self._condition.notify_all()

    def _request(self, group: PageGroup, page: int) -> PageRequest:
        segment = int(group.segment_of_page[page])
        whole = self._readers.open(self._entries[segment], self._schema)
        reader, source = whole.holder(group.name), whole.by_group[group.name]
        number = page - int(group.base[segment])
        rows = reader.decoded_rows(source, number)
        slots = group.rows_at(group.loading[page], rows) if self.device.type == "cpu" else group.staging(rows)
        return PageRequest(reader, source, number, slots)

    # What follows runs under the condition's lock.

    def _same_pages(self, group: PageGroup, number: int) -> int | None:
        """Another number of a segment, with other layers, whose pages of a group are known and the same."""
        entry = self._entries[number]
        for other in self._variants[entry.uuid]:
            if group.base[other] < 0 or other in group.pinned:  # what is being written may still move
                continue
            if _layer_of(entry, group.name) == _layer_of(self._entries[other], group.name):
                return other
        return None

    def _wait(self, what: str) -> None:
        if not self._condition.wait(_WAIT_S):
            raise StorageTimeoutError(f"waited {_WAIT_S:.0f} s for {what}; the storage does not answer")

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Those who come after this block has begun take no lease before it ends."""
        ticket = object()
        self._line.append(ticket)
        try:
            while self._line[0] is not ticket:
                self._wait("other threads that wait for room in the page cache")
            yield
        finally:
            self._line.remove(ticket)
            self._condition.notify_all()

    def _wait_for_leases(self) -> None:
        """Wait until nobody copies; what was known of the cache before may have changed then."""
        with self._turn():
            while self._leases:
                self._wait("batches that are being copied")

    def _claim(self, demands: Sequence[Demand], *, alone: bool) -> Claimed | None:
        """Lease what is resident, and extents for what is not; None if there is no room until some lease ends."""
        self._tick += 1
        tick = self._tick
        wanted = [(demand.group, demand.numbers()) for demand in demands]
        starts = [group.row_of_page[pages] for group, pages in wanted]
        for group, pages in wanted:
            group.last_use[pages] = tick
        if all(int(found.min()) >= 0 for found in starts):
            self._leases[tick] = threading.get_ident()
            return Claimed(tick, starts, [], [], complete=True, settled=True)
        if alone and not self._leases:
            for group, _ in wanted:
                collections.deque(self._arenas.evicting(group, tick + 1), maxlen=0)
        mine, theirs = _missing(wanted)
        if self._arenas.make_room(mine, floor=min(self._leases, default=tick)):
            self._leases[tick] = threading.get_ident()
            return Claimed(tick, starts, mine, theirs, complete=False, settled=False)
        if self._leases:
            return None
        if alone:
            raise CacheTooSmallError(
                f"cache_bytes={self.nbytes} cannot hold one window beside what was appended and is not yet committed; "
                "flush() the store, or pass more cache_bytes"
            )
        raise DoesNotFitError

    def _claim_in_turn(self, demands: Sequence[Demand], *, alone: bool) -> Claimed:
        """The same, when there is room; whoever holds pages is only reading or copying them."""
        with self._turn():
            while self._broken or (claim := self._claim(demands, alone=alone)) is None:
                if self._broken and not self._leases:
                    self._provide({}, {})  # anew: what the arenas hold and what is free can no longer be told apart
                else:
                    self._wait("room in the page cache")
            return claim

    def _count(self, claim: Claimed) -> None:
        asked = sum(found.size for found in claim.starts)
        missed = 0 if claim.complete else sum(int((found < 0).sum()) for found in claim.starts)
        self._stats.hits += asked - missed
        self._stats.misses += missed

    def _provide(self, needs: Mapping[str, Need], largest: Mapping[str, int]) -> None:
        """Have arenas for these needs and all that are in use; if there are none, divide the cache anew.

        Args:
            needs: By group.
            largest: Rows of the largest extent that some pages need, by group.
        """
        while True:
            division = self._arenas.division(needs, largest)
            if self._arenas.serve(division) and not self._broken:
                return
            if not self._leases:
                self._broken = True  # until it is done
                self._arenas.divide(division, segments=len(self._entries))
                self._broken = False
                return
            self._wait_for_leases()


def _missing(demands: Sequence[Pages]) -> tuple[list[Pages], list[Pages]]:
    """Pages that nobody has, and pages that other threads are loading."""
    wanted: dict[str, tuple[PageGroup, list[Array]]] = {}
    for group, pages in demands:
        wanted.setdefault(group.name, (group, []))[1].append(pages[group.row_of_page[pages] < 0])
    absent, loading = [], []
    for group, parts in wanted.values():
        pages = np.unique(np.concatenate(parts))
        state = group.row_of_page[pages]
        absent.append((group, pages[state == ABSENT]))
        loading.append((group, pages[state == LOADING]))
    return absent, loading


def _with_columns_of(schema: Schema, other: Schema) -> Schema:
    """A schema, and columns of another one that it lacks."""
    added = tuple(column for column in other if column.path not in schema)
    if not added:
        return schema
    try:
        return Schema((*schema.columns, *added), schema.metadata)
    except SchemaError:  # the store was cleared, and what were columns then are parents of some now
        return schema


def _layer_of(entry: SegmentEntry, name: str) -> str | None:
    """The layer that has a group of columns; None if the segment itself has it."""
    return next((layer.uuid for layer in entry.layers if name in layer.columns), None)


def _largest_extents(needs: Mapping[str, Need], readers: Sequence[SegmentReader]) -> dict[str, int]:
    """Rows of the largest extent that pages of these segments need, by group."""
    return {name: max((extent_rows(r.page_rows_of(name)) for r in readers), default=1) for name in needs}


def _geometry(reader: SegmentReader, name: str) -> Geometry:
    source = reader.by_group[name]
    pages = len(source.offsets)
    if pages > 1 and source.page_rows & (source.page_rows - 1):
        raise CorruptionError(
            f"segment {reader.entry.uuid}: {source.object} has pages of {source.page_rows} rows, expected a power of two"
        )
    return Geometry(pages, source.page_rows, reader.decoded_rows(source, pages - 1))
