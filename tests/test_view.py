"""Views: selection, filters, frames, columns, and plain sampling."""

import datetime as dt

import numpy as np
import pandas as pd
import pytest
import torch

import trajstore
from trajstore.errors import SelectionError


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    made = []
    for number in range(12):
        length = int(rng.integers(1, 30))
        made.append(
            {
                "length": length,
                "obs": rng.normal(size=(length + 1, 3)).astype(np.float32),
                "frame": rng.integers(0, 256, (length, 20, 20), np.uint8),
                "reward": rng.normal(size=length),
                "note": [f"{number}/{step}" for step in range(length)],
                "points": [rng.normal(size=(int(rng.integers(0, 4)), 2)) for _ in range(length)],
                "task": ["pick", "place", None][number % 3],
            }
        )
    return made


@pytest.fixture(scope="module")
def view(model):
    schema = [
        trajstore.Column(path="obs", dtype="float32", shape=(3,), extra=1, page_rows=4),
        trajstore.Column(path="frame", dtype="uint8", shape=(20, 20)),
        trajstore.Column(path="reward", dtype="float64"),
        trajstore.Column(path="note", dtype="string"),
        trajstore.Column(path="points", dtype="float64", shape=(2,), ragged=True),
    ]
    with trajstore.open("memory://view-tests", "a", schema=schema) as store:
        for number, m in enumerate(model):
            store.append(
                {name: m[name] for name in ("obs", "frame", "reward", "note", "points")},
                terminated=number % 2 == 0,
                truncated=number % 2 == 1,
                metadata={"task": m["task"], "number": number},
            )
            if number % 5 == 4:
                store.flush()
        store.flush()
        yield store.trajectories


def numbers(view):
    return [t.metadata["number"] for t in view]


def test_selection_is_that_of_a_list(view):
    everything = list(range(12))
    assert numbers(view) == everything
    assert numbers(view[3:9:2]) == everything[3:9:2]
    assert numbers(view[::-1]) == everything[::-1]
    assert numbers(view.first(4)) == everything[:4]
    assert numbers(view.last(4)) == everything[-4:]
    assert numbers(view.last(0)) == []
    assert numbers(view.first(100)) == everything
    assert numbers(view.take([5, 5, -1])) == [5, 5, 11]
    assert numbers(view.take(np.arange(12) % 4 == 0)) == [0, 4, 8]
    assert numbers(view.last(6).first(3).take([2, 0])) == [8, 6]
    assert view[-1].metadata["number"] == 11
    with pytest.raises(IndexError, match="trajectory 12 of a view of 12"):
        view[12]
    with pytest.raises(trajstore.SelectionError):
        view.take([0.5])
    with pytest.raises(trajstore.SelectionError, match="mask of 3"):
        view.take([True, False, True])
    with pytest.raises(trajstore.IndexRangeError):
        view.take([12])


def test_filter_equals_a_loop(view, model):
    def wanted(condition):
        return [n for n, m in enumerate(model) if condition(n, m)]

    assert numbers(view.filter("length > 10 and task == 'pick'")) == wanted(
        lambda n, m: m["length"] > 10 and m["task"] == "pick"
    )
    assert numbers(view.filter("reward_sum > 0 or terminated")) == wanted(
        lambda n, m: m["reward"].sum() > 0 or n % 2 == 0
    )
    assert numbers(view.filter("id in @chosen", chosen=[3, 7])) == [3, 7]
    assert numbers(view.filter("task != 'pick'").filter("number >= 6")) == wanted(
        lambda n, m: m["task"] != "pick" and n >= 6
    )
    assert len(view.filter("length > 1000")) == 0


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("lenght > 3", "lenght.*the fields are id, uuid, length"),
        ("length >", "is not an expression"),
        ("length", "gives values of int64, expected true or false"),
        ("task > 3", "is not an expression"),
        ("length > @limit", "limit"),
    ],
)
def test_a_filter_that_means_nothing_is_refused(view, expression, message):
    with pytest.raises(trajstore.SelectionError, match=message):
        view.filter(expression)


