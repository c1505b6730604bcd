"""Mixtures: how a batch is divided, and that each part is what its view alone would give."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trajstore
from tests.support.rare import examples
from tests.support.recordings import anchors_of, append, assert_same_batch, check_batch, recording_of, view_of
from trajstore import Column

COLUMNS = [
    Column(path="obs/image", dtype="uint8", shape=(4, 4), extra=1, page_rows=4),
    Column(path="obs/state", dtype="float32", shape=(3,), extra=1),
    Column(path="action", dtype="float32"),
    Column(path="reward", dtype="float64"),
    Column(path="note", dtype="string"),
    Column(path="points", dtype="int16", shape=(2,), ragged=True),
    Column(path="words", dtype="string", ragged=True),
]
# The same values, laid out and declared differently: another order, other pages, no final observation.
OTHERS = [
    Column(path="words", dtype="string", ragged=True),
    Column(path="reward", dtype="float64"),
    Column(path="points", dtype="int16", shape=(2,), ragged=True),
    Column(path="obs/state", dtype="float32", shape=(3,)),
    Column(path="obs/image", dtype="uint8", shape=(4, 4), page_rows=16),
    Column(path="action", dtype="float32"),
    Column(path="note", dtype="string"),
]
PLACE = ["source", "trajectory", "step"]
NAMES = ["obs", "action", "note", "points", "words", "terminated", "flagged", "task_name", *PLACE]
WINDOWS = {
    "steps": {"columns": NAMES},
    "window": {"columns": NAMES, "window": 3, "pad": "edge"},
    "zero": {"columns": NAMES, "window": 4, "dilation": 2, "pad": "zero"},
    "mapping": {
        "window": {"obs/image": [-1, 0], "note": range(2), "points": 1, "words": [0, 1], **dict.fromkeys(PLACE, 0)}
    },
    "returns": {"columns": ["obs", "action", "reward", *PLACE], "n_step": 3, "gamma": 0.9},
    "future": {"window": {"action": 0, "goal": trajstore.future("obs/state", 0.9), **dict.fromkeys(PLACE, 0)}},
}


@pytest.fixture(scope="module")
def recordings():
    rng = np.random.default_rng(11)
    return [
        recording_of(rng, COLUMNS, [7, 2, 30, 12, 9, 25]),
        recording_of(rng, OTHERS, [5, 40, 8]),
        recording_of(rng, COLUMNS, [11, 3, 6, 4]),
    ]


@pytest.fixture(scope="module")
def views(recordings):
    """Three stores, of several segments."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(view_of(recording, flush_after=(1,))) for recording in recordings]


def rows(value, start, stop):
    """Windows ``[start, stop)`` of a batch; ragged columns have as many lists per window as the rest has rows."""
    if isinstance(value, Mapping):
        return {name: rows(item, start, stop) for name, item in value.items()}
    if not isinstance(value, tuple):
        return value[start:stop]
    raise AssertionError("ragged columns are cut by cut()")


def cut(batch, sizes):
    """A batch of a mix as one batch per view."""
    parts, before = [], 0
    total = sum(sizes)
    for size in sizes:
        part = {}
        for name, value in batch.items():
            if not isinstance(value, tuple):
                part[name] = rows(value, before, before + size)
                continue
            values, offsets = value
            per_window = (len(offsets) - 1) // total
            mine = offsets[before * per_window : (before + size) * per_window + 1]
            part[name] = values[int(mine[0]) : int(mine[-1])], mine - mine[0]
        parts.append(part)
        before += size
    return parts


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("window", WINDOWS)
def test_each_part_holds_windows_of_its_view(views, recordings, window, prefetch):
    options = WINDOWS[window]
    mixture = trajstore.mix(dict(zip(views, (0.5, 0.2, 0.3), strict=True)))
    sizes = mixture.sizes(20)
    assert sizes == (10, 4, 6)
    seen = set()
    with mixture.loader(20, seed=4, prefetch=prefetch, **options) as loader:
        for batch in itertools.islice(loader, 15):
            for number, part in enumerate(cut(batch, sizes)):
                assert part.pop("source").unique().tolist() == [number]
                chosen = {k: v for k, v in options.items() if k != "columns"}
                if "columns" in options:
                    chosen["columns"] = [n for n in options["columns"] if n != "source"]
                else:
                    chosen["window"] = {n: o for n, o in options["window"].items() if n not in ("source", "goal")}
                if "goal" in part:
                    goal = part.pop("goal")
                    for (trajectory, step), found in zip(anchors_of(part), goal, strict=True):
                        later = recordings[number].trajectories[trajectory].columns["obs/state"][step:]
                        assert any(found.numpy().tobytes() == row.tobytes() for row in later)
                if isinstance(part.get("is_pad"), dict):
                    part["is_pad"].pop("source", None)
                seen |= {(number, *anchor) for anchor in check_batch(part, recordings[number], chosen)}
    assert len(seen) > 100


