"""Every option that says what a batch is made of, by example: two short trajectories and the numbers that come out.

trajectory  step  obs  action  reward  good   note
0           0     10   0       1.0     no     a       terminated at step 3; its final observation is 14
            1     11   1       2.0     yes    bb
            2     12   2       3.0     yes
            3     13   3       4.0     no     d
1           0     20   4       5.0     yes    e       truncated at step 1; its final observation is 22
            1     21   5       6.0     no     ff
"""

from __future__ import annotations

import datetime as dt
import itertools
import math

import numpy as np
import pytest
import torch

from tests.support.recordings import assert_same_batch, flat_batch, view_of
from tests.support.reference import Recorded, Recording, reference_anchors, reference_batch
from trajstore import Column, Schema

SCHEMA = Schema(
    (
        Column(path="obs", dtype="float32", extra=1),
        Column(path="action", dtype="int64"),
        Column(path="reward", dtype="float32"),
        Column(path="good", dtype="bool"),
        Column(path="note", dtype="string"),
        Column(path="points", dtype="int16", shape=(2,), ragged=True),
    ),
    {"task": "string", "level": "int64", "score": "float64", "solved": "bool", "at": "timestamp", "key": "bytes"},
)


def floats(*values):
    return np.array(values, np.float32)


def points(*counts):
    """Lists of so many points; the number of a point is its first coordinate."""
    numbers = itertools.count()
    return [np.array([[next(numbers), -1] for _ in range(n)], np.int16).reshape(n, 2) for n in counts]


ALWAYS = {"level": 3, "at": dt.datetime(1970, 1, 1, 0, 0, 2, tzinfo=dt.UTC)}
FIRST = Recorded(
    {
        "obs": floats(10, 11, 12, 13, 14),
        "action": np.arange(4),
        "reward": floats(1, 2, 3, 4),
        "good": np.array([False, True, True, False]),
        "note": ["a", "bb", "", "d"],
        "points": points(1, 0, 2, 1),
    },
    4,
    terminated=True,
    metadata={"task": "pick", "score": 0.5, "key": b"\0", "solved": True, **ALWAYS},
)
SECOND = Recorded(
    {
        "obs": floats(20, 21, 22),
        "action": np.arange(4, 6),
        "reward": floats(5, 6),
        "good": np.array([True, False]),
        "note": ["e", "ff"],
        "points": points(2, 0),
    },
    2,
    truncated=True,
    metadata=ALWAYS,
)
RECORDING = Recording(SCHEMA, [FIRST, SECOND])


@pytest.fixture(scope="module")
def view():
    with view_of(RECORDING, flush_after=(0,)) as view:
        yield view


def load(view, recording=RECORDING, **options):
    """All windows of a view, in order, as lists; they are also what the reference says."""
    with view.loader(64, order="sequential", **options) as loader:
        [batch] = loader
    anchors = reference_anchors(recording, **options)
    assert_same_batch(batch, reference_batch(recording, anchors, **options), close=("reward", "discount"))
    return {name: listed(value) for name, value in flat_batch(batch).items()}


def listed(value):
    return tuple(v.tolist() for v in value) if isinstance(value, tuple) else value.tolist()


# Windows


def test_without_a_window_a_batch_holds_single_steps(view):
    batch = load(view, columns=["obs", "action"])
    assert batch == {"obs": [10, 11, 12, 13, 20, 21], "action": [0, 1, 2, 3, 4, 5]}


def test_a_window_of_two_steps_never_crosses_a_trajectory(view):
    batch = load(view, window=2, columns=["obs", "action"])
    assert batch == {"obs": [[10, 11], [11, 12], [12, 13], [20, 21]], "action": [[0, 1], [1, 2], [2, 3], [4, 5]]}


def test_a_window_of_one_step_has_a_time_dimension(view):
    assert load(view, window=1, columns=["action"]) == {"action": [[0], [1], [2], [3], [4], [5]]}


def test_states_alone_reach_to_the_final_observation(view):
    assert load(view, window=3, columns=["obs"]) == {"obs": [[10, 11, 12], [11, 12, 13], [12, 13, 14], [20, 21, 22]]}
    assert load(view, window=5, columns=["obs"]) == {"obs": [[10, 11, 12, 13, 14]]}


def test_dilation_takes_every_second_step(view):
    assert load(view, window=2, dilation=2, columns=["action"]) == {"action": [[0, 2], [1, 3]]}


def test_a_mapping_gives_each_column_its_own_offsets(view):
    batch = load(view, window={"obs": [-1, 0], "action": range(2), "reward": 0})
    assert batch == {"obs": [[10, 11], [11, 12]], "action": [[1, 2], [2, 3]], "reward": [2, 3]}


