"""Old versions made the latest again: what they hold, what goes on beside it, and what it needs of other stores."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import trajstore
from tests.edit.stores import HeldDisk, append, assert_holds, filled, holds, numbered
from trajstore.edit.marks import all_pins
from trajstore.edit.vacuum import LATEST_ONLY, Keep, vacuum
from trajstore.edit.versions import Restore
from trajstore.errors import CorruptionError, VersionExpiredError, VersionNotFoundError
from trajstore.format import layout
from trajstore.format.marks import Farewell
from trajstore.format.snapshot import EMPTY, Base, Snapshot
from trajstore.opening import open_on
from trajstore.schema import Column
from trajstore.storage.commit import History
from trajstore.storage.local import LocalFilesystem

SOON = Keep(versions=1, age=LATEST_ONLY.age)  # what vacuum may empty at once without being exclusive


@pytest.fixture
def url(tmp_path):
    """Four versions: trajectories 0 to 2, 3 to 5 as well, without 1 and 4, and 6."""
    place = filled(tmp_path / "store", range(6), per_commit=3)
    with trajstore.open(place, "a") as store:
        store.delete([1, 4])
        append(store, 6)
    return place


def vacuumed(url, keep=SOON):
    filesystem = LocalFilesystem(str(url))
    return vacuum(filesystem, History(filesystem), keep, dry_run=False)


@pytest.mark.parametrize(("version", "held"), [(1, [0, 1, 2]), (2, range(6)), (3, [0, 2, 3, 5]), (4, [0, 2, 3, 5, 6])])
def test_every_version_can_be_the_latest_again(url, version, held):
    with trajstore.open(url, "a") as store:
        assert store.restore(version) == 5
        assert_holds(store.trajectories, held)
        assert not store.diff(version)
        newest = store.versions().iloc[0]
        assert (newest["operation"], newest["trajectories"]) == (f"restore {version}", len(held))
    holds(url, held)
    with trajstore.open(url, version=4) as before:
        assert_holds(before.trajectories, [0, 2, 3, 5, 6])


def test_ids_are_given_once_whatever_is_restored(url):
    with trajstore.open(url, "a") as store:
        store.restore(1)
        append(store, 7)
        store.flush()
        assert store.trajectories.ids.tolist() == [0, 1, 2, 7]
        store.restore(4)
        assert store.trajectories.ids.tolist() == [0, 2, 3, 5, 6]
        store.restore(0)
        assert store.trajectories.ids.tolist() == []
        append(store, 8)
        store.flush()
        assert store.trajectories.ids.tolist() == [8]
        assert_holds(store.trajectories, [8])


def test_tags_are_restored_and_stay_where_they_are(url):
    with trajstore.open(url, "a") as store:
        store.tag("start", 1)
        assert store.restore("start") == 5
        assert_holds(store.trajectories, [0, 1, 2])
        assert store.tags()["version"].to_dict() == {"start": 1}
        with pytest.raises(VersionNotFoundError, match="no tag 'end'; its tags are 'start'"):
            store.restore("end")
        with pytest.raises(VersionNotFoundError, match="no version 9"):
            store.restore(9)
        assert store.version == 5


def test_a_tag_of_a_version_that_was_put_in_its_place_is_refused(url, tmp_path):
    filled(tmp_path / "other", range(3))
    with trajstore.open(url, "a") as store:
        store.tag("start", 1)
        shutil.copy(tmp_path / "other" / layout.snapshot_key(1), f"{url}/{layout.snapshot_key(1)}")
        with pytest.raises((VersionNotFoundError, CorruptionError), match="tag 'start'"):
            store.restore("start")
    with pytest.raises((VersionNotFoundError, CorruptionError), match="tag 'start'"):
        trajstore.open(url, version="start")


def test_what_waits_in_any_handle_is_not_lost(url):
    """This handle's goes into a version before; another one's lands on what was restored."""
    late = {"commit_interval_s": 3600.0}
    with trajstore.open(url, "a", **late) as store, trajstore.open(url, "a", **late) as other:
        append(store, 7)
        append(other, 8)
        assert store.restore(1) == 6
        assert_holds(store.trajectories, [0, 1, 2])
        holds(url, [0, 2, 3, 5, 6, 7], version=5)
        other.flush()
        assert store.refresh() == 7
        assert_holds(store.trajectories, [0, 1, 2, 8])
        append(store, 9)
    holds(url, [0, 1, 2, 8, 9])


def test_columns_and_fields_that_were_added_since_are_gone_and_can_be_added_again(url):
    more = Column(path="more", dtype="int64", presence="optional")
    reward = numbered(0)["reward"]
    with trajstore.open(url, "a", schema=[more]) as store:
        store.add_column("double", lambda t: t["reward"] * 2, columns=["reward"])
        store.append({**numbered(7), "more": np.arange(1)}, metadata={"operator": "a"})
        store.flush()
        grown = store.version
        store.restore(4)
        assert_holds(store.trajectories, [0, 2, 3, 5, 6])
        assert "double" not in store.schema
        assert "more" in store.schema, "this handle has declared it, and may append it at once"
        store.append({**numbered(14), "more": np.arange(1)}, metadata={"number": 14})
        store.flush()
        assert store.schema["more"] == more
        store.restore(4)
    with trajstore.open(url, "a") as store:
        assert {"double", "more"}.isdisjoint(c.path for c in store.schema)
        assert "operator" not in store.schema.metadata
        store.declare([Column(path="more", dtype="float64", shape=(2,), presence="optional")])
        store.append({**numbered(9), "more": np.zeros((1 + 9 % 7, 2))}, metadata={"number": 9, "operator": 3})
        store.flush()
        assert store.schema["more"].shape == (2,), "another column of this name"
        assert store.schema.metadata["operator"] == "int64"
        store.add_column("double", lambda t: t["reward"] * 3, columns=["reward"])
        assert store.trajectories[0]["double"][:].tolist() == (reward * 3).tolist()
        assert store.restore(grown) == store.version
        assert store.trajectories[0]["double"][:].tolist() == (reward * 2).tolist()
        assert store.trajectories[-1].metadata["operator"] == "a"
    with trajstore.open(url) as store:
        assert store.schema["more"] == more


def test_a_version_that_vacuum_emptied_cannot_be_restored(url):
    with trajstore.open(url, "a") as store:
        store.tag("start", 1)
        vacuumed(url)
        with pytest.raises(VersionExpiredError):
            store.restore(2)
        assert not list(LocalFilesystem(url).list_objects(layout.PINS))
        store.restore("start")
    holds(url, [0, 1, 2])


@pytest.mark.parametrize("pending", [False, True])
def test_a_vacuum_that_comes_between_leaves_what_is_being_restored(url, pending):
    disk = HeldDisk(url)
    found = []

    def after_a_vacuum(key, create):
        if not found:
            found.append(vacuumed(url))
        return create()

    with open_on(disk, "a") as store:
        if pending:
            append(store, 7)
            store.flush()
        disk.around_create = after_a_vacuum
        store.restore(1)
        assert found[0].versions == ((2, 3, 4) if pending else (2, 3))
        assert_holds(store.trajectories, [0, 1, 2])
    assert not list(LocalFilesystem(url).list_objects(layout.PINS)), "it is held no longer than it takes"
    holds(url, [0, 1, 2])
    holds(url, [0, 1, 2], version=1)


def test_a_version_that_a_vacuum_has_announced_is_left_to_it(url):
    filesystem = LocalFilesystem(url)
    note = Farewell("a" * 32, (1, 2))
    filesystem.create(layout.farewell_key(note.uuid), note.to_bytes())
    with trajstore.open(url, "a") as store:
        with pytest.raises(VersionExpiredError, match="is being removed by vacuum"):
            store.restore(1)
        assert store.restore(3) == 5
    assert not list(filesystem.list_objects(layout.PINS))
    holds(url, [0, 2, 3, 5])


# Stores that refer to others


@pytest.fixture
def borrower(tmp_path):
    """Version 1 refers to two stores; in version 2 something of its own was appended."""
    for n, name in enumerate(("runs/a", "runs/b")):
        filled(tmp_path / name, [n])
    trajstore.merge([tmp_path / "runs/a", tmp_path / "runs/b"], tmp_path / "all")
    with trajstore.open(tmp_path / "all", "a") as store:
        append(store, 2)
    return tmp_path / "all"


def bases_of(store):
    return store._current().snapshot.bases


def test_stores_that_were_moved_since_are_found_where_they_are_now(borrower, tmp_path):
    with trajstore.open(borrower, "a") as store:
        before = bases_of(store)
        shutil.move(tmp_path / "runs", tmp_path / "kept")
        store.relocate(tmp_path / "runs", tmp_path / "kept")
        store.restore(1)
        assert [base.url for base in bases_of(store)] == ["../kept/a", "../kept/b"]
        assert [(b.store_uuid, b.pin) for b in bases_of(store)] == [(b.store_uuid, b.pin) for b in before]
        assert store.trajectories.to_pandas()["number"].tolist() == [0, 1]
    with trajstore.open(borrower) as store:
        assert store.trajectories.read("action").shape[0] == store.trajectories.num_steps
    with trajstore.open(borrower, version=1) as store:  # the latest version knows where they are now
        assert store.trajectories.read("action").shape[0] == store.trajectories.num_steps


def test_pins_outlive_every_vacuum_of_both_sides_and_a_restored_version_still_has_them(borrower, tmp_path):
    owner = LocalFilesystem(str(tmp_path / "runs/a"))
    with trajstore.open(borrower, "a") as store:
        (pinned,) = all_pins(owner)
        store.delete([0])
        store.vacuum(keep_versions=2, keep_for="0s")  # what holds trajectory 0 is the version before
        assert all_pins(owner) == [pinned]
        store.restore(2)
        store.vacuum(keep_versions=1, keep_for="0s")
        assert all_pins(owner) == [pinned]
        with trajstore.open(tmp_path / "runs/a", "a") as lender:
            lender.delete([0], reclaim=True)
        assert store.trajectories.to_pandas()["number"].tolist() == [0, 1, 2]
        assert store.trajectories.read("action").shape[0] == store.trajectories.num_steps
        store.delete([0])
        store.vacuum(keep_versions=1, keep_for="0s")
        assert not all_pins(owner)


def test_only_the_same_store_under_another_url_is_taken_from_the_latest_version():
    def snapshot(version, *bases):
        return Snapshot(**{**vars(EMPTY), "version": version, "bases": bases})

    a, b, c = "a" * 32, "b" * 32, "c" * 32
    old = snapshot(3, Base("../a", a, "1" * 32), Base("../a", a, "2" * 32), Base("../b", b), Base("../c", c, "3" * 32))
    head = snapshot(7, Base("../new/a", a, "9" * 32), Base("../else/b", b), Base("../b", b), Base("../d", "d" * 32))
    found = Restore(old).apply(head, None, lambda *_: [])
    assert found.bases == (
        Base("../new/a", a, "1" * 32),
        Base("../new/a", a, "2" * 32),
        Base("../b", b),
        Base("../c", c, "3" * 32),
    )
    assert (found.version, found.next_id) == (head.version, head.next_id)
