"""``ReplayBuffer``: transitions for off-policy training, the newest ``capacity`` of them.

Invariant: a ``Ring`` holds all rows; until the first actions define what was left open of them, it has no columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trajstore.buffers.apexrl.fields import Devices, Field, Shapes, Values, settled
from trajstore.buffers.ring import Ring
from trajstore.errors import EmptyBufferError, SchemaConflictError, SelectionError, UnknownColumnError


class RingBuffer:
    """Fields in a ring: what ``ReplayBuffer`` and ``DistillationBuffer`` share.

    Args:
        capacity: Rows.
        fields: The first one tells one row from a batch.
        device: Where the rows are kept.
    """

    def __init__(self, capacity: int, fields: list[Field], *, device: torch.device | str) -> None:
        self._ring = Ring(capacity, device=device)
        self._fields = fields
        if all(dtype is not None for field in fields for dtype in field.dtypes.values()):
            self._ring = self._ring_for(fields)
        self._nested = any(field.is_nested for field in fields)

    @property
    def capacity(self) -> int:
        """Rows that there is room for."""
        return self._ring.capacity

    @property
    def size(self) -> int:
        """Rows that it holds."""
        return self._ring.size

    @property
    def pointer(self) -> int:
        """Where the next row goes."""
        return self._ring.pointer

    @property
    def device(self) -> torch.device:
        """Where the rows are kept."""
        return self._ring.device

    def __len__(self) -> int:
        return self._ring.size

    def __repr__(self) -> str:
        shapes = ", ".join(f"{field.name}={field.described}" for field in self._fields)
        return f"{type(self).__name__}(capacity={self.capacity}, size={self.size}, device={self.device}, {shapes})"

    def clear(self) -> None:
        """Forget the rows; memory and dtypes stay."""
        self._ring.clear()

    def state_dict(self) -> dict[str, Any]:
        """``capacity``, ``size``, ``pointer`` and ``columns``, copies of the rows in storage order by flat name."""
        return self._ring.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the rows of another buffer, from its ``state_dict``.

        Raises:
            ValueError: Another capacity, other shapes or other dtypes; the buffer is as it was.
        """
        self._load(state, self._fields)

    def _load(self, state: Mapping[str, Any], fields: list[Field]) -> None:
        columns = state.get("columns") or {}
        if columns:
            expected = {path: shape for field in fields for path, shape in field.shapes.items()}
            found = {path: tuple(rows.shape[1:]) for path, rows in columns.items()}
            if found != expected:
                raise SchemaConflictError(
                    f"the state has rows of {found}, this buffer of {expected}; make one that is alike"
                )
            fields = [settled(field, lambda path: columns[path].dtype) for field in fields]
        ring = self._ring
        if columns and not ring.columns:
            ring = self._ring_for(fields)
        ring.load_state_dict(state)
        self._ring, self._fields = ring, fields

    def _add(self, values: list[Values], fields: list[Field]) -> None:
        """Add one row or a batch: a value for each field."""
        leading = fields[0].leading(values[0])
        devices = Devices(self.device)
        rows: dict[str, torch.Tensor] = {}
        for field, value in zip(fields, values, strict=True):
            rows.update(field.rows(value, leading, devices))
        ring = self._ring
        if not ring.columns:
            fields = [settled(field, lambda path: rows[path].dtype) for field in fields]
            ring = self._ring_for(fields)
        if leading:
            ring.add(rows)
        else:
            ring.add_one(rows)
        self._ring, self._fields = ring, fields

    def _ring_for(self, fields: list[Field]) -> Ring:
        return Ring(self.capacity, device=self.device, columns=[column for field in fields for column in field.columns])

    def _sample(self, batch_size: int, generator: torch.Generator | None) -> dict[str, Any]:
        """Rows drawn uniformly with replacement, by the names of the fields."""
        size = self._ring.size
        if not size:
            raise EmptyBufferError("a sample of an empty buffer; add transitions first")
        if batch_size > size:
            raise SelectionError(f"a sample of {batch_size} from a buffer of {size}; draw fewer, or add more first")
        indices = self._ring.sample_indices(batch_size, generator=generator)
        flat = self._ring.gather(indices, check=False)
        return {field.name: field.nested(flat) for field in self._fields} if self._nested else flat


