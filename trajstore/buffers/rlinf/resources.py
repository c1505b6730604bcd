"""What a buffer of rollouts takes: memory for pages, a thread, a store, a folder.

Invariant: all of it is given back, by ``close`` or when the buffer is collected; what waits is written first.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from dataclasses import dataclass

from trajstore.storage.workers import Workers
from trajstore.store import Store

_UNCACHED_BYTES = 64 << 20
_LEAST_CACHE_BYTES = 8 << 20


@dataclass(frozen=True)
class CacheKnobs:
    """How much memory pages may take.

    Attributes:
        nbytes: The budget.
        rollouts: The cache holds at least so many, whatever the budget.
        enabled: Otherwise only what a batch needs is kept.
    """

    nbytes: int
    rollouts: int
    enabled: bool

    def bytes_for(self, rollout_bytes: int) -> int:
        """Size of the page cache of a store with rollouts of about this size."""
        if not self.enabled:
            return _UNCACHED_BYTES
        return max(self.nbytes, self.rollouts * rollout_bytes, _LEAST_CACHE_BYTES)


class Resources:
    """What has to be given back, in this order: the thread that files, the store, the folder.

    Whoever forgets to close a buffer has it done when the buffer is collected, or at the interpreter's end.
    """

    def __init__(self) -> None:
        self.filing = Workers(1, name="trajstore-rollouts")
        self.store: Store | None = None
        self.folder: str | None = None

    def release_store(self) -> None:
        """Close the store, if one is open."""
        store, self.store = self.store, None
        if store is not None:
            store.close()

    def close(self) -> None:
        """Give everything back."""
        self.filing.close()  # files what waits
        try:
            self.release_store()
        finally:
            if self.folder is not None:
                shutil.rmtree(self.folder, ignore_errors=True)


def new_log_folder() -> str:
    """A place for the store of a buffer that is to be kept and was given none; RLinf's is its log directory."""
    name = f"replay-buffer-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"
    return os.path.abspath(os.path.join("logs", name))
