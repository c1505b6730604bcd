"""Other stores whose segments a store refers to.

Invariant: a base is opened only where the store's own parent folder or a prefix that the caller named says so, and only if
the store there is the one that was meant; anything else is an error that names the line to add. It is opened once, when
something that lies there is first read: what lies elsewhere can be read whether or not it is there.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trajstore.errors import CorruptionError, StoreNotFoundError, TrajstoreError, UntrustedBaseError
from trajstore.format import layout
from trajstore.format.snapshot import Base, StoreDocument
from trajstore.storage.attach import find_existing
from trajstore.storage.commit import History
from trajstore.storage.connect import connect, options_for
from trajstore.storage.filesystem import Filesystem

Connect = Callable[[str, Mapping[str, Any] | None], Filesystem]


class Bases:
    """The bases of one store, opened when first needed. Used by several threads.

    Args:
        url: Of the store.
        connect: From a URL and storage options to a filesystem.
        options: Storage options of the store itself, used for bases beside it.
        trusted: Prefixes of URLs that may be opened, with the storage options of each; see ``absolute``.
    """

    def __init__(
        self,
        url: str,
        connect: Connect,
        *,
        options: Mapping[str, Any] | None = None,
        trusted: Mapping[str, Mapping[str, Any] | None] | None = None,
    ) -> None:
        self._url = url
        self._connect = connect
        self._options = options
        self._trusted = absolute_prefixes(trusted)
        self._opened: dict[tuple[str, str], Filesystem] = {}
        self._lock = threading.Lock()
        self._opening: dict[tuple[str, str], threading.Lock] = {}  # held while a base is opened: each is opened once

    def open(self, base: Base) -> Filesystem:
        """Where a base is.

        Raises:
            UntrustedBaseError: Outside the store's parent and the prefixes that were named.
            StoreNotFoundError: No store is there.
            CorruptionError: Another store is there.
        """
        key = base.url, base.store_uuid
        if key not in self._opened:
            with self._lock:
                opening = self._opening.setdefault(key, threading.Lock())
            with opening:
                if key not in self._opened:
                    self._opened[key] = self._checked(base)
        return self._opened[key]

    def close(self) -> None:
        """Let go of their threads and files. May be called twice."""
        for filesystem in list(self._opened.values()):  # without the lock: one that is being opened may hang
            filesystem.close()

    def _checked(self, base: Base) -> Filesystem:
        url, options = self._resolve(base.url)
        filesystem = self._connect(url, options)
        data = filesystem.read(layout.STORE_DOCUMENT)
        if data is None:
            filesystem.close()
            raise StoreNotFoundError(
                f"{self._url} refers to segments of the store {url}, which is not there; move it back, say where "
                "it is now (store.relocate), or restore it from a copy"
            )
        found = StoreDocument.from_bytes(data, key=f"{layout.STORE_DOCUMENT} in {filesystem.description}")
        if found.store_uuid != base.store_uuid:
            filesystem.close()
            raise CorruptionError(
                f"{self._url} refers to segments of the store {base.store_uuid} at {url}, and another one is there "
                f"({found.store_uuid}); move the right one back, or restore it from a copy"
            )
        return filesystem

    def _resolve(self, url: str) -> tuple[str, Mapping[str, Any] | None]:
        """An absolute URL and its storage options."""
        if "::" in url:
            raise UntrustedBaseError(f"{self._url} refers to the chained URL {url!r}, which is never opened")
        parent = parent_of(self._url)
        if url.startswith("../"):
            if parent is None:
                raise UntrustedBaseError(
                    f"{self._url} refers to {url!r}, and has no parent folder; put the store into a folder"
                )
            below = url.removeprefix("../")
            if parent and not below:  # the store is in the folder of another
                return parent, self._options
            if posixpath.normpath(below) != below or below.startswith(("..", "/")) or below == ".":
                raise UntrustedBaseError(f"{self._url} refers to {url!r}, which leaves its parent folder")
            return f"{parent}/{below}", self._options
        if _is_under(url, parent):
            return url, self._options
        for prefix, options in self._trusted.items():
            if _is_under(url, prefix.rstrip("/")):
                return url, options
        raise UntrustedBaseError(
            f"{self._url} refers to segments of the store {url}, outside its own parent folder; if you trust that "
            f"place, open it "
            f"with bases={{{url!r}: None}} (or its storage options instead of None)"
        )


class LazyBase:
    """A base as versions name it, which is opened when something that lies there is first read.

    Args:
        open: Opens it, or raises what is wrong.
    """

    def __init__(self, open: Callable[[], Filesystem]) -> None:
        self._open = open
        self._filesystem: Filesystem | None = None

    def filesystem(self) -> Filesystem:
        """Where it is.

        Raises:
            UntrustedBaseError: It may not be opened.
            StoreNotFoundError: No store is there.
            CorruptionError: Another store is there.
        """
        if self._filesystem is None:
            self._filesystem = self._open()
        return self._filesystem

    def problem(self) -> TrajstoreError | None:
        """Why it cannot be opened; None if it can."""
        try:
            self.filesystem()
        except TrajstoreError as error:
            return error
        return None


def absolute_prefixes(prefixes: Mapping[str, Mapping[str, Any] | None] | None) -> dict[str, Mapping[str, Any] | None]:
    """Trusted prefixes as references are compared with them: local ones are full paths, seen from the working directory.

    >>> absolute_prefixes({"s3://bucket/runs": {"anon": True}, "/data/../runs/": None, "file:///other": None})
    {'s3://bucket/runs': {'anon': True}, '/runs': None, '/other': None}
    """
    return {absolute(os.fspath(prefix)): options for prefix, options in (prefixes or {}).items()}


def parent_of(url: str) -> str | None:
    """The folder that a store is in; None for a whole bucket, whose neighbours are other people's, or inside an archive.

    >>> parent_of("s3://bucket/runs/a"), parent_of("/data/a/"), parent_of("s3://bucket")
    ('s3://bucket/runs', '/data', None)
    """
    parent = url.rstrip("/").rpartition("/")[0]
    return None if parent.endswith(":/") or "::" in url else parent


def reference(to: str, *, seen_from: str) -> str:
    """How one store names another: relative if it is under the parent folder, so that both can be moved; else absolute.

    >>> reference("/data/a", seen_from="/data/b"), reference("/data/runs/a", seen_from="/data/b")
    ('../a', '../runs/a')
    >>> reference("/data/a", seen_from="/other/b")
    '/data/a'
    """
    parent = parent_of(seen_from)
    return "../" + to.rstrip("/")[len(parent) + 1 :] if parent and _is_under(to.rstrip("/"), parent) else to


def absolute(url: str, *, seen_from: str | None = None) -> str:
    """A URL or path that says the same from everywhere.

    Args:
        url: Of a store; as one store names another if ``seen_from`` is given.
        seen_from: Where the store is that names it.

    >>> absolute("../runs/a", seen_from="s3://bucket/b"), absolute("/data/a/"), absolute("s3://bucket/a/")
    ('s3://bucket/runs/a', '/data/a', 's3://bucket/a')
    """
    if seen_from is not None and url.startswith("../") and parent_of(seen_from) is not None:
        return f"{parent_of(seen_from)}/{url.removeprefix('../')}".rstrip("/")
    path = url.removeprefix("file://")
    if "://" in path:
        return path.rstrip("/")
    return posixpath.abspath(posixpath.expanduser(path))


def same_place(url: str, other: str) -> bool:
    """Whether two URLs or paths are of one store.

    >>> same_place("s3://bucket/a/", "s3://bucket/a"), same_place("/data/../runs", "file:///runs")
    (True, True)
    """
    one, two = absolute(url), absolute(other)
    return one == two or ("://" not in one + two and os.path.realpath(one) == os.path.realpath(two))


def moved(url: str, old: str, new: str) -> str | None:
    """A URL that begins with ``old``, whole parts only, with ``new`` in its place; None if it does not.

    >>> moved("/data/a/b", "/data/a", "/new"), moved("/data/ab", "/data/a", "/new")
    ('/new/b', None)
    """
    old = old.rstrip("/")
    if url != old and not url.startswith(old + "/"):
        return None
    return new.rstrip("/") + url[len(old) :]


def is_trusted(to: str, *, seen_from: str) -> bool:
    """Whether a reference leads to a place that is opened without having been named.

    >>> is_trusted("../a", seen_from="/data/b"), is_trusted("/other/a", seen_from="/data/b")
    (True, False)
    """
    return to.startswith("../") or _is_under(to, parent_of(seen_from))


def refers_to(url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Stores outside its own parent folder to which the store at a place refers; none if no store is there.

    Args:
        url: The place.
        storage_options: For it, if it is a URL.
    """
    with contextlib.closing(connect(url, storage_options=options_for(url, storage_options))) as filesystem:
        found = find_existing(filesystem, History(filesystem))
    bases = () if found is None else found[1].snapshot.bases
    return [base.url for base in bases if not is_trusted(base.url, seen_from=filesystem.url)]


def _is_under(url: str, prefix: str | None) -> bool:
    parts: Sequence[str] = url.split("/")
    return prefix is not None and prefix != "" and ".." not in parts and (url == prefix or url.startswith(prefix + "/"))
