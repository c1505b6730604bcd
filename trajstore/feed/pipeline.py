"""Everything behind a loader but its position: views, windows, orders and gatherers, made from options.

Invariant: a pipeline has no position; asked twice for the same batches it makes the same ones (in a fixed view, and given
the same priorities).
"""

from __future__ import annotations

import collections
import functools
import operator
import threading
import warnings
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from trajstore.errors import SelectionError
from trajstore.feed.agreement import agreed_windows
from trajstore.feed.assemble import Assembler, Batch, Lot
from trajstore.feed.follow import Following
from trajstore.feed.gather import Gatherer
from trajstore.feed.layout import Value
from trajstore.feed.options import LoaderOptions
from trajstore.feed.plan import Drawn, FollowPlanner, OrderPlanner, Planner, PriorityPlanner, Share
from trajstore.read.arena import with_index
from trajstore.read.cache import PageCache
from trajstore.read.segment import SegmentReaders
from trajstore.read.selection import Selection
from trajstore.sample.order import Order, RandomOrder, SequentialOrder, ShuffleOrder, WeightedOrder
from trajstore.sample.priority import PrioritySampler
from trajstore.sample.window import AnchorIndex, WindowSpec
from trajstore.storage.workers import Workers
from trajstore.stored import Array

# Small batches are planned, gathered and moved together: up to so many, of so many bytes.
_BATCHES_TOGETHER = 16
_LOT_BYTES = 1 << 20
_LARGE_BYTES = 4 << 20
# Blocks that a block shuffle mixes.
_BLOCKS_TOGETHER = 16


@dataclass(eq=False)
class Supply:
    """What a view has its windows gathered with.

    Attributes:
        selection: Its trajectories.
        cache: Where pages are kept.
        readers: Page indexes.
        read: Reads a whole column of the view, ``(steps,)``.
        latest: The trajectories as they are now; with True, after looking for commits of others. None if the view is not
            one that can be followed.
    """

    selection: Selection
    cache: PageCache
    readers: SegmentReaders
    read: Callable[[str], Any]
    latest: Callable[[bool], Selection] | None = None


# What batches hold besides with order="prioritized".
_ADDED = (Value("index", torch.int64, ()), Value("weight", torch.float32, ()))


