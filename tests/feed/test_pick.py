"""``View.gather``: steps that the caller names, against what indexing one trajectory at a time gives."""

from __future__ import annotations

import gc
import itertools
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trajstore
from tests.support.kinds import every_kind, trajectory_of
from tests.support.rare import examples
from tests.support.recordings import append, assert_same_batch, recording_of, recordings, view_of, windows
from tests.support.reference import Recording, reference_batch
from tests.support.strategies import bits
from trajstore import Column
from trajstore.errors import CacheTooSmallError, ClosedError, IndexRangeError, SelectionError, UnknownColumnError
from trajstore.names import nest

RELAXED = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SCHEMA = [
    Column(path="obs/image", dtype="uint8", shape=(3, 2), extra=1, page_rows=4),
    Column(path="obs/state", dtype="float32", extra=1),
    Column(path="action", dtype="int64"),
    Column(path="note", dtype="string"),
]
LENGTHS = [5, 1, 9, 33, 2]


@pytest.fixture(scope="module")
def recording():
    return recording_of(np.random.default_rng(0), SCHEMA, LENGTHS)


@pytest.fixture
def view(recording):
    with view_of(recording, flush_after=(1,), committed=False) as view:
        yield view


@given(recording=recordings(), data=st.data())
@settings(RELAXED, max_examples=examples(60))
def test_any_columns_of_any_steps_in_any_order_equal_the_reference(recording, data):
    options = data.draw(windows(recording).filter(lambda o: "columns" in o and "window" not in o))
    names = options["columns"]
    after = max((1 - c.extra for c in recording.schema for n in names if n == f"next_{c.path}"), default=0)
    places = [(t, s) for t, r in enumerate(recording.trajectories) for s in range(r.length - after)]
    flush_after = data.draw(st.lists(st.integers(0, 5), max_size=2))
    with view_of(recording, flush_after=flush_after, committed=data.draw(st.booleans())) as view:
        if not places:
            return
        chosen = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=20))
        found = view.gather([t for t, _ in chosen], [s for _, s in chosen], columns=names)
        assert_same_batch(found, reference_batch(recording, chosen, columns=names))


def test_every_kind_of_column_equals_indexing():
    schema = every_kind()
    rng = np.random.default_rng(1)
    lengths = [4, 7, 1]
    trees = [trajectory_of(schema, rng, n) for n in lengths]
    url = f"memory://pick/{uuid.uuid4().hex}"
    with trajstore.open(url, "a", schema=schema) as store:
        for number, tree in enumerate(trees):
            store.append(nest(tree), flagged=bool(number % 2), name=f"é{number}")
            if number == 1:
                store.flush()
        view = store.trajectories
        places = [(t, s) for t, n in enumerate(lengths) for s in range(n)]
        places = [places[i] for i in rng.permutation(len(places))] + places[:3]
        batch = view.gather(*zip(*places, strict=True), columns=[c.path for c in schema])
        for column in schema:
            value = batch
            for part in column.path.split("/"):
                value = value[part]
            if column.ragged:
                rows, offsets = value
                assert offsets.tolist()[0] == 0
                found = [rows[a:b] for a, b in itertools.pairwise(offsets.tolist())]
            else:
                found = list(value)
            for one, (t, s) in zip(found, places, strict=True):
                expected = view[t][column.path][s]
                assert _plain(one) == _plain(expected), (column.path, t, s)
        fields = view.gather(*zip(*places, strict=True), columns=["flagged", "name", "step", "trajectory", "is_last"])
        assert fields["flagged"].tolist() == [bool(t % 2) for t, _ in places]
        assert fields["name"].tolist() == [f"é{t}" for t, _ in places]
        assert list(zip(fields["trajectory"].tolist(), fields["step"].tolist(), strict=True)) == places
        assert fields["is_last"].tolist() == [s == lengths[t] - 1 for t, s in places]


def _plain(value):
    """Bits of a value, whatever holds it."""
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            value = value.contiguous().view(torch.int16)
        value = value.numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return np.ascontiguousarray(value).tobytes()
    if isinstance(value, np.generic):
        return value.tobytes()
    return bits(list(value)) if isinstance(value, list | np.ndarray) else value


