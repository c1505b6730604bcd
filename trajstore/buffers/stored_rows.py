"""``StoredRows``: which rows of a ring lie in which trajectory of its store.

Invariant: the trajectories stand in commit order and their rows are numbered without a gap: trajectory ``k`` holds the
numbers ``firsts[k] .. firsts[k + 1] - 1``, the last one those up to ``next - 1``. Each trajectory is known by its id in the
store, which is never given twice, so one of another writer is never taken for one of these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trajstore.buffers.filed import FiledTrajectories
from trajstore.stored import Array
from trajstore.view import View
from trajstore.write.batch import TrajectoryRef


class StoredRows:
    """The trajectories that a ring found in its store or wrote there.

    Args:
        ids: Of those found, in commit order.
        lengths: Rows of each.
        stop: Number behind the last row.

    Examples:
        >>> rows = StoredRows([7, 8], [3, 2], 10)
        >>> rows.firsts.tolist(), rows.next
        ([5, 8], 10)
        >>> rows.locate(np.array([9, 5]))
        (array([1, 0]), array([1, 0]))
    """

    def __init__(self, ids: Sequence[int] | Array = (), lengths: Sequence[int] | Array = (), stop: int = 0) -> None:
        self.next = stop  # number behind the last row
        counts = np.asarray(lengths, np.int64)
        self._firsts: list[int] = (stop - np.cumsum(counts[::-1])[::-1]).tolist()
        self._array: Array | None = None
        self._filed = FiledTrajectories(ids)

    def __len__(self) -> int:
        return len(self._firsts)

    @property
    def firsts(self) -> Array:
        """``(n,)`` int64: number of the first row of each trajectory, ascending."""
        if self._array is None:
            self._array = np.asarray(self._firsts, np.int64)
        return self._array

    def newest(self, n: int) -> int:
        """Rows of the last ``n`` trajectories."""
        return self.next - self._firsts[-n] if n else 0

    def append(self, ref: TrajectoryRef, n: int) -> None:
        """A trajectory of ``n`` rows was appended to the store."""
        self._firsts.append(self.next)
        self._filed.add([ref])
        self._array = None
        self.next += n

    def locate(self, numbers: Array) -> tuple[Array, Array]:
        """``(trajectories, steps)``, ``(n,)`` int64 each: where rows lie."""
        trajectories = np.searchsorted(self.firsts, numbers, side="right") - 1
        return trajectories, numbers - self.firsts[trajectories]

    def whole_before(self, number: int) -> tuple[int, int]:
        """Trajectories that end before a row's trajectory begins, and their rows."""
        whole = max(int(np.searchsorted(self.firsts, number, side="right")) - 1, 0)
        return whole, self._firsts[whole] - self._firsts[0] if whole else 0

    def forget_oldest(self, n: int) -> None:
        """The first ``n`` trajectories, all of them committed, were deleted."""
        del self._firsts[:n]
        self._filed.forget_oldest(n)
        self._array = None

    def lost(self) -> int:
        """After a flush of the store: trajectories that were appended and never committed."""
        return self._filed.count_waiting()

    def differences(self, view: View) -> tuple[int, int]:
        """How many trajectories of a store's view are not among these, and how many committed ones are missing there."""
        return self._filed.differences(view)

    def are_those_of(self, view: View) -> bool:
        """Whether these, and no others, are the trajectories of a store's view."""
        return self._filed.are_all_of(view)
