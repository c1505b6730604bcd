"""Rings as trajectories of a store: the rows in storage order, a few thousand to a trajectory.

Invariant: every trajectory carries the number of its save and the size, pointer and capacity of the ring, so a save that was
cut short is never taken for a whole one; older saves are deleted, and their bytes given back, only once a newer one is
durable.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

import trajstore.store
from trajstore.buffers.rows import RowFormat
from trajstore.errors import EmptyBufferError, SchemaConflictError, SelectionError
from trajstore.schema import Schema
from trajstore.stored import Array
from trajstore.view import View

_CHUNK_ROWS = 4096
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class RingState:
    """The numbers of a ring."""

    capacity: int
    size: int
    pointer: int


@dataclass(frozen=True)
class SavedRing:
    """A whole save, to be read while its store is open."""

    number: int
    state: RingState
    schema: Schema  # its columns
    view: View

    def read_into(self, column: str, rows: torch.Tensor) -> None:
        """Fill ``rows`` ``[size, *shape]``, on any device, with a column."""
        if not len(rows):
            return
        if rows.device.type == "cpu":
            self.view.read(column, physical(rows))
            return
        done = 0
        for position, length in enumerate(self.view.lengths.tolist()):
            read = self.view[position : position + 1].read(column)
            rows[done : done + length] = torch.as_tensor(read)
            done += length

    def chunks(self, start: int, stop: int) -> Iterator[dict[str, torch.Tensor]]:
        """Rows ``[start, stop)`` of all columns by flat name, ``[n, *shape]``, a trajectory or less at a time."""
        first = 0
        for position, length in enumerate(self.view.lengths.tolist()):
            lo, hi = max(start - first, 0), min(stop - first, length)
            if lo < hi:
                trajectory = self.view[position]
                yield {c.path: torch.as_tensor(trajectory.column(c.path)[lo:hi]) for c in self.schema}
            first += length


class RingStore:
    """The saves of a ring in one store. A context manager.

    Args:
        url: Where; whatever ``trajstore.open`` takes.
        mode: ``"a"`` to save, ``"r"`` to read.
        storage_options: As for ``trajstore.open``.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        mode: Literal["r", "a"] = "r",
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.url = os.fspath(url)
        self._store = trajstore.opening.open(url, mode, storage_options=storage_options)

    def __enter__(self) -> RingStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._store.close()

    def write(
        self, state: RingState, schema: Schema, chunks: Callable[[int], Iterable[Mapping[str, torch.Tensor]]]
    ) -> int:
        """Add a save; durable when it returns.

        Args:
            state: Of the ring.
            schema: Its columns.
            chunks: Given a number of rows, the rows in storage order, so many at a time.

        Returns:
            Its number.

        Raises:
            EmptyBufferError: A ring without columns.
            SchemaConflictError: The store holds other columns.
        """
        if not len(schema):
            raise EmptyBufferError("a ring to which nothing was ever added has no columns to save; add rows first")
        number = 1 + max(self._numbers(self._store.trajectories), default=0)
        there = RowFormat(self._store.schema)
        if len(there) and there != RowFormat(schema):
            raise SchemaConflictError(
                f"the store at {self.url} holds rows with the columns {there}; these have {RowFormat(schema)}: save them to "
                "another place, or remove that store first"
            )
        fields = {
            "ring_save": number,
            "ring_capacity": state.capacity,
            "ring_size": state.size,
            "ring_pointer": state.pointer,
        }
        if not len(there):
            self._store.declare(schema)  # whatever their names are
        first = 0
        for chunk in chunks(chunk_rows(schema)) if state.size else [_one_row(schema)]:
            self._store.append(chunk, metadata={**fields, "ring_first": first})
            first += len(next(iter(chunk.values())))
        self._store.flush()
        return number

    def prune(self, keep: int) -> None:
        """Delete all saves but this one, and give their bytes back: nobody else may be reading them."""
        view = self._store.trajectories
        numbers = self._column(view, "ring_save")
        if (numbers != keep).any():
            self._store.delete(view.ids[numbers != keep], reclaim=True)

    def find(self, number: int | None = None) -> SavedRing:
        """A save, by default the last one that is complete.

        Raises:
            SelectionError: There is none, or it was cut short.
        """
        view = self._store.trajectories
        found = self._numbers(view)
        for candidate in sorted(found, reverse=True) if number is None else [number]:
            saved = self._complete(view, candidate)
            if saved is not None:
                return saved
        what = "no complete save" if number is None else f"no complete save {number}"
        have = f"it has {', '.join(map(str, sorted(found)))}" if found else "it holds none"
        raise SelectionError(f"{what} of a ring at {self.url}: {have}; check the place, or save again")

    def _complete(self, view: View, number: int) -> SavedRing | None:
        chosen = np.flatnonzero(self._column(view, "ring_save") == number)
        if not len(chosen):
            return None
        ours = view.take(chosen)
        ours = ours.take(np.argsort(self._column(ours, "ring_first"), kind="stable"))
        state = RingState(*(int(self._column(ours, f"ring_{name}")[0]) for name in ("capacity", "size", "pointer")))
        if ours.num_steps != max(state.size, 1):
            return None
        return SavedRing(number, state, Schema(self._store.schema.columns), ours)

    def _numbers(self, view: View) -> set[int]:
        return {int(number) for number in self._column(view, "ring_save")}

    def _column(self, view: View, name: str) -> Array:
        """``(trajectories,)`` int64: a metadata field that all of them have."""
        if not len(view):
            return np.empty(0, np.int64)
        table = view.to_pandas()
        if name not in table or table[name].isna().any():
            raise SelectionError(
                f"the store at {self.url} holds trajectories that are no save of a ring; choose another place"
            )
        return table[name].to_numpy(np.int64)


def chunk_rows(schema: Schema) -> int:
    """Rows to a trajectory."""
    row_bytes = sum(column.row_bytes for column in schema)
    return max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // max(row_bytes, 1)))


def physical(rows: torch.Tensor) -> Array:
    """The memory of a tensor in main memory, as the store's bits."""
    if rows.dtype is torch.bfloat16:
        return rows.view(torch.int16).numpy().view(np.uint16)
    array: Array = rows.numpy()
    return array


def split(rows: Mapping[str, torch.Tensor], size: int, n: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first ``size`` rows, ``n`` at a time, not copied."""
    for start in range(0, size, n):
        yield {name: tensor[start : min(start + n, size)] for name, tensor in rows.items()}


def _one_row(schema: Schema) -> dict[str, torch.Tensor]:
    """A row of zeros: a store cannot say "no rows" without one."""
    return {c.path: torch.zeros((1, *c.shape), dtype=getattr(torch, c.dtype)) for c in schema}
