"""Prioritized draws against loops over the formulas of Schaul et al."""

import itertools
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rare import examples
from trajstore.errors import IndexRangeError, SelectionError
from trajstore.sample.priority import PrioritySampler


def make(counts: Any = (4, 3, 5), **changes: Any) -> PrioritySampler:
    return PrioritySampler(counts, **{"alpha": 0.6, "beta": 0.4, "seed": 0} | changes)


class PlainPriorities:
    """The same in lists: priorities by anchor, None where retired."""

    def __init__(self, counts: list[int], *, alpha: float, beta: float, eps: float = 1e-6) -> None:
        self.alpha, self.beta, self.eps = alpha, beta, eps
        self.trajectories: list[list[int]] = []
        self.priorities: list[float | None] = []
        self.highest = 1.0
        self.ignored = 0
        self.extend(counts)

    def extend(self, counts: list[int]) -> None:
        for count in counts:
            first = len(self.priorities)
            self.trajectories.append(list(range(first, first + count)))
            self.priorities += [self.highest] * count

    def retire(self, trajectory: int) -> None:
        for anchor in self.trajectories[trajectory]:
            self.priorities[anchor] = None

    def update(self, anchor: int, priority: float) -> None:
        if self.priorities[anchor] is None:
            self.ignored += 1
        else:
            self.priorities[anchor] = priority

    def mass(self, anchor: int) -> float:
        priority = self.priorities[anchor]
        return 0.0 if priority is None else (priority + self.eps) ** self.alpha

    def probability(self, anchor: int) -> float:
        return self.mass(anchor) / sum(map(self.mass, range(len(self.priorities))))

    def weight(self, anchor: int) -> float:
        alive = [i for i, priority in enumerate(self.priorities) if priority is not None]
        raw = {i: (len(alive) * self.probability(i)) ** -self.beta for i in {anchor, *alive}}
        return raw[anchor] / max(raw.values())


