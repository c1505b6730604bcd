"""Sampling data larger than the cache: random windows and block shuffles, cold; compressed stores; peak memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trajstore
from benchmarks import torchrl_peers as peers
from benchmarks.harness import Bar, Contender, Context, Measurement, Timing, paired_ratios, ratio_of_medians
from benchmarks.sampling_support import (
    IMAGE,
    PREFETCH,
    BareReader,
    Feed,
    drop_file_cache,
    image_rollouts,
    measure_feeds,
    page_sources,
    pages_in,
    per_batch,
    recorded_reads,
    warm,
    write_store,
)

WINDOWS, LENGTH = 64, 16
ROW_BYTES = 64 * 64 * 3
# Recorded frames compress thirty times and more, so that a disk has nearly nothing to do: camera-like ones are compared.
COLD_STORES = (("none", "none", "noise"), ("lz4", "fast", "camera"), ("zstd", None, "camera"))


def cold_windows(context: Context) -> Iterator[Measurement]:
    """Random windows of frames, data four times the cache, file cache dropped, against bare reads of the same pages."""
    rollouts = image_rollouts(context.pick(24_000, 4_000), kind="camera")
    noise = image_rollouts(context.pick(24_000, 4_000), kind="noise")
    for label, preset, kind in COLD_STORES:
        path = context.scratch / f"cold-{label}"
        context.say(f"cold {label}")
        write_store(str(path), noise if kind == "noise" else rollouts, only=[IMAGE], codec=preset)
        yield _cold(context, path, label, cache_bytes=int(rollouts.lengths.sum()) * ROW_BYTES // 4)
        shutil.rmtree(path)


def _cold(context: Context, path: Path, label: str, *, cache_bytes: int) -> Measurement:
    batches = context.pick(24, 6)

    def fresh() -> tuple[trajstore.Store, Any]:
        """A store that has read nothing but its metadata."""
        store = trajstore.open(path, cache_bytes=cache_bytes)
        page_sources(store)  # page indexes are read once, whatever the number of batches
        loader = store.trajectories.loader(WINDOWS, window=LENGTH, columns=[IMAGE], prefetch=PREFETCH)
        drop_file_cache(path)
        return store, loader

    def draw(opened: tuple[trajstore.Store, Any]) -> None:
        batch = iter(opened[1])
        for _ in range(batches):
            next(batch)

    def close(opened: tuple[trajstore.Store, Any]) -> None:
        opened[1].close()
        opened[0].close()

    opened = fresh()
    sources = page_sources(opened[0])
    with recorded_reads(opened[0]) as reads:
        draw(opened)
        runs = list(reads)  # up to this moment: what is read ahead for later batches is left out
    close(opened)
    bare = BareReader(path, runs, [pages_in(run, sources[run.key], ROW_BYTES) for run in runs])
    decode = label == "zstd"
    try:
        timings = context.measure(
            [
                Contender(name="trajstore", prepare=fresh, run=draw, cleanup=close),
                Contender(
                    name="bare", prepare=lambda: drop_file_cache(path), run=lambda _none: bare.read(decode=decode)
                ),
                Contender(name="bare decode, file cache hot", run=lambda _none: bare.read(decode=True)),
            ],
            rounds=context.pick(7, 3),
            warmup=1,
        )
        details = {
            "batches": batches,
            "cache_bytes": cache_bytes,
            "ranges": len(runs),
            "read_mb": round(bare.nbytes / 1e6, 1),
            "decoded_mb": round(bare.decoded_bytes / 1e6, 1),
            "delivered_mb": round(batches * WINDOWS * LENGTH * ROW_BYTES / 1e6, 1),
            "bare_mb_s": round(bare.nbytes / timings["bare"].median_s / 1e6),
        }
    finally:
        bare.close()
    opponent = "bare read-then-decode" if decode else "bare `preadv`"
    return Measurement(
        name=f"cold {label}",
        what=f"random windows of frames, {label}, data 4x the cache, cold: speed / {opponent} of the same pages",
        measured=ratio_of_medians(timings, "bare", "trajstore"),
        bar=Bar("at least", 0.7),
        timings=timings,
        spread=paired_ratios(timings, "bare", "trajstore"),
        details=details,
    )


def block_shuffle(context: Context) -> Iterator[Measurement]:
    """One epoch of single steps in block shuffle, data four times the cache: how much of what is read is delivered."""
    rollouts = image_rollouts(context.pick(24_000, 4_000))
    path = context.scratch / "blocks"
    write_store(str(path), rollouts, only=[IMAGE])
    steps = int(rollouts.lengths.sum())
    cache_bytes = steps * ROW_BYTES // 4
    with trajstore.open(path, cache_bytes=cache_bytes) as store:
        sources = page_sources(store)
        view = store.trajectories
        drop_file_cache(path)
        visited: set[tuple[int, int]] = set()
        with (
            recorded_reads(store) as reads,
            view.loader(
                256,
                columns=[IMAGE, "trajectory", "step"],
                order="shuffle",
                block_bytes=cache_bytes // 32,
                prefetch=PREFETCH,
            ) as loader,
        ):
            for batch in loader:
                context.tick()
                visited.update(zip(batch["trajectory"].tolist(), batch["step"].tolist(), strict=True))
            runs = list(reads)
    read = sum(page.decoded_bytes for run in runs for page in pages_in(run, sources[run.key], ROW_BYTES))
    yield Measurement(
        name="block shuffle",
        what="block shuffle of frames, one epoch, data 4x the cache, cold: bytes of distinct steps delivered / bytes read",
        measured=len(visited) * ROW_BYTES / read,
        bar=Bar("at least", 0.8),
        details={"steps": steps, "delivered_steps": len(visited), "read_mb_decoded": round(read / 1e6, 1)},
    )


def compressed_peer(context: Context) -> Iterator[Measurement]:
    """Windows of compressed frames against TorchRL on a Zarr group, hot and with a cold file cache."""
    rollouts = image_rollouts(context.pick(8_000, 2_000))
    path = context.scratch / "compressed"
    write_store(str(path), rollouts)
    columns = {name.rpartition("/")[2]: array for name, array in rollouts.columns.items()}
    windows = 256
    draws = {}
    for rows in (16, 256):
        buffer = peers.zarr_buffer(
            columns,
            rollouts.lengths,
            windows=windows,
            length=LENGTH,
            chunk_rows=rows,
            path=context.scratch / f"zarr{rows}",
        )
        draws[f"TorchRL, chunks of {rows}"] = buffer.sample
    os.sync()
    probed = peers.probe(draws, probes=3, warmup=1)
    best = min(probed, key=lambda name: probed[name])
    folder = context.scratch / f"zarr{best.rpartition(' ')[2]}"
    with trajstore.open(path, cache_bytes=3 * rollouts.nbytes) as store:
        view = store.trajectories
        warm(view)
        with view.loader(windows, window=LENGTH, prefetch=PREFETCH) as loader:
            batch = iter(loader)
            feeds = [
                Feed(name="trajstore", draw=lambda: next(batch), batches=20, ahead=PREFETCH + 1),
                Feed(name="TorchRL", draw=draws[best], batches=1),
            ]
            hot = measure_feeds(context, feeds, rounds=context.pick(5, 2))

    batches = 4

    def fresh() -> trajstore.Store:
        store = trajstore.open(path, cache_bytes=3 * rollouts.nbytes)
        drop_file_cache(path)
        return store

    def draw_cold(store: trajstore.Store) -> None:
        with store.trajectories.loader(windows, window=LENGTH, prefetch=PREFETCH) as loader:
            batch = iter(loader)
            for _ in range(batches):
                next(batch)

    def draw_peer(_none: object) -> None:
        for _ in range(batches):
            draws[best]()

    cold = context.measure(
        [
            Contender(name="trajstore", prepare=fresh, run=draw_cold, cleanup=trajstore.Store.close),
            Contender(name="TorchRL", prepare=lambda: drop_file_cache(folder), run=draw_peer),
        ],
        rounds=context.pick(3, 2),
        warmup=0,
    )
    cold = {name: per_batch(timing, batches) for name, timing in cold.items()}
    yield _against_zarr("compressed hot", "hot", hot, 30.0, best)
    yield _against_zarr("compressed cold", f"the first {batches} batches, file cache dropped", cold, 3.0, best)


def _against_zarr(name: str, when: str, timings: dict[str, Timing], bar: float, best: str) -> Measurement:
    return Measurement(
        name=name,
        what=f"256 windows x 16 steps of compressed frames, {when}: speed / TorchRL on `TensorDict.from_zarr`",
        measured=ratio_of_medians(timings, "TorchRL", "trajstore"),
        bar=Bar("at least", bar),
        timings=timings,
        spread=paired_ratios(timings, "TorchRL", "trajstore"),
        details={"opponent": best},
    )


_CHILD = """
import json, resource, sys
import numpy, pandas, pyarrow.parquet, torch, zarr, trajstore

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

