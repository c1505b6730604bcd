"""Columns whose names batches give a meaning of their own."""

from __future__ import annotations

import numpy as np
import pytest

import trajstore
from trajstore.errors import ColumnNameError, SelectionError
from trajstore.schema import Column


def good(length=4):
    return {"obs": np.zeros((length + 1, 2), np.float32), "reward": np.ones(length, np.float32)}


def stream(store, **more):
    with store.begin() as episode:
        episode.add(obs=np.zeros(2), reward=1.0, **more)
        episode.end(np.zeros(2))


@pytest.mark.parametrize("name", ["terminated", "truncated"])
def test_a_flag_per_step_is_not_quietly_a_column(tmp_path, name):
    ended = np.array([False, False, False, True])
    with trajstore.open(tmp_path / "s", "a") as store:
        with pytest.raises(ColumnNameError, match=rf"pass {name}=bool.*declare it"):
            store.append({**good(), name: ended})
        with pytest.raises(ColumnNameError, match=rf"pass {name}=bool"):
            store.append_many({**good(), name: ended}, [4])
        with pytest.raises(ColumnNameError, match=rf"pass {name}=bool"):
            stream(store, **{name: False})
        assert not len(store.trajectories)
        store.declare([Column(path=name, dtype="bool"), Column(path="reward", dtype="float32")])
        store.append({"reward": np.ones(4, np.float32), name: ended})
        store.flush()
        assert store.trajectories[0][name][:].tolist() == ended.tolist()


def test_below_another_name_it_is_a_column_as_any(tmp_path):
    with trajstore.open(tmp_path / "s", "a") as store:
        store.append({**good(), "info": {"terminated": np.zeros(4, bool)}})
        assert "info/terminated" in store.schema


@pytest.mark.parametrize("name", ["terminated", "is_first", "index", "weight", "is_pad", "length", "id", "step"])
def test_a_computed_column_hides_nothing_that_batches_have(tmp_path, name):
    with trajstore.open(tmp_path / "s", "a") as store:
        store.append(good())
        store.flush()
        with pytest.raises(ColumnNameError, match=f"'{name}' has a name that .*choose another name"):
            store.add_column(name, lambda t: t["reward"])
        assert store.version == 1


@pytest.mark.parametrize("name", ["index", "weight"])
def test_priorities_say_which_column_is_in_the_way(tmp_path, name):
    with trajstore.open(tmp_path / "s", "a") as store:
        store.append({**good(), name: np.arange(4)})
        view = store.trajectories
        with pytest.raises(SelectionError, match=f"column '{name}' has the name of what order='prioritized' adds"):
            view.loader(2, order="prioritized")
        with view.loader(2, order="prioritized", columns=["obs", "reward"]) as loader:
            assert set(next(iter(loader))) == {"obs", "reward", "index", "weight"}
