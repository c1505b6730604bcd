"""A pool of daemon threads.

Invariant: work is still done while the interpreter exits. ``concurrent.futures`` refuses work by then, and a store that its
user forgot to close is flushed exactly then.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from trajstore.errors import ForkedError

T = TypeVar("T")
R = TypeVar("R")
_Task = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...]]

FORKED = (
    "this store was opened in the parent process; open it again in the child, or start processes with "
    "multiprocessing.get_context('spawn')"
)


class Workers:
    """Runs functions in up to ``threads`` threads, which start when first needed.

    Args:
        threads: Most threads at once.
        name: Prefix of the threads' names.
    """

    def __init__(self, threads: int, *, name: str) -> None:
        self._limit = threads
        self._name = name
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._closed = False
        self._pid = os.getpid()

    @property
    def threads(self) -> int:
        """Most threads at once."""
        return self._limit

    def submit(self, function: Callable[..., R], *args: Any) -> Future[R]:
        """Run ``function(*args)`` in a thread; its result or error is the future's."""
        if os.getpid() != self._pid:
            raise ForkedError(FORKED)
        future: Future[R] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"the workers {self._name!r} are closed")
            if self._idle > 0:
                self._idle -= 1
            elif len(self._threads) < self._limit:
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._tasks.put((future, function, args))
        return future

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """``[function(item) for item in items]`` in parallel. All are run; then the first error, if any, is raised."""
        items = list(items)
        if len(items) == 1:
            return [function(items[0])]
        futures = [self.submit(function, item) for item in items]
        errors = [error for error in [f.exception() for f in futures] if error is not None]
        if errors:
            raise errors[0]
        return [f.result() for f in futures]

    def close(self, timeout_s: float | None = None) -> None:
        """End the threads once queued work is done. May be called twice.

        Args:
            timeout_s: Wait no longer than this for work that hangs; its thread ends with it, or with the process.
        """
        if os.getpid() != self._pid:
            return  # the threads stayed in the parent
        with self._lock:
            if self._closed:
                return
            self._closed = True
            threads = [thread for thread in self._threads if thread is not threading.current_thread()]
        for _ in self._threads:
            self._tasks.put(None)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, function, args = task
            try:
                future.set_result(function(*args))
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future
                future.set_exception(error)
            del task, future, function, args  # an idle thread must not keep results alive
            with self._lock:
                self._idle += 1
