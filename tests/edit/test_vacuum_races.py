"""Vacuum: whoever works beside it, and wherever it is killed."""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import uuid
from pathlib import Path

import pytest

import trajstore
from tests.edit.histories import (
    ONE,
    Clock,
    assert_whole,
    history_on,
    old_store,
    run,
    segment_entry,
    standing,
    stored,
)
from tests.edit.memory import MemoryDisk
from tests.edit.stepped import draw_some, enumerate_all
from tests.edit.stores import append, assert_holds, objects_of
from tests.support.rare import also_slow
from trajstore.edit import vacuum as module
from trajstore.edit.marks import farewells, held, pin, tag
from trajstore.edit.vacuum import Keep, vacuum
from trajstore.errors import (
    CommitError,
    VersionExpiredError,
)
from trajstore.format import layout
from trajstore.storage.age import GRACE
from trajstore.storage.changes import Append
from trajstore.storage.commit import History
from trajstore.storage.local import LocalFilesystem

# Whoever works beside it


NOTICED = {("list", "pins"), ("list", "tags"), ("list", "vacuum"), ("list", "segments")}
NOTICED |= {("read", layout.snapshot_key(1)), ("pause", "before the days"), ("pause", "after the days")}
CHANGES = {"create", "overwrite", "remove"}


class World:
    """A store of two versions, the first of which is about to go, and a clock."""

    def __init__(self, template):
        self.objects = dict(template.objects)
        self.clock = Clock(template.time)
        self.made = None

    def disk(self, before=lambda name, key: None):
        """A handle; only calls that others can notice, or that notice others, are steps, and removals are one."""
        removed = []

        def step(name, key):
            noticed = (name, key) in NOTICED or (name in CHANGES and not key.endswith("LATEST"))
            if name == "remove" and key.startswith(("manifests/", "segments/")):
                removed.append(key)
                noticed = len(removed) == 1
            if noticed:
                before(name, key)

        return MemoryDisk(self.objects, before=step, clock=self.clock)

    def vacuum(self, before):
        """Its steps, but for those that look at nothing that another party of these tests changes."""
        begun = []

        def step(name, key):
            if (name, key) == ("list", "segments"):
                begun.append(key)
            looks = name == "list" and (key == "tags" or key == "vacuum" or (begun and key != "segments"))
            if not looks and name != "read":
                before(name, key)

        disk = self.disk(step)
        vacuum(disk, history_on(disk, self.clock), ONE, dry_run=False, start=2, now=self.clock, progress=False)

    def assert_clean(self):
        assert_whole(self.disk())
        run(self.disk(), self.clock)
        assert_whole(self.disk())


@pytest.fixture(scope="module")
def template():
    disk, clock, _ = old_store(2)
    disk.time = clock.time
    return disk


def first_version(world):
    """As who opened the store earlier has it."""
    return history_on(world.disk(), world.clock).load(1)


def test_every_interleaving_of_a_borrower_and_vacuum(template):
    """Either the borrower is told that it came too late, or all that it refers to is there."""
    outcomes = set()

    def borrow(world, before):
        version = first_version(world)  # long before
        disk = world.disk(before)
        world.made = pin(disk, history_on(disk, world.clock), version, borrower_uuid="b" * 32, borrower_url="/other")

    def check(world, borrower, vacuuming):
        assert vacuuming.error is None
        outcomes.add((type(borrower.error), 1 in standing(world.disk())))
        if borrower.error is None:
            assert world.made.version in standing(world.disk())
        else:
            assert isinstance(borrower.error, VersionExpiredError)
            assert not [key for key in world.objects if key.startswith("pins/")]
        assert_whole(world.disk())

    count = enumerate_all(lambda: World(template), borrow, World.vacuum, check)
    assert count > 100
    assert {(type(None), True), (VersionExpiredError, False)} <= outcomes


