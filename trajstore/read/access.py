"""What the views of one store handle share: page indexes, cache, output buffers, and how another process opens the store.

Invariant: one cache per handle and type of its columns, whose memory is taken when first needed; closing the handle gives it
back, and takes seconds at most, even if the storage hangs.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from trajstore.deferred import torch
from trajstore.errors import ClosedError, ForkedError, StoreNotFoundError, UntrustedBaseError
from trajstore.format.snapshot import Base
from trajstore.read.bases import Bases, LazyBase
from trajstore.read.buffer_pool import BufferPool
from trajstore.read.cache import PageCache
from trajstore.read.disk_cache import DiskCache
from trajstore.read.fetch import PageFetcher
from trajstore.read.kept_statistics import KeptStatistics
from trajstore.read.segment import SegmentReaders
from trajstore.read.table import TrajectoryTable
from trajstore.schema import Schema
from trajstore.storage.commit import History, Version
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.turns import Turns
from trajstore.storage.workers import FORKED, Workers
from trajstore.stored import Array

Closable = TypeVar("Closable", bound=Any)
_KEPT_BUFFERS = 2
_JOIN_S = 1.0  # closing waits no longer for a storage that hangs


class StoreAccess:
    """The reading half of a store handle.

    Args:
        filesystem: Where the store is.
        store_uuid: Its identity.
        workers: Read and decode.
        cache_bytes: Of the shared page cache.
        disk_cache: Keeps stored pages on a local disk, or None.
        bases: Other stores that this one refers to.
        keep_statistics: Keep statistics of versions in the store, not in memory only.
        reopen: Version and rows to a view of them, in any process; None if no other can open the store.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        store_uuid: str,
        workers: Workers,
        *,
        cache_bytes: int,
        disk_cache: DiskCache | None,
        bases: Bases,
        reopen: Callable[[int, Array], Any] | None,
        keep_statistics: bool = False,
    ) -> None:
        self.filesystem = filesystem
        self.store_uuid = store_uuid
        self.bases = bases
        self.turns = Turns()  # of the edits of the handle, and of its views
        self.readers = SegmentReaders(filesystem, workers)
        self.statistics = KeptStatistics(filesystem, writes=keep_statistics)
        self._bases_named: dict[tuple[str, str], LazyBase] = {}
        self._reopen = reopen
        self.cache_bytes = cache_bytes
        self.disk_cache = disk_cache
        # Reads wait for the disk more than they compute: two threads per processor.
        self._reading = Workers(2 * (os.cpu_count() or 1), name="trajstore-read")
        self._fetcher = PageFetcher(self._reading, disk_cache)
        self._url = filesystem.url
        self._closed = False
        self._pid = os.getpid()
        self._loaders: weakref.WeakSet[Any] = weakref.WeakSet()
        self.buffers = BufferPool(_KEPT_BUFFERS)  # of batches whose steps were named
        self._choosing = threading.Lock()
        self._cache: PageCache | None = None  # of all views and loaders of the handle, from the first of them on
        self._former: list[weakref.ref[PageCache]] = []  # of columns that have other types now

    def check_open(self) -> None:
        """Raise ``ClosedError`` once the handle is closed, ``ForkedError`` in a forked child."""
        if self._pid != os.getpid():
            raise ForkedError(FORKED)
        if self._closed:
            raise ClosedError(f"the store {self._url} is closed; open it again")

    def table(self, history: History, version: Version, *, whole: bool = False) -> TrajectoryTable:
        """The trajectories of a version; ``whole`` as for the table.

        Other stores in which some lie are opened when those are first read, with the errors of ``Bases.open``.
        """
        table = TrajectoryTable(history, version, whole=whole)
        for entry in table.segments:
            for part in entry.parts if entry.layers else (entry,):
                if part.base is not None:
                    self.readers.place(part, self._base(version.snapshot.bases[part.base], history, version))
                elif self.readers.any_elsewhere:
                    self.readers.place(part, None)  # an earlier version may have referred to it
        return table

    def _base(self, base: Base, history: History, version: Version) -> LazyBase:
        """A base of a version, the same one for all versions that have it in the same place."""
        key = base.url, base.store_uuid
        if key not in self._bases_named:
            opened = functools.partial(self._open_base, base, history, version)
            self._bases_named[key] = LazyBase(opened)
        return self._bases_named[key]

    def _open_base(self, base: Base, history: History, version: Version) -> Filesystem:
        """A base of a version: where that version says, or where the latest one says, since stores are moved."""
        try:
            return self.bases.open(base)
        except (StoreNotFoundError, UntrustedBaseError):
            latest = history.latest(version.number).snapshot.bases
            urls = {other.url for other in latest if other.store_uuid == base.store_uuid} - {base.url}
            if not urls:
                raise
            return self.bases.open(replace(base, url=min(urls)))

    def reopening(self) -> Callable[[int, Array], Any]:
        """Version and rows to a view of them, in any process.

        Raises:
            StoreNotFoundError: No other process can open the store.
        """
        if self._reopen is None:
            raise StoreNotFoundError(
                f"views and loaders of {self._url} cannot go to another process, which has no way to them: open a store "
                "on a disk or in a bucket with trajstore.open(url)"
            )
        return self._reopen

    def cache_for(self, schema: Schema) -> PageCache:
        """The cache of all views whose columns have these types: a store that was cleared may have others."""
        with self._choosing:
            for cache in (self._cache, *(former() for former in self._former)):
                if cache is not None and cache.admits(schema):
                    return cache
            if self._cache is not None:
                self._former = [f for f in self._former if f() is not None] + [weakref.ref(self._cache)]
            # It takes memory only when a loader says what that needs.
            self._cache = PageCache(self.cache_bytes, self.readers, self._fetcher)
            self._cache.admits(schema)
            return self._cache

    def private_cache(self, nbytes: int | None, device: torch.device | str | None) -> PageCache:
        """A cache of a loader's own."""
        return PageCache(
            self.cache_bytes if nbytes is None else nbytes, self.readers, self._fetcher, device=device or "cpu"
        )

    def opened(self, loader: Closable) -> Closable:
        """Note a loader, which is closed with the handle."""
        self._loaders.add(loader)
        return loader

    def close(self) -> None:
        """Close loaders; give memory and threads back. May be called twice."""
        self._closed = True
        for loader in list(self._loaders):
            loader.close()
        for cache in (self._cache, *(former() for former in self._former)):
            if cache is not None:
                cache.clear()
        self._reading.close(_JOIN_S)
        self.bases.close()
