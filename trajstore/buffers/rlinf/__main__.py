"""Load a buffer, sample once, and print what a batch holds: ``python -m trajstore.buffers.rlinf --load-path P``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from trajstore.buffers.rlinf import TrajectoryReplayBuffer
from trajstore.cli.common import Base, StorageOption, parse_bases, parse_options
from trajstore.console import out, run
from trajstore.names import flatten


def main(
    load_path: Annotated[str, typer.Option(help="A checkpoint: a store, or RLinf's files; a path or a URL.")],
    num_chunks: Annotated[int, typer.Option(help="Transitions to sample.", min=1, metavar="N")] = 1024,
    cache_size: Annotated[
        int, typer.Option(help="Trajectories that the cache holds at least.", min=1, metavar="N")
    ] = 5,
    enable_cache: Annotated[
        bool, typer.Option("--enable-cache/--no-cache", help="Keep pages in memory.", metavar="")
    ] = True,
    sample_window_size: Annotated[
        int, typer.Option(help="Sample from the last so many; 0 for all.", min=0, metavar="N")
    ] = 100,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pkl files, which can run any code.")
    ] = False,
    storage_option: StorageOption = None,
    base: Base = None,
) -> None:
    """Load a replay buffer, sample one batch, print its keys and shapes."""
    with TrajectoryReplayBuffer(
        cache_size=cache_size,
        enable_cache=enable_cache,
        sample_window_size=sample_window_size,
        allow_pickle=allow_pickle,
        storage_options=parse_options(storage_option),
        bases=parse_bases(base, storage_option),
    ) as buffer:
        buffer.load_checkpoint(load_path, progress=True)
        batch: dict[str, Any] = buffer.sample(num_chunks=num_chunks)
        table = Table("key", "shape", "dtype", title=f"{len(buffer)} trajectories, {buffer.total_samples} samples")
        for path, tensor in flatten(batch).items():
            table.add_row(path, str(list(tensor.shape)), str(tensor.dtype).removeprefix("torch."))
        out.print(table)


if __name__ == "__main__":
    run(lambda: typer.run(main))
