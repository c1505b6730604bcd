"""Measuring a loader: what is counted, and that cold batches are told from hot ones."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.recordings import recording_of, view_of
from trajstore import Column
from trajstore.feed import measure
from trajstore.feed.measure import measure_sampling

SCHEMA = [
    Column(path="obs/image", dtype="uint8", shape=(4, 4), extra=1, page_rows=4),
    Column(path="action", dtype="float32"),
    Column(path="note", dtype="string"),
    Column(path="points", dtype="int16", shape=(2,), ragged=True),
]


class Clock:
    """Time that passes only when it is looked at."""

    def __init__(self, step_s: float) -> None:
        self.now, self.step_s = 0.0, step_s

    def perf_counter(self) -> float:
        self.now += self.step_s
        return self.now


@pytest.fixture(scope="module")
def view():
    with view_of(recording_of(np.random.default_rng(3), SCHEMA, [7, 2, 30, 12])) as view:  # 51 steps
        yield view


@pytest.fixture
def clock(monkeypatch):
    clock = Clock(0.06)
    monkeypatch.setattr(measure, "time", clock)
    return clock


def test_every_batch_is_counted_once(view, clock):
    with view.loader(
        10, window=2, columns=["obs", "action", "note", "points"], order="sequential", prefetch=0
    ) as loader:
        # 47 windows: in each pass a last batch of 7
        found = measure_sampling(loader, seconds=None, batches=12)
        assert found.stats.batches == loader.stats().batches == 12
    assert found.cold.batches + found.hot.batches == 12
    assert found.cold.windows + found.hot.windows == 2 * 47 + 2 * 10
    assert {entry.path: (entry.dtype, entry.shape) for entry in found.entries} == {
        "obs/image": ("uint8", (10, 2, 4, 4)),
        "action": ("float32", (10, 2)),
        "note": ("object", (10, 2)),
        "points (values)": ("int16", next(e.shape for e in found.entries if e.path == "points (values)")),
        "points (offsets)": ("int64", (21,)),
    }
    assert found.batch_windows == 10
    assert found.bytes_per_s(found.hot) == pytest.approx(found.hot.windows_per_s * found.batch_bytes / 10)


def test_what_follows_a_time_without_reads_is_hot(view, clock):
    with view.loader(16, columns=["obs", "action"], cache_bytes=1 << 20, prefetch=0) as loader:
        checks = []
        found = measure_sampling(loader, seconds=6.0, on_check=lambda *seen: checks.append(seen))
    assert found.hot.batches > 50
    assert found.cold.batches < 20
    assert found.cold.seconds + found.hot.seconds == pytest.approx(6.0, abs=0.3)
    assert found.hot.windows_per_s == pytest.approx(16 / clock.step_s, rel=0.1)
    assert [count for _, count, _ in checks] == sorted({count for _, count, _ in checks})
    assert all(windows == 16 * count for _, count, windows in checks)


def test_pages_that_are_read_until_the_end_leave_nothing_hot(view, clock):
    columns = ["obs", "note"]  # batches with strings are made one at a time
    with view.loader(64, columns=columns, cache_bytes=1 << 8, prefetch=0, seed=1) as loader:
        found = measure_sampling(loader, seconds=None, batches=30)
    assert found.hot.batches == 0
    assert found.hot.windows_per_s == 0
    assert found.cold.batches == 30
    assert found.stats.cache.evictions > 0
