"""Orders: what is visited, how often, and that it depends on nothing but view, window, seed, epoch and position."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import trajstore
from tests.support.rare import also_slow, diagonal, examples
from tests.support.recordings import (
    anchors_of,
    assert_same_batch,
    check_batch,
    least_cache_bytes,
    recording_of,
    view_of,
)
from tests.support.reference import Anchor, reference_anchors
from trajstore import Column

# Small caches are the point here.
pytestmark = pytest.mark.filterwarnings("ignore:the view holds")

QUICK = settings(
    deadline=None,
    derandomize=True,
    max_examples=examples(30),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],  # explaining a failure traces every line, for minutes
    suppress_health_check=list(HealthCheck),
)
SCHEMA = [
    Column(path="obs", dtype="uint8", shape=(4, 4), extra=1, page_rows=4),
    Column(path="action", dtype="float32"),
    Column(path="note", dtype="string"),
    Column(path="points", dtype="int16", shape=(2,), ragged=True),
]
LENGTHS = [7, 1, 30, 12, 2, 19, 25, 3]
OPTIONS = {"window": {"obs": [0, 1], "action": range(2), "note": 0, "points": 0, "trajectory": 0, "step": 0}}
ORDERS = ["random", "shuffle", "sequential"]


@pytest.fixture(scope="module")
def recording():
    return recording_of(np.random.default_rng(4), SCHEMA, LENGTHS)


@pytest.fixture(scope="module")
def view(recording):
    """Four segments."""
    with view_of(recording, flush_after=(1, 2, 5)) as view:
        yield view


@pytest.fixture(scope="module")
def anchors(recording) -> list[Anchor]:
    return reference_anchors(recording, **OPTIONS)


def copied(value):
    """A deep copy of a batch that shares no memory with it."""
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(copied(item) for item in value)
    return value.clone() if isinstance(value, torch.Tensor) else value.copy()


def first(view, count, batch_size=16, options=OPTIONS, **knobs):
    """The first batches of a loader, at most ``count``."""
    with view.loader(batch_size, timeout_s=60, **options, **knobs) as loader:
        return list(itertools.islice(loader, count))


def places(batches) -> list[list[Anchor]]:
    return [anchors_of(batch) for batch in batches]


def assert_same_batches(found, expected):
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        assert_same_batch(f, e)


# What a batch depends on


@pytest.mark.parametrize("order", also_slow(ORDERS, ["random", "shuffle"]))
def test_batches_depend_neither_on_cache_nor_on_prefetch(view, recording, order):
    expected = first(view, 30, order=order, seed=3, epochs=4, prefetch=0)
    least = least_cache_bytes(view, 16, **OPTIONS)
    for cache_bytes, prefetch in itertools.product((least, 3 * least, None), (0, 1, 2, 4)):
        found = first(view, 30, order=order, seed=3, epochs=4, cache_bytes=cache_bytes, prefetch=prefetch)
        assert_same_batches(found, expected)
    for batch in expected:
        check_batch(batch, recording, OPTIONS)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_the_batches_of_all_ranks_are_the_global_ones(view, order, world_size, drop_last):
    knobs = {"order": order, "seed": 9, "drop_last": drop_last, "prefetch": 1}
    whole = places(first(view, 12, batch_size=24, **knobs))
    ranks = [
        places(first(view, 12, batch_size=24, rank=rank, world_size=world_size, **knobs)) for rank in range(world_size)
    ]
    assert [len(batches) for batches in ranks] == [len(whole)] * world_size  # they wait for each other at every batch
    assert [[anchor for part in parts for anchor in part] for parts in zip(*ranks, strict=True)] == whole
    for part in (batches[0] for batches in ranks):
        assert len(part) == 24 // world_size


@pytest.mark.parametrize("order", ["random", "shuffle"])
def test_another_seed_gives_other_batches(view, order):
    one, same, other = (places(first(view, 3, order=order, seed=seed)) for seed in (5, 5, 6))
    assert one == same
    assert one != other
    assert len({tuple(batch) for batch in one}) == 3


@pytest.mark.parametrize("order", ORDERS)
def test_the_anchors_do_not_depend_on_the_columns_beside_them(view, order):
    """They are drawn by number: a column that leaves as many anchors changes none of them."""
    names = ["trajectory", "step"]
    plain = first(view, 4, order=order, options={"columns": names})
    more = first(view, 4, order=order, options={"columns": [*names, "obs", "note"]})
    assert places(plain) == places(more)


# Resuming


@given(data=st.data())
@QUICK
def test_a_resumed_run_equals_the_uninterrupted_one(view, data):
    """Whatever the order, the batches consumed, the prefetch depth, the cache, and the world sizes before and after."""
    knobs = {
        "order": data.draw(st.sampled_from(ORDERS)),
        "seed": data.draw(st.integers(0, 100)),
        "epochs": data.draw(st.integers(1, 3)),
        "drop_last": data.draw(st.booleans()),
    }
    batch_size = data.draw(st.sampled_from([4, 12, 60]))
    expected = first(view, 40, batch_size=batch_size, **knobs)
    consumed = data.draw(st.integers(0, len(expected)))
    before, after = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 2, 4]))
    depth = st.sampled_from([0, 1, 4])
    rank = data.draw(st.integers(0, before - 1))
    with view.loader(batch_size, rank=rank, world_size=before, prefetch=data.draw(depth), **OPTIONS, **knobs) as loader:
        assert len(list(itertools.islice(loader, consumed))) == consumed
        state = loader.state_dict()
    ranks = []
    for rank in range(after):
        with view.loader(
            batch_size, rank=rank, world_size=after, prefetch=data.draw(depth), **OPTIONS, **knobs
        ) as loader:
            loader.load_state_dict(state)
            ranks.append(places(itertools.islice(loader, len(expected) - consumed)))
    if consumed < len(expected):
        found = [[anchor for part in parts for anchor in part] for parts in zip(*ranks, strict=True)]
        assert found == places(expected[consumed:])


def test_a_loader_can_go_back_to_a_state(view):
    with view.loader(8, order="shuffle", epochs=2, prefetch=4, **OPTIONS) as loader:
        next(iter(loader))
        state = loader.state_dict()
        once = places(itertools.islice(loader, 10))
        loader.load_state_dict(state)
        assert places(itertools.islice(loader, 10)) == once


def test_a_state_survives_json_or_torch_save(view, tmp_path):
    with view.loader(8, order="shuffle", **OPTIONS) as loader:
        next(iter(loader))
        torch.save(loader.state_dict(), tmp_path / "state.pt")
        expected = places(loader)
    with view.loader(8, order="shuffle", **OPTIONS) as loader:
        loader.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert places(loader) == expected


def test_a_state_of_another_view_or_window_is_refused(view):
    with view.loader(8, window=2) as loader:
        state = loader.state_dict()
    for other, window in ((view.first(6), 2), (view, 3)):
        with other.loader(8, window=window) as loader, pytest.raises(trajstore.SelectionError):
            loader.load_state_dict(state)


# Epochs and passes


@pytest.mark.parametrize("block_bytes", [None, 1, 64, 10**9])
@pytest.mark.parametrize("batch_size", [1, 13, 64])
def test_shuffle_visits_each_anchor_once_per_epoch(view, anchors, batch_size, block_bytes):
    with view.loader(batch_size, order="shuffle", epochs=3, block_bytes=block_bytes, seed=1, **OPTIONS) as loader:
        visited = list(itertools.chain.from_iterable(places(loader)))
    n = len(anchors)
    epochs = [visited[i * n : (i + 1) * n] for i in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [anchors] * 3
    if block_bytes is None:
        assert len({tuple(epoch) for epoch in epochs}) == 3
        assert all(epoch != anchors for epoch in epochs)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("order", ["shuffle", "sequential"])
@pytest.mark.parametrize("batch_size", [1, 10, 23, 1000])
def test_length_epochs_and_drop_last(view, anchors, order, batch_size, drop_last):
    sizes = [min(batch_size, len(anchors) - start) for start in range(0, len(anchors), batch_size)]
    sizes = [size for size in sizes if size == batch_size or not drop_last]
    if not sizes:
        return
    with view.loader(batch_size, order=order, epochs=2, drop_last=drop_last, **OPTIONS) as loader:
        assert len(loader) == 2 * len(sizes)
        batches = places(loader)
        assert len(loader) == 2 * len(sizes)
    assert [len(batch) for batch in batches] == 2 * sizes
    if order == "sequential":
        kept = anchors[: sum(sizes)]
        assert list(itertools.chain.from_iterable(batches)) == 2 * kept


def test_an_endless_order_has_no_length(view):
    with view.loader(4) as loader, pytest.raises(TypeError, match="endless"):
        len(loader)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_next_pass_goes_on_with_the_next_epoch(view, prefetch):
    whole = places(first(view, 10**6, order="shuffle", epochs=4, prefetch=prefetch))
    with view.loader(16, order="shuffle", epochs=2, prefetch=prefetch, **OPTIONS) as loader:
        assert places(loader) + places(loader) == whole


@pytest.mark.parametrize("order", ORDERS)
def test_iterating_again_goes_on_where_the_loader_is(view, order):
    whole = places(first(view, 5, order=order))
    with view.loader(16, order=order, prefetch=3, **OPTIONS) as loader:
        found = places(itertools.islice(loader, 2))
        for batch in loader:
            found.append(anchors_of(batch))
            break
        found += places(itertools.islice(loader, 2))
    assert found == whole


# Distributions

CHANCE = 4.0  # standard deviations: one run in 30,000 fails by chance, and seeds are fixed


def assert_distributed(counts, probabilities):
    """Pearson's chi-square within ``CHANCE`` standard deviations of its mean (Wilson and Hilferty, 1931)."""
    total = sum(counts.values())
    assert set(counts) <= {key for key, p in probabilities.items() if p > 0}
    expected = {key: total * p for key, p in probabilities.items() if p > 0}
    assert min(expected.values()) > 5
    chi2 = sum((counts[key] - e) ** 2 / e for key, e in expected.items())
    freedom = len(expected) - 1
    spread = math.sqrt(2 / (9 * freedom))
    score = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / spread
    assert abs(score) < CHANCE, f"chi2={chi2:.1f} with {freedom} degrees of freedom"


