"""``Store``: what users hold. It ties the history, the writer and the reader of one store together.

Invariant: a handle shows one version at a time; it moves on with its own commits and with ``refresh``.
"""

from __future__ import annotations

import functools
import operator
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from trajstore.edit.reclaim import reclaim as reclaim_bytes
from trajstore.errors import (
    ClosedError,
    LengthError,
    ReadOnlyError,
    SchemaError,
    SelectionError,
    VersionExpiredError,
)
from trajstore.follows import Follows
from trajstore.format.codecs import check_preset
from trajstore.read.access import StoreAccess
from trajstore.read.bases import Bases
from trajstore.read.cache import DEFAULT_CACHE_BYTES
from trajstore.read.disk_cache import DiskCache
from trajstore.read.live import LiveTrajectories
from trajstore.read.table import TrajectoryTable
from trajstore.read.usage import StoreUsage, measure_usage
from trajstore.schema import Column, Schema
from trajstore.storage.attach import open_existing, open_or_create
from trajstore.storage.changes import Append, Delete
from trajstore.storage.commit import History, Version
from trajstore.storage.connect import connect
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.workers import Workers
from trajstore.stored import Array
from trajstore.view import View
from trajstore.write.batch import TrajectoryRef, WriteOptions
from trajstore.write.episode import Episode
from trajstore.write.writer import Writer

Mode = Literal["r", "a", "x"]
DEFAULT_CACHE_DIR_BYTES = 64 << 30
_JOIN_S = 5.0  # closing waits no longer for a reader whose storage hangs


@dataclass(frozen=True)
class CacheOptions:
    """Knobs of reading: bytes in memory, and a folder on a local disk with its bytes."""

    nbytes: int = DEFAULT_CACHE_BYTES
    folder: str | None = None
    folder_bytes: int = DEFAULT_CACHE_DIR_BYTES