def chi_square_bound(freedom: int) -> float:
    """The value that a chi-square of so many degrees exceeds once in 10,000 times (Wilson and Hilferty)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.719 * spread**0.5) ** 3


def chi_square(drawn: Any, expected: Any) -> float:
    expected = np.asarray(expected)
    assert not drawn[expected == 0].any()
    alive = expected > 0
    return float((((drawn - expected) ** 2)[alive] / expected[alive]).sum())


@settings(max_examples=examples(60), deadline=None, derandomize=True)
@given(data=st.data(), alpha=st.sampled_from([0.0, 0.6, 1.0]), beta=st.sampled_from([0.0, 0.4, 1.0]))
def test_against_lists(data: st.DataObject, alpha: float, beta: float) -> None:
    counts = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=8))
    plain, sampler = PlainPriorities(counts, alpha=alpha, beta=beta), make(counts, alpha=alpha, beta=beta)
    for step in range(data.draw(st.integers(1, 8))):
        match data.draw(st.sampled_from(["extend", "retire", "update", "update"])):
            case "extend":
                more = data.draw(st.lists(st.integers(0, 6), max_size=3))
                plain.extend(more)
                sampler.extend(more)
            case "retire":
                gone = data.draw(st.lists(st.integers(0, len(plain.trajectories) - 1), max_size=3))
                for trajectory in gone:
                    plain.retire(trajectory)
                sampler.retire(gone)
            case _ if plain.priorities:
                pairs = st.tuples(st.integers(0, len(plain.priorities) - 1), st.floats(0, 1e3))
                changes = data.draw(st.lists(pairs, max_size=12))
                before = list(plain.priorities)
                for anchor, priority in changes:
                    plain.update(anchor, priority)
                given_to = [priority for anchor, priority in changes if before[anchor] is not None]
                plain.highest = max([plain.highest, *given_to])
                sampler.update([anchor for anchor, _ in changes], [priority for _, priority in changes])
        assert sampler.num_anchors == len(plain.priorities)
        assert sampler.max_priority == plain.highest
        assert sampler.ignored_updates == plain.ignored
        masses = [plain.mass(anchor) for anchor in range(len(plain.priorities))]
        np.testing.assert_allclose(sampler.state_dict()["masses"], masses, rtol=1e-12)
        if not any(masses):
            with pytest.raises(SelectionError, match="no anchor to draw"):
                sampler.draw(step, 5)
            continue
        anchors, weights = sampler.draw(step, 17)
        assert (anchors.dtype, anchors.shape, weights.dtype, weights.shape) == (np.int64, (17,), np.float32, (17,))
        ends = list(itertools.accumulate(masses))
        for segment, anchor in enumerate(anchors):
            assert masses[anchor] > 0
            assert ends[anchor] >= ends[-1] / 17 * segment * (1 - 1e-9)
            assert ends[anchor] - masses[anchor] <= ends[-1] / 17 * (segment + 1) * (1 + 1e-9)
        np.testing.assert_allclose(weights, [plain.weight(int(anchor)) for anchor in anchors], rtol=1e-5)


@pytest.mark.parametrize("size", [1, 13])
def test_proportional(size: int) -> None:
    """Single draws are independent, so their chi-square is one; in larger batches the strata make it smaller."""
    plain, sampler = PlainPriorities([5, 20, 5], alpha=0.7, beta=0.5), make([5, 20, 5], alpha=0.7, beta=0.5)
    priorities = np.random.default_rng(1).exponential(size=30)
    sampler.update(np.arange(30), priorities)
    sampler.retire([0])
    for anchor, priority in enumerate(priorities):
        plain.update(anchor, float(priority))
    plain.retire(0)
    draws = 6000
    drawn = np.concatenate([sampler.draw(batch, size)[0] for batch in range(draws)])
    expected = [draws * size * plain.probability(anchor) for anchor in range(30)]
    assert chi_square(np.bincount(drawn, minlength=30), expected) < chi_square_bound(24)


def test_draw_is_a_pure_function_of_state_and_batch() -> None:
    sampler, again = make([1000]), make([1000])
    first = [sampler.draw(batch, 64) for batch in range(6)]
    for batch in (3, 0, 5):
        for here, there in zip(again.draw(batch, 64), first[batch], strict=True):
            np.testing.assert_array_equal(here, there)
        bits = np.random.Philox(key=0, counter=[0, 0, 0, batch])
        points = (np.arange(64) + np.random.Generator(bits).random(64)) / 64  # equal priorities: mass is anchors
        np.testing.assert_array_equal(first[batch][0], (points * 1000).astype(int))
    assert not np.array_equal(first[0][0], first[1][0])
    assert not np.array_equal(make([1000], seed=1).draw(0, 64)[0], first[0][0])


def test_no_priority_is_no_zero_mass() -> None:
    sampler = make([3], alpha=200.0, beta=1.0)  # eps ** 200 underflows
    sampler.update([0, 1, 2], [0.0, 0.0, 0.0])
    anchors, weights = sampler.draw(0, 3)
    assert anchors.tolist() == [0, 1, 2]
    assert weights.tolist() == [1.0, 1.0, 1.0]


def test_new_anchors_have_the_largest_priority() -> None:
    sampler = make([2], alpha=1.0, eps=1e-9)
    sampler.update([0], [8.0])
    sampler.update([0], [0.5])
    sampler.retire([0])
    sampler.update([1], [99.0])  # retired: ignored, and not the maximum
    sampler.extend([2])
    assert sampler.max_priority == 8.0
    np.testing.assert_allclose(sampler.state_dict()["masses"], [0, 0, 8, 8], rtol=1e-8)
    assert sampler.ignored_updates == 1


@pytest.mark.parametrize(
    ("index", "priorities"),
    [
        ([3, 0], [2.0, 5]),
        (np.array([3, 0], np.uint8), np.array([2, 5], np.int32)),
        (torch.tensor([3, 0], dtype=torch.int32), torch.tensor([2.0, 5.0], dtype=torch.bfloat16)),
        (torch.tensor([[3], [0]]), torch.tensor([[2.0], [5.0]], requires_grad=True)),
        (np.array([3, 1, 0])[::2], torch.tensor([2.0, 9.0, 5.0])[::2]),
    ],
)
def test_what_update_takes(index: Any, priorities: Any) -> None:
    sampler = make([4], alpha=1.0, eps=1e-12)
    sampler.update(index, priorities)
    np.testing.assert_allclose(sampler.state_dict()["masses"], [5, 1, 1, 2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_update_takes_cuda_tensors() -> None:
    sampler = make([4], alpha=1.0, eps=1e-12)
    sampler.update(torch.tensor([3], device="cuda"), torch.tensor([2.0], device="cuda", dtype=torch.float16))
    np.testing.assert_allclose(sampler.state_dict()["masses"], [1, 1, 1, 2])


def test_empty_calls_are_allowed() -> None:
    sampler = make([2])
    before = sampler.state_dict()["masses"]
    sampler.update([], [])
    sampler.retire([])
    sampler.extend([])
    sampler.extend(np.array([0]))
    np.testing.assert_array_equal(sampler.state_dict()["masses"], before)


@pytest.mark.parametrize(
    ("index", "priorities", "error", "message"),
    [
        ([0, 1], [1.0, float("nan")], SelectionError, r"priorities\[1\] is nan, expected a finite"),
        ([0, 1], [1.0, float("inf")], SelectionError, r"priorities\[1\] is inf"),
        ([0, 1], [-0.5, 1.0], SelectionError, r"priorities\[0\] is -0.5.*absolute"),
        ([0, 1], [1e300, 1.0], SelectionError, "exceeds"),
        ([0, 1], [1.0], SelectionError, r"shape \(2,\) with priorities of shape \(1,\)"),
        ([[0, 1]], [1.0, 1.0], SelectionError, r"shape \(1, 2\) with priorities of shape \(2,\)"),
        ([0.0, 1.0], [1.0, 1.0], SelectionError, "index is of float64, expected integers"),
        ([True, False], [1.0, 1.0], SelectionError, "index is of bool"),
        ([0, 1], ["a", "b"], SelectionError, "priorities is of <U1"),
        ([0, 12], [1.0, 1.0], IndexRangeError, "anchor 12, expected 0 to 11"),
        ([-1, 0], [1.0, 1.0], IndexRangeError, "anchor -1, expected 0 to 11"),
    ],
)
def test_refused_updates_change_nothing(index: Any, priorities: Any, error: type[Exception], message: str) -> None:
    sampler = make(alpha=1.0)
    sampler.retire([2])
    before = sampler.state_dict()
    with pytest.raises(error, match=message):
        sampler.update(index, priorities)
    after = sampler.state_dict()
    np.testing.assert_array_equal(before.pop("masses"), after.pop("masses"))
    assert str(before) == str(after)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"eps": 0.0}, "eps=0.0, expected a finite number above 0"),
        ({"rank": 2, "world_size": 2}, "rank=2 of world_size=2"),
        ({"counts": [1, -1]}, "counts has -1"),
        ({"counts": [1.5]}, "counts is of float64"),
    ],
)
def test_refused_construction(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        make(**changes)


def test_refused_calls() -> None:
    sampler = make([2, 2])
    with pytest.raises(IndexRangeError, match="trajectories 1 to 2, expected 0 to 1"):
        sampler.retire([1, 2])
    with pytest.raises(SelectionError, match="size=0"):
        sampler.draw(0, 0)
    with pytest.raises(SelectionError, match="beta=-1"):
        sampler.beta = -1
    assert sampler.state_dict()["masses"].all()


# --- ranks --------------------------------------------------------------------------------------------------


def held_by(sampler: PrioritySampler) -> list[int]:
    """Which anchors a rank draws: with equal priorities and as many points as leaves, each one once."""
    size = len(sampler.state_dict()["masses"])
    return sorted(set(sampler.draw(0, size * 8)[0].tolist())) if size else []


@settings(max_examples=examples(40), deadline=None, derandomize=True)
@given(additions=st.lists(st.lists(st.integers(0, 7), max_size=5), min_size=1, max_size=6), world=st.integers(1, 4))
def test_ranks_share_the_anchors(additions: list[list[int]], world: int) -> None:
    ranks = [make(additions[0], rank=rank, world_size=world) for rank in range(world)]
    expected: list[list[int]] = [[] for _ in ranks]
    total = 0
    for number, counts in enumerate(additions):
        for anchor in range(sum(counts)):
            (part,) = [s for s in range(world) if sum(counts) * s // world <= anchor < sum(counts) * (s + 1) // world]
            expected[(part - number) % world].append(total + anchor)
        total += sum(counts)
        for sampler in ranks if number else ():
            sampler.extend(counts)
    assert [held_by(sampler) for sampler in ranks] == expected
    owner = {anchor: rank for rank, anchors in enumerate(expected) for anchor in anchors}
    for anchor, rank in owner.items():
        for other, sampler in enumerate(ranks):
            if other == rank:
                sampler.update([anchor], [2.0])
            else:
                with pytest.raises(IndexRangeError, match=f"anchor {anchor} .*held by another rank than {other}"):
                    sampler.update([anchor], [2.0])


def test_a_rank_follows_its_own_masses() -> None:
    counts, half = [6, 3, 7], 8
    for rank in (0, 1):
        sampler = make(counts, rank=rank, world_size=2, alpha=1.0, beta=0.5, eps=1e-9)
        own = range(half * rank, half * (rank + 1))
        priorities = {anchor: 1.0 + anchor for anchor in own}
        sampler.update(list(priorities), list(priorities.values()))
        total = sum(priorities.values())
        largest = max((half * priority / total) ** -0.5 for priority in priorities.values())
        seen = np.zeros(16)
        for batch in range(300):
            anchors, weights = sampler.draw(batch, 16)
            np.add.at(seen, anchors, 1)
            plain = [(half * priorities[int(anchor)] / total) ** -0.5 / largest for anchor in anchors]
            np.testing.assert_allclose(weights, plain, rtol=1e-5)
        expected = [300 * 16 * priorities.get(anchor, 0.0) / total for anchor in range(16)]
        assert chi_square(seen, expected) < chi_square_bound(half - 1)


def test_retiring_a_trajectory_that_two_ranks_share() -> None:
    for rank, left in ((0, [0, 1]), (1, [6, 7])):
        sampler = make([2, 4, 2], rank=rank, world_size=2)
        sampler.extend([5])
        sampler.retire([1, 3])
        assert held_by(sampler) == left


def test_ranks_draw_differently() -> None:
    first, second = (make([1000], rank=rank, world_size=2).draw(0, 100)[0] for rank in (0, 1))
    assert not np.array_equal(first, second - 500)


# --- state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 3])
def test_state_round_trip(world: int) -> None:
    rng = np.random.default_rng(5)
    for rank in range(world):
        sampler = make([40, 60], rank=rank, world_size=world, seed=9)
        sampler.extend([31, 10])
        own = np.array(held_by(sampler))
        sampler.update(rng.choice(own, 50), rng.exponential(size=50))
        sampler.retire([0])
        sampler.update(own, rng.exponential(size=len(own)))
        sampler.beta = 0.8
        state = sampler.state_dict()
        resumed = make([40, 60, 31, 10], rank=rank, world_size=world, seed=9)
        resumed.load_state_dict(state)
        for batch in (3, 4):
            for ours, theirs in zip(sampler.draw(batch, 33), resumed.draw(batch, 33), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            for one in (sampler, resumed):
                one.extend([7])
                one.update(own[:20], np.arange(20.0))
        assert sampler.ignored_updates == resumed.ignored_updates
        assert sampler.ignored_updates > 0 or rank == 2  # whose slice has nothing of trajectory 0
        assert str(sampler.state_dict()) == str(resumed.state_dict())
        assert len(state["masses"]) == len(own)  # a copy: what came later is not in it


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"counts": [4, 3, 5, 1]}, "12 anchors in 3 trajectories, this sampler 13 in 4"),
        ({"counts": [4, 4, 4]}, "of other lengths"),
        ({"alpha": 0.5}, "alpha=0.6, this sampler 0.5"),
        ({"rank": 1, "world_size": 2}, "rank=0, this sampler 1"),
    ],
)
def test_refused_states(other: dict[str, Any], message: str) -> None:
    state = make().state_dict()
    sampler = make(**other)
    before = str(sampler.state_dict())
    with pytest.raises(SelectionError, match=message):
        sampler.load_state_dict(state)
    assert str(sampler.state_dict()) == before


@pytest.mark.parametrize(
    "damage",
    [
        {"masses": np.ones(11)},
        {"masses": np.ones(13)},
        {"masses": np.full(12, np.nan)},
        {"runs": np.zeros((0, 2), np.int64)},
        {"runs": np.array([[5, 0]])},
        {"runs": np.array([[0, 0], [3, 9]])},
    ],
)
def test_damaged_states(damage: dict[str, Any]) -> None:
    sampler = make()
    with pytest.raises(SelectionError):
        sampler.load_state_dict(sampler.state_dict() | damage)
    assert held_by(sampler) == list(range(12))


def test_a_state_that_lacks_something() -> None:
    state = make().state_dict()
    del state["runs"], state["alpha"]
    with pytest.raises(SelectionError, match="lacks runs, alpha"):
        make().load_state_dict(state)


# --- threads ------------------------------------------------------------------------------------------------


def test_draws_while_others_write() -> None:
    sampler = make([500] * 10)
    stop, failures, drawn = threading.Event(), [], []
    ready = threading.Barrier(2, timeout=60)

    def draw() -> None:
        try:
            ready.wait()
            for batch in itertools.count():
                anchors, weights = sampler.draw(batch, 64)
                assert (weights > 0).all()
                assert (weights <= 1).all()
                drawn.append(anchors)
                if stop.is_set():
                    break
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    ready.wait()
    rng = np.random.default_rng(0)
    for number in range(200):
        sampler.update(rng.integers(0, sampler.num_anchors, 100), rng.random(100))
        sampler.extend([50])
        if number % 50 == 0:
            sampler.retire([number // 50])
    stop.set()
    thread.join(60)
    assert not failures
    assert drawn
    assert set(np.unique(sampler.draw(10**6, 5000)[0]).tolist()).isdisjoint(range(2000))
