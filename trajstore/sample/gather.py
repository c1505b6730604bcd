"""The plain gather: windows copied one by one, through the reader, uncached.

Invariant: it is the obvious loop. Whatever is faster must give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trajstore.errors import SelectionError, UnknownColumnError
from trajstore.schema import VARIABLE_DTYPES, Column
from trajstore.stored import Array, ragged_values, to_user

if TYPE_CHECKING:
    from trajstore.view import Trajectory, View

VIRTUAL_COLUMNS = ("terminated", "truncated", "is_first", "is_last", "step", "trajectory")


def resolve_columns(view: View, names: Sequence[str] | None) -> tuple[list[Column], list[str]]:
    """The stored columns and the virtual ones that a batch holds.

    Args:
        view: The trajectories.
        names: As the user gave them, or None for all fixed-shape columns that every trajectory has.

    Raises:
        SelectionError: A named column is lacking from some trajectories.
        UnknownColumnError: A name that is neither a column nor virtual nor a metadata field.
    """
    if names is None:
        return [c for c in view.common_columns if not c.is_variable], []
    stored: list[Column] = []
    virtual: list[str] = []
    common = {c.path for c in view.common_columns}
    for name in names:
        if name in VIRTUAL_COLUMNS or name in view.schema.metadata:
            virtual.append(name)
            continue
        try:
            chosen = view.schema.select(name)
        except UnknownColumnError as error:
            raise UnknownColumnError(f"{error}; virtual columns are {', '.join(VIRTUAL_COLUMNS)}") from None
        for column in chosen:
            if column.path not in common:
                lacking = sum(column.path not in t.columns for t in view)
                raise SelectionError(
                    f"column {column.path!r} is lacking from {lacking} of {len(view)} trajectories; select those that have "
                    "it, or leave it out"
                )
            stored.append(column)
    return stored, virtual


def gather(
    view: View,
    columns: Sequence[Column],
    virtual: Sequence[str],
    trajectories: Array,
    steps: Array,
    window: int,
) -> dict[str, Any]:
    """A batch of windows.

    Args:
        view: The trajectories.
        columns: Stored columns.
        virtual: Names of virtual columns and metadata fields.
        trajectories: ``(batch,)`` int64, positions in the view.
        steps: ``(batch,)`` int64, first steps of the windows.
        window: Steps per window.

    Returns:
        Path -> tensor ``[batch, window, *shape]``; an object array ``[batch, window]`` for strings and bytes; a pair
        ``(values [n, *shape], offsets [batch * window + 1])`` for ragged columns. Datetimes are int64 in their unit.
    """
    anchors = list(zip(trajectories.tolist(), steps.tolist(), strict=True))
    batch: dict[str, Any] = {}
    for column in columns:
        parts = [view.read_window(position, column, step, step + window) for position, step in anchors]
        batch[column.path] = _joined(column, parts, window)
    for name in virtual:
        values = [_virtual(name, view[position], step, window) for position, step in anchors]
        array = np.stack(values)
        batch[name] = torch.from_numpy(array) if array.dtype != object else array
    return batch


def _joined(column: Column, parts: list[Any], window: int) -> Any:
    if column.ragged:
        values = [ragged_values(column, part) for part in parts]
        sizes = np.concatenate([np.diff(part.offsets.to_numpy()) for part in parts])
        offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
        if column.dtype in VARIABLE_DTYPES:
            return np.concatenate(values), offsets
        return torch.cat([_tensor(column, v) for v in values]), offsets
    if column.is_variable:
        return np.stack([to_user(column, part) for part in parts])
    stacked = np.concatenate(parts).reshape(len(parts), window, *column.shape)
    return _tensor(column, stacked)


def _tensor(column: Column, array: Any) -> torch.Tensor:
    tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    if column.dtype == "bfloat16" and tensor.dtype == torch.uint16:
        return tensor.view(torch.bfloat16)
    return tensor


def _virtual(name: str, trajectory: Trajectory, start: int, window: int) -> Any:
    steps = np.arange(start, start + window)
    last = steps == trajectory.length - 1
    if name == "step":
        return steps
    if name == "is_first":
        return steps == 0
    if name == "is_last":
        return last
    if name == "terminated":
        return last & trajectory.terminated
    if name == "truncated":
        return last & trajectory.truncated
    value = trajectory.id if name == "trajectory" else trajectory._fields[name]
    filled = np.full(window, value) if isinstance(value, bool | int | float) else np.empty(window, object)
    if filled.dtype == object:
        filled[:] = [value] * window
    return filled
