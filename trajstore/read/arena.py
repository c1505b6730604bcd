"""Pages of one group of columns in memory: an arena per column, a page table, and when each page was last used.

Invariant: ``row_of_page[p] >= 0`` exactly while page ``p`` lies in the arena, from that row on. A group has no lock of its
own: its cache's lock guards everything here but the rows themselves, which belong to whoever is filling or leasing them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.deferred import torch
from trajstore.format import layout
from trajstore.read.extents import Extents, extent_rows
from trajstore.schema import Column
from trajstore.stored import Array

# Far below zero: a row inside an absent page still is negative.
ABSENT = -(1 << 62)
LOADING = -(1 << 61)
_ONE_PAGE_SHIFT = 62  # every row of a column with a single page is in page 0


def group_name(column: Column) -> str:
    """Columns of one group share their pages: those of an Arrow file come together, a tensor and a derived column are alone.

    A derived column lies in a layer, which has an Arrow file of its own for it if it is a scalar.
    """
    if column.stored_in == "zarr" or column.presence == "derived":
        return column.path
    return layout.STATES_FILE if column.extra else layout.STEPS_FILE


@dataclass(frozen=True)
class Geometry:
    """Where rows of a segment's column lie in pages: row ``r`` is in page ``r >> shift``, at ``r & mask`` there."""

    pages: int
    page_rows: int  # of every page but the last; a power of two unless there is only one
    last_rows: int  # of the last page, as decoded

    @property
    def shift(self) -> int:
        """Binary logarithm of the rows per page."""
        return _ONE_PAGE_SHIFT if self.pages == 1 else self.page_rows.bit_length() - 1


