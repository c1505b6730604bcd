"""Several trajectories at once: the same as one after the other, and all or none."""

from __future__ import annotations

import uuid
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trajstore
from tests.support.rare import examples
from tests.support.strategies import bits, columns, trajectory
from trajstore import Column
from trajstore.errors import (
    ColumnTypeError,
    LengthError,
    MetadataError,
    MissingColumnError,
    ReadOnlyError,
    SchemaError,
    TrajstoreError,
    UnknownColumnError,
)
from trajstore.names import nest

RELAXED = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def fresh_url():
    return f"memory://append_many/{uuid.uuid4().hex}"


def end_to_end(parts):
    """Rows of several trajectories as one column: arrays, tensors or lists."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    if isinstance(first, list):
        return [row for part in parts for row in part]
    return torch.cat(parts)


@pytest.fixture
def store():
    with trajstore.open(fresh_url(), "a") as store:
        yield store


@given(
    schema=columns(),
    seed=st.integers(0, 2**32 - 1),
    lots=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=3),
    look=st.booleans(),
)
@settings(RELAXED, max_examples=examples(50))
def test_equals_appending_one_after_the_other(schema, seed, lots, look):
    rng = np.random.default_rng(seed)
    schema = [replace(c, presence="required") for c in schema]
    with (
        trajstore.open(fresh_url(), "a", schema=schema) as one,
        trajstore.open(fresh_url(), "a", schema=schema) as many,
    ):
        for lengths in lots:
            flats = [trajectory(rng, schema, n) for n in lengths]
            ended = [bool(rng.integers(2)) for _ in lengths]
            fields = [{"number": n} if n % 2 else {} for n in lengths]
            for flat, end, about in zip(flats, ended, fields, strict=True):
                one.append(nest(flat), terminated=end, truncated=not end, metadata=about, task="pick")
            joined = {c.path: end_to_end([flat[c.path] for flat in flats]) for c in schema}
            refs = many.append_many(
                nest(joined),
                lengths,
                terminated=ended,
                truncated=[not end for end in ended],
                metadata=fields,
                task="pick",
            )
            assert len(refs) == len(lengths)
            if look:
                assert_same(many.trajectories, one.trajectories)
        one.flush()
        many.flush()
        assert_same(many.trajectories, one.trajectories)
        assert many.schema == one.schema
        assert [ref.id for ref in refs] == many.trajectories.ids[-len(refs) :].tolist()


def assert_same(found, expected):
    names = ["length", "terminated", "truncated", "task", "number"]
    tables = [view.to_pandas().reindex(columns=names) for view in (found, expected)]
    assert tables[0].equals(tables[1])
    for a, b in zip(found, expected, strict=True):
        assert a.columns == b.columns
        for path in a.columns:
            assert bits(a.column(path)[:]) == bits(b.column(path)[:])


def test_an_empty_store_learns_its_columns(store):
    """A column of one row more per trajectory is one of states."""
    store.append_many({"obs": np.arange(8), "action": np.arange(5), "name": list("abcde")}, [2, 2, 1], terminated=True)
    view = store.trajectories
    assert store.schema["obs"].extra == 1
    assert [t["obs"][:].tolist() for t in view] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [t["action"][:].tolist() for t in view] == [[0, 1], [2, 3], [4]]
    assert [t["name"][:].tolist() for t in view] == [["a", "b"], ["c", "d"], ["e"]]
    assert all(t.terminated and not t.truncated for t in view)


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8", "uint64", "bool"])
def test_the_return_of_each_is_its_own(store, dtype):
    rng = np.random.default_rng(0)
    lengths = [3, 1, 40, 7]
    rewards = (rng.normal(size=51) * 20).astype(dtype)
    store.append_many({"reward": rewards}, lengths)
    parts = np.split(rewards, np.cumsum(lengths)[:-1])
    found = store.trajectories.to_pandas()
    np.testing.assert_allclose(
        found[next(c for c in found.columns if c in ("return", "reward_sum"))],
        [p.astype(np.float64).sum() for p in parts],
    )


def test_they_are_committed_together_whatever_the_size_of_a_segment():
    with trajstore.open(fresh_url(), "a", segment_bytes=64) as store:
        for _ in range(5):
            store.append_many({"a": np.arange(100)}, [10] * 10)
        store.flush()
        counts = store.versions()["trajectories"].tolist()
        assert all(n % 10 == 0 for n in counts)
        assert counts[0] == 50
        assert len({t.uuid for t in store.trajectories}) == 50


def test_they_share_a_segment_with_what_came_before(store):
    store.append({"a": np.arange(3)})
    store.append_many({"a": np.arange(5)}, [1, 4])
    store.flush()
    assert store.usage().segments == 1
    assert store.trajectories.read("a").tolist() == [0, 1, 2, 0, 1, 2, 3, 4]


SCHEMA = [Column(path="a", dtype="int64"), Column(path="s", dtype="float32", extra=1), Column(path="t", dtype="string")]
GOOD = {"a": np.arange(5), "s": np.zeros(7, np.float32), "t": list("abcde")}


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "match"),
    [
        ({"a": np.arange(4)}, {}, LengthError, r"column 'a' has 4 rows, expected 5"),
        ({"s": np.zeros(5, np.float32)}, {}, LengthError, r"column 's' has 5 rows, expected 7.*final observation"),
        ({"t": list("abcd")}, {}, LengthError, "column 't' has 4 rows"),
        ({}, {"lengths": [2, 4]}, LengthError, "expected 6"),
        ({}, {"lengths": []}, LengthError, "expected one number"),
        ({}, {"lengths": [5, 0]}, LengthError, "from 1 on"),
        ({}, {"lengths": [6, -1]}, LengthError, "from 1 on"),
        ({}, {"terminated": [True]}, LengthError, r"terminated of shape \[1\], expected one for each of 2"),
        ({}, {"truncated": np.zeros((2, 1), bool)}, LengthError, "truncated of shape"),
        ({}, {"metadata": [{}]}, LengthError, "metadata of 1 trajectories, lengths of 2"),
        ({}, {"metadata": [{"k": 1}, {"k": "one"}]}, MetadataError, "'k'"),
        ({}, {"metadata": [{}, {"length": 1}]}, MetadataError, "reserved"),
        ({}, {"metadata": [{}, {"k": 1}], "k": 2}, SchemaError, "given twice"),
        ({}, {"k": object()}, MetadataError, "'k' is a object"),
        ({"a": np.arange(5.0)}, {}, ColumnTypeError, "'a'"),
        ({"extra": np.arange(5)}, {}, UnknownColumnError, "'extra'"),
        ({"t": None}, {}, MissingColumnError, "'t' missing"),
    ],
)
@pytest.mark.parametrize("look", [False, True])
def test_what_does_not_fit_appends_nothing(changes, arguments, error, match, look):
    with trajstore.open(fresh_url(), "a", schema=SCHEMA) as store:
        if look:
            assert len(store.trajectories) == 0
        tree = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
        with pytest.raises(error, match=match):
            store.append_many(tree, **{"lengths": [2, 3], **arguments})
        assert store.pending == 0
        assert store.schema.metadata == {}
        store.append_many(GOOD, [2, 3], k="a text")
        assert [t["t"][:].tolist() for t in store.trajectories] == [["a", "b"], ["c", "d", "e"]]
        assert [t.metadata for t in store.trajectories] == [{"k": "a text"}] * 2


def test_a_reader_appends_nothing(store):
    store.append_many(GOOD, [2, 3])
    store.flush()
    with trajstore.open(store.url) as reader, pytest.raises(ReadOnlyError):
        reader.append_many(GOOD, [2, 3])


def test_memory_that_runs_out_in_the_middle_leaves_all_or_none(monkeypatch):
    with trajstore.open(fresh_url(), "a", schema=SCHEMA) as store:
        store.append_many(GOOD, [2, 3], k=0)
        monkeypatch.setattr(pa, "concat_arrays", _out_of_memory)
        builder = next(iter(store._writer._backlog.open.shared.values()))
        monkeypatch.setattr(builder, "end_trajectory", _out_of_memory)
        with pytest.raises(MemoryError):
            store.append_many(GOOD, [1, 4], k=1)
        monkeypatch.undo()
        store.append_many(GOOD, [4, 1], k=2)
        store.flush()
        assert store.trajectories.lengths.tolist() == [2, 3, 4, 1]
        for t in store.trajectories:
            assert len(t["s"][:]) == t.length + 1
        assert store.trajectories.read("a").tolist() == [0, 1, 2, 3, 4] * 2


def _out_of_memory(*_, **__):
    raise MemoryError


def test_more_than_memory_holds_is_seen_once_it_is_committed():
    """What does not fit in the page cache beside the rest is committed when somebody looks, and only then."""
    schema = [Column(path="obs", dtype="int64", shape=(32,), page_rows=4), Column(path="note", dtype="string")]
    with trajstore.open(fresh_url(), "a", schema=schema, cache_bytes=16_000) as store:
        assert len(store.trajectories) == 0
        expected = []
        versions = []
        for number in range(30):
            rows = np.arange(12)[:, None].repeat(32, 1) + 100 * number
            store.append_many({"obs": rows, "note": [str(r[0]) for r in rows]}, [5, 7])
            expected.append(rows)
            if number % 3 == 2:
                view = store.trajectories
                versions.append(store.version)
                np.testing.assert_array_equal(view.read("obs"), np.concatenate(expected))
                assert view.read("note").tolist() == [str(r[0]) for rows in expected for r in rows]
                assert not store._writer.hides
                last = len(view) - 1
                batch = view.gather([last, 0, last - 1], [6, 0, 4], columns=["obs", "note"])
                assert batch["obs"][:, 0].tolist() == [100 * number + 11, 0, 100 * number + 4]
        assert versions[-1] > 1, "some did not fit"
        assert len(set(versions)) > 3


def test_what_fits_is_seen_without_a_commit():
    with trajstore.open(fresh_url(), "a") as store:
        store.append_many({"a": np.arange(4)}, [1, 3])
        assert len(store.trajectories) == 2  # the first look commits
        for number in range(5):
            store.append_many({"a": np.arange(4) + number}, [2, 2])
            assert len(store.trajectories) == 4 + 2 * number
            assert store.version == 1
        with pytest.raises(TrajstoreError):
            store.append_many({"a": ["text"] * 4}, [2, 2])
        assert len(store.trajectories) == 12
