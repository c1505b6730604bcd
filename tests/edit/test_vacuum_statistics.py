"""Statistics that a store keeps go with the version that they are of, and no sooner."""

from __future__ import annotations

import datetime as dt

import pytest

import trajstore
from tests.edit.stores import append, filled, objects_of
from trajstore.edit.vacuum import Keep, vacuum
from trajstore.format import layout
from trajstore.storage.commit import History
from trajstore.storage.local import LocalFilesystem

VERSIONS = range(1, 5)


class AgedDisk(LocalFilesystem):
    """A disk on which everything was written long ago, but for what vacuum itself writes to read the clock."""

    def list_objects(self, prefix):
        for info in super().list_objects(prefix):
            if not info.key.startswith(layout.VACUUM):
                info = type(info)(info.key, info.nbytes, info.modified - dt.timedelta(days=30))
            yield info


@pytest.fixture
def url(tmp_path):
    """Four versions, each with statistics, the second with a tag."""
    place = tmp_path / "store"
    for number in VERSIONS:
        with trajstore.open(place, "a") as store:
            append(store, number)
            store.flush()
            store.trajectories.statistics(["reward"])
    with trajstore.open(place, "a") as store:
        store.tag("best", 2)
    assert documents(place) == {layout.statistics_key(version) for version in VERSIONS}
    return place


def documents(url):
    return {key for key in objects_of(url) if key.startswith(layout.STATISTICS)}


def vacuumed(disk, **options):
    keep = Keep(versions=1, age=dt.timedelta(0))
    return vacuum(disk, History(disk), keep, **{"dry_run": False, "progress": False, **options})


def test_those_of_emptied_versions_go_and_those_of_others_stay(url):
    before = objects_of(url)
    planned = vacuumed(AgedDisk(str(url)), dry_run=True)
    assert objects_of(url) == before
    done = vacuumed(AgedDisk(str(url)))
    assert done.versions == planned.versions == (1, 3)
    assert documents(url) == {layout.statistics_key(2), layout.statistics_key(4)}
    gone = [len(before[layout.statistics_key(version)]) for version in (1, 3)]
    assert (done.other.objects, done.other.nbytes) == (len(gone), sum(gone))
    with trajstore.open(url, version="best") as store:
        assert store.trajectories.statistics(["reward"]).trajectories == 2


def test_young_ones_stay_for_now(url):
    done = vacuumed(LocalFilesystem(str(url)))
    assert done.versions == (1, 3)
    assert documents(url) == {layout.statistics_key(version) for version in VERSIONS}
    assert vacuumed(AgedDisk(str(url))).other.objects == 2
    assert documents(url) == {layout.statistics_key(2), layout.statistics_key(4)}


def test_a_store_that_reads_only_leaves_none(tmp_path):
    place = filled(tmp_path / "store", range(3))
    with trajstore.open(place) as store:
        store.trajectories.statistics(["reward"])
    assert not documents(place)
