"""Stored bits: the physical form of a column's rows, casts that change no value, and the way back to what people use."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from trajstore.deferred import torch
from trajstore.schema import VARIABLE_DTYPES, Column, physical_dtype

Array = np.ndarray[Any, np.dtype[Any]]
# Stored bits of one column: an Array (rows, *shape) in the physical dtype, or a pa.Array of `rows` strings or lists.
# pyarrow has no types, so neither has this.
Stored: TypeAlias = Any


def exact_cast(source: Array, from_dtype: str, to_dtype: str) -> Array | None:
    """``source`` in the physical dtype of ``to_dtype``, or None if any value would change.

    Examples:
        >>> exact_cast(np.array([1, 2]), "int64", "float32")
        array([1., 2.], dtype=float32)
        >>> exact_cast(np.array([0.1]), "float64", "float32") is None
        True
    """
    logical = {from_dtype, to_dtype}
    if any(name.startswith(("datetime64", "timedelta64")) for name in logical):
        return None
    if from_dtype == "bool" and to_dtype != "bool":
        return None  # True is not the number one: people who mix them made a mistake
    if to_dtype == "bfloat16":
        wide = exact_cast(source, from_dtype, "float64")
        if wide is None:
            return None
        narrow = torch.from_numpy(wide).to(torch.bfloat16)
        unchanged = np.array_equal(wide, narrow.to(torch.float64).numpy(), equal_nan=True)
        return narrow.view(torch.uint16).numpy() if unchanged else None
    target = physical_dtype(to_dtype)
    if source.dtype.kind == "c" and target.kind != "c":
        return None  # NumPy would only warn, and drop the imaginary parts
    if target.kind == "c" and source.dtype.kind != "c":
        real = exact_cast(source, from_dtype, target.type(0).real.dtype.name)
        return None if real is None else real.astype(target)
    with np.errstate(all="ignore"):
        cast = source.astype(target)
        same = np.array_equal(cast.astype(source.dtype), source, equal_nan=source.dtype.kind in "fc")
        # 2**63 as float64 survives the way to int64 and back by saturation, 2**63 - 1 the way to float64 and
        # back, -2**63 that to an infinite float16: hold the ranges too.
        if same and source.dtype.kind in "fui" and target.kind in "ui":
            info = np.iinfo(target)
            same = bool(np.all(source >= info.min) and np.all(source <= info.max))
            if same and source.dtype.kind == "f":
                same = bool(np.all(source < float(info.max) + 1))
        elif same and source.dtype.kind in "ui" and target.kind == "f":
            wide = cast.astype(np.float64)
            same = bool(np.all(np.isfinite(wide) & (wide < float(np.iinfo(source.dtype).max) + 1)))
    return cast if same else None


def list_array(offsets: pa.Array, values: Array, dtype: str, shape: tuple[int, ...]) -> pa.Array:
    """A ragged column: ``values`` ``(n, *shape)`` in lists that begin and end at ``offsets``."""
    return pa.LargeListArray.from_arrays(offsets, element_array(values, dtype, shape))


def element_array(values: Array, dtype: str, shape: tuple[int, ...]) -> pa.Array:
    """List elements ``(n, *shape)`` as an Arrow array: fixed-size lists for shapes, pairs of floats for complex."""
    if dtype.startswith("complex"):
        half = values.dtype.type(0).real.dtype
        values, shape = np.ascontiguousarray(values).view(half), (*shape, 2)
    size = int(np.prod(shape, dtype=np.int64))
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, size) if shape else flat


def empty_rows(column: Column, count: int) -> Stored:
    """Rows that hold nothing: zeros ``(count, *shape)``, which take no memory, empty texts or empty lists."""
    if not column.is_variable:
        return np.broadcast_to(np.zeros((), column.physical_dtype), (count, *column.shape))
    if column.ragged:
        offsets = pa.array(np.zeros(count + 1, np.int64))
        if column.dtype in VARIABLE_DTYPES:
            return pa.LargeListArray.from_arrays(offsets, pa.array([], _text_type(column.dtype)))
        none = np.empty((0, *column.shape), column.physical_dtype)
        return list_array(offsets, none, column.dtype, column.shape)
    return pa.array(["" if column.dtype == "string" else b""] * count, _text_type(column.dtype))


def to_user(column: Column, stored: Stored) -> Any:
    """Stored rows as people use them.

    Returns:
        A NumPy array ``(rows, *shape)``; a ``torch.bfloat16`` tensor for bfloat16, which NumPy lacks; an object array of
        ``str`` or ``bytes``; an object array of such arrays for ragged columns.
    """
    if column.ragged:
        out = np.empty(len(stored), object)
        offsets = stored.offsets.to_numpy()
        values = ragged_values(column, stored)
        for row in range(len(stored)):
            out[row] = values[offsets[row] - offsets[0] : offsets[row + 1] - offsets[0]]
        return out
    if column.dtype in VARIABLE_DTYPES:
        return _object_array(stored)
    return from_physical(column.dtype, np.asarray(stored))


def ragged_values(column: Column, stored: pa.Array) -> Any:
    """All list elements of ``stored`` end to end, ``(n, *shape)``."""
    offsets = stored.offsets
    values = stored.values.slice(offsets[0].as_py(), offsets[-1].as_py() - offsets[0].as_py())
    if column.dtype in VARIABLE_DTYPES:
        return _object_array(values)
    count = len(values)
    flat = values.flatten() if isinstance(values, pa.FixedSizeListArray) else values
    array = flat.to_numpy(zero_copy_only=False)
    if column.dtype.startswith("complex"):
        array = array.view(column.dtype)
    return from_physical(column.dtype, np.array(array).reshape(count, *column.shape))  # a copy: Arrow's is read-only


def from_physical(dtype: str, array: Array) -> Any:
    """Stored bits as an array of the logical dtype; a torch tensor for bfloat16."""
    if dtype == "bfloat16":
        return torch.from_numpy(np.array(array)).view(torch.bfloat16)
    return array.view(dtype) if dtype.startswith(("datetime64", "timedelta64")) else array


def _text_type(dtype: str) -> pa.DataType:
    return pa.large_string() if dtype == "string" else pa.large_binary()


def _object_array(stored: pa.Array) -> Array:
    out = np.empty(len(stored), object)
    out[:] = stored.to_pylist()
    return out
