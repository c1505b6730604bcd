"""``ReplayBuffer`` and ``DistillationBuffer`` against lists of rows, through wrap-around."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rare import examples
from trajstore import errors
from trajstore.buffers.apexrl import DistillationBuffer, ReplayBuffer

NUMBERS = ["rewards", "dones"]


def numbered(shape, numbers, dtype=torch.float32):
    """Tensors ``(n, *shape)``, every value the number of its row."""
    if isinstance(shape, dict):
        return {key: numbered(inner, numbers) for key, inner in shape.items()}
    return torch.tensor(numbers, dtype=dtype).reshape(-1, *[1] * len(shape)).expand(-1, *shape).clone()


def transitions(numbers, obs_shape=(4,), action_shape=(), critic_shape=None, action_dtype=torch.float32):
    made = [
        numbered(obs_shape, numbers),
        numbered(action_shape, numbers, action_dtype),
        numbered((), numbers),
        numbered(obs_shape, [x + 0.5 for x in numbers]),
        torch.tensor([x % 3 == 0 for x in numbers]),
    ]
    if critic_shape is not None:
        made += [numbered(critic_shape, numbers), numbered(critic_shape, [x + 0.5 for x in numbers])]
    return made


def first(value):
    return {key: first(inner) for key, inner in value.items()} if isinstance(value, dict) else value[0]


def leaves(value):
    return [leaf for inner in value.values() for leaf in leaves(inner)] if isinstance(value, dict) else [value]


def numbers_of(batch):
    """The numbers of a batch's rows, once every tensor in it has been seen to agree."""
    numbers = batch["rewards"]
    for name, value in batch.items():
        for leaf in leaves(value):
            expected = {"dones": (numbers % 3 == 0).float()}.get(name, numbers + 0.5 * name.startswith("next_"))
            assert torch.equal(leaf.double(), expected.double().reshape(-1, *[1] * (leaf.ndim - 1)).expand(leaf.shape))
    return numbers.tolist()


def stored(buffer):
    """Numbers of all rows in storage order."""
    return buffer.state_dict()["columns"]["rewards"].tolist()


# ---- against a list


@given(
    st.integers(1, 9),
    st.lists(st.one_of(st.integers(0, 9), st.sampled_from(["clear", "reload", "too many"])), max_size=25),
    st.sampled_from([(4,), {"image": (2, 2), "state": {"arm": (3,)}}]),
    st.sampled_from([(), (2,)]),
    st.sampled_from([None, (6,), {"mass": (1,)}]),
)
@settings(max_examples=examples(80), deadline=None)
def test_any_calls_leave_what_a_list_would_hold(capacity, calls, obs_shape, action_shape, critic_shape):
    def make():
        return ReplayBuffer(capacity, obs_shape, action_shape, critic_obs_shape=critic_shape)

    def rows(numbers):
        return transitions(numbers, obs_shape, action_shape, critic_shape)

    buffer, model, pointer, number = make(), [], 0, 0
    for call in calls:
        if call == "clear":
            buffer.clear()
            model, pointer = [], 0
        elif call == "reload":
            state = copy.deepcopy(buffer.state_dict())
            buffer = make()
            buffer.load_state_dict(state)
        elif call == "too many":
            with pytest.raises(ValueError, match=f"{capacity + 1} rows at once"):
                buffer.add(*rows(list(range(capacity + 1))))
        else:
            count = min(call, capacity)
            numbers = list(range(number, number + max(count, 1)))
            # Zero stands for one transition, without a batch dimension.
            buffer.add(*(rows(numbers) if count else map(first, rows(numbers))))
            number += len(numbers)
            for value in numbers:
                if len(model) < capacity:
                    model.append(value)
                else:
                    model[pointer] = value
                pointer = (pointer + 1) % capacity
        assert (len(buffer), buffer.size, buffer.pointer) == (len(model), len(model), pointer)
    if model:
        assert stored(buffer) == model
        batch = buffer.sample(len(model), generator=torch.Generator().manual_seed(0))
        drawn = torch.randint(len(model), (len(model),), generator=torch.Generator().manual_seed(0))
        assert numbers_of(batch) == [model[i] for i in drawn]