LOCATED = {"columns": ["trajectory", "step"]}


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 2, "dilation": 3, "pad": "edge"}])
def test_random_is_uniform_over_anchors(view, recording, options):
    wanted = reference_anchors(recording, **options, **LOCATED)
    with view.loader(512, seed=2, **options, **LOCATED) as loader:
        counts = collections.Counter(a for batch in itertools.islice(loader, 20) for a in anchors_of(batch))
    assert_distributed(counts, dict.fromkeys(wanted, 1 / len(wanted)))


def test_the_first_place_of_a_shuffle_is_uniform(view, anchors):
    counts = collections.Counter()
    for seed in range(500):
        [batch] = first(view, 1, batch_size=1, order="shuffle", seed=seed, prefetch=0)
        counts[anchors_of(batch)[0][0]] += 1
    shares = collections.Counter(position for position, _ in anchors)
    most = {p: n / len(anchors) for p, n in shares.items() if n > 1}
    rare = 1 - sum(most.values())
    seen = {p: counts[p] for p in most} | {None: sum(n for p, n in counts.items() if p not in most)}
    assert_distributed(collections.Counter(seen), most | {None: rare})


@pytest.mark.parametrize("weights", ["array", "number", "length"])
def test_a_trajectory_is_drawn_by_its_weight_then_one_of_its_anchors(weights):
    numbers = [3, 0, 1, 2]
    schema = [Column(path="x", dtype="float32")]
    recording = recording_of(np.random.default_rng(0), schema, [5, 4, 1, 3])
    for recorded, number in zip(recording.trajectories, numbers, strict=True):
        recorded.metadata["number"] = number
    given_weights = np.array(numbers, np.float32) if weights == "array" else weights
    of = [t.length for t in recording.trajectories] if weights == "length" else numbers
    options = {"window": 2, **LOCATED}
    anchors = reference_anchors(recording, **options)
    per_trajectory = collections.Counter(position for position, _ in anchors)
    total = sum(of[p] for p in per_trajectory)  # one without anchors cannot be drawn
    wanted = {(p, s): of[p] / total / per_trajectory[p] for p, s in anchors}
    with view_of(recording, flush_after=(1,)) as view, view.loader(512, weights=given_weights, **options) as loader:
        counts = collections.Counter(a for batch in itertools.islice(loader, 20) for a in anchors_of(batch))
    assert_distributed(counts, wanted)


