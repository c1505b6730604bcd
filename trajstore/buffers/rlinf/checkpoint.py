"""Which checkpoint is meant, and which share of it: what ``load_checkpoint`` asks before anything changes.

Invariant: nothing here changes anything; what cannot be loaded is refused, or warned of, while the buffer is as it was.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from typing import Any

import trajstore
from trajstore.buffers.rlinf import rollouts
from trajstore.errors import IndexRangeError, SelectionError, StoreNotFoundError
from trajstore.interop.rlinf_files import rank_folders
from trajstore.storage.connect import connect
from trajstore.store import Store
from trajstore.view import View

_SHOWN = 3


def rank_of(
    local_rank: int | None, world_size: int | None, load_rank: int | None, load_split_num: int | None
) -> tuple[int, int]:
    """This rank, and of how many, under the names of either generation.

    Raises:
        SelectionError: Both names of one of them are given.
        IndexRangeError: No ranks, or a rank that is not one of them.

    Examples:
        >>> rank_of(1, 4, None, None), rank_of(None, None, 0, 2), rank_of(None, None, None, None)
        ((1, 4), (0, 2), (0, 1))
    """
    rank = _one_of("local_rank", local_rank, "load_rank", load_rank, 0)
    ranks = _one_of("world_size", world_size, "load_split_num", load_split_num, 1)
    if ranks < 1:
        name = "world_size" if load_split_num is None else "load_split_num"
        raise IndexRangeError(f"{name}={ranks}, expected at least 1")
    if not 0 <= rank < ranks:
        raise IndexRangeError(f"rank {rank} of {ranks}, expected 0 to {ranks - 1}")
    return rank, ranks


def warn_of_none(path: str | os.PathLike[str], total: int, rank: int, ranks: int, *, stacklevel: int) -> None:
    """Warn if a rank gets none of the trajectories, which RLinf allows.

    Args:
        path: Of the checkpoint.
        total: Trajectories in it; none at all are no matter of ranks.
        rank: This one.
        ranks: Of so many.
        stacklevel: As ``warnings.warn`` counts from here.
    """
    if 0 < total <= rank:
        warnings.warn(
            f"rank {rank} of {ranks} gets none of the {total} trajectories of {os.fspath(path)}, so its buffer is empty: "
            f"sampling is an error until some are added; load with at most {total} ranks",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def open_checkpoint(
    url: str, storage_options: Mapping[str, Any] | None, bases: Mapping[str, Mapping[str, Any] | None] | None
) -> Store:
    """The store of a checkpoint, to be read.

    Raises:
        StoreNotFoundError: There is none; names the buffers of ranks that are below.
    """
    try:
        return trajstore.open(url, storage_options=storage_options, bases=bases)
    except StoreNotFoundError as error:
        _check_one_buffer(url, storage_options)
        raise StoreNotFoundError(
            f"no checkpoint at {url}: neither a store nor RLinf's files are there; check the path"
        ) from error


def rollouts_of(view: View, url: str, storage_options: Mapping[str, Any] | None) -> rollouts.Found:
    """The rollouts of a checkpoint.

    Args:
        view: All of its store.
        url: Of that store.
        storage_options: For the URL.

    Raises:
        SelectionError: It holds other trajectories.
        StoreNotFoundError: It holds no rollouts, but the buffers of ranks are below.
    """
    try:
        found = rollouts.find(view)
    except SelectionError:
        _check_one_buffer(url, storage_options)
        raise
    if not found.entries:  # a store that was made by mistake could lie above those of the ranks
        _check_one_buffer(url, storage_options)
    return found


def _check_one_buffer(url: str, storage_options: Mapping[str, Any] | None) -> None:
    """Raise if there are the buffers of several ranks, each of which could be meant."""
    place = url.rstrip("/")
    with contextlib.closing(connect(place, storage_options=storage_options)) as filesystem:
        names = sorted(name for name, documents in rank_folders(filesystem).items() if documents)
    if names:
        raise StoreNotFoundError(
            f"{place} is not one buffer, but a folder of {len(names)} ({', '.join(names[:_SHOWN])}"
            f"{', ...' if len(names) > _SHOWN else ''}): load one of them, {place}/{names[0]}, or merge them first with "
            f"`trajstore rlinf merge-or-split --source-path {place} --save-path MERGED`"
        )


def _one_of(name: str, value: int | None, other_name: str, other: int | None, default: int) -> int:
    if value is not None and other is not None:
        raise SelectionError(f"{name}= and {other_name}= mean the same; give one")
    return next((given for given in (value, other) if given is not None), default)