def open(
    url: str | os.PathLike[str],
    mode: Mode = "r",
    *,
    schema: Schema | Iterable[Column] | None = None,
    version: int | None = None,
    codec: str | None = None,
    segment_bytes: int = WriteOptions.segment_bytes,
    commit_interval_s: float = WriteOptions.commit_interval_s,
    write_buffer_bytes: int = WriteOptions.write_buffer_bytes,
    spill_bytes: int = WriteOptions.spill_bytes,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_dir_bytes: int = DEFAULT_CACHE_DIR_BYTES,
    storage_options: Mapping[str, Any] | None = None,
    single_writer: bool = False,
    bases: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> Store:
    """Open a store of trajectories.

    Args:
        url: A local path, ``memory://name``, ``s3://bucket/path``, or any other URL that fsspec knows.
        mode: ``"r"`` to read; ``"a"`` to append, made if there is none; ``"x"`` to append to a new one.
        schema: Columns, if they are not to be inferred from the first trajectory. On a store that has a schema, optional
            columns are added to it; anything else must agree.
        version: Show this version instead of the latest; for reading.
        codec: How pages are compressed: ``"fast"``, ``"small"``, ``"none"``, or None for a default per dtype.
        segment_bytes: Appended data is committed in segments of about this many bytes, before compression.
        commit_interval_s: Appended data is committed at least this often, in the background.
        write_buffer_bytes: ``append`` waits while more bytes than this wait to be encoded.
        spill_bytes: A streaming episode goes to disk in parts of this many bytes.
        cache_bytes: Bound of the page cache in memory, which all views and loaders of this handle share.
        cache_dir: A local folder that keeps what was read of a remote store, for all processes of this machine.
        cache_dir_bytes: Its bound.
        storage_options: Credentials, endpoint and so on, for fsspec.
        single_writer: Allow a storage that cannot create an object atomically; you promise that nobody else writes.
        bases: Where other stores may lie that this one refers to, besides its own parent folder: prefixes of URLs, with the
            storage options of each, or None.

    Raises:
        StoreNotFoundError: Mode ``"r"`` and no store there, or a bucket that does not exist.
        StoreExistsError: Mode ``"x"`` and a store is there.
        UnsupportedStorageError: A storage that cannot create an object atomically, opened for writing.
        FormatVersionError: A store of a newer trajstore.
        UntrustedBaseError: It refers to segments of a store elsewhere, when they are first looked at.

    Examples:
        >>> import numpy as np, trajstore
        >>> with trajstore.open("memory://docs/open", mode="a") as store:
        ...     ref = store.append({"obs": np.zeros((4, 2)), "action": np.arange(3)}, terminated=True, task="pick")
        ...     store.flush()
        ...     store.trajectories[0].metadata, store.version
        ({'task': 'pick'}, 1)
    """
    options = WriteOptions(
        codec=codec,
        segment_bytes=segment_bytes,
        commit_interval_s=commit_interval_s,
        write_buffer_bytes=write_buffer_bytes,
        spill_bytes=spill_bytes,
    )
    check_preset(codec)
    if mode not in ("r", "a", "x"):
        raise ValueError(f"mode={mode!r}, expected 'r' to read, 'a' to append or 'x' for a new store")
    if mode == "r" and schema is not None:
        raise ReadOnlyError("schema= changes the store; open it with mode='a'")
    if mode != "r" and version is not None:
        raise ReadOnlyError(f"version={version} is for reading; open it with mode='r'")
    if cache_bytes < 1:
        raise ValueError(f"cache_bytes={cache_bytes}, expected a positive number")
    filesystem = connect(url, storage_options=storage_options, single_writer=single_writer)
    declared = schema if isinstance(schema, Schema) else Schema(tuple(schema or ()))
    cache = CacheOptions(cache_bytes, None if cache_dir is None else os.fspath(cache_dir), cache_dir_bytes)
    reopen = None
    if not filesystem.url.startswith("memory://"):
        reopen = functools.partial(_reopened, filesystem.url, storage_options, cache, bases)
    others = Bases(filesystem.url, _connect_base, options=storage_options, trusted=bases)
    return open_on(
        filesystem, mode, declared=declared, version=version, options=options, cache=cache, bases=others, reopen=reopen
    )


def open_on(
    filesystem: Filesystem,
    mode: Mode,
    *,
    declared: Schema | None = None,
    version: int | None = None,
    options: WriteOptions | None = None,
    history: History | None = None,
    cache: CacheOptions | None = None,
    bases: Bases | None = None,
    reopen: Callable[[int, Array], View] | None = None,
) -> Store:
    """Open a store on a filesystem at hand; ``open`` says what the arguments mean, ``reopen`` makes a view elsewhere."""
    history = history or History(filesystem)
    if mode == "x" or mode == "a":
        store_uuid, head = open_or_create(filesystem, history, must_be_new=mode == "x")
    else:
        store_uuid, head = open_existing(filesystem, history, version)
    reading = cache or CacheOptions()
    kept = None if reading.folder is None else DiskCache(reading.folder, max_bytes=reading.folder_bytes)
    workers = Workers(os.cpu_count() or 1, name="trajstore-codec")
    access = StoreAccess(
        filesystem,
        store_uuid,
        workers,
        cache_bytes=reading.nbytes,
        disk_cache=kept,
        bases=bases or Bases(filesystem.url, _connect_base),
        reopen=reopen,
    )
    return Store(
        filesystem, history, head, store_uuid, mode, declared or Schema(), options or WriteOptions(), workers, access
    )


def _connect_base(url: str, storage_options: Mapping[str, Any] | None) -> Filesystem:
    return connect(url, storage_options=storage_options)


def _reopened(
    url: str,
    storage_options: Mapping[str, Any] | None,
    cache: CacheOptions,
    bases: Mapping[str, Mapping[str, Any] | None] | None,
    version: int,
    rows: Array,
) -> View:
    """A view of a store that another process has opened."""
    store = open(
        url,
        version=version,
        storage_options=storage_options,
        cache_bytes=cache.nbytes,
        cache_dir=cache.folder,
        cache_dir_bytes=cache.folder_bytes,
        bases=bases,
    )
    return store.trajectories.take(rows)


class Store:
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

    def delete(self, ids: Iterable[int] | Array, *, reclaim: bool = False) -> int:
        """A new version without these trajectories; earlier versions keep them. What was appended before is flushed.

        Args:
            ids: ``view.ids``, or some of them.
            reclaim: Also give back the bytes of whole segments that the new version does not need, and with them every
                earlier version: for a store that nobody else reads, writes or refers to.

        Returns:
            The version.

        Raises:
            IndexRangeError: A trajectory that the latest version does not hold.

        Examples:
            >>> import numpy as np, trajstore
            >>> with trajstore.open("memory://docs/delete", mode="a") as store:
            ...     for n in (3, 5):
            ...         _ = store.append({"action": np.arange(n)})
            ...     store.flush()
            ...     _ = store.delete(store.trajectories.filter("length < 4").ids)
            ...     len(store.trajectories)
            1
        """
        chosen = ids if isinstance(ids, np.ndarray) else np.array(list(ids))
        if chosen.size and chosen.dtype.kind not in "iu":
            raise SelectionError(f"ids of dtype {chosen.dtype}, expected integers")
        writer = self._writing()
        version = writer.commit(Delete(np.unique(chosen.astype(np.int64))))
        if reclaim:
            with writer.paused():
                reclaim_bytes(self._filesystem, self._history, version.number, in_progress=writer.segments_in_progress)
        return version.number

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

    def versions(self, limit: int = 1000) -> pd.DataFrame:
        """The latest versions, newest first: when, by what operation, and what they hold.

        Args:
            limit: At most so many.
        """
        self._check_open()
        rows: list[dict[str, Any]] = []
        number = self._history.latest(self._current().number).number
        while number > 0 and len(rows) < limit:
            try:
                snapshot = self._history.load(number).snapshot
            except VersionExpiredError:
                break  # what is older is gone too
            rows.append(
                {
                    "version": number,
                    "created_at": pd.Timestamp(snapshot.created_at),
                    "operation": snapshot.operation,
                    "trajectories": snapshot.totals.trajectories,
                    "steps": snapshot.totals.steps,
                    "stored_bytes": snapshot.totals.nbytes,
                    "manifests": len(snapshot.manifests),
                }
            )
            number -= 1
        columns = ["version", "created_at", "operation", "trajectories", "steps", "stored_bytes", "manifests"]
        return pd.DataFrame(rows, columns=columns).set_index("version")

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
