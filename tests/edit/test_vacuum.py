"""Vacuum: what goes, what stays, by marks, ages and any history."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.edit import histories
from tests.edit.histories import (
    DAY,
    Clock,
    assert_whole,
    filled,
    history_on,
    old_store,
    run,
    segment_entry,
    standing,
    stored,
)
from tests.edit.memory import MemoryDisk
from tests.support.rare import examples
from trajstore.edit.marks import held, pin, tag, unpin, untag
from trajstore.edit.vacuum import KEPT_VERSIONS, Keep, parse_duration, vacuum
from trajstore.errors import (
    SelectionError,
    UnsupportedStorageError,
    VersionExpiredError,
    VersionNotFoundError,
)
from trajstore.format import layout
from trajstore.format.snapshot import Base
from trajstore.storage.commit import EMPTY_VERSION

# What goes


def test_versions_go_by_number_and_age_and_objects_with_them():
    disk, clock, _ = old_store(4)
    assert len(standing(disk)) == 4
    told = run(disk, clock, dry_run=True)
    done = run(disk, clock)
    assert done.versions == told.versions == (1, 2, 3)
    assert (done.manifests, done.segments) == (told.manifests, told.segments)
    assert (done.manifests.objects, done.segments.objects) == (3, 3)
    assert (told.dry_run, done.dry_run) == (True, False)
    assert sorted(standing(disk)) == [4, 5], "its own version fences off paused writers"
    assert history_on(disk, clock).load(5).snapshot.operation == "vacuum"
    assert_whole(disk)
    again = run(disk, clock)
    assert again.versions == (4,)
    assert str(again).endswith("; 1 version stands")
    assert str(again).startswith("removed 1 version, 0 manifests, ")
    assert "removed 3 versions, 3 manifests, 3 objects of segments" in str(done)


def test_a_dry_run_writes_nothing():
    disk, clock, _ = old_store(4)
    before = dict(disk.objects)
    assert run(disk, clock, dry_run=True).nbytes > 0
    assert disk.objects == before


def test_nothing_to_remove_adds_no_version():
    disk, clock, _ = old_store(1)
    assert run(disk, clock).objects == 0
    assert sorted(standing(disk)) == [1]
    assert not [key for key in disk.objects if key.startswith("vacuum/")]


def test_the_last_hundred_and_the_young_stay_by_default():
    disk, clock = MemoryDisk(), Clock()
    disk.clock = clock
    filled(disk, clock, 105)
    assert run(disk, clock, Keep()).versions == (1, 2, 3, 4, 5)
    clock.wait(days=30)
    disk, clock, _ = old_store(4)
    clock.time -= 10 * DAY  # the youngest is a day old
    assert run(disk, clock, Keep(versions=1, age=3 * DAY), dry_run=True).versions == (1, 2)
    assert KEPT_VERSIONS == 100


def test_objects_younger_than_the_grace_stay_and_are_told():
    disk, clock, _ = old_store(4)
    disk.store({layout.segment_key("a" * 32, "c.0"): [b"12345"], layout.manifest_key("a" * 32): [b"123"]})
    clock.wait(days=7, seconds=-1)
    done = run(disk, clock)
    assert (done.young.objects, done.young.nbytes) == (2, 8)
    clock.wait(seconds=2)
    done = run(disk, clock)
    assert (done.young.objects, done.segments.nbytes) == (0, 5)


def test_a_segment_whose_trajectories_are_all_deleted_goes_and_its_manifest_stays():
    disk, clock = MemoryDisk(), Clock()
    disk.clock = clock
    history = history_on(disk, clock)
    layered = segment_entry("b" * 32, layers=(segment_entry("c" * 32, columns=("x",)),))
    head = history.commit(stored(disk, [segment_entry("a" * 32), layered, segment_entry("d" * 32)]), EMPTY_VERSION)
    histories.delete(history, head, [0])
    clock.wait(days=30)
    run(disk, clock)
    left = {layout.segment_of(key) for key in disk.objects} - {None}
    assert left == {"b" * 32, "c" * 32, "d" * 32}
    histories.delete(history, histories.latest(history), [1])
    clock.wait(days=30)
    run(disk, clock)
    assert {layout.segment_of(key) for key in disk.objects} - {None} == {"d" * 32}
    assert_whole(disk)


def test_segments_of_other_stores_are_theirs_and_layers_over_them_are_not():
    disk, clock = MemoryDisk(), Clock()
    disk.clock = clock
    history = history_on(disk, clock)
    bases = (Base("../one", "1" * 32, "e" * 32), Base("../two", "2" * 32, "f" * 32))
    borrowed = segment_entry("a" * 32, base=0, layers=(segment_entry("b" * 32, columns=("x",)),))
    other = segment_entry("c" * 32, base=1)
    head = history.commit(stored(disk, [borrowed, other], bases=bases), EMPTY_VERSION)
    histories.delete(history, head, [1])
    disk.store({layout.segment_key("a" * 32, "c.0"): [b"a namesake here"]})
    clock.wait(days=30)
    done = run(disk, clock)
    assert done.unused_bases == (bases[1],)
    assert {layout.segment_of(key) for key in disk.objects} - {None} == {"b" * 32}


def test_leftovers_of_killed_commits_go():
    disk, clock, _ = old_store(1)
    names = ["snapshots/.ab.tmp", "tags/.ab.tmp", "pins/.ab.tmp", "vacuum/.ab.tmp", "vacuum/ab.clock"]
    names += ["manifests/.ab.tmp", f"{next(k for k in disk.objects if k.startswith('segments/'))}.ab.tmp"]
    names += [layout.statistics_key(7)]
    kept = ["notes.txt", "mine/file.tmp", layout.statistics_key(1)]
    for name in names + kept:
        disk.objects[name] = b"x", clock.time - 8 * DAY
    done = run(disk, clock)
    assert not set(names) & disk.objects.keys()
    assert set(kept) <= disk.objects.keys()
    assert done.objects == len(names)


def test_an_empty_store_is_left_alone():
    """What lies there is used again by whoever tries again to make its first version."""
    disk, clock = MemoryDisk(), Clock()
    disk.objects["manifests/x.parquet"] = b"x", clock.time - 30 * DAY
    assert run(disk, clock).objects == 0
    assert len(disk.objects) == 1


def test_what_this_handle_is_writing_stays_even_without_a_grace():
    disk, clock, _ = old_store(2)
    disk.store({layout.segment_key("a" * 32, "c.0"): [b"1"], layout.segment_key("b" * 32, "c.0"): [b"1"]})
    keep = Keep(versions=1, age=dt.timedelta(0), grace=dt.timedelta(0))
    run(disk, clock, keep, exclusive=True, in_progress=lambda: {"a" * 32})
    assert layout.segment_key("a" * 32, "c.0") in disk.objects
    assert layout.segment_key("b" * 32, "c.0") not in disk.objects
    assert sorted(standing(disk)) == [2], "exclusive: no version of its own"


def test_a_short_grace_is_for_the_exclusive():
    disk, clock, _ = old_store(2)
    with pytest.raises(SelectionError, match=r"grace of 1 days, expected at least 7: .* exclusive=True"):
        run(disk, clock, Keep(grace=DAY))
    assert run(disk, clock, Keep(versions=1, age=DAY, grace=DAY), exclusive=True).versions == (1,)


@pytest.mark.parametrize("options", [{"versions": 0}, {"age": -DAY}, {"grace": -DAY}])
def test_limits_that_make_no_sense_are_refused(options):
    with pytest.raises(SelectionError, match="expected"):
        Keep(**options)


def test_a_storage_without_times_is_refused_and_left_as_it_was():
    disk, clock, _ = old_store(3)
    disk.clock = lambda: None
    before = dict(disk.objects)
    with pytest.raises(UnsupportedStorageError, match="does not say when"):
        run(disk, clock)
    with pytest.raises(UnsupportedStorageError):
        run(disk, clock, exclusive=True)
    assert disk.objects == before


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7d", 604800), ("90m", 5400), ("1.5h", 5400), (" 2w ", 1209600), ("0s", 0), (dt.timedelta(seconds=3), 3)],
)
def test_durations(text, seconds):
    assert parse_duration(text).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-7d", "7 days", "7y", "٣d", "9" * 40 + "d", 7, None])
def test_what_is_no_duration(text):
    with pytest.raises(SelectionError, match="write 30m, 12h, 7d or 2w"):
        parse_duration(text)


# Marks


def test_tagged_and_pinned_versions_stay_until_they_are_released():
    disk, clock, _ = old_store(5)
    history = history_on(disk, clock)
    tag(disk, history, "paper", history.load(1))
    made = pin(disk, history, history.load(3), borrower_uuid="b" * 32, borrower_url="/other")
    assert run(disk, clock).versions == (2, 4)
    assert_whole(disk)
    untag(disk, "paper")
    unpin(disk, made.uuid)
    assert run(disk, clock).versions == (1, 3, 5)
    with pytest.raises(VersionNotFoundError):
        untag(disk, "paper")


def test_a_version_that_is_released_late_is_found_though_all_around_it_are_gone():
    disk, clock, _ = old_store(100)
    history = history_on(disk, clock)
    tag(disk, history, "old", history.load(3))
    keep = Keep(versions=1, age=dt.timedelta(0), grace=dt.timedelta(0))
    for _ in range(40):
        run(disk, clock, keep, exclusive=True)
        histories.append(disk, history, histories.latest(history), instead=True)
    assert sorted(standing(disk)) == [3, 139, 140]
    assert_whole(disk)
    untag(disk, "old")
    assert run(disk, clock, keep, exclusive=True).versions == (3, 139)


def test_slots_that_are_known_to_be_empty_are_not_looked_at_again():
    disk, clock, _ = old_store(300)
    keep = Keep(versions=1, age=dt.timedelta(0), grace=dt.timedelta(0))
    run(disk, clock, keep, exclusive=True)
    history = history_on(disk, clock)
    for _ in range(20):
        histories.append(disk, history, histories.latest(history), instead=True)
        calls, start = [], histories.latest(history).number
        disk.before = lambda name, key, calls=calls: calls.append((name, key))
        vacuum(disk, history, keep, dry_run=False, exclusive=True, start=start, now=clock)
        disk.before = lambda name, key: None
        assert len(calls) < 60
        assert ("list", "snapshots") not in calls


def test_a_tag_of_a_version_that_is_gone_is_refused_and_leaves_nothing():
    disk, clock, head = old_store(3)
    history = history_on(disk, clock)
    first = history.load(1)
    tag(disk, history, "kept", head)
    run(disk, clock)
    for name, options in (("new", {}), ("kept", {"move": True})):
        with pytest.raises(VersionExpiredError):
            tag(disk, history, name, first, **options)
    with pytest.raises(VersionExpiredError):
        pin(disk, history, first, borrower_uuid="b" * 32, borrower_url="/other")
    with pytest.raises(VersionExpiredError), held(disk, history, first):
        pytest.fail("it does not stand")
    assert [key for key in disk.objects if key.startswith(("tags/", "pins/"))] == [layout.tag_key("kept")]
    assert b'"version":3' in disk.objects[layout.tag_key("kept")][0]


def test_a_hold_of_an_edit_that_was_killed_goes_with_the_first_vacuum_after_the_grace():
    disk, clock, _ = old_store(4)
    disk.clock = clock
    history = history_on(disk, clock)
    hold = held(disk, history, history.load(2))
    hold.__enter__()  # and is never left
    assert 2 not in run(disk, clock).versions, "whoever holds it may be at work"
    assert [key for key in disk.objects if key.startswith("pins/")]
    clock.wait(days=8)
    assert 2 not in run(disk, clock).versions
    assert not [key for key in disk.objects if key.startswith("pins/")]
    assert 2 in run(disk, clock).versions


# Any history


@settings(deadline=None, max_examples=examples(60))
@given(data=st.data())
def test_exactly_what_an_obvious_model_keeps_is_kept(data):
    disk, clock = MemoryDisk(), Clock()
    disk.clock = clock
    history, head = history_on(disk, clock), EMPTY_VERSION
    ids = []
    for _ in range(data.draw(st.integers(1, 8))):
        clock.wait(days=data.draw(st.sampled_from([0.001, 2, 5])))
        if ids and data.draw(st.booleans()):
            gone = data.draw(st.lists(st.sampled_from(ids), min_size=1, max_size=4, unique=True))
            head = histories.delete(history, head, sorted(gone))
            ids = [i for i in ids if i not in gone]
        else:
            rows = data.draw(st.integers(1, 2))
            instead = bool(head.number) and data.draw(st.integers(0, 3)) == 0
            ids = ([] if instead else ids) + list(range(head.snapshot.next_id, head.snapshot.next_id + rows))
            head = histories.append(disk, history, head, rows=rows, instead=instead)
    tags = data.draw(st.sets(st.integers(1, head.number), max_size=2))
    pins = data.draw(st.sets(st.integers(1, head.number), max_size=2))
    for number in tags:
        tag(disk, history, f"v{number}", history.load(number))
    for number in pins:
        pin(disk, history, history.load(number), borrower_uuid="b" * 32, borrower_url="/other")
    orphans = {}
    for number in range(data.draw(st.integers(0, 2))):
        orphans[layout.segment_key(f"{number:032x}", "c.0")] = b"x", clock.time
    disk.objects.update(orphans)
    clock.wait(days=data.draw(st.sampled_from([0, 4, 8])))
    versions = data.draw(st.integers(1, 4))
    age = data.draw(st.integers(0, 9)) * DAY
    exclusive = data.draw(st.booleans())
    grace = data.draw(st.integers(0, 9)) * DAY if exclusive else data.draw(st.integers(7, 9)) * DAY

    before, names = dict(disk.objects), standing(disk)
    created = {number: history.load(number).snapshot.created_at for number in names}
    stay = set()
    for number in names:
        newest = len([n for n in names if n > number]) < versions
        if newest or number in tags | pins or clock.time - created[number] < age:
            stay.add(number)
    objects = set()
    for key, (_, time) in before.items():
        if key.startswith(("manifests/", "segments/")):
            needed = any(key in names[number] for number in stay)
            young = grace > dt.timedelta(0) and clock.time - time < grace
            if not (needed or young):
                objects.add(key)

    told = run(disk, clock, Keep(versions, age, grace), exclusive=exclusive, dry_run=True)
    assert disk.objects == before
    done = run(disk, clock, Keep(versions, age, grace), exclusive=exclusive)
    assert set(done.versions) == set(told.versions) == names.keys() - stay
    assert {key for key in before if key not in disk.objects} == objects
    assert done.objects == told.objects == len(objects)
    assert done.nbytes == sum(len(before[key][0]) for key in objects)
    assert_whole(disk)
