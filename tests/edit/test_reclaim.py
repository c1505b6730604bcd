"""Giving bytes back: what goes, what stays, and what a crash in the middle leaves."""

from __future__ import annotations

import itertools
import os
import shutil
import uuid
from pathlib import Path

import fsspec
import pytest

import trajstore
from tests.edit.killed import again, kill_everywhere
from tests.edit.stores import append, assert_holds, filled, holds, numbers_in, objects_of, segments_of
from tests.support.faulty import DISK_FAULTS, FaultyDisk
from trajstore.edit.vacuum import LATEST_ONLY, vacuum
from trajstore.errors import TrajstoreError, VersionExpiredError
from trajstore.format import layout
from trajstore.opening import open_on
from trajstore.storage.commit import History
from trajstore.storage.connect import connect


@pytest.fixture(params=["disk", "memory"])
def url(request, tmp_path):
    if request.param == "disk":
        yield str(tmp_path / "store")
        return
    name = uuid.uuid4().hex
    yield f"memory://reclaim/{name}"
    fsspec.filesystem("memory").rm(f"/reclaim/{name}", recursive=True)


def listed(url):
    """Keys and sizes of all objects."""
    return {info.key: info.nbytes for info in connect(url).list_objects("")}


def segments_in(url):
    return {layout.segment_of(key) for key in listed(url)} - {None}


def reclaim(filesystem):
    """Bytes that went."""
    return vacuum(filesystem, History(filesystem), LATEST_ONLY, dry_run=False, exclusive=True).nbytes


def test_bytes_of_what_is_deleted_are_given_back(url):
    filled(url, range(9), per_commit=3)
    before = listed(url)
    with trajstore.open(url, "a") as store:
        store.delete([3, 4, 5, 7], reclaim=True)
        assert_holds(store.trajectories, [0, 1, 2, 6, 8])
        assert len(segments_in(url)) == 2, "a segment goes when nothing of it is left"
        assert store.version == 4
        assert store.versions().index.tolist() == [4]
        assert store.usage().segments == 2
        append(store, 9)
        store.flush()
    holds(url, [0, 1, 2, 6, 8, 9])
    for version in (1, 2, 3):
        with pytest.raises(VersionExpiredError):
            trajstore.open(url, version=version)
        assert listed(url)[layout.snapshot_key(version)] == 0
    with trajstore.open(url, version=4) as store:
        assert_holds(store.trajectories, [0, 1, 2, 6, 8])
    after = listed(url)
    assert sum(n for k, n in after.items() if k.startswith("segments/")) < sum(
        n for k, n in before.items() if k.startswith("segments/")
    )


def test_all_of_it_may_go_and_numbers_are_not_used_twice(url):
    filled(url, range(4))
    with trajstore.open(url, "a") as store:
        store.delete(range(4), reclaim=True)
        assert not segments_in(url)
        assert not [key for key in listed(url) if key.startswith("manifests/")]
        append(store, 4)
        store.flush()
        assert store.trajectories.ids.tolist() == [4]
        store.delete([], reclaim=True)
        assert store.version == 7
    holds(url, [4])


def test_a_window_of_the_newest_takes_bounded_room_and_is_right_throughout(tmp_path):
    """As a ring buffer does: manifests are merged on the way, and none keeps a segment that it no longer needs."""
    url = tmp_path / "store"
    with trajstore.open(url, "a") as store:
        for n in range(80):
            append(store, n)
            store.flush()
            view = store.trajectories
            if n % 3 == 2 and len(view) > 10:
                store.delete(view.ids[:-10], reclaim=True)
                assert len(segments_of(url)) == 10
                assert len(list((url / "manifests").iterdir())) <= 10
                assert numbers_in(store.trajectories) == list(range(n - 9, n + 1))
        assert_holds(store.trajectories, numbers_in(store.trajectories))
    holds(url, range(68, 80))


def test_a_segment_of_a_merged_manifest_goes_too(tmp_path):
    url = filled(tmp_path / "store", range(12))  # merged on the way
    with trajstore.open(url, "a") as store:
        assert any(entry.rows > 1 for entry in store._current().snapshot.manifests)
        store.delete(range(0, 12, 2), reclaim=True)
        assert len(segments_of(url)) == 6
        assert store.usage().segments == 6
        for n in range(12, 24):
            append(store, n)
            store.flush()
        assert_holds(store.trajectories, [*range(1, 12, 2), *range(12, 24)])
        assert store.usage().segments == 18
    holds(url, [*range(1, 12, 2), *range(12, 24)])


