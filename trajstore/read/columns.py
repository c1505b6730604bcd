"""Whole columns of a selection, end to end, without the page cache.

Invariant: rows come in the order of the selection; neighbours in a segment are read in one go.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trajstore.errors import SelectionError
from trajstore.read.segment import RowRange, SegmentReaders
from trajstore.read.selection import Selection
from trajstore.schema import Column
from trajstore.stored import Array, to_user


def read_column(selection: Selection, readers: SegmentReaders, name: str, out: Array | None = None) -> Any:
    """One column of all trajectories; ``View.read`` says what the arguments mean."""
    column = selection.schema[name]
    starts, stops, segments = _runs(selection, column)
    if not len(starts):
        raise SelectionError(f"column {name!r} of an empty view")
    entries, schema = selection.table.segments, selection.schema
    runs = [
        (readers.open(entries[segment], schema), RowRange(start, stop))
        for segment, start, stop in zip(segments.tolist(), starts.tolist(), stops.tolist(), strict=True)
    ]
    if column.is_variable:
        return np.concatenate([to_user(column, reader.read(name, rows)) for reader, rows in runs])
    total = int((stops - starts).sum())
    if out is None:
        out = np.empty((total, *column.shape), column.physical_dtype)
    elif out.shape != (total, *column.shape) or out.dtype != column.physical_dtype or not out.flags.c_contiguous:
        raise SelectionError(
            f"out is {out.dtype}{list(out.shape)}; column {name!r} needs a C-contiguous "
            f"{column.physical_dtype}{[total, *column.shape]}"
        )
    done = 0
    for reader, rows in runs:
        n = rows.stop - rows.start
        reader.read(name, rows, out[done : done + n])
        done += n
    return to_user(column, out)


def _runs(selection: Selection, column: Column) -> tuple[Array, Array, Array]:
    """Rows of all trajectories, neighbours joined: starts, stops and segments, ``(runs,)`` each."""
    table, rows = selection.table, selection.rows
    starts = table.start[rows] + (table.ordinal[rows] if column.extra else 0)
    stops = starts + table.length[rows] + column.extra
    segments = table.segment[rows]
    new = np.ones(len(rows), bool)
    new[1:] = (segments[1:] != segments[:-1]) | (starts[1:] != stops[:-1])
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(rows)) - 1 if len(rows) else first
    return starts[first], stops[last], segments[first]
