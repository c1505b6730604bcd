"""Files that are kept open for reading: opening one for every page costs as much as reading a small page.

Invariant: a file is closed when nobody reads it any more and it is no longer among the last used; a process that keeps no
more than ``keep`` of them open never runs out of descriptors because of this.
"""

from __future__ import annotations

import collections
import os
import threading


class OpenFile:
    """A file open for reading, closed when the last reference to it is gone."""

    __slots__ = ("number",)

    def __init__(self, path: str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class OpenFiles:
    """The files last used. Used by several threads.

    Args:
        keep: Most files kept open.
    """

    def __init__(self, keep: int = 128) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._files: collections.OrderedDict[str, OpenFile] = collections.OrderedDict()

    def get(self, path: str) -> OpenFile:
        """A file; hold on to it while reading.

        Raises:
            OSError: It cannot be opened.
        """
        with self._lock:
            file = self._files.get(path)
            if file is not None:
                self._files.move_to_end(path)
                return file
        file = OpenFile(path)
        with self._lock:
            self._files[path] = file
            while len(self._files) > self._keep:
                self._files.popitem(last=False)
        return file

    def forget(self, path: str) -> None:
        """A file was removed: its bytes are free once nobody reads it."""
        with self._lock:
            self._files.pop(path, None)

    def close(self) -> None:
        """Close what nobody is reading. May be called twice."""
        with self._lock:
            self._files.clear()
