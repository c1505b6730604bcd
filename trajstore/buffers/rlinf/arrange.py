"""RLinf's merge-or-split tool, on stores and on its own files.

Invariant: sources are only read, nothing is moved; trajectories are numbered from 0 in the result.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import trajstore
from trajstore.buffers.rlinf import columns as parts
from trajstore.buffers.rlinf import rollouts
from trajstore.buffers.rlinf.transfer import NO_SEED, append_all, new_store
from trajstore.edit.combine import combine
from trajstore.errors import SchemaConflictError, SelectionError, StoreExistsError
from trajstore.format.layout import STORE_DOCUMENT
from trajstore.interop.rlinf_files import (
    INDEX_KEYS,
    METADATA_KEY,
    all_ranks_with,
    is_rlinf_directory,
    merge_directories,
    open_directories,
    plan_merge,
    plan_split,
    rank_folders,
    split_directory,
)
from trajstore.progress import counted
from trajstore.read.bases import absolute
from trajstore.schema import Schema
from trajstore.storage.connect import connect, options_for
from trajstore.store import Store
from trajstore.stored import Array
from trajstore.view import View


def merge_or_split(
    source_path: str | os.PathLike[str] = ".",
    save_path: str | os.PathLike[str] = "",
    *,
    split_count: int | None = None,
    copy: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    bases: Mapping[str, Mapping[str, Any] | None] | None = None,
    progress: bool = False,
) -> int:
    """Merge the ``rank_*`` buffers under a place, or keep the first trajectories of one buffer.

    Trajectories of several ranks are interleaved: ids ascend, and for each id the ranks take turns in the order of their
    names.

    Args:
        source_path: Stores or RLinf's files: a folder of ``rank_*``, or one buffer; by default the working directory, as
            RLinf's tool has it.
        save_path: Where the result goes, of the same kind; nothing must be there. It has to be given.
        split_count: How many trajectories of one buffer to keep; None to merge.
        copy: Give the result bytes of its own. Otherwise a store refers to the segments of its sources, and files are hard
            links where both are on one disk. Stores of which some hold an observation once, and others twice since it
            seldom repeats there, are copied in any case.
        storage_options: For those of the two that are URLs.
        bases: Where stores may lie to which the sources refer; see ``trajstore.open``. If the sources lie outside the
            parent folder of the result, whoever opens it has to name them so, too; not with ``copy``.
        progress: Show a bar on standard error.

    Returns:
        Trajectories in the result.

    Raises:
        StoreNotFoundError: Nothing to merge or split.
        MissingObjectError: Some of the ``rank_*`` hold a buffer, and others none, or one of the other kind.
        SchemaConflictError: Stores whose trajectories have different fields.
        SelectionError: Fewer trajectories than ``split_count``, several buffers to split, no ``save_path``, or one in a
            buffer that is read or among the ``rank_*``.
        StoreExistsError: A buffer is at ``save_path``.
    """
    source, out = os.fspath(source_path).rstrip("/"), os.fspath(save_path)
    if not out:
        raise SelectionError("merge_or_split needs save_path=, a folder or a URL for the result")
    read_options, save_options = options_for(source, storage_options), options_for(out, storage_options)
    stores = _stores(source, read_options)
    is_one = stores == [source] or (not stores and is_rlinf_directory(source, storage_options=read_options))
    _check_beside(source, out, is_one=is_one)
    _check_free(out, save_options)
    if stores and split_count is not None and len(stores) > 1:
        raise SelectionError(f"{source} holds {len(stores)} buffers; split one of them, or merge them first")
    if stores:
        return _arrange_stores(
            stores,
            out,
            split_count,
            copy=copy,
            storage_options=read_options,
            save_storage_options=save_options,
            bases=bases,
            progress=progress,
        )
    if split_count is None:
        return merge_directories(
            source,
            out,
            link=not copy,
            storage_options=read_options,
            save_storage_options=save_options,
            progress=progress,
        ).size
    return split_directory(
        source,
        out,
        split_count,
        link=not copy,
        storage_options=read_options,
        save_storage_options=save_options,
        progress=progress,
    ).size


def _arrange_stores(
    urls: Sequence[str],
    out: str,
    split_count: int | None,
    *,
    copy: bool,
    storage_options: Mapping[str, Any] | None,
    save_storage_options: Mapping[str, Any] | None,
    bases: Mapping[str, Mapping[str, Any] | None] | None,
    progress: bool,
) -> int:
    with contextlib.ExitStack() as opened:
        views = [
            opened.enter_context(trajstore.open(url, storage_options=storage_options, bases=bases)).trajectories
            for url in urls
        ]
        found = [rollouts.find(view) for view in views]
        _check_alike({url: view.schema for url, view in zip(urls, views, strict=True) if len(view)})
        ids = [[entry.id for entry in one.entries] for one in found]
        if split_count is None:
            places = _merged(ids)
        else:
            plan_split(ids[0], split_count, where=urls[0])
            places = [(0, at) for at in range(split_count)]
        if len({parts.shared_in(view.schema) for view in views}) > 1:
            target = opened.enter_context(new_store(out, save_storage_options))
            return _rewrite(views, found, places, target, progress)
        order, numbers = _rows(found, places)
        folder = opened.enter_context(contextlib.closing(connect(out, storage_options=save_storage_options)))
        combine(
            [view.take(one.rows).source() for view, one in zip(views, found, strict=True)],
            folder,
            share="copy" if copy else "reference",
            order=order,
            fields={rollouts.ID: ("int64", numbers)},
            operation="merge" if split_count is None else "split",
            progress=progress,
        )
        return len(places)


def _check_alike(schemas: Mapping[str, Schema]) -> None:
    """Raise ``SchemaConflictError`` unless the stores of these URLs hold the same fields.

    Whether an observation is stored once, or as the current and as the next one, makes no difference.
    """
    fields = {url: _fields(schema) for url, schema in schemas.items()}
    told = []
    for path in sorted({path for held in fields.values() for path in held}):
        kinds: dict[str, str] = {}  # what it is -> the first store that has it so
        for url, held in fields.items():
            kinds.setdefault(held.get(path, "lacking"), url)
        if len(kinds) > 1:
            told.append(f"{path!r} is {', '.join(f'{kind} in {url}' for kind, url in kinds.items())}")
    if told:
        raise SchemaConflictError(
            f"the buffers hold different fields, so nothing could be sampled from all of them: {'; '.join(told)}; merge "
            "those that agree"
        )


def _fields(schema: Schema) -> dict[str, str]:
    """Path -> dtype and shape of each field of a batch."""
    kinds = {column.path: f"{column.dtype} {list(column.shape)}" for column in schema}
    return kinds | {f"next_obs/{name}": kinds[f"curr_obs/{name}"] for name in parts.shared_in(schema)}


def _rewrite(
    views: Sequence[View],
    found: Sequence[rollouts.Found],
    places: Sequence[tuple[int, int]],
    store: Store,
    progress: bool,
) -> int:
    """Append rollouts of stores that differ in which observations they hold once."""
    ends = [np.cumsum([entry.pieces for entry in one.entries]) for one in found]

    def read() -> Iterator[tuple[int, str, dict[str, Any]]]:
        shown = counted(places, total=len(places), what="merging", shown=progress)
        for number, (rank, at) in enumerate(shown):
            entry = found[rank].entries[at]
            rows = found[rank].rows[ends[rank][at] - entry.pieces : ends[rank][at]]
            for _, fields in rollouts.read(views[rank].take(rows), [entry]):
                yield number, f"trajectory {entry.id} of store {rank}", fields

    return append_all(store, read(), next((one.seed for one in found if one.seed is not None), NO_SEED))


def _merged(ids: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Rank and position of each rollout, in the order of a merge; a rank may hold an id twice."""
    order = [sorted(range(len(numbers)), key=numbers.__getitem__) for numbers in ids]
    taken = [0] * len(ids)
    places = []
    for rank, _ in plan_merge(ids):
        places.append((rank, order[rank][taken[rank]]))
        taken[rank] += 1
    return places


