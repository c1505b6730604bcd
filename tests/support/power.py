"""A disk that remembers only what was fsynced, and a filesystem that logs every system call for it.

Invariant: the model knows nothing of trajstore. A file's bytes survive as of its last fsync, a folder's names as of the last
fsync of that folder; everything else may be gone, or, in the lenient variant, survives in a random part.
"""

from __future__ import annotations

import copy
import os
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trajstore.storage.local import LocalFilesystem

Entry = tuple[Any, ...]


class PowerCut(Exception):
    """The process ends here: no call reaches the disk any more."""


class RecordingFilesystem(LocalFilesystem):
    """A local filesystem that logs the system calls that change the disk, each once it has returned.

    The real disk is synced by nobody: what an fsync means is the model's business.

    Args:
        root: The store's folder.
        log: Shared by all handles of a history.
        stop_before: Every call from this position of the log on raises ``PowerCut`` instead.
    """

    stream_threshold_bytes = 1024

    def __init__(self, root: str, log: list[Entry], *, stop_before: int | None = None) -> None:
        super().__init__(root, threads=2)
        self._log = log
        self._stop_before = stop_before
        self._files: dict[int, str] = {}  # descriptor -> the path under which its file was created
        self._lock = threading.Lock()

    def acknowledge(self, what: Any) -> None:
        """Mark in the log that this is owed from here on."""
        with self._lock:
            self._log.append(("acknowledge", what))

    def _logged(self, call: Callable[[], Any], *entry: Any) -> Any:
        # One call at a time: the order of the log is the order of the disk.
        with self._lock:
            if self._stop_before is not None and len(self._log) >= self._stop_before:
                raise PowerCut
            result = call()
            self._log.append(entry)
            return result

    def _make_directory(self, path: str) -> None:
        self._logged(lambda: super(RecordingFilesystem, self)._make_directory(path), "mkdir", path)

    def _create_file(self, path: str) -> int:
        create = super()._create_file
        descriptor: int = self._logged(lambda: create(path), "create", path)
        self._files[descriptor] = path
        return descriptor

    def _write(self, descriptor: int, buffers: Sequence[Any], name: str) -> None:
        write, path = super()._write, self._files[descriptor]
        data = b"".join(bytes(memoryview(b)) for b in buffers)
        self._logged(lambda: write(descriptor, buffers, name), "write", path, data)

    def _fsync_file(self, descriptor: int, name: str) -> None:
        self._logged(lambda: None, "fsync", self._files[descriptor])

    def _fsync_directory(self, path: str) -> None:
        self._logged(lambda: None, "fsync directory", path)

    def _link(self, source: str, target: str) -> None:
        link = super()._link
        self._logged(lambda: link(source, target), "link", source, target)

    def _rename(self, source: str, target: str) -> None:
        rename = super()._rename
        self._logged(lambda: rename(source, target), "rename", source, target)

    def _unlink(self, path: str) -> None:
        unlink = super()._unlink
        self._logged(lambda: unlink(path), "unlink", path)


@dataclass(eq=False)
class _File:
    data: bytes = b""
    durable: bytes = b""


@dataclass(eq=False)
class _Folder:
    names: dict[str, Any] = field(default_factory=dict)
    durable: dict[str, Any] = field(default_factory=dict)
    pending: list[tuple[str, Any]] = field(default_factory=list)  # name -> what it names since the last fsync


