"""``RingTail``: the newest rows of a ring in a store, in memory until they are enough for a trajectory.

Invariant: rows reach the store in the order in which they were added, each once, and every trajectory says the number of its
first row and what the ring was like. ``close`` brings all of them there; what nobody closed is closed when its ring is
collected, or at the interpreter's end.
"""

from __future__ import annotations

import os
import threading

from trajstore.buffers.ring import Ring
from trajstore.buffers.stored_rows import StoredRows
from trajstore.store import Store

FIELDS = ("ring_number", "ring_origin", "ring_capacity")


class RingTail:
    """What has to be written if nobody closes the ring. It knows nothing of the ring itself, which can be collected.

    Args:
        store: Where the rows go.
        capacity: Of the ring.

    Attributes:
        store: As given.
        capacity: As given; it may change while there are no rows.
        origin: Number of the row at index 0.
        stored: The rows that went to the store.
        rows: The others, in main memory; None while there are no columns.
    """

    def __init__(self, store: Store, capacity: int) -> None:
        self.store = store
        self.capacity = capacity
        self.origin = 0
        self.stored = StoredRows()
        self.rows: Ring | None = None
        self._pid = os.getpid()

    def __len__(self) -> int:
        return 0 if self.rows is None else len(self.rows)

    @property
    def next(self) -> int:
        """Number of the next row."""
        return self.stored.next + len(self)

    def append(self) -> bool:
        """Append the rows to the store as a trajectory; whether there were any."""
        tail = self.rows
        if tail is None or not len(tail):
            return False
        if not len(self.store.schema):
            self.store.declare(tail.schema)  # whatever their names are
        fields = dict(zip(FIELDS, (self.stored.next, self.origin, self.capacity), strict=True))
        ref = self.store.append({name: rows[: len(tail)] for name, rows in tail.columns.items()}, metadata=fields)
        self.stored.append(ref, len(tail))
        tail.clear()
        return True

    def close(self) -> None:
        """Commit all rows, and let go of the store, whatever happens."""
        try:
            self.append()
        finally:
            self.store.close()

    def close_unclosed(self) -> None:
        """``close``, for a ring that is being collected, in whichever thread that happens."""
        if os.getpid() != self._pid:
            return  # a forked child's copy: the rows are its parent's to write
        if threading.current_thread() is threading.main_thread():
            self.close()
        else:  # this may be the thread of the store that closing waits for
            threading.Thread(target=self.close, name="trajstore-ring-close").start()
