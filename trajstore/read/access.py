"""What the views of one store handle share: page indexes, the page cache, and how another process opens the same store.

Invariant: one cache per handle, made when first needed; closing the handle gives its memory back.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import torch

from trajstore.read.cache import PageCache
from trajstore.read.disk_cache import DiskCache
from trajstore.read.fetch import PageFetcher
from trajstore.read.segment import SegmentReaders
from trajstore.read.variable import VariablePages
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.workers import Workers
from trajstore.stored import Array

Closable = TypeVar("Closable", bound=Any)
# Of the cache's bytes, for strings and lists, which have no arena.
_VARIABLE_SHARE = 8


class StoreAccess:
    """The reading half of a store handle.

    Args:
        filesystem: Where the store is.
        workers: Read and decode.
        cache_bytes: Of the shared page cache.
        disk_cache: Keeps stored pages on a local disk, or None.
        reopen: Version and rows to a view of them, in any process.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        workers: Workers,
        *,
        cache_bytes: int,
        disk_cache: DiskCache | None,
        reopen: Callable[[int, Array], Any],
    ) -> None:
        self.readers = SegmentReaders(filesystem, workers)
        self.reopen = reopen
        self.cache_bytes = cache_bytes
        self.disk_cache = disk_cache
        # Reads wait for the disk more than they compute: two threads per processor.
        self._reading = Workers(2 * (os.cpu_count() or 1), name="trajstore-read")
        self._fetcher = PageFetcher(filesystem, self._reading, disk_cache)
        self._loaders: weakref.WeakSet[Any] = weakref.WeakSet()

    @cached_property
    def cache(self) -> PageCache:
        """Shared by all views and loaders of the handle."""
        return PageCache(self.cache_bytes, self.readers, self._fetcher)

    @cached_property
    def variable(self) -> VariablePages:
        """The same for strings and lists."""
        return VariablePages(self.cache_bytes // _VARIABLE_SHARE, self._fetcher)

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
        for loader in list(self._loaders):
            loader.close()
        if "cache" in self.__dict__:
            self.cache.clear()
        self._reading.close()
