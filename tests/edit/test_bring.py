"""Segments that come from other stores, and vacuums and writers of the store that they come to."""

from __future__ import annotations

import datetime as dt
import functools
import uuid
from pathlib import Path

import pytest

import trajstore
from tests.edit.histories import (
    Clock,
    append,
    assert_whole,
    delete,
    history_on,
    latest,
    run,
    segment_entry,
    standing,
    stored,
)
from tests.edit.memory import MemoryDisk
from tests.edit.stepped import Stepped, draw_some
from tests.edit.stores import append as append_number
from tests.edit.stores import filled, holds, numbers_in, segments_of
from tests.support.rare import also_slow
from trajstore.edit import combine as module
from trajstore.edit.combine import Source, combine
from trajstore.edit.needed import own_segments
from trajstore.errors import ManifestsChangedError, MissingObjectError, VersionExpiredError
from trajstore.format import layout
from trajstore.format.snapshot import StoreDocument
from trajstore.read.bases import Bases
from trajstore.read.selection import Selection
from trajstore.read.table import TrajectoryTable
from trajstore.storage.commit import EMPTY_VERSION, History
from trajstore.storage.local import LocalFilesystem

SOURCE, TARGET = "5" * 32, "7" * 32


def never(url, options):
    raise AssertionError("no store refers to another one here")


def disk_of(store_uuid: str, clock: Clock) -> MemoryDisk:
    disk = MemoryDisk(clock=clock)
    disk.create(layout.STORE_DOCUMENT, StoreDocument(store_uuid).to_bytes())
    return disk


@functools.cache
def template(still: int) -> tuple[dict, dict, dt.datetime]:
    """Objects of a source and a target, and the time."""
    clock = Clock()
    source, target = disk_of(SOURCE, clock), disk_of(TARGET, clock)
    for number in range(3):
        append(source, history_on(source, clock), latest(history_on(source, clock)))
        clock.wait(hours=number)
    combine([source_of(source, SOURCE, latest(History(source)))], target, progress=False)
    history = history_on(target, clock)
    if still < 3:
        delete(history, latest(history), list(range(still, 3)))
    clock.wait(days=30)
    return source.objects, target.objects, clock.time


class World:
    """A source whose segments the target had once and may still have, older than the grace, and a clock.

    Args:
        still: How many of the source's trajectories the target's latest version still names.
    """

    def __init__(self, still: int) -> None:
        source, target, time = template(still)
        self.clock = Clock(time)
        self.source = MemoryDisk(dict(source), clock=self.clock)
        self.objects = dict(target)
        self.former = {layout.segment_of(key) for key in target} - {None}
        self.saved = EMPTY_VERSION

    def disk(self, before=lambda name, key: None) -> MemoryDisk:
        """A handle of the target."""
        return MemoryDisk(self.objects, before=before, clock=self.clock)

    def chosen(self) -> Source:
        """All of the source."""
        return source_of(self.source, SOURCE, latest(History(self.source)))

    def save(self, before) -> None:
        self.saved = combine([self.chosen()], self.disk(before), instead=True, progress=False).version

    def vacuum(self, before) -> None:
        run(self.disk(before), self.clock)

    def drop_and_vacuum(self, before) -> None:
        """Another writer, who needs nothing of what is there, and a vacuum."""
        disk = self.disk(before)
        history = history_on(disk, self.clock)
        change = stored(disk, [segment_entry(uuid.uuid4().hex)], instead=True)
        history.commit(change, latest(history))
        run(disk, self.clock)

    def rows(self, version) -> list[tuple[bytes, bytes]]:
        """Identity and bytes of each trajectory of a version of the target."""
        return rows_of(self.disk(), version)


def source_of(disk: MemoryDisk, store_uuid: str, version) -> Source:
    table = TrajectoryTable(History(disk), version)
    return Source(Selection(table, table.all_rows, whole=True), disk, store_uuid, Bases(disk.url, never))


