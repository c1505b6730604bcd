"""``RolloutBuffer``: the steps of many environments side by side, for on-policy training.

Invariant: rows ``0 .. step - 1`` of every tensor are what ``add`` was given, one row per call; advantages and returns mean
something once they were computed for exactly these rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch

from trajstore import Store, TrajectoryRef
from trajstore.buffers.advantages import gae
from trajstore.buffers.apexrl.episodes import append_episodes
from trajstore.buffers.apexrl.fields import Devices, Field, Shapes, Values, mapped, settled, tensor_of
from trajstore.errors import BufferFullError, EmptyBufferError, SchemaConflictError, SelectionError, UnknownColumnError
from trajstore.names import flatten

_Self = TypeVar("_Self", bound="RolloutBuffer")
_NUMBERS = ("rewards", "dones", "values", "log_probs")


class RolloutBuffer:
    """The steps of many environments side by side, for on-policy training.

    Args:
        num_envs: Environments.
        num_steps: Steps of each, until ``clear()``.
        obs_shape: Of one observation: a shape, or a (nested) dict of shapes for dict observations.
        device: Where everything is kept.
        num_privileged_obs: Length of a flat privileged observation; 0 for none.
        action_shape: Of one action; by default that of the first ones added.
        action_dtype: Actions are converted to it; by default it is the dtype of the first ones added.
        privileged_obs_shape: Of one privileged observation, instead of ``num_privileged_obs``.
        obs_dtype: Observations are converted to it; a dict, if ``obs_shape`` is one. Privileged observations are float32,
            unless it is one dtype.

    Attributes:
        observations: ``(num_steps, num_envs, *obs_shape)``; a dict of them for dict observations.
        privileged_observations: Likewise, or None.
        actions: ``(num_steps, num_envs, *action_shape)``; None until their shape and dtype are known.
        rewards: ``(num_steps, num_envs)`` float32, as the next five.
        dones: 1 where the episode ended with the step.
        values: Of the observations.
        log_probs: Of the actions.
        advantages: Zero until computed, and again from the next ``add`` on: they were those of a shorter rollout.
        returns: Likewise.
        step: Rows that were added.

    Raises:
        ValueError: Sizes or shapes that are none.

    Examples:
        >>> import torch
        >>> buffer = RolloutBuffer(num_envs=2, num_steps=3, obs_shape=(4,), device="cpu")
        >>> ones = torch.ones(2)
        >>> for _ in range(3):
        ...     buffer.add(torch.ones(2, 4), None, torch.zeros(2, 1), ones, dones=0 * ones, values=ones, log_probs=ones)
        >>> buffer.compute_returns_and_advantages(last_values=ones, gamma=0.5, gae_lambda=1.0)
        >>> buffer.advantages[:, 0]
        tensor([0.8750, 0.7500, 0.5000])
        >>> buffer.get_all_data()["observations"].shape
        torch.Size([6, 4])
    """

    def __init__(
        self,
        num_envs: int,
        num_steps: int,
        obs_shape: Shapes,
        device: torch.device | str = "cpu",
        num_privileged_obs: int = 0,
        action_shape: int | tuple[int, ...] | None = None,
        action_dtype: torch.dtype | None = None,
        privileged_obs_shape: Shapes | None = None,
        *,
        obs_dtype: torch.dtype | Mapping[str, Any] = torch.float32,
    ) -> None:
        for name, number, least in (
            ("num_envs", num_envs, 1),
            ("num_steps", num_steps, 1),
            ("num_privileged_obs", num_privileged_obs, 0),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise SelectionError(f"{name}={number!r}, expected a whole number, at least {least}")
        self.num_envs = num_envs
        self.num_steps = num_steps
        self.device = torch.empty(0, device=device).device  # "cuda" is cuda:0, as its tensors will say
        self.step = 0
        self._computed = 0  # rows that advantages and returns were computed for: all, or 0
        self._observations = Field.of("observations", obs_shape, obs_dtype)
        privileged = _privileged_shape(num_privileged_obs, privileged_obs_shape)
        privileged_dtype = torch.float32 if isinstance(obs_dtype, Mapping) else obs_dtype
        self._privileged: Field | None = None
        if privileged is not None:
            self._privileged = Field.of("privileged_observations", privileged, privileged_dtype)
        self._action_shape, self._action_dtype = action_shape, action_dtype
        self._actions: Field | None = None  # once shape and dtype are known
        self._numbers = [Field.of(name, (), torch.float32) for name in _NUMBERS]

        self.observations: Values = self._zeros(self._observations)
        self.privileged_observations: Values = None if self._privileged is None else self._zeros(self._privileged)
        self.actions: torch.Tensor | None = None
        if action_shape is not None and action_dtype is not None:
            self._actions = Field.of("actions", action_shape, action_dtype)
            self.actions = self._zeros(self._actions)
        self.rewards, self.dones, self.values, self.log_probs = (self._zeros(field) for field in self._numbers)
        self.advantages = torch.zeros_like(self.rewards)
        self.returns = torch.zeros_like(self.rewards)

    def __len__(self) -> int:
        return self.step * self.num_envs

    def add(
        self,
        observations: Values,
        privileged_observations: Values,
        actions: Any,
        rewards: torch.Tensor,
        dones: torch.Tensor,
        values: torch.Tensor,
        log_probs: torch.Tensor,
    ) -> None:
        """Add one step of every environment. It is copied, without gradients.

        Args:
            observations: ``(num_envs, *obs_shape)``; a dict of them if ``obs_shape`` is one.
            privileged_observations: Likewise; None if there are none.
            actions: ``(num_envs, *action_shape)``.
            rewards: ``(num_envs,)`` or ``(num_envs, 1)``, as the next three.
            dones: 1 or True where the episode ended with this step, however it ended.
            values: Of the observations.
            log_probs: Of the actions.

        Raises:
            BufferFullError: ``num_steps`` were added already; a ValueError.
            ValueError: Other shapes or keys, or tensors on different devices. The buffer is as it was.
        """
        if self.step >= self.num_steps:
            raise BufferFullError(
                f"step {self.step + 1} for a rollout buffer of num_steps={self.num_steps}; call clear() between rollouts"
            )
        if self._privileged is None and privileged_observations is not None:
            raise UnknownColumnError(
                "privileged_observations for a buffer that was made without; pass num_privileged_obs or "
                "privileged_obs_shape there, or None here"
            )
        leading, devices = (self.num_envs,), Devices(self.device)
        rows = self._observations.rows(observations, leading, devices)
        if self._privileged is not None:
            rows.update(self._privileged.rows(privileged_observations, leading, devices))
        field = self._actions
        if field is None:
            shape = tensor_of("actions", actions).shape[1:] if self._action_shape is None else self._action_shape
            field = Field.of("actions", shape, self._action_dtype)
        rows.update(field.rows(actions, leading, devices))
        for number, given in zip(self._numbers, (rewards, dones, values, log_probs), strict=True):
            rows.update(number.rows(given, leading, devices))
        if self._actions is None:
            self._actions = settled(field, lambda path: rows[path].dtype)
            self.actions = self._zeros(self._actions)
        for path, tensor in self._tensors():
            tensor[self.step] = rows[path]
        self.step += 1
        if self._computed:
            self._forget_computed()

    def compute_returns_and_advantages(
        self,
        last_values: torch.Tensor,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        *,
        truncated: torch.Tensor | None = None,
        bootstrap_values: torch.Tensor | None = None,
    ) -> None:
        """Set ``advantages`` and ``returns`` of the steps added: ``trajstore.buffers.advantages.gae``.

        Args:
            last_values: ``(num_envs,)`` or ``(num_envs, 1)``, values of the observations after the last step.
            gamma: Discount, 0 to 1.
            gae_lambda: 0 gives one-step TD errors, 1 discounted returns minus values.
            truncated: ``(step, num_envs)``, only a time limit ended the episode: ``bootstrap_values`` are bootstrapped.
            bootstrap_values: ``(step, num_envs)``, values of the observations that followed truncated steps.

        Raises:
            EmptyBufferError: Nothing was added; a ValueError and RuntimeError.
            ValueError: Other shapes, numbers outside 0 to 1, or no tensor.
        """
        n = self._filled()
        last_values = tensor_of("last_values", last_values, device=self.device)
        if tuple(last_values.shape) == (self.num_envs, 1):
            last_values = last_values.squeeze(-1)
        found = gae(
            self.rewards[:n],
            self.values[:n],
            last_values.to(self.device),
            self.dones[:n],
            gamma=gamma,
            lam=gae_lambda,
            truncated=None if truncated is None else truncated.to(self.device),
            bootstrap_values=None if bootstrap_values is None else bootstrap_values.to(self.device),
        )
        self.advantages[:n] = found.advantages
        self.returns[:n] = found.returns
        self._computed = n

    def get_all_data(self) -> dict[str, Any]:
        """Everything that was added, steps and environments flattened into one dimension of ``len()``, steps first.

        Returns:
            ``observations``, ``privileged_observations`` (or None), ``actions``, ``old_log_probs``, ``advantages``,
            ``returns`` and ``values``. They are views of the buffer: the next rollout overwrites them. Advantages and
            returns are zero where they were not computed, or steps were added since.

        Raises:
            EmptyBufferError: Nothing was added; a ValueError and RuntimeError.
        """
        n = self._filled()
        return {name: mapped(value, lambda tensor: tensor[:n].flatten(0, 1)) for name, value in self._batch().items()}

    def get_minibatch(self, batch_size: int, *, generator: torch.Generator | None = None) -> tuple[Any, ...]:
        """Rows of ``get_all_data()`` drawn uniformly, none of them twice.

        Args:
            batch_size: How many, at most ``len()``.
            generator: Source of randomness, on the buffer's device.

        Returns:
            ``observations``, ``privileged_observations`` (or None), ``actions``, ``old_log_probs``, ``advantages``,
            ``returns`` and ``values``, copied.

        Raises:
            EmptyBufferError: Nothing was added; a ValueError and RuntimeError.
            SelectionError: ``batch_size`` is below 1 or above ``len()``; a ValueError.
        """
        data = self.get_all_data()
        if not 1 <= batch_size <= len(self):
            raise SelectionError(f"batch_size={batch_size} of {len(self)} rows; expected 1 to {len(self)}")
        indices = torch.randperm(len(self), generator=generator, device=self.device)[:batch_size]
        return tuple(mapped(value, lambda tensor: tensor.index_select(0, indices)) for value in data.values())

    def clear(self) -> None:
        """Forget all steps; memory, and shape and dtype of actions, stay."""
        self.step = 0
        self._forget_computed()

    def to(self: _Self, device: torch.device | str) -> _Self:
        """Move everything to a device; returns the buffer."""
        self.device = torch.empty(0, device=device).device
        for name in ("observations", "privileged_observations", "actions", *_NUMBERS, "advantages", "returns"):
            setattr(self, name, mapped(getattr(self, name), lambda tensor: tensor.to(self.device)))
        return self

    def append_to(self, store: Store, *, truncated: torch.Tensor | None = None, **metadata: Any) -> list[TrajectoryRef]:
        """Append what was added to a store, as episodes of each environment.

        They are split where ``dones`` is positive. Columns: ``obs`` (``obs/<key>`` for dict observations),
        ``privileged_obs`` if there are any, ``action``, ``reward``, ``value``, ``log_prob``, and ``advantage`` and
        ``return`` if they have been computed: one store takes rollouts with and without these two. A step with ``dones`` is
        the terminated end of its episode; the last piece of an environment that was still going on is neither terminated
        nor truncated.

        Args:
            store: Open for appending.
            truncated: ``(step, num_envs)``, episodes that end there were cut off by a time limit instead.
            **metadata: Fields of every episode; ``environment``, the number of the environment, is added.

        Returns:
            One reference per episode, by environment, then time. They are durable after ``store.flush()``.

        Raises:
            EmptyBufferError: Nothing was added; a ValueError and RuntimeError.
            SelectionError: ``store`` is no store, a path say; a ValueError.
            ColumnShapeError: ``truncated`` has another shape; a ValueError.
            SchemaError: The store has other columns, or requires ``advantage`` and ``return`` and they were not computed; a
                ValueError.
        """
        n = self._filled()
        named = {
            "obs": self.observations,
            "privileged_obs": self.privileged_observations,
            "action": self.actions,
            "reward": self.rewards,
            "value": self.values,
            "log_prob": self.log_probs,
        }
        if self._computed:
            named |= {"advantage": self.advantages, "return": self.returns}
        steps = {
            path: tensor[:n] for path, tensor in flatten({k: v for k, v in named.items() if v is not None}).items()
        }
        return append_episodes(store, steps, self.dones[:n] > 0, truncated, metadata, computed=("advantage", "return"))

    def state_dict(self) -> dict[str, Any]:
        """``num_steps``, ``num_envs``, ``step``, ``computed`` and ``tensors``: copies of the rows added, by flat name."""
        tensors = {path: tensor[: self.step].clone() for path, tensor in self._tensors()}
        for name in ("advantages", "returns"):
            tensors[name] = getattr(self, name)[: self.step].clone()
        return {
            "num_steps": self.num_steps,
            "num_envs": self.num_envs,
            "step": self.step,
            "computed": self._computed,
            "tensors": tensors,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the steps of another buffer, from its ``state_dict``.

        Raises:
            ValueError: Other sizes, shapes or dtypes; the buffer is as it was.
        """
        missing = [key for key in ("step", "computed", "tensors") if key not in state]
        if missing:
            raise SchemaConflictError(f"a state without {', '.join(map(repr, missing))}; pass what state_dict() gave")
        for key, value in (("num_steps", self.num_steps), ("num_envs", self.num_envs)):
            if state.get(key) != value:
                raise SchemaConflictError(
                    f"the state has {key}={state.get(key)}, this rollout buffer {key}={value}; make one that is alike"
                )
        tensors: dict[str, torch.Tensor] = dict(state["tensors"])
        field = self._actions
        if field is None and "actions" in tensors:
            shape = tensors["actions"].shape[2:] if self._action_shape is None else self._action_shape
            field = settled(Field.of("actions", shape, self._action_dtype), lambda path: tensors[path].dtype)
        fields = [self._observations, self._privileged, field if "actions" in tensors else None, *self._numbers]
        fields += [Field.of(name, (), torch.float32) for name in ("advantages", "returns")]
        leading = (int(state["step"]), self.num_envs)
        expected = {
            path: ((*leading, *shape), kept.dtypes[path])
            for kept in fields
            if kept
            for path, shape in kept.shapes.items()
        }
        found = {path: (tuple(tensor.shape), tensor.dtype) for path, tensor in tensors.items()}
        if found != expected or not 0 <= leading[0] <= self.num_steps:
            raise SchemaConflictError(
                f"the state has tensors {found}, expected {expected}; make a rollout buffer that is alike"
            )
        if self._actions is None and field is not None:
            self._actions = field
            self.actions = self._zeros(field)
        self.clear()
        self.step, self._computed = leading[0], int(state["computed"])
        for path, tensor in [*self._tensors(), ("advantages", self.advantages), ("returns", self.returns)]:
            if path in tensors:
                tensor[: self.step] = tensors[path]
        if 0 < self._computed < self.step:  # from a version that kept those of a shorter rollout
            self._forget_computed()

    def _forget_computed(self) -> None:
        """Advantages and returns that belong to other rows than those of now are nobody's."""
        self._computed = 0
        self.advantages.zero_()
        self.returns.zero_()

    def _zeros(self, field: Field) -> Values:
        return field.nested(field.zeros(self.num_steps, self.num_envs, device=self.device))

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Flat name and tensor of everything that ``add`` is given."""
        for name in ("observations", "privileged_observations", "actions", *_NUMBERS):
            value = getattr(self, name)
            if value is not None:
                yield from flatten({name: value}).items()

    def _batch(self) -> dict[str, Values]:
        return {
            "observations": self.observations,
            "privileged_observations": self.privileged_observations,
            "actions": self.actions,
            "old_log_probs": self.log_probs,
            "advantages": self.advantages,
            "returns": self.returns,
            "values": self.values,
        }

    def _filled(self) -> int:
        if not self.step:
            raise EmptyBufferError("nothing was added to the rollout buffer; add steps first")
        return self.step


def _privileged_shape(number: int, shape: Shapes | None) -> Shapes | None:
    """The shape of privileged observations by the two arguments that may say it; None for none."""
    if shape is None:
        return number or None
    name = "privileged_observations"
    if number and Field.of(name, shape, None).shapes != {name: (number,)}:
        raise SelectionError(f"num_privileged_obs={number} and privileged_obs_shape={shape!r} differ; pass one of them")
    return shape
