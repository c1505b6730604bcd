"""How a cache is divided among groups of columns."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.rare import examples
from trajstore.read.division import Claim, divide

QUICK = settings(deadline=None, derandomize=True, max_examples=examples(300), suppress_health_check=list(HealthCheck))

CLAIMS = st.lists(
    st.builds(
        Claim,
        st.integers(1, 5000),
        st.integers(1, 300),
        st.integers(0, 8).map(lambda power: 1 << power),
        st.integers(0, 100_000),
    ),
    min_size=1,
    max_size=6,
)


def least_rows(claim):
    """What a window needs, in whole extents."""
    return next(
        n for n in range(claim.extent, claim.window_rows + claim.extent, claim.extent) if n >= claim.window_rows
    )


def nbytes_of(claims, rows):
    return sum(claim.row_bytes * count for claim, count in zip(claims, rows, strict=True))


@given(claims=CLAIMS, share=st.floats(0, 20))
@QUICK
def test_a_division_is_within_the_bound_and_enough_for_a_window(claims, share):
    least = nbytes_of(claims, [least_rows(claim) for claim in claims])
    nbytes = int(least * share)
    rows = divide(nbytes, claims)
    assert (rows is None) == (nbytes < least)
    if rows is not None:
        assert nbytes_of(claims, rows) <= nbytes
        for count, claim in zip(rows, claims, strict=True):
            assert count >= least_rows(claim)
            assert count % claim.extent == 0


@given(claims=CLAIMS, more=st.floats(1, 3))
@QUICK
def test_everything_is_resident_if_everything_fits(claims, more):
    nbytes = int(nbytes_of(claims, [claim.all for claim in claims]) * more) + 1
    rows = divide(nbytes, claims)
    assert rows is not None
    assert all(count >= max(claim.total_rows, least_rows(claim)) for count, claim in zip(rows, claims, strict=True))


def test_small_groups_are_kept_whole_and_the_large_one_gets_the_rest():
    images, states, rewards = Claim(12288, 32, 16, 10**6), Claim(68, 2048, 1024, 10**6), Claim(9, 8192, 4096, 10**6)
    rows = divide(1 << 30, [images, states, rewards])
    assert rows is not None
    assert rows[1] >= 10**6
    assert rows[2] >= 10**6
    assert nbytes_of([images, states, rewards], rows) > 0.99 * (1 << 30)


def test_groups_that_are_all_large_hold_the_pages_of_equally_many_windows():
    claims = [Claim(12288, 32, 16, 10**8), Claim(68, 2048, 1024, 10**8), Claim(9, 8192, 4096, 10**8)]
    rows = divide(1 << 30, claims)
    assert rows is not None
    windows = [count / claim.window_rows for count, claim in zip(rows, claims, strict=True)]
    assert max(windows) < 1.01 * min(windows)


def test_exactly_what_one_window_needs_is_enough_and_a_byte_less_is_not():
    claims = [Claim(100, 33, 16, 1000), Claim(1, 64, 64, 1000)]
    assert divide(100 * 48 + 64, claims) == [48, 64]
    assert divide(100 * 48 + 63, claims) is None
