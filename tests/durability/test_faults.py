"""A storage that fails at the n-th operation, for every n: what was acknowledged is there once, and whole.

What a flush acknowledged must be there; what an error called lost must not be; only what an error calls unknown may be
either. Every error belongs to the tree.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.faulty import DISK_FAULTS, FAULTS, Faults, FaultyDisk, faulty_bucket
from tests.support.rare import also_slow
from tests.support.rollouts import (
    Acknowledged,
    acknowledge,
    append_rollout,
    check_store,
    make_pages_small,
    rollout,
    stream_rollout,
)
from trajstore.errors import ClosedError, CommitOutcomeUnknownError, StorageError, TrajstoreError
from trajstore.opening import open_on
from trajstore.schema import Column
from trajstore.storage import commit, retry
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.local import LocalFilesystem
from trajstore.storage.workers import Workers
from trajstore.store import Store
from trajstore.write.batch import WriteOptions
from trajstore.write.blocks import BlockPool
from trajstore.write.episode import Episode
from trajstore.write.segment import SegmentBuilder
from trajstore.write.shard import ArrowFileBuilder, ShardBuilder
from trajstore.write.writer import Writer

_STREAM_STEPS = 60
_OPTIONS = WriteOptions(spill_bytes=1024)
_AGED_COMMITS = 6  # the next one merges manifests
_FLUSHES = 2


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


def _aged(filesystem: Filesystem) -> list[Acknowledged]:
    """Some commits of the past; what they owe."""
    owed = []
    with open_on(filesystem, "a") as store:
        for number in range(_AGED_COMMITS):
            ref = append_rollout(store, 9, number)
            store.flush()
            owed.append(acknowledge(ref, 9, number))
    return owed


def _workload(connect: Callable[[], Filesystem], owed: list[Acknowledged]) -> _Outcome:
    """Open, append, flush, stream, flush, close, reopen, read; on after every error."""
    outcome = _Outcome(list(owed))
    store = _opened(connect, outcome)
    if store is not None:
        _flush_one(store, 0, None, outcome)
        _flush_one(store, 1, _STREAM_STEPS, outcome)
        with outcome.telling([]):
            store.close()
    with outcome.telling([]), open_on(connect(), "r") as store:
        for trajectory in store.trajectories.last(_FLUSHES):
            trajectory.read()
    return outcome


def _opened(connect: Callable[[], Filesystem], outcome: _Outcome) -> Store | None:
    for _ in range(2):
        with outcome.telling([]):
            return open_on(connect(), "a", options=_OPTIONS)
    return None


def _flush_one(store: Store, number: int, stream_steps: int | None, outcome: _Outcome) -> None:
    with outcome.telling([number]):
        write = append_rollout if stream_steps is None else stream_rollout
        ref = write(store, 0, number, length=stream_steps)
        store.flush()
        outcome.acknowledged.append(acknowledge(ref, 0, number, length=stream_steps))


def _check(filesystem: Filesystem, outcome: _Outcome) -> None:
    """Reopened on a healthy storage."""
    with open_on(filesystem, "a") as store:  # it takes appends again
        ref = append_rollout(store, 1, 0)
        store.flush()
        check_store(store, [*outcome.acknowledged, acknowledge(ref, 1, 0)])
        shown = {t.metadata["number"] for t in store.trajectories.filter("seed == 0")}
        assert not shown & set(outcome.lost), "called lost, and yet there: appended once more, it would be there twice"


@pytest.fixture(params=[13, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def every(request: pytest.FixtureRequest) -> int:
    """Which calls are spoiled: kinds of faults begin at different ones, so that together they meet all of them."""
    return int(request.param)


@pytest.fixture(params=["new", "aged"])
def objects_of(request: pytest.FixtureRequest) -> tuple[dict[str, Any], list[Acknowledged]]:
    """A bucket with no store, or with one that is due for a merge of manifests; objects are immutable."""
    objects: dict[str, Any] = {}
    owed = _aged(faulty_bucket(objects, Faults())) if request.param == "aged" else []
    return objects, owed


@pytest.fixture(params=["new", "aged"])
def folder_of(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[Acknowledged]]:
    """The same as a folder."""
    folder = tmp_path / "origin"
    if request.param == "new":
        return folder, []
    return folder, _aged(LocalFilesystem(str(folder)))


def test_the_workload_creates_merges_and_streams() -> None:
    for aged in (False, True):
        objects: dict[str, Any] = {}
        owed = _aged(faulty_bucket(objects, Faults())) if aged else []
        faults = Faults()
        outcome = _workload(partial(faulty_bucket, objects, faults), owed)
        assert outcome.errors == []
        assert len(outcome.acknowledged) == len(owed) + _FLUSHES
        assert any(line.startswith("part ") for line in faults.log), "an episode was streamed"
        with open_on(faulty_bucket(objects, Faults()), "r") as store:
            merged = store.version - len(store._head.snapshot.manifests)
            assert bool(merged) == aged


def _fail_everywhere(
    kind: str, start: tuple[dict[str, Any], list[Acknowledged]], operations: Iterator[int], *, forever: bool
) -> int:
    """Spoil operations in turn; returns how many rounds told the caller of an error."""
    told = 0
    origin, owed = start
    for at in operations:
        objects = dict(origin)
        faults = Faults(kind, at, forever=forever)
        outcome = _workload(partial(faulty_bucket, objects, faults), owed)
        if not faults.fired:
            break
        told += bool(outcome.errors)
        try:
            assert outcome.errors or len(outcome.acknowledged) == len(owed) + _FLUSHES, "the caller must be told"
            _check(faulty_bucket(objects, Faults()), outcome)
        except BaseException as error:
            error.add_note(f"{kind} at operation {at}: {faults.log[at]}; told: {outcome.errors!r}")
            raise
    assert at > 40
    return told


@pytest.mark.parametrize("kind", also_slow(FAULTS, list(FAULTS)[::2]))
def test_a_bucket_that_fails_once_at_any_operation_loses_nothing_acknowledged(
    kind: str, every: int, objects_of: tuple[dict[str, Any], list[Acknowledged]]
) -> None:
    operations = itertools.count(list(FAULTS).index(kind) % every, every)
    told = _fail_everywhere(kind, objects_of, operations, forever=False)
    if kind in ("delay", "duplicate"):
        assert told == 0, "the caller need not know"


@pytest.mark.parametrize("kind", ["fail", "lost reply", "late"])
def test_a_bucket_that_fails_from_some_operation_on_loses_nothing_acknowledged(
    kind: str, every: int, objects_of: tuple[dict[str, Any], list[Acknowledged]]
) -> None:
    operations = itertools.count(list(FAULTS).index(kind) % every, every)
    assert _fail_everywhere(kind, objects_of, operations, forever=True) > 30 // every


class _Disks:
    """The handles of one workload, whose calls are counted together."""

    def __init__(self, root: str, code: int, at: int, *, forever: bool) -> None:
        self._root, self._code, self._at, self._forever = root, code, at, forever
        self._disks: list[FaultyDisk] = []

    def connect(self) -> FaultyDisk:
        spent = sum(disk.calls for disk in self._disks)
        self._disks.append(FaultyDisk(self._root, self._code, self._at - spent, forever=self._forever))
        return self._disks[-1]

    @property
    def fired(self) -> int:
        return sum(disk.fired for disk in self._disks)


@pytest.mark.parametrize(
    ("name", "forever"),
    [
        ("ENOSPC", False),
        ("ENOSPC", True),
        pytest.param("EIO", False, marks=pytest.mark.slow),
        pytest.param("EROFS", True, marks=pytest.mark.slow),
    ],
)
def test_a_disk_whose_nth_call_fails_loses_nothing_acknowledged(
    name: str, forever: bool, every: int, folder_of: tuple[Path, list[Acknowledged]], tmp_path: Path
) -> None:
    origin, owed = folder_of
    for at in itertools.count(int(forever), every):
        root = str(tmp_path / str(at))
        if origin.exists():
            shutil.copytree(origin, root)
        disks = _Disks(root, DISK_FAULTS[name], at, forever=forever)
        outcome = _workload(disks.connect, owed)
        if not disks.fired:
            break
        try:
            assert outcome.errors or len(outcome.acknowledged) == len(owed) + _FLUSHES, "the caller must be told"
            _check(FaultyDisk(root, 0, at=1 << 60), outcome)  # healthy, and spares the real syncs
        except BaseException as error:
            error.add_note(f"{name} in call {at}; told: {outcome.errors!r}")
            raise
        shutil.rmtree(root)
    assert at > 60


def _interrupted(append: Callable[..., None], countdown: Iterator[type[BaseException] | None]) -> Callable[..., None]:
    def run(*args: Any) -> None:
        error = next(countdown, None)
        if error is not None:
            raise error
        append(*args)

    return run


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_an_append_interrupted_at_any_column_tears_nothing(kind: type[BaseException], tmp_path: Path) -> None:
    """Some columns have the rows of the interrupted trajectory then; those that follow must not be shifted."""
    for at in itertools.count():
        countdown = iter([None] * at + [kind])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ShardBuilder, "append", _interrupted(ShardBuilder.append, countdown))
            patch.setattr(ArrowFileBuilder, "append", _interrupted(ArrowFileBuilder.append, countdown))
            owed = []
            with open_on(LocalFilesystem(str(tmp_path / str(at))), "a") as store:
                for number in range(4):
                    with suppress(kind):
                        owed.append((append_rollout(store, 0, number), number))
                    if number == 2:
                        store.flush()
                store.flush()
                assert check_store(store, [acknowledge(ref, 0, number) for ref, number in owed]) == len(owed)
        if len(owed) == 4:
            break
        assert len(owed) == 3
    assert at == 4 * 3, "two tensors and one file of steps, four times"


def test_a_full_disk_says_how_much_was_lost_and_takes_appends_once_there_is_room(tmp_path: Path) -> None:
    disk = FaultyDisk(str(tmp_path / "store"), DISK_FAULTS["ENOSPC"], 0, forever=True)
    disk._at = 1 << 60
    with open_on(disk, "a") as store:
        kept = append_rollout(store, 0, 0)
        store.flush()
        disk._at = 0
        append_rollout(store, 0, 1)
        append_rollout(store, 0, 2)
        with pytest.raises(StorageError, match=r"No space left.*free space.*2 trajectories.* are not in the store"):
            store.flush()
        disk._at = 1 << 60
        later = append_rollout(store, 0, 3)
        store.flush()
        assert check_store(store, [acknowledge(kept, 0, 0), acknowledge(later, 0, 3)]) == 2


def _add_until_told(writer: Writer, episode: Episode, flat: Mapping[str, np.ndarray]) -> None:
    """Add steps; the background fails meanwhile, or soon after, and the next call says so."""
    for step in range(len(flat["action"])):
        episode.add(image=flat["obs/image"][step], action=flat["action"][step])
    with writer._condition:
        assert writer._condition.wait_for(lambda: writer._errors, 30)
    writer.flush()


def test_an_episode_whose_segment_could_not_be_written_says_so_at_its_end() -> None:
    """The background has told of the failure already; ending the episode must not make half of it visible."""
    faults = Faults("refuse", forever=True)
    faults.kind = None
    flat = rollout(0, 0, length=200)
    with open_on(faulty_bucket({}, faults), "a", options=_OPTIONS) as store:
        writer = store._writer
        assert writer is not None
        episode = store.begin()
        faults.kind = "refuse"
        with pytest.raises(StorageError, match="InvalidRequest"):
            _add_until_told(writer, episode, flat)
        faults.kind = None
        with pytest.raises(ClosedError, match="begin the episode again"):
            episode.end()
        ref = store.append({"image": flat["obs/image"][:9], "action": flat["action"][:9]})
        store.flush()
        assert [trajectory.uuid for trajectory in store.trajectories] == [ref.uuid]


def test_a_segment_that_could_not_be_drained_is_never_finished() -> None:
    """Its batch may have been queued for commit meanwhile; pages are missing, so it must fail there too."""
    faults = Faults("refuse", 0)
    workers = Workers(1, name="test")
    column = Column(path="x", dtype="uint8", shape=(64,))
    builder = SegmentBuilder(
        [column], preset="none", filesystem=faulty_bucket({}, faults), workers=workers, blocks=BlockPool(0)
    )
    builder.append_rows({"x": np.zeros((100, 64), np.uint8)})
    builder.end_trajectory(100)
    builder.close_pages()
    with pytest.raises(StorageError, match="InvalidRequest"):
        builder.drain(wait=True)
    with pytest.raises(StorageError, match="InvalidRequest"):
        builder.finish()
    workers.close()


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
