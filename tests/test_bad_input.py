"""Bad input: each mistake is refused with the column, what was found and what was expected, and leaves no trace."""

from __future__ import annotations

import datetime as dt
import math

import fsspec
import numpy as np
import pandas as pd
import pytest
import torch

import trajstore
from trajstore import Column, Schema, errors
from trajstore.storage.connect import connect

SCHEMA = [
    Column(path="obs/image", dtype="uint8", shape=(2, 2), extra=1),
    Column(path="obs/state", dtype="float32", shape=(3,), extra=1),
    Column(path="action", dtype="int64"),
    Column(path="reward", dtype="float32"),
    Column(path="text", dtype="string"),
    Column(path="boxes", dtype="float32", shape=(2,), ragged=True),
    Column(path="when", dtype="datetime64[us]"),
    Column(path="note", dtype="uint8", presence="optional"),
]


def good(length=3):
    rng = np.random.default_rng(length)
    return {
        "obs/image": rng.integers(0, 256, (length + 1, 2, 2), dtype=np.uint8),
        "obs/state": rng.random((length + 1, 3), dtype=np.float32),
        "action": rng.integers(0, 9, length),
        "reward": rng.random(length, dtype=np.float32),
        "text": [f"step {i}" for i in range(length)],
        "boxes": [rng.random((i, 2), dtype=np.float32) for i in range(length)],
        "when": np.arange(length).astype("datetime64[us]"),
    }


def listing(store):
    return sorted((info.key, info.nbytes) for info in store._filesystem.list_objects(""))


@pytest.fixture
def url(tmp_path):
    yield f"memory://{tmp_path}"
    fs = fsspec.filesystem("memory")
    if fs.exists(str(tmp_path)):
        fs.rm(str(tmp_path), recursive=True)


@pytest.fixture
def store(url):
    with trajstore.open(url, "x", schema=SCHEMA) as store:
        store.append(good())
        store.flush()
        yield store


def refused(store, error, words, columns, **metadata):
    """The append fails with these words, leaves nothing behind, and the next good one works."""
    before, version, schema = listing(store), store.version, store.schema
    with pytest.raises(error) as caught:
        store.append(columns, **metadata)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{message!r} does not say {word!r}"
    assert isinstance(caught.value, errors.SchemaError)
    assert store.pending == 0
    store.flush()
    assert listing(store) == before
    assert (store.version, store.schema) == (version, schema)
    return message


def appends(store, columns):
    count = len(store.trajectories)
    ref = store.append(columns)
    store.flush()
    assert len(store.trajectories) == count + 1
    assert store.trajectories[-1].uuid == ref.uuid
    return store.trajectories[-1]


MASKED = np.ma.masked_array([1, 2, 3], [False, True, False])
RECORDS = np.zeros(3, [("x", "i4"), ("y", "f4")])
AWARE = [dt.datetime(2026, 1, 1, tzinfo=dt.UTC)] * 3
OBJECTS = np.array([1, "a", None], object)

