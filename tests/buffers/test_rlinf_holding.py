"""What stands behind a buffer of rollouts: who shares what, who gives back what, and what failures leave."""

from __future__ import annotations

import gc
import os
import shutil
import threading
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trajstore
from tests.buffers.test_rlinf_parity import assert_parity
from tests.support.rare import also_slow
from tests.support.rlinf_reference import ReferenceBuffer, random_trajectory
from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer, rollouts
from trajstore.buffers.rlinf.arrange import merge_or_split
from trajstore.edit.combine import combine
from trajstore.errors import ClosedError, ColumnTypeError, CorruptionError, SelectionError, UntrustedBaseError
from trajstore.read.bases import refers_to


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


def tiny(first: int, count: int) -> list[Trajectory]:
    """Each holds its number, in one step or two of one environment."""
    return [
        Trajectory(rewards=torch.full((1 + number % 2, 1), float(number)), model_weights_id=f"w{number}")
        for number in range(first, first + count)
    ]


def numbers_at(path: Path, **knobs: Any) -> list[float]:
    """What a checkpoint holds, read with a buffer that keeps and samples everything."""
    with TrajectoryReplayBuffer(sample_window_size=0, allow_pickle=True, **knobs) as buffer:
        buffer.load_checkpoint(path)
        return [float(fields["rewards"][0, 0]) for _, fields in buffer._holding.read()]


@pytest.fixture(scope="module", params=["store", "pt", "pkl"])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, form: str) -> Path:
    """Of 130 trajectories."""
    place = tmp_path_factory.mktemp(form) / "checkpoint"
    with TrajectoryReplayBuffer(sample_window_size=0, trajectory_format=form) as buffer:
        buffer.add_trajectories(tiny(0, 130))
        buffer.save_checkpoint(place)
    return place


class TestKeeping:
    @pytest.mark.parametrize("window", also_slow([0, 5, 100], [5]))
    def test_what_was_loaded_is_saved(self, checkpoint: Path, form: str, window: int, tmp_path: Path) -> None:
        with TrajectoryReplayBuffer(sample_window_size=window, trajectory_format=form, allow_pickle=True) as buffer:
            buffer.load_checkpoint(checkpoint)
            assert (len(buffer), buffer.total_samples) == (130, 195)
            drawn = buffer.sample(10_000)["rewards"]  # sampling has its own window
            assert set(drawn.tolist()) <= set(range(130 - (window or 130), 130))
            buffer.save_checkpoint(tmp_path / "again")
        assert numbers_at(tmp_path / "again") == list(range(130))

    @pytest.mark.parametrize(("window", "added"), also_slow([(0, 3), (5, 3), (5, 300), (100, 131)], [(100, 131)]))
    def test_as_many_of_the_newest_as_were_loaded(
        self, checkpoint: Path, form: str, window: int, added: int, tmp_path: Path
    ) -> None:
        with TrajectoryReplayBuffer(sample_window_size=window, trajectory_format=form, allow_pickle=True) as buffer:
            buffer.load_checkpoint(checkpoint)
            buffer.add_trajectories(tiny(130, added))
            assert len(buffer) == 130 + added
            buffer.save_checkpoint(tmp_path / "again")
            buffer.load_checkpoint(tmp_path / "again")  # as many again
            buffer.save_checkpoint(tmp_path / "once more")
        everything = list(range(130 + added))
        expected = everything if not window else everything[-130:]
        assert numbers_at(tmp_path / "again") == numbers_at(tmp_path / "once more") == expected

    @pytest.mark.parametrize("way", ["clear", "load"])
    def test_until_it_is_cleared_or_something_else_is_loaded(
        self, checkpoint: Path, form: str, way: str, tmp_path: Path
    ) -> None:
        with TrajectoryReplayBuffer(sample_window_size=5, trajectory_format=form, allow_pickle=True) as buffer:
            buffer.add_trajectories(tiny(0, 2))
            buffer.save_checkpoint(tmp_path / "two")
            buffer.load_checkpoint(checkpoint)
            if way == "clear":
                buffer.clear()
            else:
                buffer.load_checkpoint(tmp_path / "two")
            buffer.add_trajectories(tiny(500, 30))
            buffer.save_checkpoint(tmp_path / "again")
        assert numbers_at(tmp_path / "again") == list(range(525, 530))

    def test_a_rank_keeps_its_share(self, checkpoint: Path, form: str, tmp_path: Path) -> None:
        with TrajectoryReplayBuffer(sample_window_size=5, trajectory_format=form, allow_pickle=True) as buffer:
            buffer.load_checkpoint(checkpoint, True, 1, 2)
            buffer.save_checkpoint(tmp_path / "again")
        assert numbers_at(tmp_path / "again") == list(range(65, 130))

    def test_what_is_loaded_and_added_to_is_bounded_on_disk(self, checkpoint: Path) -> None:
        with TrajectoryReplayBuffer(sample_window_size=5, allow_pickle=True) as buffer:
            buffer.load_checkpoint(checkpoint)
            for number in range(0, 600, 50):
                buffer.add_trajectories(tiny(number, 50))
                assert buffer.store is not None
                assert len(buffer.store.trajectories) <= 2 * 130


