"""How a cache is divided among groups of columns that have pages of their own.

Invariant: whatever is divided, one window fits, and the whole is not exceeded.

Equally many rows of every group would be natural, and is what comes out when everything fits. When it does not, a window
that misses has to read a page of each group, and pages of small rows hold thousands of them: so groups that are small in all
are kept whole, and the rest is divided such that every group holds the pages of equally many windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Groups that are smallest in all are kept whole as long as they take no more than this part of the cache.
_SMALL_PART = 4


@dataclass(frozen=True)
class Claim:
    """What one group needs.

    Attributes:
        row_bytes: Of all its columns.
        window_rows: Rows of the pages that one window needs.
        extent: Rows of its largest extent: what it gets is a multiple of it.
        total_rows: All rows that will be read.
    """

    row_bytes: int
    window_rows: int
    extent: int
    total_rows: int

    @property
    def least(self) -> int:
        """Rows without which a window does not fit."""
        return math.ceil(self.window_rows / self.extent) * self.extent

    @property
    def all(self) -> int:
        """Rows with which nothing has to be read twice."""
        return max(self.least, math.ceil(self.total_rows / self.extent) * self.extent)


def divide(nbytes: int, claims: Sequence[Claim]) -> list[int] | None:
    """Rows of each group's arenas.

    Args:
        nbytes: To be divided.
        claims: One for each group.

    Returns:
        Rows, each a multiple of the group's extent; None if one window needs more than ``nbytes``.

    Examples:
        >>> divide(10_000, [Claim(100, 32, 16, 50), Claim(1, 64, 64, 50)])
        [96, 64]
    """
    least = [claim.least for claim in claims]
    if _nbytes(claims, least) > nbytes:
        return None
    whole = [claim.all for claim in claims]
    wanted = _nbytes(claims, whole)
    if wanted <= nbytes:
        return [_extents(claim, claim.all * nbytes // wanted) for claim in claims]
    rows = list(least)
    opened = []
    for i in sorted(range(len(claims)), key=lambda i: claims[i].row_bytes * whole[i]):
        rows[i] = whole[i]
        small = [claims[k].row_bytes * whole[k] for k in range(len(claims)) if k not in opened and rows[k] == whole[k]]
        if sum(small) > nbytes // _SMALL_PART or _nbytes(claims, rows) > nbytes:
            rows[i] = least[i]
            opened.append(i)
    return _spread(nbytes, claims, rows, opened)


def _spread(nbytes: int, claims: Sequence[Claim], rows: list[int], opened: list[int]) -> list[int]:
    """Divide what is left among the opened groups, in proportion to what a window needs of each."""
    while opened:
        fixed = sum(claims[i].row_bytes * rows[i] for i in range(len(claims)) if i not in opened)
        per_window = sum(claims[i].row_bytes * claims[i].window_rows for i in opened)
        share = {i: (nbytes - fixed) * claims[i].window_rows // per_window for i in opened}
        below = [i for i in opened if _extents(claims[i], share[i]) < claims[i].least]
        above = [] if below else [i for i in opened if share[i] > claims[i].all]
        if not below and not above:
            for i in opened:
                rows[i] = _extents(claims[i], share[i])
            return rows
        for i in below or above:
            rows[i] = claims[i].least if below else claims[i].all
        opened = [i for i in opened if i not in (below or above)]
    return rows


def _extents(claim: Claim, rows: int) -> int:
    return rows // claim.extent * claim.extent


def _nbytes(claims: Sequence[Claim], rows: Sequence[int]) -> int:
    return sum(claim.row_bytes * count for claim, count in zip(claims, rows, strict=True))
