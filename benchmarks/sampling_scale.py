"""Sampling as a store grows: while it is appended to, with a million trajectories, with ten thousand segments."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import trajstore
from benchmarks import torchrl_peers as peers
from benchmarks.harness import Bar, Contender, Context, Measurement, paired_ratios, ratio_of_medians
from benchmarks.sampling_support import (
    Rollouts,
    cache_counters,
    loader_feed,
    measure_feeds,
    nested,
    per_batch,
    state_rollouts,
    warm,
    write_store,
)

WINDOWS, LENGTH = 256, 16


def after_appends(context: Context) -> Iterator[Measurement]:
    """Batches of windows right after each append, following the store, against a fixed view of it.

    A cycle is one append and one batch. Both loaders see the same appends to the same store; what an append takes alone is
    measured in turn and taken off both.
    """
    rollouts = state_rollouts(context.pick(1_000_000, 100_000))
    url = write_store(str(context.scratch / "growing"), rollouts)
    episode = nested(next(rollouts.episodes()))
    cycles = 50
    with trajstore.open(url, mode="a", cache_bytes=4 * rollouts.nbytes, commit_interval_s=1e6) as store:
        view = store.trajectories
        warm(view)
        with (
            view.loader(WINDOWS, window=LENGTH, prefetch=1) as fixed,
            view.loader(WINDOWS, window=LENGTH, prefetch=1, follow=True) as following,
        ):
            batches: dict[str, Iterator[Any] | None] = {
                "append": None,
                "fixed": iter(fixed),
                "following": iter(following),
            }

            def turn(name: str) -> None:
                batch = batches[name]
                for _ in range(cycles):
                    store.append(episode)
                    if batch is not None:
                        next(batch)

            contenders = [Contender(name=name, run=lambda _none, name=name: turn(name)) for name in batches]  # type: ignore[misc]
            timings = context.measure(contenders, rounds=context.pick(20, 5), warmup=2)
        timings = {name: per_batch(timing, cycles) for name, timing in timings.items()}
    alone = timings["append"].median_s
    peer = _torchrl_after_extends(context, rollouts)
    yield Measurement(
        name="follow",
        what=f"windows of states right after each append, {int(rollouts.lengths.sum()):,} steps stored: time / static time",
        measured=(timings["following"].median_s - alone) / (timings["fixed"].median_s - alone),
        bar=Bar("at most", 1.3),
        timings=timings,
        spread=paired_ratios(timings, "following", "fixed"),
        details={"spread_is_of": "whole cycles, with the append", **peer},
    )


def _torchrl_after_extends(context: Context, rollouts: Rollouts) -> dict[str, float]:
    """What the same costs TorchRL, per way of drawing windows: time right after each extend over its static time."""
    found = {}
    length = int(rollouts.lengths[0])
    rounds = context.pick(40, 10)
    first = {path: array[:length] for path, array in rollouts.columns.items()}
    for way in ("SliceSampler", "Sequence, stop"):
        boundary = peers.WINDOW_SAMPLERS[way][1]
        buffer = peers.window_buffer(
            way,
            rollouts.columns,
            rollouts.lengths,
            windows=WINDOWS,
            length=LENGTH,
            kind="tensor",
            scratch=context.scratch,
            room=(rounds + 10) * length,
        )
        numbers = iter(range(len(rollouts.lengths), 1 << 40))

        def extend(buffer: Any = buffer, boundary: str = boundary, numbers: Iterator[int] = numbers) -> None:
            rows = peers.window_rows(first, np.array([length]), boundary, first_trajectory=next(numbers))
            buffer.extend(rows)

        def draw(_none: object, buffer: Any = buffer) -> object:
            return buffer.sample()

        # The static run first: a sample after the extend has just paid for the boundaries that this one finds cached.
        static = context.measure([Contender(name="static", run=draw)], rounds=rounds, warmup=3)["static"]
        extended = context.measure([Contender(name="x", prepare=extend, run=draw)], rounds=rounds, warmup=3)["x"]
        key = "torchrl_" + way.partition(",")[0].lower()
        found[f"{key}_after_extend_ms"] = round(extended.median_s * 1e3, 3)
        found[f"{key}_static_ms"] = round(static.median_s * 1e3, 3)
    return found


def many_trajectories(context: Context) -> Iterator[Measurement]:
    """Windows of a byte column out of 346 million steps in a million trajectories, against a million steps."""
    length = 346
    count = context.pick(1_000_000, 50_000)
    large, small = context.scratch / "large", context.scratch / "small"
    context.say(f"index: appending {count:,} trajectories")
    action = np.zeros(length, np.uint8)
    for path, trajectories in ((large, count), (small, 1_000_000 // length)):
        with trajstore.open(path, mode="x", codec="fast", segment_bytes=1 << 26, commit_interval_s=1e6) as store:
            for _ in range(trajectories):
                store.append({"action": action})
    context.say("index")
    with (
        trajstore.open(large, cache_bytes=2 * count * length + (64 << 20)) as large_store,
        trajstore.open(small, cache_bytes=64 << 20) as small_store,
    ):
        views = {"large": large_store.trajectories, "small": small_store.trajectories}
        for view in views.values():
            with view.loader(1 << 18, order="sequential") as loader:
                for _ in loader:
                    pass
        with (
            views["large"].loader(WINDOWS, window=LENGTH) as large_loader,
            views["small"].loader(WINDOWS, window=LENGTH) as small_loader,
        ):
            feeds = [
                loader_feed("large", large_loader, batches=320),
                loader_feed("small", small_loader, batches=320),
            ]
            timings = measure_feeds(context, feeds, rounds=context.pick(20, 5))
            per_trajectory = index_bytes(large_loader, views["large"], trajectories=count) / count
            evictions = cache_counters(large_loader).evictions
    shutil.rmtree(large)
    what = f"256 windows x 16 of a byte column, {count * length:,} steps in {count:,} trajectories"
    yield Measurement(
        name="index growth",
        what=f"{what}: time / that with {1_000_000 // length * length:,} steps",
        measured=ratio_of_medians(timings, "large", "small"),
        bar=Bar("at most", 4.0),
        timings=timings,
        spread=paired_ratios(timings, "large", "small"),
        details={"evictions": int(evictions)},
    )
    yield Measurement(
        name="index time",
        what=f"{what}: time",
        measured=timings["large"].median_s * 1e3,
        unit="ms",
        bar=Bar("at most", 0.3),
    )
    yield Measurement(
        name="index memory",
        what=f"{what}: memory of the index per trajectory",
        measured=per_trajectory,
        unit="B",
        bar=Bar("at most", 60.0),
    )


def index_bytes(*roots: object, trajectories: int) -> int:
    """Bytes of every array with an entry per trajectory that these objects of trajstore hold, each memory counted once."""
    seen: set[int] = set()
    memory: dict[int, int] = {}
    waiting: list[Any] = list(roots)
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            item = item.numpy()
        if isinstance(item, np.ndarray):
            if item.ndim and trajectories <= len(item) <= trajectories + 1:
                while isinstance(item.base, np.ndarray):
                    item = item.base
                memory[item.__array_interface__["data"][0]] = item.nbytes
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple | set):
            waiting.extend(item)
        elif type(item).__module__.startswith("trajstore"):
            waiting.extend(gc.get_referents(item))
    return sum(memory.values())


def many_segments(context: Context) -> Iterator[Measurement]:
    """The same ten thousand episodes as one segment and as ten thousand."""
    count = context.pick(10_000, 1_000)
    rng = np.random.default_rng(0)
    lengths = rng.integers(64, 129, count)
    steps = state_rollouts(200 * -(-int(lengths.sum()) // 200)).columns
    rollouts = Rollouts(
        columns={path: array[: int(lengths.sum())] for path, array in steps.items()}, lengths=lengths.astype(np.int64)
    )
    many, one = str(context.scratch / "many"), str(context.scratch / "one")
    context.say(f"segments: writing {count:,}")
    write_store(many, rollouts, segment_bytes=1)
    write_store(one, rollouts, segment_bytes=1 << 40)
    context.say("segments")
    with (
        trajstore.open(many, cache_bytes=4 * rollouts.nbytes) as many_store,
        trajstore.open(one, cache_bytes=4 * rollouts.nbytes) as one_store,
    ):
        views = {"many": many_store.trajectories, "one": one_store.trajectories}
        for view in views.values():
            warm(view)
        with (
            views["many"].loader(WINDOWS, window=LENGTH) as many_loader,
            views["one"].loader(WINDOWS, window=LENGTH) as one_loader,
        ):
            feeds = [loader_feed("many", many_loader, batches=160), loader_feed("one", one_loader, batches=160)]
            timings = measure_feeds(context, feeds, rounds=context.pick(20, 5))
            used = {"many": cache_counters(many_loader).used_bytes, "one": cache_counters(one_loader).used_bytes}
        segments = len(many_store.trajectories._table.segments)
    details = {"segments": segments, "data_bytes": rollouts.nbytes, "used_bytes": used}
    yield Measurement(
        name="segments time",
        what=f"{segments:,} segments of one episode each: windows of states, hot, time / that with one segment",
        measured=ratio_of_medians(timings, "many", "one"),
        bar=Bar("at most", 1.1),
        timings=timings,
        spread=paired_ratios(timings, "many", "one"),
        details=details,
    )
    yield Measurement(
        name="segments memory",
        what=f"{segments:,} segments of one episode each: cache used / the data",
        measured=used["many"] / rollouts.nbytes,
        bar=Bar("at most", 2.2),
        details=details,
    )
