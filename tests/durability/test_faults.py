"""A storage that fails at the n-th operation, for every n: what was acknowledged is there once, and whole.

What a flush acknowledged must be there; what an error called lost must not be; only what an error calls unknown may be
either. Every error belongs to the tree.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.faulty import DISK_FAULTS, FAULTS, FaultyDisk, Faults, faulty_bucket
from tests.support.rollouts import (
    Acknowledged,
    acknowledge,
    append_rollout,
    check_store,
    make_pages_small,
    stream_rollout,
)
from trajstore.errors import CommitOutcomeUnknownError, StorageError, TrajstoreError
from trajstore.storage import commit, retry
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.local import LocalFilesystem
from trajstore.store import Store, open_on
from trajstore.write.writer import WriteOptions

_STREAM_STEPS = 60
_OPTIONS = WriteOptions(spill_bytes=1024)
_PLAIN_FLUSHES = 5


@pytest.fixture(autouse=True)
def _small_pages_and_no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    make_pages_small(monkeypatch.setattr)
    monkeypatch.setattr(retry, "MAX_WAIT_S", 0.0)
    monkeypatch.setattr(commit, "_HINT_INTERVAL_S", 0.0)


@dataclass
class _Outcome:
    """What the caller was told."""

    acknowledged: list[Acknowledged] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)  # an error said that they are not in the store
    errors: list[TrajstoreError] = field(default_factory=list)

    @contextmanager
    def telling(self, pending: list[int]) -> Iterator[None]:
        """Whatever is raised must be of the tree; unless it says that it does not know, ``pending`` are lost."""
        try:
            yield
        except TrajstoreError as error:
            self.errors.append(error)
            if not isinstance(error, CommitOutcomeUnknownError):
                self.lost += pending


def _workload(connect: Callable[[], Filesystem]) -> _Outcome:
    """Open, append, flush, stream, commit until manifests are merged, reopen, read; on after every error."""
    outcome = _Outcome()
    numbers = itertools.count()
    store = _opened(connect, outcome)
    if store is not None:
        for flush in range(_PLAIN_FLUSHES):
            _flush_one(store, next(numbers), None, outcome)
            if flush == 1:
                _flush_one(store, next(numbers), _STREAM_STEPS, outcome)
        with outcome.telling([]):
            store.close()
    store = _opened(connect, outcome)
    if store is not None:
        _flush_one(store, next(numbers), None, outcome)
        with outcome.telling([]):
            check_store(store, ())
        with outcome.telling([]):
            store.close()
    return outcome


def _opened(connect: Callable[[], Filesystem], outcome: _Outcome) -> Store | None:
    for _ in range(2):
        with outcome.telling([]):
            return open_on(connect(), "a", options=_OPTIONS)
    return None


def _flush_one(store: Store, number: int, stream_steps: int | None, outcome: _Outcome) -> None:
    ref: Any = None
    with outcome.telling([number]):
        if stream_steps:
            ref = stream_rollout(store, 0, number, length=stream_steps)
        else:
            ref = append_rollout(store, 0, number)
        store.flush()
        outcome.acknowledged.append(acknowledge(ref, 0, number, length=stream_steps))


def _check(filesystem: Filesystem, outcome: _Outcome) -> None:
    """Reopened on a healthy storage."""
    with open_on(filesystem, "a") as store:  # it takes appends again
        ref = append_rollout(store, 1, 0)
        store.flush()
        check_store(store, [*outcome.acknowledged, acknowledge(ref, 1, 0)])
        shown = {t.metadata["number"] for t in store.trajectories if t.metadata["seed"] == 0}
        assert not shown & set(outcome.lost), "called lost, and yet there: appended once more, it would be there twice"


def test_the_workload_merges_manifests_and_streams() -> None:
    objects: dict[str, Any] = {}
    faults = Faults()
    outcome = _workload(lambda: faulty_bucket(objects, faults))
    assert outcome.errors == []
    assert len(outcome.acknowledged) == _PLAIN_FLUSHES + 2
    assert any(line.startswith("part ") for line in faults.log), "an episode was streamed"
    with open_on(faulty_bucket(objects, Faults()), "r") as store:
        assert len(store._head.snapshot.manifests) < store.version, "manifests were merged"


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bucket_that_fails_once_at_any_operation_loses_nothing_acknowledged(kind: str) -> None:
    surfaced = 0
    for at in itertools.count():
        objects: dict[str, Any] = {}
        faults = Faults(kind, at)
        outcome = _workload(lambda: faulty_bucket(objects, faults))  # noqa: B023 - called in this round
        if not faults.fired:
            break
        surfaced += bool(outcome.errors)
        try:
            _check(faulty_bucket(objects, Faults()), outcome)
        except BaseException as error:
            error.add_note(f"{kind} at operation {at}: {faults.log[at]}; told: {outcome.errors!r}")
            raise
    assert at > 80
    if kind in ("delay", "duplicate"):
        assert surfaced == 0, "the caller need not know"


@pytest.mark.parametrize("kind", ["fail", "refuse", "lost reply", "late", "409"])
def test_a_bucket_that_fails_from_some_operation_on_loses_nothing_acknowledged(kind: str) -> None:
    for at in itertools.count():
        objects: dict[str, Any] = {}
        faults = Faults(kind, at, forever=True)
        outcome = _workload(lambda: faulty_bucket(objects, faults))  # noqa: B023 - called in this round
        if not faults.fired:
            break
        try:
            assert outcome.errors or len(outcome.acknowledged) == _PLAIN_FLUSHES + 2, "the caller must be told"
            _check(faulty_bucket(objects, Faults()), outcome)
        except BaseException as error:
            error.add_note(f"{kind} from operation {at} on: {faults.log[at]}; told: {outcome.errors!r}")
            raise
    assert at > 80


@pytest.mark.parametrize(
    ("name", "forever"), [("ENOSPC", False), ("EIO", False), ("ENOSPC", True), ("EROFS", True)]
)
def test_a_disk_whose_nth_call_fails_loses_nothing_acknowledged(name: str, forever: bool, tmp_path: Path) -> None:
    for at in itertools.count():
        root = str(tmp_path / str(at))
        disks: list[FaultyDisk] = []

        def connect() -> FaultyDisk:
            spent = sum(disk.calls for disk in disks)  # noqa: B023 - called in this round
            disks.append(FaultyDisk(root, DISK_FAULTS[name], at - spent, forever=forever))  # noqa: B023
            return disks[-1]

        outcome = _workload(connect)
        if not any(disk.fired for disk in disks):
            break
        try:
            _check(LocalFilesystem(root), outcome)
        except BaseException as error:
            error.add_note(f"{name} in call {at}; told: {outcome.errors!r}")
            raise
    assert at > 120


def test_a_full_disk_says_how_much_was_lost_and_takes_appends_once_there_is_room(tmp_path: Path) -> None:
    disk = FaultyDisk(str(tmp_path / "store"), DISK_FAULTS["ENOSPC"], 0, forever=True)
    disk._at = 1 << 60
    with open_on(disk, "a") as store:
        kept = append_rollout(store, 0, 0)
        store.flush()
        disk._at = 0
        append_rollout(store, 0, 1)
        append_rollout(store, 0, 2)
        with pytest.raises(StorageError, match="No space left.*free space.*2 trajectories.* are not in the store"):
            store.flush()
        disk._at = 1 << 60
        later = append_rollout(store, 0, 3)
        store.flush()
        assert check_store(store, [acknowledge(kept, 0, 0), acknowledge(later, 0, 3)]) == 2


@pytest.mark.parametrize("most", [1, 7, 100])
def test_a_disk_that_writes_less_than_asked_is_asked_again(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``writev`` may stop anywhere, also inside a buffer."""
    writev = os.writev

    def short(descriptor: int, buffers: Any) -> int:
        first = [memoryview(b)[:most] for b in buffers if len(b)][:1]
        return writev(descriptor, first)

    monkeypatch.setattr(os, "writev", short)
    with open_on(LocalFilesystem(str(tmp_path / "store")), "a", options=_OPTIONS) as store:
        refs = [(append_rollout(store, 0, 0), 0, None), (stream_rollout(store, 0, 1, length=40), 1, 40)]
        store.flush()
        assert check_store(store, [acknowledge(r, 0, n, length=k) for r, n, k in refs]) == 2


def test_a_folder_without_permission_is_an_error_of_the_tree(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(TrajstoreError, match="permissions"):
        open_on(LocalFilesystem(str(tmp_path / "store")), "a")
