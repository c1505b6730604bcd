"""Keyed permutations are bijections, do not depend on how they are asked, and look like uniformly drawn ones."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sample.chi_square import chi_square_bound, chi_square_of
from tests.support.rare import examples
from trajstore.errors import IndexRangeError, SelectionError
from trajstore.sample.permutation import MAX_COUNT, KeyedPermutation

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
NUM_KEYS = 120_000


def reference(count: int, key: list[int], position: int) -> int:
    """The same in plain integers, with true remainders, one number at a time."""

    def mixed(bits: int) -> int:
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
        return bits ^ (bits >> 31)

    state = len(key)
    for word in key:
        state = mixed(((state + GOLDEN) & MASK) ^ (word & MASK))
    if count < 4096:
        return sorted(range(count), key=lambda i: mixed((state + (i + 1) * GOLDEN) & MASK))[position]
    root = math.isqrt(count - 1) + 1
    root += root % 2
    a = min(range(root, root + min(root // 4, 64) + 1, 2), key=lambda a: a * -(-count // a) - count)
    moduli = [a, -(-count // a)]
    while True:
        halves = [position % a, position // a]
        for number in range(6):
            round_key = mixed((state + (number + 1) * GOLDEN) & MASK)
            target = number % 2
            hashed = ((halves[1 - target] + round_key) * 0xD6E8FEB86659FD93) & MASK
            hashed = ((hashed ^ (hashed >> 32)) * 0xFF51AFD7ED558CCD) & MASK
            halves[target] = (halves[target] + ((hashed >> 32) * moduli[target] >> 32)) % moduli[target]
        position = halves[0] + a * halves[1]
        if position < count:
            return position


@given(st.integers(1, 9000), st.integers(-(2**70), 2**70), st.integers(0, 10))
@settings(max_examples=examples(60), deadline=None)
def test_bijection(count: int, seed: int, epoch: int) -> None:
    permutation = KeyedPermutation(count, seed, epoch)
    images = permutation(np.arange(count))
    assert images.dtype == np.int64
    np.testing.assert_array_equal(np.sort(images), np.arange(count))
    np.testing.assert_array_equal(permutation.inverse(images), np.arange(count))


@pytest.mark.parametrize("count", [*range(1, 20), 4095, 4096, 4097, 4225, 10_007])
def test_bijection_under_every_key(count: int) -> None:
    num_keys = 200 if count < 100 else 20
    which = np.repeat(np.arange(num_keys), count)
    positions = np.tile(np.arange(count), num_keys)
    permutations = KeyedPermutation(count, np.arange(num_keys))
    images = permutations(positions, which)
    assert (np.sort(images.reshape(num_keys, count), axis=1) == np.arange(count)).all()
    np.testing.assert_array_equal(permutations.inverse(images, which), positions)


@given(
    st.sampled_from([1, 2, 3, 7, 63, 64, 1000, 4095, 4096, 65537, 346_000_000, 2**40 + 7, 10**15, MAX_COUNT]), st.data()
)
@settings(max_examples=examples(150), deadline=None)
def test_equals_plain_integers(count: int, data: st.DataObject) -> None:
    key = data.draw(st.lists(st.integers(-(2**63), 2**64 - 1), min_size=0, max_size=3))
    positions = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=8))
    permutation = KeyedPermutation(count, *key)
    images = permutation(np.array(positions))
    assert images.tolist() == [reference(count, key, position) for position in positions]
    assert permutation.inverse(images).tolist() == positions


@pytest.mark.parametrize("count", [1, 2, 5, 63, 100, 4096, 5000, 10**12])
def test_several_keys_equal_a_permutation_per_key(count: int) -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(-(2**63), 2**63 - 1, 50)
    which = rng.integers(0, 50, 300)
    positions = rng.integers(0, count, 300)
    several = KeyedPermutation(count, 5, keys, 6)
    images = several(positions, which)
    single = [
        KeyedPermutation(count, 5, int(keys[w]), 6)(np.array([p])).item() for w, p in zip(which, positions, strict=True)
    ]
    assert images.tolist() == single
    np.testing.assert_array_equal(several.inverse(images, which), positions)
    np.testing.assert_array_equal(several(positions, 7), KeyedPermutation(count, 5, keys[7], 6)(positions))
    np.testing.assert_array_equal(KeyedPermutation(count, 5, keys.astype(np.uint64), 6)(positions, which), images)
    np.testing.assert_array_equal(
        KeyedPermutation(count, np.int64(5), keys, np.full(50, 6, np.int32))(positions, which), images
    )


def test_known_images() -> None:
    """Resuming a run under another version must find the same order: these numbers may never change."""
    assert KeyedPermutation(346_000_000, 7, 1)(np.arange(5)).tolist() == [
        219052811,
        242408302,
        241316764,
        322680665,
        80411596,
    ]
    assert KeyedPermutation(10, 7)(np.arange(10)).tolist() == [6, 0, 5, 8, 7, 4, 2, 9, 3, 1]


def test_empty() -> None:
    assert KeyedPermutation(10, 0)(np.empty(0, np.int64)).shape == (0,)


@pytest.mark.parametrize("count", [10, 10_000])
@pytest.mark.parametrize("beyond", [None, 0, 1, 2**62])
def test_positions_outside(count: int, beyond: int | None) -> None:
    permutation = KeyedPermutation(count, 0)
    outside = -1 if beyond is None else count + beyond
    for method in (permutation, permutation.inverse):
        with pytest.raises(IndexRangeError, match=rf"expected \[0, {count}\)"):
            method(np.array([3, outside]))


@pytest.mark.parametrize("count", [0, -1, MAX_COUNT + 1])
def test_counts_outside(count: int) -> None:
    with pytest.raises(SelectionError, match="expected 1 to"):
        KeyedPermutation(count, 0)


def _over_keys(count: int, positions: list[int]) -> np.ndarray:
    """Images ``(NUM_KEYS, len(positions))`` under consecutive keys, as epochs are."""
    parts = []
    for keys in np.array_split(np.arange(NUM_KEYS), 1 + count * NUM_KEYS // 10**7 if count < 4096 else 1):
        which = np.repeat(np.arange(len(keys)), len(positions))
        images = KeyedPermutation(count, 2026, keys)(np.tile(positions, len(keys)), which)
        parts.append(images.reshape(len(keys), len(positions)))
    return np.concatenate(parts)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_all_permutations_are_equally_likely(count: int) -> None:
    images = _over_keys(count, list(range(count)))
    codes = images @ count ** np.arange(count)
    permutations = np.array(list(itertools.permutations(range(count)))) @ count ** np.arange(count)
    observed = [int((codes == code).sum()) for code in permutations]
    assert sum(observed) == NUM_KEYS
    assert chi_square_of(observed) < chi_square_bound(len(observed) - 1)


@pytest.mark.parametrize("count", [7, 16, 100])
def test_pairs_of_images_are_equally_likely(count: int) -> None:
    positions = [0, 1, count // 2, count - 1]
    images = _over_keys(count, positions)
    for i, j in itertools.combinations(images.T, 2):
        observed = np.bincount(i * (count - 1) + j - (j > i), minlength=count * (count - 1))
        assert chi_square_of(observed) < chi_square_bound(len(observed) - 1)


@pytest.mark.parametrize("count", [4096, 4099, 5000, 65_536, 346_000_000])
def test_each_position_goes_everywhere(count: int) -> None:
    num_bins = 500
    width = np.bincount(np.arange(count) * num_bins // count) if count < 10**6 else None
    for images in _over_keys(count, [0, 1, count // 2, count - 1]).T:
        observed = np.bincount(images * num_bins // count, minlength=num_bins)
        assert chi_square_of(observed, width) < chi_square_bound(num_bins - 1)


@pytest.mark.parametrize("count", [4096, 5000, 346_000_000])
def test_the_cipher_hides_its_halves(count: int) -> None:
    """Neighbours share one half of the cipher's state, positions one modulus apart the other; the images show neither.

    Looked at: each half of the images of a pair, jointly, and differences around the rectangle that the halves span.
    """
    modulus = int(KeyedPermutation(count, 0)._moduli[0])
    images = _over_keys(count, [0, 1, modulus, modulus + 1])
    for i, j in itertools.combinations(images.T, 2):
        # That i and j differ is below what so many keys can see in 64 cells, except in halves, where it is the bias itself.
        for half_i, half_j in ((i % modulus, j % modulus), (i // modulus, j // modulus), (i % modulus, j // modulus)):
            cells = half_i * 8 // (half_i.max() + 1) * 8 + half_j * 8 // (half_j.max() + 1)
            rows, columns = (np.bincount(c, minlength=8) for c in (cells // 8, cells % 8))
            observed = np.bincount(cells, minlength=64)
            assert chi_square_of(observed, np.outer(rows, columns).ravel()) < chi_square_bound(49)
        agreement = (i % modulus == j % modulus).mean() * modulus
        assert abs(agreement - 1) < 6 * math.sqrt(modulus / NUM_KEYS) + modulus / count
    for coefficients in ((1, -1, 0, 0), (1, 0, -1, 0), (1, -1, -1, 1)):
        differences = (images @ np.array(coefficients)) % count
        widths = np.bincount(np.arange(count) * 50 // count) if count < 10**6 else None
        observed = np.bincount(differences * 50 // count, minlength=50)
        assert chi_square_of(observed, widths) < chi_square_bound(49), coefficients


@pytest.mark.parametrize("count", [5, 50, 1000, 5000])
def test_fixed_points_and_parity(count: int) -> None:
    """A uniform permutation has one fixed point on average, of variance one, and half of them are even."""
    num_keys = 20_000 if count < 100 else 1000
    fixed, odd = [], []
    for key in range(num_keys):
        images = KeyedPermutation(count, key)(np.arange(count))
        fixed.append(int((images == np.arange(count)).sum()))
        if key < 300:
            odd.append((count - _num_cycles(images.tolist())) % 2)
    assert abs(np.mean(fixed) - 1) < 5 / math.sqrt(num_keys)
    assert abs(np.var(fixed) - 1) < 10 / math.sqrt(num_keys)
    assert abs(sum(odd) - len(odd) / 2) < 5 * math.sqrt(len(odd)) / 2


def _num_cycles(permutation: list[int]) -> int:
    seen = [False] * len(permutation)
    cycles = 0
    for start in range(len(permutation)):
        cycles += not seen[start]
        while not seen[start]:
            seen[start] = True
            start = permutation[start]
    return cycles


def test_neighbouring_keys_are_unrelated() -> None:
    """Two epochs of one seed, or one epoch of two seeds, agree at one position in ``count``."""
    count = 10_000
    positions = np.arange(count)
    permutations = [KeyedPermutation(count, seed, epoch)(positions) for seed in range(8) for epoch in range(8)]
    agreements = [int((p == q).sum()) for p, q in itertools.combinations(permutations, 2)]
    assert abs(np.mean(agreements) - 1) < 5 / math.sqrt(len(agreements))
    assert max(agreements) < 10
