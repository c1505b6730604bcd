"""``open``: from a URL to a store.

Invariant: arguments that make no sense together are refused before anything is looked at, and before anything is made.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trajstore.edit.marks import check_tagged, find_tag, tag_in
from trajstore.errors import ReadOnlyError, SelectionError
from trajstore.format.codecs import check_preset
from trajstore.read.access import StoreAccess
from trajstore.read.bases import Bases, absolute_prefixes
from trajstore.read.cache import DEFAULT_CACHE_BYTES
from trajstore.read.disk_cache import DiskCache
from trajstore.schema import Column, Schema
from trajstore.storage.attach import open_existing, open_or_create
from trajstore.storage.commit import History
from trajstore.storage.connect import connect
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.workers import Workers
from trajstore.store import Mode, Store
from trajstore.stored import Array
from trajstore.view import View
from trajstore.write.batch import WriteOptions

DEFAULT_CACHE_DIR_BYTES = 64 << 30


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
    version: int | str | None = None,
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
    past_damage: bool = False,
) -> Store:
    """Open a store of trajectories.

    Args:
        url: A local path, ``memory://name``, ``s3://bucket/path``, or any other URL that fsspec knows.
        mode: ``"r"`` to read; ``"a"`` to append, made if there is none; ``"x"`` to append to a new one.
        schema: Columns, if they are not to be inferred from the first trajectory. On a store that has a schema, optional
            columns are added to it; anything else must agree.
        version: Show this version, or the one of this tag, instead of the latest; for reading.
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
        bases: Where other stores may lie that this one refers to, besides its own parent folder: prefixes of URLs or paths
            (relative ones are seen from the working directory), with the storage options of each, or None.
        past_damage: If the latest version is damaged, show what the last readable one holds in its place, for ``verify``,
            ``repair`` and ``restore``: what is committed next goes on from there, and the damaged version stays as it is.

    Raises:
        StoreNotFoundError: Mode ``"r"`` and no store there, or a bucket that does not exist.
        StoreExistsError: Mode ``"x"`` and a store is there.
        UnsupportedStorageError: A storage that cannot create an object atomically, opened for writing.
        FormatVersionError: A store of a newer trajstore.
        CorruptionError: The latest version is damaged; says which one can be read.
        UntrustedBaseError: It refers to segments of a store elsewhere, when they are first read.

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
        raise SelectionError(f"mode={mode!r}, expected 'r' to read, 'a' to append or 'x' for a new store")
    if mode == "r" and schema is not None:
        raise ReadOnlyError("schema= changes the store; open it with mode='a'")
    if mode != "r" and version is not None:
        raise ReadOnlyError(f"version={version} is for reading; open it with mode='r'")
    if cache_bytes < 1:
        raise SelectionError(f"cache_bytes={cache_bytes}, expected a positive number")
    filesystem = connect(url, storage_options=storage_options, single_writer=single_writer)
    declared = schema if isinstance(schema, Schema) else Schema(tuple(schema or ()))
    cache = CacheOptions(cache_bytes, None if cache_dir is None else os.fspath(cache_dir), cache_dir_bytes)
    reopen, trusted = None, absolute_prefixes(bases)
    if not filesystem.url.startswith("memory://"):
        reopen = functools.partial(_reopened, filesystem.url, storage_options, cache, trusted)
    others = Bases(filesystem.url, _connect_base, options=storage_options, trusted=trusted)
    history = History(filesystem, past_damage=past_damage)
    return open_on(
        filesystem,
        mode,
        declared=declared,
        version=version,
        options=options,
        history=history,
        cache=cache,
        bases=others,
        reopen=reopen,
    )


def open_on(
    filesystem: Filesystem,
    mode: Mode,
    *,
    declared: Schema | None = None,
    version: int | str | None = None,
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
        name = tag_in(version)
        if name is not None:
            tag = find_tag(filesystem, name)
            store_uuid, head = open_existing(filesystem, history, tag.version)
            check_tagged(filesystem, tag, head)
        else:
            number = int(version) if isinstance(version, str) else version
            store_uuid, head = open_existing(filesystem, history, number)
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
        keep_statistics=mode != "r",
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
