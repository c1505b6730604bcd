"""Orders: what is drawn is a function of the batch's number, complete or rightly distributed, and local where it says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sample.chi_square import chi_square_bound, chi_square_of
from tests.support.rare import also_slow, examples
from trajstore.errors import IndexRangeError, SelectionError
from trajstore.sample.order import Order, RandomOrder, SequentialOrder, ShuffleOrder, WeightedOrder
from trajstore.sample.permutation import KeyedPermutation


def weighted(count: int, *, batch_size: int, seed: int = 0) -> WeightedOrder:
    """``count`` anchors in trajectories of 0, 1, 2, ... anchors, with weights of which some are zero."""
    lengths: list[int] = []
    while sum(lengths) < count:
        lengths.append(min(len(lengths), count - sum(lengths)))
    weights = np.arange(1, len(lengths) + 1) % 3
    weights[-1] = 1
    return WeightedOrder(np.cumsum(lengths), weights, batch_size=batch_size, seed=seed)


def shuffle(count: int, *, batch_size: int, seed: int = 0, **options: Any) -> ShuffleOrder:
    options = {"epochs": 1, "drop_last": False} | options
    return ShuffleOrder(count, batch_size=batch_size, seed=seed, **options)


def sequential(count: int, *, batch_size: int, **options: Any) -> SequentialOrder:
    return SequentialOrder(count, batch_size=batch_size, **{"epochs": 1, "drop_last": False} | options)


SEEDED: dict[str, Callable[..., Order]] = {
    "random": RandomOrder,
    "weighted": weighted,
    "shuffle": shuffle,
    "blocks": lambda count, **options: shuffle(count, block=7, blocks_together=3, **options),
}
EVERY: dict[str, Callable[..., Order]] = {
    **{name: lambda count, make=make, **options: make(count, seed=3, **options) for name, make in SEEDED.items()},
    "sequential": sequential,
}


class TestEveryOrder:
    """What all orders promise."""

    @pytest.fixture(params=EVERY)
    def make(self, request: pytest.FixtureRequest) -> Callable[..., Order]:
        return EVERY[request.param]

    @pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (3, 2), (100, 7), (100, 100), (5, 9), (1000, 1)])
    def test_blocks_equal_single_draws(self, make: Callable[..., Order], count: int, batch_size: int) -> None:
        fresh = [make(count, batch_size=batch_size).draw(batch) for batch in range(50)]
        for first, length in ((0, 50), (0, 16), (16, 16), (5, 20), (49, 1), (31, 2), (7, 0)):
            block = make(count, batch_size=batch_size).draw_block(first, length)
            assert [batch.tolist() for batch in block] == [batch.tolist() for batch in fresh[first : first + length]]

    def test_draws_in_any_sequence_are_the_same(self, make: Callable[..., Order]) -> None:
        order = make(100, batch_size=8)
        expected = [make(100, batch_size=8).draw(batch).tolist() for batch in range(60)]
        for batch in np.random.default_rng(0).integers(0, 60, 200).tolist():
            assert order.draw(batch).tolist() == expected[batch]

    def test_anchors_are_int64_in_range(self, make: Callable[..., Order]) -> None:
        for batch in make(10, batch_size=3).draw_block(0, 100):
            assert batch.dtype == np.int64
            assert batch.ndim == 1
            assert 0 < len(batch) <= 3
            assert ((batch >= 0) & (batch < 10)).all()

    def test_batches_belong_to_the_caller(self, make: Callable[..., Order]) -> None:
        order = make(50, batch_size=10)
        before = order.draw(3).tolist()
        order.draw(3)[:] = -1
        for batch in order.draw_block(0, 5):
            batch[:] = -1
        assert order.draw(3).tolist() == before

    def test_far_batches(self, make: Callable[..., Order]) -> None:
        order = make(100, batch_size=10)
        assert len(order.draw(10**12)) == 10

    def test_threads_share_an_order(self, make: Callable[..., Order]) -> None:
        order = make(100, batch_size=8)
        expected = [make(100, batch_size=8).draw(batch).tolist() for batch in range(64)]
        wrong: list[int] = []

        def draw(seed: int) -> None:
            for batch in np.random.default_rng(seed).integers(0, 64, 100).tolist():
                if order.draw(batch).tolist() != expected[batch]:
                    wrong.append(batch)

        threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong

    @pytest.mark.parametrize(("first", "length"), [(-1, 1), (0, -1)])
    def test_negative_batches(self, make: Callable[..., Order], first: int, length: int) -> None:
        with pytest.raises(IndexRangeError, match="expected numbers from 0"):
            make(10, batch_size=2).draw_block(first, length)

    def test_a_batch_size_of_zero(self, make: Callable[..., Order]) -> None:
        with pytest.raises(SelectionError, match="batch_size=0, expected at least 1"):
            make(10, batch_size=0)


@pytest.mark.parametrize("name", SEEDED)
def test_seeds(name: str) -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [batch.tolist() for batch in SEEDED[name](1000, batch_size=50, seed=seed).draw_block(0, 8)]

    assert drawn(5) == drawn(5)
    different = [drawn(seed) for seed in (0, 1, 2, -1, 2**63, 2**64 - 2)]
    assert all(a != b for i, a in enumerate(different) for b in different[:i])


def test_known_batches() -> None:
    """A run may be resumed under another version of NumPy or of this package: these numbers may never change."""
    blocks = shuffle(10**6, batch_size=4, seed=1, block=300, blocks_together=4)
    trajectories = WeightedOrder(np.array([9, 10, 99]), np.array([1, 0, 2]), batch_size=4, seed=1)
    assert RandomOrder(10**6, batch_size=4, seed=1).draw(17).tolist() == [219279, 400511, 527456, 577716]
    assert trajectories.draw(17).tolist() == [5, 48, 71, 52]
    assert shuffle(10**6, batch_size=4, seed=1, epochs=2).draw(250_001).tolist() == [870508, 878970, 117634, 639051]
    assert blocks.draw(250_001).tolist() == [889440, 954133, 954018, 889348]


# Each anchor once per epoch


@given(
    count=st.integers(1, 300),
    batch_size=st.integers(1, 40),
    epochs=st.integers(1, 3),
    drop_last=st.booleans(),
    block=st.none() | st.integers(1, 320),
    blocks_together=st.integers(1, 12),
    seed=st.integers(0, 2**64),
)
@settings(max_examples=examples(300), deadline=None)
def test_each_anchor_once_per_epoch(
    count: int, batch_size: int, epochs: int, drop_last: bool, block: int | None, blocks_together: int, seed: int
) -> None:
    if drop_last and batch_size > count:
        batch_size = count
    order = shuffle(
        count,
        batch_size=batch_size,
        seed=seed,
        epochs=epochs,
        drop_last=drop_last,
        block=block,
        blocks_together=blocks_together,
    )
    per_epoch = count // batch_size + (1 if count % batch_size and not drop_last else 0)
    assert order.batches_per_pass == epochs * per_epoch
    batches = order.draw_block(0, (epochs + 1) * per_epoch)  # one epoch into the next pass
    for epoch in range(epochs + 1):
        of_epoch = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert [len(batch) for batch in of_epoch[:-1]] == [batch_size] * (per_epoch - 1)
        anchors = np.concatenate(of_epoch)
        assert len(anchors) == (per_epoch * batch_size if drop_last else count)
        seen = np.bincount(anchors, minlength=count)
        assert len(seen) == count
        assert seen.max() == 1


@given(
    count=st.integers(1, 300), block=st.integers(1, 320), blocks_together=st.integers(1, 12), epoch=st.integers(0, 5)
)
@settings(max_examples=examples(200), deadline=None)
def test_blocks_are_permuted_and_runs_shuffled(count: int, block: int, blocks_together: int, epoch: int) -> None:
    """The order equals what its description says, block by block in plain lists."""
    order = shuffle(count, batch_size=count, seed=9, block=block, blocks_together=blocks_together)
    block = min(block, count)
    blocks = [list(range(start, min(start + block, count))) for start in range(0, count, block)]
    visited = [blocks[i] for i in KeyedPermutation(len(blocks), 9, epoch)(np.arange(len(blocks)))]
    expected: list[int] = []
    for number, start in enumerate(range(0, len(visited), blocks_together)):
        run = [anchor for part in visited[start : start + blocks_together] for anchor in part]
        expected += [run[i] for i in KeyedPermutation(len(run), 9, epoch, number)(np.arange(len(run)))]
    assert order.draw(epoch).tolist() == expected


@given(count=st.integers(1, 200), batch_size=st.integers(1, 40), epochs=st.integers(1, 3), drop_last=st.booleans())
@settings(max_examples=examples(100), deadline=None)
def test_sequential(count: int, batch_size: int, epochs: int, drop_last: bool) -> None:
    expected = [list(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]
    if drop_last:
        expected = [batch for batch in expected if len(batch) == batch_size]
    if not expected:
        with pytest.raises(SelectionError, match="do not fill one batch"):
            sequential(count, batch_size=batch_size, epochs=epochs, drop_last=drop_last)
        return
    order = sequential(count, batch_size=batch_size, epochs=epochs, drop_last=drop_last)
    assert order.batches_per_pass == epochs * len(expected)
    assert [batch.tolist() for batch in order.draw_block(0, order.batches_per_pass)] == expected * epochs


def test_random_orders_are_endless() -> None:
    assert RandomOrder(3, batch_size=2, seed=0).batches_per_pass is None
    assert weighted(3, batch_size=2).batches_per_pass is None


# Distributions

DRAWS = 200_000


def drawn(order: Order, size: int = DRAWS) -> np.ndarray:
    return np.concatenate(order.draw_block(0, -(-size // order.batch_size)))


@pytest.mark.parametrize("batch_size", [1, 100, 256, 5000, 70_000])
@pytest.mark.parametrize("count", [2, 7, 1000])
def test_random_is_uniform(count: int, batch_size: int) -> None:
    size = DRAWS if batch_size > 1 else 20_000
    order = RandomOrder(count, batch_size=batch_size, seed=11)
    observed = np.bincount(drawn(order, size), minlength=count)
    assert len(observed) == count
    assert chi_square_of(observed) < chi_square_bound(count - 1)


def test_random_batches_are_independent() -> None:
    """Pairs of anchors at the same place of neighbouring batches, within one stream and from one to the next."""
    anchors = np.concatenate(RandomOrder(20, batch_size=64, seed=1).draw_block(0, 2000)).reshape(2000, 64)
    for distance in (1, 2, 16):
        pairs = (anchors[:-distance] * 20 + anchors[distance:]).ravel()
        assert chi_square_of(np.bincount(pairs, minlength=400)) < chi_square_bound(399)
    neighbours = (anchors[:, :-1] * 20 + anchors[:, 1:]).ravel()
    assert chi_square_of(np.bincount(neighbours, minlength=400)) < chi_square_bound(399)


def test_random_over_many_anchors() -> None:
    count = 346_000_000
    anchors = drawn(RandomOrder(count, batch_size=256, seed=5))
    assert chi_square_of(np.bincount(anchors * 1000 // count, minlength=1000)) < chi_square_bound(999)
    assert chi_square_of(np.bincount(anchors % 1024, minlength=1024)) < chi_square_bound(1023)


@pytest.mark.parametrize(
    ("counts", "weights"),
    [
        ([5], [2.0]),
        ([3, 4, 5], [1, 1, 1]),
        ([10, 1, 100], [0.5, 0.25, 0.25]),
        ([0, 4, 0, 6, 0], [9.0, 1.0, 9.0, 2.0, 9.0]),
        ([4, 4, 4, 4], [0, 1, 0, 3]),
        ([4, 4, 4], [0, 1, 0]),
        ([2, 3, 4], [1e300, 1.5e308, 1e308]),
        ([2, 3, 4], [5e-324, 1e-323, 5e-324]),
        (list(range(1, 40)), list(range(39, 0, -1))),
        ([2, 3], [True, True]),
    ],
)
def test_weighted_against_the_exact_distribution(counts: list[int], weights: list[float]) -> None:
    order = WeightedOrder(np.cumsum(counts), np.array(weights), batch_size=256, seed=4)
    largest = max(weights)
    shares = [(w / largest) / n if n else 0.0 for n, w in zip(counts, weights, strict=True)]
    exact = np.array([share for n, share in zip(counts, shares, strict=True) for _ in range(n)])
    observed = np.bincount(drawn(order), minlength=len(exact))
    assert len(observed) == len(exact)
    freedom = int((exact > 0).sum()) - 1
    assert chi_square_of(observed, exact) < chi_square_bound(freedom)


def test_weighted_at_the_ends_of_the_unit_interval() -> None:
    """Zero, and the last number before one, find trajectories that may be drawn and have anchors."""
    last = 1 - 2.0**-53
    for scale in (1.0, 1 / 3, 0.7, 1e300, 1e-300):
        order = WeightedOrder(np.array([3, 5, 5, 9, 12]), np.array([0, 1, 9, 1, 0]) * scale, batch_size=1, seed=0)
        assert order._anchors(np.array([[0.0, 0.0, last, last], [0.0, last, 0.0, last]])).tolist() == [3, 4, 5, 8]


def test_weighted_pairs_within_a_batch_are_independent() -> None:
    """The search works on sorted numbers; that must not show in the order of a batch."""
    order = WeightedOrder(np.array([2, 4, 6]), np.array([1, 2, 1]), batch_size=50, seed=0)
    batches = np.stack(order.draw_block(0, 4000))
    exact = np.array([1, 1, 2, 2, 1, 1])
    for first, second in ((0, 1), (0, 49), (20, 30)):
        pairs = np.bincount(batches[:, first] * 6 + batches[:, second], minlength=36)
        assert chi_square_of(pairs, np.outer(exact, exact).ravel()) < chi_square_bound(35)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, -1.0, 1.0], "1 of 3 weights are negative, NaN or infinite, the first is -1.0 of trajectory 1"),
        ([1.0, 2.0, np.nan], "the first is nan of trajectory 2"),
        ([np.inf, -np.inf, 1.0], "2 of 3 weights"),
        ([0.0, 0.0, 0.0], "none of the 3 trajectories has both an anchor and a positive weight"),
        ([0.0, 1.0, 0.0], "none of the 3 trajectories"),  # the only positive weight is of a trajectory without anchors
        ([1.0, 2.0], r"shape \(2,\), expected one per trajectory: \(3,\)"),
    ],
)
def test_refused_weights(weights: list[float], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        WeightedOrder(np.array([4, 4, 8]), np.array(weights), batch_size=2, seed=0)


# Shuffling


def test_epochs_differ() -> None:
    for options in ({}, {"block": 16}, {"block": 16, "blocks_together": 4}):
        order = shuffle(256, batch_size=256, epochs=3, **options)
        epochs = [order.draw(epoch).tolist() for epoch in range(6)]  # two passes: the second goes on with the epochs
        assert all(a != b for i, a in enumerate(epochs) for b in epochs[:i])


@pytest.mark.parametrize(
    "options",
    also_slow(
        [
            {},
            {"block": 4},
            {"block": 4, "blocks_together": 2},
            {"block": 5, "blocks_together": 2},
            {"block": 1, "blocks_together": 1},
            {"block": 1, "blocks_together": 5},
            {"block": 50, "blocks_together": 1},
        ],
        [{}, {"block": 5, "blocks_together": 2}],
    ),
)
def test_each_anchor_comes_first_equally_often(options: dict[str, int]) -> None:
    """Over epochs, except that a short block is as likely as a whole one to come first: 12 anchors, blocks of up to 5."""
    order = shuffle(12, batch_size=12, seed=8, **options)
    first = np.array([order.draw(epoch)[0] for epoch in range(3000)])
    weights = np.ones(12)
    if options == {"block": 5, "blocks_together": 2}:
        # Runs of two of the blocks 5, 5, 2: any pair comes first equally often, then an anchor of it uniformly.
        weights = np.array([1 / 10 + 1 / 7] * 10 + [2 / 7] * 2)
    assert chi_square_of(np.bincount(first, minlength=12), weights) < chi_square_bound(11)


def test_all_shuffles_of_blocks_are_equally_likely() -> None:
    """Four anchors in two blocks of two: 8 orders are possible without mixing blocks, 24 with."""
    for blocks_together, possible in ((1, 8), (2, 24)):
        order = shuffle(4, batch_size=4, seed=0, block=2, blocks_together=blocks_together)
        seen = np.array([order.draw(epoch) @ 4 ** np.arange(4) for epoch in range(6000)])
        _, observed = np.unique(seen, return_counts=True)
        assert len(observed) == possible
        assert chi_square_of(observed) < chi_square_bound(possible - 1)


@pytest.mark.parametrize(
    ("count", "block", "together", "batch_size"), [(10_000, 64, 8, 32), (9_999, 100, 5, 50), (777, 10, 1, 10)]
)
def test_a_run_of_batches_touches_few_blocks(count: int, block: int, together: int, batch_size: int) -> None:
    order = shuffle(count, batch_size=batch_size, seed=2, block=block, blocks_together=together)
    batches = order.draw_block(0, order.batches_per_pass)
    touched = [set((batch // block).tolist()) for batch in batches]
    # No batch reaches over more than two runs, unless it is larger than one (the last run may be small).
    assert max(map(len, touched)) <= 2 * together + (together if count % (block * together) else 0)
    # A block is touched in one stretch of batches, no longer than a run and its two ends.
    for number in range(-(-count // block)):
        batches_with = [i for i, blocks in enumerate(touched) if number in blocks]
        assert batches_with[-1] - batches_with[0] <= -(-together * block // batch_size)
    # So at any time the blocks that were begun and not finished are those of one run, or of two within a batch.
    begun = {n: min(i for i, blocks in enumerate(touched) if n in blocks) for n in range(-(-count // block))}
    ended = {n: max(i for i, blocks in enumerate(touched) if n in blocks) for n in begun}
    for i in range(len(batches)):
        assert sum(begun[n] < i < ended[n] for n in begun) <= together


def test_whole_runs_touch_exactly_their_blocks() -> None:
    order = shuffle(64 * 100, batch_size=64, seed=2, block=64, blocks_together=4)
    visited: list[int] = []
    for first in range(0, 100, 4):
        blocks = set((np.concatenate(order.draw_block(first, 4)) // 64).tolist())
        assert len(blocks) == 4
        visited += sorted(blocks)
    assert sorted(visited) == list(range(100))


@pytest.mark.parametrize(
    "options", [{}, {"block": 1 << 12, "blocks_together": 256}, {"block": 1 << 20, "blocks_together": 1}]
)
def test_shuffle_of_very_many_anchors(options: dict[str, int]) -> None:
    """Random access into 346 million, without a repeat nearby or at the ends; spread over all anchors, or over the run's."""
    count = 346_000_001
    order = shuffle(count, batch_size=4096, seed=6, **options)
    last = order.batches_per_pass - 1
    assert len(order.draw(last)) == count % 4096
    anchors = np.concatenate([*order.draw_block(0, 40), *order.draw_block(last - 40, 41)])
    assert ((anchors >= 0) & (anchors < count)).all()
    assert len(np.unique(anchors)) == len(anchors)
    if options:
        assert len(np.unique(anchors[: 40 * 4096] // options["block"])) == options["blocks_together"]
    else:
        assert chi_square_of(np.bincount(anchors * 100 // count, minlength=100)) < chi_square_bound(99)
    within = anchors[: 40 * 4096] % options.get("block", 4096)
    assert chi_square_of(np.bincount(within * 64 // options.get("block", 4096), minlength=64)) < chi_square_bound(63)


def test_shuffled_neighbours_are_unrelated() -> None:
    """Neighbours in the data end up neighbours in the order about twice in ``count``, as in a uniform permutation."""
    neighbours = []
    for epoch in range(200):
        anchors = shuffle(500, batch_size=500, seed=1).draw(epoch)
        neighbours.append(int((np.abs(np.diff(anchors)) == 1).sum()))
    assert abs(np.mean(neighbours) - 2) < 5 * np.sqrt(2 / 200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0, expected at least 1"),
        ({"epochs": 0}, "epochs=0"),
        ({"block": 0}, "block=0"),
        ({"block": 2, "blocks_together": 0}, "blocks_together=0"),
        ({"batch_size": 11, "drop_last": True}, "10 anchors do not fill one batch of batch_size=11"),
    ],
)
def test_refused_arguments(options: dict[str, Any], message: str) -> None:
    options = {"count": 10, "batch_size": 2} | options
    with pytest.raises(SelectionError, match=message):
        shuffle(options.pop("count"), **options)
