"""One column of every kind there is, and trajectories of them."""

from __future__ import annotations

import itertools

from tests.support.strategies import rows
from trajstore import Column

NUMERIC = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("datetime64[ns]", "datetime64[D]", "timedelta64[us]"),
]
SHAPES = [(), (3,), (2, 1, 2)]


def every_kind() -> list[Column]:
    """Every dtype in every form: scalar, tensors, ragged with and without inner shape, each with and without ``extra``."""
    columns = []
    for extra in (0, 1):
        top = ("steps", "states")[extra]
        for dtype, shape in itertools.product(NUMERIC, SHAPES):
            name = f"{_plain(dtype)}_{len(shape)}d"
            page_rows = 4 if shape or dtype.startswith("complex") else None
            columns.append(
                Column(path=f"{top}/fixed/{name}", dtype=dtype, shape=shape, extra=extra, page_rows=page_rows)
            )
            columns.append(Column(path=f"{top}/ragged/{name}", dtype=dtype, shape=shape, extra=extra, ragged=True))
        for dtype, ragged in itertools.product(("string", "bytes"), (False, True)):
            path = f"{top}/{'ragged' if ragged else 'fixed'}/{dtype}"
            columns.append(Column(path=path, dtype=dtype, extra=extra, ragged=ragged))
    return columns


def trajectory_of(columns, rng, length):
    """Path -> rows, as a user would hand them in."""
    return {column.path: rows(rng, column, length + column.extra) for column in columns}


def _plain(dtype: str) -> str:
    return dtype.replace("[", "_").replace("]", "")