def test_interleavings_of_a_tag_that_moves_and_vacuum(template):
    def make():
        world = World(template)
        history = history_on(world.disk(), world.clock)
        tag(world.disk(), history, "best", history.load(2))
        return world

    told = set()

    def move(world, before):
        disk = world.disk(before)
        tag(disk, history_on(disk, world.clock), "best", first_version(world), move=True)

    def check(world, mover, vacuuming):
        assert vacuuming.error is None
        told.add(type(mover.error))
        found = b'"version":1' in world.objects[layout.tag_key("best")][0]
        assert found == (mover.error is None)
        assert not found or 1 in standing(world.disk())
        assert_whole(world.disk())

    draw_some(make, move, World.vacuum, check, count=200)
    assert told == {type(None), VersionExpiredError}


def test_interleavings_of_a_restored_version_and_vacuum(template):
    """It names what an old version names: it holds that one until it is committed."""
    told = set()

    def restore(world, before):
        old = first_version(world)
        disk = world.disk(before)
        history = history_on(disk, world.clock)
        with held(disk, history, old):
            change = Append(old.snapshot.schema, old.snapshot.manifests, 0, instead=True)
            world.made = history.commit(change, history_on(world.disk(), world.clock).load(2))

    def check(world, restoring, vacuuming):
        assert vacuuming.error is None
        told.add(type(restoring.error))
        assert_whole(world.disk())
        if restoring.error is None:
            assert world.made.number in standing(world.disk())

    draw_some(lambda: World(template), restore, World.vacuum, check, count=200)
    assert told == {type(None), VersionExpiredError}


@pytest.mark.parametrize("days", also_slow([1, 3.4, 3.6, 6, 7.1, 30], [3.4, 3.6, 7.1]))
def test_every_interleaving_of_a_writer_that_is_paused_and_vacuum(template, days):
    """The writer stores, sleeps for days, and commits; the vacuum comes at any moment of that."""
    told = set()

    def write(world, before):
        disk = world.disk(before)
        history = history_on(disk, world.clock)
        head = history_on(world.disk(), world.clock).load(2)
        since = history.moment()
        change = stored(disk, [segment_entry(uuid.uuid4().hex)])
        before("pause", "before the days")
        world.clock.wait(days=days)
        before("pause", "after the days")
        world.made = history.commit(change, head, since=since)

    def check(world, writer, vacuuming):
        assert vacuuming.error is None
        told.add(type(writer.error))
        if writer.error is None:
            assert world.made.number in standing(world.disk())
        else:
            assert isinstance(writer.error, CommitError)
        assert_whole(world.disk())

    enumerate_all(lambda: World(template), write, World.vacuum, check)
    assert (type(None) in told) == (days < GRACE.days / 2)


def test_a_writer_that_is_paused_between_its_check_and_its_creation_loses_to_a_vacuum():
    disk, clock, head = old_store(2)
    history = history_on(disk, clock)
    since = history.moment()
    change = stored(disk, [segment_entry("a" * 32)])
    clock.wait(days=3)
    woken = []

    def pause(name, key):
        if name == "create" and key == layout.snapshot_key(3) and not woken:
            woken.append(True)
            clock.wait(days=20)
            assert run(disk, clock).segments.objects == 2, "its segment, and that of the version that went"

    disk.before = pause
    with pytest.raises(CommitError, match=r"began to be stored 23 days ago, expected at most 3\.5"):
        history.commit(change, head, since=since)
    disk.before = lambda name, key: None
    assert_whole(disk)


def test_of_two_vacuums_at_any_time_none_breaks_anything(template):
    """The later one ends the earlier, if that had not decided yet."""
    told = set()

    def tagged():
        world = World(template)
        tag(world.disk(), history_on(world.disk(), world.clock), "kept", history_on(world.disk(), world.clock).load(2))
        return world

    def check(world, one, two):
        for party in (one, two):
            told.add(type(party.error))
            assert isinstance(party.error, CommitError | None), repr(party.error)
        assert_whole(world.disk())
        assert 2 in standing(world.disk())
        world.assert_clean()
        assert not [f for f in farewells(world.disk()).values() if f.versions]

    draw_some(tagged, World.vacuum, World.vacuum, check, count=200)
    assert told == {type(None), CommitError}


