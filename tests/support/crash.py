"""Children that append to a store and are killed, from a parent that holds no threads.

Run as ``python -m tests.support.crash FOLDER SEED STEP...``: one store per step, in each of which children die one after
another, every one in that step of the commit and after at least one acknowledged flush of its own. Prints a JSON report.

The parent imports everything and opens nothing, so a fork costs milliseconds and copies no lock that a thread might hold.
What a child acknowledges goes through a pipe; what the parent has read of it, every later child inherits and checks.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import select
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.rollouts import (
    Acknowledged,
    acknowledge,
    append_rollout,
    check_store,
    make_pages_small,
    stream_rollout,
)
from trajstore.opening import open_on
from trajstore.storage import commit
from trajstore.storage.local import LocalFilesystem
from trajstore.write.batch import WriteOptions
from trajstore.write.shard import ShardBuilder

ANY_TIME = "at any time"

# Where a child dies: the system call, what it is about, and on which side of it.
STEPS: dict[str, tuple[str, str, str]] = {
    "encoding a page": ("encode", "page", "before"),
    "making a segment's folder": ("mkdir", "segment", "after"),
    "creating a segment's file": ("create", "segment", "after"),
    "half of a segment's file written": ("write", "segment", "half"),
    "before a segment's file is synced": ("fsync", "segment", "before"),
    "half of a streamed part written": ("write", "stream", "half"),
    "half of the manifest written": ("write", "manifest", "half"),
    "before the manifest is synced": ("fsync", "manifest", "before"),
    "half of a merged manifest written": ("write", "merged manifest", "half"),
    "before the folders of the segment are synced": ("fsync directory", "segment", "before"),
    "after a folder of the segment is synced": ("fsync directory", "segment", "after"),
    "creating the snapshot's temporary file": ("create", "snapshot", "after"),
    "half of the snapshot written": ("write", "snapshot", "half"),
    "before the snapshot is synced": ("fsync", "snapshot", "before"),
    "before the snapshot is linked": ("link", "snapshot", "before"),
    "after the snapshot is linked": ("link", "snapshot", "after"),
    "after the temporary file is removed": ("unlink", "snapshot", "after"),
    "after the snapshots' folder is synced": ("fsync directory", "snapshot", "after"),
    "half of the hint written": ("write", "hint", "half"),
    "before the hint takes its name": ("rename", "hint", "before"),
    "after the hint has its name": ("rename", "hint", "after"),
}
_STREAM_STEPS = 120
_FLUSHES = 40  # a child that outlives them was not killed, which is a failure


@dataclass
class Report:
    """What one run of children came to."""

    kills: Counter[str] = field(default_factory=Counter)
    acknowledged: int = 0
    shown: int = 0
    threads: int = 0  # of the parent, as the kernel counts them, at most
    failures: list[str] = field(default_factory=list)


class KillingFilesystem(LocalFilesystem):
    """Kills its process in the ``countdown``-th matching system call after ``arm``."""

    stream_threshold_bytes = 1024  # so that an episode of some hundred steps streams

    def __init__(self, root: str, step: str | None, die: Callable[[], None]) -> None:
        super().__init__(root, threads=2)
        self.call, self.about, self.side = STEPS.get(step or "", ("", "", ""))
        self.merging = False
        self._streams: set[str] = set()
        self._countdown: int | None = None
        self._lock = threading.Lock()
        self._die = die

    def arm(self, countdown: int) -> None:
        """From now on, matching calls count."""
        self._countdown = countdown

    def stream(self, key: str) -> Any:
        self._streams.add(key)
        return super().stream(key)

    @contextlib.contextmanager
    def at(self, call: str, path: str) -> Iterator[bool]:
        """Around one system call; gives whether to die in its middle."""
        matches = call == self.call and self.about in self._subjects(path)
        now = False
        if matches and self._countdown is not None:
            with self._lock:
                self._countdown -= 1
                now = self._countdown == 0
        if now and self.side == "before":
            self._die()
        yield now and self.side == "half"
        if now and self.side == "after":
            self._die()

    def _subjects(self, path: str) -> set[str]:
        key = os.path.relpath(path, self.root) if os.path.isabs(path) else path
        if key == "page":
            return {"page"}
        if key in self._streams:
            return {"stream"}
        if key.startswith("segments"):
            return {"segment"}
        if key.startswith("manifests"):
            return {"manifest", *({"merged manifest"} if self.merging else ())}
        if key.startswith("snapshots"):
            return {"hint" if self._in_hint else "snapshot"}
        return set()

    _in_hint = False

    def overwrite(self, key: str, data: bytes, *, durable: bool = False) -> None:
        self._in_hint = True
        try:
            super().overwrite(key, data, durable=durable)
        finally:
            self._in_hint = False

    def _make_directory(self, path: str) -> None:
        with self.at("mkdir", path):
            super()._make_directory(path)

    def _create_file(self, path: str) -> int:
        with self.at("create", path):
            return super()._create_file(path)

    def _write(self, descriptor: int, buffers: Sequence[Any], name: str) -> None:
        with self.at("write", name) as half:
            if half:
                whole = b"".join(bytes(memoryview(b)) for b in buffers)
                os.write(descriptor, whole[: len(whole) // 2])
                self._die()
            super()._write(descriptor, buffers, name)

    def _fsync_file(self, descriptor: int, name: str) -> None:
        with self.at("fsync", name):
            super()._fsync_file(descriptor, name)

    def _fsync_directory(self, path: str) -> None:
        with self.at("fsync directory", path):
            super()._fsync_directory(path)

    def _link(self, source: str, target: str) -> None:
        with self.at("link", target):
            super()._link(source, target)

    def _rename(self, source: str, target: str) -> None:
        with self.at("rename", target):
            super()._rename(source, target)

    def _unlink(self, path: str) -> None:
        with self.at("unlink", path):
            super()._unlink(path)


def run(folder: str, seed: int, steps: Sequence[str], kills_per_step: int) -> Report:
    """Kill children in each of the steps, in a store of its own each, and check after every death."""
    report = Report()
    gc.freeze()  # children would otherwise copy what a collection only looks at
    rng = random.Random(seed)
    for number, step in enumerate(steps):
        root = os.path.join(folder, f"store-{number}")
        acknowledged: list[Acknowledged] = []
        for child in range(kills_per_step):
            who = seed * 1_000_000 + number * 1000 + child
            _kill_one(root, step, who, acknowledged, rng, report)
            if report.failures:
                return report
        _check_last(root, acknowledged, report)
        report.acknowledged += len(acknowledged)
        report.threads = max(report.threads, threading.active_count(), len(os.listdir("/proc/self/task")))
    return report


def _kill_one(
    root: str, step: str, who: int, acknowledged: list[Acknowledged], rng: random.Random, report: Report
) -> None:
    after, countdown = 1 + (rng.random() < 0.2), rng.randint(1, 2)
    delay_s = rng.uniform(0, 0.06)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _child(root, step, who, acknowledged, writer, after, countdown)
    os.close(writer)
    said = b""
    deadline: float | None = None
    while True:
        wait_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([reader], [], [], wait_s)
        if not ready:
            os.kill(pid, signal.SIGKILL)
            deadline = None
            continue
        data = os.read(reader, 65536)
        if not data:
            break
        said += data
        if step == ANY_TIME and deadline is None and b"ack " in said:
            deadline = time.monotonic() + delay_s
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    lines = [line.split(" ", 1) for line in said.decode().splitlines()]
    acks = [Acknowledged.from_line(rest) for kind, rest in lines if kind == "ack"]
    acknowledged += acks
    report.failures += [rest.replace("\\n", "\n") for kind, rest in lines if kind == "failed"]
    died_in = ANY_TIME if step == ANY_TIME else next((rest for kind, rest in lines if kind == "dying"), None)
    if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and acks and died_in == step):
        report.failures.append(f"child {who} for {step!r}: status {status}, {len(acks)} acknowledged, {died_in}")
    else:
        report.kills[step] += 1


def _check_last(root: str, acknowledged: list[Acknowledged], report: Report) -> None:
    """After the last death too, in a child, since reading may start threads."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        with _telling(writer):
            os.write(writer, f"shown {_check(root, acknowledged)}\n".encode())
    os.close(writer)
    with os.fdopen(reader) as file:
        for line in file:
            kind, rest = line.rstrip("\n").split(" ", 1)
            if kind == "shown":
                report.shown += int(rest)
            else:
                report.failures.append(rest.replace("\\n", "\n"))
    os.waitpid(pid, 0)


