"""Output buffers that are used again: gathering into fresh memory takes eight times as long, from page faults.

Invariant: a buffer returns to the pool only when nothing outside refers to it any more, tensors and views of them included.
The pool never blocks: if all its buffers are held, a fresh one is made and counted.
"""

from __future__ import annotations

import collections
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trajstore.deferred import torch

_ALIGNMENT = 64  # bytes


@dataclass(eq=False)
class Buffer:
    """Memory of one batch or several.

    Attributes:
        data: ``(nbytes,)`` uint8; a view that dies with the last tensor made of it.
        tensor: The same memory.
    """

    data: np.ndarray[Any, np.dtype[np.uint8]] = field(repr=False)
    tensor: torch.Tensor = field(repr=False)


class BufferPool:
    """Buffers of one size after the other; when the size grows, the old ones are dropped. Used by several threads.

    Args:
        keep: Most free buffers kept.
        pinned: Whether they are page-locked, for copies to a CUDA device that nobody waits for.
    """

    def __init__(self, keep: int, *, pinned: bool = False) -> None:
        self._keep = keep
        self._pinned = pinned
        self._lock = threading.Lock()
        self._free: list[torch.Tensor] = []
        # Finalizers may run at any allocation, in any thread: they only append.
        self._returned: collections.deque[torch.Tensor] = collections.deque()
        self.made = 0  # buffers that had to be made

    def take(self, nbytes: int) -> Buffer:
        """A buffer whose content is arbitrary."""
        base = None
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            while self._free and base is None:
                candidate = self._free.pop()
                base = candidate if len(candidate) >= nbytes else None
            del self._free[self._keep :]
        if base is None:
            base = _memory(max(nbytes, 1), pinned=self._pinned)
            self.made += 1
        data = base.numpy()[:nbytes]
        weakref.finalize(data, self._returned.append, base).atexit = False
        return Buffer(data, torch.from_numpy(data))


def aligned(nbytes: int) -> int:
    """The next offset at which any dtype may begin."""
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _memory(nbytes: int, *, pinned: bool) -> torch.Tensor:
    if pinned:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)  # whatever the default device is
    return torch.from_numpy(np.empty(nbytes, np.uint8))
