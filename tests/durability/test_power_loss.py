"""A power cut after any system call: what was fsynced is enough for everything acknowledged."""

from __future__ import annotations

import itertools
import os
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.power import Disk, Entry, PowerCut, Rebuilt, RecordingFilesystem
from tests.support.rollouts import (
    Acknowledged,
    acknowledge,
    append_rollout,
    check_store,
    make_pages_small,
    stream_rollout,
)
from trajstore.errors import CommitError, StoreNotFoundError
from trajstore.opening import open_on
from trajstore.storage import commit
from trajstore.storage.local import LocalFilesystem
from trajstore.store import Store
from trajstore.write.batch import WriteOptions

_STREAM_STEPS = 150


class _Recorded:
    """A history of several handles: many commits, merged manifests, a streamed episode."""

    def __init__(self, folder: Path) -> None:
        self.log: list[Entry] = []
        self.top = str(folder)
        self.root = str(folder / "made" / "store")  # neither folder is there yet
        with self.handle() as (filesystem, store):
            for number in range(3):
                self.flush(filesystem, store, 1, [number])
            self.flush(filesystem, store, 1, [3, 4], streamed=[5])
            for number in range(6, 14):
                self.flush(filesystem, store, 1, [number])
            with self.handle() as (other_filesystem, other):  # each commits under the other's feet
                for number in range(2):
                    self.flush(other_filesystem, other, 2, [number])
                    self.flush(filesystem, store, 1, [14 + number])
        with self.handle() as (filesystem, store):
            self.flush(filesystem, store, 3, [0])
            append_rollout(store, 3, 1)  # committed by closing

    def handle(self) -> _Handle:
        return _Handle(self)

    def flush(
        self, filesystem: RecordingFilesystem, store: Store, seed: int, numbers: list[int], streamed: Any = ()
    ) -> None:
        refs = [(append_rollout(store, seed, number), number, None) for number in numbers]
        for number in streamed:
            begun = len(self.log)
            ref = stream_rollout(store, seed, number, length=_STREAM_STEPS, midway=partial(self.wait_for_frames, begun))
            refs.append((ref, number, _STREAM_STEPS))
        store.flush()
        for ref, number, length in refs:
            filesystem.acknowledge(acknowledge(ref, seed, number, length=length))

    def wait_for_frames(self, begun: int) -> None:
        """Until the background has written frames of the running episode, so that the rest is a part of its own."""
        deadline = time.monotonic() + 60
        while not any(entry[0] == "write" and "obs/image/c" in entry[1] for entry in self.log[begun:]):
            assert time.monotonic() < deadline
            time.sleep(0.001)


class _Handle:
    def __init__(self, recorded: _Recorded) -> None:
        self._filesystem = RecordingFilesystem(recorded.root, recorded.log)

    def __enter__(self) -> tuple[RecordingFilesystem, Store]:
        self._store = open_on(self._filesystem, "a", options=WriteOptions(spill_bytes=2048))
        return self._filesystem, self._store

    def __exit__(self, *_: object) -> None:
        self._store.close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> _Recorded:
    with pytest.MonkeyPatch.context() as patch:
        make_pages_small(patch.setattr)
        patch.setattr(commit, "_HINT_INTERVAL_S", 0.0)  # the hint is renamed at every commit, not once a second
        return _Recorded(tmp_path_factory.mktemp("recorded"))


def _check_left(root: str, owed: list[Acknowledged]) -> int:
    """Open what a power cut left, without repair; returns the trajectories shown."""
    try:
        store = open_on(LocalFilesystem(root), "r")
    except StoreNotFoundError:
        assert not owed, "the store is gone with what it had acknowledged"
        return 0
    with store:
        return check_store(store, owed)


def test_the_recorded_history_holds_every_kind_of_operation(recorded: _Recorded) -> None:
    kinds = {entry[0] for entry in recorded.log}
    assert kinds == {
        "mkdir", "create", "write", "fsync", "fsync directory", "link", "rename", "unlink", "acknowledge"
    }  # fmt: skip
    with open_on(LocalFilesystem(recorded.root), "r") as store:
        owed = [entry[1] for entry in recorded.log if entry[0] == "acknowledge"]
        assert check_store(store, owed) == len(owed) + 1 == 20
        assert store.version > len(store._head.snapshot.manifests) + 5, "manifests were merged"
        stream = store.trajectories.filter("length == 150")[0]
        written = [entry[1] for entry in recorded.log if entry[0] == "write" and "obs/image/c" in entry[1]]
        assert len(written) > len(set(written)), "the episode's frames were written in parts"
        assert stream.length == _STREAM_STEPS