class TestFlush:
    def test_what_was_added_is_there_whatever_happens_next(self, tmp_path: Path) -> None:
        with TrajectoryReplayBuffer(seed=3, auto_save=True, auto_save_path=tmp_path / "run") as buffer:
            buffer.flush()  # of nothing
            for count in (3, 5):
                buffer.add_trajectories(some(count))
                buffer.flush()
                shutil.copytree(tmp_path / "run", tmp_path / f"killed {count}")  # what a kill would leave
            buffer.add_trajectories(some(1))
            buffer.clear_cache()
            buffer.flush()  # the store is not open
            with trajstore.open(tmp_path / "run") as store:
                assert len(rollouts.find(store.trajectories).entries) == 9
        for count, held in ((3, 3), (5, 8)):
            place = tmp_path / f"killed {count}"
            with TrajectoryReplayBuffer(auto_save=True, auto_save_path=place) as again:
                again.load_checkpoint(place)
                assert len(again) == held
                reference = ReferenceBuffer(seed=3)
                reference.add([*some(3), *some(5)][:held])
                assert_parity(again, reference)

    def test_a_temporary_folder_and_a_closed_buffer(self) -> None:
        buffer = TrajectoryReplayBuffer()
        buffer.add_trajectories(some(2))
        buffer.flush()
        assert buffer.store is not None
        with trajstore.open(buffer.store.url) as store:
            assert len(rollouts.find(store.trajectories).entries) == 2
        buffer.close()
        with pytest.raises(ClosedError, match="closed"):
            buffer.flush()


class TestMergeOrSplit:
    @pytest.mark.parametrize("form", ["store", "pt"])
    def test_of_the_working_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
        for rank in range(2):
            with TrajectoryReplayBuffer(trajectory_format=form) as buffer:
                buffer.add_trajectories(tiny(10 * rank, 2))
                buffer.save_checkpoint(tmp_path / f"ranks/rank_{rank}")
        monkeypatch.chdir(tmp_path / "ranks")
        with pytest.raises(SelectionError, match="save_path="):
            merge_or_split()
        assert merge_or_split(save_path="merged") == 4
        assert numbers_at(tmp_path / "ranks/merged") == [0, 10, 1, 11]
        monkeypatch.chdir("merged")
        assert merge_or_split(save_path="../first", split_count=3) == 3
        assert numbers_at(tmp_path / "ranks/first") == [0, 10, 1]

    def test_a_copy_outside_the_parent_folder_needs_no_trust(self, tmp_path: Path) -> None:
        for rank in range(2):
            saved(str(tmp_path / f"m/rank_{rank}"))
        merge_or_split(tmp_path / "m", tmp_path / "y/merged", copy=True)
        assert refers_to(tmp_path / "y/merged") == []
        with TrajectoryReplayBuffer() as buffer:
            buffer.load_checkpoint(tmp_path / "y/merged")
            assert len(buffer) == 6


