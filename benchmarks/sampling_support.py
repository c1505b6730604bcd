"""What the sampling benchmarks share: stores to sample from, batches drawn in turn, reads recorded and done again bare.

Invariant: a loader is timed over many more batches than it holds ready, after its first ones were thrown away, so what it
did while somebody else was timed is no part of its time.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import trajstore
from benchmarks import data
from benchmarks.harness import Contender, Context, Timing, cores
from trajstore.format import layout
from trajstore.format.codecs import codec_named
from trajstore.format.pages import PageSource
from trajstore.storage.filesystem import ReadRun

PREFETCH = 2
_SETTLE_S = 0.03  # a loader fills its queue again before the next contender begins
IMAGE = "obs/image"


# --- stores -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Episodes end to end, as all contenders get them."""

    columns: Mapping[str, np.ndarray]  # path -> (steps, ...)
    lengths: np.ndarray  # (episodes,) int64

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        return sum(array.nbytes for array in self.columns.values())

    def episodes(self) -> Iterator[dict[str, np.ndarray]]:
        """One mapping of columns per episode."""
        stops = np.cumsum(self.lengths)
        for start, stop in zip(stops - self.lengths, stops, strict=True):
            yield {path: array[start:stop] for path, array in self.columns.items()}


def image_rollouts(steps: int, *, length: int = 250, kind: str = "recorded") -> Rollouts:
    """Frames with states, actions, rewards and ends: 12,397 bytes a step.

    Args:
        steps: A multiple of ``length``.
        length: Of every episode.
        kind: ``"recorded"``: Atari frames; ``"camera"``: camera-like ones; ``"noise"``: nothing to compress.
    """
    distinct = min(steps, 8_000)
    if kind == "noise":
        frames = np.random.default_rng(0).integers(0, 256, (distinct, data.SIDE, data.SIDE, 3), np.uint8)
    else:
        frames = data.camera(distinct) if kind == "camera" else data.atari_small(distinct, "MsPacman")
    rng = np.random.default_rng(0)
    columns = {
        IMAGE: frames[np.arange(steps) % distinct],
        "obs/state": data.white_noise(steps, 17),
        "action": rng.standard_normal((steps, 6), np.float32),
        "reward": rng.random(steps, np.float32),
        "done": np.arange(steps) % length == length - 1,
    }
    return Rollouts(columns=columns, lengths=np.full(steps // length, length))


def state_rollouts(steps: int, *, length: int = 200) -> Rollouts:
    """States of 17 floats, actions and rewards: 96 bytes a step."""
    rng = np.random.default_rng(0)
    columns = {
        "obs": data.white_noise(steps, 17),
        "action": rng.standard_normal((steps, 6), np.float32),
        "reward": rng.random(steps, np.float32),
    }
    return Rollouts(columns=columns, lengths=np.full(steps // length, length))


def write_store(
    url: str, rollouts: Rollouts, *, only: Sequence[str] | None = None, final_obs: bool = False, **options: Any
) -> str:
    """A new store of these episodes; returns its URL.

    Args:
        url: Where.
        rollouts: The episodes.
        only: These columns; all by default.
        final_obs: Give ``obs`` one row more, so that the next state is not stored twice.
        **options: Of ``trajstore.open``.
    """
    with trajstore.open(url, mode="x", commit_interval_s=1e6, **options) as store:
        for number, episode in enumerate(rollouts.episodes()):
            if final_obs:
                episode["obs"] = np.concatenate([episode["obs"], episode["obs"][:1]])
            kept = {path: array for path, array in episode.items() if only is None or path in only}
            store.append(nested(kept), terminated=number % 2 == 0, truncated=number % 2 == 1)
        store.flush()
    return url


def nested(columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """``{"obs/image": a}`` as ``{"obs": {"image": a}}``."""
    out: dict[str, Any] = {}
    for path, array in columns.items():
        *folders, name = path.split("/")
        inner = out
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = array
    return out


def warm(view: trajstore.View, columns: Sequence[str] | None = None) -> None:
    """Bring every page of these columns into the store's cache."""
    with view.loader(4096, order="sequential", columns=columns) as loader:
        for _ in loader:
            pass


def cache_counters(loader: Any) -> Any:
    """What the cache of a loader has counted: ``used_bytes``, ``bytes_decoded``, ``bytes_read``, ``evictions``."""
    stats = loader.stats()
    return getattr(stats, "cache", stats)


# --- batches drawn in turn ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Feed:
    """One way to get batches."""

    name: str
    draw: Callable[[], object]  # the next batch
    batches: int  # drawn in one timed run
    ahead: int = 0  # batches that it may hold ready


def loader_feed(name: str, loader: Any, *, batches: int) -> Feed:
    """A loader as a feed; it must be endless."""
    batch = iter(loader)
    return Feed(name=name, draw=lambda: next(batch), batches=batches, ahead=PREFETCH + 1)


def measure_feeds(context: Context, feeds: Sequence[Feed], *, rounds: int) -> dict[str, Timing]:
    """Seconds per batch of each feed, in turn."""
    timings = context.measure([_contender(feed) for feed in feeds], rounds=rounds, warmup=2)
    return {feed.name: per_batch(timings[feed.name], feed.batches) for feed in feeds}


def per_batch(timing: Timing, batches: int) -> Timing:
    """A timing of runs of several batches, for one of them."""
    return Timing(tuple(s / batches for s in timing.seconds), tuple(s / batches for s in timing.cpu_seconds))


def _contender(feed: Feed) -> Contender:
    def draw(count: int) -> None:
        for _ in range(count):
            batch = feed.draw()
            del batch  # a consumer that keeps nothing

    if not feed.ahead:
        return Contender(name=feed.name, run=lambda _none: draw(feed.batches))
    return Contender(
        name=feed.name,
        prepare=lambda: draw(feed.ahead),
        run=lambda _none: draw(feed.batches),
        cleanup=lambda _none: time.sleep(_SETTLE_S),
    )


# --- reads --------------------------------------------------------------------------------------------------


def drop_file_cache(folder: Path) -> None:
    """Have the kernel forget the contents of every file below (``posix_fadvise``, DONTNEED); they must be synced."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def recorded_reads(store: trajstore.Store) -> Iterator[list[ReadRun]]:
    """Every range of step data that a store reads during the block, in order of completion."""
    filesystem: Any = store._filesystem
    plain, straight = filesystem.read_runs, filesystem.read_into
    seen: list[ReadRun] = []

    def read_runs(runs: Sequence[ReadRun]) -> Any:
        found = plain(runs)
        seen.extend(runs)  # once they are read: at any moment these are the finished ones
        return found

    def read_into(key: str, start: int, buffers: Sequence[memoryview]) -> None:
        straight(key, start, buffers)
        seen.append(ReadRun(key, start, start + sum(len(buffer) for buffer in buffers), (0,)))

    filesystem.read_runs, filesystem.read_into = read_runs, read_into
    try:
        yield seen
    finally:
        del filesystem.read_runs, filesystem.read_into


@dataclass(frozen=True)
class StoredPage:
    """One page inside a range that was read."""

    offset: int  # in the range
    nbytes: int
    codec: str
    decoded_bytes: int


def page_sources(store: trajstore.Store) -> dict[str, PageSource]:
    """The page index of every tensor object of a store, by key."""
    view = store.trajectories
    found = {}
    for entry in view._table.segments:
        reader = store._access.readers.open(entry, view.schema)
        for source in reader.sources.values():
            found[layout.segment_key(entry.uuid, source.object)] = source
    return found


def pages_in(run: ReadRun, source: PageSource, row_bytes: int) -> list[StoredPage]:
    """The pages that lie in a range."""
    whole = (source.offsets >= run.start) & (source.offsets + source.nbytes <= run.stop)
    return [
        StoredPage(
            int(source.offsets[page]) - run.start,
            int(source.nbytes[page]),
            source.codec,
            source.page_rows * row_bytes,
        )
        for page in np.flatnonzero(whole)
    ]


class BareReader:
    """Reads ranges of local files with ``preadv`` from as many threads as there are cores, and decodes them if asked to.

    Each thread has a memory of its own that it has touched before, and decodes what it has just read.
    """

    def __init__(self, root: Path, runs: Sequence[ReadRun], pages: Sequence[Sequence[StoredPage]]) -> None:
        self._runs = list(zip(runs, pages, strict=True))
        self._files = {key: os.open(root / key, os.O_RDONLY) for key in {run.key for run in runs}}
        self._room = max(run.stop - run.start for run in runs)
        self._page_room = max((page.decoded_bytes for run in pages for page in run), default=1)
        self._threads = cores()
        self._local = threading.local()
        self._pool = ThreadPoolExecutor(self._threads, initializer=self._touch)
        self._pool.submit(int).result()

    @property
    def nbytes(self) -> int:
        """Bytes of all ranges."""
        return sum(run.stop - run.start for run, _ in self._runs)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the pages in them, once decoded."""
        return sum(page.decoded_bytes for _, pages in self._runs for page in pages)

    def read(self, *, decode: bool) -> None:
        """Read every range once."""
        list(self._pool.map(lambda share: self._read_share(share, decode), range(self._threads)))

    def close(self) -> None:
        """Let go of threads and files."""
        self._pool.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)

    def _touch(self) -> None:
        self._local.stored = np.ones(self._room, np.uint8)
        self._local.page = np.ones(self._page_room, np.uint8)

    def _read_share(self, share: int, decode: bool) -> None:
        memory, page_memory = self._local.stored, self._local.page
        for run, pages in self._runs[share :: self._threads]:
            view = memoryview(memory)[: run.stop - run.start]
            done = 0
            while done < len(view):
                got = os.preadv(self._files[run.key], [view[done:]], run.start + done)
                if got == 0:
                    raise RuntimeError(f"{run.key} ends before {run.stop}")
                done += got
            if decode:
                for page in pages:
                    stored = view[page.offset : page.offset + page.nbytes]
                    codec_named(page.codec).decode_into(stored, page_memory[: page.decoded_bytes])
