"""What stands behind a buffer of rollouts: who shares what, who gives back what, and what failures leave."""

from __future__ import annotations

import gc
import os
import threading
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

import trajstore
from tests.support.rlinf_reference import random_trajectory
from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer
from trajstore.buffers.rlinf.arrange import merge_or_split, refers_to
from trajstore.errors import ColumnTypeError, CorruptionError, UntrustedBaseError


def some(count: int) -> list[Trajectory]:
    return [random_trajectory(np.random.default_rng(seed)) for seed in range(count)]


def saved(url: str, count: int = 3) -> str:
    with TrajectoryReplayBuffer() as buffer:
        buffer.add_trajectories(some(count))
        buffer.save_checkpoint(url)
    return url


class TestSharing:
    def test_a_store_that_outlives_the_buffer_stands_alone(self, tmp_path: Path) -> None:
        checkpoint = saved(f"memory://{uuid.uuid4().hex}/checkpoint")
        with TrajectoryReplayBuffer(auto_save=True, auto_save_path=tmp_path / "run") as buffer:
            buffer.load_checkpoint(checkpoint)
            expected = buffer.sample(16)
        assert refers_to(tmp_path / "run") == []
        with TrajectoryReplayBuffer(auto_save=True, auto_save_path=tmp_path / "run") as again:
            again.load_checkpoint(tmp_path / "run")
            assert torch.equal(again.sample(16)["actions"], expected["actions"])

    def test_a_temporary_one_refers_to_a_bucket(self) -> None:
        checkpoint = saved(f"memory://{uuid.uuid4().hex}/checkpoint")
        with TrajectoryReplayBuffer() as buffer:
            buffer.load_checkpoint(checkpoint)
            assert buffer.sample(16)["actions"].shape[0] == 16
            assert not list(Path(buffer.store.url).rglob("steps.arrow"))

    def test_a_merge_outside_the_parent_folder_is_loaded_by_who_trusts_it(self, tmp_path: Path) -> None:
        for rank in range(2):
            saved(str(tmp_path / f"m/rank_{rank}"))
        merge_or_split(tmp_path / "m", tmp_path / "y/merged")
        assert len(refers_to(tmp_path / "y/merged")) == 2
        with TrajectoryReplayBuffer() as buffer:
            with pytest.raises(UntrustedBaseError, match="bases="):
                buffer.load_checkpoint(tmp_path / "y/merged")
            assert len(buffer) == 0
        with TrajectoryReplayBuffer(bases={str(tmp_path / "m"): None}) as buffer:
            buffer.load_checkpoint(tmp_path / "y/merged")
            assert len(buffer) == 6
            assert buffer.sample(8)["actions"].shape[0] == 8
        merge_or_split(tmp_path / "y/merged", tmp_path / "part", split_count=2, bases={str(tmp_path / "m"): None})
        assert refers_to(tmp_path / "part") == []  # beside m

    def test_a_damaged_checkpoint_changes_nothing(self, tmp_path: Path) -> None:
        saved(str(tmp_path / "checkpoint"))
        (index,) = (tmp_path / "checkpoint/segments").glob("*/pages.arrow")
        index.write_bytes(index.read_bytes()[:-1] + b"?")
        with TrajectoryReplayBuffer() as buffer:
            buffer.add_trajectories(some(2))
            with pytest.raises(CorruptionError):
                buffer.load_checkpoint(tmp_path / "checkpoint")
            assert len(buffer) == 2
            buffer.sample(4)


class TestGivingBack:
    def test_a_buffer_that_is_forgotten_is_closed_and_its_folder_gone(self) -> None:
        before = set(threading.enumerate())
        buffer = TrajectoryReplayBuffer()
        buffer.add_trajectories(some(2))
        buffer.sample(4)
        folder = os.path.dirname(buffer.store.url)
        assert os.path.isdir(folder)
        del buffer
        gc.collect()
        assert not os.path.exists(folder)
        assert {t for t in set(threading.enumerate()) - before if t.is_alive() and "trajstore" in t.name} == set()

    def test_a_forgotten_store_is_flushed(self, tmp_path: Path) -> None:
        store = trajstore.open(tmp_path / "run", mode="a")
        store.append({"action": np.arange(3)})
        assert len(store.trajectories) == 1
        del store
        gc.collect()
        with trajstore.open(tmp_path / "run") as again:
            assert len(again.trajectories) == 1


class TestCounting:
    def test_a_number_that_is_none_is_refused_before_anything_is_counted(self) -> None:
        with TrajectoryReplayBuffer() as buffer:
            buffer.add_trajectories(some(1))
            bad = random_trajectory(np.random.default_rng(1))
            bad.max_episode_length = torch.tensor([5, 5])
            with pytest.raises(ColumnTypeError, match="max_episode_length"):
                buffer.add_trajectories([*some(1), bad])
            assert len(buffer) == 1
            bad.max_episode_length = np.int64(5)
            buffer.add_trajectories([bad])
            assert len(buffer) == 2

    def test_ids_are_never_given_twice_whatever_the_file_says(self, tmp_path: Path) -> None:
        with TrajectoryReplayBuffer(trajectory_format="pt") as buffer:
            buffer.add_trajectories(some(3))
            buffer.save_checkpoint(tmp_path / "files")
        metadata = tmp_path / "files/metadata.json"
        metadata.write_text(metadata.read_text().replace('"trajectory_counter": 3', '"trajectory_counter": 1'))
        with TrajectoryReplayBuffer(trajectory_format="pt") as buffer:
            buffer.load_checkpoint(tmp_path / "files")
            buffer.add_trajectories(some(1))
            buffer.save_checkpoint(tmp_path / "again")
            assert (tmp_path / "again/trajectory_3_weights.pt").exists()

    def test_the_cache_holds_so_many_trajectories_also_of_a_checkpoint(self, tmp_path: Path) -> None:
        saved(str(tmp_path / "checkpoint"))
        with TrajectoryReplayBuffer(cache_bytes=1, cache_size=100_000) as buffer:
            buffer.load_checkpoint(tmp_path / "checkpoint")
            rollout = sum(column.row_bytes for column in buffer.store.schema) * 12  # T=6, B=2
            assert buffer.store._access.cache_bytes >= 100_000 * rollout