def rows_of(disk: MemoryDisk, version) -> list[tuple[bytes, bytes]]:
    table = TrajectoryTable(History(disk), version)
    names = [table.segments[n].uuid for n in table.segment.tolist()]
    bytes_ = [disk.objects[layout.segment_key(name, "c.0")][0] for name in names]
    return list(zip(table.full["uuid"].to_pylist(), bytes_, strict=True))


@pytest.mark.parametrize("still", also_slow([0, 2, 3], [0, 3]))
@pytest.mark.parametrize("other", ["vacuum", "drop_and_vacuum"])
def test_what_is_brought_is_there_whatever_a_vacuum_and_another_writer_do_meanwhile(still, other):
    brought = set()

    def check(world, saving, vacuuming):
        assert (saving.error, vacuuming.error) == (None, None)
        assert_whole(world.disk())
        if world.saved.number not in standing(world.disk()):
            assert other == "drop_and_vacuum", "the other writer came later"
            return
        wanted = rows_of(world.source, latest(History(world.source)))
        assert world.rows(world.saved) == wanted
        assert len({data for _, data in wanted}) == 3
        named = own_segments(world.saved.snapshot, History(world.disk()).read_manifests).keys()
        brought.add(len(named - world.former))
        run(world.disk(), world.clock)
        assert_whole(world.disk())

    draw_some(lambda: World(still), World.save, getattr(World, other), check, count=50)
    # What the version before named is used again, unless somebody dropped it meanwhile; nothing else is.
    assert brought == {3 - still if other == "vacuum" else 3}


def test_rows_of_an_earlier_version_of_the_store_itself_stay_while_they_are_committed():
    told = set()

    def make():
        world = World(3)
        history = history_on(world.disk(), world.clock)
        delete(history, latest(history), [0, 1])
        world.clock.wait(days=30)
        world.early = history.load(1)
        world.wanted = rows_of(world.disk(), world.early)
        return world

    def restore(world, before):
        disk = world.disk(before)
        world.saved = combine([source_of(disk, TARGET, world.early)], disk, instead=True, progress=False).version

    def check(world, restoring, vacuuming):
        assert vacuuming.error is None
        told.add(type(restoring.error))
        assert_whole(world.disk())
        if restoring.error is None:
            assert world.rows(world.saved) == world.wanted
            assert not [key for key in world.objects if key.startswith("pins/")]
            run(world.disk(), world.clock)
            assert_whole(world.disk())
        else:
            assert isinstance(restoring.error, VersionExpiredError | MissingObjectError), restoring.error

    draw_some(make, restore, World.vacuum, check, count=100)
    assert type(None) in told
    assert len(told) >= 2


def test_who_saves_into_a_store_without_a_version_uses_what_a_killed_try_left():
    world = World(0)
    world.objects.clear()
    world.disk().create(layout.STORE_DOCUMENT, StoreDocument(TARGET).to_bytes())

    class KilledError(Exception):
        pass

    def kill(name, key):
        if name == "create":
            raise KilledError

    with pytest.raises(KilledError):
        combine([world.chosen()], world.disk(kill), instead=True, progress=False)
    left = {key for key in world.objects if key.startswith("segments/")}
    assert len(left) == 3
    again = combine([world.chosen()], world.disk(), instead=True, progress=False)
    assert {key for key in world.objects if key.startswith("segments/")} == left
    assert world.rows(again.version) == rows_of(world.source, latest(History(world.source)))


def test_a_store_that_got_versions_meanwhile_is_looked_at_again():
    """What was copied into the store without a version may be waste by now."""
    world = World(0)
    world.objects.clear()
    world.disk().create(layout.STORE_DOCUMENT, StoreDocument(TARGET).to_bytes())
    saving = Stepped(world.save)
    calls = 0
    saving.step()
    while not any(key.startswith("manifests/") for key in world.objects):
        saving.step()
        calls += 1
    other = world.disk()
    append(other, history_on(other, world.clock), EMPTY_VERSION)
    world.clock.wait(days=30)
    run(world.disk(), world.clock)
    assert not {layout.segment_of(key) for key in world.objects} & {
        layout.segment_of(key) for key in world.source.objects if layout.segment_of(key)
    }, "it was waste"
    saving.finish()
    assert saving.error is None
    assert calls > 0
    assert_whole(world.disk())
    assert world.rows(world.saved) == rows_of(world.source, latest(History(world.source)))


