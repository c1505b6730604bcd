"""A progress bar over the batches of a loader.

Invariant: the terminal is as it was before, however the loop ends: at the end, by ``break``, by an exception, or because the
loader is closed; and batches are not slowed down, since what is shown changes ten times a second and not with every batch.
"""

from __future__ import annotations

import time
import weakref

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_REDRAW_S = 0.1


class LoaderProgress:
    """Batches that were received, how many there will be, and their rate.

    Args:
        done: Batches of this pass that were received before.
        total: Batches of a pass; None if there is no end.
        console: Where it is drawn; by default standard error.
    """

    def __init__(self, done: int, total: int | None, *, console: Console | None = None) -> None:
        counted = MofNCompleteColumn() if total is not None else TextColumn("{task.completed:,}")
        left = [TextColumn("left"), TimeRemainingColumn()] if total is not None else []
        self._progress = Progress(
            BarColumn() if total is not None else SpinnerColumn(),
            counted,
            TextColumn("batches  {task.fields[rate]}  elapsed"),
            TimeElapsedColumn(),
            *left,
            console=console or Console(stderr=True),
        )
        self._task = self._progress.add_task("", total=total, completed=done, rate="")
        self._first = self._done = done
        self._begun = self._drawn = time.perf_counter()
        # Also if the interpreter exits first: a terminal without a cursor is no way to leave.
        weakref.finalize(self, self._progress.stop)
        self._progress.start()

    def advance(self) -> None:
        """One more batch."""
        self._done += 1
        now = time.perf_counter()
        if now - self._drawn >= _REDRAW_S:
            self._drawn = now
            self._update()

    def close(self) -> None:
        """Draw it for the last time. May be called twice."""
        if self._progress.live.is_started:
            self._update()
            self._progress.stop()

    def _update(self) -> None:
        elapsed = max(time.perf_counter() - self._begun, 1e-9)
        rate = (self._done - self._first) / elapsed
        shown = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s"
        self._progress.update(self._task, completed=self._done, rate=shown)
