"""Trajectories and steps as Arrow tables and streams, which DuckDB, Polars and pyarrow read as they are.

Invariant: every value can be read back exactly. Types are those that both DuckDB and Polars have: tensors are nested
fixed-size lists, half-precision floats are widened to float32 (DuckDB has no float16, Arrow no bfloat16), complex
numbers are structs of ``real`` and ``imag``, identifiers are text, "not a time" is null.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from trajstore.errors import SelectionError
from trajstore.interop.frames import HIDDEN_FIELDS, uuid_text
from trajstore.interop.steps import StepReader
from trajstore.schema import VARIABLE_DTYPES, Column
from trajstore.stored import Array, Stored

INDEX_COLUMNS = ("trajectory", "step")
_UUID = pa.field("uuid", pa.string(), nullable=False)
_BATCH_ROWS = 1 << 16
_FIRST_ROWS = 256  # of a stream with strings or lists, whose size is known only once some were read
_UUIDS_IN_CHUNK = 1 << 24  # their text stays far below the 2 GiB of an Arrow string array
# What a NumPy unit of time becomes: these, and beyond them the plain number.
_TIME_UNITS = {"W": "D", "Y": "D", "M": "D", "D": "D", "h": "s", "m": "s", "s": "s", "ms": "ms", "us": "us", "ns": "ns"}
_DURATION_UNITS = {"W": "s", "D": "s", "h": "s", "m": "s", "s": "s", "ms": "ms", "us": "us", "ns": "ns"}


def trajectory_table(table: pa.Table) -> pa.Table:
    """One row per trajectory: id, uuid (text), length, flags, return, time, then metadata fields.

    Args:
        table: Rows of the store's trajectory table.
    """
    plain = table.select(["id", *_shown(table.schema)])
    return plain.add_column(1, _UUID, _uuid_strings(table["uuid"]))


def trajectory_schema(table: pa.Schema) -> pa.Schema:
    """The schema of ``trajectory_table``, from that of the store's trajectory table."""
    return pa.schema([table.field("id"), _UUID, *(table.field(name) for name in _shown(table))])


def _shown(table: pa.Schema) -> list[str]:
    return [name for name in table.names if name not in HIDDEN_FIELDS and name != "uuid"]


def _uuid_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    text = uuid_text(column)
    parts = []
    for start in range(0, len(text), _UUIDS_IN_CHUNK):
        part = text[start : start + _UUIDS_IN_CHUNK]
        offsets = np.arange(len(part) + 1, dtype=np.int32) * np.int32(part.shape[1])
        parts.append(pa.StringArray.from_buffers(len(part), pa.py_buffer(offsets), pa.py_buffer(part)))
    return pa.chunked_array(parts, pa.string())


