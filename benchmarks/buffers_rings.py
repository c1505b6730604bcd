"""Ring buffers and rollouts: ObjectRL's calls against TorchRL, ApexRL's against plain indexing, advantages against the loop.

Invariant: both sides hold the same rows and draw their own indices; a contender is timed over many calls at once, since one
takes microseconds, and nothing that it returned is kept.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping

import torch
import torchrl
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer

from benchmarks.harness import Bar, Contender, Context, Measurement, Timing, paired_ratios, ratio_of_medians
from trajstore.buffers import advantages, apexrl, objectrl

torchrl.logger.setLevel(logging.WARNING)

CAPACITY, BATCH = 100_000, 256
Call = Callable[[], object]


def in_turn(context: Context, calls: Mapping[str, Call], *, each: int, rounds: int) -> dict[str, Timing]:
    """Time calls in turn, ``each`` of them in a row; times are of a row."""

    def repeat(call: Call) -> Callable[[object], None]:
        def run(_none: object) -> None:
            for _ in range(each):
                call()

        return run

    contenders = [Contender(name=name, run=repeat(call)) for name, call in calls.items()]
    return context.measure(contenders, rounds=rounds, warmup=3)


# --- ObjectRL -----------------------------------------------------------------------------------------------


def _transitions(count: int, *, seed: int = 0) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    return TensorDict(
        {
            "obs": torch.randn(count, 17, generator=generator),
            "action": torch.randn(count, 6, generator=generator),
            "reward": torch.rand(count, generator=generator),
            "next_obs": torch.randn(count, 17, generator=generator),
            "terminated": torch.rand(count, generator=generator) < 0.01,
            "truncated": torch.zeros(count, dtype=torch.bool),
        },
        batch_size=[count],
    )


def _objectrl_pair(context: Context) -> tuple[objectrl.ReplayBuffer, TensorDictReplayBuffer]:
    """Ours and TorchRL's, each with room for ``CAPACITY`` and full of the same."""
    cpu = torch.device("cpu")
    ours = objectrl.ReplayBuffer(device=cpu, storing_device=cpu, buffer_size=CAPACITY)
    theirs = TensorDictReplayBuffer(storage=LazyMemmapStorage(CAPACITY, scratch_dir=context.scratch / "memmap"))
    rows = _transitions(CAPACITY)
    ours.add_batch(rows)
    theirs.extend(rows)
    return ours, theirs


def _against_torchrl(
    context: Context, what: str, calls: tuple[Call, Call], *, each: int, bar: Bar | None
) -> Measurement:
    timings = in_turn(context, {"trajstore": calls[0], "TorchRL": calls[1]}, each=each, rounds=context.pick(40, 8))
    return Measurement(
        name=f"objectrl {what}",
        what=f"ObjectRL, {what}: time / TorchRL's TensorDictReplayBuffer on LazyMemmapStorage",
        measured=ratio_of_medians(timings, "trajstore", "TorchRL"),
        bar=bar,
        timings=timings,
        spread=paired_ratios(timings, "trajstore", "TorchRL"),
        details={"calls_per_run": each, "capacity": CAPACITY},
    )


def objectrl_add(context: Context) -> Iterator[Measurement]:
    """One transition at a time."""
    ours, theirs = _objectrl_pair(context)
    rows = _transitions(512, seed=1)
    # One list each: TorchRL writes an index into what it is given.
    mine, yours = (iter([row.clone() for row in rows] * 10_000).__next__ for _ in range(2))
    yield _against_torchrl(
        context,
        "`add` of one transition",
        (lambda: ours.add(mine()), lambda: theirs.add(yours())),
        each=context.pick(500, 100),
        bar=Bar("at most", 0.5),
    )


def objectrl_add_batch(context: Context) -> Iterator[Measurement]:
    """A thousand transitions at a time."""
    ours, theirs = _objectrl_pair(context)
    mine, yours = _transitions(1_000, seed=1), _transitions(1_000, seed=1)
    yield _against_torchrl(
        context,
        "`add_batch` of 1,000 transitions",
        (lambda: ours.add_batch(mine), lambda: theirs.extend(yours)),
        each=context.pick(50, 10),
        bar=None,
    )


def objectrl_sample(context: Context) -> Iterator[Measurement]:
    """Random batches."""
    ours, theirs = _objectrl_pair(context)
    yield _against_torchrl(
        context,
        f"`sample_batch({BATCH})`",
        (lambda: ours.sample_batch(BATCH), lambda: theirs.sample(BATCH)),
        each=context.pick(100, 20),
        bar=Bar("at most", 0.6),
    )


