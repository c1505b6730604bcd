"""``Ring``: an arena of preallocated tensors with a write pointer, shared by the replay buffers of this package.

Invariant: the ring holds the last ``size`` rows that were added; until it is full they lie at ``0 .. size - 1`` in the order
of addition, afterwards the oldest lies at ``pointer``. Rows are checked before the first one is written: a ring that refuses
rows is as it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from trajstore.buffers.ring_store import RingState, RingStore, split
from trajstore.buffers.rows import RowFormat, select_rows
from trajstore.errors import (
    EmptyBufferError,
    IndexRangeError,
    LengthError,
    SchemaConflictError,
    SchemaError,
    SelectionError,
    UnknownColumnError,
)
from trajstore.schema import Column, Schema


class Ring:
    """Rows of named tensors, the newest ``capacity`` of them.

    Args:
        capacity: Rows.
        device: Where they are kept.
        columns: Their names, dtypes and shapes; by default those of the first rows that are added.

    Examples:
        >>> ring = Ring(3)
        >>> ring.add({"obs": torch.arange(4.0).view(2, 2), "reward": torch.tensor([0.5, 1.5])})
        >>> ring.add({"obs": torch.arange(4.0, 8.0).view(2, 2), "reward": torch.tensor([2.5, 3.5])})
        >>> ring.size, ring.pointer, ring.gather(torch.tensor([0, 2]))["reward"]
        (3, 1, tensor([3.5000, 2.5000]))
    """

    def __init__(
        self, capacity: int, *, device: torch.device | str = "cpu", columns: Iterable[Column] | None = None
    ) -> None:
        self._capacity = check_capacity(capacity)
        self._device = torch.empty(0, device=device).device  # "cuda" is cuda:0, as its tensors will say
        self._size = 0
        self._pointer = 0
        self._format = RowFormat()
        self._columns: dict[str, torch.Tensor] = {}
        if columns is not None:
            self.declare(columns)

    @property
    def capacity(self) -> int:
        """Rows that there is room for."""
        return self._capacity

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self._device

    @property
    def size(self) -> int:
        """Rows that it holds."""
        return self._size

    @property
    def pointer(self) -> int:
        """Where the next row goes."""
        return self._pointer

    @property
    def schema(self) -> Schema:
        """Columns; none before the first rows, unless declared."""
        return self._format.schema

    @property
    def columns(self) -> Mapping[str, torch.Tensor]:
        """The arena itself: ``[capacity, *shape]`` by flat name. Only the rows that were added mean anything."""
        return self._columns

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return (
            f"Ring(capacity={self._capacity}, size={self._size}, device={self._device}, columns={list(self._columns)})"
        )

    def declare(self, columns: Iterable[Column]) -> None:
        """Set the columns, and make room for their rows.

        Raises:
            SchemaConflictError: The ring has columns already.
            SchemaError: Columns that no tensor holds.
        """
        if self._columns:
            raise SchemaConflictError(
                f"the ring has the columns {', '.join(map(repr, self._columns))} already; make a new one"
            )
        self._set_format(RowFormat(columns))

    def add_one(self, row: Mapping[str, Any]) -> None:
        """Add one row.

        Args:
            row: Tensors ``[*shape]`` by name, nested or flat (``"obs/state"``), all on one device.

        Raises:
            SchemaError: One of its subclasses, naming the column; the ring is as it was.
        """
        pointer = self._pointer
        for name, value in self.check(row, batched=False).items():
            self._columns[name][pointer] = value
        self._advance(1)

    def add(self, rows: Mapping[str, Any], *, keep_last: bool = False) -> None:
        """Add rows, over the oldest once the ring is full.

        Args:
            rows: Tensors ``[n, *shape]`` by name, nested or flat (``"obs/state"``), all on one device; copied.
            keep_last: Of more than ``capacity`` rows, take the last ones.

        Raises:
            BufferFullError: More rows than ``capacity``, without ``keep_last``.
            SchemaError: One of its subclasses, naming the column. Either way the ring is as it was.
        """
        checked = self.check(rows, most=None if keep_last else self._capacity)
        n = len(next(iter(checked.values())))
        skipped = max(n - self._capacity, 0)
        start = (self._pointer + skipped) % self._capacity
        kept = n - skipped
        before_end = min(kept, self._capacity - start)
        for name, value in checked.items():
            arena = self._columns[name]
            arena[start : start + before_end] = value[skipped : skipped + before_end]
            if before_end < kept:
                arena[: kept - before_end] = value[skipped + before_end :]
        self._advance(n)

    def check(
        self, rows: Mapping[str, Any], *, batched: bool = True, most: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Hold rows against the columns, which they define if there are none. Nothing is added.

        Args:
            rows: As for ``add``, or for ``add_one`` if not ``batched``.
            batched: Whether they have a first dimension.
            most: More rows than this are refused.

        Returns:
            Their tensors by flat name, in the order of the columns.

        Raises:
            BufferFullError: More than ``most``.
            SchemaError: One of its subclasses, naming the column.
        """
        flat = self._format.flat(rows)
        if not self._columns:
            self._set_format(RowFormat.of(flat, batched=batched, most=most))
        return self._format.check(flat, batched=batched, most=most)

    def gather(
        self,
        indices: torch.Tensor,
        *,
        names: Iterable[str] | None = None,
        check: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Rows by where they lie, copied.

        Args:
            indices: ``(n,)`` int64 or int32 positions, ``0 .. size - 1``, on the ring's device.
            names: Columns, flat; all by default.
            check: Hold the positions against ``size``; leave it out where they were drawn below it.

        Returns:
            Flat mapping of tensors ``[n, *shape]``.

        Raises:
            IndexRangeError: A position outside ``0 .. size - 1``.
            UnknownColumnError: No such column.
        """
        if check:
            check_indices(indices, self._size)
        chosen = self._columns if names is None else self._named(names)
        return {name: select_rows(arena, indices) for name, arena in chosen.items()}

    def sample_indices(self, n: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """``(n,)`` int64 positions drawn uniformly, with replacement, on the ring's device.

        Raises:
            EmptyBufferError: The ring is empty.
            SelectionError: ``n`` is below 1.
        """
        check_draw(n, self._size)
        return torch.randint(self._size, (n,), generator=generator, device=self._device)

    def clear(self) -> None:
        """Forget the rows. Columns and memory stay."""
        self._size = 0
        self._pointer = 0

    def state_dict(self) -> dict[str, Any]:
        """``capacity``, ``size``, ``pointer`` and ``columns``: copies of the rows in storage order, by flat name."""
        return {
            "capacity": self._capacity,
            "size": self._size,
            "pointer": self._pointer,
            "columns": {name: arena[: self._size].clone() for name, arena in self._columns.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the rows of another ring, from its ``state_dict``.

        Raises:
            SelectionError: Its capacity differs, or its numbers contradict each other.
            SchemaError: Its columns differ. Either way this ring is as it was.
        """
        missing = [key for key in ("capacity", "size", "pointer", "columns") if key not in state]
        if missing:
            raise SelectionError(f"a ring's state without {', '.join(map(repr, missing))}; pass what state_dict() gave")
        size, pointer, columns = int(state["size"]), int(state["pointer"]), dict(state["columns"])
        self._check_state(int(state["capacity"]), size, pointer)
        if size:
            checked = self.check(columns)
            name, rows = next(iter(checked.items()))
            if len(rows) != size:
                raise LengthError(f"column {name!r} has {len(rows)} rows in a state of size {size}")
            for name, rows in checked.items():
                self._columns[name][:size] = rows
        self._size, self._pointer = size, pointer

    def save(self, url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> int:
        """Save the rows as a store, or as the next state in the store of an earlier save. Durable when it returns.

        A crash on the way leaves the state saved before.

        Args:
            url: Where; whatever ``trajstore.open`` takes.
            storage_options: As for ``trajstore.open``.

        Returns:
            The number of the save, 1 for the first.

        Raises:
            EmptyBufferError: Nothing was ever added, so there are no columns to save.
            SchemaConflictError: The store there holds other columns.
        """
        with RingStore(url, "a", storage_options=storage_options) as store:
            number = self.write_to(store)
            store.prune(number)
        return number

    def load(
        self,
        url: str | os.PathLike[str],
        *,
        save: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Take the rows that were saved at a URL. While they are read, both old and new rows are in memory.

        Args:
            url: Where.
            save: Number of the save; by default the last one that is complete.
            storage_options: As for ``trajstore.open``.

        Raises:
            StoreNotFoundError: No store there.
            SelectionError: The store holds no such save, or its ring had another capacity.
            SchemaConflictError: The columns are others than those of this ring. In each case the ring is as it was.
        """
        with RingStore(url, storage_options=storage_options) as store:
            self.read_from(store, save)

    def write_to(self, store: RingStore) -> int:
        """Add a save to a store, beside the older ones; returns its number."""
        state = RingState(self._capacity, self._size, self._pointer)
        return store.write(state, self.schema, lambda rows: split(self._columns, self._size, rows))

    def read_from(self, store: RingStore, save: int | None = None) -> None:
        """``load``, from a store that is open."""
        saved = store.find(save)
        state = saved.state
        self._check_state(state.capacity, state.size, state.pointer)
        fresh = Ring(self._capacity, device=self._device, columns=saved.schema)
        if self._columns:
            check_same_columns(fresh._format, self._format, store.url)
        for name, rows in fresh._columns.items():
            saved.read_into(name, rows[: state.size])
        self._format, self._columns = fresh._format, fresh._columns
        self._size, self._pointer = state.size, state.pointer

    def _set_format(self, row_format: RowFormat) -> None:
        if not len(row_format):
            raise SchemaError("a ring needs at least one column")
        self._columns = row_format.arena(self._capacity, self._device)
        self._format = row_format

    def _advance(self, n: int) -> None:
        self._pointer = (self._pointer + n) % self._capacity
        self._size = min(self._size + n, self._capacity)

    def _check_state(self, capacity: int, size: int, pointer: int) -> None:
        if capacity != self._capacity:
            raise SelectionError(
                f"the saved ring has a capacity of {capacity}, this one of {self._capacity}; make one of {capacity} rows"
            )
        if not 0 <= size <= capacity or pointer != (size if size < capacity else pointer % capacity):
            raise SelectionError(f"a ring of capacity {capacity} cannot have size {size} and pointer {pointer}")

    def _named(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        try:
            return {name: self._columns[name] for name in names}
        except KeyError as error:
            known = ", ".join(map(repr, self._columns)) or "no columns yet"
            raise UnknownColumnError(f"no column {error.args[0]!r}; there are {known}") from None


# What a ring in a store checks, too.


def check_capacity(capacity: int) -> int:
    """``capacity``, if it is a whole number of rows."""
    if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
        raise SelectionError(f"capacity={capacity!r}, expected a whole number of rows, at least 1")
    return capacity


def check_draw(n: int, size: int) -> None:
    """Raise unless ``n`` rows can be drawn, with replacement, from a ring that holds ``size``."""
    if n < 1:
        raise SelectionError(f"a sample of {n} rows; expected at least 1")
    check_not_empty(size)


def check_not_empty(size: int) -> None:
    """Raise ``EmptyBufferError`` if ``size`` is 0."""
    if not size:
        raise EmptyBufferError("a sample of an empty buffer; add to it first")


def check_same_columns(found: RowFormat, own: RowFormat, url: str) -> None:
    """Raise ``SchemaConflictError`` unless the rows of a ring saved at ``url`` look like a ring's own."""
    if found != own:
        raise SchemaConflictError(
            f"the ring at {url} has the columns {found}; this one has {own}; load it into a new ring"
        )


def check_indices(indices: torch.Tensor, size: int) -> None:
    """Raise ``IndexRangeError`` unless all of ``indices`` ``(n,)`` lie in ``0 .. size - 1``."""
    if indices.ndim != 1 or indices.dtype not in (torch.int64, torch.int32):
        raise SelectionError(
            f"indices of {indices.dtype} and shape {list(indices.shape)}; expected int64 and one dimension"
        )
    if len(indices):
        low, high = (int(bound) for bound in torch.aminmax(indices))
        if low < 0 or high >= size:
            raise IndexRangeError(f"indices {low} .. {high} of a buffer that holds {size} rows: 0 .. {size - 1}")