def test_the_first_part_is_what_its_view_alone_gives_whatever_it_is_mixed_with(views):
    knobs = {"columns": ["obs", "note", "points", *PLACE[1:]], "window": 3, "pad": "zero", "seed": 5}
    with views[0].loader(8, **knobs) as alone:
        expected = list(itertools.islice(alone, 10))
    for others in ({views[1]: 1}, {views[2]: 1, views[1]: 1}):
        mixture = trajstore.mix({views[0]: len(others), **others})
        assert mixture.sizes(16)[0] == 8
        with mixture.loader(16, **knobs) as loader:
            for batch, wanted in zip(loader, expected, strict=False):
                assert_same_batch(cut(batch, mixture.sizes(16))[0], wanted)


def test_views_of_one_store_are_drawn_independently(views):
    mixture = trajstore.mix({views[0][:]: 1, views[0][:]: 1})
    with mixture.loader(512, columns=["step", "trajectory"], seed=0) as loader:
        one, two = cut(next(iter(loader)), (256, 256))
    assert anchors_of(one) != anchors_of(two)


# How a batch is divided


@given(
    st.lists(st.floats(1e-6, 1e6) | st.integers(1, 9), min_size=2, max_size=6),
    st.integers(2, 600),
)
@settings(deadline=None, derandomize=True, max_examples=examples(300))
def test_sizes_are_the_shares_by_largest_remainder(shares, batch_size):
    stores = [view_of_nothing() for _ in shares]
    mixture = trajstore.mix(dict(zip(stores, shares, strict=True)))
    if batch_size < len(shares):
        with pytest.raises(trajstore.SelectionError, match="at least one window of each"):
            mixture.sizes(batch_size)
        return
    sizes = mixture.sizes(batch_size)
    assert sum(sizes) == batch_size
    assert min(sizes) >= 1
    quotas = [batch_size * share / sum(shares) for share in shares]
    if min(quotas) >= 1:
        assert all(abs(size - quota) < 1 + 1e-6 for size, quota in zip(sizes, quotas, strict=True))
        assert sizes == largest_remainder(quotas, batch_size) or near_tie(quotas)
    for (a, size_a), (b, size_b) in itertools.permutations(zip(shares, sizes, strict=True), 2):
        assert size_a >= size_b or a <= b  # who asks for more does not get less


def largest_remainder(quotas, total):
    sizes = [int(quota) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda i: (int(quotas[i]) - quotas[i], i))
    for number in order[: total - sum(sizes)]:
        sizes[number] += 1
    return tuple(sizes)


def near_tie(quotas):
    """Whether rounding may decide."""
    remainders = sorted(quota % 1 for quota in quotas)
    remainders = [0.0, *remainders, 1.0]
    return any(b - a < 1e-9 for a, b in itertools.pairwise(remainders))


def view_of_nothing():
    view = object.__new__(trajstore.View)
    view.__dict__["_rows"] = np.empty(0, np.int64)
    return view


