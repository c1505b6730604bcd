"""Ctrl-C in the middle of a test, also where the tests were started in the background, in which case shells ignore it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside the block ``SIGINT`` raises ``KeyboardInterrupt``, also in a child that is started there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
