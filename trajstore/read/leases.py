"""What passes between the page cache and those who copy from it: demands, leases, reservations, counters.

Invariant: a lease or a reservation that is given back twice is given back once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from trajstore.read.arena import PageGroup
from trajstore.stored import Array

if TYPE_CHECKING:
    from trajstore.read.cache import PageCache

Pages: TypeAlias = tuple[PageGroup, Array]  # page numbers of any shape


@dataclass(frozen=True, eq=False)
class Demand:
    """Pages that are wanted, repeated as they come.

    Attributes:
        group: Of columns.
        segments: ``(n,)`` int64, the cache's numbers.
        pages: ``(n, w)`` int64, pages of that segment.
    """

    group: PageGroup
    segments: Array
    pages: Array

    def numbers(self) -> Array:
        """``(n, w)``: the group's numbers of the pages, which may change while the lock is not held."""
        numbers: Array = self.pages + self.group.base[self.segments][:, None]
        return numbers


@dataclass(eq=False, slots=True)
class Claimed:
    """A lease, some of whose pages may have to be read."""

    tick: int
    starts: list[Array]  # for each demand, where its pages are; negative where they are not
    mine: list[Pages]  # to be read by whoever has the claim
    theirs: list[Pages]  # that other threads are reading
    complete: bool  # whether all pages are there
    settled: bool  # whether no extent is taken for a page that is not there


class DoesNotFitError(Exception):
    """The pages asked for are more than the cache holds at once: ask for fewer."""


@dataclass
class CacheStats:
    """What a cache has done. Rows are counted per group of columns that share their pages, window and offset.

    Attributes:
        hits: Rows that were resident when asked for.
        misses: Rows whose page had to be read.
        pages_read: Pages read and decoded.
        bytes_read: Their stored bytes.
        bytes_decoded: Their bytes in memory.
        evictions: Pages given up for others.
        used_bytes: Bytes of the arenas that hold pages now.
        capacity_bytes: Bytes of the arenas.
    """

    hits: int = 0
    misses: int = 0
    pages_read: int = 0
    bytes_read: int = 0
    bytes_decoded: int = 0
    evictions: int = 0
    used_bytes: int = 0
    capacity_bytes: int = 0


class Lease:
    """Pages that stay where they are until ``release``."""

    __slots__ = ("_cache", "_tick", "starts")

    def __init__(self, cache: PageCache, tick: int, starts: list[Array]) -> None:
        self._cache = cache
        self._tick = tick
        self.starts = starts  # for each demand: the arena row at which each page begins, shaped like the demand

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """The pages may go. May be called twice."""
        self._cache._release(self._tick)


class Reservation:
    """Arenas that are kept as long as somebody uses them."""

    def __init__(self, cache: PageCache, names: Sequence[str]) -> None:
        self._cache = cache
        self._names = names
        self._pid = os.getpid()

    def release(self) -> None:
        """They are no longer used. May be called twice."""
        names, self._names = self._names, []
        if self._pid == os.getpid():  # in a forked child, whoever held the lock is not there to let go of it
            self._cache._unreserve(names)
