"""Lots made ahead of their consumer, by one thread.

Invariant: what fails in the thread is raised by ``take``, every wait has an end, and ``stop`` returns within bounded time
whatever the thread is doing. The thread refers to nobody who refers to it, so an abandoned loader can be collected.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

from trajstore.errors import StorageTimeoutError
from trajstore.feed.assemble import Lot

_JOIN_S = 5.0


class Prefetcher:
    """Runs ``make`` in a thread until it returns None.

    Args:
        make: The next lot, or None at the end.
        depth: It is called when fewer batches than this are ready.
    """

    def __init__(self, make: Callable[[], Lot | None], depth: int) -> None:
        self._depth = depth
        self._condition = threading.Condition()
        self._ready: collections.deque[Lot] = collections.deque()
        self._ready_batches = 0
        self._ended = False
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._run, args=(make,), name="trajstore-prefetch", daemon=True)
        self._thread.start()

    def take(self, timeout_s: float) -> Lot | None:
        """The next lot; None at the end.

        Raises:
            StorageTimeoutError: There is none after ``timeout_s``.
            BaseException: What ``make`` raised.
        """
        with self._condition:
            if not self._condition.wait_for(lambda: self._ready or self._ended or self._stopped, timeout_s):
                raise StorageTimeoutError(
                    f"no batch within timeout_s={timeout_s:g}; the storage is slow or does not answer: iterate again to go "
                    "on waiting, or pass a larger timeout_s"
                )
            if self._ready:
                lot = self._ready.popleft()
                self._ready_batches -= len(lot.batches)
                self._condition.notify_all()
                return lot
            if self._error is not None:
                raise self._error
            return None

    def stop(self, timeout_s: float = _JOIN_S) -> bool:
        """Ask the thread to end; whether it has. May be called twice, and from any thread."""
        with self._condition:
            self._stopped = True
            self._ready.clear()
            self._condition.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self, make: Callable[[], Lot | None]) -> None:
        error: BaseException | None = None
        try:
            while self._wait_for_room():
                lot = make()
                if lot is None:
                    break
                with self._condition:
                    self._ready.append(lot)
                    self._ready_batches += len(lot.batches)
                    self._condition.notify_all()
                del lot  # a waiting thread must not keep a batch alive
        except BaseException as failure:  # noqa: BLE001 - it belongs to whoever takes the next batch
            error = failure
        with self._condition:
            self._error = error
            self._ended = True
            self._condition.notify_all()

    def _wait_for_room(self) -> bool:
        with self._condition:
            self._condition.wait_for(lambda: self._stopped or self._ready_batches < self._depth)
            return not self._stopped


class Inline:
    """The same face without a thread: lots are made when they are taken."""

    def __init__(self, make: Callable[[], Lot | None]) -> None:
        self._make = make

    def take(self, timeout_s: float) -> Lot | None:  # noqa: ARG002 - the caller's own thread does the work
        """The next lot; None at the end."""
        return self._make()

    def stop(self) -> bool:
        """Nothing to stop."""
        return True