class PageGroup:
    """The resident pages of columns that share them.

    Args:
        name: See ``group_name``.
        columns: Of fixed size.
        device: Where the arenas are.
    """

    def __init__(self, name: str, columns: Sequence[Column], device: torch.device) -> None:
        self.name = name
        self.columns = tuple(columns)
        self.device = device
        self._stream: Any = None
        self.extents = Extents(1, largest=1)
        self.arenas: dict[str, torch.Tensor] = {}  # (capacity, row_bytes) uint8 by column
        self._arrays: dict[str, Array] = {}  # the same memory, if it is main memory
        self.largest = 1  # rows of the largest extent that any known page needs
        # By page.
        self.row_of_page = np.empty(0, np.int64)  # in the arenas; ABSENT or LOADING if negative
        self.last_use = np.empty(0, np.int64)  # tick
        self.extent_of_page = np.empty(0, np.int32)  # rows that it takes, resident or not
        self.segment_of_page = np.empty(0, np.int32)
        self.pinned: set[int] = set()  # segments whose pages must stay
        self.loading: dict[int, int] = {}  # where pages that are being loaded will be
        self.pages = 0
        # By number of the segment in the cache.
        self.base = np.empty(0, np.int64)  # its first page; -1 while its page index has not been read
        self.shift = np.empty(0, np.int64)
        self.mask = np.empty(0, np.int64)
        self.common_shift: int | None = None  # of all segments so far, if it is the same; -1 if it is not

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all columns."""
        return sum(c.row_bytes for c in self.columns)

    @property
    def used_bytes(self) -> int:
        """Bytes of all extents that are taken."""
        return (self.extents.capacity - self.extents.free_rows) * self.row_bytes if self.arenas else 0

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the arenas."""
        return self.extents.capacity * self.row_bytes if self.arenas else 0

    def allocate(self, capacity: int) -> None:
        """New, empty arenas of ``capacity`` rows. Memory is touched only as pages come."""
        self.extents = Extents(capacity, largest=self.largest)
        self.arenas = {c.path: _arena(capacity, c.row_bytes, self.device) for c in self.columns}
        if self.device.type == "cpu":
            self._arrays = {path: arena.numpy() for path, arena in self.arenas.items()}
        self.row_of_page[:] = ABSENT
        self.loading.clear()

    def free(self) -> None:
        """Let go of the arenas' memory."""
        self.arenas, self._arrays = {}, {}

    def know_segments(self, count: int) -> None:
        """Make room for segments numbered below ``count``."""
        if count > len(self.base):
            count = max(count, 2 * len(self.base), 64)
            self.base = _grown(self.base, count, -1)
            self.shift = _grown(self.shift, count, 0)
            self.mask = _grown(self.mask, count, 0)

    def add_segment(self, number: int, geometry: Geometry) -> None:
        """Give the pages of a segment numbers."""
        first, self.pages = self.pages, self.pages + geometry.pages
        if self.pages > len(self.row_of_page):
            count = max(self.pages, 2 * len(self.row_of_page), 256)
            self.row_of_page = _grown(self.row_of_page, count, ABSENT)
            self.last_use = _grown(self.last_use, count, 0)
            self.extent_of_page = _grown(self.extent_of_page, count, 0)
            self.segment_of_page = _grown(self.segment_of_page, count, -1)
        self.segment_of_page[first : self.pages] = number
        self.extent_of_page[first : self.pages] = extent_rows(geometry.page_rows)
        self.extent_of_page[self.pages - 1] = extent_rows(geometry.last_rows)
        self.shift[number] = geometry.shift
        self.mask[number] = (1 << geometry.shift) - 1
        self.base[number] = first
        if self.common_shift is None or self.common_shift == geometry.shift:
            self.common_shift = geometry.shift
        else:
            self.common_shift = -1

    def share_segment(self, number: int, other: int) -> None:
        """A segment whose pages of this group are those of another number: it has other layers."""
        self.base[number], self.shift[number], self.mask[number] = self.base[other], self.shift[other], self.mask[other]

    def pages_of(self, number: int) -> Array:
        """The group's numbers of a segment's pages, ``(n,)`` int64."""
        base = int(self.base[number])
        if base < 0:
            return np.empty(0, np.int64)
        mine = self.segment_of_page[base : self.pages] == number
        return np.arange(base, base + (len(mine) if mine.all() else int(np.argmin(mine))))

    def pinned_rows(self) -> int:
        """Rows of the arenas that nobody may evict."""
        pages = [self.pages_of(number) for number in self.pinned]
        return sum(int(self.extent_of_page[p[self.row_of_page[p] >= 0]].sum()) for p in pages)

    def move_segment(self, number: int, pages: int) -> None:
        """Give a growing segment numbers for more pages; those that it has keep their places."""
        before = self.pages_of(number)
        rows, use, extent = self.row_of_page[before], self.last_use[before], self.extent_of_page[before]
        self.row_of_page[before] = ABSENT
        self.segment_of_page[before] = -1
        self.add_segment(number, Geometry(pages, 1 << int(self.shift[number]), 1 << int(self.shift[number])))
        after = slice(int(self.base[number]), int(self.base[number]) + len(before))
        self.row_of_page[after], self.last_use[after], self.extent_of_page[after] = rows, use, extent

    def trim(self, page: int, size: int) -> None:
        """Give back what a resident page does not need of its extent."""
        start, extent = int(self.row_of_page[page]), int(self.extent_of_page[page])
        while extent > size:
            extent //= 2
            self.extents.give(start + extent, extent)
        self.extent_of_page[page] = extent

    def rows_at(self, start: int, rows: int) -> dict[str, Array]:
        """Rows of the arenas, ``(rows, row_bytes)`` uint8 by column; arenas in main memory only."""
        return {path: array[start : start + rows] for path, array in self._arrays.items()}

    def staging(self, rows: int) -> dict[str, Array]:
        """Memory for a page on its way to a device."""
        return {c.path: np.empty((rows, c.row_bytes), np.uint8) for c in self.columns}

    def upload(self, start: int, staged: Mapping[str, Array]) -> None:
        """Copy a page to its place on the device; when this returns it is there."""
        with self._upload_stream():
            for path, rows in staged.items():
                self.arenas[path][start : start + len(rows)].copy_(torch.from_numpy(rows))

    def _upload_stream(self) -> AbstractContextManager[Any]:
        """A stream of its own on a CUDA device: the default one would wait for whatever the consumer has queued there."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._stream)

    def begin_load(self, page: int, start: int) -> None:
        """An extent was taken for a page."""
        self.row_of_page[page] = LOADING
        self.loading[page] = start

    def end_load(self, page: int, *, loaded: bool) -> None:
        """The page's rows are there, or will not be."""
        start = self.loading.pop(page)
        if loaded:
            self.row_of_page[page] = start
        else:
            self.row_of_page[page] = ABSENT
            self.extents.give(start, int(self.extent_of_page[page]))

    def evict(self, page: int) -> None:
        """Give a page's extent back."""
        self.extents.give(int(self.row_of_page[page]), int(self.extent_of_page[page]))
        self.row_of_page[page] = ABSENT

    def evictable(self, before: int) -> Array:
        """Resident pages last used before a tick, the least recently used first: ``(n,)`` int64."""
        pages = np.flatnonzero((self.row_of_page[: self.pages] >= 0) & (self.last_use[: self.pages] < before))
        if self.pinned:
            pages = pages[~np.isin(self.segment_of_page[pages], list(self.pinned))]
        return pages[np.argsort(self.last_use[pages], kind="stable")]


@dataclass(frozen=True)
class Need:
    """What one window must have resident at once, of one group.

    Attributes:
        columns: All columns that the group is to hold.
        pages: Most pages that a window touches.
        rows: All rows that will be read, in extents.
    """

    columns: tuple[Column, ...]
    pages: int
    rows: int

    def joined(self, other: Need | None) -> Need:
        """What serves both."""
        if other is None:
            return self
        columns = dict.fromkeys([*other.columns, *self.columns])
        return Need(tuple(columns), max(self.pages, other.pages), max(self.rows, other.rows))


def _arena(rows: int, row_bytes: int, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":  # NumPy asks for huge pages, which makes random access to small rows faster
        return torch.from_numpy(np.empty((rows, row_bytes), np.uint8))
    with torch.inference_mode(mode=False):  # else only code in inference mode could fill it
        arena = torch.empty((rows, row_bytes), dtype=torch.uint8, device=device)
    if device.type == "cuda":
        # The memory may be that of a tensor which kernels of this stream still use; other streams are about to fill it.
        torch.cuda.current_stream(device).synchronize()
    return arena


def with_index(device: torch.device | str) -> torch.device:
    """The same device, a CUDA device with its index: which one is current differs between threads."""
    found = torch.device(device)
    if found.type != "cuda" or found.index is not None:
        return found
    return torch.device("cuda", torch.cuda.current_device())


def _grown(array: Array, count: int, fill: int) -> Array:
    out = np.full(count, fill, array.dtype)
    out[: len(array)] = array
    return out
