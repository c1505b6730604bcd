"""Episodes under way: what a recorder knows of each environment between two steps.

Invariant: between two calls, the rows of a ``Track``'s open episode and its ``observation`` fit together: the
    observation
is the one after the last row, the one that the next action will be chosen for. ``abandon`` therefore may end
the episode there; where a call was interrupted half-way, only ``discard`` is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode

from trajstore.errors import (
    ColumnTypeError,
    MetadataError,
    MissingColumnError,
    ReadOnlyError,
    RecordingError,
    SchemaConflictError,
)
from trajstore.gym.spaces import SpaceColumns, same_values
from trajstore.schema import Column, Schema
from trajstore.stored import Array

if TYPE_CHECKING:
    from trajstore.write.episode import Episode

Metadata = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]
OnEpisode = Callable[[int, int, float], None]  # (episodes stored so far, length in steps, return)


class Sink(Protocol):
    """Where episodes go: a ``Store`` opened for writing."""

    @property
    def mode(self) -> str:
        """``"r"`` for reading only."""
        ...

    @property
    def schema(self) -> Schema:
        """The columns so far; none before the first trajectory."""
        ...

    def begin(self, *, metadata: Mapping[str, Any] | None = None) -> Episode:
        """Open an episode."""
        ...


class Recording:
    """What all environments of one recorder have in common.

    Args:
        env: The environment, for its id.
        observation_space: Of one environment.
        action_space: Of one environment.
        store: Where the episodes go.
        metadata: The user's, per trajectory: a mapping, or a function of the episode's number.
        info_columns: Keys of the info to store each step.
        keep_unfinished: Whether an episode that is cut short is stored or dropped.
        on_episode: Called after each stored episode.

    Attributes:
        stored: Episodes stored so far.

    Raises:
        SchemaError: A space that cannot be stored as columns, or only as others than the store has.
        ReadOnlyError: The store was opened for reading.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any] | gymnasium.vector.VectorEnv[Any, Any, Any],
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        *,
        store: Sink,
        metadata: Metadata | None,
        info_columns: Sequence[str],
        keep_unfinished: bool,
        on_episode: OnEpisode | None,
    ) -> None:
        self.observations = SpaceColumns(observation_space, "obs", extra=True)
        self.actions = SpaceColumns(action_space, "action")
        self.store = store
        self.info_columns = (info_columns,) if isinstance(info_columns, str) else tuple(info_columns)
        self.keep_unfinished = keep_unfinished
        self.stored = 0
        self.on_episode = on_episode
        self._begun = 0
        self._metadata = metadata
        self._env_id = _env_id(env)
        self._reward_dtype: np.dtype[Any] | None = None
        self._check_store()

    def begin(self, env_index: int | None, seed: int | None) -> Episode:
        """Open the store's episode for an environment whose first step has just happened."""
        given = self._metadata(self._begun) if callable(self._metadata) else self._metadata
        if not isinstance(given, Mapping | None):
            raise MetadataError(f"metadata is a {type(given).__name__}, expected a mapping of field names to values")
        self._begun += 1
        own = {"env_id": self._env_id, "env_index": env_index, "seed": seed}
        known = {name: value for name, value in own.items() if value is not None}
        return self.store.begin(metadata={**known, **(given or {})})

    def rewards(self, values: Any) -> Array:
        """Rewards in the one dtype that the store has: float64, or the environment's own float.

        Raises:
            ColumnTypeError: The store's reward column cannot hold them exactly.
        """
        array = np.asarray(values)
        if self._reward_dtype is None:
            schema = self.store.schema
            if "reward" in schema:
                self._reward_dtype = schema["reward"].physical_dtype
            else:
                self._reward_dtype = array.dtype if array.dtype.kind == "f" else np.dtype(np.float64)
        if array.dtype == self._reward_dtype:
            return array
        with np.errstate(all="ignore"):
            cast = array.astype(self._reward_dtype)
        if not np.array_equal(cast, array, equal_nan=array.dtype.kind == "f"):
            raise ColumnTypeError(
                f"column 'reward': found {array.dtype} values that the store's {self._reward_dtype} cannot "
                "hold exactly; convert them (gymnasium.wrappers.TransformReward), or use a store of their own"
            )
        return cast

    def info_of(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """The values of ``info_columns`` in one environment's info of one step.

        Raises:
            MissingColumnError: A key is not there.
        """
        for key in self.info_columns:
            if key not in info:
                raise MissingColumnError(
                    f"column 'info/{key}': this step's info has no {key!r}, only "
                    f"{', '.join(map(repr, info)) or 'nothing'}; a column needs a value at each step: leave "
                    "it out of info_columns, or have the environment give it"
                )
        return {key: info[key] for key in self.info_columns}

    def _check_store(self) -> None:
        if self.store.mode == "r":
            raise ReadOnlyError("the store was opened with mode='r'; open it with mode='a' to record into it")
        schema = self.store.schema
        for column in (*self.observations.columns, *self.actions.columns):
            stored = schema[column.path] if len(schema) else None
            if stored is None and column.ragged:
                raise SchemaConflictError(
                    f"column {column.path!r} is a Sequence, whose lengths differ from step to step; open the "
                    "store with a schema that says so: "
                    "trajstore.open(url, mode='a', schema=trajstore.gym.schema_of(env))"
                )
            if stored is not None and _kind(stored) != _kind(column):
                raise SchemaConflictError(
                    f"column {column.path!r} is {_kind(stored)} in the store and {_kind(column)} in the "
                    "environment's space; record this environment into a store of its own"
                )


class Track:
    """One environment's episode under way.

    Args:
        recording: What it shares with the recorder's other environments.
        env_index: Which sub-environment, or None for a single environment.

    Attributes:
        active: In an episode that is being recorded.
        resets_next: The next step only resets the environment; it is not part of an episode.
    """

    def __init__(self, recording: Recording, env_index: int | None) -> None:
        self.active = False
        self.resets_next = False
        self._recording = recording
        self._env_index = env_index
        self._observation: Any = None
        self._seed: int | None = None
        # Opened by the first step, so that an episode without steps leaves no trace.
        self._episode: Episode | None = None
        self._length = 0  # steps
        self._return = 0.0

    def start(self, observation: Any, seed: Any = None) -> None:
        """A new episode begins with this observation (encoded)."""
        self.discard()
        self._observation = observation
        self._seed = int(seed) if isinstance(seed, int | np.integer) else None
        self.active = True

    def is_at(self, observation: Any) -> bool:
        """Whether this (encoded) is the observation that the next action is for."""
        return same_values(self._observation, observation)

    def add(self, action: Any, reward: Any, info: Mapping[str, Any], after: Any) -> None:
        """One step: ``action`` was taken; ``reward``, ``info`` and the observation ``after`` came back."""
        if self._episode is None:
            self._episode = self._recording.begin(self._env_index, self._seed)
        columns = {"obs": self._observation, "action": action, "reward": reward}
        if info:
            columns["info"] = info
        self._episode.add(**columns)
        self._observation = after
        self._length += 1
        self._return += float(reward.sum())

    def end(self, terminated: bool, truncated: bool) -> None:
        """The episode is over; its last observation is the one after its last step."""
        episode, observation = self._episode, self._observation
        length, return_ = self._length, self._return
        self._forget()
        if episode is not None:
            episode.end(observation, terminated=terminated, truncated=truncated)
            self._recording.stored += 1
            if self._recording.on_episode is not None:
                self._recording.on_episode(self._recording.stored, length, return_)

    def abandon(self) -> None:
        """The episode, if any, will not be finished: drop it, or with ``keep_unfinished`` store it."""
        if self._recording.keep_unfinished and self._episode is not None:
            self.end(terminated=False, truncated=False)
        else:
            self.discard()

    def discard(self) -> None:
        """Drop the episode, if any."""
        episode = self._episode
        self._forget()
        if episode is not None:
            episode.discard()

    def _forget(self) -> None:
        self.active = self.resets_next = False
        self._observation = self._seed = self._episode = None
        self._length, self._return = 0, 0.0


def autoreset_mode(env: gymnasium.vector.VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """How a vector environment resets its sub-environments.

    Raises:
        RecordingError: It does not say, or says something unknown.
    """
    # The attribute first: some environments share one class-level metadata dict between instances of
    # different modes.
    found = getattr(env.unwrapped, "autoreset_mode", None) or env.metadata.get("autoreset_mode")
    try:
        return AutoresetMode(found)
    except ValueError:
        raise RecordingError(
            f"{env} has metadata['autoreset_mode']={found!r}, expected one of "
            f"{', '.join(map(str, AutoresetMode))}: where an episode ends and the next begins depends on it; "
            "set env.metadata['autoreset_mode']"
        ) from None


def seeds_of(env: gymnasium.vector.VectorEnv[Any, Any, Any], seed: Any) -> list[Any]:
    """The seed of each sub-environment, ``[num_envs]``, from what ``reset`` was given."""
    if seed is None or isinstance(seed, int | np.integer):
        # Only these two promise seed + index. Others draw all their sub-environments from one generator.
        each = isinstance(env.unwrapped, gymnasium.vector.SyncVectorEnv | gymnasium.vector.AsyncVectorEnv)
        return [seed if seed is None or not each else int(seed) + index for index in range(env.num_envs)]
    seeds = list(seed)
    return seeds if len(seeds) == env.num_envs else [None] * env.num_envs


def info_row(infos: Mapping[str, Any], index: int, keys: Iterable[str] | None = None) -> dict[str, Any]:
    """The info of sub-environment ``index``: ``keys`` or all, but none whose mask ``_key`` is false there."""
    row: dict[str, Any] = {}
    for key in infos if keys is None else keys:
        mask = infos.get(f"_{key}")
        is_mask = key.startswith("_") and key[1:] in infos
        if key in infos and not is_mask and (mask is None or mask[index]):
            values = infos[key]
            row[key] = info_row(values, index) if isinstance(values, Mapping) else values[index]
    return row


def has_wrapper(env: gymnasium.Env[Any, Any], kind: type[gymnasium.Wrapper[Any, Any, Any, Any]]) -> bool:
    """Whether ``env`` is wrapped in ``kind`` at any depth."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, kind):
            return True
        env = env.env
    return False


def _kind(column: Column) -> str:
    return f"{column.describe()} ({'a row per observation' if column.extra else 'a row per step'})"


def _env_id(env: gymnasium.Env[Any, Any] | gymnasium.vector.VectorEnv[Any, Any, Any]) -> str | None:
    unwrapped = env.unwrapped
    spec = unwrapped.spec
    if spec is None and isinstance(unwrapped, gymnasium.vector.SyncVectorEnv):  # not made by make_vec
        spec = unwrapped.envs[0].unwrapped.spec
    return None if spec is None else spec.id
