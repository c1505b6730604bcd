"""Endless batches out of replay buffers, for a ``DataLoader`` or a plain loop.

Invariant: batches come in the order in which the buffers drew them; what fails while one is made is raised by the ``next()``
that would have given it; no wait is longer than ``timeout_s``, and ``close`` ends every wait.
"""

from __future__ import annotations

import functools
import logging
import operator
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch.utils.data import IterableDataset, get_worker_info

from trajstore.errors import ClosedError, ForkedError, SchemaConflictError, SelectionError, StorageTimeoutError
from trajstore.feed.assemble import Lot
from trajstore.feed.prefetch import Inline, Prefetcher

_log = logging.getLogger(__name__)

_SAY_S = 30.0  # who waits so long is told for what
_STOP_S = 10.0  # a batch that is being made when the dataset is closed has so long to end

Batch = dict[str, Any]


class SampledBuffer(Protocol):
    """What is sampled: ``TrajectoryReplayBuffer``, RLinf's, or one of your own."""

    def is_ready(self, min_size: int) -> bool:
        """Whether it holds so many trajectories."""

    def sample(self, num_chunks: int) -> Mapping[str, Any]:
        """A nested batch ``[num_chunks, ...]``."""


class ReplayBufferDataset(IterableDataset[Batch]):
    """Batches of a replay buffer, or half and half of it and a buffer of demonstrations, once both are ready.

    Each batch is sampled when it is asked for. A context manager.

    Args:
        replay_buffer: Sampled for every batch.
        demo_buffer: Demonstrations that are mixed in, after the samples of ``replay_buffer``; None for none.
        batch_size: Samples in a batch. With ``demo_buffer``, each gives ``batch_size // 2``, so an odd size gives one less.
        min_replay_buffer_size: Trajectories that ``replay_buffer`` must hold before the first batch.
        min_demo_buffer_size: Trajectories that ``demo_buffer`` must hold.
        poll_s: While they are not ready, they are asked so often.
        timeout_s: To wait longer than this for a batch is an error; iterate again to go on waiting.
        **kwargs: Ignored, as RLinf ignores them.

    Raises:
        SelectionError: A size that gives no batch, or a wait that has no end.
    """

    def __init__(
        self,
        replay_buffer: SampledBuffer,
        demo_buffer: SampledBuffer | None,
        batch_size: int,
        min_replay_buffer_size: int,
        min_demo_buffer_size: int,
        *,
        poll_s: float = 0.05,
        timeout_s: float = 3600.0,
        **kwargs: Any,  # noqa: ARG002 - RLinf passes what other datasets need
    ) -> None:
        least = 1 if demo_buffer is None else 2
        if operator.index(batch_size) < least:
            raise SelectionError(f"batch_size={batch_size}, expected {least} or more: each buffer gives a sample")
        for name, seconds in (("poll_s", poll_s), ("timeout_s", timeout_s)):
            if not 0 < seconds < threading.TIMEOUT_MAX:  # nan is not either
                raise SelectionError(f"{name}={seconds}, expected a positive number of seconds")
        self.replay_buffer = replay_buffer
        self.demo_buffer = demo_buffer
        self.batch_size = batch_size
        self.min_replay_buffer_size = min_replay_buffer_size
        self.min_demo_buffer_size = min_demo_buffer_size
        self._timeout_s = timeout_s
        needs = [_Need("replay_buffer", replay_buffer, min_replay_buffer_size)]
        if demo_buffer is not None:
            needs.append(_Need("demo_buffer", demo_buffer, min_demo_buffer_size))
        self._maker = _Maker(needs, operator.index(batch_size) // len(needs), poll_s)

    def __iter__(self) -> Iterator[Batch]:
        """An iterator that has no end until ``close``; it can be asked again after an error.

        Raises:
            ClosedError: The dataset was closed.
            ForkedError: In a worker of a ``DataLoader``, whose copy of the buffers would never see what is added.
        """
        if get_worker_info() is not None:
            raise ForkedError(
                "a worker process has a copy of the replay buffer, which never sees new trajectories; pass "
                "num_workers=0 to the "
                "DataLoader, and use PreloadReplayBufferDataset to have batches made ahead"
            )
        if self._maker.closed.is_set():
            raise ClosedError("this dataset was closed; make another")
        return _Batches(self, self._source(), self._maker, self._timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End iteration, also of somebody who waits. The buffers stay open. May be called twice."""
        self._maker.closed.set()

    def _source(self) -> Prefetcher | Inline:
        return Inline(functools.partial(self._maker.make, self._timeout_s))


class PreloadReplayBufferDataset(ReplayBufferDataset):
    """The same batches, made ahead by a background thread. All iterators take from one queue.

    The thread starts with the first iterator and ends with ``close``, or when the dataset is no longer referred to.

    Args:
        replay_buffer: See ``ReplayBufferDataset``, also for what is not described here.
        demo_buffer: See there.
        batch_size: See there.
        min_replay_buffer_size: See there.
        min_demo_buffer_size: See there.
        prefetch_size: So many batches are kept ready at most.
        poll_s: See there.
        timeout_s: See there.
        **kwargs: See there.
    """

    def __init__(
        self,
        replay_buffer: SampledBuffer,
        demo_buffer: SampledBuffer | None,
        batch_size: int,
        min_replay_buffer_size: int,
        min_demo_buffer_size: int,
        prefetch_size: int = 5,
        *,
        poll_s: float = 0.05,
        timeout_s: float = 3600.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            replay_buffer,
            demo_buffer,
            batch_size,
            min_replay_buffer_size,
            min_demo_buffer_size,
            poll_s=poll_s,
            timeout_s=timeout_s,
            **kwargs,
        )
        if operator.index(prefetch_size) < 1:
            raise SelectionError(
                f"prefetch_size={prefetch_size}, expected 1 or more; ReplayBufferDataset makes none ahead"
            )
        self.prefetch_size = prefetch_size
        self._prefetcher: Prefetcher | None = None
        self._starting = threading.Lock()

    def close(self) -> None:
        """End the thread and iteration. The buffers stay open. May be called twice."""
        super().close()
        with self._starting:
            prefetcher = self._prefetcher
        if prefetcher is not None and not prefetcher.stop(_STOP_S):
            _log.warning("a batch that was being made did not end within %g s; its thread ends with it", _STOP_S)

    def _source(self) -> Prefetcher:
        with self._starting:
            if self._prefetcher is None:
                self._prefetcher = Prefetcher(functools.partial(self._maker.make, None), self.prefetch_size)
                # The thread refers to the maker and to nobody else: what nobody closed ends when it is collected.
                weakref.finalize(self, _stop, self._maker, self._prefetcher)
            return self._prefetcher


def replay_buffer_collate_fn(batch: Sequence[Batch]) -> Batch:
    """For ``DataLoader(dataset, batch_size=1, collate_fn=...)``: the dataset's batch as it is.

    Args:
        batch: One batch of a dataset of this module.

    Raises:
        SelectionError: There are several, of which all but one would be lost.

    Examples:
        >>> replay_buffer_collate_fn([{"rewards": torch.ones(2)}])
        {'rewards': tensor([1., 1.])}
    """
    if len(batch) != 1:
        raise SelectionError(
            f"{len(batch)} batches to collate, expected one; pass batch_size=1 to the DataLoader, and the size that "
            f"you want to "
            "the dataset"
        )
    return batch[0]


def concatenated(first: Mapping[str, Any], second: Mapping[str, Any], *, path: str = "") -> Batch:
    """Two nested batches, the samples of the second after those of the first.

    Args:
        first: ``[n, ...]``.
        second: ``[m, ...]``, with the same names, dtypes, shapes and device.
        path: Name of what they are in.

    Raises:
        SchemaConflictError: They do not go together.

    Examples:
        >>> concatenated({"obs": {"x": torch.zeros(1)}}, {"obs": {"x": torch.ones(2)}})
        {'obs': {'x': tensor([0., 1., 1.])}}
    """
    if set(first) != set(second):
        only = [
            f"{', '.join(repr(f'{path}{name}') for name in sorted(set(mine) - set(other)))} only in the {whose}"
            for mine, other, whose in ((first, second, "replay buffer"), (second, first, "demo buffer"))
            if set(mine) - set(other)
        ]
        raise SchemaConflictError(
            f"the buffers have different fields: {'; '.join(only)}; add trajectories with the same fields to both"
        )
    return {name: _joined(first[name], second[name], f"{path}{name}") for name in first}


def _joined(first: Any, second: Any, name: str) -> Any:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return concatenated(first, second, path=f"{name}/")
    found = [_described(value) for value in (first, second)]
    if found[0] != found[1] or not isinstance(first, torch.Tensor):
        raise SchemaConflictError(
            f"{name!r} is {found[0]} in the replay buffer and {found[1]} in the demo buffer, expected tensors of one dtype, "
            "shape and device; convert one before it is added"
        )
    return torch.cat([first, second])


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    sizes = ", ".join(["n", *map(str, value.shape[1:])])
    return f"{str(value.dtype).removeprefix('torch.')}[{sizes}] on {value.device}"


@dataclass(frozen=True)
class _Need:
    """A buffer, and how many trajectories it must hold."""

    name: str
    buffer: SampledBuffer
    min_size: int

    def met(self) -> bool:
        return bool(self.buffer.is_ready(self.min_size))


class _Maker:
    """Makes one batch after the other; refers to no dataset."""

    def __init__(self, needs: Sequence[_Need], samples: int, poll_s: float) -> None:
        self.closed = threading.Event()
        self._needs = needs
        self._samples = samples
        self._poll_s = poll_s

    def make(self, timeout_s: float | None) -> Lot | None:
        """The next batch; None once it is closed.

        Args:
            timeout_s: Until the buffers are ready; None in the background, where whoever takes the batch has a time-out.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        say_at = time.monotonic() + _SAY_S
        while not all(need.met() for need in self._needs):
            if time.monotonic() >= say_at:
                _log.warning("waiting: %s", self.waits_for())
                say_at = float("inf")
            if deadline is not None and timeout_s is not None and time.monotonic() >= deadline:
                raise self.late(timeout_s)
            if self.closed.wait(self._poll_s):
                return None
        if self.closed.is_set():
            return None
        batches = [need.buffer.sample(self._samples) for need in self._needs]
        return Lot([dict(batches[0]) if len(batches) == 1 else concatenated(*batches)])

    def waits_for(self) -> str:
        """What is not ready, for messages; empty if all is."""
        waiting = [f"{n.name} has fewer than min_{n.name}_size={n.min_size}" for n in self._needs if not n.met()]
        return f"{' and '.join(waiting)} trajectories" if waiting else ""

    def late(self, timeout_s: float) -> StorageTimeoutError:
        """What to raise when there is no batch."""
        reason = self.waits_for() or "sampling takes longer"
        return StorageTimeoutError(
            f"no batch within timeout_s={timeout_s:g}: {reason}; iterate again to go on waiting, or pass a larger timeout_s"
        )


class _Batches:
    """An iterator; keeps its dataset, whose thread would end with it."""

    def __init__(
        self, dataset: ReplayBufferDataset, source: Prefetcher | Inline, maker: _Maker, timeout_s: float
    ) -> None:
        self._dataset = dataset
        self._source = source
        self._maker = maker
        self._timeout_s = timeout_s

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._maker.closed.is_set():
            raise StopIteration
        try:
            lot = self._source.take(self._timeout_s)
        except StorageTimeoutError as error:
            if not self._source.running:
                raise  # a buffer's own, or one that says it all
            raise self._maker.late(self._timeout_s) from error
        if lot is None:
            raise StopIteration
        return lot.batches[0]


def _stop(maker: _Maker, prefetcher: Prefetcher) -> None:
    maker.closed.set()
    prefetcher.stop(0.0)  # called by the garbage collector, which must not wait
