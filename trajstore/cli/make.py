"""Commands that make stores: recordings and the demo."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

import trajstore
from trajstore.cli.common import StorageOption, check_lasting, parse_options, progress_bar
from trajstore.console import bold, err, out, quantity
from trajstore.store import Mode

if TYPE_CHECKING:
    from trajstore.write.episode import Episode


def record(
    env_id: Annotated[str, typer.Argument(help="A gymnasium environment: CartPole-v1, ALE/Breakout-v5.")],
    url: Annotated[str, typer.Option("--out", "-o", help="The store to append to; made if there is none.")],
    episodes: Annotated[int, typer.Option("--episodes", "-n", help="How many.", min=1)] = 10,
    num_envs: Annotated[int, typer.Option(help="Environments stepped side by side.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of environments and random actions.", min=0)] = 0,
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

    check_lasting(url)
    options, make_kwargs = parse_options(storage_option), parse_options(env_option)
    with _StoreMadeLate(lambda mode: trajstore.open(url, mode=mode, codec=codec, storage_options=options)) as target:
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
                    target,
                    episodes=episodes,
                    num_envs=num_envs,
                    seed=seed,
                    make_kwargs=make_kwargs,
                    on_episode=on_episode,
                )
            except KeyboardInterrupt:
                if target.store is None:
                    err.print("interrupted before the first step: nothing was recorded")
                else:
                    target.store.flush()
                    err.print(
                        f"interrupted: the {done} finished episodes ({quantity(steps, 'step')}) are in {bold(url)}"
                    )
                raise typer.Exit(130) from None
        store = target.made()
        store.flush()
        told = f"{quantity(done, 'episode')}, {quantity(steps, 'step')}"
        out.print(f"{told} in {bold(url)}, version {store.version}", highlight=False)
        out.print(f"look at them: trajstore info {url}", highlight=False, markup=False)


class _StoreMadeLate:
    """Where episodes go: a store that is made with the first step, so that what fails before leaves none behind.

    Args:
        opened: Opens the store, in this mode.

    Attributes:
        mode: That of a store for writing.
        store: None until it is there.
    """

    mode = "a"

    def __init__(self, opened: Callable[[Mode], trajstore.Store]) -> None:
        self._opened = opened
        self.store: trajstore.Store | None = None
        with contextlib.suppress(trajstore.StoreNotFoundError):
            opened("r").close()
            self.store = opened("a")

    @property
    def schema(self) -> trajstore.Schema:
        """The columns so far."""
        return trajstore.Schema(()) if self.store is None else self.store.schema

    def begin(self, *, metadata: Mapping[str, Any] | None = None) -> Episode:
        """Open an episode."""
        return self.made().begin(metadata=metadata)

    def made(self) -> trajstore.Store:
        """The store, which is there from now on."""
        if self.store is None:
            self.store = self._opened("a")
        return self.store

    def __enter__(self) -> _StoreMadeLate:
        return self

    def __exit__(self, *_: object) -> None:
        if self.store is not None:
            self.store.close()


def demo(
    url: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(help="Where to put the demo's stores. Default: a new temporary folder, which is kept."),
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long to train.", min=1.0)] = 15.0,
    seed: Annotated[int, typer.Option(help="Of environments, policy and sampling.", min=0)] = 0,
) -> None:
    """Record real rollouts, reopen the store, sample windows, train a small policy on them. Under a minute.

    Example: trajstore demo runs/demo
    """
    from trajstore.demo import run_demo

    check_lasting(*([] if url is None else [url]))
    run_demo(url, seconds=seconds, seed=seed, console=out)