WRONG_VALUES = {
    "float array for int64": ("action", np.zeros(3), errors.ColumnTypeError, ["int64", "float64"]),
    "float64 array for float32": ("reward", np.zeros(3), errors.ColumnTypeError, ["float32", "float64"]),
    "int32 array for int64": ("action", np.zeros(3, np.int32), errors.ColumnTypeError, ["int64", "int32"]),
    "bool array for int64": ("action", np.zeros(3, bool), errors.ColumnTypeError, ["int64", "bool"]),
    "tensor of another dtype": (
        "reward",
        torch.zeros(3, dtype=torch.float16),
        errors.ColumnTypeError,
        ["float32", "float16"],
    ),
    "int8 image": ("obs/image", np.zeros((4, 2, 2), np.int8), errors.ColumnTypeError, ["uint8", "int8"]),
    "strings for numbers": ("action", ["a", "b", "c"], errors.ColumnTypeError, ["int64", "string"]),
    "numbers for strings": ("text", [1, 2, 3], errors.ColumnTypeError, ["string", "int64"]),
    "bytes for strings": ("text", [b"a", b"b", b"c"], errors.ColumnTypeError, ["string", "bytes"]),
    "one bytes among strings": ("text", ["a", b"b", "c"], errors.ColumnTypeError, ["string", "bytes"]),
    "None among strings": ("text", ["a", None, "c"], errors.ColumnTypeError, ["string", "NoneType"]),
    "a lone surrogate": ("text", ["a", "\ud800", "c"], errors.ColumnTypeError, ["UTF-8"]),
    "strings per step": ("text", np.array([["a", "b"]] * 3), errors.ColumnShapeError, ["ragged=True"]),
    "a mixed list": ("action", [1, "a", 2], errors.ColumnTypeError, ["mixes strings"]),
    "booleans among numbers": ("action", [1, True, 2], errors.ColumnTypeError, ["mixes booleans"]),
    "booleans for numbers": ("action", [True, False, True], errors.ColumnTypeError, ["int64", "bool"]),
    "None among numbers": ("action", [1, None, 2], errors.ColumnTypeError, ["object array"]),
    "objects": ("action", OBJECTS, errors.ColumnTypeError, ["object arrays have no fixed type"]),
    "objects in a list": ("action", [object()] * 3, errors.ColumnTypeError, ["object array", "numbers"]),
    "dictionaries in a list": ("action", [{}, {}, {}], errors.ColumnTypeError, ["object array", "dict"]),
    "lists of differing lengths": ("obs/state", [[1.0]] + [[1.0] * 3] * 3, errors.ColumnShapeError, ["ragged=True"]),
    "a masked array": ("action", MASKED, errors.ColumnTypeError, ["masked array", "fill it"]),
    "records": ("action", RECORDS, errors.ColumnTypeError, ["one column per field"]),
    "long double": ("reward", np.zeros(3, np.longdouble), errors.ColumnTypeError, ["use float64"]),
    "complex long double": ("reward", np.zeros(3, np.clongdouble), errors.ColumnTypeError, ["use complex128"]),
    "a sparse tensor": ("reward", torch.zeros(3).to_sparse(), errors.ColumnTypeError, ["sparse", "to_dense"]),
    "no unit": ("when", np.zeros(3, "datetime64"), errors.ColumnTypeError, ["unit is missing", "datetime64[us]"]),
    "another unit": (
        "when",
        np.zeros(3, "datetime64[ms]"),
        errors.ColumnTypeError,
        ["datetime64[us]", "datetime64[ms]"],
    ),
    "numbers for times": ("when", [1, 2, 3], errors.ColumnTypeError, ["datetime64[us]", "int64"]),
    "time zones": ("when", AWARE, errors.ColumnTypeError, ["time zones", "UTC"]),
    "time zones of pandas": ("when", pd.Series(AWARE), errors.ColumnTypeError, ["object"]),
    "int too large": ("note", [1, 256, 3], errors.ColumnTypeError, ["uint8", "exactly"]),
    "int too small": ("note", [1, -1, 3], errors.ColumnTypeError, ["uint8", "exactly"]),
    "int beyond 64 bits": ("action", [1, 2**70, 3], errors.ColumnTypeError, ["object array"]),
    "int beyond int64": ("action", [1, 2**63, 3], errors.ColumnTypeError, ["int64", "exactly"]),
    "fraction for int": ("action", [1.0, 2.5, 3.0], errors.ColumnTypeError, ["int64", "exactly"]),
    "NaN for int": ("action", [1.0, math.nan, 3.0], errors.ColumnTypeError, ["int64", "exactly"]),
    "float that float32 lacks": ("reward", [0.5, 0.1, 1.0], errors.ColumnTypeError, ["float32", "exactly"]),
    "int that float32 lacks": ("reward", [2**24 + 1, 0, 0], errors.ColumnTypeError, ["float32", "exactly"]),
    "complex for float": ("reward", [1j, 2, 3], errors.ColumnTypeError, ["float32", "complex128"]),
    "another shape": ("obs/image", np.zeros((4, 3, 2), np.uint8), errors.ColumnShapeError, ["[2, 2]", "[3, 2]"]),
    "a missing dimension": ("obs/image", np.zeros((4, 4), np.uint8), errors.ColumnShapeError, ["[2, 2]", "[4]"]),
    "a dimension too many": ("action", np.zeros((3, 1), np.int64), errors.ColumnShapeError, ["int64", "[1]"]),
    "a dimension of zero": ("obs/state", np.zeros((4, 0), np.float32), errors.ColumnShapeError, ["holds no values"]),
    "no time": ("action", 7, errors.ColumnShapeError, ["time first"]),
    "no time in an array": ("action", np.array(7), errors.ColumnShapeError, ["time first"]),
    "no time in a tensor": ("reward", torch.tensor(7.0), errors.ColumnShapeError, ["time first"]),
    "a string": ("text", "step", errors.ColumnShapeError, ["one value per step"]),
    "None": ("action", None, errors.ColumnTypeError, ["NoneType", "array"]),
    "a set": ("action", {1, 2, 3}, errors.ColumnTypeError, ["set", "array"]),
    "a generator": ("action", (i for i in range(3)), errors.ColumnTypeError, ["generator", "array"]),
    "a tensor for a ragged column": (
        "boxes",
        np.zeros((3, 5), np.float32),
        errors.ColumnShapeError,
        ["list of float32[2]"],
    ),
    "lists of another shape": ("boxes", [np.zeros((1, 3), np.float32)] * 3, errors.ColumnShapeError, ["[3]"]),
    "lists of another dtype": ("boxes", [np.zeros((1, 2))] * 3, errors.ColumnTypeError, ["float32", "float64"]),
    "lists of two shapes": (
        "boxes",
        [np.zeros((1, 2), np.float32), np.zeros((1, 3), np.float32), np.zeros((0, 2), np.float32)],
        errors.ColumnShapeError,
        ["[2]", "[3]"],
    ),
    "lists of two dtypes": (
        "boxes",
        [np.zeros((1, 2), np.float32), np.zeros((1, 2)), np.zeros((0, 2), np.float32)],
        errors.ColumnTypeError,
        ["float32", "float64"],
    ),
    "lists of lists of lists": ("boxes", [[[[1.0], [2.0, 3.0]]]] * 3, errors.SchemaError, []),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")  # torch's word about its own beta
@pytest.mark.parametrize("case", WRONG_VALUES)
def test_wrong_values_are_refused(store, case):
    path, value, error, words = WRONG_VALUES[case]
    refused(store, error, [f"'{path}'", *words], {**good(), path: value})
    appends(store, good())


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize(
    "case",
    ["objects", "records", "a masked array", "long double", "a sparse tensor", "no unit", "time zones", "a set"],
)
def test_what_cannot_be_stored_at_all_is_refused_by_a_new_store(url, case):
    path, value, error, words = WRONG_VALUES[case]
    with trajstore.open(url, "x") as store:
        refused(store, error, [f"'{path}'", *words], {path: value})
        assert len(store.schema) == 0
        appends(store, {path: np.arange(3)})


@pytest.mark.parametrize(
    "value",
    [
        [math.nan, math.inf, -math.inf],
        np.array([math.nan, math.inf, -0.0], np.float32),
        [1, 2, 3],
        [0.5, 2**24, 2.0**-149],
    ],
    ids=str,
)
def test_values_that_float32_holds_are_taken(store, value):
    expected = np.array(value, np.float32)
    assert appends(store, {**good(), "reward": value})["reward"][:].tobytes() == expected.tobytes()


def test_missing_and_unknown_columns(store):
    for path in ("action", "obs/state", "boxes"):
        columns = {k: v for k, v in good().items() if k != path}
        message = refused(store, errors.MissingColumnError, [f"'{path}'", "missing", "requires", "'reward'"], columns)
        assert "'note'" not in message, "an optional column is not asked for"
    refused(
        store,
        errors.MissingColumnError,
        ["'action', 'boxes', 'obs/image', 'obs/state'"],
        {"reward": np.zeros(3, np.float32)},
    )
    unknown = ["'velocity'", "not in the schema", "'obs/image'", "optional"]
    refused(store, errors.UnknownColumnError, unknown, {**good(), "velocity": np.zeros(3)})
    refused(store, errors.UnknownColumnError, ["'obs/depth'"], {**good(), "obs": {"depth": np.zeros(3)}})
    refused(store, errors.LengthError, ["at least one column", "empty"], {})
    appends(store, {**good(), "note": np.zeros(3, np.uint8)})


def test_lengths_that_differ(store):
    words = ["lengths differ", "'action' has 2 rows", "'obs/image' has 4 rows (one is the final observation's)"]
    refused(store, errors.LengthError, words, {**good(), "action": np.arange(2)})
    refused(store, errors.LengthError, ["'obs/image' has 3 rows"], {**good(), "obs/image": good()["obs/image"][:3]})
    refused(store, errors.LengthError, ["'text' has 4 rows"], {**good(), "text": ["a"] * 4})
    refused(store, errors.LengthError, ["'boxes' has 2 rows"], {**good(), "boxes": good()["boxes"][:2]})
    appends(store, good(1))


def test_zero_steps(store, url):
    nothing = {path: rows[: 1 if path.startswith("obs/") else 0] for path, rows in good().items()}
    refused(store, errors.LengthError, ["zero steps", "at least one"], nothing)
    refused(store, errors.LengthError, ["'action'", "at least one"], {**good(), "action": []})
    refused(store, errors.LengthError, ["zero steps"], {**nothing, "obs/image": good()["obs/image"][:0]})
    with trajstore.open(f"{url}/new", "x") as new:
        refused(new, errors.LengthError, ["'a'", "zero steps"], {"a": np.zeros(0)})
        refused(new, errors.LengthError, ["'a' has 0", "'b' has 1"], {"a": np.zeros(0), "b": np.zeros(1)})
        refused(new, errors.LengthError, ["'a' has 3", "'b' has 5"], {"a": np.zeros(3), "b": np.zeros(5)})
        refused(new, errors.LengthError, ["'c' has 5"], {"a": np.zeros(3), "b": np.zeros(4), "c": np.zeros(5)})


BAD_NAMES = [
    *("..", "a/..", "../a", "a/../b", ".", "a/./b", "/a", "/", "a/", "", "a//b", "//"),
    *(
        "a\nb",
        "a\tb",
        "\x00",
        "a\x1f",
        "\x7f",
        "a\\b",
        "a:b",
        "a*b",
        'a"b',
        "a<b",
        "a>b",
        "a|b",
        "a#b",
        "a%b",
        "a?b",
        "a[0]",
    ),
    *("__a", "a/__b", " a", "a ", "a/ b", "a.", "a\u200b", "a\u2028b", "a\ud800", "x" * 201, "ü" * 101),
    *("zarr.json", "steps.arrow", "states.arrow", "pages.arrow", "a/zarr.json", "steps.arrow/a"),
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_names_that_are_no_key(url, name):
    with trajstore.open(url, "x") as store:
        message = refused(store, errors.ColumnNameError, ["column name"], {name: np.zeros(3)})
        assert repr(name) in message or not name
        if name.strip("/") and not name.split("/")[0].endswith(".arrow"):
            refused(store, errors.ColumnNameError, ["column name"], {"obs": {name: np.zeros(3)}})
        appends(store, {"fine": np.zeros(3)})
    with pytest.raises(errors.ColumnNameError, match="column name"):
        Column(path=name, dtype="float32")


@pytest.mark.parametrize(
    "name", ["a", "obs/image", "ü", "日本/画像", "a b", "a-b_c.d", "x" * 200, "A1", "c.0", "c", "é😀"], ids=ascii
)
def test_names_that_are_keys(url, name):
    with trajstore.open(url, "x") as store:
        one = appends(store, {name: np.arange(6).reshape(3, 2), "scalar": np.arange(3)})
        assert (one[name][:] == np.arange(6).reshape(3, 2)).all()
        assert (store.trajectories.read(name) == np.arange(6).reshape(3, 2)).all()


@pytest.mark.parametrize(
    ("columns", "error", "words"),
    [
        ({"Action": 1, "action": 1}, errors.ColumnNameError, ["'Action'", "'action'", "case"]),
        ({"obs": {"A": 1}, "OBS": {"a": 1}}, errors.ColumnNameError, ["'obs/A'", "'OBS/a'", "case"]),
        ({"straße": 1, "STRASSE": 1}, errors.ColumnNameError, ["'straße'", "case"]),
        ({"obs": 1, "obs/image": 1}, errors.ColumnNameError, ["'obs'", "'obs/image'"]),
        ({"a/b/c": 1, "a/b": 1}, errors.ColumnNameError, ["'a/b'", "'a/b/c'"]),
        ({"obs": {"a": 1}, "obs/a": 1}, errors.ColumnNameError, ["'obs/a'", "twice"]),
        ({"obs": {}}, errors.ColumnNameError, ["'obs'", "empty mapping"]),
        ({3: 1}, errors.ColumnNameError, ["3", "not a string"]),
        ({"obs": {None: 1}}, errors.ColumnNameError, ["None", "'obs'", "not a string"]),
    ],
    ids=str,
)
def test_names_that_do_not_go_together(url, columns, error, words):
    def fill(tree):
        return {k: fill(v) if isinstance(v, dict) else np.zeros(3) for k, v in tree.items()}

    with trajstore.open(url, "x") as store:
        refused(store, error, words, fill(columns))
        appends(store, {"fine": np.zeros(3)})


def test_prefixes_are_held_against_each_other_whatever_their_order():
    for paths in (["a-b", "a", "a/b"], ["a/b", "a-b", "a"], ["a", "a/b", "a.c"]):
        with pytest.raises(errors.ColumnNameError, match=r"'a'.*'a/b'|'a/b'.*'a'"):
            Schema(tuple(Column(path=path, dtype="int8") for path in paths))
    Schema(tuple(Column(path=path, dtype="int8") for path in ("a-b", "a/b", "ab")))


@pytest.mark.parametrize(
    "name",
    ["uuid", "id", "length", "terminated", "reward_sum", "created_at", "step", "trajectory", "is_first", "", "a\nb", 3],
)
def test_reserved_and_impossible_metadata_names(store, name):
    refused(store, errors.MetadataError, [f"metadata field {name!r}"], good(), metadata={name: 1})


def test_metadata_that_does_not_fit(store):
    store.append(good(), task="pick", score=0.5, count=1)
    store.flush()
    refused(store, errors.MetadataError, ["'task'", "string", "int64", "7"], good(), task=7)
    refused(store, errors.MetadataError, ["'task'", "string", "bytes"], good(), task=b"pick")
    refused(store, errors.MetadataError, ["'score'", "float64", "bool"], good(), score=True)
    refused(store, errors.MetadataError, ["'count'", "int64", "float64", "1.5"], good(), count=1.5)
    refused(store, errors.MetadataError, ["'count'", "does not fit int64"], good(), count=2**63)
    refused(store, errors.MetadataError, ["'extra'", "list", "JSON"], good(), extra=[1, 2])
    refused(store, errors.MetadataError, ["'extra'", "ndarray"], good(), extra=np.zeros(3))
    refused(store, errors.MetadataError, ["'extra'", "UTF-8"], good(), extra="\ud800")
    refused(store, errors.MetadataError, ["'action'", "name of a column"], good(), metadata={"action": 1})
    refused(store, errors.SchemaError, ["'task'", "twice"], good(), metadata={"task": "a"}, task="b")
    store.append(good(), task="place", score=math.nan, count=None)
    store.flush()
    assert store.trajectories[-1].metadata["task"] == "place"


def test_a_refused_column_comes_before_its_metadata(store):
    """Neither half of a refused append is kept: its new metadata field is not in the schema."""
    refused(store, errors.ColumnTypeError, ["'action'"], {**good(), "action": np.zeros(3)}, brand_new=1)
    assert "brand_new" not in store.schema.metadata


def test_a_step_of_an_episode_is_refused_whole(store):
    step = {path: rows[0] for path, rows in good().items()}
    step["boxes"] = good()["boxes"][2]
    before = listing(store)
    with store.begin() as episode:
        episode.add(**step)
        for path, value, error, words in [
            ("action", 0.5, errors.ColumnTypeError, ["'action'", "int64"]),
            ("action", np.float32(1), errors.ColumnTypeError, ["'action'", "int64", "float32"]),
            ("obs/image", np.zeros((3, 2), np.uint8), errors.ColumnShapeError, ["'obs/image'", "[2, 2]", "[3, 2]"]),
            ("reward", 0.1, errors.ColumnTypeError, ["'reward'", "float32"]),
            ("text", 3, errors.ColumnTypeError, ["'text'", "string"]),
            ("velocity", 1.0, errors.UnknownColumnError, ["'velocity'"]),
        ]:
            with pytest.raises(error) as caught:
                episode.add(**{**step, path: value})
            assert all(word in str(caught.value) for word in words), str(caught.value)
        with pytest.raises(errors.MissingColumnError, match="'reward'"):
            episode.add(**{path: value for path, value in step.items() if path != "reward"})
        with pytest.raises(errors.LengthError, match="'obs/image' has one row more"):
            episode.end()
        with pytest.raises(errors.ColumnShapeError, match="'obs/image'"):
            episode.end({"image": np.zeros((3, 2), np.uint8), "state": step["obs/state"]})
        assert len(episode) == 1
        assert listing(store) == before
        episode.end({"image": step["obs/image"], "state": step["obs/state"]}, terminated=True)
    store.flush()
    assert store.trajectories[-1].length == 1


def test_a_schema_that_does_not_fit_the_store(url, store):
    for column, words in [
        (Column(path="action", dtype="int32"), ["'action'", "int64", "int32"]),
        (Column(path="obs/image", dtype="uint8", shape=(3, 2), extra=1), ["'obs/image'", "(2, 2)", "(3, 2)"]),
        (Column(path="obs/image", dtype="uint8", shape=(2, 2)), ["'obs/image'", "extra"]),
    ]:
        others = [c for c in SCHEMA if c.path != column.path]
        with pytest.raises(errors.SchemaConflictError) as caught:
            trajstore.open(url, "a", schema=[*others, column])
        assert all(word in str(caught.value) for word in words), str(caught.value)
    with pytest.raises(errors.SchemaConflictError, match=r"'velocity'.*optional"):
        trajstore.open(url, "a", schema=[*SCHEMA, Column(path="velocity", dtype="float32")])
    assert store.refresh() == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"path": "a", "dtype": "float33"}, ["'a'", "float33"]),
        ({"path": "a", "dtype": "object"}, ["'a'", "object"]),
        ({"path": "a", "dtype": "string", "shape": (3,)}, ["'a'", "string", "(3,)"]),
        ({"path": "a", "dtype": "int8", "shape": (3, 0)}, ["'a'", "(3, 0)"]),
        ({"path": "a", "dtype": "int8", "shape": (-1,)}, ["'a'", "(-1,)"]),
        ({"path": "a", "dtype": "int8", "extra": 2}, ["'a'", "extra=2", "0 or 1"]),
        ({"path": "a", "dtype": "int8", "presence": "maybe"}, ["'a'", "maybe", "'optional'"]),
        ({"path": "a", "dtype": "int8", "shape": (2,), "codec": "gzip"}, ["'a'", "gzip", "zstd"]),
        ({"path": "a", "dtype": "int8", "shape": (2,), "page_rows": 3}, ["'a'", "page_rows=3", "power of two"]),
        ({"path": "a", "dtype": "int8", "shape": (2,), "page_rows": 0}, ["'a'", "page_rows=0"]),
        ({"path": "a", "dtype": "int8", "codec": "zstd"}, ["'a'", "tensors only"]),
        ({"path": "a", "dtype": "int8", "ragged": True, "page_rows": 8}, ["'a'", "tensors only"]),
    ],
    ids=str,
)
def test_columns_that_cannot_be(arguments, words):
    with pytest.raises(errors.SchemaError) as caught:
        Column(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_every_error_is_also_the_builtin_that_people_catch():
    for error, builtin in [
        (errors.ColumnTypeError, TypeError),
        (errors.MissingColumnError, KeyError),
        (errors.UnknownColumnError, KeyError),
        (errors.SchemaError, ValueError),
        (errors.StoreNotFoundError, FileNotFoundError),
        (errors.StoreExistsError, FileExistsError),
        (errors.StoragePermissionError, PermissionError),
        (errors.ReadOnlyError, PermissionError),
        (errors.VersionNotFoundError, LookupError),
        (errors.CorruptionError, ValueError),
    ]:
        assert issubclass(error, builtin)
        assert issubclass(error, errors.TrajstoreError)
        assert str(error("a sentence")) == "a sentence"


def test_storage_options_of_a_local_path(tmp_path):
    with pytest.raises(errors.StorageError, match=r"storage_options \['key'\] mean nothing for the local path"):
        connect(tmp_path, storage_options={"key": 1})
