"""Windows and anchors.

Invariant: a window never crosses a trajectory. An anchor is a step at which a whole window begins; anchors are numbered over
the view by arithmetic on cumulative counts, so the index does not grow with steps.
"""

from __future__ import annotations

import numpy as np

from trajstore.errors import SelectionError
from trajstore.stored import Array


class AnchorIndex:
    """The anchors of a view for windows of one length.

    Args:
        lengths: ``(n,)`` int64, steps of each trajectory.
        window: Steps per window.

    Raises:
        SelectionError: No trajectory is long enough.
    """

    def __init__(self, lengths: Array, window: int) -> None:
        if window < 1:
            raise SelectionError(f"window={window}, expected at least 1 step")
        counts = np.maximum(lengths - (window - 1), 0)
        self._ends = np.cumsum(counts)  # (n,) anchors up to and including each trajectory
        self.window = window
        if not len(self):
            longest = int(lengths.max()) if len(lengths) else 0
            raise SelectionError(
                f"no trajectory has {window} steps: the view holds {len(lengths)} and the longest has {longest}; "
                "pass a smaller window, or append longer trajectories"
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, anchors: Array) -> tuple[Array, Array]:
        """Anchor numbers as trajectories and steps.

        Args:
            anchors: ``(k,)`` int64, each in ``[0, len(self))``.

        Returns:
            Position in the view and step in the trajectory, ``(k,)`` int64 each.
        """
        trajectory = np.searchsorted(self._ends, anchors, side="right")
        before = np.where(trajectory > 0, self._ends[trajectory - 1], 0)
        return trajectory, anchors - before
