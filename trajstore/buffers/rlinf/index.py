"""Which step of which stored trajectory a sample of a rollout buffer is.

Invariant: sample ``i`` of a window is step ``t`` of environment ``b`` of a rollout with ``i = t * B + b`` counted from the
rollout's first sample, rollout after rollout; the store holds the same steps environment by environment, cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trajstore.stored import Array


@dataclass(frozen=True)
class Entry:
    """One rollout.

    Attributes:
        id: ``trajectory_id``.
        steps: ``T``.
        envs: ``B``.
        pieces: Stored trajectories that hold it.
    """

    id: int
    steps: int
    envs: int
    pieces: int

    @property
    def num_samples(self) -> int:
        """``T * B``."""
        return self.steps * self.envs


class RolloutIndex:
    """The rollouts of a buffer, in the order of the store.

    Args:
        entries: From the oldest on.

    Attributes:
        dropped: Rollouts that came before them and are kept no longer.
        dropped_samples: Of those.
    """

    def __init__(self, entries: Sequence[Entry] = ()) -> None:
        self.dropped = 0
        self.dropped_samples = 0
        self._entries = list(entries)
        self._made: tuple[int, _Window] | None = None

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> Sequence[Entry]:
        """From the oldest on."""
        return self._entries

    def add(self, entry: Entry) -> None:
        """Add the newest."""
        self._entries.append(entry)
        self._made = None

    def drop(self, count: int) -> None:
        """The oldest rollouts are kept no longer; they are counted all the same."""
        gone = self._entries[:count]
        self.dropped += len(gone)
        self.dropped_samples += sum(entry.num_samples for entry in gone)
        del self._entries[:count]
        self._made = None

    def keep(self, pieces: Array) -> None:
        """Forget rollouts as if they had not been added.

        Args:
            pieces: ``(n,)`` bool, for each stored trajectory of all rollouts whether it is there.
        """
        ends = np.cumsum([entry.pieces for entry in self._entries], dtype=np.int64).tolist()
        placed = zip(self._entries, ends, strict=True)
        self._entries = [entry for entry, end in placed if pieces[end - entry.pieces : end].all()]
        self._made = None

    def window(self, size: int) -> _Window:
        """The last ``size`` rollouts; 0 for all."""
        if self._made is None or self._made[0] != size:
            first = max(len(self) - size, 0) if size > 0 else 0
            self._made = size, _Window(self._entries, first)
        return self._made[1]


class _Window:
    """The rollouts from ``first`` on."""

    def __init__(self, entries: Sequence[Entry], first: int) -> None:
        chosen = entries[first:]
        self.first_piece = sum(entry.pieces for entry in entries[:first])
        self._steps = np.array([entry.steps for entry in chosen], np.int64)
        self._envs = np.array([entry.envs for entry in chosen], np.int64)
        self._ends = np.cumsum(self._steps * self._envs)
        self._begins = self._ends - self._steps * self._envs

    @property
    def num_samples(self) -> int:
        """Samples in all."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def stored_steps(self, samples: Array) -> Array:
        """Where samples are among the window's steps as they are stored, ``(n,)`` int64.

        Args:
            samples: ``(n,)`` int64, each in ``[0, num_samples)``.
        """
        rollout = np.searchsorted(self._ends, samples, side="right")
        begin = self._begins[rollout]
        step, env = np.divmod(samples - begin, self._envs[rollout])
        stored: Array = begin + env * self._steps[rollout] + step
        return stored
