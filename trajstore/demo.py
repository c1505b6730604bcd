"""``trajstore demo``: record real episodes, look at them, learn from them, see where their bytes are.

Invariant: everything that is shown was measured in this run. The losses are those of the batches that the loader
gave; both returns come from episodes that are played here, with seeds that were not recorded.

The policy is behaviour cloning of the better half of the episodes (the "%BC" baseline of Chen et al., 2021,
"Decision Transformer", section 5.1). The recorded player is a rule whose actions are replaced by random ones,
at a rate of its own in each episode; what can be learned from many of them is the rule without the noise.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress
from rich.table import Table

import trajstore
from trajstore import report
from trajstore.feed.measure import measure_sampling
from trajstore.stored import Array

if TYPE_CHECKING:
    import gymnasium

    from trajstore.view import View

CARTPOLE = "CartPole-v1"
WINDOW = 8  # observations that the policy sees
BATCH_SIZE = 512
_SAMPLE_S = 0.5
_SPARKS = "▁▂▃▄▅▆▇█"

Act = Callable[[Array], Array]  # the last observations [n, WINDOW, 4] -> actions [n]


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What a demo measured.

    Attributes:
        stores: URLs of the stores that it wrote, CartPole's first.
        losses: Cross-entropy of each training step, nats.
        recorded_return: Mean return of the recorded CartPole episodes.
        random_return: Mean return of random actions.
        trained_return: Mean return of the trained policy.
    """

    stores: tuple[str, ...]
    losses: tuple[float, ...]
    recorded_return: float
    random_return: float
    trained_return: float


def run_demo(
    url: str | None, *, seconds: float = 15.0, seed: int = 0, episodes: int = 300, console: Console
) -> DemoResult:
    """Run the demo: under a minute on two cores, without a network.

    Args:
        url: Where its stores go, one per environment: ``url/cartpole`` and so on. Stores that are there
            already are appended to. None: a new temporary directory, which is kept and named.
        seconds: How long to train.
        seed: Of the recorded episodes and of the training.
        episodes: CartPole episodes to record.
        console: Where to print.

    Raises:
        ImportError: gymnasium is not installed; the message says what to install.
    """
    # Not at the top: that gymnasium is missing is this command's error, not that of all commands.
    import trajstore.gym

    root = url.rstrip("/") if url else os.path.join(tempfile.mkdtemp(prefix="trajstore-"), "demo")
    console.rule(f"trajstore demo: {root}")
    stores = _record_all(root, episodes, seed, console)
    cartpole = stores[0]
    with trajstore.open(cartpole) as store:
        view = store.trajectories
        frame = view.to_pandas()
        console.print(f"{cartpole}, version {store.version}:", soft_wrap=True, highlight=False)
        report.print_trajectories(console, frame.head(8).drop(columns=["created_at", "env_id"]), total=len(frame))
        better = view.filter(f"reward_sum >= {float(frame['reward_sum'].median())!r}")
        policy, losses = _train(better, seconds, seed, console)
    rng, unseen = np.random.default_rng(seed), seed + 1_000_000
    result = DemoResult(
        stores=tuple(stores),
        losses=tuple(losses),
        recorded_return=float(frame["reward_sum"].mean()),
        random_return=_evaluate(lambda windows: rng.integers(2, size=len(windows)), unseen),
        trained_return=_evaluate(policy, unseen),
    )
    _show_returns(result, console)
    for store_url in stores:
        with trajstore.open(store_url) as store:
            report.print_usage(
                console,
                store.usage(),
                title=f"where the bytes of {store_url} are",
                how=f"trajstore info {store_url} --json shows all",
            )
    _show_sampling(stores, seed, console)
    console.print("\nLook further:", style="bold")
    for command in ("info", "ls", "head", "sample"):
        console.print(f"  trajstore {command} {cartpole}", highlight=False, soft_wrap=True)
    return result


def _record_all(root: str, episodes: int, seed: int, console: Console) -> list[str]:
    import gymnasium

    rng = np.random.default_rng(seed)
    noise = rng.uniform(0.3, 1.0, episodes)  # share of random actions, per episode

    def noisy_rule(observation: Array, episode: int) -> int:
        if rng.random() < noise[episode]:
            return int(rng.integers(2))
        return int(observation[2] + 0.3 * observation[3] > 0)  # push to the side that the pole is falling to

    stores = [f"{root}/cartpole"]
    metadata = [{"noise": round(float(share), 3)} for share in noise]
    _record(stores[0], gymnasium.make(CARTPOLE), noisy_rule, metadata, seed, console)
    if importlib.util.find_spec("ale_py"):
        stores.append(f"{root}/breakout")
        _record(stores[-1], _breakout(), None, [{}] * 4, seed, console)
    if importlib.util.find_spec("mujoco"):
        stores.append(f"{root}/hopper")
        _record(stores[-1], gymnasium.make("Hopper-v5"), None, [{}] * 30, seed, console)
    return stores


def _breakout() -> gymnasium.Env[Any, Any]:
    """Breakout in short episodes of grey frames at half resolution, uint8 [80, 80]."""
    import ale_py
    import gymnasium

    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    gymnasium.register_envs(ale_py)
    env = gymnasium.make("ALE/Breakout-v5", obs_type="grayscale", max_episode_steps=300)
    frames = gymnasium.spaces.Box(0, 255, (80, 80), np.uint8)
    return gymnasium.wrappers.TransformObservation(env, lambda frame: frame[34:194:2, ::2], frames)


