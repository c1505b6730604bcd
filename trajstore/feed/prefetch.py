"""Lots made ahead of their consumer, by one thread.

Invariant: what fails in the thread is raised by ``take``, every wait has an end, and ``stop`` returns within bounded time
whatever the thread is doing. The thread refers to nobody who refers to it, so an abandoned loader can be collected.
"""

from __future__ import annotations

import atexit
import collections
import os
import threading
import weakref
from collections.abc import Callable

from trajstore.errors import StorageTimeoutError
from trajstore.feed.assemble import Lot

_JOIN_AT_EXIT_S = 2.0
_running: weakref.WeakSet[Prefetcher] = weakref.WeakSet()


class Prefetcher:
    """Runs ``make`` in a thread until it returns None.

    Args:
        make: The next lot, or None at the end.
        depth: It is called when fewer batches than this are ready.
    """

    def __init__(self, make: Callable[[], Lot | None], depth: int) -> None:
        self._depth = depth
        self._lock = threading.RLock()  # entered by itself: Ctrl-C in a condition's own __exit__ would leave it locked
        self._condition = threading.Condition(self._lock)
        self._ready: collections.deque[Lot] = collections.deque()
        self._ready_batches = 0
        self._ended = False
        self._error: BaseException | None = None
        self._stopped = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, args=(make,), name="trajstore-prefetch", daemon=True)
        self._thread.start()
        _running.add(self)

    @property
    def running(self) -> bool:
        """Whether lots may still come."""
        with self._lock:
            return not self._ended and not self._stopped

    def take(self, timeout_s: float) -> Lot | None:
        """The next lot; None at the end, or when stopped.

        Raises:
            StorageTimeoutError: There is none after ``timeout_s``; it may be asked for again.
            BaseException: What ``make`` raised.
        """
        with self._lock:
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

    def stop(self, timeout_s: float) -> bool:
        """Ask the thread to end, and wait so long; whether it has. May be called twice, and from any thread."""
        if self._pid != os.getpid():
            return True  # the thread stayed in the parent, perhaps with the lock
        with self._lock:
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
                with self._lock:
                    self._ready.append(lot)
                    self._ready_batches += len(lot.batches)
                    self._condition.notify_all()
                del lot  # a waiting thread must not keep a batch alive
        except BaseException as failure:  # noqa: BLE001 - it belongs to whoever takes the next batch
            error = failure
        with self._lock:
            self._error = error
            self._ended = True
            self._condition.notify_all()

    def _wait_for_room(self) -> bool:
        with self._lock:
            self._condition.wait_for(lambda: self._stopped or self._ready_batches < self._depth)
            return not self._stopped


def _stop_all() -> None:
    # A thread that is still within torch when the interpreter goes away aborts the whole process.
    running = list(_running)
    for timeout_s in (0.0, _JOIN_AT_EXIT_S):
        for prefetcher in running:
            prefetcher.stop(timeout_s)


atexit.register(_stop_all)


class Inline:
    """The same face without a thread: lots are made when they are taken."""

    def __init__(self, make: Callable[[], Lot | None]) -> None:
        self._make = make

    def take(self, timeout_s: float) -> Lot | None:  # noqa: ARG002 - the caller's own thread does the work
        """The next lot; None at the end."""
        return self._make()

    @property
    def running(self) -> bool:
        """Never, outside ``take``."""
        return False

    def stop(self, timeout_s: float) -> bool:  # noqa: ARG002 - there is no thread
        """Nothing to stop."""
        return True
