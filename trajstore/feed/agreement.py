"""What the views of a mix have in common: the same outputs, from columns of their own.

Invariant: the windows that are returned name the same outputs in the same order, and each output has one dtype and one shape
in all views, so that their rows fit into one batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from trajstore.errors import SelectionError
from trajstore.feed.options import LoaderOptions
from trajstore.read.selection import Selection
from trajstore.sample.columns import resolve_window
from trajstore.sample.window import Output, WindowSpec
from trajstore.schema import Column


def agreed_windows(selections: Sequence[Selection], options: LoaderOptions) -> list[WindowSpec]:
    """For each view of a loader, what a window of it holds; several views are a mix.

    Raises:
        SelectionError: Views of a mix that differ in a column; names it, and what it is in both.
        UnknownColumnError: A name that a view does not have.
    """
    columns = _shared_columns(selections, options) if len(selections) > 1 else options.columns
    specs = [
        resolve_window(
            selection,
            window=options.window,
            dilation=options.dilation,
            pad=options.pad,
            columns=columns,
            n_step=options.n_step,
            gamma=options.gamma,
            mixed=len(selections) > 1,
        )
        for selection in selections
    ]
    agreed = specs[:1]
    for number in range(1, len(specs)):
        theirs = {output.name: output for output in specs[number].outputs}
        ours = [output.name for output in specs[0].outputs]
        for name in [*ours, *theirs]:
            if name not in theirs or name not in ours:
                having, lacking = (0, number) if name in ours else (number, 0)
                raise SelectionError(
                    f"view {having} of the mix gives {name!r} and view {lacking} does not; name columns that both have"
                )
        for output in specs[0].outputs:
            found, expected = _described(selections[number], theirs[output.name]), _described(selections[0], output)
            if found != expected:
                raise SelectionError(
                    f"{output.name!r} is {expected} in view 0 of the mix and {found} in view {number}; leave it out, or mix "
                    "views that agree"
                )
        agreed.append(replace(specs[number], outputs=tuple(theirs[name] for name in ours)))
    return agreed


def _shared_columns(selections: Sequence[Selection], options: LoaderOptions) -> Sequence[str] | None:
    """Names as given; by default the columns of fixed size that are alike in all views."""
    if options.columns is not None or isinstance(options.window, Mapping):
        return options.columns
    shared: list[str] = []
    for column in selections[0].common_columns:
        alike = [
            any(c.path == column.path and c.describe() == column.describe() for c in selection.common_columns)
            for selection in selections[1:]
        ]
        if all(alike) and not column.is_variable:
            shared.append(column.path)
    if not shared:
        raise SelectionError(
            "the views of the mix have no column of fixed size in common; compare their schemas: view.schema"
        )
    return shared


def _described(selection: Selection, output: Output) -> str:
    """What the rows of an output are. Whether there is a final one (``extra``) is each view's own affair."""
    if isinstance(output.source, Column):
        return output.source.describe()
    kind = selection.schema.metadata.get(output.source)
    return "computed" if kind is None else f"a metadata field of {kind}"
