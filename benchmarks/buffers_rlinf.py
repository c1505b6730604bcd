"""RLinf's calls on trajectories ``[T, B, ...]`` of two image fields: ``sample``, ``add_trajectories``, ``save_checkpoint``.

Invariant: both sides hold the same trajectories, draw with the same seed, and their first batches are equal.
"""

from __future__ import annotations

import operator
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import data
from benchmarks.harness import Bar, Contender, Context, Measurement, paired_ratios, ratio_of_medians
from benchmarks.rlinf_files_peer import FilesBuffer, save_all, save_all_in_threads
from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer

STEPS, ENVIRONMENTS, WINDOW, CHUNKS, SEED = 50, 8, 100, 256, 1234
CACHE_BYTES = 2 << 30
# Whether `next_obs` is `curr_obs` one step on, as it is unless steps are chunks of actions.
KINDS = {"repeating": "next_obs repeats curr_obs", "apart": "next_obs of its own"}

Fields = dict[str, Any]


# --- trajectories -------------------------------------------------------------------------------------------


def rollouts(count: int, kind: str) -> list[Fields]:
    """Trajectories of camera frames, states, actions, rewards and ends; the same tensors go to both sides."""
    frames = torch.from_numpy(data.camera(4_000))
    generator = torch.Generator().manual_seed(0)
    return [_rollout(frames, number, kind, generator) for number in range(count)]


def _rollout(frames: torch.Tensor, number: int, kind: str, generator: torch.Generator) -> Fields:
    steps = torch.arange(STEPS + 1)[:, None] + 500 * torch.arange(ENVIRONMENTS) + 37 * number  # (T + 1, B)
    shown = _frames(frames, steps)
    states = torch.randn(STEPS + 1, ENVIRONMENTS, 32, generator=generator)
    dones = torch.rand(STEPS, ENVIRONMENTS, 1, generator=generator) < 0.02
    if kind == "apart":
        following = _frames(frames, steps[:-1] + 1_713)
    else:
        following = shown[1:].clone()
        ended = dones[..., 0]
        following[ended] = _frames(frames, steps[:-1] + 2_011)[ended]  # the last frame, before the reset
    return {
        "max_episode_length": STEPS,
        "model_weights_id": "0",
        "actions": torch.randn(STEPS, ENVIRONMENTS, 7, generator=generator),
        "rewards": torch.rand(STEPS, ENVIRONMENTS, 1, generator=generator),
        "dones": torch.cat([torch.zeros(1, ENVIRONMENTS, 1, dtype=torch.bool), dones]),
        "prev_logprobs": torch.randn(STEPS, ENVIRONMENTS, 7, generator=generator),
        "curr_obs": {"main_images": shown[:-1].clone(), "states": states[:-1].clone()},
        "next_obs": {"main_images": following, "states": states[1:].clone()},
    }


