"""Batches as tensordicts.

Invariant: every entry has the batch dimension, what is no tensor as well, so that indexing, stacking and sending a batch to
a device means the same for all of them. Tensors are not copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from trajstore.sample.window import WindowSpec
from trajstore.stored import Array


class TensorDictMaker:
    """Makes a ``tensordict.TensorDict`` of batch size ``[windows]`` of each batch.

    Strings, bytes and ragged columns become stacks of non-tensors (``NonTensorStack``) with the leading dimensions that a
    tensor would have: ``[windows]`` or ``[windows, w]``. One element of a ragged column is a tensor ``[n, *shape]``, or an
    array of ``n`` strings.

    Args:
        spec: What a window holds.

    Raises:
        ImportError: The package tensordict is missing; says what to install.
    """

    def __init__(self, spec: WindowSpec) -> None:
        try:
            from tensordict import NonTensorData, NonTensorStack, TensorDict
        except ImportError as error:
            raise ImportError(
                "output='tensordict' needs the package tensordict: pip install 'trajstore[tensordict]'"
            ) from error
        self._make: Callable[..., Any] = TensorDict
        self._single: Callable[..., Any] = NonTensorData
        self._stack: Callable[..., Any] = NonTensorStack
        self._widths = {o.name: None if o.squeezed else len(o.offsets) for o in spec.outputs}

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """One batch, as a loader makes it."""
        entries = self._entries(batch, "")
        leaf: Any = entries
        while isinstance(leaf, dict):
            leaf = next(iter(leaf.values()))
        return self._make(entries, batch_size=[leaf.shape[0]])

    def _entries(self, batch: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in batch.items():
            path = prefix + name
            if isinstance(value, torch.Tensor):
                found[name] = value
            elif isinstance(value, Mapping):
                found[name] = self._entries(value, f"{path}/")
            else:
                width = self._widths[path]
                items = _lists(value[0], value[1], width) if isinstance(value, tuple) else value
                found[name] = self._stacked(items)
        return found

    def _stacked(self, items: Array) -> Any:
        if items.ndim > 1:
            return self._stack(*[self._stacked(row) for row in items])
        return self._stack(*[self._single(item) for item in items])


def _lists(values: Any, offsets: torch.Tensor, width: int | None) -> Array:
    """Lists that lie end to end, as objects ``[windows]`` or ``[windows, width]``."""
    bounds = offsets.tolist()
    lists = np.empty(len(bounds) - 1, object)
    for number in range(len(lists)):
        lists[number] = values[bounds[number] : bounds[number + 1]]
    return lists if width is None else lists.reshape(-1, width)
