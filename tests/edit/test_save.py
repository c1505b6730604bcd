"""Saving a view as a store: what it holds, what it shares, and what is left where it fails."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest

import trajstore
from tests.edit.killed import again, kill_everywhere
from tests.edit.stores import CountingDisk, append, assert_holds, filled, holds, numbers_in, objects_of, segments_of
from tests.support.faulty import DISK_FAULTS, Faults, FaultyDisk, faulty_bucket
from tests.support.rare import also_slow, diagonal
from trajstore.edit.combine import combine
from trajstore.edit.lineage import LINEAGE
from trajstore.errors import (
    ClosedError,
    MissingObjectError,
    SchemaConflictError,
    SelectionError,
    StoreExistsError,
    TrajstoreError,
)
from trajstore.opening import open_on
from trajstore.storage import retry
from trajstore.storage.local import LocalFilesystem

SHARES = ("link", "copy", "reference")


@pytest.fixture
def source(tmp_path):
    """Ten trajectories in four segments, two of them deleted."""
    url = filled(tmp_path / "source", range(10), per_commit=3)
    with trajstore.open(url, "a") as store:
        store.delete([4, 7])
    return url


HELD = [0, 1, 2, 3, 5, 6, 8, 9]


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


def choose(view):
    return {
        "all": view,
        "first": view.first(2),
        "none": view.first(0),
        "filtered": view.filter("task == 'task-1'"),
        "backwards": view[::-1],
        "some": view.take([5, 0, 3]),
    }


@pytest.mark.parametrize(
    ("share", "which"), diagonal(SHARES, ["all", "first", "none", "filtered", "backwards", "some"])
)
def test_a_saved_view_is_a_store_of_its_trajectories(source, target, share, which):
    with trajstore.open(source) as store:
        view = choose(store.trajectories)[which]
        numbers = numbers_in(view)
        before = objects_of(source)
        assert view.save(target, share=share) == 1
        added = objects_of(source).items() - before.items()
        assert objects_of(source).items() >= before.items()
        assert [name.split("/")[0] for name, _ in added] == ["pins"] * (share == "reference" and len(view) > 0)
        frame = view.to_pandas()
    holds(target, numbers)
    with trajstore.open(target) as saved:
        assert saved.uuid != store.uuid
        assert saved.schema == view.schema.with_metadata(LINEAGE)
        assert saved.trajectories.ids.tolist() == list(range(len(numbers)))
        found = saved.trajectories.to_pandas()
        assert found.pop("source_id").tolist() == frame.index.tolist()
        assert found.pop("source_store").tolist() == [store.uuid] * len(frame)
        assert found.reset_index(drop=True).equals(frame.reset_index(drop=True)), "uuid, times, return and fields"
        assert saved.versions()[["operation", "trajectories"]].to_numpy().tolist() == [["save", len(numbers)]]
        assert saved.trajectories.num_steps == view.num_steps
    with trajstore.open(target, "a") as saved:  # it goes on
        append(saved, 20)
        if numbers:
            saved.delete([0])
    holds(target, [*numbers[1:], 20])


def test_where_trajectories_came_from_stays_when_they_are_saved_again_and_may_be_left_out(source, tmp_path):
    with trajstore.open(source) as store:
        store.trajectories.last(3).save(tmp_path / "once")
        store.trajectories.save(tmp_path / "without", lineage=False)
        origin = store.uuid
    with trajstore.open(tmp_path / "once", "a") as once:
        append(once, 20)
        once.flush()
        once.trajectories[::-1].save(tmp_path / "twice")
        own = once.uuid
    with trajstore.open(tmp_path / "twice") as twice, trajstore.open(tmp_path / "without") as without:
        frame = twice.trajectories.to_pandas()
        assert frame["source_store"].tolist() == [own, origin, origin, origin]
        assert frame["source_id"].tolist() == [3, 9, 8, 6]
        assert not LINEAGE.keys() & without.schema.metadata.keys()


def test_a_field_of_the_name_for_lineage_is_refused_unless_lineage_is_left_out(tmp_path, target):
    with trajstore.open(tmp_path / "own", "a") as store:
        store.append({"reward": np.zeros(2)}, source_id="episode 7")
        store.flush()
        with pytest.raises(SchemaConflictError, match=r"a metadata field 'source_id' of type string.*lineage=False"):
            store.trajectories.save(target)
        assert not target.exists()
        store.trajectories.save(target, lineage=False)


def test_a_link_shares_bytes_on_the_disk_a_copy_none_and_a_reference_has_none(source, tmp_path):
    with trajstore.open(source) as store:
        view = store.trajectories
        for share in SHARES:
            view.save(tmp_path / share, share=share)
    names = [n for n in objects_of(source) if n.startswith("segments/")]
    assert len(names) >= 8
    inodes = {share: {name: (tmp_path / share / name).stat().st_ino for name in names} for share in ("link", "copy")}
    origin = {name: (Path(source) / name).stat().st_ino for name in names}
    assert inodes["link"] == origin
    assert not set(inodes["copy"].values()) & set(origin.values())
    assert segments_of(tmp_path / "reference") == set()
    shutil.rmtree(source)
    for share in ("link", "copy"):
        holds(tmp_path / share, HELD)


def test_only_the_segments_that_are_needed_come_along(source, target):
    with trajstore.open(source) as store:
        store.trajectories.filter("number < 3").save(target, share="copy")
        assert len(segments_of(target)) == 1
        assert segments_of(target) < segments_of(source)


def test_earlier_versions_and_readers_of_any_mode_can_be_saved(source, tmp_path):
    with trajstore.open(source, version=2) as store:
        store.trajectories.save(tmp_path / "early")
    holds(tmp_path / "early", range(6))
    with trajstore.open(source, "a") as store:
        append(store, 30)
        store.trajectories  # noqa: B018 - the first look commits
        append(store, 31)
        append(store, 32)
        with pytest.raises(SelectionError, match=r"2 trajectories of .* are not yet committed: flush"):
            store.trajectories.save(tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        store.flush()
        store.trajectories.save(tmp_path / "late")
    holds(tmp_path / "late", [*HELD, 30, 31, 32])


@pytest.mark.parametrize("more", [0, 1, 1000])
def test_a_view_of_what_is_committed_later_can_be_saved(tmp_path, more):
    with trajstore.open(filled(tmp_path / "store", range(2)), "a") as store:
        assert len(store.trajectories) == 2
        for number in (2, 3):
            append(store, number)
        view = store.trajectories
        assert view.ids.tolist() == [0, 1, -1, -1]
        for _ in range(more):  # however much is appended in between
            append(store, 4)
        store.flush()
        assert view.ids.tolist() == [0, 1, 2, 3]
        view.save(tmp_path / "saved")
    holds(tmp_path / "saved", range(4))


@pytest.mark.parametrize("share", SHARES)
def test_what_was_appended_and_committed_under_a_view_can_be_saved(tmp_path, share):
    with trajstore.open(tmp_path / "live", "a") as store:
        append(store, 0)
        assert_holds(store.trajectories, [0])
        append(store, 1)
        view = store.trajectories
        store.flush()
        view.save(tmp_path / "target", share=share)
    holds(tmp_path / "target", [0, 1])


def test_a_store_that_is_there_is_left_alone_unless_it_is_to_be_replaced(source, target):
    filled(target, [40, 41])
    before = objects_of(target)
    with trajstore.open(source) as store:
        for share in SHARES:
            with pytest.raises(StoreExistsError, match="already at"):
                store.trajectories.save(target, share=share)
        with pytest.raises(StoreExistsError):
            store.trajectories.save(source)
        with pytest.raises(SelectionError, match="expected 'link', 'copy' or 'reference'"):
            store.trajectories.save(target, share="move", replace=True)  # type: ignore[arg-type]
        assert objects_of(target) == before
        view = store.trajectories
        for share, version in zip(SHARES, (3, 4, 5), strict=True):
            assert view.save(target, share=share, replace=True) == version
            holds(target, HELD)
            assert set(before) <= set(objects_of(target))
    with pytest.raises(ClosedError):
        view.save(target, replace=True)
    with trajstore.open(target, version=2) as saved:
        assert_holds(saved.trajectories, [40, 41])
    with trajstore.open(target) as saved:
        assert saved.trajectories.ids.tolist() == list(range(18, 26)), "no number is given twice"


def test_saving_again_copies_only_what_is_new(source, target):
    with trajstore.open(source, "a") as store:
        store.trajectories.first(4).save(target, share="copy")
        first = objects_of(target)
        append(store, 50)
        store.flush()
        combined = combine(
            [store.trajectories.source()], LocalFilesystem(str(target)), share="copy", instead=True, operation="save"
        )
        manifest = sum(len(d) for n, d in objects_of(target).items() if n.startswith("manifests/") and n not in first)
        new = sum(len(d) for n, d in objects_of(target).items() if n.startswith("segments/") and n not in first)
        assert combined.written_bytes == manifest + new
        assert 0 < new < sum(len(d) for n, d in first.items() if n.startswith("segments/")) * 3
        again = combine([store.trajectories.source()], LocalFilesystem(str(target)), share="copy", instead=True)
        assert again.written_bytes < 2 * manifest
    holds(target, [*HELD, 50])


def test_a_store_is_replaced_by_a_selection_of_itself(source):
    with trajstore.open(source, "a") as store:
        view = store.trajectories.filter("number % 2 == 0")[::-1]
        before = segments_of(source)
        for share in SHARES:
            view.save(source, share=share, replace=True)
            assert segments_of(source) == before
            holds(source, [8, 6, 2, 0])
        assert store.refresh() == 8
        assert_holds(store.trajectories, [8, 6, 2, 0])
        assert store._head.snapshot.bases == () == store._current().snapshot.bases


def test_a_trajectory_taken_twice_is_there_twice(source, target):
    with trajstore.open(source) as store:
        store.trajectories.take([1, 1, 0]).save(target)
    holds(target, [1, 1, 0])
    with trajstore.open(target, "a") as saved:
        saved.delete([0])
        assert_holds(saved.trajectories, [1, 0])


def test_a_replaced_store_may_have_other_columns(source, target):
    with trajstore.open(target, "a") as store:
        store.append({"action": np.arange(3.0)}, number="other type")
        store.flush()
        view = store.trajectories
        with trajstore.open(source) as other:
            other.trajectories.save(target, replace=True)
        store.refresh()
        assert_holds(store.trajectories, HELD)
        assert view.gather([0], [2])["action"].tolist() == [2.0]
        append(store, 60)
        assert_holds(store.trajectories, [*HELD, 60])


def test_a_second_save_of_two_to_one_place_is_refused(source, target, tmp_path):
    """Both found the place empty; who comes second in the end says so, and what the first saved is as it was."""
    disk = LocalFilesystem(str(target))
    with trajstore.open(source) as store:
        source_of = store.trajectories.first(2).source()
        create = disk.create

        def somebody_else_first(key: str, data: bytes) -> bool:
            if key.startswith("snapshots/") and key.endswith("1.json"):
                store.trajectories.first(1).save(target)  # takes the store without a version that it finds
            return create(key, data)

        disk.create = somebody_else_first  # type: ignore[method-assign]
        with pytest.raises(StoreExistsError, match="another writer"):
            combine([source_of], disk)
    holds(target, [0])


def test_a_large_view_is_saved_in_several_manifests(source, target, monkeypatch):
    monkeypatch.setattr("trajstore.edit.combine.MAX_MERGED_ROWS", 3)
    with trajstore.open(source) as store:
        store.trajectories.save(target)
    with trajstore.open(target) as saved:
        assert [entry.rows for entry in saved._head.snapshot.manifests] == [3, 3, 2]
    holds(target, HELD)


def test_progress_is_drawn_on_standard_error_only_if_asked_for(source, tmp_path, capsys):
    with trajstore.open(source) as store:
        store.trajectories.save(tmp_path / "quiet")
        assert capsys.readouterr() == ("", "")
        store.trajectories.save(tmp_path / "told", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "copying" in err


def test_between_filesystems_bytes_are_copied(source, tmp_path):
    there = f"memory://saves/{uuid.uuid4().hex}"
    with trajstore.open(source) as store:
        store.trajectories.save(there)
        numbers = numbers_in(store.trajectories)
    holds(there, numbers)
    with trajstore.open(there) as store:
        store.trajectories.save(tmp_path / "back")
        store.trajectories.save(f"{there}-beside")  # copied by the server
    holds(tmp_path / "back", numbers)
    holds(f"{there}-beside", numbers)
    fsspec.filesystem("memory").rm("/saves", recursive=True)
    holds(tmp_path / "back", numbers)


def test_on_a_disk_without_links_bytes_are_copied(source, target, monkeypatch):
    def no_links(self, origin, name):
        if "/segments/" in name:
            raise OSError(errno.EXDEV, "another disk")
        os.link(origin, name)

    monkeypatch.setattr(LocalFilesystem, "_link", no_links)
    with trajstore.open(source) as store:
        store.trajectories.save(target)
    shutil.rmtree(source)
    holds(target, HELD)


# Failures


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("replace", [False, True])
def test_a_segment_that_is_missing_is_named_and_nothing_is_committed(source, target, share, replace):
    if replace:
        filled(target, [40])
    before = objects_of(target)
    with trajstore.open(source) as store:
        shutil.rmtree(Path(source) / "segments" / sorted(segments_of(source))[0])
        with pytest.raises(MissingObjectError, match=rf"segments/.* in {source} .*restore it"):
            store.trajectories.save(target, share=share, replace=replace)
    assert objects_of(target) == before


def test_a_view_whose_bytes_were_reclaimed_cannot_replace_its_store(source):
    with trajstore.open(source, "a") as store:
        view = store.trajectories
        store.delete([0, 1, 2], reclaim=True)
        with pytest.raises(MissingObjectError, match="restore it"):
            view.save(source, replace=True)
    holds(source, HELD[3:])


@pytest.fixture
def small(tmp_path):
    """Two trajectories in one segment."""
    return filled(tmp_path / "small", [0, 1], per_commit=2)


def _saves(source: str, disk: LocalFilesystem, share: str, *, instead: bool) -> None:
    with trajstore.open(source) as store:
        combine([store.trajectories.source()], disk, share=share, instead=instead, operation="save")


@pytest.mark.parametrize("code", [DISK_FAULTS["ENOSPC"], pytest.param(DISK_FAULTS["EIO"], marks=pytest.mark.slow)])
@pytest.mark.parametrize("share", ["copy", "reference", pytest.param("link", marks=pytest.mark.slow)])
@pytest.mark.parametrize("instead", [False, True])
def test_a_disk_that_fails_at_any_system_call_leaves_the_target_and_the_next_try_works(
    small, tmp_path, share, instead, code
):
    old = filled(tmp_path / "old", [40, 41]) if instead else None
    told = 0
    every = 1 if code == DISK_FAULTS["EIO"] else 3
    for at in itertools.count(step=every):
        target = tmp_path / f"target-{at}"
        if old is not None:
            shutil.copytree(old, target)
        disk = FaultyDisk(str(target), code, at)
        failed = None
        try:
            _saves(small, disk, share, instead=instead)
        except TrajstoreError as error:
            failed = error
        disk.close()
        told += failed is not None
        _check_left(target, [40, 41] if instead else [], [0, 1], done=failed is None)
        if not disk.fired:
            break
        if _shown(target) != [0, 1]:
            _saves(small, LocalFilesystem(str(target)), share, instead=instead)
        assert _shown(target) == [0, 1]
        shutil.rmtree(target)
    assert told >= 3
    holds(small, [0, 1])


def _check_left(target, before, after, *, done, **options):
    """What was there, or what was to come, and nothing else; every bit of it."""
    shown = _shown(target, **options)
    assert shown == after if done else shown in (before or None, before, after), shown
    if shown is not None:
        holds(target, shown, **options)


def _shown(target, **options):
    """What a reader finds: None if there is no store."""
    if not (Path(target) / "trajstore.json").exists():
        return None
    with trajstore.open(target, **options) as store:
        return numbers_in(store.trajectories)


@pytest.mark.parametrize(
    ("kind", "instead"),
    also_slow(
        itertools.product(["lost reply", "cut", "fail", "refuse", "late", "409"], [False, True]),
        [("lost reply", True), ("cut", False)],
    ),
)
def test_a_bucket_that_fails_for_ever_from_any_request_on_is_left_as_it_was(small, kind, instead, monkeypatch):
    monkeypatch.setattr(retry, "MAX_WAIT_S", 0.0)
    monkeypatch.setattr(retry, "ATTEMPTS", 2)
    origin: dict = {}
    if instead:
        with open_on(faulty_bucket(origin, Faults()), "a") as store:
            append(store, 40)
    told = 0
    for at in itertools.count():
        objects = dict(origin)
        faults = Faults(kind, at, forever=True)
        failed = None
        try:
            _saves(small, faulty_bucket(objects, faults), "copy", instead=instead)
        except TrajstoreError as error:
            failed = error
        told += failed is not None
        healthy = faulty_bucket(objects, Faults())
        found = None
        if any(name.endswith("trajstore.json") for name in objects):
            with open_on(healthy, "r") as store:
                found = numbers_in(store.trajectories)
        assert (
            found == [0, 1]
            if failed is None
            else found in ([40] if instead else None, [] if not instead else [40], [0, 1])
        )
        if not faults.fired:
            break
        if found == [0, 1] and not instead:  # the request whose answer was lost had landed
            with pytest.raises(StoreExistsError):
                _saves(small, healthy, "copy", instead=instead)
        else:
            _saves(small, healthy, "copy", instead=instead)
        with open_on(healthy, "r") as store:
            assert_holds(store.trajectories, [0, 1])
    assert told >= 3


@pytest.mark.parametrize(
    ("action", "every"),
    [
        ("save by link", 7),
        *(
            pytest.param(f"{how} by {share}", 1, marks=pytest.mark.slow)
            for how in ("save", "replace")
            for share in SHARES
        ),
    ],
)
def test_a_process_killed_anywhere_in_a_save_leaves_the_target_and_the_next_try_works(small, tmp_path, action, every):
    before = [40, 41] if action.startswith("replace") else []
    old = filled(tmp_path / "old", before) if before else None
    left = kill_everywhere(action, small, old, tmp_path / "killed", every=every)
    assert len(left) > 10 / every
    trusted = {"bases": {small: None}}  # they are not in one folder
    for target in left:
        _check_left(target, before, [0, 1], done=False, **trusted)
        if _shown(target, **trusted) != [0, 1]:
            again(action, small, target)
        assert _shown(target, **trusted) == [0, 1]
    holds(left[0], [0, 1], **trusted)
    holds(left[-1], [0, 1], **trusted)
    holds(small, [0, 1])


def test_names_that_an_earlier_try_left_are_made_durable_by_the_next(source, target):
    """It died before it could sync its folders: the next try finds the files there, and must not take that for granted."""
    synced = []

    class Noting(CountingDisk):
        def _fsync_directory(self, path):
            synced.append(os.path.relpath(path, self.root))
            super()._fsync_directory(path)

    with trajstore.open(source) as store:
        view = store.trajectories
        for name in objects_of(source):
            if name.startswith("segments/"):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(Path(source) / name, target / name)
        combine([view.source()], Noting(str(target)), share="copy")
    folders = {str(Path(n).parent) for n in objects_of(target) if n.startswith("segments/")}
    assert folders <= set(synced)
    assert {"segments", "."} <= set(synced)
    holds(target, HELD)