def test_offsets_may_come_in_any_order_and_twice(view):
    assert load(view, window={"obs": [2, 0, 0]}) == {"obs": [[12, 10, 10], [13, 11, 11], [14, 12, 12], [22, 20, 20]]}
    offsets = np.array([0, 1])
    assert load(view, window={"action": offsets})["action"] == load(view, window=2, columns=["action"])["action"]


def test_a_mapping_takes_virtual_columns_and_metadata(view):
    batch = load(view, window={"step": [0, 1], "trajectory": 0, "task": 0, "level": [0, 1]})
    assert batch["step"] == [[0, 1], [1, 2], [2, 3], [0, 1]]
    assert batch["trajectory"] == [0, 0, 0, 1]
    assert batch["task"] == ["pick", "pick", "pick", None]
    assert batch["level"] == [[3, 3]] * 4


@pytest.mark.parametrize(
    "options", [{"columns": ["obs"]}, {"window": {"obs": 0}}, {"columns": ["obs/image", "obs/speed"]}]
)
def test_a_parent_name_stands_for_all_columns_under_it(options):
    schema = Schema((Column(path="obs/image", dtype="uint8", shape=(1,)), Column(path="obs/speed", dtype="int8")))
    made = Recorded({"obs/image": np.array([[1], [2]], np.uint8), "obs/speed": np.array([3, 4], np.int8)}, 2)
    recording = Recording(schema, [made])
    with view_of(recording) as view:
        assert load(view, recording, **options) == {"obs/image": [[1], [2]], "obs/speed": [3, 4]}
        assert set(view.sample(1)["obs"]) == {"image", "speed"}


# Padding


def test_edge_repeats_the_first_and_last_row(view):
    batch = load(view, window=3, pad="edge", columns=["obs", "action"])
    assert batch["action"] == [[0, 1, 2], [1, 2, 3], [2, 3, 3], [3, 3, 3], [4, 5, 5], [5, 5, 5]]
    assert batch["obs"] == [[10, 11, 12], [11, 12, 13], [12, 13, 14], [13, 14, 14], [20, 21, 22], [21, 22, 22]]
    no, yes = False, True
    assert batch["is_pad"] == [[no, no, no], [no, no, no], [no, no, yes], [no, yes, yes], [no, no, yes], [no, yes, yes]]


def test_zero_fills_with_zeros_and_empty_values(view):
    batch = load(view, window=2, pad="zero", columns=["action", "good", "note", "points"])
    assert batch["action"] == [[0, 1], [1, 2], [2, 3], [3, 0], [4, 5], [5, 0]]
    assert batch["good"] == [[False, True], [True, True], [True, False], [False, False], [True, False], [False, False]]
    assert batch["note"] == [["a", "bb"], ["bb", ""], ["", "d"], ["d", ""], ["e", "ff"], ["ff", ""]]
    assert batch["points"][1] == [0, 1, 1, 1, 3, 5, 6, 7, 7, 9, 9, 9, 9]


def test_is_pad_of_a_mapping_is_per_column(view):
    batch = load(view, window={"obs": [0, 1], "action": [-1, 1], "reward": 1}, pad="zero")
    assert batch["obs"] == [[10, 11], [11, 12], [12, 13], [13, 14], [20, 21], [21, 22]]
    assert batch["is_pad/obs"] == [[False, False]] * 6  # its rows go one step further
    assert batch["action"] == [[0, 1], [0, 2], [1, 3], [2, 0], [0, 5], [4, 0]]
    no, yes = False, True
    assert batch["is_pad/action"] == [[yes, no], [no, no], [no, no], [no, yes], [yes, no], [no, yes]]
    assert batch["reward"] == [2, 3, 4, 0, 6, 0]
    assert batch["is_pad/reward"] == [no, no, no, yes, no, yes]


def test_single_steps_are_never_padded(view):
    assert load(view, pad="edge", columns=["action"])["is_pad"] == [False] * 6


def test_virtual_columns_are_padded_as_if_they_were_stored(view):
    names = ["step", "is_first", "is_last", "terminated", "truncated", "trajectory"]
    window = {name: [-1, 0, 2] for name in names}
    edge, zero = load(view, window=window, pad="edge"), load(view, window=window, pad="zero")
    last = [n for n, step in enumerate(edge["step"]) if step[1] == 1][-1]  # step 1 of trajectory 1
    assert {n: edge[n][last] for n in names} == {
        "step": [0, 1, 1],
        "is_first": [True, False, False],
        "is_last": [False, True, True],
        "terminated": [False, False, False],
        "truncated": [False, True, True],
        "trajectory": [1, 1, 1],
    }
    assert {n: zero[n][last] for n in names} == {
        "step": [0, 1, 0],
        "is_first": [True, False, False],
        "is_last": [False, True, False],
        "terminated": [False, False, False],
        "truncated": [False, True, False],
        "trajectory": [1, 1, 0],
    }