def _frames(frames: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    return frames.index_select(0, (numbers % len(frames)).reshape(-1)).reshape(*numbers.shape, *frames.shape[1:])


def _nbytes(fields: Mapping[str, Any]) -> int:
    return sum(tensor.nbytes for tensor in _tensors(fields))


def _tensors(fields: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for _, value in sorted(fields.items()):
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


def _same(batch: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    pairs = zip(_tensors(batch), _tensors(other), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def _require(held: bool, what: str) -> None:
    if not held:
        raise RuntimeError(f"{what}: the comparison would be of different work")


# --- sample -------------------------------------------------------------------------------------------------


def rlinf_sample(context: Context) -> Iterator[Measurement]:
    """``sample(256)`` hot, against files, against everything in memory; and held to the bytes of five trajectories."""
    for kind, about in KINDS.items():
        context.say(f"rlinf sample, {kind}")
        yield from _sample(context, kind, about)


def _sample(context: Context, kind: str, about: str) -> Iterator[Measurement]:
    trajectories = rollouts(context.pick(100, 20), kind)
    files = context.scratch / f"{kind}-files"
    files.mkdir()
    run, checkpoint = (str(context.scratch / f"{kind}-{name}") for name in ("run", "checkpoint"))
    five = 5 * _nbytes(trajectories[0])
    shared = {"seed": SEED, "sample_window_size": WINDOW}
    case = f"RLinf, {len(trajectories)} x T={STEPS} x B={ENVIRONMENTS}, two images ({about}), `sample({CHUNKS})`"
    with (
        FilesBuffer(files, cache_size=5, **shared) as reading,
        FilesBuffer(files, cache_size=len(trajectories), save=False, **shared) as cached,
    ):
        reading.add_trajectories(trajectories)
        cached.add_trajectories(trajectories)
        reading.wait()
        hot = TrajectoryReplayBuffer(auto_save=True, auto_save_path=run, cache_bytes=CACHE_BYTES, **shared)
        hot.add_trajectories([Trajectory(**fields) for fields in trajectories])
        hot.save_checkpoint(checkpoint)
        held = TrajectoryReplayBuffer(cache_bytes=five, **shared)
        held.load_checkpoint(checkpoint)
        del trajectories
        expected = cached.sample(CHUNKS)
        for name, batch in (
            ("files", reading.sample(CHUNKS)),
            ("hot", hot.sample(CHUNKS)),
            ("held", held.sample(CHUNKS)),
        ):
            _require(_same(batch, expected), f"the first batch of '{name}' is not the first of RLinf's rules")
        for _ in range(context.pick(100, 20)):  # every page comes into the cache
            hot.sample(4 * CHUNKS)

        quick = context.measure(
            [
                Contender(name="trajstore", run=lambda _: hot.sample(CHUNKS)),
                Contender(name="all cached", run=lambda _: cached.sample(CHUNKS)),
                Contender(name="all cached, index_select", run=lambda _: cached.sample_vectorised(CHUNKS)),
            ],
            rounds=context.pick(200, 30),
            warmup=10,
        )
        slow = context.measure(
            [
                Contender(name="trajstore", run=lambda _: hot.sample(CHUNKS)),
                Contender(name="trajstore, held", run=lambda _: held.sample(CHUNKS)),
                Contender(name="files", run=lambda _: reading.sample(CHUNKS)),
            ],
            rounds=context.pick(20, 5),
            warmup=2,
        )
        held.close()
        hot.close()
    bars = (
        ("files", slow, "trajstore", "reading its files as RLinf does (cache_size=5)", Bar("at least", 100.0)),
        ("cached", quick, "trajstore", "RLinf's way with all cached", Bar("at least", 3.0)),
        ("select", quick, "trajstore", "one `index_select` per field, all cached", None),
        ("held", slow, "trajstore, held", "reading its files as RLinf does (cache_size=5)", Bar("at least", 5.0)),
    )
    opponents = {"cached": "all cached", "select": "all cached, index_select"}
    for name, timings, ours, against, bar in bars:
        theirs = opponents.get(name, "files")
        held_to = ", held to the bytes of 5 trajectories" if name == "held" else ""
        yield Measurement(
            name=f"rlinf sample, {kind}, {name}",
            what=f"{case}{held_to}: speed / {against}",
            measured=ratio_of_medians(timings, theirs, ours),
            bar=bar,
            timings=timings,
            spread=paired_ratios(timings, theirs, ours),
            details={"cache_bytes": five if name == "held" else CACHE_BYTES},
        )


# --- add ----------------------------------------------------------------------------------------------------


def rlinf_add(context: Context) -> Iterator[Measurement]:
    """``add_trajectories`` until it returns, and until all is on the disk, against ``torch.save`` of the same."""
    for kind, about in KINDS.items():
        context.say(f"rlinf add, {kind}")
        yield from _add(context, kind, about)


def _add(context: Context, kind: str, about: str) -> Iterator[Measurement]:
    fields = rollouts(context.pick(100, 10), kind)
    trajectories = [Trajectory(**each) for each in fields]

    def directory() -> Path:
        os.sync()  # what others wrote is not written back at this one's expense
        return Path(tempfile.mkdtemp(dir=context.scratch))

    def buffer(*, copy_on_add: bool = False) -> tuple[Path, TrajectoryReplayBuffer]:
        path = directory()
        return path, TrajectoryReplayBuffer(
            auto_save=True, auto_save_path=str(path / "run"), cache_bytes=CACHE_BYTES, copy_on_add=copy_on_add
        )

    def close(made: tuple[Path, TrajectoryReplayBuffer]) -> None:
        made[1].close()
        shutil.rmtree(made[0])

    def add_and_close(made: tuple[Path, TrajectoryReplayBuffer]) -> None:
        made[1].add_trajectories(trajectories)
        made[1].close()

    saving: dict[str, Callable[[Path], object]] = {
        "torch.save": lambda path: save_all(fields, path),
        "torch.save, 20 threads": lambda path: save_all_in_threads(fields, path),
        "torch.save, fsync": lambda path: save_all(fields, path, sync=True),
    }
    timings = context.measure(
        [
            Contender(
                name="add", prepare=buffer, run=lambda made: made[1].add_trajectories(trajectories), cleanup=close
            ),
            Contender(
                name="add, copied",
                prepare=lambda: buffer(copy_on_add=True),
                run=lambda made: made[1].add_trajectories(trajectories),
                cleanup=close,
            ),
            Contender(name="add, close", prepare=buffer, run=add_and_close, cleanup=close),
            *(Contender(name=name, prepare=directory, run=run, cleanup=shutil.rmtree) for name, run in saving.items()),
        ],
        rounds=context.pick(5, 3),
    )
    yield Measurement(
        name=f"rlinf add, {kind}",
        what=f"RLinf, `add_trajectories` of {len(fields)} such ({about}) returns: speed / `torch.save` of the same",
        measured=ratio_of_medians(timings, "torch.save", "add"),
        bar=Bar("at least", 5.0),
        timings=timings,
        spread=paired_ratios(timings, "torch.save", "add"),
        details={"bytes": sum(map(_nbytes, fields))},
    )
    yield Measurement(
        name=f"rlinf add against threads, {kind}",
        what="the same: speed / `torch.save` by 20 threads, as RLinf does, waited for",
        measured=ratio_of_medians(timings, "torch.save, 20 threads", "add"),
        timings=timings,
        spread=paired_ratios(timings, "torch.save, 20 threads", "add"),
    )
    yield Measurement(
        name=f"rlinf add copied, {kind}",
        what="the same with `copy_on_add=True`: speed / `torch.save` of the same",
        measured=ratio_of_medians(timings, "torch.save", "add, copied"),
        timings=timings,
        spread=paired_ratios(timings, "torch.save", "add, copied"),
    )
    yield Measurement(
        name=f"rlinf add and close, {kind}",
        what="the same, until all is on the disk (`close`): speed / `torch.save` and `fsync` of each",
        measured=ratio_of_medians(timings, "torch.save, fsync", "add, close"),
        timings=timings,
        spread=paired_ratios(timings, "torch.save, fsync", "add, close"),
    )


# --- checkpoint ---------------------------------------------------------------------------------------------


def rlinf_checkpoint(context: Context) -> Iterator[Measurement]:
    """``save_checkpoint`` of what is already flushed: time, bytes written, and whole once the run is gone."""
    count = context.pick(10_000, 500)
    run = context.scratch / "run"
    shared = {"seed": SEED, "sample_window_size": 0, "cache_bytes": CACHE_BYTES}
    buffer = TrajectoryReplayBuffer(auto_save=True, auto_save_path=str(run), **shared)
    nbytes = 0
    for batch in _many(count):
        nbytes += sum(map(_nbytes, batch))
        buffer.add_trajectories([Trajectory(**fields) for fields in batch])
        context.tick()
    batches = context.pick(60, 5)
    drawn = _digests(buffer, batches)
    buffer.save_checkpoint(str(context.scratch / "first"))  # flushes
    numbers = iter(range(1 << 30))

    def fresh() -> Path:
        return context.scratch / f"checkpoint{next(numbers)}"

    written: list[int] = []

    def measured(path: Path) -> None:
        written.append(_own_bytes(path))
        shutil.rmtree(path)

    context.say("rlinf checkpoint")
    timings = context.measure(
        [
            Contender(
                name="save_checkpoint",
                prepare=fresh,
                run=lambda path: buffer.save_checkpoint(str(path)),
                cleanup=measured,
            )
        ],
        rounds=context.pick(9, 3),
    )
    size = f"a flushed buffer of {count:,} trajectories ({nbytes / 1e9:.1f} GB)"
    yield Measurement(
        name="rlinf checkpoint, time",
        what=f"RLinf, `save_checkpoint` of {size}, same filesystem: time",
        measured=timings["save_checkpoint"].median_s,
        unit="s",
        bar=Bar("at most", 1.0),
        timings=timings,
        details={"bytes": nbytes},
    )
    yield Measurement(
        name="rlinf checkpoint, bytes",
        what="the same: bytes written per 10,000 trajectories",
        measured=max(written) / count * 10_000 / 1e6,
        unit="MB",
        bar=Bar("at most", 1.0),
        details={"files_of_its_own_bytes": max(written)},
    )
    kept = fresh()
    buffer.save_checkpoint(str(kept))
    buffer.close()
    shutil.rmtree(run)
    loaded = TrajectoryReplayBuffer(**shared)
    loaded.load_checkpoint(str(kept))
    right = sum(map(operator.eq, _digests(loaded, batches), drawn)) if len(loaded) == count else 0
    loaded.close()
    yield Measurement(
        name="rlinf checkpoint, whole",
        what=f"the same, loaded after the run's directory was deleted: batches of {4 * CHUNKS:,} that are as before",
        measured=100.0 * right / batches,
        unit="%",
        bar=Bar("at least", 100.0),
    )


def _many(count: int) -> Iterator[list[Fields]]:
    """Small trajectories whose frames no codec can shrink, a hundred at a time."""
    steps, environments, side = 10, 2, data.SIDE
    size = steps * environments * side * side * 3
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (256 << 20,), dtype=torch.uint8, generator=generator)
    for first in range(0, count, 100):
        starts = torch.randint(0, len(noise) - size, (min(100, count - first),), generator=generator).tolist()
        yield [
            {
                "actions": torch.randn(steps, environments, 7, generator=generator),
                "rewards": torch.rand(steps, environments, 1, generator=generator),
                "curr_obs": {"main_images": noise[at : at + size].view(steps, environments, side, side, 3)},
            }
            for at in starts
        ]


def _digests(buffer: TrajectoryReplayBuffer, batches: int) -> list[int]:
    """A checksum of each of the next batches."""
    digests = []
    for _ in range(batches):
        digest = 0
        for tensor in _tensors(buffer.sample(4 * CHUNKS)):
            digest = zlib.crc32(tensor.contiguous().numpy(), digest)
        digests.append(digest)
    return digests


def _own_bytes(folder: Path) -> int:
    """Bytes of the files in a folder that are no hard links to files elsewhere."""
    found = (path.stat() for path in folder.rglob("*") if path.is_file())
    return sum(status.st_size for status in found if status.st_nlink == 1)
