"""How long ago something began, for commits that must not come too late.

Invariant: an age is never smaller than the time that passed, however clocks were set meanwhile and however long the machine
slept: it is taken from two clocks, and the larger counts. Every writer and every vacuum knows the same ``GRACE``: vacuum
leaves objects younger than that alone, and no commit names new objects older than half of it.
"""

from __future__ import annotations

import datetime as dt
import time
from dataclasses import dataclass

from trajstore.errors import CommitTooOldError

GRACE = dt.timedelta(days=7)
MOST_AGE = GRACE / 2


@dataclass(frozen=True)
class Moment:
    """A point in time, by two clocks.

    Attributes:
        wall: UTC; somebody may set this clock back.
        since_boot_s: Seconds; goes on while the machine sleeps, where the system has such a clock.
    """

    wall: dt.datetime
    since_boot_s: float

    def __sub__(self, earlier: Moment) -> dt.timedelta:
        return max(self.wall - earlier.wall, dt.timedelta(seconds=self.since_boot_s - earlier.since_boot_s))


def since_boot_s() -> float:
    """Seconds on a clock that nobody sets; where the system has one, it also counts while the machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def check_age(age: dt.timedelta, *, where: str) -> None:
    """Refuse a commit whose oldest object began to be stored this long ago.

    Raises:
        CommitTooOldError: Vacuum may already have taken it for waste.
    """
    if age > MOST_AGE:
        raise CommitTooOldError(
            f"what is to be committed to {where} began to be stored {in_days(age)} days ago, expected at most "
            f"{in_days(MOST_AGE)}: a vacuum may have removed it since; append it again, or do the edit again, and flush or "
            "end episodes more often"
        )


def in_days(time: dt.timedelta) -> str:
    """Days, as people write them.

    >>> in_days(dt.timedelta(days=3, hours=12))
    '3.5'
    """
    return f"{time / dt.timedelta(days=1):.4g}"
