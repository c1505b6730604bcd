"""From pinned memory to a CUDA device, beside whatever the device is doing.

Invariant: the consumer's stream never reads a batch before it is whole, and a pinned buffer is used again only after its
copy has ended. Copies run on a stream of their own: neither the consumer's stream nor its thread waits for them to begin.

Two races are prevented here. The consumer's kernels could overtake the copy: so the stream that is current when a batch is
taken waits on the event that follows the copy. And PyTorch's allocator could give a batch's device memory to the next batch
while a kernel of the consumer still reads it, since it was allocated on the copying stream: so the memory is recorded on the
consumer's stream.

Memory that is recorded comes back only when those kernels have ended. A consumer that queues work faster than the device
does it would fill the device with batches: so copies wait, in the thread that makes them, until all but the last few batches
that were received have been worked on.

Who captures a CUDA graph while batches are made ahead needs ``capture_error_mode="thread_local"``.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from trajstore.read.buffer_pool import Buffer

_RECEIVED_AHEAD = 8  # lots whose kernels may still be queued when another one is copied


class Arrival:
    """The end of everything that makes a batch on its device.

    Args:
        event: Recorded behind it.
        tensors: Whose memory the batch has.
        received: Where to note how far the consumer's stream was when it first received the batch.
    """

    def __init__(self, event: Any, tensors: Sequence[torch.Tensor], received: collections.deque[Any]) -> None:
        self._event = event
        self._tensors = tensors
        self._received: collections.deque[Any] | None = received

    def receive(self) -> None:
        """Make the current stream wait for the batch; the calling thread does not wait."""
        stream = torch.cuda.current_stream(self._tensors[0].device)
        if self._received is not None:
            begun: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            begun.record(stream)
            self._received.append(begun)
            self._received = None
        stream.wait_event(self._event)
        for tensor in self._tensors:
            tensor.record_stream(stream)


class DeviceCopier:
    """Copies buffers to one device, on a stream of its own.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # A buffer that is here is not used again: its copy may be under way.
        self._under_way: collections.deque[tuple[Any, Buffer]] = collections.deque()
        self._received: collections.deque[Any] = collections.deque()  # events on the consumer's stream

    def stream(self) -> AbstractContextManager[Any]:
        """Everything inside runs on the copying stream."""
        return torch.cuda.stream(self._stream)

    def copy(self, buffer: Buffer) -> torch.Tensor:
        """Begin to copy a pinned buffer; call it inside ``stream()``."""
        while len(self._received) > _RECEIVED_AHEAD:
            self._received.popleft().synchronize()
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()
        data = buffer.tensor.to(self._device, non_blocking=True)
        copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(self._stream)
        self._under_way.append((copied, buffer))
        return data

    def arrival(self, tensors: Sequence[torch.Tensor]) -> Arrival:
        """What the consumer has to wait for; call it inside ``stream()``, after the last kernel."""
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return Arrival(event, tensors, self._received)
