"""Derived columns: values computed from the columns of each trajectory, stored as layers beside their segments.

Invariant: a layer has the rows of its segment, in the same places, and is durable before a manifest names it; nothing that
is there is touched. Whatever ends the work leaves a store in which whole segments have the column or lack it, and the next
run computes those that lack it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.edit.inputs import Inputs, Part, parts_of
from trajstore.edit.rewrite import rewrite
from trajstore.errors import ColumnTypeError, CommitError, LengthError, SchemaConflictError, SchemaError, SelectionError
from trajstore.format.manifest import Manifest, SegmentEntry
from trajstore.format.snapshot import ManifestEntry
from trajstore.names import check_derived_name
from trajstore.progress import byte_progress
from trajstore.read.access import StoreAccess
from trajstore.read.table import TrajectoryTable
from trajstore.schema import Column, Schema
from trajstore.storage.age import Moment
from trajstore.storage.commit import History, Version
from trajstore.storage.workers import Workers
from trajstore.stored import Array, Stored
from trajstore.values import check_rows, rows_of
from trajstore.write.blocks import BlockPool
from trajstore.write.segment import SegmentBuilder

Derive = Callable[[dict[str, Any]], Any]

COMMIT_INTERVAL_S = 30.0
_MOST_THREADS = 4
_ENCODING_BYTES = 32 << 20  # of a thread's results that wait to be encoded
_MOST_ROUNDS = 20
_COMMIT_SHARE = 10  # committing takes a tenth of the time at most


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer that is stored.

    Attributes:
        entry: Of it.
        starts: ``(n,)`` int64, first rows of the trajectories that it has values of; zeros are between them.
    """

    entry: SegmentEntry
    starts: Array


@dataclass(frozen=True, eq=False)
class _Lot:
    """Layers that are stored and not yet committed.

    Attributes:
        since: Before the first of their objects.
        layers: By uuid of their segment.
    """

    since: Moment
    layers: Mapping[str, _Layer]


def add_column(
    access: StoreAccess,
    history: History,
    head: Version,
    name: str | Column,
    function: Derive,
    *,
    columns: Sequence[str] | None = None,
    replace: bool = False,
    threads: int | None = None,
    preset: str | None = None,
    workers: Workers,
    commit_interval_s: float | None = None,
    progress: bool | None = None,
) -> Version:
    """Give trajectories that lack it a column computed from others; ``Store.add_column`` says more.

    Args:
        access: The reading half of the store.
        history: Its versions.
        head: The latest version known.
        name: Of the column, or what it is.
        function: From columns of a trajectory to rows of the new one.
        columns: That the function gets; by default all of fixed shape.
        replace: Also where the column is there: all of it is then replaced by one commit.
        threads: Segments at a time.
        preset: Of codecs.
        workers: Encode pages.
        commit_interval_s: What is finished is committed so often; by default ``COMMIT_INTERVAL_S``.
        progress: Show a bar on standard error; by default in a terminal, if there is much to read.

    Returns:
        The version; ``head`` if no trajectory lacks the column.

    Raises:
        SchemaError: The column cannot be there, or a result is not what the first one was; names the trajectory.
        SelectionError: There are no trajectories, or some lack a column that was named.
        CommitError: Others compacted or restored trajectories meanwhile that have values which were to be replaced; or they
            did so again and again.
    """
    path = name if isinstance(name, str) else name.path
    check_derived_name(path)
    known = head.snapshot.next_id
    for _ in range(_MOST_ROUNDS):
        head = _add_once(
            access,
            history,
            head,
            name,
            function,
            columns=columns,
            replace=replace,
            threads=threads,
            preset=preset,
            workers=workers,
            commit_interval_s=commit_interval_s,
            progress=progress,
        )
        head = history.latest(head.number)
        lacking = _lacking(access.table(history, head), path, known)
        if not lacking:  # what others compacted or restored meanwhile is computed in another round
            return head
    raise CommitError(
        f"{lacking} trajectories of {access.filesystem.description} still lack {path!r}: others compacted or restored them "
        f"{_MOST_ROUNDS} times meanwhile; call add_column again when they are done"
    )


def _lacking(table: TrajectoryTable, path: str, known: int) -> int:
    """How many trajectories with ids below ``known`` lack a column."""
    old = table.id < known
    if path not in table.schema:
        return int(old.sum())
    presence = table.column_presence.get(path)
    return 0 if presence is None else int((old & ~presence[table.segment]).sum())


