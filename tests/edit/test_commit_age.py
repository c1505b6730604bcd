"""Commits that come too late: by which clock, since when, and what the user is told."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest

import trajstore
from tests.edit.histories import Clock, append, delete, history_on, segment_entry, stored
from tests.edit.memory import NOON, MemoryDisk
from trajstore.errors import CommitTooOldError
from trajstore.opening import open_on
from trajstore.storage.age import GRACE, MOST_AGE, Moment, check_age, since_boot_s
from trajstore.storage.commit import EMPTY_VERSION, History
from trajstore.storage.local import LocalFilesystem
from trajstore.storage.tiers import merge_from
from trajstore.write.batch import WriteOptions

HOUR = dt.timedelta(hours=1)


def test_the_larger_of_two_clocks_counts():
    begun = Moment(NOON, 100.0)
    assert Moment(NOON + HOUR, 160.0) - begun == HOUR, "the machine slept, on a system without such a clock"
    assert Moment(NOON - HOUR, 160.0) - begun == dt.timedelta(seconds=60), "somebody set the clock back"
    assert MOST_AGE == GRACE / 2


def test_the_clock_that_nobody_sets_goes_forward(monkeypatch):
    assert since_boot_s() <= since_boot_s()
    monkeypatch.delattr("time.CLOCK_BOOTTIME", raising=False)
    assert since_boot_s() <= since_boot_s()


def test_half_the_grace_is_the_limit():
    check_age(MOST_AGE, where="x")
    with pytest.raises(
        CommitTooOldError, match=r"to x began to be stored 3\.542 days ago, expected at most 3\.5: .*again"
    ):
        check_age(MOST_AGE + HOUR, where="x")


def test_a_commit_is_refused_by_the_age_of_what_it_stores_and_before_each_try():
    disk, clock = MemoryDisk(), Clock()
    history = history_on(disk, clock)
    since = history.moment()
    clock.wait(days=3)
    head = append(disk, history, EMPTY_VERSION, since=since)
    change = stored(disk, [segment_entry("a" * 32)])
    append(disk, history, head)

    def sleep_before_losing(name, key):
        if (name, key) == ("create", "snapshots/00000000000000000002.json"):
            clock.wait(days=1)

    disk.before = sleep_before_losing
    with pytest.raises(CommitTooOldError, match="4 days"):
        history.commit(change, head, since=since)
    assert history.latest(0).number == 2


def test_what_stores_nothing_is_never_too_old():
    disk, clock = MemoryDisk(), Clock()
    history = history_on(disk, clock)
    head = append(disk, history, EMPTY_VERSION)
    disk.before = lambda name, key: clock.wait(days=1)
    assert delete(history, head, [0]).number == 2


def test_a_manifest_that_is_merged_on_the_way_counts():
    disk, clock = MemoryDisk(), Clock()
    history, head = history_on(disk, clock), EMPTY_VERSION
    while merge_from([entry.rows for entry in head.snapshot.manifests]) is None:
        head = append(disk, history, head)
    change = stored(disk, [segment_entry("a" * 32)])
    disk.before = lambda name, key: clock.wait(days=4) if (name, key[:10]) == ("store", "manifests/") else None
    with pytest.raises(CommitTooOldError):
        history.commit(change, head)


class _Writing:
    """A store on a disk, with a clock."""

    def __init__(self, folder, **options):
        self.clock = Clock()
        disk = LocalFilesystem(str(folder))
        disk.stream_threshold_bytes = 512
        history = History(disk, now=self.clock, since_boot_s=lambda: self.clock.boot_s)
        self.store = open_on(disk, "a", history=history, options=WriteOptions(**options))


def test_what_waits_in_memory_has_no_age(tmp_path):
    """Nothing of it is stored yet, so nobody can have removed it."""
    one = _Writing(tmp_path / "s")
    one.store.append({"a": np.arange(3)})
    one.clock.wait(days=20)
    one.store.flush()
    one.store.close()
    with trajstore.open(tmp_path / "s") as store:
        assert len(store.trajectories) == 1


def test_what_was_streamed_for_too_long_is_refused_and_the_next_goes_through(tmp_path):
    one = _Writing(tmp_path / "s", write_buffer_bytes=1 << 16, spill_bytes=4096)
    rows = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    episode = one.store.begin()
    for row in rows:  # some of it is on its way to the disk then
        for _ in range(64):
            episode.add(image=row)
    builders = one.store._writer._backlog.streaming
    assert builders
    deadline = since_boot_s() + 60
    while not builders[0].is_streaming and since_boot_s() < deadline:
        episode.add(image=rows[0])
    one.clock.wait(days=4)
    episode.end()
    with pytest.raises(CommitTooOldError, match="1 trajectories appended since the last commit are not in the store"):
        one.store.flush()
    one.store.append({"image": rows})
    one.store.close()
    with trajstore.open(tmp_path / "s") as store:
        assert store.trajectories.lengths.tolist() == [64]