def test_samples_reach_every_row_and_have_the_names_of_apexrl():
    buffer = ReplayBuffer(capacity=10, obs_shape=(4,))
    buffer.add(*transitions(list(range(25))[:10]))
    buffer.add(*transitions([10, 11, 12]))
    torch.manual_seed(0)
    seen = {number for _ in range(60) for number in numbers_of(buffer.sample(10))}
    assert seen == set(range(3, 13))
    assert list(buffer.sample(1)) == ["observations", "actions", "rewards", "next_observations", "dones"]


def test_samples_are_copies_and_so_is_what_is_added():
    given_rows = transitions([1, 2, 3])
    buffer = ReplayBuffer(5, (4,))
    buffer.add(*given_rows)
    for value in given_rows:
        value.zero_()
    for value in buffer.sample(3).values():
        value.zero_()
    assert stored(buffer) == [1, 2, 3]


def test_dict_observations_come_back_as_dicts():
    shape = {"image": (2, 2, 3), "robot": {"arm": (7,)}}
    buffer = ReplayBuffer(
        5, shape, critic_obs_shape=(3,), obs_dtype={"image": torch.uint8, "robot": {"arm": torch.float32}}
    )
    made = list(transitions([1, 2], shape, (), (3,)))
    made[3]["image"] = made[3]["image"].floor()
    buffer.add(*made)
    batch = buffer.sample(2)
    assert batch["next_observations"]["image"].dtype == torch.uint8
    assert batch["observations"]["robot"]["arm"].shape == (2, 7)
    assert list(batch)[5:] == ["critic_observations", "next_critic_observations"]
    assert batch["critic_observations"].dtype == torch.float32


# ---- dtypes, one transition


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64, torch.uint8, torch.bool, torch.bfloat16])
def test_actions_keep_the_dtype_of_the_first_ones(dtype):
    buffer = ReplayBuffer(5, (4,), (2,))
    buffer.add(*transitions([1], action_shape=(2,), action_dtype=dtype))
    assert buffer.sample(1)["actions"].dtype == dtype


def test_an_explicit_action_dtype_wins():
    buffer = ReplayBuffer(5, (4,), action_dtype=torch.int64)
    buffer.add(*transitions([1, 2], action_dtype=torch.float32))
    assert buffer.sample(2)["actions"].dtype == torch.int64
    whole = ReplayBuffer(5, (4,))
    whole.add(*transitions([1, 2], action_dtype=torch.int64))
    with pytest.raises(errors.ColumnTypeError, match=r"actions is torch\.float32, and torch\.int64 was given first"):
        whole.add(*transitions([1, 2], action_dtype=torch.float32))
    assert len(whole) == 2


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [
        (torch.uint8, [0.0, 255.0], [0.5, 255.0]),
        (torch.uint8, [7, 200], [-1, 3]),
        (torch.int32, [3.0, -4.0], [float("nan"), 0.0]),
        (torch.bool, [0, 1], [2, 0]),
        (torch.float32, [1 / 3, 2.0], [1j, 2.0]),
    ],
)
def test_an_explicit_dtype_refuses_what_it_cannot_hold(dtype, good, bad):
    buffer = ReplayBuffer(5, (2,), obs_dtype=dtype)
    good, bad = torch.tensor(good), torch.tensor(bad)
    buffer.add(good, 0, 1.0, good, False)
    assert torch.equal(buffer.sample(1)["observations"][0], good.to(dtype))
    with pytest.raises(errors.ColumnTypeError, match=rf"observations is {bad.dtype} with values that {dtype}"):
        buffer.add(bad, 0, 1.0, good, False)
    with pytest.raises(errors.ColumnTypeError, match="next_observations"):
        buffer.add(good, 0, 1.0, bad, False)
    assert len(buffer) == 1


def test_one_transition_of_plain_numbers_and_arrays():
    buffer = ReplayBuffer(5, (4,))
    buffer.add(np.ones(4), 3, 1.5, [0.0] * 4, True)
    buffer.add(torch.ones(4), torch.tensor([3]), torch.tensor([1.5]), np.zeros(4, np.float32), np.bool_(True))
    batch = buffer.sample(2)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "observations": [[1.0] * 4] * 2,
        "actions": [3, 3],
        "rewards": [1.5, 1.5],
        "next_observations": [[0.0] * 4] * 2,
        "dones": [1.0, 1.0],
    }
    assert all(value.dtype == torch.float32 for name, value in batch.items() if name != "actions")
    buffer.add(
        torch.ones(2, 4), torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 1), torch.ones(2, 4), torch.ones(2, 1)
    )
    assert len(buffer) == 4