# Columns


def test_virtual_columns(view):
    batch = load(view, columns=["trajectory", "step", "is_first", "is_last", "terminated", "truncated"])
    no, yes = False, True
    assert batch == {
        "trajectory": [0, 0, 0, 0, 1, 1],
        "step": [0, 1, 2, 3, 0, 1],
        "is_first": [yes, no, no, no, yes, no],
        "is_last": [no, no, no, yes, no, yes],
        "terminated": [no, no, no, yes, no, no],
        "truncated": [no, no, no, no, no, yes],
    }


def test_trajectory_is_the_position_in_the_view(view):
    swapped = Recording(SCHEMA, [SECOND, FIRST, SECOND])
    batch = load(view.take([1, 0, 1]), swapped, window=2, columns=["trajectory", "action"])
    assert batch == {
        "trajectory": [[0, 0], [1, 1], [1, 1], [1, 1], [2, 2]],
        "action": [[4, 5], [0, 1], [1, 2], [2, 3], [4, 5]],
    }


def test_metadata_fields(view):
    batch = load(view, window=3, pad="zero", columns=["task", "level", "score", "at", "key"])
    assert batch["task"] == [["pick"] * 3] * 4 + [[None] * 3] * 2  # of the trajectory, so never padded
    assert batch["level"] == [[3] * 3] * 6
    assert batch["score"][3] == [0.5] * 3
    assert all(math.isnan(score) for score in batch["score"][4])
    assert batch["at"] == [[2_000_000_000] * 3] * 6  # nanoseconds
    assert batch["key"] == [[b"\0"] * 3] * 4 + [[None] * 3] * 2


def test_the_next_step_of_a_column(view):
    """Of states, the observation after the last action is a next one too; of the others, the last step has none."""
    assert load(view, columns=["obs", "next_obs"])["next_obs"] == [11, 12, 13, 14, 21, 22]
    assert load(view, columns=["action", "next_action"]) == {"action": [0, 1, 2, 4], "next_action": [1, 2, 3, 5]}
    assert load(view, window=2, columns=["next_obs"])["next_obs"] == [[11, 12], [12, 13], [13, 14], [21, 22]]
    assert load(view, window={"next_obs": [-1, 0]})["next_obs"] == [
        [10, 11],
        [11, 12],
        [12, 13],
        [13, 14],
        [20, 21],
        [21, 22],
    ]
    assert load(view, pad="edge", columns=["next_action"])["next_action"] == [1, 2, 3, 3, 5, 5]


def test_strings_and_lists_come_when_named(view):
    batch = load(view, columns=["note", "points"])
    assert batch["note"] == ["a", "bb", "", "d", "e", "ff"]
    values, offsets = batch["points"]
    assert values == [[0, -1], [1, -1], [2, -1], [3, -1], [0, -1], [1, -1]]
    assert offsets == [0, 1, 1, 3, 4, 6, 6]
    with view.loader(2) as loader:
        assert set(next(iter(loader))) == {"obs", "action", "reward", "good"}


def test_lists_of_windows_are_row_major(view):
    values, offsets = load(view, window=2, columns=["points"])["points"]
    assert offsets == [0, 1, 1, 1, 3, 5, 6, 8, 8]
    assert [first for first, _ in values] == [0, 1, 2, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    ("dtype", "values", "found"),
    [
        ("bool", np.array([True, False]), torch.tensor([True, False])),
        ("float16", np.array([1.5, 2], np.float16), torch.tensor([1.5, 2], dtype=torch.float16)),
        ("bfloat16", torch.tensor([1.5, 2]).bfloat16(), torch.tensor([1.5, 2]).bfloat16()),
        ("uint16", np.array([1, 65535], np.uint16), torch.tensor([1, 65535], dtype=torch.uint16)),
        ("uint64", np.array([1, 2**63], np.uint64), torch.tensor([1, 2**63], dtype=torch.uint64)),
        ("complex64", np.array([1j, 2], np.complex64), torch.tensor([1j, 2])),
        ("datetime64[D]", np.array(["1970-01-03", "1969-12-31"], "M8[D]"), torch.tensor([2, -1])),
        ("timedelta64[us]", np.array([5, -7], "m8[us]"), torch.tensor([5, -7])),
    ],
)
def test_dtypes(dtype, values, found):
    recording = Recording(Schema((Column(path="x", dtype=dtype),)), [Recorded({"x": values}, 2)])
    with view_of(recording) as view:
        load(view, recording, columns=["x"])
        batch = next(iter(view.loader(2, order="sequential")))
    assert batch["x"].dtype == found.dtype
    assert torch.equal(batch["x"], found)
