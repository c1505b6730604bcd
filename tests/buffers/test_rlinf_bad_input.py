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
from tests.support.rare import diagonal
from tests.support.rlinf_reference import with_attributes
from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer, import_directories
from trajstore.errors import (
    ColumnTypeError,
    CorruptionError,
    EmptyBufferError,
    IndexRangeError,
    MissingObjectError,
    SelectionError,
    StoreExistsError,
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

    @pytest.mark.parametrize(
        ("rank", "ranks", "match"),
        [
            (3, 3, "^rank 3 of 3, expected 0 to 2$"),
            (-1, 3, "^rank -1 of 3, expected 0 to 2$"),
            (0, 0, "^world_size=0, expected at least 1$"),
            (5, -2, "^world_size=-2, expected at least 1$"),
        ],
    )
    def test_ranks(self, buffer: TrajectoryReplayBuffer, tmp_path: Path, rank: int, ranks: int, match: str) -> None:
        saved_at(tmp_path / "c", made(3, first=7))
        load: Callable[[], None] = lambda: buffer.load_checkpoint(tmp_path / "c", True, rank, ranks)  # noqa: E731
        self.refused(buffer, IndexRangeError, match, load)

    def test_no_ranks_under_the_name_of_the_first_generation(self, buffer: TrajectoryReplayBuffer) -> None:
        with pytest.raises(IndexRangeError, match=r"^load_split_num=0, expected at least 1$"):
            buffer.load_checkpoint("c", is_distributed=True, load_rank=0, load_split_num=0)

    @pytest.mark.parametrize("form", ["store", "pt"])
    def test_more_ranks_than_trajectories(self, buffer: TrajectoryReplayBuffer, tmp_path: Path, form: str) -> None:
        saved_at(tmp_path / "c", made(2), trajectory_format=form)
        match = f"rank 4 of 5 gets none of the 2 trajectories of {tmp_path / 'c'}.*at most 2 ranks"
        load: Callable[[], None] = lambda: buffer.load_checkpoint(tmp_path / "c", True, 4, 5)  # noqa: E731
        self.refused(buffer, UserWarning, match, load)  # where warnings are errors
        with pytest.warns(UserWarning, match=match) as caught:
            load()
        assert [warning.filename for warning in caught] == [__file__]
        assert_parity(buffer, reference_of([]))
        buffer.add_trajectories(made(1))
        assert_parity(buffer, reference_of(made(1), seed=9))

    @pytest.mark.parametrize("form", ["store", "pt"])
    def test_ranks_of_an_empty_checkpoint_are_no_surprise(self, tmp_path: Path, form: str) -> None:
        saved_at(tmp_path / "c", [], trajectory_format=form)
        with TrajectoryReplayBuffer() as buffer:
            buffer.load_checkpoint(tmp_path / "c", True, 1, 2)
            assert_parity(buffer, reference_of([]))

    def test_one_trajectory_that_is_in_no_list(self, buffer: TrajectoryReplayBuffer) -> None:
        one = made(1)[0]
        takes = "add_trajectories takes a list of trajectories; got "
        self.refused(buffer, ColumnTypeError, takes + r"one: pass \[trajectory\]", lambda: buffer.add_trajectories(one))
        with pytest.raises(ColumnTypeError, match=takes + r"a dict: pass \[Trajectory\(\*\*fields\)\]"):
            buffer.add_trajectories(vars(one))

    def test_a_generator_of_trajectories_is_fine(self) -> None:
        with TrajectoryReplayBuffer() as buffer:
            buffer.add_trajectories(trajectory for trajectory in made(3))
            assert_parity(buffer, reference_of(made(3)))

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
        self.refused(buffer, StoreNotFoundError, "no checkpoint at .*nothing: neither a store nor RLinf's files", load)

    @pytest.mark.parametrize(
        ("above", "form"), diagonal(["nothing", "an empty store", "another store"], ["store", "pt"])
    )
    def test_the_folder_above_the_ranks(
        self, buffer: TrajectoryReplayBuffer, tmp_path: Path, form: str, above: str
    ) -> None:
        place = tmp_path / "ranks"
        for rank in range(4):
            saved_at(place / f"rank_{rank}", made(1, first=rank), trajectory_format=form)
        if above != "nothing":
            with trajstore.open(place, "x") as store:
                if above == "another store":
                    store.append({"a": [1, 2]})
        match = (
            rf"^{place} is not one buffer, but a folder of 4 \(rank_0, rank_1, rank_2, ...\): load one of them, "
            f"{place}/rank_0, or merge them first with `trajstore rlinf merge-or-split --source-path {place} "
        )
        self.refused(buffer, StoreNotFoundError, match, lambda: buffer.load_checkpoint(f"{place}/"))

    def test_a_store_that_is_none_of_rollouts(self, buffer: TrajectoryReplayBuffer, tmp_path: Path) -> None:
        with trajstore.open(tmp_path / "other", "x") as store:
            store.append({"a": [1, 2]})
        match = "no field 'trajectory_id'; name a store that a TrajectoryReplayBuffer wrote, or sample this one with"
        self.refused(buffer, SelectionError, match, lambda: buffer.load_checkpoint(tmp_path / "other"))

    def test_rollouts_among_other_trajectories(self, buffer: TrajectoryReplayBuffer, tmp_path: Path) -> None:
        saved_at(tmp_path / "c", made(1))
        with trajstore.open(tmp_path / "c", "a") as store:
            rows = {c.path: torch.zeros(3 + c.extra, *c.shape, dtype=getattr(torch, c.dtype)) for c in store.schema}
            store.append(rows)
        match = "holds other trajectories beside the rollouts of a replay buffer: 1 have no field 'trajectory_id'; keep them"
        self.refused(buffer, SelectionError, match, lambda: buffer.load_checkpoint(tmp_path / "c"))

    def test_a_mistyped_path_is_not_walked(
        self, buffer: TrajectoryReplayBuffer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "home/deep/rank_0").mkdir(parents=True)
        (tmp_path / "home/rank_0/old").mkdir(parents=True)

        def walk(*_: Any, **__: Any) -> Iterator[Any]:
            raise AssertionError("everything below was listed")

        monkeypatch.setattr(os, "walk", walk)
        with pytest.raises(StoreNotFoundError, match=r"no checkpoint at .*home: neither"):
            buffer.load_checkpoint(tmp_path / "home")

    def test_importing_a_store(self, tmp_path: Path) -> None:
        for rank in range(2):
            saved_at(tmp_path / "ranks" / f"rank_{rank}", made(1))
        for source, match in ((tmp_path / "ranks/rank_0", "is a store already"), (tmp_path / "ranks", "holds stores")):
            with pytest.raises(StoreExistsError, match=f"^{source} {match}"):
                import_directories(source, tmp_path / "out")
        with pytest.raises(StoreNotFoundError, match=r"neither metadata\.json nor a folder rank_"):
            import_directories(tmp_path / "nothing", tmp_path / "out")
        assert not (tmp_path / "out").exists()

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
