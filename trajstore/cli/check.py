"""Commands that look at a store as a whole: its versions, its numbers, its health, its pictures."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from trajstore import report_history as report
from trajstore.cli.common import (
    AsJson,
    Base,
    StorageOption,
    Url,
    Version,
    Where,
    check_lasting,
    offer,
    print_json,
)
from trajstore.cli.look import opened
from trajstore.console import bold, out, quantity

KINDS = ("overview", "returns", "lengths", "trajectory", "frames")


def versions(
    url: Url,
    limit: Annotated[int, typer.Option("--limit", "-n", help="At most so many, the newest.", min=1, metavar="N")] = 20,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
) -> None:
    """List versions, newest first: when, by what operation, their tags, and what they hold.

    Example: trajstore versions runs/demo -n 5
    """
    with opened(url, None, storage_option, None) as store:
        frame = store.versions(limit)
        if as_json:
            print_json(report.frame_json(frame))
        else:
            report.print_versions(out, frame)


def diff(
    url: Url,
    first: Annotated[str, typer.Argument(help="A version, or a tag.")],
    second: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="Another. Default: the latest."),
    ] = None,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Say what changed from one version to another: trajectories, columns, metadata fields.

    Example: trajstore diff runs/demo paper
    """
    with opened(url, None, storage_option, base) as store:
        found = store.diff(first, second)
        if as_json:
            print_json(report.diff_json(found))
        else:
            report.print_diff(out, found)


def verify(
    url: Url,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read every page and hold it against its checksum.")
    ] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Make a version without the trajectories that cannot be read; nothing is removed."
        ),
    ] = False,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Check a store from its versions down to its segments. Nothing is changed, unless --repair is given.

    Ends with status 0 if there are no errors, whatever the warnings and notes,
    and with 1 if there are some. After --repair, what is left decides.

    Example: trajstore verify runs/demo --deep
    """
    if repair:
        check_lasting(url)
    store = opened(url, None, storage_option, base, past_damage=True)
    if repair:
        store.close()  # mode "a" would make one
        store = opened(url, None, storage_option, base, mode="a", past_damage=True)
    with store:
        found = store.verify(deep=deep)
        before = store.num_trajectories
        made = store.repair(found) if repair and not found.ok else None
        left = found if made is None else store.verify()
        kept = store.num_trajectories
        if as_json:
            repaired = (
                None if made is None else {"version": made, "ok": left.ok, "findings": left.to_json()["findings"]}
            )
            print_json({**found.to_json(), "repaired": repaired})
        else:
            report.print_verified(out, found)
            if made is not None:
                told = "no errors are left" if left.ok else "errors are left; verify it again"
                whole = f"{kept:,} of {quantity(before, 'trajectory')}"
                out.print(f"version {made} holds what can be read, {whole}: {told}", highlight=False)
            elif repair and not found.ok:
                out.print("no new version would make it better: see above what to do", highlight=False)
    if left.exit_code:
        raise typer.Exit(left.exit_code)


def stats(
    url: Url,
    columns: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--column", "-c", help="A column; may be repeated. Default: all numbers of fixed size."),
    ] = None,
    where: Where = None,
    version: Version = None,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Mean, standard deviation, minimum, maximum and quantiles of each column.

    Columns that some trajectories lack are left out unless asked for; then
    those count that have them.

    Example: trajstore stats runs/demo -c obs -c reward
    """
    with opened(url, version, storage_option, base) as store:
        view = store.trajectories.filter(where) if where else store.trajectories
        chosen = view.having(*columns) if columns else view
        found = chosen.statistics(columns)
        if as_json:
            print_json(found.to_json())
        else:
            partial = [] if columns else [c.path for c in view.schema if c not in view.common_columns]
            report.print_statistics(out, found, of=len(view), partial=partial)


def plot(
    url: Url,
    kind: Annotated[
        str,
        typer.Argument(
            help="overview, returns, lengths, trajectory or frames.", autocompletion=offer(*KINDS), metavar="KIND"
        ),
    ] = "overview",
    path: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--out", "-o", help="A .png, .pdf or .svg to write. Default: KIND.png, unless there is --show."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Open a window.")] = False,
    trajectory: Annotated[
        Optional[list[int]],  # noqa: UP045
        typer.Option(
            "--trajectory", "-t", help="Number of a trajectory (see ls), for trajectory; for frames, may be repeated."
        ),
    ] = None,
    columns: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--column", "-c", help="A column to draw, for trajectory and frames; may be repeated."),
    ] = None,
    by: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A metadata field that gives colours, for overview and returns."),
    ] = None,
    x: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="What returns are drawn over, for overview and returns: id (the default), created_at or steps.",
            autocompletion=offer("id", "created_at", "steps"),
        ),
    ] = None,
    rows: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Trajectories, for frames. Default: 3.", min=1, metavar="N"),
    ] = None,
    frames: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Frames of each, for frames and overview. Default: 8.", min=1, metavar="N"),
    ] = None,
    where: Where = None,
    version: Version = None,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Draw a store: returns over time, lengths, one trajectory's steps, or frames of its images.

    Example: trajstore plot runs/demo frames -o frames.png
    """
    from trajstore.plot import check_taken

    target = path if path is not None or show else f"{kind}.png"
    asked = {"by": by, "x": x, "trajectory": trajectory, "columns": columns, "rows": rows, "frames": frames}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value}
    check_taken(kind, given)
    with opened(url, version, storage_option, base) as store:
        view = store.trajectories.filter(where) if where else store.trajectories
        view.plot(kind, path=target, show=show, **given)  # type: ignore[arg-type]
    if target is not None:
        out.print(f"drawn to {bold(target)}", highlight=False)