path, cache_bytes, windows, length, prefetch, batches = json.loads(sys.argv[1])
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts from here
before = now()
with trajstore.open(path, cache_bytes=cache_bytes) as store:
    with store.trajectories.loader(windows, window=length, prefetch=prefetch) as loader:
        draw = iter(loader)
        for _ in range(batches):
            batch = next(draw)
print(peak() - before)
"""


def peak_memory(context: Context) -> Iterator[Measurement]:
    """Peak resident memory of a process that samples data four times its cache."""
    rollouts = image_rollouts(context.pick(24_000, 6_000))
    path = context.scratch / "memory"
    write_store(str(path), rollouts)
    cache_bytes = rollouts.nbytes // 4
    batch_bytes = WINDOWS * LENGTH * rollouts.nbytes // int(rollouts.lengths.sum())
    ring_bytes = (PREFETCH + 2) * batch_bytes  # those ready, the one being filled, the one in the consumer's hands
    arguments = [str(path), cache_bytes, WINDOWS, LENGTH, PREFETCH, context.pick(100, 20)]
    root = Path(__file__).resolve().parents[1]
    search = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    peaks = []
    for _ in range(context.pick(3, 1)):
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps(arguments)],
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": search},
        )
        peaks.append(int(done.stdout))
    peak = sorted(peaks)[len(peaks) // 2]
    yield Measurement(
        name="peak memory",
        what="windows of frames, data 4x the cache: peak memory above the imports, the cache and the output buffers",
        measured=(peak - cache_bytes - ring_bytes) / 1e6,
        unit="MB",
        bar=Bar("at most", 200.0),
        details={"peak_bytes": peak, "cache_bytes": cache_bytes, "ring_bytes": ring_bytes},
    )
