"""The tree against a list of masses, its running sums, and a binary search."""

import bisect
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.rare import examples
from trajstore.errors import IndexRangeError, SelectionError
from trajstore.sample import sum_tree
from trajstore.sample.sum_tree import FAN_OUT, MAX_MASS, SumTree

ALMOST_ONE = np.nextafter(1.0, 0.0)


def plain_sample(masses: list[float], uniforms: list[float]) -> list[int]:
    """One point per equal segment of the total; the leaf whose interval [sum before, sum after) holds it."""
    ends = list(itertools.accumulate(masses))
    width = ends[-1] / len(uniforms)
    points = [(i + u) * width for i, u in enumerate(uniforms)]
    return [bisect.bisect_right(ends, min(point, math.nextafter(ends[-1], 0))) for point in points]


@pytest.fixture
def _small_levels() -> Iterator[None]:
    """Levels and chunks so small that a hundred leaves take several of both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sum_tree, "_TOP", FAN_OUT)
        patch.setattr(sum_tree, "_CHUNK", 5)
        yield


small_levels = pytest.mark.usefixtures("_small_levels")


def assert_exact(tree: SumTree) -> None:
    """Each node is what its children say, by loops, and just what a tree made anew from the leaves has."""
    anew = SumTree(tree.leaves)
    nodes = len(tree)
    for level, (sums, mins) in enumerate(zip(tree._sums, tree._mins, strict=True)):
        if level:
            below, lows = tree._sums[level - 1], tree._mins[level - 1]
            nodes = -(-nodes // FAN_OUT)
            for node in range(nodes):
                children = slice(node * FAN_OUT, (node + 1) * FAN_OUT)
                np.testing.assert_allclose(sums[node], sum(below[children].tolist()), rtol=1e-14)
                assert mins[node] == min((low for low in lows[children].tolist() if low > 0), default=np.inf)
        assert not sums[nodes:].any()
        if level < len(anew._sums):
            np.testing.assert_array_equal(sums[:nodes], anew._sums[level][:nodes])


whole = st.integers(0, 7).map(float)  # whole numbers: every sum is exact, so every draw is


class TreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(sum_tree, "_TOP", FAN_OUT)
        self.patch.setattr(sum_tree, "_CHUNK", 5)
        self.masses: list[float] = []
        self.tree = SumTree()

    def teardown(self) -> None:
        assert_exact(self.tree)
        self.patch.undo()

    @rule(added=st.lists(whole, max_size=40), times=st.integers(1, 20))
    def append(self, added: list[float], times: int) -> None:
        self.tree.append(added * times)
        self.masses += added * times

    @precondition(lambda self: self.masses)
    @rule(data=st.data(), times=st.integers(1, 60))
    def set(self, data: st.DataObject, times: int) -> None:
        where = st.integers(0, len(self.masses) - 1)
        changes = data.draw(st.lists(st.tuples(where, whole), max_size=20)) * times
        self.tree.set(np.array([i for i, _ in changes], np.int64), np.array([mass for _, mass in changes]))
        for i, mass in changes:
            self.masses[i] = mass

    @precondition(lambda self: any(self.masses))
    @rule(uniforms=st.lists(st.floats(0, ALMOST_ONE), min_size=1, max_size=30))
    def sample(self, uniforms: list[float]) -> None:
        assert self.tree.sample(np.array(uniforms)).tolist() == plain_sample(self.masses, uniforms)

    @invariant()
    def same_masses(self) -> None:
        assert self.tree.leaves.tolist() == self.masses
        assert self.tree.total == sum(self.masses)
        assert self.tree.smallest == min((mass for mass in self.masses if mass > 0), default=np.inf)


TreeMachine.TestCase.settings = settings(
    max_examples=examples(20), stateful_step_count=15, deadline=None, derandomize=True
)
TestTree = TreeMachine.TestCase


@pytest.mark.parametrize("size", [1, 15, 16, 17, 4096, 4097, 70_000])
@pytest.mark.parametrize("count", [1, 2, 333, 9000])
def test_sample_is_the_running_sum_at_every_size(size: int, count: int) -> None:
    rng = np.random.default_rng(size)
    masses = rng.integers(0, 4, size).astype(float)
    masses[-1] = 2.0
    uniforms = rng.random(count)
    expected = plain_sample(masses.tolist(), uniforms.tolist())
    assert SumTree(masses).sample(uniforms).tolist() == expected


@small_levels
@settings(max_examples=examples(150), deadline=None, derandomize=True)
@given(
    masses=st.lists(st.just(0.0) | st.floats(1e-300, 1e280) | st.floats(1e-3, 1e3), min_size=1, max_size=400),
    count=st.integers(1, 50),
    edge=st.sampled_from([0.0, 0.5, ALMOST_ONE]),
)
def test_zero_mass_is_never_drawn(masses: list[float], count: int, edge: float) -> None:
    tree = SumTree(masses)
    if not any(masses):
        with pytest.raises(SelectionError, match=r"all of .* masses are zero"):
            tree.sample(np.full(count, edge))
        return
    drawn = tree.sample(np.full(count, edge))
    assert all(0 <= leaf < len(masses) and masses[leaf] > 0 for leaf in drawn)
    assert (np.diff(drawn) >= 0).all()


@small_levels
def test_points_beyond_a_block_stay_on_a_leaf_with_mass() -> None:
    """A block's sum may exceed its running sum in the last bits: a point in between belongs to its last leaf with mass."""
    rng = np.random.default_rng(0)
    beyond = 0
    for _ in range(300):
        masses = np.zeros(3 * FAN_OUT)
        masses[FAN_OUT + 1 : 2 * FAN_OUT - 1] = rng.random(FAN_OUT - 2)
        tree = SumTree(masses)
        beyond += np.nextafter(tree.total, 0) >= list(itertools.accumulate(masses))[-1]
        assert tree.sample(np.array([ALMOST_ONE])) == [2 * FAN_OUT - 2]
    assert beyond > 0


