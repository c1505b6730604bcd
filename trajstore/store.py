"""``Store``: what users hold. It ties the history, the writer and the reader of one store together.

Invariant: a handle shows one version at a time; it moves on with its own commits and with ``refresh``.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from trajstore.editing import Edited
from trajstore.errors import (
    ClosedError,
    LengthError,
    ReadOnlyError,
    SchemaError,
)
from trajstore.follows import Follows
from trajstore.read.access import StoreAccess
from trajstore.read.live import LiveTrajectories
from trajstore.read.table import TrajectoryTable
from trajstore.read.usage import StoreUsage, measure_usage
from trajstore.schema import Column, Schema
from trajstore.storage.changes import Append
from trajstore.storage.commit import History, Version
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.workers import Workers
from trajstore.stored import Array
from trajstore.view import View
from trajstore.write.batch import TrajectoryRef, WriteOptions
from trajstore.write.episode import Episode
from trajstore.write.writer import Writer

Mode = Literal["r", "a", "x"]
_JOIN_S = 5.0  # closing waits no longer for a reader whose storage hangs


class Store(Edited):
    """A store of trajectories, made by ``trajstore.open``. Close it, or use it as a context manager.

    Args:
        filesystem: Where it is.
        history: Its versions.
        head: The version shown.
        store_uuid: Its identity.
        mode: See ``open``.
        declared: Columns given by the user.
        options: Knobs of writing.
        workers: Encode and decode pages.
        access: The reading half.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        history: History,
        head: Version,
        store_uuid: str,
        mode: Mode,
        declared: Schema,
        options: WriteOptions,
        workers: Workers,
        access: StoreAccess,
    ) -> None:
        self._filesystem = filesystem
        self._history = history
        self._mode = mode
        self._workers = workers
        self._access = access
        self._turns = access.turns
        self._table: TrajectoryTable | None = None
        self._live: LiveTrajectories | None = None
        self._closed = False
        self.uuid = store_uuid
        self._head = head
        self._writer: Writer | None = None
        if mode != "r":
            self._writer = Writer(filesystem, history, head, schema=declared, options=options, workers=self._workers)
            # Flushes what a user forgot to close, at the latest when the interpreter exits.
            self._finalizer = weakref.finalize(self, self._writer.close)

    @property
    def url(self) -> str:
        """Where the store is."""
        return self._filesystem.url

    @property
    def mode(self) -> Mode:
        """How it was opened."""
        return self._mode

    @property
    def version(self) -> int:
        """The version that this handle shows: as opened, or after its last commit or ``refresh``."""
        return self._current().number

    @property
    def schema(self) -> Schema:
        """Columns and metadata fields, including those of trajectories not yet committed."""
        return self._writer.schema if self._writer is not None else self._head.snapshot.schema

    @property
    def trajectories(self) -> View:
        """All trajectories of the version that this handle shows, and those that were appended through it since.

        The first call on a handle that has appended commits that, and from then on ``append`` also keeps its rows in the
        page cache until they are committed.
        """
        self._check_open()
        return View(self._latest_table(), self._access, follows=Follows(self._follow))

    def rows_to_copy(self) -> View:
        """``trajectories`` of a handle opened for reading, with every column of their table: for edits."""
        self._check_open()
        return View(self._access.table(self._history, self._current(), whole=True), self._access)

    def _latest_table(self) -> TrajectoryTable:
        if self._writer is not None:
            cache = self._access.cache_for(self._writer.schema)
            if self._live is None or self._live.cache is not cache:
                # Not a method of this handle, which would then never be collected.
                table_of = functools.partial(self._access.table, self._history)
                live = LiveTrajectories(table_of, self._writer.head, cache, self._access.readers)
                self._writer.follow(live)
                self._live = live
            elif self._writer.hides:  # there was no memory to keep all of it in
                self._writer.flush()
            return self._live.table()
        current = self._current()
        if self._table is None or self._table.version.number != current.number:
            self._table = self._table_of(current)
        return self._table

    def _table_of(self, version: Version) -> TrajectoryTable:
        return self._access.table(self._history, version)

    def _follow(self, refresh: bool) -> View:
        """The view as it would be taken now, for loaders that follow."""
        if refresh:
            self.refresh()
        return self.trajectories

    @property
    def num_trajectories(self) -> int:
        """Trajectories of the version that this handle shows; what waits to be committed is not counted."""
        return self._current().snapshot.totals.trajectories

    @property
    def pending(self) -> int:
        """Trajectories appended through this handle and not yet committed."""
        return self._writer.pending if self._writer is not None else 0

    def append(
        self,
        columns: Mapping[str, Any],
        *,
        terminated: bool = False,
        truncated: bool = False,
        metadata: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> TrajectoryRef:
        """Append one trajectory. It is copied at once, and becomes durable in the background, or at ``flush``.

        Args:
            columns: Nested mapping of NumPy arrays, torch tensors (any device) or lists, time first: ``[T, ...]``, or
                ``[T + 1, ...]`` for states with a final observation. The first trajectory defines the schema.
            terminated: It ended in a terminal state.
            truncated: It was cut off, by a time limit for instance.
            metadata: Fields of the trajectory: bool, number, string, bytes or datetime each.
            **fields: More of them.

        Raises:
            SchemaError: One of its subclasses, naming the column or field; nothing is appended.
            TrajstoreError: A background commit failed since the last call.
        """
        return self._writing().append(
            columns, terminated=terminated, truncated=truncated, metadata=_joined(metadata, fields)
        )

    def append_many(
        self,
        columns: Mapping[str, Any],
        lengths: Sequence[int] | Array,
        *,
        terminated: Sequence[bool] | Array | bool = False,
        truncated: Sequence[bool] | Array | bool = False,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        **fields: Any,
    ) -> list[TrajectoryRef]:
        """Append several trajectories at once; they become durable together.

        Args:
            columns: As for ``append``, the trajectories end to end: one row per step, and of states with a final observation
                one more per trajectory.
            lengths: ``(n,)`` steps of each.
            terminated: ``(n,)``, or one for all: it ended in a terminal state.
            truncated: ``(n,)``, or one for all: it was cut off.
            metadata: Fields of each trajectory.
            **fields: Fields of all.

        Raises:
            SchemaError: One of its subclasses, naming the column or field; nothing is appended.
            TrajstoreError: A background commit failed since the last call.

        Examples:
            >>> import numpy as np, trajstore
            >>> with trajstore.open("memory://docs/append_many", mode="a") as store:
            ...     refs = store.append_many({"action": np.arange(5)}, [2, 3], terminated=[True, False], task="pick")
            ...     store.trajectories[1]["action"][:]
            array([2, 3, 4])
        """
        counts = [operator.index(n) for n in np.asarray(lengths).tolist()]
        about = [{}] * len(counts) if metadata is None else metadata
        if len(about) != len(counts):
            raise LengthError(f"metadata of {len(about)} trajectories, lengths of {len(counts)}")
        for one in about:
            _check_given_once(one, fields)
        return self._writing().append_many(
            columns,
            counts,
            terminated=_for_each("terminated", terminated, len(counts)),
            truncated=_for_each("truncated", truncated, len(counts)),
            metadata=about,
            shared=fields,
        )

    def begin(self, *, metadata: Mapping[str, Any] | None = None, **fields: Any) -> Episode:
        """Begin a trajectory that is given step by step; memory stays bounded however long it gets.

        Args:
            metadata: Fields of the trajectory.
            **fields: More of them.
        """
        return Episode(self._writing(), _joined(metadata, fields))

    def flush(self, timeout_s: float | None = None) -> None:
        """Return when everything appended before is durable and visible to others.

        Args:
            timeout_s: Wait no longer than this; the commit goes on in the background.

        Raises:
            StorageTimeoutError: It takes longer.
            TrajstoreError: What failed in the background: those trajectories are not in the store.
        """
        self._writing().flush(timeout_s)

    def declare(self, schema: Schema | Iterable[Column]) -> None:
        """Add columns, as ``schema=`` of ``open`` does: all of them if there are none yet, otherwise optional ones.

        Raises:
            SchemaConflictError: A column differs, or a new one is required.
        """
        self._writing().declare(schema if isinstance(schema, Schema) else Schema(tuple(schema)))

    def clear(self) -> int:
        """A new version that holds nothing, so that what comes next may have other columns; earlier versions stay."""
        version = self._writing().commit(Append(Schema(), (), 0, operation="clear", instead=True))
        self._live = None
        return version.number

    def refresh(self) -> int:
        """Move on to the latest version, by whomever; returns its number."""
        self._check_open()
        latest = self._history.latest(self._current().number)
        if self._writer is not None:
            self._writer.head = latest
        self._head = latest
        return self.version

    def usage(self) -> StoreUsage:
        """Where the bytes are: per column logical and stored, and how many segments, manifests and versions."""
        table = self.trajectories._table
        return measure_usage(table, self._access.readers)

    def close(self) -> None:
        """Flush, and let go of threads. May be called twice.

        Raises:
            TrajstoreError: What failed in the background; the store is closed all the same.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._writer is not None:
                self._finalizer.detach()
                self._writer.close()
                self._head = self._writer.head
        finally:
            self._access.close()
            self._workers.close(_JOIN_S)
            self._filesystem.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        totals = self._current().snapshot.totals
        return (
            f"Store({self.url!r}, mode={self._mode!r}, version={self.version}, trajectories={totals.trajectories}, "
            f"steps={totals.steps}{f', pending={self.pending}' if self.pending else ''})"
        )

    def _current(self) -> Version:
        return self._writer.head if self._writer is not None else self._head

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the store {self.url} is closed; open it again")

    def _writing(self) -> Writer:
        self._check_open()
        if self._writer is None:
            raise ReadOnlyError(f"the store {self.url} was opened with mode='r'; open it with mode='a' to append")
        return self._writer


def _for_each(name: str, flags: Sequence[bool] | Array | bool, count: int) -> list[bool]:
    each = np.broadcast_to(np.asarray(flags, bool), (count,)) if np.ndim(flags) == 0 else np.asarray(flags, bool)
    if each.shape != (count,):
        raise LengthError(f"{name} of shape {list(each.shape)}, expected one for each of {count} trajectories")
    return each.tolist()  # type: ignore[no-any-return]


def _joined(metadata: Mapping[str, Any] | None, fields: Mapping[str, Any]) -> dict[str, Any]:
    _check_given_once(metadata or {}, fields)
    return {**(metadata or {}), **fields}


def _check_given_once(metadata: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    both = metadata.keys() & fields.keys()
    if both:
        raise SchemaError(f"metadata field {min(both)!r} is given twice, as a keyword and in metadata=")
