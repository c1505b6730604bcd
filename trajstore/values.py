"""What people hand in, turned into the bits that are stored.

Invariant: no value changes on the way. Arrays and tensors must have their column's dtype exactly; Python numbers and
lists ("weak" values, which have no dtype of their own) take the column's dtype only where every value survives.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from trajstore.deferred import is_tensor, torch
from trajstore.errors import (
    ColumnShapeError,
    ColumnTypeError,
    LengthError,
    MissingColumnError,
    SchemaError,
    UnknownColumnError,
)
from trajstore.names import check_no_flags, flatten
from trajstore.schema import VARIABLE_DTYPES, Column, Schema, canonical_dtype
from trajstore.stored import Array, Stored, exact_cast, list_array, ragged_values


@dataclass(frozen=True)
class Rows:
    """The rows of one column of one trajectory, not yet held against a schema."""

    data: Stored
    dtype: str
    shape: tuple[int, ...]
    ragged: bool = False
    weak: bool = False  # from Python numbers: the dtype is only a proposal

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class CheckedTrajectory:
    """Columns of one trajectory that agree with a schema: ready to be stored."""

    columns: Mapping[str, Stored]
    length: int  # steps

    @property
    def nbytes(self) -> int:
        """Bytes of all columns in memory."""
        return sum(data.nbytes for data in self.columns.values())


def check_trajectory(tree: Mapping[str, Any], schema: Schema) -> tuple[CheckedTrajectory, Schema]:
    """Hold one trajectory against a schema, or infer the schema if it has no columns yet.

    Args:
        tree: Nested mapping of columns; every leaf has time as its first dimension: ``[T, ...]``, or ``[T + 1, ...]`` for
            columns with ``extra=1``.
        schema: The store's schema.

    Returns:
        The trajectory, and the schema with inferred columns if it had none.

    Raises:
        SchemaError: One of its subclasses, naming the column; nothing has been stored.
    """
    flat = _flat(tree)
    if len(schema):
        columns = _checked(flat, schema)
    else:
        check_no_flags(flat)
        rows = {path: rows_of(path, value) for path, value in flat.items()}
        schema = replace(schema, columns=infer_columns(rows))
        columns = {path: r.data for path, r in rows.items()}
    return CheckedTrajectory(columns, _common_length(columns, schema)), schema


def check_trajectories(
    tree: Mapping[str, Any], lengths: Sequence[int], schema: Schema
) -> tuple[Mapping[str, Stored], Schema]:
    """As ``check_trajectory``, for several trajectories end to end.

    Args:
        tree: Nested mapping of columns; every leaf has the rows of all trajectories: one per step, and for columns with
            ``extra=1`` one more per trajectory.
        lengths: Steps of each.
        schema: The store's schema.

    Returns:
        The columns, and the schema with inferred columns if it had none.
    """
    flat = _flat(tree)
    steps, states = sum(lengths), sum(lengths) + len(lengths)
    if not lengths or min(lengths) < 1:
        raise LengthError(f"lengths {list(lengths)[:8]}, expected one number from 1 on for each trajectory")
    if not len(schema):
        check_no_flags(flat)
        rows = {path: rows_of(path, value) for path, value in flat.items()}
        extra = {path for path, r in rows.items() if len(r) == states}
        inferred = [
            Column(path=path, dtype=r.dtype, shape=r.shape, ragged=r.ragged, extra=1 if path in extra else 0)
            for path, r in rows.items()
        ]
        schema = replace(schema, columns=tuple(inferred))
        flat = dict(rows)
    columns = _checked(flat, schema)
    for path, data in columns.items():
        expected = states if schema[path].extra else steps
        if len(data) != expected:
            raise LengthError(
                f"column {path!r} has {len(data)} rows, expected {expected}: {len(lengths)} trajectories of {steps} "
                f"steps in "
                "all" + (", and the final observation of each" if schema[path].extra else "")
            )
    return columns, schema


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(tree)
    if not flat:
        raise LengthError("a trajectory needs at least one column; the mapping is empty")
    return flat


def _checked(flat: Mapping[str, Any], schema: Schema) -> dict[str, Stored]:
    """Columns as the schema stores them, none missing."""
    schema.check_appended(flat)
    columns = {}
    for path, value in flat.items():
        column = schema.get(path)
        if column is None:
            raise UnknownColumnError(
                f"column {path!r} is not in the schema ({', '.join(repr(c.path) for c in schema)}); leave it out, or "
                "open the store with a schema that adds it as an optional column"
            )
        # The ordinary case, before anything that costs microseconds: an array that already is what is stored.
        plain = type(value) is np.ndarray and value.dtype is column.array_dtype
        as_stored = plain and value.ndim and value.shape[1:] == column.shape
        columns[path] = value if as_stored else check_rows(column, rows_of(path, value, column))
    missing = [path for path in schema.required if path not in flat]
    if missing:
        raise MissingColumnError(
            f"column{'s' * (len(missing) > 1)} {', '.join(map(repr, sorted(missing)))} missing: the schema requires "
            f"{', '.join(map(repr, sorted(schema.required)))}"
        )
    return columns


def infer_columns(rows: Mapping[str, Rows]) -> tuple[Column, ...]:
    """Columns from a first trajectory: the ones with one row more than the shortest are ``extra=1``.

    Raises:
        LengthError: More than two lengths, or two that differ by more than one.
    """
    lengths = {path: len(r) for path, r in rows.items()}
    shortest, longest = min(lengths.values()), max(lengths.values())
    if longest == 0:
        raise LengthError(f"column {next(iter(lengths))!r} has zero steps; a trajectory has at least one")
    if longest - shortest > 1 or shortest == 0:
        raise LengthError(
            f"lengths differ: {', '.join(f'{p!r} has {n}' for p, n in lengths.items())}; all columns need the same number "
            "of rows, or one more for states with a final observation"
        )
    return tuple(
        Column(
            path=path,
            dtype=r.dtype,
            shape=r.shape,
            ragged=r.ragged,
            extra=1 if lengths[path] > shortest else 0,
        )
        for path, r in rows.items()
    )


def _common_length(columns: Mapping[str, Stored], schema: Schema) -> int:
    lengths = {path: len(data) - schema[path].extra for path, data in columns.items()}
    length = next(iter(lengths.values()))
    for path, n in lengths.items():
        if n < 1:
            raise LengthError(
                f"column {path!r} has {len(columns[path])} rows, which is zero steps; a trajectory has at least one"
            )
        if n != length:
            raise LengthError(
                "lengths differ: "
                + ", ".join(
                    f"{p!r} has {len(d)} rows" + (" (one is the final observation's)" if schema[p].extra else "")
                    for p, d in columns.items()
                )
                + "; all columns of a trajectory need the same number of steps"
            )
    return length


def check_rows(column: Column, rows: Rows) -> Stored:
    """The rows as this column stores them.

    Raises:
        SchemaError: Wrong dtype or shape, naming the column.
    """
    if rows.ragged != column.ragged:
        hint = "" if column.ragged else "; declare it with ragged=True to store lists of their own length each step"
        raise ColumnShapeError(f"column {column.path!r} is {column.describe()}, found {_describe(rows)}{hint}")
    if rows.dtype != column.dtype:
        rows = _cast_weak(column, rows)
    if rows.shape != column.shape:
        raise ColumnShapeError(
            f"column {column.path!r} takes {column.describe()} per step, found shape {list(rows.shape)} per step"
        )
    return rows.data


def _describe(rows: Rows) -> str:
    return Column(path="x", dtype=rows.dtype, shape=rows.shape, ragged=rows.ragged).describe()


def _cast_weak(column: Column, rows: Rows) -> Rows:
    wrong = f"column {column.path!r} is {column.dtype}, found {rows.dtype}"
    numbers = column.dtype not in VARIABLE_DTYPES and rows.dtype not in VARIABLE_DTYPES
    if not rows.weak or not numbers:
        raise ColumnTypeError(f"{wrong}; convert it to {column.dtype} before appending")
    source = rows.data
    if column.ragged:
        source = ragged_values(replace(column, dtype=rows.dtype, shape=rows.shape), rows.data)
    cast = exact_cast(source, rows.dtype, column.dtype)
    if cast is None:
        raise ColumnTypeError(f"{wrong} with values that {column.dtype} cannot hold exactly; convert them explicitly")
    if not column.ragged:
        return replace(rows, data=cast, dtype=column.dtype)
    return replace(rows, data=list_array(rows.data.offsets, cast, column.dtype, column.shape), dtype=column.dtype)


def rows_of(path: str, value: Any, column: Column | None = None) -> Rows:
    """The rows of one column from whatever a user holds.

    Args:
        path: The column's name, for messages.
        value: NumPy array, torch tensor (any device), list, or anything with ``__array__``; time is the first dimension.
            ``Rows`` pass through.
        column: The column, if known: tells ragged lists from tensors.

    Raises:
        ColumnTypeError: A dtype that cannot be stored.
        ColumnShapeError: No time dimension, or lists of differing lengths for a tensor column.
    """
    if isinstance(value, Rows):
        rows = value
    elif isinstance(value, np.ndarray) and value.dtype.kind not in "OUSVMm" and type(value) is np.ndarray:
        rows = _rows_of_array(path, value, weak=False)
    elif is_tensor(value):
        rows = _rows_of_tensor(path, value)
    elif isinstance(value, list | tuple):
        rows = _rows_of_list(path, value, column)
    elif isinstance(value, np.ma.MaskedArray):
        raise ColumnTypeError(f"column {path!r} is a masked array, whose mask would be lost; fill it first")
    elif hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype == object and array.ndim >= 1:
            rows = _rows_of_objects(path, array, column)
        else:
            rows = _rows_of_array(path, array, weak=False)
    else:
        raise _no_time_axis(path, value)
    if column is not None and column.ragged and not rows.ragged and rows.shape and rows.shape[1:] == column.shape:
        rows = _ragged_of_tensor(rows)  # lists of equal length look like a tensor
    return rows


def _no_time_axis(path: str, value: Any) -> SchemaError:
    if isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        return ColumnShapeError(
            f"column {path!r} is a single {type(value).__name__}; expected one value per step, time first"
        )
    return ColumnTypeError(
        f"column {path!r} is a {type(value).__name__}; expected a NumPy array, a torch tensor or a list, time first"
    )


def _rows_of_array(path: str, array: Array, *, weak: bool) -> Rows:
    if array.ndim == 0:
        raise _no_time_axis(path, array[()])
    dtype = canonical_dtype(array.dtype, path=path)
    shape = array.shape[1:]
    if dtype in VARIABLE_DTYPES:
        if shape:
            raise ColumnShapeError(
                f"column {path!r} holds {array.shape[1:]} strings per step; use lists and ragged=True, or a column each"
            )
        return Rows(_string_array(path, array.tolist(), dtype), dtype, ())
    if 0 in shape:
        raise ColumnShapeError(f"column {path!r} has shape {list(shape)} per step, which holds no values; leave it out")
    if dtype == "bfloat16":  # of ml_dtypes, as JAX hands it out
        array = array.view(np.uint16)
    elif array.dtype.kind in "mM":
        array = array.astype(array.dtype.newbyteorder("="), copy=False).view(np.int64)
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return Rows(array, dtype, shape, weak=weak)


def _rows_of_tensor(path: str, tensor: torch.Tensor) -> Rows:
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ColumnTypeError(f"column {path!r} is a {tensor.layout} tensor; expected a dense one (call .to_dense())")
    if tensor.dim() == 0:
        raise _no_time_axis(path, tensor.item())
    dtype = canonical_dtype(tensor.dtype, path=path)
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if dtype == "bfloat16":
        tensor = tensor.contiguous().view(torch.uint16)
    if 0 in tensor.shape[1:]:
        raise ColumnShapeError(
            f"column {path!r} has shape {list(tensor.shape[1:])} per step, which holds no values; leave it out"
        )
    return Rows(tensor.numpy(), dtype, tuple(tensor.shape[1:]))


def _rows_of_objects(path: str, array: Array, column: Column | None) -> Rows:
    items = list(array)
    if array.ndim == 1 and items:
        if all(isinstance(item, str) for item in items):
            return Rows(_string_array(path, items, "string"), "string", ())
        if all(isinstance(item, bytes) for item in items):
            return Rows(_string_array(path, items, "bytes"), "bytes", ())
        if all(isinstance(item, list | np.ndarray) or is_tensor(item) for item in items):
            return _ragged(path, items, column)
    canonical_dtype(np.dtype(object), path=path)
    raise AssertionError("unreachable")  # canonical_dtype refuses object


def _rows_of_list(path: str, items: Sequence[Any], column: Column | None) -> Rows:
    if not items:
        raise LengthError(f"column {path!r} has zero steps; a trajectory has at least one")
    if column is not None and column.ragged:
        return _ragged(path, items, column)
    first = items[0]
    if is_tensor(first):
        if not all(is_tensor(i) and i.dtype == first.dtype for i in items):
            raise ColumnTypeError(f"column {path!r} is a list of tensors of several types; give them one dtype")
        if any(i.shape != first.shape for i in items):
            return _ragged(path, items, column)
        return _rows_of_tensor(path, torch.stack([i.detach() for i in items]))
    if isinstance(first, np.ndarray | np.generic):
        if not all(isinstance(i, np.ndarray | np.generic) and i.dtype == first.dtype for i in items):
            raise ColumnTypeError(f"column {path!r} is a list of arrays of several types; give them one dtype")
        if any(i.shape != first.shape for i in items):
            return _ragged(path, items, column)
        stacked = np.stack(items)
        return (
            _rows_of_objects(path, stacked, column)
            if stacked.dtype == object
            else _rows_of_array(path, stacked, weak=False)
        )
    if isinstance(first, str | bytes):
        dtype = "string" if isinstance(first, str) else "bytes"
        return Rows(_string_array(path, items, dtype), dtype, ())
    if isinstance(first, dt.datetime | dt.timedelta):
        return _rows_of_array(path, _datetimes(path, items), weak=False)
    if isinstance(first, list | tuple) and _is_ragged(items):
        return _ragged(path, items, column)
    return _rows_of_array(path, _numbers(path, items), weak=True)


def _numbers(path: str, items: Any) -> Array:
    """Nested lists of Python numbers as one array; int64, float64, complex128 or bool."""
    try:
        array = np.asarray(items)
    except (ValueError, OverflowError, TypeError) as error:
        raise ColumnTypeError(f"column {path!r}: the list is not a regular array of numbers: {error}") from None
    if array.dtype.kind not in "biufcUS":
        raise ColumnTypeError(
            f"column {path!r}: the list becomes an object array (found a {type(items[0]).__name__}); pass numbers, "
            "strings, bytes or arrays"
        )
    if array.dtype.kind in "US":
        raise ColumnTypeError(f"column {path!r} mixes strings with something else, or nests them")
    if array.dtype.kind != "b" and _holds_bool(items):
        raise ColumnTypeError(f"column {path!r} mixes booleans with numbers")
    return array


def _holds_bool(items: Any) -> bool:
    return any(_holds_bool(i) if isinstance(i, list | tuple) else isinstance(i, bool) for i in items)


def _datetimes(path: str, items: Sequence[Any]) -> Array:
    kind = "datetime64[us]" if isinstance(items[0], dt.datetime) else "timedelta64[us]"
    if any(type(i) is not type(items[0]) for i in items):
        raise ColumnTypeError(f"column {path!r} mixes {type(items[0]).__name__} with other types")
    if any(isinstance(i, dt.datetime) and i.tzinfo is not None for i in items):
        raise ColumnTypeError(f"column {path!r} has time zones; convert to UTC and drop the zone first")
    return np.array(items, dtype=kind)


def _string_array(path: str, items: Sequence[Any], dtype: str) -> pa.Array:
    wanted = str if dtype == "string" else bytes
    for item in items:
        if not isinstance(item, wanted):
            raise ColumnTypeError(f"column {path!r} is {dtype}, found a {type(item).__name__} among its values")
    try:
        return pa.array(items, pa.large_string() if dtype == "string" else pa.large_binary())
    except UnicodeEncodeError as error:
        raise ColumnTypeError(f"column {path!r} holds text that UTF-8 cannot: {error}") from None


def _is_ragged(items: Sequence[Any]) -> bool:
    if all(len(i) == len(items[0]) for i in items if isinstance(i, list | tuple)):
        inner = items[0]
        return not inner or isinstance(inner[0], str | bytes)
    return True


def _ragged_of_tensor(rows: Rows) -> Rows:
    count, size = len(rows.data), rows.shape[0]
    values = np.ascontiguousarray(rows.data).reshape(count * size, *rows.shape[1:])
    offsets = np.arange(count + 1, dtype=np.int64) * size
    data = list_array(pa.array(offsets), values, rows.dtype, rows.shape[1:])
    return replace(rows, data=data, shape=rows.shape[1:], ragged=True)


def _ragged(path: str, items: Sequence[Any], column: Column | None) -> Rows:
    """Lists of their own length each step: ``items[t]`` is ``[n_t, *shape]``."""
    texts = _text_dtype(items, column)
    if texts is not None:
        return _ragged_strings(path, items, texts)
    parts: list[Rows] = []
    sizes = np.zeros(len(items), np.int64)
    for step, item in enumerate(items):
        if isinstance(item, list | tuple) and not item:
            continue
        if isinstance(item, np.ndarray) and item.dtype == object:
            canonical_dtype(item.dtype, path=path)
        part = rows_of(path, item)
        if part.ragged or part.dtype in VARIABLE_DTYPES:
            raise ColumnShapeError(f"column {path!r}: step {step} holds lists of lists; only one dimension may vary")
        sizes[step] = len(part)
        parts.append(part)
    if not parts:
        if column is None:
            raise SchemaError(f"column {path!r}: every list is empty, so its dtype is unknown; declare it in a schema")
        empty = np.empty((0, *column.shape), column.physical_dtype)
        return Rows(
            list_array(pa.array([0] * (len(items) + 1), pa.int64()), empty, column.dtype, column.shape),
            column.dtype,
            column.shape,
            ragged=True,
        )
    firm = [p for p in parts if not p.weak and len(p)] or [p for p in parts if not p.weak]
    # Weak steps beside each other: ints and floats meet in float64, as in one list of numbers.
    widest = firm[0] if firm else max(parts, key=lambda p: np.dtype(p.dtype).num)
    arrays = []
    for part in parts:
        if len(part) and part.shape != widest.shape:
            raise ColumnShapeError(
                f"column {path!r}: list elements of shapes {list(widest.shape)} and {list(part.shape)}; only their number "
                "may vary from step to step"
            )
        if part.dtype != widest.dtype:
            cast = exact_cast(part.data, part.dtype, widest.dtype) if part.weak else None
            if cast is None:
                raise ColumnTypeError(
                    f"column {path!r}: lists of {widest.dtype} and of {part.dtype}; give them one dtype"
                )
            part = replace(part, data=cast)
        arrays.append(part.data.reshape(len(part), *widest.shape))
    offsets = np.zeros(len(items) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    data = list_array(pa.array(offsets), np.concatenate(arrays), widest.dtype, widest.shape)
    return Rows(data, widest.dtype, widest.shape, ragged=True, weak=not firm)


def _text_dtype(items: Sequence[Any], column: Column | None) -> str | None:
    """``"string"`` or ``"bytes"`` if that is what the lists hold or, where all are empty, what the column holds."""
    first = next((i for item in items for i in item), None) if all(hasattr(i, "__len__") for i in items) else None
    if isinstance(first, str | bytes):
        return "string" if isinstance(first, str) else "bytes"
    declared = column.dtype if column is not None else ""
    return declared if first is None and declared in VARIABLE_DTYPES else None


def _ragged_strings(path: str, items: Sequence[Any], dtype: str) -> Rows:
    offsets = np.zeros(len(items) + 1, np.int64)
    np.cumsum([len(item) for item in items], out=offsets[1:])
    values = _string_array(path, [i for item in items for i in item], dtype)
    return Rows(pa.LargeListArray.from_arrays(pa.array(offsets), values), dtype, (), ragged=True)
