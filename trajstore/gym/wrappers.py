"""The recording wrappers, one for single environments and one for vector environments.

Invariant: whatever happens, what the environment receives and returns is passed on unchanged. A step is
    recorded after
the environment has taken it; if that fails, the episodes under way are dropped, since their rows may be
incomplete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat

import gymnasium
import numpy as np
from gymnasium.core import ActType, ObsType
from gymnasium.vector import AutoresetMode

from trajstore.errors import RecordingError
from trajstore.gym.recording import (
    Metadata,
    OnEpisode,
    Recording,
    Sink,
    Track,
    autoreset_mode,
    has_wrapper,
    info_row,
    seeds_of,
)
from trajstore.gym.spaces import row_of


class RecordEnv(gymnasium.Wrapper[ObsType, ActType, ObsType, ActType]):
    """Records a single environment; see ``trajstore.gym.RecordTrajectories`` for the arguments."""

    def __init__(
        self,
        env: gymnasium.Env[ObsType, ActType],
        store: Sink,
        *,
        metadata: Metadata | None = None,
        info_columns: Sequence[str] = (),
        keep_unfinished: bool = False,
        on_episode: OnEpisode | None = None,
    ) -> None:
        super().__init__(env)
        self._recording = Recording(
            env,
            env.observation_space,
            env.action_space,
            store=store,
            metadata=metadata,
            info_columns=info_columns,
            keep_unfinished=keep_unfinished,
            on_episode=on_episode,
        )
        self._track = Track(self._recording, None)
        self._autoreset = has_wrapper(env, gymnasium.wrappers.Autoreset)

    @property
    def episodes_recorded(self) -> int:
        """Episodes stored by this wrapper so far."""
        return self._recording.stored

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[ObsType, dict[str, Any]]:
        """Begin a new episode; one that is under way is dropped, or stored with ``keep_unfinished``."""
        self._track.abandon()
        observation, info = super().reset(seed=seed, options=options)
        self._track.start(self._recording.observations.encode(observation), seed)
        return observation, info

    def step(self, action: ActType) -> tuple[ObsType, SupportsFloat, bool, bool, dict[str, Any]]:
        """Step the environment and record the step.

        Raises:
            RecordingError: The episode is over, or none has begun: call ``reset``.
            SchemaError: Something the environment took or gave does not fit its declared spaces. The episode
                is dropped.
        """
        if not (self._track.active or self._track.resets_next):
            raise RecordingError("step() outside of an episode: call reset() before the first step and after each end")
        encoded = self._recording.actions.encode(action)
        try:
            result = super().step(action)
        except BaseException:
            self._track.abandon()
            raise
        try:
            self._record(encoded, *result)
        except BaseException:
            self._track.discard()
            raise
        return result

    def close(self) -> None:
        """Close the environment; the episode under way is dropped, or stored with ``keep_unfinished``."""
        try:
            self._track.abandon()
        finally:
            super().close()

    def _record(
        self,
        action: Any,
        observation: Any,
        reward: Any,
        terminated: bool,
        truncated: bool,
        info: Mapping[str, Any],
    ) -> None:
        after = self._recording.observations.encode(observation)
        if self._track.resets_next:  # gymnasium.wrappers.Autoreset: this step was the reset
            self._track.start(after)
            return
        rewards = self._recording.rewards(np.asarray(reward, np.float64))
        self._track.add(action, rewards[()], self._recording.info_of(info), after)
        if terminated or truncated:
            self._track.end(bool(terminated), bool(truncated))
            self._track.resets_next = self._autoreset


class RecordVectorEnv(gymnasium.vector.VectorWrapper):
    """Records each sub-environment of a vector environment; see ``trajstore.gym.RecordTrajectories``.

    The autoreset mode is the one that the environment declares (``metadata["autoreset_mode"]``):

    * ``NEXT_STEP``: the step after an episode's end, which resets and ignores its action, is not stored.
    * ``SAME_STEP``: the final observation is ``infos["final_obs"]``, the final info ``infos["final_info"]``.
    * ``DISABLED``: a sub-environment that has finished is not recorded until
      ``reset(options={"reset_mask": mask})`` resets it.
    """

    # Some gymnasium versions call close() in __del__, however far __init__ got.
    _tracks: tuple[Track, ...] = ()

    def __init__(
        self,
        env: gymnasium.vector.VectorEnv[Any, Any, Any],
        store: Sink,
        *,
        metadata: Metadata | None = None,
        info_columns: Sequence[str] = (),
        keep_unfinished: bool = False,
        on_episode: OnEpisode | None = None,
    ) -> None:
        super().__init__(env)
        self._mode = autoreset_mode(env)
        self._recording = Recording(
            env,
            env.single_observation_space,
            env.single_action_space,
            store=store,
            metadata=metadata,
            info_columns=info_columns,
            keep_unfinished=keep_unfinished,
            on_episode=on_episode,
        )
        self._tracks = tuple(Track(self._recording, index) for index in range(env.num_envs))
        self._needs_reset = True

    @property
    def episodes_recorded(self) -> int:
        """Episodes stored by this wrapper so far."""
        return self._recording.stored

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin new episodes in all sub-environments, or in those of ``options["reset_mask"]``.

        The mask is a bool array ``[num_envs]``. Episodes under way in them are dropped, or stored with
        ``keep_unfinished``; the others go on.

        Raises:
            RecordingError: The environment does not heed the mask. The episodes under way are dropped.
        """
        # Copied: gymnasium takes the mask out of the options that it is given.
        mask = np.array((options or {}).get("reset_mask", np.ones(self.num_envs)), dtype=bool)
        if mask.shape != (self.num_envs,):
            raise ValueError(f"reset_mask has shape {mask.shape}, expected ({self.num_envs},)")
        for index in np.flatnonzero(mask):
            self._tracks[index].abandon()
        observations, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]
        batch = self._recording.observations.encode_batch(observations, self.num_envs)
        self._check_mask_was_heeded(mask, batch)
        seeds = seeds_of(self.env, seed)
        for index in np.flatnonzero(mask):
            self._tracks[index].start(row_of(batch, index), seeds[index])
        self._needs_reset = False
        return observations, infos

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all sub-environments and record the step of each that is in an episode.

        Raises:
            RecordingError: No ``reset`` came first, or the environment does not keep to its autoreset mode.
            SchemaError: Something it took or gave does not fit its declared spaces. The episodes under way
                are dropped.
        """
        if self._needs_reset:
            raise RecordingError(
                "step() outside of an episode: call reset() first, and again after an exception in step()"
            )
        encoded = self._recording.actions.encode_batch(actions, self.num_envs)
        self._needs_reset = True  # until this step has been recorded in full
        try:
            result = self.env.step(actions)
        except BaseException:
            for track in self._tracks:
                track.abandon()
            raise
        try:
            self._record(encoded, *result)
        except BaseException:
            for track in self._tracks:
                track.discard()
            raise
        self._needs_reset = False
        return result

    def skip(self, index: int | np.integer[Any]) -> None:
        """Record nothing of sub-environment ``index`` until it is reset; its episode under way is dropped."""
        self._tracks[index].discard()

    def close(self, **kwargs: Any) -> None:
        """Close the environment; episodes under way are dropped, or stored with ``keep_unfinished``."""
        try:
            for track in self._tracks:
                track.abandon()
        finally:
            self.env.close(**kwargs)

    def _check_mask_was_heeded(self, mask: Any, batch: Any) -> None:
        for index in np.flatnonzero(~mask):
            if self._tracks[index].active and not self._tracks[index].is_at(row_of(batch, index)):
                self._needs_reset = True
                for track in self._tracks:
                    track.discard()
                raise RecordingError(
                    f"reset(options={{'reset_mask': ...}}) changed the observation of sub-environment {index}, which the "
                    "mask leaves alone: two episodes would be stored as one; reset all of them, or put a wrapper that "
                    "alters observations outside of the recorder"
                )

    def _record(
        self,
        actions: Any,
        observations: Any,
        rewards: Any,
        terminations: Any,
        truncations: Any,
        infos: Mapping[str, Any],
    ) -> None:
        recording, same_step = self._recording, self._mode is AutoresetMode.SAME_STEP
        batch = recording.observations.encode_batch(observations, self.num_envs)
        rewards = recording.rewards(np.asarray(rewards))
        for index, track in enumerate(self._tracks):
            after = row_of(batch, index)
            if track.resets_next:
                track.start(after)
            elif track.active:
                terminated, truncated = bool(terminations[index]), bool(truncations[index])
                ended = terminated or truncated
                final = self._final_observation(infos, index) if ended and same_step else after
                info = self._info_of(infos, index, of_ended=ended and same_step)
                track.add(row_of(actions, index), rewards[index], info, final)
                if ended:
                    track.end(terminated, truncated)
                    track.resets_next = self._mode is AutoresetMode.NEXT_STEP
                    if same_step:
                        track.start(after)

    def _info_of(self, infos: Mapping[str, Any], index: int, *, of_ended: bool) -> dict[str, Any]:
        columns = self._recording.info_columns
        if not columns:
            return {}
        if of_ended:  # what lies beside final_info belongs to the reset
            return self._recording.info_of(info_row(infos, index, ["final_info"]).get("final_info", {}))
        return self._recording.info_of(info_row(infos, index, columns))

    def _final_observation(self, infos: Mapping[str, Any], index: int) -> Any:
        final, present = infos.get("final_obs"), infos.get("_final_obs")
        # gymnasium gives an object array of single observations; other environments a batch like any other.
        single = isinstance(final, np.ndarray) and final.dtype == object
        if final is None or (present is not None and not present[index]) or (single and final[index] is None):
            raise RecordingError(
                f"sub-environment {index} ended in autoreset mode SAME_STEP without its final observation in "
                "infos['final_obs']; return it there, or use autoreset mode NEXT_STEP"
            )
        if single:
            return self._recording.observations.encode(final[index])
        return row_of(self._recording.observations.encode_batch(final, self.num_envs), index)
