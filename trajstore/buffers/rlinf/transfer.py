"""RLinf's files into a store, and out of one.

Invariant: what is imported and exported again equals what was there, field by field.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import trajstore
from trajstore.buffers.rlinf import columns as parts
from trajstore.buffers.rlinf import rollouts
from trajstore.errors import SchemaError, StoreExistsError, StoreNotFoundError
from trajstore.format.layout import STORE_DOCUMENT
from trajstore.interop.rlinf_files import (
    Metadata,
    RlinfDirectory,
    open_directories,
    plan_merge,
    rank_folders,
    write_directory,
)
from trajstore.progress import counted
from trajstore.storage.connect import connect, options_for
from trajstore.store import Store
from trajstore.view import View

NO_SEED = 1234  # of a buffer that was given none


def import_files(
    directory: RlinfDirectory,
    store: Store,
    ids: Sequence[int] | None = None,
    *,
    seed: int,
    allow_pickle: bool = False,
    progress: bool = False,
) -> int:
    """Append trajectories of RLinf's files to a store.

    Args:
        directory: The files.
        store: Empty, or of such trajectories.
        ids: Which; all by default.
        seed: Noted with them, if the files name none.
        allow_pickle: Read ``.pkl`` files, which can run any code.
        progress: Show how far it is on standard error.

    Returns:
        Trajectories appended; durable when this returns.

    Raises:
        SchemaError: A trajectory that does not fit those before it; names its file.
        CorruptionError: A file that is damaged.
    """
    noted = seed if directory.metadata.seed is None else directory.metadata.seed
    found = directory.trajectories(ids, allow_pickle=allow_pickle, progress=progress)
    named = ((number, f"{entry.file_stem()} of {directory.url}", fields) for number, entry, fields in found)
    return append_all(store, named, noted)


def import_directories(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    allow_pickle: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> int:
    """Make a store of RLinf's files: of one directory, or of all ``rank_*`` in it, in the order of its merge tool.

    Args:
        source: Path or URL of the files.
        out: Of the store, which must not exist.
        allow_pickle: Read ``.pkl`` files, which can run any code.
        storage_options: For those of the two that are URLs.
        progress: Show how far it is on standard error.

    Returns:
        Trajectories imported; those of several ranks are numbered anew.

    Raises:
        StoreNotFoundError: No such files are there.
        StoreExistsError: A store is at ``out``; or at ``source``, or in its ``rank_*``, instead of files.
        UntrustedPickleError: There are ``.pkl`` files.
        SchemaError: A trajectory that does not fit those before it; names its file. As after any error, there is nothing
            in the store then, and ``out`` can be used again.
    """
    with contextlib.ExitStack() as opened:
        try:
            found = open_directories(source, storage_options=options_for(source, storage_options))
        except StoreNotFoundError:
            _check_no_stores(source, options_for(source, storage_options))
            raise
        directories = [opened.enter_context(directory) for directory in found]
        store = opened.enter_context(new_store(out, options_for(out, storage_options)))
        seed = next((d.metadata.seed for d in directories if d.metadata.seed is not None), NO_SEED)
        if len(directories) == 1:
            return import_files(directories[0], store, seed=seed, allow_pickle=allow_pickle, progress=progress)
        places = plan_merge([d.ids for d in directories])

        def merged() -> Iterator[tuple[int, str, Mapping[str, Any]]]:
            shown = counted(places, total=len(places), what="importing", shown=progress)
            for number, (rank, name) in enumerate(shown):
                directory = directories[rank]
                for _, entry, fields in directory.trajectories([name], allow_pickle=allow_pickle):
                    yield number, f"{entry.file_stem()} of {directory.url}", fields

        return append_all(store, merged(), seed)


def _check_no_stores(source: str | os.PathLike[str], storage_options: Mapping[str, Any] | None) -> None:
    """Raise where there are stores, which need no import."""
    with contextlib.closing(connect(source, storage_options=storage_options)) as filesystem:
        is_store = filesystem.read(STORE_DOCUMENT) is not None
        ranks = sorted(name for name, documents in rank_folders(filesystem).items() if STORE_DOCUMENT in documents)
    if is_store:
        raise StoreExistsError(
            f"{os.fspath(source)} is a store already: load_checkpoint() and trajstore.open() take it as it is"
        )
    if ranks:
        raise StoreExistsError(
            f"{os.fspath(source)} holds stores already ({ranks[0]} and so on): load_checkpoint() takes each as it is; "
            "`trajstore rlinf merge-or-split` merges them"
        )


@contextlib.contextmanager
def new_store(out: str | os.PathLike[str], storage_options: Mapping[str, Any] | None) -> Iterator[Store]:
    """A store that holds nothing yet; what fails inside leaves it so, and takes its bytes back.

    Raises:
        StoreExistsError: It holds trajectories.
    """
    with trajstore.open(out, mode="a", storage_options=storage_options) as store:
        if store.num_trajectories:
            raise StoreExistsError(
                f"{os.fspath(out)} is a store of {store.num_trajectories} trajectories already; choose another place"
            )
        try:
            yield store
        except BaseException:
            ids = store.trajectories.ids
            if len(ids):
                store.delete(ids, reclaim=True)
            store.clear()
            raise


def append_all(store: Store, trajectories: Iterable[tuple[int, str, Mapping[str, Any]]], seed: int) -> int:
    """Append number, name and fields of trajectories, durably; how many there were."""
    shared = parts.shared_in(store.schema)
    count = 0
    for number, name, fields in trajectories:
        try:
            rollout = rollouts.taken_apart(fields)
            if rollout is None:
                continue
            if not store.schema.columns:
                shared = parts.shared_observations(rollout)
                store.declare(parts.schema_of(rollout, shared))
            parts.check_like(rollout, store.schema, shared)
        except SchemaError as error:
            error.args = (f"{name}: {error}",)
            raise
        rollouts.append(store, fields, rollout, shared, number=number, seed=seed)
        count += 1
    store.flush()
    return count


def export_files(
    view: View,
    path: str | os.PathLike[str],
    *,
    trajectory_format: str = "pt",
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Metadata:
    """Write the trajectories of a view as RLinf's files.

    Args:
        view: Of a store that a ``TrajectoryReplayBuffer`` or ``import_files`` made.
        path: A folder or a URL.
        trajectory_format: ``"pt"`` or ``"pkl"``.
        overwrite: Take the place of what is there.
        storage_options: For a URL.
        progress: Show how far it is on standard error.

    Raises:
        StoreExistsError: Such files are there, and ``overwrite`` is false.
        SelectionError: The view holds other trajectories.
    """
    found = rollouts.find(view)
    return write_directory(
        path,
        rollouts.read(view.take(found.rows), found.entries),
        trajectory_format=trajectory_format,
        seed=found.seed,
        trajectory_counter=max((entry.id for entry in found.entries), default=-1) + 1,
        overwrite=overwrite,
        storage_options=storage_options,
        total=len(found.entries),
        progress=progress,
    )
