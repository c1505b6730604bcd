"""Statistics of views against two passes of plain NumPy over the concatenated columns; what is kept, and what is refused."""

from __future__ import annotations

import itertools
import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import trajstore
from tests.support.rare import also_slow, diagonal, examples
from trajstore import Column, CorruptionError, SelectionError, UnknownColumnError
from trajstore.format import layout
from trajstore.format.schemas import validate
from trajstore.format.statistics import Statistics
from trajstore.read import accumulate, statistics
from trajstore.read.accumulate import Histogram, Moments, accumulator, reduction_of

QUANTILES = (0.0, 0.01, 0.3, 0.5, 0.99, 1.0)
DTYPES = [
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
]


def groups(rows, shape):
    """The values of each entry, by the words of the docstring, one after the other: ``{place: (n,)}``."""
    if int(np.prod(shape)) <= 1024:
        return {place: rows[(slice(None), *place)] for place in np.ndindex(*shape)}
    ones = (0,) * (len(shape) - 1)
    if shape[-1] <= 4:
        return {(*ones, c): rows[..., c].reshape(-1) for c in range(shape[-1])}
    if shape[0] <= 4:
        return {(c, *ones): rows[:, c].reshape(-1) for c in range(shape[0])}
    return {(0, *ones): rows.reshape(-1)}


def assert_described(found, rows, *, exact_quantiles=True):
    """Two passes over the values of each entry, in float64 differences from the first."""
    shape = rows.shape[1:]
    expected = groups(rows, shape)
    assert set(np.ndindex(*found.reduced)) == set(expected)
    np.broadcast_shapes(found.reduced, shape)
    for place, values in expected.items():
        kept = values[np.isfinite(values)]
        assert found.count[place] == len(kept)
        assert found.nan_count[place] == len(values) - len(kept)
        if not len(kept):
            assert all(
                np.isnan(a[place]) for a in (found.mean, found.std, found.min, found.max, *found.quantiles.values())
            )
            continue
        assert found.min[place] == kept.min()
        assert found.max[place] == kept.max()
        exact = [int(v) for v in kept] if kept.dtype.kind in "iub" else [float(v) for v in kept]
        away = np.array([v - exact[0] for v in exact], np.float64)
        spread = max(float(np.ptp(away)), 1e-300)
        assert abs(found.mean[place] - (exact[0] + away.mean())) <= 1e-12 * max(spread, abs(float(exact[0])))
        assert abs(found.std[place] - away.std()) <= 1e-9 * spread
        if (away == 0).all():
            assert found.std[place] == 0
            assert found.mean[place] == float(exact[0])
        if exact_quantiles:
            for q, values_at in found.quantiles.items():
                reference = np.quantile(kept.astype(np.float64), q)
                np.testing.assert_allclose(values_at[place], reference, rtol=1e-12, atol=1e-12 * spread)


def gathered(column, rows, parts, quantiles=QUANTILES, make=accumulator):
    """The accumulator's result, fed in parts that are measured in reverse and added in order."""
    stored = rows.view(column.physical_dtype) if rows.dtype != column.physical_dtype else rows
    made = make(column, quantiles, len(rows))
    made.begin(stored[:1])
    measured = {first: made.measure(np.ascontiguousarray(stored[first:stop]), first) for first, stop in reversed(parts)}
    for first, _ in parts:
        made.add(measured[first])
    return made.result()


@st.composite
def columns_of_rows(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=3)) if draw(st.booleans()) else ()
    elements = None
    if dtype.startswith("float"):
        width = int(dtype[5:])
        bound = {16: 1e4, 32: 2.0**60, 64: 2.0**120}[width]
        bound = float(np.dtype(dtype).type(bound))
        numbers = st.floats(-bound, bound, width=width)
        elements = numbers | st.sampled_from([np.nan, np.inf, -np.inf]) if draw(st.booleans()) else numbers
    rows = draw(hnp.arrays(dtype, (draw(st.integers(1, 30)), *shape), elements=elements))
    cuts = sorted({0, len(rows), *draw(st.lists(st.integers(0, len(rows)), max_size=4))})
    return Column(path="x", dtype=dtype, shape=shape), rows, list(itertools.pairwise(cuts))


