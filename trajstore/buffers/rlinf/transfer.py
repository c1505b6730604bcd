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
from trajstore.errors import SchemaError
from trajstore.interop.rlinf_files import Metadata, RlinfDirectory, open_directories, plan_merge, write_directory
from trajstore.interop.rlinf_files.progress import counted
from trajstore.store import Store
from trajstore.view import View

_NO_SEED = 1234  # of a buffer that was given none


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
    return _append_all(store, named, noted)


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
        storage_options: For both, if they are URLs.
        progress: Show how far it is on standard error.

    Returns:
        Trajectories imported; those of several ranks are numbered anew.

    Raises:
        StoreNotFoundError: No such files are there.
        StoreExistsError: A store is at ``out``.
        UntrustedPickleError: There are ``.pkl`` files.
    """
    with contextlib.ExitStack() as opened:
        directories = [opened.enter_context(d) for d in open_directories(source, storage_options=storage_options)]
        store = opened.enter_context(trajstore.open(out, mode="x", storage_options=storage_options))
        seed = next((d.metadata.seed for d in directories if d.metadata.seed is not None), _NO_SEED)
        if len(directories) == 1:
            return import_files(directories[0], store, seed=seed, allow_pickle=allow_pickle, progress=progress)
        places = plan_merge([d.ids for d in directories])

        def merged() -> Iterator[tuple[int, str, Mapping[str, Any]]]:
            shown = counted(places, total=len(places), what="importing", shown=progress)
            for number, (rank, name) in enumerate(shown):
                directory = directories[rank]
                for _, entry, fields in directory.trajectories([name], allow_pickle=allow_pickle):
                    yield number, f"{entry.file_stem()} of {directory.url}", fields

        return _append_all(store, merged(), seed)


def _append_all(store: Store, trajectories: Iterable[tuple[int, str, Mapping[str, Any]]], seed: int) -> int:
    """Append number, name and fields of trajectories."""
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
