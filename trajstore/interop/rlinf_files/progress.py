"""A progress bar over items.

Invariant: the terminal is as it was before, however the loop ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")


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
