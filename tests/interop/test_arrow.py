"""Views and steps as Arrow, read by pyarrow, DuckDB and Polars, against the values that were appended."""

import datetime as dt

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch

import trajstore
from tests.support.kinds import every_kind, trajectory_of
from trajstore.interop.steps import StepReader

LENGTHS = (5, 1, 9, 3, 7, 2)


@pytest.fixture(scope="module")
def model():
    """Trajectories as they are appended: path -> rows."""
    rng = np.random.default_rng(0)
    made = []
    for number, length in enumerate(LENGTHS):
        columns = {
            "obs/state": rng.normal(size=(length + 1, 3)).astype(np.float32),
            "image": rng.integers(0, 256, (length + 1, 4, 5, 3), np.uint8),
            "reward": rng.normal(size=length),
            "half": rng.normal(size=(length, 2)).astype(np.float16),
            "note": [f"{number}/{step}" for step in range(length)],
            "points": [rng.normal(size=(int(rng.integers(0, 4)), 2)) for _ in range(length)],
            "time": np.arange(length).astype("datetime64[ms]"),
        }
        if number % 2:
            columns["rare"] = rng.integers(0, 9, (length, 2))
            columns["rare_text"] = ["x"] * length
        made.append(columns)
    return made


@pytest.fixture(scope="module")
def view(model):
    schema = [
        trajstore.Column(path="obs/state", dtype="float32", shape=(3,), extra=1, page_rows=4),
        trajstore.Column(path="image", dtype="uint8", shape=(4, 5, 3), extra=1, page_rows=2),
        trajstore.Column(path="reward", dtype="float64"),
        trajstore.Column(path="half", dtype="float16", shape=(2,)),
        trajstore.Column(path="note", dtype="string"),
        trajstore.Column(path="points", dtype="float64", shape=(2,), ragged=True),
        trajstore.Column(path="time", dtype="datetime64[ms]"),
        trajstore.Column(path="rare", dtype="int64", shape=(2,), presence="optional"),
        trajstore.Column(path="rare_text", dtype="string", presence="optional"),
    ]
    with trajstore.open("memory://arrow-tests", "a", schema=schema) as store:
        for number, columns in enumerate(model):
            task = ["pick", "place", None][number % 3]
            store.append(columns, terminated=number % 2 == 0, metadata={"task": task, "number": number})
            if number == 3:
                store.flush()
        store.flush()
        yield store.trajectories


def slow_steps(model, chosen, path):
    """One Python value per step, None where a trajectory lacks the column."""
    values = []
    for number in chosen:
        rows = model[number].get(path, [None] * LENGTHS[number])
        for step in range(LENGTHS[number]):
            row = rows[step]
            if isinstance(row, np.datetime64):
                row = row.astype(dt.datetime)
            values.append(row.tolist() if isinstance(row, np.ndarray | np.generic) else row)
    return values


def test_the_trajectory_table_has_what_to_pandas_has(view):
    table = view[::-1].to_arrow()
    frame = view[::-1].to_pandas()
    assert table.column_names == ["id", *frame.columns]
    assert table["id"].to_pylist() == frame.index.tolist()
    for name in frame.columns:
        expected = [None if missing else value for value, missing in zip(frame[name], frame[name].isna(), strict=True)]
        assert table[name].to_pylist() == expected
    assert table["task"].to_pylist() == [["pick", "place", None][n % 3] for n in range(len(LENGTHS))][::-1]
    assert pa.schema(view).equals(table.schema)
    assert pa.table(view).equals(view.to_arrow())
    assert view.first(0).to_arrow().num_rows == 0
    assert pa.table(view.first(0)).schema.equals(table.schema)


