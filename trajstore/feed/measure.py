"""How fast a loader gives batches, and whether they came from the page cache.

Invariant: what is reported was counted while batches were taken one after the other, by a consumer that does nothing else;
batches that were made while pages were still being read are kept apart from those that came after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trajstore.feed.loader import Loader, LoaderStats

_CHECK_S = 0.1


@dataclass(frozen=True)
class Pace:
    """Some batches that were taken one after the other.

    Attributes:
        batches: How many.
        windows: In all of them.
        seconds: How long they took.
    """

    batches: int = 0
    windows: int = 0
    seconds: float = 0.0

    @property
    def windows_per_s(self) -> float:
        """Windows per second; 0 if there are none."""
        return self.windows / self.seconds if self.windows else 0.0


@dataclass(frozen=True)
class Entry:
    """One value of a batch.

    Attributes:
        path: Name.
        dtype: Of a tensor; ``object`` for strings and bytes.
        shape: Of the first batch.
        nbytes: Of the first batch; 0 for objects.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class SamplingMeasurement:
    """What ``measure_sampling`` found.

    Attributes:
        entries: Of the first batch.
        first_s: Seconds until it was there.
        cold: Batches up to the first tenth of a second in which no page was read, the first one included.
        hot: Those after; none if pages were read until the end.
        batch_bytes: Bytes of the tensors of the first batch.
        batch_windows: Its windows.
        stats: Of the loader, at the end.
    """

    entries: tuple[Entry, ...]
    first_s: float
    cold: Pace
    hot: Pace
    batch_bytes: int
    batch_windows: int
    stats: LoaderStats

    def bytes_per_s(self, pace: Pace) -> float:
        """Bytes of tensors per second."""
        return pace.windows_per_s * self.batch_bytes / self.batch_windows


def measure_sampling(
    loader: Loader,
    *,
    seconds: float | None = 3.0,
    batches: int | None = None,
    on_check: Callable[[float, int, int], None] | None = None,
) -> SamplingMeasurement:
    """Take batches, and nothing else, for some time.

    Args:
        loader: Passes that end are begun again.
        seconds: End after this time; None for no limit.
        batches: End after so many.
        on_check: Called about ten times a second with seconds, batches and windows so far.
    """
    begun = time.perf_counter()
    source = _endless(loader)
    batch = next(source)
    _synchronize(batch)
    entries = tuple(_entries(batch))
    rows = _rows(batch)
    first_s = time.perf_counter() - begun
    count, windows, first_windows = 1, rows, rows
    checked_s, checked = first_s, (count, windows)
    pages = loader.stats().cache.pages_read
    hot_from: tuple[float, int, int] | None = None
    now = first_s
    while (seconds is None or now < seconds) and (batches is None or count < batches):
        batch = next(source)
        count += 1
        windows += _rows(batch)
        now = time.perf_counter() - begun
        if now - checked_s < _CHECK_S:
            continue
        read = loader.stats().cache.pages_read
        if hot_from is None and read == pages:
            hot_from = checked_s, *checked
        pages, checked_s, checked = read, now, (count, windows)
        if on_check is not None:
            on_check(now, count, windows)
    _synchronize(batch)
    now = time.perf_counter() - begun
    cold_s, cold, cold_windows = hot_from or (now, count, windows)
    return SamplingMeasurement(
        entries=entries,
        first_s=first_s,
        cold=Pace(cold, cold_windows, cold_s),
        hot=Pace(count - cold, windows - cold_windows, now - cold_s),
        batch_bytes=sum(entry.nbytes for entry in entries),
        batch_windows=first_windows,
        stats=loader.stats(),
    )


def _endless(loader: Loader) -> Iterator[Mapping[str, Any]]:
    while True:
        yield from loader


def _rows(batch: Mapping[str, Any]) -> int:
    """Windows of a batch."""
    leaf: Any = batch
    while isinstance(leaf, Mapping):
        leaf = next(iter(leaf.values()))
    return len(leaf[1]) - 1 if isinstance(leaf, tuple) else len(leaf)


def _entries(batch: Mapping[str, Any], prefix: str = "") -> Iterator[Entry]:
    for name, value in batch.items():
        path = prefix + name
        if isinstance(value, Mapping):
            yield from _entries(value, f"{path}/")
        elif isinstance(value, tuple):  # ragged
            yield _entry(f"{path} (values)", value[0])
            yield _entry(f"{path} (offsets)", value[1])
        else:
            yield _entry(path, value)


def _entry(path: str, value: torch.Tensor | np.ndarray[Any, Any]) -> Entry:
    if isinstance(value, torch.Tensor):
        return Entry(path, str(value.dtype).removeprefix("torch."), tuple(value.shape), value.nbytes)
    return Entry(path, str(value.dtype), value.shape, 0)


def _synchronize(batch: Mapping[str, Any]) -> None:
    """Wait until the batch is on its device."""
    for value in batch.values():
        if isinstance(value, torch.Tensor) and value.device.type == "cuda":
            torch.cuda.current_stream(value.device).synchronize()
            return
        if isinstance(value, Mapping):
            _synchronize(value)
