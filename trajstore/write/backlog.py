"""What was appended and is not yet committed, in order.

Invariant: batches are numbered without gaps and leave in that order; the open one has the highest number. A segment is in
one place: in the open batch, in one that waits, or with the episode that streams into it. Not locked: whoever shares it
between threads holds a lock around every call, but for ``note_drained`` and ``stored_since``, which are the committing
thread's own.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from weakref import WeakKeyDictionary

from trajstore.format.manifest import TrajectoryRow
from trajstore.schema import Schema
from trajstore.storage.age import Moment
from trajstore.write.batch import Batch, TrajectoryRef
from trajstore.write.segment import SegmentBuilder

_MAX_QUEUED_BATCHES = 4


class Backlog:
    """The open batch, those that wait to be committed, and segments of episodes that outgrew memory."""

    def __init__(self) -> None:
        self.open = Batch(0)
        self.queue: deque[Batch] = deque()
        self.streaming: list[SegmentBuilder] = []
        self.settled = -1  # number of the last batch that was committed or failed
        self._streamed_since: WeakKeyDictionary[SegmentBuilder, Moment] = WeakKeyDictionary()

    def __bool__(self) -> bool:
        return bool(self.open.rows or self.queue or self.streaming)

    @property
    def trajectories(self) -> int:
        """Appended and not yet committed."""
        return len(self.open.rows) + sum(len(batch.rows) for batch in self.queue)

    @property
    def builders(self) -> Iterator[SegmentBuilder]:
        """All segments that are being written."""
        return itertools.chain(self.streaming, self.open.builders, *(batch.builders for batch in self.queue))

    def has_room(self, nbytes: int) -> bool:
        """Whether fewer bytes than this wait to be encoded, and few batches to be committed."""
        if len(self.queue) >= _MAX_QUEUED_BATCHES:
            return False
        return sum(b.full_bytes + b.encoding_bytes for b in self.builders) < nbytes

    def add(self, ref: TrajectoryRef, row: TrajectoryRow, *, at_s: float) -> bool:
        """A trajectory joins the open batch; whether it is the first there."""
        first = not self.open.rows
        if first:
            self.open.opened_at = at_s
        self.open.rows.append((ref, row))
        return first

    def cut(self, schema: Schema) -> bool:
        """Close the open batch and queue it; False if it is empty."""
        if not self.open.rows:
            return False
        self.open.schema = schema
        self.queue.append(self.open)
        self.open = Batch(self.open.number + 1)
        return True

    def settle(self, batch: Batch) -> None:
        """The first of the queue was committed."""
        self.settled = batch.number
        self.queue.popleft()

    def drop_open(self) -> Batch:
        """The open batch, which is lost; another one takes its number."""
        lost, self.open = self.open, Batch(self.open.number)
        return lost

    def drop(self, batches: list[Batch]) -> None:
        """Batches of the queue that are lost, the first of it among them."""
        for batch in batches:
            if batch in self.queue:
                self.queue.remove(batch)
        self.settled = self.queue[0].number - 1 if self.queue else self.open.number - 1

    def note_drained(self, builder: SegmentBuilder, before: Moment) -> None:
        """A segment was drained: what of it is on its way to the storage now was not so before this moment."""
        if builder.is_streaming:
            self._streamed_since.setdefault(builder, before)

    def stored_since(self, batch: Batch, now: Moment) -> Moment:
        """When the first part of a batch was sent to the storage; ``now`` if none was."""
        since = [self._streamed_since.get(builder, now) for builder in batch.builders]
        return max(since, key=lambda moment: now - moment, default=now)
