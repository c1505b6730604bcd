"""``StoredRing``: a ring of rows in a store, for experience beyond memory.

Invariant: every row ever added has a number, in commit order and without gaps. What the ring holds are the last ``size``
numbers: row ``n`` lies at the index ``(n - origin) % capacity``. The newest rows, fewer than one trajectory's, are in memory
until ``flush``, until they are enough for one, or until the ring is collected. Trajectories whose rows are all overwritten
are deleted, and their bytes given back, by a commit after the one of the rows that took their place, and only while the
store holds the trajectories that this ring found or wrote, and no others.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

import trajstore.store
from trajstore.buffers.ring import Ring, check_capacity, check_draw, check_indices, check_same_columns
from trajstore.buffers.ring_store import RingState, RingStore, SavedRing, chunk_rows
from trajstore.buffers.ring_tail import FIELDS, RingTail
from trajstore.buffers.rows import RowFormat, select_rows
from trajstore.buffers.stored_rows import StoredRows
from trajstore.errors import (
    ClosedError,
    CommitError,
    EmptyBufferError,
    IndexRangeError,
    MissingObjectError,
    SelectionError,
    VersionExpiredError,
)
from trajstore.names import flatten
from trajstore.schema import Schema
from trajstore.stored import Array
from trajstore.view import View


class StoredRing:
    """Rows of named tensors in a store, the newest ``capacity`` of them. Close it, or use it as a context manager.

    One that is not closed commits its rows when it is collected, or at the interpreter's end.

    A store that holds such a ring already goes on with it. One ring at a time may write there: one that finds another's rows
    deletes nothing any more and raises ``CommitError`` from then on, at ``flush`` and ``close`` at the latest. The next ring
    made on that store holds the rows of both, in the order of their commits. Methods are those of ``Ring``.

    Args:
        url: The store, made if there is none.
        capacity: Rows. Another one than before keeps the newest rows, renumbered from index 0.
        device: Where ``gather`` puts them.
        storage_options: As for ``trajstore.open``.

    Raises:
        SelectionError: The store holds trajectories that are no ring, or the capacity is no number of rows.
        ClosedError: A method was called after ``close``.
        CommitError: Another ring writes there; see above.

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
        check_capacity(capacity)
        self._device = torch.empty(0, device=device).device
        self._start = 0  # number of the oldest row that counts
        self._view: View | None = None
        self._fault: str | None = None  # why nothing may be deleted or read any more
        self._closed = False
        self._store = trajstore.opening.open(url, "a", storage_options=storage_options)
        self._tail = RingTail(self._store, capacity)
        try:
            self._go_on()
        except BaseException:
            self._store.close()
            raise
        self._finalizer = weakref.finalize(self, self._tail.close_unclosed)

    @property
    def url(self) -> str:
        """Of the store."""
        return self._store.url

    @property
    def capacity(self) -> int:
        """Rows that there is room for."""
        return self._tail.capacity

    @property
    def device(self) -> torch.device:
        """Where gathered rows are put."""
        return self._device

    @property
    def size(self) -> int:
        """Rows that it holds."""
        return min(self._tail.next - self._start, self.capacity)

    @property
    def pointer(self) -> int:
        """Where the next row goes."""
        return (self._tail.next - self._tail.origin) % self.capacity

    @property
    def schema(self) -> Schema:
        """Columns; none before the first rows, and none after ``clear``."""
        return Schema() if self._tail.rows is None else self._tail.rows.schema

    @property
    def pending(self) -> int:
        """Rows that a crash would lose: in memory, or on their way to the store."""
        return self._tail.stored.newest(self._store.pending) + len(self._tail)

    def __len__(self) -> int:
        return self.size

    def __enter__(self) -> StoredRing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"StoredRing({self.url!r}, capacity={self.capacity}, size={self.size})"

    def add_one(self, row: Mapping[str, Any]) -> None:
        """Add one row; as ``Ring.add_one``. A ``CommitError`` comes after the row was taken."""
        self._check_open()
        tail = self._tail.rows
        if tail is None:
            tail = self._begin_with(RowFormat.of(flatten(row), batched=False))
        if tail.size == tail.capacity:  # now, not when it got full: if the store refuses, the row was not added
            tail.check(row, batched=False)
            self._append_tail()
        tail.add_one(row)
        self._check_fault()

    def add(self, rows: Mapping[str, Any], *, keep_last: bool = False) -> None:
        """Add rows; as ``Ring.add``. A ``CommitError`` comes after all of them were taken."""
        self._check_open()
        most = None if keep_last else self.capacity
        tail = self._tail.rows
        if tail is None:
            tail = self._begin_with(RowFormat.of(flatten(rows), most=most))
        checked = tail.check(rows, most=most)
        n = len(next(iter(checked.values())))
        done = 0
        while done < n:
            if tail.size == tail.capacity:
                self._append_tail()
            stop = min(n, done + tail.capacity - tail.size)
            tail.add({name: value[done:stop] for name, value in checked.items()})
            done = stop
        self._check_fault()

    def gather(
        self, indices: torch.Tensor, *, names: Iterable[str] | None = None, check: bool = True
    ) -> dict[str, torch.Tensor]:
        """Rows by index; as ``Ring.gather``, on the ring's device."""
        self._check_open()
        self._check_fault()
        if check:
            check_indices(indices, self.size)
        tail = self._tail.rows
        if tail is None:
            raise EmptyBufferError("rows of a buffer that was never added to; add some first")
        chosen = [self.schema[name].path for name in (tail.columns if names is None else names)]
        wanted = indices.cpu().numpy().astype(np.int64)
        newest = self._tail.next - 1
        numbers = newest - (newest - self._tail.origin - wanted) % self.capacity
        in_tail = numbers >= self._tail.stored.next
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
        return {name: select_rows(torch.cat([older[name], newer[name]]), order) for name in chosen}

    def sample_indices(self, n: int, *, generator: torch.Generator | None = None) -> torch.Tensor:
        """``(n,)`` int64 indices drawn uniformly, with replacement, in main memory; as ``Ring.sample_indices``."""
        self._check_open()
        check_draw(n, self.size)
        return torch.randint(self.size, (n,), generator=generator)

    def clear(self, capacity: int | None = None) -> None:
        """Forget the rows, in the store too: those that this ring found or wrote. What comes next may have other columns.

        Args:
            capacity: From now on.

        Raises:
            CommitError: Another ring wrote there, and nothing was deleted. A ring that is made afterwards knows of those
                rows, and clears them too.
        """
        self._check_open()
        if capacity is not None:
            check_capacity(capacity)
        view = self._settled()
        self._check_fault()
        if len(view):
            self._delete(view.ids)
        tail = self._tail
        tail.capacity = capacity or tail.capacity
        self._start = tail.origin = tail.next
        tail.stored, tail.rows, self._view = StoredRows(stop=tail.next), None, None

    def flush(self) -> None:
        """Return when all rows are durable.

        Raises:
            CommitError: Another ring writes there. The rows are durable all the same.
        """
        self._check_open()
        self._append_tail()
        self._settled()
        self._check_fault()

    def close(self) -> None:
        """``flush``, and let go of the store, whatever ``flush`` raises. May be called twice."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._closed = True
            self._finalizer.detach()
            self._store.close()

    def write_to(self, store: RingStore) -> int:
        """Add a save of the rows to another store, beside the older ones; returns its number."""
        self._check_open()
        if store.url == self.url:
            raise SelectionError(f"the ring lives at {self.url}; save it elsewhere, or call flush()")
        return store.write(RingState(self.capacity, self.size, self.pointer), self.schema, self._chunks)

    def read_from(self, store: RingStore, save: int | None = None) -> None:
        """Take the rows, capacity and pointer of a save in place of what is here.

        Raises:
            SelectionError: The store holds no such save.
            SchemaConflictError: Its columns are not those of this ring.
            CorruptionError: It is damaged.
            CommitError: Another ring writes to this one's store. In each case the ring is as it was.
        """
        self._check_open()
        saved = store.find(save)
        found = RowFormat(saved.schema)
        if self._tail.rows is not None:
            check_same_columns(found, RowFormat(self.schema), store.url)
        full = saved.state.size == saved.state.capacity
        oldest = saved.state.pointer if full else 0
        for _ in _in_order_of_age(saved, oldest):
            pass  # a damaged save raises here, before anything of this ring is gone
        self.clear(saved.state.capacity)
        self._begin_with(found)
        self._tail.origin -= oldest
        for chunk in _in_order_of_age(saved, oldest):
            self.add(chunk, keep_last=True)

    def _begin_with(self, row_format: RowFormat) -> Ring:
        """Begin with the first rows; the columns of others, which ``clear`` has deleted, are deleted too if these differ."""
        former = self._store.schema
        if former.metadata.keys() >= set(FIELDS) and RowFormat(former) != row_format:
            self._settled()
            self._check_fault()
            self._store.clear()
        return self._begin(row_format)

    def _begin(self, row_format: RowFormat) -> Ring:
        rows = min(chunk_rows(row_format.schema), self.capacity)
        self._tail.rows = Ring(rows, columns=row_format.schema)
        return self._tail.rows

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the buffer at {self.url} is closed; make it again to go on with its rows")

    def _check_fault(self) -> None:
        if self._fault is not None:
            raise CommitError(self._fault)

    def _append_tail(self) -> None:
        if not self._tail.append():
            return
        self._view = None
        self._start = max(self._start, self._tail.next - self.capacity)
        self._drop_overwritten()

    def _drop_overwritten(self) -> None:
        """Delete trajectories whose rows are all overwritten, once they are worth a version of the store."""
        whole, rows = self._tail.stored.whole_before(self._start)
        if self._fault is not None or not whole or rows < self.capacity // 4:
            return
        view = self._settled()
        if self._fault is None:
            self._delete(view.ids[:whole])
            self._tail.stored.forget_oldest(whole)
            self._view = None

    def _delete(self, ids: Array) -> None:
        try:
            self._store.delete(ids, reclaim=True)
        except IndexRangeError:
            self._settled()  # another ring deleted some since the last look, and nothing was deleted now
            self._check_fault()
            raise

    def _settled(self) -> View:
        """What the store holds once all that was appended is durable; notes a fault if it is not what this ring knows of."""
        self._store.flush()
        self._store.refresh()
        view = self._store.trajectories
        lost, known = self._tail.stored.lost(), self._tail.stored
        if self._fault is None and lost:
            self._fault = (
                f"some of the last {known.newest(lost)} rows for the store at {self.url} could not be committed, as an "
                "earlier error said; close this buffer, and make it again to go on with those that were"
            )
        elif self._fault is None and not known.are_those_of(view):
            foreign, gone = known.differences(view)
            self._fault = (
                f"another buffer writes to {self.url}: of {len(view)} trajectories there {foreign} are not of this one, and "
                f"{gone} that it knows of were deleted. Nothing was lost, and this buffer deletes nothing any more: close "
                "it and the other one, then make one buffer there, which holds the rows of both; use one at a time"
            )
        return view

    def _trajectories(self) -> View:
        if self._view is None:
            view = self._store.trajectories
            if not self._tail.stored.are_those_of(view):
                view = self._settled()  # perhaps there was no room to keep the newest in memory until their commit
                self._check_fault()
            self._view = view
        return self._view

    def _from_store(self, numbers: Array, names: list[str]) -> dict[str, torch.Tensor]:
        trajectories, steps = self._tail.stored.locate(numbers)
        device = None if self._device.type == "cpu" else self._device
        try:
            rows = self._trajectories().gather(trajectories, steps, columns=names, device=device)
        except (MissingObjectError, VersionExpiredError):
            self._settled()  # another ring may have deleted them
            self._check_fault()
            raise
        return flatten(rows)

    def _from_tail(self, tail: Ring, numbers: Array, names: list[str]) -> dict[str, torch.Tensor]:
        rows = tail.gather(torch.from_numpy(numbers - self._tail.stored.next), names=names, check=False)
        return {name: tensor.to(self._device) for name, tensor in rows.items()}

    def _chunks(self, rows: int) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, self.size, rows):
            indices = torch.arange(start, min(start + rows, self.size))
            yield self.gather(indices, check=False)

    def _go_on(self) -> None:
        """Take up the ring that is in the store: all of its trajectories, whatever numbers they were given."""
        schema, view = self._store.schema, self._store.trajectories
        cleared = not len(view) and schema.metadata.keys() >= set(FIELDS)
        if len(schema) and not cleared:
            self._begin(RowFormat(schema))
        if not len(view):
            return
        table = view.to_pandas()
        if any(name not in table or table[name].isna().any() for name in FIELDS):
            raise SelectionError(
                f"the store at {self.url} holds trajectories that are no ring's; choose another place (one that a buffer "
                "was saved to is read by load)"
            )
        told, lengths = table["ring_number"].to_numpy(np.int64), view.lengths
        self._tail.stored = stored = StoredRows(view.ids, lengths, int(told[-1] + lengths[-1]))
        firsts = stored.firsts
        self._start = max(int(firsts[0]), stored.next - self.capacity)
        self._tail.origin = int(table["ring_origin"].iloc[-1])
        counts = firsts + lengths > self._start
        if (
            (told != firsts)[counts].any()  # two rings wrote at once, or the rows of a commit that failed are missing
            or int(table["ring_capacity"].iloc[-1]) != self.capacity
            or (self.size < self.capacity and self._tail.origin != self._start)
        ):
            self._tail.origin = self._start


def _in_order_of_age(saved: SavedRing, oldest: int) -> Iterator[dict[str, torch.Tensor]]:
    yield from saved.chunks(oldest, saved.state.size)
    yield from saved.chunks(0, oldest)
