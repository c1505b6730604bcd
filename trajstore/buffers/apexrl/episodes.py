"""The steps of environments side by side as episodes of a store.

Invariant: every step is in exactly one episode, and the episodes of an environment are in the order of time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trajstore import Store, TrajectoryRef
from trajstore.errors import ColumnShapeError


def append_episodes(
    store: Store,
    steps: Mapping[str, torch.Tensor],
    dones: torch.Tensor,
    truncated: torch.Tensor | None,
    metadata: Mapping[str, Any],
) -> list[TrajectoryRef]:
    """Append the episodes of every environment.

    Args:
        store: Open for appending.
        steps: Tensors ``(T, environments, ...)`` by column.
        dones: ``(T, environments)`` bool: the episode ended with the step.
        truncated: ``(T, environments)``: it was cut off there, whatever ``dones`` says; None for nowhere.
        metadata: Fields of every episode; ``environment``, its number, is added unless it is among them.

    Returns:
        One reference per episode, by environment, then time.

    Raises:
        ColumnShapeError: ``truncated`` has another shape than ``dones``.
        SchemaError: What ``Store.append`` refuses.
    """
    cut = torch.zeros_like(dones) if truncated is None else (torch.as_tensor(truncated) != 0).to(dones.device)
    if cut.shape != dones.shape:
        raise ColumnShapeError(
            f"truncated has shape {tuple(cut.shape)}, expected {tuple(dones.shape)}: steps, environments"
        )
    # One transfer per column, and environments first: an episode's rows are then contiguous.
    columns = {path: tensor.transpose(0, 1).contiguous().cpu() for path, tensor in steps.items()}
    length = len(dones)
    refs = []
    pairs = zip((dones | cut).T.tolist(), cut.T.tolist(), strict=True)
    for environment, (ended, was_cut) in enumerate(pairs):
        fields = {"environment": environment, **metadata}
        start = 0
        for last in range(length):
            if not ended[last] and last < length - 1:
                continue
            refs.append(
                store.append(
                    {path: rows[environment, start : last + 1] for path, rows in columns.items()},
                    terminated=ended[last] and not was_cut[last],
                    truncated=was_cut[last],
                    metadata=fields,
                )
            )
            start = last + 1
    return refs