def test_by_default_all_columns_of_fixed_shape(view, recording):
    batch = view.gather([0, 3], [1, 2])
    assert_same_batch(batch, reference_batch(recording, [(0, 1), (3, 2)]))
    assert sorted(batch) == ["action", "obs"]


def test_the_step_after_and_where_it_is_missing(view, recording):
    last = [(t, n - 1) for t, n in enumerate(LENGTHS)]
    names = ["next_obs/image", "obs/state"]
    batch = view.gather(*zip(*last, strict=True), columns=names)
    assert_same_batch(batch, reference_batch(recording, last, columns=names))
    ok = view.gather([0], [LENGTHS[0] - 2], columns=["next_action"])
    assert ok["next_action"].tolist() == [recording.trajectories[0].columns["action"][-1]]
    with pytest.raises(IndexRangeError, match="step 4 of trajectory 0, which has 5, and a column of the next step"):
        view.gather([0], [LENGTHS[0] - 1], columns=["next_action"])


def test_positions_are_the_view_s_and_not_the_store_s(view, recording):
    chosen = view.take([3, 0, 3])
    batch = chosen.gather([0, 1, 2], [32, 4, 31], columns=["action", "trajectory"])
    actions = [recording.trajectories[t].columns["action"] for t in (3, 0, 3)]
    assert batch["action"].tolist() == [actions[0][32], actions[1][4], actions[2][31]]
    assert batch["trajectory"].tolist() == [0, 1, 2]
    with pytest.raises(IndexRangeError, match=r"trajectories 1\.\.3 of a view of 3"):
        chosen.gather([1, 3], [0, 0])


@pytest.mark.parametrize(
    ("trajectories", "steps", "error", "match"),
    [
        ([5], [0], IndexRangeError, r"trajectories 5\.\.5 of a view of 5"),
        ([-1], [0], IndexRangeError, r"trajectories -1\.\.-1 of a view of 5"),
        ([0, 1], [0, 1], IndexRangeError, "step 1 of trajectory 1, which has 1"),
        ([0], [-1], IndexRangeError, "step -1 of trajectory 0"),
        ([0], [2**40], IndexRangeError, "step 1099511627776"),
        ([0, 1], [0], SelectionError, "2 trajectories and 1 steps"),
        ([], [], SelectionError, "integers|no step"),
        (np.empty(0, np.int64), np.empty(0, np.int64), SelectionError, "no step is named"),
        ([0.0], [0], SelectionError, "trajectories of dtype float64"),
        ([0], [0.5], SelectionError, "steps of dtype float64"),
        ([True], [0], SelectionError, "dtype bool"),
        ([[0]], [0], SelectionError, "2 dimensions"),
        (0, 0, SelectionError, "0 dimensions"),
        (["0"], [0], SelectionError, "dtype <U1"),
    ],
)
def test_what_is_not_there_is_refused(view, trajectories, steps, error, match):
    with pytest.raises(error, match=match):
        view.gather(trajectories, steps, columns=["action"])
    assert view.gather([0], [0], columns=["action"])["action"].shape == (1,)


def test_names_that_nothing_has_are_refused(view, recording):
    with pytest.raises(UnknownColumnError, match="nothing"):
        view.gather([0], [0], columns=["nothing"])
    with pytest.raises(SelectionError):
        view.gather([0], [0], columns=[])
    with pytest.raises(IndexRangeError, match="a view of no trajectories"):
        view.first(0).gather([0], [0])


def test_integers_of_any_kind_will_do(view):
    wanted = view.gather([3, 0], [4, 2], columns=["action"])["action"].tolist()
    for kind in (np.int8, np.uint8, np.int32, np.uint64):
        assert (
            view.gather(np.array([3, 0], kind), np.array([4, 2], kind), columns=["action"])["action"].tolist() == wanted
        )
    strided = np.array([3, 9, 0, 9])[::2]
    assert view.gather(strided, (4, 2), columns=["action"])["action"].tolist() == wanted


