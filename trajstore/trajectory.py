"""One trajectory of a view, and its columns, read on demand.

Invariant: nothing is read before it is asked for, and what is read is what was appended.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from trajstore.errors import IndexRangeError, SelectionError, UnknownColumnError
from trajstore.format.manifest import TABLE_FIELDS
from trajstore.names import nest
from trajstore.schema import Column
from trajstore.stored import Array, to_user

if TYPE_CHECKING:
    from trajstore.view import View

_TABLE_FIELDS = frozenset(field.name for field in TABLE_FIELDS)


class Trajectory:
    """One trajectory of a view: its columns, read on demand, and what is known about it."""

    def __init__(self, view: View, row: int) -> None:
        self._view = view
        self._row = row

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"Trajectory(id={self.id}, length={self.length}, columns={list(self.columns)})"

    @property
    def id(self) -> int:
        """Number in the store."""
        return int(self._view._table.id[self._row])

    @property
    def length(self) -> int:
        """Steps."""
        return int(self._view._table.length[self._row])

    @property
    def uuid(self) -> uuid.UUID:
        """Identity, made at append."""
        return uuid.UUID(bytes=self._fields["uuid"])

    @property
    def terminated(self) -> bool:
        """Whether it ended in a terminal state."""
        return bool(self._fields["terminated"])

    @property
    def truncated(self) -> bool:
        """Whether it was cut off."""
        return bool(self._fields["truncated"])

    @property
    def reward_sum(self) -> float | None:
        """Undiscounted return; None without a scalar column ``reward``."""
        return self._fields["reward_sum"]  # type: ignore[no-any-return]

    @property
    def created_at(self) -> pd.Timestamp:
        """When it was appended, UTC."""
        return pd.Timestamp(self._fields["created_at"])

    @property
    def metadata(self) -> dict[str, Any]:
        """Its metadata fields; those never set are left out."""
        return {k: v for k, v in self._fields.items() if k not in _TABLE_FIELDS and v is not None}

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of its columns."""
        table = self._view._table
        present = set(table.segments[int(table.segment[self._row])].all_columns)
        return tuple(c.path for c in self._view.schema if c.path in present)

    def __contains__(self, name: object) -> bool:
        return any(path == name or path.startswith(f"{name}/") for path in self.columns)

    def __getitem__(self, name: str) -> Any:
        """A column by its path, or a nested mapping of the columns under a name.

        Raises:
            UnknownColumnError: This trajectory has neither.
        """
        if name in self.columns:
            return self.column(name)
        under = {path: self.column(path) for path in self.columns if path.startswith(f"{name}/")}
        if not under:
            raise UnknownColumnError(
                f"trajectory {self.id} has no column {name!r}; it has {', '.join(map(repr, self.columns))}"
            )
        return nest({path.removeprefix(f"{name}/"): column for path, column in under.items()})

    def column(self, path: str) -> TrajectoryColumn:
        """A column by its full path."""
        if path not in self.columns:
            raise UnknownColumnError(
                f"trajectory {self.id} has no column {path!r}; it has {', '.join(map(repr, self.columns))}"
            )
        return TrajectoryColumn(self._view, self._row, self._view.schema[path])

    def read(self) -> dict[str, Any]:
        """All columns as nested arrays, the way they were appended."""
        return nest({path: self.column(path)[:] for path in self.columns})

    @cached_property
    def _fields(self) -> Mapping[str, Any]:
        fields: dict[str, Any] = self._view._table.full.slice(self._row, 1).to_pylist()[0]
        return fields


class TrajectoryColumn:
    """One column of one trajectory, read on demand. ``np.asarray`` reads all of it."""

    def __init__(self, view: View, row: int, column: Column) -> None:
        self._view = view
        self._row = row
        self.column = column

    @property
    def shape(self) -> tuple[int, ...]:
        """``(rows, *shape)``; rows are the length, and one more for ``extra=1``."""
        return (len(self), *(() if self.column.is_variable else self.column.shape))

    @property
    def dtype(self) -> str:
        """Name of the column's dtype."""
        return self.column.dtype

    def __len__(self) -> int:
        return int(self._view._table.length[self._row]) + self.column.extra

    def __repr__(self) -> str:
        return f"TrajectoryColumn({self.column.path!r}, {self.column.describe()}, rows={len(self)})"

    def __getitem__(self, key: int | slice | tuple[Any, ...]) -> Any:
        """Rows: an array for a slice, one value for a number; ``[rows, ...]`` also selects inside them."""
        if isinstance(key, tuple):
            rows = self[key[0]]
            return rows[(slice(None), *key[1:])] if isinstance(key[0], slice) else rows[key[1:]]
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return to_user(self.column, self._view._read_rows(self._row, self.column, start, max(stop, start)))
            wanted = range(start, stop, step)
            if not len(wanted):
                return self[0:0]
            lo = min(wanted[0], wanted[-1])
            read = self[lo : max(wanted[0], wanted[-1]) + 1]
            return read[[i - lo for i in wanted]]
        if not isinstance(key, int | np.integer):
            raise SelectionError(f"rows are selected by a number or a slice, found a {type(key).__name__}")
        row = int(key) + (len(self) if key < 0 else 0)
        if not 0 <= row < len(self):
            raise IndexRangeError(f"row {int(key)} of column {self.column.path!r}, which has {len(self)}")
        return self[row : row + 1][0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("a column is read from the store: it cannot be had without a copy")
        return np.asarray(self[:], dtype)
