"""Deleting: what is left, what earlier versions keep, and what happens beside other writers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import trajstore
from tests.edit.stores import HeldDisk, append, assert_holds, filled, holds, numbers_in
from tests.support.race import race
from tests.support.rare import diagonal
from trajstore import Column
from trajstore.errors import ClosedError, IndexRangeError, ReadOnlyError, SchemaConflictError, SelectionError
from trajstore.opening import open_on
from trajstore.write.batch import WriteOptions

TIMEOUT_S = 60


@pytest.fixture
def url(tmp_path):
    return str(tmp_path / "store")


def test_what_is_no_collection_of_ids_is_refused_with_what_to_write(url):
    filled(url, range(3), per_commit=3)
    with trajstore.open(url, "a") as store:
        with pytest.raises(SelectionError, match=r"found a view; give its ids: delete\(view.ids\)"):
            store.delete(store.trajectories)
        with pytest.raises(SelectionError, match=r"found 3; write delete\(\[3\]\)"):
            store.delete(3)
        assert len(store.trajectories) == 3


@pytest.mark.parametrize(
    ("per_commit", "gone"),
    diagonal([1, 4, 100], [[0], [11], [3, 4, 5], [0, 2, 4, 6, 8, 10], list(range(12)), []]),
)
def test_what_is_deleted_is_gone_and_the_rest_keeps_its_ids(url, per_commit, gone):
    filled(url, range(12), per_commit=per_commit)
    with trajstore.open(url, "a") as store:
        before = store.version
        kept = [n for n in range(12) if n not in gone]
        assert store.delete(gone) == before + 1 == store.version
        view = store.trajectories
        assert view.ids.tolist() == kept
        assert_holds(view, kept)
        assert store.num_trajectories == len(kept)
        assert store.usage().trajectories == len(kept)
        append(store, 12)
        store.flush()
        assert store.trajectories.ids.tolist() == [*kept, 12], "no number is given twice"
        assert store.versions()["operation"].tolist()[:2] == ["append", "delete"]
        assert store.versions()["trajectories"].tolist()[:2] == [len(kept) + 1, len(kept)]
        assert store.versions()["steps"].iloc[1] == sum(1 + n % 7 for n in kept)
    holds(url, [*kept, 12])
    with trajstore.open(url, version=before) as store:
        assert_holds(store.trajectories, range(12))


def test_an_empty_store_takes_appends_again_and_keeps_its_schema(url):
    filled(url, range(3))
    with trajstore.open(url, "a") as store:
        store.delete(store.trajectories.ids)
        assert len(store.trajectories) == 0
        assert "obs/image" in store.schema
        append(store, 3)
        assert_holds(store.trajectories, [3])
    holds(url, [3])


def test_ids_may_be_any_integers_in_any_order_and_repeated(url):
    filled(url, range(6))
    with trajstore.open(url, "a") as store:
        store.delete(np.array([5, 0, 5], np.uint8))
        store.delete(iter([3]))
        store.delete({1})
        assert numbers_in(store.trajectories) == [2, 4]


@pytest.mark.parametrize("ids", [[0.0], [1.7], np.array([0.0]), ["0"], np.array([True, False]), [None], [2**80]])
def test_ids_that_are_no_integers_are_refused_and_nothing_is_deleted(url, ids):
    filled(url, range(3))
    with trajstore.open(url, "a") as store:
        with pytest.raises(SelectionError, match="integers"):
            store.delete(ids)
        assert store.version == 3
        assert_holds(store.trajectories, range(3))


@pytest.mark.parametrize("ids", [[3], [-1], [0, 99], [2**62]])
def test_an_id_that_is_not_there_deletes_nothing(url, ids):
    filled(url, range(3))
    with trajstore.open(url, "a") as store:
        with pytest.raises(IndexRangeError, match="fresh view"):
            store.delete(ids)
        assert store.version == 3
        store.delete([1])
        with pytest.raises(IndexRangeError, match="1 of 1 trajectories to delete are not in version 4: "):
            store.delete([1])
    holds(url, [0, 2])


def test_a_reader_and_a_closed_handle_delete_nothing(url):
    filled(url, range(2))
    with trajstore.open(url) as store, pytest.raises(ReadOnlyError):
        store.delete([0])
    with trajstore.open(url) as store, pytest.raises(ReadOnlyError):
        store.clear()
    store = trajstore.open(url, "a")
    store.close()
    for call in (lambda: store.delete([0]), store.clear):
        with pytest.raises(ClosedError):
            call()
    holds(url, [0, 1])


def test_what_was_appended_before_is_committed_and_can_be_deleted_once_it_has_an_id(url):
    with trajstore.open(url, "a") as store:
        refs = [append(store, n) for n in range(3)]
        assert store.trajectories.ids.tolist() == [0, 1, 2]
        more = [append(store, n) for n in range(3, 6)]
        view = store.trajectories
        assert view.ids.tolist() == [0, 1, 2, -1, -1, -1]
        with pytest.raises(IndexRangeError, match="fresh view"):
            store.delete(view.ids)  # flushed, but these ids name nothing
        assert [ref.id for ref in (*refs, *more)] == [0, 1, 2, 3, 4, 5]
        assert_holds(view, range(6))
        append(store, 6)
        store.delete([more[0].id, refs[1].id])
        assert store.pending == 0
        assert_holds(store.trajectories, [0, 2, 4, 5, 6])
        assert_holds(view, range(6))  # a view never changes
    holds(url, [0, 2, 4, 5, 6])


def test_deleting_beside_an_episode_that_is_being_recorded(url):
    with trajstore.open(url, "a", spill_bytes=256) as store:
        with store.begin(number=7) as episode:
            for step in range(40):
                episode.add(sensor=np.full(8, step), action=step)
                if step == 20:
                    store.delete([])
            episode.end()
        store.flush()
        store.delete(store.trajectories.ids, reclaim=True)
        with store.begin(number=8) as episode:
            for step in range(60):
                episode.add(sensor=np.full(8, step), action=step)
                if step % 20 == 10:
                    store.delete(store.trajectories.ids, reclaim=True)
            episode.end()
        store.flush()
        (only,) = store.trajectories
        np.testing.assert_array_equal(only["action"][:], np.arange(60))
        np.testing.assert_array_equal(only["sensor"][:], np.arange(60)[:, None].repeat(8, 1))


# Other writers


def test_a_delete_lands_on_what_another_handle_appended_meanwhile(url):
    filled(url, range(4))
    with trajstore.open(url, "a") as one, trajstore.open(url, "a") as other:
        for n in (4, 5):
            append(other, n)
            other.flush()
        assert one.version == 4
        assert one.delete([1, 5]) == 7, "rebased; an id that this handle has not seen will do"
        assert_holds(one.trajectories, [0, 2, 3, 4])
        append(other, 6)
        other.flush()
        assert_holds(other.trajectories, [0, 2, 3, 4, 6])
        with pytest.raises(IndexRangeError):
            other.delete([5])


def test_a_handle_goes_on_after_another_has_reclaimed_what_its_version_needs(url):
    filled(url, range(8))
    with trajstore.open(url, "a") as one, trajstore.open(url, "a") as other, trajstore.open(url, "a") as third:
        other.delete([0, 3], reclaim=True)
        assert one.delete([5]) == 10
        append(third, 8)
        third.flush()
        assert_holds(third.trajectories, [1, 2, 4, 6, 7, 8])
    holds(url, [1, 2, 4, 6, 7, 8])


def test_of_two_deletes_of_the_same_trajectory_one_fails_and_says_so(url):
    filled(url, range(4))
    with trajstore.open(url, "a") as one, trajstore.open(url, "a") as other:
        one.delete([1])
        with pytest.raises(IndexRangeError, match="1 of 2 trajectories to delete are not in version 5"):
            other.delete([1, 2])
        assert other.refresh() == 5
        other.delete([2])
    holds(url, [0, 3])


@pytest.mark.parametrize("commits", [5, 12, 40])
def test_a_delete_lands_after_manifests_were_merged(url, commits):
    filled(url, range(commits))
    with trajstore.open(url, "a") as one, trajstore.open(url, "a") as other:
        kept = list(range(commits))
        for n in range(commits, 2 * commits):
            append(other, n)
            other.flush()
            kept.append(n)
            if n % 3 == 0:  # the handle's head is some versions, and a merge or two, behind
                gone = kept[(7 * n) % len(kept)]
                one.delete([gone])
                kept.remove(gone)
        other.refresh()
        assert len(other._head.snapshot.manifests) < 30
        assert_holds(other.trajectories, kept)
        assert other.trajectories.ids.tolist() == kept
    holds(url, kept)


def test_a_merge_that_was_under_way_when_a_delete_landed_brings_nothing_back(url):
    """Its manifest was made of what is now deleted: it is left out of the commit."""
    filled(url, range(5))  # the sixth commit merges
    disk = HeldDisk(url)
    deleted = []

    def after_a_delete(key, create):
        if not deleted:
            with trajstore.open(url, "a") as other:
                deleted.append(other.delete([2, 3]))
        return create()

    with open_on(disk, "a") as store:
        disk.around_create = after_a_delete
        append(store, 5)
        store.flush()
        assert store._history.races_lost == 1
        assert_holds(store.trajectories, [0, 1, 4, 5])
    holds(url, [0, 1, 4, 5])


def test_several_handles_append_and_one_deletes(url):
    """Every append lands once, and what was deleted stays gone."""
    filled(url, range(20))
    with ThreadPoolExecutor(4) as pool:

        def append_some(first):
            with trajstore.open(url, "a") as store:
                for n in range(first, first + 12):
                    append(store, n)
                    store.flush()

        def delete_all_twenty():
            with trajstore.open(url, "a") as store:
                for n in range(20):
                    store.delete([n])

        running = [pool.submit(append_some, first) for first in (100, 200, 300)] + [pool.submit(delete_all_twenty)]
        for task in running:
            task.result(TIMEOUT_S)
    with trajstore.open(url) as store:
        found = numbers_in(store.trajectories)
        assert sorted(found) == [*range(100, 112), *range(200, 212), *range(300, 312)]
        assert_holds(store.trajectories, found)
        assert store.version == 20 + 3 * 12 + 20


def test_processes_append_while_this_one_deletes(url):
    with trajstore.open(url, "a") as store:
        for n in range(30):
            store.append({"value": np.full((2, 2), [-1, n])}, writer=-1, n=n)
        store.flush()
        with ThreadPoolExecutor(1) as pool:
            racing = pool.submit(race, url, writers=2, commits=15)
            for n in range(30):
                store.delete([n])
            reports = racing.result(2 * TIMEOUT_S)
        assert store.refresh() == 1 + 30 + 30
        view = store.trajectories
        told = {number: report.writer for report in reports for _, number in report.landed}
        assert view.ids.tolist() == sorted(told)
        assert view.read("value")[::2, 0].tolist() == [told[number] for number in view.ids.tolist()]


def test_threads_of_one_handle_append_and_delete_and_reclaim(url):
    """A learner deletes what is oldest while actors append: segments and manifests under way are not taken for waste."""
    options = WriteOptions(segment_bytes=400)  # a commit every few trajectories, in the background
    with open_on(HeldDisk(url), "a", options=options) as store:
        append(store, 0)
        first = store.trajectories
        assert_holds(first, [0])
        done = threading.Event()

        def act(start):
            for n in range(start, start + 60):
                append(store, n)

        def learn():
            while not done.is_set():
                view = store.trajectories.filter("number >= 0")
                ids = view.ids[view.ids >= 0]
                if len(ids) > 8:
                    store.delete(ids[:-8], reclaim=True)

        with ThreadPoolExecutor(3) as pool:
            learner = pool.submit(learn)
            for actor in [pool.submit(act, 1000), pool.submit(act, 2000)]:
                actor.result(TIMEOUT_S)
            done.set()
            learner.result(TIMEOUT_S)
        store.flush()
        found = numbers_in(store.trajectories)
        assert_holds(store.trajectories, found)
        assert len(found) >= 8
    holds(url, found)


def test_a_commit_that_is_under_way_while_bytes_are_reclaimed_keeps_its_objects(url):
    """Its manifest and segments are stored, and no version names them yet."""
    filled(url, range(3))
    disk = HeldDisk(url)
    stored, reclaimed = threading.Event(), threading.Event()

    def between(key, create):
        if threading.current_thread().name == "trajstore-commit":
            stored.set()
            reclaimed.wait(0.5)  # reclaiming has to wait for this commit; were it not so, it would be done by then
        elif not stored.is_set():
            append(store, 3)  # after the flush of what was appended before
            assert stored.wait(TIMEOUT_S)
        return create()

    store = open_on(disk, "a", options=WriteOptions(segment_bytes=1))
    disk.around_create = between
    store.delete([0], reclaim=True)
    reclaimed.set()
    store.flush()
    assert_holds(store.trajectories, [1, 2, 3])
    store.close()
    holds(url, [1, 2, 3])


def test_a_handle_never_goes_back_to_an_older_version(url):
    """A commit in the background that is told late does not undo what was seen since."""
    filled(url, range(2))
    disk = HeldDisk(url)
    reached, go_on = threading.Event(), threading.Event()

    def told_late(key, create):
        won = create()
        if threading.current_thread().name == "trajstore-commit":
            reached.set()
            assert go_on.wait(TIMEOUT_S)
        return won

    store = open_on(disk, "a")
    assert_holds(store.trajectories, [0, 1])
    disk.around_create = told_late
    append(store, 2)
    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(store.flush)
        assert reached.wait(TIMEOUT_S)
        with trajstore.open(url, "a") as other:
            other.delete([0])
        assert store.refresh() == 4
        during = store.trajectories
        assert_holds(during, [1, 2])  # once, though its commit has not been told yet
        assert during.ids.tolist() == [1, 2]
        go_on.set()
        flushing.result(TIMEOUT_S)
    assert store.version == 4
    assert_holds(store.trajectories, [1, 2])
    append(store, 3)
    store.close()
    holds(url, [1, 2, 3])


# Following loaders


@pytest.mark.parametrize("order", ["random", "prioritized"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_following_loader_draws_nothing_that_was_deleted(url, order, prefetch):
    with trajstore.open(url, "a") as store:
        for n in range(1, 9):
            append(store, n)
        store.flush()
        view = store.trajectories
        options = {"columns": ["action", "trajectory", "step"], "order": order, "follow": True, "prefetch": prefetch}
        numbers = {}

        def drawn(loader):
            batch = next(loader)
            for place, n in zip(batch["trajectory"].tolist(), batch["action"][:, 0].tolist(), strict=True):
                assert numbers.setdefault(place, n) == n, "a number means the same trajectory for ever"
            return set(batch["action"][:, 0].tolist())

        with view.loader(64, timeout_s=TIMEOUT_S, **options) as loader:
            assert drawn(loader) <= set(range(1, 9))
            here = set(range(1, 9))
            for n in range(9, 20):
                append(store, n)
                store.flush()
                ids = store.trajectories.ids
                gone = store.trajectories[0].metadata["number"]
                store.delete(ids[:1])
                here = here - {gone} | {n}
                upcoming = [drawn(loader) for _ in range(prefetch + 2)]
                assert upcoming[-1] <= here, "what was planned before may still come, nothing later"
        with view.loader(64, columns=["action"], order="sequential") as loader:
            assert {n for batch in loader for n in batch["action"][:, 0].tolist()} == set(range(1, 9))


def test_a_following_loader_says_so_when_nothing_is_left_and_goes_on_with_what_comes(url):
    with trajstore.open(url, "a") as store:
        append(store, 1)
        with store.trajectories.loader(4, columns=["action"], follow=True, prefetch=0) as loader:
            next(loader)
            store.delete(store.trajectories.ids)
            with pytest.raises(SelectionError, match="the view holds 0"):
                next(loader)
            append(store, 2)
            assert set(next(loader)["action"].flatten().tolist()) == {2}


# Clearing


def test_clearing_empties_the_store_for_other_columns_and_earlier_versions_stay(url):
    filled(url, range(3))
    with trajstore.open(url, "a") as store:
        before = store.trajectories
        assert before.gather([1], [0], columns=["action"])["action"].tolist() == [[1, 1]]
        append(store, 3)
        assert store.clear() == 5
        assert (len(store.trajectories), store.num_trajectories, len(store.schema)) == (0, 0, 0)
        assert store.schema.metadata == {}
        # The same names with other types, and a field of another type.
        store.append({"action": np.arange(4, dtype=np.float64), "reward": np.eye(4)}, number="one")
        after = store.trajectories
        assert after.ids.tolist() == [4]
        for _ in range(2):  # both kinds of views are read, in turn, by everything that reads
            assert after.gather([0, 0], [1, 2])["action"].tolist() == [1.0, 2.0]
            assert before.gather([2, 1], [0, 0], columns=["action"])["action"].tolist() == [[2, 2], [1, 1]]
            assert_holds(before, range(3))
            np.testing.assert_array_equal(after.read("reward"), np.eye(4))
            (batch,) = after.loader(4, order="sequential")
            np.testing.assert_array_equal(batch["reward"], np.eye(4))
            with before.loader(6, order="sequential", columns=["reward"]) as loader:
                (batch,) = loader
            assert batch["reward"].tolist() == [0.0, 1 / 8, 1 + 1 / 8, 2 / 8, 1 + 2 / 8, 2 + 2 / 8]
            store.flush()
    with trajstore.open(url) as store:
        assert store.trajectories[0].metadata == {"number": "one"}
        assert store.versions()["operation"].tolist() == ["append", "clear", *["append"] * 4]
    with trajstore.open(url, version=4) as store:
        assert_holds(store.trajectories, range(4))


def test_another_handle_follows_a_clear_to_other_columns(url):
    filled(url, range(2))
    with trajstore.open(url, "a") as one, trajstore.open(url, "a") as other:
        assert_holds(one.trajectories, [0, 1])
        append(one, 2)
        one.flush()
        follower = one.trajectories.loader(4, columns=["action"], follow=True, prefetch=0, refresh_s=1e-9)
        next(follower)
        other.refresh()
        other.clear()
        other.append({"action": np.arange(3.0)})
        other.flush()
        with pytest.raises(SchemaConflictError, match="new loader"):
            next(follower)
        follower.close()
        assert one.refresh() == 5
        assert [c.path for c in one.schema] == ["action"]
        assert one.trajectories.gather([0], [2])["action"].tolist() == [2.0]
        one.append({"action": np.arange(2.0) + 5})
        assert one.trajectories.read("action").tolist() == [0, 1, 2, 5, 6]
        one.flush()
        assert one.trajectories.read("action").tolist() == [0, 1, 2, 5, 6]


def test_what_another_handle_appended_before_a_clear_fails_clearly_if_it_no_longer_fits(url):
    filled(url, range(2))
    with trajstore.open(url, "a") as one, trajstore.open(url, "a") as other:
        assert_holds(one.trajectories, [0, 1])
        append(one, 2)
        other.clear()
        other.append({"action": np.arange(3.0)})
        other.flush()
        with pytest.raises(
            SchemaConflictError, match="1 trajectories appended since the last commit are not in the store"
        ):
            one.flush()
        assert one.trajectories.read("action").tolist() == [0, 1, 2]
        one.append({"action": np.arange(2.0)})
        one.flush()
        assert one.trajectories.ids.tolist() == [2, 3]


def test_declared_columns_outlive_a_delete_and_not_a_clear(url):
    with trajstore.open(url, "a", schema=[Column(path="a", dtype="float32")]) as store:
        store.append({"a": [1, 2]})
        store.flush()
        store.declare([Column(path="b", dtype="int8", presence="optional")])
        store.delete([0])
        store.append({"a": [3], "b": [4]})
        assert store.trajectories[0]["b"][:].dtype == np.int8
        store.flush()
        assert store.schema["b"].dtype == "int8"
        store.clear()
        store.append({"a": ["text"]})
        assert store.trajectories[0]["a"][:].tolist() == ["text"]


def test_declared_columns_make_a_store_and_conflicts_are_refused(url):
    with trajstore.open(url, "a") as store:
        store.declare([Column(path="a", dtype="float32")])
        with pytest.raises(SchemaConflictError):
            store.declare([Column(path="a", dtype="int64")])
        with pytest.raises(SchemaConflictError, match="presence='optional'"):
            store.declare([Column(path="c", dtype="int64")])
        store.append({"a": [1, 2]})
        store.flush()
        assert store.trajectories.read("a").dtype == np.float32
