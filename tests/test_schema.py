"""Schemas: names, dtypes, how mappings nest, and which two schemas can be one."""

from __future__ import annotations

import string

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.strategies import columns, paths
from trajstore import Column, Schema, errors
from trajstore.names import RESERVED_METADATA, check_column_path, flatten, nest
from trajstore.schema import METADATA_TYPES, NUMERIC_DTYPES, canonical_dtype, physical_dtype

names = st.text(string.ascii_letters + string.digits + "_-. ü日", min_size=1, max_size=4)
trees = st.recursive(
    st.integers(), lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))


@given(trees)
def test_nest_is_the_inverse_of_flatten(tree):
    flat = flatten(tree)
    assert nest(flat) == tree
    assert flatten(nest(flat)) == flat
    assert flatten(flat) == flat, "flat names are taken as they are"


def slow_flatten(tree, prefix=()):
    found = {}
    for key, value in tree.items():
        found |= slow_flatten(value, (*prefix, key)) if isinstance(value, dict) else {"/".join((*prefix, key)): value}
    return found


@given(trees)
def test_flatten_joins_the_keys(tree):
    assert flatten(tree) == slow_flatten(tree)


@given(columns())
def test_json_round_trip(found):
    schema = Schema(tuple(found), {"a_task": "string", "a_number": "int64"})
    assert Schema.from_json(schema.to_json()) == schema


@given(columns(), paths)
def test_look_up(found, name):
    schema = Schema(tuple(found))
    assert len(schema) == len(found) == len(list(schema))
    assert schema.required == {c.path for c in found if c.presence == "required"}
    under = [c for c in found if c.path == name or c.path.startswith(f"{name}/")]
    if under:
        assert list(schema.select(name)) == under
    else:
        with pytest.raises(errors.UnknownColumnError, match=f"no column '{name}'"):
            schema.select(name)
    assert (name in schema) == (name in [c.path for c in found])


DTYPES = [*NUMERIC_DTYPES, "datetime64[ns]", "timedelta64[D]", "datetime64[25us]"]


@pytest.mark.parametrize("name", DTYPES)
def test_a_dtype_by_every_name_it_has(name):
    assert canonical_dtype(name, path="x") == name
    if name == "bfloat16":
        assert canonical_dtype(torch.bfloat16, path="x") == name
        assert physical_dtype(name) == np.uint16
        return
    for other in (np.dtype(name), np.dtype(name).newbyteorder(">"), np.dtype(name).type if "64[" not in name else name):
        assert canonical_dtype(other, path="x") == name
    if hasattr(torch, name):
        assert canonical_dtype(getattr(torch, name), path="x") == name
    assert physical_dtype(name) == (np.int64 if "64[" in name else np.dtype(name))


@pytest.mark.parametrize(
    ("dtype", "name"), [("U7", "string"), ("S3", "bytes"), ("f4", "float32"), ("<i8", "int64"), ("?", "bool")]
)
def test_short_names(dtype, name):
    assert canonical_dtype(np.dtype(dtype), path="x") == name
    assert Column(path="x", dtype=dtype).dtype == name


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        (np.dtype(object), "no fixed type"),
        (np.dtype("g"), "float64"),
        (np.dtype("G"), "complex128"),
        (np.dtype("M8"), "unit is missing"),
        (np.dtype("m8"), "unit is missing"),
        (np.dtype([("a", "i4")]), "one column per field"),
        (np.dtype("V4"), "NumPy numeric dtype"),
        (torch.float8_e4m3fn, "NumPy numeric dtype"),
        (torch.quint8, "NumPy numeric dtype"),
        ("float8", "NumPy numeric dtype"),
        ("datetime64", "unit is missing"),
        ("datetime64[fortnight]", ""),
    ],
    ids=str,
)
def test_dtypes_that_cannot_be_stored(dtype, hint):
    with pytest.raises(errors.ColumnTypeError, match=rf"^column 'x': dtype .* cannot be stored: .*{hint}"):
        canonical_dtype(dtype, path="x")


