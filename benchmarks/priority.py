"""Prioritized replay with 1M and 10M entries: drawing and updating, against cpprb's C++ tree and TorchRL's.

cpprb does not give its tree away, so its ``PrioritizedReplayBuffer`` runs with one uint8 column: copying ``batch`` bytes of
it is the only work of its `sample` that the others do not do. Each side does all of a step: drawing gives anchors and
importance weights, updating takes raw priorities. All get the same indices and priorities.

TorchRL's extension loads with one version of torch only (0.14.1: torch 2.14), so its trees run in a process of another
interpreter, in turn with the rest. ``TRAJSTORE_BENCH_TORCHRL_PYTHON`` names that interpreter; without it they are left out.
To make one: ``python -m venv DIR && DIR/bin/pip install torchrl==0.14.1 torch==2.14.1``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Bar, Contender, Context, Measurement, Report, Timing, paired_ratios, ratio_of_medians
from trajstore.sample.priority import PrioritySampler

TORCHRL_PYTHON = "TRAJSTORE_BENCH_TORCHRL_PYTHON"
ALPHA, BETA, EPS = 0.6, 0.4, 1e-6
BATCHES = (65_536, 256)
VARIANTS = 8  # so many different batches of updates go round
# What must be reached, as time / cpprb's; other combinations are stated without a bar.
BARS = {
    (1_000_000, 65_536, "draw"): 0.5,
    (10_000_000, 65_536, "draw"): 0.5,
    (10_000_000, 65_536, "update"): 1.0,
}

Step = Callable[[range], object]  # does its work once for each turn of the range
Steps = Callable[[int], Mapping[str, Step]]  # of a batch size: "draw" and "update"


def run(context: Context) -> Report:
    """Measure every size, batch and work."""
    measurements: list[Measurement] = []
    conclusions: list[str] = []
    for entries in (50_000,) if context.quick else (1_000_000, 10_000_000):
        if context.wants(f"per {entries}"):
            context.say(f"{entries:,} entries")
            measurements.extend(_measure(context, entries, conclusions))
    return Report(measurements=measurements, conclusions=list(dict.fromkeys(conclusions)))


def _measure(context: Context, entries: int, conclusions: list[str]) -> Iterator[Measurement]:
    with contextlib.ExitStack() as stack:
        peers: list[tuple[str, Steps]] = [("trajstore", _trajstore(entries))]
        if importlib.util.find_spec("cpprb") is None:
            conclusions.append("cpprb was left out: it is not installed; pip install cpprb==11")
        else:
            peers.append(("cpprb", _cpprb(entries)))
        python = os.environ.get(TORCHRL_PYTHON)
        if python is None:
            conclusions.append(f"TorchRL's trees were left out: {TORCHRL_PYTHON} names no interpreter that has them")
        else:
            try:
                torchrl = stack.enter_context(TorchRL(python, entries, context.scratch))
            except (OSError, RuntimeError) as error:
                conclusions.append(f"TorchRL's trees were left out: {python} cannot run them: {error}")
            else:
                conclusions.append(f"TorchRL {torchrl.versions['torchrl']} ran with torch {torchrl.versions['torch']}")
                peers += [(f"torchrl {kind}", torchrl.steps(kind)) for kind in ("Fp32", "Fp64")]
        for batch, work in itertools.product(BATCHES, ("draw", "update")):
            yield from _compare(context, entries, batch, work, [(name, make(batch)[work]) for name, make in peers])


def _compare(
    context: Context, entries: int, batch: int, work: str, steps: list[tuple[str, Step]]
) -> Iterator[Measurement]:
    repeat = 1 if batch > 1000 else 20  # short calls are timed together
    turns = {name: itertools.count() for name, _ in steps}

    def contender(name: str, step: Step) -> Contender:
        def prepare() -> range:
            turn = next(turns[name])
            return range(turn * repeat, (turn + 1) * repeat)

        return Contender(name=name, prepare=prepare, run=step)

    context.say(f"{work} {batch:,} of {entries:,}")
    timings = context.measure(
        [contender(name, step) for name, step in steps], rounds=context.pick(41, 5), warmup=context.pick(10, 2)
    )
    for name, _ in steps[1:]:
        limit = BARS.get((entries, batch, work)) if name == "cpprb" else None
        yield Measurement(
            name=f"per {entries} {work} {batch} {name}",
            what=f"prioritized replay, {entries:,} entries: {work} {batch:,}, time / {name}",
            measured=ratio_of_medians(timings, "trajstore", name),
            bar=None if limit is None else Bar("at most", limit),
            timings=_each_call(timings, repeat),
            spread=paired_ratios(timings, "trajstore", name),
        )


def _each_call(timings: Mapping[str, Timing], repeat: int) -> dict[str, Timing]:
    return {
        name: Timing(
            tuple(seconds / repeat for seconds in timing.seconds),
            tuple(seconds / repeat for seconds in timing.cpu_seconds),
        )
        for name, timing in timings.items()
    }


def updates(entries: int, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The indices ``(batch,)`` int64 and priorities ``(batch,)`` float64 that everyone gets, in turn."""
    rng = np.random.default_rng(entries + batch)
    return [(rng.integers(0, entries, batch), rng.exponential(size=batch)) for _ in range(VARIANTS)]


