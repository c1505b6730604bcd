"""A trajectory that is given step by step, in bounded memory.

Invariant: a step is recorded in all columns or in none. A short episode becomes visible like any appended trajectory; one
that outgrows ``spill_bytes`` gets a segment of its own, to which its full pages go while it is still running.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from trajstore.deferred import is_tensor
from trajstore.errors import (
    ClosedError,
    ColumnShapeError,
    LengthError,
    MissingColumnError,
    UnknownColumnError,
)
from trajstore.format.manifest import check_metadata
from trajstore.names import check_no_flags, flatten
from trajstore.schema import Column, Schema
from trajstore.stored import Array, Stored
from trajstore.values import Rows, check_rows, rows_of
from trajstore.write.batch import TrajectoryRef, total_reward
from trajstore.write.segment import SegmentBuilder
from trajstore.write.writer import Writer

# What gymnasium calls the value that has one row more than there are actions.
_STATES = "obs"
_FIRST_CAPACITY = 64  # rows
_PLAIN_VALUE_BYTES = 64  # a Python number in a list, roughly


class Episode:
    """One running trajectory; made by ``Store.begin``.

    Left by an exception, an episode used as a context manager is discarded.

    An episode that outgrows memory before the store knows its columns takes ``obs`` as having one row more than the others
    (``extra=1``); declare a schema to have it otherwise.

    Examples:
        >>> import numpy as np, trajstore
        >>> with trajstore.open("memory://docs/episode", mode="a") as store:
        ...     with store.begin(task="pick") as episode:
        ...         for step in range(3):
        ...             episode.add(obs=np.zeros(4, np.float32), action=step, reward=1.0)
        ...         ref = episode.end(np.ones(4, np.float32), terminated=True)
        ...     store.flush()
        ...     store.trajectories[0]["obs"].shape
        (4, 4)
    """

    def __init__(self, writer: Writer, metadata: Mapping[str, Any]) -> None:
        check_metadata(metadata, writer.schema.metadata)
        self._writer = writer
        self._metadata = metadata
        self._buffers: dict[str, _ColumnBuffer] = {}
        self._length = 0
        self._buffered_bytes = 0
        self._reward_sum: float | None = None
        self._stream: SegmentBuilder | None = None
        self._state = "running"

    def __len__(self) -> int:
        """Steps so far."""
        return self._length

    def add(self, **columns: Any) -> None:
        """Record one step.

        Args:
            **columns: One value per column, nested mappings allowed: ``add(obs={"image": u8[64, 64, 3]}, action=2)``.

        Raises:
            SchemaError: One of its subclasses, naming the column; nothing of this step is recorded.
        """
        self._check_running()
        flat = flatten(columns)
        schema = self._writer.schema
        self._check_names(flat, schema)
        rows = {path: self._one_row(path, value, schema) for path, value in flat.items()}
        for path, (column, row) in rows.items():
            buffer = self._buffers.get(path)
            if buffer is None:
                buffer = self._buffers[path] = _ColumnBuffer()
            self._buffered_bytes += buffer.append(column, row, flat[path])
        self._length += 1
        if self._buffered_bytes >= self._writer.options.spill_bytes:
            self._spill()

    def end(
        self,
        final_obs: Any = None,
        *,
        terminated: bool = False,
        truncated: bool = False,
        final: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> TrajectoryRef:
        """Complete the episode.

        Args:
            final_obs: The observation after the last action: the last row of ``obs``.
            terminated: The environment reached a terminal state.
            truncated: The episode was cut off, by a time limit for instance.
            final: Last rows of other columns with ``extra=1``, nested like a step.
            metadata: Fields that were not known at the beginning.

        Raises:
            LengthError: No step was added, or a column with ``extra=1`` has no final row. The episode goes on: call again.
        """
        self._check_running()
        if not self._length:
            raise LengthError("this episode has zero steps; add() one, or discard() it")
        last = dict(final or {})
        if final_obs is not None:
            last[_STATES] = final_obs
        schema = self._writer.schema
        finals = flatten(last)
        unknown = [path for path in finals if path not in self._buffers]
        if unknown:
            raise UnknownColumnError(f"final row of column {unknown[0]!r}, which no step of this episode had")
        missing = [p for p in self._buffers if p in schema and schema[p].extra and p not in finals]
        if missing:
            raise LengthError(
                f"column {missing[0]!r} has one row more than there are steps, and its final row is missing; call "
                "end(final_obs, ...), or end(final={...}) for columns outside 'obs'"
            )
        if not len(schema) and len(finals) == len(self._buffers):
            raise LengthError("every column has a final row, so it is one step more; give final rows to states only")
        fields = {**self._metadata, **(metadata or {})}
        if self._stream is None:
            tree = {path: buffer.contents() for path, buffer in self._buffers.items()}
            for path, value in finals.items():
                tree[path] = self._buffers[path].contents((*self._one_row(path, value, schema), value))
            ref = self._writer.append(tree, terminated=terminated, truncated=truncated, metadata=fields)
        else:
            ref = self._end_stream(self._stream, finals, schema, terminated, truncated, fields)
        self._state = "ended"
        self._buffers.clear()
        return ref

    def discard(self) -> None:
        """Drop the episode. May be called twice; does nothing after ``end``."""
        if self._state != "running":
            return
        self._state = "discarded"
        self._buffers.clear()
        if self._stream is not None:
            self._writer.abandon_stream(self._stream)

    def __enter__(self) -> Episode:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._state == "running":
            self.discard()
            if kind is None:
                raise ClosedError("the episode was neither ended nor discarded; call episode.end(final_obs, ...)")

    def _check_running(self) -> None:
        if self._state != "running":
            raise ClosedError(f"this episode is {self._state}; begin another one with store.begin()")

    def _check_names(self, flat: Mapping[str, Any], schema: Schema) -> None:
        schema.check_appended(flat)
        known = frozenset(self._buffers) or frozenset(column.path for column in schema)
        required = frozenset(self._buffers) or schema.required
        if not flat:
            raise MissingColumnError("a step needs at least one column")
        if not known:
            return
        for path in flat:
            if path not in known:
                raise UnknownColumnError(
                    f"column {path!r} is not among {', '.join(map(repr, sorted(known)))}; leave it out"
                )
        for path in required:
            if path not in flat:
                raise MissingColumnError(f"column {path!r} is missing from this step; every step has the same columns")

    def _one_row(self, path: str, value: Any, schema: Schema) -> tuple[Column | None, Rows]:
        """One step's value as ``(1, *shape)``, checked; the column is None while its dtype is not certain."""
        column = schema.get(path)
        if column is None and path in self._buffers:
            column = self._buffers[path].column
        one = [value] if column is not None and column.ragged else _with_time_axis(value)
        row = rows_of(path, one, column)
        if column is None and not row.weak and isinstance(row.data, np.ndarray) and path not in self._buffers:
            column = Column(path=path, dtype=row.dtype, shape=row.shape)
        if column is not None:
            data = check_rows(column, row)
            return column, Rows(data, column.dtype, column.shape, column.ragged)
        if path in self._buffers:
            self._buffers[path].check_like(path, row)
        return None, row

    def _spill(self) -> None:
        """Move what is buffered to a segment of its own."""
        rows = {path: rows_of(path, buffer.contents()) for path, buffer in self._buffers.items()}
        schema = self._writer.schema
        if not len(schema):
            check_no_flags(rows)
            schema = Schema(tuple(_infer_running(path, r) for path, r in rows.items()), schema.metadata)
        columns = {path: check_rows(schema[path], r) for path, r in rows.items()}
        if self._stream is None:
            self._stream = self._writer.open_stream([c for c in schema if c.path in columns], schema)
        reward = total_reward(schema, columns)
        if reward is not None:
            self._reward_sum = reward + (self._reward_sum or 0.0)
        self._writer.append_to_stream(self._stream, columns)
        for buffer in self._buffers.values():
            buffer.clear()
        self._buffered_bytes = 0

    def _end_stream(
        self,
        stream: SegmentBuilder,
        finals: Mapping[str, Any],
        schema: Schema,
        terminated: bool,
        truncated: bool,
        fields: Mapping[str, Any],
    ) -> TrajectoryRef:
        for path in finals:
            if not schema[path].extra:
                raise LengthError(f"column {path!r} has as many rows as there are steps, so it takes no final row")
        check_metadata(fields, schema.metadata)
        last = {path: self._one_row(path, value, schema)[1].data for path, value in finals.items()}
        if self._buffered_bytes:
            self._spill()
        if last:
            self._writer.append_to_stream(stream, last)
        return self._writer.end_stream(
            stream,
            self._length,
            terminated=terminated,
            truncated=truncated,
            reward_sum=self._reward_sum,
            metadata=fields,
        )


