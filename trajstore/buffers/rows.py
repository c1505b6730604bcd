"""``RowFormat``: what the rows of a buffer look like, and whether rows that somebody adds do.

Invariant: rows that were checked can be copied into the arena of the format without a further look: same names, dtypes and
shapes, as many of each, on one device, and outside any autograd graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from trajstore.errors import (
    BufferFullError,
    ColumnShapeError,
    ColumnTypeError,
    LengthError,
    MissingColumnError,
    SchemaError,
    UnknownColumnError,
)
from trajstore.names import flatten
from trajstore.schema import Column, Schema


class RowFormat:
    """Names, dtypes and shapes of one row's tensors.

    Args:
        columns: Them.

    Raises:
        SchemaError: Columns that no tensor holds.
    """

    def __init__(self, columns: Iterable[Column] = ()) -> None:
        self.schema = Schema(tuple(columns))
        self.tensors = {column.path: (_torch_dtype(column), torch.Size(column.shape)) for column in self.schema}

    @classmethod
    def of(cls, rows: Mapping[str, Any], *, batched: bool = True, most: int | None = None) -> RowFormat:
        """The format of these rows, which are held against it.

        Args:
            rows: Tensors ``[n, *shape]`` by flat name, or ``[*shape]`` if not ``batched``.
            batched: Whether they have a first dimension.
            most: More rows than this are refused.

        Raises:
            SchemaError: One of its subclasses: a name or a dtype that cannot be stored, something that is no tensor.
        """
        columns = []
        for name, value in rows.items():
            if not isinstance(value, torch.Tensor):
                raise ColumnTypeError(f"column {name!r}: a {type(value).__name__}, expected a tensor")
            if batched and not value.ndim:
                raise ColumnShapeError(f"column {name!r}: shape [], expected ['n', ...]")
            dtype = str(value.dtype).removeprefix("torch.")
            columns.append(Column(path=name, dtype=dtype, shape=tuple(value.shape[batched:])))
        found = cls(columns)
        found.check(rows, batched=batched, most=most)
        return found

    def __len__(self) -> int:
        return len(self.tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowFormat) and self.tensors == other.tensors

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return ", ".join(f"{column.path!r} {column.describe()}" for column in self.schema)

    def arena(self, capacity: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Room for so many rows: ``[capacity, *shape]`` by name."""
        return {
            # Not zeros: a page of memory is touched when its rows are written, and not before.
            name: torch.empty((capacity, *shape), dtype=dtype, device=device)
            for name, (dtype, shape) in self.tensors.items()
        }

    def flat(self, rows: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rows by flat name."""
        if rows and rows.keys() == self.tensors.keys():
            return rows  # the ordinary case
        rows = flatten(rows)
        if not rows:
            raise LengthError("no columns; the mapping is empty")
        return rows

    def check(
        self, rows: Mapping[str, Any], *, batched: bool = True, most: int | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of these rows, in the order of the columns, once all of them fit.

        Args:
            rows: Tensors ``[n, *shape]`` by flat name, or ``[*shape]`` if not ``batched``.
            batched: Whether they have a first dimension.
            most: More rows than this are refused.

        Raises:
            BufferFullError: More than ``most``.
            SchemaError: One of its subclasses, naming the column.
        """
        if rows.keys() != self.tensors.keys():
            raise self._wrong_names(rows)
        checked: dict[str, torch.Tensor] = {}
        device: torch.device | None = None
        length = -1
        for name, (dtype, shape) in self.tensors.items():
            value = rows[name]
            if not isinstance(value, torch.Tensor):
                raise ColumnTypeError(f"column {name!r}: a {type(value).__name__}, expected a tensor")
            if value.dtype is not dtype:
                raise ColumnTypeError(f"column {name!r}: {value.dtype}, expected {dtype}; convert it with .to({dtype})")
            found = value.shape
            if not batched:
                if found != shape:
                    raise ColumnShapeError(f"column {name!r}: shape {list(found)}, expected {list(shape)} of one row")
            elif found[1:] != shape or not found:
                raise ColumnShapeError(f"column {name!r}: shape {list(found)}, expected {['n', *shape]}")
            elif found[0] != length:
                if checked:
                    raise LengthError(
                        f"column {name!r} has {found[0]} rows, column {next(iter(checked))!r} {length}; all need as many"
                    )
                length = found[0]
            if value.device != device:
                if checked:
                    other = next(iter(checked))
                    raise ColumnTypeError(
                        f"column {name!r} is on {value.device}, column {other!r} on {device}; move them to one device"
                    )
                device = value.device
            checked[name] = value.detach() if value.requires_grad else value
        if device is not None and device.type == "meta":
            raise ColumnTypeError("the tensors are on the device 'meta', which holds no values; pass real ones")
        if length == 0:
            raise LengthError("zero rows; add at least one")
        if most is not None and length > most:
            raise BufferFullError(
                f"{length} rows at once for a buffer of {most}; add fewer at a time, or make a larger one"
            )
        return checked

    def _wrong_names(self, rows: Mapping[str, Any]) -> SchemaError:
        expected = ", ".join(map(repr, self.tensors))
        unknown = [name for name in rows if name not in self.tensors]
        if unknown:
            return UnknownColumnError(f"column {unknown[0]!r} is not one of the buffer's: {expected}; leave it out")
        missing = [name for name in self.tensors if name not in rows]
        return MissingColumnError(f"column {missing[0]!r} is missing; every row needs {expected}")


# What torch cannot select rows of on a CPU, and what has the same bits.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def select_rows(tensor: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows ``(n,)`` of a tensor ``[m, *shape]`` of any dtype, copied: ``[n, *shape]``.

    >>> select_rows(torch.tensor([7, 8, 9], dtype=torch.uint16), torch.tensor([2, 0])).tolist()
    [9, 7]
    """
    signed = _SIGNED.get(tensor.dtype)
    if signed is None:
        return tensor.index_select(0, indices)
    return tensor.view(signed).index_select(0, indices).view(tensor.dtype)


def _torch_dtype(column: Column) -> torch.dtype:
    dtype = getattr(torch, column.dtype, None)
    if not isinstance(dtype, torch.dtype) or column.ragged or column.extra:
        raise ColumnTypeError(
            f"column {column.path!r} ({column.describe()}): a buffer holds numbers of one shape per row; leave it out"
        )
    return dtype
