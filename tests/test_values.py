"""Values: whatever is handed in comes back bit for bit, and plain numbers are cast only where nothing changes."""

from __future__ import annotations

import datetime as dt
import fractions
import math
import struct

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.support.strategies import NUMERIC, VARIABLE, bits, columns, numbers, rows
from trajstore import Column, LengthError, Schema, errors
from trajstore.names import flatten
from trajstore.stored import exact_cast, from_physical, to_user
from trajstore.values import check_rows, check_trajectory, infer_columns, rows_of

SHAPES = [(), (3,), (2, 1, 2)]
PLAIN = [d for d in NUMERIC if d != "bfloat16"]


def column(dtype, shape=(), **more):
    return Column(path="x", dtype=dtype, shape=shape, **more)


def round_trip(value, spec=None):
    found = rows_of("x", value, spec)
    inferred = column(found.dtype, found.shape, ragged=found.ragged)
    assert spec is None or (spec.dtype, spec.shape, spec.ragged) == (inferred.dtype, inferred.shape, inferred.ragged)
    return to_user(inferred, check_rows(inferred, found))


# ---- arrays and tensors: there and back


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", NUMERIC)
@given(count=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_arrays_come_back_bit_for_bit(dtype, shape, count, seed):
    given_array = numbers(np.random.default_rng(seed), dtype, (count, *shape))
    back = round_trip(given_array)
    assert type(back) is type(given_array)
    assert bits(back) == bits(given_array)


@given(columns(), st.integers(1, 5), st.integers(0, 2**32))
def test_columns_of_any_kind_come_back(found, count, seed):
    rng = np.random.default_rng(seed)
    for spec in found:
        handed_in = rows(rng, spec, count)
        back = to_user(spec, check_rows(spec, rows_of(spec.path, handed_in, spec)))
        assert len(back) == count
        if spec.ragged:
            assert [list(a) if spec.dtype in VARIABLE else bits(a) for a in back] == [
                list(a) if spec.dtype in VARIABLE else bits(a) for a in handed_in
            ]
        else:
            assert bits(back) == (handed_in if spec.dtype in VARIABLE else bits(handed_in))


@pytest.mark.parametrize("dtype", PLAIN)
def test_any_memory_layout_gives_the_same_rows(dtype):
    array = numbers(np.random.default_rng(0), dtype, (4, 3, 2))
    wide = np.repeat(np.repeat(array, 2, axis=0), 2, axis=2)
    layouts = {
        "big-endian": array.astype(array.dtype.newbyteorder(">")),
        "Fortran": np.asfortranarray(array),
        "strided": wide[::2, :, ::2],
        "reversed": np.ascontiguousarray(array[::-1])[::-1],
        "transposed": np.ascontiguousarray(array.transpose(2, 1, 0)).transpose(2, 1, 0),
        "read-only": array.copy(),
    }
    layouts["read-only"].flags.writeable = False
    for name, laid_out in layouts.items():
        back = round_trip(laid_out)
        assert back.dtype == array.dtype, name
        assert back.dtype.isnative, name
        assert bits(back) == bits(array), name


def test_broadcast_rows_of_zero_stride():
    one = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    back = round_trip(np.broadcast_to(one, (4, 2, 3)))
    assert bits(back) == bits(np.repeat(one, 4, axis=0))
    tensor = round_trip(torch.from_numpy(one).expand(4, 2, 3))
    assert bits(tensor) == bits(np.repeat(one, 4, axis=0))


TENSORS = {
    "float": torch.arange(6.0).reshape(3, 2),
    "bfloat16": torch.arange(6.0).reshape(3, 2).to(torch.bfloat16),
    "requires grad": torch.arange(6.0).reshape(3, 2).requires_grad_(),
    "of a graph": torch.arange(6.0).reshape(3, 2).requires_grad_() * 2,
    "bfloat16 of a graph": torch.arange(6.0).reshape(3, 2).to(torch.bfloat16).requires_grad_() * 2,
    "conjugated": torch.tensor([[1 + 2j, 3 - 4j]] * 3).conj(),
    "negated": torch.tensor([[1 + 2j, 3 - 4j]] * 3).conj().imag,
    "not contiguous": torch.arange(24.0).reshape(4, 6)[:, ::2],
    "bfloat16 not contiguous": torch.arange(24.0).to(torch.bfloat16).reshape(4, 6).t(),
    "bool": torch.tensor([True, False]),
    "unsigned": torch.arange(3).to(torch.uint16),
    "inference": torch.inference_mode()(lambda: torch.arange(4.0) + 1)(),
    "parameter": torch.nn.Parameter(torch.arange(4.0)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_every_make(name):
    tensor = TENSORS[name]
    found = rows_of("x", tensor)
    assert (found.dtype, found.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:]))
    resolved = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    assert bits(round_trip(tensor)) == bits(resolved)


def test_bfloat16_comes_back_as_a_tensor_and_keeps_odd_bits():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    back = round_trip(every)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.view(torch.int16), every.view(torch.int16))