@settings(max_examples=examples(200), deadline=None)
@given(columns_of_rows(), st.booleans())
def test_any_column_in_any_parts_is_what_numpy_says(made, as_moments):
    column, rows, parts = made
    make = Moments if as_moments else accumulator
    assert_described(gathered(column, rows, parts, make=make), rows)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    diagonal(["uint8", "int16", "float32"], [(2, 512), (40, 30, 3), (3, 40, 30), (40, 30), (1, 41, 40), (1025,)]),
)
def test_large_steps_are_reduced_by_channel_or_altogether(dtype, shape):
    rng = np.random.default_rng(0)
    rows = (rng.integers(0, 100, (12, *shape))).astype(dtype)
    column = Column(path="x", dtype=dtype, shape=shape)
    assert_described(gathered(column, rows, [(0, 5), (5, 12)]), rows)


def test_the_shape_of_the_result():
    assert reduction_of(()).shape == ()
    assert reduction_of((1024,)).shape == (1024,)
    assert reduction_of((1025,)).shape == (1,)
    assert reduction_of((512, 2)).shape == (512, 2)
    assert reduction_of((64, 64, 4)).shape == (1, 1, 4)
    assert reduction_of((4, 64, 64)).shape == (4, 1, 1)
    assert reduction_of((5, 64, 64)).shape == (1, 1, 1)


@pytest.mark.parametrize(
    "values",
    [
        np.array([2**63 - 1, -(2**63), 0, 5], np.int64),
        np.array([2**64 - 1, 0, 2**64 - 2], np.uint64),
        np.arange(5, dtype=np.int64) * 1000
        + 1_700_000_000_000_000_000,  # a spread far below what float64 resolves there
        np.full(7, 2**53 + 1, np.int64),
        np.full(1000, 0.1),
        1e9 + np.arange(5000) / 1000,
        np.array([np.inf, -np.inf, np.nan]),
        np.array([np.nan, 1.0, 2.0]),
    ],
    ids=lambda v: f"{v.dtype}-{v[0]}",
)
def test_extremes(values):
    column = Column(path="x", dtype=values.dtype.name)
    half = len(values) // 2
    found = gathered(column, values, [(0, half), (half, len(values))])
    assert_described(found, values)
    if values.dtype.kind in "iu":
        assert found.min.dtype == found.max.dtype == values.dtype


def test_squares_beyond_float64_are_nan_and_nothing_warns():
    found = gathered(Column(path="x", dtype="float64"), np.array([1e300, -1e300, 0.0]), [(0, 1), (1, 3)])
    assert np.isnan(found.std)
    assert (found.min, found.max) == (-1e300, 1e300)


def test_bfloat16_is_counted_by_its_bits():
    values = torch.tensor([[0.5, float("nan")], [-3.0, 2.0], [100.0, float("inf")]], dtype=torch.bfloat16)
    column = Column(path="x", dtype="bfloat16", shape=(2,))
    for make in (accumulator, Moments):
        found = gathered(column, values.view(torch.uint16).numpy(), [(0, 2), (2, 3)], make=make)
        assert_described(found, values.to(torch.float64).numpy())


def test_narrow_columns_are_counted_and_large_ones_of_16_bits_are_not():
    assert isinstance(accumulator(Column(path="x", dtype="uint8", shape=(1024,)), (), 1), Histogram)
    assert isinstance(accumulator(Column(path="x", dtype="float16", shape=(8,)), (), 1), Histogram)
    assert isinstance(accumulator(Column(path="x", dtype="int16", shape=(1024,)), (), 1), Moments)
    assert isinstance(accumulator(Column(path="x", dtype="int32"), (), 1), Moments)


