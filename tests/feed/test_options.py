"""n-step returns, anchors, goals, mixtures and samples by example, and what a loader refuses.

The trajectories are those of ``test_windows``.
"""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
import torch

import trajstore
from tests.feed.test_windows import RECORDING, floats, load
from tests.support.recordings import append, assert_same_batch, view_of
from tests.support.reference import Recorded, Recording
from trajstore import Column, Schema


@pytest.fixture(scope="module")
def view():
    with view_of(RECORDING, flush_after=(0,)) as view:
        yield view


# n-step


def test_n_step_sums_discounts_and_bootstraps(view):
    batch = load(view, n_step=3, gamma=0.5, columns=["obs", "action", "reward"])
    assert batch["obs"] == [10, 11, 12, 13, 20, 21]
    assert batch["action"] == [0, 1, 2, 3, 4, 5]
    assert batch["reward"] == [1 + 1 + 0.75, 2 + 1.5 + 1, 3 + 2, 4, 5 + 3, 6]
    assert batch["next_obs"] == [13, 14, 14, 14, 22, 22]
    # Nothing is worth anything after a terminal state; after a truncation, the final observation's value counts.
    assert batch["discount"] == [0.125, 0, 0, 0, 0.25, 0.5]


def test_one_step_is_a_transition(view):
    batch = load(view, n_step=1, gamma=0.5, columns=["obs", "reward"])
    assert batch == {
        "obs": [10, 11, 12, 13, 20, 21],
        "reward": [1, 2, 3, 4, 5, 6],
        "next_obs": [11, 12, 13, 14, 21, 22],
        "discount": [0.5, 0.5, 0.5, 0, 0.5, 0.5],
    }


def test_n_step_with_stacked_observations(view):
    """The bootstrap observation is stacked like the observation; the stack restricts the anchors."""
    batch = load(view, window={"obs": [-1, 0], "action": 0, "reward": 0}, n_step=2, gamma=1.0)
    assert batch["obs"] == [[10, 11], [11, 12], [12, 13], [20, 21]]
    assert batch["next_obs"] == [[12, 13], [13, 14], [13, 14], [21, 22]]
    assert batch["reward"] == [5, 7, 4, 6]
    assert batch["discount"] == [1, 0, 0, 1]


@pytest.mark.parametrize("pad", ["none", "edge"])
def test_a_truncated_end_whose_final_observation_was_not_stored_is_no_anchor(pad):
    schema = Schema((Column(path="obs", dtype="float32"), Column(path="reward", dtype="float32")))
    made = [
        Recorded({"obs": floats(10, 11, 12), "reward": floats(1, 2, 3)}, 3, terminated=True),
        Recorded({"obs": floats(20, 21, 22), "reward": floats(4, 5, 6)}, 3, truncated=True),
    ]
    recording = Recording(schema, made)
    with view_of(recording) as view:
        batch = load(view, recording, window={"obs": 0, "reward": 0}, n_step=2, gamma=0.5, pad=pad)
    assert batch["obs"] == [10, 11, 12, 20]
    assert batch["reward"] == [2, 3.5, 3, 6.5]
    assert batch["next_obs"] == [12, 12, 12, 22]  # the terminal ones were not stored: any will do
    assert batch["discount"] == [0.25, 0, 0, 0.25]


@pytest.mark.parametrize(
    "column",
    [
        Column(path="reward", dtype="float32", shape=(2,)),
        Column(path="reward", dtype="bool"),
        Column(path="x", dtype="int8"),
    ],
    ids=lambda column: f"{column.path} {column.describe()}",
)
def test_n_step_sums_one_number_per_step_and_nothing_else(column):
    rows = np.zeros((3, *column.shape), column.dtype)
    with (
        view_of(Recording(Schema((column,)), [Recorded({column.path: rows}, 3)])) as view,
        pytest.raises(trajstore.SelectionError, match="'reward', one number per step"),
    ):
        view.loader(2, n_step=2)