class _ColumnBuffer:
    """Rows of one column: a growing array, Arrow arrays, or plain Python values whose dtype is settled at the end."""

    def __init__(self) -> None:
        self.column: Column | None = None
        self._array: Array | None = None
        self._filled = 0
        self._parts: list[Any] = []  # Arrow arrays if the column is known, else plain values
        self._example: Rows | None = None

    def append(self, column: Column | None, row: Rows, value: Any) -> int:
        """Add one row; returns the bytes that it takes."""
        self._example = self._example or row
        if column is None:
            self._parts.append(copy.deepcopy(value))
            return _PLAIN_VALUE_BYTES + (len(value) if isinstance(value, str | bytes | list) else 0)
        if self.column is None:
            if self._parts:  # the schema became known while plain values were waiting
                self._parts, waiting = [], self._parts
                self._store(column, check_rows(column, rows_of(column.path, waiting, column)))
            self.column = column
        self._store(column, row.data)
        return int(row.data.nbytes)

    def check_like(self, path: str, row: Rows) -> None:
        """Refuse a plain value that is unlike the first one."""
        first = self._example
        if first is not None and (first.shape != row.shape and not first.ragged):
            raise ColumnShapeError(
                f"column {path!r} had shape {list(first.shape)} in the first step, found {list(row.shape)}"
            )

    def contents(self, final: tuple[Column | None, Rows, Any] | None = None) -> Any:
        """All rows, and a final one behind: ``Rows``, or a list of plain values."""
        column = self.column
        if column is None:
            return [*self._parts, *([final[2]] if final else [])]
        last = [final[1].data] if final else []
        if column.is_variable:
            data = pa.concat_arrays([*self._parts, *last])
        else:
            data = self._array[: self._filled] if self._array is not None else np.empty(0)
            data = np.concatenate([data, *last]) if last else data
        return Rows(data, column.dtype, column.shape, column.ragged)

    def clear(self) -> None:
        """Forget the rows, keep the memory."""
        self._filled = 0
        self._parts = []

    def _store(self, column: Column, data: Stored) -> None:
        if column.is_variable:
            self._parts.append(data)
            return
        if self._array is None:
            self._array = np.empty((_FIRST_CAPACITY, *data.shape[1:]), data.dtype)
        while self._filled + len(data) > len(self._array):
            grown = np.empty((2 * len(self._array), *self._array.shape[1:]), self._array.dtype)
            grown[: self._filled] = self._array[: self._filled]
            self._array = grown
        self._array[self._filled : self._filled + len(data)] = data
        self._filled += len(data)


def _with_time_axis(value: Any) -> Any:
    """A value of one step as a sequence of one step."""
    if is_tensor(value):
        return value[None]
    if isinstance(value, np.ndarray | np.generic):
        array = np.asarray(value)
        return [array] if array.dtype == object else array[None]
    return [value]


def _infer_running(path: str, rows: Rows) -> Column:
    extra = 1 if path.split("/", 1)[0] == _STATES else 0
    return Column(path=path, dtype=rows.dtype, shape=rows.shape, ragged=rows.ragged, extra=1 if extra else 0)
