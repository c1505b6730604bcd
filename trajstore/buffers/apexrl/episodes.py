"""The steps of environments side by side as episodes of a store.

Invariant: every step is in exactly one episode, and the episodes of an environment are in the order of time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
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
    # Environments first: the rows of an episode are then contiguous, and one transfer per column does.
    columns = {path: tensor.transpose(0, 1).flatten(0, 1).cpu() for path, tensor in steps.items()}
    ends = dones | cut
    ends[-1] = True
    last = np.flatnonzero(ends.T.cpu().numpy())  # (episodes,) their last steps, counted environment by environment
    terminated, truncations = (flags.T.cpu().numpy().reshape(-1)[last] for flags in (dones & ~cut, cut))
    return store.append_many(
        columns,
        np.diff(last, prepend=-1),
        terminated=terminated,
        truncated=truncations,
        metadata=[{"environment": environment, **metadata} for environment in (last // len(dones)).tolist()],
    )
