"""Hypothesis strategies: any schema, and trajectories that fit it."""

from __future__ import annotations

import string

import numpy as np
import torch
from hypothesis import strategies as st

from trajstore import Column

NUMERIC = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "datetime64[ns]",
    "datetime64[D]",
    "timedelta64[us]",
]
VARIABLE = ["string", "bytes"]

names = st.text(string.ascii_lowercase, min_size=1, max_size=5)
paths = st.lists(names, min_size=1, max_size=3).map("/".join)


def _compatible(found: list[str]) -> list[str]:
    kept: list[str] = []
    for path in found:
        if not any(path == k or path.startswith(f"{k}/") or k.startswith(f"{path}/") for k in kept):
            kept.append(path)
    return kept


@st.composite
def columns(draw: st.DrawFn, max_columns: int = 6) -> list[Column]:
    """Columns of every kind; at least one is required."""
    chosen = _compatible(draw(st.lists(paths, min_size=1, max_size=max_columns)))
    made = []
    for number, path in enumerate(chosen):
        dtype = draw(st.sampled_from(NUMERIC + VARIABLE))
        ragged = draw(st.booleans()) and draw(st.booleans())
        shape = () if dtype in VARIABLE else tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
        presence = "required" if number == 0 else draw(st.sampled_from(["required", "required", "optional"]))
        tensor = not ragged and dtype not in VARIABLE and (shape or dtype.startswith("complex"))
        codec = (
            draw(st.sampled_from([None, "none", "lz4", "lz4-shuffle", "zstd", "zstd-bitshuffle"])) if tensor else None
        )
        page_rows = draw(st.sampled_from([None, 1, 2, 16])) if tensor else None
        made.append(
            Column(
                path=path,
                dtype=dtype,
                shape=shape,
                extra=draw(st.sampled_from([0, 1])),
                presence=presence,
                ragged=ragged,
                codec=codec,
                page_rows=page_rows,
            )
        )
    return made


def numbers(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]):
    """Random values of a logical dtype, special ones among them."""
    if dtype == "bfloat16":
        return torch.from_numpy(rng.integers(0, 2**16, shape, dtype=np.uint16)).view(torch.bfloat16)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    kind = np.dtype(dtype)
    if kind.kind in "mM":
        return rng.integers(-(2**62), 2**62, shape).astype(np.int64).view(dtype)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return rng.integers(info.min, info.max, shape, dtype=kind, endpoint=True)
    raw = rng.integers(0, 256, (*shape, kind.itemsize), dtype=np.uint8)
    return np.ascontiguousarray(raw).view(kind).reshape(shape)  # any bits, NaNs with payload too


def text(rng: np.random.Generator, dtype: str):
    size = int(rng.integers(0, 6))
    if dtype == "bytes":
        return rng.bytes(size)
    return "".join(rng.choice(list("aé∑😀 \x00z"), size)) if size else ""


def rows(rng: np.random.Generator, column: Column, count: int):
    """``count`` rows of a column, as a user would hand them in."""
    if column.ragged:
        sizes = rng.integers(0, 4, count)
        if column.dtype in VARIABLE:
            return [[text(rng, column.dtype) for _ in range(n)] for n in sizes]
        return [numbers(rng, column.dtype, (int(n), *column.shape)) for n in sizes]
    if column.dtype in VARIABLE:
        return [text(rng, column.dtype) for _ in range(count)]
    return numbers(rng, column.dtype, (count, *column.shape))


def trajectory(rng: np.random.Generator, schema: list[Column], length: int) -> dict[str, object]:
    """Flat columns of one trajectory; optional ones are there half of the time."""
    return {c.path: rows(rng, c, length + c.extra) for c in schema if c.presence == "required" or rng.integers(0, 2)}


def bits(value: object) -> object:
    """Something that compares equal if and only if two values are the same bits."""
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            return ("bfloat16", tuple(value.shape), value.contiguous().view(torch.int16).numpy().tobytes())
        value = value.numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return (value.dtype.name, value.shape, np.ascontiguousarray(value).tobytes())
    if isinstance(value, np.ndarray | list | tuple):
        return [bits(item) for item in value]
    return value
