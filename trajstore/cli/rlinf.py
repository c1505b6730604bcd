"""Commands for buffers of RLinf: its merge-or-split tool, and its files into a store and back.

What RLinf calls a trajectory, the steps of several environments side by side, is a rollout here; a store holds it as
trajectories, the episodes of each environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Optional

import typer

import trajstore
from trajstore.cli.common import Base, StorageOption, check_lasting, parse_bases, parse_options
from trajstore.console import err, out, quantity
from trajstore.errors import StoreNotFoundError
from trajstore.read.bases import refers_to
from trajstore.storage.connect import options_for

app = typer.Typer(
    help="Replay buffers of RLinf: merge, split, import, export.\n\n"
    "A rollout is what RLinf calls a trajectory: several environments side by side. A store holds it as trajectories, the "
    "episodes of each environment.",
    no_args_is_help=True,
)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Take the place of what is there.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .pkl files, which can run any code.")]


@app.command("merge-or-split")
def merge_or_split_command(
    save_path: Annotated[str, typer.Option(help="Where the result goes: a path or a URL.")],
    source_path: Annotated[
        str,
        typer.Option(help="A buffer, or a folder of rank_* buffers: stores, or RLinf's files. A path or a URL."),
    ] = ".",
    split_count: Annotated[
        Optional[int],  # noqa: UP045 - typer reads annotations at run time
        typer.Option(help="Keep the first so many rollouts of one buffer.", min=1),
    ] = None,
    copy: Annotated[
        bool,
        typer.Option(
            "--copy", help="Give the result bytes of its own. Without, it refers to the source, which must stay."
        ),
    ] = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Merge the buffers of several ranks, interleaved by trajectory id; or keep the first rollouts of one.

    Rollouts are numbered from 0 in the result. RLinf's tool moves files
    unless told to copy; here nothing is ever moved: a result of stores refers
    to the segments of its sources, one of RLinf's files is hard links on the
    same disk. With --copy it stands alone.

    Example: trajstore rlinf merge-or-split --source-path runs/buffer --save-path runs/merged
    """
    from trajstore.buffers.rlinf import merge_or_split  # with torch, which takes seconds

    check_lasting(save_path)
    given = parse_options(storage_option)
    count = merge_or_split(
        source_path,
        save_path,
        split_count=split_count,
        copy=copy,
        storage_options=given,
        bases=parse_bases(base, storage_option),
        progress=True,
    )
    out.print(f"{_rollouts(count, save_path, given)} in [bold]{save_path}[/bold]", highlight=False)
    elsewhere = refers_to(save_path, storage_options=given)
    if elsewhere:
        err.print(
            f"it refers to {', '.join(elsewhere)}, outside its own parent folder: whoever opens it has to trust "
            "that place (--base, or bases= in Python), or use --copy",
            highlight=False,
        )


@app.command("import")
def import_command(
    source: Annotated[str, typer.Argument(help="A directory of RLinf's files, or one of rank_* directories.")],
    url: Annotated[str, typer.Argument(help="The store to make.", metavar="URL")],
    allow_pickle: Pickle = False,
    storage_option: StorageOption = None,
) -> None:
    """Make a store of RLinf's files (.pt, or .pkl with --allow-pickle).

    Example: trajstore rlinf import logs/replay_buffer runs/replay
    """
    from trajstore.buffers.rlinf import import_directories  # with torch, which takes seconds

    check_lasting(url)
    given = parse_options(storage_option)
    count = import_directories(source, url, allow_pickle=allow_pickle, storage_options=given, progress=True)
    told = _rollouts(count, url, given)
    out.print(f"{told} in [bold]{url}[/bold]; look at them: trajstore info {url}", highlight=False)


@app.command("export")
def export_command(
    url: Annotated[str, typer.Argument(help="A store that a replay buffer or an import made.", metavar="URL")],
    path: Annotated[str, typer.Argument(help="Where the files go.")],
    trajectory_format: Annotated[str, typer.Option("--format", help="pt or pkl.")] = "pt",
    overwrite: Overwrite = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Write the rollouts of a store as RLinf's files.

    Example: trajstore rlinf export runs/replay logs/replay_buffer
    """
    from trajstore.buffers.rlinf import export_files  # with torch, which takes seconds

    check_lasting(path)
    given = parse_options(storage_option)
    bases = parse_bases(base, storage_option)
    with trajstore.open(url, storage_options=options_for(url, given), bases=bases) as store:
        metadata = export_files(
            store.trajectories,
            path,
            trajectory_format=trajectory_format,
            overwrite=overwrite,
            storage_options=options_for(path, given),
            progress=True,
        )
    told = f"{_rollouts(metadata.size, url, given)}, {quantity(metadata.total_samples, 'sample')}"
    out.print(f"{told} in [bold]{path}[/bold]", highlight=False)


def _rollouts(count: int, url: str, storage_options: Mapping[str, Any]) -> str:
    """How many rollouts, and how many trajectories they are if they are in a store."""
    told = quantity(count, "rollout")
    try:
        with trajstore.open(url, storage_options=options_for(url, storage_options)) as store:
            return f"{told} ({quantity(store.num_trajectories, 'trajectory')} in the store)"
    except StoreNotFoundError:
        return told  # RLinf's files