@pytest.mark.parametrize(("dtype", "summed"), [("float64", "float64"), ("float16", "float16"), ("int32", "float32")])
def test_n_step_rewards_keep_a_floating_dtype(dtype, summed):
    schema = Schema((Column(path="reward", dtype=dtype),))
    with view_of(Recording(schema, [Recorded({"reward": np.array([1, 2], dtype)}, 2)])) as view:
        batch = next(iter(view.loader(2, order="sequential", n_step=2, gamma=0.5)))
    assert (batch["reward"].dtype, batch["reward"].tolist()) == (getattr(torch, summed), [2, 2])
    assert batch["discount"].dtype == torch.float32


# Anchors


def test_anchors_may_be_those_where_a_column_is_true(view):
    assert load(view, anchors="good", columns=["action"]) == {"action": [1, 2, 4]}
    assert load(view, anchors="good", window=2, columns=["action"]) == {"action": [[1, 2], [2, 3], [4, 5]]}
    assert load(view, anchors="good", window=3, columns=["action"]) == {"action": [[1, 2, 3]]}


def test_anchors_may_be_an_array_over_all_steps(view):
    mask = np.array([True, False, False, True, False, True])
    assert load(view, anchors=mask, columns=["action"]) == {"action": [0, 3, 5]}
    assert load(view, anchors=mask, window=2, columns=["action"]) == {"action": [[0, 1]]}
    assert load(view, anchors=mask, window=2, pad="edge", columns=["action"])["action"] == [[0, 1], [3, 3], [5, 5]]


# Goals


def goals(view, column, gamma, **knobs):
    """Pairs of an observation's step and its goal, of the first trajectory."""
    window = {"trajectory": 0, "step": 0, "goal": trajstore.future(column, gamma)}
    with view.loader(1000, window=window, **knobs) as loader:
        batch = next(iter(loader))
    first = batch["trajectory"] == 0
    return list(zip(batch["step"][first].tolist(), batch["goal"][first].tolist(), strict=True)), batch


def test_future_reads_a_later_row_of_the_same_trajectory(view):
    pairs, batch = goals(view, "obs", 1.0)
    assert batch["goal"].shape == (1000,)
    assert {s: {g for t, g in pairs if t == s} for s in range(4)} == {
        0: {11, 12, 13, 14},
        1: {12, 13, 14},
        2: {13, 14},
        3: {14},
    }
    second = batch["trajectory"] == 1
    assert set(batch["goal"][second].tolist()) == {21, 22}


def test_where_nothing_is_further_future_stays(view):
    pairs, _ = goals(view, "action", 1.0)
    assert {g for s, g in pairs if s == 3} == {3}
    assert {g for s, g in pairs if s == 2} == {3}


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_future_is_geometric(view, gamma):
    counts = collections.Counter(
        goal for seed in range(20) for step, goal in goals(view, "obs", gamma, seed=seed)[0] if step == 0
    )
    total = sum(counts.values())  # about 3,300
    weights = {11 + j: gamma**j for j in range(4)}
    for goal, weight in weights.items():
        assert abs(counts[goal] / total - weight / sum(weights.values())) < 0.04


def test_goals_depend_on_the_seed_alone(view):
    one, _ = goals(view, "obs", 0.9, seed=1, prefetch=0)
    assert goals(view, "obs", 0.9, seed=1, prefetch=4)[0] == one
    assert goals(view, "obs", 0.9, seed=2)[0] != one


# Mixtures and single batches


def test_a_mixture_has_fixed_shares(view):
    first, second = view.take([0]), view.take([1])
    names = ["source", "trajectory", "action"]
    with trajstore.mix({first: 0.75, second: 0.25}).loader(8, columns=names, seed=3) as loader:
        for batch in itertools.islice(loader, 20):
            assert batch["source"].tolist() == [0] * 6 + [1] * 2
            assert batch["source"].dtype == torch.int64
            assert set(batch["action"][:6].tolist()) <= {0, 1, 2, 3}
            assert set(batch["action"][6:].tolist()) <= {4, 5}
            assert batch["trajectory"].tolist() == [0] * 8  # of its own view


def test_sample_is_one_batch_and_takes_the_options_of_a_loader(view):
    assert view.sample(5)["obs"].shape == (5,)
    batch = view.sample(50, seed=1, window=2, columns=["action", "next_obs"], anchors="good")
    assert {tuple(row) for row in batch["action"].tolist()} == {(1, 2), (2, 3), (4, 5)}
    assert_same_batch(view.sample(9, seed=4), view.sample(9, seed=4))


