"""Trajectories with fields of every kind come back exactly, through stores and through RLinf's files."""

from __future__ import annotations

import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.buffers.test_rlinf_buffer import reference_of
from tests.buffers.test_rlinf_parity import assert_parity
from tests.support.rare import also_slow, diagonal
from tests.support.rlinf_reference import assert_same, fields
from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer, rollouts


def stored_fields(buffer: TrajectoryReplayBuffer) -> dict[str, dict[str, Any]]:
    """Of each rollout by id, as they come out of the buffer's store."""
    assert buffer.store is not None
    buffer.store.flush()
    view = buffer.store.trajectories
    return {str(number): read for number, read in rollouts.read(view, rollouts.find(view).entries)}


def everything(steps: int, envs: int, *, number: int = 0, epochs: int = 1) -> Trajectory:
    """A trajectory with fields of every kind."""
    generator = torch.Generator().manual_seed(number)

    def rand(*shape: int, rows: int = steps) -> torch.Tensor:
        return torch.rand(rows, envs, *shape, generator=generator)

    bits = torch.randint(-(2**31), 2**31, (steps, envs, 5), generator=generator).to(torch.int32)
    bits[..., 0] = 0x7FC00001 + torch.arange(envs)  # not-a-numbers that differ
    bits[..., 1] = -(2**31)  # minus zero
    states = rand(3, rows=steps + 1).to(torch.bfloat16)
    trajectory = Trajectory(
        max_episode_length=7,
        model_weights_id=f"step {number}: ü",
        actions=rand(4, 3).transpose(2, 3).to(torch.float16),
        intervene_flags=rand(2) > 0.5,
        rewards=torch.tensor(0.5).expand(steps, envs),
        dones=rand(rows=steps + epochs) > 0.5,
        prev_values=rand(1, rows=steps + 1),
        prev_logprobs=rand().requires_grad_(),
        versions=torch.arange(2 * steps * envs).view(steps, 2 * envs)[:, ::2],
        curr_obs={
            "states": states[:-1],
            "constant": torch.tensor(0.5).expand(steps, envs, 1),
            "image": (255 * rand(4, 4, 3)).to(torch.uint8).flip(0),
        },
        next_obs={
            "states": states[1:],
            "constant": torch.tensor(0.5).expand(steps, envs, 1),
            "texts": ["pick", "place"],
            "none": None,
            "empty": {},
        },
        forward_inputs={
            "observation/image": rand(2),
            "deep": {"int8": (255 * rand() - 128).to(torch.int8), "er": {"complex": torch.complex(rand(2), rand(2))}},
            "bits": bits.view(torch.float32),
            "bool": rand() > 0.5,
            "scalar": torch.tensor(2.5),
            "row": torch.arange(3.0) * number,
            "one": torch.tensor(1.5).expand(1),
            "conjugate": torch.complex(rand(), rand())[0].sum(0, keepdim=True).conj(),
            "empty": {"deeper": {}},
        },
    )
    trajectory.advantages = rand(2).double()  # type: ignore[attr-defined]
    trajectory.task = "stack"  # type: ignore[attr-defined]
    trajectory.success = True  # type: ignore[attr-defined]
    trajectory.count = 2**40 + number  # type: ignore[attr-defined]
    trajectory.rate = float("inf")  # type: ignore[attr-defined]
    trajectory.names = ("a", ["b", 1.5, None])  # type: ignore[attr-defined]
    return trajectory


def plain(tree: dict[str, Any]) -> dict[str, Any]:
    """Without gradients and odd strides, which are not kept."""
    found = {}
    for key, value in tree.items():
        found[key] = plain(value) if isinstance(value, dict) else value
        if isinstance(value, torch.Tensor):
            found[key] = value.detach().clone(memory_format=torch.contiguous_format)
    return found


