"""``RolloutBuffer`` against lists of steps and the loop of ApexRL's page."""

from __future__ import annotations

import copy
import uuid

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trajstore
from tests.support.rare import examples
from trajstore import errors
from trajstore.buffers.apexrl import RolloutBuffer

OBS_SHAPES = [(5,), (2, 3), {"image": (2, 2, 3), "state": (4,)}, {"robot": {"arm": (2,)}, "state": (1,)}]
ACTIONS = [((), torch.int64), ((3,), torch.float32), ((2, 2), torch.float64)]
NAMES = ["observations", "privileged_observations", "actions", "rewards", "dones", "values", "log_probs"]
BATCH = ["observations", "privileged_observations", "actions", "old_log_probs", "advantages", "returns", "values"]


def normal(shape, lead, generator):
    if isinstance(shape, dict):
        return {key: normal(inner, lead, generator) for key, inner in shape.items()}
    return torch.randn(*lead, *shape, generator=generator)


def steps_of(count, num_envs, obs_shape, privileged_shape=None, action=ACTIONS[1], *, seed=0, done_rate=0.2):
    """What ``add`` is given, one dict per step."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        numbers = normal((4,), (num_envs,), generator)
        made.append(
            {
                "observations": normal(obs_shape, (num_envs,), generator),
                "privileged_observations": privileged_shape and normal(privileged_shape, (num_envs,), generator),
                "actions": (10 * normal(action[0], (num_envs,), generator)).to(action[1]),
                "rewards": numbers[:, 0],
                "dones": (torch.rand(num_envs, generator=generator) < done_rate).float(),
                "values": numbers[:, 1],
                "log_probs": numbers[:, 2],
            }
        )
    return made


def filled(steps, num_steps=None, **more):
    first = steps[0]
    buffer = RolloutBuffer(
        num_envs=len(first["rewards"]),
        num_steps=num_steps or len(steps),
        obs_shape=shape_of(first["observations"]),
        device="cpu",
        **more,
    )
    for step in steps:
        buffer.add(**step)
    return buffer


def shape_of(value):
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    return tuple(value.shape[1:])


def stacked(values):
    if isinstance(values[0], dict):
        return {key: stacked([value[key] for value in values]) for key in values[0]}
    return None if values[0] is None else torch.stack(values)


def same(found, expected):
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if expected is None:
        return found is None
    return found.dtype == expected.dtype and torch.equal(found, expected)


def each(value, function):
    if isinstance(value, dict):
        return {key: each(inner, function) for key, inner in value.items()}
    return None if value is None else function(value)


def page_gae(steps, last_values, gamma, gae_lambda):
    """The loop of ApexRL's page, in float64."""
    rewards, values, dones = (stacked([s[name].double() for s in steps]) for name in ("rewards", "values", "dones"))
    advantages = torch.zeros_like(rewards)
    last_gae = torch.zeros(rewards.shape[1], dtype=torch.float64)
    for t in reversed(range(len(steps))):
        next_values = last_values.double() if t == len(steps) - 1 else values[t + 1]
        delta = rewards[t] + gamma * next_values * (1 - dones[t]) - values[t]
        last_gae = delta + gamma * gae_lambda * (1 - dones[t]) * last_gae
        advantages[t] = last_gae
    return advantages, advantages + values


# ---- what was added comes back


