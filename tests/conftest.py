"""What all tests share: properties are the same in every run, and how long an example takes is not one of them.

The checks of types and style come first: the longest of them is then under way beside other tests, not after them.
"""

import os
import sys

import pytest
from hypothesis import settings

# Many tests start interpreters, which would all compile the package anew where the environment forbids to keep bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

settings.register_profile("trajstore", deadline=None, derandomize=True, max_examples=25)
settings.register_profile(
    "thorough", deadline=None, derandomize=True, max_examples=400
)  # --hypothesis-profile thorough
settings.load_profile("trajstore")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of the others stays."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_checks.py"))
