"""``DistillationBuffer``: observations and what an expert did there, the newest ``capacity`` of them.

Invariant: as ``replay``; the shape of actions is also open until the first ones are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from trajstore.buffers.apexrl.fields import Field, Shapes, Values, tensor_of
from trajstore.buffers.apexrl.replay import RingBuffer


class DistillationBuffer(RingBuffer):
    """Observations and what an expert did there, the newest ``capacity`` of them.

    Args:
        capacity: Pairs.
        obs_shape: Of one observation: a shape, or a (nested) dict of shapes for dict observations.
        device: Where they are kept, and where samples are.
        obs_dtype: Observations are converted to it; a dict, if ``obs_shape`` is one.
        action_shape: Of one action; by default that of the first one added.
        action_dtype: Actions are converted to it; by default it is the dtype of the first ones added.

    Raises:
        ValueError: A capacity or shape that is none.

    Examples:
        >>> import torch
        >>> buffer = DistillationBuffer(capacity=100, obs_shape=(48,), device="cpu")
        >>> buffer.add(torch.rand(10, 48), torch.rand(10, 12))
        >>> obs, expert_actions = buffer.sample(batch_size=4)
        >>> obs.shape, expert_actions.shape
        (torch.Size([4, 48]), torch.Size([4, 12]))
    """

    def __init__(
        self,
        capacity: int,
        obs_shape: Shapes,
        device: torch.device | str = "cpu",
        *,
        obs_dtype: torch.dtype | Mapping[str, Any] = torch.float32,
        action_shape: int | tuple[int, ...] | None = None,
        action_dtype: torch.dtype | None = None,
    ) -> None:
        self._action_dtype = action_dtype
        self._shape_is_open = action_shape is None
        fields = [
            Field.of("observations", obs_shape, obs_dtype),
            # Without a dtype there are no columns yet, so the shape can still be settled.
            Field.of(
                "actions", () if action_shape is None else action_shape, None if action_shape is None else action_dtype
            ),
        ]
        super().__init__(capacity, fields, device=device)

    def add(self, obs: Values, action: Any) -> None:
        """Add one pair or a batch of ``n``, over the oldest once the buffer is full. It is copied.

        Args:
            obs: ``(*obs_shape)`` or ``(n, *obs_shape)``, which tells one pair from a batch; a dict of them if ``obs_shape``
                is one.
            action: ``(*action_shape)`` or ``(n, *action_shape)``.

        Raises:
            ValueError: Other shapes or keys, tensors on different devices, or a batch above ``capacity``; the buffer is as
                it was.
        """
        leading = self._fields[0].leading(obs)
        self._add([obs, action], self._fields_with(lambda: tensor_of("actions", action).shape[len(leading) :]))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the pairs of another buffer, from its ``state_dict``.

        Raises:
            ValueError: Another capacity, other shapes or other dtypes; the buffer is as it was.
        """
        actions = (state.get("columns") or {}).get("actions")
        self._load(state, self._fields if actions is None else self._fields_with(lambda: actions.shape[1:]))

    def _fields_with(self, action_shape: Callable[[], tuple[int, ...]]) -> list[Field]:
        """The fields, with this shape of actions if theirs is still open."""
        if not self._shape_is_open or self._ring.columns:
            return self._fields
        return [self._fields[0], Field.of("actions", action_shape(), self._action_dtype)]

    def sample(self, batch_size: int, *, generator: torch.Generator | None = None) -> tuple[Values, torch.Tensor]:
        """Pairs drawn uniformly, with replacement, on the buffer's device.

        Args:
            batch_size: How many, at most ``len()``.
            generator: Source of randomness, on the buffer's device.

        Returns:
            Observations ``(batch_size, *obs_shape)``, a dict of them for dict observations, and actions
            ``(batch_size, *action_shape)``.

        Raises:
            EmptyBufferError: The buffer is empty; a ValueError and RuntimeError.
            SelectionError: ``batch_size`` is below 1 or above ``len()``; a ValueError.
        """
        batch = self._sample(batch_size, generator)
        return batch["observations"], batch["actions"]
