"""In which order anchors are visited.

Invariant: an order is a pure function of its arguments and the number of a batch. What was drawn before, and by whom,
changes nothing, so an order is resumed anywhere and every rank computes the same global batches. Nothing grows with steps.

Batches count on over the epochs, and over the passes of a loader; no batch spans two epochs. Random numbers are the raw
output of Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), whose counter is the place in the
order. They are scaled here, as NumPy promises the same raw output in every version, but not the same ``integers``.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from itertools import pairwise

import numpy as np

from trajstore.errors import IndexRangeError, SelectionError
from trajstore.sample.permutation import KeyedPermutation
from trajstore.stored import Array


class Order(ABC):
    """The anchors of each global batch.

    Args:
        count: Number of anchors; they are ``0 .. count - 1``.
        batch_size: Anchors per batch, over all ranks.

    Raises:
        SelectionError: An argument is below 1.
    """

    def __init__(self, count: int, *, batch_size: int) -> None:
        self.count = _at_least_one("count", count)
        self.batch_size = _at_least_one("batch_size", batch_size)

    @property
    @abstractmethod
    def batches_per_pass(self) -> int | None:
        """Batches until a pass of ``epochs`` epochs ends; None if the order is endless."""

    def draw(self, batch: int) -> Array:
        """Anchors of one batch.

        Args:
            batch: Its number, from 0; it may lie beyond the first pass.

        Returns:
            ``(batch_size,)`` int64 in ``[0, count)``; shorter where an epoch ends with a short batch.

        Raises:
            IndexRangeError: ``batch`` is negative.
        """
        return self.draw_block(batch, 1)[0]

    def draw_block(self, first: int, count: int) -> list[Array]:
        """``[draw(first), ..., draw(first + count - 1)]``, computed together.

        Raises:
            IndexRangeError: ``first`` or ``count`` is negative.
        """
        if first < 0 or count < 0:
            raise IndexRangeError(f"{count} batches from batch {first}, expected numbers from 0")
        return self._draw_block(first, count)

    @abstractmethod
    def _draw_block(self, first: int, count: int) -> list[Array]:
        """As ``draw_block``, with checked arguments."""


class _StreamOrder(Order):
    """Endless orders, drawn with replacement.

    One Philox stream serves a fixed run of consecutive batches, since setting one up costs as much as drawing thousands of
    numbers. The last run is kept; it is replaced, never changed, so threads may share an order.
    """

    _numbers_per_anchor = 1

    def __init__(self, count: int, *, batch_size: int, seed: int) -> None:
        super().__init__(count, batch_size=batch_size)
        self._seed = operator.index(seed) % 2**64
        self._batches_per_stream = max(1, min(16, 2**16 // self.batch_size))
        self._last: tuple[int, Array] = (-1, np.empty((0, self.batch_size), np.int64))

    @property
    def batches_per_pass(self) -> None:
        """None: there is no end."""
        return None

    @abstractmethod
    def _anchors(self, uniforms: Array) -> Array:
        """Anchors ``(k,)`` from numbers ``(numbers_per_anchor, k)``, float64 in ``[0, 1)``."""

    def _draw_block(self, first: int, count: int) -> list[Array]:
        batches: list[Array] = []
        while len(batches) < count:
            stream, begin = divmod(first + len(batches), self._batches_per_stream)
            rows = self._stream(stream)[begin : begin + count - len(batches)]
            batches.extend(rows.copy())  # what callers do to their batches stays theirs
        return batches

    def _stream(self, stream: int) -> Array:
        number, anchors = self._last
        if number != stream:
            bits = np.random.Philox(key=np.array([self._seed, 0], np.uint64), counter=[0, 0, 0, stream])
            raw = bits.random_raw(self._numbers_per_anchor * self._batches_per_stream * self.batch_size)
            uniforms = (raw >> np.uint64(11)) * 2.0**-53
            anchors = self._anchors(uniforms.reshape(self._numbers_per_anchor, -1)).reshape(-1, self.batch_size)
            self._last = stream, anchors
        return anchors


class RandomOrder(_StreamOrder):
    """Each anchor equally likely, with replacement, endlessly.

    Args:
        count: Number of anchors.
        batch_size: Anchors per batch.
        seed: Any integer.

    Raises:
        SelectionError: ``count`` or ``batch_size`` is below 1.

    >>> order = RandomOrder(1000, batch_size=4, seed=0)
    >>> order.draw(5).tolist() == order.draw_block(0, 6)[5].tolist()
    True
    """

    def _anchors(self, uniforms: Array) -> Array:
        return _scaled(uniforms[0], self.count)


class GrowingOrder(_StreamOrder):
    """Like ``RandomOrder``, over a number of anchors that may change from batch to batch: ``order.count``.

    Args:
        count: Number of anchors at first.
        batch_size: Anchors per batch.
        seed: Any integer.

    >>> order = GrowingOrder(10, batch_size=256, seed=0)
    >>> order.count = 1000
    >>> int(order.draw(0).max()) > 10
    True
    """

    def _anchors(self, uniforms: Array) -> Array:
        return np.asarray(uniforms[0])

    def _draw_block(self, first: int, count: int) -> list[Array]:
        return [_scaled(uniforms, self.count) for uniforms in super()._draw_block(first, count)]


class WeightedOrder(_StreamOrder):
    """A trajectory with probability proportional to its weight, then one of its anchors uniformly; endless.

    Args:
        ends: ``(n,)`` int64, anchors up to and including each trajectory.
        weights: ``(n,)`` numbers from 0, finite. Trajectories without anchors are never drawn, whatever their weight.
        batch_size: Anchors per batch.
        seed: Any integer.

    Raises:
        SelectionError: A weight is negative, NaN or infinite, or no trajectory with anchors has a positive one.

    >>> order = WeightedOrder(np.array([10, 20, 30]), np.array([1, 0, 3]), batch_size=256, seed=0)
    >>> anchors = order.draw(0)
    >>> bool(((anchors < 10) | (anchors >= 20)).all())
    True
    """

    _numbers_per_anchor = 2

    def __init__(self, ends: Array, weights: Array, *, batch_size: int, seed: int) -> None:
        super().__init__(int(ends[-1]) if len(ends) else 0, batch_size=batch_size, seed=seed)
        weights = np.asarray(weights, np.float64)
        if weights.shape != ends.shape:
            raise SelectionError(f"weights of shape {weights.shape}, expected one per trajectory: {ends.shape}")
        refused = ~((weights >= 0) & (weights < np.inf))  # true for NaN too
        if refused.any():
            first = int(refused.argmax())
            raise SelectionError(
                f"{int(refused.sum())} of {len(weights)} weights are negative, NaN or infinite, the first is "
                f"{weights[first]} of trajectory {first}; pass finite numbers from 0, with 0 for what is never to be drawn"
            )
        weights = np.where(np.diff(ends, prepend=0) > 0, weights, 0.0)
        if not weights.any():
            raise SelectionError(
                f"none of the {len(weights)} trajectories has both an anchor and a positive weight; "
                "pass other weights, or a window that more trajectories are long enough for"
            )
        self._ends = ends
        self._cumulative = np.cumsum(weights / weights.max())  # (n,) float64; scaled, so that no sum overflows

    def _anchors(self, uniforms: Array) -> Array:
        ascending = np.argsort(uniforms[0])  # a search in order touches memory in order: twice as fast at a million
        # u < 1 makes u * total < total, also rounded; side="right" then never finds a trajectory of weight 0.
        shares = uniforms[0, ascending] * self._cumulative[-1]
        trajectories = np.searchsorted(self._cumulative, shares, side="right")
        starts = np.where(trajectories > 0, self._ends[trajectories - 1], 0)
        anchors = np.empty(len(ascending), np.int64)
        anchors[ascending] = starts + _scaled(uniforms[1, ascending], self._ends[trajectories] - starts)
        return anchors


class _EpochOrder(Order):
    """Orders that visit each anchor once per epoch (with ``drop_last``, all but those of a short last batch)."""

    def __init__(self, count: int, *, batch_size: int, epochs: int, drop_last: bool) -> None:
        super().__init__(count, batch_size=batch_size)
        self.epochs = _at_least_one("epochs", epochs)
        self._batches_per_epoch = self.count // self.batch_size if drop_last else -(-self.count // self.batch_size)
        if not self._batches_per_epoch:
            raise SelectionError(
                f"{self.count} anchors do not fill one batch of batch_size={self.batch_size}, and drop_last=True drops it; "
                f"pass drop_last=False, or batch_size <= {self.count}"
            )

    @property
    def batches_per_pass(self) -> int:
        """Batches of ``epochs`` epochs."""
        return self.epochs * self._batches_per_epoch

    @abstractmethod
    def _anchors(self, epoch: int, start: int, stop: int) -> Array:
        """Anchors at positions ``[start, stop)`` of an epoch, not empty."""

    def _draw_block(self, first: int, count: int) -> list[Array]:
        batches: list[Array] = []
        while len(batches) < count:
            epoch, begin = divmod(first + len(batches), self._batches_per_epoch)
            end = min(begin + count - len(batches), self._batches_per_epoch)
            anchors = self._anchors(epoch, begin * self.batch_size, min(end * self.batch_size, self.count))
            batches += [anchors[i : i + self.batch_size] for i in range(0, len(anchors), self.batch_size)]
        return batches


class SequentialOrder(_EpochOrder):
    """Anchors as they are numbered: trajectory after trajectory, step after step; every epoch the same.

    Args:
        count: Number of anchors.
        batch_size: Anchors per batch.
        epochs: Epochs per pass.
        drop_last: Leave out the short last batch of an epoch.

    Raises:
        SelectionError: An argument is below 1, or ``drop_last`` leaves no batch.

    >>> [batch.tolist() for batch in SequentialOrder(5, batch_size=2, epochs=1, drop_last=False).draw_block(0, 3)]
    [[0, 1], [2, 3], [4]]
    """

    def _anchors(self, epoch: int, start: int, stop: int) -> Array:  # noqa: ARG002 - all epochs are alike
        return np.arange(start, stop, dtype=np.int64)


class ShuffleOrder(_EpochOrder):
    """Each anchor once per epoch, in a new random order every epoch.

    Without ``block``, any permutation of the anchors. With it, anchors are cut into blocks of consecutive ones, the blocks
    are permuted, and each run of ``blocks_together`` permuted blocks is shuffled as one: whoever holds the rows of a run
    needs no others until it is over, so data larger than memory is read about once per epoch. All permutations are computed
    (``KeyedPermutation``): nothing is stored per anchor, nor per block.

    Args:
        count: Number of anchors.
        batch_size: Anchors per batch.
        seed: Any integer.
        epochs: Epochs per pass.
        drop_last: Leave out the short last batch of an epoch; which anchors those are differs between epochs.
        block: Anchors per block, None for no blocks. The last block is short where ``count`` is no multiple.
        blocks_together: Blocks per run.

    Raises:
        SelectionError: An argument is below 1, or ``drop_last`` leaves no batch.

    >>> order = ShuffleOrder(100, batch_size=20, seed=0, epochs=1, drop_last=False, block=10, blocks_together=2)
    >>> sorted(set(order.draw(0).tolist())) == sorted(order.draw(0).tolist())
    True
    >>> len({anchor // 10 for anchor in order.draw(0).tolist()})  # blocks that a run of 2 * 10 anchors touches
    2
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int,
        seed: int,
        epochs: int,
        drop_last: bool,
        block: int | None = None,
        blocks_together: int = 1,
    ) -> None:
        super().__init__(count, batch_size=batch_size, epochs=epochs, drop_last=drop_last)
        self._seed = operator.index(seed)
        self.block = None if block is None else min(_at_least_one("block", block), self.count)
        self.blocks_together = _at_least_one("blocks_together", blocks_together)
        self._last: tuple[int, _PlainEpoch | _BlockwiseEpoch] = (
            0,
            self._epoch(0),
        )  # replaced, never changed, so threads may share an order

    def _anchors(self, epoch: int, start: int, stop: int) -> Array:
        number, drawn = self._last
        if number != epoch:
            drawn = self._epoch(epoch)
            self._last = epoch, drawn
        return drawn.anchors(start, stop)

    def _epoch(self, epoch: int) -> _PlainEpoch | _BlockwiseEpoch:
        if self.block is None:
            return _PlainEpoch(self.count, (self._seed, epoch))
        return _BlockwiseEpoch(self.count, self.block, self.blocks_together, (self._seed, epoch))


class _PlainEpoch:
    """One epoch of a permutation of all anchors."""

    def __init__(self, count: int, key: tuple[int, int]) -> None:
        self._permutation = KeyedPermutation(count, *key)

    def anchors(self, start: int, stop: int) -> Array:
        """Anchors at positions ``[start, stop)`` of the epoch."""
        return self._permutation(np.arange(start, stop))


class _BlockwiseEpoch:
    """One epoch of permuted blocks, shuffled run by run.

    Permuted blocks stand in slots; a run is ``blocks_together`` slots. A *place* numbers anchors, slot after slot, as if
    every block were whole, so that slots are quotients; the short block leaves a hole at the end of its slot, which the
    positions of the epoch skip.
    """

    def __init__(self, count: int, block: int, blocks_together: int, key: tuple[int, int]) -> None:
        num_blocks = -(-count // block)
        self._block = block
        self._num_blocks = num_blocks
        self._together = blocks_together
        self._key = key
        self._block_in_slot = KeyedPermutation(num_blocks, *key)
        self._missing = num_blocks * block - count  # places in the hole
        short_slot = int(self._block_in_slot.inverse(np.array([num_blocks - 1]))[0])
        self._hole = (short_slot + 1) * block - self._missing  # its first place
        self._short_run = short_slot // blocks_together
        self._last_run = (num_blocks - 1) // blocks_together

    def anchors(self, start: int, stop: int) -> Array:
        """Anchors at positions ``[start, stop)`` of the epoch."""
        first, last = self._run_of(start), self._run_of(stop - 1)
        # The run with the short block and the last run have sizes of their own; all between them are alike.
        special = {run + after for run in (self._short_run, self._last_run) for after in (0, 1)}
        cuts = sorted({first, last + 1} | {run for run in special if first < run <= last})
        parts = [
            self._of_equal_runs(low, high, max(start, self._begin(low)), min(stop, self._begin(high)))
            for low, high in pairwise(cuts)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _begin(self, run: int) -> int:
        """The position at which a run begins."""
        place = min(run * self._together, self._num_blocks) * self._block
        return place - (self._missing if run > self._short_run else 0)

    def _run_of(self, position: int) -> int:
        place = position + (self._missing if position >= self._hole else 0)
        return place // (self._together * self._block)

    def _of_equal_runs(self, low: int, high: int, start: int, stop: int) -> Array:
        """Anchors at positions ``[start, stop)``, which lie in runs ``[low, high)``, all of one size."""
        size = self._begin(low + 1) - self._begin(low)
        positions = np.arange(start, stop) - self._begin(low)
        run_places = self._together * self._block
        if high - low == 1:
            places = KeyedPermutation(size, *self._key, low)(positions) + low * run_places
        else:
            runs = positions // size
            positions -= runs * size
            places = (
                KeyedPermutation(size, *self._key, np.arange(low, high))(positions, runs) + (runs + low) * run_places
            )
        if low == self._short_run:  # then it is the only one here
            places[places >= self._hole] += self._missing
        slots = places // self._block
        offsets = places - slots * self._block
        first_slot, end_slot = low * self._together, min(high * self._together, self._num_blocks)
        blocks: Array
        if end_slot - first_slot < len(slots):  # the slots of these runs are fewer than the anchors asked for
            blocks = self._block_in_slot(np.arange(first_slot, end_slot))[slots - first_slot]
        else:
            blocks = self._block_in_slot(slots)
        blocks *= self._block
        blocks += offsets
        return blocks


def _scaled(uniforms: Array, counts: int | Array) -> Array:
    """Integers in ``[0, counts)`` from float64 in ``[0, 1)``, equally likely but for ``counts * 2**-53``."""
    scaled: Array = (uniforms * counts).astype(np.int64)
    return scaled


def _at_least_one(name: str, value: int) -> int:
    value = operator.index(value)
    if value < 1:
        raise SelectionError(f"{name}={value}, expected at least 1")
    return value
