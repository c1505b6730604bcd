"""Threads that the code under test started."""

import threading
import time
from collections.abc import Collection


def wait_for_others(known: Collection[threading.Thread], timeout_s: float = 60) -> None:
    """Wait until only the ``known`` threads are left.

    ``Thread.join`` would not do: a thread that is just being started by another one is listed, and cannot be joined yet.
    """
    deadline = time.monotonic() + timeout_s
    while left := set(threading.enumerate()) - set(known):
        assert time.monotonic() < deadline, f"still running after {timeout_s} s: {left}"
        time.sleep(0.01)
