"""The steps of environments side by side as episodes of a store.

Invariant: every step is in exactly one episode, and the episodes of an environment are in the order of time; what only some
rollouts have is an optional column of the store, whichever of them came first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trajstore import Column, Store, TrajectoryRef
from trajstore.errors import ColumnShapeError, MissingColumnError, SchemaConflictError, SchemaError, SelectionError


def append_episodes(
    store: Store,
    steps: Mapping[str, torch.Tensor],
    dones: torch.Tensor,
    truncated: torch.Tensor | None,
    metadata: Mapping[str, Any],
    *,
    computed: Sequence[str] = (),
) -> list[TrajectoryRef]:
    """Append the episodes of every environment.

    Args:
        store: Open for appending.
        steps: Tensors ``(T, environments, ...)`` by column.
        dones: ``(T, environments)`` bool: the episode ended with the step.
        truncated: ``(T, environments)``: it was cut off there, whatever ``dones`` says; None for nowhere.
        metadata: Fields of every episode; ``environment``, its number, is added unless it is among them.
        computed: float32 numbers that steps may have or lack: the store gets them as optional columns either way.

    Returns:
        One reference per episode, by environment, then time.

    Raises:
        SelectionError: ``store`` is no store.
        ColumnShapeError: ``truncated`` has another shape than ``dones``.
        SchemaError: What ``Store.append`` refuses.
    """
    if not isinstance(store, Store):
        raise SelectionError(
            f"store is a {type(store).__name__} ({store!r}), expected a store: trajstore.open(path, mode='a')"
        )
    cut = torch.zeros_like(dones) if truncated is None else (torch.as_tensor(truncated) != 0).to(dones.device)
    if cut.shape != dones.shape:
        raise ColumnShapeError(
            f"truncated has shape {tuple(cut.shape)}, expected {tuple(dones.shape)}: steps, environments"
        )
    _declare(store, steps, computed)
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


def _declare(store: Store, steps: Mapping[str, torch.Tensor], computed: Sequence[str]) -> None:
    """Have the store take steps with and without the columns that are computed.

    Raises:
        MissingColumnError: It requires one that these steps lack.
        SchemaConflictError: It cannot have one.
    """
    schema = store.schema
    required = [path for path in computed if path in schema.required and path not in steps]
    if required:
        raise MissingColumnError(
            f"the store {store.url} requires {' and '.join(map(repr, required))} of every episode, and this rollout has no "
            "such values for all of its steps; compute them first (compute_returns_and_advantages), or append to another "
            "store"
        )
    columns = [Column(path=path, dtype="float32", presence="optional") for path in computed if path not in schema]
    if not columns:
        return
    if not len(schema):  # the first columns of a store are declared together
        columns = [
            Column(path=path, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape[2:]))
            for path, tensor in steps.items()
            if path not in computed
        ] + columns
    try:
        store.declare(columns)
    except SchemaError as error:
        raise SchemaConflictError(
            f"the store {store.url} cannot have the columns of this rollout ({error}); append to another store"
        ) from error
