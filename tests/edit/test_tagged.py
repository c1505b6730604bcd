"""Versions that are opened by a name."""

from __future__ import annotations

import pytest

import trajstore
from tests.edit.stores import append, filled, holds, numbers_in
from trajstore.errors import TagNameError, VersionExpiredError, VersionNotFoundError


@pytest.fixture
def url(tmp_path):
    """Three versions; the second is ``best``."""
    place = filled(tmp_path / "store", range(3))
    with trajstore.open(place, "a") as store:
        store.tag("best", 2)
    return place


def test_a_tagged_version_is_opened_by_its_name_until_the_name_goes(url):
    holds(url, range(2), version="best")
    with trajstore.open(url, "a") as store:
        store.tag("best", 1, move=True)
    holds(url, range(1), version="best")
    with trajstore.open(url, "a") as store:
        store.untag("best")
    with pytest.raises(VersionNotFoundError, match="no tag 'best'; its tags are none"):
        trajstore.open(url, version="best")


def test_a_number_that_is_given_as_text_is_a_number(url):
    holds(url, range(1), version="1")
    with trajstore.open(url, "a") as store:
        assert store.restore("1") == 4
    with pytest.raises(VersionNotFoundError, match="no version 12"):
        trajstore.open(url, version="12")


def test_a_name_that_is_not_there_says_which_are(url):
    with trajstore.open(url, "a") as store:
        store.tag("start", 1)
    with pytest.raises(VersionNotFoundError, match="no tag 'bets'; its tags are 'best', 'start'"):
        trajstore.open(url, version="bets")
    with pytest.raises(TagNameError):
        trajstore.open(url, version="../best")


def test_a_tagged_version_stands_whatever_vacuum_empties(url):
    with trajstore.open(url, "a") as store:
        append(store, 3)
        store.flush()
        done = store.vacuum(keep_versions=1, keep_for="0s", grace="0s", exclusive=True)
        assert done.versions == (1, 3)
        assert store.versions()["tags"].to_dict() == {4: "", 2: "best"}
    holds(url, range(2), version="best")
    holds(url, range(4))
    with pytest.raises(VersionExpiredError):
        trajstore.open(url, version=1)
    with trajstore.open(url, "a") as store:
        store.untag("best")
        assert store.vacuum(keep_versions=1, keep_for="0s", grace="0s", exclusive=True).versions == (2,)
    with pytest.raises(VersionExpiredError):
        trajstore.open(url, version=2)


def test_who_has_a_version_open_by_name_stays_there(url):
    with trajstore.open(url, version="best") as reader:
        with trajstore.open(url, "a") as store:
            append(store, 3)
            store.flush()
            store.tag("best", move=True)
        assert (reader.version, numbers_in(reader.trajectories)) == (2, [0, 1])
    with trajstore.open(url, version="best") as reader:
        assert (reader.version, numbers_in(reader.trajectories)) == (4, [0, 1, 2, 3])