def test_anything_with_an_array_protocol():
    for value in (
        pd.Series([1, 2, 3]),
        pd.array([1, 2, 3]),
        np.array([1, 2, 3]),
        pa.array([1, 2, 3]),
        memoryview(b"abc"),
    ):
        if isinstance(value, memoryview):
            value = np.frombuffer(value, np.uint8)
        assert round_trip(value).tolist() in ([1, 2, 3], [97, 98, 99])
    assert list(round_trip(pd.Series(["a", "b"]))) == ["a", "b"]
    assert list(round_trip(pd.Series(["a", "b"], dtype="category"))) == ["a", "b"]
    assert round_trip(pd.Series(pd.to_datetime(["2026-01-01"]))).dtype.kind == "M"


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=6))
def test_text_in_every_container(items):
    expected = [bits(item) for item in items]
    for value in (items, tuple(items), np.array(items, object), pd.Series(items, dtype=object)):
        assert bits(round_trip(value)) == expected
    plain = [item for item in items if not item.endswith("\0")] or ["x"]  # NumPy drops those at the end
    assert bits(round_trip(np.array(plain))) == plain


@given(st.lists(st.binary(), min_size=1, max_size=6))
def test_bytes_in_every_container(items):
    for value in (items, np.array(items, object)):
        assert bits(round_trip(value)) == items


def test_datetimes():
    moments = [dt.datetime(2026, 1, 1, 12, 30, 0, 5), dt.datetime(1890, 1, 1)]
    assert round_trip(moments).tolist() == moments
    assert round_trip(moments).dtype == np.dtype("datetime64[us]")
    spans = [dt.timedelta(days=-3, microseconds=1), dt.timedelta(0)]
    assert round_trip(spans).tolist() == spans
    odd = np.array([1, 2, -3]).view("datetime64[10ms]")
    assert bits(round_trip(odd)) == bits(odd)
    missing = np.array(["NaT", "2026-01-01"], "datetime64[ns]")
    assert bits(round_trip(missing)) == bits(missing)
    big_endian = missing.astype(">M8[ns]")
    assert bits(round_trip(big_endian)) == bits(missing)
    with pytest.raises(errors.ColumnTypeError, match=r"'x' mixes datetime with other types"):
        rows_of("x", [moments[0], 3])


# ---- ragged lists


def test_ragged_lists_of_every_form():
    arrays = [np.arange(n, dtype=np.float32) for n in (2, 0, 3)]
    tensors = [torch.from_numpy(a) for a in arrays]
    objects = np.empty(3, object)
    objects[:] = arrays
    for value in (arrays, tensors, objects):
        found = rows_of("x", value)
        assert (found.dtype, found.shape, found.ragged, found.weak) == ("float32", (), True, False)
        assert [bits(a) for a in round_trip(value)] == [bits(a) for a in arrays]
    plain = rows_of("x", [[1, 2], [], [3.5]])
    assert (plain.dtype, plain.weak) == ("float64", True)
    assert [a.tolist() for a in round_trip([[1, 2], [], [3.5]])] == [[1.0, 2.0], [], [3.5]]
    words = [["a", "b"], [], ["ü"]]
    assert [list(a) for a in round_trip(words)] == words
    assert [list(a) for a in round_trip([[b"a"], [], [b"\0", b""]])] == [[b"a"], [], [b"\0", b""]]


def test_lists_of_equal_lengths_are_a_tensor_unless_the_column_is_ragged():
    value = [[1.0, 2.0], [3.0, 4.0]]
    assert not rows_of("x", value).ragged
    ragged = column("float64", ragged=True)
    for handed_in in (value, np.array(value), torch.tensor(value, dtype=torch.float64)):
        back = to_user(ragged, check_rows(ragged, rows_of("x", handed_in, ragged)))
        assert [a.tolist() for a in back] == value
    boxes = column("float32", (2,), ragged=True)
    back = to_user(boxes, check_rows(boxes, rows_of("x", np.zeros((3, 5, 2), np.float32), boxes)))
    assert [a.shape for a in back] == [(5, 2)] * 3


