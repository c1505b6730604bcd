"""Permutations that are computed, not stored.

Invariant: a ``KeyedPermutation`` of ``count`` numbers is a bijection of ``[0, count)`` for every key, and the image of
a position depends on nothing but ``count``, the key and the position: random access, no memory that grows with ``count``.

Small domains are sorted by a keyed hash, which makes all permutations equally likely. Larger ones go through the generalised
Feistel cipher of Black & Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002): a number is split as
``left + a * right`` with ``a * b >= count``, and each round adds a keyed hash of one half to the other, modulo ``a`` or
``b``. An image outside ``[0, count)`` is enciphered again until it lies inside (cycle walking). Mitchell et al.,
"Bandwidth-optimal random shuffling for GPUs" (ACM TOPC 2022), do so on powers of two, where up to half of the images lie
outside and a call takes a dozen passes, each on fewer numbers. Here ``a * b`` is fitted to ``count``: less than one image
in a hundred lies outside, one in many thousands where ``count`` is in the millions, and a second pass is rare.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from trajstore.errors import IndexRangeError, SelectionError
from trajstore.stored import Array

MAX_COUNT = 2**62  # halves then have about 31 bits, and every product below fits into 64

_SORTED_BELOW = 4096  # sorting so many is faster than a cipher, which would need more rounds the smaller they are
_ROUNDS = 6  # after 4, a chi-square over two million keys still told pairs of images from uniform ones; after 6, not

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15  # increment of SplitMix64
_HASH_1 = np.uint64(0xD6E8FEB86659FD93)  # odd and without pattern: multipliers of the round function
_HASH_2 = np.uint64(0xFF51AFD7ED558CCD)
_32 = np.uint64(32)


class KeyedPermutation:
    """A pseudorandom bijection of ``[0, count)``, or one for each of several keys.

    Args:
        count: Size of the domain, ``1 .. 2**62``.
        *key: Integers, taken modulo ``2**64``. Int64 or uint64 arrays ``(m,)`` among them make ``m`` permutations, numbered
            ``0 .. m - 1``. (Below 4096, ``count`` numbers are held for each.)

    Raises:
        SelectionError: ``count`` is out of range.

    >>> shuffle = KeyedPermutation(10, 7)
    >>> images = shuffle(np.arange(10))
    >>> sorted(images.tolist()) == list(range(10))
    True
    >>> shuffle.inverse(images).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    >>> several = KeyedPermutation(10, 7, np.arange(3))
    >>> several(np.array([5, 5]), np.array([0, 2])).tolist() == [
    ...     KeyedPermutation(10, 7, epoch)(np.array([5])).item() for epoch in (0, 2)
    ... ]
    True
    """

    def __init__(self, count: int, *key: int | Array) -> None:
        count = operator.index(count)
        if not 1 <= count <= MAX_COUNT:
            raise SelectionError(f"a permutation of {count} numbers, expected 1 to {MAX_COUNT}")
        self.count = count
        state = _state(key)
        self._images: Array | None = None  # (m, count) int64
        if count < _SORTED_BELOW:
            numbers = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
            # SplitMix64 never repeats a number, so there are no ties.
            self._images = np.argsort(_mixed(np.asarray(state, np.uint64).reshape(-1, 1) + numbers), axis=1)
            return
        a, b = _moduli(count)
        self._moduli = np.uint64(a), np.uint64(b)
        round_keys = [_mixed(state + (number * _GOLDEN & _MASK) & _MASK) for number in range(1, _ROUNDS + 1)]
        self._round_keys = [np.asarray(k, np.uint64).reshape(-1) for k in round_keys]  # (m,) each

    def __call__(self, positions: Array, which: Array | int = 0) -> Array:
        """Images of positions.

        Args:
            positions: ``(k,)`` int64, each in ``[0, count)``.
            which: ``(k,)`` int64, the number of the permutation for each position; or one for all.

        Returns:
            ``(k,)`` int64 in ``[0, count)``.

        Raises:
            IndexRangeError: A position is out of range.
        """
        return self._apply(positions, which, inverse=False)

    def inverse(self, images: Array, which: Array | int = 0) -> Array:
        """Positions of images: ``inverse(self(positions)) == positions``. Arguments and errors as for a call."""
        return self._apply(images, which, inverse=True)

    def _apply(self, numbers: Array, which: Array | int, *, inverse: bool) -> Array:
        values = numbers.astype(np.uint64)  # a negative number becomes a huge one
        limit = np.uint64(self.count)
        if (values >= limit).any():
            raise IndexRangeError(
                f"positions from {numbers.min()} to {numbers.max()}, expected [0, {self.count}): a permutation's domain"
            )
        if self._images is not None:
            table = np.argsort(self._images, axis=1) if inverse else self._images
            found: Array = table[which, numbers]
            return found
        values = self._cipher(values, which, inverse=inverse)
        # A walk ends: it follows the cycle of a bijection that it entered from inside [0, count).
        while (outside := values >= limit).any():
            walking = which[outside] if isinstance(which, np.ndarray) else which
            values[outside] = self._cipher(values[outside], walking, inverse=inverse)
        return values.view(np.int64)

    def _cipher(self, values: Array, which: Array | int, *, inverse: bool) -> Array:
        """All rounds, on ``[0, a * b)``."""
        a, b = self._moduli
        right = values // a
        left = values - right * a
        hashed = np.empty_like(left)
        rounds = list(enumerate(self._round_keys))
        for number, keys in reversed(rounds) if inverse else rounds:
            source, target, modulus = (left, right, b) if number % 2 else (right, left, a)
            # 32 bits from a multiply-xorshift-multiply hash of 64, scaled to [0, modulus).
            np.add(source, keys[which], out=hashed)
            hashed *= _HASH_1
            hashed ^= hashed >> _32
            hashed *= _HASH_2
            hashed >>= _32
            hashed *= modulus
            hashed >>= _32
            if inverse:
                np.subtract(modulus, hashed, out=hashed)
            target += hashed
            # target % modulus, as target < 2 * modulus: where it was below, the difference wraps around to a huge number.
            np.subtract(target, modulus, out=hashed)
            np.minimum(target, hashed, out=target)
        right *= a
        right += left
        return right


def _moduli(count: int) -> tuple[int, int]:
    """``a`` and ``b``, about equal, with ``a * b >= count`` and little more.

    ``a`` is even, so that a round can be an odd permutation; two odd moduli would leave half of all permutations out.
    """
    root = math.isqrt(count - 1) + 1
    root += root % 2
    a = min(range(root, root + min(root // 4, 64) + 1, 2), key=lambda a: -count % a)
    return a, -(-count // a)


def _state(key: Sequence[int | Array]) -> Any:
    """SplitMix64 over the words of a key: an int below ``2**64``, or ``(m,)`` uint64."""
    state: Any = len(key)
    for word in key:
        bits = np.asarray(word).astype(np.uint64) if np.ndim(word) else int(word) & _MASK
        state = _mixed((state + _GOLDEN & _MASK) ^ bits)
    return state


def _mixed(bits: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), a bijection of 64 bits: of an int or uint64 array."""
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _MASK
    return bits ^ bits >> 31
