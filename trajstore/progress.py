"""Progress bars of long work.

Invariant: nothing is drawn where nobody looks, and the terminal is as it was before, however the work ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

T = TypeVar("T")
_LONG_BYTES = 64 << 20


def is_shown(shown: bool | None, nbytes: int) -> bool:
    """Whether to draw a bar on standard error.

    Args:
        shown: What was asked for; None for only if that is a terminal and the work may take a while.
        nbytes: How much work it is.
    """
    return Console(stderr=True).is_terminal and nbytes >= _LONG_BYTES if shown is None else shown


def counted(items: Iterable[T], *, total: int | None, what: str, shown: bool) -> Iterator[T]:
    """The items, with a bar on standard error while they are taken.

    Args:
        items: Anything.
        total: How many; None if unknown.
        what: Stands before the bar.
        shown: Without it there is no bar.
    """
    if not shown:
        yield from items
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("trajectories  elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(task)


@contextlib.contextmanager
def byte_progress(title: str, total: int, *, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """A bar that is advanced by a number of bytes.

    Args:
        title: What is going on.
        total: Bytes in all.
        shown: Whether to draw it, on standard error; None for only if that is a terminal and the work may take a while.
    """
    if not is_shown(shown, total):
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
