"""The folders above a store on a disk, whose names must be as durable as what the store acknowledges.

Invariant: a sync of a folder makes durable what was in it when the sync began. So one is enough for all stores below that
were there by then, and a store that came later, or was found later, waits for one of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

_MOST_KNOWN = 4096
_synced: dict[str, float] = {}  # when the last sync began, of those that are done in this process


class FoldersAbove:
    """Those of one store. Whoever made them may have been killed before they were synced.

    Args:
        root: The store's folder.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._there_since = time.monotonic() if os.path.isdir(root) else None
        self._done = False

    def root_made(self) -> None:
        """The store's folder, or one above it, was made just now."""
        self._there_since = time.monotonic()

    def sync(self, sync: Callable[[str], None]) -> None:
        """Sync those that have not been since the store was there; once for each handle."""
        if self._done:
            return
        for path in _above(self._root):  # hardly ever is one waiting to be written: no work for threads
            if self._there_since is not None and _synced.get(path, 0.0) > self._there_since:
                continue
            began = time.monotonic()
            sync(path)
            if len(_synced) >= _MOST_KNOWN:
                _synced.clear()
            _synced[path] = began
        self._done = True


def _above(path: str) -> list[str]:
    """The folders above a path, up to where its disk is mounted."""
    found = []
    device = os.stat(path).st_dev
    while (parent := os.path.dirname(path)) != path and os.stat(parent).st_dev == device:
        found.append(parent)
        path = parent
    return found