def first_priorities(entries: int) -> np.ndarray:
    """Priorities ``(entries,)`` float64 at the start."""
    return np.random.default_rng(entries).exponential(size=entries)


def _trajstore(entries: int) -> Steps:
    sampler = PrioritySampler([entries], alpha=ALPHA, beta=BETA, seed=0, eps=EPS)
    sampler.update(np.arange(entries), first_priorities(entries))

    def steps(batch: int) -> Mapping[str, Step]:
        changes = updates(entries, batch)

        def draw(turns: range) -> None:
            for turn in turns:
                sampler.draw(turn, batch)

        def update(turns: range) -> None:
            for turn in turns:
                sampler.update(*changes[turn % VARIANTS])

        return {"draw": draw, "update": update}

    return steps


def _cpprb(entries: int) -> Steps:
    buffer: Any = importlib.import_module("cpprb").PrioritizedReplayBuffer(
        entries, {"step": {"dtype": np.uint8}}, alpha=ALPHA, eps=EPS
    )
    buffer.add(step=np.zeros(entries, np.uint8), priorities=first_priorities(entries))

    def steps(batch: int) -> Mapping[str, Step]:
        changes = updates(entries, batch)

        def draw(turns: range) -> None:
            for _ in turns:
                buffer.sample(batch, BETA)

        def update(turns: range) -> None:
            for turn in turns:
                buffer.update_priorities(*changes[turn % VARIANTS])

        return {"draw": draw, "update": update}

    return steps


# What PrioritizedSampler.sample and update_priority of TorchRL 0.14 do around their trees, and nothing else. A line of
# standard input is [type, work, batch, first turn, turns]; a line of standard output says that it was done.
_CHILD = """
import importlib.metadata, json, sys
import numpy as np, torch
from torchrl import _torchrl

folder, alpha, beta, eps = sys.argv[1], *map(float, sys.argv[2:])
first_priorities = torch.from_numpy(np.load(folder + "/first.npy"))
entries = len(first_priorities)
trees = {}
for kind, dtype in (("Fp32", torch.float32), ("Fp64", torch.float64)):
    pair = tuple(getattr(_torchrl, name + "SegmentTree" + kind)(entries) for name in ("Sum", "Min"))
    for tree in pair:
        tree[torch.arange(entries)] = first_priorities.add(eps).pow(alpha).to(dtype)
    trees[kind] = (*pair, dtype)
changes = {}

def draw(sums, mins, dtype, batch, turn):
    total, smallest = sums.query(0, entries), mins.query(0, entries)
    index = torch.as_tensor(sums.scan_lower_bound(np.random.uniform(0.0, total, size=batch)))
    index.clamp_max_(entries - 1)
    mass = torch.as_tensor(sums[index])
    assert not (mass == 0).any()
    return index, torch.pow(mass / smallest, -beta)

def update(sums, mins, dtype, batch, turn):
    which = changes[batch, dtype]
    index, priorities = which[turn % len(which)]
    masses = torch.pow(priorities + eps, alpha)
    sums[index] = masses
    mins[index] = masses

print(json.dumps({name: importlib.metadata.version(name) for name in ("torch", "torchrl")}), flush=True)
for line in sys.stdin:
    kind, work, batch, first, turns = json.loads(line)
    sums, mins, dtype = trees[kind]
    if (batch, dtype) not in changes:
        changes[batch, dtype] = [
            (torch.from_numpy(index), torch.from_numpy(priorities).to(dtype))
            for index, priorities in zip(*(np.load(f"{folder}/{name}_{batch}.npy") for name in ("index", "priorities")))
        ]
    for turn in range(first, first + turns):
        {"draw": draw, "update": update}[work](sums, mins, dtype, batch, turn)
    print("done", flush=True)
"""


class TorchRL:
    """TorchRL's segment trees in a process of their own. A context manager: it owns that process."""

    def __init__(self, python: str, entries: int, folder: Path) -> None:
        np.save(folder / "first.npy", first_priorities(entries))
        for batch in BATCHES:
            index, priorities = zip(*updates(entries, batch), strict=True)
            np.save(folder / f"index_{batch}.npy", np.stack(index))
            np.save(folder / f"priorities_{batch}.npy", np.stack(priorities))
        self._process = subprocess.Popen(
            [python, "-W", "ignore", "-c", _CHILD, str(folder), *map(str, (ALPHA, BETA, EPS))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self.versions: dict[str, str] = json.loads(self._answer())
        except BaseException:
            self.close()
            raise

    def steps(self, kind: str) -> Steps:
        """The work of the trees of one type; a turn costs a line each way, 0.05 ms, beside what it does."""

        def ask(work: str, batch: int) -> Step:
            def step(turns: range) -> None:
                pipe = self._process.stdin
                if pipe is None:
                    raise RuntimeError("the process has no standard input")
                pipe.write(json.dumps([kind, work, batch, turns.start, len(turns)]) + "\n")
                pipe.flush()
                self._answer()

            return step

        return lambda batch: {work: ask(work, batch) for work in ("draw", "update")}

    def _answer(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise RuntimeError(f"it ended with status {self._process.wait()}")
        return line

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()

    def __enter__(self) -> TorchRL:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()
