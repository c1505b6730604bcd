"""What the store promises about speed: append, flush, read, open, commit, each beside the plain way to do it.

Every opponent does the same work on the same data: memcpy into touched memory, the same codec on all cores,
one bare write and fsync, ``pyarrow.parquet.read_table`` of the same columns, zarr-python with the same array,
codec, chunks and shards at the best of its settings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

import trajstore
from benchmarks import data
from benchmarks.frames import flushed_throughput, read_segment
from benchmarks.harness import (
    Bar,
    Contender,
    Context,
    Measurement,
    Report,
    paired_ratios,
    ratio_of_medians,
)

PACE_BYTES_S = 100e6  # appends come at this rate, faster than any simulator of this machine renders
# What it takes to find any step of any trajectory.
INDEX_COLUMNS = ("id", "segment", "start", "ordinal", "length")

Trajectory = dict[str, Any]


def run(context: Context) -> Report:
    """Measure every item; a missed bar is reported like a met one."""
    measurements: list[Measurement] = []
    for name, item in ITEMS.items():
        if context.wants(name):
            context.say(name)
            measurements.extend(item(context))
    return Report(measurements=measurements)


def append_latency(context: Context) -> Iterator[Measurement]:
    """``append`` against ``numpy.copyto`` of the same arrays into memory that was touched before."""
    for megabytes in (1, 4, 16):
        yield _append(context, megabytes)


def _append(context: Context, megabytes: int) -> Measurement:
    sources = [_trajectory(megabytes << 20, seed) for seed in range(max(2, 128 // megabytes))]
    touched = [np.zeros_like(array) for array in _leaves(sources[0])]
    nbytes = sum(array.nbytes for array in touched)
    with trajstore.open(str(context.scratch / f"append{megabytes}"), mode="a") as store:
        turn = iter(range(1 << 30))

        def paced() -> Trajectory:
            time.sleep(nbytes / PACE_BYTES_S)
            # Never the one that the other contender has just brought into the processor's cache.
            return sources[next(turn) * 7 % len(sources)]

        def copy(trajectory: Trajectory) -> None:
            for target, source in zip(touched, _leaves(trajectory), strict=True):
                np.copyto(target, source)

        timings = context.measure(
            [
                Contender(name="append", prepare=paced, run=lambda t: store.append(t, task="bench")),
                Contender(name="memcpy", prepare=paced, run=copy),
            ],
            rounds=context.pick(max(40, 200 // megabytes), 10),
            warmup=context.pick(max(20, 256 // megabytes), 5),
        )
    return Measurement(
        name=f"append {megabytes} MB",
        what=f"`append` of a {megabytes} MB trajectory, time / memcpy into touched memory",
        measured=ratio_of_medians(timings, "append", "memcpy"),
        bar=Bar("at most", 2.5),
        timings=timings,
        spread=paired_ratios(timings, "append", "memcpy"),
        details={"bytes": nbytes, "pace_mb_s": PACE_BYTES_S / 1e6},
    )


def _trajectory(nbytes: int, seed: int) -> Trajectory:
    """Frames, states, actions and rewards of about ``nbytes`` together."""
    length = max(1, nbytes // (data.SIDE * data.SIDE * 3 + 17 * 4 + 8 + 8))
    rng = np.random.default_rng(seed)
    frames = data.atari_small(4096)
    start = int(rng.integers(0, len(frames) - length))
    return {
        "obs": {
            "image": frames[start : start + length].copy(),
            "state": data.white_noise(length, 17, seed).copy(),
        },
        "action": rng.integers(0, 6, length),
        "reward": rng.random(length),
    }


def _leaves(trajectory: Trajectory) -> list[np.ndarray]:
    return [*trajectory["obs"].values(), trajectory["action"], trajectory["reward"]]


def open_store(context: Context) -> Iterator[Measurement]:
    """Opening a store of a million trajectories, against reading the same columns with pyarrow."""
    count = context.pick(1_000_000, 50_000)
    path = context.scratch / "many"
    action, reward = np.zeros(2, np.int64), np.zeros(2)
    context.say(f"open: appending {count} trajectories")
    with trajstore.open(str(path), mode="a") as store:
        for number in range(count):
            store.append({"action": action, "reward": reward}, task="reach", seed=number)
    manifests = _manifests(path)

    def open_it(_none: object) -> int:
        with trajstore.open(str(path)) as store:
            view = store.trajectories
            return len(view) + int(view[len(view) - 1].length)

    def read_tables(_none: object) -> int:
        return sum(pq.read_table(manifest, columns=list(INDEX_COLUMNS)).num_rows for manifest in manifests)

    def read_table(_none: object) -> int:
        return int(pq.read_table(manifests, columns=list(INDEX_COLUMNS)).num_rows)

    if (open_it(None), read_table(None), read_tables(None)) != (count + 2, count, count):
        raise RuntimeError("a contender did not see every trajectory")
    context.say("open")
    timings = context.measure(
        [
            Contender(name="trajstore", run=open_it),
            Contender(name="pyarrow, one call", run=read_table),
            Contender(name="pyarrow, a call per file", run=read_tables),
        ],
        rounds=context.pick(25, 5),
        warmup=2,
    )
    faster = min(("pyarrow, one call", "pyarrow, a call per file"), key=lambda name: timings[name].median_s)
    yield Measurement(
        name="open",
        what=f"opening a store of {count:,} trajectories, time / pyarrow reading its index columns",
        measured=ratio_of_medians(timings, "trajstore", faster),
        bar=Bar("at most", 2.0),
        timings=timings,
        spread=paired_ratios(timings, "trajstore", faster),
        details={"manifests": len(manifests), "index_columns": list(INDEX_COLUMNS), "opponent": faster},
    )
    peaks = [_open_in_a_child(path) for _ in range(context.pick(3, 1))]
    peak, kept = sorted(peaks)[len(peaks) // 2]
    yield Measurement(
        name="open memory",
        what=f"opening a store of {count:,} trajectories, peak memory above the imports",
        measured=peak / 1e6,
        unit="MB",
        bar=Bar("at most", 300.0),
        details={"kept_mb": round(kept / 1e6, 1)},
    )


def _manifests(store: Path) -> list[Path]:
    """The manifests that the newest snapshot names."""
    newest = max((store / "snapshots").glob("*.json"))
    snapshot = json.loads(newest.read_text())
    return [store / entry["path"] for entry in snapshot["manifests"]]


_CHILD = """
import resource, sys
import numpy, pandas, pyarrow.parquet, torch, zarr, trajstore

