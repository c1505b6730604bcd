"""What the test command of the README runs of long searches; the rest is marked ``slow``, or comes with a profile."""

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest
from hypothesis import settings

_PER_PROPERTY = 100  # examples of a profile that gives a property as many as it asks for
_LEAST = 6


def also_slow(values: Iterable[Any], often: Collection[Any]) -> list[Any]:
    """Parameters of a test, of which those that are not in ``often`` are ``slow``; a tuple is one of several arguments."""

    def slow(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if value in often else slow(value) for value in values]


def diagonal(*axes: Collection[Any]) -> list[Any]:
    """All combinations of the arguments of a test, ``slow`` but for as few as have each value of each argument."""
    values = [list(axis) for axis in axes]
    often = [tuple(axis[n % len(axis)] for axis in values) for n in range(max(map(len, values)))]
    return also_slow(itertools.product(*values), often)


def examples(number: int) -> int:
    """How many examples a property gets that deserves ``number`` of them, under the profile that is chosen."""
    return max(min(number, _LEAST), number * settings.default.max_examples // _PER_PROPERTY)