@pytest.mark.parametrize("shape", [(), (3,), (2, 600), (600, 2), (40, 30)])
def test_sampled_quantiles_are_within_the_stated_error(shape):
    rng = np.random.default_rng(1)
    rows = rng.exponential(size=(100_000 if len(shape) < 2 else 300, *shape)).astype(np.float32)
    column = Column(path="x", dtype="float32", shape=shape)

    def make(column, quantiles, count):
        return Moments(column, quantiles, count, sample=4096)

    parts = [(0, 100), (100, 150), (150, len(rows))]
    found = gathered(column, rows, parts, make=make)
    assert found.sampled == 4096
    assert_described(found, rows, exact_quantiles=False)
    for place, values in groups(rows, shape).items():
        assert found.quantiles[0.0][place] == values.min()
        assert found.quantiles[1.0][place] == values.max()
        for q in (0.01, 0.3, 0.5, 0.99):
            rank = (values <= found.quantiles[q][place]).mean()
            assert abs(rank - q) < 4.5 * np.sqrt(q * (1 - q) / found.sampled)
    again = gathered(column, rows, [(0, len(rows))], make=make)  # parts do not matter
    for q in QUANTILES:
        np.testing.assert_array_equal(again.quantiles[q], found.quantiles[q])


# views


SCHEMA = [
    Column(path="obs/state", dtype="float32", shape=(3,), extra=1, page_rows=4),
    Column(path="obs/frame", dtype="uint8", shape=(24, 24, 3), page_rows=2),
    Column(path="action", dtype="int64"),
    Column(path="done", dtype="bool"),
    Column(path="half", dtype="bfloat16", shape=(2,)),
    Column(path="reward", dtype="float64"),
    Column(path="bonus", dtype="float32", presence="optional"),
    Column(path="note", dtype="string"),
    Column(path="points", dtype="float64", shape=(2,), ragged=True),
    Column(path="wave", dtype="complex64"),
    Column(path="when", dtype="datetime64[us]"),
]
MEASURED = ["obs/state", "obs/frame", "action", "done", "half", "reward"]


def made(rng, length, number):
    trajectory = {
        "obs": {
            "state": (rng.normal(size=(length + 1, 3)) * [1, 0, 100] + [0, 5, 1e6]).astype(np.float32),
            "frame": rng.integers(0, 256, (length, 24, 24, 3), np.uint8),
        },
        "action": rng.integers(-(2**40), 2**40, length),
        "done": rng.random(length) < 0.2,
        "half": torch.from_numpy(rng.normal(size=(length, 2)).astype(np.float32)).to(torch.bfloat16),
        "reward": np.where(rng.random(length) < 0.1, np.nan, rng.normal(size=length)),
        "note": ["x"] * length,
        "points": [np.zeros((1, 2))] * length,
        "wave": np.zeros(length, np.complex64),
        "when": np.zeros(length, "datetime64[us]"),
    }
    if number % 2:
        trajectory["bonus"] = np.ones(length, np.float32)
    return trajectory


def fill(store, count, rng, *, flush_each=6):
    for number in range(count):
        store.append(made(rng, int(rng.integers(1, 12)), number))
        if number % flush_each == flush_each - 1:
            store.flush()
    store.flush()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("statistics") / "store"
    with trajstore.open(place, "x", schema=SCHEMA, segment_bytes=1 << 14) as store:
        fill(store, 40, np.random.default_rng(0))
    return place


@pytest.fixture
def view(folder):
    with trajstore.open(folder) as store:
        yield store.trajectories


def rows_of(view, path):
    read = [t[path][:] for t in view]
    return torch.cat(read).to(torch.float64).numpy() if isinstance(read[0], torch.Tensor) else np.concatenate(read)


def assert_view_described(view, found):
    assert [path for path in found if path != "bonus"] == MEASURED  # which only some trajectories have
    assert ("bonus" in found) == all("bonus" in t for t in view)
    for path in MEASURED:
        assert_described(found[path], rows_of(view, path))
    assert (found.trajectories, found.steps, found.version) == (len(view), view.num_steps, view.version)
    table = view.to_pandas()
    assert_described(found.length, table["length"].to_numpy())
    assert_described(found.reward_sum, table["reward_sum"].to_numpy(dtype=np.float64, na_value=np.nan))


