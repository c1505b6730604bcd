"""Splitting a store: which trajectories go where."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

import trajstore
from tests.edit.stores import filled, length_of, metadata_of, objects_of
from tests.support.interrupts import interruptible
from trajstore import arrange
from trajstore.errors import SelectionError, StorageError, StoreExistsError, StoreNotFoundError

SHARES = ("reference", "link", "copy")


@pytest.fixture
def ten(tmp_path):
    """Trajectories 0 to 11 without 4 and 7."""
    url = filled(tmp_path / "ten", range(12), per_commit=3)
    with trajstore.open(url, "a") as store:
        store.delete([4, 7])
    return url


HELD = [0, 1, 2, 3, 5, 6, 8, 9, 10, 11]


def numbers(url):
    with trajstore.open(url) as store:
        view = store.trajectories
        found = [t.metadata["number"] for t in view]
        assert [t["action"][:].tolist() for t in view] == [[[n, n]] * length_of(n) for n in found]
        if found:
            frame = view.to_pandas()
            assert frame["source_id"].tolist() == found, "the id in the source"
            assert frame["source_store"].nunique() == 1
            assert frame.index.tolist() == list(range(len(found)))
        return found


@pytest.mark.parametrize("share", SHARES)
def test_the_first_so_many(ten, tmp_path, share):
    out = tmp_path / "out"
    assert trajstore.split(ten, out, first=4, share=share) == {str(out): 4}
    assert numbers(out) == HELD[:4]


@pytest.mark.parametrize("share", SHARES)
def test_what_a_filter_says(ten, tmp_path, share):
    out = tmp_path / "out"
    assert trajstore.split(ten, out, where="length > 1 and task == 'task-1'", share=share) == {str(out): 2}
    assert numbers(out) == [n for n in HELD if length_of(n) > 1 and metadata_of(n).get("task") == "task-1"]


def test_several_counts_one_after_the_other(ten, tmp_path):
    places = {tmp_path / "a": 3, tmp_path / "b": np.int64(5), tmp_path / "c": 1}
    assert trajstore.split(ten, places) == {str(tmp_path / "a"): 3, str(tmp_path / "b"): 5, str(tmp_path / "c"): 1}
    assert [numbers(place) for place in places] == [HELD[:3], HELD[3:8], HELD[8:9]]


def test_several_expressions_may_overlap(ten, tmp_path):
    places = {tmp_path / "long": "length >= 5", tmp_path / "late": "number > 5", tmp_path / "none": "number > 99"}
    assert list(trajstore.split(ten, places).values()) == [3, 5, 0]
    assert numbers(tmp_path / "long") == [n for n in HELD if length_of(n) >= 5]
    assert numbers(tmp_path / "late") == [n for n in HELD if n > 5]
    assert numbers(tmp_path / "none") == []


def test_fractions_are_drawn_at_random_and_no_trajectory_twice(ten, tmp_path):
    def parts(name, seed, *fractions):
        places = {tmp_path / f"{name}-{n}": fraction for n, fraction in enumerate(fractions)}
        counts = trajstore.split(ten, places, seed=seed)
        found = [numbers(place) for place in places]
        assert [len(part) for part in found] == list(counts.values())
        assert all(part == sorted(part) for part in found), "each in the order of the source"
        together = [n for part in found for n in part]
        assert len(set(together)) == len(together)
        assert set(together) <= set(HELD)
        return found

    first = parts("first", 0, 0.8, 0.2)
    assert [len(part) for part in first] == [8, 2]
    assert parts("again", 0, 0.8, 0.2) == first
    assert parts("other", 1, 0.8, 0.2) != first
    assert [len(part) for part in parts("some", 3, 0.3, 0.3)] == [3, 3]
    thirds = parts("thirds", 5, 1 / 3, 1 / 3, 1 / 3)
    assert sorted(n for part in thirds for n in part) == HELD
    assert [len(part) for part in parts("all", 5, 1.0, 0.0)] == [10, 0]


def test_a_view_is_split_and_stays_open(ten, tmp_path):
    with trajstore.open(ten) as store:
        view = store.trajectories.filter("number % 2 == 0")[::-1]
        trajstore.split(view, {tmp_path / "a": 2, tmp_path / "b": 2})
        assert len(view) == 5
    assert [numbers(tmp_path / name) for name in "ab"] == [[10, 8], [6, 2]]


@pytest.mark.parametrize(
    ("outs", "options", "match"),
    [
        ("out", {}, "takes first= or where="),
        ("out", {"first": 1, "where": "number > 1"}, "takes first= or where="),
        ("out", {"first": 0}, "at most 10 in all"),
        ("out", {"first": 11}, "at most 10 in all"),
        ("out", {"where": "nmber > 1"}, "nmber.*the fields are"),
        ("out", {"where": "number >"}, "not an expression"),
        ({"a": 0.5}, {"first": 3}, "are for one place"),
        ({}, {}, "no place to split to"),
        ({"a": 0.7, "b": 0.4}, {}, "add up to at most 1"),
        ({"a": -0.1, "b": 0.4}, {}, "add up to at most 1"),
        ({"a": float("nan")}, {}, "add up to at most 1"),
        ({"a": 6, "b": 5}, {}, r"6 \+ 5 trajectories"),
        ({"a": 3, "b": 0}, {}, r"at least 1 each"),
        ({"a": 0.5, "b": "number > 1"}, {}, "all of one kind"),
        ({"a": True}, {}, "all of one kind"),
        ({"a": 0.5, "./a": 0.5}, {}, "named twice"),
        ({"a": 0.5, "ten": 0.5}, {}, "is one of the sources"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(ten, tmp_path, monkeypatch, outs, options, match):
    monkeypatch.chdir(tmp_path)
    before = objects_of(tmp_path)
    with pytest.raises(SelectionError, match=match):
        trajstore.split(ten, outs, **options)
    assert objects_of(tmp_path) == before


def test_a_place_that_is_taken_is_found_before_any_part_is_written(ten, tmp_path):
    filled(tmp_path / "b", [1])
    before = objects_of(tmp_path)
    with pytest.raises(StoreExistsError, match="already at"):
        trajstore.split(ten, {tmp_path / "a": 0.5, tmp_path / "b": 0.5})
    with pytest.raises(StoreNotFoundError):
        trajstore.split(tmp_path / "nothing", tmp_path / "a", first=1)
    assert objects_of(tmp_path) == before


def test_a_part_can_be_merged_with_the_rest_again(ten, tmp_path):
    trajstore.split(ten, {tmp_path / "a": 0.4, tmp_path / "b": 0.6})
    trajstore.merge([tmp_path / "b", tmp_path / "a"], tmp_path / "whole")
    with trajstore.open(tmp_path / "whole") as store, trajstore.open(ten) as origin:
        frame = store.trajectories.to_pandas().sort_values("source_id")
        assert frame["number"].tolist() == HELD
        assert frame["source_id"].tolist() == origin.trajectories.ids.tolist()
        assert set(frame["source_store"]) == {origin.uuid}


def test_a_part_that_cannot_be_written_stops_those_that_have_not_begun(ten, tmp_path, monkeypatch):
    begun = []
    write = arrange._write

    def fails(views, target, *rest):
        begun.append(target.url)
        if target.url.endswith("part-0"):
            raise StorageError("the disk is full")
        write(views, target, *rest)

    monkeypatch.setattr(arrange, "_write", fails)
    monkeypatch.setattr(arrange, "_PARTS_AT_ONCE", 1)
    with pytest.raises(StorageError, match="the disk is full"):
        trajstore.split(ten, {tmp_path / f"part-{n}": 1 for n in range(8)})
    assert len(begun) == 1


def test_ctrl_c_stops_parts_that_have_not_begun(ten, tmp_path, monkeypatch):
    begun = []
    write = arrange._write

    def interrupted(views, target, *rest):
        begun.append(target.url)
        time.sleep(0.2)  # all of them wait for their turn
        if target.url.endswith("part-0"):
            os.kill(os.getpid(), signal.SIGINT)
        write(views, target, *rest)

    monkeypatch.setattr(arrange, "_write", interrupted)
    with interruptible(), pytest.raises(KeyboardInterrupt):
        trajstore.split(ten, {tmp_path / f"part-{n}": 1 for n in range(10)})
    made = [n for n in range(10) if (tmp_path / f"part-{n}" / "snapshots" / "00000000000000000001.json").exists()]
    assert 1 <= len(made) == len(begun) < 10, "what had begun is whole"
    for n in made:
        assert numbers(tmp_path / f"part-{n}") == [HELD[n]]


def test_parts_may_lie_in_the_folder_of_the_whole(ten):
    trajstore.split(ten, {f"{ten}/train": 0.8, f"{ten}/test": 0.2})
    assert sorted(numbers(f"{ten}/train") + numbers(f"{ten}/test")) == HELD
    for url in (ten, f"{ten}/train"):
        with trajstore.open(url) as store:
            assert store.verify(deep=True).ok
    trajstore.merge([f"{ten}/train", f"{ten}/test"], f"{ten}/all")
    assert sorted(numbers(f"{ten}/all")) == HELD


def test_counts_and_fractions_cannot_be_mixed(ten, tmp_path):
    for given in ((-5.0, 5), (0.5, 5)):
        with pytest.raises(SelectionError, match=r"a fraction from 0 to 1, .*: the two cannot be mixed"):
            trajstore.split(ten, dict(zip((tmp_path / "a", tmp_path / "b"), given, strict=True)))


def test_a_file_is_no_place_for_a_store(ten, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="a file is where a folder should be; choose a folder, or another place"):
        trajstore.merge([ten], tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