class ReplayBuffer(RingBuffer):
    """Transitions for off-policy training, the newest ``capacity`` of them.

    Args:
        capacity: Transitions.
        obs_shape: Of one observation: a shape, or a (nested) dict of shapes for dict observations.
        action_shape: Of one action, ``()`` for a number.
        device: Where they are kept, and where samples are.
        obs_dtype: Of observations and critic observations, which are converted to it; a dict, if ``obs_shape`` is one.
        action_dtype: Actions are converted to it; by default it is the dtype of the first actions added.
        critic_obs_shape: Of one privileged observation, as ``obs_shape``; None if there are none.

    Raises:
        ValueError: A capacity or shape that is none.

    Examples:
        >>> import torch
        >>> buffer = ReplayBuffer(capacity=100, obs_shape=(4,), action_shape=(2,))
        >>> buffer.add(torch.ones(4), torch.tensor([0.5, 0.1]), 1.0, torch.ones(4), False)
        >>> buffer.add(torch.ones(9, 4), torch.rand(9, 2), torch.ones(9), torch.ones(9, 4), torch.zeros(9))
        >>> batch = buffer.sample(batch_size=8)
        >>> len(buffer), {name: tuple(value.shape) for name, value in batch.items()}
        (10, {'observations': (8, 4), 'actions': (8, 2), 'rewards': (8,), 'next_observations': (8, 4), 'dones': (8,)})
    """

    def __init__(
        self,
        capacity: int,
        obs_shape: Shapes,
        action_shape: int | tuple[int, ...] = (),
        device: torch.device | str = "cpu",
        obs_dtype: torch.dtype | Mapping[str, Any] = torch.float32,
        action_dtype: torch.dtype | None = None,
        critic_obs_shape: Shapes | None = None,
    ) -> None:
        fields = [
            Field.of("observations", obs_shape, obs_dtype),
            Field.of("actions", action_shape, action_dtype),
            Field.of("rewards", (), torch.float32),
            Field.of("next_observations", obs_shape, obs_dtype),
            Field.of("dones", (), torch.float32),  # so that 1 - dones works
        ]
        if critic_obs_shape is not None:
            critic_dtype = torch.float32 if isinstance(obs_dtype, Mapping) else obs_dtype
            names = ("critic_observations", "next_critic_observations")
            fields += [Field.of(name, critic_obs_shape, critic_dtype) for name in names]
        self._has_critic = critic_obs_shape is not None
        super().__init__(capacity, fields, device=device)

    def add(
        self,
        observations: Values,
        actions: Any,
        rewards: Any,
        next_observations: Values,
        dones: Any,
        critic_observations: Values = None,
        next_critic_observations: Values = None,
    ) -> None:
        """Add one transition or a batch of ``n``, over the oldest once the buffer is full. It is copied.

        Args:
            observations: ``(*obs_shape)`` or ``(n, *obs_shape)``, which tells one transition from a batch; a dict of them
                if ``obs_shape`` is one.
            actions: ``(*action_shape)`` or ``(n, *action_shape)``.
            rewards: A number, or ``(n,)``.
            next_observations: As ``observations``.
            dones: A number or bool, or ``(n,)``; kept as float32.
            critic_observations: As ``observations``, if there is a ``critic_obs_shape``.
            next_critic_observations: As ``critic_observations``.

        Raises:
            ValueError: Other shapes or keys, tensors on different devices, fractions for actions that began as whole
                numbers, or a batch above ``capacity``; the buffer is as it was.
        """
        values = [observations, actions, rewards, next_observations, dones]
        critic = [critic_observations, next_critic_observations]
        if self._has_critic:
            values += critic
        elif any(value is not None for value in critic):
            raise UnknownColumnError(
                "critic_observations for a buffer that was made without critic_obs_shape; pass it there"
            )
        self._add(values, self._fields)

    def sample(self, batch_size: int, *, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Transitions drawn uniformly, with replacement, on the buffer's device.

        Args:
            batch_size: How many, at most ``len()``.
            generator: Source of randomness, on the buffer's device.

        Returns:
            ``observations``, ``actions``, ``rewards``, ``next_observations``, ``dones``, and ``critic_observations`` and
            ``next_critic_observations`` if there are any: tensors ``(batch_size, ...)``, or dicts of them.

        Raises:
            EmptyBufferError: The buffer is empty; a ValueError and RuntimeError.
            SelectionError: ``batch_size`` is below 1 or above ``len()``; a ValueError.
        """
        return self._sample(batch_size, generator)
