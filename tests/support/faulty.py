"""Storages that fail at the n-th operation: a bucket, as its client sees it, and a disk, as the kernel reports it."""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from trajstore.storage.local import LocalFilesystem
from trajstore.storage.remote import RemoteFilesystem

_CONDITIONAL = re.compile(r"(snapshots/\d{20}|trajstore)\.json$")
_DELAY_S = 0.005


class ClientError(Exception):
    """As botocore's: the answer of the server is attached."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


def _answer(code: str, status: int) -> OSError:
    """As s3fs raises it."""
    error = OSError(errno.EBUSY, f"the server answered {code}")
    error.__cause__ = ClientError(code, status)
    return error


# What may be wrong with one operation. Each is given the operation and a way to do a part of it.
FAULTS = ("fail", "refuse", "cut", "delay", "lost reply", "late", "duplicate", "409", "429")


class Faults:
    """Counts operations, and spoils the n-th, or all from the n-th on.

    Args:
        kind: One of ``FAULTS``; None for a healthy storage.
        at: Which operation, from 0.
        forever: All later ones too.
    """

    def __init__(self, kind: str | None = None, at: int = 0, *, forever: bool = False) -> None:
        self.kind = kind
        self.operations = 0
        self.fired = 0
        self.log: list[str] = []
        self._at = at
        self._forever = forever
        self._late: list[tuple[int, Callable[[], Any]]] = []
        self._lock = threading.Lock()

    def run(self, name: str, whole: Callable[[], Any], part: Callable[[], Any] | None = None) -> Any:
        """One operation; ``part`` leaves it half done, where that can happen."""
        with self._lock:
            number = self.operations
            self.operations += 1
            self.log.append(name)
            due = [call for when, call in self._late if when <= number]
            self._late = [(when, call) for when, call in self._late if when > number]
            spoiled = self.kind is not None and (number >= self._at if self._forever else number == self._at)
            self.fired += spoiled
        for call in due:
            self._quietly(call)
        return self._spoil(number, whole, part) if spoiled else whole()

    def _spoil(self, number: int, whole: Callable[[], Any], part: Callable[[], Any] | None) -> Any:
        match self.kind:
            case "fail":
                raise OSError(errno.EIO, "the connection broke before the request was sent")
            case "refuse":
                raise _answer("InvalidRequest", 400)
            case "cut":
                if part is not None:
                    part()
                raise ConnectionResetError("the connection broke while the data was on its way")
            case "delay":
                time.sleep(_DELAY_S)
                return whole()
            case "lost reply":
                self._quietly(whole)
                raise TimeoutError("no answer")
            case "late":  # the request is under way while the client has given it up
                with self._lock:
                    self._late.append((number + 2, whole))
                raise TimeoutError("no answer")
            case "duplicate":
                self._quietly(whole)
                return whole()
            case "409":
                raise _answer("ConditionalRequestConflict", 409)
            case "429":
                raise _answer("TooManyRequests", 429)
            case _:
                raise ValueError(self.kind)

    @staticmethod
    def _quietly(call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception:
            return


class FaultyFileSystem(MemoryFileSystem):
    """A bucket in memory. Objects appear whole or not at all where a request is conditional."""

    cachable = False

    def __init__(self, objects: dict[str, MemoryFile], faults: Faults) -> None:
        super().__init__()
        self.store = objects
        self.pseudo_dirs = [""]
        self.faults = faults

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        read = super().cat_file
        return self.faults.run(f"get {path}", lambda: read(path, start, end, **kwargs))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        conditional = bool(_CONDITIONAL.search(path))

        def put(data: bytes) -> None:
            if conditional and path in self.store:
                raise FileExistsError(path)
            self.store[path] = MemoryFile(self, path, data)

        self.faults.run(
            f"put {path}", lambda: put(value), None if conditional else lambda: put(value[: len(value) // 2])
        )

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if mode != "wb":
            return super()._open(path, mode, **kwargs)
        self.faults.run(f"begin {path}", lambda: None)
        return _Upload(self, path)


class _Upload:
    """A multipart upload: the object appears when it is completed."""

    def __init__(self, fs: FaultyFileSystem, path: str) -> None:
        self._fs, self._path = fs, path
        self._parts: dict[int, bytes] = {}
        self._number = 0

    def write(self, data: Any) -> None:
        number, part = self._number, bytes(data)
        self._number += 1  # parts are numbered: sending one twice changes nothing
        self._fs.faults.run(f"part {self._path}", lambda: self._parts.update({number: part}))

    def close(self) -> None:
        def complete() -> None:
            self._fs.store[self._path] = MemoryFile(
                self._fs, self._path, b"".join(self._parts[n] for n in sorted(self._parts))
            )

        self._fs.faults.run(f"complete {self._path}", complete)

    def discard(self) -> None:
        self._fs.faults.run(f"abort {self._path}", self._parts.clear)


def faulty_bucket(objects: dict[str, MemoryFile], faults: Faults) -> RemoteFilesystem:
    """A store in a bucket that holds ``objects``."""
    filesystem = RemoteFilesystem(FaultyFileSystem(objects, faults), "/bucket/store", url="memory://bucket/store")
    filesystem.stream_threshold_bytes = 512
    return filesystem


DISK_FAULTS = {
    "ENOSPC": errno.ENOSPC,
    "EDQUOT": errno.EDQUOT,
    "EIO": errno.EIO,
    "EROFS": errno.EROFS,
}


class FaultyDisk(LocalFilesystem):
    """A local filesystem whose n-th system call that changes the disk fails, after half of a write.

    Args:
        root: The store's folder.
        code: The errno.
        at: Which call, from 0.
        forever: All later ones too.
    """

    stream_threshold_bytes = 512

    def __init__(self, root: str, code: int, at: int, *, forever: bool = False) -> None:
        super().__init__(root, threads=2)
        self._code, self._at, self._forever = code, at, forever
        self._lock = threading.Lock()
        self.calls = 0
        self.fired = 0

    def _spoiled(self) -> bool:
        with self._lock:
            number = self.calls
            self.calls += 1
            spoiled = number >= self._at if self._forever else number == self._at
            self.fired += spoiled
        return spoiled

    def _fail(self) -> None:
        raise OSError(self._code, os.strerror(self._code))

    def _make_directory(self, path: str) -> None:
        if self._spoiled():
            self._fail()
        super()._make_directory(path)

    def _create_file(self, path: str) -> int:
        if self._spoiled():
            self._fail()
        return super()._create_file(path)

    def _write(self, descriptor: int, buffers: Sequence[Any], name: str) -> None:
        if self._spoiled():
            whole = b"".join(bytes(memoryview(b)) for b in buffers)
            super()._write(descriptor, [whole[: len(whole) // 2]], name)
            self._fail()
        super()._write(descriptor, buffers, name)

    def _fsync_file(self, descriptor: int, name: str) -> None:
        if self._spoiled():
            self._fail()

    def _fsync_directory(self, path: str) -> None:
        if self._spoiled():
            self._fail()

    def _link(self, source: str, target: str) -> None:
        if self._spoiled():
            self._fail()
        super()._link(source, target)

    def _rename(self, source: str, target: str) -> None:
        if self._spoiled():
            self._fail()
        super()._rename(source, target)

    def _unlink(self, path: str) -> None:
        if self._spoiled():
            self._fail()
        super()._unlink(path)
