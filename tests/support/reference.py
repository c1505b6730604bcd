"""The plain reference of sampling: every batch built element by element, from trajectories in memory.

Invariant: it is the obvious loop, and shares no code with ``trajstore.sample`` or ``trajstore.feed``. Whatever is faster
must give the same bytes. What may be chosen freely (the order of anchors, the draws of ``future``) is not decided here: a
test hands in the anchors.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trajstore.schema import VARIABLE_DTYPES, Column, Schema
from trajstore.view import View

VIRTUAL = ("terminated", "truncated", "is_first", "is_last", "step", "trajectory")
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)

Anchor = tuple[int, int]  # position of the trajectory in the view, step


@dataclass(frozen=True)
class Recorded:
    """One trajectory, as it was appended.

    Attributes:
        columns: Path -> rows: array or tensor ``(length + extra, *shape)``, or a list of strings, bytes or lists.
        length: Steps.
        terminated: As appended.
        truncated: As appended.
        metadata: Fields; one that is absent or None is null.
    """

    columns: Mapping[str, Any]
    length: int
    terminated: bool = False
    truncated: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recording:
    """The trajectories of a view, in its order, and the schema of its store."""

    schema: Schema
    trajectories: Sequence[Recorded]

    @classmethod
    def of(cls, view: View) -> Recording:
        """All of a view, read column by column, past every cache."""
        return cls(
            view.schema,
            [
                Recorded({p: t.column(p)[:] for p in t.columns}, t.length, t.terminated, t.truncated, t.metadata)
                for t in view
            ],
        )

    @property
    def num_steps(self) -> int:
        """Steps of all trajectories."""
        return sum(t.length for t in self.trajectories)

    @property
    def common_paths(self) -> list[str]:
        """Columns that every trajectory has, in the schema's order."""
        return [c.path for c in self.schema if all(c.path in t.columns for t in self.trajectories)]


@dataclass(frozen=True)
class _Output:
    """One entry of a batch: where its rows come from."""

    name: str
    source: Column | str  # a stored column; or the name of a virtual column or metadata field
    offsets: tuple[int, ...]
    time: bool  # whether the batch has a time dimension for it
    bootstrap: bool = False  # offsets count from the step after the last of the n

    def rows(self, recorded: Recorded) -> int:
        return recorded.length + (self.source.extra if isinstance(self.source, Column) else 0)

    def at(self, step: int) -> list[int]:
        return [step + offset for offset in self.offsets]


def reference_anchors(
    source: View | Recording,
    *,
    window: Any = None,
    dilation: int = 1,
    pad: str = "none",
    n_step: int | None = None,
    columns: Sequence[str] | None = None,
    anchors: Any = None,
    **_: Any,  # the other options of a loader change nothing
) -> list[Anchor]:
    """All anchors of a view, in the order in which they are numbered.

    Args:
        source: A view, or what was appended to it.
        window: This and the following arguments are those of ``View.loader``.
        dilation: See there.
        pad: See there.
        n_step: See there.
        columns: See there.
        anchors: See there.
    """
    recording = source if isinstance(source, Recording) else Recording.of(source)
    outputs = _outputs(recording, window=window, dilation=dilation, n_step=n_step, columns=columns)
    found = []
    number = 0  # of a step, over the whole view
    for position, recorded in enumerate(recording.trajectories):
        for step in range(recorded.length):
            if isinstance(anchors, str):
                chosen = bool(recorded.columns[anchors][step])
            else:
                chosen = anchors is None or bool(anchors[number])
            number += 1
            if pad == "none":
                for output in outputs:
                    inside = all(0 <= row < output.rows(recorded) for row in output.at(step))
                    chosen = chosen and (inside or output.bootstrap)
            if n_step is not None and step + n_step >= recorded.length and not recorded.terminated:
                # The bootstrap observation is the final one: was it stored?
                chosen = chosen and all(o.source.extra for o in outputs if o.bootstrap)
            if chosen:
                found.append((position, step))
    return found