class Disk:
    """The disk that a log describes.

    Args:
        top: An existing, durable folder above everything in the log.
    """

    def __init__(self, top: str) -> None:
        self._top = top
        self._root = _Folder()
        self._created: dict[str, _File] = {}  # by the path under which the file was created

    def apply(self, entry: Entry) -> None:
        """One entry of the log."""
        kind, *rest = entry
        if kind == "mkdir":
            self._name(rest[0], _Folder())
        elif kind == "create":
            self._created[rest[0]] = _File()
            self._name(rest[0], self._created[rest[0]])
        elif kind == "write":
            self._created[rest[0]].data += rest[1]
        elif kind == "fsync":
            self._created[rest[0]].durable = self._created[rest[0]].data
        elif kind == "fsync directory" and (rest[0] + os.sep).startswith(self._top + os.sep):
            folder = self._folder(rest[0])
            folder.durable, folder.pending = dict(folder.names), []
        elif kind == "link":
            self._name(rest[1], self._named(rest[0]))
        elif kind == "rename":
            self._name(rest[1], self._named(rest[0]))
            self._name(rest[0], None)
        elif kind == "unlink":
            self._name(rest[0], None)

    def durable(self) -> dict[str, bytes | None]:
        """What is left at the least: path -> bytes, None for a folder; relative to the top."""
        return _walk(self._root, lambda folder: folder.durable, lambda file: file.durable)

    def lenient(self, rng: random.Random) -> dict[str, bytes | None]:
        """What may be left: of everything not synced, any part."""

        def names(folder: _Folder) -> dict[str, Any]:
            left = dict(folder.durable)
            kind = rng.choice(["prefix", "subset", "all"])
            stop = rng.randint(0, len(folder.pending)) if kind == "prefix" else len(folder.pending)
            for name, node in folder.pending[:stop]:
                if kind == "subset" and rng.random() < 0.5:
                    continue
                if node is None:
                    left.pop(name, None)
                else:
                    left[name] = node
            return left

        def data(file: _File) -> bytes:
            if file.data == file.durable:
                return file.data
            kind = rng.choice(["none", "cut", "zeros", "all"])
            cut = rng.randint(len(file.durable), len(file.data))
            return {
                "none": file.durable,
                "cut": file.data[:cut],
                "zeros": file.durable + bytes(len(file.data) - len(file.durable)),
                "all": file.data,
            }[kind]

        return _walk(self._root, names, data)

    def copy(self) -> Disk:
        """An independent copy."""
        return copy.deepcopy(self)

    def _parts(self, path: str) -> list[str]:
        relative = os.path.relpath(path, self._top)
        return [] if relative == "." else relative.split(os.sep)

    def _folder(self, path: str) -> _Folder:
        folder = self._root
        for part in self._parts(path):
            folder = folder.names[part]
        return folder

    def _named(self, path: str) -> Any:
        return self._folder(os.path.dirname(path)).names[os.path.basename(path)]

    def _name(self, path: str, node: Any) -> None:
        folder, name = self._folder(os.path.dirname(path)), os.path.basename(path)
        if node is None:
            folder.names.pop(name)
        else:
            folder.names[name] = node
        folder.pending.append((name, node))


def _walk(
    folder: _Folder, names: Callable[[_Folder], dict[str, Any]], data: Callable[[_File], bytes], at: str = ""
) -> dict[str, bytes | None]:
    found: dict[str, bytes | None] = {}
    for name, node in names(folder).items():
        path = f"{at}{name}"
        if isinstance(node, _Folder):
            found[path] = None
            found.update(_walk(node, names, data, f"{path}/"))
        else:
            found[path] = data(node)
    return found


class Rebuilt:
    """A real folder that is made to hold what is left after a power cut; only differences are written."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._content: dict[str, bytes | None] = {}
        os.makedirs(folder)

    def show(self, content: dict[str, bytes | None]) -> None:
        """Make the folder hold exactly this."""
        for path in sorted(self._content.keys() - content.keys(), reverse=True):
            whole = os.path.join(self.folder, path)
            os.rmdir(whole) if self._content[path] is None else os.unlink(whole)
        for path in sorted(content):
            data = content[path]
            if path in self._content and self._content[path] == data:
                continue
            whole = os.path.join(self.folder, path)
            if data is None:
                os.mkdir(whole)
                continue
            with open(whole, "wb") as file:
                file.write(data)
        self._content = dict(content)

    def fresh(self, content: dict[str, bytes | None]) -> None:
        """The same, from nothing: for a folder that was written to meanwhile."""
        shutil.rmtree(self.folder)
        os.makedirs(self.folder)
        self._content = {}
        self.show(content)