def test_plain_lists_take_the_dtype_of_a_ragged_column():
    for spec, value in [
        (column("float32", ragged=True), [[1, 2], [], [0.5]]),
        (column("uint8", ragged=True), [[255], [0, 1]]),
        (column("bfloat16", ragged=True), [[1.5], [2.0, 3.0]]),
        (column("float32", (2,), ragged=True), [[[1, 2]], [[3, 4], [5, 6]]]),
        (column("complex64", ragged=True), [[1j], [2, 3]]),
        (column("bool", ragged=True), [[True], [False, True]]),
    ]:
        back = to_user(spec, check_rows(spec, rows_of("x", value, spec)))
        assert [a.tolist() for a in back] == value, spec.dtype
    for spec, value in [
        (column("float32", ragged=True), [[1, 2], [0.1]]),
        (column("uint8", ragged=True), [[256], [0, 1]]),
        (column("bool", ragged=True), [[2], [0, 1]]),
        (column("int8", ragged=True), [[True], [False, True]]),
        (column("float32", ragged=True), [[1j], [2, 3]]),
    ]:
        with pytest.raises(errors.ColumnTypeError, match=f"'x' is {spec.dtype}, found"):
            check_rows(spec, rows_of("x", value, spec))


def test_empty_lists_need_a_schema():
    with pytest.raises(errors.SchemaError, match=r"'x': every list is empty.*declare it"):
        rows_of("x", [[], []])
    for spec in (column("float32", (2,), ragged=True), column("string", ragged=True), column("complex64", ragged=True)):
        back = to_user(spec, check_rows(spec, rows_of("x", [[], []], spec)))
        assert [len(a) for a in back] == [0, 0]


# ---- plain numbers: exact casts


def obvious_value(value, dtype):
    """The value as ``dtype`` holds it, or None; by Python's own numbers."""
    if dtype == "bool":
        return bool(value) if value in (0, 1) else None
    kind = np.dtype("float32" if dtype == "bfloat16" else dtype)
    if kind.kind in "iu":
        if not isinstance(value, int) and (not math.isfinite(value) or value != int(value)):
            return None
        info = np.iinfo(kind)
        return int(value) if info.min <= value <= info.max else None
    if not isinstance(value, int) and not math.isfinite(value):
        return float(value)
    return float(value) if float_holds(fractions.Fraction(value), dtype) else None


def float_holds(exact: fractions.Fraction, dtype: str) -> bool:
    """Whether a number is a multiple of the float's smallest step at its size, within its range."""
    bits_, low, high = {
        "float16": (11, -14, 15),
        "bfloat16": (8, -126, 127),
        "float32": (24, -126, 127),
        "float64": (53, -1022, 1023),
    }[dtype]
    if exact == 0:
        return True
    exponent = max(_floor_log2(abs(exact)), low)
    step = fractions.Fraction(2) ** (exponent - bits_ + 1)
    return exponent <= high and exact % step == 0


def _floor_log2(x: fractions.Fraction) -> int:
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    while fractions.Fraction(2) ** guess > x:
        guess -= 1
    while fractions.Fraction(2) ** (guess + 1) <= x:
        guess += 1
    return guess


TARGETS = [d for d in NUMERIC if not d.startswith(("complex", "datetime", "timedelta"))]
edges = st.sampled_from([2**n + d for n in (0, 7, 8, 11, 15, 16, 24, 31, 32, 53, 62, 63) for d in (-1, 0, 1)])
small_floats = st.floats(width=16) | st.floats(width=32) | st.floats() | edges.map(float)
edge_floats = st.sampled_from(
    [0.1, 65504.0, 65520.0, 2.0**-24, 2.0**-25, 2.0**-133, 2.0**-134, 2.0**-149, 2.0**127, 3.4e38]
)
python_ints = st.integers(-(2**63), 2**63 - 1) | st.integers(-300, 300) | edges.map(lambda n: min(n, 2**63 - 1))


@pytest.mark.parametrize("target", TARGETS)
@given(
    values=st.lists(python_ints, min_size=1, max_size=4) | st.lists(small_floats | edge_floats, min_size=1, max_size=4)
)
@example(values=[2.0**63])
@example(values=[-(2.0**63)])
@example(values=[2.0**64])
@example(values=[-0.0])
@example(values=[2**63 - 1])
@example(values=[2**53 + 1])
@example(values=[math.nan, math.inf])
def test_exact_cast_is_what_exact_arithmetic_says(target, values):
    source = np.array(values)
    found = exact_cast(source, source.dtype.name, target)
    expected = [obvious_value(value, target) for value in values]
    if None in expected:
        assert found is None, (found, expected)
        return
    assert found is not None, expected
    assert found.dtype == column(target).physical_dtype
    back = from_physical(target, found)
    back = back.double().tolist() if isinstance(back, torch.Tensor) else back.tolist()
    assert list(map(same_bits, back)) == list(map(same_bits, expected))


