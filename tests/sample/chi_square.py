"""Pearson's chi-square, without scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def chi_square_of(observed: Sequence[int] | np.ndarray, weights: np.ndarray | None = None) -> float:
    """Of counts against expected shares: ``weights``, which need not sum to one, or equal ones."""
    counts = np.asarray(observed, float)
    weights = np.ones(len(counts)) if weights is None else np.asarray(weights, float)
    expected = weights / weights.sum() * counts.sum()
    assert not counts[expected == 0].any(), "something impossible was seen"
    possible = expected > 0
    return float((((counts - expected) ** 2)[possible] / expected[possible]).sum())


def chi_square_bound(freedom: int, deviates: float = 4.3) -> float:
    """What a chi-square of so many degrees of freedom stays below but for one time in 100,000 (Wilson & Hilferty, 1931)."""
    shrink = 2 / (9 * freedom)
    return freedom * (1 - shrink + deviates * math.sqrt(shrink)) ** 3
