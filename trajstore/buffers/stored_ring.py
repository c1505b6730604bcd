"""``StoredRing``: a ring of rows in a store, for experience beyond memory.

Invariant: every row ever added has a number; the rows of a trajectory are numbered one after the other from its field
``ring_number``. What the ring holds are the last ``size`` numbers: row ``n`` lies at the index ``(n - origin) % capacity``.
The newest rows, fewer than one trajectory's, are in memory until ``flush`` or until they are enough for one. Trajectories
whose rows are all overwritten are deleted, and their bytes given back, by a commit after the one of the rows that took
their place.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

import trajstore.store
from trajstore.buffers.ring import Ring, check_indices
from trajstore.buffers.ring_store import RingState, RingStore, SavedRing, chunk_rows
from trajstore.buffers.rows import RowFormat
from trajstore.errors import CorruptionError, EmptyBufferError, SchemaConflictError, SelectionError
from trajstore.schema import Schema, flatten
from trajstore.stored import Array
from trajstore.view import View

_FIELDS = ("ring_number", "ring_origin", "ring_capacity")


class StoredRing:
    """Rows of named tensors in a store, the newest ``capacity`` of them. Close it, or use it as a context manager.

    A store that holds such a ring already goes on with it; nobody else may use it meanwhile. The faces' methods are those of
    ``Ring``.

    Args:
        url: The store, made if there is none.
        capacity: Rows. Another one than before keeps the newest rows, renumbered from index 0.
        device: Where ``gather`` puts them.
        storage_options: As for ``trajstore.open``.

    Raises:
        SelectionError: The store holds trajectories that are no ring.

    Examples:
        >>> with StoredRing("memory://docs/ring", 3) as ring:
        ...     for reward in range(5):
        ...         ring.add_one({"reward": torch.tensor(float(reward))})
        ...     ring.size, ring.pointer, ring.gather(torch.tensor([0, 1, 2]))["reward"]
        (3, 2, tensor([3., 4., 2.]))
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._capacity = Ring(capacity).capacity  # checked there
        self._device = torch.empty(0, device=device).device
        self._tail: Ring | None = None  # rows that are not in the store yet, in main memory
        self._firsts: list[int] = []  # number of the first row of each trajectory, ascending
        self._stored = 0  # number behind the last row in the store
        self._start = 0  # number of the oldest row that counts
        self._origin = 0
        self._view: View | None = None
        self._store = trajstore.opening.open(url, "a", storage_options=storage_options)
        try:
            self._go_on()
        except BaseException:
            self._store.close()
            raise

    @property
    def url(self) -> str:
        """Of the store."""
        return self._store.url

    @property
    def capacity(self) -> int:
        """Rows that there is room for."""
        return self._capacity

    @property
    def device(self) -> torch.device:
        """Where gathered rows are put."""
        return self._device

    @property
    def size(self) -> int:
        """Rows that it holds."""
        return min(self._next - self._start, self._capacity)

    @property
    def pointer(self) -> int:
        """Where the next row goes."""
        return (self._next - self._origin) % self._capacity

    @property
    def schema(self) -> Schema:
        """Columns; none before the first rows."""
        return self._tail.schema if self._tail is not None else Schema()

    @property
    def pending(self) -> int:
        """Rows that a crash would lose: in memory, or on their way to the store."""
        waiting = self._store.pending
        on_the_way = self._stored - self._firsts[-waiting] if waiting else 0
        return on_the_way + (len(self._tail) if self._tail is not None else 0)

    def __len__(self) -> int:
        return self.size

    def __enter__(self) -> StoredRing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"StoredRing({self.url!r}, capacity={self._capacity}, size={self.size})"

    def add_one(self, row: Mapping[str, Any]) -> None:
        """Add one row; as ``Ring.add_one``."""
        tail = self._tail
        if tail is None:
            tail = self._begin(RowFormat.of(flatten(row), batched=False))
        if tail.size == tail.capacity:  # now, not when it got full: if the store refuses, the row was not added
            tail.check(row, batched=False)
            self._append_tail()
        tail.add_one(row)

    def add(self, rows: Mapping[str, Any], *, keep_last: bool = False) -> None:
        """Add rows; as ``Ring.add``."""
        most = None if keep_last else self._capacity
        tail = self._tail
        if tail is None:
            tail = self._begin(RowFormat.of(flatten(rows), most=most))
        checked = tail.check(rows, most=most)
        n = len(next(iter(checked.values())))
        done = 0
        while done < n:
            if tail.size == tail.capacity:
                self._append_tail()
            stop = min(n, done + tail.capacity - tail.size)
            tail.add({name: value[done:stop] for name, value in checked.items()})
            done = stop

    def gather(
        self, indices: torch.Tensor, *, names: Iterable[str] | None = None, check: bool = True
    ) -> dict[str, torch.Tensor]:
        """Rows by index; as ``Ring.gather``, on the ring's device."""
        if check:
            check_indices(indices, self.size)
        tail = self._tail
        if tail is None:
            raise EmptyBufferError("rows of a buffer that was never added to; add some first")
        chosen = [self.schema[name].path for name in (tail.columns if names is None else names)]
        wanted = indices.cpu().numpy().astype(np.int64)
        newest = self._next - 1
        numbers = newest - (newest - self._origin - wanted) % self._capacity
        in_tail = numbers >= self._stored
        if in_tail.all():  # also where no rows are wanted
            return self._from_tail(tail, numbers, chosen)
        if not in_tail.any():
            return self._from_store(numbers, chosen)
        older, newer = self._from_store(numbers[~in_tail], chosen), self._from_tail(tail, numbers[in_tail], chosen)
        # Row i of the batch is the next one of its part.
        place = np.empty(len(numbers), np.int64)
        place[~in_tail] = np.arange(len(numbers) - int(in_tail.sum()))
        place[in_tail] = np.arange(len(numbers) - int(in_tail.sum()), len(numbers))
        order = torch.from_numpy(place).to(self._device)
        return {name: torch.cat([older[name], newer[name]]).index_select(0, order) for name in chosen}

    def sample_indices(self, n: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """``(n,)`` int64 indices drawn uniformly, with replacement, in main memory; as ``Ring.sample_indices``."""
        if n < 1:
            raise SelectionError(f"a sample of {n} rows; expected at least 1")
        if not self.size:
            raise EmptyBufferError("a sample of an empty buffer; add rows first")
        return torch.randint(self.size, (n,), generator=generator)

    def clear(self, capacity: int | None = None) -> None:
        """Forget the rows, in the store too.

        Args:
            capacity: From now on.
        """
        if capacity is not None:
            capacity = Ring(capacity).capacity
        self._store.flush()
        ids = self._store.trajectories.ids
        if len(ids):
            self._store.delete(ids, reclaim=True)
        following = self._next
        row_format = None if self._tail is None else RowFormat(self.schema)
        self._capacity = capacity or self._capacity
        self._firsts, self._view = [], None
        self._stored = self._start = self._origin = following
        if row_format is not None:
            self._begin(row_format)

    def flush(self) -> None:
        """Return when all rows are durable."""
        self._append_tail()
        self._store.flush()

    def close(self) -> None:
        """``flush``, and let go of the store. May be called twice."""
        try:
            self._append_tail()
        finally:
            self._store.close()

    def write_to(self, store: RingStore) -> int:
        """Add a save of the rows to another store, beside the older ones; returns its number."""
        if store.url == self.url:
            raise SelectionError(f"the ring lives at {self.url}; save it elsewhere, or call flush()")
        return store.write(RingState(self._capacity, self.size, self.pointer), self.schema, self._chunks)

    def read_from(self, store: RingStore, save: int | None = None) -> None:
        """Take the rows, capacity and pointer of a save in place of what is here.

        Raises:
            SelectionError: The store holds no such save.
            SchemaConflictError: Its columns are not those of this ring.
            CorruptionError: It is damaged. In each case the ring is as it was.
        """
        saved = store.find(save)
        found = RowFormat(saved.schema)
        if self._tail is not None and found != RowFormat(self.schema):
            raise SchemaConflictError(
                f"the ring at {store.url} has the columns {found}; the one at {self.url} has {RowFormat(self.schema)}; load "
                "it into a new one"
            )
        full = saved.state.size == saved.state.capacity
        oldest = saved.state.pointer if full else 0
        for _ in _in_order_of_age(saved, oldest):
            pass  # a damaged save raises here, before anything of this ring is gone
        self.clear(saved.state.capacity)
        if self._tail is None:
            self._begin(found)
        self._origin -= oldest
        for chunk in _in_order_of_age(saved, oldest):
            self.add(chunk, keep_last=True)

    @property
    def _next(self) -> int:
        """Number of the next row."""
        return self._stored + (len(self._tail) if self._tail is not None else 0)

    def _begin(self, row_format: RowFormat) -> Ring:
        rows = min(chunk_rows(row_format.schema), self._capacity)
        self._tail = Ring(rows, columns=row_format.schema)
        return self._tail

    def _append_tail(self) -> None:
        tail = self._tail
        if tail is None or not len(tail):
            return
        number = self._stored
        fields = dict(zip(_FIELDS, (number, self._origin, self._capacity), strict=True))
        self._store.append({name: rows[: len(tail)] for name, rows in tail.columns.items()}, metadata=fields)
        self._firsts.append(number)
        self._stored += len(tail)
        tail.clear()
        self._view = None
        self._start = max(self._start, self._next - self._capacity)
        self._drop_overwritten()

    def _drop_overwritten(self) -> None:
        """Delete trajectories whose rows are all overwritten, once they are worth a version of the store."""
        whole = int(np.searchsorted(self._firsts, self._start, side="right")) - 1  # those before the oldest row's
        if whole < 1 or self._firsts[whole] - self._firsts[0] < self._capacity // 4:
            return
        self._store.flush()
        self._store.delete(self._trajectories().ids[:whole], reclaim=True)
        del self._firsts[:whole]
        self._view = None

    def _trajectories(self) -> View:
        if self._view is None:
            view = self._store.trajectories
            if len(view) < len(self._firsts):
                self._store.flush()  # there was no room to keep the newest in memory until their commit
                view = self._store.trajectories
            if len(view) != len(self._firsts):
                raise CorruptionError(
                    f"the store at {self.url} has {len(view)} trajectories where this ring wrote {len(self._firsts)}; only "
                    "one buffer at a time may write there"
                )
            self._view = view
        return self._view

    def _from_store(self, numbers: Array, names: list[str]) -> dict[str, torch.Tensor]:
        firsts = np.asarray(self._firsts)
        trajectories = np.searchsorted(firsts, numbers, side="right") - 1
        steps = numbers - firsts[trajectories]
        device = None if self._device.type == "cpu" else self._device
        return flatten(self._trajectories().gather(trajectories, steps, columns=names, device=device))

    def _from_tail(self, tail: Ring, numbers: Array, names: list[str]) -> dict[str, torch.Tensor]:
        rows = tail.gather(torch.from_numpy(numbers - self._stored), names=names, check=False)
        return {name: tensor.to(self._device) for name, tensor in rows.items()}

    def _chunks(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, self.size, rows):
            indices = torch.arange(start, min(start + rows, self.size))
            yield self.gather(indices, check=False)

    def _go_on(self) -> None:
        """Take up the ring that is in the store."""
        if len(self._store.schema):
            self._begin(RowFormat(self._store.schema))
        view = self._store.trajectories
        if not len(view):
            return
        table = view.to_pandas()
        if any(name not in table or table[name].isna().any() for name in _FIELDS):
            raise SelectionError(
                f"the store at {self.url} holds trajectories that are no ring's; choose another place (one that a buffer "
                "was saved to is read by load)"
            )
        firsts = table["ring_number"].to_numpy(np.int64)
        stops = firsts + view.lengths
        # What follows the last gap: a commit that failed took its rows with it.
        gaps = np.flatnonzero(firsts[1:] != stops[:-1])
        kept = int(gaps[-1]) + 1 if len(gaps) else 0
        if kept:
            self._store.delete(view.ids[:kept], reclaim=True)
        self._firsts = firsts[kept:].tolist()
        self._stored = int(stops[-1])
        self._start = max(self._firsts[0], self._stored - self._capacity)
        self._origin = int(table["ring_origin"].iloc[-1])
        was = int(table["ring_capacity"].iloc[-1])
        if was != self._capacity or (self.size < self._capacity and self._origin != self._start):
            self._origin = self._start


def _in_order_of_age(saved: SavedRing, oldest: int) -> Iterator[dict[str, torch.Tensor]]:
    yield from saved.chunks(oldest, saved.state.size)
    yield from saved.chunks(0, oldest)
