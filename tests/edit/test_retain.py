"""The window of a replay buffer: which trajectories stay, against a loop from the newest to the oldest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trajstore
from tests.edit.stores import HeldDisk, append, assert_holds, filled, holds, length_of, numbers_in
from tests.support.rare import examples
from trajstore.edit.retain import kept_positions, stored_bytes
from trajstore.errors import SelectionError
from trajstore.opening import open_on

SIZES = [3, 1, 4, 5, 2]  # trajectories per segment


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """15 trajectories in segments of several sizes, some deleted; opened once for all examples."""
    url = tmp_path_factory.mktemp("shelf") / "store"
    with trajstore.open(url, "x") as store:
        number = 0
        for size in SIZES:
            for _ in range(size):
                append(store, number)
                number += 1
            store.flush()
        store.delete([1, 9])
    with trajstore.open(url) as store:
        yield store


def bytes_of(store):
    """Whole stored bytes of each trajectory, segment by segment."""
    table = store._latest_table()
    found = []
    for segment, length in zip(table.segment.tolist(), table.length.tolist(), strict=True):
        entry = table.segments[segment]
        found.append(int(entry.nbytes / entry.steps * length))
    return found


def window(rows, *, last, max_steps, max_bytes):
    """Rows (number, steps, bytes) that stay: the newest, until one does not fit."""
    kept = []
    for row in reversed(rows):
        more = [row, *kept]
        if last is not None and len(more) > last:
            break
        if max_steps is not None and sum(steps for _, steps, _ in more) > max_steps:
            break
        if max_bytes is not None and sum(nbytes for *_, nbytes in more) > max_bytes:
            break
        kept = more
    return [number for number, *_ in kept]


LIMITS = {
    "last": st.none() | st.integers(0, 20),
    "max_steps": st.none() | st.integers(0, 70),
    "max_bytes": st.none() | st.integers(0, 12_000),
}


@given(**LIMITS, where=st.sampled_from([None, "length > 2", "task == 'task-1'", "number < 0", "terminated"]))
@settings(deadline=None, derandomize=True, max_examples=examples(200))
def test_the_newest_within_all_limits_stay(shelf, where, **limits):
    view = shelf.trajectories
    nbytes = dict(zip(numbers_in(view), bytes_of(shelf), strict=True))
    chosen = view if where is None else view.filter(where)
    rows = [(n, length_of(n), nbytes[n]) for n in numbers_in(chosen)]
    found = chosen.take(kept_positions(chosen.source().selection, **limits))
    assert numbers_in(found) == window(rows, **limits)


def test_bytes_are_those_of_the_segments(shelf):
    view = shelf.trajectories
    found = stored_bytes(view.source().selection).tolist()
    assert found == bytes_of(shelf)
    everything = sum(found)
    assert len(kept_positions(view.source().selection, max_bytes=everything)) == len(view), "the limit itself is within"
    assert len(kept_positions(view.source().selection, max_bytes=everything - 1)) == len(view) - 1


def test_derived_columns_count(tmp_path):
    with trajstore.open(filled(tmp_path / "store", range(4)), "a") as store:
        before = stored_bytes(store.trajectories.source().selection).sum()
        store.add_column("double", lambda t: t["reward"] * 2, columns=["reward"])
        assert stored_bytes(store.trajectories.source().selection).sum() > before


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({"last": 3}, [4, 5, 6]),
        ({"last": 0}, []),
        ({"max_steps": 13}, [5, 6]),
        ({"max_steps": 12}, [6]),
        ({"max_bytes": 0}, []),
        ({"where": "number % 2 == 0"}, [0, 2, 4, 6]),
        ({"where": "number % 2 == 0", "last": 2}, [4, 6]),
        ({"where": "number < 4", "last": 3, "max_steps": 8}, [2, 3]),
    ],
)
def test_a_store_keeps_its_window_and_earlier_versions_keep_the_rest(tmp_path, limits, kept):
    url = filled(tmp_path / "store", range(7), per_commit=2)
    with trajstore.open(url, "a") as store:
        before = store.version
        assert store.retain(**limits) == 7 - len(kept)
        assert_holds(store.trajectories, kept)
        newest = store.versions().iloc[0]
        assert (newest["operation"], newest["trajectories"], store.version) == ("retain", len(kept), before + 1)
        append(store, 7)
        store.flush()
        assert store.trajectories.ids.tolist() == [*kept, 7]
    holds(url, range(7), version=before)


def test_if_nothing_goes_there_is_no_version(tmp_path):
    url = filled(tmp_path / "store", range(4), per_commit=4)
    with trajstore.open(url, "a") as store:
        assert store.retain(last=4) == 0
        assert store.retain(last=10, max_steps=10**9, max_bytes=10**18, where="number >= 0") == 0
        assert store.version == 1
    with trajstore.open(tmp_path / "empty", "a") as store:
        assert store.retain(last=0) == store.version == 0


def test_what_waits_is_committed_first_and_counts(tmp_path):
    url = filled(tmp_path / "store", range(4), per_commit=4)
    with trajstore.open(url, "a", commit_interval_s=3600.0) as store, trajstore.open(url, "a") as other:
        append(other, 4)
        other.flush()
        append(store, 5)
        append(store, 6)
        assert store.retain(last=3) == 4
        assert store.versions()["operation"].tolist() == ["retain", "append", "append", "append"]
    holds(url, [4, 5, 6])


@pytest.mark.parametrize("limits", [{"last": -1}, {"max_steps": -1}, {"max_bytes": -5}, {"last": 1, "max_steps": -2}])
def test_limits_below_zero_are_refused(tmp_path, limits):
    url = filled(tmp_path / "store", range(2))
    with trajstore.open(url, "a") as store:
        with pytest.raises(SelectionError, match=r"=-\d, expected .*zero or more"):
            store.retain(**limits)
        with pytest.raises(SelectionError, match="without a limit"):
            store.retain()
        with pytest.raises(SelectionError, match="nothing"):
            store.retain(where="nothing > 1")
    holds(url, range(2))


def test_what_another_handle_deletes_meanwhile_is_no_error(tmp_path):
    """Two processes that keep the same window: who is slower finds that less is left to do."""
    url = filled(tmp_path / "store", range(6), per_commit=6)
    disk = HeldDisk(url)
    deleted = []

    def after_a_delete(key, create):
        if not deleted:
            with trajstore.open(url, "a") as other:
                deleted.append(other.delete([0, 5]))
        return create()

    with open_on(disk, "a") as store:
        disk.around_create = after_a_delete
        assert store.retain(last=3) == 1, "the other one took two; of four that were left, three stay"
        assert store.versions()["operation"].tolist() == ["retain", "delete", "append"]
    holds(url, [2, 3, 4])