def _check(root: str, acknowledged: list[Acknowledged]) -> int:
    with open_on(LocalFilesystem(root), "r") as store:
        return check_store(store, acknowledged, whole_batches=True)


@contextlib.contextmanager
def _telling(writer: int) -> Iterator[None]:
    """A child's whole life: what goes wrong is told, and it never returns into the parent's code."""
    try:
        yield
    except BaseException:
        os.write(writer, f"failed {traceback.format_exc()!s}".replace("\n", "\\n").encode()[:60000] + b"\n")
        os._exit(1)
    os._exit(0)


def _child(
    root: str, step: str, who: int, acknowledged: list[Acknowledged], writer: int, after: int, countdown: int
) -> None:
    def die() -> None:
        os.write(writer, f"dying {step}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()  # the signal may reach another thread first

    with _telling(writer):
        if acknowledged:
            _check(root, acknowledged)
        commit._HINT_INTERVAL_S = 0.0  # every commit writes the hint
        make_pages_small(setattr)
        filesystem = KillingFilesystem(root, step, die)
        history = commit.History(filesystem)
        merge = history._merge_manifests

        def merge_and_say_so(parent: Any) -> Any:
            filesystem.merging = True
            try:
                return merge(parent)
            finally:
                filesystem.merging = False

        history._merge_manifests = merge_and_say_so  # type: ignore[method-assign]
        encode = ShardBuilder._encode

        def encode_or_die(self: Any, *args: Any) -> Any:
            with filesystem.at("encode", "page"):
                return encode(self, *args)

        ShardBuilder._encode = encode_or_die  # type: ignore[method-assign]
        streams = filesystem.about == "stream"
        store = open_on(filesystem, "a", history=history, options=WriteOptions(spill_bytes=2048))
        for flush in range(_FLUSHES):
            if flush == after:
                filesystem.arm(countdown)
            numbers = (2 * flush, 2 * flush + 1)
            refs = [append_rollout(store, who, numbers[0], batch=flush)]
            length = _STREAM_STEPS if streams and flush >= after else None
            if length:
                refs.append(stream_rollout(store, who, numbers[1], batch=flush, length=length))
            else:
                refs.append(append_rollout(store, who, numbers[1], batch=flush))
            store.flush()
            lengths = (None, length)
            acks = [acknowledge(r, who, n, length=k) for r, n, k in zip(refs, numbers, lengths, strict=True)]
            os.write(writer, b"".join(b"ack " + ack.to_line() for ack in acks))


def main() -> None:
    """Entry of the runner's process."""
    folder, seed, kills_per_step, *steps = sys.argv[1:]
    report = run(folder, int(seed), steps, int(kills_per_step))
    json.dump(report.__dict__, sys.stdout)


if __name__ == "__main__":
    main()
