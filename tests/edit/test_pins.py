"""Pins: what a store that refers to others leaves there, what it leaves where it fails, and who is told."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

import trajstore
from tests.edit.stores import CountingDisk, append, filled, holds, objects_of
from tests.support.faulty import DISK_FAULTS, Faults, FaultyDisk, faulty_bucket
from tests.support.interrupts import interruptible
from trajstore.edit import borrow as borrowing
from trajstore.edit.combine import Source, combine
from trajstore.edit.marks import all_pins, pin, unpin
from trajstore.errors import ReadOnlyError, StorageError, TrajstoreError, VersionExpiredError
from trajstore.format import layout
from trajstore.opening import open_on
from trajstore.storage import retry
from trajstore.storage.commit import History
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.local import LocalFilesystem


def pins_of(url):
    return all_pins(LocalFilesystem(str(url)))


def snapshot_of(url, version=None):
    with trajstore.open(url, version=version) as store:
        return store._head.snapshot


def empty_slot(url, version):
    """What vacuum does first."""
    (Path(url) / layout.snapshot_key(version)).write_bytes(b"")


@pytest.fixture
def three(tmp_path):
    """Stores ``a``, ``b`` and ``c`` of two trajectories each."""
    return [filled(tmp_path / name, [2 * n, 2 * n + 1]) for n, name in enumerate("abc")]


# What is pinned


def test_each_owner_is_pinned_once_at_the_version_that_is_referred_to(three, tmp_path):
    trajstore.merge(three, tmp_path / "all")
    snapshot = snapshot_of(tmp_path / "all")
    with trajstore.open(tmp_path / "all") as merged:
        borrower = merged.uuid
    assert [base.url for base in snapshot.bases] == ["../a", "../b", "../c"]
    for url, base in zip(three, snapshot.bases, strict=True):
        (found,) = pins_of(url)
        with trajstore.open(url) as store:
            assert (found.version, found.snapshot_sha256) == (store.version, store._head.sha256)
            assert base.store_uuid == store.uuid
        assert (found.uuid, found.borrower_uuid, found.borrower_url) == (base.pin, borrower, str(tmp_path / "all"))


def test_two_versions_of_one_owner_are_two_bases(three, tmp_path):
    with trajstore.open(three[0], version=1) as early, trajstore.open(three[0]) as late:
        trajstore.merge([early, late.trajectories.last(1), late], tmp_path / "all")
    assert sorted(found.version for found in pins_of(three[0])) == [1, 2]
    assert len(snapshot_of(tmp_path / "all").bases) == 2
    holds_merged(tmp_path / "all", [0, 1, 0, 1])


def holds_merged(url, numbers, **options):
    """As ``holds``, but for the fields that say where trajectories came from."""
    with trajstore.open(url, **options) as store:
        view = store.trajectories
        assert view.to_pandas()["number"].tolist() == list(numbers)
        assert [t["action"][:].tolist() for t in view] == [[[n, n]] * (1 + n % 7) for n in numbers]
        assert view.read("action").shape[0] == view.num_steps


@pytest.mark.parametrize("share", ["link", "copy"])
def test_who_has_bytes_of_its_own_pins_nothing(three, tmp_path, share):
    trajstore.merge(three, tmp_path / "all", share=share)
    assert snapshot_of(tmp_path / "all").bases == ()
    assert not any(pins_of(url) for url in three)


def test_bases_are_flattened_and_pinned_at_their_owner(three, tmp_path):
    trajstore.merge(three[:2], tmp_path / "one")
    trajstore.merge([tmp_path / "one", three[2]], tmp_path / "two")
    trajstore.split(tmp_path / "two", tmp_path / "part", where="number in (1, 4)")
    assert [base.url for base in snapshot_of(tmp_path / "two").bases] == ["../a", "../b", "../c"]
    assert [base.url for base in snapshot_of(tmp_path / "part").bases] == ["../a", "../c"]
    assert [len(pins_of(url)) for url in three] == [3, 2, 2]
    assert not pins_of(tmp_path / "one")
    assert not pins_of(tmp_path / "two")
    shutil.rmtree(tmp_path / "one")
    shutil.rmtree(tmp_path / "two")
    holds_merged(tmp_path / "part", [1, 4])


def test_a_borrowed_segment_is_pinned_at_the_version_that_its_own_pin_keeps(three, tmp_path):
    trajstore.merge(three, tmp_path / "one")
    with trajstore.open(three[0], "a") as store:
        store.delete([0, 1])
    trajstore.merge([tmp_path / "one"], tmp_path / "two")
    assert [found.version for found in pins_of(three[0])] == [2, 2]


def test_a_borrowed_segment_without_pin_is_pinned_at_the_latest_version_that_has_it(three, tmp_path):
    with trajstore.open(three[0]) as store:
        store.trajectories.save(tmp_path / "one", share="reference")
    unpin(LocalFilesystem(three[0]), pins_of(three[0])[0].uuid)
    with trajstore.open(three[0], "a") as store:
        append(store, 9)
        store.flush()
        store.delete([1])
    trajstore.merge([tmp_path / "one"], tmp_path / "two")
    assert [found.version for found in pins_of(three[0])] == [3]
    for version in (1, 2, 3):
        empty_slot(three[0], version)
    unpin(LocalFilesystem(three[0]), pins_of(three[0])[0].uuid)
    with pytest.raises(VersionExpiredError, match=r"no version any more that names segment .*share='copy'"):
        trajstore.merge([tmp_path / "one"], tmp_path / "three")
    assert not pins_of(three[0])
    assert trajstore.merge([tmp_path / "one"], tmp_path / "three", allow_unpinned=True) == 2
    assert [base.pin for base in snapshot_of(tmp_path / "three").bases] == [None]
    holds_merged(tmp_path / "three", [0, 1])


def test_a_view_that_grew_is_pinned_at_the_version_that_has_all_of_it(tmp_path):
    with trajstore.open(tmp_path / "live", "a") as store:
        append(store, 0)
        store.trajectories  # noqa: B018 - the first look commits
        append(store, 1)
        view = store.trajectories
        store.flush()
        append(store, 2)
        store.flush()
        assert view.version < store.version
        trajstore.merge([view], tmp_path / "all")
        (found,) = pins_of(tmp_path / "live")
        assert found.version == store.version
    holds_merged(tmp_path / "all", [0, 1])


def test_a_store_that_does_not_outlive_the_process_needs_none(three, tmp_path):
    with trajstore.open(three[0]) as store:
        combine([store.trajectories.source()], LocalFilesystem(str(tmp_path / "t")), share="reference", pins="none")
    assert not pins_of(three[0])
    holds(tmp_path / "t", [0, 1])


def test_what_is_replaced_is_referred_to_no_more(three, tmp_path):
    for url, count in ((three[0], 1), (three[1], 1), (three[1], 1)):
        with trajstore.open(url) as store:
            store.trajectories.save(tmp_path / "t", share="reference", replace=True)
        assert len(snapshot_of(tmp_path / "t").bases) == count
    assert [base.url for base in snapshot_of(tmp_path / "t").bases] == ["../b"]
    assert [base.url for base in snapshot_of(tmp_path / "t", 1).bases] == ["../a"]
    holds(tmp_path / "t", [2, 3])
    with trajstore.open(tmp_path / "t", version=1) as store:
        assert store.trajectories.to_pandas()["number"].tolist() == [0, 1]


def test_segments_of_a_store_and_of_a_copy_of_it_are_its_own_only_if_they_are_there(three, tmp_path):
    """A folder copied by hand has the same identity; what only one of the two has is not looked for in the other."""
    shutil.copytree(three[0], tmp_path / "twin")
    with trajstore.open(tmp_path / "twin", "a") as store:
        append(store, 7)
    with trajstore.open(tmp_path / "twin") as store, pytest.raises(TrajstoreError, match="restore it"):
        store.trajectories.save(three[0], share="reference", replace=True)
    holds(three[0], [0, 1])


# Who cannot be written


class _ReadOnly(LocalFilesystem):
    """A disk that lets nobody write."""

    def _create_file(self, path):
        raise PermissionError(13, "Permission denied", path)


def sources_on(urls, disk=LocalFilesystem):
    """Trajectories of stores; the first is on another kind of disk."""
    stores = [trajstore.open(url) for url in urls]
    sources = [store.trajectories.source() for store in stores]
    first = sources[0]
    return stores, [Source(first.selection, disk(urls[0]), first.store_uuid, first.bases), *sources[1:]]


def test_an_owner_that_cannot_be_written_is_an_error_that_names_the_ways_out(three, tmp_path):
    stores, sources = sources_on(three[::-1], _ReadOnly)
    before = [objects_of(url) for url in three]
    target = LocalFilesystem(str(tmp_path / "all"))
    with pytest.raises(ReadOnlyError, match=r"/c cannot be pinned .*share='copy'.*allow_unpinned=True"):
        combine(sources, target, share="reference")
    assert [objects_of(url) for url in three] == before, "pins of the others are gone again"
    combined = combine(sources, target, share="reference", pins="where possible")
    assert [base.pin is None for base in combined.version.snapshot.bases] == [True, False, False]
    assert [len(pins_of(url)) for url in three] == [1, 1, 0]
    holds(tmp_path / "all", [4, 5, 2, 3, 0, 1])
    for store in stores:
        store.close()


def test_a_save_that_may_be_unpinned(three, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise trajstore.StorageError(5, "no")

    monkeypatch.setattr(borrowing, "pin", refuse)
    with trajstore.open(three[0]) as store:
        with pytest.raises(ReadOnlyError):
            store.trajectories.save(tmp_path / "t", share="reference")
        store.trajectories.save(tmp_path / "t", share="reference", allow_unpinned=True)
    holds(tmp_path / "t", [0, 1])


# Who is faster


def test_a_version_that_vacuum_empties_before_it_is_pinned_is_an_error_and_leaves_no_pin(three, tmp_path, monkeypatch):
    def late(filesystem, history, version, **borrower):
        if filesystem.url == three[1]:
            empty_slot(three[1], version.number)
        return pin(filesystem, history, version, **borrower)

    monkeypatch.setattr(borrowing, "pin", late)
    with pytest.raises(VersionExpiredError, match="removed by vacuum"):
        trajstore.merge(three, tmp_path / "all")
    assert not any(pins_of(url) for url in three)
    with trajstore.open(tmp_path / "all") as store:
        assert store.version == 0


def test_a_lost_race_for_the_place_removes_the_pins(three, tmp_path):
    disk = LocalFilesystem(str(tmp_path / "all"))
    create = disk.create

    def somebody_else_first(key: str, data: bytes) -> bool:
        if key.startswith("snapshots/"):
            filled(tmp_path / "all", [8])
        return create(key, data)

    disk.create = somebody_else_first  # type: ignore[method-assign]
    stores, sources = sources_on(three)
    with pytest.raises(trajstore.StoreExistsError):
        combine(sources, disk, share="reference")
    assert not any(pins_of(url) for url in three)
    holds(tmp_path / "all", [8])
    for store in stores:
        store.close()


# What fails anywhere


def _check_sources(urls, before, *, pinned):
    """They are as they were, but for pins."""
    for url, objects in zip(urls, before, strict=True):
        found = objects_of(url)
        assert {name: data for name, data in found.items() if not name.startswith("pins/")} == objects
        pins = [name for name in found if name.startswith("pins/") and not name.endswith(".tmp")]
        assert len(pins) in pinned, pins


def _shown(url):
    """Trajectories that a reader finds; 0 if there is no store."""
    if not (Path(url) / layout.STORE_DOCUMENT).exists():
        return 0
    with trajstore.open(url) as store:
        return store.num_trajectories


@pytest.mark.parametrize("share", ["reference", pytest.param("link", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["target", "source"])
def test_a_disk_that_fails_at_any_call_leaves_sources_as_they_were_and_the_next_try_works(
    three, tmp_path, share, where
):
    before = [objects_of(url) for url in three]
    told = 0
    for at in itertools.count(step=2 if where == "target" else 1):
        target = tmp_path / f"target-{at}"
        code = DISK_FAULTS["ENOSPC"]
        failing = FaultyDisk(str(target) if where == "target" else three[0], code, at)
        stores, sources = sources_on(
            three, lambda url, disk=failing: disk if where == "source" else LocalFilesystem(url)
        )
        failed = None
        try:
            combine(sources, failing if where == "target" else LocalFilesystem(str(target)), share=share)
        except TrajstoreError as error:
            failed = error
        for store in stores:
            store.close()
        told += failed is not None
        _check_sources(three, before, pinned={1} if share == "reference" and failed is None else {0, 1})
        for url in three:
            shutil.rmtree(Path(url) / "pins", ignore_errors=True)
        if _shown(target) == 0:
            assert failed is not None
            assert trajstore.merge(three, target, share=share) == 6
        holds_merged(target, range(6))
        if not failing.fired:
            break
        for url in three:
            shutil.rmtree(Path(url) / "pins", ignore_errors=True)
        shutil.rmtree(target)
    assert told >= 3 or (where, share) == ("source", "link")


class _Stopped(BaseException):
    """What kills the process."""


class _Calls:
    """Counts the calls of a filesystem that change it, and stops before the n-th."""

    CHANGES = ("store", "create", "overwrite", "copy_from", "remove")

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0

    def watch(self, filesystem: Filesystem) -> Filesystem:
        for name in self.CHANGES:
            setattr(filesystem, name, self._counted(getattr(filesystem, name)))
        return filesystem

    def _counted(self, call):
        def counted(*args, **kwargs):
            self.count += 1
            if self.count > self.at:
                raise _Stopped
            return call(*args, **kwargs)

        return counted


@pytest.mark.parametrize("share", ["reference", "link", "copy"])
def test_a_merge_stopped_before_any_call_leaves_at_most_pins_and_the_next_run_finishes(three, tmp_path, share):
    before = [objects_of(url) for url in three]
    for at in itertools.count():
        calls = _Calls(at)
        target = tmp_path / f"target-{at}"
        stores = [trajstore.open(url) for url in three]
        sources = [
            Source(one.selection, calls.watch(LocalFilesystem(url)), one.store_uuid, one.bases)
            for url, one in zip(three, (store.trajectories.source() for store in stores), strict=True)
        ]
        stopped = False
        try:
            combine(sources, calls.watch(LocalFilesystem(str(target))), share=share)
        except _Stopped:
            stopped = True
        for store in stores:
            store.close()
        _check_sources(three, before, pinned={0, 1})
        assert _shown(target) in (0, 6)
        if _shown(target) == 0:
            assert trajstore.merge(three, target, share=share) == 6
        holds_merged(target, range(6))
        for url in three:
            shutil.rmtree(Path(url) / "pins", ignore_errors=True)
        if not stopped:
            break
    assert at >= 4


@pytest.mark.parametrize("kind", ["lost reply", "fail"])
def test_a_bucket_that_fails_for_ever_keeps_pins_only_if_the_commit_may_have_landed(three, kind, monkeypatch):
    monkeypatch.setattr(retry, "MAX_WAIT_S", 0.0)
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
    unknown = 0
    for at in itertools.count():
        stores, sources = sources_on(three)
        objects: dict = {}
        faults = Faults(kind, at, forever=True)
        try:
            combine(sources, faulty_bucket(objects, faults), share="reference")
            expected = {1}
        except trajstore.CommitOutcomeUnknownError:
            unknown += 1
            expected = {1} if any("snapshots/0" in name for name in objects) else {0, 1}
        except TrajstoreError:
            expected = {0}
        for store in stores:
            store.close()
        assert {len(pins_of(url)) for url in three} <= expected, at
        for url in three:
            shutil.rmtree(Path(url) / "pins", ignore_errors=True)
        if not faults.fired:
            break
    assert unknown or kind == "fail"


def test_a_pin_that_cannot_be_removed_is_logged(three, tmp_path, caplog, monkeypatch):
    def refuse(*args, **kwargs):
        raise trajstore.StorageError(5, "no")

    monkeypatch.setattr(borrowing, "unpin", refuse)
    disk = CountingDisk(str(tmp_path / "all"))
    monkeypatch.setattr(History, "commit", refuse)
    stores, sources = sources_on(three)
    with pytest.raises(trajstore.StorageError):
        combine(sources, disk, share="reference")
    assert sum("was not removed, and keeps version 2" in line for line in caplog.messages) == 3
    for store in stores:
        store.close()


def test_a_bucket_of_readers_and_its_borrower(three):
    """Pins work in a bucket as on a disk."""
    objects: dict = {}
    with open_on(faulty_bucket(objects, Faults()), "a") as store:
        append(store, 3)
        store.flush()
        source = store.trajectories.source()
        combine([source], LocalFilesystem(three[0]), share="reference", instead=True)
    assert sum("/pins/" in name for name in objects) == 1


def manifests_of(url):
    return sorted(path.name for path in (Path(url) / "manifests").glob("*"))


@pytest.mark.parametrize("instead", [False, True])
def test_a_pin_that_cannot_be_made_leaves_neither_pins_nor_manifests(three, tmp_path, monkeypatch, instead):
    target = tmp_path / "target"
    before = manifests_of(filled(target, [9])) if instead else []

    def fails(filesystem, *arguments, **options):
        if filesystem.url.endswith("c"):
            time.sleep(0.3)  # manifests are stored meanwhile
            raise StorageError("the disk is read-only")
        return pin(filesystem, *arguments, **options)

    monkeypatch.setattr(borrowing, "pin", fails)
    with trajstore.open(three[1]) as b, trajstore.open(three[2]) as c:
        sources = [store.trajectories.source() for store in (b, c)]
        with pytest.raises(ReadOnlyError, match="read-only"):
            combine(sources, LocalFilesystem(str(target)), share="reference", instead=instead)
    assert not any(map(pins_of, three))
    assert manifests_of(target) == before
    if instead:
        holds(target, [9])


def test_ctrl_c_while_pins_are_made_leaves_neither_pins_nor_manifests(three, tmp_path, monkeypatch):
    def interrupted(filesystem, *arguments, **options):
        made = pin(filesystem, *arguments, **options)
        if filesystem.url.endswith("b"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        return made

    monkeypatch.setattr(borrowing, "pin", interrupted)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        trajstore.merge(three, tmp_path / "all")
    assert not any(map(pins_of, three))
    assert not manifests_of(tmp_path / "all")
    monkeypatch.undo()
    trajstore.merge(three, tmp_path / "all")
    holds(tmp_path / "all", range(6))


def test_a_pin_of_which_nobody_knows_whether_it_is_durable_is_taken_back(three, tmp_path, monkeypatch):
    sync = LocalFilesystem._sync_directories

    def fails(self, folders):
        if self.root.endswith("b") and "pins" in folders:
            raise StorageError("input/output error")
        sync(self, folders)

    monkeypatch.setattr(LocalFilesystem, "_sync_directories", fails)
    with pytest.raises(ReadOnlyError, match="input/output error"):
        trajstore.merge(three, tmp_path / "all")
    assert not any(map(pins_of, three))
