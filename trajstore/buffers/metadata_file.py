"""One small file beside a store, replaced whole.

Invariant: whoever reads the file sees all of its former bytes or all of its new ones, also after a power loss.
"""

from __future__ import annotations

import os
import uuid

from trajstore.errors import MissingObjectError
from trajstore.storage.connect import connect


def replace_file(path: str, data: bytes) -> None:
    """Write a file, local or under a URL, in place of the one that is there. Durable when it returns.

    Raises:
        StorageError: The disk or bucket failed; the former file is still there.
    """
    folder, name = _parts(path)
    filesystem = connect(folder)
    try:
        if "://" in folder:
            filesystem.overwrite(name, data)  # one object: a bucket replaces it whole
            return
        # Stored durably under a name of its own first, since renaming is all that a local overwrite promises.
        temporary = f".{name}.{uuid.uuid4().hex}.tmp"
        filesystem.store({temporary: [data]})
        with filesystem.errors(name):
            os.replace(os.path.join(folder, temporary), os.path.join(folder, name))
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    finally:
        filesystem.close()


def read_file(path: str) -> bytes:
    """The bytes of a file, local or under a URL.

    Raises:
        MissingObjectError: It is not there.
    """
    folder, name = _parts(path)
    filesystem = connect(folder)
    try:
        data = filesystem.read(name)
    finally:
        filesystem.close()
    if data is None:
        raise MissingObjectError(f"{path} is not there; check the path")
    return data


def _parts(path: str) -> tuple[str, str]:
    if path.startswith("file://"):
        path = path.removeprefix("file://")
    if "://" in path:
        folder, _, name = path.rpartition("/")
        return folder, name
    folder, name = os.path.split(os.path.abspath(os.path.expanduser(path)))
    return folder, name
