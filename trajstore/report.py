"""What a person sees of a store in a terminal.

Invariant: a table is never wider than the terminal because of how many columns a store has: those that fit are shown, the
others are named.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from trajstore.console import for_commands, quantity
from trajstore.edit.health import Health
from trajstore.read.leases import CacheStats
from trajstore.read.usage import StoreUsage
from trajstore.store import Store
from trajstore.tables import print_left, print_table
from trajstore.trajectory import Trajectory
from trajstore.view import View

if TYPE_CHECKING:
    from trajstore.feed.measure import Pace, SamplingMeasurement

_WIDEST_CELL = 28
_BRIEF_ENTRIES = 2  # shown of a vector for whose entries there is no room
_NAMED = 5  # tags or other stores


def usage_json(store: Store, usage: StoreUsage, health: Health) -> dict[str, Any]:
    """``trajstore info --json``."""
    return {
        "url": store.url,
        "uuid": store.uuid,
        "version": usage.version,
        "versions": health.versions,
        "tags": {tag.name: tag.version for tag in health.tags},
        "pins": [{"pin": pin.uuid, "version": pin.version, "borrower_url": pin.borrower_url} for pin in health.pins],
        "refers_to": [dataclasses.asdict(other) for other in health.others],
        "trajectories": usage.trajectories,
        "steps": usage.steps,
        "segments": usage.segments,
        "small_segments": health.small_segments,
        "compacted_segments": health.compacted_segments,
        "manifests": usage.manifests,
        "manifest_bytes": usage.manifest_bytes,
        "segment_bytes": usage.segment_bytes,
        "segments_out_of_reach": usage.out_of_reach,
        "problems": [str(problem) for problem in usage.problems],
        "schema": store.schema.to_json(),
        "objects": [
            {
                "columns": list(entry.columns),
                "codec": entry.codec,
                "rows": entry.rows,
                "pages": entry.pages,
                "logical_bytes": entry.logical_bytes,
                "stored_bytes": entry.stored_bytes,
            }
            for entry in usage.objects.values()
        ],
    }


def print_info(console: Console, store: Store, usage: StoreUsage, health: Health) -> None:
    """``trajstore info``."""
    mean = usage.steps / usage.trajectories if usage.trajectories else 0.0
    console.print(f"[bold]{escape(store.url)}[/bold]  version {usage.version}", highlight=False)
    print_standing(console, health)
    console.print(
        f"{quantity(usage.trajectories, 'trajectory')}, {quantity(usage.steps, 'step')} (mean {mean:,.1f})",
        highlight=False,
    )
    console.print(
        f"{quantity(usage.segments, 'segment')} of {decimal(usage.segment_bytes)}, "
        f"{quantity(usage.manifests, 'manifest')} of {decimal(usage.manifest_bytes)}",
        highlight=False,
    )
    if usage.out_of_reach:
        console.print(f"[red]{quantity(usage.out_of_reach, 'segment')} cannot be read, and not counted below:[/red]")
        for problem in usage.problems:
            console.print(escape(for_commands(str(problem))), highlight=False)
    if health.compacting_pays:
        console.print(
            f"{health.small_segments:,} of them are small and would fit into {health.compacted_segments:,}, which open and "
            f"read faster: trajstore compact {escape(store.url)}",
            highlight=False,
        )
    if not usage.trajectories:
        console.print("nothing is committed yet" if not usage.version else "this version holds no trajectories")
        return
    print_columns(console, store)
    print_usage(console, usage)


def print_standing(console: Console, health: Health) -> None:
    """Versions that can be opened, their names, and ties to other stores; only what there is."""
    if health.versions:
        told = f"{quantity(health.versions, 'version')} can be opened"
        if health.tags:
            told += f"; tags: {_few([f'{tag.name} ({tag.version})' for tag in health.tags])}"
        console.print(escape(told), highlight=False)
    unpinned = sum(not other.pinned for other in health.others)
    if health.others:
        places = _few([other.url for other in health.others])
        console.print(
            f"refers to segments of {quantity(len(health.others), 'other store')}: {escape(places)}", highlight=False
        )
    if unpinned:
        console.print(
            f"{unpinned:,} of them {'keeps' if unpinned == 1 else 'keep'} nothing for this store: a vacuum there may remove "
            "what it needs",
            highlight=False,
        )
    if health.pins:
        places = _few(sorted({pin.borrower_url for pin in health.pins}))
        console.print(f"keeps versions for stores that refer to it: {escape(places)}", highlight=False)


def print_columns(console: Console, store: Store) -> None:
    """The schema, one row per column, then the metadata fields."""
    columns = list(store.schema)
    cells: dict[str, list[str]] = {
        "column": [column.path for column in columns],
        "per step": [column.describe() for column in columns],
        "rows": ["length + 1" if column.extra else "length" for column in columns],
        "presence": [column.presence for column in columns],
    }
    print_table(console, cells, texts=("column",), title="columns")
    if store.schema.metadata:
        fields = ", ".join(f"{name} ({kind})" for name, kind in store.schema.metadata.items())
        console.print(f"metadata: {fields}", highlight=False)


def print_usage(
    console: Console, usage: StoreUsage, *, title: str = "where the bytes are", how: str = "--json shows all"
) -> None:
    """Where the bytes are, largest first; ``how`` to see what there is no room for."""
    objects = sorted(usage.objects.items(), key=lambda item: -item[1].stored_bytes)
    total = max(sum(entry.stored_bytes for _, entry in objects), 1)
    numbers = {
        "rows": [f"{entry.rows:,}" for _, entry in objects],
        "in memory": [
            "varies" if entry.logical_bytes is None else decimal(entry.logical_bytes) for _, entry in objects
        ],
        "stored": [decimal(entry.stored_bytes) for _, entry in objects],
        "ratio": [
            "" if entry.logical_bytes is None else f"{entry.logical_bytes / max(entry.stored_bytes, 1):.1f}"
            for _, entry in objects
        ],
        "share": [f"{entry.stored_bytes / total:.0%}" for _, entry in objects],
    }
    cells = {
        "object": [
            name if len(entry.columns) == 1 else f"{name} ({', '.join(entry.columns)})" for name, entry in objects
        ],
        "codec": [entry.codec for _, entry in objects],
        **numbers,
    }
    least = ("rows", "codec", "ratio", "in memory", "share")
    print_table(console, cells, texts=("object",), right=numbers, least=least, title=title, how=how)


def print_trajectories(
    console: Console, frame: pd.DataFrame, *, total: int, columns: Sequence[str] | None = None
) -> None:
    """``trajstore ls``: the trajectory table.

    Args:
        console: Where to print.
        frame: One row per trajectory, as ``View.to_pandas`` gives.
        total: How many trajectories there are.
        columns: Which columns; by default those for which there is room, lengths and returns first, without what only
            programs need, and without those whose values are all the same, which take a line.
    """
    shown = frame[list(columns)] if columns is not None else frame[_useful_first(frame)]
    cells = {str(name): [_cell(value) for value in shown[name]] for name in shown.columns}
    width = max([len("id"), *(len(str(number)) for number in shown.index)])
    same: dict[str, str] = {}
    fitting, left = list(cells), list[str]()
    if columns is None:
        cells = {name: [_clipped(text) for text in texts] for name, texts in cells.items()}
        alone = len(shown) < 2
        same = {name: texts[0] for name, texts in cells.items() if len(set(texts)) == 1 and not (alone and texts[0])}
        widths = {name: _width(name, cells[name]) for name in cells if name not in same}
        fitting = _that_fit(widths, console.width - width - 4)
        left = [name for name in cells if name not in same and name not in fitting]
        left += [str(name) for name in frame.columns if name not in cells and name != "uuid"]
    table = Table("id")
    for name in fitting:
        numeric = pd.api.types.is_numeric_dtype(shown[name]) and shown[name].dtype != bool
        table.add_column(name, justify="right" if numeric else "left", no_wrap=columns is None, overflow="fold")
    for row, number in enumerate(shown.index):
        table.add_row(str(number), *(cells[name][row] for name in fitting))
    console.print(table)
    alike = ", ".join(f"{name}={text}" for name, text in same.items() if text)
    if alike:
        console.print(f"in all of these: {alike}", highlight=False)
    print_left(console, left, "-c NAME shows one, --json all")
    if total > len(frame):
        console.print(f"{len(frame)} of {quantity(total, 'trajectory')}", highlight=False)


def print_steps(
    console: Console, trajectory: Trajectory, frame: pd.DataFrame, *, columns: Sequence[str] | None = None
) -> None:
    """``trajstore head``: steps of one trajectory.

    Args:
        console: Where to print.
        trajectory: Whose.
        frame: One row per step, as ``View.steps`` gives.
        columns: Those that were asked for, which are shown whatever room there is.
    """
    about = [f"trajectory {trajectory.id}: {quantity(trajectory.length, 'step')}"]
    flags = {"terminated": trajectory.terminated, "truncated": trajectory.truncated}
    about.append(" and ".join(name for name, is_so in flags.items() if is_so) or "neither terminated nor truncated")
    if total := _cell(trajectory.reward_sum):
        about.append(f"return {total}")
    told = {name: "..." if _is_document(value) else _cell(value) for name, value in trajectory.metadata.items()}
    about += [f"{name}={_clipped(text)}" for name, text in told.items() if text]
    console.print(", ".join(about), highlight=False)
    groups: dict[str, list[str]] = {}  # the columns of the frame that are one column of the store
    for name in map(str, frame.columns):
        groups.setdefault(next(path for path in trajectory.columns if _shows(name, path)), []).append(name)
    whole = {name: [_cell(value) for value in frame[name]] for name in map(str, frame.columns)}
    most = _BRIEF_ENTRIES if columns is None else None
    brief = {path: _brief([whole[name] for name in names], most) for path, names in groups.items()}
    brief_widths = {path: _width(path, texts) for path, texts in brief.items()}
    room = console.width - len("step") - 4
    fitting = list(groups) if columns is not None else _that_fit(brief_widths, room)
    room -= sum(brief_widths[path] for path in fitting)
    table = Table("step")
    cells: list[list[str]] = []
    for path in fitting:
        more = sum(_width(name, whole[name]) for name in groups[path]) - brief_widths[path]
        in_full = len(groups[path]) == 1 or more <= room
        room -= more if in_full else 0
        for name, texts in {name: whole[name] for name in groups[path]}.items() if in_full else [(path, brief[path])]:
            table.add_column(name, justify="right", no_wrap=columns is None, overflow="fold")
            cells.append(texts)
    for row, (_, step) in enumerate(frame.index):
        table.add_row(str(step), *(texts[row] for texts in cells))
    console.print(table)
    if columns is None:
        left = [name for name in trajectory.columns if name not in fitting]
        described = [f"{name} ({trajectory.column(name).column.describe()})" for name in left]
        print_left(console, described, "-c NAME shows one")


def sampling_json(view: View, measured: SamplingMeasurement, *, window: int | None) -> dict[str, Any]:
    """``trajstore sample --json``."""

    def part(pace: Pace) -> dict[str, Any]:
        return {
            "batches": pace.batches,
            "windows": pace.windows,
            "seconds": pace.seconds,
            "windows_per_s": pace.windows_per_s,
            "steps_per_s": pace.windows_per_s * (window or 1),
            "bytes_per_s": measured.bytes_per_s(pace),
        }

    return {
        "trajectories": len(view),
        "steps": view.num_steps,
        "version": view.version,
        "batch": {entry.path: {"dtype": entry.dtype, "shape": list(entry.shape)} for entry in measured.entries},
        "batch_bytes": measured.batch_bytes,
        "first_batch_s": measured.first_s,
        "wait_s": measured.stats.wait_s,
        "cold": part(measured.cold),
        "hot": part(measured.hot),
        "cache": dataclasses.asdict(measured.stats.cache),
    }


def print_sampling(console: Console, view: View, measured: SamplingMeasurement, *, window: int | None) -> None:
    """``trajstore sample``."""
    console.print(
        f"{quantity(len(view), 'trajectory')}, {quantity(view.num_steps, 'step')}, version {view.version}",
        highlight=False,
    )
    entries = {
        "column": [entry.path for entry in measured.entries],
        "dtype": [entry.dtype for entry in measured.entries],
        "shape": [str(list(entry.shape)) for entry in measured.entries],
    }
    print_table(console, entries, texts=("column",), title=f"a batch, {decimal(measured.batch_bytes)}")
    labelled = (("while pages were read", measured.cold), ("from the page cache", measured.hot))
    paces = [(label, pace) for label, pace in labelled if pace.batches]
    numbers = {
        "number": [f"{pace.batches:,}" for _, pace in paces],
        "seconds": [f"{pace.seconds:.2f}" for _, pace in paces],
        "windows/s": [f"{pace.windows_per_s:,.0f}" for _, pace in paces],
        "steps/s": [f"{pace.windows_per_s * (window or 1):,.0f}" for _, pace in paces],
        "bytes/s": [decimal(round(measured.bytes_per_s(pace))) for _, pace in paces],
    }
    cells = {"batches": [label for label, _ in paces], **numbers}
    least = ("number", "seconds", "steps/s")
    print_table(console, cells, texts=("batches",), right=numbers, least=least, title="how fast")
    if not measured.hot.batches:
        console.print("pages were read until the end: sample for longer, or with a larger cache", highlight=False)
    total = measured.cold.seconds + measured.hot.seconds
    console.print(
        f"first batch after {measured.first_s:.3f} s; waited {measured.stats.wait_s:.2f} of {total:.2f} s for batches",
        highlight=False,
    )
    console.print(described_cache(measured.stats.cache), highlight=False)


def described_cache(stats: CacheStats) -> str:
    """What a page cache has done, in one line."""
    rows = stats.hits + stats.misses
    share = stats.hits / rows if rows else 0.0
    return (
        f"page cache: {share:.2%} of {rows:,} rows were there; {quantity(stats.pages_read, 'page')} read "
        f"({decimal(stats.bytes_read)} stored, {decimal(stats.bytes_decoded)} in memory), {stats.evictions:,} evicted; "
        f"{decimal(stats.used_bytes)} of {decimal(stats.capacity_bytes)} used"
    )


def _useful_first(frame: pd.DataFrame) -> list[str]:
    """Columns of the trajectory table: what training asks for, then metadata, then when; without what only programs need."""
    names = [str(name) for name in frame.columns if name not in ("uuid", "created_at")]
    names = [name for name in names if not any(_is_document(value) for value in frame[name])]
    return names + [name for name in ("created_at",) if name in frame.columns]


def _that_fit(widths: Mapping[str, int], room: int) -> list[str]:
    """The names that fit, each earlier one before a later one; those too wide are passed over."""
    fitting = []
    for name, width in widths.items():
        if width <= room:
            fitting.append(name)
            room -= width
    return fitting


def _width(name: str, texts: Sequence[str]) -> int:
    """Of a column of a table, with its border and blanks."""
    return max(len(name), *map(len, texts), 0) + 3


def _few(texts: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    more = len(texts) - _NAMED
    return ", ".join(texts[:_NAMED]) + (f", and {more:,} more" if more > 0 else "")


def _brief(entries: Sequence[Sequence[str]], most: int | None) -> list[str]:
    """The rows of a vector in one column, from those of its entries; not more than ``most`` of these."""
    if len(entries) == 1:
        return list(entries[0])
    more = ["..."] * (most is not None and len(entries) > most)
    return [f"[{', '.join([*row[:most], *more])}]" for row in zip(*entries, strict=True)]


def _is_document(value: Any) -> bool:
    """Whether a field holds JSON for programs, which nobody reads in a table."""
    return isinstance(value, str) and len(value) > _WIDEST_CELL and value[0] in "{["


def _shows(frame_column: str, path: str) -> bool:
    return frame_column == path or frame_column.startswith(f"{path}[")


def _clipped(text: str) -> str:
    return text if len(text) <= _WIDEST_CELL else text[: _WIDEST_CELL - 1] + "…"


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or value is pd.NaT:
        return ""
    if isinstance(value, np.ndarray):
        return _brief([[_cell(number)] for number in value.reshape(-1)[: _BRIEF_ENTRIES + 1].tolist()], _BRIEF_ENTRIES)[
            0
        ]
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    if isinstance(value, pd.Timestamp):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    return str(value)
