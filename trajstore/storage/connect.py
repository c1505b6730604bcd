"""From a URL to a filesystem."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import fsspec

from trajstore.errors import StorageError
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.local import LocalFilesystem
from trajstore.storage.remote import RemoteFilesystem

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


def connect(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    single_writer: bool = False,
) -> Filesystem:
    """The filesystem of a store.

    Args:
        url: A local path, ``file://``, ``memory://``, ``s3://bucket/path``, or anything else that fsspec knows.
        storage_options: For the fsspec filesystem: credentials, endpoint, and so on.
        single_writer: Accept a storage that cannot create an object atomically.

    Raises:
        StorageError: The URL is empty, fsspec does not know the protocol, or its client library is missing.
    """
    address = os.fspath(url)
    if not address:
        raise StorageError("the path or URL of a store is empty; name a folder, or '.' for the working directory")
    if address.startswith("file://"):
        address = address.removeprefix("file://")
    if "://" not in address:
        root = os.path.abspath(os.path.expanduser(address))
        if storage_options:
            raise StorageError(f"storage_options {sorted(storage_options)} mean nothing for the local path {root}")
        return LocalFilesystem(root, single_writer=single_writer)
    protocol = address.split("://", 1)[0]
    options = dict(storage_options or {})
    if protocol in ("s3", "s3a"):
        # A listing that is minutes old would hide other writers' objects.
        options.setdefault("use_listings_cache", False)
    try:
        fs, root = fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        how = f"pip install 'trajstore[{extra}]'" if extra else f"install what fsspec asks for: {error}"
        raise StorageError(f"{address}: the client library for {protocol}:// is missing; {how}") from error
    except ValueError as error:
        raise StorageError(f"{address}: {error}") from error
    if protocol in ("s3", "s3a"):
        try:
            _bound_waiting(fs)
        except Exception as error:
            raise StorageError(f"{address}: {error}; check storage_options") from error
    return RemoteFilesystem(fs, root, url=address, single_writer=single_writer)


def options_for(place: str | os.PathLike[str], storage_options: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The storage options of a caller as far as they are for one of several places: a local path has none.

    >>> options_for("s3://bucket/runs", {"anon": True}), options_for("file:///runs", {"anon": True})
    ({'anon': True}, None)
    """
    address = os.fspath(place)
    return storage_options if "://" in address and not address.startswith("file://") else None


def _bound_waiting(fs: Any) -> None:
    """Have a server that hangs noticed after s3fs's ``read_timeout`` times a few attempts, not after hours or never."""
    from botocore.handlers import add_expect_header

    # botocore makes five attempts, and trajstore six, knowing which PUTs may have landed; those of s3fs would multiply them.
    fs.retries = 1
    # After "100 Continue" aiohttp forgets its time-out (client_proto.data_received): a PUT could wait for ever.
    fs.connect().meta.events.unregister("before-call.s3", add_expect_header)