def reference_batch(
    source: View | Recording,
    chosen: Iterable[Anchor],
    /,
    *,
    window: Any = None,
    dilation: int = 1,
    pad: str = "none",
    n_step: int | None = None,
    gamma: float = 0.99,
    columns: Sequence[str] | None = None,
    **_: Any,  # the other options of a loader change nothing
) -> dict[str, Any]:
    """The batch of these anchors.

    Where the batch contract leaves something open, the reference leaves it out: with a mapping window ``is_pad`` has no
    entries for metadata fields, and with n-step none for ``reward`` and the bootstrap observations.

    Args:
        source: A view, or what was appended to it.
        chosen: Its anchors: position in the view and step, ``batch`` of them.
        window: This and the following arguments are those of ``View.loader``.
        dilation: See there.
        pad: See there.
        n_step: See there.
        gamma: See there.
        columns: See there.

    Returns:
        Nested mapping, as a loader yields it.
    """
    recording = source if isinstance(source, Recording) else Recording.of(source)
    outputs = _outputs(recording, window=window, dilation=dilation, n_step=n_step, columns=columns)
    anchors = list(chosen)
    batch: dict[str, Any] = {}
    for output in outputs:
        if n_step is not None and output.name == "reward":
            batch["reward"] = _n_step_reward(recording, output.source, anchors, n_step, gamma)
            continue
        values = []
        for position, step in anchors:
            recorded = recording.trajectories[position]
            first = step + min(n_step, recorded.length - step) if output.bootstrap and n_step is not None else step
            for row in output.at(first):
                # A terminal observation that was not stored counts for nothing: any row will do, so it is the last one.
                past_the_end = output.bootstrap and row >= output.rows(recorded)
                values.append(_value(recording, output, position, row, "edge" if past_the_end else pad))
        _put(batch, output.name, _stacked(recording, output, values, len(anchors)))
    if n_step is not None:
        discounts = []
        for position, step in anchors:
            left = recording.trajectories[position].length - step
            ends = n_step >= left and recording.trajectories[position].terminated
            discounts.append(0.0 if ends else gamma ** min(n_step, left))
        batch["discount"] = torch.tensor(discounts, dtype=torch.float32)
    if pad != "none":
        _put_is_pad(batch, recording, outputs, anchors, window, dilation, n_step)
    return batch


def _outputs(
    recording: Recording, *, window: Any, dilation: int, n_step: int | None, columns: Sequence[str] | None
) -> list[_Output]:
    if isinstance(window, Mapping):
        plans = [
            (name, (offsets,) if isinstance(offsets, int) else tuple(offsets), not isinstance(offsets, int))
            for name, offsets in window.items()
        ]
    else:
        names = columns
        if names is None:
            names = [p for p in recording.common_paths if not recording.schema[p].is_variable]
        own = (0,) if window is None else tuple(range(0, window * dilation, dilation))
        plans = [(name, own, window is not None) for name in names]
    outputs: dict[str, _Output] = {}
    for name, offsets, time in plans:
        for output in _named(recording.schema, name, offsets, time):
            outputs.setdefault(output.name, output)
    if n_step is not None:
        for output in list(outputs.values()):
            if output.name.startswith("next_") or not isinstance(output.source, Column):
                continue
            if output.source.extra or output.name == "obs" or output.name.startswith("obs/"):
                name = f"next_{output.name}"
                outputs[name] = _Output(name, output.source, output.offsets, output.time, bootstrap=True)
    return list(outputs.values())


def _named(schema: Schema, name: str, offsets: tuple[int, ...], time: bool) -> list[_Output]:
    if name in VIRTUAL or name in schema.metadata:
        return [_Output(name, name, offsets, time)]
    if name.startswith("next_") and not _under(schema, name):
        shifted = tuple(offset + 1 for offset in offsets)
        return [_Output(f"next_{c.path}", c, shifted, time) for c in _under(schema, name.removeprefix("next_"))]
    return [_Output(c.path, c, offsets, time) for c in _under(schema, name)]


def _under(schema: Schema, name: str) -> list[Column]:
    return [c for c in schema if c.path == name or c.path.startswith(f"{name}/")]


def _value(recording: Recording, output: _Output, position: int, row: int, pad: str) -> Any:
    """One element: the row of an output for one trajectory, padded if it lies outside."""
    recorded = recording.trajectories[position]
    source, rows = output.source, output.rows(recorded)
    if isinstance(source, str) and source not in VIRTUAL:
        return recorded.metadata.get(source)
    outside = not 0 <= row < rows
    assert not outside or pad in ("edge", "zero"), f"row {row} of {output.name}, which has {rows}"
    row = min(max(row, 0), rows - 1)
    if isinstance(source, Column):
        if outside and pad == "zero":
            return _zero(source)
        return _plain(source, recorded.columns[source.path][row])
    if outside and pad == "zero":
        return 0
    is_last = row == recorded.length - 1
    return {
        "terminated": is_last and recorded.terminated,
        "truncated": is_last and recorded.truncated,
        "is_first": row == 0,
        "is_last": is_last,
        "step": row,
        "trajectory": position,
    }[source]