# --- ApexRL -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Case:
    about: str
    capacity: int
    obs_shape: tuple[int, ...]
    action_width: int
    obs_dtype: torch.dtype = torch.float32


CASES = (
    _Case("4 and 2 floats, as in its page", 1_000_000, (4,), 2),
    _Case("48 and 12 floats", 200_000, (48,), 12),
    _Case("64x64x3 images", 10_000, (64, 64, 3), 2, torch.uint8),
)


def apexrl_sample(context: Context) -> Iterator[Measurement]:
    """``sample(256)`` against indexing preallocated tensors with the same number of random indices."""
    for case in CASES:
        yield _apexrl_sample(context, case)


def _apexrl_sample(context: Context, case: _Case) -> Measurement:
    generator = torch.Generator().manual_seed(0)
    buffer = apexrl.ReplayBuffer(
        capacity=case.capacity,
        obs_shape=case.obs_shape,
        action_shape=(case.action_width,),
        device="cpu",
        obs_dtype=case.obs_dtype,
        action_dtype=torch.float32,
    )

    def observations(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, *case.obs_shape), generator=generator).to(case.obs_dtype)

    plain = {
        "observations": torch.zeros(case.capacity, *case.obs_shape, dtype=case.obs_dtype),
        "actions": torch.zeros(case.capacity, case.action_width),
        "rewards": torch.zeros(case.capacity),
        "next_observations": torch.zeros(case.capacity, *case.obs_shape, dtype=case.obs_dtype),
        "dones": torch.zeros(case.capacity),
    }
    step = min(5_000, case.capacity)
    for first in range(0, case.capacity, step):
        rows = {
            "observations": observations(step),
            "actions": torch.randn(step, case.action_width, generator=generator),
            "rewards": torch.rand(step, generator=generator),
            "next_observations": observations(step),
            "dones": (torch.rand(step, generator=generator) < 0.01).float(),
        }
        buffer.add(**rows)
        for name, tensor in rows.items():
            plain[name][first : first + step] = tensor

    def indexing() -> object:
        rows = torch.randint(0, case.capacity, (BATCH,))
        return {name: tensor[rows] for name, tensor in plain.items()}

    timings = in_turn(
        context,
        {"trajstore": lambda: buffer.sample(BATCH), "indexing": indexing},
        each=context.pick(100, 20),
        rounds=context.pick(60, 10),
    )
    return Measurement(
        name=f"apexrl sample, {case.about}",
        what=f"ApexRL, `sample({BATCH})` of {case.capacity:,} ({case.about}): time / indexing preallocated tensors",
        measured=ratio_of_medians(timings, "trajstore", "indexing"),
        bar=Bar("at most", 1.0),
        timings=timings,
        spread=paired_ratios(timings, "trajstore", "indexing"),
    )


# --- advantages ---------------------------------------------------------------------------------------------


def gae_of_a_rollout(context: Context) -> Iterator[Measurement]:
    """24 steps of 4,096 environments, on every device that there is."""
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        yield _gae(context, device)


def _gae(context: Context, device: str) -> Measurement:
    steps, environments = 24, 4096
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(steps, environments, generator=generator).to(device) for _ in range(2))
    dones = (torch.rand(steps, environments, generator=generator) < 0.02).float().to(device)
    last_values = torch.randn(environments, generator=generator).to(device)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None

    def ours() -> None:
        advantages.gae(rewards, values, last_values, dones, gamma=0.99, lam=0.95)
        finish()

    def loop() -> None:
        plain_gae(rewards, values, last_values, dones, gamma=0.99, lam=0.95)
        finish()

    timings = in_turn(
        context, {"trajstore": ours, "loop": loop}, each=context.pick(50, 10), rounds=context.pick(40, 10)
    )
    return Measurement(
        name=f"gae {device}",
        what=f"advantages (GAE) of {steps} x {environments:,} on {device}: speed / the plain loop over steps",
        measured=ratio_of_medians(timings, "loop", "trajstore"),
        bar=Bar("at least", 5.0) if device == "cuda" else None,
        timings=timings,
        spread=paired_ratios(timings, "loop", "trajstore"),
        details={"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"},
    )


def plain_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    last_values: torch.Tensor,
    dones: torch.Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recursion, one step after the other, all environments at once; ``(T, N)`` advantages and returns."""
    found = torch.zeros_like(rewards)
    running = torch.zeros_like(last_values)
    following = last_values
    for step in reversed(range(len(rewards))):
        going_on = 1 - dones[step]
        delta = rewards[step] + gamma * following * going_on - values[step]
        running = delta + gamma * lam * going_on * running
        found[step] = running
        following = values[step]
    return found, found + values
