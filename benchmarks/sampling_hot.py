"""Sampling from memory: windows of images and of states, single transitions, and a training step that waits for nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

import trajstore
from benchmarks import torchrl_peers as peers
from benchmarks.harness import Bar, Context, Measurement, Timing, cores, paired_ratios, ratio_of_medians
from benchmarks.sampling_support import (
    PREFETCH,
    Feed,
    Rollouts,
    image_rollouts,
    loader_feed,
    measure_feeds,
    state_rollouts,
    warm,
    write_store,
)

WINDOWS, LENGTH = 256, 16
TRANSITION = ["obs", "action", "reward", "next_obs", "terminated"]
STEP_S = 0.020
OURS = "trajstore"


def image_windows(context: Context) -> Iterator[Measurement]:
    """256 windows of 16 steps with 64x64x3 frames, against memcpy of the same bytes and both window samplers of TorchRL."""
    rollouts = image_rollouts(context.pick(24_000, 6_000))
    url = write_store(str(context.scratch / "images"), rollouts, codec="fast")
    ways = {"SliceSampler": 10.0, "Sequence, stop": 5.0}
    flat = {path.rpartition("/")[2]: array for path, array in rollouts.columns.items()}
    buffers = {}
    for way in ways:
        buffers[way] = peers.window_buffer(
            way, flat, rollouts.lengths, windows=WINDOWS, length=LENGTH, kind="memmap", scratch=context.scratch
        )
    with trajstore.open(url, cache_bytes=3 * rollouts.nbytes) as store:
        view = store.trajectories
        warm(view)
        with view.loader(WINDOWS, window=LENGTH, prefetch=PREFETCH) as loader:
            feeds = [loader_feed(OURS, loader, batches=20), _memcpy(rollouts, batches=20)]
            feeds += [Feed(name=way, draw=buffer.sample, batches=4) for way, buffer in buffers.items()]
            timings = measure_feeds(context, feeds, rounds=context.pick(15, 4))
    nbytes = WINDOWS * LENGTH * rollouts.nbytes // int(rollouts.lengths.sum())
    details = {"batch_bytes": nbytes, "threads": torch.get_num_threads(), "gb_s": _rate(nbytes, timings[OURS])}
    yield _speed(
        "images memcpy",
        "256 windows x 16 steps of 64x64x3 frames, state, action, reward, done, hot: speed / memcpy of the same bytes",
        timings,
        "memcpy",
        0.8,
        details,
    )
    for way, bar in ways.items():
        yield _speed(
            f"images {way}", f"the same: speed / TorchRL {way} on LazyMemmapStorage", timings, way, bar, details
        )


def _memcpy(rollouts: Rollouts, *, batches: int) -> Feed:
    """``Tensor.copy_`` of one batch's bytes into memory that was touched before.

    Sources and targets take turns, as the rows of a store and the buffers of a loader do: neither is in the processor's
    cache because the copy before left it there.
    """
    rows = WINDOWS * LENGTH
    sources = []
    for turn in range(4):
        start = turn * 997 % (len(rollouts.columns["reward"]) - rows)
        sources.append([torch.from_numpy(a[start : start + rows].copy()) for a in rollouts.columns.values()])
    targets = [[torch.ones_like(tensor) for tensor in source] for source in sources]
    turns = iter(range(1 << 62))

    def copy() -> None:
        turn = next(turns)
        for target, source in zip(targets[turn % 4], sources[(turn + 1) % 4], strict=True):
            target.copy_(source)

    return Feed(name="memcpy", draw=copy, batches=batches)


def state_windows(context: Context) -> Iterator[Measurement]:
    """256 windows of 16 states of 17 floats, against the best of TorchRL's storages and window samplers."""
    rollouts = state_rollouts(context.pick(1_000_000, 100_000))
    columns = {"obs": rollouts.columns["obs"]}
    url = write_store(str(context.scratch / "states"), rollouts, only=["obs"])
    draws = {}
    for kind in ("memmap", "tensor"):
        for way in peers.WINDOW_SAMPLERS:
            buffer = peers.window_buffer(
                way, columns, rollouts.lengths, windows=WINDOWS, length=LENGTH, kind=kind, scratch=context.scratch
            )
            draws[f"{way}, {kind}"] = buffer.sample
    kept = peers.fastest(draws)
    with trajstore.open(url, cache_bytes=3 * rollouts.nbytes) as store:
        view = store.trajectories
        warm(view)
        with view.loader(WINDOWS, window=LENGTH, prefetch=PREFETCH) as loader:
            feeds = [loader_feed(OURS, loader, batches=200)]
            feeds += [Feed(name=name, draw=draws[name], batches=50) for name in kept]
            timings = measure_feeds(context, feeds, rounds=context.pick(15, 4))
    best = _best(timings, kept)
    yield _speed(
        "states",
        "256 windows x 16 steps of 17-float states, hot: speed / TorchRL's best of two storages and five samplers",
        timings,
        best,
        2.0,
        {"opponent": best, "dropped_after_a_probe": sorted(set(draws) - set(kept))},
    )