@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from(OBS_SHAPES),
    st.sampled_from([None, (3,), {"mass": (1,), "push": (2,)}]),
    st.sampled_from(ACTIONS),
    st.integers(0, 2),
    st.integers(0, 2**31),
)
@settings(max_examples=examples(60), deadline=None)
def test_data_are_what_was_added(count, num_envs, obs_shape, privileged_shape, action, room, seed):
    steps = steps_of(count, num_envs, obs_shape, privileged_shape, action, seed=seed)
    buffer = filled(steps, count + room, privileged_obs_shape=privileged_shape)
    assert (len(buffer), buffer.step) == (count * num_envs, count)
    for name in NAMES:
        expected = stacked([step[name] for step in steps])
        assert same(each(getattr(buffer, name), lambda tensor: tensor[:count]), expected)
        assert each(getattr(buffer, name), len) == each(expected, lambda _: count + room)

    last_values = torch.randn(num_envs, generator=torch.Generator().manual_seed(seed))
    buffer.compute_returns_and_advantages(last_values, gamma=0.9, gae_lambda=0.8)
    for found, expected in zip(
        (buffer.advantages, buffer.returns), page_gae(steps, last_values, 0.9, 0.8), strict=True
    ):
        torch.testing.assert_close(found[:count].double(), expected, rtol=1e-5, atol=1e-5)
        assert not found[count:].any()

    data = buffer.get_all_data()
    assert list(data) == BATCH
    for name in BATCH:
        source = getattr(buffer, {"old_log_probs": "log_probs"}.get(name, name))
        row = 0
        for t in range(count):
            for n in range(num_envs):
                assert same(each(data[name], lambda x, i=row: x[i]), each(source, lambda x, i=t, j=n: x[i, j]))
                row += 1
        assert each(data[name], len) == each(source, lambda _, rows=row: rows)


def test_the_page_formula_with_the_defaults_of_the_page():
    steps = steps_of(24, 7, (48,))
    buffer = filled(steps)
    last_values = torch.randn(7, 1, generator=torch.Generator().manual_seed(1))
    buffer.compute_returns_and_advantages(last_values)
    torch.testing.assert_close(
        buffer.advantages.double(), page_gae(steps, last_values[:, 0], 0.99, 0.95)[0], rtol=1e-5, atol=1e-5
    )


def test_truncated_episodes_bootstrap():
    (step,) = steps_of(1, 2, (1,))
    step |= {"rewards": torch.ones(2), "dones": torch.ones(2), "values": torch.zeros(2)}
    buffer = filled([step])
    truncated, bootstrap = torch.tensor([[True, False]]), torch.full((1, 2), 10.0)
    buffer.compute_returns_and_advantages(torch.zeros(2), gamma=0.5, truncated=truncated, bootstrap_values=bootstrap)
    assert buffer.returns.tolist() == [[6.0, 1.0]]


def test_minibatches_take_no_row_twice():
    steps = steps_of(5, 4, {"state": (1,)}, (1,))
    for number, step in enumerate(steps):
        rows = torch.arange(4.0) + 4 * number
        for name in NAMES:
            step[name] = {"state": rows[:, None]} if name == "observations" else rows
        step["privileged_observations"] = rows[:, None]
    buffer = filled(steps, 6, num_privileged_obs=1)
    buffer.advantages[:5] = buffer.returns[:5] = torch.arange(20.0).reshape(5, 4)
    for batch_size in (1, 7, 20):
        observations, privileged, *rest = buffer.get_minibatch(batch_size, generator=torch.Generator().manual_seed(3))
        drawn = rest[0]
        assert len(rest) == 5
        assert len(set(drawn.tolist())) == batch_size
        assert all(torch.equal(value, drawn) for value in [observations["state"][:, 0], privileged[:, 0], *rest])
        again = buffer.get_minibatch(batch_size, generator=torch.Generator().manual_seed(3))
        assert torch.equal(again[2], drawn)
    assert set(drawn.tolist()) == set(range(20))


def test_dtypes_follow_the_arguments_or_the_first_actions():
    (step,) = steps_of(1, 3, {"image": (2, 2)}, action=ACTIONS[0])
    step["observations"] = {"image": torch.full((3, 2, 2), 200, dtype=torch.uint8)}
    assert filled([step]).observations["image"].dtype == torch.float32
    kept = filled([step], obs_dtype={"image": torch.uint8})
    assert torch.equal(kept.observations["image"][0], step["observations"]["image"])
    assert kept.actions.dtype == torch.int64
    assert filled([step], action_dtype=torch.float32).actions.dtype == torch.float32
    assert RolloutBuffer(3, 2, (1,), action_shape=(4,), action_dtype=torch.float16).actions.shape == (2, 3, 4)
    two = filled([step], 2)
    with pytest.raises(errors.ColumnTypeError, match=r"actions is torch.float32, and torch.int64 was given first"):
        two.add(**{**step, "actions": torch.tensor([0.5, 1.0, 2.0])})
    assert two.step == 1