def test_after_every_prefix_of_the_log_what_was_synced_holds_all_acknowledged(
    recorded: _Recorded, tmp_path: Path
) -> None:
    """Prefixes that leave the same bytes and owe the same are opened once."""
    disk, rebuilt, owed = Disk(recorded.top), Rebuilt(str(tmp_path / "left")), []
    root = os.path.join(rebuilt.folder, os.path.relpath(recorded.root, recorded.top))
    before: Any = None
    shown, opened = 0, 0
    for entry in [("start",), *recorded.log]:
        if entry[0] == "acknowledge":
            owed.append(entry[1])
        disk.apply(entry)
        left = disk.durable()
        if (left, len(owed)) == before:
            continue
        before = (left, len(owed))
        rebuilt.show(left)
        now = _check_left(root, owed)
        assert now >= shown, "a version that was there is gone"
        shown, opened = now, opened + 1
    assert shown == len(owed) + 1
    assert opened > 3 * len(owed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_part_of_what_was_not_synced_may_survive_too(recorded: _Recorded, tmp_path: Path, seed: int) -> None:
    """Torn files, names without files, a later rename without an earlier one."""
    rng = random.Random(seed)
    disk, rebuilt, owed = Disk(recorded.top), Rebuilt(str(tmp_path / "left")), []
    root = os.path.join(rebuilt.folder, os.path.relpath(recorded.root, recorded.top))
    opened = 0
    for entry in recorded.log:
        if entry[0] == "acknowledge":
            owed.append(entry[1])
        disk.apply(entry)
        if rng.random() < 0.15:
            rebuilt.show(disk.lenient(rng))
            _check_left(root, owed)
            opened += 1
    assert opened > 60


def test_a_store_left_by_a_power_cut_takes_appends_again(recorded: _Recorded, tmp_path: Path) -> None:
    """No repair: the next handle commits on top of whatever was left."""
    rng = random.Random(0)
    disk, rebuilt, owed = Disk(recorded.top), Rebuilt(str(tmp_path / "left")), []
    root = os.path.join(rebuilt.folder, os.path.relpath(recorded.root, recorded.top))
    for position, entry in enumerate(recorded.log):
        if entry[0] == "acknowledge":
            owed.append(entry[1])
        disk.apply(entry)
        if position % 50 == 0:
            rebuilt.fresh(disk.lenient(rng))
            with open_on(LocalFilesystem(root), "a") as store:
                ref = append_rollout(store, 9, position)
                store.flush()
                check_store(store, [*owed, acknowledge(ref, 9, position)])


def test_killed_at_any_call_and_then_a_power_cut(tmp_path: Path) -> None:
    """What a killed process left unsynced, the next one relies on: it must sync it before it acknowledges."""
    for stop in itertools.count(step=2):
        top = tmp_path / str(stop)
        top.mkdir()
        root = str(top / "made" / "store")
        log: list[Entry] = []
        owed = []
        killed = False
        try:
            _append_and_acknowledge(RecordingFilesystem(root, log, stop_before=stop), 1, owed)
        except (PowerCut, CommitError):  # in this thread, or in the one that commits
            killed = True
        _append_and_acknowledge(RecordingFilesystem(root, log), 2, owed)
        disk, rebuilt = Disk(str(top)), Rebuilt(str(tmp_path / f"left-{stop}"))
        for entry in log:
            disk.apply(entry)
        rebuilt.show(disk.durable())
        _check_left(os.path.join(rebuilt.folder, "made", "store"), owed)
        if not killed:
            break
    assert stop > 30


def _append_and_acknowledge(filesystem: RecordingFilesystem, seed: int, owed: list[Acknowledged]) -> None:
    """Open, append, flush, and vanish without closing."""
    store = open_on(filesystem, "a")
    store._finalizer.detach()  # a killed process flushes nothing at its end
    try:
        for number in range(2):
            ref = append_rollout(store, seed, number)
            store.flush()
            owed.append(acknowledge(ref, seed, number))
    finally:
        store._workers.close()
        filesystem.close()