def test_who_loses_segments_and_has_no_more_tries_says_so(monkeypatch):
    def drop(name, key):
        if name == "create" and key.startswith("snapshots/"):
            history = history_on(world.disk(), world.clock)
            change = stored(world.disk(), [segment_entry(uuid.uuid4().hex)], instead=True)
            history.commit(change, latest(history))

    world = World(3)
    assert combine([world.chosen()], world.disk(once(drop)), instead=True, progress=False).version.number == 3
    monkeypatch.setattr(module, "_MOST_PLANS", 1)
    world = World(3)
    before = set(world.objects)
    with pytest.raises(ManifestsChangedError, match="do it again"):
        combine([world.chosen()], world.disk(once(drop)), instead=True, progress=False)
    assert not [key for key in set(world.objects) - before if key.startswith("pins/")]
    assert_whole(world.disk())


def once(function):
    """A hook that does something the first time that it would."""
    done = []

    def hook(name, key):
        if not done and name == "create" and key.startswith("snapshots/"):
            done.append(key)
            function(name, key)

    return hook


# Stores on a disk


def test_a_save_again_and_again_copies_each_segment_once(tmp_path):
    source, target = filled(tmp_path / "source", range(3)), tmp_path / "target"
    with trajstore.open(source, "a") as store:
        seen: set[str] = set()
        for number in range(3, 8):
            store.trajectories.save(target, replace=True, share="copy")
            added = segments_of(target) - seen
            assert len(added) == (3 if number == 3 else 1)
            seen |= added
            holds(target, range(number))
            append_number(store, number)
            store.flush()
    with trajstore.open(target) as saved:
        assert saved.verify(deep=True).ok
    again = tmp_path / "again"
    with trajstore.open(target) as saved, trajstore.open(source) as store:
        saved.trajectories.save(again, replace=True)
        store.trajectories.save(again, replace=True)  # the same segments under their first names
        assert len(segments_of(again)) == 8
    holds(again, range(8))


def test_segments_that_sources_have_under_several_names_are_named_once(tmp_path):
    one, two, target = tmp_path / "one", tmp_path / "two", tmp_path / "target"
    filled(one, range(2))
    filled(two, [9])
    with trajstore.open(one) as store:
        store.trajectories.save(two, replace=True)
        names = segments_of(one), segments_of(two)
        store.trajectories.save(target)
    assert len(names[0] & names[1]) == 0
    with trajstore.open(one) as first, trajstore.open(two) as second:
        combine([first.trajectories.source(), second.trajectories.source()], LocalFilesystem(str(target)), instead=True)
    holds(target, [0, 1, 0, 1])
    with trajstore.open(target) as store:
        assert len({s.uuid for s in store.trajectories._table.segments}) == len(store.trajectories._table.segments) == 2
        assert numbers_in(store.trajectories) == [0, 1, 0, 1]


def test_a_fresh_name_begins_like_the_former_one_and_shares_its_bytes(tmp_path):
    source, target = filled(tmp_path / "source", range(2)), tmp_path / "target"
    filled(target, [7])
    before = segments_of(target)
    with trajstore.open(source) as store:
        store.trajectories.save(target, replace=True)
    fresh = segments_of(target) - before
    assert len(fresh) == 2
    assert not fresh & segments_of(source)
    assert {name[:16] for name in fresh} == {name[:16] for name in segments_of(source)}
    inodes = [{p.stat().st_ino for p in Path(s).glob("segments/*/**/*") if p.is_file()} for s in (source, target)]
    assert inodes[0] <= inodes[1]
    assert {len(name) for name in fresh} == {32}