def test_columns_of_one_booleans_and_gradients_are_taken():
    (step,) = steps_of(1, 3, (2,))
    shaped = {name: step[name].unsqueeze(-1) for name in ("rewards", "values", "log_probs")}
    shaped["values"].requires_grad_()
    buffer = filled([{**step, **shaped, "dones": step["dones"].bool()}])
    for name in ("rewards", "values", "log_probs", "dones"):
        assert torch.equal(getattr(buffer, name)[0], step[name])
    assert not buffer.values.requires_grad


def test_clear_begins_the_next_rollout():
    old, new = steps_of(3, 2, (4,), seed=1), steps_of(3, 2, (4,), seed=2)
    buffer = filled(old)
    buffer.compute_returns_and_advantages(torch.zeros(2))
    buffer.clear()
    assert (len(buffer), buffer.step) == (0, 0)
    buffer.add(**new[0])
    assert same(buffer.get_all_data()["observations"], new[0]["observations"])
    assert not buffer.advantages.any()
    assert not buffer.returns.any()


def test_to_moves_everything_and_returns_the_buffer():
    buffer = filled(steps_of(2, 2, {"state": (4,)}, (3,)), num_privileged_obs=3)
    assert buffer.to("meta") is buffer
    tensors = [getattr(buffer, name) for name in [*NAMES, "advantages", "returns"] if name != "observations"]
    assert {t.device.type for t in [*tensors, buffer.observations["state"]]} == {"meta"}
    assert buffer.device.type == "meta"


# ---- episodes


@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(2,), {"image": (2, 2), "state": (1,)}]),
    st.integers(0, 2**31),
)
@settings(max_examples=examples(30), deadline=None)
def test_episodes_are_split_where_dones_say(count, num_envs, done_rate, with_truncated, computed, obs_shape, seed):
    steps = steps_of(count, num_envs, obs_shape, (3,), seed=seed, done_rate=done_rate)
    buffer = filled(steps, count + 1, num_privileged_obs=3)
    if computed:
        buffer.compute_returns_and_advantages(torch.zeros(num_envs))
    truncated = None
    if with_truncated:
        truncated = torch.rand(count, num_envs, generator=torch.Generator().manual_seed(seed)) < 0.3

    expected = []
    for n in range(num_envs):
        piece = []
        for t in range(count):
            piece.append(t)
            cut = truncated is not None and bool(truncated[t, n])
            done = bool(steps[t]["dones"][n])
            if done or cut or t == count - 1:
                expected.append((n, piece, done and not cut, cut))
                piece = []

    with trajstore.open(f"memory://{uuid.uuid4()}", mode="a") as store:
        refs = buffer.append_to(store, truncated=truncated, task="walk")
        store.flush()
        view = store.trajectories
        assert len(view) == len(refs) == len(expected)
        for found, (n, rows, terminated, was_cut) in zip(view, expected, strict=True):
            assert (found.terminated, found.truncated) == (terminated, was_cut)
            assert found.metadata == {"environment": n, "task": "walk"}
            episode = found.read()
            names = {
                "obs": "observations",
                "privileged_obs": "privileged_observations",
                "action": "actions",
                "reward": "rewards",
                "value": "values",
                "log_prob": "log_probs",
            }
            if computed:
                names |= {"advantage": "advantages", "return": "returns"}
            assert set(episode) == set(names)
            for column, name in names.items():
                taken = each(getattr(buffer, name), lambda x, rows=rows, n=n: x[rows, n])
                assert same(each(episode[column], torch.as_tensor), taken)


def test_what_is_not_computed_for_all_steps_is_not_kept():
    steps = steps_of(2, 1, (2,), done_rate=0.0)
    buffer = filled(steps[:1], 2)
    buffer.compute_returns_and_advantages(torch.zeros(1))
    buffer.add(**steps[1])
    with trajstore.open(f"memory://{uuid.uuid4()}", mode="a") as store:
        buffer.append_to(store, environment=7)
        (episode,) = store.trajectories
        assert "advantage" not in episode.read()
        assert episode.metadata == {"environment": 7}
        with pytest.raises(errors.ColumnShapeError, match=r"truncated has shape \(1, 2\), expected \(2, 1\)"):
            buffer.append_to(store, truncated=torch.zeros(1, 2))


