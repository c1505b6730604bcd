"""Commands that make stores: recordings and the demo."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

import trajstore
from trajstore.cli.common import StorageOption, parse_options, progress_bar
from trajstore.console import err, out, quantity


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
    """Play episodes with random actions and append them to a store. Ctrl-C keeps every finished episode.

    Example: trajstore record CartPole-v1 --episodes 100 --out runs/cartpole
    """
    from trajstore.gym import record_episodes

    with trajstore.open(url, mode="a", codec=codec, storage_options=parse_options(storage_option)) as store:
        done = steps = 0
        with progress_bar("episodes") as progress:
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
                    make_kwargs=parse_options(env_option),
                    on_episode=on_episode,
                )
            except KeyboardInterrupt:
                store.flush()
                err.print(f"interrupted: the {done} finished episodes ({quantity(steps, 'step')}) are in {url}")
                raise typer.Exit(130) from None
        store.flush()
        told = f"{quantity(done, 'episode')}, {quantity(steps, 'step')}"
        out.print(f"{told} in [bold]{url}[/bold], version {store.version}", highlight=False)
        out.print(f"look at them: trajstore info {url}", highlight=False)


def demo(
    url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="Where to put the demo's stores. Default: a new temporary folder, which is kept."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long to train.", min=1.0)] = 15.0,
    seed: Annotated[int, typer.Option(help="Of environments, policy and sampling.")] = 0,
) -> None:
    """Record real rollouts, reopen the store, sample windows, train a small policy on them. Under a minute.

    Example: trajstore demo runs/demo
    """
    from trajstore.demo import run_demo

    run_demo(url, seconds=seconds, seed=seed, console=out)
