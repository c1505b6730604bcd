"""Find a store, or make one.

Invariant: a place that is refused holds nothing that looks like a store; of several that make one at the same place at the
same time, one does and the others open it.
"""

from __future__ import annotations

import contextlib
import uuid

from trajstore.errors import (
    CorruptionError,
    StorageError,
    StoreExistsError,
    StoreNotFoundError,
    UnsupportedStorageError,
)
from trajstore.format import layout
from trajstore.format.snapshot import StoreDocument
from trajstore.storage.commit import EMPTY_VERSION, History, Version
from trajstore.storage.filesystem import Filesystem

# By these an error recognises a buffer that RLinf saved; the older index has its misspelling.
_RLINF_DOCUMENT = "metadata.json"
_RLINF_INDEXES = ("trajectory_index.json", "trajector_index.json")
_MOST_FOLDERS = 1000  # looked into for the sake of a message
_NAMED_FOLDERS = 4


def open_existing(filesystem: Filesystem, history: History, version: int | None) -> tuple[str, Version]:
    """Identity and a version of the store that is there.

    Args:
        filesystem: Where.
        history: Its versions.
        version: Which; None for the latest.

    Raises:
        StoreNotFoundError: There is none.
        CorruptionError: There is one that has lost its versions.
    """
    found = _find(filesystem, history, version)
    if found is None:
        raise StoreNotFoundError(f"no trajstore at {filesystem.description}{_what_is_there(filesystem)}")
    return found


def find_existing(filesystem: Filesystem, history: History) -> tuple[str, Version] | None:
    """Identity and latest version of the store that is there, or None."""
    return _find(filesystem, history, None)


def _find(filesystem: Filesystem, history: History, version: int | None) -> tuple[str, Version] | None:
    document, hint = filesystem.read_many([layout.STORE_DOCUMENT, layout.LATEST_HINT])
    if document is None:
        return None
    store = StoreDocument.from_bytes(document, key=f"{layout.STORE_DOCUMENT} in {filesystem.description}")
    if version is not None:
        return store.store_uuid, history.load(version)
    hinted = history.parse_hint(hint)
    latest = history.latest(hinted)
    if hinted and not latest.number:  # versions are numbered without gaps, and emptied rather than removed
        raise CorruptionError(
            f"{layout.LATEST_HINT} of {filesystem.description} says that there is a version {hinted}, and there is none: "
            f"the versions were lost; restore {layout.SNAPSHOTS}/ from a copy, or, to begin anew, choose another place"
        )
    return store.store_uuid, latest


def open_or_create(filesystem: Filesystem, history: History, *, must_be_new: bool) -> tuple[str, Version]:
    """Identity and latest version of the store that is there, or of a new one.

    Raises:
        StoreExistsError: There is one, and it was to be new.
        UnsupportedStorageError: A storage that cannot create an object atomically.
    """
    if not must_be_new:
        found = find_existing(filesystem, history)
        if found is not None:
            return found  # else it is made below; if somebody else is faster, theirs is opened
    _check_creation_is_atomic(filesystem)
    store = StoreDocument(uuid.uuid4().hex)
    if filesystem.create(layout.STORE_DOCUMENT, store.to_bytes()):
        return store.store_uuid, EMPTY_VERSION
    if must_be_new:
        raise taken(filesystem)
    return open_existing(filesystem, history, None)


def taken(filesystem: Filesystem) -> StoreExistsError:
    """The error that says so."""
    return StoreExistsError(
        f"a store is already at {filesystem.description}; open it with mode='a', or choose another place"
    )


def _what_is_there(filesystem: Filesystem) -> str:
    """What an error says of a place without a store: what lies there instead, and what to do with it."""
    place, folders = filesystem.description, _folders(filesystem)
    keys = [_RLINF_DOCUMENT, *_RLINF_INDEXES, *(f"{folder}/{layout.STORE_DOCUMENT}" for folder in folders)]
    keys += [f"{folder}/{_RLINF_DOCUMENT}" for folder in folders if folder.startswith("rank_")]
    found: set[str] = set()
    with contextlib.suppress(StorageError):
        found = {key for key, data in zip(keys, filesystem.read_many(keys), strict=True) if data is not None}
    stores = [folder for folder in folders if f"{folder}/{layout.STORE_DOCUMENT}" in found]
    ranks = [folder for folder in folders if f"{folder}/{_RLINF_DOCUMENT}" in found]
    if _RLINF_DOCUMENT in found and found.intersection(_RLINF_INDEXES):
        return f": these are RLinf's files; make a store of them: trajstore rlinf import {place} STORE"
    if stores:
        told = ", ".join(stores[:_NAMED_FOLDERS]) + ", ..." * (len(stores) > _NAMED_FOLDERS)
        advice = f"open one of them, {place}/{stores[0]} say"
        if len(stores) > 1 and all(folder.startswith("rank_") for folder in stores):
            advice += f", or merge them: trajstore rlinf merge-or-split --source-path {place} --save-path STORE"
        return f", but there are stores in its folders ({told}); {advice}"
    if ranks:
        told = ", ".join(ranks[:_NAMED_FOLDERS]) + ", ..." * (len(ranks) > _NAMED_FOLDERS)
        return f": its folders ({told}) hold RLinf's files; make a store of them: trajstore rlinf import {place} STORE"
    return f" ({layout.STORE_DOCUMENT} is not there); check the path or bucket, or make one with mode='a'"


def _folders(filesystem: Filesystem) -> list[str]:
    """Names of folders inside a folder; in a bucket, where a listing goes all the way down, only what is likely."""
    if "://" in filesystem.url:
        return ["rank_0", "rank_1"]
    with contextlib.suppress(StorageError):
        return filesystem.list_folders()[:_MOST_FOLDERS]
    return []


def _check_creation_is_atomic(filesystem: Filesystem) -> None:
    """Some S3 servers accept a conditional put and ignore the condition: find out before there is a store to lose.

    It is tried on the hint, which nobody trusts, so a refused storage holds nothing that looks like a store.
    """
    if filesystem.single_writer:
        return
    if filesystem.create(layout.LATEST_HINT, b"0") and filesystem.create(layout.LATEST_HINT, b"00"):
        raise UnsupportedStorageError(
            f"{filesystem.description} replaced an object that was to be created only if absent, so two writers could "
            "overwrite each other's commits; use a server that honours If-None-Match, or pass single_writer=True if nobody "
            "else writes this store"
        )
