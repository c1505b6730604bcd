"""Where rows lie in pages, and which of them may go."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.rare import examples
from trajstore.read.arena import Geometry, Need, PageGroup
from trajstore.schema import Column

QUICK = settings(deadline=None, derandomize=True, max_examples=examples(200), suppress_health_check=list(HealthCheck))


@given(power=st.integers(0, 12), pages=st.integers(2, 40), data=st.data())
@QUICK
def test_a_row_is_found_by_shift_and_mask(power, pages, data):
    page_rows = 1 << power
    geometry = Geometry(pages, page_rows, data.draw(st.integers(1, page_rows)))
    row = data.draw(st.integers(0, pages * page_rows - 1))
    assert (row >> geometry.shift, row & ((1 << geometry.shift) - 1)) == divmod(row, page_rows)


@given(rows=st.integers(1, 1 << 40), data=st.data())
@QUICK
def test_every_row_of_a_single_page_is_in_it(rows, data):
    geometry = Geometry(1, rows, rows)
    row = np.array([data.draw(st.integers(0, rows - 1))], np.int64)
    assert (row >> geometry.shift).tolist() == [0]
    assert (row & ((1 << geometry.shift) - 1)).tolist() == row.tolist()


def test_needs_are_joined_to_what_serves_both():
    a, b, c = (Column(path=path, dtype="int64") for path in "abc")
    assert Need((a, b), 2, 7).joined(None) == Need((a, b), 2, 7)
    assert Need((a, b), 2, 7).joined(Need((b, c), 5, 3)) == Need((b, c, a), 5, 7)


def group_of_segments(last_rows):
    """A group of four-row pages; each segment has two whole pages and one of so many rows."""
    columns = (Column(path="x", dtype="uint8", shape=(3,)), Column(path="y", dtype="float64"))
    group = PageGroup("steps.arrow", columns, torch.device("cpu"))
    group.largest = 4
    group.know_segments(len(last_rows))
    for number, rows in enumerate(last_rows):
        group.add_segment(number, Geometry(3, 4, rows))
    return group


def test_pages_are_loaded_where_they_were_told_and_evicted_in_order_of_last_use():
    group = group_of_segments([1, 2, 3])
    group.allocate(16)
    assert (group.used_bytes, group.capacity_bytes) == (0, 16 * 11)
    rng = np.random.default_rng(0)
    content = {}
    for use, page in enumerate([2, 0, 5, 8]):  # of 1, 4, 2 and 4 rows (3, rounded up)
        rows = int(group.extent_of_page[page])
        start = group.extents.take(rows)
        group.begin_load(page, start)
        content[page] = {"x": rng.integers(0, 256, (rows, 3), np.uint8), "y": rng.integers(0, 256, (rows, 8), np.uint8)}
        group.upload(start, content[page])
        group.end_load(page, loaded=True)
        group.last_use[page] = 10 - use
    assert group.used_bytes == (1 + 4 + 2 + 4) * 11
    for page, columns in content.items():
        found = group.rows_at(int(group.row_of_page[page]), int(group.extent_of_page[page]))
        for path, rows in columns.items():
            np.testing.assert_array_equal(found[path], rows)
    assert group.evictable(100).tolist() == [8, 5, 0, 2]
    assert group.evictable(10).tolist() == [8, 5, 0]
    for page in (8, 5, 0, 2):
        group.evict(page)
    assert group.used_bytes == 0


def test_a_page_that_could_not_be_loaded_leaves_nothing_behind():
    group = group_of_segments([4])
    group.allocate(8)
    group.begin_load(1, group.extents.take(4))
    group.end_load(1, loaded=False)
    assert group.used_bytes == 0
    assert not group.loading
    assert group.evictable(100).tolist() == []