class Pipeline:
    """Makes lots of batches.

    Args:
        supplies: One view, or those of a mix.
        options: Of the loader.
        sizes: Windows of each view in a global batch.
    """

    def __init__(self, supplies: Sequence[Supply], options: LoaderOptions, sizes: Sequence[int]) -> None:
        self.options = options
        self.supplies = list(supplies)
        specs = agreed_windows([supply.selection for supply in supplies], options)
        self.spec = specs[0]
        if options.order == "prioritized":
            for name in (output.name for output in self.spec.outputs):
                if name.split("/")[0] in {value.name for value in _ADDED}:
                    raise SelectionError(
                        f"column {name!r} has the name of what order='prioritized' adds to a batch; leave it out (columns=)"
                    )
        self._sizes = list(sizes)
        self._making = threading.Lock()
        mixed = len(supplies) > 1
        self._gatherers: list[Gatherer] = []
        self._ahead = Lookahead(self)
        self._reading = False  # whether the last lot had to read pages
        self._looks_ahead = not mixed and options.prefetch > 0 and not options.follow and options.order != "prioritized"
        anchors = [_anchors(supply, spec, options) for supply, spec in zip(supplies, specs, strict=True)]
        try:
            for number, (supply, spec) in enumerate(zip(supplies, specs, strict=True)):
                self._gatherers.append(Gatherer(supply.selection, spec, supply.cache, supply.readers, source=number))
            self._planners = [
                _planner(supply, spec, anchors[number], options, self._gatherers[number], sizes[number], stream=number)
                for number, (supply, spec) in enumerate(zip(supplies, specs, strict=True))
            ]
            self._following = [
                Following(_latest(supply), options.refresh_s, gatherer, planner)
                for supply, gatherer, planner in zip(supplies, self._gatherers, self._planners, strict=True)
                if isinstance(planner, FollowPlanner) or (options.follow and isinstance(planner, PriorityPlanner))
            ]
            self._assembler = Assembler(
                self.spec,
                self._gatherers,
                extra=_ADDED if options.order == "prioritized" else (),
                device=None if options.device is None else with_index(options.device),
                keep_buffers=options.prefetch + 2,
                normalization=options.normalization,
            )
        except BaseException:
            self.close()
            raise
        together = 1
        objects = any(gatherer.objects for gatherer in self._gatherers)
        if not (mixed or objects or options.order == "prioritized" or options.follow):
            nbytes = self._assembler.window_bytes * (options.batch_size // options.world_size)
            together = max(1, min(_BATCHES_TOGETHER, _LOT_BYTES // max(nbytes, 1)))
        self.batches_together = together
        # While a large lot is copied, without the interpreter, another thread plans the next.
        self._large = self._assembler.window_bytes * (options.batch_size // options.world_size) >= _LARGE_BYTES

    @property
    def batches_per_pass(self) -> int | None:
        """Batches until the end of a pass; None if there is none."""
        return self._planners[0].batches_per_pass

    @property
    def sampler(self) -> PrioritySampler | None:
        """Priorities, if windows are drawn by them."""
        planner = self._planners[0]
        return planner.sampler if isinstance(planner, PriorityPlanner) else None

    @property
    def buffers_made(self) -> int:
        """Output buffers that had to be made."""
        return self._assembler.buffers.made

    def make(self, first: int, count: int) -> Lot:
        """Batches ``first`` to ``first + count - 1``."""
        with self._making:  # a thread that was given up may still be at work
            return self._make(first, count)

    def _make(self, first: int, count: int) -> Lot:
        for following in self._following:
            following.refresh()
        drawn, warmed = self._ahead.take(first, count) or (self.plan(first, count), False)
        read = self._pages_read()
        then = None
        if self._looks_ahead and (self._reading or self._large):
            then = functools.partial(self._ahead.start, first + count, count)
        if len(drawn) == 1:
            only = drawn[0]
            lot = self._assembler.assemble([only.windows], only.sizes, only.extra, warmed=warmed, on_resident=then)
        else:
            lot = self._assembler.assemble([d.windows for d in drawn], [_size_of(drawn)], warmed=warmed)
        self._reading = self._pages_read() > read
        return lot

    def plan(self, first: int, count: int) -> list[Drawn]:
        """What these batches are made of, by view."""
        return [planner.plan(first, count) for planner in self._planners]

    def warm(self, drawn: Sequence[Drawn]) -> bool:
        """Have the pages of planned batches read."""
        return all(g.warm(d.windows) for g, d in zip(self._gatherers, drawn, strict=True) if len(d.windows))

    def _pages_read(self) -> int:
        return sum(supply.cache.pages_read for supply in self.supplies)

    def fingerprint(self) -> list[Any]:
        """What a state must agree with to be resumed."""
        latest = [following.roster.latest for following in self._following]
        views = [_fingerprint(selection) for selection in latest or [supply.selection for supply in self.supplies]]
        return [views, self.spec.fingerprint(), [*self.options.order_fingerprint(), self._sizes]]

    def trajectories(self) -> dict[str, Any] | None:
        """Which trajectories the numbers in batches mean, of a loader that follows."""
        return self._following[0].roster.state() if self._following else None

    def resume_priorities(self, state: Mapping[str, Any], trajectories: Mapping[str, Any] | None) -> None:
        """Go on with the priorities of another loader, of an earlier version if it followed."""
        assert self.sampler is not None
        if trajectories is not None and self._following:
            self.sampler.adopt(state, self._following[0].roster.places(trajectories))
        else:
            self.sampler.load_state_dict(state)

    def close(self) -> None:
        """Let go of the caches' arenas. May be called twice."""
        self._ahead.close()
        for gatherer in self._gatherers:
            gatherer.close()


class Supplier(Protocol):
    """A view."""

    def supply(self, options: LoaderOptions) -> Supply:
        """What its windows are gathered with."""


@dataclass(frozen=True, eq=False)
class PipelineBuilder:
    """Makes the pipeline of a loader, here or in another process.

    Attributes:
        views: One, or those of a mix.
        sizes: Windows of each in a global batch.
        options: Of the loader.
    """

    views: tuple[Supplier, ...]
    sizes: tuple[int, ...]
    options: LoaderOptions

    def __call__(self) -> Pipeline:
        """Make it."""
        return Pipeline([view.supply(self.options) for view in self.views], self.options, self.sizes)


class Samples:
    """Random batches in the calling thread, one after the other.

    Args:
        pipeline: Of random batches.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._lock = threading.Lock()
        self._ready: collections.deque[Batch] = collections.deque()
        self._made = 0

    def next(self) -> Batch:
        """The next batch."""
        with self._lock:
            if not self._ready:
                lot = self._pipeline.make(self._made, self._pipeline.batches_together)
                self._made += len(lot.batches)
                self._ready.extend(lot.batches)
            return self._ready.popleft()


class Lookahead:
    """Plans the next lot and reads its pages while this one is copied: one uses the disk, the other memory.

    Args:
        pipeline: Whose lots.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = weakref.proxy(pipeline)
        self._workers = Workers(1, name="trajstore-ahead")
        weakref.finalize(self, self._workers.close, 0.0)  # of what nobody closed
        self._next: tuple[int, int, Future[tuple[list[Drawn], bool]]] | None = None

    def start(self, first: int, count: int) -> None:
        """Begin with batches ``first`` to ``first + count - 1``."""
        self._next = first, count, self._workers.submit(self._prepare, first, count)

    def take(self, first: int, count: int) -> tuple[list[Drawn], bool] | None:
        """What was planned for these batches, once it is done, and whether all pages are there; None if it was others."""
        ahead, self._next = self._next, None
        # What failed fails again when it is tried in the thread that hands errors on.
        if ahead is None or ahead[2].exception() is not None or ahead[:2] != (first, count):
            return None
        return ahead[2].result()

    def _prepare(self, first: int, count: int) -> tuple[list[Drawn], bool]:
        drawn = self._pipeline.plan(first, count)
        return drawn, self._pipeline.warm(drawn)

    def close(self) -> None:
        """End the thread, once it no longer reads. May be called twice."""
        self._workers.close(0.0)


def _size_of(drawn: Sequence[Drawn]) -> int:
    return sum(d.sizes[0] for d in drawn)


def _anchors(supply: Supply, spec: WindowSpec, options: LoaderOptions) -> AnchorIndex:
    selection = supply.selection
    anchors = spec.anchors(selection.lengths, selection.terminated if spec.n_step is not None else None)
    if options.anchors is not None:
        anchors = anchors.restricted(_allowed(supply, options.anchors), selection.lengths)
    return anchors


def _planner(
    supply: Supply,
    spec: WindowSpec,
    anchors: AnchorIndex,
    options: LoaderOptions,
    gatherer: Gatherer,
    size: int,
    *,
    stream: int,
) -> Planner:
    share = Share(operator.index(options.rank), operator.index(options.world_size))
    if options.order == "prioritized":
        sampler = PrioritySampler(
            anchors.counts(),
            alpha=options.alpha,
            beta=options.beta,
            seed=options.seed,
            rank=options.rank,
            world_size=options.world_size,
        )
        return PriorityPlanner(spec, anchors, sampler, batch_size=size // options.world_size, seed=options.seed)
    if options.follow:
        return FollowPlanner(spec, anchors, batch_size=size, seed=options.seed, share=share, stream=stream)
    order = _order(supply, anchors, options, gatherer, size, options.seed + (stream << 32))
    return OrderPlanner(spec, anchors, order, seed=options.seed, share=share, stream=stream)


def _order(
    supply: Supply, anchors: AnchorIndex, options: LoaderOptions, gatherer: Gatherer, size: int, seed: int
) -> Order:
    if options.weights is not None:
        weights = _weights(supply.selection, options.weights)
        return WeightedOrder(np.cumsum(anchors.counts()), weights, batch_size=size, seed=seed)
    if options.order == "random":
        return RandomOrder(len(anchors), batch_size=size, seed=seed)
    if options.order == "sequential":
        return SequentialOrder(len(anchors), batch_size=size, epochs=options.epochs, drop_last=options.drop_last)
    return ShuffleOrder(
        len(anchors),
        batch_size=size,
        seed=seed,
        epochs=options.epochs,
        drop_last=options.drop_last,
        block=_blocks(supply, options, gatherer),
        blocks_together=_BLOCKS_TOGETHER,
    )


def _blocks(supply: Supply, options: LoaderOptions, gatherer: Gatherer) -> int | None:
    """Anchors per block; None to shuffle all anchors. It must not depend on the cache, or the batches would."""
    row_bytes = max(gatherer.row_bytes, 1)
    if options.block_bytes is not None:
        return max(1, options.block_bytes // row_bytes)
    nbytes = row_bytes * int(supply.selection.lengths.sum())
    if nbytes > supply.cache.nbytes:
        block_bytes = max(supply.cache.nbytes // (2 * _BLOCKS_TOGETHER), 1)
        warnings.warn(
            f"the view holds {nbytes} bytes and the cache {supply.cache.nbytes}, so shuffling all of it reads pages again "
            f"and again; pass block_bytes={block_bytes} to shuffle it in blocks, or more cache_bytes",
            stacklevel=2,
        )
    return None


def _latest(supply: Supply) -> Callable[[bool], Selection]:
    if supply.latest is None:
        raise SelectionError(
            "follow=True needs a view that says what comes next: store.trajectories, with filter(), first() and last(); "
            "this one was chosen by position, or in another process"
        )
    return supply.latest


def _allowed(supply: Supply, anchors: Any) -> Array:
    """``(steps,)`` bool: where a window may begin."""
    selection = supply.selection
    if isinstance(anchors, str):
        column = selection.schema[anchors]
        if column.dtype != "bool" or column.shape or column.extra or column.ragged:
            raise SelectionError(
                f"anchors={anchors!r} is {column.describe()}, expected a column of one bool per step, or an array of them"
            )
        if selection.lacking(column):
            raise SelectionError(f"column {anchors!r} is lacking from some trajectories; select those that have it")
        allowed = np.asarray(supply.read(anchors))
    else:
        allowed = np.asarray(anchors)
    steps = int(selection.lengths.sum())
    if allowed.dtype != bool or allowed.shape != (steps,):
        raise SelectionError(
            f"anchors= is {allowed.dtype}{list(allowed.shape)}, expected bool[{steps}]: one for each step of the view"
        )
    return allowed


def _weights(selection: Selection, weights: Any) -> Array:
    """``(n,)`` one weight per trajectory."""
    if not isinstance(weights, str):
        array = weights.detach().cpu().numpy() if isinstance(weights, torch.Tensor) else np.asarray(weights)
        if array.shape != (len(selection),):
            raise SelectionError(
                f"weights= has shape {array.shape}, expected ({len(selection)},): one for each trajectory"
            )
        return array
    table = selection.table.full
    if weights not in table.column_names:
        raise SelectionError(
            f"weights={weights!r}: no such field; there are {', '.join(map(repr, selection.schema.metadata))}, 'length' and "
            "'reward_sum'"
        )
    column = table[weights].take(selection.rows)
    if column.null_count or column.to_numpy().dtype.kind not in "iufb":
        raise SelectionError(
            f"weights={weights!r} is {column.type} with {column.null_count} nulls, expected a number for each trajectory"
        )
    return column.to_numpy()  # type: ignore[no-any-return]


def _fingerprint(selection: Selection) -> list[int]:
    """Tells selections apart by their trajectories, whatever version shows them."""
    table, rows = selection.table, selection.rows
    segments = np.array([zlib.crc32(entry.uuid.encode()) for entry in table.segments], np.uint32)
    trajectories = np.stack([segments[table.segment[rows]].astype(np.int64), table.ordinal[rows]])
    return [len(rows), int(table.length[rows].sum()), zlib.crc32(trajectories.tobytes())]