@pytest.mark.parametrize(
    ("steps", "envs", "epochs"),
    also_slow([(1, 1, 1), (2, 1, 2), (1, 3, 1), (6, 1, 2), (4, 2, 1), (6, 3, 3)], [(1, 1, 1), (6, 1, 2), (6, 3, 3)]),
)
class TestFields:
    def test_round_trips(self, tmp_path: Path, steps: int, envs: int, epochs: int) -> None:
        trajectories = [everything(steps, envs, number=n, epochs=epochs) for n in range(3)]
        expected = {str(n): plain(fields(trajectory)) for n, trajectory in enumerate(trajectories)}
        reference = reference_of(
            [types.SimpleNamespace(**without_gradients) for without_gradients in expected.values()]
        )
        with TrajectoryReplayBuffer(allow_pickle=True) as buffer:
            buffer.add_trajectories(trajectories)
            assert_parity(buffer, reference)
            assert_same(stored_fields(buffer), expected)
            for form in ("store", "pt", "store", "pkl"):
                buffer.trajectory_format = form
                place = tmp_path / form
                buffer.save_checkpoint(place)
                shutil.rmtree(tmp_path / "before", ignore_errors=True)
                buffer.load_checkpoint(place)
                assert_same(stored_fields(buffer), expected)
                place.rename(tmp_path / "before")  # the buffer needs it no longer
                reference.generator.manual_seed(reference.seed)
                assert_parity(buffer, reference)


def assert_kept(place: Path, trajectories: list[Any]) -> None:
    """Fields and batches, before and after checkpoints of both kinds."""
    expected = {str(n): plain(fields(trajectory)) for n, trajectory in enumerate(trajectories)}
    reference = reference_of(trajectories)
    with TrajectoryReplayBuffer() as buffer:
        buffer.add_trajectories(trajectories)
        assert_parity(buffer, reference)
        for form in ("store", "pt"):
            buffer.trajectory_format = form
            buffer.save_checkpoint(place / form)
            buffer.load_checkpoint(place / form)
            assert_same(stored_fields(buffer), expected)
            reference.generator.manual_seed(reference.seed)
            assert_parity(buffer, reference)


def stepping(number: int = 0, **more: Any) -> Trajectory:
    """Six steps of two environments, whose next observation is that of the next step; with more fields."""
    states = torch.arange(7.0)[:, None, None].expand(-1, 2, 3) + 100 * number
    trajectory = Trajectory(rewards=torch.rand(6, 2), curr_obs={"states": states[:-1]}, next_obs={"states": states[1:]})
    for name, value in more.items():
        setattr(trajectory, name, value)
    return trajectory


@pytest.mark.parametrize(
    ("name", "kind"),
    diagonal(
        ["seed", "env", "rest", "trajectory_id", "rollout_steps", "rollout_envs", "next_curr_obs", "Seed", "~73eed"],
        ["tensors", "number", "tensor"],
    ),
)
def test_fields_that_the_store_has_its_own_use_for(tmp_path: Path, name: str, kind: str) -> None:
    kinds = {"tensor": torch.arange(12.0).view(6, 2), "number": 7}
    value = kinds.get(kind, {"states": torch.arange(12.0).view(6, 2, 1), name: torch.ones(6, 2)})
    assert_kept(tmp_path, [stepping(number, **{name: value}) for number in range(2)])


@pytest.mark.parametrize("lacks", [False, True])
def test_such_a_field_is_called_by_its_name_in_errors(lacks: bool) -> None:
    one, other = stepping(seed=torch.ones(6, 2)), stepping()
    with TrajectoryReplayBuffer() as buffer:
        buffer.add_trajectories([one if lacks else other])
        with pytest.raises(ValueError, match="lacks 'seed'" if lacks else "has 'seed' besides"):
            buffer.add_trajectories([other if lacks else one])


@pytest.mark.parametrize(("dtype", "shape"), diagonal([torch.uint16, torch.uint32, torch.uint64], [(), (1,), (4, 2)]))
def test_unsigned_integers(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)

    def values(rows: int = 6) -> torch.Tensor:
        return torch.randint(0, 2**16, (rows, 2, *shape), generator=generator).to(dtype)

    trajectories = []
    for number in range(2):
        trajectory = stepping(
            number, extra=values(), dones=values(7) if number else torch.zeros(7, 2, *shape, dtype=dtype)
        )
        states = values(7)
        trajectory.curr_obs["unsigned"], trajectory.next_obs["unsigned"] = states[:-1], states[1:].clone()
        trajectory.next_obs["unsigned"][3] = values(1)[0]  # an exception
        trajectories.append(trajectory)
    assert_kept(tmp_path, trajectories)


def test_a_sparse_tensor_is_refused_before_anything_is_filed() -> None:
    with TrajectoryReplayBuffer() as buffer:
        with pytest.raises(ValueError, match=r"field 'extra' is a sparse tensor; pass its to_dense\(\)"):
            buffer.add_trajectories([stepping(extra=torch.eye(6, 2).to_sparse())])
        assert len(buffer) == 0
