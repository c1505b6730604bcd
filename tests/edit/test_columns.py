"""``Store.add_column``: what functions get and give, what is refused, and that nothing is lost or computed twice."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

import trajstore
from tests.edit.killed import again, kill_everywhere
from tests.edit.stores import append, assert_holds, filled, length_of, metadata_of, numbered
from tests.support.kinds import every_kind
from tests.support.strategies import rows
from trajstore import Column
from trajstore.edit import columns as derived
from trajstore.edit import inputs
from trajstore.errors import (
    ColumnNameError,
    ColumnShapeError,
    ColumnTypeError,
    LengthError,
    ReadOnlyError,
    SchemaConflictError,
    SelectionError,
    UnknownColumnError,
)
from trajstore.read.segment import RowRange, SegmentReader
from trajstore.schema import Schema
from trajstore.storage.local import LocalFilesystem
from trajstore.storage.workers import Workers
from trajstore.stored import to_user
from trajstore.values import check_rows, rows_of
from trajstore.write.blocks import BlockPool
from trajstore.write.segment import SegmentBuilder

NUMBERS = [0, 6, 3, 9, 4, 12, 7]


@pytest.fixture
def url(tmp_path):
    return filled(tmp_path / "store", NUMBERS, per_commit=3)


def double(trajectory):
    return trajectory["reward"] * 2


def doubled(number):
    return numbered(number)["reward"] * 2


def values(store, path, numbers):
    """What a store shows of a column, by the numbers of those that have it."""
    view = store.trajectories
    assert [one.metadata["number"] for one in view] == list(numbers)
    return {one.metadata["number"]: one[path][:].tolist() for one in view if path in one}


# What the function gets


def test_all_columns_of_fixed_shape_come_nested(url):
    seen = {}

    def note(trajectory):
        seen[int(trajectory["action"][0, 0])] = trajectory
        return trajectory["reward"]

    with trajstore.open(url, "a") as store:
        store.add_column("same", note, threads=1)
    assert sorted(seen) == sorted(NUMBERS)
    for number, found in seen.items():
        tree = numbered(number)
        assert set(found) == {"obs", "action", "reward"}
        assert set(found["obs"]) == {"image", "state"}
        np.testing.assert_array_equal(found["obs"]["image"], tree["obs"]["image"])
        np.testing.assert_array_equal(found["obs"]["state"], tree["obs"]["state"])
        np.testing.assert_array_equal(found["action"], tree["action"])


def test_columns_fields_and_virtual_columns_come_when_named(url):
    seen = {}
    names = ["obs", "note", "points", "terminated", "truncated", "is_first", "is_last", "step", "number", "task"]

    def note(trajectory):
        seen[int(trajectory["number"][0])] = trajectory
        return trajectory["obs"]["state"]

    with trajstore.open(url, "a") as store:
        store.add_column("same", note, columns=names, threads=1)
    for number in NUMBERS:
        length, found, tree = length_of(number), seen[number], numbered(number)
        assert set(found) == {"obs", *names[1:]}
        assert found["note"].tolist() == tree["note"].tolist()
        assert [part.tolist() for part in found["points"]] == [part.tolist() for part in tree["points"]]
        last = [False] * (length - 1) + [True]
        assert found["is_last"].tolist() == last
        assert found["is_first"].tolist() == last[::-1]
        assert found["terminated"].tolist() == [end and number % 2 == 0 for end in last]
        assert found["truncated"].tolist() == [end and number % 3 == 0 for end in last]
        assert found["step"].tolist() == list(range(length))
        assert found["number"].tolist() == [number] * length
        assert found["task"].tolist() == [metadata_of(number).get("task")] * length


def test_long_segments_are_read_in_chunks(url, monkeypatch):
    with trajstore.open(url, "a") as store:
        store.delete([1, 4])
        monkeypatch.setattr(inputs, "_CHUNK_BYTES", 100)
        store.add_column("double", double)
        left = [n for i, n in enumerate(NUMBERS) if i not in (1, 4)]
        assert values(store, "double", left) == {n: doubled(n).tolist() for n in left}


# What it gives


@pytest.mark.parametrize(
    ("function", "column"),
    [
        (lambda t: t["reward"].astype(np.float16), Column(path="x", dtype="float16", presence="derived")),
        (
            lambda t: torch.from_numpy(t["obs"]["state"]).to(torch.bfloat16),
            Column(path="x", dtype="bfloat16", extra=1, presence="derived"),
        ),
        (lambda t: t["reward"].tolist(), Column(path="x", dtype="float64", presence="derived")),
        (lambda t: [[1, 2, 3]] * len(t["reward"]), Column(path="x", dtype="int64", shape=(3,), presence="derived")),
        (
            lambda t: t["obs"]["image"].astype("complex64"),
            Column(path="x", dtype="complex64", shape=(4, 3), extra=1, presence="derived"),
        ),
        (lambda t: [f"{r}" for r in t["reward"]], Column(path="x", dtype="string", presence="derived")),
        (
            lambda t: np.arange(len(t["reward"])).astype("datetime64[s]"),
            Column(path="x", dtype="datetime64[s]", presence="derived"),
        ),
        (
            lambda t: torch.ones(len(t["reward"]), 2, requires_grad=True),
            Column(path="x", dtype="float32", shape=(2,), presence="derived"),
        ),
    ],
    ids=["float16", "bfloat16", "list", "lists", "complex", "strings", "times", "tensor"],
)
def test_the_first_result_says_what_the_column_is(url, function, column):
    with trajstore.open(url, "a") as store:
        store.add_column("x", function)
        assert store.schema["x"] == column
        for one in store.trajectories:
            wanted = rows_of("x", function(one.read()))
            found = one["x"][:]
            assert len(found) == one.length + column.extra
            np.testing.assert_array_equal(
                np.asarray(torch.as_tensor(found).float()) if isinstance(found, torch.Tensor) else found,
                np.asarray(to_user(column, check_rows(column, wanted)).float())
                if column.dtype == "bfloat16"
                else to_user(column, check_rows(column, wanted)),
            )


def test_a_column_can_be_said_beforehand(url):
    wanted = Column(path="deep/x", dtype="float32", shape=(2,), page_rows=4, codec="zstd")
    with trajstore.open(url, "a") as store:
        store.add_column(wanted, lambda t: [[1, 2]] * len(t["reward"]), columns=["reward"])
        found = store.schema["deep/x"]
        assert (found.presence, found.page_rows, found.codec, found.dtype) == ("derived", 4, "zstd", "float32")
        assert store.trajectories[1]["deep"]["x"][:].tolist() == [[1.0, 2.0]] * length_of(6)
        with pytest.raises(ColumnTypeError, match="trajectory 0: column 'list' is float32, found float64"):
            store.add_column(Column(path="list", dtype="float32"), lambda t: t["reward"])


@pytest.mark.parametrize(
    ("later", "error", "message"),
    [
        (lambda t: t["reward"].astype(np.float32), ColumnTypeError, "is float64, found float32"),
        (lambda t: t["action"].astype(float), ColumnShapeError, r"found shape \[2\]"),
        (lambda t: t["reward"][1:], LengthError, r"has 2 rows, expected 3: one for each step"),
        (lambda t: t["obs"]["state"], LengthError, r"has 4 rows, expected 3"),
        (lambda t: [object()] * 3, ColumnTypeError, "object"),
        (lambda t: 1.0, ColumnShapeError, "single float"),
    ],
    ids=["dtype", "shape", "short", "long", "object", "number"],
)
def test_a_result_unlike_the_first_names_its_trajectory_and_changes_nothing(url, later, error, message):
    with trajstore.open(url, "a") as store:
        version = store.version
        with pytest.raises(error, match=rf"^trajectory 3: .*'x'.*{message}|^trajectory 3: .*{message}"):
            store.add_column("x", lambda t: later(t) if t["action"][0, 0] == 9 else t["reward"])
        assert store.refresh() == version
        assert "x" not in store.schema


def test_a_first_result_of_no_fitting_length_is_refused(url):
    with (
        trajstore.open(url, "a") as store,
        pytest.raises(LengthError, match=r"trajectory 0: .*has 3 rows, expected 1 or 2"),
    ):
        store.add_column("x", lambda t: np.zeros(3))


def test_an_error_of_the_function_is_raised_as_it_is_with_the_trajectory(url):
    def fails(trajectory):
        if trajectory["action"][0, 0] == 4:
            raise ZeroDivisionError("mine")
        return trajectory["reward"]

    with trajstore.open(url, "a") as store:
        version = store.version
        with pytest.raises(ZeroDivisionError, match="mine") as caught:
            store.add_column("x", fails)
        assert caught.value.__notes__ == ["This was column 'x' of trajectory 4."]
        assert store.version == store.refresh() == version


# What is refused


def test_names_that_cannot_be(url):
    with trajstore.open(url, "a") as store:
        for name, error, message in [
            ("reward", SchemaConflictError, "'reward' is appended with the trajectories"),
            ("obs", ColumnNameError, "parent"),
            ("reward/x", ColumnNameError, "parent"),
            ("task", SchemaConflictError, "name of a column"),
            ("a//b", ColumnNameError, "empty part"),
        ]:
            with pytest.raises((error, trajstore.MetadataError), match=message):
                store.add_column(name, double)
        store.add_column("double", double)
        with pytest.raises(SchemaConflictError, match="dtype"):
            store.add_column(Column(path="double", dtype="int8"), double, replace=True)
        assert store.version == 4


def test_old_values_are_not_replaced_by_those_of_another_type(url):
    with trajstore.open(url, "a") as store:
        store.add_column("double", double)
        dtype = store.schema["double"].dtype
        expected = rf"trajectory \d+: column 'double' is {dtype}, found bool; have the function return {dtype}, or give"
        with pytest.raises(ColumnTypeError, match=expected):
            store.add_column("double", lambda t: t["reward"] > 0, replace=True)


def test_inputs_that_are_not_there(url):
    with trajstore.open(url, "a") as store:
        with pytest.raises(UnknownColumnError, match="nothing"):
            store.add_column("x", double, columns=["nothing"])
        with pytest.raises(SelectionError, match=r"expected a list of names: columns=\['reward'\]"):
            store.add_column("x", double, columns="reward")  # type: ignore[arg-type]
        store.add_column("double", double)
        append(store, 20)
        with pytest.raises(SelectionError, match="'double' is lacking from 1 of 8"):
            store.add_column("x", lambda t: t["double"], columns=["double"])
        assert "x" not in store.schema


def test_stores_without_trajectories_or_that_are_only_read(tmp_path, url):
    with trajstore.open(tmp_path / "empty", "a") as store, pytest.raises(SelectionError, match="append some first"):
        store.add_column("x", double)
    with trajstore.open(url) as store, pytest.raises(ReadOnlyError):
        store.add_column("x", double)


def test_a_derived_column_is_not_appended(url):
    with trajstore.open(url, "a") as store:
        store.add_column("double", double)
        for call in (
            lambda: store.append({**numbered(1), "double": doubled(1)}),
            lambda: store.append_many({"reward": np.ones(2), "double": np.ones(2)}, [1, 1]),
            lambda: store.begin().add(double=1.0),
        ):
            with pytest.raises(ColumnNameError, match=r"'double' is derived .*store.add_column\('double', ...\)"):
                call()
        with pytest.raises(SchemaConflictError, match="derived"):
            store.declare([Column(path="double", dtype="float64", presence="optional")])
    with pytest.raises(SchemaConflictError, match="derived"):
        trajstore.open(url, "a", schema=[Column(path="double", dtype="float64", presence="optional")])


# What is computed, and when


def test_what_lacks_it_is_computed_when_asked_again(url):
    calls = []

    def counted(trajectory):
        calls.append(int(trajectory["action"][0, 0]))
        return trajectory["reward"] * 2

    with trajstore.open(url, "a") as store:
        store.add_column("double", counted)
        assert sorted(calls) == sorted(NUMBERS)
        version = store.version
        assert store.add_column("double", counted) == version, "nothing lacks it"
        append(store, 20)
        append(store, 13)
        calls.clear()
        assert store.add_column("double", counted) == version + 2, "it flushes what was appended"
        assert sorted(calls) == [13, 20]
        everyone = [*NUMBERS, 20, 13]
        assert values(store, "double", everyone) == {n: doubled(n).tolist() for n in everyone}
        assert store.versions().loc[version + 2, "operation"] == "add-column"
    with trajstore.open(url) as store:
        assert values(store, "double", everyone) == {n: doubled(n).tolist() for n in everyone}


def test_replacing_computes_all_and_commits_once(url):
    with trajstore.open(url, "a") as store:
        store.add_column("double", double)
        store.add_column("other", lambda t: t["reward"] - 1)
        append(store, 20)
        version = store.add_column(
            "double", lambda t: t["double"] * 2 if "double" in t else t["reward"] * 5, replace=True
        )
        everyone = [*NUMBERS, 20]
        assert values(store, "double", everyone) == {n: (numbered(n)["reward"] * 5).tolist() for n in everyone}
        assert values(store, "other", everyone) == {n: (numbered(n)["reward"] - 1).tolist() for n in NUMBERS}
        assert version == 7
        assert all(len(s.layers) <= 2 for s in store.trajectories._table.segments)
    with trajstore.open(url, version=4) as old:
        assert values(old, "double", NUMBERS) == {n: doubled(n).tolist() for n in NUMBERS}


def test_finished_segments_are_committed_and_the_next_run_goes_on(url, monkeypatch):
    monkeypatch.setattr(derived, "COMMIT_INTERVAL_S", 0.0)
    calls = []

    def fails_at_the_end(trajectory):
        number = int(trajectory["action"][0, 0])
        calls.append(number)
        if number == NUMBERS[-1]:
            raise KeyboardInterrupt
        return trajectory["reward"] * 2

    with trajstore.open(url, "a") as store:
        with pytest.raises(KeyboardInterrupt):
            store.add_column("double", fails_at_the_end, threads=1)
        done = values_after_refresh(store)
        assert done
        assert set(done) <= set(NUMBERS[:6])
        calls.clear()
        store.add_column("double", lambda t: (calls.append(int(t["action"][0, 0])), double(t))[1], threads=1)
        assert sorted(calls) == sorted(set(NUMBERS) - set(done))
        assert values(store, "double", NUMBERS) == {n: doubled(n).tolist() for n in NUMBERS}


def values_after_refresh(store):
    store.refresh()
    return values(store, "double", NUMBERS)


def test_nothing_is_lost_by_a_kill_and_the_next_run_finishes(url, tmp_path):
    left = kill_everywhere("add column", url, url, tmp_path / "killed", every=11)
    assert len(left) > 3
    partly = 0
    for target in left:
        with trajstore.open(target) as store:
            assert store.version >= 3
            found = values(store, "double", NUMBERS)
            assert found == {n: doubled(n).tolist() for n in found}
            partly += 0 < len(found) < len(NUMBERS)
        again("add column", url, target)
        with trajstore.open(target) as store:
            assert values(store, "double", NUMBERS) == {n: doubled(n).tolist() for n in NUMBERS}
    assert partly


def test_others_append_and_delete_meanwhile(url, monkeypatch):
    monkeypatch.setattr(derived, "COMMIT_INTERVAL_S", 0.0)
    seen: list[int] = []

    def disturbed(trajectory):
        number = int(trajectory["action"][0, 0])
        seen.append(number)
        with trajstore.open(url, "a") as other:
            if number in (6, 7):
                append(other, 30 + number)
            if number == 12:
                other.delete([0, 5])
        return trajectory["reward"] * 2

    with trajstore.open(url, "a") as store:
        store.add_column("double", disturbed, threads=1)
        everyone = [n for n in NUMBERS if n not in (0, 12)] + [36, 37]
        found = values(store, "double", everyone)
        assert found == {n: doubled(n).tolist() for n in everyone if n < 30}
        assert store.trajectories.ids.tolist() == [1, 2, 3, 4, 6, 7, 8]
        assert sorted(seen) == sorted(NUMBERS)


def test_two_handles_add_columns_at_once(url):
    with trajstore.open(url, "a") as one, trajstore.open(url, "a") as two:
        barrier = threading.Barrier(2)

        def together(store, path, factor):
            def function(trajectory):
                if trajectory["action"][0, 0] == NUMBERS[0]:
                    barrier.wait(30)
                return trajectory["reward"] * factor

            store.add_column(path, function)

        threads = [threading.Thread(target=together, args=a) for a in ((one, "a", 2), (two, "b", 3))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        one.refresh()
        assert values(one, "a", NUMBERS) == {n: (numbered(n)["reward"] * 2).tolist() for n in NUMBERS}
        assert values(one, "b", NUMBERS) == {n: (numbered(n)["reward"] * 3).tolist() for n in NUMBERS}


def test_rows_of_deleted_trajectories_are_zero(url):
    with trajstore.open(url, "a") as store:
        store.delete([0, 2, 4])
        store.add_column("double", double)
        store.add_column("text", lambda t: [f"{r}" for r in t["reward"]])
        left = [n for i, n in enumerate(NUMBERS) if i not in (0, 2, 4)]
        assert values(store, "double", left) == {n: doubled(n).tolist() for n in left}
        view = store.trajectories
        entry = view._table.segments[0]
        assert entry.steps == sum(length_of(n) for n in NUMBERS[:3])
        reader = store._access.readers.open(entry, store.schema)
        whole = reader.read("double", RowRange(0, entry.steps))
        assert whole.tolist() == [0.0] * length_of(0) + doubled(6).tolist() + [0.0] * length_of(3)
        texts = reader.read("text", RowRange(0, entry.steps)).to_pylist()
        assert texts == [""] * length_of(0) + [f"{r}" for r in numbered(6)["reward"]] + [""] * length_of(3)


def test_a_trajectory_that_is_there_twice_is_computed_once(url, tmp_path):
    with trajstore.open(url) as store:
        store.trajectories.take([1, 1, 0, 1]).save(tmp_path / "twice", share="reference")
    calls = []
    with trajstore.open(tmp_path / "twice", "a") as store:
        store.add_column("double", lambda t: (calls.append(1), double(t))[1])
        assert [one["double"][:].tolist() for one in store.trajectories] == [doubled(n).tolist() for n in (6, 6, 0, 6)]
    assert len(calls) == 2


def test_merged_manifests_keep_layers(tmp_path):
    with trajstore.open(tmp_path / "store", "a") as store:
        for number in range(9):
            append(store, number)
            store.flush()
            if number % 3 == 1:
                store.add_column("double", double)
        assert len(store._current().snapshot.manifests) < 9
        found = values(store, "double", range(9))
        assert found == {n: doubled(n).tolist() for n in range(8)}


def test_in_memory_and_without_a_disk():
    with trajstore.open("memory://tests/columns", "a") as store:
        for number in NUMBERS:
            append(store, number)
        store.add_column("double", double)
        assert values(store, "double", NUMBERS) == {n: doubled(n).tolist() for n in NUMBERS}


def test_reclaiming_bytes_keeps_layers(url):
    with trajstore.open(url, "a") as store:
        store.add_column("double", double)
        store.delete([0], reclaim=True)
        assert values(store, "double", NUMBERS[1:]) == {n: doubled(n).tolist() for n in NUMBERS[1:]}


def test_what_was_appended_is_untouched(url):
    with trajstore.open(url, "a") as store:
        version = store.version
        store.add_column("double", double)
    with trajstore.open(url, version=version) as store:
        assert_holds(store.trajectories, NUMBERS)


# Rows that are skipped


def test_skipped_rows_are_zero_or_empty_in_every_kind_of_column(tmp_path):
    kinds, rng = every_kind(), np.random.default_rng(8)
    disk, workers = LocalFilesystem(str(tmp_path)), Workers(2, name="test")
    builder = SegmentBuilder(kinds, preset=None, filesystem=disk, workers=workers, blocks=BlockPool(1 << 20))
    given: dict[str, Any] = {c.path: [] for c in kinds}

    def give(steps: int) -> None:
        parts = {c.path: check_rows(c, rows_of(c.path, rows(rng, c, steps + c.extra), c)) for c in kinds}
        builder.append_rows(parts)
        builder.end_trajectory(steps)
        for path, part in parts.items():
            given[path].append(part)

    def leave(steps: int, trajectories: int) -> None:
        builder.skip(steps, trajectories)
        for column in kinds:
            given[column.path].append(steps + trajectories * column.extra)

    leave(3, 1)
    leave(4, 2)
    give(5)
    leave(9, 1)
    give(2)
    leave(1, 1)
    builder.close_pages()
    finished = builder.finish()
    disk.store(finished.objects, finished.streams)
    assert (finished.entry.steps, finished.entry.trajectories) == (24, 7)
    data = disk.read(f"segments/{builder.uuid}/pages.arrow")
    reader = SegmentReader(finished.entry, Schema(tuple(kinds)), disk, workers, data)
    for column in kinds:
        at = 0
        for part in given[column.path]:
            count = part if isinstance(part, int) else len(part)
            found = reader.read(column.path, RowRange(at, at + count))
            at += count
            if not isinstance(part, int):
                assert (
                    repr(found.to_pylist()) == repr(part.to_pylist())
                    if column.is_variable
                    else found.tobytes() == part.tobytes()
                )
            elif column.is_variable:
                assert all(not value for value in found.to_pylist())
            else:
                assert not found.view(np.uint8).any()
        assert at == 24 + 7 * column.extra
    workers.close()
    disk.close()