def test_what_was_gathered_stays_as_it_is_while_the_caller_holds_it(view, recording):
    rng = np.random.default_rng(2)
    places = [(t, int(rng.integers(n))) for t, n in enumerate(LENGTHS)] * 4
    held = []
    for first in range(10):
        chosen = places[first:] + places[:first]
        held.append((chosen, view.gather(*zip(*chosen, strict=True), columns=["obs/image", "action"])))
    for chosen, batch in held:
        assert_same_batch(batch, reference_batch(recording, chosen, columns=["obs/image", "action"]))
    part = held[0][1]["obs"]["image"][3]  # a view of one row keeps the memory, too
    expected = part.clone()
    held.clear()
    del batch
    gc.collect()
    for _ in range(6):
        view.gather([3] * 20, list(range(20)), columns=["obs/image", "action"])
    assert torch.equal(part, expected)


def test_memory_is_used_again_once_the_caller_has_let_go(view):
    pool = view._access.buffers
    for _ in range(3):
        view.gather([0, 3], [0, 1], columns=["obs/image"])
    made = pool.made
    addresses = {view.gather([0, 3], [0, n], columns=["obs/image"])["obs"]["image"].data_ptr() for n in range(30)}
    assert pool.made == made
    assert len(addresses) <= 2
    kept = [view.gather([0, 3], [0, n], columns=["obs/image"]) for n in range(5)]
    assert len({batch["obs"]["image"].data_ptr() for batch in kept}) == 5


def test_threads_gather_from_one_view(recording):
    with view_of(recording, flush_after=(0, 2), cache_bytes=1 << 20) as view:

        def gather(seed):
            rng = np.random.default_rng(seed)
            names = [["action", "obs/image"], ["note", "obs/state"], ["next_obs/state", "step"]][seed % 3]
            for _ in range(40):
                t = rng.integers(0, len(LENGTHS), 16)
                chosen = list(zip(t.tolist(), rng.integers(0, np.array(LENGTHS)[t]).tolist(), strict=True))
                batch = view.gather(*zip(*chosen, strict=True), columns=names)
                assert_same_batch(batch, reference_batch(recording, chosen, columns=names))

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(gather, range(6)))


def test_a_cache_of_a_few_pages_gives_the_same(recording):
    """More is asked for than fits at once: it is gathered in parts."""
    schema = [Column(path="obs", dtype="int64", shape=(64,), page_rows=4)]
    big = recording_of(np.random.default_rng(3), schema, [400, 300])
    with view_of(big, cache_bytes=6000) as view:
        try:
            view.gather([0], [0])
        except CacheTooSmallError as error:
            pytest.fail(str(error))
        rng = np.random.default_rng(4)
        for _ in range(5):
            chosen = [(int(t), int(rng.integers(300))) for t in rng.integers(0, 2, 200)]
            assert_same_batch(view.gather(*zip(*chosen, strict=True)), reference_batch(big, chosen))


def test_views_before_and_after_a_commit_and_a_growing_store(recording):
    url = f"memory://pick/{uuid.uuid4().hex}"
    names = ["action", "obs/image", "note"]
    with trajstore.open(url, "a", schema=recording.schema) as store:
        views = []
        for number, recorded in enumerate(recording.trajectories):
            append(store, recorded)
            views.append(store.trajectories)
            if number % 2:
                store.flush()
        for count, view in enumerate(views, 1):
            chosen = [(t, LENGTHS[t] - 1) for t in range(count)]
            part = Recording(recording.schema, recording.trajectories[:count])
            found = view.gather(*zip(*chosen, strict=True), columns=names)
            assert_same_batch(found, reference_batch(part, chosen, columns=names))
    with pytest.raises(ClosedError):
        view.gather([0], [0])


def test_a_device_may_be_named(view):
    assert view.gather([0], [1], columns=["action"], device="cpu")["action"].device.type == "cpu"
    assert view.gather([0], [1], columns=["action"], device=torch.device("cpu"))["action"].shape == (1,)
