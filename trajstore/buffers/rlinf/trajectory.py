"""A trajectory as RLinf hands it over: a batch of environments, recorded in step.

Invariant: whatever has these fields is a trajectory; nothing here asks for the class. A field that is None is not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trajstore.errors import ColumnTypeError
from trajstore.interop.rlinf_files import leading_shape

Fields = dict[str, Any]


@dataclass
class Trajectory:
    """``T`` steps of ``B`` environments; same fields as RLinf's ``Trajectory``.

    Attributes:
        max_episode_length: Steps after which the environment truncates.
        model_weights_id: Of the policy that acted.
        actions: ``[T, B, ...]``, as all tensors; None for what was not recorded.
        intervene_flags: Whether a human acted instead.
        rewards: Of each step.
        terminations: As gymnasium means it. This and the next two may have ``T + extra`` rows with ``T % extra == 0``:
            ``extra`` epochs, each of which begins with a row that belongs to no step.
        truncations: As gymnasium means it.
        dones: Either of the two.
        prev_logprobs: Log-probabilities of the actions under the policy that acted.
        prev_values: Its value estimates.
        versions: Of the policy, by step.
        forward_inputs: Tensors that the policy needs to be run again.
        curr_obs: Observations before the actions.
        next_obs: Observations after them.
    """

    max_episode_length: int = 0
    model_weights_id: str = ""
    actions: torch.Tensor | None = None
    intervene_flags: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
    terminations: torch.Tensor | None = None
    truncations: torch.Tensor | None = None
    dones: torch.Tensor | None = None
    prev_logprobs: torch.Tensor | None = None
    prev_values: torch.Tensor | None = None
    versions: torch.Tensor | None = None
    forward_inputs: dict[str, Any] = field(default_factory=dict)
    curr_obs: dict[str, Any] = field(default_factory=dict)
    next_obs: dict[str, Any] = field(default_factory=dict)


def fields_of(trajectory: object) -> Fields:
    """What a trajectory holds: the fields of its dataclass, then its further public attributes, without those that are None.

    Args:
        trajectory: Anything with attributes: ours, RLinf's, or one of your own.

    Raises:
        ColumnTypeError: It has no attributes: a dict or a tensor, for example.

    Examples:
        >>> trajectory = Trajectory(max_episode_length=5, rewards=torch.zeros(2, 1))
        >>> trajectory.task = "pick"
        >>> list(fields_of(trajectory))
        ['max_episode_length', 'model_weights_id', 'rewards', 'forward_inputs', 'curr_obs', 'next_obs', 'task']
    """
    names: dict[str, None] = {}
    if dataclasses.is_dataclass(trajectory) and not isinstance(trajectory, type):
        names.update(dict.fromkeys(f.name for f in dataclasses.fields(trajectory)))
    elif isinstance(trajectory, Mapping | torch.Tensor | type) or not hasattr(trajectory, "__dict__"):
        raise ColumnTypeError(
            f"a trajectory is {type(trajectory).__name__}, expected an object with the fields of "
            "trajstore.buffers.rlinf.Trajectory; pass Trajectory(**fields)"
        )
    names.update(dict.fromkeys(name for name in getattr(trajectory, "__dict__", ()) if not name.startswith("_")))
    found = {name: getattr(trajectory, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def shape_of(fields: Mapping[str, Any]) -> tuple[int, int] | None:
    """``(T, B)``, from ``prev_logprobs`` if there is one, else from ``rewards``; None if there is neither.

    Args:
        fields: As ``fields_of`` gives them.

    Raises:
        ColumnTypeError: It is no tensor.
        ColumnShapeError: It has fewer than two dimensions, or no samples.

    Examples:
        >>> shape_of({"rewards": torch.zeros(5, 2)})
        (5, 2)
    """
    shape = leading_shape(fields)
    return None if shape is None else (shape[0], shape[1])


def check_list(trajectories: object) -> None:
    """Raise ``ColumnTypeError`` for a trajectory that is in no list."""
    if not isinstance(trajectories, Iterable):
        raise ColumnTypeError("add_trajectories takes a list of trajectories; got one: pass [trajectory]")
    if isinstance(trajectories, Mapping):
        raise ColumnTypeError("add_trajectories takes a list of trajectories; got a dict: pass [Trajectory(**fields)]")