# ---- what is refused


def test_bad_transitions_are_refused_by_name_and_change_nothing():
    buffer = ReplayBuffer(5, {"state": (4,)}, (2,), critic_obs_shape=(3,))
    good = transitions([1, 2], {"state": (4,)}, (2,), (3,))
    names = ["observations", "actions", "rewards", "next_observations", "dones"]
    names += ["critic_observations", "next_critic_observations"]
    cases = [
        ({"observations": {"state": torch.zeros(2, 5)}}, errors.ColumnShapeError, "observations/state has shape"),
        ({"observations": {"state": torch.zeros(1, 2, 4)}}, errors.ColumnShapeError, "observations/state has shape"),
        ({"observations": {}}, errors.ColumnNameError, "empty mapping"),
        ({"next_observations": {"state": torch.zeros(3, 4)}}, errors.ColumnShapeError, "next_observations/state"),
        ({"next_observations": {"x": torch.zeros(2, 4)}}, errors.UnknownColumnError, "next_observations/x"),
        ({"actions": torch.zeros(2)}, errors.ColumnShapeError, "actions has shape"),
        ({"rewards": torch.zeros(3)}, errors.ColumnShapeError, "rewards has shape"),
        ({"dones": None}, errors.MissingColumnError, "dones is missing"),
        ({"dones": torch.zeros(2, device="meta")}, errors.ColumnTypeError, "dones is on meta"),
        ({"critic_observations": None}, errors.MissingColumnError, "critic_observations is missing"),
        ({"observations": {"state": torch.zeros(2, 4, device="meta")}}, errors.ColumnTypeError, "holds no values"),
    ]
    for attempt in range(2):  # before the first rows and after them
        for changes, error, words in cases:
            with pytest.raises(error, match=words) as caught:
                buffer.add(**{**dict(zip(names, good, strict=True)), **changes})
            assert isinstance(caught.value, ValueError)
            assert len(buffer) == 2 * attempt
        with pytest.raises(errors.LengthError, match="zero rows"):
            buffer.add(*transitions([], {"state": (4,)}, (2,), (3,)))
        if not attempt:
            buffer.add(*good)
            kept = buffer.state_dict()["columns"]
    assert all(torch.equal(a, b) for a, b in zip(buffer.state_dict()["columns"].values(), kept.values(), strict=True))
    with pytest.raises(errors.UnknownColumnError, match="critic_obs_shape"):
        ReplayBuffer(5, (4,)).add(*transitions([1], critic_shape=(3,)))


def test_samples_that_cannot_be():
    buffer = ReplayBuffer(5, (4,))
    with pytest.raises(errors.EmptyBufferError) as caught:
        buffer.sample(1)
    assert isinstance(caught.value, ValueError)
    buffer.add(*transitions([1, 2]))
    for n in (3, 0, -1):
        with pytest.raises(ValueError, match=f"a sample of {n}"):
            buffer.sample(n)


def test_buffers_that_cannot_be():
    for arguments, words in [
        ({"capacity": 0}, "capacity=0"),
        ({"capacity": 1.5}, "capacity=1.5"),
        ({"obs_shape": (0,)}, "shape of observations"),
        ({"obs_shape": {}}, "empty mapping"),
        ({"action_shape": (-1,)}, "shape of actions"),
        ({"critic_obs_shape": (1.5,)}, "shape of critic_observations"),
    ]:
        with pytest.raises(ValueError, match=words):
            ReplayBuffer(**{"capacity": 5, "obs_shape": (4,), **arguments})