@dataclass(frozen=True, eq=False, repr=False)
class StepTable:
    """Steps of a view as an Arrow table that is read only when it is streamed, as often as that is.

    Anything that takes the Arrow stream protocol takes it: ``duckdb.sql("select ... from steps")``,
    ``polars.DataFrame(steps)``, ``pyarrow.table(steps)``. Memory stays near ``batch_bytes`` however many steps there are.

    Attributes:
        columns: Which columns, after ``trajectory`` (id) and ``step``.
        batch_bytes: Of one record batch, about.

    Examples:
        >>> import numpy as np, trajstore
        >>> with trajstore.open("memory://docs/steps", mode="a") as store:
        ...     _ = store.append({"action": np.arange(3), "reward": [0.0, 0.0, 1.0]}, terminated=True)
        ...     store.trajectories.steps_arrow().to_table().to_pydict()
        {'trajectory': [0, 0, 0], 'step': [0, 1, 2], 'action': [0, 1, 2], 'reward': [0.0, 0.0, 1.0]}
    """

    reader: StepReader
    columns: Sequence[Column]
    batch_bytes: int

    def __post_init__(self) -> None:
        taken = [column.path for column in self.columns if column.path in INDEX_COLUMNS]
        if taken:
            raise SelectionError(
                f"column {taken[0]!r} has the name of one of the step table's own columns; name the columns that you "
                "want without it, and read it with view.read()"
            )
        if self.batch_bytes < 1:
            raise SelectionError(f"batch_bytes={self.batch_bytes}, expected one or more")

    def __repr__(self) -> str:
        return f"StepTable(rows={self.num_rows}, columns={self.schema.names})"

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_rows(self) -> int:
        """Steps."""
        return self.reader.rows

    @cached_property
    def schema(self) -> pa.Schema:
        """Names and types."""
        index = [pa.field(name, pa.int64(), nullable=False) for name in INDEX_COLUMNS]
        return pa.schema([*index, *(pa.field(c.path, step_type(c)) for c in self.columns)])

    def to_reader(self) -> pa.RecordBatchReader:
        """A new stream over the steps."""
        return pa.RecordBatchReader.from_batches(self.schema, self._batches())

    def to_table(self) -> pa.Table:
        """All of it in memory."""
        return self.to_reader().read_all()

    def __arrow_c_schema__(self) -> Any:
        return self.schema.__arrow_c_schema__()

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.to_reader().__arrow_c_stream__(requested_schema)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        fixed = 16 + sum(0 if c.is_variable else c.row_bytes for c in self.columns)
        rows = min(_BATCH_ROWS, max(1, self.batch_bytes // fixed))
        variable = any(c.is_variable for c in self.columns)
        if variable:
            rows = min(rows, _FIRST_ROWS)
        start = 0
        while start < self.num_rows:
            stop = min(self.num_rows, start + rows)
            arrays = [pa.array(numbers) for numbers in self.reader.index(start, stop)]
            arrays += [step_array(column, *self.reader.read(column, start, stop)) for column in self.columns]
            batch = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
            if variable:  # no more than twice as many as before: rows that follow may be larger
                rows = max(1, min(_BATCH_ROWS, 2 * rows, self.batch_bytes * len(batch) // max(batch.nbytes, 1)))
            start = stop
            yield batch


def step_type(column: Column) -> pa.DataType:
    """The Arrow type of a column of a step table."""
    kind = _element_type(column.dtype)
    for size in reversed(column.shape):
        kind = pa.list_(kind, size)
    return pa.large_list(kind) if column.ragged else kind


def step_array(column: Column, stored: Stored, absent: Array | None = None) -> pa.Array:
    """Stored rows as an Arrow array of ``step_type``.

    Args:
        column: The column.
        stored: Its rows.
        absent: ``(rows,)`` bool: rows that are null; strings and lists are null there already.
    """
    if column.dtype in VARIABLE_DTYPES:
        return stored
    if not column.ragged:
        return _nested(column.dtype, column.shape, stored.reshape(-1), absent)
    offsets = stored.offsets.to_numpy()
    flat = stored.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0]))
    if isinstance(flat, pa.FixedSizeListArray):
        flat = flat.flatten()
    values = flat.to_numpy(zero_copy_only=False)
    if column.dtype.startswith("complex"):
        values = values.view(column.dtype)
    nulls = pa.array(absent) if absent is not None else None
    elements = _nested(column.dtype, column.shape, values, None)
    return pa.LargeListArray.from_arrays(pa.array(offsets - offsets[0]), elements, mask=nulls)


def _nested(dtype: str, shape: tuple[int, ...], flat: Array, absent: Array | None) -> pa.Array:
    """Values ``(n * prod(shape),)`` in lists of fixed size, as deep as the shape."""
    array = _elements(dtype, flat, None if shape else absent)
    for axis in range(len(shape) - 1, -1, -1):
        nulls = pa.array(absent) if axis == 0 and absent is not None else None
        array = pa.FixedSizeListArray.from_arrays(array, shape[axis], mask=nulls)
    return array


def _element_type(dtype: str) -> pa.DataType:
    if dtype in VARIABLE_DTYPES:
        return pa.large_string() if dtype == "string" else pa.large_binary()
    if dtype.startswith(("datetime64", "timedelta64")):
        unit = _arrow_unit(dtype)
        if unit is None:
            return pa.int64()
        if dtype.startswith("timedelta64"):
            return pa.duration(unit)
        return pa.date32() if unit == "D" else pa.timestamp(unit)
    if dtype.startswith("complex"):
        half = pa.float32() if dtype == "complex64" else pa.float64()
        return pa.struct([pa.field("real", half), pa.field("imag", half)])
    return pa.float32() if dtype in ("bfloat16", "float16") else pa.from_numpy_dtype(np.dtype(dtype))


def _elements(dtype: str, flat: Array, absent: Array | None) -> pa.Array:
    if dtype == "bfloat16":
        flat = (flat.astype(np.uint32) << 16).view(np.float32)  # it is the upper half of a float32
    elif dtype == "float16":
        flat = flat.astype(np.float32)
    elif dtype.startswith("complex"):
        nulls = pa.array(absent) if absent is not None else None
        halves = [pa.array(np.ascontiguousarray(part)) for part in (flat.real, flat.imag)]
        return pa.StructArray.from_arrays(halves, fields=list(_element_type(dtype)), mask=nulls)
    elif dtype.startswith(("datetime64", "timedelta64")):
        return _times(dtype, flat, absent)
    return pa.array(flat, mask=absent)


def _times(dtype: str, flat: Array, absent: Array | None) -> pa.Array:
    unit = _arrow_unit(dtype)
    if unit is None:
        return pa.array(flat, mask=absent)
    exact = flat.view(dtype)
    kind = dtype.split("[")[0]
    converted = exact.astype(f"{kind}[{unit}]")
    days = converted.view(np.int64)
    wrapped = unit == "D" and bool((~np.isnat(converted) & (days != days.astype(np.int32))).any())
    if wrapped or not np.array_equal(converted.astype(dtype), exact, equal_nan=True):
        raise SelectionError(
            f"{dtype} values reach beyond what Arrow's {_element_type(dtype)} can hold; read the column with view.read()"
        )
    nulls = np.isnat(converted) | (False if absent is None else absent)
    return pa.array(converted.view(np.int64).astype(np.int32 if unit == "D" else np.int64), mask=nulls).cast(
        _element_type(dtype)
    )


def _arrow_unit(dtype: str) -> str | None:
    """The unit of Arrow that holds a NumPy unit exactly; None if there is none."""
    unit = np.datetime_data(np.dtype(dtype))[0]
    return (_DURATION_UNITS if dtype.startswith("timedelta64") else _TIME_UNITS).get(unit)