def test_frames(view, model):
    frame = view.to_pandas()
    assert list(frame.columns) == (
        ["uuid", "length", "terminated", "truncated", "reward_sum", "created_at", "task", "number"]
    )
    assert frame.index.tolist() == list(range(12))
    assert frame["uuid"].tolist() == [str(t.uuid) for t in view]
    assert frame["length"].tolist() == [m["length"] for m in model]
    np.testing.assert_allclose(frame["reward_sum"], [m["reward"].sum() for m in model])
    assert frame["task"].isna().tolist() == [m["task"] is None for m in model]
    assert frame["created_at"].dt.tz is not None
    assert len(view.filter("length > 1000").to_pandas()) == 0


def test_steps(view, model):
    n = model[0]["length"] + model[1]["length"] // 2 + 1
    frame = view.steps(["reward", "obs", "note", "frame", "points"], n=n)
    index = [(number, step) for number, m in enumerate(model) for step in range(m["length"])][:n]
    assert frame.index.tolist() == index
    assert frame.index.names == ["trajectory", "step"]
    for (number, step), row in zip(index, frame.to_dict("records"), strict=True):
        m = model[number]
        assert row["reward"] == m["reward"][step]
        assert [row[f"obs[{i}]"] for i in range(3)] == m["obs"][step].tolist()
        assert row["note"] == m["note"][step]
        assert np.array_equal(row["frame"], m["frame"][step])
        assert np.array_equal(row["points"], m["points"][step])
    assert list(view.steps().columns) == ["obs[0]", "obs[1]", "obs[2]", "reward", "note"]
    assert isinstance(view.steps(n=0), pd.DataFrame)


def test_read_is_concatenation(view, model):
    chosen = [7, 8, 9, 2, 11]
    part = view.take(chosen)
    for name in ("obs", "frame", "reward"):
        assert np.array_equal(part.read(name), np.concatenate([model[n][name] for n in chosen]))
    assert part.read("note").tolist() == [note for n in chosen for note in model[n]["note"]]
    out = np.empty((sum(model[n]["length"] + 1 for n in chosen), 3), np.float32)
    assert part.read("obs", out=out).base is out or part.read("obs", out=out) is out
    with pytest.raises(trajstore.SelectionError, match="out is"):
        part.read("obs", out=out[:-1])
    with pytest.raises(trajstore.UnknownColumnError, match="'nothing'"):
        part.read("nothing")


def test_column_indexing_is_that_of_an_array(view, model):
    column, array = view[3]["obs"], model[3]["obs"]
    n = len(array)
    assert (len(column), column.shape, column.dtype) == (n, array.shape, "float32")
    for key in (
        slice(None),
        slice(1, 3),
        slice(-2, None),
        slice(None, None, -1),
        slice(None, None, 3),
        slice(n, None),
        slice(5, 2),
    ):
        assert np.array_equal(column[key], array[key])
    assert np.array_equal(column[-1], array[-1])
    assert np.array_equal(column[1:, 0], array[1:, 0])
    assert np.array_equal(np.asarray(column), array)
    with pytest.raises(IndexError, match=f"row {n} of column 'obs'"):
        column[n]
    with pytest.raises(trajstore.SelectionError):
        column["x"]


def test_sample_draws_what_is_there(view, model):
    batch = view.sample(200, seed=3, columns=["obs", "reward", "note", "points", "task", "trajectory", "step"])
    assert batch["obs"].shape == (200, 3)
    values, offsets = batch["points"]
    for row in range(200):
        m, step = model[int(batch["trajectory"][row])], int(batch["step"][row])
        assert torch.equal(batch["obs"][row], torch.from_numpy(m["obs"][step]))
        assert batch["reward"][row].item() == m["reward"][step]
        assert batch["note"][row] == m["note"][step]
        assert batch["task"][row] == m["task"]
        assert np.array_equal(values[offsets[row] : offsets[row + 1]].numpy(), m["points"][step])
    again = view.sample(200, seed=3, columns=["obs"])
    assert torch.equal(again["obs"], batch["obs"])
    assert not torch.equal(view.sample(200)["obs"], view.sample(200)["obs"])


def test_virtual_columns_mark_ends(view, model):
    columns = ["trajectory", "step", "is_first", "is_last", "terminated", "truncated"]
    with view.loader(64, order="sequential", columns=columns) as loader:
        rows = [{k: b[k][i].item() for k in columns} for b in loader for i in range(len(b["step"]))]
    assert len(rows) == sum(m["length"] for m in model)
    for row in rows:
        number, step = row["trajectory"], row["step"]
        last = step == model[number]["length"] - 1
        assert row["is_first"] == (step == 0)
        assert row["is_last"] == last
        assert row["terminated"] == (last and number % 2 == 0)
        assert row["truncated"] == (last and number % 2 == 1)


