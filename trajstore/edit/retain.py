"""Which trajectories a replay window keeps.

Invariant: what is kept are the newest trajectories that every limit allows, without gaps.
"""

from __future__ import annotations

import numpy as np

from trajstore.errors import SelectionError
from trajstore.read.selection import Selection
from trajstore.stored import Array


def kept_positions(
    selection: Selection, *, last: int | None = None, max_steps: int | None = None, max_bytes: int | None = None
) -> Array:
    """Positions of the newest trajectories within all limits, ``(k,)`` int64.

    Args:
        selection: Trajectories, oldest first.
        last: At most so many.
        max_steps: At most so many steps in all.
        max_bytes: At most so many stored bytes in all; of a segment's bytes, each of its steps counts the same.

    Raises:
        SelectionError: A limit below zero.
    """
    for name, limit in (("last", last), ("max_steps", max_steps), ("max_bytes", max_bytes)):
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
            raise SelectionError(f"{name}={limit!r}, expected a whole number, zero or more")
    keep = len(selection) if last is None else min(last, len(selection))
    if max_steps is not None:
        keep = min(keep, _newest_within(selection.lengths, max_steps))
    if max_bytes is not None:
        keep = min(keep, _newest_within(stored_bytes(selection), max_bytes))
    return np.arange(len(selection) - keep, len(selection), dtype=np.int64)


def stored_bytes(selection: Selection) -> Array:
    """``(n,)`` int64: about how many stored bytes each trajectory takes, derived columns included."""
    segments = selection.table.segments
    per_step = np.array([s.total_bytes / max(s.steps, 1) for s in segments]) if segments else np.empty(0)
    # Whole bytes, rounded down: the sum of all is never above what is there, and does not depend on the order.
    nbytes: Array = np.floor(per_step[selection.table.segment[selection.rows]] * selection.lengths).astype(np.int64)
    return nbytes


def _newest_within(amounts: Array, limit: int) -> int:
    return int(np.searchsorted(np.cumsum(amounts[::-1]), limit, side="right"))
