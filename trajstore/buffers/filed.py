"""Which trajectories of a store are those of a buffer, by their identity.

Invariant: one is known by its id in the store, which is never given twice, so one of another writer is never taken for one
of these; until it is committed it is known by what ``append`` returned. They stand in the order in which they were appended,
which is that of their ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trajstore.stored import Array
from trajstore.view import View
from trajstore.write.batch import TrajectoryRef


class FiledTrajectories:
    """The trajectories that a buffer found in its store or appended to it.

    Args:
        ids: ``(n,)`` int64, of those found.
    """

    def __init__(self, ids: Sequence[int] | Array = ()) -> None:
        self._ids = np.asarray(ids, np.int64)  # (m,) of those that are known to be committed, the oldest
        self._refs: list[TrajectoryRef] = []  # of the others

    def __len__(self) -> int:
        return len(self._ids) + len(self._refs)

    def add(self, refs: Sequence[TrajectoryRef]) -> None:
        """Trajectories were appended to the store."""
        self._refs += refs

    def oldest(self, n: int) -> Array:
        """``(n,)`` int64: ids of the first ``n``, all of them committed."""
        self._learn_ids()
        return self._ids[:n]

    def count_waiting(self) -> int:
        """How many are not known to be committed."""
        self._learn_ids()
        return len(self._refs)

    def forget_oldest(self, n: int) -> None:
        """The first ``n`` were deleted."""
        self._ids = self._ids[n:]

    def forget_lost(self) -> Array:
        """Once nothing waits to be committed: forget what was not; ``(n,)`` bool, which of them are in the store."""
        committed = np.array([ref.id is not None for ref in self._refs], bool)
        kept = np.concatenate([np.ones(len(self._ids), bool), committed])
        self._refs = [ref for ref in self._refs if ref.id is not None]
        self._learn_ids()
        return kept

    def are_all_of(self, view: View) -> bool:
        """Whether these, and no others, are the trajectories of a store's view."""
        self._learn_ids()
        found = view.ids  # -1 while not committed
        known = len(self._ids)
        if len(found) != len(self) or (found[:known] != self._ids).any():
            return False
        waiting = zip(found[known:].tolist(), self._refs, strict=True)
        return all(number == -1 or ref.id in (None, number) for number, ref in waiting)

    def differences(self, view: View) -> tuple[int, int]:
        """How many trajectories of a store's view are not among these, and how many committed ones are missing there."""
        self._learn_ids()
        return len(np.setdiff1d(view.ids, self._ids)), len(np.setdiff1d(self._ids, view.ids))

    def _learn_ids(self) -> None:
        known = 0
        while known < len(self._refs) and self._refs[known].id is not None:
            known += 1
        if known:
            self._ids = np.concatenate([self._ids, np.array([ref.id for ref in self._refs[:known]], np.int64)])
            del self._refs[:known]
