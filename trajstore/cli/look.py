"""Commands that look into a store."""

from __future__ import annotations

import json
from typing import Annotated, Any, Optional

import typer

import trajstore
from trajstore import report
from trajstore.cli.common import (
    AsJson,
    Base,
    StorageOption,
    Url,
    Version,
    Where,
    open_store,
    parse_bytes,
    print_json,
    progress_bar,
)
from trajstore.console import out
from trajstore.edit.health import measure_health
from trajstore.read.cache import DEFAULT_CACHE_BYTES


def opened(
    url: str, version: str | None, storage_option: list[str] | None, base: list[str] | None, **options: Any
) -> trajstore.Store:
    """The store that a command looks into."""
    return open_store(url, storage_option, base, version=version, **options)


def info(
    url: Url, version: Version = None, as_json: AsJson = False, storage_option: StorageOption = None, base: Base = None
) -> None:
    """Say what a store holds: versions, schema, trajectories, steps, and where the bytes are.

    Also which stores it refers to, which refer to it, and whether it has so many
    small segments that compact would make it faster.

    Example: trajstore info runs/demo
    """
    with opened(url, version, storage_option, base) as store:
        usage, source = store.usage(), store.trajectories.source()
        health = measure_health(source.filesystem, source.selection.table)
        if as_json:
            print_json(report.usage_json(store, usage, health))
        else:
            report.print_info(out, store, usage, health)


def ls(
    url: Url,
    where: Where = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="Show at most this many, the newest.", min=1)] = 20,
    columns: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--column", "-c", help="A column to show; may be repeated. Default: those that there is room for."
        ),
    ] = None,
    version: Version = None,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """List trajectories: one row each, newest last.

    Example: trajstore ls runs/demo --where "length > 100" -c length -c reward_sum
    """
    with opened(url, version, storage_option, base) as store:
        view = store.trajectories.filter(where) if where else store.trajectories
        frame = view.last(limit).to_pandas()
        for name in columns or []:
            if name not in frame.columns:
                raise trajstore.UnknownColumnError(
                    f"no column {name!r} in the table of trajectories; there are {', '.join(frame.columns)}"
                )
        if as_json:
            shown = frame[columns] if columns else frame
            print_json(json.loads(shown.reset_index().to_json(orient="records", date_format="iso")))
        else:
            report.print_trajectories(out, frame, total=len(view), columns=columns)


def head(
    url: Url,
    trajectory: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--trajectory", "-t", help="Number of the trajectory (see ls). Default: the first."),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="How many steps.", min=1)] = 10,
    columns: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--column", "-c", help="A column to show; may be repeated. Default: small ones that there is room for."
        ),
    ] = None,
    version: Version = None,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Show the first steps of a trajectory.

    Example: trajstore head runs/demo --trajectory 3 -n 5
    """
    with opened(url, version, storage_option, base) as store:
        view = store.trajectories
        chosen = view.first(1) if trajectory is None else view.filter("id == @wanted", wanted=trajectory)
        if not len(chosen):
            raise trajstore.IndexRangeError(
                f"{url} has no trajectory {trajectory}; `trajstore ls {url}` shows those that it has"
                if len(view)
                else f"{url} holds no trajectories yet"
            )
        frame = chosen.steps(columns, n=n)
        if as_json:
            print_json(json.loads(frame.reset_index().to_json(orient="records", date_format="iso")))
        else:
            report.print_steps(out, chosen[0], frame, columns=columns)


def sample(
    url: Url,
    batch: Annotated[int, typer.Option("--batch", "-b", help="Windows per batch.", min=1)] = 256,
    window: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--window", "-w", help="Steps per window. Default: single steps.", min=1),
    ] = None,
    order: Annotated[
        str,
        typer.Option(
            help="random: uniform, with replacement. shuffle: every window once per epoch. sequential: in order. "
            "prioritized: by priorities, which are all equal here."
        ),
    ] = "random",
    columns: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--column", "-c", help="A column, or all under a name; may be repeated. Default: all of fixed size."
        ),
    ] = None,
    pad: Annotated[
        str, typer.Option(help="What is beyond a trajectory's ends: none (no such windows), edge or zero.")
    ] = "none",
    n_step: Annotated[Optional[int], typer.Option(help="Sum so many rewards, and bootstrap behind them.")] = None,  # noqa: UP045
    where: Where = None,
    seconds: Annotated[float, typer.Option(help="How long to sample.", min=0.1)] = 3.0,
    batches: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Stop after so many batches, however long they take.", min=1),
    ] = None,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Where batches go: cuda, cuda:1. Default: main memory."),
    ] = None,
    cache_bytes: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Size of the page cache: 500MB, 8GiB, or a number of bytes. Default: 1GiB."),
    ] = None,
    prefetch: Annotated[int, typer.Option(help="Batches made ahead, by a thread; 0 for none.", min=0)] = 2,
    seed: Annotated[int, typer.Option(help="Same seed, same batches.", min=0)] = 0,
    version: Version = None,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Sample windows: what a batch holds, how fast they come, what is cached.

    The first batches read pages from the storage and decode them; once the
    pages are in the cache, batches are copied out of memory. The two are
    reported apart. If pages are read until the end, the cache is smaller than
    what is sampled, or there was too little time: try a larger --cache-bytes,
    more --seconds, or fewer columns.

    Example: trajstore sample runs/cartpole --window 16 -c obs -c action
    """
    from trajstore.feed.measure import measure_sampling

    nbytes = DEFAULT_CACHE_BYTES if cache_bytes is None else parse_bytes(cache_bytes)
    with opened(url, version, storage_option, base, cache_bytes=nbytes) as store:
        view = store.trajectories.filter(where) if where else store.trajectories
        with (
            view.loader(
                batch,
                window=window,
                columns=columns,
                pad=pad,
                n_step=n_step,
                order=order,
                device=device,
                prefetch=prefetch,
                seed=seed,
            ) as loader,
            progress_bar("batches" if batches else "s") as progress,
        ):
            task = progress.add_task("sampling", total=batches or round(seconds))

            def on_check(elapsed: float, count: int, windows: int) -> None:
                speed = f"sampling  {windows / elapsed:,.0f} windows/s"
                progress.update(task, completed=count if batches else int(elapsed), description=speed)

            measured = measure_sampling(
                loader, seconds=None if batches else seconds, batches=batches, on_check=on_check
            )
        if as_json:
            print_json(report.sampling_json(view, measured, window=window))
        else:
            report.print_sampling(out, view, measured, window=window)
