"""In which order anchors are visited: pure functions of (number of anchors, seed, position).

Invariant: batch ``k`` is the same whatever was drawn before it, so an order can be resumed anywhere. Randomness comes from
Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose counter is the position.
"""

from __future__ import annotations

import numpy as np

from trajstore.errors import SelectionError
from trajstore.stored import Array

ORDERS = ("random", "sequential")


def check_order(order: str) -> None:
    """Raise ``SelectionError`` unless ``order`` is one of ``ORDERS``."""
    if order not in ORDERS:
        raise SelectionError(f"order={order!r}, expected one of {', '.join(map(repr, ORDERS))}")


def random_anchors(count: int, *, seed: int, batch: int, size: int) -> Array:
    """``size`` anchors of batch ``batch``, uniform with replacement: ``(size,)`` int64 in ``[0, count)``."""
    bits = np.random.Philox(key=seed % 2**64, counter=[0, 0, 0, batch])
    return np.random.Generator(bits).integers(0, count, size, dtype=np.int64)


def sequential_anchors(count: int, *, batch: int, size: int) -> Array:
    """Anchors of batch ``batch`` in order; the last batch of an epoch may be short: ``(<= size,)`` int64."""
    return np.arange(batch * size, min((batch + 1) * size, count), dtype=np.int64)
