"""Everything behind a loader but its position: views, windows, orders and gatherers, made from options.

Invariant: a pipeline has no position; asked twice for the same batches it makes the same ones (in a fixed view, and given
the same priorities).
"""

from __future__ import annotations

import collections
import operator
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from trajstore.errors import SelectionError
from trajstore.feed.assemble import Assembler, Batch, Lot
from trajstore.feed.gather import Gatherer
from trajstore.feed.layout import Value
from trajstore.feed.options import LoaderOptions
from trajstore.feed.plan import Drawn, OrderPlanner, Planner, PriorityPlanner, Share
from trajstore.read.cache import PageCache
from trajstore.read.segment import SegmentReaders
from trajstore.read.selection import Selection
from trajstore.read.variable import VariablePages
from trajstore.sample.columns import resolve_window
from trajstore.sample.order import Order, RandomOrder, SequentialOrder, ShuffleOrder, WeightedOrder
from trajstore.sample.priority import PrioritySampler
from trajstore.sample.window import AnchorIndex, WindowSpec
from trajstore.stored import Array

# Small batches are planned, gathered and moved together: up to so many, of so many bytes.
_BATCHES_TOGETHER = 16
_LOT_BYTES = 1 << 20
_BLOCKS_IN_CACHE = 64


@dataclass(eq=False)
class Supply:
    """What a view has its windows gathered with.

    Attributes:
        selection: Its trajectories.
        cache: Where pages are kept.
        readers: Page indexes.
        variable: Pages of strings and lists.
        read: Reads a whole column of the view, ``(steps,)``.
    """

    selection: Selection
    cache: PageCache
    readers: SegmentReaders
    variable: VariablePages
    read: Callable[[str], Any]


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
        self.spec = _common_spec(supplies, options)
        mixed = len(supplies) > 1
        self._gatherers: list[Gatherer] = []
        try:
            for number, supply in enumerate(supplies):
                self._gatherers.append(
                    Gatherer(supply.selection, self.spec, supply.cache, supply.readers, supply.variable, source=number)
                )
            self._planners = [
                _planner(supply, self.spec, options, gatherer, size, stream=number)
                for number, (supply, gatherer, size) in enumerate(zip(supplies, self._gatherers, sizes, strict=True))
            ]
            extra = [Value("index", torch.int64, ()), Value("weight", torch.float32, ())]
            self._assembler = Assembler(
                self.spec,
                self._gatherers,
                extra=extra if options.order == "prioritized" else (),
                device=None if options.device is None else torch.device(options.device),
                keep_buffers=options.prefetch + 2,
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
        drawn = [planner.plan(first, count) for planner in self._planners]
        if len(drawn) == 1:
            return self._assembler.assemble([drawn[0].windows], drawn[0].sizes, drawn[0].extra)
        return self._assembler.assemble([d.windows for d in drawn], [_size_of(drawn)])

    def fingerprint(self) -> list[Any]:
        """What a state must agree with to be resumed."""
        views = [_fingerprint(supply.selection) for supply in self.supplies]
        return [views, self.spec.fingerprint(), self.options.order_fingerprint()]

    def close(self) -> None:
        """Let go of the caches' arenas. May be called twice."""
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


def _size_of(drawn: Sequence[Drawn]) -> int:
    return sum(d.sizes[0] for d in drawn)


def _common_spec(supplies: Sequence[Supply], options: LoaderOptions) -> WindowSpec:
    """The outputs of a batch; those of a mix must agree in all views."""
    specs = [
        resolve_window(
            supply.selection,
            window=options.window,
            dilation=options.dilation,
            pad=options.pad,
            columns=_shared_columns(supplies, options),
            n_step=options.n_step,
            gamma=options.gamma,
            mixed=len(supplies) > 1,
        )
        for supply in supplies
    ]
    for other in specs[1:]:
        for ours, theirs in zip(specs[0].outputs, other.outputs, strict=True):
            if ours.source != theirs.source and not _same_values(ours.source, theirs.source):
                raise SelectionError(
                    f"column {ours.name!r} is {_described(ours.source)} in the first view of the mix and "
                    f"{_described(theirs.source)} in another; leave it out, or mix views whose columns agree"
                )
    return specs[0]


def _shared_columns(supplies: Sequence[Supply], options: LoaderOptions) -> Sequence[str] | None:
    if options.columns is not None or isinstance(options.window, Mapping):
        return options.columns
    if len(supplies) == 1:
        return None
    names = [c.path for c in supplies[0].selection.common_columns if not c.is_variable]
    for supply in supplies[1:]:
        theirs = {c.path for c in supply.selection.common_columns}
        names = [name for name in names if name in theirs]
    return names


def _same_values(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, str) or isinstance(theirs, str):
        return False
    return (ours.dtype, ours.shape, ours.extra, ours.ragged) == (
        theirs.dtype,
        theirs.shape,
        theirs.extra,
        theirs.ragged,
    )


def _described(source: Any) -> str:
    return "virtual" if isinstance(source, str) else source.describe()


def _planner(
    supply: Supply, spec: WindowSpec, options: LoaderOptions, gatherer: Gatherer, size: int, *, stream: int
) -> Planner:
    selection = supply.selection
    anchors = spec.anchors(selection.lengths, selection.terminated if spec.n_step is not None else None)
    if options.anchors is not None:
        anchors = anchors.restricted(_allowed(supply, options.anchors), selection.lengths)
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
        return PriorityPlanner(spec, anchors, sampler, batch_size=size, seed=options.seed)
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
    block, together = _blocks(supply, options, gatherer)
    return ShuffleOrder(
        len(anchors),
        batch_size=size,
        seed=seed,
        epochs=options.epochs,
        drop_last=options.drop_last,
        block=block,
        blocks_together=together,
    )


def _blocks(supply: Supply, options: LoaderOptions, gatherer: Gatherer) -> tuple[int | None, int]:
    """Anchors per block, and how many blocks are shuffled together: as many as half of the cache holds."""
    row_bytes = max(gatherer.row_bytes, 1)
    exceeds = row_bytes * int(supply.selection.lengths.sum()) > supply.cache.nbytes
    if options.block_bytes is None and not exceeds:
        return None, 1
    block_bytes = options.block_bytes or max(supply.cache.nbytes // _BLOCKS_IN_CACHE, row_bytes)
    return max(1, block_bytes // row_bytes), max(1, supply.cache.nbytes // (2 * block_bytes))


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