def now():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts from here
before = now()
store = trajstore.open(sys.argv[1])
view = store.trajectories
len(view), view[len(view) - 1].length
print(peak() - before, now() - before)
"""


def _open_in_a_child(path: Path) -> tuple[int, int]:
    """Peak and kept growth of resident memory, in bytes, in a fresh process that only opens the store."""
    root = Path(__file__).resolve().parents[1]
    search = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    )
    peak, kept = map(int, done.stdout.split())
    return peak, kept


def commit(context: Context) -> Iterator[Measurement]:
    """Append and flush of one small trajectory, against one bare write + fsync + link + directory fsync."""
    bare_dir = context.scratch / "bare"
    bare_dir.mkdir()
    payload = np.random.default_rng(0).bytes(4096)
    rng = np.random.default_rng(0)
    length = 8
    trajectory = {
        "obs": {
            "image": rng.integers(0, 255, (length, 32, 32, 3), np.uint8),
            "state": rng.random((length, 17), np.float32),
        },
        "action": rng.random((length, 6), np.float32),
    }

    def bare(_none: object) -> None:
        name = bare_dir / uuid.uuid4().hex
        descriptor = os.open(name, os.O_CREAT | os.O_WRONLY | os.O_EXCL)
        os.write(descriptor, payload)
        os.fsync(descriptor)
        os.close(descriptor)
        os.link(name, name.with_suffix(".linked"))
        directory = os.open(bare_dir, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    with trajstore.open(str(context.scratch / "commits"), mode="a") as store:

        def one(_none: object) -> None:
            store.append(trajectory, task="bench")
            store.flush()

        timings = context.measure(
            [Contender(name="commit", run=one), Contender(name="bare", run=bare)],
            rounds=context.pick(300, 40),
            warmup=10,
        )
    yield Measurement(
        name="commit",
        what="committing one small trajectory (an image and two vectors), time / "
        "one bare write + fsync + link + directory fsync",
        measured=ratio_of_medians(timings, "commit", "bare"),
        bar=Bar("at most", 12.0),
        timings=timings,
        spread=paired_ratios(timings, "commit", "bare"),
    )


ITEMS: Mapping[str, Callable[[Context], Iterator[Measurement]]] = {
    "append": append_latency,
    "flush": flushed_throughput,
    "read": read_segment,
    "open": open_store,
    "commit": commit,
}
