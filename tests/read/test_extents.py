"""The buddy allocator against a bytearray with one byte per row."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.rare import examples
from trajstore.read.extents import Extents, extent_rows

QUICK = settings(deadline=None, derandomize=True, max_examples=examples(80), suppress_health_check=list(HealthCheck))


@st.composite
def arenas(draw):
    """Rows of the largest extent, and of the arena."""
    largest = 1 << draw(st.integers(0, 6))
    return largest, largest * draw(st.integers(1, 9))


class ExtentsMachine(RuleBasedStateMachine):
    """Takes and gives in any order."""

    @initialize(arena=arenas())
    def make(self, arena):
        self.largest, self.capacity = arena
        self.extents = Extents(self.capacity, largest=self.largest)
        self.taken = bytearray(self.capacity)
        self.held = []

    @rule(data=st.data())
    def take(self, data):
        size = 1 << data.draw(st.integers(0, self.largest.bit_length() - 1))
        start = self.extents.take(size)
        places = [at for at in range(0, self.capacity, size) if not any(self.taken[at : at + size])]
        if start is None:
            assert not places, "an aligned place was free"
            return
        assert start in places
        self.taken[start : start + size] = b"\1" * size
        self.held.append((start, size))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data):
        start, size = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.extents.give(start, size)
        self.taken[start : start + size] = bytes(size)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_the_second_half(self, data):
        place = data.draw(st.integers(0, len(self.held) - 1))
        start, size = self.held[place]
        if size > 1:
            self.extents.give(start + size // 2, size // 2)
            self.taken[start + size // 2 : start + size] = bytes(size // 2)
            self.held[place] = start, size // 2

    @rule()
    def give_all_and_take_whole_ones(self):
        for start, size in self.held:
            self.extents.give(start, size)
        whole = [self.extents.take(self.largest) for _ in range(self.capacity // self.largest)]
        assert sorted(start for start in whole if start is not None) == list(range(0, self.capacity, self.largest))
        assert self.extents.take(1) is None
        self.held = [(start, self.largest) for start in whole]
        self.taken = bytearray(b"\1" * self.capacity)

    @invariant()
    def free_rows_are_counted(self):
        assert self.extents.free_rows == self.taken.count(0)


TestExtents = ExtentsMachine.TestCase
TestExtents.settings = settings(QUICK, stateful_step_count=40)


@given(arena=arenas(), data=st.data())
@QUICK
def test_whatever_fits_in_total_fits_if_the_largest_come_first(arena, data):
    largest, capacity = arena
    powers = st.integers(0, largest.bit_length() - 1)
    sizes, left = [], capacity
    for power in data.draw(st.lists(powers, max_size=200)):
        if 1 << power <= left:
            sizes.append(1 << power)
            left -= 1 << power
    extents = Extents(capacity, largest=largest)
    for size in sorted(sizes, reverse=True):
        assert extents.take(size) is not None
    assert extents.free_rows == left


@given(rows=st.integers(1, 1 << 40))
@QUICK
def test_an_extent_is_the_smallest_power_of_two_that_holds_the_rows(rows):
    size = extent_rows(rows)
    assert bin(size).count("1") == 1
    assert size // 2 < rows <= size


@pytest.mark.parametrize(("capacity", "largest"), [(0, 1), (8, 3), (8, 16), (12, 8), (8, 0), (8, -8)])
def test_an_arena_that_cannot_be_is_refused(capacity, largest):
    with pytest.raises(ValueError, match=f"{capacity} rows in extents of up to {largest}"):
        Extents(capacity, largest=largest)