FIRST = ["obs", "action", "reward", "value", "log_prob"]


@pytest.mark.parametrize("order", [[False, True, False], [True, False, True]])
@pytest.mark.parametrize("flushed", [False, True])
@pytest.mark.parametrize("obs_shape", [(2,), {"image": (2, 2), "state": (1,)}])
def test_one_store_takes_rollouts_before_and_after_computing(tmp_path, order, flushed, obs_shape):
    buffers = []
    for number, computed in enumerate(order):
        buffers.append(filled(steps_of(3, 2, obs_shape, seed=number, done_rate=0.0)))
        if computed:
            buffers[-1].compute_returns_and_advantages(torch.ones(2))
        with trajstore.open(tmp_path / "s", mode="a") as store:
            buffers[-1].append_to(store, update=number)
            if flushed:
                store.flush()
    with trajstore.open(tmp_path / "s") as store:
        presence = {column.path: column.presence for column in store.schema}
        assert [path.split("/")[0] for path in presence][-2:] == ["advantage", "return"]
        assert {path for path, found in presence.items() if found == "optional"} == {"advantage", "return"}
        for update, (buffer, computed) in enumerate(zip(buffers, order, strict=True)):
            for n, episode in enumerate(store.trajectories.filter("update == @update", update=update)):
                expected = {"obs": buffer.observations, "reward": buffer.rewards, "action": buffer.actions}
                if computed:
                    expected |= {"advantage": buffer.advantages, "return": buffer.returns}
                found = episode.read()
                assert set(found) == {*FIRST, *expected}
                for name, value in expected.items():
                    assert same(each(found[name], torch.as_tensor), each(value, lambda x, n=n: x[:, n]))


def test_in_one_handle_too():
    buffer = filled(steps_of(3, 2, (2,), done_rate=0.0))
    with trajstore.open(f"memory://{uuid.uuid4()}", mode="a") as store:
        buffer.append_to(store)
        buffer.compute_returns_and_advantages(torch.ones(2))
        buffer.append_to(store)
        assert ["advantage" in episode.read() for episode in store.trajectories] == [False, False, True, True]


def test_a_store_whose_columns_do_not_fit():
    buffer = filled(steps_of(2, 1, (2,)))
    with trajstore.open(f"memory://{uuid.uuid4()}", mode="a") as store:
        numbers = dict.fromkeys([*FIRST[2:], "advantage", "return"], torch.zeros(3))
        store.append({"obs": torch.zeros(3, 2), "action": torch.zeros(3, 3), **numbers})
        with pytest.raises(errors.MissingColumnError, match=r"requires 'advantage' and 'return' .* append to another"):
            buffer.append_to(store)
        buffer.compute_returns_and_advantages(torch.ones(1))
        refs = buffer.append_to(store)
        assert len(store.trajectories) == 1 + len(refs)
    with trajstore.open(f"memory://{uuid.uuid4()}", mode="a") as store:
        store.append({"obs": torch.zeros(3, 2), "return/of": torch.zeros(3)})
        with pytest.raises(errors.SchemaConflictError, match=r"'return' .*; append to another store"):
            buffer.append_to(store)
        assert len(store.trajectories) == 1


def test_a_path_is_no_store():
    buffer = filled(steps_of(2, 1, (2,)))
    with pytest.raises(
        ValueError, match=r"store is a str \('runs/ppo'\), expected a store: trajstore.open\(path, mode='a'\)"
    ):
        buffer.append_to("runs/ppo")


