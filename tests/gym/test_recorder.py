"""Recorded episodes hold what each raw environment did, as an independent log below all wrappers tells it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.errors import EnvironmentNotFoundError, RecordingError, TrajstoreError

gymnasium = pytest.importorskip("gymnasium")

from gymnasium.vector import AutoresetMode, SyncVectorEnv  # noqa: E402

from tests.support.gym_environments import (  # noqa: E402
    MODES,
    Counter,
    Log,
    Logged,
    Zoo,
    assert_same_episodes,
    column,
    counters,
    finished,
    play,
)
from trajstore.gym import RecordEnv, RecordTrajectories, RecordVectorEnv, record_episodes  # noqa: E402


@pytest.fixture
def store(tmp_path: Any) -> Iterator[Any]:
    with trajstore.open(str(tmp_path / "store"), mode="a") as opened:
        yield opened


# Single environments


@pytest.mark.parametrize("reuse", [False, True])
def test_single_environment_matches_its_log(store: Any, reuse: bool) -> None:
    log: Log = []
    env = RecordTrajectories(Logged(Counter(reuse=reuse), log), store)
    assert isinstance(env, RecordEnv)
    assert isinstance(env, gymnasium.Wrapper)
    play(env, 40)
    env.close()
    store.flush()
    assert env.episodes_recorded == len(finished(log)) > 10
    assert_same_episodes(store, finished(log), ["obs", "action"])
    view = store.trajectories
    assert [view[i].metadata.get("seed") for i in range(3)] == [0, None, None]
    assert column(view[0], "obs").dtype == np.int32
    assert column(view[0], "reward").dtype == np.float64


def test_cartpole_matches_a_replay_of_its_seeds_and_actions(store: Any) -> None:
    lengths = []
    steps = record_episodes(
        "CartPole-v1",
        store,
        episodes=5,
        seed=3,
        make_kwargs={"max_episode_steps": 25},
        on_episode=lambda done, length, return_: lengths.append((done, length, return_)),
    )
    store.flush()
    view = store.trajectories
    assert [done for done, _, _ in lengths] == [1, 2, 3, 4, 5]
    assert steps == sum(length for _, length, _ in lengths) == sum(view[i].length for i in range(5))
    raw = gymnasium.make("CartPole-v1", max_episode_steps=25)
    ends = set()
    for i in range(5):
        trajectory = view[i]
        assert trajectory.metadata["env_id"] == "CartPole-v1"
        observation, _ = raw.reset(seed=int(trajectory.metadata["seed"]))
        observations, rewards, ended = [observation], [], (False, False)
        for action in column(trajectory, "action"):
            assert ended == (False, False)
            observation, reward, *flags, _ = raw.step(action)
            observations.append(observation)
            rewards.append(reward)
            ended = (bool(flags[0]), bool(flags[1]))
        np.testing.assert_array_equal(column(trajectory, "obs"), np.stack(observations))
        assert (trajectory.length, sum(rewards)) == lengths[i][1:]
        assert (trajectory.terminated, trajectory.truncated) == ended
        ends.add(ended)
    assert ends == {(True, False), (False, True)}  # both kinds of end were seen
    raw.close()


def test_autoreset_wrapper_is_a_reset_step(store: Any) -> None:
    log: Log = []
    env = RecordTrajectories(gymnasium.wrappers.Autoreset(Logged(Counter(reuse=True), log)), store)
    env.reset()
    for step in range(40):
        env.step(step % 5)
    store.flush()
    assert len(finished(log)) > 8
    assert_same_episodes(store, finished(log), ["obs", "action"])


def test_every_space_of_a_single_environment(store: Any) -> None:
    log: Log = []
    play(RecordTrajectories(Logged(Zoo(), log), store), 20)
    store.flush()
    paths = ["obs/image", "obs/goal", "obs/note", "obs/pair/0", "obs/pair/1"]
    assert_same_episodes(store, finished(log), [*paths, "action/move", "action/force", "action/say"])
    dtypes = {path: column(store.trajectories[0], path).dtype for path in paths}
    assert dtypes["obs/image"] == np.uint8
    assert (dtypes["obs/pair/0"], dtypes["obs/pair/1"]) == (np.float32, np.int8)


# Vector environments


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("copy", [True, False])
def test_vector_environment_matches_its_logs(store: Any, mode: Any, copy: bool) -> None:
    raw, logs = counters(3, mode, copy=copy)
    env = RecordTrajectories(raw, store)
    assert isinstance(env, RecordVectorEnv)
    assert isinstance(env, gymnasium.vector.VectorWrapper)
    play(env, 40, seed=100)
    env.close()
    store.flush()
    assert len(finished(*logs)) > 20
    assert_same_episodes(store, finished(*logs), ["obs", "action"])
    view = store.trajectories
    seeded = {
        view[i].metadata["env_index"]: view[i].metadata["seed"]
        for i in range(len(view))
        if view[i].metadata.get("seed")
    }
    assert seeded == {0: 100, 1: 101, 2: 102}


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_space_of_a_vector_environment(store: Any, mode: Any) -> None:
    logs: list[Log] = [[], []]
    makers = [lambda i=i: Logged(Zoo(i), logs[i]) for i in range(2)]
    play(RecordTrajectories(SyncVectorEnv(makers, autoreset_mode=mode), store), 20)
    store.flush()
    assert len(finished(*logs)) > 8
    paths = ["obs/image", "obs/goal", "obs/note", "obs/pair/0", "obs/pair/1"]
    assert_same_episodes(store, finished(*logs), [*paths, "action/move", "action/force", "action/say"])


@pytest.mark.parametrize("keep", [False, True])
def test_reset_mask_ends_only_its_own_episodes(store: Any, keep: bool) -> None:
    raw, logs = counters(3, AutoresetMode.DISABLED)
    env = RecordTrajectories(raw, store, keep_unfinished=keep)
    env.reset(seed=[5, None, 6])
    env.step(np.array([1, 2, 3]))  # environment 0 ends after 1 step, 1 after 4, 2 after 2
    env.reset(seed=[8, 9, None], options={"reset_mask": np.array([True, False, True])})
    for _ in range(3):
        _, _, terminated, truncated, _ = env.step(np.array([4, 4, 4]))
        if (terminated | truncated).any():
            env.reset(options={"reset_mask": terminated | truncated})
    env.close()
    store.flush()
    expected = [
        (index, episode)
        for index, log in enumerate(logs)
        for episode in log
        if episode["ended"] or (keep and episode["action"])
    ]
    assert len(expected) > len(finished(*logs)) or not keep
    assert_same_episodes(store, expected, ["obs", "action"])
    by_index = [
        (view.metadata["env_index"], view.metadata.get("seed"))
        for view in map(store.trajectories.__getitem__, range(2))
    ]
    assert by_index[0] == (0, 5)


def test_native_vector_cartpole_matches_a_plain_loop(store: Any) -> None:
    actions = np.random.default_rng(0).integers(0, 2, (60, 3))
    env = RecordTrajectories(gymnasium.make_vec("CartPole-v1", 3, "vector_entry_point", max_episode_steps=15), store)
    raw = gymnasium.make_vec("CartPole-v1", 3, "vector_entry_point", max_episode_steps=15)
    env.reset(seed=2)
    observations, _ = raw.reset(seed=2)
    logs: list[Log] = [[], [], []]
    over = [True] * 3
    for index in range(3):
        logs[index].append({"obs": [observations[index].copy()], "action": [], "reward": [], "ended": None})
    over = [False] * 3
    for action in actions:
        env.step(action)
        observations, rewards, terminated, truncated, _ = raw.step(action)
        for index, log in enumerate(logs):
            if over[index]:
                log.append({"obs": [observations[index].copy()], "action": [], "reward": [], "ended": None})
                over[index] = False
                continue
            log[-1]["obs"].append(observations[index].copy())
            log[-1]["action"].append(action[index])
            log[-1]["reward"].append(rewards[index])
            if terminated[index] or truncated[index]:
                log[-1]["ended"] = (bool(terminated[index]), bool(truncated[index]))
                over[index] = True
    env.close()
    raw.close()
    store.flush()
    assert len(finished(*logs)) >= 9
    assert_same_episodes(store, finished(*logs), ["obs", "action"])
    assert column(store.trajectories[0], "reward").dtype == np.float32
    assert store.trajectories[0].metadata["env_id"] == "CartPole-v1"


def test_batched_final_observations_of_atari(store: Any) -> None:
    """ale-py gives final_obs as one batch without a mask, and int32 rewards."""
    vector_env = pytest.importorskip("ale_py.vector_env")
    metadata = dict(gymnasium.vector.VectorEnv.metadata)
    try:
        made = [
            vector_env.AtariVectorEnv(
                "pong", 2, autoreset_mode="SameStep", max_num_frames_per_episode=60, img_height=8, img_width=8
            )
            for _ in range(2)
        ]
        env, raw = RecordTrajectories(made[0], store), made[1]
        env.reset(seed=1)
        observations = [raw.reset(seed=1)[0].copy()]
        expected = []
        for step in range(40):
            action = np.full(2, step % 3, np.int64)
            env.step(action)
            observation, _, terminated, truncated, info = raw.step(action)
            if (terminated | truncated).any():
                expected.append(np.stack([*observations, info["final_obs"].copy()]))
                observations = []
            observations.append(observation.copy())
        store.flush()
        view = store.trajectories
        assert len(view) == 2 * len(expected) > 2
        for index in range(2):
            own = [view[i] for i in range(len(view)) if view[i].metadata["env_index"] == index]
            for trajectory, batch in zip(own, expected, strict=True):
                np.testing.assert_array_equal(column(trajectory, "obs"), batch[:, index])
        assert column(view[0], "reward").dtype == np.float64
    finally:
        gymnasium.vector.VectorEnv.metadata.clear()  # ale-py writes into the class attribute that all share
        gymnasium.vector.VectorEnv.metadata.update(metadata)


# Episodes that do not finish


@pytest.mark.parametrize("keep", [False, True])
def test_reset_and_close_in_mid_episode(store: Any, keep: bool) -> None:
    log: Log = []
    env = RecordTrajectories(Logged(Counter(3, reuse=True), log), store, keep_unfinished=keep)
    env.reset()
    env.reset()  # an episode without steps leaves no trace
    env.step(1)
    env.reset(seed=4)
    env.step(2)
    env.close()
    env.close()
    store.flush()
    expected = [(0, episode) for episode in log if episode["action"]] if keep else []
    assert_same_episodes(store, expected, ["obs", "action"])
    assert env.episodes_recorded == len(expected)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("vector", [False, True])
def test_ctrl_c_keeps_every_finished_episode(tmp_path: Any, keep: bool, vector: bool) -> None:
    url, log = str(tmp_path / "store"), []
    raw: Any = Logged(Counter(reuse=True, interrupt_at=30), log)
    with pytest.raises(KeyboardInterrupt), trajstore.open(url, mode="a") as store:
        play(
            RecordTrajectories(SyncVectorEnv([lambda: raw]) if vector else raw, store, keep_unfinished=keep),
            100,
        )
    expected = finished(log)
    assert len(expected) > 8
    assert not log[-1]["ended"]
    with trajstore.open(url) as store:
        unfinished = [(0, log[-1])] if keep and log[-1]["action"] else []
        assert_same_episodes(store, expected + unfinished, ["obs", "action"])


def test_steps_outside_of_an_episode_are_refused(store: Any) -> None:
    env = RecordTrajectories(Counter(interrupt_at=2), store)
    with pytest.raises(TrajstoreError, match="call reset"):
        env.step(0)
    env.reset()
    env.step(0)  # this episode has one step
    with pytest.raises(TrajstoreError, match="call reset"):
        env.step(0)
    env.reset()
    with pytest.raises(KeyboardInterrupt):
        env.step(0)
    with pytest.raises(TrajstoreError, match="call reset"):
        env.step(0)
    raw, _ = counters(2, AutoresetMode.NEXT_STEP)
    with pytest.raises(TrajstoreError, match="call reset"):
        RecordTrajectories(raw, store).step(np.zeros(2, np.int64))


# record_episodes


@pytest.mark.parametrize("num_envs", [1, 2, 3, 8])
def test_record_episodes_plays_each_seed_to_its_end(store: Any, num_envs: int) -> None:
    done: list[int] = []
    steps = record_episodes(
        "CartPole-v1",
        store,
        episodes=5,
        seed=20,
        num_envs=num_envs,
        policy=lambda observation: np.ones(num_envs, np.int64) if num_envs > 1 else 1,
        metadata={"policy": "right"},
        on_episode=lambda n, length, return_: done.append(n),
    )
    store.flush()
    view = store.trajectories
    assert done == [1, 2, 3, 4, 5]
    assert sorted(view[i].metadata["seed"] for i in range(len(view))) == [20, 21, 22, 23, 24]
    raw = gymnasium.make("CartPole-v1")
    for i in range(len(view)):
        observations, ended = [raw.reset(seed=int(view[i].metadata["seed"]))[0]], False
        while not ended:
            observation, _, ended, *_ = raw.step(1)
            observations.append(observation)
        np.testing.assert_array_equal(column(view[i], "obs"), np.stack(observations))
        assert view[i].terminated
        assert view[i].metadata["policy"] == "right"
    assert steps == sum(view[i].length for i in range(5))
    raw.close()


def test_record_episodes_is_reproducible(tmp_path: Any) -> None:
    actions = []
    for name in ("a", "b"):
        with trajstore.open(str(tmp_path / name), mode="a") as store:
            record_episodes("CartPole-v1", store, episodes=3, seed=1, num_envs=2)
            store.flush()
            actions.append([column(store.trajectories[i], "action").tolist() for i in range(3)])
    assert actions[0] == actions[1]


def test_record_episodes_names_what_is_wrong(store: Any) -> None:
    with pytest.raises(EnvironmentNotFoundError, match=r"'CartPoll-v1'.*'CartPole-v1'"):
        record_episodes("CartPoll-v1", store, episodes=1)
    with pytest.raises(EnvironmentNotFoundError, match="nowhere_to_be_found"):
        record_episodes("nowhere_to_be_found:Env-v0", store, episodes=1)
    with pytest.raises(EnvironmentNotFoundError, match="CartPole-v99"):
        record_episodes("CartPole-v99", store, episodes=1, num_envs=2)
    with pytest.raises(ValueError, match="episodes=0"):
        record_episodes("CartPole-v1", store, episodes=0)
    with pytest.raises(ValueError, match="num_envs=0"):
        record_episodes("CartPole-v1", store, episodes=1, num_envs=0)
    with pytest.raises(ValueError, match="seed=-1, expected at least 0"):
        record_episodes("CartPole-v1", store, episodes=1, seed=-1)
    with pytest.raises(RecordingError, match=r"'CartPole-v1' could not be made with foo=3: TypeError"):
        record_episodes("CartPole-v1", store, episodes=1, make_kwargs={"foo": 3})