def test_random_windows_are_uniform_over_anchors():
    with trajstore.open("memory://uniform", "a") as store:
        for length in (3, 10, 4, 1, 7):
            store.append({"x": np.zeros(length)})
        store.flush()
        with store.trajectories.loader(1000, window=3, seed=1, columns=["trajectory", "step"]) as loader:
            source = iter(loader)
            counts = {}
            for _ in range(20):
                batch = next(source)
                for key in zip(batch["trajectory"][:, 0].tolist(), batch["step"][:, 0].tolist(), strict=True):
                    counts[key] = counts.get(key, 0) + 1
    anchors = [(t, s) for t, length in enumerate((3, 10, 4, 1, 7)) for s in range(length - 2)]
    assert sorted(counts) == anchors
    expected = 20_000 / len(anchors)
    chi2 = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi2 < 40  # 15 degrees of freedom: p = 0.0005


def test_orders_are_functions_of_their_arguments(view):
    def first(n, **arguments):
        with view.loader(16, window=2, columns=["obs"], **arguments) as loader:
            source = iter(loader)
            return [next(source)["obs"] for _ in range(n)]

    assert all(map(torch.equal, first(3, seed=5), first(3, seed=5)))
    assert not torch.equal(first(1, seed=5)[0], first(1, seed=6)[0])
    one, two = first(2, seed=5)
    assert not torch.equal(one, two)


def test_loader_refuses_nonsense(view):
    with pytest.raises(trajstore.SelectionError, match="longest has"):
        view.loader(4, window=1000)
    with pytest.raises(trajstore.SelectionError, match="order='shuffel'"):
        view.loader(4, order="shuffel")
    with pytest.raises(trajstore.SelectionError, match="batch_size=0"):
        view.loader(0)
    with pytest.raises(trajstore.UnknownColumnError, match="virtual columns are"):
        view.loader(4, columns=["nothing"])
    with pytest.raises(TypeError, match="endless"):
        len(view.loader(4))
    loader = view.loader(4)
    source = iter(loader)
    next(source)
    loader.close()
    with pytest.raises(trajstore.ClosedError):
        next(source)
    assert len(view.loader(7, order="sequential", drop_last=True, epochs=2)) == 2 * (view.num_steps // 7)


def test_nested_columns_come_back_nested():
    with trajstore.open("memory://nested", "a") as store:
        store.append({"obs": {"a": {"b": np.arange(4)}, "c": np.ones((4, 2))}, "action": np.arange(3)})
        store.flush()
        t = store.trajectories[0]
        assert t["obs"]["a"]["b"][:].tolist() == [0, 1, 2, 3]
        assert t["obs/a/b"][1] == 1
        assert t.read()["obs"]["c"].shape == (4, 2)
        batch = store.trajectories.sample(5, columns=["obs"])
        assert set(batch) == {"obs"}
        assert batch["obs"]["c"].shape == (5, 2)
        with pytest.raises(trajstore.UnknownColumnError, match="'obs/a/b'"):
            t["obs/x"]


@pytest.mark.parametrize(
    ("expression", "count"),
    [
        ("created_at > '2026-01-01'", 2),
        ("created_at > '2026-01-01T00:00:00Z'", 2),
        ("created_at > '2026-01-01 01:00:00+01:00' and length > 2", 1),
        ("created_at < '2026-01-01'", 0),
        ("created_at > @some_day", 2),
    ],
)
def test_times_are_written_with_or_without_a_zone(tmp_path, expression, count):
    with trajstore.open(tmp_path / "times", "a") as store:
        for length in (2, 3):
            store.append({"reward": np.ones(length)})
        store.flush()
        for some_day in (dt.datetime(2026, 1, 1), dt.datetime(2026, 1, 1, tzinfo=dt.UTC)):
            assert len(store.trajectories.filter(expression, some_day=some_day)) == count
        with pytest.raises(SelectionError, match=r"name 'true' is not defined \(write True, False\)"):
            store.trajectories.filter("terminated == true")
        with pytest.raises(SelectionError, match='with two "="'):
            store.trajectories.filter("length = 3")
