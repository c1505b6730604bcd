"""Environments whose observations say where they are, and an independent log of what the raw ones did."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

Log = list[dict[str, Any]]  # one dict per episode that began, in order
MODES = list(AutoresetMode)


class Counter(gymnasium.Env):
    """Observations are (environment, episode, step): a row from a wrong place is a wrong number."""

    observation_space = spaces.Box(0, 10_000, (3,), np.int32)
    action_space = spaces.Discrete(5)

    def __init__(self, index: int = 0, *, reuse: bool = False, interrupt_at: int | None = None) -> None:
        self.state = np.array([index, -1, 0], np.int32)
        self.reuse = reuse
        self.steps_until_interrupt = interrupt_at

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state[1:] = self.state[1] + 1, 0
        return self._observation(), {"double": -1, "part": {"inner": -1.0}}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.steps_until_interrupt is not None:
            self.steps_until_interrupt -= 1
            if self.steps_until_interrupt == 0:
                raise KeyboardInterrupt
        self.state[2] += 1
        index, episode, step = self.state.tolist()
        ended = step == 1 + (7 * episode + 3 * index) % 5
        info = {"double": 2 * step, "part": {"inner": step / 2}}
        return (
            self._observation(),
            episode + step / 10,
            ended and episode % 2 == 0,
            ended and episode % 2 == 1,
            info,
        )

    def _observation(self) -> Any:
        return self.state if self.reuse else self.state.copy()


class Zoo(gymnasium.Env):
    """One of each space that can be stored; values encode the step where the space has room for it."""

    observation_space = spaces.Dict(
        image=spaces.Box(0, 255, (5, 4, 3), np.uint8),
        goal=spaces.Discrete(100, start=-3),
        note=spaces.Text(20, charset="envpt 0123456789"),
        pair=spaces.Tuple((spaces.Box(-np.inf, np.inf, (2,), np.float32), spaces.MultiBinary(3))),
    )
    action_space = spaces.Dict(
        move=spaces.MultiDiscrete([3, 4]), force=spaces.Box(-1, 1, (2,), np.float32), say=spaces.Text(5)
    )

    def __init__(self, index: int = 0) -> None:
        self.index, self.episode, self.t = index, -1, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.episode, self.t = self.episode + 1, 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._observation(), 1.0, self.t == 2 + (self.episode + self.index) % 3, False, {}

    def _observation(self) -> dict[str, Any]:
        code = 16 * self.index + 4 * self.episode + self.t
        return {
            "image": np.full((5, 4, 3), code % 256, np.uint8),
            "goal": np.int64(code % 100 - 3),
            "note": f"env {self.index} ep {self.episode} t {self.t}",
            "pair": (np.array([code, -code], np.float32), np.array([code & 1, code >> 1 & 1, 1], np.int8)),
        }


class Logged(gymnasium.Wrapper):
    """Writes down, directly above the raw environment, what goes in and comes out: the truth of the tests."""

    def __init__(self, env: Any, log: Log) -> None:
        super().__init__(env)
        self.log = log

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        result = super().reset(seed=seed, options=options)
        self.log.append(
            {
                "obs": [deepcopy(result[0])],
                "action": [],
                "reward": [],
                "info": [],
                "ended": None,
                "seed": seed,
            }
        )
        return result

    def step(self, action: Any) -> Any:
        action = deepcopy(action)
        observation, reward, terminated, truncated, info = super().step(action)
        episode = self.log[-1]
        episode["obs"].append(deepcopy(observation))
        episode["action"].append(action)
        episode["reward"].append(reward)
        episode["info"].append(deepcopy(info))
        if terminated or truncated:
            episode["ended"] = (bool(terminated), bool(truncated))
        return observation, reward, terminated, truncated, info


def finished(*logs: Log) -> list[tuple[int, dict[str, Any]]]:
    return [(index, episode) for index, log in enumerate(logs) for episode in log if episode["ended"]]


def column(trajectory: Any, path: str) -> np.ndarray:
    return np.asarray(trajectory[path][:])


def part(value: Any, path: str) -> Any:
    """``obs/pair/0`` of one logged observation."""
    for key in path.split("/")[1:]:
        value = value[int(key) if isinstance(value, tuple) else key]
    return value


def assert_same_episodes(store: Any, expected: list[tuple[int, dict[str, Any]]], paths: list[str]) -> None:
    """The store holds exactly these episodes, in the order of each environment."""
    view = store.trajectories
    stored = [view[i] for i in range(len(view))]
    assert len(stored) == len(expected)
    queues: dict[int, list[Any]] = {}
    for trajectory in stored:
        queues.setdefault(trajectory.metadata.get("env_index") or 0, []).append(trajectory)
    for index, episode in expected:
        trajectory = queues[index].pop(0)
        assert trajectory.length == len(episode["action"])
        assert (trajectory.terminated, trajectory.truncated) == (episode["ended"] or (False, False))
        np.testing.assert_array_equal(column(trajectory, "reward"), episode["reward"])
        for path in paths:
            values = [part(value, path) for value in episode[path.split("/")[0]]]
            found = column(trajectory, path)
            assert len(found) == trajectory.length + path.startswith("obs")
            np.testing.assert_array_equal(found, np.array(values, dtype=found.dtype))


def play(env: Any, steps: int, *, seed: int | None = 0) -> None:
    """A plain loop with random actions; resets a single environment after each end."""
    env.action_space.seed(7)
    env.reset(seed=seed)
    for _ in range(steps):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if not isinstance(env, gymnasium.vector.VectorEnv):
            if terminated or truncated:
                env.reset()
        elif env.metadata["autoreset_mode"] is AutoresetMode.DISABLED and (terminated | truncated).any():
            env.reset(options={"reset_mask": terminated | truncated})


def counters(count: int, mode: Any, **kwargs: Any) -> tuple[Any, list[Log]]:
    logs: list[Log] = [[] for _ in range(count)]
    reuse = mode is not AutoresetMode.SAME_STEP  # there gymnasium itself keeps a reference over the reset
    makers: list[Callable[[], Any]] = [
        lambda i=i: Logged(Counter(i, reuse=reuse), logs[i])  # type: ignore[misc]
        for i in range(count)
    ]
    return SyncVectorEnv(makers, autoreset_mode=mode, **kwargs), logs
