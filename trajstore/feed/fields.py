"""What is known of whole trajectories, as columns of a batch.

Invariant: one value for each trajectory, read once; what a tensor cannot hold is an object or refused, never replaced.
"""

from __future__ import annotations

import numpy as np

from trajstore.deferred import torch
from trajstore.errors import SelectionError
from trajstore.read.selection import Selection
from trajstore.schema import Schema
from trajstore.stored import Array

_METADATA_DTYPES = {"bool": "bool", "int64": "int64", "float64": "float64", "timestamp": "int64"}


def field_dtype(name: str, schema: Schema) -> torch.dtype:
    """The dtype of a virtual column or metadata field, other than text."""
    if name in ("terminated", "truncated", "is_first", "is_last"):
        return torch.bool
    if name in ("step", "trajectory", "source"):
        return torch.int64
    return getattr(torch, _METADATA_DTYPES[schema.metadata[name]])  # type: ignore[no-any-return]


def trajectory_values(name: str, selection: Selection) -> Array:
    """The values of a virtual column or metadata field.

    Args:
        name: Of the column.
        selection: ``n`` trajectories.

    Returns:
        ``(n,)``, objects for text; empty for columns that do not depend on what is known of a trajectory.

    Raises:
        SelectionError: Some trajectories have no value, and the dtype none for that.
    """
    if name in ("terminated", "truncated"):
        return selection.terminated if name == "terminated" else selection.truncated
    kind = selection.schema.metadata.get(name)
    if kind is None:
        return np.empty(0, np.int64)
    column = selection.table.values(name, selection.rows)
    if kind in ("string", "bytes"):
        values = np.empty(len(column), object)
        values[:] = column.to_pylist()
        return values
    if kind != "float64" and column.null_count:
        raise SelectionError(
            f"metadata field {name!r} is not set for {column.null_count} of {len(column)} trajectories, and {kind} has no "
            f'value for that; select those that have it: view.filter("{name} == {name}")'
        )
    array: Array = column.to_numpy(zero_copy_only=False)
    return array.astype("datetime64[ns]").view(np.int64) if kind == "timestamp" else array
