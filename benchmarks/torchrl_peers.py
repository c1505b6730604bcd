"""TorchRL and cpprb at the same job: the same rows in their own buffers, at the best of their settings.

Invariant: nothing is made harder for a peer. Buffers hold only the columns that are asked for and what the sampler itself
needs; keys that a sampler adds to its batches are switched off; the plain ``ReplayBuffer`` is used, which is faster than
``TensorDictReplayBuffer``; of several ways the fastest is compared.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cpprb
import numpy as np
import torch
import torchrl
import zarr
import zarr.codecs
from tensordict import TensorDict
from torchrl.data import (
    LazyMemmapStorage,
    LazyTensorStorage,
    RandomSampler,
    ReplayBuffer,
    SliceSampler,
    SliceSamplerWithoutReplacement,
    TensorStorage,
)
from torchrl.data.replay_buffers import Sequence

torchrl.logger.setLevel(logging.WARNING)

Draw = Callable[[], object]  # one batch
TRAJECTORY, DONE = "trajectory", "done"


def storage(kind: str, rows: int, scratch: Path) -> LazyTensorStorage:
    """``"memmap"`` or ``"tensor"``, empty."""
    if kind == "tensor":
        return LazyTensorStorage(rows)
    return LazyMemmapStorage(rows, scratch_dir=tempfile.mkdtemp(dir=scratch))


# What each way of drawing windows takes: settings of the buffer for `windows` x `length` steps, and the boundary column it
# reads. StreamingSliceSampler, whose uniform part took 25 ms at a million steps, is left out; ``ends=`` fails in 0.14.1.
WINDOW_SAMPLERS: Mapping[str, tuple[Callable[[int, int], dict[str, Any]], str]] = {
    "SliceSampler": (
        lambda windows, length: {
            "sampler": SliceSampler(slice_len=length, traj_key=TRAJECTORY, strict_length=True, cache_values=True),
            "batch_size": windows * length,
        },
        TRAJECTORY,
    ),
    "SliceSampler, no added keys": (
        lambda windows, length: {
            "sampler": SliceSampler(
                slice_len=length,
                traj_key=TRAJECTORY,
                strict_length=True,
                cache_values=True,
                truncated_key=None,
                init_key=None,
            ),
            "batch_size": windows * length,
        },
        TRAJECTORY,
    ),
    "SliceSamplerWithoutReplacement": (
        lambda windows, length: {
            "sampler": SliceSamplerWithoutReplacement(slice_len=length, traj_key=TRAJECTORY, strict_length=True),
            "batch_size": windows * length,
        },
        TRAJECTORY,
    ),
    "Sequence, stop": (
        lambda windows, length: {
            "sample_unit": Sequence(length=length, done_key=DONE, episode_boundary="stop"),
            "batch_size": windows,
        },
        DONE,
    ),
    "Sequence, pad": (
        lambda windows, length: {
            "sample_unit": Sequence(length=length, done_key=DONE, episode_boundary="pad"),
            "batch_size": windows,
        },
        DONE,
    ),
}


def window_buffer(
    way: str,
    columns: Mapping[str, np.ndarray],
    lengths: np.ndarray,
    *,
    windows: int,
    length: int,
    kind: str,
    scratch: Path,
    room: int = 0,
) -> ReplayBuffer:
    """A filled buffer that draws windows.

    Args:
        way: Of ``WINDOW_SAMPLERS``.
        columns: Name -> ``(steps, ...)``, episodes end to end; the boundary column is added if it is not among them.
        lengths: ``(episodes,)``, their sum is ``steps``.
        windows: Per batch.
        length: Steps of a window.
        kind: Of ``storage``.
        scratch: For memory-mapped files.
        room: Steps that may be added later.
    """
    settings, boundary = WINDOW_SAMPLERS[way]
    rows = window_rows(columns, lengths, boundary)
    buffer = ReplayBuffer(storage=storage(kind, len(rows) + room, scratch), **settings(windows, length))
    buffer.extend(rows)
    return buffer


def window_rows(
    columns: Mapping[str, np.ndarray], lengths: np.ndarray, boundary: str, *, first_trajectory: int = 0
) -> TensorDict:
    """Columns of whole episodes with the boundary column that a sampler reads."""
    steps = int(lengths.sum())
    found = {name: torch.from_numpy(array) for name, array in columns.items()}
    if boundary == TRAJECTORY:
        found[TRAJECTORY] = torch.from_numpy(np.repeat(np.arange(len(lengths)) + first_trajectory, lengths))
    else:
        ends = np.zeros((steps, 1), bool)
        ends[np.cumsum(lengths) - 1] = True
        found[DONE] = torch.from_numpy(ends)
    return TensorDict(found, [steps])


def transition_buffers(
    transitions: Mapping[str, np.ndarray], batch_size: int, scratch: Path
) -> dict[str, Callable[[], object]]:
    """Ways to draw single transitions: TorchRL with both storages, cpprb with and without its shared next state.

    Args:
        transitions: ``obs``, ``action``, ``reward``, ``next_obs`` and ``terminated``, ``(steps, ...)`` each.
        batch_size: Transitions per batch.
        scratch: For memory-mapped files.
    """
    ways: dict[str, Callable[[], object]] = {}
    tensors = {name: torch.from_numpy(array) for name, array in transitions.items()}
    steps = len(tensors["obs"])
    following = {
        "observation": tensors["next_obs"],
        "reward": tensors["reward"][:, None],
        "terminated": tensors["terminated"][:, None],
    }
    rows = TensorDict(
        {"observation": tensors["obs"], "action": tensors["action"], "next": TensorDict(following, [steps])}, [steps]
    )
    for kind in ("memmap", "tensor"):
        buffer = ReplayBuffer(storage=storage(kind, steps, scratch), sampler=RandomSampler(), batch_size=batch_size)
        buffer.extend(rows)
        ways[f"TorchRL, {kind}"] = buffer.sample
    for name, shares_next in (("cpprb, next_of", True), ("cpprb, plain", False)):
        kept = ["obs", "action", "reward", "terminated"] + ([] if shares_next else ["next_obs"])
        spec = {key: {"shape": transitions[key].shape[1:] or 1, "dtype": transitions[key].dtype} for key in kept}
        flat = cpprb.ReplayBuffer(steps, spec, **({"next_of": "obs"} if shares_next else {}))
        given = kept + (["next_obs"] if shares_next else [])
        flat.add(**{key: transitions[key] for key in given})
        ways[name] = lambda flat=flat: flat.sample(batch_size)  # type: ignore[misc]
    return ways


def zarr_buffer(
    columns: Mapping[str, np.ndarray], lengths: np.ndarray, *, windows: int, length: int, chunk_rows: int, path: Path
) -> ReplayBuffer:
    """Windows out of a compressed Zarr group through ``TensorDict.from_zarr``.

    Large columns are in chunks of ``chunk_rows``, others in a single chunk: smaller ones only cost it time.
    """
    group = zarr.create_group(path)
    whole = {**columns, TRAJECTORY: np.repeat(np.arange(len(lengths)), lengths)}
    for name, array in whole.items():
        rows = chunk_rows if array.ndim > 2 else len(array)
        chunks = (rows, *array.shape[1:])
        codec = zarr.codecs.ZstdCodec(level=1)
        group.create_array(name, shape=array.shape, dtype=array.dtype, chunks=chunks, compressors=codec)[...] = array
    stored = TensorDict.from_zarr(str(path), batch_size=[int(lengths.sum())])
    settings, _ = WINDOW_SAMPLERS["SliceSampler"]
    return ReplayBuffer(
        storage=TensorStorage(stored), collate_fn=lambda rows: rows.to_tensordict(), **settings(windows, length)
    )


def probe(draws: Mapping[str, Draw], *, probes: int = 15, warmup: int = 3) -> dict[str, float]:
    """Median seconds per batch of each way, one way after the other: enough to see which are far off."""
    medians = {}
    for name, draw in draws.items():
        for _ in range(warmup):
            draw()
        seconds = []
        for _ in range(probes):
            begin = time.perf_counter()
            draw()
            seconds.append(time.perf_counter() - begin)
        medians[name] = statistics.median(seconds)
    return medians


def fastest(draws: Mapping[str, Draw], *, within: float = 1.5) -> list[str]:
    """The ways that are worth timing in turn: those within a factor of the fastest in a short probe."""
    medians = probe(draws)
    best = min(medians.values())
    return [name for name, median in medians.items() if median <= within * best]
