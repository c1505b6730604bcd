"""What a person sees in a terminal of a store's versions, edits and health.

Invariant: what is printed is what the library returned, nothing is computed here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from trajstore.console import bold, for_commands, quantity
from trajstore.edit.findings import Report
from trajstore.edit.vacuum import Vacuumed
from trajstore.edit.versions import Diff
from trajstore.format.statistics import Statistics
from trajstore.stored import Array
from trajstore.tables import print_table

_SHOWN_FINDINGS = 50
_SHOWN_IDS = 10
_MOST_WHOLE = 1e15  # larger ones are printed with an exponent
_COLOURS = {"error": "bold red", "warning": "yellow", "note": "dim"}
_BYTES = frozenset({"written"})


def frame_json(frame: pd.DataFrame) -> Any:
    """A DataFrame as records, its index included."""
    return json.loads(frame.reset_index().to_json(orient="records", date_format="iso"))


def print_versions(console: Console, frame: pd.DataFrame) -> None:
    """``trajstore versions``."""
    shown = frame.rename(columns={"created_at": "when (UTC)", "written_bytes": "segments"})
    print_frame(console, shown, empty="nothing is committed yet", least=("manifests", "written", "steps"))


def print_statistics(console: Console, found: Statistics, *, of: int, partial: Sequence[str] = ()) -> None:
    """``trajstore stats``.

    Args:
        console: Where to print.
        found: What to print.
        of: How many trajectories there are, of which those were chosen that have the columns.
        partial: Columns that were left out, since some trajectories lack them.
    """
    frame = found.to_pandas()
    if not frame["nan_count"].any():
        frame = frame.drop(columns="nan_count")
    for name in ("min", "max"):  # which are exact, other than what was computed from them
        frame[name] = pd.Series([_whole(value) for value in frame[name]], index=frame.index, dtype=object)
    quantiles = [name for name in map(str, frame.columns) if name.startswith("q")]
    least = ("count", *quantiles[:1], *quantiles[-1:], *quantiles[1:-1])
    print_frame(console, frame, empty="no columns of numbers", least=least)
    chosen = quantity(found.trajectories, "trajectory") + (f" of {of:,}" if of != found.trajectories else "")
    console.print(f"{chosen}, {quantity(found.steps, 'step')}, version {found.version}", highlight=False)
    if partial:
        told = f"not in every trajectory, and left out: {', '.join(partial)} (-c {partial[0]} shows those that have it)"
        console.print(told, highlight=False)


def print_frame(console: Console, frame: pd.DataFrame, *, empty: str, least: Sequence[str] = ()) -> None:
    """A DataFrame as a table, its index first; columns in which nothing stands are left out.

    Args:
        console: Where to print.
        frame: What to print.
        empty: To say instead if it has no rows.
        least: Columns that give way first if there is no room, the first first.
    """
    if not len(frame):
        console.print(empty, highlight=False)
        return
    whole = frame.reset_index()
    cells = {name: [_cell(name, value) for value in whole[name]] for name in map(str, whole.columns)}
    cells = {name: column for name, column in cells.items() if any(column)}
    texts = {name for name in cells if any(isinstance(value, str) for value in whole[name])}
    times = {name for name in cells if any(isinstance(value, pd.Timestamp) for value in whole[name])}

    def header(name: str) -> str:
        return name.replace("_", " ")

    print_table(
        console,
        {header(name): column for name, column in cells.items()},
        texts={header(name) for name in texts},
        right={header(name) for name in cells if name not in texts | times},
        least=[header(name) for name in least],
    )


def diff_json(found: Diff) -> dict[str, Any]:
    """``trajstore diff --json``."""
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return {name: values if isinstance(values, list) else [*values] for name, values in _plain(fields).items()}


def print_diff(console: Console, found: Diff) -> None:
    """``trajstore diff``."""
    if not found:
        console.print("no difference: the same trajectories, columns and metadata fields")
        return
    table = Table("", "added", "removed")
    for column in table.columns:
        column.overflow = "fold"
    table.add_row("trajectories", _ids(found.added), _ids(found.removed))
    for what, added, removed in (
        ("columns", found.added_columns, found.removed_columns),
        ("metadata fields", found.added_fields, found.removed_fields),
    ):
        if added or removed:
            table.add_row(what, escape(", ".join(added)), escape(", ".join(removed)))
    console.print(table)


def vacuumed_json(done: Vacuumed) -> dict[str, Any]:
    """``trajstore vacuum --json``."""
    return {**dataclasses.asdict(done), "objects": done.objects, "nbytes": done.nbytes}


def print_vacuumed(console: Console, done: Vacuumed, *, url: str, rule: str) -> None:
    """``trajstore vacuum``; ``rule`` says which versions stay."""
    if not done.versions and not done.objects:
        console.print(f"nothing to give back in {bold(url)}", highlight=False)
        _print_kept(console, done, url, rule)
        return
    would = "would go" if done.dry_run else "went"
    table = Table("what " + would, "number", "bytes")
    table.columns[1].justify = table.columns[2].justify = "right"
    table.add_row("versions", f"{len(done.versions):,}", "")
    for name, amount in (("manifests", done.manifests), ("objects of segments", done.segments), ("other", done.other)):
        table.add_row(name, f"{amount.objects:,}", decimal(amount.nbytes))
    console.print(table)
    _print_kept(console, done, url, rule)
    if done.dry_run:
        console.print("this was a dry run, nothing was changed; --really does it", highlight=False)


def _print_kept(console: Console, done: Vacuumed, url: str, rule: str) -> None:
    stay = "stays" if done.kept_versions == 1 else "stay"
    console.print(
        f"{quantity(done.kept_versions, 'version')} of {bold(url)} {stay}: {escape(rule)} (--keep-versions, --keep-for)",
        highlight=False,
    )
    if done.young.objects:
        console.print(
            f"{quantity(done.young.objects, 'object')} of {decimal(done.young.nbytes)} that no version needs may go when "
            "older than the grace",
            highlight=False,
        )


def print_verified(console: Console, found: Report) -> None:
    """``trajstore verify``."""
    shown = found.findings[:_SHOWN_FINDINGS]
    if shown:
        table = Table("", "where", "what", show_lines=True)
        for one in shown:
            colour = _COLOURS[one.severity]
            kind = f"[{colour}]{one.severity}[/{colour}]\n{one.kind}"
            table.add_row(kind, escape(one.where), escape(for_commands(one.message)))
        for column in table.columns:
            column.overflow = "fold"
        console.print(table)
    if len(found.findings) > len(shown):
        console.print(
            f"{quantity(len(found.findings) - len(shown), 'more finding')}; --json shows all", highlight=False
        )
    console.print(escape(found.lines()[-1]), highlight=False)


def _whole(value: Any) -> Any:
    """A whole number as an integer, which is printed with all of its digits."""
    return int(value) if abs(value) < _MOST_WHOLE and int(value) == value else value


def _cell(name: str, value: Any) -> str:
    if value is None or value is pd.NaT or (isinstance(value, float) and pd.isna(value)):
        return ""
    if name in _BYTES:
        return decimal(int(value))
    if isinstance(value, pd.Timestamp):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return value
    return f"{value:,}"


def _ids(ids: Array) -> str:
    few = ", ".join(str(number) for number in ids[:_SHOWN_IDS].tolist())
    return f"{len(ids):,}" + (f": {few}{', ...' if len(ids) > _SHOWN_IDS else ''}" if len(ids) else "")


def _plain(fields: dict[str, Any]) -> dict[str, Sequence[Any]]:
    return {name: values.tolist() if hasattr(values, "tolist") else values for name, values in fields.items()}