class TestTitles:
    """What the bar says: whether bytes are copied or shared."""

    @pytest.mark.parametrize(("share", "title"), [("link", "linking, or copying between disks"), ("copy", "copying")])
    def test_of_a_store(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], share: Any, title: str) -> None:
        with TrajectoryReplayBuffer() as buffer:
            buffer.add_trajectories(some(1))
            buffer.save_checkpoint(tmp_path / "c", share=share, progress=True)
            assert capsys.readouterr().err.startswith(title + " ")
            buffer.save_checkpoint(f"memory://{uuid.uuid4().hex}/c", share=share, progress=True)
            assert capsys.readouterr().err.startswith("copying ")
        with TrajectoryReplayBuffer() as buffer:
            buffer.load_checkpoint(tmp_path / "c", progress=True)
            assert capsys.readouterr().err.startswith("linking, or copying between disks ")

    @pytest.mark.parametrize(("copy", "title"), [(False, "linking, or copying between disks"), (True, "copying")])
    def test_of_files(self, tmp_path: Path, capfd: pytest.CaptureFixture[str], copy: bool, title: str) -> None:
        with TrajectoryReplayBuffer(trajectory_format="pt") as buffer:
            buffer.add_trajectories(some(2))
            buffer.save_checkpoint(tmp_path / "c")
        capfd.readouterr()
        merge_or_split(tmp_path / "c", tmp_path / "part", split_count=1, copy=copy, progress=True)
        assert capfd.readouterr().err.startswith(title + " ")

    @pytest.mark.parametrize(("form", "titles"), [("pt", ["writing", "reading"]), ("store", ["linking", "linking"])])
    def test_by_default_in_a_terminal_if_it_is_much(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        form: str,
        titles: Any,
    ) -> None:
        with TrajectoryReplayBuffer(trajectory_format=form) as buffer:
            buffer.add_trajectories(some(2))
            monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
            for number, least in enumerate((1 << 20, 1)):
                monkeypatch.setattr("trajstore.progress._LONG_BYTES", least)
                buffer.save_checkpoint(tmp_path / f"c{number}")
                written = capsys.readouterr().err
                with TrajectoryReplayBuffer() as other:
                    other.load_checkpoint(tmp_path / f"c{number}")
                read = capsys.readouterr().err
                shown = [title in err for title, err in zip(titles, (written, read), strict=True)]
                assert shown == [least == 1] * 2


class TestRlinfsFiles:
    def test_are_written_once_when_they_are_loaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with TrajectoryReplayBuffer(trajectory_format="pt") as buffer:
            buffer.add_trajectories(some(5))
            buffer.save_checkpoint(tmp_path / "files")
        copied = []

        def combined(*sources: Any, **knobs: Any) -> Any:
            done = combine(*sources, **knobs)
            copied.append(done.written_bytes)
            return done

        monkeypatch.setattr("trajstore.buffers.rlinf.holding.combine", combined)
        with TrajectoryReplayBuffer(auto_save=True, auto_save_path=tmp_path / "run") as buffer:
            buffer.load_checkpoint(tmp_path / "files")
            segments = [path.stat() for path in (tmp_path / "run/segments").rglob("*") if path.is_file()]
            manifests = [path.stat() for path in (tmp_path / "run/manifests").rglob("*") if path.is_file()]
            assert copied == [sum(found.st_size for found in manifests)]
            assert sum(found.st_size for found in segments) > 0
            assert {found.st_nlink for found in segments} == {1}  # the other name is gone
            assert len(buffer) == 5


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
