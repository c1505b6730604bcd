"""Extents of rows in an arena: a buddy allocator (Knuth, The Art of Computer Programming, vol. 1, section 2.5).

Invariant: an extent is a power of two of rows and begins at a multiple of its size, so a short page takes less than twice
what it needs, and extents that fit in total and are taken largest first always find their places in an empty arena.
"""

from __future__ import annotations


def extent_rows(rows: int) -> int:
    """The smallest extent that holds ``rows``.

    Examples:
        >>> [extent_rows(n) for n in (1, 5, 8)]
        [1, 8, 8]
    """
    return 1 << max(rows - 1, 0).bit_length()


class Extents:
    """Which rows of an arena are free.

    Args:
        capacity: Rows, a multiple of ``largest``.
        largest: Rows of the largest extent, a power of two.

    Examples:
        >>> extents = Extents(16, largest=8)
        >>> first, second = extents.take(8), extents.take(2)
        >>> extents.free_rows
        6
        >>> extents.give(first, 8), extents.give(second, 2), extents.free_rows
        (None, None, 16)
    """

    def __init__(self, capacity: int, *, largest: int) -> None:
        if largest < 1 or largest & (largest - 1) or capacity < largest or capacity % largest:
            raise ValueError(f"{capacity} rows in extents of up to {largest}, expected a multiple of a power of two")
        self.capacity = capacity
        self.largest = largest
        self.free_rows = capacity
        # Free extents by size. The largest are taken in order: an arena that fills up touches memory front to back, and
        # what was never touched needs no list.
        self._free: dict[int, set[int]] = {}
        size = largest
        while size:
            self._free[size] = set()
            size >>= 1
        self._whole: list[int] = []
        self._untouched = 0

    def take(self, size: int) -> int | None:
        """First row of a free extent of ``size`` rows, now taken; None if there is none."""
        found = size
        while found < self.largest and not self._free[found]:
            found *= 2
        if found < self.largest:
            start = self._free[found].pop()
        elif self._whole:
            start = self._whole.pop()
        elif self._untouched < self.capacity:
            start = self._untouched
            self._untouched += self.largest
        else:
            return None
        while found > size:
            found //= 2
            self._free[found].add(start + found)
        self.free_rows -= size
        return start

    def give(self, start: int, size: int) -> None:
        """Return an extent."""
        self.free_rows += size
        while size < self.largest:
            free, buddy = self._free[size], start ^ size
            if buddy not in free:
                free.add(start)
                return
            free.remove(buddy)
            start = min(start, buddy)
            size *= 2
        self._whole.append(start)
