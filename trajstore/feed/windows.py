"""Windows that are gathered together, and the plan of how.

Invariant: a plan names pages by their segment, not by where they lie: it stays right whatever is evicted or moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trajstore.read.arena import PageGroup
from trajstore.sample.window import Output
from trajstore.stored import Array


@dataclass(eq=False)
class Windows:
    """Windows that are gathered together.

    Attributes:
        trajectories: ``(n,)`` int64, positions in the selection.
        steps: ``(n,)`` int64, the anchors.
        uniforms: For each drawn row (``future``), ``(n,)`` float64 in [0, 1), by name of its output.
    """

    trajectories: Array
    steps: Array
    uniforms: Mapping[str, Array]
    plan: WindowPlan | None = None  # once made

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(eq=False)
class Rows:
    """Rows that several outputs read: relative to the trajectory, and which of them lie outside it."""

    relative: Array  # (n, w) int64
    outside: Array | None  # (n, w) bool; None if none can


@dataclass(eq=False)
class Lookup:
    """Rows of one group of columns, in pages."""

    group: PageGroup
    segments: Array  # (n,) int64, the cache's numbers
    pages: Array  # (n, w) int64, pages of the segment
    inside: Array  # (n, w) int64, row within the page
    outputs: list[Output]


@dataclass(eq=False)
class WindowPlan:
    """Which rows some windows read, and where these are."""

    table_rows: Array  # (n,) int64
    lengths: Array  # (n,) int64, steps of their trajectories; empty if nothing asks for it
    rows: dict[Any, Rows]
    lookups: list[Lookup]
