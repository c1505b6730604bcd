"""Which windows each batch is made of.

Invariant: what a batch holds depends on its number and the loader's arguments alone, never on which batches are planned
together, by whom, or when; ranks plan the same global batches and keep their rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trajstore.feed.windows import Windows
from trajstore.sample.order import GrowingOrder, Order
from trajstore.sample.priority import PrioritySampler
from trajstore.sample.window import AnchorIndex, WindowSpec
from trajstore.stored import Array


@dataclass(frozen=True)
class Share:
    """Which rows of every batch a process receives.

    Attributes:
        rank: Of this process.
        world_size: Of all.
    """

    rank: int = 0
    world_size: int = 1

    def rows(self, size: int) -> slice:
        """This process's rows of a global batch of ``size``."""
        return slice(self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size)


@dataclass(eq=False)
class Drawn:
    """Windows of consecutive batches, from one view.

    Attributes:
        windows: Of all batches end to end.
        sizes: Windows of each batch.
        extra: Values that come with them, by name.
    """

    windows: Windows
    sizes: list[int]
    extra: Mapping[str, Array] = field(default_factory=dict)


class Planner(ABC):
    """Plans batches of one view.

    Args:
        spec: What a window holds.
        anchors: Of the view.
        seed: Of drawn rows.
        share: Which rows are planned.
        stream: Tells the views of a mix apart.
    """

    def __init__(self, spec: WindowSpec, anchors: AnchorIndex, *, seed: int, share: Share, stream: int = 0) -> None:
        self.anchors = anchors
        self._futures = [o.name for o in spec.outputs if o.future is not None]
        self._seed = seed % 2**64
        self._share = share
        self._stream = stream

    @property
    @abstractmethod
    def batches_per_pass(self) -> int | None:
        """Batches until the end; None if there is none."""

    @abstractmethod
    def plan(self, first: int, count: int) -> Drawn:
        """Batches ``first`` to ``first + count - 1``; fewer, if some come only later."""

    def _windows(self, first: int, drawn: Sequence[Array]) -> Drawn:
        mine = [anchors[self._share.rows(len(anchors))] for anchors in drawn] if self._share.world_size > 1 else drawn
        trajectories, steps = self.anchors.locate(np.concatenate(mine) if len(mine) > 1 else mine[0])
        uniforms = {}
        for number, name in enumerate(self._futures):
            parts = []
            for batch, anchors in enumerate(drawn, first):
                numbers = self._uniforms(batch, number, len(anchors))
                parts.append(numbers[self._share.rows(len(anchors))])
            uniforms[name] = np.concatenate(parts)
        return Drawn(Windows(trajectories, steps, uniforms), [len(anchors) for anchors in mine])

    def _uniforms(self, batch: int, output: int, size: int) -> Array:
        """Random numbers of a batch in [0, 1), as many as the global batch has windows: ``(size,)`` float64."""
        key = np.array([self._seed, self._stream], np.uint64)
        bits = np.random.Philox(key=key, counter=[0, 1 + output, 0, batch])
        return (bits.random_raw(size) >> np.uint64(11)) * 2.0**-53


class OrderPlanner(Planner):
    """Batches in an order that is a function of their numbers."""

    def __init__(
        self, spec: WindowSpec, anchors: AnchorIndex, order: Order, *, seed: int, share: Share, stream: int = 0
    ) -> None:
        super().__init__(spec, anchors, seed=seed, share=share, stream=stream)
        self._order = order

    @property
    def batches_per_pass(self) -> int | None:
        """Of the order."""
        return self._order.batches_per_pass

    def plan(self, first: int, count: int) -> Drawn:
        """As the order says."""
        return self._windows(first, self._order.draw_block(first, count))


class FollowPlanner(Planner):
    """Uniform batches of a view that changes.

    Args:
        spec: What a window holds.
        anchors: Of the view at first.
        batch_size: Global.
        seed: Of the order and of drawn rows.
        share: Which rows are planned.
        stream: Tells the views of a mix apart.
    """

    def __init__(
        self, spec: WindowSpec, anchors: AnchorIndex, *, batch_size: int, seed: int, share: Share, stream: int = 0
    ) -> None:
        super().__init__(spec, anchors, seed=seed, share=share, stream=stream)
        self._order = GrowingOrder(len(anchors), batch_size=batch_size, seed=seed + (stream << 32))

    @property
    def batches_per_pass(self) -> None:
        """None: there is no end."""
        return None

    def plan(self, first: int, count: int) -> Drawn:
        """Of the view as it is now."""
        return self._windows(first, self._order.draw_block(first, count))

    def grow(self, counts: Array) -> None:
        """Trajectories with these numbers of anchors have come."""
        self.anchors = self.anchors.extended(counts)
        self._order.count = len(self.anchors)

    def replace(self, anchors: AnchorIndex) -> None:
        """Another view."""
        self.anchors = anchors
        self._order.count = len(anchors)


class PriorityPlanner(Planner):
    """Batches drawn by priority, one at a time: what the consumer has updated counts at once."""

    def __init__(
        self, spec: WindowSpec, anchors: AnchorIndex, sampler: PrioritySampler, *, batch_size: int, seed: int
    ) -> None:
        super().__init__(spec, anchors, seed=seed, share=Share())
        self.sampler = sampler
        self._batch_size = batch_size  # of this rank, whose anchors the sampler holds

    @property
    def batches_per_pass(self) -> None:
        """None: there is no end."""
        return None

    def grow(self, counts: Array, gone: Array) -> None:
        """Trajectories have come, with these numbers of anchors, and others are gone."""
        self.anchors = self.anchors.extended(counts)
        if len(counts):
            self.sampler.extend(counts)
        if len(gone):
            self.sampler.retire(gone)

    def plan(self, first: int, count: int) -> Drawn:  # noqa: ARG002 - the rest comes later
        """One batch."""
        anchors, weights = self.sampler.draw(first, self._batch_size)
        drawn = self._windows(first, [anchors])
        drawn.extra = {"index": anchors, "weight": weights}
        return drawn