def transitions(context: Context) -> Iterator[Measurement]:
    """256 single transitions, through the loader and by ``view.sample``, against TorchRL and cpprb."""
    rollouts = state_rollouts(context.pick(1_000_000, 100_000))
    url = write_store(str(context.scratch / "transitions"), rollouts, final_obs=True)
    draws = peers.transition_buffers(_with_next(rollouts), WINDOWS, context.scratch)
    torchrl_ways = [name for name in draws if name.startswith("TorchRL")]
    cpprb_ways = [name for name in draws if name.startswith("cpprb")]
    sample = "view.sample"
    with trajstore.open(url, cache_bytes=3 * rollouts.nbytes) as store:
        view = store.trajectories
        warm(view)
        with view.loader(WINDOWS, columns=TRANSITION, prefetch=PREFETCH) as loader:
            feeds = [
                loader_feed(OURS, loader, batches=640),
                Feed(name=sample, draw=lambda: view.sample(WINDOWS, columns=TRANSITION), batches=50),
            ]
            feeds += [Feed(name=name, draw=draw, batches=200) for name, draw in draws.items()]
            timings = measure_feeds(context, feeds, rounds=context.pick(15, 4))
    best, best_cpprb = _best(timings, torchrl_ways), _best(timings, cpprb_ways)
    what = "256 transitions (state, action, reward, next state, terminated), hot"
    for name, text, ours, opponent, bar in (
        ("transitions", f"{what}, loader: time / TorchRL RandomSampler's", OURS, best, 0.5),
        ("transitions cpprb", f"{what}, loader: time / cpprb's", OURS, best_cpprb, 1.0),
        ("transitions sample", f"{what}, `view.sample`: time / TorchRL RandomSampler's", sample, best, 0.7),
    ):
        yield Measurement(
            name=name,
            what=text,
            measured=ratio_of_medians(timings, ours, opponent),
            bar=Bar("at most", bar),
            timings=timings,
            spread=paired_ratios(timings, ours, opponent),
            details={"opponent": opponent},
        )


def _with_next(rollouts: Rollouts) -> dict[str, np.ndarray]:
    """The transitions that the store gives, as buffers without episodes keep them."""
    stops = np.cumsum(rollouts.lengths)
    obs = rollouts.columns["obs"]
    next_obs = np.roll(obs, -1, axis=0)
    next_obs[stops - 1] = obs[stops - rollouts.lengths]  # what `write_store` appends as the final observation
    terminated = np.zeros(len(obs), bool)
    terminated[stops[::2] - 1] = True
    return {
        "obs": obs,
        "action": rollouts.columns["action"],
        "reward": rollouts.columns["reward"],
        "next_obs": next_obs,
        "terminated": terminated,
    }


def training_step(context: Context) -> Iterator[Measurement]:
    """How much of the time a loop waits for data when each step takes 20 ms, asleep or at work on one core."""
    rollouts = image_rollouts(context.pick(24_000, 6_000))
    url = write_store(str(context.scratch / "training"), rollouts, codec="fast")
    buffer = peers.window_buffer(
        "Sequence, stop",
        {path.rpartition("/")[2]: array for path, array in rollouts.columns.items()},
        rollouts.lengths,
        windows=WINDOWS,
        length=LENGTH,
        kind="memmap",
        scratch=context.scratch,
    )
    steps = context.pick(100, 25)
    with trajstore.open(url, cache_bytes=3 * rollouts.nbytes) as store:
        view = store.trajectories
        warm(view)
        for name, text, step in (
            ("sleep", "asleep", lambda: time.sleep(STEP_S)),
            ("matmul", "a matmul on one core", _matmul()),
        ):
            with view.loader(WINDOWS, window=LENGTH, prefetch=PREFETCH) as loader:
                draw = iter(loader).__next__
                shares = [_waiting_share(draw, step, steps) for _ in range(context.pick(5, 2))]
            peer = _waiting_share(buffer.sample, step, max(5, steps // 5))
            yield Measurement(
                name=f"training {name}",
                what=f"image windows beside a training step of 20 ms ({text}): share of the time spent waiting for data",
                measured=100 * sorted(shares)[len(shares) // 2],
                unit="%",
                bar=Bar("at most", 3.0),
                details={
                    "steps": steps,
                    "shares_percent": [round(100 * share, 3) for share in shares],
                    "torchrl_sequence_percent": round(100 * peer, 1),
                },
            )


def _matmul() -> Callable[[], object]:
    """A product of matrices that takes about 20 ms on one core, on this machine."""
    matrix = torch.rand(512, 512)
    out = torch.empty_like(matrix)

    def multiply(times: int) -> float:
        torch.set_num_threads(1)
        begin = time.perf_counter()
        for _ in range(times):
            torch.mm(matrix, matrix, out=out)
        elapsed = time.perf_counter() - begin
        torch.set_num_threads(cores())
        return elapsed

    multiply(10)
    times = max(1, round(STEP_S / (min(multiply(10) for _ in range(5)) / 10)))
    return lambda: multiply(times)


def _waiting_share(draw: Callable[[], object], step: Callable[[], object], steps: int) -> float:
    """Waiting for batches over wall time, of a loop that has run for a moment."""
    waited = 0.0
    for number in range(PREFETCH + 2 + steps):
        if number == PREFETCH + 2:
            begin, waited = time.perf_counter(), 0.0
        before = time.perf_counter()
        batch = draw()
        waited += time.perf_counter() - before
        step()
        del batch
    return waited / (time.perf_counter() - begin)


def _best(timings: Mapping[str, Timing], names: list[str]) -> str:
    return min(names, key=lambda name: timings[name].median_s)


def _rate(nbytes: int, timing: Timing) -> float:
    return round(nbytes / timing.median_s / 1e9, 2)


def _speed(
    name: str, what: str, timings: Mapping[str, Timing], opponent: str, bar: float, details: Mapping[str, object]
) -> Measurement:
    return Measurement(
        name=name,
        what=what,
        measured=ratio_of_medians(timings, opponent, OURS),
        bar=Bar("at least", bar),
        timings=timings,
        spread=paired_ratios(timings, opponent, OURS),
        details=details,
    )
