"""Background group commit: appends are copied into the open segment at once, and become versions a little later.

Invariant: the trajectories of one batch become visible together, in the order in which they were appended, or not at all;
``flush`` returns only when everything appended before it is durable, and whatever failed in the background is raised at the
next call. One thread commits; encoding runs in all workers; the caller of ``append`` only copies.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from trajstore.errors import ClosedError, ForkedError, SchemaConflictError, StorageError, StorageTimeoutError
from trajstore.format.manifest import SegmentEntry, TrajectoryRow
from trajstore.schema import Column, Schema
from trajstore.storage.age import Moment
from trajstore.storage.changes import Append, Change
from trajstore.storage.commit import History, Version
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.workers import FORKED, Workers
from trajstore.stored import Stored
from trajstore.values import check_trajectories, check_trajectory
from trajstore.write.backlog import Backlog
from trajstore.write.batch import (
    Batch,
    Ending,
    Follower,
    FreshUuids,
    TrajectoryRef,
    WriteOptions,
    checked_metadata,
    endings_of,
    lost_error,
    total_reward,
)
from trajstore.write.blocks import BlockPool
from trajstore.write.segment import SegmentBuilder

_PUMP_INTERVAL_S = 0.01
# Full blocks are handed to the workers in lots of this many bytes: waking threads for each would slow ``append`` down.
_SUBMIT_BYTES = 4 * 1024 * 1024
_LOST_STREAM = "this episode's segment could not be written; begin the episode again"


class Writer:
    """The writing half of a store handle.

    Args:
        filesystem: Where the store is.
        history: Its versions.
        head: The latest version known.
        schema: Columns declared by the caller; merged with the store's.
        options: Knobs.
        workers: Encode pages.
        now: The clock, UTC.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        history: History,
        head: Version,
        *,
        schema: Schema,
        options: WriteOptions,
        workers: Workers,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self.options = options
        self._filesystem = filesystem
        self._history = history
        self._head = head
        self._declared = schema
        self._schema = head.snapshot.schema.extended_by(schema)
        self._workers = workers
        self._now = now
        self._pid = os.getpid()
        self._blocks = BlockPool(options.write_buffer_bytes)
        self._condition = threading.Condition()
        self._storing = threading.Lock()  # held while a batch's objects are stored and committed
        self._backlog = Backlog()
        self._hidden_until = -1  # number of the last batch that holds what the follower cannot see
        self._errors: list[Exception] = []
        self._pump_wanted = False
        self._uuids = FreshUuids()
        self._closing = False
        self._follower: Follower | None = None
        self._thread: threading.Thread | None = None

    @property
    def head(self) -> Version:
        """The latest version known to this handle."""
        return self._head

    @head.setter
    def head(self, version: Version) -> None:
        with self._condition:
            if version.number > self._head.number:
                self._adopt(version)

    @property
    def schema(self) -> Schema:
        """The store's schema with what was appended but is not yet committed."""
        return self._schema

    @property
    def pending(self) -> int:
        """Trajectories appended and not yet committed."""
        with self._condition:
            return self._backlog.trajectories

    def append(
        self, tree: Mapping[str, Any], *, terminated: bool, truncated: bool, metadata: Mapping[str, Any]
    ) -> TrajectoryRef:
        """Copy a whole trajectory into the open segment."""
        with self._begin_change():
            self._wait_for_room()
            trajectory, schema = check_trajectory(tree, self._schema)
            fields, schema = checked_metadata(metadata, schema)
            reward_sum = total_reward(schema, trajectory.columns)
            ending = Ending(trajectory.length, terminated, truncated, reward_sum, fields)
            return self._append(trajectory.columns, schema, [ending])[0]

    def append_many(
        self,
        tree: Mapping[str, Any],
        lengths: Sequence[int],
        *,
        terminated: Sequence[bool],
        truncated: Sequence[bool],
        metadata: Sequence[Mapping[str, Any]],
        shared: Mapping[str, Any],
    ) -> list[TrajectoryRef]:
        """Copy whole trajectories, end to end, into the open segment; they are committed together.

        ``metadata`` is of each, ``shared`` of all.
        """
        with self._begin_change():
            self._wait_for_room()
            columns, schema = check_trajectories(tree, lengths, self._schema)
            endings, schema = endings_of(columns, lengths, terminated, truncated, metadata, shared, schema)
            return self._append(columns, schema, endings)

    def _append(self, columns: Mapping[str, Stored], schema: Schema, endings: Sequence[Ending]) -> list[TrajectoryRef]:
        present = tuple(c.path for c in schema if c.path in columns)
        builder = self._backlog.open.shared.get(present)
        if builder is None:
            builder = self._new_builder([schema[path] for path in present])
            self._backlog.open.shared[present] = builder
            self._backlog.open.builders.append(builder)
        self._schema = schema
        try:
            self._append_rows(builder, columns)
            page_rows = builder.page_rows if self._follower is not None else {}
            added = [self._add_row(builder, ending) for ending in endings]
        except BaseException:  # Ctrl-C, or out of memory: some columns may have rows that others lack
            self._backlog.open.shared.pop(present, None)  # what it holds stays; nothing may follow
            if not builder.trajectories and builder in self._backlog.open.builders:
                self._backlog.open.builders.remove(builder)
                builder.abandon()
            raise
        self._show([row for _, row in added], columns, page_rows)
        self._cut_if_full()
        return [ref for ref, _ in added]

    @property
    def hides(self) -> bool:
        """Whether the follower cannot see all trajectories before the next ``flush``."""
        return self._follower is not None and self._backlog.settled < self._hidden_until

    def declare(self, schema: Schema) -> None:
        """Add columns to the schema; they are committed with the next trajectory."""
        with self._begin_change():
            self._schema = self._schema.extended_by(schema)
            self._declared = self._declared.extended_by(schema)

    def follow(self, follower: Follower) -> None:
        """Tell ``follower`` of every trajectory from now on. What was appended before is committed first."""
        while True:
            self.flush()
            with self._begin_change():
                if not self._backlog.trajectories:
                    follower.advance(self._head)
                    self._follower = follower
                    return

    def open_stream(self, columns: Iterable[Column], schema: Schema) -> SegmentBuilder:
        """A segment of its own for an episode that outgrew memory."""
        with self._begin_change():
            self._schema = self._schema.merged_with(schema)
            builder = self._new_builder(list(columns))
            self._backlog.streaming.append(builder)
            return builder

    def append_to_stream(self, builder: SegmentBuilder, columns: Mapping[str, Stored]) -> None:
        """Rows of such an episode."""
        with self._begin_change():
            self._wait_for_room()
            if builder not in self._backlog.streaming:
                raise ClosedError(_LOST_STREAM)
            try:
                self._append_rows(builder, columns)
            except BaseException:  # as in append
                self._backlog.streaming.remove(builder)
                builder.abandon()
                raise
            self._wake_if_needed()

    def end_stream(
        self,
        builder: SegmentBuilder,
        length: int,
        *,
        terminated: bool,
        truncated: bool,
        reward_sum: float | None,
        metadata: Mapping[str, Any],
    ) -> TrajectoryRef:
        """The end of such an episode: it joins the open batch."""
        with self._begin_change():
            if builder not in self._backlog.streaming:
                raise ClosedError(_LOST_STREAM)
            fields, self._schema = checked_metadata(metadata, self._schema)
            self._backlog.streaming.remove(builder)
            self._backlog.open.builders.append(builder)
            ref, _ = self._add_row(builder, Ending(length, terminated, truncated, reward_sum, fields))
            self._hidden_until = self._backlog.open.number  # its rows are on disk, too many for memory
            self._cut_if_full()
            return ref

    def abandon_stream(self, builder: SegmentBuilder) -> None:
        """Such an episode is given up."""
        with self._condition:
            if builder in self._backlog.streaming:
                self._backlog.streaming.remove(builder)
        builder.abandon()

    def flush(self, timeout_s: float | None = None) -> None:
        """Commit what was appended and wait until it is durable.

        Raises:
            StorageTimeoutError: It takes longer than ``timeout_s``; it goes on in the background.
            TrajstoreError: What failed in the background.
        """
        with self._begin_change():
            self._cut()
            wanted = self._backlog.open.number - 1
            if not self._condition.wait_for(lambda: self._backlog.settled >= wanted, timeout_s):
                raise StorageTimeoutError(
                    f"{self._filesystem.description}: {self.pending} trajectories are not yet durable after {timeout_s} s; "
                    "the commit goes on in the background, call flush() again"
                )
            self._raise_background_errors()

    def commit(self, change: Change, *, since: Moment | None = None) -> Version:
        """Flush, then commit another change; ``since`` as in ``History.commit``."""
        self.flush()
        version = self._history.commit(change, self._head, since=since)
        with self._condition:
            if isinstance(change, Append) and change.instead:
                self._declared = Schema()
            if version.number > self._head.number:
                self._adopt(version)
        return version

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Inside the block no batch is stored or committed; appending goes on."""
        with self._storing:
            yield

    def segments_in_progress(self) -> set[str]:
        """Segments that are being written."""
        with self._condition:
            return {builder.uuid for builder in self._backlog.builders}

    def close(self) -> None:
        """Flush, then end the thread. May be called twice."""
        if os.getpid() != self._pid or self._closing or threading.current_thread() is self._thread:
            return  # in a forked child, or twice, or collected as garbage in the thread that would have to be waited for
        try:
            self.flush()
        finally:
            with self._condition:
                self._closing = True
                self._condition.notify_all()
                streaming, self._backlog.streaming = self._backlog.streaming, []
            if self._thread is not None:
                self._thread.join()
            for builder in streaming:
                builder.abandon()
            if self._backlog.settled >= 0:
                self._history.write_hint(self._head.number)

    # What follows runs under the condition's lock, in the thread of the caller.

    def _begin_change(self) -> threading.Condition:
        if os.getpid() != self._pid:
            raise ForkedError(FORKED)
        if self._closing:
            raise ClosedError("the store is closed; open it again to write")
        if self._errors:
            with self._condition:
                self._raise_background_errors()
        return self._condition

    def _raise_background_errors(self) -> None:
        if self._errors:
            first, self._errors = self._errors[0], []
            raise first

    def _wait_for_room(self) -> None:
        if self._backlog.has_room(self.options.write_buffer_bytes) and not self._errors:
            return
        self._pump_wanted = True
        self._wake()
        self._condition.wait_for(lambda: self._backlog.has_room(self.options.write_buffer_bytes) or self._errors)
        self._raise_background_errors()

    def _new_builder(self, columns: list[Column]) -> SegmentBuilder:
        return SegmentBuilder(
            columns,
            preset=self.options.codec,
            filesystem=self._filesystem,
            workers=self._workers,
            blocks=self._blocks,
        )

    def _append_rows(self, builder: SegmentBuilder, columns: Mapping[str, Stored]) -> None:
        builder.append_rows(columns)
        if builder.full_bytes >= min(_SUBMIT_BYTES, self.options.write_buffer_bytes // 2):
            self._pump_wanted = True

    def _add_row(self, builder: SegmentBuilder, ending: Ending) -> tuple[TrajectoryRef, TrajectoryRow]:
        row = ending.row(builder, uuid=self._uuids.next(), created_at=self._now())
        ref = TrajectoryRef(row.uuid)
        if self._backlog.add(ref, row, at_s=time.monotonic()):
            self._pump_wanted = True  # so that the thread learns of the deadline
        return ref, row

    def _show(self, rows: Sequence[TrajectoryRow], columns: Mapping[str, Stored], page_rows: Mapping[str, int]) -> None:
        """Let the follower see trajectories; if that takes too much memory, it has to wait until they are committed."""
        if self._follower is not None and not self._follower.appended(rows, columns, page_rows, self._schema):
            self._hidden_until = self._backlog.open.number

    def _cut_if_full(self) -> None:
        if sum(b.raw_bytes for b in self._backlog.open.builders) >= self.options.segment_bytes:
            self._cut()
        self._wake_if_needed()

    def _cut(self) -> None:
        """Close the open batch and queue it for commit."""
        if self._backlog.cut(self._schema):
            self._wake()

    def _wake_if_needed(self) -> None:
        """The last thing that a change does: a thread that is woken earlier takes turns with it."""
        if self._pump_wanted:
            self._wake()

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="trajstore-commit", daemon=True)
            self._thread.start()
        self._condition.notify_all()

    # What follows runs in the background thread.

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(self._has_work, self._seconds_to_wake())
                if self._backlog.open.rows and not self._backlog.queue and self._seconds_to_deadline() == 0:
                    self._cut()
                batch = self._backlog.queue[0] if self._backlog.queue else None
                if batch is None and self._closing:
                    return
                self._pump_wanted = False
                builders = [*self._backlog.streaming, *(() if batch else self._backlog.open.builders)]
                for builder in builders:
                    try:
                        builder.encode_arrow()
                    except Exception as error:  # noqa: BLE001 - raised at the next call of the user
                        self._fail_open(builder, error)
            if batch is not None:
                self._settle(batch)
            self._pump(builders)

    def _has_work(self) -> bool:
        return bool(self._backlog.queue) or self._pump_wanted or self._closing

    def _seconds_to_wake(self) -> float | None:
        if any(b.encoding_bytes for b in (*self._backlog.streaming, *self._backlog.open.builders)):
            return _PUMP_INTERVAL_S
        return self._seconds_to_deadline() if self._backlog.open.rows else None

    def _seconds_to_deadline(self) -> float:
        return max(0.0, self._backlog.open.opened_at + self.options.commit_interval_s - time.monotonic())

    def _pump(self, builders: Iterable[SegmentBuilder]) -> None:
        for builder in builders:
            try:
                before = self._history.moment()
                builder.drain()
                self._backlog.note_drained(builder, before)
            except Exception as error:  # noqa: BLE001 - raised at the next call of the user
                with self._condition:
                    self._fail_open(builder, error)
        with self._condition:
            self._condition.notify_all()  # there may be room again

    def _fail_open(self, failed: SegmentBuilder, error: Exception) -> None:
        """A segment under construction cannot be written: its trajectories are lost, and the user is told."""
        lost = 0
        if failed in self._backlog.streaming:
            self._backlog.streaming.remove(failed)
            failed.abandon()
        elif failed not in self._backlog.open.builders:
            return  # its batch was cut meanwhile: committing it will fail, and say what is lost
        else:
            dropped = self._backlog.drop_open()
            lost = len(dropped.rows)
            self._give_up(dropped)
        self._errors.append(lost_error(error, lost))

    def _adopt(self, version: Version) -> None:
        self._head = version
        if self._follower is not None:
            self._follower.advance(version)
        waiting = bool(self._backlog)
        fresh = version.snapshot.schema
        try:
            # What nothing waits for is forgotten: the columns may have been cleared.
            self._schema = fresh.merged_with(self._schema) if waiting else fresh.extended_by(self._declared)
        except SchemaConflictError:
            if not waiting:
                self._schema = fresh
            # Otherwise another writer was first: committing what is open will say so, with what is lost.

    def _settle(self, batch: Batch) -> None:
        try:
            with self._storing:
                version, entries = self._commit(batch)
        except Exception as error:  # noqa: BLE001 - raised at the next call of the user
            with self._condition:
                self._fail(batch, error)
            return
        with self._condition:
            first_id = version.snapshot.manifests[-1].first_id
            for number, (ref, _) in enumerate(batch.rows):
                ref._id = first_id + number
            if self._follower is not None:
                ids = {row.uuid: first_id + number for number, (_, row) in enumerate(batch.rows)}
                self._follower.committed(version, entries, ids)
            if version.number > self._head.number:  # a later one may have been seen meanwhile
                self._adopt(version)
            self._backlog.settle(batch)
            self._condition.notify_all()

    def _commit(self, batch: Batch) -> tuple[Version, list[SegmentEntry]]:
        since = self._backlog.stored_since(batch, self._history.moment())
        entry, manifest = batch.store(self._filesystem, batch.schema or self._schema)
        change = Append(batch.schema or self._schema, (entry,), nbytes=sum(s.nbytes for s in manifest.segments))
        version = self._history.commit(change, self._head, since=since)
        self._history.remember(entry, manifest)
        return version, list(manifest.segments)

    def _fail(self, batch: Batch, error: Exception) -> None:
        failed = [batch]
        if isinstance(error, SchemaConflictError):
            # What was appended since has the same columns: it cannot fit either.
            failed = [*self._backlog.queue, self._backlog.drop_open()]
            try:
                self._head = self._history.latest(self._head.number)
                self._schema = self._head.snapshot.schema
            except StorageError as later:
                error.add_note(f"and the store's schema could not be read again: {later}")
        for one in failed:
            self._give_up(one)
        self._backlog.drop(failed)
        self._errors.append(lost_error(error, sum(len(one.rows) for one in failed)))
        self._condition.notify_all()

    def _give_up(self, batch: Batch) -> None:
        if self._follower is not None:
            self._follower.lost([builder.uuid for builder in batch.builders])
        for builder in batch.builders:
            builder.abandon()
