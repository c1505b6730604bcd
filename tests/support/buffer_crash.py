"""Children that write through a buffer and are killed in a system call; the next child checks what is there and goes on.

Run as ``python -m tests.support.buffer_crash FOLDER SEED KIND``; prints a JSON report. The parent opens nothing and computes
nothing, so that a fork copies no lock that a thread might hold.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.support.rlinf_reference import assert_same
from trajstore.buffers import stored_ring
from trajstore.buffers.objectrl import ReplayBuffer
from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer, rollouts
from trajstore.buffers.rlinf.trajectory import fields_of
from trajstore.buffers.stored_ring import StoredRing
from trajstore.storage.local import LocalFilesystem

KILLS = 40
_ROUNDS = 60  # a child that outlives them was not killed, which is a failure
_CALLS = ("_make_directory", "_create_file", "_write", "_fsync_file", "_fsync_directory", "_link", "_rename", "_unlink")
_CAPACITY = 40


def saves(folder: str, done: int) -> Iterator[int]:
    """Checkpoints of ObjectRL's buffer, one over the other; gives the number of each that has returned."""
    path = os.path.join(folder, "checkpoint")
    buffer = ReplayBuffer("cpu", "cpu", _CAPACITY)
    if done or os.path.exists(f"{path}.metadata"):
        buffer.load(path)
        last = _check_numbers([int(n) for n in buffer.sample_all()["n"]], done)
    else:
        last = done
    for number in range(last + 1, last + 1 + _ROUNDS):
        buffer.add({"n": torch.tensor(number), "obs": torch.full((3,), float(number))})
        buffer.save(path)
        yield number


def stored(folder: str, done: int) -> Iterator[int]:
    """A ring that lives in a store; gives the number of the newest row that is durable."""
    stored_ring.chunk_rows = lambda _: 4  # type: ignore[assignment]
    with StoredRing(os.path.join(folder, "ring"), _CAPACITY) as ring:
        last = done
        if done or ring.size:
            rows = ring.gather(torch.arange(ring.size))
            last = _check_numbers(rows["n"].tolist(), done)
            assert torch.equal(rows["obs"], rows["n"].float()[:, None].expand(-1, 3))
        for number in range(last + 1, last + 1 + 5 * _ROUNDS):
            ring.add_one({"n": torch.tensor(number), "obs": torch.full((3,), float(number))})
            if number % 5 == 0:
                ring.flush()
                yield number


def added(folder: str, done: int) -> Iterator[int]:
    """Rollouts in a store of their own; gives the number of the newest that is durable."""
    path = os.path.join(folder, "run")
    with TrajectoryReplayBuffer(auto_save=True, auto_save_path=path, sample_window_size=0) as buffer:
        last = done
        if done or os.path.exists(os.path.join(path, "trajstore.json")):
            buffer.load_checkpoint(path)
            assert buffer.store is not None
            view = buffer.store.trajectories
            found = rollouts.find(view)
            assert len(found.rows) == len(view), "a rollout is there in part"
            last = len(buffer)
            assert last >= done, f"{done} were acknowledged, {last} are there"
            assert [entry.id for entry in found.entries] == list(range(last))
            for (_, fields), number in zip(rollouts.read(view, found.entries), range(last), strict=True):
                assert_same(fields, fields_of(rollout(number)))
        for number in range(last, last + _ROUNDS):
            buffer.add_trajectories([rollout(number)])
            if number % 2:
                buffer._holding.flush()
                yield number + 1


def rollout(number: int) -> Trajectory:
    """A function of its number; some observations repeat and some do not, so that it lies in several pieces."""
    generator = torch.Generator().manual_seed(number)
    steps, envs = 3 + number % 4, 1 + number % 3
    states = torch.rand(steps + 1, envs, 4, generator=generator)
    dones = torch.rand(steps, envs, generator=generator) < 0.3
    return Trajectory(
        max_episode_length=number,
        rewards=torch.rand(steps, envs, generator=generator),
        dones=dones,
        curr_obs={"states": states[:-1]},
        next_obs={"states": torch.where(dones[..., None], -states[1:], states[1:])},
    )


def _check_numbers(numbers: list[int], done: int) -> int:
    """The newest of the numbers that a ring holds, which must be the last that were added, each where it belongs."""
    last = max(numbers)
    assert last >= done, f"{done} was acknowledged, {last} is the newest"
    expected: list[int] = [0] * min(last, _CAPACITY)
    for number in range(max(1, last - _CAPACITY + 1), last + 1):
        expected[(number - 1) % _CAPACITY] = number
    assert numbers == expected
    return last


KINDS: dict[str, Callable[[str, int], Iterator[int]]] = {"saves": saves, "stored": stored, "added": added}


def run(folder: str, seed: int, kind: str, kills: int = KILLS) -> dict[str, Any]:
    """Kill one child after the other, each at some system call, and check what is left."""
    gc.freeze()  # children would otherwise copy what a collection only looks at
    rng = random.Random(seed)
    done = 0
    for _ in range(kills):
        countdown, before = rng.randint(1, 80), rng.random() < 0.5
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(folder, kind, done, writer, countdown, before=before)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            said = pipe.read().splitlines()
        _, status = os.waitpid(pid, 0)
        acknowledged = [int(line.split()[1]) for line in said if line.startswith("ack ")]
        done = max(acknowledged, default=done)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and "dying" in said):
            return {"done": done, "failure": "\n".join(said) or f"status {status}"}
    nbytes = sum(os.path.getsize(os.path.join(top, name)) for top, _, names in os.walk(folder) for name in names)
    return {"done": done, "failure": None, "threads": threading.active_count(), "bytes": nbytes}


def _child(folder: str, kind: str, done: int, writer: int, countdown: int, *, before: bool) -> None:
    lock = threading.Lock()
    armed = threading.Event()

    def die() -> None:
        os.write(writer, b"dying\n")
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()  # the signal may reach another thread first

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal countdown
            with lock:
                countdown -= armed.is_set()
                now = countdown == 0
            if now and before:
                die()
            result = call(*args, **options)
            if now:
                die()
            return result

        return wrapped

    try:
        torch.set_num_threads(1)
        for name in _CALLS:
            setattr(LocalFilesystem, name, dying(getattr(LocalFilesystem, name)))
        os.replace = dying(os.replace)
        for number in KINDS[kind](folder, done):
            os.write(writer, f"ack {number}\n".encode())
            armed.set()
        raise AssertionError("nothing killed it")
    except BaseException:
        os.write(writer, traceback.format_exc().encode()[:60000])
        os._exit(1)


def main() -> None:
    """Entry of the runner's process."""
    folder, seed, kind, *kills = sys.argv[1:]
    if kind == "saves":
        importlib.import_module("tensordict")  # once, not in every child
    json.dump(run(folder, int(seed), kind, *map(int, kills)), sys.stdout)


if __name__ == "__main__":
    main()
