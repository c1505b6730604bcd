"""A progress bar over bytes that are copied.

Invariant: nothing is drawn unless it was asked for, and the terminal is as it was before, however the work ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextlib.contextmanager
def byte_progress(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar that is advanced by a number of bytes.

    Args:
        title: What is going on.
        total: Bytes in all.
        shown: Whether to draw it, on standard error.
    """
    if not shown:
        yield lambda _: None
        return
    bar = Progress(
        TextColumn(title),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task("", total=total)
        yield lambda nbytes: bar.advance(task, nbytes)
