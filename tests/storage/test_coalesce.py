"""Which ranges are read together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trajstore.storage.filesystem import ByteRange, ReadRun, coalesce


@st.composite
def byte_ranges(draw: st.DrawFn) -> ByteRange:
    start = draw(st.integers(0, 60))
    return ByteRange(draw(st.sampled_from("ab")), start, start + draw(st.integers(0, 12)))


def joined_bytes(ranges: list[ByteRange], gap: int) -> dict[str, list[tuple[int, int]]]:
    """Slow and obvious: repeatedly join two spans of an object that are at most ``gap`` apart."""
    spans = {key: [(r.start, r.stop) for r in ranges if r.key == key] for key in {r.key for r in ranges}}
    for key, found in spans.items():
        while True:
            pair = next(
                (
                    (a, b)
                    for i, a in enumerate(found)
                    for b in found[i + 1 :]
                    if a[0] <= b[1] + gap and b[0] <= a[1] + gap
                ),
                None,
            )
            if pair is None:
                break
            a, b = pair
            found.remove(a)
            found.remove(b)
            found.append((min(a[0], b[0]), max(a[1], b[1])))
        spans[key] = sorted(found)
    return spans


@given(st.lists(byte_ranges(), max_size=12), st.integers(0, 8))
def test_runs_are_the_ranges_joined_wherever_they_are_close(ranges: list[ByteRange], gap: int) -> None:
    runs = coalesce(ranges, max_gap_bytes=gap)
    found: dict[str, list[tuple[int, int]]] = {}
    for run in runs:
        found.setdefault(run.key, []).append((run.start, run.stop))
    assert found == joined_bytes(ranges, gap)


@given(st.lists(byte_ranges(), max_size=12), st.integers(0, 8), st.integers(1, 30))
def test_every_range_lies_in_the_one_run_that_names_it(ranges: list[ByteRange], gap: int, most: int) -> None:
    runs = coalesce(ranges, max_gap_bytes=gap, max_run_bytes=most)
    assert sorted(member for run in runs for member in run.members) == list(range(len(ranges)))
    for run in runs:
        members = [ranges[i] for i in run.members]
        assert {r.key for r in members} == {run.key}
        assert (run.start, run.stop) == (min(r.start for r in members), max(r.stop for r in members))
        assert run.stop - run.start <= max(most, *(r.stop - r.start for r in members))


def test_nothing_is_read_for_nothing() -> None:
    assert coalesce([], max_gap_bytes=9) == []


def test_a_gap_is_read_over_only_up_to_the_bound() -> None:
    ranges = [ByteRange("a", 0, 2), ByteRange("a", 5, 6)]
    assert coalesce(ranges, max_gap_bytes=3) == [ReadRun("a", 0, 6, (0, 1))]
    assert coalesce(ranges, max_gap_bytes=2) == [ReadRun("a", 0, 2, (0,)), ReadRun("a", 5, 6, (1,))]