def test_duckdb_and_polars_query_a_view(view, model):
    found = duckdb.sql("select task, sum(length), max(reward_sum) from view group by task order by task").fetchall()
    expected = []
    for task in ("pick", "place", None):
        numbers = [n for n in range(len(LENGTHS)) if ["pick", "place", None][n % 3] == task]
        expected.append(
            (task, sum(LENGTHS[n] for n in numbers), pytest.approx(max(model[n]["reward"].sum() for n in numbers)))
        )
    assert found == expected
    frame = pl.DataFrame(view)
    assert frame.columns == view.to_arrow().column_names
    assert frame["uuid"].to_list() == [str(one.uuid) for one in view]
    assert frame.filter(pl.col("created_at") > dt.datetime(2020, 1, 1, tzinfo=dt.UTC)).height == len(view)
    wanted = str(view[2].uuid)
    assert duckdb.sql(f"select id from view where uuid = '{wanted}'").fetchall() == [(2,)]


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5], [1, 3, 5], [5, 0, 3, 3], [2], []])
@pytest.mark.parametrize("batch_bytes", [1, 700, 1 << 20])
def test_steps_equal_a_loop(view, model, chosen, batch_bytes):
    names = ["image", "obs", "reward", "half", "note", "points", "time", "rare", "rare_text"]
    steps = view.take(chosen).steps_arrow(names, batch_bytes=batch_bytes)
    table = pa.table(steps)
    table.validate(full=True)
    assert table.num_rows == len(steps) == sum(LENGTHS[n] for n in chosen)
    assert table["trajectory"].to_pylist() == [n for n in chosen for _ in range(LENGTHS[n])]
    assert table["step"].to_pylist() == [step for n in chosen for step in range(LENGTHS[n])]
    for path in table.column_names[2:]:
        assert table[path].to_pylist() == slow_steps(model, chosen, path)
    frame = pl.DataFrame(steps)
    assert frame.schema["image"] == pl.Array(pl.UInt8, (4, 5, 3))
    for path in frame.columns[2:]:
        assert [v.tolist() if isinstance(v, np.ndarray) else v for v in frame[path].to_list()] == slow_steps(
            model, chosen, path
        )


def test_duckdb_reads_steps_in_order_and_joins_them(view, model):
    steps = view.steps_arrow(["image", "obs/state", "reward", "note", "points", "rare"], batch_bytes=500)  # noqa: F841 - DuckDB finds it by name
    rows = duckdb.sql('select image, "obs/state", reward, note, points, rare from steps').fetchall()
    assert rows  # a second query streams again
    again = duckdb.sql('select image, "obs/state", reward, note, points, rare from steps').to_arrow_table()
    everything = range(len(LENGTHS))
    for path in again.column_names:
        assert again[path].to_pylist() == slow_steps(model, everything, path)
    joined = duckdb.sql(
        "select task, count(*) from steps join view on trajectory = id where task is not null group by task order by task"
    ).fetchall()
    assert joined == [("pick", LENGTHS[0] + LENGTHS[3]), ("place", LENGTHS[1] + LENGTHS[4])]


def test_n_cuts_steps_and_defaults_are_small_columns(view):
    steps = view.steps_arrow(n=8)
    assert steps.schema.names == ["trajectory", "step", "obs/state", "reward", "half", "note", "time"]
    assert steps.to_table()["trajectory"].to_pylist() == [0] * 5 + [1] + [2, 2]
    assert view.steps_arrow(n=0).to_table().num_rows == 0
    assert len(view.steps_arrow(n=1000)) == sum(LENGTHS)
    frame = view.steps(["reward", "obs"], n=8)
    assert frame.index.get_level_values("trajectory").tolist() == [0] * 5 + [1] + [2, 2]


def test_nothing_is_read_before_it_is_streamed(view, monkeypatch):
    steps = view.steps_arrow(["image"], batch_bytes=200)
    read = []
    really = StepReader.read

    def noted(self, column, start, stop):
        read.append((start, stop))
        return really(self, column, start, stop)

    monkeypatch.setattr(StepReader, "read", noted)
    stream = pa.RecordBatchReader.from_stream(steps)
    assert not read
    first = stream.read_next_batch()
    assert read == [(0, first.num_rows)]
    assert first.num_rows == 200 // (4 * 5 * 3 + 16)


