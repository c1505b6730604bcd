"""Trajectories and steps as pandas frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from trajstore.errors import SelectionError
from trajstore.stored import Array

# Of the table, what people ask for; where a trajectory lies is the store's business.
_SHOWN = ("uuid", "length", "terminated", "truncated", "reward_sum", "created_at")
_HIDDEN = ("id", "segment", "start", "ordinal", "episode", "first_step")
_NULLABLE = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype(), pa.string(): pd.StringDtype()}
_MAX_EXPANDED = 64


def trajectory_frame(table: pa.Table) -> pd.DataFrame:
    """One row per trajectory, indexed by id: uuid, length, flags, return, time, then metadata fields."""
    metadata = [name for name in table.column_names if name not in _SHOWN and name not in _HIDDEN]
    plain = table.select([*_SHOWN[1:], *metadata])
    frame: pd.DataFrame = plain.to_pandas(types_mapper=_NULLABLE.get)
    for name in ("terminated", "truncated"):
        frame[name] = frame[name].astype(bool)
    frame["length"] = frame["length"].astype(np.int64)
    frame.insert(0, "uuid", uuid_strings(table["uuid"]))
    frame.index = pd.Index(table["id"].to_numpy(), name="id")
    return frame


def uuid_strings(column: pa.ChunkedArray) -> Array:
    """16-byte identifiers as ``8-4-4-4-12`` text, ``(n,)`` object."""
    if not len(column):
        return np.empty(0, object)
    chunk = column.combine_chunks()
    raw = np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * 16 :][: len(chunk) * 16].reshape(-1, 16)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.full((len(raw), 36), ord("-"), np.uint8)
    places = [i for i in range(36) if i not in (8, 13, 18, 23)]
    text[:, places[0::2]] = digits[raw >> 4]
    text[:, places[1::2]] = digits[raw & 15]
    return text.view("S36").reshape(-1).astype("U36").astype(object)


def query(frame: pd.DataFrame, expression: str, variables: dict[str, Any]) -> Array:
    """Positions of the rows for which an expression holds.

    Raises:
        SelectionError: The expression cannot be understood, or names an unknown field.
    """
    numbered = frame.reset_index().assign(**{"__position__": np.arange(len(frame))})
    fields = [name for name in numbered.columns if name != "__position__"]
    try:
        kept = numbered.query(expression, engine="python", local_dict=variables)
        return kept["__position__"].to_numpy(np.int64)
    except pd.errors.UndefinedVariableError as error:
        raise SelectionError(f"filter {expression!r}: {error}; the fields are {', '.join(fields)}") from error
    except Exception as error:  # pandas raises what its parser and its operators raise
        raise SelectionError(
            f"filter {expression!r} is not an expression over {', '.join(fields)}: {error}; write it like "
            "\"length > 100 and task == 'pick'\""
        ) from error


def step_frame(ids: Sequence[int], lengths: Sequence[int], columns: Sequence[tuple[str, Any]]) -> pd.DataFrame:
    """One row per step, indexed by (trajectory, step).

    Args:
        ids: Of the trajectories.
        lengths: Steps taken of each.
        columns: Name and values ``(steps, *shape)``. Vectors become one column per entry,
            anything larger one array per cell.
    """
    index = pd.MultiIndex.from_arrays(
        [
            np.repeat(np.asarray(ids, np.int64), lengths),
            np.concatenate([np.arange(n) for n in lengths]) if len(lengths) else np.empty(0, np.int64),
        ],
        names=["trajectory", "step"],
    )
    data: dict[str, Any] = {}
    for name, values in columns:
        array = values if isinstance(values, np.ndarray) else values.float().numpy()  # bfloat16
        if array.ndim == 2 and array.shape[1] <= _MAX_EXPANDED:
            data.update({f"{name}[{i}]": array[:, i] for i in range(array.shape[1])})
        elif array.ndim > 1:
            cells = np.empty(len(array), object)
            cells[:] = list(array)
            data[name] = cells
        else:
            data[name] = array
    return pd.DataFrame(data, index=index)