# Killed


class Killed(BaseException):
    """Nothing after it is done, not even what tidies up."""


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_killed_at_any_call_it_loses_nothing_and_the_next_one_finishes(exclusive, beside):
    """With ``beside``, a version is tagged by somebody else right before that call."""
    if exclusive and beside:
        pytest.skip("exclusive: nobody else is there")
    finished = None
    for at in itertools.count():
        disk, clock, _ = old_store(5)
        history = history_on(disk, clock)
        tag(disk, history, "first", history.load(1))
        fourth = history.load(4)
        calls, dead, tagged = [], [], []

        def before(name, key, *, at=at, calls=calls, dead=dead, tagged=tagged, disk=disk, fourth=fourth, clock=clock):
            calls.append((name, key))
            if len(calls) > at or dead:
                if beside and not dead:
                    other = MemoryDisk(disk.objects, clock=clock)
                    with contextlib.suppress(VersionExpiredError):
                        tagged.append(tag(other, history_on(other, clock), "late", fourth))
                dead.append(True)
                raise Killed

        disk.before = before
        with contextlib.suppress(Killed):
            run(disk, clock, exclusive=exclusive)
        disk.before = lambda name, key: None
        kept = {1} | ({4} if tagged else set())
        shown = standing(disk)[5]
        assert kept <= standing(disk).keys()
        assert_whole(disk)
        run(disk, clock, exclusive=exclusive)
        assert kept <= standing(disk).keys()
        assert_whole(disk)
        run(disk, clock, exclusive=exclusive)
        assert standing(disk)[max(standing(disk))] == shown, "its own versions hold what the latest did"
        named = {key for keys in standing(disk).values() for key in keys}
        left = {key for key in disk.objects if key.startswith(("manifests/", "segments/"))}
        assert left == named, "nothing stays behind"
        if not dead:
            finished = at
            break
    assert finished > (10 if exclusive else 20)


class DyingDisk(LocalFilesystem):
    """Its process is gone from the n-th call on."""

    def __init__(self, root, at):
        super().__init__(root)
        self.left = at

    def _tick(self):
        self.left -= 1
        if self.left < 0:
            raise Killed

    def create(self, key, data):
        self._tick()
        return super().create(key, data)

    def overwrite(self, key, data, *, durable=False):
        self._tick()
        super().overwrite(key, data, durable=durable)

    def list_objects(self, prefix):
        self._tick()
        return super().list_objects(prefix)

    def _unlink(self, path):
        if not path.endswith(".tmp"):
            self._tick()
        super()._unlink(path)


def test_killed_on_a_disk_every_kept_version_reads_back_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GRACE", dt.timedelta(0))  # all of it is old at once
    keep = Keep(versions=2, age=dt.timedelta(0), grace=dt.timedelta(microseconds=1))
    for at in itertools.count(0, 3):
        url = tmp_path / str(at)
        with trajstore.open(url, "a") as store:
            for n in range(5):
                append(store, n)
                store.flush()
                store.delete([n - 1] if n else [])
        disk = LocalFilesystem(str(url))
        history = History(disk)
        tag(disk, history, "half", history.load(5))
        dying = DyingDisk(str(url), at)
        finished = False
        try:
            vacuum(dying, history, keep, dry_run=False, progress=False)
            finished = True
        except Killed:
            pass
        for _ in range(2):
            for version, numbers in ((5, [1, 2]), (10, [4]), (None, [4])):
                with trajstore.open(url, version=version) as store:
                    assert_holds(store.trajectories, numbers)
            vacuum(LocalFilesystem(str(url)), history, keep, dry_run=False, progress=False)
        left = {layout.segment_of(name) for name in objects_of(url)} - {None}
        assert len(left) == 3, "segments of trajectories 1, 2 and 4"
        assert {p.name for p in Path(url, "segments").iterdir() if any(p.rglob("c.*"))} == left
        disk.close()
        if finished:
            break
