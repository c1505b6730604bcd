"""Batches of steps that the caller names, where a loader would draw them.

Invariant: row ``i`` of a batch is step ``steps[i]`` of trajectory ``trajectories[i]``, in the order asked for, repeats
included; its memory is used again only once the caller has let go of the batch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch

from trajstore.errors import IndexRangeError, SelectionError
from trajstore.feed.assemble import Assembler, Batch
from trajstore.feed.gather import Gatherer
from trajstore.feed.pipeline import Supply
from trajstore.feed.windows import Windows
from trajstore.read.arena import with_index
from trajstore.read.buffer_pool import BufferPool
from trajstore.sample.columns import resolve_window
from trajstore.stored import Array


class Picker:
    """Gathers single steps of one view. Used by several threads.

    Args:
        supply: What the view's windows are gathered with.
        columns: Names; None for all columns of fixed shape that every trajectory has.
        device: Where batches go; None for main memory.
        buffers: Output buffers, shared with other views; for batches in main memory.

    Raises:
        IndexRangeError: A view of no trajectories.
        SelectionError: A column that some trajectories lack, or one that needs a step after the last.
        UnknownColumnError: A name that nothing has.
    """

    def __init__(
        self,
        supply: Supply,
        columns: Sequence[str] | None,
        *,
        device: torch.device | str | None = None,
        buffers: BufferPool | None = None,
    ) -> None:
        selection = supply.selection
        if not len(selection):
            raise IndexRangeError("a view of no trajectories has no step; append some and take the view again")
        spec = resolve_window(selection, window=None, columns=columns)
        self._lengths = selection.lengths
        self._first, self._after = spec.bounds
        self._gatherer = Gatherer(selection, spec, supply.cache, supply.readers)
        target = None if device is None else with_index(device)
        self._assembler = Assembler(
            spec, [self._gatherer], device=target, buffers=buffers if target is None else None, keep_buffers=2
        )
        self._lock = threading.Lock()

    def pick(self, trajectories: Array, steps: Array) -> Batch:
        """One batch.

        Args:
            trajectories: ``(n,)`` integers, positions in the view.
            steps: ``(n,)`` integers, steps of these trajectories.

        Raises:
            IndexRangeError: A trajectory that is not in the view, or a step that it does not have.
            SelectionError: Arrays of different lengths, or of no integers.
        """
        which, steps = _integers("trajectories", trajectories), _integers("steps", steps)
        if len(which) != len(steps):
            raise SelectionError(f"{len(which)} trajectories and {len(steps)} steps, expected as many of both")
        if not len(which):
            raise SelectionError("no step is named; name one at least")
        if which.min() < 0 or which.max() >= len(self._lengths):
            raise IndexRangeError(f"trajectories {which.min()}..{which.max()} of a view of {len(self._lengths)}")
        last = self._lengths[which] - self._after
        wrong = (steps < self._first) | (steps >= last)
        if wrong.any():
            first = int(wrong.argmax())
            reason = "" if not self._after else ", and a column of the next step is asked for"
            raise IndexRangeError(
                f"step {steps[first]} of trajectory {which[first]}, which has {self._lengths[which[first]]}{reason}"
            )
        with self._lock:
            return self._assembler.assemble([Windows(which, steps, {})], [len(which)]).batches[0]


def _integers(name: str, values: Array) -> Array:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise SelectionError(f"{name} of dtype {array.dtype} and {array.ndim} dimensions; expected 1-d integers")
    return array.astype(np.int64, copy=False)