@pytest.mark.parametrize(
    ("shares", "batch_size", "sizes"),
    [
        ((0.5, 0.5), 256, (128, 128)),
        ((1, 1), 3, (2, 1)),
        ((1, 1, 1), 256, (86, 85, 85)),
        ((0.1, 0.2, 0.7), 10, (1, 2, 7)),
        ((3, 1), 2, (1, 1)),
        ((0.999, 0.001), 64, (63, 1)),
        ((1e-9, 1, 1e-9), 5, (1, 3, 1)),
    ],
)
def test_sizes(shares, batch_size, sizes):
    assert trajstore.mix({view_of_nothing(): share for share in shares}).sizes(batch_size) == sizes


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_parts_of_all_ranks_are_the_global_batch(views, world_size):
    mixture = trajstore.mix({views[0]: 2, views[1]: 1})
    options = {"window": WINDOWS["future"]["window"], "seed": 8}
    with mixture.loader(24, **options) as loader:
        whole = [cut(batch, (16, 8)) for batch in itertools.islice(loader, 5)]
    for rank in range(world_size):
        with mixture.loader(24, rank=rank, world_size=world_size, **options) as loader:
            for batch, parts in zip(loader, whole, strict=False):
                found = cut(batch, (16 // world_size, 8 // world_size))
                for mine, part in zip(found, parts, strict=True):
                    size = len(part["step"]) // world_size
                    assert_same_batch(mine, rows(part, rank * size, (rank + 1) * size))


# Columns


def test_by_default_the_columns_that_all_views_have_alike(views):
    changed = [
        Column(path="obs/state", dtype="float64", shape=(3,), extra=1),
        Column(path="obs/image", dtype="uint8", shape=(4, 4), extra=1),
        Column(path="action", dtype="float32", shape=(1,)),
        Column(path="reward", dtype="float64"),
        Column(path="bonus", dtype="float64"),
    ]
    with view_of(recording_of(np.random.default_rng(0), changed, [5, 6])) as other:
        with trajstore.mix({views[0]: 1, other: 1}).loader(4) as loader:
            batch = next(iter(loader))
        assert {name: sorted(v) if isinstance(v, dict) else v.dtype for name, v in batch.items()} == {
            "obs": ["image"],
            "reward": torch.float64,
        }
        for columns, message in (
            (["obs"], "'obs/state' is float32.3. in view 0 of the mix and float64.3. in view 1"),
            (["action"], "'action' is float32 in view 0 of the mix and float32.1. in view 1"),
        ):
            with pytest.raises(trajstore.SelectionError, match=message):
                trajstore.mix({views[0]: 1, other: 1}).loader(4, columns=columns)
        with pytest.raises(trajstore.UnknownColumnError, match="no column 'bonus'"):
            trajstore.mix({views[0]: 1, other: 1}).loader(4, columns=["bonus"])


def test_columns_under_a_name_must_agree_and_so_must_fields(views):
    def made(name, **metadata):
        store = trajstore.open(f"memory://mix/{name}", "a")
        store.append({"obs": {"state": np.zeros((6, 3), np.float32)}, "other": np.zeros(5)}, **metadata)
        store.flush()
        return store

    with made("fewer", flagged=3) as fewer, made("alone", task=1) as alone:
        mixture = trajstore.mix({views[0]: 1, fewer.trajectories: 1})
        with pytest.raises(trajstore.SelectionError, match="view 0 of the mix gives 'obs/image' and view 1 does not"):
            mixture.loader(4, columns=["obs"])
        with pytest.raises(
            trajstore.SelectionError,
            match="'flagged' is a metadata field of bool in view 0 of the mix and a metadata field",
        ):
            mixture.loader(4, columns=["flagged"])
        with trajstore.open("memory://mix/none", "a") as none:
            none.append({"unlike": np.zeros(4)})
            none.flush()
            with pytest.raises(trajstore.SelectionError, match="no column of fixed size in common"):
                trajstore.mix({none.trajectories: 1, alone.trajectories: 1}).loader(4)


# Arguments


@pytest.mark.parametrize("share", [0, -1.0, float("nan"), float("inf"), "half", None])
def test_shares_are_positive(views, share):
    with pytest.raises(trajstore.SelectionError, match="share of view 1 of the mix is"):
        trajstore.mix({views[0]: 0.5, views[1]: share})


def test_what_a_mix_does_not_take(views):
    mixture = trajstore.mix({views[0]: 0.75, views[1]: 0.25})
    for found, arguments in {
        "a mix of 1 view,": {views[0]: 1},
        "a mix of 0 views,": {},
        "a mix of str,": {"demonstrations": 0.5, views[0]: 0.5},
    }.items():
        with pytest.raises(trajstore.SelectionError, match=found):
            trajstore.mix(arguments)
    for order in ("shuffle", "sequential", "prioritized"):
        with pytest.raises(trajstore.SelectionError, match=f"order='{order}' in a mix, expected 'random'"):
            mixture.loader(8, order=order)
    with pytest.raises(trajstore.SelectionError, match="order='any'"):
        mixture.loader(8, order="any")
    with pytest.raises(trajstore.SelectionError, match="weights= is an array"):
        mixture.loader(8, weights=np.ones(6))
    with pytest.raises(trajstore.SelectionError, match="anchors= is an array"):
        mixture.loader(8, anchors=np.ones(85, bool))
    with pytest.raises(trajstore.SelectionError, match="at least one window of each"):
        mixture.loader(1)
    with pytest.raises(trajstore.SelectionError, match=r"world_size=2 must divide .* are 9, 3"):
        mixture.loader(12, world_size=2)
    with pytest.raises(trajstore.SelectionError, match="world_size=5 must divide it"):
        mixture.loader(8, world_size=5)


def test_weights_by_the_name_of_a_field_hold_in_every_view(views):
    with trajstore.mix({views[0]: 1, views[1]: 1}).loader(4000, weights="length", columns=["trajectory"]) as loader:
        parts = cut(next(iter(loader)), (2000, 2000))
    for view, part in zip(views, parts, strict=False):
        shares = np.bincount(part["trajectory"], minlength=len(view)) / 2000
        np.testing.assert_allclose(shares, view.lengths / view.num_steps, atol=0.06)


# The life of a mix


def test_resumed_and_pickled_loaders_go_on_bit_for_bit(views):
    mixture = trajstore.mix({views[0]: 0.5, views[1]: 0.5})
    knobs = {"window": {**WINDOWS["future"]["window"], "note": 0, "points": range(2)}, "seed": 3}
    with mixture.loader(12, **knobs) as loader:
        whole = list(itertools.islice(loader, 12))
    with mixture.loader(12, **knobs) as loader:
        list(itertools.islice(loader, 5))
        state = loader.state_dict()
    with mixture.loader(12, prefetch=0, **knobs) as loader:
        loader.load_state_dict(state)
        for found, expected in zip(loader, whole[5:], strict=False):
            assert_same_batch(found, expected)
    for shares, difference in (
        ({views[0]: 0.25, views[1]: 0.75}, "another order"),
        ({views[0]: 0.5, views[2]: 0.5}, "another view"),
    ):
        other = trajstore.mix(shares).loader(12, **knobs)
        with other, pytest.raises(trajstore.SelectionError, match=difference):
            other.load_state_dict(state)


def test_a_mix_travels_to_other_processes(tmp_path):
    """Stores in memory do not: two on disk, of which only index arrays are pickled."""
    for name in ("one", "two"):
        with trajstore.open(str(tmp_path / name), "a") as store:
            for number in range(30):
                store.append({"action": np.arange(number + 1) + 100 * (name == "two")}, even=number % 2 == 0)
    with trajstore.open(str(tmp_path / "one")) as one, trajstore.open(str(tmp_path / "two")) as two:
        mixture = trajstore.mix({one.trajectories.filter("even"): 1, two.trajectories.last(5): 1})
        copied = pickle.loads(pickle.dumps(mixture))
        assert [len(view) for view in copied.views] == [15, 5]
        with mixture.loader(16, window=2, seed=1) as loader:
            list(itertools.islice(loader, 3))
            again = pickle.loads(pickle.dumps(loader))
            with again, copied.loader(16, window=2, seed=1) as third:
                list(itertools.islice(third, 3))
                for a, b, c in itertools.islice(zip(loader, again, third, strict=False), 10):
                    assert_same_batch(b, a)
                    assert_same_batch(c, a)


def test_sample(views, recordings):
    mixture = trajstore.mix({views[0]: 0.5, views[1]: 0.5})
    options = {"columns": ["obs", "note", "trajectory", "step"], "window": 3}
    for part, recording in zip(cut(mixture.sample(10, **options), (5, 5)), recordings, strict=False):
        check_batch(part, recording, options)
    assert_same_batch(mixture.sample(10, seed=1, **options), mixture.sample(10, seed=1, **options))
    one, two = (anchors_of(mixture.sample(64, **options)) for _ in range(2))
    assert one != two
    assert mixture.sample(6, columns=["source"])["source"].tolist() == [0, 0, 0, 1, 1, 1]


def test_its_loader_is_closed_with_any_of_its_stores(recordings):
    with view_of(recordings[0]) as kept:
        with view_of(recordings[2]) as view:
            loader = trajstore.mix({kept: 1, view: 1}).loader(8)
            next(iter(loader))
        with pytest.raises(trajstore.ClosedError):
            next(loader)


@pytest.mark.parametrize("commit", [False, True])
def test_one_view_grows_while_another_stays(recordings, commit):
    """As in RLPD: half demonstrations, half what the agent has recorded so far."""
    demonstrations, recording = recordings[0], recordings[2]
    options = {"columns": ["obs", "note", "source", "trajectory", "step"], "window": 2}
    chosen = {"columns": ["obs", "note", "trajectory", "step"], "window": 2}
    url = f"memory://mix/growing-{commit}"
    with (
        view_of(demonstrations) as fixed,
        trajstore.open(url, "a", schema=recording.schema) as store,
    ):
        append(store, recording.trajectories[0])
        mixture = trajstore.mix({fixed: 1, store.trajectories: 1})
        with mixture.loader(32, follow=True, refresh_s=1e-3, prefetch=0, **options) as loader:
            for count in range(1, 5):
                seen = set()
                for batch in itertools.islice(loader, 8):
                    first, second = cut(batch, (16, 16))
                    assert (first.pop("source").unique().tolist(), second.pop("source").unique().tolist()) == ([0], [1])
                    check_batch(first, demonstrations, chosen)
                    seen |= {trajectory for trajectory, _ in check_batch(second, recording, chosen)}
                assert seen == set(range(count))
                if count < 4:
                    append(store, recording.trajectories[count])
                    if commit:
                        store.flush()


def test_a_view_that_cannot_be_followed_is_named(views):
    with pytest.raises(trajstore.SelectionError, match="follow=True needs a view that says what comes next"):
        trajstore.mix({views[0]: 1, views[1].take([0, 1]): 1}).loader(8, follow=True)


def test_statistics_cover_the_caches_of_all_stores(views):
    with trajstore.mix({views[0]: 1, views[1]: 1}).loader(8, cache_bytes=1 << 20, columns=["obs", "action"]) as loader:
        next(iter(loader))
        cache = loader.stats().cache
    with views[0].loader(8, cache_bytes=1 << 20, columns=["obs", "action"]) as alone:
        assert cache.capacity_bytes > alone.stats().cache.capacity_bytes
    assert cache.misses > 0
    assert repr(trajstore.mix({views[0]: 1, views[1]: 3})).endswith("version=2): 0.75})")


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, True])
def test_a_program_may_end_without_closing_its_loader(mixed):
    """While the thread behind it is making batches."""
    code = (
        "import numpy as np, trajstore\n"
        "store = trajstore.open('memory://mix', 'a')\n"
        "for _ in range(20): store.append({'obs': np.zeros((201, 17), np.float32), 'action': np.zeros((200, 6))})\n"
        "store.flush()\n"
        "view = store.trajectories\n"
        f"source = trajstore.mix({{view.first(10): 1, view.last(10): 1}}) if {mixed} else view\n"
        "loader = source.loader(256, prefetch=1000)\n"
        "next(iter(loader))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