def _add_once(
    access: StoreAccess,
    history: History,
    head: Version,
    name: str | Column,
    function: Derive,
    *,
    columns: Sequence[str] | None,
    replace: bool,
    threads: int | None,
    preset: str | None,
    workers: Workers,
    commit_interval_s: float | None,
    progress: bool | None,
) -> Version:
    """Give trajectories of a version that lack it a column."""
    table = access.table(history, head)
    if not len(table):
        raise SelectionError("the store holds no trajectories to compute a column from; append some first")
    path = name if isinstance(name, str) else name.path
    column = _known_column(name, head.snapshot.schema)
    parts = parts_of(table, None if replace else path)
    if not parts:
        return head
    inputs = Inputs(table, access, path, columns, parts)
    job = _Job(inputs, function, path, access, BlockPool(_ENCODING_BYTES), workers, preset)
    job.settle_column(column, head.snapshot.schema, parts[0])
    total = sum(inputs.nbytes(part) for part in parts)
    began = history.moment()
    interval_s = COMMIT_INTERVAL_S if commit_interval_s is None else commit_interval_s
    with byte_progress(f"add_column {path}", total, shown=progress) as advance:
        lots = job.run(parts, threads or min(os.cpu_count() or 1, _MOST_THREADS), advance, interval_s, history.moment)
        with contextlib.closing(lots):
            for lot in lots:
                if not replace:
                    head = _commit(access, history, head, job.column, lot, replace=False)
        if replace:  # at the end, that nobody sees old values beside new ones
            whole = _Lot(began, job.layers)
            head = _commit(access, history, head, job.column, whole, replace=True)
    return head


def _commit(
    access: StoreAccess,
    history: History,
    head: Version,
    column: Column,
    lot: _Lot,
    *,
    replace: bool,
) -> Version:
    """A version in which segments have these layers.

    A segment of which trajectories were restored meanwhile that the layer has no values of lacks the column.
    """
    layers = lot.layers

    def layered(segment: SegmentEntry, starts: Array) -> SegmentEntry:
        has = column.path in segment.all_columns
        if has and not replace:
            return segment
        layer = layers.get(segment.uuid)
        if layer is not None and np.isin(starts, layer.starts).all():
            return segment.with_layer(layer.entry)
        if has:
            raise CommitError(
                f"others compacted, restored or computed trajectories of {access.filesystem.description} meanwhile, which "
                f"have old values of {column.path!r}, so none was replaced; do it again"
            )
        return segment

    def change(_: ManifestEntry, manifest: Manifest) -> Manifest | None:
        numbers, starts = (manifest.table[name].to_numpy() for name in ("segment", "start"))
        order = np.argsort(numbers, kind="stable")
        bounds = np.searchsorted(numbers[order], np.arange(len(manifest.segments) + 1)).tolist()
        segments = tuple(
            layered(segment, starts[order[bounds[n] : bounds[n + 1]]]) for n, segment in enumerate(manifest.segments)
        )
        return None if segments == manifest.segments else Manifest(manifest.table, segments)

    return rewrite(
        access.filesystem,
        history,
        head,
        change,
        operation="add-column",
        nbytes=sum(layer.entry.nbytes for layer in layers.values()),
        columns=Schema((column,)),
        affected=None if replace else layers.keys(),
        since=lot.since,
    )


def _known_column(name: str | Column, schema: Schema) -> Column | None:
    """What is known of the column before anything is computed."""
    path = name if isinstance(name, str) else name.path
    there = schema.get(path)
    if there is not None and there.presence != "derived":
        raise SchemaConflictError(
            f"column {path!r} is appended with the trajectories ({there.presence}); give the derived one a name of its own"
        )
    return there if isinstance(name, str) else dataclasses.replace(name, presence="derived")


