"""A loader under torch's DataLoader, and on its way to another process."""

from __future__ import annotations

import copy
import itertools
import pickle
import uuid

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import trajstore
from trajstore import Column

SCHEMA = [
    Column(path="obs/image", dtype="uint8", shape=(8, 8, 3), extra=1, page_rows=8),
    Column(path="obs/state", dtype="float32", shape=(3,), extra=1),
    Column(path="action", dtype="int64"),
    Column(path="note", dtype="string"),
    Column(path="points", dtype="int16", ragged=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("workers") / "s"
    with trajstore.open(path, "x", schema=SCHEMA) as store:
        fill(store)
    return path


def fill(store):
    for number in range(6):
        rng = np.random.default_rng(number)
        length = 20 + number
        observation = {
            "image": rng.integers(0, 256, (length + 1, 8, 8, 3), np.uint8),
            "state": rng.standard_normal((length + 1, 3), np.float32),
        }
        note = [f"{number} {step}" for step in range(length)]
        points = [np.arange(step % 4, dtype=np.int16) for step in range(length)]
        action = 1000 * number + np.arange(length)
        store.append({"obs": observation, "action": action, "note": note, "points": points})


@pytest.fixture
def view(folder):
    with trajstore.open(folder) as store:
        yield store.trajectories


def in_workers(loader, num_workers=2, **options):
    return DataLoader(loader, batch_size=None, num_workers=num_workers, multiprocessing_context="spawn", **options)


def assert_same(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for batch, other in zip(found, expected, strict=True):
        assert_same_batch(batch, other)


def assert_same_batch(batch, other):
    assert list(batch) == list(other)
    for name, value in other.items():
        if isinstance(value, dict):
            assert_same_batch(batch[name], value)
        elif isinstance(value, tuple):  # a DataLoader makes lists of tuples
            assert all(torch.equal(a, b) for a, b in zip(batch[name], value, strict=True))
        elif isinstance(value, np.ndarray):
            np.testing.assert_array_equal(batch[name], value)
        else:
            assert batch[name].dtype == value.dtype
            assert torch.equal(batch[name], value)


EVERYTHING = ["obs", "action", "note", "points", "step", "is_last"]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("order", ["sequential", "shuffle"])
def test_without_workers_it_is_the_loader(view, order, prefetch):
    options = {"order": order, "window": 3, "pad": "zero", "columns": EVERYTHING, "epochs": 2, "seed": 3}
    loader = DataLoader(view.loader(7, prefetch=prefetch, **options), batch_size=None)
    expected = view.loader(7, **options)
    assert len(loader) == len(expected)
    assert_same(loader, expected)
    assert_same(loader, expected)  # the next pass


def test_workers_make_the_same_batches_in_the_same_order(view):
    options = {"order": "shuffle", "window": 3, "pad": "zero", "columns": EVERYTHING, "epochs": 2, "seed": 3}
    expected = view.loader(7, **options)
    loader = in_workers(view.loader(7, **options), persistent_workers=True)
    assert len(loader) == len(expected) == 40
    assert_same(loader, expected)
    assert_same(loader, expected)  # the next pass, by the same workers
    assert_same(loader, expected)
    assert expected.state_dict()["batches"] == 120


@pytest.mark.slow
def test_workers_of_an_endless_order_and_of_fewer_batches_than_workers(view):
    expected = view.loader(5, seed=1)
    assert_same(itertools.islice(in_workers(view.loader(5, seed=1)), 9), itertools.islice(expected, 9))
    whole = {"order": "sequential", "columns": ["action"]}
    assert_same(in_workers(view.loader(1000, **whole)), view.loader(1000, **whole))


@pytest.mark.slow
def test_workers_begin_where_the_loader_is(view):
    options = {"order": "shuffle", "columns": ["action"], "epochs": 3}
    loader, expected = view.loader(9, **options), view.loader(9, **options)
    for batches in (loader, expected):
        for _ in range(7):
            next(batches)
    assert_same(in_workers(loader), expected)


@pytest.mark.slow
def test_forked_workers_are_told_to_spawn(view):
    loader = view.loader(5)
    forked = DataLoader(loader, batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(trajstore.ForkedError, match="spawn"):
        next(iter(forked))
    assert next(loader)["action"].shape == (5,)


@pytest.mark.slow
def test_what_fails_in_a_worker_is_raised_with_its_own_type(tmp_path):
    with trajstore.open(tmp_path / "s", "x", schema=SCHEMA) as store:
        fill(store)
        store.flush()
        loader = in_workers(store.trajectories.loader(5), 1)
    (tmp_path / "s" / "trajstore.json").unlink()
    with pytest.raises(trajstore.StoreNotFoundError, match="check the path"):
        next(iter(loader))


@pytest.mark.slow
def test_priorities_are_not_for_workers(view):
    with pytest.raises(trajstore.SelectionError, match="iterate over the loader itself"):
        next(iter(in_workers(view.loader(5, order="prioritized"), 1)))


# Pickling


def test_a_pickled_loader_goes_on_where_the_original_is(view):
    options = {"order": "shuffle", "window": 2, "columns": EVERYTHING}
    loader, expected = view.loader(7, **options), view.loader(7, **options)
    for _ in range(3):
        assert_same_batch(next(loader), next(expected))
    copied = pickle.loads(pickle.dumps(loader))
    rest = list(expected)
    assert_same(loader, rest)
    assert_same(copied, rest)
    copied.close()


def test_a_pickled_loader_opens_nothing_before_it_is_used(view, folder):
    data = pickle.dumps(view.loader(7, order="sequential"))
    assert len(data) < 5000
    loader = pickle.loads(data)
    assert loader._made is None
    assert len(loader) == len(view.loader(7, order="sequential"))
    assert loader._made is not None
    loader.close()
    unused = pickle.loads(data)
    unused.close()
    with pytest.raises(trajstore.ClosedError):
        next(unused)


def test_a_store_that_is_gone_is_said_by_the_loader_that_needs_it(tmp_path):
    with trajstore.open(tmp_path / "s", "x", schema=SCHEMA) as store:
        fill(store)
        store.flush()
        loader = pickle.loads(pickle.dumps(store.trajectories.loader(5)))
    (tmp_path / "s" / "trajstore.json").unlink()
    again = pickle.loads(pickle.dumps(loader))  # on to a third process
    with pytest.raises(trajstore.StoreNotFoundError, match="check the path"):
        next(again)


def test_a_relative_path_means_the_same_place_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with trajstore.open("here", "x", schema=SCHEMA) as store:
        fill(store)
        store.flush()
        data = pickle.dumps(store.trajectories)
    monkeypatch.chdir("/")
    assert len(pickle.loads(data)) == 6


def test_a_store_in_memory_stays_in_its_process():
    with trajstore.open(f"memory://workers/{uuid.uuid4().hex}", "a", schema=SCHEMA) as store:
        fill(store)
        store.flush()
        view = store.trajectories
        for copying in (pickle.dumps, copy.deepcopy):
            for what in (view, view.loader(3)):
                with pytest.raises(trajstore.StoreNotFoundError, match=r"memory://.*cannot go to another process"):
                    copying(what)
        with pytest.raises(trajstore.StoreNotFoundError, match="cannot go to another process"):
            next(iter(in_workers(view.loader(3))))


def test_what_is_not_yet_committed_stays_in_its_process(tmp_path):
    with trajstore.open(tmp_path / "s", "x", schema=SCHEMA[:1], commit_interval_s=3600) as store:
        store.append({"obs": {"image": np.zeros((3, 8, 8, 3), np.uint8)}})
        assert len(store.trajectories) == 1  # looks at its own appends from now on
        store.flush()
        store.append({"obs": {"image": np.zeros((3, 8, 8, 3), np.uint8)}})
        view = store.trajectories
        assert view.ids.tolist() == [0, -1]
        for _ in range(2):  # it does not help that they are committed later: the view is of the version before
            for what in (view, view.loader(3), view.take([1])):
                with pytest.raises(trajstore.SelectionError, match="take the view again"):
                    pickle.dumps(what)
            store.flush()
        assert pickle.loads(pickle.dumps(view.take([0]))).ids.tolist() == [0]
        assert pickle.loads(pickle.dumps(store.trajectories)).ids.tolist() == [0, 1]
