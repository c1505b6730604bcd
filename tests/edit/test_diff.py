"""What differs between two versions, against plain sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trajstore
from tests.edit.stores import append, filled
from trajstore.edit.versions import Diff
from trajstore.errors import VersionExpiredError, VersionNotFoundError


@pytest.fixture
def url(tmp_path):
    """Version 1: trajectories 0 to 4; 2: 5 more; 3: without 0, 3; 4: with a column; 5: with a field."""
    place = tmp_path / "store"
    filled(place, range(5), per_commit=5)
    with trajstore.open(place, "a") as store:
        for number in range(5, 10):
            append(store, number)
        store.flush()
        store.tag("all")
        store.delete([0, 3])
        store.add_column("double", lambda t: t["reward"] * 2, columns=["reward"])
        store.append(_tree(), metadata={"operator": "ann"})
        store.flush()
        assert store.version == 5
    return place


def _tree():
    return {
        "obs": {"image": np.zeros((3, 4, 3), np.uint8), "state": np.zeros(3)},
        "action": np.zeros((2, 2), np.int32),
        "reward": np.zeros(2),
        "note": np.array(["a", "b"], object),
        "points": [np.zeros(1, np.int16)] * 2,
    }


def told(diff):
    return [list(map(str, getattr(diff, name))) for name in Diff.__dataclass_fields__]


def test_any_two_versions_against_sets(url):
    versions = {n: trajstore.open(url, version=n) for n in range(1, 6)}
    facts = {
        n: (set(v.trajectories.ids.tolist()), {c.path for c in v.schema}, set(v.schema.metadata))
        for n, v in versions.items()
    }
    with trajstore.open(url) as store:
        for first in versions:
            for second in versions:
                diff = store.diff(first, second)
                found = [
                    (diff.added.tolist(), diff.removed.tolist()),
                    (diff.added_columns, diff.removed_columns),
                    (diff.added_fields, diff.removed_fields),
                ]
                for (added, removed), old, new in zip(found, facts[first], facts[second], strict=True):
                    assert (list(added), list(removed)) == (sorted(new - old), sorted(old - new))
                assert bool(diff) == (facts[first] != facts[second])
                assert diff.added.dtype == diff.removed.dtype == np.int64
    for version in versions.values():
        version.close()


def test_what_it_tells(url):
    with trajstore.open(url) as store:
        assert str(store.diff(1, 5)) == (
            "6 trajectories added (ids 5-10); 2 trajectories removed (ids 0, 3); columns added: double; "
            "fields added: operator"
        )
        assert str(store.diff(4, 3)) == "columns removed: double"
        assert str(store.diff(4, 5)) == "1 trajectory added (ids 10); fields added: operator"
        assert str(store.diff(2, 2)) == "no difference"
        assert not store.diff(2, 2)
        every_other = store.diff(2, 5).removed
        assert str(Diff(np.arange(0, 40, 2), every_other, [], [], [], [])).startswith(
            "20 trajectories added (ids 0, 2, 4, 6, 8, 10, 12, 14, ...); 2 trajectories removed"
        )


def test_tags_name_versions_and_the_second_is_the_one_that_is_shown(url):
    with trajstore.open(url) as store, trajstore.open(url, version=3) as old:
        assert told(store.diff("all")) == told(store.diff(2, 5))
        assert told(store.diff(1, "all")) == told(store.diff(1, 2))
        assert told(old.diff("all")) == told(store.diff("all", 3)) == [[], ["0", "3"], [], [], [], []]
        assert told(store.diff("2", "3")) == told(store.diff(2, 3)), "numbers may be text: commands have nothing else"
        assert told(store.diff(0, 1))[0] == ["0", "1", "2", "3", "4"]


def test_versions_that_cannot_be_compared_are_named(url):
    with trajstore.open(url, "a") as store:
        with pytest.raises(VersionNotFoundError, match="no version 9; the latest is 5"):
            store.diff(9)
        with pytest.raises(VersionNotFoundError, match="no tag 'best'; its tags are 'all'"):
            store.diff(1, "best")
        store.vacuum(keep_versions=1, keep_for="0s")
        with pytest.raises(VersionExpiredError):
            store.diff(1)
        assert told(store.diff("all"))[1] == ["0", "3"], "tagged versions stand"


@given(st.sets(st.integers(0, 60)))
@settings(deadline=None, derandomize=True)
def test_ranges_of_ids_are_those_of_a_loop(chosen):
    ids = np.array(sorted(chosen), np.int64)
    spans: list[list[int]] = []
    for number in ids.tolist():
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    ranges = [str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in spans]
    ranges = ranges if len(ranges) <= 8 else [*ranges[:8], "..."]
    what = "trajectory" if len(ids) == 1 else "trajectories"
    expected = f"{len(ids)} {what} removed (ids {', '.join(ranges)})" if chosen else "no difference"
    assert str(Diff(np.empty(0, np.int64), ids, [], [], [], [])) == expected
