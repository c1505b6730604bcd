"""The command line. It parses, calls, and prints; what it prints comes from the library."""

from __future__ import annotations

import json
import re
import sys
from typing import Annotated, Any, Optional

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import trajstore
from trajstore import report
from trajstore.errors import TrajstoreError
from trajstore.read.cache import DEFAULT_CACHE_BYTES

app = typer.Typer(
    name="trajstore",
    help="Look into, record and try out stores of reinforcement-learning trajectories.\n\n"
    "A store is a local path, or any URL that fsspec knows: s3://bucket/run, memory://name.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

Url = Annotated[str, typer.Argument(help="Where the store is: a path, or s3://bucket/path.", metavar="URL")]
Version = Annotated[Optional[int], typer.Option(help="Show this version instead of the latest.")]  # noqa: UP045
Where = Annotated[
    Optional[str],  # noqa: UP045 - typer reads annotations at run time
    typer.Option(help="Only trajectories for which this holds, e.g. \"length > 100 and task == 'pick'\"."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
StorageOption = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--storage-option",
        help="KEY=VALUE for the storage client, VALUE as JSON or text; may be repeated. "
        "For instance endpoint_url=http://127.0.0.1:9000.",
    ),
]


@app.command()
def info(url: Url, version: Version = None, as_json: AsJson = False, storage_option: StorageOption = None) -> None:
    """Say what a store holds: schema, trajectories, steps, and where the bytes are."""
    with trajstore.open(url, version=version, storage_options=_options(storage_option)) as store:
        usage = store.usage()
        if as_json:
            _print_json(report.usage_json(store, usage))
        else:
            report.print_info(out, store, usage)


@app.command()
def ls(
    url: Url,
    where: Where = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="Show at most this many, the newest.", min=1)] = 20,
    version: Version = None,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
) -> None:
    """List trajectories: one row each, newest last."""
    with trajstore.open(url, version=version, storage_options=_options(storage_option)) as store:
        view = store.trajectories.filter(where) if where else store.trajectories
        frame = view.last(limit).to_pandas()
        if as_json:
            _print_json(json.loads(frame.reset_index().to_json(orient="records", date_format="iso")))
        else:
            report.print_trajectories(out, frame, total=len(view))


@app.command()
def head(
    url: Url,
    trajectory: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--trajectory", "-t", help="Number of the trajectory (see ls). Default: the first."),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="How many steps.", min=1)] = 10,
    columns: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--column", "-c", help="A column to show; may be repeated. Default: all small ones."),
    ] = None,
    version: Version = None,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
) -> None:
    """Show the first steps of a trajectory."""
    with trajstore.open(url, version=version, storage_options=_options(storage_option)) as store:
        view = store.trajectories
        chosen = view.first(1) if trajectory is None else view.filter("id == @wanted", wanted=trajectory)
        if not len(chosen):
            raise trajstore.IndexRangeError(
                f"{url} has no trajectory {trajectory}; `trajstore ls {url}` shows the {len(view)} that it has"
                if len(view)
                else f"{url} holds no trajectories yet"
            )
        frame = chosen.steps(columns, n=n)
        if as_json:
            _print_json(json.loads(frame.reset_index().to_json(orient="records", date_format="iso")))
        else:
            report.print_steps(out, chosen[0], frame)


@app.command()
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
    seed: Annotated[int, typer.Option(help="Same seed, same batches.")] = 0,
    version: Version = None,
    as_json: AsJson = False,
    storage_option: StorageOption = None,
) -> None:
    """Sample windows: what a batch holds, how fast they come, what is cached.

    The first batches read pages from the storage and decode them; once the
    pages are in the cache, batches are copied out of memory. The two are
    reported apart. If pages are read until the end, the cache is smaller than
    what is sampled, or there was too little time: try a larger --cache-bytes,
    more --seconds, or fewer columns.

    Example: trajstore sample runs/cartpole --window 16 --batch 256 -c obs -c action
    """
    from trajstore.feed.measure import measure_sampling

    nbytes = DEFAULT_CACHE_BYTES if cache_bytes is None else _nbytes(cache_bytes)
    with trajstore.open(url, version=version, storage_options=_options(storage_option), cache_bytes=nbytes) as store:
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
            _progress("batches" if batches else "s") as progress,
        ):
            task = progress.add_task("sampling", total=batches or round(seconds))

            def on_check(elapsed: float, count: int, windows: int) -> None:
                speed = f"sampling  {windows / elapsed:,.0f} windows/s"
                progress.update(task, completed=count if batches else int(elapsed), description=speed)

            measured = measure_sampling(
                loader, seconds=None if batches else seconds, batches=batches, on_check=on_check
            )
        if as_json:
            _print_json(report.sampling_json(view, measured, window=window))
        else:
            report.print_sampling(out, view, measured, window=window)