def test_what_was_computed_for_fewer_rows_is_forgotten():
    steps = steps_of(3, 2, (4,))
    buffer = filled(steps[:2], 3)
    buffer.compute_returns_and_advantages(torch.ones(2))
    assert buffer.get_all_data()["advantages"].any()
    stale = copy.deepcopy(buffer.state_dict())
    buffer.add(**steps[2])
    for name in ("advantages", "returns"):
        assert not buffer.get_all_data()[name].any()
    assert not any(tensor.any() for tensor in buffer.get_minibatch(6)[4:6])
    buffer.compute_returns_and_advantages(torch.ones(2))
    expected = page_gae(steps, torch.ones(2), 0.99, 0.95)
    torch.testing.assert_close(buffer.advantages.double(), expected[0], rtol=1e-5, atol=1e-5)

    stale["computed"] = 1  # as if it were a state of the two rows, and one had been added since
    other = filled(steps[:1], 3)
    other.load_state_dict(stale)
    assert not other.get_all_data()["advantages"].any()


def test_advantages_of_ones_own_stay():
    steps = steps_of(2, 1, (4,))
    buffer = filled(steps[:1], 2)
    buffer.advantages[0] = 3.0
    buffer.add(**steps[1])
    assert buffer.get_all_data()["advantages"].tolist() == [3.0, 0.0]


# ---- state


@pytest.mark.parametrize("count", [0, 2, 3])
def test_a_state_loads_into_a_new_buffer(count):
    steps = steps_of(3, 2, OBS_SHAPES[2], (3,))
    arguments = {"num_envs": 2, "num_steps": 3, "obs_shape": OBS_SHAPES[2], "num_privileged_obs": 3}
    buffer, other = RolloutBuffer(**arguments), RolloutBuffer(**arguments)
    for step in steps[:count]:
        buffer.add(**step)
    if count:
        buffer.compute_returns_and_advantages(torch.zeros(2))
    state = copy.deepcopy(buffer.state_dict())
    other.load_state_dict(state)
    assert len(other) == len(buffer)
    for step in steps[count:]:
        buffer.add(**step)
        other.add(**step)
    assert same(other.get_all_data(), buffer.get_all_data())
    state["tensors"]["rewards"].zero_()  # a copy
    assert same(other.get_all_data(), buffer.get_all_data())


def test_a_state_that_does_not_fit_changes_nothing():
    buffer = filled(steps_of(2, 2, (4,)), 3)
    before = copy.deepcopy(buffer.state_dict())
    other_actions = filled(steps_of(2, 2, (4,), action=ACTIONS[0]), 3)
    for other in [
        filled(steps_of(2, 2, (4,)), 4),
        filled(steps_of(2, 3, (4,)), 3),
        filled(steps_of(2, 2, (5,)), 3),
        filled(steps_of(2, 2, {"state": (4,)}), 3),
        filled(steps_of(2, 2, (4,), (3,)), 3, num_privileged_obs=3),
        other_actions,
    ]:
        with pytest.raises(errors.SchemaConflictError) as caught:
            buffer.load_state_dict(other.state_dict())
        assert isinstance(caught.value, ValueError)
    for damage in (
        {"step": 9},
        {"tensors": {}},
        {"tensors": {**before["tensors"], "rewards": before["tensors"]["rewards"].double()}},
    ):
        with pytest.raises(errors.SchemaConflictError):
            buffer.load_state_dict({**before, **damage})
    with pytest.raises(errors.SchemaConflictError, match="a state without 'step'"):
        buffer.load_state_dict({})
    assert same(buffer.state_dict()["tensors"], before["tensors"])


# ---- what is refused


def test_more_steps_than_there_is_room_for():
    steps = steps_of(3, 2, (4,))
    buffer = filled(steps[:2])
    with pytest.raises(ValueError, match=r"step 3 .* num_steps=2; call clear\(\)"):
        buffer.add(**steps[2])
    assert same(buffer.get_all_data()["observations"], torch.cat([s["observations"] for s in steps[:2]]))