def test_one_point_in_each_segment() -> None:
    rng = np.random.default_rng(3)
    masses = rng.random(5000)
    ends = np.cumsum(masses)
    for count in (1, 7, 256, 20_000):
        drawn = SumTree(masses).sample(rng.random(count))
        width = ends[-1] / count
        for segment, leaf in enumerate(drawn):
            assert ends[leaf] >= segment * width * (1 - 1e-12)
            assert ends[leaf] - masses[leaf] <= (segment + 1) * width * (1 + 1e-12)


def test_the_last_of_equal_indices_counts() -> None:
    tree = SumTree(np.ones(100_000))
    rng = np.random.default_rng(0)
    index, masses = rng.integers(0, 1000, 65_536), rng.random(65_536)
    tree.set(index, masses)
    expected = dict(zip(index.tolist(), masses.tolist(), strict=True))
    assert {i: tree.leaves[i] for i in expected} == expected
    assert_exact(tree)


def test_sums_do_not_drift() -> None:
    tree = SumTree(np.ones(5000))
    rng = np.random.default_rng(0)
    for _ in range(300):
        tree.set(rng.integers(0, 5000, 50), rng.choice([1e-9, 1.0, 1e9], 50))
    tree.set(np.arange(5000), np.full(5000, 0.1))
    assert tree.total == SumTree(np.full(5000, 0.1)).total
    assert_exact(tree)


def test_growth_is_amortised_and_memory_bounded() -> None:
    tree, allocations = SumTree(np.ones(10)), set()
    for _ in range(2000):
        tree.append(np.ones(37))
        allocations.add(id(tree._sums))
        assert sum(a.nbytes for a in {id(a): a for a in tree._sums + tree._mins}.values()) <= 2 * 8 * len(tree) + 4096
    assert len(tree) == 10 + 2000 * 37
    assert tree.total == len(tree)
    assert len(allocations) < 30


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1.0, MAX_MASS * 2])
def test_bad_masses_change_nothing(wrong: float) -> None:
    tree = SumTree([1.0, 2.0])
    with pytest.raises(SelectionError, match=r"masses from .* expected finite"):
        tree.set(np.array([0, 1]), np.array([5.0, wrong]))
    with pytest.raises(SelectionError, match=r"masses from .* expected finite"):
        tree.append([1.0, wrong])
    assert tree.leaves.tolist() == [1.0, 2.0]
    assert len(tree) == 2


@pytest.mark.parametrize("wrong", [-1, 2])
def test_bad_indices_change_nothing(wrong: int) -> None:
    tree = SumTree([1.0, 2.0])
    with pytest.raises(IndexRangeError, match="expected 0 to 1"):
        tree.set(np.array([0, wrong]), np.array([5.0, 5.0]))
    assert tree.leaves.tolist() == [1.0, 2.0]


def test_leaves_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        SumTree([1.0]).leaves[0] = 2.0
