"""When to merge manifests, so that neither a commit rewrites the store nor a store collects manifests without end.

Invariant (after each commit, of the manifests below the cap): the rows from the i-th manifest on are at least four times
those from the (i+4)-th on. So there are at most ``4 * log4(rows)`` of them, 27 for 10,000 commits of one trajectory, and a
row is rewritten about ``log4`` times in its life.
"""

from __future__ import annotations

from collections.abc import Sequence

GROUP = 4
MAX_MERGED_ROWS = 1 << 18  # no manifest grows beyond this by merging: a commit's work stays bounded


def merge_from(rows: Sequence[int]) -> int | None:
    """Which manifests to merge into one.

    Args:
        rows: Rows of the manifests, oldest first.

    Returns:
        The index of the first of them (it and all later ones are merged), or None for nothing to do.

    Examples:
        >>> merge_from([1, 1, 1, 1, 1]) is None
        True
        >>> merge_from([100, 1, 1, 1, 1, 1, 1])
        1
    """
    suffix = [0]
    for n in reversed(rows):
        suffix.append(suffix[-1] + n)
    suffix.reverse()  # suffix[i]: rows from manifest i on
    first = next((i for i in range(len(rows)) if suffix[i] <= MAX_MERGED_ROWS), len(rows))
    for i in range(first, len(rows) - GROUP):
        if suffix[i] < GROUP * suffix[i + GROUP]:
            return i
    return None