@pytest.mark.parametrize(
    "chosen",
    [
        lambda view: view,
        lambda view: view[::3],
        lambda view: view.take([5]),
        lambda view: view.take([7, 3, 3, 39, 0]),  # in another order, one of them twice
        lambda view: view.filter("length == 1"),
        lambda view: view[::-1],
    ],
    ids=["all", "every-third", "one", "repeated", "single-steps", "backwards"],
)
@pytest.mark.parametrize("piece_bytes", also_slow([1, 3000, 8 << 20], [3000]))
def test_a_view_is_what_numpy_says_of_its_columns(view, chosen, piece_bytes, monkeypatch):
    monkeypatch.setattr(statistics, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(accumulate, "_BLOCK_VALUES", 50)
    some = chosen(view)
    assert_view_described(some, some.statistics(quantiles=QUANTILES))


def test_each_row_is_read_in_one_piece(view):
    for chosen in (view, view[::2], view.take([9, 1, 1])):
        for column in (view.schema["obs/state"], view.schema["action"]):
            table = chosen._table
            expected = []
            for row in chosen._rows:
                start = table.start[row] + (table.ordinal[row] if column.extra else 0)
                expected += [(table.segment[row], r) for r in range(start, start + table.length[row] + column.extra)]
            found = list(statistics.pieces(chosen._selection, chosen._access.readers, column))
            assert sorted((p.segment, r) for p in found for run in p.runs for r in range(*run)) == sorted(expected)
            assert [p.first for p in found] == np.cumsum([0, *(p.rows for p in found)])[:-1].tolist()


def test_trajectories_that_are_not_committed_are_measured_and_not_kept(tmp_path):
    with trajstore.open(tmp_path / "s", "x", schema=SCHEMA, commit_interval_s=3600) as store:
        fill(store, 5, np.random.default_rng(0))
        assert len(store.trajectories) == 5
        for number in range(3):
            store.append(made(np.random.default_rng(9), 4, number))
        view = store.trajectories
        assert len(view) == 8
        assert_view_described(view, view.statistics(quantiles=QUANTILES))
        assert not (tmp_path / "s" / layout.STATISTICS).exists()


def test_deleted_trajectories_do_not_count(tmp_path):
    with trajstore.open(tmp_path / "s", "x", schema=SCHEMA) as store:
        fill(store, 12, np.random.default_rng(0))
        before = store.trajectories.statistics()
        store.delete(store.trajectories.ids[[0, 3, 4, 11]])
        view = store.trajectories
        assert len(view) == 8
        assert_view_described(view, view.statistics(quantiles=QUANTILES))
        assert before.trajectories == 12


# kept


def without_reading(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("columns are read again")

    monkeypatch.setattr(statistics, "_read", refuse)


def assert_same(found, expected):
    assert json.dumps(found.to_json()) == json.dumps(expected.to_json())


def kept_document(folder, version):
    return folder / layout.statistics_key(version)


@pytest.fixture
def store(tmp_path):
    with trajstore.open(tmp_path / "s", "x", schema=SCHEMA) as store:
        fill(store, 6, np.random.default_rng(0))
        yield store


def test_a_version_is_measured_once_and_kept_in_the_store(store, tmp_path, monkeypatch):
    measured = store.trajectories.statistics()
    document = kept_document(tmp_path / "s", store.version)
    validate(json.loads(document.read_bytes()), "statistics")
    with monkeypatch.context() as patched:
        without_reading(patched)
        assert_same(store.trajectories.statistics(), measured)
        with trajstore.open(tmp_path / "s") as other:
            assert_same(other.trajectories.statistics(), measured)
            assert_same(other.trajectories.statistics(["action"]), store.trajectories.statistics(["action"]))
            with pytest.raises(AssertionError, match="read again"):
                other.trajectories[1:].statistics()  # not the whole version
    store.append(made(np.random.default_rng(1), 3, 0))
    store.flush()
    assert store.trajectories.statistics().trajectories == 7
    assert kept_document(tmp_path / "s", store.version) != document


def test_what_is_asked_for_later_is_added(store, tmp_path, monkeypatch):
    view = store.trajectories
    first = view.statistics(["action"], quantiles=[0.5])
    assert list(first) == ["action"]
    more = view.statistics(["action", "reward"], quantiles=[0.1])
    assert [list(more[path].quantiles) for path in more] == [[0.1], [0.1]]
    assert list(more.length.quantiles) == [0.1]
    without_reading(monkeypatch)
    assert_same(view.statistics(["action"], quantiles=[0.5]), first)
    both = view.statistics(["action"], quantiles=[0.5, 0.1])["action"]
    assert both.quantile(0.1) == more["action"].quantile(0.1)
    with trajstore.open(tmp_path / "s") as other:
        assert list(other.trajectories.statistics(["action"], quantiles=[0.1, 0.5])["action"].quantiles) == [0.1, 0.5]
        with pytest.raises(AssertionError, match="read again"):
            other.trajectories.statistics(["reward"], quantiles=[0.5])


def test_a_handle_that_reads_keeps_in_memory_only(folder, monkeypatch):
    with trajstore.open(folder) as store:
        measured = store.trajectories.statistics(["action"])
        assert not (folder / layout.STATISTICS).exists()
        without_reading(monkeypatch)
        assert_same(store.trajectories.statistics(["action"]), measured)


@pytest.mark.parametrize("damage", ["flipped", "empty", "of another snapshot"])
def test_a_document_that_is_no_good_is_measured_anew(store, tmp_path, caplog, damage):
    measured = store.trajectories.statistics(["action"])
    document = kept_document(tmp_path / "s", store.version)
    whole = document.read_bytes()
    if damage == "of another snapshot":
        document.write_bytes(measured.to_bytes(snapshot_sha256="ab" * 32))
    else:
        document.write_bytes(whole.replace(b"action", b"actiom") if damage == "flipped" else b"")
    with trajstore.open(tmp_path / "s", "a") as other, caplog.at_level(logging.WARNING):
        assert_same(other.trajectories.statistics(["action"]), measured)
    assert "measured anew" in caplog.text
    assert document.read_bytes() == whole


def test_a_document_of_another_snapshot_is_refused(store):
    data = store.trajectories.statistics(["action"]).to_bytes(snapshot_sha256="ab" * 32)
    with pytest.raises(CorruptionError, match="key is of another snapshot"):
        Statistics.from_bytes(data, snapshot_sha256="cd" * 32, key="key")


def test_documents_come_back_bit_for_bit(view):
    found = view.statistics(quantiles=QUANTILES)
    again = Statistics.from_bytes(found.to_bytes(snapshot_sha256="ab" * 32), snapshot_sha256="ab" * 32, key="k")
    assert_same(again, found)
    for path in found:
        for name in ("count", "nan_count", "mean", "std", "min", "max"):
            ours, theirs = getattr(found[path], name), getattr(again[path], name)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
    json.dumps(found.to_json(), allow_nan=False)


# looking, and what is refused


def test_a_table_to_look_at(view):
    found = view.statistics()
    table = found.to_pandas()
    assert list(table.index[:4]) == ["length", "reward_sum", "obs/state[0]", "obs/state[1]"]
    assert list(table.columns) == ["count", "nan_count", "mean", "std", "min", "q0.01", "q0.5", "q0.99", "max"]
    assert [n for n in table.index if "frame" in n] == [f"obs/frame[{c}]" for c in range(3)]
    assert table.loc["action", "max"] == rows_of(view, "action").max()
    pooled = found.to_pandas(elements=False)
    state = rows_of(view, "obs/state").astype(np.float64)
    assert pooled.loc["obs/state", "count"] == state.size
    np.testing.assert_allclose(pooled.loc["obs/state", "mean"], state.mean())
    np.testing.assert_allclose(pooled.loc["obs/state", "std"], state.std())
    assert pooled.loc["obs/state", "min"] == state.min()
    assert np.isnan(pooled.loc["obs/state", "q0.5"])


def test_ends_are_numbers_to_pandas_unless_these_would_round_them():
    with trajstore.open("memory://statistics/ends", "a") as store:
        store.append({"small": np.array([-3e-7, 3e-7]), "whole": np.array([1, 2])})
        store.append({"small": np.array([0.0]), "whole": np.array([2**53 + 1])})
        store.flush()
        table = store.trajectories.first(1).statistics().to_pandas()
        assert table["min"].dtype == table["max"].dtype == np.float64
        assert "-3.000000e-07" in str(table["min"])
        large = store.trajectories.statistics(["whole"]).to_pandas()
        assert large.loc["whole", "max"] == 2**53 + 1
        with_floats = store.trajectories.statistics().to_pandas()
        assert with_floats["max"].dtype == object
        assert with_floats.loc["whole", "max"] == 2**53 + 1


def test_many_values_are_one_row_unless_asked_for():
    with trajstore.open("memory://statistics/wide", "a") as store:
        store.append({"wide": np.arange(40.0).reshape(2, 20)})
        store.flush()
        found = store.trajectories.statistics()
    assert list(found.to_pandas().index) == ["length", "wide"]
    assert len(found.to_pandas(elements=True)) == 21


def test_parents_name_what_is_under_them(view):
    assert list(view.statistics(["obs"], quantiles=())) == ["obs/state", "obs/frame"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"columns": ["nothing"]}, UnknownColumnError, "no column 'nothing'"),
        ({"columns": ["note"]}, SelectionError, "'note' is string"),
        ({"columns": ["points"]}, SelectionError, "'points' is list of float64"),
        ({"columns": ["wave"]}, SelectionError, "'wave' is complex64"),
        ({"columns": ["when"]}, SelectionError, "'when' is datetime64"),
        ({"columns": ["bonus"]}, SelectionError, "'bonus' is lacking from 20 of 40"),
        ({"columns": "action"}, SelectionError, r"expected a list of names: columns=\['action'\]"),
        ({"quantiles": [50]}, SelectionError, "quantile 50.0, expected a fraction"),
        ({"quantiles": [float("nan")]}, SelectionError, "quantile nan"),
        ({"quantiles": 0.5}, SelectionError, "expected fractions"),
    ],
)
def test_refused(view, arguments, error, message):
    with pytest.raises(error, match=message):
        view.statistics(**arguments)