def test_what_others_left_behind_goes_and_what_this_handle_is_writing_stays(tmp_path):
    url = filled(tmp_path / "store", range(2))
    orphan = Path(url) / "segments" / uuid.uuid4().hex / "deep" / "down"
    orphan.mkdir(parents=True)
    (orphan / "c.0").write_bytes(b"x" * 100)
    (Path(url) / "manifests" / "orphan.parquet").write_bytes(b"y")
    with trajstore.open(url, "a") as store:
        store.delete([0], reclaim=True)
        assert len(segments_of(url)) == 1
        assert not (Path(url) / "manifests" / "orphan.parquet").exists()
    holds(url, [1])


def test_bytes_are_free_though_the_files_were_read(tmp_path):
    """A descriptor that is kept open would keep the blocks of a removed file."""
    url = filled(tmp_path / "store", range(6))
    with trajstore.open(url, "a") as store:
        assert_holds(store.trajectories, range(6))
        store.delete(range(5), reclaim=True)
        names = [os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if n.isdigit() and _is_open(n)]
        assert not [name for name in names if url in name and "(deleted)" in name]
        assert_holds(store.trajectories, [5])


def _is_open(number):
    return os.path.lexists(f"/proc/self/fd/{number}")


def test_the_return_value_is_what_the_objects_took(url):
    filled(url, range(4))
    filesystem = connect(url)
    with trajstore.open(url, "a") as store:
        store.delete([0, 1])
    before = listed(url)
    freed = reclaim(filesystem)
    after = listed(url)
    assert freed == sum(n for key, n in before.items() if key not in after) > 0
    assert reclaim(filesystem) == 0
    assert listed(url) == after
    holds(url, [2, 3])


def test_a_saved_copy_by_link_keeps_its_bytes(tmp_path):
    url = filled(tmp_path / "store", range(4))
    with trajstore.open(url, "a") as store:
        store.trajectories.save(tmp_path / "linked")
        store.delete(range(4), reclaim=True)
    holds(tmp_path / "linked", range(4))


# Failures

GONE, KEPT = [0, 1, 3], [2, 4, 5]


def check_left(url, *, done=False):
    """The latest version is whole, and every version that does not say that it is gone."""
    with trajstore.open(url) as store:
        latest, shown = store.version, numbers_in(store.trajectories)
        assert shown == KEPT if done else shown in (list(range(6)), KEPT)
        assert_holds(store.trajectories, shown)
    expired = []
    for version in range(1, latest):
        try:
            trajstore.open(url, version=version).close()
        except VersionExpiredError:
            expired.append(version)
    assert expired == list(range(1, len(expired) + 1)), "the oldest go first"
    if len(segments_of(url)) < 3:  # then nothing shows what is gone
        assert len(expired) == latest - 1
    return shown


@pytest.mark.parametrize("code", [DISK_FAULTS["EIO"], pytest.param(DISK_FAULTS["EROFS"], marks=pytest.mark.slow)])
@pytest.mark.parametrize("forever", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_disk_that_fails_at_any_system_call_loses_nothing(tmp_path, code, forever):
    old = filled(tmp_path / "old", range(6), per_commit=2)
    told = 0
    for at in itertools.count():
        url = tmp_path / f"store-{at}"
        shutil.copytree(old, url)
        disk = FaultyDisk(str(url), code, at, forever=forever)
        failed = None
        try:
            with open_on(disk, "a") as store:
                store.delete(GONE, reclaim=True)
        except TrajstoreError as error:
            failed = error
        told += failed is not None
        shown = check_left(url)
        if not disk.fired:
            assert shown == KEPT
            break
        _finish(url, shown)
        shutil.rmtree(url)
    assert told > 5


def _finish(url, shown):
    with trajstore.open(url, "a") as store:
        store.delete(GONE if shown != KEPT else [], reclaim=True)
    check_left(url, done=True)
    # Of what a crash interrupted, empty folders may be left.
    assert len({layout.segment_of(name) for name in objects_of(url)} - {None}) == 2
    assert sum(1 for name in objects_of(url) if name.startswith("manifests/")) == 2


@pytest.mark.parametrize(
    ("action", "every"),
    [("reclaim", 5), *(pytest.param(action, 1, marks=pytest.mark.slow) for action in ("reclaim", "delete"))],
)
def test_a_process_killed_anywhere_loses_nothing_and_the_next_try_works(tmp_path, action, every):
    old = filled(tmp_path / "old", range(6), per_commit=2)
    left = kill_everywhere(action, old, old, tmp_path / "killed", every=every)
    assert len(left) > (15 if action == "reclaim" else 5) / every
    seen = set()
    for url in left:
        shown = check_left(url)
        seen.add(tuple(shown))
        if shown != KEPT:
            again(action, old, url)
        check_left(url, done=True)
    if action == "reclaim":
        for url in left[-3:]:
            _finish(url, KEPT)
    assert seen == {tuple(range(6)), tuple(KEPT)}
