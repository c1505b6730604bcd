"""Windows: which rows of which columns a batch holds for each anchor.

Invariant: a window never crosses a trajectory. An anchor is a step of a trajectory; anchors are numbered over the view by
arithmetic on cumulative counts, so the index does not grow with steps.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np

from trajstore.errors import SelectionError
from trajstore.schema import Column
from trajstore.stored import Array

Pad = Literal["none", "edge", "zero"]
# A relative row, several of them, or one that is drawn.
Offsets: TypeAlias = "int | Sequence[int] | range | Future"
Window: TypeAlias = "int | Mapping[str, Offsets] | None"

VIRTUAL_COLUMNS = ("terminated", "truncated", "is_first", "is_last", "step", "trajectory", "source")


@dataclass(frozen=True)
class Future:
    """One further row of the same trajectory; see ``future``."""

    column: str
    gamma: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise SelectionError(f"future(gamma={self.gamma}), expected a number in (0, 1]")

    def draw(self, ahead: Array, uniforms: Array) -> Array:
        """How far ahead to read: geometric, truncated, by inversion; 0 where nothing is ahead.

        Args:
            ahead: ``(n,)`` int64, rows after the anchor.
            uniforms: ``(n,)`` float64 in [0, 1).

        Returns:
            ``(n,)`` int64, in ``1 .. ahead``.
        """
        if self.gamma == 1.0:
            drawn = np.floor(uniforms * ahead) + 1
        else:
            mass = -np.expm1(ahead * math.log(self.gamma))
            drawn = np.floor(np.log1p(-uniforms * mass) / math.log(self.gamma)) + 1
        steps: Array = np.minimum(drawn.astype(np.int64), ahead)
        return steps


def future(column: str, gamma: float = 1.0) -> Future:
    """A later row of the anchor's trajectory, drawn at random: goals for hindsight relabelling.

    The row at ``t + j``, ``j >= 1``, is drawn with probability proportional to ``gamma ** (j - 1)`` among the rows that the
    trajectory has; with ``gamma=1`` uniformly, the "future" strategy of Andrychowicz et al., "Hindsight Experience Replay"
    (NeurIPS 2017, arXiv:1707.01495); with less, the discounted state occupancy of Eysenbach et al., "C-Learning" (ICLR 2021,
    arXiv:2011.08909). At the last row there is none further: that row itself.

    Args:
        column: A column of fixed size.
        gamma: In (0, 1].

    Examples:
        >>> import numpy as np, trajstore
        >>> with trajstore.open("memory://docs/future", mode="a") as store:
        ...     _ = store.append({"obs": np.arange(5.0), "action": np.arange(4)})
        ...     window = {"obs": 0, "action": 0, "goal": trajstore.future("obs", gamma=0.9)}
        ...     store.flush()
        ...     batch = next(store.trajectories.loader(64, window=window, seed=0))
        >>> bool((batch["goal"] > batch["obs"]).all())
        True
    """
    return Future(column, gamma)


@dataclass(frozen=True, eq=False)
class Output:
    """One entry of a batch.

    Attributes:
        name: Where it is in the batch: ``"obs/image"``.
        source: The stored column, or the name of a virtual column or metadata field.
        offsets: ``(w,)`` int64, rows relative to the anchor.
        squeezed: Whether it has no time dimension.
        bootstrap: Whether its rows come after the n-step return's rewards instead of at the anchor.
        future: Drawn further rows.
    """

    name: str
    source: Column | str
    offsets: Array
    squeezed: bool
    bootstrap: bool = False
    future: Future | None = None

    @cached_property
    def key(self) -> tuple[bytes, int, bool, str]:
        """Outputs with the same key read the same rows."""
        return self.offsets.tobytes(), self.extra, self.bootstrap, self.name if self.future else ""

    @cached_property
    def extra(self) -> int:
        """Rows that the source has beyond one per step."""
        return self.source.extra if isinstance(self.source, Column) else 0


@dataclass(frozen=True)
class NStep:
    """Returns over up to ``steps`` rewards (Sutton & Barto, Reinforcement Learning, 2nd ed., section 7.1)."""

    steps: int
    gamma: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SelectionError(f"n_step={self.steps}, expected at least 1")
        if not 0 <= self.gamma <= 1:
            raise SelectionError(f"gamma={self.gamma}, expected a number in [0, 1]")


@dataclass(frozen=True)
class WindowSpec:
    """What a batch holds.

    Attributes:
        outputs: In the order of the batch.
        pad: What rows outside the trajectory are.
        by_column: Whether each output has offsets of its own, so that ``is_pad`` has to say it for each.
        n_step: Discounted returns in place of ``reward``.
    """

    outputs: tuple[Output, ...]
    pad: Pad = "none"
    by_column: bool = False
    n_step: NStep | None = None

    def fingerprint(self) -> list[Any]:
        """Everything that decides what a batch holds, as plain values that can be compared and stored."""
        rows = [
            [
                o.name,
                o.source if isinstance(o.source, str) else o.source.path,
                o.offsets.tolist(),
                o.squeezed,
                o.bootstrap,
                None if o.future is None else [o.future.column, o.future.gamma],
            ]
            for o in self.outputs
        ]
        return [rows, self.pad, None if self.n_step is None else [self.n_step.steps, self.n_step.gamma]]

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """``first, after``: the anchors of a trajectory are the steps from ``first`` to before ``length - after``."""
        if self.pad != "none":
            return 0, 0
        first = after = 0
        for output in self.outputs:
            if output.future is None and not output.bootstrap and not self._is_reward(output):
                first = max(first, -int(output.offsets.min()))
                after = max(after, int(output.offsets.max()) - output.extra)
        return first, after

    def anchors(self, lengths: Array, terminated: Array | None = None) -> AnchorIndex:
        """The anchors of trajectories.

        Args:
            lengths: ``(n,)`` int64, steps.
            terminated: ``(n,)`` bool, needed for n-step returns.

        Raises:
            SelectionError: There is none.
        """
        counts = self.anchor_counts(lengths, terminated)
        first, after = self.bounds
        if not counts.any():
            longest = int(lengths.max()) if len(lengths) else 0
            needed = (
                first + after + 1 + (self.n_step.steps if self.n_step is not None and longest > first + after else 0)
            )
            raise SelectionError(
                f"no trajectory has {needed} steps: the view holds {len(lengths)} and the longest has {longest}; "
                "pass a smaller window, pad='edge' or 'zero', or append longer trajectories"
            )
        return AnchorIndex(counts, first)

    def anchor_counts(self, lengths: Array, terminated: Array | None = None) -> Array:
        """``(n,)`` int64: how many anchors each trajectory has; arguments as for ``anchors``."""
        first, after = self.bounds
        last = lengths - after
        if (
            self.n_step is not None
            and terminated is not None
            and any(o.bootstrap and not o.extra for o in self.outputs)
        ):
            # The final observation of these was never stored, so a return that reaches the end has nothing to go on from.
            last = np.where(terminated, last, np.minimum(last, lengths - self.n_step.steps))
        counts: Array = np.maximum(last - first, 0)
        return counts

    def pages_per_window(self, output: Output, page_rows: int) -> int:
        """Most pages that one window of an output touches."""
        if output.future is not None:
            return 1
        span = int(output.offsets.max() - output.offsets.min())
        return min(len(output.offsets), math.ceil(span / page_rows) + 1)

    def _is_reward(self, output: Output) -> bool:
        return self.n_step is not None and output.name == "reward"


# Anchors from which a table of where to begin costs less than searching.
_GUIDED_FROM = 1024
_GUIDED_STEPS = 4


class AnchorIndex:
    """The anchors of trajectories, numbered one trajectory after the other.

    Args:
        counts: ``(n,)`` int64, anchors of each trajectory.
        first: Step of each trajectory's first anchor.
    """

    def __init__(self, counts: Array, first: int = 0) -> None:
        self._room = np.cumsum(counts)
        self.ends = self._room  # (n,) int64, anchors up to and including each trajectory
        self._first = first
        self._extended = False
        self._guide: Array | None = None  # (buckets,) int32: a trajectory at or before that of each bucket's anchors
        self._guide_shift = 0
        self._chosen: Array | None = None  # (m,) int64, sorted: those that are left of a restricted index

    def __len__(self) -> int:
        if self._chosen is not None:
            return len(self._chosen)
        return int(self.ends[-1]) if len(self.ends) else 0

    def extended(self, counts: Array) -> AnchorIndex:
        """This index and the anchors of further trajectories; costs nothing for those that it has.

        Args:
            counts: ``(m,)`` int64, anchors of the further ones.
        """
        used = len(self.ends)
        grown = AnchorIndex(np.empty(0, np.int64), self._first)
        grown._room = self._room
        if used + len(counts) > len(grown._room) or self._extended:
            grown._room = np.empty(used + len(counts) + max(64, used // 8), np.int64)
            grown._room[:used] = self.ends
        self._extended = True  # what lies behind this index's end in its array now belongs to the other
        grown._room[used : used + len(counts)] = np.cumsum(counts) + (self.ends[-1] if used else 0)
        grown.ends = grown._room[: used + len(counts)]
        return grown

    def restricted(self, allowed: Array, lengths: Array) -> AnchorIndex:
        """Only anchors at allowed steps; takes 8 bytes for each.

        Args:
            allowed: ``(steps,)`` bool, all steps of the trajectories end to end.
            lengths: ``(n,)`` int64, steps.

        Raises:
            SelectionError: None is left.
        """
        begins = np.cumsum(lengths) - lengths  # (n,) of each trajectory among all steps
        steps = np.flatnonzero(allowed)
        trajectory = np.searchsorted(begins, steps, side="right") - 1
        step = steps - begins[trajectory] - self._first
        counts = np.diff(self.ends, prepend=0)
        inside = (step >= 0) & (step < counts[trajectory])
        found = AnchorIndex(counts, self._first)
        found._chosen = (self.ends[trajectory] - counts[trajectory] + step)[inside]
        if not len(found):
            raise SelectionError(
                f"anchors= allows {len(steps)} of {len(allowed)} steps, and no whole window begins at any of them"
            )
        return found

    def counts(self) -> Array:
        """``(n,)`` int64: anchors of each trajectory."""
        if self._chosen is None:
            return np.diff(self.ends, prepend=0)
        return np.diff(np.searchsorted(self._chosen, self.ends), prepend=0)

    def locate(self, anchors: Array) -> tuple[Array, Array]:
        """Anchor numbers as trajectories and steps.

        Args:
            anchors: ``(k,)`` int64, each in ``[0, len(self))``.

        Returns:
            Position in the view and step in the trajectory, ``(k,)`` int64 each.
        """
        if self._chosen is not None:
            anchors = self._chosen[anchors]
        trajectory = self._trajectories(anchors)
        before = self.ends[trajectory - 1]
        before[trajectory == 0] = 0
        return trajectory, anchors - before + self._first

    def _trajectories(self, anchors: Array) -> Array:
        """Positions in the view, ``(k,)`` int64. Few are searched for; for many a table says where to begin to look."""
        if len(anchors) < _GUIDED_FROM or self._extended or len(self._room) != len(self.ends):
            return np.searchsorted(self.ends, anchors, side="right")
        if self._guide is None:
            total = int(self.ends[-1])
            self._guide_shift = max((total // len(self.ends)).bit_length() - 1, 0)
            begins = np.arange((total >> self._guide_shift) + 1, dtype=np.int64) << self._guide_shift
            self._guide = np.searchsorted(self.ends, begins, side="right").astype(np.int32)
        found: Array = self._guide[anchors >> self._guide_shift].astype(np.int64)
        behind = np.flatnonzero(self.ends[found] <= anchors)
        for _ in range(_GUIDED_STEPS):
            if not len(behind):
                return found
            found[behind] += 1
            behind = behind[self.ends[found[behind]] <= anchors[behind]]
        found[behind] = np.searchsorted(self.ends, anchors[behind], side="right")
        return found


def check_pad(pad: str) -> Pad:
    """Raise ``SelectionError`` unless ``pad`` is one of the three."""
    if pad not in ("none", "edge", "zero"):
        raise SelectionError(f"pad={pad!r}, expected 'none', 'edge' or 'zero'")
    return pad  # type: ignore[return-value]


def as_offsets(name: str, offsets: Any) -> tuple[Array, bool]:
    """Offsets as given by the user: ``(w,)`` int64, and whether it was one number."""
    try:
        return np.array([operator.index(offsets)], np.int64), True
    except TypeError:
        pass
    try:
        rows = np.array([operator.index(o) for o in offsets], np.int64)
    except TypeError as error:
        raise SelectionError(
            f"window of {name!r} is {offsets!r}, expected a whole number, several of them, or future(...)"
        ) from error
    if not len(rows):
        raise SelectionError(f"window of {name!r} has no offsets")
    return rows, False
