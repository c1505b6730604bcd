"""What waits to be filed by a thread: jobs in the order in which they were put.

Invariant: a job is forgotten only once it has ended, also if whoever waits for it is interrupted; the first failure is kept
until it is raised.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from trajstore.storage.workers import Workers


class FilingQueue:
    """Jobs of one thread, and the bytes that they hold until they have ended.

    Args:
        worker: Runs them, one at a time.

    Examples:
        >>> worker = Workers(1, name="docs")
        >>> queue = FilingQueue(worker)
        >>> queue.put(int, "no number", nbytes=10, max_bytes=100)
        >>> queue.wait()
        >>> type(queue.failure)
        <class 'ValueError'>
        >>> worker.close()
    """

    def __init__(self, worker: Workers) -> None:
        self._worker = worker
        self._waiting: collections.deque[tuple[Future[None], int]] = collections.deque()  # and bytes of each
        self._nbytes = 0
        self.failure: BaseException | None = None  # the first that was not raised yet

    def put(self, job: Callable[..., Any], *args: Any, nbytes: int, max_bytes: int) -> None:
        """Have a job done soon.

        Args:
            job: What to do.
            *args: Its arguments.
            nbytes: Bytes that it holds.
            max_bytes: Wait while those of all jobs would be more, unless it is the only one.
        """
        while self._waiting and self._nbytes + nbytes > max_bytes:
            self._await_oldest()
        self._waiting.append((self._worker.submit(job, *args), nbytes))
        self._nbytes += nbytes

    def collect(self) -> None:
        """Forget jobs that have ended."""
        while self._waiting and self._waiting[0][0].done():
            self._await_oldest()

    def wait(self) -> None:
        """Wait until all jobs have ended."""
        while self._waiting:
            self._await_oldest()

    def raise_failure(self) -> None:
        """Raise the failure, if there is one; it is then kept no longer."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def _await_oldest(self) -> None:
        future, nbytes = self._waiting[0]
        error = future.exception()  # who is interrupted here finds the job waiting at the next call
        self._waiting.popleft()
        self._nbytes -= nbytes
        self.failure = self.failure or error
