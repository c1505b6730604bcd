"""Trajectories and steps as pandas frames."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from trajstore.errors import SelectionError
from trajstore.stored import Array

# Of the table, what people ask for; where a trajectory lies is the store's business.
_SHOWN = ("uuid", "length", "terminated", "truncated", "reward_sum", "created_at")
HIDDEN_FIELDS = ("id", "segment", "start", "ordinal", "episode", "first_step")
_NULLABLE = {pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype(), pa.string(): pd.StringDtype()}
_MAX_EXPANDED = 64


def trajectory_frame(table: pa.Table, *, named_in: str | None = None) -> pd.DataFrame:
    """One row per trajectory, indexed by id: uuid, length, flags, return, time, then metadata fields.

    Args:
        table: The rows.
        named_in: Leave out fields whose name does not occur in this text.
    """
    fields = [name for name in _fields(table) if named_in is None or name in named_in]
    frame: pd.DataFrame = table.select([f for f in fields if f != "uuid"]).to_pandas(types_mapper=_NULLABLE.get)
    for name in {"terminated", "truncated"}.intersection(fields):
        frame[name] = frame[name].astype(bool)
    if "length" in fields:
        frame["length"] = frame["length"].astype(np.int64)
    if "uuid" in fields:
        frame.insert(0, "uuid", uuid_strings(table["uuid"]))
    frame.index = pd.Index(table["id"].to_numpy(), name="id")
    return frame


def _fields(table: pa.Table) -> list[str]:
    return [*_SHOWN, *(name for name in table.column_names if name not in _SHOWN and name not in HIDDEN_FIELDS)]


def uuid_strings(column: pa.ChunkedArray) -> Array:
    """16-byte identifiers as ``8-4-4-4-12`` text, ``(n,)`` object."""
    if not len(column):
        return np.empty(0, object)
    return uuid_text(column).view("S36").reshape(-1).astype("U36").astype(object)


def uuid_text(column: pa.ChunkedArray) -> Array:
    """16-byte identifiers as ``8-4-4-4-12`` text, ``(n, 36)`` uint8, ASCII."""
    if not len(column):
        return np.empty((0, 36), np.uint8)
    chunk = column.combine_chunks()
    raw = np.frombuffer(chunk.buffers()[1], np.uint8)[chunk.offset * 16 :][: len(chunk) * 16].reshape(-1, 16)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.full((len(raw), 36), ord("-"), np.uint8)
    places = [i for i in range(36) if i not in (8, 13, 18, 23)]
    text[:, places[0::2]] = digits[raw >> 4]
    text[:, places[1::2]] = digits[raw & 15]
    return text


def query(table: pa.Table, expression: str, variables: dict[str, Any]) -> Array:
    """Positions of the rows for which an expression over their fields holds. Times without a zone are UTC.

    Raises:
        SelectionError: The expression cannot be understood, or names an unknown field.
    """
    fields = ["id", *_fields(table)]
    frame = trajectory_frame(table, named_in=str(expression))
    try:
        found = _evaluated(frame.reset_index(), expression, variables)
    except pd.errors.UndefinedVariableError as error:
        name = re.search(r"name '(true|false|none|null)'", str(error))
        how = " (write True, False)" if name else ""
        raise SelectionError(
            f"filter {expression!r}: {error}{how}; the fields are {', '.join(fields)}, and a text stands in quotes"
        ) from error
    except Exception as error:  # pandas raises what its parser and its operators raise
        hint = "; write and, or, not for &&, || and !" if re.search(r"&&|\|\||!(?!=)", str(expression)) else ""
        raise SelectionError(
            f"filter {expression!r} is not an expression over {', '.join(fields)}: {error}{hint}; write it like "
            "\"length > 100 and task == 'pick'\" or \"created_at > '2026-01-31'\""
        ) from error
    holds = _truths(found, len(frame))
    if holds is None:  # pandas would take numbers for labels of rows
        raise SelectionError(
            f"filter {expression!r} gives {_described(found)}, expected true or false for each trajectory; compare with "
            'something, with two "=": "success == 1"'
        )
    return np.flatnonzero(holds)


def _evaluated(frame: pd.DataFrame, expression: str, variables: dict[str, Any]) -> Any:
    try:
        return frame.eval(expression, engine="python", local_dict=variables)
    except TypeError:  # times with a zone are not compared with times without one
        times = frame.select_dtypes("datetimetz").columns
        plain = frame.assign(**{name: frame[name].dt.tz_convert("UTC").dt.tz_localize(None) for name in times})
        return plain.eval(expression, engine="python", local_dict=variables)


def _truths(found: Any, rows: int) -> Array | None:
    """``(rows,)`` bool, missing values as false; None for anything but truth values."""
    if not isinstance(found, pd.Series) or len(found) != rows:
        return None
    if found.dtype == object and all(value is None or isinstance(value, bool | np.bool_) for value in found):
        return np.array([bool(value) for value in found], bool)
    if not pd.api.types.is_bool_dtype(found.dtype):
        return None
    return found.fillna(False).to_numpy(bool)


def _described(found: Any) -> str:
    return f"values of {found.dtype}" if isinstance(found, pd.Series) else f"one {type(found).__name__}"


def step_frame(trajectories: Array, steps: Array, columns: Sequence[tuple[str, Any]]) -> pd.DataFrame:
    """One row per step, indexed by (trajectory, step).

    Args:
        trajectories: ``(rows,)`` int64: id of each step's trajectory.
        steps: ``(rows,)`` int64: number of each step in it.
        columns: Name and values ``(rows, *shape)``. Vectors become one column per entry,
            anything larger one array per cell.
    """
    index = pd.MultiIndex.from_arrays([trajectories, steps], names=["trajectory", "step"])
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