def test_every_kind_of_column_can_be_queried():
    rng = np.random.default_rng(1)
    columns = every_kind()
    calendar = [c for c in columns if c.dtype == "datetime64[D]"]
    plain = [c for c in columns if c.dtype != "datetime64[D]"]
    made = [trajectory_of(columns, rng, length) for length in (3, 5)]
    for one, length in zip(made, (3, 5), strict=True):
        for c in calendar:
            rows = length + c.extra
            days = [rng.integers(-40000, 40000, ((2,) if c.ragged else ()) + c.shape) for _ in range(rows)]
            one[c.path] = (
                [d.astype("datetime64[D]") for d in days] if c.ragged else np.stack(days).astype("datetime64[D]")
            )
    with trajstore.open("memory://arrow-kinds", "a", schema=columns) as store:
        for one in made:
            store.append(one)
        view = store.trajectories  # not yet committed
        steps = view.steps_arrow([c.path for c in plain + calendar], batch_bytes=10_000)
        table = pa.table(steps)
        table.validate(full=True)
        assert duckdb.sql("select * from steps").to_arrow_table().num_rows == 8
        assert pl.DataFrame(steps).height == 8
        for column in columns:
            everything = table[column.path].to_pylist()
            for number, one in enumerate(made):
                rows = everything[3 * number : 3 + 5 * number]
                for step, row in enumerate(rows):
                    assert_same(column, row, one[column.path][step])


def assert_same(column, row, value):
    if column.dtype in ("string", "bytes"):
        assert row == (list(value) if column.ragged else value)
        return
    value = value.float().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    if column.dtype.startswith("complex"):
        flat = np.array(flattened(row, dict), dtype=object)
        assert np.array_equal(np.array([v["real"] for v in flat], float), value.real.reshape(-1), equal_nan=True)
        assert np.array_equal(np.array([v["imag"] for v in flat], float), value.imag.reshape(-1), equal_nan=True)
    elif column.dtype.startswith(("datetime64", "timedelta64")):
        # pandas' nanoseconds do not survive to_pylist; the integers behind them do
        flat = flattened(row, object)
        assert len(flat) == value.size
        for got, expected in zip(flat, value.reshape(-1), strict=True):
            assert (got is None) == bool(np.isnat(expected))
            if got is not None and hasattr(got, "value"):
                assert got.value == expected.astype(np.int64)
            elif got is not None and column.dtype == "datetime64[D]":
                assert np.datetime64(got, "D") == expected
    else:
        assert np.array_equal(
            np.array(flattened(row, object), value.dtype), value.reshape(-1), equal_nan=value.dtype.kind == "f"
        )


def flattened(row, leaf):
    if isinstance(row, list):
        return [inner for item in row for inner in flattened(item, leaf)]
    return [row]


def test_times_that_arrow_cannot_hold_are_refused():
    with trajstore.open("memory://arrow-times", "a") as store:
        store.append(
            {"day": np.array([2**40, 0]).view("datetime64[D]"), "tick": np.array([5, 6]).view("datetime64[ps]")}
        )
        steps = store.trajectories.steps_arrow(["day"])
        with pytest.raises((pa.ArrowInvalid, trajstore.SelectionError), match=r"beyond what Arrow.*view\.read"):
            steps.to_table()
        assert store.trajectories.steps_arrow(["tick"]).to_table()["tick"].to_pylist() == [5, 6]


def test_a_column_named_like_the_index_is_refused_by_name_and_left_out_by_default():
    with trajstore.open("memory://arrow-names", "a") as store:
        store.append({"step": np.arange(3), "action": np.arange(3)})
        assert store.trajectories.steps_arrow().schema.names == ["trajectory", "step", "action"]
        with pytest.raises(trajstore.SelectionError, match="'step' has the name"):
            store.trajectories.steps_arrow(["step"])


def test_a_frame_of_a_column_that_some_lack_is_refused(view):
    with pytest.raises(trajstore.UnknownColumnError, match="trajectory 0 has no column 'rare'"):
        view.steps(["rare"])
    with pytest.raises(trajstore.SelectionError, match="batch_bytes=0"):
        view.steps_arrow(batch_bytes=0)
