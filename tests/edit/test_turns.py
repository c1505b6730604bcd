"""Threads of one handle: what one stores, another does not take for waste."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import trajstore
from tests.edit.stores import append, filled, holds, numbers_in
from trajstore.errors import EditUnderWayError
from trajstore.storage.commit import History
from trajstore.storage.turns import Turns

TIMEOUT_S = 60
REMOVALS = {
    "reclaim": lambda store: store.delete([0], reclaim=True),
    "exclusive vacuum": lambda store: store.vacuum("0d", keep_for="0d", keep_versions=1, exclusive=True),
}


@pytest.fixture
def url(tmp_path):
    return filled(tmp_path / "store", range(12), per_commit=1)


def before_its_commit(store, operation, monkeypatch):
    """Two events: it is about to commit, and it may."""
    at, go = threading.Event(), threading.Event()
    commit = store._history.commit

    def waits(change, head, **options):
        if change.operation == operation:
            at.set()
            assert go.wait(TIMEOUT_S)
        return commit(change, head, **options)

    monkeypatch.setattr(store._history, "commit", waits)
    return at, go


@pytest.mark.parametrize("removal", REMOVALS)
@pytest.mark.parametrize("edit", ["compact", "add-column"])
def test_bytes_are_not_reclaimed_under_an_edit(url, monkeypatch, edit, removal):
    with trajstore.open(url, "a") as store, ThreadPoolExecutor(1) as pool:
        at, go = before_its_commit(store, edit, monkeypatch)
        doing = pool.submit(
            store.compact if edit == "compact" else lambda: store.add_column("double", lambda t: t["reward"] * 2)
        )
        assert at.wait(TIMEOUT_S)
        version = store.refresh()
        with pytest.raises(EditUnderWayError, match=r"under way in another thread .* do it again when that is done"):
            REMOVALS[removal](store)
        assert store.refresh() == version, "nothing was deleted"
        store.vacuum(keep_for="0d", keep_versions=1)  # leaves what is young
        append(store, 12)
        go.set()
        doing.result(TIMEOUT_S)
        REMOVALS[removal](store)
        assert not store.verify(deep=True).errors
    numbers = [*range(1 if removal == "reclaim" else 0, 13)]
    if edit == "compact":
        holds(url, numbers)
        return
    with trajstore.open(url) as store:
        assert numbers_in(store.trajectories) == numbers
        derived = store.trajectories.having("double")
        assert numbers_in(derived) == numbers[:-1]
        np.testing.assert_array_equal(derived.read("double"), 2 * derived.read("reward"))


def test_who_stores_waits_for_who_removes_and_is_waited_for_by_nobody():
    turns = Turns()
    done = []

    def edit():
        with turns.storing("an edit"):
            done.append("edit")

    with ThreadPoolExecutor(1) as pool:
        with turns.removing("a removal"):
            editing = pool.submit(edit)
            with pytest.raises(TimeoutError):
                editing.result(0.1)
            assert not done
        editing.result(TIMEOUT_S)
    with turns.storing("one"), turns.storing("another"), pytest.raises(EditUnderWayError, match="what one, under way"):
        turns.removing("a removal").__enter__()
    with turns.removing("a removal"):
        pass


def test_one_at_a_time_removes():
    turns = Turns()
    inside = threading.Lock()

    def remove(_):
        with turns.removing("a removal"):
            assert inside.acquire(blocking=False)
            time.sleep(0.001)
            inside.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(remove, range(40)))


@pytest.mark.parametrize("removal", REMOVALS)
def test_bytes_are_not_reclaimed_under_a_view_that_is_saved_onto_its_own_store(url, monkeypatch, removal):
    refused = []
    commit = History.commit

    def beside(history, change, head, **options):
        if change.operation == "save":
            with pytest.raises(EditUnderWayError, match=r"save\(\), under way in another thread") as error:
                REMOVALS[removal](store)
            refused.append(error)
        return commit(history, change, head, **options)

    with trajstore.open(url, "a") as store:
        monkeypatch.setattr(History, "commit", beside)
        store.trajectories.take([5, 0, 3]).save(url, replace=True)
        assert refused
    holds(url, [5, 0, 3])


def test_a_view_that_is_saved_elsewhere_keeps_nobody_from_removing(url, monkeypatch, tmp_path):
    commit = History.commit

    def beside(history, change, head, **options):
        if change.operation == "save":
            REMOVALS["exclusive vacuum"](store)
        return commit(history, change, head, **options)

    with trajstore.open(url, "a") as store:
        monkeypatch.setattr(History, "commit", beside)
        store.trajectories.save(tmp_path / "other")
    holds(tmp_path / "other", range(12))