# Batches that are held


@pytest.mark.parametrize(("prefetch", "order"), diagonal([0, 1, 4], ["shuffle", "random"]))
def test_batches_that_are_held_are_never_overwritten(view, recording, order, prefetch):
    least = least_cache_bytes(view, 8, **OPTIONS)
    held, copies = [], []
    with view.loader(8, order=order, epochs=6, prefetch=prefetch, cache_bytes=least, **OPTIONS) as loader:
        for batch in itertools.islice(loader, 60):
            held.append(batch)
            copies.append(copied(batch))
    assert_same_batches(held, copies)
    for batch in held:
        check_batch(batch, recording, OPTIONS)


@pytest.mark.parametrize("hold", ["row", "view", "numpy", "detached", "buffer", "dlpack"])
def test_a_part_of_a_batch_keeps_its_memory(view, hold):
    """A slice, an array or a buffer made from a tensor holds the batch as the tensor itself does."""
    parts = {
        "row": lambda x: x[3],
        "view": lambda x: x.reshape(-1).view(torch.int8),
        "numpy": lambda x: x.numpy(),
        "detached": lambda x: x.detach()[1:].numpy()[:, 0],
        "buffer": lambda x: memoryview(x.numpy()),
        "dlpack": lambda x: np.from_dlpack(x),
    }
    held, copies = [], []
    with view.loader(8, prefetch=2, **OPTIONS) as loader:
        for batch in itertools.islice(loader, 40):
            part = parts[hold](batch["obs"])
            held.append(part)
            copies.append(np.asarray(part).copy())
            del batch, part
    for part, copy in zip(held, copies, strict=True):
        assert np.array_equal(np.asarray(part), copy)
