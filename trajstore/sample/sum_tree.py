"""A sum tree of wide blocks: masses, their sums and minima, and draws in proportion to mass.

Invariant: every sum and minimum is recomputed from what lies below it, never adjusted by a difference, so rounding does not
accumulate and the tree is a function of its leaves alone. A leaf of zero mass is never drawn, also where rounding puts a
point on or beyond the edge of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trajstore.errors import IndexRangeError, SelectionError
from trajstore.stored import Array

FAN_OUT = 16  # children of a block: two cache lines of float64
MAX_MASS = 2.0**960  # of one leaf; sums of 2**63 such leaves are still finite
_SHIFT = FAN_OUT.bit_length() - 1
_TOP = 4096  # a level of at most so many blocks needs no level above it
# Blocks that are worked on together: their rows stay in the processor's cache, and are fewer numbers than the 32,768 from
# which torch starts threads, whose barriers cost scheduler's time slices (8 ms) where other work keeps the cores busy.
_CHUNK = 2000


class SumTree:
    """Non-negative masses, and how to draw one in proportion to its mass.

    A tree of fan-out 16, kept as one array of sums and one of minima (of the masses above zero) per level. A batch of
    points starts at the level whose size suits the batch, by binary search in its cumulative sums, and goes down from
    there block by block, all points at once. The arrays take 1.14 times the memory of the leaves, and growing reserves
    up to half as much again. Not thread-safe: whoever owns it holds a lock.

    Examples:
        >>> tree = SumTree([1.0, 0.0, 3.0])
        >>> tree.sample(np.array([0.5, 0.5, 0.5, 0.5]))
        array([0, 2, 2, 2])
        >>> tree.set(np.array([0, 2]), np.array([4.0, 0.0]))
        >>> tree.total, tree.smallest
        (4.0, 4.0)
    """

    def __init__(self, masses: Array | Sequence[float] = ()) -> None:
        self._size = 0
        # Level 0 is the leaves; node i of level k > 0 has the nodes [16 i, 16 i + 16) of level k - 1 below it.
        self._sums: list[Array] = []  # (capacity of the level,) float64; zero where there is no leaf yet
        self._mins: list[Array] = []  # the same shape; infinite where there is no mass. Level 0 is the leaves here too.
        self.append(masses)

    def __len__(self) -> int:
        return self._size

    @property
    def leaves(self) -> Array:
        """The masses, ``(len(self),)`` float64: a view that must not be written to."""
        view = self._sums[0][: self._size]
        view.flags.writeable = False
        return view

    @property
    def total(self) -> float:
        """Sum of the masses."""
        return float(self._sums[-1].sum())

    @property
    def smallest(self) -> float:
        """The smallest mass above zero; infinity if there is none."""
        top = self._mins[-1]
        return float((np.where(top > 0, top, np.inf) if len(self._mins) == 1 else top).min())

    def append(self, masses: Array | Sequence[float]) -> None:
        """Add leaves at the end, in amortised constant time per leaf.

        Raises:
            SelectionError: a mass that is NaN, negative or above ``MAX_MASS``; nothing was added.
        """
        added = np.asarray(masses, np.float64)
        _check_masses(added)
        first, self._size = self._size, self._size + len(added)
        if not self._sums or self._size > len(self._sums[0]):
            self._grow(first)
            first_changed = 0
        else:
            first_changed = first
        self._sums[0][first : self._size] = added
        low, high = first_changed, self._size
        for level in range(1, len(self._sums)):
            low, high = low >> _SHIFT, -(-high >> _SHIFT)
            self._refresh(level, low, high)

    def set(self, index: Array, masses: Array) -> None:
        """Set leaf ``index[i]`` to ``masses[i]``; both ``(n,)``. Of a leaf that is named twice the last mass counts.

        Raises:
            IndexRangeError: an index outside ``[0, len(self))``.
            SelectionError: a mass that is NaN, negative or above ``MAX_MASS``. In either case nothing was changed.
        """
        if len(index) == 0:
            return
        if index.min() < 0 or index.max() >= self._size:
            raise IndexRangeError(f"leaves {index.min()} to {index.max()}, expected 0 to {self._size - 1}")
        _check_masses(masses)
        self._sums[0][index] = masses  # NumPy assigns in order where an index occurs twice
        nodes = index
        for level in range(1, len(self._sums)):
            nodes = nodes >> _SHIFT
            filled = -(-self._size >> (_SHIFT * level))
            if len(nodes) >= filled >> 2:  # most nodes are touched, many of them often
                self._refresh(level, 0, filled)
                continue
            sums, mins = (_blocks(levels[level - 1]) for levels in (self._sums, self._mins))
            for start in range(0, len(nodes), _CHUNK):
                part = nodes[start : start + _CHUNK]
                rows = sums.take(part, axis=0)
                self._sums[level][part] = _sum_rows(rows)
                self._mins[level][part] = _min_leaves(rows) if level == 1 else _min_rows(mins.take(part, axis=0))

    def _refresh(self, level: int, low: int, high: int) -> None:
        """Compute the nodes ``[low, high)`` of ``level`` from the level below."""
        sums, mins = (_blocks(levels[level - 1]) for levels in (self._sums, self._mins))
        for start in range(low, high, _CHUNK):
            part = slice(start, min(start + _CHUNK, high))
            self._sums[level][part] = _sum_rows(sums[part])
            self._mins[level][part] = _min_leaves(sums[part]) if level == 1 else _min_rows(mins[part])

    def sample(self, uniforms: Array) -> Array:
        """Draw one leaf from each of ``n`` equal segments of the total mass: ``(n,)`` int64, ascending.

        ``uniforms`` ``(n,)`` in [0, 1) says where in its segment each point lies.

        Raises:
            SelectionError: all masses are zero.
        """
        count = len(uniforms)
        level = self._start_level(count)
        filled = -(-self._size >> (_SHIFT * level))
        ends = torch.cumsum(torch.from_numpy(self._sums[level][:filled]), 0).numpy()
        total = ends[-1] if filled else 0.0
        if not total > 0:
            raise SelectionError(f"all of {self._size} masses are zero; nothing can be drawn: set one above zero first")
        points = (np.arange(count) + uniforms) * (total / count)
        np.minimum(points, np.nextafter(total, 0), out=points)  # the last segment may round up to the end
        nodes = np.searchsorted(ends, points, side="right")
        if level == 0:
            return nodes
        points -= np.where(nodes > 0, ends[nodes - 1], 0)
        for start in range(0, count, _CHUNK):
            part = slice(start, start + _CHUNK)
            self._descend(nodes[part], points[part], level)
        return nodes

    def _start_level(self, count: int) -> int:
        """The lowest level that is cheap to sum up for ``count`` points."""
        level = 0
        while level + 1 < len(self._sums) and self._size >> (_SHIFT * level) > max(_TOP, 12 * count):
            level += 1
        return level

    def _descend(self, nodes: Array, points: Array, level: int) -> None:
        """Replace the blocks ``nodes`` of ``level`` by the leaves that ``points`` (offsets within the block) fall on."""
        first = np.arange(-1, len(nodes) * FAN_OUT - 1, FAN_OUT)
        for below in range(level - 1, -1, -1):
            rows = _blocks(self._sums[below]).take(nodes, axis=0)
            cumulative = torch.cumsum(torch.from_numpy(rows), 1).numpy()
            beyond = points >= cumulative[:, -1]  # by rounding: the block's sum was added up in another order
            if beyond.any():
                points[beyond] = np.nextafter(cumulative[beyond, -1], 0)
            # The first child whose cumulative sum exceeds the point: it exists, and its own mass is above zero.
            child = (cumulative <= points[:, None]).argmin(1)
            if below:
                points -= np.where(child > 0, cumulative.reshape(-1)[first + child], 0)
            nodes <<= _SHIFT
            nodes += child

    def _grow(self, keep: int) -> None:
        """Allocate room for ``_size`` leaves and half as many more, with the first ``keep`` leaves."""
        kept = self._sums[0][:keep] if self._sums else np.empty(0)
        capacity = max(FAN_OUT, self._size + (keep and self._size >> 1))
        self._sums, self._mins = [], []
        while True:
            capacity = -(-capacity >> _SHIFT) << _SHIFT
            sums = np.zeros(capacity)  # not touched, so not resident, until it is filled
            self._sums.append(sums)
            self._mins.append(np.full(capacity, np.inf) if self._mins else sums)
            if capacity <= _TOP:
                break
            capacity >>= _SHIFT
        self._sums[0][:keep] = kept


def _blocks(level: Array) -> Array:
    """A level as rows: row i holds what is below node i of the next level."""
    return level.reshape(-1, FAN_OUT)


# torch's kernels for short rows take a fifth of NumPy's time.


def _sum_rows(rows: Array) -> Array:
    return torch.from_numpy(rows).sum(1).numpy()


def _min_rows(rows: Array) -> Array:
    return torch.from_numpy(rows).amin(1).numpy()


def _min_leaves(rows: Array) -> Array:
    """The smallest mass above zero of each row, infinity if there is none."""
    smallest = _min_rows(rows)
    if not smallest.all():  # few rows have a leaf of zero mass: only they are looked at again
        again = np.flatnonzero(smallest == 0)
        masses = rows[again]
        smallest[again] = _min_rows(np.where(masses > 0, masses, np.inf))
    return smallest


def _check_masses(masses: Array) -> None:
    if masses.size and not (masses.min() >= 0 and masses.max() <= MAX_MASS):  # false for NaN as well
        raise SelectionError(
            f"masses from {masses.min()} to {masses.max()}, expected finite ones from 0 to {MAX_MASS:.3g}"
        )
