"""The loader: batches in an order, made ahead of their consumer.

Invariant: its position counts batches that the consumer received, and nothing else; what is ahead in the pipe is made again
after a resumption. Whatever fails behind it is raised by ``next``, and the call after that tries the same batch again.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pickle
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from trajstore.errors import ClosedError, ForkedError, SelectionError, StorageTimeoutError
from trajstore.feed.assemble import Batch, Lot
from trajstore.feed.cuda import Arrival
from trajstore.feed.normalize import Normalization
from trajstore.feed.options import LoaderOptions
from trajstore.feed.pipeline import Pipeline
from trajstore.feed.prefetch import Inline, Prefetcher
from trajstore.feed.progress import LoaderProgress
from trajstore.feed.tensordicts import TensorDictMaker
from trajstore.read.cache import PageCache
from trajstore.read.leases import CacheStats
from trajstore.storage.workers import FORKED

_STATE_FORMAT = 1
_JOIN_S = 2.0  # closing waits no longer for a thread that hangs


@dataclass(frozen=True)
class LoaderStats:
    """What a loader has done.

    Attributes:
        batches: Received by the consumer.
        wait_s: Seconds that the consumer waited for them.
        buffers_made: Output buffers that had to be made: more than a few if the consumer keeps batches.
        ignored_updates: Priorities given for trajectories that are gone.
        cache: Of the store's cache, which other loaders may share; of a mix, the sum over the caches of its views.
    """

    batches: int
    wait_s: float
    buffers_made: int
    ignored_updates: int
    cache: CacheStats


@dataclass(frozen=True, eq=False)
class _Ahead:
    """Batches that are ready for the consumer."""

    end: int  # number of the batch that comes after them
    batches: collections.deque[Batch]


class Loader(IterableDataset[Batch]):
    """An iterator over batches, and a context manager; made by ``View.loader``, which says what a batch holds.

    ``iter(loader)`` goes on where the loader is. After the end of a pass the next ``iter`` begins the next pass, with the
    epochs counted on. Under ``torch.utils.data.DataLoader(loader, batch_size=None, num_workers=n,
    multiprocessing_context="spawn")`` each worker makes every n-th batch, with a page cache of its own, and the batches are
    the same. Pass ``persistent_workers=True`` too: workers that are started anew begin with the first epoch again. (With
    ``output="tensordict"`` also pass a ``collate_fn`` that returns its argument.)

    Several threads may take batches of one loader; each gets other ones.

    Args:
        build: Makes the pipeline; called again in another process.
        options: The arguments.
    """

    def __init__(self, build: Callable[[], Pipeline], options: LoaderOptions) -> None:
        self._build = build
        self._options = options
        self._reset()
        self._make()  # what does not fit is said at once

    def _reset(self) -> None:
        self._made: Pipeline | None = None
        self._converted: TensorDictMaker | None = None
        self._bar: LoaderProgress | None = None  # of the pass that goes on
        self._pid = os.getpid()
        self._taking = threading.Lock()
        self._ended = False  # at the end of a pass, until the next iter()
        self._closed = False
        self._source: Prefetcher | Inline | None = None
        self._ahead = _Ahead(0, collections.deque())
        self._arrival: Arrival | None = None
        self._stride = 1  # of batches, when workers of a DataLoader take turns
        self._sharing = False  # whether this worker is within a pass,
        self._shared_from = 0  # and where that began
        self._wait_s = 0.0
        self._finalizer: weakref.finalize[Any, Any] | None = None

    @property
    def _pipeline(self) -> Pipeline:
        """In another process it is made when first needed, so that what fails there is raised where it can be caught."""
        return self._made or self._make()

    def _make(self) -> Pipeline:
        self._made = pipeline = self._build()
        if self._options.output == "tensordict":
            self._converted = TensorDictMaker(pipeline.spec)
        return pipeline

    @property
    def _received(self) -> int:
        """Batches that the consumer has, over all passes."""
        return self._ahead.end - self._stride * len(self._ahead.batches)

    def __len__(self) -> int:
        """Batches of a pass.

        Raises:
            TypeError: The order is endless.
        """
        count = self._pipeline.batches_per_pass
        if count is None:
            raise TypeError(f"a loader with order={self._options.order!r} is endless; take as many batches as you need")
        return count

    def __iter__(self) -> Iterator[Batch]:
        self._check_usable()
        worker = get_worker_info()
        if worker is not None and self._options.order == "prioritized":
            raise SelectionError(
                "order='prioritized' in a worker of a DataLoader, which would never learn of new priorities; iterate over "
                "the loader itself, which makes batches ahead in a thread"
            )
        if worker is not None and not self._sharing:
            self._shared_from = self._received
            self._ahead = _Ahead(self._received + worker.id, collections.deque())
            self._stride = worker.num_workers
            self._sharing = True
        self._ended = False
        # One bar in a terminal: not one for each worker and rank.
        shown = self._options.progress and worker is None and self._options.rank == 0
        return self._with_progress() if shown else self

    def __next__(self) -> Batch:
        with self._taking:
            self._check_usable()
            batches = self._ahead.batches or self._fetch()
            arrival = self._arrival
            if arrival is not None:
                arrival.receive()
            batch = batches.popleft()
        return batch if self._converted is None else self._converted(batch)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """No more batches; let go of threads and memory. May be called twice."""
        if self._closed or self._pid != os.getpid():
            return
        self._closed = True
        self._restart(_JOIN_S)
        if self._made is not None:
            self._made.close()
        if self._bar is not None:
            self._bar.close()

    @property
    def normalization(self) -> Normalization | None:
        """What columns are normalized with, by name; None without ``normalize=``.

        To deploy a policy with: ``loader.normalization["obs/state"].apply(state)``, ``["action"].undo(action)``.
        """
        return self._options.normalization

    def stats(self) -> LoaderStats:
        """Counters as they are now."""
        sampler = self._pipeline.sampler
        return LoaderStats(
            batches=self._received,
            wait_s=self._wait_s,
            buffers_made=self._pipeline.buffers_made,
            ignored_updates=0 if sampler is None else sampler.ignored_updates,
            cache=_summed({supply.cache for supply in self._pipeline.supplies}),
        )

    def update_priorities(self, index: Any, priorities: Any) -> None:
        """Set the priorities of windows, for ``order="prioritized"``.

        Args:
            index: ``batch["index"]``, ``(k,)``.
            priorities: ``(k,)``, the absolute temporal-difference error for instance; tensors of any device.

        Raises:
            SelectionError: Another order, or priorities that are no finite numbers from 0.
        """
        sampler = self._pipeline.sampler
        if sampler is None:
            raise SelectionError(f"order={self._options.order!r} has no priorities; pass order='prioritized'")
        sampler.update(index, priorities)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is: to be loaded into a loader of the same view, window and order.

        Numbers, strings and NumPy arrays. With ``follow=True`` it says which trajectory each number in ``trajectory`` means;
        with priorities it holds them.
        """
        state: dict[str, Any] = {
            "format": _STATE_FORMAT,
            "batches": self._received,
            "fingerprint": self._pipeline.fingerprint(),
        }
        trajectories = self._pipeline.trajectories()
        if trajectories is not None:
            state["trajectories"] = trajectories
        if self._pipeline.sampler is not None:
            state["priorities"] = self._pipeline.sampler.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader was. The number of ranks may differ, but for priorities.

        A loader that follows goes on with the view as it is now, and warns if it has changed.

        Raises:
            SelectionError: It was a loader of another view, window or order.
        """
        self._check_usable()
        if state.get("format") != _STATE_FORMAT:
            raise SelectionError(f"a loader's state of format {state.get('format')!r}, expected {_STATE_FORMAT}")
        parts = ("view", "window", "order")
        for part, theirs, ours in zip(parts, state["fingerprint"], self._pipeline.fingerprint(), strict=True):
            if theirs != ours and part == "view" and self._options.follow:
                warnings.warn(
                    f"the view has changed since this state was saved: it had {theirs[0][0]} trajectories, and now has "
                    f"{ours[0][0]}; sampling goes on with these",
                    stacklevel=2,
                )
            elif theirs != ours:
                raise SelectionError(
                    f"this state is of a loader of another {part}: it was saved with {theirs}, this loader has {ours}"
                )
        self._restart(_JOIN_S)
        if self._pipeline.sampler is not None:
            self._pipeline.resume_priorities(state["priorities"], state.get("trajectories"))
        self._ahead = _Ahead(int(state["batches"]), collections.deque())
        count = self._pipeline.batches_per_pass
        self._ended = count is not None and self._received > 0 and self._received % count == 0

    def __getstate__(self) -> dict[str, Any]:
        build = self._build if isinstance(self._build, _Packed) else _Packed(pickle.dumps(self._build))
        return {"build": build, "options": self._options, "received": self._received}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._build, self._options = state["build"], state["options"]
        self._reset()
        self._ahead = _Ahead(state["received"], collections.deque())

    def _fetch(self) -> collections.deque[Batch]:
        """The next batches, at least one."""
        if self._source is None and self._ended:
            raise StopIteration
        source = self._source or self._start()
        begun = time.perf_counter()
        try:
            lot = source.take(self._options.timeout_s)
            if lot is not None:
                self._arrival = lot.arrival
                ahead = _Ahead(self._received + self._stride * len(lot.batches), collections.deque(lot.batches))
                self._ahead = ahead  # at once: Ctrl-C finds the position and the batches in agreement
                return ahead.batches
        except StorageTimeoutError:
            if not source.running:  # the thread's own error, not that of waiting for it
                self._restart()
            raise
        except BaseException:
            self._restart()
            raise
        finally:
            self._wait_s += time.perf_counter() - begun
        self._check_usable()  # closed meanwhile?
        self._restart()
        if self._sharing:  # what is left of the pass are the other workers' batches
            self._ahead = _Ahead(self._end_of_pass() or 0, collections.deque())
        self._ended = True
        self._sharing = False
        raise StopIteration

    def _end_of_pass(self) -> int | None:
        """The number of the last batch of this pass, plus one."""
        count = self._pipeline.batches_per_pass
        if count is None:
            return None
        if self._ended:
            return self._received
        return ((self._shared_from if self._sharing else self._received) // count + 1) * count

    def _start(self) -> Prefetcher | Inline:
        make = _Maker(self._pipeline, self._received, self._stride, self._end_of_pass())
        if not self._options.prefetch:
            source: Prefetcher | Inline = Inline(make)
        else:
            source = Prefetcher(make, self._options.prefetch)
            self._finalizer = weakref.finalize(self, source.stop, 0.0)
        self._source = source
        if self._closed:  # by another thread, which found no source to stop
            self._restart()
        return source

    def _restart(self, join_s: float = 0.0) -> None:
        """Give up what is ahead of the consumer; a thread that hangs is left to itself."""
        source, self._source = self._source, None
        finalizer, self._finalizer = self._finalizer, None
        self._arrival = None  # which keeps the memory of its batches
        # A new one: another thread may be about to take of the old one.
        self._ahead = _Ahead(self._received, collections.deque())
        if finalizer is not None:
            finalizer.detach()
        if source is not None:
            source.stop(join_s)

    def _check_usable(self) -> None:
        if self._pid != os.getpid():
            raise ForkedError(FORKED)
        if self._closed:
            raise ClosedError("the loader is closed; make another one with view.loader(...)")

    def _with_progress(self) -> Iterator[Batch]:
        """This pass, with a progress bar that ends with it, or with the generator."""
        count = self._pipeline.batches_per_pass
        if self._bar is not None:
            self._bar.close()
        self._bar = bar = LoaderProgress(self._received if count is None else self._received % count, count)
        try:
            while True:
                try:
                    batch = next(self)
                except StopIteration:
                    return
                bar.advance()
                yield batch
        finally:
            bar.close()


def _summed(caches: Iterable[PageCache]) -> CacheStats:
    counters = zip(*(dataclasses.astuple(cache.stats()) for cache in caches), strict=True)
    return CacheStats(*map(sum, counters))


@dataclass(frozen=True)
class _Packed:
    """How to make a pipeline, on its way to another process.

    A store that cannot be opened there is an error of whoever needs it: a process that is still starting would die of it.
    """

    data: bytes  # pickled by this process or its parent, never read from a store

    def __call__(self) -> Pipeline:
        build: Callable[[], Pipeline] = pickle.loads(self.data)  # noqa: S301 - see above
        return build()


class _Maker:
    """Makes one lot after the other, up to the end of the pass."""

    def __init__(self, pipeline: Pipeline, position: int, stride: int, end: int | None) -> None:
        self._pipeline = pipeline
        self._position = position
        self._stride = stride
        self._end = end

    def __call__(self) -> Lot | None:
        count = self._pipeline.batches_together if self._stride == 1 else 1
        if self._end is not None:
            count = min(count, self._end - self._position)
        if count <= 0:
            return None
        lot = self._pipeline.make(self._position, count)
        self._position += self._stride * len(lot.batches)
        return lot
