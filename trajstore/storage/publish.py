"""Put-if-absent on everything that fsspec reaches, and what to do when the answer is lost.

Invariant: True is returned only after the storage said that the object is ours, or after it was read back and holds our
bytes, which carry a fresh 128-bit commit id. A client that repeats its own landed PUT is told "lost the race" by the
server; taking that at face value would commit an append twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from trajstore.errors import CommitOutcomeUnknownError, TrajstoreError, UnsupportedStorageError
from trajstore.storage.retry import error_codes, is_transient, retrying

_memory_lock = threading.Lock()
# Codes by which S3 servers, Google and Azure say that the key is taken.
_TAKEN = frozenset(
    {
        "PreconditionFailed",
        "412",
        "BlobAlreadyExists",
        "EntityAlreadyExists",
        "ResourceExistsError",
        "conditionNotMet",
    }
)

_NO_CONDITIONS = frozenset({"NotImplemented", "501"})


def create_function(fs: AbstractFileSystem) -> Callable[[str, bytes], None] | None:
    """How this filesystem puts an object only if there is none, or None if it cannot.

    The function raises FileExistsError (or an error with one of the codes above) if the key is taken.
    """
    if isinstance(fs, MemoryFileSystem):
        return lambda path, data: _create_in_memory(fs, path, data)
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    if protocols & {"s3", "s3a"}:  # If-None-Match: *
        # One PUT, never multipart: some servers ignore the condition on the latter.
        return lambda path, data: fs.pipe_file(path, data, mode="create", chunksize=max(len(data) + 1, 1 << 26))
    if protocols & {"gs", "gcs"}:  # ifGenerationMatch=0
        return lambda path, data: fs.pipe_file(path, data, mode="create")
    if protocols & {"abfs", "az", "abfss"}:  # If-None-Match: *
        return lambda path, data: fs.pipe_file(path, data, mode="create")
    return None


def create(
    fs: AbstractFileSystem,
    path: str,
    data: bytes,
    *,
    single_writer: bool,
    read_back: Callable[[], bytes | None],
) -> bool:
    """Put ``data`` at ``path`` unless something is there.

    Args:
        fs: The filesystem.
        path: Full path on it.
        data: The object's bytes; unique to this call.
        single_writer: Allow "look, then write" where nothing better exists.
        read_back: Reads the object, None if it is absent.

    Returns:
        Whether the object is ours.
    """
    put = create_function(fs)
    if put is None:
        if not single_writer:
            raise UnsupportedStorageError(
                f"{_protocol(fs)} cannot create an object atomically as far as trajstore knows, so two writers could "
                "overwrite each other's commits; use a local disk, S3, Google Cloud Storage or Azure, or pass "
                "single_writer=True if nobody else writes this store"
            )
        return _look_then_put(fs, path, data, read_back)
    try:
        for attempt in retrying():
            with attempt:
                return _attempt(put, path, data, read_back)
    except Exception as error:
        if error_codes(error) & _NO_CONDITIONS:
            if single_writer:
                return _look_then_put(fs, path, data, read_back)
            raise UnsupportedStorageError(
                f"the server of {path} knows no If-None-Match ({error}), so two writers could overwrite each other's "
                "commits; use another server, or pass single_writer=True if nobody else writes this store"
            ) from error
        if is_transient(error) and not isinstance(error, CommitOutcomeUnknownError):
            raise _unknown(path, error) from error
        raise
    raise AssertionError("unreachable")  # retrying() ends by raising


def _attempt(put: Callable[[str, bytes], None], path: str, data: bytes, read_back: Callable[[], bytes | None]) -> bool:
    try:
        put(path, data)
    except Exception as error:
        taken = isinstance(error, FileExistsError) or bool(_TAKEN & error_codes(error))
        if not taken and not is_transient(error):
            raise
        try:
            found = read_back()
        except TrajstoreError as later:
            raise _unknown(path, later) from error
        if found is None:
            raise  # refused or lost, and nobody is there: once more
        return found == data
    return True


def _look_then_put(fs: AbstractFileSystem, path: str, data: bytes, read_back: Callable[[], bytes | None]) -> bool:
    """What remains where nothing is atomic and nobody else writes."""
    if read_back() is not None:
        return False
    fs.pipe_file(path, data)
    return True


def _unknown(path: str, error: Exception) -> CommitOutcomeUnknownError:
    return CommitOutcomeUnknownError(
        f"{path}: the storage did not say whether the commit landed ({error}); open the store again and look for the "
        "trajectories' uuids before appending them once more"
    )


def _create_in_memory(fs: MemoryFileSystem, path: str, data: bytes) -> None:
    with _memory_lock:
        if fs.isfile(path):  # mode="create" would look through every key there is
            raise FileExistsError(path)
        fs.pipe_file(path, data)


def _protocol(fs: Any) -> str:
    return fs.protocol if isinstance(fs.protocol, str) else str(fs.protocol[0])