def _zero(column: Column) -> Any:
    if column.dtype in VARIABLE_DTYPES:
        return [] if column.ragged else {"string": "", "bytes": b""}[column.dtype]
    return np.zeros((0, *column.shape) if column.ragged else column.shape, column.physical_dtype)


def _plain(column: Column, value: Any) -> Any:
    """One row as stored bits: an array in the physical dtype, text, or a list of text."""
    if column.dtype in VARIABLE_DTYPES:
        return list(value) if column.ragged else value
    if isinstance(value, torch.Tensor):
        value = (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
    array = np.asarray(value)
    if array.dtype.kind in "mM" or column.dtype == "bfloat16":
        array = array.view(column.physical_dtype)
    array = array.astype(column.physical_dtype, copy=False)
    return array.reshape(-1, *column.shape) if column.ragged else array


def _stacked(recording: Recording, output: _Output, values: list[Any], batch: int) -> Any:
    dims = (batch, len(output.offsets)) if output.time else (batch,)
    source = output.source
    if isinstance(source, str):
        if source in VIRTUAL:
            dtype = torch.int64 if source in ("step", "trajectory") else torch.bool
            return torch.tensor(values, dtype=dtype).reshape(dims)
        kind = recording.schema.metadata[source]
        if kind in ("string", "bytes"):
            return _objects(values).reshape(dims)
        if kind == "timestamp":
            values = [_nanoseconds(v) for v in values]
        elif kind == "float64":
            values = [math.nan if v is None else v for v in values]
        dtype = {"bool": torch.bool, "float64": torch.float64}.get(kind, torch.int64)
        return torch.tensor(values, dtype=dtype).reshape(dims)
    if source.ragged:
        offsets = torch.tensor([0, *np.cumsum([len(v) for v in values])], dtype=torch.int64)
        if source.dtype in VARIABLE_DTYPES:
            return _objects([item for value in values for item in value]), offsets
        return _tensor(source, np.concatenate([*values, _zero(source)])), offsets
    if source.dtype in VARIABLE_DTYPES:
        return _objects(values).reshape(dims)
    out = np.empty((len(values), *source.shape), source.physical_dtype)
    for row, value in enumerate(values):
        out[row] = value
    return _tensor(source, out.reshape(*dims, *source.shape))


def _tensor(column: Column, array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if column.dtype == "bfloat16" else tensor


def _objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), object)
    for row, value in enumerate(values):
        array[row] = value
    return array


def _nanoseconds(moment: dt.datetime) -> int:
    moment = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
    return (moment - _EPOCH) // dt.timedelta(microseconds=1) * 1000


def _n_step_reward(recording: Recording, column: Column, anchors: list[Anchor], n: int, gamma: float) -> torch.Tensor:
    """``sum_{i < min(n, length - t)} gamma**i * reward[t + i]``, summed in float64."""
    dtype = _tensor(column, np.empty(0, column.physical_dtype)).dtype
    sums = torch.zeros((len(anchors), *column.shape), dtype=torch.float64)
    for number, (position, step) in enumerate(anchors):
        recorded = recording.trajectories[position]
        for i in range(min(n, recorded.length - step)):
            reward = _tensor(column, np.array(_plain(column, recorded.columns[column.path][step + i])))
            sums[number] += gamma**i * reward.to(torch.float64)
    return sums.to(dtype if dtype.is_floating_point else torch.float32)


def _put_is_pad(
    batch: dict[str, Any],
    recording: Recording,
    outputs: list[_Output],
    anchors: list[Anchor],
    window: Any,
    dilation: int,
    n_step: int | None,
) -> None:
    def outside(offsets: Sequence[int], rows_of: Any, time: bool) -> torch.Tensor:
        marks = [
            [not 0 <= step + offset < rows_of(recording.trajectories[position]) for offset in offsets]
            for position, step in anchors
        ]
        tensor = torch.tensor(marks, dtype=torch.bool).reshape(len(anchors), len(offsets))
        return tensor if time else tensor[:, 0]

    if not isinstance(window, Mapping):
        steps = (0,) if window is None else tuple(range(0, window * dilation, dilation))
        batch["is_pad"] = outside(steps, lambda recorded: recorded.length, window is not None)
        return
    batch["is_pad"] = {}
    for output in outputs:
        stored_or_virtual = isinstance(output.source, Column) or output.source in VIRTUAL
        reduced = n_step is not None and (output.bootstrap or output.name == "reward")
        if stored_or_virtual and not reduced:
            _put(batch["is_pad"], output.name, outside(output.offsets, output.rows, output.time))


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value
