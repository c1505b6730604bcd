"""Rows of a segment that is still being written, against a NumPy array that grows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.read.test_cache import write
from tests.support.watched import WatchedDisk
from trajstore import Column
from trajstore.format.manifest import SegmentEntry
from trajstore.read.arena import Need, group_name
from trajstore.read.cache import PageCache
from trajstore.read.fetch import PageFetcher
from trajstore.read.pinning import PinnedRows
from trajstore.read.segment import SegmentReaders
from trajstore.schema import Schema
from trajstore.storage.workers import Workers

RELAXED = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SCHEMA = Schema(
    (
        Column(path="frame", dtype="uint8", shape=(5,), page_rows=4),
        Column(path="x", dtype="int32"),
        Column(path="y", dtype="float64"),
    )
)
GROUPS = {"frame": ["frame"], group_name(SCHEMA["x"]): ["x", "y"]}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    return WatchedDisk(write(tmp_path_factory.mktemp("pins") / "s", [3]))


class Pinned:
    """A cache into which rows are pinned, and the arrays that it should hold."""

    def __init__(self, disk, nbytes, page_rows):
        self.workers = Workers(1, name="test")
        readers = SegmentReaders(disk, self.workers)
        self.cache = PageCache(nbytes, readers, PageFetcher(self.workers))
        self.page_rows = page_rows
        needs = {name: Need(tuple(SCHEMA[path] for path in paths), 1, nbytes // 20) for name, paths in GROUPS.items()}
        self.reservation = self.cache.reserve(needs, np.empty(0, np.int64), SCHEMA, page_rows=page_rows)
        self.pins = PinnedRows(self.cache)
        self.rng = np.random.default_rng(0)
        self.model = {}  # (segment, path) -> (n, row_bytes) uint8
        self.numbers = {}
        self.closed = set()

    def segment(self, which):
        if which not in self.numbers:
            entry = SegmentEntry(f"{which:032x}", 1 << 60, 1 << 60, 0, tuple(c.path for c in SCHEMA), "", "")
            self.numbers[which] = int(self.cache.number_segments([entry])[0])
        return self.numbers[which]

    def add(self, which, name, count):
        first = len(self.model.get((which, GROUPS[name][0]), ()))
        rows = {p: self.rng.integers(0, 256, (count, SCHEMA[p].row_bytes), dtype=np.uint8) for p in GROUPS[name]}
        if not self.pins.add(self.segment(which), name, first, rows, page_rows=self.page_rows[name]):
            self.closed.add((which, name))  # as its owner does: nothing may follow
            return False
        for path, data in rows.items():
            before = self.model.get((which, path), np.empty((0, data.shape[1]), np.uint8))
            self.model[which, path] = np.concatenate([before, data])
        return True

    def check(self, lo_hi=(0.0, 1.0)):
        for (which, path), data in self.model.items():
            lo, hi = (round(part * len(data)) for part in lo_hi)
            if lo < hi:
                out = np.zeros((hi - lo, data.shape[1]), np.uint8)
                assert self.pins.copy(self.numbers[which], group_name(SCHEMA[path]), path, lo, out)
                np.testing.assert_array_equal(out, data[lo:hi])

    def close(self):
        self.reservation.release()
        self.workers.close()


lots = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(sorted(GROUPS)), st.integers(1, 70)), min_size=1, max_size=25
)


@given(
    lots=lots, shifts=st.tuples(st.integers(0, 5), st.integers(0, 5)), nbytes=st.sampled_from([4_000, 40_000, 10**6])
)
@RELAXED
def test_rows_are_where_they_were_put_whatever_the_size_of_lots_and_pages(disk, lots, shifts, nbytes):
    pinned = Pinned(disk, nbytes, {name: 1 << shift for name, shift in zip(sorted(GROUPS), shifts, strict=True)})
    for which, name, count in lots:
        if (which, name) not in pinned.closed:
            pinned.add(which, name, count)
            pinned.check((0.3, 0.8))
    pinned.check()
    capacity = {name: pinned.cache.group(name).extents.capacity for name in GROUPS}
    for name in GROUPS:
        assert pinned.cache.group(name).pinned_rows() <= capacity[name], "a window still fits"
    pinned.close()


def test_a_cache_that_is_full_refuses_and_what_it_holds_stays(disk):
    pinned = Pinned(disk, 4_000, dict.fromkeys(GROUPS, 4))
    refused = 0
    for _ in range(60):
        refused += not pinned.add(0, "frame", 9)
        pinned.check()
        if refused:
            break
    assert refused
    assert not pinned.pins.copy(pinned.numbers[0], "frame", "frame", 10**6, np.empty((1, 5), np.uint8))
    pinned.close()


def test_released_rows_stay_until_others_need_the_room(disk):
    pinned = Pinned(disk, 40_000, dict.fromkeys(GROUPS, 8))
    for name in GROUPS:
        assert pinned.add(0, name, 21)
    entry = SegmentEntry(f"{0:032x}", 1, 21, 0, tuple(c.path for c in SCHEMA), "", "")
    pinned.pins.release(pinned.numbers[0], entry, dict.fromkeys(GROUPS, 21))
    pinned.check()
    assert all(pinned.cache.group(name).pinned_rows() == 0 for name in GROUPS)
    assert pinned.add(1, "frame", 30)
    pinned.pins.release(pinned.numbers[1], entry, None)  # given up
    assert not pinned.pins.copy(pinned.numbers[1], "frame", "frame", 0, np.empty((1, 5), np.uint8))
    pinned.close()