@pytest.mark.parametrize(
    ("column", "where", "row_bytes", "described"),
    [
        (Column(path="x", dtype="uint8", shape=(64, 64, 3)), "zarr", 12288, "uint8[64, 64, 3]"),
        (Column(path="x", dtype="float32"), "arrow", 4, "float32"),
        (Column(path="x", dtype="complex64"), "zarr", 8, "complex64"),
        (Column(path="x", dtype="bfloat16", shape=(5,)), "zarr", 10, "bfloat16[5]"),
        (Column(path="x", dtype="string"), "arrow", 0, "string"),
        (Column(path="x", dtype="float32", shape=(4,), ragged=True), "arrow", 16, "list of float32[4]"),
        (Column(path="x", dtype="complex128", ragged=True), "arrow", 16, "list of complex128"),
        (Column(path="x", dtype="datetime64[us]"), "arrow", 8, "datetime64[us]"),
    ],
    ids=lambda value: value.describe() if isinstance(value, Column) else None,
)
def test_where_a_column_goes_and_what_it_weighs(column, where, row_bytes, described):
    assert (column.stored_in, column.row_bytes, column.describe()) == (where, row_bytes, described)


A = Column(path="a", dtype="int64")
B = Column(path="b", dtype="float32", shape=(2,), presence="optional")


def test_merging_adds_optional_columns_and_fields():
    one, other = Schema((A,), {"task": "string"}), Schema((A, B), {"n": "int64"})
    merged = one.merged_with(other)
    assert merged == Schema((A, B), {"task": "string", "n": "int64"})
    assert merged.merged_with(one) is merged
    assert one.merged_with(one) is one
    assert Schema().merged_with(one) == one.merged_with(Schema()) == one
    assert one.with_metadata({"n": "int64"}) == Schema((A,), {"task": "string", "n": "int64"})


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Schema((B,)), ["required column 'a'"]),
        (Schema((A, Column(path="c", dtype="int8"))), ["'c'", "presence='optional'"]),
        (Schema((Column(path="a", dtype="int32"),)), ["'a'", "int64", "int32"]),
        (Schema((Column(path="a", dtype="int64", shape=(2,)),)), ["'a'", "(2,)"]),
        (Schema((Column(path="a", dtype="int64", extra=1),)), ["'a'", "extra"]),
        (Schema((Column(path="a", dtype="int64", ragged=True),)), ["'a'", "ragged"]),
        (Schema((A,), {"task": "int64"}), ["'task'", "string", "int64"]),
    ],
    ids=str,
)
def test_schemas_that_do_not_merge(other, words):
    with pytest.raises(errors.SchemaConflictError) as caught:
        Schema((A,), {"task": "string"}).merged_with(other)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@given(columns(), columns())
def test_merging_two_schemas_keeps_every_column_of_both_or_refuses(one, other):
    first, second = Schema(tuple(one)), Schema(tuple(other))
    try:
        merged = first.merged_with(second)
    except errors.SchemaError:
        return
    assert {c.path for c in merged} == {c.path for c in one} | {c.path for c in other}
    for column in one:
        assert merged[column.path] == column


def test_metadata_fields():
    for kind in METADATA_TYPES:
        assert Schema((), {"x": kind}).metadata == {"x": kind}
    with pytest.raises(errors.MetadataError, match=r"'x': type 'json', expected one of bool, int64"):
        Schema((), {"x": "json"})
    with pytest.raises(errors.MetadataError, match="'a' has the name of a column"):
        Schema((A,), {"a": "int64"})
    for name in sorted(RESERVED_METADATA):
        with pytest.raises(errors.MetadataError, match=f"'{name}' is reserved"):
            Schema((), {name: "int64"})


@given(st.text(max_size=8))
def test_a_name_that_passes_is_a_key_that_no_storage_can_take_amiss(name):
    try:
        check_column_path(name)
    except errors.ColumnNameError:
        return
    parts = name.split("/")
    assert all(part and part not in (".", "..") and part == part.strip() for part in parts)
    assert all(part.isprintable() and not set(part) & set('\\:*?"<>|#%[]') for part in parts)
    assert name.encode().decode() == name
