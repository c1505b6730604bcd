"""One small file by its path or URL, read or replaced whole.

Invariant: whoever reads the file sees all of its former bytes or all of its new ones, also after a power loss.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from trajstore.errors import MissingObjectError
from trajstore.storage.connect import connect


def replace_file(path: str, data: bytes, *, storage_options: Mapping[str, Any] | None = None) -> None:
    """Write a file in place of the one that is there. Durable when it returns.

    Args:
        path: Local, or a URL.
        data: Its bytes.
        storage_options: For a URL.

    Raises:
        StorageError: The disk or bucket failed; the former file is still there.
    """
    folder, name = _parts(path)
    with contextlib.closing(connect(folder, storage_options=storage_options)) as filesystem:
        filesystem.overwrite(name, data, durable=True)


def read_file(path: str, *, storage_options: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a file.

    Args:
        path: Local, or a URL.
        storage_options: For a URL.

    Raises:
        MissingObjectError: It is not there.
    """
    folder, name = _parts(path)
    with contextlib.closing(connect(folder, storage_options=storage_options)) as filesystem:
        data = filesystem.read(name)
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
