"""Record gymnasium environments, single or vectorized, into a store.

Invariant: each stored trajectory is exactly one episode of one environment, as that environment lived it:
``length`` actions and rewards, ``length + 1`` observations, the last of which is the episode's own final
observation and never the next episode's first. Steps that only reset an environment are not stored.

Columns are ``obs``, ``action`` (both nested as their spaces are), ``reward``, and ``info/<key>`` for each of
``info_columns``. Metadata are ``env_id``, ``seed`` (of the ``reset`` that began the episode, where it was
given one), ``env_index`` (vector environments), and the caller's own.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np

try:
    import gymnasium
except ImportError as error:
    raise ImportError("trajstore.gym needs gymnasium: pip install 'trajstore[gym]'") from error

from gymnasium.core import ActType, ObsType
from gymnasium.vector import AutoresetMode

from trajstore.errors import EnvironmentNotFoundError, RecordingError
from trajstore.gym.recording import Metadata, OnEpisode, Sink
from trajstore.gym.spaces import SpaceColumns
from trajstore.gym.wrappers import RecordEnv, RecordVectorEnv
from trajstore.schema import Column, Schema

__all__ = ["RecordEnv", "RecordTrajectories", "RecordVectorEnv", "record_episodes", "schema_of"]

# Namespaces whose package gymnasium must be told of first: (module, what to install).
_NAMESPACES = {"ALE": ("ale_py", "trajstore[atari]")}


@overload
def RecordTrajectories(
    env: gymnasium.Env[ObsType, ActType],
    store: Sink,
    *,
    metadata: Metadata | None = None,
    info_columns: Sequence[str] = (),
    keep_unfinished: bool = False,
    on_episode: OnEpisode | None = None,
) -> RecordEnv[ObsType, ActType]: ...


@overload
def RecordTrajectories(
    env: gymnasium.vector.VectorEnv[Any, Any, Any],
    store: Sink,
    *,
    metadata: Metadata | None = None,
    info_columns: Sequence[str] = (),
    keep_unfinished: bool = False,
    on_episode: OnEpisode | None = None,
) -> RecordVectorEnv: ...


@overload
def RecordTrajectories(
    env: gymnasium.Env[Any, Any] | gymnasium.vector.VectorEnv[Any, Any, Any],
    store: Sink,
    *,
    metadata: Metadata | None = None,
    info_columns: Sequence[str] = (),
    keep_unfinished: bool = False,
    on_episode: OnEpisode | None = None,
) -> RecordEnv[Any, Any] | RecordVectorEnv: ...


def RecordTrajectories(  # noqa: N802 - wraps like a gymnasium wrapper, and is named like one
    env: gymnasium.Env[Any, Any] | gymnasium.vector.VectorEnv[Any, Any, Any],
    store: Sink,
    *,
    metadata: Metadata | None = None,
    info_columns: Sequence[str] = (),
    keep_unfinished: bool = False,
    on_episode: OnEpisode | None = None,
) -> RecordEnv[Any, Any] | RecordVectorEnv:
    """Wrap an environment so that each episode it finishes is appended to ``store``.

    The wrapper changes nothing that the environment receives or returns. Memory stays bounded however long an
    episode is, since its steps go to the store as they happen. An episode that an exception or Ctrl-C cuts
    short is dropped; every episode finished before it is kept.

    Args:
        env: An ``Env`` or a ``VectorEnv`` of any autoreset mode.
        store: A store opened for writing. It stays the caller's: closing the wrapper does not flush or close
            it.
        metadata: Stored with each trajectory: a mapping, or a function of the episode's number, which counts
            the episodes that this wrapper began, from 0. It may override the wrapper's own fields.
        info_columns: Keys of ``info`` whose value is stored each step, under ``info/<key>``. The value is the
            one that the step returned; the info of ``reset`` is not stored.
        keep_unfinished: Store an episode that ``reset``, ``close`` or an exception in the environment cuts
            short, as neither terminated nor truncated, with the last observation that was returned as its
            final one.
        on_episode: Called after each stored episode with (episodes stored so far, its length in steps, its
            return).

    Returns:
        ``RecordEnv``, a ``gymnasium.Wrapper``, for an ``Env``; ``RecordVectorEnv``, a
        ``gymnasium.vector.VectorWrapper``, for a ``VectorEnv``.

    Raises:
        SchemaError: A space that cannot be stored as columns, or only as others than the store has.
        ReadOnlyError: The store was opened for reading.
        RecordingError: A vector environment that does not say how it resets.
        TypeError: ``env`` is neither.
    """
    options: dict[str, Any] = {
        "metadata": metadata,
        "info_columns": info_columns,
        "keep_unfinished": keep_unfinished,
        "on_episode": on_episode,
    }
    if isinstance(env, gymnasium.vector.VectorEnv):
        return RecordVectorEnv(env, store, **options)
    if isinstance(env, gymnasium.Env):
        return RecordEnv(env, store, **options)
    raise TypeError(f"env is a {type(env).__name__}, expected a gymnasium.Env or a gymnasium.vector.VectorEnv")


def schema_of(
    env: gymnasium.Env[Any, Any] | gymnasium.vector.VectorEnv[Any, Any, Any],
    *,
    reward: str = "float64",
    info: Mapping[str, str] | None = None,
) -> Schema:
    """The columns that recording an environment writes, for ``trajstore.open(url, mode="a", schema=...)``.

    Only environments with a ``Sequence`` in their spaces need it: that its lengths differ from step to step
    cannot be inferred from a first episode. For all others it makes a store refuse what does not come from
    such an environment.

    Args:
        env: An ``Env`` or a ``VectorEnv``.
        reward: The dtype of the scalar reward.
        info: For each of ``info_columns``, the dtype of its scalar value.

    Raises:
        SchemaError: A space that cannot be stored as columns.
    """
    if isinstance(env, gymnasium.vector.VectorEnv):
        spaces = env.single_observation_space, env.single_action_space
    else:
        spaces = env.observation_space, env.action_space
    return Schema(
        (
            *SpaceColumns(spaces[0], "obs", extra=True).columns,
            *SpaceColumns(spaces[1], "action").columns,
            Column(path="reward", dtype=reward),
            *(Column(path=f"info/{key}", dtype=dtype) for key, dtype in (info or {}).items()),
        )
    )


def record_episodes(
    env_id: str,
    store: Sink,
    *,
    episodes: int,
    policy: Callable[[Any], Any] | None = None,
    seed: int | None = 0,
    num_envs: int = 1,
    make_kwargs: Mapping[str, Any] | None = None,
    metadata: Metadata | None = None,
    info_columns: Sequence[str] = (),
    on_episode: OnEpisode | None = None,
) -> int:
    """Play exactly ``episodes`` episodes of a registered environment to their ends and store each.

    Every episode that begins is also finished and stored: with several environments in parallel, too, the
    stored episodes are not biased towards short ones. Call ``store.flush()`` to make them durable.

    Args:
        env_id: What ``gymnasium.make`` takes: ``"CartPole-v1"``, ``"module:Env-v0"``.
        store: A store opened for writing.
        episodes: How many, at least 1.
        policy: Observation -> action, of a batch (``[num_envs, ...]``) if ``num_envs > 1``. Default: actions
            sampled uniformly from the action space.
        seed: Episode ``k`` is reset with ``seed + k`` and says so in its metadata, and random actions are
            seeded with ``seed``. None leaves all of it to chance.
        num_envs: Environments stepped together, at least 1.
        make_kwargs: Passed to the environment.
        metadata: As for ``RecordTrajectories``.
        info_columns: As for ``RecordTrajectories``.
        on_episode: As for ``RecordTrajectories``.

    Returns:
        Steps recorded.

    Raises:
        EnvironmentNotFoundError: No environment has this id (the message lists close matches), or it needs a
            package that is not installed.
        RecordingError: The environment could not be made with these arguments.
        SchemaError: A space that cannot be stored as columns.
        ValueError: ``episodes`` or ``num_envs`` is less than 1, or ``seed`` less than 0.
    """
    for name, value in (("episodes", episodes), ("num_envs", num_envs)):
        if value < 1:
            raise ValueError(f"{name}={value}, expected at least 1")
    if seed is not None and seed < 0:
        raise ValueError(f"seed={seed}, expected at least 0, or None to leave it to chance")
    seeds = [None if seed is None else seed + episode for episode in range(episodes)]
    steps = 0

    def count(done: int, length: int, return_: float) -> None:
        nonlocal steps
        steps += length
        if on_episode is not None:
            on_episode(done, length, return_)

    env = _made(env_id, num_envs, make_kwargs or {})
    try:
        recorder = RecordTrajectories(env, store, metadata=metadata, info_columns=info_columns, on_episode=count)
        recorder.action_space.seed(seed)
        choose = policy or (lambda _: recorder.action_space.sample())
        if isinstance(recorder, RecordVectorEnv):
            _play_many(recorder, choose, seeds)
        else:
            _play_one(recorder, choose, seeds)
    finally:
        env.close()
    return steps


def _play_one(env: RecordEnv[Any, Any], policy: Callable[[Any], Any], seeds: Sequence[int | None]) -> None:
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        ended = False
        while not ended:
            observation, _, terminated, truncated, _ = env.step(policy(observation))
            ended = terminated or truncated


def _play_many(envs: RecordVectorEnv, policy: Callable[[Any], Any], seeds: Sequence[int | None]) -> None:
    unplayed = list(seeds)[::-1]
    ended = np.ones(envs.num_envs, dtype=bool)
    playing = np.zeros(envs.num_envs, dtype=bool)
    while True:
        if ended.any():
            chosen: list[int | None] = [None] * envs.num_envs
            for index in np.flatnonzero(ended):
                playing[index] = bool(unplayed)
                chosen[index] = unplayed.pop() if unplayed else None
            if not playing.any():
                return
            observations, _ = envs.reset(seed=chosen, options={"reset_mask": ended})
            for index in np.flatnonzero(ended & ~playing):  # stepped along with the others
                envs.skip(index)
        observations, _, terminations, truncations, _ = envs.step(policy(observations))
        ended = terminations | truncations


def _made(
    env_id: str, num_envs: int, kwargs: Mapping[str, Any]
) -> gymnasium.Env[Any, Any] | gymnasium.vector.VectorEnv[Any, Any, Any]:
    """Make an environment, with gymnasium's errors about ids and packages as ours."""
    module, extra = _NAMESPACES.get(env_id.partition("/")[0], ("", ""))
    absent = module and not importlib.util.find_spec(module)
    if module and not absent:
        gymnasium.register_envs(importlib.import_module(module))
    try:
        if num_envs == 1:
            return gymnasium.make(env_id, **kwargs)
        # DISABLED lets each episode have a seed of its own.
        vector_kwargs = {"autoreset_mode": AutoresetMode.DISABLED}
        return gymnasium.make_vec(env_id, num_envs, "sync", vector_kwargs=vector_kwargs, **kwargs)
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv) as error:
        known = {name.casefold(): name for name in gymnasium.registry}
        close = [known[name] for name in difflib.get_close_matches(env_id.casefold(), known, n=3)]
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else str(error)
        if absent:
            hint = f"pip install '{extra}'"
        raise EnvironmentNotFoundError(
            f"no environment {env_id!r} is registered: {hint} (those of other packages are named "
            "'package:Name-v0'; gymnasium.pprint_registry() lists all)"
        ) from error
    except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        raise EnvironmentNotFoundError(
            f"environment {env_id!r} needs a package that is not installed: {error}"
        ) from error
    except Exception as error:  # whatever the environment's own code raises
        given = ", ".join(f"{name}={value!r}" for name, value in kwargs.items()) or "no options"
        raise RecordingError(
            f"environment {env_id!r} could not be made with {given}: {type(error).__name__}: {error}; give the options "
            "that it takes"
        ) from error