class _Job:
    """Computes the layers of segments, several at a time.

    Args:
        inputs: What the function gets.
        function: Of the user.
        path: Of the new column.
        access: Where layers go.
        blocks: Memory for pages.
        workers: Encode pages.
        preset: Of codecs.
    """

    def __init__(
        self,
        inputs: Inputs,
        function: Derive,
        path: str,
        access: StoreAccess,
        blocks: BlockPool,
        workers: Workers,
        preset: str | None,
    ) -> None:
        self.layers: dict[str, _Layer] = {}  # finished ones, by uuid of their segment
        self._inputs = inputs
        self._function = function
        self._path = path
        self._filesystem = access.filesystem
        self._blocks = blocks
        self._workers = workers
        self._preset = preset
        self._column: Column | None = None
        self._first: tuple[int, Stored] | None = (
            None  # row of the table, and the result by which the column was settled
        )
        self._stopped = threading.Event()

    @property
    def column(self) -> Column:
        """The new column."""
        assert self._column is not None
        return self._column

    def settle_column(self, column: Column | None, schema: Schema, part: Part) -> None:
        """Find out what the column is by the first trajectory, and whether the store can have it."""
        if column is None:
            row = int(part.rows[0])
            result = self._call(next(self._inputs.read(part.entry, part.rows[:1])), row)
            length = int(self._inputs.table.length[row])
            with _TrajectoryNamed(self._inputs.table, row):
                rows = rows_of(self._path, result)
                if len(rows) not in (length, length + 1):
                    raise _wrong_length(self._path, len(rows), f"{length} or {length + 1}")
                column = Column(
                    path=self._path,
                    dtype=rows.dtype,
                    shape=rows.shape,
                    ragged=rows.ragged,
                    extra=1 if len(rows) > length else 0,
                    presence="derived",
                )
            self._first = row, rows.data
        schema.extended_by(Schema((column,)))
        self._column = column

    def run(
        self,
        parts: Sequence[Part],
        threads: int,
        advance: Callable[[int], None],
        interval_s: float,
        now: Callable[[], Moment],
    ) -> Generator[_Lot]:
        """Compute all layers; now and then, and at the end, those that were finished since."""
        pool = Workers(threads, name="trajstore-derive")
        waiting: deque[tuple[Part, Moment, Future[SegmentEntry]]] = deque()
        todo = iter(parts)
        finished: dict[str, _Layer] = {}
        since = now()
        due = time.monotonic() + interval_s
        try:
            while True:
                while len(waiting) < 2 * threads and (part := next(todo, None)) is not None:
                    waiting.append((part, now(), pool.submit(self._layer, part, advance)))
                if waiting:
                    part, begun, future = waiting.popleft()
                    since = since if finished else begun
                    layer = _Layer(future.result(), self._inputs.table.start[part.rows])
                    finished[part.entry.uuid] = self.layers[part.entry.uuid] = layer
                if finished and (not waiting or time.monotonic() >= due):
                    began = time.monotonic()
                    yield _Lot(since, finished)
                    finished = {}
                    due = time.monotonic() + max(interval_s, _COMMIT_SHARE * (time.monotonic() - began))
                if not waiting:
                    return
        finally:
            self._stopped.set()
            pool.close()

    def _layer(self, part: Part, advance: Callable[[int], None]) -> SegmentEntry:
        """Compute and store the layer of one segment."""
        table, row_bytes = self._inputs.table, self._inputs.row_bytes(part.entry)
        builder = SegmentBuilder(
            [self.column],
            preset=self._preset,
            filesystem=self._filesystem,
            workers=self._workers,
            blocks=self._blocks,
        )
        try:
            for rows in self._inputs.chunks(part):
                for row, columns in zip(rows.tolist(), self._inputs.read(part.entry, rows), strict=True):
                    self._check_running()
                    _skip_to(builder, int(table.start[row]), int(table.ordinal[row]))
                    builder.append_rows({self._path: self._result(row, columns)})
                    builder.end_trajectory(int(table.length[row]))
                builder.encode_arrow()
                builder.drain(wait=builder.full_bytes + builder.encoding_bytes > _ENCODING_BYTES)
                advance(int(table.length[rows].sum()) * row_bytes)
            _skip_to(builder, part.entry.steps, part.entry.trajectories)
            builder.close_pages()
            finished = builder.finish()
            self._filesystem.store(finished.objects, finished.streams)
        except BaseException:
            builder.abandon()
            raise
        return finished.entry

    def _check_running(self) -> None:
        if self._stopped.is_set():
            raise InterruptedError("another segment failed, and nobody waits for this one")

    def _result(self, row: int, columns: dict[str, Any]) -> Stored:
        """Rows of the new column, checked."""
        if self._first is not None and self._first[0] == row:
            return self._first[1]
        result = self._call(columns, row)
        with _TrajectoryNamed(self._inputs.table, row):
            rows = rows_of(self._path, result, self.column)
            try:
                data = check_rows(self.column, rows)
            except ColumnTypeError as error:
                raise ColumnTypeError(
                    f"column {self._path!r} is {self.column.dtype}, found {rows.dtype}; have the function return "
                    f"{self.column.dtype}, or give the column another name"
                ) from error
            expected = int(self._inputs.table.length[row]) + self.column.extra
            if len(data) != expected:
                raise _wrong_length(self._path, len(data), str(expected))
        return data

    def _call(self, columns: dict[str, Any], row: int) -> Any:
        try:
            return self._function(columns)
        except Exception as error:
            error.add_note(f"This was column {self._path!r} of trajectory {int(self._inputs.table.id[row])}.")
            raise


def _skip_to(builder: SegmentBuilder, steps: int, trajectories: int) -> None:
    """Leave out rows of trajectories that no version shows."""
    if steps > builder.steps or trajectories > builder.trajectories:
        builder.skip(steps - builder.steps, trajectories - builder.trajectories)


def _wrong_length(path: str, found: int, expected: str) -> LengthError:
    return LengthError(f"column {path!r} has {found} rows, expected {expected}: one for each step of the trajectory")


class _TrajectoryNamed:
    """Errors of the block name a trajectory."""

    def __init__(self, table: TrajectoryTable, row: int) -> None:
        self._table = table
        self._row = row

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, SchemaError):
            error.args = (f"trajectory {int(self._table.id[self._row])}: {error}",)
