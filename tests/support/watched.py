"""A local store whose reads of pages can be counted, held up and spoiled."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from typing import Any

import trajstore
from trajstore.opening import CacheOptions, open_on
from trajstore.read.cache import DEFAULT_CACHE_BYTES
from trajstore.storage.filesystem import Buffer, ReadRun
from trajstore.storage.local import LocalFilesystem


class WatchedDisk(LocalFilesystem):
    """A local filesystem that asks before it reads pages.

    Args:
        root: The store's folder.
        like_a_bucket: Whether all reads of a batch are one call, made by the thread that wants it.

    Attributes:
        runs: How often each run was read.
        before: Called with each run before it is read; what it raises is what the read raises.
    """

    def __init__(self, root: str, *, like_a_bucket: bool = False) -> None:
        super().__init__(root)
        self.overlaps_reads = like_a_bucket
        self.max_gap_bytes = -1  # pages are read one by one, so that each can be counted
        self.runs: collections.Counter[ReadRun] = collections.Counter()
        self.before: Callable[[ReadRun], Any] = lambda run: None
        self._lock = threading.Lock()

    def read_runs(self, runs: Sequence[ReadRun]) -> list[Buffer]:
        """The bytes of each run."""
        for run in runs:
            with self._lock:
                self.runs[run] += 1
            self.before(run)
        return super().read_runs(runs)

    def open(self, cache_bytes: int = DEFAULT_CACHE_BYTES) -> trajstore.Store:
        """The store, to be read."""
        return open_on(self, "r", cache=CacheOptions(cache_bytes))


class Gate:
    """Holds reads up until it is opened.

    Attributes:
        reached: Set once a read has come.
    """

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, run: ReadRun) -> None:
        self.reached.set()
        self._opened.wait()

    def open(self) -> None:
        """Let them all go."""
        self._opened.set()
