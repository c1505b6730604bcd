"""Small trajectories, and a comparison of what a store gives back with what was appended."""

from __future__ import annotations

from typing import Any

import numpy as np

from trajstore import View

Tree = dict[str, Any]

# Of ``trajectory``: what decides how many objects a commit writes.
TENSOR_COLUMNS = 3
NESTED_GROUPS = 1


def trajectory(seed: int, length: int = 5) -> Tree:
    """Three tensor columns, one nested group, one scalar column."""
    rng = np.random.default_rng(seed)
    return {
        "obs": {
            "image": rng.integers(0, 256, (length + 1, 8, 8, 3), np.uint8),
            "state": rng.standard_normal((length + 1, 4), np.float32),
        },
        "action": rng.standard_normal((length, 2), np.float32),
        "reward": rng.standard_normal(length),
    }


def assert_holds(view: View, expected: list[Tree]) -> None:
    """The view holds exactly these trajectories, in this order, bit for bit."""
    assert len(view) == len(expected)
    for found, tree in zip(view, expected, strict=True):
        np.testing.assert_array_equal(found["obs/image"][:], tree["obs"]["image"])
        np.testing.assert_array_equal(found["obs/state"][:], tree["obs"]["state"])
        np.testing.assert_array_equal(found["action"][:], tree["action"])
        np.testing.assert_array_equal(found["reward"][:], tree["reward"])


def seeds_in(view: View) -> list[int]:
    """The metadata field ``seed`` of every trajectory, sorted."""
    return sorted(view.to_pandas()["seed"].tolist()) if len(view) else []