@app.command()
def record(
    env_id: Annotated[str, typer.Argument(help="A gymnasium environment: CartPole-v1, ALE/Breakout-v5.")],
    url: Annotated[str, typer.Option("--out", "-o", help="The store to append to; made if there is none.")],
    episodes: Annotated[int, typer.Option("--episodes", "-n", help="How many.", min=1)] = 10,
    num_envs: Annotated[int, typer.Option(help="Environments stepped side by side.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of environments and random actions.")] = 0,
    codec: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="fast, small or none. Default: chosen per dtype."),
    ] = None,
    env_option: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--env-option", help="KEY=VALUE for gymnasium.make, VALUE as JSON or text; may be repeated."),
    ] = None,
    storage_option: StorageOption = None,
) -> None:
    """Play episodes with random actions and append them to a store. Ctrl-C keeps every finished episode."""
    from trajstore.gym import record_episodes

    with trajstore.open(url, mode="a", codec=codec, storage_options=_options(storage_option)) as store:
        done = steps = 0
        with _progress("episodes") as progress:
            task = progress.add_task(env_id, total=episodes)

            def on_episode(_number: int, length: int, _return: float) -> None:
                nonlocal done, steps
                done, steps = done + 1, steps + length
                progress.update(task, advance=1, description=f"{env_id}  {steps:,} steps")

            try:
                record_episodes(
                    env_id,
                    store,
                    episodes=episodes,
                    num_envs=num_envs,
                    seed=seed,
                    make_kwargs=_options(env_option),
                    on_episode=on_episode,
                )
            except KeyboardInterrupt:
                store.flush()
                err.print(f"interrupted: the {done} finished episodes ({steps:,} steps) are in {url}")
                raise typer.Exit(130) from None
        store.flush()
        out.print(f"{done} episodes, {steps:,} steps in [bold]{url}[/bold], version {store.version}", highlight=False)
        out.print(f"look at them: trajstore info {url}", highlight=False)


@app.command()
def demo(
    url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="Where to put the demo's stores. Default: a new temporary folder, which is kept."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long to train.", min=1.0)] = 15.0,
    seed: Annotated[int, typer.Option(help="Of environments, policy and sampling.")] = 0,
) -> None:
    """Record real rollouts, reopen the store, sample windows, train a small policy on them. Under a minute."""
    from trajstore.demo import run_demo

    run_demo(url, seconds=seconds, seed=seed, console=out)


@app.callback(invoke_without_command=True)
def _global(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out.print(f"trajstore {trajstore.__version__}", highlight=False)
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        out.print(ctx.get_help())


def main() -> None:
    """Entry point: errors that trajstore raises on purpose are printed as one sentence."""
    try:
        app()
    except (TrajstoreError, ImportError) as error:
        err.print(f"[bold red]error:[/bold red] {_escaped(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))


def _options(pairs: list[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` pairs; dots in a key nest: ``client_kwargs.region_name=eu-west-1``."""
    options: dict[str, Any] = {}
    for pair in pairs or []:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *parents, leaf = key.split(".")
        node = options
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return options


def _nbytes(text: str) -> int:
    """A number of bytes as people write it: ``500MB``, ``8 GiB``, ``1000000``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a number of bytes; write 500MB, 8GiB or 1000000")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, default=str))


def _progress(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )
