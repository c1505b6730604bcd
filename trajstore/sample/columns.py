"""What the user asked for, as outputs of a window: names resolved, offsets checked.

Invariant: a ``WindowSpec`` that exists can be gathered: every column is there in every trajectory of the selection.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trajstore.errors import SelectionError, UnknownColumnError
from trajstore.read.selection import Selection
from trajstore.sample.window import (
    VIRTUAL_COLUMNS,
    Future,
    NStep,
    Output,
    Window,
    WindowSpec,
    as_offsets,
    check_pad,
)
from trajstore.schema import Column

_NEXT = "next_"
_OBSERVATION = "obs"
_REWARD = "reward"


def resolve_window(
    selection: Selection,
    *,
    window: Window,
    dilation: int = 1,
    pad: str = "none",
    columns: Sequence[str] | None = None,
    n_step: int | None = None,
    gamma: float = 0.99,
    mixed: bool = False,
) -> WindowSpec:
    """The outputs that a batch holds; ``View.loader`` says what the arguments mean.

    Args:
        selection: The trajectories.
        window: Offsets.
        dilation: Distance of the offsets of an integer window.
        pad: What rows outside the trajectory are.
        columns: Names.
        n_step: Rewards in a return.
        gamma: Discount per step.
        mixed: Whether there is a column ``source``.

    Raises:
        SelectionError: A combination that makes no sense, or a column that some trajectories lack.
        UnknownColumnError: A name that nothing has.
    """
    offsets = _named_offsets(selection, window, dilation, columns)
    returns = None if n_step is None else NStep(operator.index(n_step), float(gamma))
    outputs: list[Output] = []
    for name, given in offsets:
        if isinstance(given, Future):
            column = selection.schema[given.column]
            _check_present(selection, column)
            if column.is_variable:
                raise SelectionError(f"future({given.column!r}): {column.describe()} has no fixed size")
            outputs.append(Output(name, column, np.zeros(1, np.int64), squeezed=True, future=given))
            continue
        rows, single = as_offsets(name, given)
        single = single or window is None
        outputs += [Output(n, s, rows + jump, single) for n, s, jump in _sources(selection, name, mixed)]
    if returns is not None:
        outputs = _with_returns(selection, outputs, returns)
    if not outputs and not len(selection):
        raise SelectionError("the view holds no trajectories; append some, or choose a wider view")
    if not outputs:
        raise SelectionError("no column to load: all are strings or ragged; name them in columns=")
    spec = WindowSpec(tuple(outputs), check_pad(pad), isinstance(window, Mapping), returns)
    _check_names(spec)
    return spec


def _named_offsets(
    selection: Selection, window: Window, dilation: int, columns: Sequence[str] | None
) -> list[tuple[str, Any]]:
    if isinstance(columns, str):
        raise SelectionError(f"columns={columns!r}, expected a list of names: columns=[{columns!r}]")
    if isinstance(window, Mapping):
        if columns is not None:
            raise SelectionError("a mapping as window= names the columns; leave columns= out")
        if dilation != 1:
            raise SelectionError("dilation= is for an integer window; give a mapping ranges with a step")
        return list(window.items())
    names = list(columns) if columns is not None else [c.path for c in selection.common_columns if not c.is_variable]
    if window is None:
        if dilation != 1:
            raise SelectionError("dilation= is for an integer window")
        return [(name, 0) for name in names]
    try:
        count, distance = operator.index(window), operator.index(dilation)
    except TypeError:
        raise SelectionError(
            f"window={window!r}, expected a number of steps, a mapping from columns to offsets, or None"
        ) from None
    if count < 1 or distance < 1:
        raise SelectionError(f"window={count} and dilation={distance}, expected at least 1 step each")
    return [(name, range(0, count * distance, distance)) for name in names]


def _sources(selection: Selection, name: str, mixed: bool) -> list[tuple[str, Column | str, int]]:
    """Output names, what they show, and how many steps later."""
    schema = selection.schema
    if name in schema.metadata:
        return [(name, name, 0)]
    if name in VIRTUAL_COLUMNS and name not in schema:
        if name == "source" and not mixed:
            raise SelectionError("column 'source' tells the views of a mix apart, and this is one view: leave it out")
        return [(name, name, 0)]
    try:
        return [(c.path, _present(selection, c), 0) for c in schema.select(name)]
    except UnknownColumnError as error:
        if name.startswith(_NEXT):
            try:
                following = schema.select(name.removeprefix(_NEXT))
                return [(_NEXT + c.path, _present(selection, c), 1) for c in following]
            except UnknownColumnError:
                pass
        raise UnknownColumnError(
            f"{error}; virtual columns are {', '.join(VIRTUAL_COLUMNS)}, and next_<column> is a column one step on"
        ) from None


def _present(selection: Selection, column: Column) -> Column:
    _check_present(selection, column)
    return column


def _check_present(selection: Selection, column: Column) -> None:
    lacking = selection.lacking(column)
    if lacking:
        raise SelectionError(
            f"column {column.path!r} is lacking from {lacking} of {len(selection)} trajectories; select those that have it, "
            f"view.having({column.path!r}){_or_compute(column)}, or leave it out"
        )


def _or_compute(column: Column) -> str:
    return (
        f", compute it for the others, store.add_column({column.path!r}, ...)" if column.presence == "derived" else ""
    )


def _with_returns(selection: Selection, outputs: list[Output], returns: NStep) -> list[Output]:
    reward = selection.schema.get(_REWARD)
    if reward is None or reward.is_variable or reward.shape or reward.extra or reward.physical_dtype.kind not in "fiu":
        found = "none" if reward is None else reward.describe()
        raise SelectionError(f"n_step= sums the column 'reward', one number per step; found {found}")
    _check_present(selection, reward)
    changed: list[Output] = []
    for output in outputs:
        if output.name == _REWARD:
            continue
        if output.name.startswith(_NEXT):
            raise SelectionError(f"n_step= gives the next observations itself; leave column {output.name!r} out")
        changed.append(output)
        path = output.source.path if isinstance(output.source, Column) else ""
        if output.future is None and (output.extra or path == _OBSERVATION or path.startswith(f"{_OBSERVATION}/")):
            changed.append(Output(_NEXT + output.name, output.source, output.offsets, output.squeezed, bootstrap=True))
    changed.append(Output(_REWARD, reward, np.arange(returns.steps), squeezed=False))
    return changed


def _check_names(spec: WindowSpec) -> None:
    names = [output.name for output in spec.outputs]
    added = [] if spec.pad == "none" else ["is_pad"]
    if spec.n_step is not None:
        added.append("discount")
    for name in names:
        if names.count(name) > 1:
            raise SelectionError(f"column {name!r} is named twice")
        if name.split("/")[0] in added:
            raise SelectionError(f"column {name!r} has the name of what the batch adds; leave it out")
        clash = next((other for other in names if other.startswith(f"{name}/")), None)
        if clash is not None:
            raise SelectionError(f"{name!r} and {clash!r} cannot both be in a batch: one is a part of the other")
