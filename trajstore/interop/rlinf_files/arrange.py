"""Merge directories of several ranks, keep the first trajectories of one: RLinf's merge-or-split tool.

Invariant: sources are only read; trajectory files are copied byte for byte, or linked, under their new numbers, so nothing
is unpickled.
"""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

from trajstore.errors import SchemaConflictError, SelectionError
from trajstore.interop.rlinf_files.directory import RlinfDirectory, TrajectoryFile, Url, open_directories
from trajstore.interop.rlinf_files.documents import Metadata
from trajstore.interop.rlinf_files.writer import RlinfWriter
from trajstore.progress import counted


def plan_merge(ids: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """The order of a merge: ids ascend, and for each id the sources take turns. Pure: no I/O.

    Args:
        ids: Of each source, in the order of their names.

    Returns:
        (source, id) of each trajectory, which is numbered from 0 on in this order.

    Examples:
        >>> plan_merge([[0, 1, 4], [1, 0]])
        [(0, 0), (1, 0), (0, 1), (1, 1), (0, 4)]
    """
    placed = [(source, number) for source, numbers in enumerate(ids) for number in numbers]
    return sorted(placed, key=lambda place: (place[1], place[0]))


def plan_split(ids: Sequence[int], count: int, *, where: str = "the buffer") -> list[int]:
    """The ids that a split keeps: the first of the list, which are numbered from 0 on in this order. Pure: no I/O.

    Args:
        ids: ``trajectory_id_list``.
        count: How many to keep, from 1 on.
        where: Names the source in errors.

    Raises:
        SelectionError: There are not so many.

    Examples:
        >>> plan_split([7, 3, 5], 2)
        [7, 3]
    """
    wanted = operator.index(count)
    if not 1 <= wanted <= len(ids):
        raise SelectionError(f"split_count={wanted}: {where} has {len(ids)} trajectories; pass 1 to {len(ids)}")
    return list(ids[:wanted])


def merge_directories(
    source_url: Url,
    save_url: Url,
    *,
    overwrite: bool = False,
    link: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    save_storage_options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Metadata:
    """Copy the trajectories of all ``rank_*`` folders into one directory, interleaved by id.

    Args:
        source_url: The folder above the ranks; or one directory, whose trajectories are numbered anew.
        save_url: Where the result goes.
        overwrite: Replace what was saved there before.
        link: Let both share the bytes of the files, by hard links, if they are on one disk.
        storage_options: For the filesystem of ``source_url``.
        save_storage_options: For that of ``save_url``.
        progress: Show a bar on standard error.

    Raises:
        StoreNotFoundError: There is nothing to merge.
        SchemaConflictError: Some ranks wrote ``.pt``, others ``.pkl``.
        MissingObjectError: Some ranks saved nothing, or a store.
        StoreExistsError: A buffer is saved at ``save_url``, and ``overwrite`` was not said.
        MissingObjectError: A trajectory of an index has no file.
    """
    directories = open_directories(source_url, storage_options=storage_options)
    try:
        files = [directories[source].select([number])[0] for source, number in plan_merge([d.ids for d in directories])]
        return _copy(files, directories[0], save_url, overwrite, link, save_storage_options, progress)
    finally:
        for directory in directories:
            directory.close()


def split_directory(
    source_url: Url,
    save_url: Url,
    split_count: int,
    *,
    overwrite: bool = False,
    link: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    save_storage_options: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Metadata:
    """Copy the first trajectories of a directory into another, numbered anew.

    Args:
        source_url: The directory.
        save_url: Where the result goes.
        split_count: How many to keep.
        overwrite: Replace what was saved there before.
        link: Let both share the bytes of the files, by hard links, if they are on one disk.
        storage_options: For the filesystem of ``source_url``.
        save_storage_options: For that of ``save_url``.
        progress: Show a bar on standard error.

    Raises:
        SelectionError: There are not so many.
        StoreNotFoundError: There is no directory.
        StoreExistsError: A buffer is saved at ``save_url``, and ``overwrite`` was not said.
        MissingObjectError: A trajectory of the index has no file.
    """
    with RlinfDirectory(source_url, storage_options=storage_options) as directory:
        files = directory.select(plan_split(directory.ids, split_count, where=directory.url))
        return _copy(files, directory, save_url, overwrite, link, save_storage_options, progress)


def _copy(
    files: Sequence[TrajectoryFile],
    first: RlinfDirectory,
    save_url: Url,
    overwrite: bool,
    link: bool,
    save_storage_options: Mapping[str, Any] | None,
    progress: bool,
) -> Metadata:
    formats = {file.trajectory_format: file for file in files}
    if len(formats) > 1:
        raise SchemaConflictError(
            f"{formats['pt'].where} and {formats['pkl'].where}: a directory is of one format; save one of them anew in "
            "the format of the other"
        )
    writer = RlinfWriter(
        save_url,
        trajectory_format=next(iter(formats), first.metadata.trajectory_format),
        seed=first.metadata.seed,
        overwrite=overwrite,
        storage_options=save_storage_options,
    )
    try:
        on_disks = "://" not in f"{first.url}{os.fspath(save_url)}"
        title = "linking, or copying between disks" if link and on_disks else "copying"
        for number, file in enumerate(counted(files, total=len(files), what=title, shown=progress)):
            writer.add_file(dataclasses.replace(file.entry, trajectory_id=number), file, link=link)
        return writer.finish()
    finally:
        writer.abandon()