def test_states_that_do_not_fit_change_nothing():
    buffer = ReplayBuffer(5, (4,))
    buffer.add(*transitions([1, 2]))
    for other in [
        ReplayBuffer(6, (4,)),
        ReplayBuffer(5, (3,)),
        ReplayBuffer(5, {"state": (4,)}),
        ReplayBuffer(5, (4,), action_shape=(2,)),
        ReplayBuffer(5, (4,), critic_obs_shape=(4,)),
        ReplayBuffer(5, (4,), action_dtype=torch.int64),
        ReplayBuffer(5, (4,), obs_dtype=torch.float64),
    ]:
        shapes = {field.name: next(iter(field.shapes.values())) for field in other._fields}
        obs_shape = {"state": (4,)} if "observations" not in other._fields[0].shapes else shapes["observations"]
        other.add(*transitions([5], obs_shape, shapes["actions"], shapes.get("critic_observations")))
        for target in (buffer, ReplayBuffer(5, (4,), action_dtype=torch.float32)):
            held = stored(target)
            with pytest.raises(ValueError, match=r"alike|expected|capacity"):
                target.load_state_dict(other.state_dict())
            assert stored(target) == held
    with pytest.raises(ValueError, match="state_dict"):
        buffer.load_state_dict({})
    state = buffer.state_dict()
    with pytest.raises(ValueError, match="size 2 and pointer 4"):
        buffer.load_state_dict({**state, "pointer": 4})
    assert stored(buffer) == [1, 2]


# ---- distillation


@given(
    st.integers(1, 6),
    st.lists(st.one_of(st.integers(0, 6), st.sampled_from(["clear", "reload"])), max_size=15),
    st.sampled_from([(4,), {"image": (2, 2), "state": (3,)}]),
    st.sampled_from([(), (2,)]),
)
@settings(max_examples=examples(50), deadline=None)
def test_distillation_holds_what_a_list_would(capacity, calls, obs_shape, action_shape):
    buffer, model, pointer, number = DistillationBuffer(capacity, obs_shape), [], 0, 0
    for call in calls:
        if call == "clear":
            buffer.clear()
            model, pointer = [], 0
        elif call == "reload":
            state = copy.deepcopy(buffer.state_dict())
            buffer = DistillationBuffer(capacity, obs_shape)
            buffer.load_state_dict(state)
        else:
            numbers = list(range(number, number + max(min(call, capacity), 1)))
            number += len(numbers)
            obs, action = numbered(obs_shape, numbers), numbered(action_shape, numbers)
            buffer.add(*((obs, action) if call else (first(obs), first(action))))
            for value in numbers:
                model[pointer : pointer + 1] = [value]
                pointer = (pointer + 1) % capacity
        assert len(buffer) == len(model)
    if model:
        obs, actions = buffer.sample(len(model), generator=torch.Generator().manual_seed(0))
        drawn = torch.randint(len(model), (len(model),), generator=torch.Generator().manual_seed(0))
        for leaf in [*leaves(obs), actions]:
            assert leaf.reshape(len(model), -1)[:, 0].tolist() == [model[i] for i in drawn]
        assert actions.shape == (len(model), *action_shape)


def test_distillation_refuses_what_does_not_fit():
    buffer = DistillationBuffer(capacity=3, obs_shape=(4,), device="cpu")
    for obs, action, words in [
        (torch.zeros(2, 5), torch.zeros(2), "observations has shape"),
        (torch.zeros(2, 4), torch.zeros(3, 2), "actions has shape"),
        (torch.zeros(2, 4), torch.zeros(()), "actions has shape"),
        (torch.zeros(4, 4), torch.zeros(4, 2), "4 rows at once"),
        (torch.zeros(2, 4), torch.zeros(2, device="meta"), "actions is on meta"),
        (torch.zeros(2, 4), None, "actions"),
    ]:
        with pytest.raises(ValueError, match=words):
            buffer.add(obs, action)
    with pytest.raises(ValueError, match="empty"):
        buffer.sample(1)
    buffer.add(torch.zeros(2, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="actions has shape"):
        buffer.add(torch.zeros(2, 4), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="a sample of 3 from a buffer of 2"):
        buffer.sample(3)
    other = DistillationBuffer(3, (4,), action_shape=(2,), action_dtype=torch.float32)
    with pytest.raises(ValueError, match="make one that is alike"):
        other.load_state_dict(buffer.state_dict())
    other.add(torch.zeros(4), torch.tensor([1, 2]))
    assert other.sample(1)[1].dtype == torch.float32