def same_bits(value):
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack("d", value)
    return value


@given(hnp.arrays(np.complex128, st.integers(1, 4)))
def test_complex_numbers_become_complex_only(values):
    for target in TARGETS:
        assert exact_cast(values, "complex128", target) is None
    narrow = exact_cast(values, "complex128", "complex64")
    with np.errstate(all="ignore"):
        fits = np.array_equal(values.astype(np.complex64).astype(np.complex128), values, equal_nan=True)
    assert (narrow is not None) == fits


@given(st.lists(python_ints, min_size=1, max_size=3) | st.lists(small_floats, min_size=1, max_size=3))
def test_real_numbers_become_complex_where_their_parts_hold_them(values):
    source = np.array(values)
    for target, part in (("complex64", "float32"), ("complex128", "float64")):
        found, real = exact_cast(source, source.dtype.name, target), exact_cast(source, source.dtype.name, part)
        assert (found is None) == (real is None)
        if found is not None:
            assert found.dtype == target
            assert np.array_equal(found.real, real, equal_nan=True)
            assert not found.imag.any()


@pytest.mark.parametrize("target", ["datetime64[us]", "timedelta64[s]"])
def test_numbers_are_no_times(target):
    assert exact_cast(np.array([1]), "int64", target) is None
    assert exact_cast(np.array([1]), target, "int64") is None


def test_booleans_are_no_numbers():
    assert exact_cast(np.array([True]), "bool", "int64") is None
    assert exact_cast(np.array([True]), "bool", "bfloat16") is None
    assert exact_cast(np.array([True]), "bool", "bool").tolist() == [True]


# ---- trajectories


def test_a_first_trajectory_gives_the_schema():
    tree = {
        "obs": {"image": np.zeros((4, 2, 2), np.uint8), "state": torch.zeros(4, 3)},
        "action": [1, 2, 3],
        "words": [["a"], [], ["b", "c"]],
        "note": ["x", "y", "z"],
    }
    checked, schema = check_trajectory(tree, Schema((), {"task": "string"}))
    assert checked.length == 3
    assert schema.metadata == {"task": "string"}
    assert [(c.path, c.dtype, c.shape, c.extra, c.ragged) for c in schema] == [
        ("obs/image", "uint8", (2, 2), 1, False),
        ("obs/state", "float32", (3,), 1, False),
        ("action", "int64", (), 0, False),
        ("words", "string", (), 0, True),
        ("note", "string", (), 0, False),
    ]
    assert checked.nbytes == sum(checked.columns[path].nbytes for path in flatten(tree))
    again, same = check_trajectory(tree, schema)
    assert same is schema
    assert again.length == 3


def test_one_row_and_its_final_state():
    _, schema = check_trajectory({"obs": np.zeros((2, 3)), "action": np.zeros(1)}, Schema())
    assert [(c.path, c.extra) for c in schema] == [("obs", 1), ("action", 0)]
    alone, schema = check_trajectory({"obs": np.zeros((2, 3))}, Schema())
    assert (alone.length, schema["obs"].extra) == (2, 0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_lengths_that_can_be_one_trajectory(lengths):
    handed_in = {f"c{n}": rows_of(f"c{n}", np.zeros(length)) for n, length in enumerate(lengths)}
    shortest, longest = min(lengths), max(lengths)
    if shortest < 1 or longest > shortest + 1:
        with pytest.raises(LengthError):
            infer_columns(handed_in)
    else:
        assert [c.extra for c in infer_columns(handed_in)] == [length - shortest for length in lengths]


@given(columns(), st.integers(1, 5), st.integers(0, 2**32))
def test_a_trajectory_that_fits_its_schema_is_taken(found, length, seed):
    schema = Schema(tuple(found))
    rng = np.random.default_rng(seed)
    tree = {c.path: rows(rng, c, length + c.extra) for c in found}
    checked, same = check_trajectory(tree, schema)
    assert same is schema
    assert checked.length == length
    assert set(checked.columns) == set(tree)
    for path, stored in checked.columns.items():
        assert len(stored) == length + schema[path].extra