def test_bad_steps_are_refused_by_name_and_change_nothing():
    steps = steps_of(2, 3, {"image": (2, 2), "state": (4,)}, (5,))
    image, state = steps[1]["observations"].values()
    buffer = filled(steps[:1], 2, privileged_obs_shape=(5,))
    for changes, error, words in [
        (
            {"observations": {"image": image, "state": state[:2]}},
            errors.ColumnShapeError,
            "observations/state has shape",
        ),
        ({"observations": {"image": image}}, errors.MissingColumnError, "observations/state is missing"),
        ({"observations": {"image": image, "state": state, "x": state}}, errors.UnknownColumnError, "observations/x"),
        ({"observations": state}, errors.ColumnTypeError, "expected a dict"),
        ({"privileged_observations": None}, errors.MissingColumnError, "privileged_observations is missing"),
        ({"actions": torch.zeros(3, 4)}, errors.ColumnShapeError, "actions has shape"),
        ({"actions": None}, errors.MissingColumnError, "actions is missing"),
        ({"rewards": torch.zeros(1, 3)}, errors.ColumnShapeError, r"rewards has shape \(1, 3\), expected \(3,\)"),
        ({"rewards": "much"}, errors.ColumnTypeError, "rewards is a str"),
        ({"values": torch.zeros(3, device="meta")}, errors.ColumnTypeError, "values is on meta"),
        ({"log_probs": torch.zeros(())}, errors.ColumnShapeError, "log_probs has shape"),
    ]:
        with pytest.raises(error, match=words) as caught:
            buffer.add(**{**steps[1], **changes})
        assert isinstance(caught.value, ValueError)
        assert buffer.step == 1
    buffer.add(**steps[1])
    assert same(buffer.observations, stacked([step["observations"] for step in steps]))


def test_a_refused_first_step_settles_nothing():
    (step,) = steps_of(1, 3, (4,))
    buffer = RolloutBuffer(3, 1, (4,))
    with pytest.raises(errors.ColumnShapeError, match="dones"):
        buffer.add(**{**step, "actions": torch.zeros(3, 9, dtype=torch.int32), "dones": torch.zeros(4)})
    with pytest.raises(errors.MissingColumnError, match="actions is missing"):
        buffer.add(**{**step, "actions": None})
    assert buffer.actions is None
    buffer.add(**step)
    assert same(buffer.actions[0], step["actions"])


def test_other_bad_calls():
    steps = steps_of(2, 3, (4,), (5,))
    empty = RolloutBuffer(3, 2, (4,), "cpu")
    for call in (
        empty.get_all_data,
        lambda: empty.get_minibatch(1),
        lambda: empty.compute_returns_and_advantages(torch.zeros(3)),
        lambda: empty.append_to(None),
    ):
        with pytest.raises(errors.EmptyBufferError, match="add steps first"):
            call()
    with pytest.raises(errors.UnknownColumnError, match="num_privileged_obs"):
        empty.add(**steps[0])
    buffer = filled(steps, num_privileged_obs=5)
    for batch_size in (0, 7):
        with pytest.raises(ValueError, match=f"batch_size={batch_size} of 6 rows"):
            buffer.get_minibatch(batch_size)
    with pytest.raises(errors.ColumnShapeError, match="last_values has shape"):
        buffer.compute_returns_and_advantages(torch.zeros(4))
    with pytest.raises(ValueError, match="gamma=2"):
        buffer.compute_returns_and_advantages(torch.zeros(3), gamma=2)
    for arguments, words in [
        ({"num_envs": 0}, "num_envs=0"),
        ({"num_steps": 1.5}, "num_steps=1.5"),
        ({"num_privileged_obs": -1}, "num_privileged_obs=-1"),
        ({"num_privileged_obs": 2, "privileged_obs_shape": (3,)}, "pass one of them"),
        ({"obs_shape": (0,)}, "the shape of observations"),
        ({"obs_shape": "wide"}, "the shape of observations"),
        ({"obs_dtype": {"image": torch.uint8}}, "expected the same keys"),
    ]:
        with pytest.raises(ValueError, match=words):
            RolloutBuffer(**{"num_envs": 3, "num_steps": 2, "obs_shape": (4,), **arguments})
    agreed = RolloutBuffer(3, 2, (4,), num_privileged_obs=2, privileged_obs_shape=(2,))
    assert agreed.privileged_observations.shape == (2, 3, 2)
