"""What ``TrajectoryReplayBuffer`` refuses, and that it is then as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trajstore
from tests.buffers.test_rlinf_buffer import made, reference_of, saved_at
from tests.buffers.test_rlinf_parity import assert_parity
from tests.support.rlinf_reference import with_attributes
from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer
from trajstore.errors import (
    ColumnTypeError,
    CorruptionError,
    EmptyBufferError,
    IndexRangeError,
    MissingObjectError,
    SelectionError,
    StoreNotFoundError,
)


class TestBadInput:
    """A clear error each, and the buffer is as it was: the same counts, the same next batch."""

    @pytest.fixture(params=["temporary", "saved"])
    def buffer(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TrajectoryReplayBuffer]:
        place = {} if request.param == "temporary" else {"auto_save": True, "auto_save_path": tmp_path / "run"}
        with TrajectoryReplayBuffer(**place) as buffer:
            buffer.add_trajectories(made(2))
            yield buffer

    def refused(self, buffer: TrajectoryReplayBuffer, error: type[Exception], match: str, call: Any) -> None:
        with pytest.raises(error, match=match):
            call()
        reference = reference_of(made(2))
        assert_parity(buffer, reference)
        buffer.add_trajectories(made(1, first=2))  # and it goes on
        reference.add(made(1, first=2))
        assert_parity(buffer, reference)

    @pytest.mark.parametrize("all_of_it", [False, True])
    def test_tensors_elsewhere(self, buffer: TrajectoryReplayBuffer, all_of_it: bool) -> None:
        trajectory = made(1)[0]
        if all_of_it:
            trajectory = Trajectory(rewards=torch.zeros(6, 2, device="meta"))
        else:
            trajectory.curr_obs["states"] = trajectory.curr_obs["states"].to("meta")
        self.refused(buffer, ColumnTypeError, "meta", lambda: buffer.add_trajectories([made(1)[0], trajectory]))

    @pytest.mark.parametrize(
        "odd",
        [
            torch.ones(6, 2).to_sparse(),
            torch.ones(6, 2).to(torch.float8_e4m3fn),
            torch.ones(6, 2, 0),
            np.ones((6, 2)),
            object(),
            b"bytes",
            {3: torch.ones(6, 2)},
        ],
        ids=["sparse", "float8", "no values", "numpy", "object", "bytes", "key"],
    )
    def test_things_that_cannot_be_stored(self, buffer: TrajectoryReplayBuffer, odd: Any) -> None:
        trajectory = with_attributes(made(1)[0], forward_inputs={**made(1)[0].forward_inputs, "odd": odd})
        self.refused(buffer, ValueError, "odd", lambda: buffer.add_trajectories([trajectory]))

    @pytest.mark.parametrize(("steps", "envs"), [(0, 2), (3, 0), (0, 0)])
    def test_no_samples(self, buffer: TrajectoryReplayBuffer, steps: int, envs: int) -> None:
        trajectory = Trajectory(rewards=torch.zeros(steps, envs))
        self.refused(buffer, ValueError, "T >= 1", lambda: buffer.add_trajectories([trajectory]))

    def test_another_order_of_the_same_fields_is_fine(self) -> None:
        trajectory = made(1)[0]
        trajectory.curr_obs = dict(reversed(trajectory.curr_obs.items()))
        with TrajectoryReplayBuffer() as buffer:
            buffer.add_trajectories([*made(1), trajectory])
            assert_parity(buffer, reference_of([*made(1), trajectory]))

    @pytest.mark.parametrize("fault", ["lacks", "adds", "narrow", "wide", "dtype", "rows"])
    def test_keys_that_differ_between_trajectories(self, buffer: TrajectoryReplayBuffer, fault: str) -> None:
        trajectory = made(1, first=5)[0]
        states = trajectory.next_obs["states"]
        if fault == "lacks":
            del trajectory.next_obs["states"]
        elif fault == "adds":
            trajectory.next_obs["states2"] = states
        else:
            wrong = {"narrow": states[..., :3], "wide": states[..., None], "dtype": states.double(), "rows": states[:5]}
            trajectory.next_obs["states"] = wrong[fault]
        self.refused(
            buffer, ValueError, "next_obs/states", lambda: buffer.add_trajectories([made(1, first=4)[0], trajectory])
        )

    @pytest.mark.parametrize(("damage", "error"), [("cut", CorruptionError), ("gone", MissingObjectError)])
    def test_files(self, buffer: TrajectoryReplayBuffer, tmp_path: Path, damage: str, error: type[Exception]) -> None:
        saved_at(tmp_path / "c", made(3, first=7), trajectory_format="pt")
        path = tmp_path / "c" / "trajectory_2_weights.pt"
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-30])
        else:
            path.unlink()
        self.refused(buffer, error, "trajectory_2_weights", lambda: buffer.load_checkpoint(tmp_path / "c"))
        assert not [name for name in os.listdir(tmp_path) if name.startswith("trajstore-load")]

    @pytest.mark.parametrize(("rank", "ranks"), [(3, 3), (-1, 3), (0, 0)])
    def test_ranks(self, buffer: TrajectoryReplayBuffer, tmp_path: Path, rank: int, ranks: int) -> None:
        saved_at(tmp_path / "c", made(3, first=7))
        load: Callable[[], None] = lambda: buffer.load_checkpoint(tmp_path / "c", True, rank, ranks)  # noqa: E731
        self.refused(buffer, IndexRangeError, f"rank {rank} of {ranks}", load)

    def test_more_ranks_than_trajectories(self, tmp_path: Path) -> None:
        saved_at(tmp_path / "c", made(2))
        with TrajectoryReplayBuffer() as buffer:
            buffer.load_checkpoint(tmp_path / "c", True, 4, 5)
            assert_parity(buffer, reference_of([]))
            buffer.add_trajectories(made(1))
            assert_parity(buffer, reference_of(made(1), seed=9))

    def test_places(self, buffer: TrajectoryReplayBuffer, tmp_path: Path) -> None:
        with trajstore.open(tmp_path / "other", "x") as store:
            store.append({"a": [1, 2]})
        with pytest.raises(SelectionError, match="trajectory_id"):
            buffer.load_checkpoint(tmp_path / "other")
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="file"):
            buffer.load_checkpoint(tmp_path / "file")
        with pytest.raises(OSError, match="file"):
            buffer.save_checkpoint(tmp_path / "file")
        load: Callable[[], None] = lambda: buffer.load_checkpoint(tmp_path / "nothing")  # noqa: E731
        self.refused(buffer, StoreNotFoundError, "nothing", load)

    def test_a_damaged_store(self, buffer: TrajectoryReplayBuffer, tmp_path: Path) -> None:
        saved_at(tmp_path / "c", made(3, first=7))
        for path in (tmp_path / "c" / "manifests").rglob("*"):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:-20])
        self.refused(buffer, CorruptionError, "manifests", lambda: buffer.load_checkpoint(tmp_path / "c"))

    def test_a_store_whose_segments_are_gone(self, buffer: TrajectoryReplayBuffer, tmp_path: Path) -> None:
        saved_at(tmp_path / "c", made(3, first=7))
        shutil.rmtree(tmp_path / "c" / "segments")
        self.refused(buffer, MissingObjectError, "segments", lambda: buffer.load_checkpoint(tmp_path / "c"))

    def test_nothing_to_sample(self) -> None:
        with TrajectoryReplayBuffer() as buffer:
            for call in (lambda: buffer.sample(3), lambda: buffer.sample_chunks(3)):
                with pytest.raises(EmptyBufferError, match="add trajectories first"):
                    call()
            buffer.add_trajectories([])
            buffer.add_trajectories([Trajectory(actions=torch.ones(2, 2))])  # says nothing of T and B: skipped
            with pytest.raises(EmptyBufferError):
                buffer.sample(1)
            assert buffer.store is None
            buffer.add_trajectories(made(1))
            assert_parity(buffer, reference_of(made(1)))

    def test_a_tensor_that_changes_too_early(self) -> None:
        with TrajectoryReplayBuffer(copy_on_add=True) as buffer:
            trajectories = made(3)
            buffer.add_trajectories(trajectories)
            for trajectory in trajectories:
                trajectory.actions.zero_()
            assert_parity(buffer, reference_of(made(3)))
