"""Find a store, or make one.

Invariant: a place that is refused holds nothing that looks like a store; of several that make one at the same place at the
same time, one does and the others open it.
"""

from __future__ import annotations

import uuid

from trajstore.errors import StoreExistsError, StoreNotFoundError, UnsupportedStorageError
from trajstore.format import layout
from trajstore.format.snapshot import StoreDocument
from trajstore.storage.commit import EMPTY_VERSION, History, Version
from trajstore.storage.filesystem import Filesystem


def open_existing(filesystem: Filesystem, history: History, version: int | None) -> tuple[str, Version]:
    """Identity and a version of the store that is there.

    Args:
        filesystem: Where.
        history: Its versions.
        version: Which; None for the latest.

    Raises:
        StoreNotFoundError: There is none.
    """
    document, hint = filesystem.read_many([layout.STORE_DOCUMENT, layout.LATEST_HINT])
    if document is None:
        raise StoreNotFoundError(
            f"no trajstore at {filesystem.description} ({layout.STORE_DOCUMENT} is not there); check the path or bucket, or "
            "make one with mode='a'"
        )
    store = StoreDocument.from_bytes(document, key=f"{layout.STORE_DOCUMENT} in {filesystem.description}")
    if version is not None:
        return store.store_uuid, history.load(version)
    return store.store_uuid, history.latest(history.parse_hint(hint))


def find_existing(filesystem: Filesystem, history: History) -> tuple[str, Version] | None:
    """Identity and latest version of the store that is there, or None."""
    try:
        return open_existing(filesystem, history, None)
    except StoreNotFoundError:
        return None


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
