"""The plain reference of RLinf's replay buffer: trajectories in a list, batches built sample by sample, files as RLinf's.

Invariant: it is the obvious loop over the rules that RLinf documents, and shares no code with ``trajstore``. Whatever is
faster must give the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

DONE_FIELDS = ("terminations", "truncations", "dones")
TENSOR_FIELDS = (
    "actions",
    "intervene_flags",
    "rewards",
    "terminations",
    "truncations",
    "dones",
    "prev_logprobs",
    "prev_values",
    "versions",
)
DICT_FIELDS = ("forward_inputs", "curr_obs", "next_obs")


@dataclass
class PlainTrajectory:
    """What a framework hands over: tensors ``[T, B, ...]``, dicts of them, and None for what it has not recorded."""

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


def fields(trajectory: Any) -> dict[str, Any]:
    """What a trajectory holds, without what is None."""
    return {name: value for name, value in vars(trajectory).items() if value is not None}


def shape(trajectory: Any) -> tuple[int, int] | None:
    """``(T, B)``; None for a trajectory that is skipped."""
    for name in ("prev_logprobs", "rewards"):
        if getattr(trajectory, name, None) is not None:
            return tuple(getattr(trajectory, name).shape[:2])
    return None


class ReferenceBuffer:
    """RLinf's ``TrajectoryReplayBuffer``, as slowly and plainly as it can be said.

    Args:
        seed: Of the draws.
        sample_window_size: Trajectories that are drawn from, the newest; 0 for all.
    """

    def __init__(self, *, seed: int = 1234, sample_window_size: int = 100) -> None:
        self.seed = seed
        self.sample_window_size = sample_window_size
        self.counter = 0
        self.trajectories: list[tuple[int, Any]] = []  # (id, trajectory)
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.trajectories)

    @property
    def total_samples(self) -> int:
        """Samples of all trajectories."""
        return sum(shape(t)[0] * shape(t)[1] for _, t in self.trajectories)

    def is_ready(self, min_size: int) -> bool:
        """Whether it holds so many trajectories."""
        return len(self) >= min_size

    def add(self, trajectories: Iterable[Any]) -> None:
        """Number and keep them."""
        for trajectory in trajectories:
            if shape(trajectory) is not None:
                self.trajectories.append((self.counter, trajectory))
                self.counter += 1

    def sample(self, num_chunks: int) -> dict[str, Any]:
        """A batch ``[num_chunks, ...]``, or of as many as the window has."""
        if not self.trajectories:
            raise RuntimeError("the buffer is empty")
        window = [t for _, t in self.trajectories][-self.sample_window_size :]  # [-0:] is all of them
        samples = [(t, step, env) for t in window for step in range(shape(t)[0]) for env in range(shape(t)[1])]
        drawn = torch.randint(0, len(samples), (min(num_chunks, len(samples)),), generator=self.generator)
        return _stacked([sample_of(*samples[int(i)]) for i in drawn])

    def save(
        self,
        folder: Path,
        trajectory_format: str = "pt",
        *,
        older: bool = False,
        misspelt: bool = False,
        update_count: int | None = None,
    ) -> None:
        """RLinf's own files.

        Args:
            folder: Where; it is made.
            trajectory_format: Of the trajectories: ``"pt"`` or ``"pkl"``.
            older: With the keys of the first generation in ``metadata.json``.
            misspelt: With the index under its misspelt name.
            update_count: Ends the names of files, as in the longer form.
        """
        folder.mkdir(parents=True, exist_ok=True)
        index: dict[str, Any] = {}
        for number, trajectory in self.trajectories:
            leading = trajectory.rewards if trajectory.prev_logprobs is None else trajectory.prev_logprobs
            index[str(number)] = {
                "num_samples": shape(trajectory)[0] * shape(trajectory)[1],
                "trajectory_id": number,
                "max_episode_length": trajectory.max_episode_length,
                "shape": list(leading.shape),
                "model_weights_id": trajectory.model_weights_id,
            }
            name = f"trajectory_{number}_{trajectory.model_weights_id}"
            name += "" if update_count is None else f"_{update_count}"
            path = folder / f"{name}.{trajectory_format}"
            if trajectory_format == "pt":
                torch.save(fields(trajectory), path)
            else:
                path.write_bytes(pickle.dumps(fields(trajectory)))
        formats = {"storage_format": trajectory_format, "storage_dir": str(folder)}
        metadata = {
            **(formats if older else {"trajectory_format": trajectory_format}),
            "size": len(self),
            "total_samples": self.total_samples,
            "trajectory_counter": self.counter,
            "seed": self.seed,
        }
        (folder / "metadata.json").write_text(json.dumps(metadata))
        document = {"trajectory_index": index, "trajectory_id_list": [number for number, _ in self.trajectories]}
        (folder / ("trajector_index.json" if misspelt else "trajectory_index.json")).write_text(json.dumps(document))

    def load(self, folder: Path, *, rank: int | None = None, world_size: int = 1) -> None:
        """What ``save`` wrote, or a rank's share of it: a run of ids, longer by one for the first ranks if need be."""
        metadata = json.loads((folder / "metadata.json").read_text())
        document = json.loads((folder / "trajectory_index.json").read_text())
        ids = document["trajectory_id_list"]
        if rank is not None:
            sizes = [len(ids) // world_size + (1 if r < len(ids) % world_size else 0) for r in range(world_size)]
            ids = ids[sum(sizes[:rank]) :][: sizes[rank]]
        self.trajectories = []
        for number in ids:
            entry = document["trajectory_index"][str(number)]
            path = folder / f"trajectory_{number}_{entry['model_weights_id']}.{metadata['trajectory_format']}"
            stored = (
                torch.load(path, weights_only=True)
                if path.suffix == ".pt"
                else pickle.loads(path.read_bytes())  # of this test's own making
            )
            trajectory = PlainTrajectory(max_episode_length=entry["max_episode_length"])
            for name, value in stored.items():
                setattr(trajectory, name, value)
            self.trajectories.append((number, trajectory))
        self.seed = metadata["seed"]
        self.generator = torch.Generator().manual_seed(self.seed)
        self.counter = metadata["trajectory_counter"] if rank is None else max(ids, default=-1) + 1


def sample_of(trajectory: Any, step: int, env: int) -> dict[str, Any]:
    """One sample: the row of every field that has rows per step and environment."""
    length = shape(trajectory)[0]
    found: dict[str, Any] = {}
    for name, value in fields(trajectory).items():
        if isinstance(value, dict):
            nested = _nested_sample(value, step, env)
            if nested:
                found[name] = nested
        elif isinstance(value, torch.Tensor) and value.ndim >= 2:
            row = step
            if name in DONE_FIELDS and len(value) > length:
                epochs = len(value) - length
                steps = length // epochs
                row = (step // steps) * (steps + 1) + 1 + step % steps
            found[name] = value[row, env]
    return found


def _nested_sample(values: Mapping[str, Any], step: int, env: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            deeper = _nested_sample(value, step, env)
            if deeper:
                found[key] = deeper
        elif isinstance(value, torch.Tensor) and value.ndim >= 2:
            found[key] = value[step, env]
    return found


def _stacked(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        key: _stacked([s[key] for s in samples]) if isinstance(value, dict) else torch.stack([s[key] for s in samples])
        for key, value in samples[0].items()
    }


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal bit for bit, with equal types, dtypes and shapes, and in no particular order of keys."""
    if isinstance(expected, dict):
        assert isinstance(found, Mapping), f"{where} is {type(found).__name__}"
        assert set(found) == set(expected), f"{where} has {sorted(found)}, expected {sorted(expected)}"
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor), f"{where} is {type(found).__name__}"
        assert (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device), where
        assert torch.equal(_bits(found), _bits(expected)), where
    else:
        assert type(found) is type(expected), where
        assert found == expected, where


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# ---- trajectories at random -----------------------------------------------------------------------------------------

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (*FLOATS, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
NEXT_OBS = ("absent", "repeats", "repeats but at dones", "repeats but for a sign", "anew")


@dataclass(frozen=True)
class Part:
    """One tensor of a trajectory.

    Attributes:
        dtype: Of its values.
        shape: Of one sample's.
        rank: 2 for ``[T, B, *shape]``; 1 for ``[T]`` and 0 for one value, which no batch has.
    """

    dtype: torch.dtype
    shape: tuple[int, ...] = ()
    rank: int = 2


@dataclass(frozen=True)
class Layout:
    """What all trajectories of a buffer have in common.

    Attributes:
        tensors: Field -> its tensor. Fields that are missing here are None.
        curr_obs: Nested name -> tensor, ``>`` between the levels.
        forward_inputs: Likewise.
        next_obs: One of ``NEXT_OBS``: how it goes with ``curr_obs``.
    """

    tensors: Mapping[str, Part]
    curr_obs: Mapping[str, Part]
    forward_inputs: Mapping[str, Part]
    next_obs: str = "repeats but at dones"

    @property
    def skipped(self) -> bool:
        """Whether trajectories say nothing of T and B."""
        return not {"prev_logprobs", "rewards"} & set(self.tensors)


SIMPLE = Layout(
    tensors={
        "actions": Part(torch.float32, (3,)),
        "rewards": Part(torch.float32),
        "terminations": Part(torch.bool),
        "truncations": Part(torch.bool),
        "dones": Part(torch.bool),
        "prev_logprobs": Part(torch.bfloat16, (2,)),
    },
    curr_obs={"main_images": Part(torch.uint8, (4, 4, 3)), "states": Part(torch.float32, (5,))},
    forward_inputs={"tokens": Part(torch.int64, (2,)), "deep>er": Part(torch.float16)},
)


def random_values(rng: np.random.Generator, part: Part, T: int, B: int) -> torch.Tensor:
    """A tensor of that part, with not-a-numbers and negative zeros among its floats."""
    shape = {2: (T, B, *part.shape), 1: (T,), 0: ()}[part.rank]
    if part.dtype in FLOATS:
        values = torch.from_numpy(np.asarray(rng.standard_normal(shape))).to(part.dtype)
        special = torch.from_numpy(np.asarray(rng.integers(0, 40, shape)))
        values = torch.where(special == 0, torch.tensor(float("nan"), dtype=part.dtype), values)
        return torch.where(special == 1, torch.tensor(-0.0, dtype=part.dtype), values)
    if part.dtype == torch.bool:
        return torch.from_numpy(np.asarray(rng.integers(0, 2, shape))).to(torch.bool)
    info = torch.iinfo(part.dtype)
    return torch.from_numpy(np.asarray(rng.integers(info.min, info.max, shape, endpoint=True))).to(part.dtype)


def random_trajectory(
    rng: np.random.Generator,
    layout: Layout = SIMPLE,
    *,
    T: int = 6,
    B: int = 2,
    extra: int = 0,
    extra_fields: Sequence[str] = DONE_FIELDS,
    weights: str = "weights",
) -> PlainTrajectory:
    """A trajectory of that layout.

    Args:
        rng: Where its values come from.
        layout: What it has.
        T: Steps.
        B: Environments.
        extra: Rows that ``extra_fields`` have beyond T; divides T.
        extra_fields: Of ``DONE_FIELDS``.
        weights: Its ``model_weights_id``.
    """
    made = PlainTrajectory(max_episode_length=int(rng.integers(0, 500)), model_weights_id=weights)
    for name, part in layout.tensors.items():
        rows = T + extra if name in extra_fields and name in DONE_FIELDS else T
        setattr(made, name, random_values(rng, part, rows, B))
    made.curr_obs = _random_dict(rng, layout.curr_obs, T, B)
    made.forward_inputs = _random_dict(rng, layout.forward_inputs, T, B)
    if layout.next_obs != "absent":
        ends = torch.from_numpy(rng.integers(0, 4, (T, B)) == 0)
        made.next_obs = _next_obs(rng, made.curr_obs, layout.next_obs, ends, T, B)
    return made


def _random_dict(rng: np.random.Generator, parts: Mapping[str, Part], T: int, B: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for path, part in parts.items():
        *above, last = path.split(">")
        place = made
        for key in above:
            place = place.setdefault(key, {})
        place[last] = random_values(rng, part, T, B)
    return made


def _next_obs(
    rng: np.random.Generator, curr_obs: Mapping[str, Any], how: str, ends: torch.Tensor, T: int, B: int
) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in curr_obs.items():
        if isinstance(value, dict):
            made[key] = _next_obs(rng, value, how, ends, T, B)
            continue
        if value.ndim < 2:
            made[key] = value.clone()
            continue
        anew = random_values(rng, Part(value.dtype, tuple(value.shape[2:])), T, B)
        if how != "anew":
            final = anew[-1].clone()
            if how == "repeats but at dones":
                anew = torch.where(ends.reshape(T, B, *[1] * (value.ndim - 2)), anew, torch.roll(value, -1, 0))
            else:
                anew = torch.roll(value, -1, 0)
                if how == "repeats but for a sign" and value.dtype in FLOATS:
                    anew[0] = torch.where(anew[0] == 0, -anew[0], anew[0])
            anew[-1] = final
        made[key] = anew
    return made


_shapes = st.sampled_from([(), (1,), (3,), (2, 2)])
_parts = st.builds(Part, st.sampled_from(DTYPES), _shapes)
_odd_parts = st.builds(Part, st.sampled_from(DTYPES), _shapes, st.sampled_from([2, 2, 2, 1, 0]))
_OBS_NAMES = ("main_images", "states", "deep>er>still", "deep>image")


@st.composite
def layouts(draw: st.DrawFn, *, skipped: bool = False) -> Layout:
    """Any layout; by default one whose trajectories are not skipped.

    Args:
        draw: Hypothesis'.
        skipped: With neither ``prev_logprobs`` nor ``rewards``.
    """
    names = [n for n in TENSOR_FIELDS if n not in ("prev_logprobs", "rewards") and draw(st.booleans())]
    tensors = {n: draw(_parts if n in DONE_FIELDS else _odd_parts) for n in names}
    if not skipped:
        for name in draw(st.sampled_from([("prev_logprobs",), ("rewards",), ("prev_logprobs", "rewards")])):
            tensors[name] = draw(_parts)
    return Layout(
        tensors=tensors,
        curr_obs=draw(st.dictionaries(st.sampled_from(_OBS_NAMES), _odd_parts, max_size=3)),
        forward_inputs=draw(st.dictionaries(st.sampled_from(("tokens", "x", "deep>er")), _odd_parts, max_size=2)),
        next_obs=draw(st.sampled_from(NEXT_OBS)),
    )


@st.composite
def trajectories(draw: st.DrawFn, layout: Layout, *, max_trajectories: int = 5) -> list[PlainTrajectory]:
    """Trajectories of a layout that differ in T, B and the extra rows of their done fields."""
    made = []
    for number in range(draw(st.integers(1, max_trajectories))):
        epochs, steps = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        made.append(
            random_trajectory(
                np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
                layout,
                T=epochs * steps,
                B=draw(st.integers(1, 3)),
                extra=draw(st.sampled_from([0, epochs])),
                extra_fields=draw(st.sampled_from([DONE_FIELDS, DONE_FIELDS, ("dones",), ("dones", "truncations")])),
                weights=f"weights{number // 2}",
            )
        )
    return made


def with_attributes(trajectory: PlainTrajectory, **attributes: Any) -> PlainTrajectory:
    """A copy with further attributes, which are no fields of the class."""
    copy = dataclasses.replace(trajectory)
    vars(copy).update(attributes)
    return copy