def _rows(found: Sequence[rollouts.Found], places: Sequence[tuple[int, int]]) -> tuple[Array, Array]:
    """Which pieces come in which order, and the new ``trajectory_id`` of each piece, in the order of the sources."""
    counts = [np.array([entry.pieces for entry in one.entries], np.int64) for one in found]
    offsets = np.cumsum([0, *(int(c.sum()) for c in counts)])
    begins = [offset + np.cumsum(c) - c for offset, c in zip(offsets, counts, strict=False)]
    numbers = np.full(int(offsets[-1]), -1, np.int64)
    order = []
    for number, (rank, at) in enumerate(places):
        rows = begins[rank][at] + np.arange(counts[rank][at])
        numbers[rows] = number
        order.append(rows)
    return np.concatenate(order) if order else np.empty(0, np.int64), numbers


def _check_beside(source: str, out: str, *, is_one: bool) -> None:
    """Raise ``SelectionError`` if the result would lie in a buffer that is read, or where the next merge takes it for one.

    Args:
        source: A buffer, or a folder of ``rank_*``.
        out: Where the result goes.
        is_one: Whether the source is a buffer.
    """
    one, other = absolute(source), absolute(out)
    below = other.removeprefix(f"{one}/")
    if other == one or (below != other and (is_one or below.startswith("rank_"))):
        raise SelectionError(
            f"save_path {out} is the source, or one of the buffers in it: the next merge would take the result for a "
            "source; choose a place beside it"
        )


def _check_free(out: str, storage_options: Mapping[str, Any] | None) -> None:
    """Raise ``StoreExistsError`` if a buffer of either kind is at a place."""
    documents = [STORE_DOCUMENT, METADATA_KEY, *INDEX_KEYS]
    with contextlib.closing(connect(out, storage_options=storage_options)) as filesystem:
        found = filesystem.read_many(documents)
    there = [name for name, data in zip(documents, found, strict=True) if data is not None]
    if there:
        raise StoreExistsError(
            f"a buffer is already saved at {filesystem.description} ({there[0]} is there), and nothing is replaced; choose "
            "another save_path"
        )


def _stores(source: str, storage_options: Mapping[str, Any] | None) -> list[str]:
    """The store at a place, or those of all its ``rank_*`` folders; none if these are RLinf's files.

    Raises:
        StoreNotFoundError: There is nothing of either kind.
        MissingObjectError: Some folders hold one, and others do not.
    """
    with contextlib.closing(connect(source, storage_options=storage_options)) as filesystem:
        if filesystem.read(STORE_DOCUMENT) is not None:
            return [source]
        if is_rlinf_directory(source, storage_options=storage_options):
            return []
        names = all_ranks_with(STORE_DOCUMENT, rank_folders(filesystem), where=filesystem.description)
    if names:
        return [f"{source}/{name}" for name in names]
    for directory in open_directories(source, storage_options=storage_options):  # says what is lacking
        directory.close()
    return []