def test_what_was_not_asked_for_is_an_error_that_says_so(view):
    found = view.statistics(["action"], quantiles=[0.5])
    with pytest.raises(UnknownColumnError, match="there are those of 'action'"):
        found["reward"]
    with pytest.raises(SelectionError, match=r"quantile 0.9 of 'action' was not asked for; there are 0.5"):
        found["action"].quantile(0.9)


def test_an_empty_view_and_a_closed_store_are_refused(folder):
    with trajstore.open(folder) as store:
        view = store.trajectories
        with pytest.raises(SelectionError, match="no trajectories"):
            view[:0].statistics()
    with pytest.raises(trajstore.ClosedError):
        view.statistics()


def test_a_broken_page_is_an_error_and_nothing_is_kept(tmp_path):
    with trajstore.open(tmp_path / "s", "x", schema=SCHEMA) as store:
        fill(store, 6, np.random.default_rng(0))
    shard = next((tmp_path / "s" / "segments").glob("*/obs/frame/c.*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    with trajstore.open(tmp_path / "s", "a") as store:
        with pytest.raises(CorruptionError, match="obs/frame"):
            store.trajectories.statistics()
        assert not (tmp_path / "s" / layout.STATISTICS).exists()


def test_progress_is_shown_when_asked_for(view, capfd):
    view.statistics(["action"], progress=True)
    assert "Measuring" in capfd.readouterr().err
    view[:3].statistics(["action"])
    assert not capfd.readouterr().err
