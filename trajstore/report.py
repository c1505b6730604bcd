"""What a person sees of a store in a terminal."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pandas as pd
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from trajstore.feed.measure import Pace, SamplingMeasurement
from trajstore.read.leases import CacheStats
from trajstore.read.usage import StoreUsage
from trajstore.store import Store
from trajstore.trajectory import Trajectory
from trajstore.view import View

_WIDEST_CELL = 28


def usage_json(store: Store, usage: StoreUsage) -> dict[str, Any]:
    """``trajstore info --json``."""
    return {
        "url": store.url,
        "uuid": store.uuid,
        "version": usage.version,
        "trajectories": usage.trajectories,
        "steps": usage.steps,
        "segments": usage.segments,
        "manifests": usage.manifests,
        "manifest_bytes": usage.manifest_bytes,
        "segment_bytes": usage.segment_bytes,
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


def print_info(console: Console, store: Store, usage: StoreUsage) -> None:
    """``trajstore info``."""
    mean = usage.steps / usage.trajectories if usage.trajectories else 0.0
    console.print(f"[bold]{store.url}[/bold]  version {usage.version}", highlight=False)
    console.print(
        f"{usage.trajectories:,} trajectories, {usage.steps:,} steps (mean {mean:,.1f}), "
        f"{usage.segments:,} segments of {decimal(usage.segment_bytes)}, "
        f"{usage.manifests} manifests of {decimal(usage.manifest_bytes)}",
        highlight=False,
    )
    if not usage.trajectories:
        console.print("nothing is committed yet")
        return
    print_columns(console, store)
    print_usage(console, usage)


def print_columns(console: Console, store: Store) -> None:
    """The schema, one row per column, then the metadata fields."""
    table = Table("column", "per step", "rows", "presence", title="columns", title_justify="left")
    for column in store.schema:
        rows = "length + 1" if column.extra else "length"
        table.add_row(column.path, column.describe(), rows, column.presence)
    console.print(table)
    if store.schema.metadata:
        fields = ", ".join(f"{name} ({kind})" for name, kind in store.schema.metadata.items())
        console.print(f"metadata: {fields}", highlight=False)


def print_usage(console: Console, usage: StoreUsage, *, title: str = "where the bytes are") -> None:
    """Where the bytes are, largest first."""
    table = Table(title=title, title_justify="left")
    for name in ("object", "codec"):
        table.add_column(name)
    for name in ("rows", "in memory", "stored", "ratio", "share"):
        table.add_column(name, justify="right")
    total = max(sum(entry.stored_bytes for entry in usage.objects.values()), 1)
    for name, entry in sorted(usage.objects.items(), key=lambda item: -item[1].stored_bytes):
        logical = entry.logical_bytes
        label = name if len(entry.columns) == 1 else f"{name} ({', '.join(entry.columns)})"
        table.add_row(
            label,
            entry.codec,
            f"{entry.rows:,}",
            "varies" if logical is None else decimal(logical),
            decimal(entry.stored_bytes),
            "" if logical is None else f"{logical / max(entry.stored_bytes, 1):.1f}",
            f"{entry.stored_bytes / total:.0%}",
        )
    console.print(table)


def print_trajectories(console: Console, frame: pd.DataFrame, *, total: int) -> None:
    """``trajstore ls``: the trajectory table, without what only programs need, and as much of it as is wide enough."""
    shown = frame.drop(columns=["uuid"])
    cells = {str(name): [_clipped(_cell(value)) for value in shown[name]] for name in shown.columns}
    same = {} if len(shown) < 2 else {name: texts[0] for name, texts in cells.items() if len(set(texts)) == 1}
    room = console.width - max((len(str(number)) for number in shown.index), default=2) - 4
    table = Table("id")
    fitting: list[str] = []
    for name in (name for name in cells if name not in same):
        room -= max(len(name), *map(len, cells[name]), 0) + 3 if cells[name] else len(name) + 3
        if room < 0:
            break
        fitting.append(name)
        numeric = pd.api.types.is_numeric_dtype(shown[name]) and shown[name].dtype != bool
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row, number in enumerate(shown.index):
        table.add_row(str(number), *(cells[name][row] for name in fitting))
    console.print(table)
    alike = ", ".join(f"{name}={text}" for name, text in same.items() if text)
    if alike:
        console.print(f"in all of these: {alike}", highlight=False)
    left = [name for name in cells if name not in same and name not in fitting]
    if left:
        console.print(f"not shown, for lack of room: {', '.join(left)} (--json has all)", highlight=False)
    if total > len(frame):
        console.print(f"{len(frame)} of {total:,} trajectories", highlight=False)


def print_steps(console: Console, trajectory: Trajectory, frame: pd.DataFrame) -> None:
    """``trajstore head``: steps of one trajectory."""
    ending = "terminated" if trajectory.terminated else "truncated" if trajectory.truncated else "neither ended"
    console.print(
        f"trajectory {trajectory.id}: {trajectory.length:,} steps, {ending}, return {_cell(trajectory.reward_sum)}, "
        f"{', '.join(f'{k}={v}' for k, v in trajectory.metadata.items()) or 'no metadata'}",
        highlight=False,
    )
    table = Table("step")
    for name in frame.columns:
        table.add_column(str(name), justify="right")
    for (_, step), row in zip(frame.index, frame.itertuples(index=False), strict=True):
        table.add_row(str(step), *(_cell(value) for value in row))
    console.print(table)
    left_out = [name for name in trajectory.columns if not any(_shows(shown, name) for shown in frame.columns)]
    if left_out:
        described = [f"{name} ({trajectory.column(name).column.describe()})" for name in left_out]
        console.print(f"not shown: {', '.join(described)}", highlight=False)


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
    console.print(f"{len(view):,} trajectories, {view.num_steps:,} steps, version {view.version}", highlight=False)
    table = Table(title=f"a batch, {decimal(measured.batch_bytes)}", title_justify="left")
    for name in ("column", "dtype", "shape"):
        table.add_column(name)
    for entry in measured.entries:
        table.add_row(entry.path, entry.dtype, str(list(entry.shape)))
    console.print(table)
    table = Table(title="how fast", title_justify="left")
    table.add_column("batches")
    for name in ("number", "seconds", "windows/s", "steps/s", "bytes/s"):
        table.add_column(name, justify="right")
    for label, pace in (("while pages were read", measured.cold), ("from the page cache", measured.hot)):
        if pace.batches:
            table.add_row(
                label,
                f"{pace.batches:,}",
                f"{pace.seconds:.2f}",
                f"{pace.windows_per_s:,.0f}",
                f"{pace.windows_per_s * (window or 1):,.0f}",
                f"{decimal(round(measured.bytes_per_s(pace)))}/s",
            )
    console.print(table)
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
        f"page cache: {share:.2%} of {rows:,} rows were there; {stats.pages_read:,} pages read "
        f"({decimal(stats.bytes_read)} stored, {decimal(stats.bytes_decoded)} in memory), {stats.evictions:,} evicted; "
        f"{decimal(stats.used_bytes)} of {decimal(stats.capacity_bytes)} used"
    )


def _shows(frame_column: str, path: str) -> bool:
    return frame_column == path or frame_column.startswith(f"{path}[")


def _clipped(text: str) -> str:
    return text if len(text) <= _WIDEST_CELL else text[: _WIDEST_CELL - 1] + "…"


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or value is pd.NaT:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    if isinstance(value, pd.Timestamp):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