def _record(
    url: str,
    env: gymnasium.Env[Any, Any],
    choose: Callable[[Array, int], Any] | None,  # (observation, episode) -> action; None: random
    metadata: Sequence[Mapping[str, Any]],  # one per episode
    seed: int,
    console: Console,
) -> None:
    from trajstore.gym import RecordTrajectories

    steps, started = 0, time.perf_counter()
    env.action_space.seed(seed)
    with (
        trajstore.open(url, mode="a") as store,
        closing(RecordTrajectories(env, store, metadata=lambda episode: metadata[episode])) as recorder,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        for episode in progress.track(range(len(metadata)), description=f"recording {url}"):
            observation, _ = recorder.reset(seed=seed + episode)
            ended = False
            while not ended:
                action = choose(observation, episode) if choose else env.action_space.sample()
                observation, _, terminated, truncated, _ = recorder.step(action)
                ended = terminated or truncated
                steps += 1
        store.flush()
        version = store.version
    elapsed = time.perf_counter() - started
    console.print(
        f"recorded {len(metadata)} episodes, {steps} steps in {elapsed:.1f} s: version {version} of {url}",
        soft_wrap=True,
    )


def _show_sampling(urls: Sequence[str], seed: int, console: Console) -> None:
    """How fast random windows come from each store, and how many of their rows were cached."""
    table = Table(title=f"random windows of {WINDOW} steps, {BATCH_SIZE} in a batch", title_justify="left")
    table.add_column("store")
    for name in ("a batch", "windows/s", "bytes/s", "cache hits"):
        table.add_column(name, justify="right")
    for url in urls:
        with (
            trajstore.open(url) as store,
            store.trajectories.loader(BATCH_SIZE, window=WINDOW, pad="edge", seed=seed) as loader,
        ):
            measured = measure_sampling(loader, seconds=_SAMPLE_S)
        pace = measured.hot if measured.hot.batches else measured.cold
        cache = measured.stats.cache
        table.add_row(
            os.path.basename(url),
            decimal(measured.batch_bytes),
            f"{pace.windows_per_s:,.0f}",
            f"{decimal(round(measured.bytes_per_s(pace)))}/s",
            f"{cache.hits / max(cache.hits + cache.misses, 1):.1%}",
        )
    console.print(table)


# Learning


def _train(view: View, seconds: float, seed: int, console: Console) -> tuple[Act, list[float]]:
    """Predict an action from the observations up to it."""
    device = _best_device()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(4 * WINDOW, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 64),
            torch.nn.ReLU(),
            torch.nn.Linear(64, 2),
        ).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses: list[float] = []
    with (
        _one_thread(),
        # At the start of an episode the first observation is repeated: pad="edge".
        view.loader(
            BATCH_SIZE, window={"obs": range(1 - WINDOW, 1), "action": 0}, pad="edge", seed=seed, device=device
        ) as loader,
    ):
        ends = time.perf_counter() + seconds
        for batch in loader:
            # obs [BATCH_SIZE, WINDOW, 4], action [BATCH_SIZE]
            loss = torch.nn.functional.cross_entropy(network(batch["obs"]), batch["action"])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            if time.perf_counter() > ends and len(losses) >= 20:
                break
    console.print(
        f"trained on the {len(view)} better trajectories ({view.num_steps} steps): {len(losses)} batches of "
        f"{BATCH_SIZE} windows of {WINDOW} observations on {device}"
    )
    part = max(1, len(losses) // 20)
    middle = len(losses) // 2
    start, half, end = (float(np.mean(x)) for x in (losses[:part], losses[middle : middle + part], losses[-part:]))
    console.print(f"loss {_sparkline(losses)}  start {start:.3f}, middle {half:.3f}, end {end:.3f} nats")
    console.print("(it cannot reach 0: a share of the recorded actions is random)")

    def act(windows: Array) -> Array:
        with torch.inference_mode():
            actions: Array = network(torch.from_numpy(windows).to(device)).argmax(-1).cpu().numpy()
        return actions

    return act, losses


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def _one_thread() -> Iterator[None]:
    # The network is so small that threads would spend their time waiting for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sparkline(values: Sequence[float], width: int = 40) -> str:
    means = [float(np.mean(part)) for part in np.array_split(np.asarray(values), min(width, len(values)))]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)


def _evaluate(act: Act, seed: int, episodes: int = 20) -> float:
    """Mean return of one CartPole episode in each of ``episodes`` environments."""
    import gymnasium

    with closing(gymnasium.make_vec(CARTPOLE, episodes, "sync")) as envs, _one_thread():
        observations, _ = envs.reset(seed=seed)
        # (episodes, WINDOW, 4); before the first observation, the first one again
        windows = np.repeat(observations[:, None], WINDOW, axis=1)
        returns, running = np.zeros(episodes), np.ones(episodes, bool)
        while running.any():
            observations, rewards, terminated, truncated, _ = envs.step(act(windows))
            windows = np.concatenate([windows[:, 1:], observations[:, None]], axis=1)
            returns += rewards * running
            running &= ~(terminated | truncated)
    return float(returns.mean())


def _show_returns(result: DemoResult, console: Console) -> None:
    table = Table(title=f"mean return of {CARTPOLE} (500 is the most there is)", title_justify="left")
    table.add_column("player")
    table.add_column("return", justify="right")
    table.add_row("random actions", f"{result.random_return:.0f}")
    table.add_row("the recorded episodes", f"{result.recorded_return:.0f}")
    table.add_row("the policy trained on the better half of them", f"{result.trained_return:.0f}")
    console.print(table)
