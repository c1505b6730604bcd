"""Pins that a store has in others go when it needs them no longer, and only then."""

from __future__ import annotations

import datetime as dt
import shutil

import pytest

import trajstore
from tests.edit.stores import filled
from trajstore.edit.marks import all_pins, pin
from trajstore.edit.release import Borrower, release_pins
from trajstore.edit.verify import verify
from trajstore.errors import StoragePermissionError
from trajstore.format.snapshot import Base
from trajstore.read.bases import reference
from trajstore.storage.commit import History
from trajstore.storage.local import LocalFilesystem

ALL = {"grace": "0d", "keep_for": "0d", "keep_versions": 1, "exclusive": True}
SOON = dt.timedelta(days=8)  # longer than any commit may take


@pytest.fixture
def runs(tmp_path):
    """Store ``b`` refers to ``a``."""
    folder = tmp_path / "runs"
    filled(folder / "a", range(4))
    trajstore.merge([folder / "a"], folder / "b")
    return folder


def pins_in(url):
    return all_pins(LocalFilesystem(str(url)))


def empty(url, **options):
    """Delete all, and vacuum."""
    with trajstore.open(url, "a", **options) as store:
        store.delete(store.trajectories.ids)
        store.vacuum(**ALL)


def assert_whole(url):
    with trajstore.open(url) as store:
        assert store.trajectories.read("action").shape[0] == 1 + 2 + 3 + 4
        assert not store.verify(deep=True).errors


def test_a_copy_made_by_hand_does_not_let_go_of_what_the_original_needs(runs, caplog):
    shutil.copytree(runs / "b", runs / "copy")
    empty(runs / "copy")
    assert "is a copy" in caplog.text
    empty(runs / "a")
    assert_whole(runs / "b")
    empty(runs / "b")
    assert not pins_in(runs / "a"), "the original does"


def test_a_store_that_was_moved_lets_go_of_what_it_pinned_from_where_it_was(runs):
    (runs / "b").rename(runs / "moved")
    assert_whole(runs / "moved")
    empty(runs / "moved")
    assert not pins_in(runs / "a")


def test_stores_that_were_moved_together_find_each_other(runs, caplog):
    runs = runs.rename(runs.parent / "elsewhere")
    (found,) = pins_in(runs / "a")
    assert found.borrower_url == str(runs / "b")
    with trajstore.open(runs / "a") as store:
        assert store.pins()["borrower_url"].tolist() == [str(runs / "b")]
        assert not store.verify().findings
    empty(runs / "b")
    assert not pins_in(runs / "a")
    assert not caplog.records


def test_where_the_original_may_be_is_not_known(runs, tmp_path, caplog):
    """The copy lies where nobody said that stores outside are to be looked at."""
    trusted = {str(runs): None}
    trajstore.merge([runs / "a"], tmp_path / "far" / "b")
    shutil.move(tmp_path / "far", tmp_path / "farther")
    empty(tmp_path / "farther" / "b", bases=trusted)
    assert len(pins_in(runs / "a")) == 2
    assert "is not known" in caplog.text
    assert str(tmp_path / "far" / "b") in caplog.text


def forgotten(runs, *, borrower_url=None, version=4):
    """A pin such as a merge leaves that is killed before its commit."""
    owner = LocalFilesystem(str(runs / "a"))
    history = History(owner)
    with trajstore.open(runs / "b") as store:
        url = reference(borrower_url or store.url, seen_from=owner.url)
        return pin(owner, history, history.load(version), borrower_uuid=store.uuid, borrower_url=url)


def release(store, unused=(), used=None, now=None):
    bases = store._head.snapshot.bases if used is None else used
    return release_pins(Borrower(store.url, store.uuid, store._access.bases.open), unused, bases, now=now)


def test_a_pin_that_no_version_names_goes_when_no_commit_may_come_to_name_it(runs):
    (named,) = pins_in(runs / "a")
    left = forgotten(runs)
    theirs = pin(
        LocalFilesystem(str(runs / "a")),
        history := History(LocalFilesystem(str(runs / "a"))),
        history.load(2),
        borrower_uuid="f" * 32,
        borrower_url="../c",
    )
    later = dt.datetime.now(dt.UTC) + SOON
    with trajstore.open(runs / "b") as store:
        assert not release(store).released
        assert not release(store, now=dt.datetime.now(dt.UTC)).released
        assert [one.uuid for _, one in release(store, now=later).released] == [left.uuid]
    assert {one.uuid for one in pins_in(runs / "a")} == {named.uuid, theirs.uuid}


def test_the_owner_is_told_of_a_pin_that_no_version_names(runs):
    left = forgotten(runs)
    with trajstore.open(runs / "a") as store:
        assert not store.verify().findings
        (found,) = verify(store._filesystem, store._access, now=dt.datetime.now(dt.UTC) + SOON).findings
    assert (found.severity, found.kind) == ("warning", "pin-unused")
    assert left.uuid in found.where


def test_what_cannot_be_reached_is_told(runs):
    def refuse(_):
        raise StoragePermissionError("no access")

    with trajstore.open(runs / "b") as store:
        (base,) = store._head.snapshot.bases
        borrower = Borrower(store.url, store.uuid, refuse)
        assert release_pins(borrower, [base], []).kept == [("../a", "no access")]
        assert release_pins(borrower, [], [base], now=dt.datetime.now(dt.UTC)).kept == [], (
            "nothing is to be released there"
        )
        gone = Base("../gone", "d" * 32, "e" * 32)
        assert [place for place, _ in release(store, [gone]).kept] == ["../gone"]
    assert len(pins_in(runs / "a")) == 1


def test_a_damaged_pin_of_somebody_else_is_in_nobodys_way(runs):
    (runs / "a" / "pins" / f"{'f' * 32}.json").write_text("{}")
    empty(runs / "b")
    assert [path.name for path in (runs / "a" / "pins").glob("*")] == [f"{'f' * 32}.json"]


def test_a_pin_of_a_store_of_which_some_version_is_damaged_has_to_stay(runs):
    with trajstore.open(runs / "b", "a") as store:
        store.delete([0])
    path = runs / "b" / "snapshots" / "00000000000000000001.json"
    path.write_bytes(path.read_bytes().replace(b"merge", b"mergf"))
    with trajstore.open(runs / "a") as store:
        findings = [finding for finding in store.verify().findings if finding.kind == "pin-borrower"]
    assert [finding.severity for finding in findings] == ["note"]
    assert "not every version can be read, so that it has to stay" in findings[0].message
