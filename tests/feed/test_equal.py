"""Every batch equals the plain reference bit for bit, whatever the columns, the options and the cache."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import trajstore
from tests.support.kinds import every_kind, trajectory_of
from tests.support.rare import diagonal, examples
from tests.support.recordings import (
    METADATA,
    PADS,
    assert_same_batch,
    check_batch,
    least_cache_bytes,
    metadata,
    recording_of,
    recordings,
    taken,
    view_of,
    windows,
)
from tests.support.reference import VIRTUAL, Recorded, Recording, reference_anchors, reference_batch
from trajstore import Column, Schema

# Small caches are the point here.
pytestmark = pytest.mark.filterwarnings("ignore:the view holds")

QUICK = settings(
    deadline=None,
    derandomize=True,
    max_examples=examples(60),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],  # explaining a failure traces every line, for minutes
    suppress_health_check=list(HealthCheck),
)
DEEP = settings(QUICK, derandomize=False, max_examples=2000)
BIG_CACHE = 64 * 1024 * 1024


def check_any_view(data):
    """Draw a store, a view of it and options of a loader; hold each batch against the reference."""
    recording = data.draw(recordings())
    count = len(recording.trajectories)
    flush_after = data.draw(st.lists(st.integers(0, count - 1)))
    segment_bytes = data.draw(st.sampled_from([1, 3000, 2**28]))
    committed = data.draw(st.booleans())
    with view_of(recording, flush_after=flush_after, committed=committed, segment_bytes=segment_bytes) as view:
        if data.draw(st.booleans()):
            positions = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=8))
            view, recording = view.take(positions), taken(recording, positions)
        order = data.draw(st.sampled_from(["sequential", "shuffle", "random"]))
        check_loader(data, view, recording, data.draw(windows(recording, located=order != "sequential")), order)


def check_loader(data, view, recording, options, order):
    anchors = reference_anchors(recording, **options)
    batch_size = data.draw(st.integers(1, 64))
    if not anchors:
        with pytest.raises(trajstore.SelectionError):
            view.loader(batch_size, order=order, **options)
        return
    cache = data.draw(st.sampled_from(["shared", "least", "big"]))
    least = least_cache_bytes(view, batch_size, order=order, **options) if cache == "least" else None
    cache_bytes = {"shared": None, "least": least, "big": BIG_CACHE}[cache]
    knobs = {"cache_bytes": cache_bytes, "prefetch": data.draw(st.sampled_from([0, 1, 4])), "timeout_s": 60}
    knobs["seed"] = data.draw(st.integers(0, 2**64 - 1))
    with view.loader(batch_size, order=order, **options, **knobs) as loader:
        if order == "random":
            for batch in itertools.islice(loader, 4):
                seen = check_batch(batch, recording, options)
                assert len(seen) == batch_size
                assert set(seen) <= set(anchors)
        elif order == "shuffle":
            seen = [anchor for batch in loader for anchor in check_batch(batch, recording, options)]
            assert sorted(seen) == anchors
        else:
            batches = list(loader)
            assert len(batches) == -(-len(anchors) // batch_size)
            for number, batch in enumerate(batches):
                chosen = anchors[number * batch_size : (number + 1) * batch_size]
                assert_same_batch(batch, reference_batch(recording, chosen, **options))


@given(data=st.data())
@QUICK
def test_batches_equal_the_reference(data):
    check_any_view(data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(data=st.data())
@DEEP
def test_batches_equal_the_reference_deep(data):
    check_any_view(data)


@pytest.fixture(scope="module")
def kinds():
    """A column of every dtype, scalar, tensor and ragged, with and without a final row; three segments, one uncommitted."""
    schema = every_kind()
    rng = np.random.default_rng(11)
    made = [Recorded(trajectory_of(schema, rng, n), n, n % 2 == 0, n % 3 == 0, metadata(rng)) for n in (5, 1, 9, 2, 6)]
    recording = Recording(Schema(tuple(schema), METADATA), made)
    with view_of(recording, flush_after=(1, 3), committed=False) as view:
        yield recording, view


@pytest.mark.parametrize(("pad", "window"), diagonal(PADS, [3, [-2, 0, 1], None]))
def test_every_kind_of_column(kinds, window, pad):
    recording, view = kinds
    names = ["steps", "states", *VIRTUAL, *METADATA]
    if isinstance(window, list):
        options = {"window": dict.fromkeys(names, window), "pad": pad}
    else:
        options = {"window": window, "columns": names, "pad": pad}
    anchors = reference_anchors(recording, **options)
    least = least_cache_bytes(view, 8, order="sequential", **options)
    for cache_bytes in (least, None):
        with view.loader(8, order="sequential", cache_bytes=cache_bytes, timeout_s=60, **options) as loader:
            for number, batch in enumerate(loader):
                expected = reference_batch(recording, anchors[8 * number : 8 * number + 8], **options)
                assert_same_batch(batch, expected)
        assert number == (len(anchors) - 1) // 8


def test_by_default_all_fixed_shape_columns_that_every_trajectory_has(kinds):
    recording, view = kinds
    batch = next(iter(view.loader(4, order="sequential")))
    assert_same_batch(batch, reference_batch(recording, [(0, 0), (0, 1), (0, 2), (0, 3)]))


@pytest.mark.timeout(30)
def test_the_default_cache_takes_columns_of_one_byte():
    """It has room for a thousand million of their rows; what it costs to set up does not grow with that."""
    schema = [Column(path="pixel", dtype="uint8", shape=(1,), page_rows=1), Column(path="flag", dtype="bool")]
    recording = recording_of(np.random.default_rng(5), schema, [3, 2])
    with view_of(recording, cache_bytes=None) as view, view.loader(5, order="sequential") as loader:
        [batch] = loader
    assert_same_batch(batch, reference_batch(recording, reference_anchors(recording)))


@pytest.mark.parametrize(("window", "batch_size"), diagonal([1, 2, 4], [1, 64, 7]))
def test_the_least_cache_that_the_error_names_is_enough_and_one_byte_less_is_not(window, batch_size):
    schema = [
        Column(path="image", dtype="uint8", shape=(8, 8), extra=1, page_rows=2),
        Column(path="reward", dtype="int64"),
    ]
    recording = recording_of(np.random.default_rng(2), schema, [9, 3, 14, 30])
    options = {"window": window, "columns": ["image", "reward", "trajectory", "step"]}
    with view_of(recording, flush_after=(0, 2)) as view:
        least = least_cache_bytes(view, batch_size, **options)
        with pytest.raises(trajstore.CacheTooSmallError, match=f"cache_bytes={least - 1} .*cache_bytes >= {least}"):
            view.loader(batch_size, cache_bytes=least - 1, **options)
        with view.loader(batch_size, cache_bytes=least, timeout_s=60, **options) as loader:
            for batch in itertools.islice(loader, 5):
                check_batch(batch, recording, options)


REWARDS = ["float32", "float64", "float16", "bfloat16", "int64", "uint8"]


def check_any_n_step(data):
    """Draw observations with and without a final row, rewards of any dtype, and n; hold each batch against the reference."""
    extra = st.integers(0, 1)
    reward = data.draw(st.sampled_from(REWARDS))
    schema = [
        Column(path="obs/image", dtype="uint8", shape=(2, 2), extra=data.draw(extra), page_rows=2),
        Column(path="obs/speed", dtype="float32", extra=data.draw(extra)),
        Column(path="hidden", dtype="float64", shape=(3,), extra=1),
        Column(path="action", dtype="int32", shape=(2,)),
        Column(path="reward", dtype=reward),
    ]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    recording = recording_of(rng, schema, lengths)
    for recorded in recording.trajectories:
        whole = reward.endswith(("int64", "int8"))
        rewards = torch.from_numpy(
            rng.integers(0, 9, recorded.length) if whole else rng.uniform(-1, 1, recorded.length)
        )
        rewards = rewards.to(getattr(torch, reward))
        recorded.columns["reward"] = rewards if reward == "bfloat16" else rewards.numpy()
    options = {"n_step": data.draw(st.integers(1, 6)), "gamma": data.draw(st.sampled_from([0.0, 0.5, 0.99, 1.0]))}
    located = {"reward": 0, "action": 0, "trajectory": 0, "step": 0}
    if data.draw(st.booleans()):
        options["columns"] = ["obs", "hidden", *located]
    else:
        offsets = st.sampled_from([0, [0], [-1, 0], [-3, -1], range(-2, 1)])
        options["window"] = {"obs": data.draw(offsets), "hidden": data.draw(offsets), **located}
        options["pad"] = data.draw(st.sampled_from(["none", "edge"]))
    with view_of(recording, flush_after=data.draw(st.lists(st.integers(0, 4)))) as view:
        anchors = reference_anchors(recording, **options)
        if not anchors:
            with pytest.raises(trajstore.SelectionError):
                view.loader(4, **options)
            return
        with view.loader(data.draw(st.integers(1, 32)), order="sequential", **options) as loader:
            assert [a for batch in loader for a in check_batch(batch, recording, options)] == anchors


@given(data=st.data())
@settings(QUICK, max_examples=examples(40))
def test_n_step_equals_the_reference(data):
    check_any_n_step(data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(data=st.data())
@DEEP
def test_n_step_equals_the_reference_deep(data):
    check_any_n_step(data)


def test_infinite_rewards_stay_within_their_trajectory_and_their_n_steps():
    inf, nan = float("inf"), float("nan")
    schema = Schema((Column(path="reward", dtype="float32"),))
    rewards = [[1.0, 2.0, 3.0], [inf, 1.0, nan, 2.0, 4.0], [-inf]]
    made = [Recorded({"reward": np.array(r, np.float32)}, len(r), True) for r in rewards]
    options = {"n_step": 2, "gamma": 0.5, "columns": ["reward", "trajectory", "step"]}
    with view_of(Recording(schema, made)) as view, view.loader(64, order="sequential", **options) as loader:
        [batch] = loader
    expected = [2.0, 3.5, 3.0, inf, nan, nan, 4.0, 4.0, -inf]
    torch.testing.assert_close(batch["reward"], torch.tensor(expected), equal_nan=True)