# What is refused

WRONG = {
    "a window longer than any trajectory": ({"window": 5, "columns": ["action"]}, r"longest\D*4"),
    "no anchor chosen": ({"anchors": np.zeros(6, bool)}, "anchors=.*0 of 6"),
    "no step in a window": ({"window": 0}, "window=0"),
    "no dilation": ({"window": 2, "dilation": 0}, "dilation=0"),
    "no column in a mapping": ({"window": {}}, "no column"),
    "no offset": ({"window": {"obs": []}}, "obs"),
    "two places for columns": ({"window": {"obs": 0}, "columns": ["action"]}, "columns"),
    "padding": ({"pad": "mirror"}, "pad='mirror'"),
    "no n-step": ({"n_step": 0}, "n_step=0"),
    "order": ({"order": "shuffel"}, "order='shuffel'"),
    "batch size": ({"batch_size": 0}, "batch_size=0"),
    "batch size over ranks": ({"batch_size": 5, "world_size": 2}, "batch_size=5.*world_size=2"),
    "rank": ({"rank": 2, "world_size": 2}, "rank=2"),
    "negative rank": ({"rank": -1, "world_size": 2}, "rank=-1"),
    "no ranks": ({"world_size": 0}, "world_size=0"),
    "epochs": ({"order": "shuffle", "epochs": 0}, "epochs=0"),
    "anchors of another view": ({"anchors": np.ones(7, bool)}, "7.*6"),
    "anchors that are numbers": ({"anchors": np.arange(6)}, "anchors.*int64"),
    "anchors by a column of numbers": ({"anchors": "reward"}, "'reward'.*float32"),
    "weights of another view": ({"weights": np.ones(3)}, "weights.*3.*2"),
    "negative weights": ({"weights": np.array([1.0, -1.0])}, "weights"),
    "weights that are not numbers": ({"weights": np.array([1.0, np.nan])}, "weights"),
    "weights of nothing": ({"weights": np.zeros(2)}, "weights"),
    "weights by text": ({"weights": "task"}, "'task'"),
    "weights without a choice": ({"weights": np.ones(2), "order": "shuffle"}, "weights.*order"),
    "whole numbers that are null": ({"columns": ["solved"]}, "'solved'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_loader_refuses_at_construction(view, case):
    options, message = WRONG[case]
    with pytest.raises(trajstore.SelectionError, match=message):
        view.loader(**{"batch_size": 4, **options})


def test_unknown_names_are_refused(view):
    for options in (
        {"columns": ["nothing"]},
        {"window": {"nothing": 0}},
        {"anchors": "nothing"},
        {"weights": "nothing"},
    ):
        with pytest.raises(trajstore.TrajstoreError, match="'nothing'"):
            view.loader(4, **options)
    with pytest.raises(trajstore.UnknownColumnError, match="next_nothing"):
        view.loader(4, columns=["next_nothing"])


def test_a_column_that_some_trajectories_lack_is_refused_when_named():
    schema = Schema((Column(path="x", dtype="int8"), Column(path="maybe", dtype="int8", presence="optional")))
    with trajstore.open("memory://sampling/lacking", "a", schema=schema) as store:
        append(store, Recorded({"x": np.zeros(2, np.int8)}, 2))
        append(store, Recorded({"x": np.zeros(2, np.int8), "maybe": np.zeros(2, np.int8)}, 2))
        store.flush()
        view = store.trajectories
        for options in ({"columns": ["maybe"]}, {"window": {"maybe": 0}}, {"columns": ["next_maybe"]}):
            with pytest.raises(trajstore.SelectionError, match="'maybe' is lacking from 1 of 2"):
                view.loader(4, **options)
        assert set(view.sample(4)) == {"x"}
        assert set(view.take([1]).sample(4)) == {"x", "maybe"}


def test_an_empty_view_has_no_anchor(view):
    with pytest.raises(trajstore.SelectionError):
        view.first(0).loader(4)


def test_a_closed_loader_says_so(view):
    loader = view.loader(4)
    batches = iter(loader)
    next(batches)
    loader.close()
    loader.close()
    with pytest.raises(trajstore.ClosedError):
        next(batches)
    with pytest.raises(trajstore.ClosedError):
        next(iter(loader))
