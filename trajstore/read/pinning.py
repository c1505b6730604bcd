"""Rows of segments that are still being written, in pages of the cache that stay.

Invariant: what was added stays where it is until it is released; pins never take so much that a window would not fit beside
them. This is a part of the page cache with a file of its own: it works under the cache's lock.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from trajstore.deferred import torch
from trajstore.format.manifest import SegmentEntry
from trajstore.read.arena import Geometry
from trajstore.read.cache import PageCache
from trajstore.read.extents import extent_rows
from trajstore.stored import Array


class PinnedRows:
    """The pinned pages of a cache.

    Args:
        cache: The cache.
    """

    def __init__(self, cache: PageCache) -> None:
        self._cache = cache

    def add(self, number: int, name: str, first: int, rows: Mapping[str, Array], *, page_rows: int) -> bool:
        """Put rows of a segment that is still being written into pages that stay until ``release``.

        Args:
            number: Of the segment.
            name: Of the group.
            first: How many rows the segment has already.
            rows: ``(n, row_bytes)`` uint8 by column.
            page_rows: Rows per page, a power of two.

        Returns:
            Whether there was room for them.
        """
        cache = self._cache
        count = len(next(iter(rows.values())))
        with cache._lock:
            group = cache._arenas.groups[name]
            group.know_segments(len(cache._entries))
            last = (first + count - 1) // page_rows
            if group.base[number] < 0:
                group.add_segment(number, Geometry(max(8, last + 1), page_rows, page_rows))
                group.pinned.add(number)
            elif last >= len(group.pages_of(number)):
                group.move_segment(number, 2 * (last + 1))
            base = int(group.base[number])
            window = cache._arenas.needs[name].pages * group.largest
            if group.pinned_rows() + (2 + count // page_rows) * page_rows > group.extents.capacity - max(
                window, group.extents.capacity // 2
            ):
                return False
            evicting = cache._arenas.evicting(group, min(cache._leases, default=cache._tick + 1))
            for page in range(base + first // page_rows, base + last + 1):
                if group.row_of_page[page] < 0:
                    start = group.extents.take(page_rows)
                    while start is None and next(evicting, False):
                        start = group.extents.take(page_rows)
                    if start is None:
                        return False
                    group.row_of_page[page] = start
                    group.extent_of_page[page] = page_rows
            pages = group.row_of_page[base + first // page_rows : base + last + 1]
            # Pages that lie end to end are filled in one go.
            breaks = (np.flatnonzero(np.diff(pages) != page_rows) + 1).tolist()
            for begin, end in zip([0, *breaks], [*breaks, len(pages)], strict=True):
                lo = max(begin * page_rows - first % page_rows, 0)
                hi = min(end * page_rows - first % page_rows, count)
                start = int(pages[begin]) + (first % page_rows if begin == 0 else 0)
                for path, data in rows.items():
                    group.arenas[path].numpy()[start : start + hi - lo] = data[lo:hi]
            return True

    def release(self, number: int, entry: SegmentEntry, rows: Mapping[str, int] | None) -> None:
        """A segment is no longer being written.

        Args:
            number: Of the segment.
            entry: How its manifest names it.
            rows: Rows of each group, if all of them are here: they stay like any page that was read. None: they go.
        """
        cache = self._cache
        with cache._lock:
            cache._entries[number] = entry
            if rows is None:
                cache._wait_for_leases()
            for name, group in cache._arenas.groups.items():
                if number not in group.pinned:
                    continue
                group.pinned.discard(number)
                pages = group.pages_of(number)
                if rows is None or name not in rows:
                    for page in pages.tolist():
                        if group.row_of_page[page] >= 0:
                            group.evict(page)
                        group.segment_of_page[page] = -1
                    group.base[number] = -1
                    continue
                group.last_use[pages] = cache._tick
                page_rows = int(group.mask[number]) + 1
                last = (rows[name] - 1) // page_rows
                if last == 0 or name.endswith(".arrow"):
                    group.trim(int(pages[last]), extent_rows(rows[name] - last * page_rows))
            cache._condition.notify_all()

    def copy(self, number: int, name: str, path: str, first: int, out: Array) -> bool:
        """Copy resident rows of a segment; False if some are not resident.

        Args:
            number: Of the segment.
            name: Of the group.
            path: The column.
            first: Row of the segment.
            out: ``(n, row_bytes)`` uint8.
        """
        cache = self._cache
        with cache._lock:
            group = cache._arenas.groups.get(name)
            if group is None or group.base[number] < 0:
                return False
            wanted = np.arange(first, first + len(out))
            pages = wanted >> group.shift[number]
            if int(pages[-1]) >= len(group.pages_of(number)):  # what comes there is another segment's
                return False
            starts = group.row_of_page[pages + group.base[number]]
            if starts.min() < 0:
                return False
            index = torch.from_numpy(starts + (wanted & group.mask[number])).to(cache.device)
            out[...] = group.arenas[path].index_select(0, index).cpu().numpy()
            return True
