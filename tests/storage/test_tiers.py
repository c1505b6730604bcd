"""When manifests are merged."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trajstore.storage import tiers
from trajstore.storage.tiers import GROUP, merge_from


def commit_all(sizes: list[int]) -> tuple[list[int], list[int], int]:
    """What a history of commits comes to.

    Returns:
        Rows of each manifest at the end, how many manifests there were after each commit, and rows rewritten in all.
    """
    rows: list[int] = []
    counts = []
    rewritten = 0
    for size in sizes:
        first = merge_from(rows)
        if first is not None:
            assert first < len(rows) - 1, "merging one manifest with itself"
            rewritten += sum(rows[first:])
            rows[first:] = [sum(rows[first:])]
        rows.append(size)
        counts.append(len(rows))
    return rows, counts, rewritten


def test_ten_thousand_commits_of_one_trajectory_have_at_most_thirty_manifests() -> None:
    rows, counts, rewritten = commit_all([1] * 10_000)
    assert sum(rows) == 10_000
    assert max(counts) <= 30
    assert rewritten <= 10_000 * 2 * math.log(10_000, GROUP), "a row is rewritten a logarithmic number of times"


@pytest.mark.parametrize("seed", range(6))
def test_commits_of_any_size_keep_few_manifests_and_rewrite_little(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = np.ceil(rng.pareto(0.5 + seed / 4, 3000) + 1).clip(1, 5000).astype(int).tolist()
    rows, counts, rewritten = commit_all(sizes)
    total = sum(sizes)
    assert sum(rows) == total
    capped = 1 + 2 * total // tiers.MAX_MERGED_ROWS  # those that have grown as large as they may
    assert max(counts) <= GROUP * math.log(total, GROUP) + GROUP + capped
    assert rewritten <= 2 * total * math.log(total, GROUP)


def test_a_merge_never_makes_a_manifest_larger_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "MAX_MERGED_ROWS", 100)
    rows, counts, rewritten = commit_all([3] * 2000)
    assert max(rows) <= 100
    assert max(counts) <= 6000 / (100 / GROUP) + 30
    assert rewritten <= 6000 * 2 * math.log(100, GROUP)


@pytest.mark.parametrize("rows", [[], [1], [7, 1], [1] * 4, [1] * 5, [10**9] * 50])
def test_few_or_full_manifests_are_left_alone(rows: list[int]) -> None:
    assert merge_from(rows) is None
