"""Rollouts in a store: written as pieces of environments, found again, read back.

Invariant: a rollout is found only if all of its pieces are there: one that was cut off by a crash is as if it had never been
added.
"""

from __future__ import annotations

import numbers
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trajstore.buffers.rlinf import columns as parts
from trajstore.buffers.rlinf.columns import Rollout
from trajstore.buffers.rlinf.index import Entry
from trajstore.buffers.rlinf.trajectory import shape_of
from trajstore.errors import ColumnTypeError, LengthError, SelectionError
from trajstore.names import flatten, nest
from trajstore.store import Store
from trajstore.stored import Array
from trajstore.view import View
from trajstore.write.batch import TrajectoryRef

# Metadata fields of a piece.
ID, WEIGHTS, EPISODE_LENGTH = "trajectory_id", "model_weights_id", "max_episode_length"
STEPS, ENVS, ENV, SEED, REST = "rollout_steps", "rollout_envs", "env", "seed", "rest"

_FOLLOWING = "next_curr_obs"  # what a view calls ``curr_obs`` a step on
_NO_COLUMNS = frozenset([ID, STEPS, ENVS, ENV, SEED, REST, _FOLLOWING])


@dataclass(frozen=True, eq=False)
class Found:
    """The rollouts of a view.

    Attributes:
        entries: From the oldest on.
        rows: ``(pieces,)`` int64, positions in the view of all pieces of these rollouts, in order.
        seed: Of the buffer that wrote the newest; None without one.
    """

    entries: list[Entry]
    rows: Array
    seed: int | None


def taken_apart(fields: Mapping[str, Any]) -> Rollout | None:
    """The columns of a trajectory's fields; None if it has neither ``prev_logprobs`` nor ``rewards``.

    Raises:
        LengthError: It has no samples.
        ColumnTypeError: Its ``max_episode_length`` is no whole number, or ``model_weights_id`` no text.
    """
    shape = shape_of(fields)
    if shape is None:
        return None
    if not shape[0] * shape[1]:
        raise LengthError(
            f"a trajectory has {shape[0]} steps of {shape[1]} environments, expected at least one of each"
        )
    for name, kind in ((EPISODE_LENGTH, numbers.Integral), (WEIGHTS, str)):
        value = fields.get(name)
        if value is not None and not isinstance(value, kind):
            raise ColumnTypeError(f"field {name!r} is a {type(value).__name__}, expected {kind.__name__}")
    return parts.take_apart(fields, *shape, taken=_NO_COLUMNS)


def append(
    store: Store, fields: Mapping[str, Any], rollout: Rollout, shared: Collection[str], *, number: int, seed: int
) -> tuple[Entry, list[TrajectoryRef]]:
    """Append a rollout; what it is called, and its pieces.

    Args:
        store: Of rollouts like this one.
        fields: Of the trajectory.
        rollout: The same, taken apart.
        shared: Observations that are stored once.
        number: Its ``trajectory_id``.
        seed: Of the buffer.

    Raises:
        SelectionError: Its tensors have changed since it was taken apart.
    """
    about = {
        ID: number,
        WEIGHTS: str(fields.get(WEIGHTS, "")),
        EPISODE_LENGTH: int(fields.get(EPISODE_LENGTH, 0)),
        STEPS: rollout.steps,
        ENVS: rollout.envs,
        SEED: seed,
    }
    cut = parts.pieces(rollout, shared)
    rollout.check_unchanged()  # from here on it is a copy
    metadata: list[dict[str, Any]] = [{ENV: env} for env in cut.envs.tolist()]
    if rollout.rest:
        metadata[0][REST] = rollout.rest
    refs = store.append_many(
        cut.columns, cut.lengths, terminated=cut.terminated, truncated=cut.truncated, metadata=metadata, **about
    )
    return Entry(number, rollout.steps, rollout.envs, len(refs)), refs


def find(view: View) -> Found:
    """The rollouts of a view.

    Raises:
        SelectionError: It holds other trajectories.
    """
    table = view.to_pandas()
    if not len(table):
        return Found([], np.empty(0, np.int64), None)
    for name in (ID, STEPS, ENVS):
        others = int(table[name].isna().sum()) if name in table else len(table)
        if others == len(table):
            raise SelectionError(
                f"{view!r} holds no rollouts of a replay buffer: its trajectories have no field {name!r}; name a store "
                "that a TrajectoryReplayBuffer wrote, or sample this one with store.trajectories.loader()"
            )
        if others:
            raise SelectionError(
                f"{view!r} holds other trajectories beside the rollouts of a replay buffer: {others} have no field "
                f"{name!r}; keep them in a store of their own, or sample all of them with store.trajectories.loader()"
            )
    ids = table[ID].to_numpy(np.int64)
    steps, envs = table[STEPS].to_numpy(np.int64), table[ENVS].to_numpy(np.int64)
    ends = np.cumsum(view.lengths)
    changes = np.flatnonzero(np.diff(ids)) + 1
    entries: list[Entry] = []
    rows: list[Array] = []
    row = 0
    while row < len(table):
        samples = int(steps[row] * envs[row])
        begin = int(ends[row - 1]) if row else 0
        last = int(np.searchsorted(ends, begin + samples))
        whole = last < len(table) and ends[last] == begin + samples and (ids[row : last + 1] == ids[row]).all()
        if whole:
            entries.append(Entry(int(ids[row]), int(steps[row]), int(envs[row]), last + 1 - row))
            rows.append(np.arange(row, last + 1))
            row = last + 1
        else:
            later = changes[changes > row]
            row = int(later[0]) if len(later) else len(table)
    seed = table[SEED].iloc[-1] if SEED in table else None
    found = np.concatenate(rows) if rows else np.empty(0, np.int64)
    return Found(entries, found, None if seed is None else int(seed))


def read(view: View, entries: Sequence[Entry]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Id and fields of rollouts, one after the other.

    Args:
        view: Their pieces, and no others.
        entries: The rollouts.
    """
    first = 0
    for entry in entries:
        pieces = view[first : first + entry.pieces]
        first += entry.pieces
        about = pieces[0].metadata
        rows = {c.path: _tensor(pieces.read(c.path)) for c in view.schema if c.path in pieces[0].columns}
        columns = parts.columns_of(view.schema, rows, pieces.lengths.tolist(), entry.steps, entry.envs)
        fields = parts.put_together(columns, about.get(REST, ""))
        fields.setdefault(EPISODE_LENGTH, about[EPISODE_LENGTH])
        fields.setdefault(WEIGHTS, about.get(WEIGHTS, ""))
        yield entry.id, fields


def share_of(count: int, rank: int, ranks: int) -> slice:
    """Consecutive rollouts of one rank; the first ``count % ranks`` ranks get one more.

    >>> [share_of(5, rank, 2) for rank in range(2)]
    [slice(0, 3, None), slice(3, 5, None)]
    """
    size, more = divmod(count, ranks)
    first = rank * size + min(rank, more)
    return slice(first, first + size + (rank < more))


def batch_columns(rollout_columns: Collection[str], shared: Collection[str]) -> list[str]:
    """What to ask a view for: the next observation is the current one a step on, where it is stored once."""
    return [*rollout_columns, *(f"{_FOLLOWING}/{name}" for name in sorted(shared))]


def as_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch under the names of the original."""
    following = batch.pop(_FOLLOWING, None)
    if following is not None:
        batch["next_obs"] = _merged(following, batch.get("next_obs", {}))
    return parts.unescaped_keys(batch)


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return nest({**flatten(one), **(flatten(other) if other else {})})


def _tensor(values: Any) -> torch.Tensor:
    return values if isinstance(values, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(values))
