"""``TrajectoryReplayBuffer`` through its life: keywords, checkpoints, threads, places."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

import trajstore
from tests.buffers.test_rlinf_parity import assert_parity
from tests.s3.conftest import bucket, options, s3  # noqa: F401 - fixtures
from tests.support.rare import also_slow
from tests.support.rlinf_reference import ReferenceBuffer, assert_same, fields, random_trajectory
from tests.support.threads import wait_for_others
from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer, rollouts
from trajstore.errors import (
    ClosedError,
    SelectionError,
    StoreExistsError,
)


def made(count: int, *, first: int = 0, **shape: Any) -> list[Any]:
    return [random_trajectory(np.random.default_rng(n), **shape) for n in range(first, first + count)]


def reference_of(trajectories: list[Any], **knobs: Any) -> ReferenceBuffer:
    reference = ReferenceBuffer(**knobs)
    reference.add(trajectories)
    return reference


def saved_at(path: str | Path, trajectories: list[Any], **knobs: Any) -> ReferenceBuffer:
    """A checkpoint, and what it holds."""
    with TrajectoryReplayBuffer(seed=9, **knobs) as buffer:
        buffer.add_trajectories(trajectories)
        buffer.save_checkpoint(path)
    return reference_of(trajectories, seed=9)


class TestKeywords:
    @pytest.mark.parametrize("temporary", [{"storage_dir": ""}, {"auto_save": False}, {"save_trajectories": False}, {}])
    def test_a_temporary_folder_goes_with_the_buffer(self, temporary: dict[str, Any]) -> None:
        with TrajectoryReplayBuffer(**temporary) as buffer:
            buffer.add_trajectories(made(2))
            buffer.sample(1)
            assert buffer.store is not None
            folder = buffer.store.url
            assert os.path.isdir(folder)
        assert not os.path.exists(os.path.dirname(folder))

    def test_a_temporary_folder_goes_with_a_buffer_that_nobody_closed(self) -> None:
        buffer = TrajectoryReplayBuffer()
        buffer.add_trajectories(made(2))
        buffer.sample(1)
        assert buffer.store is not None
        folder = buffer.store.url
        buffer.store.close()
        del buffer
        gc.collect()
        assert not os.path.exists(folder)

    @pytest.mark.parametrize("kind", ["storage_dir", "auto_save_path"])
    def test_a_named_place_stays(self, tmp_path: Path, kind: str) -> None:
        named = {kind: str(tmp_path / "run"), **({"auto_save": True} if kind == "auto_save_path" else {})}
        with TrajectoryReplayBuffer(**named) as buffer:
            buffer.add_trajectories(made(3))
        with trajstore.open(tmp_path / "run") as store:
            assert [entry.id for entry in rollouts.find(store.trajectories).entries] == [0, 1, 2]

    def test_a_place_that_is_not_asked_for_is_left_alone(self, tmp_path: Path) -> None:
        with TrajectoryReplayBuffer(auto_save=False, auto_save_path=tmp_path / "run") as buffer:
            buffer.add_trajectories(made(1))
            buffer.sample(1)
        assert not (tmp_path / "run").exists()

    def test_a_place_without_its_switch(self, tmp_path: Path) -> None:
        with pytest.raises(SelectionError, match=r"auto_save_path='.*run' without auto_save=: .* pass auto_save=True"):
            TrajectoryReplayBuffer(auto_save_path=tmp_path / "run")

    def test_a_switch_without_a_place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with TrajectoryReplayBuffer(auto_save=True) as buffer, TrajectoryReplayBuffer(auto_save=True) as other:
            for number, one in enumerate((buffer, other)):
                one.add_trajectories(made(number + 1))
            monkeypatch.chdir("/")
            buffer.clear_cache()
            assert_parity(buffer, reference_of(made(1)))
        places = sorted((tmp_path / "logs").iterdir(), key=lambda place: place.stat().st_ctime)
        assert all(place.name.startswith("replay-buffer-") for place in places)
        assert {str(place) in repr(buffer) for place in places} == {True, False}
        held = []
        for place in places:
            with trajstore.open(place) as store:
                held.append(len(rollouts.find(store.trajectories).entries))
        assert sorted(held) == [1, 2]

    @pytest.mark.parametrize(
        "wrong",
        [
            {"save_trajectories": True, "auto_save": False},
            {"storage_dir": "", "auto_save_path": "b"},
            {"save_trajectories": False, "storage_dir": "a"},
            {"trajectory_format": "pt", "storage_format": "pt"},
            {"storage_format": "zarr"},
            {"cache_bytes": 0},
            {"cache_size": 0},
        ],
    )
    def test_contradictions(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(SelectionError, match="="):
            TrajectoryReplayBuffer(**wrong)

    def test_the_same_thing_named_twice_at_a_load(self, tmp_path: Path) -> None:
        reference = saved_at(tmp_path, made(2))
        with TrajectoryReplayBuffer() as buffer:
            for twice in ({"local_rank": 0, "load_rank": 0}, {"world_size": 2, "load_split_num": 2}):
                with pytest.raises(SelectionError, match="mean the same"):
                    buffer.load_checkpoint(tmp_path, is_distributed=True, **twice)
            buffer.load_checkpoint(tmp_path, local_rank=0, world_size=2)  # not distributed: all of it
            assert_parity(buffer, reference)
            buffer.load_checkpoint(tmp_path, local_rank=3)
            assert len(buffer) == 2

    @pytest.mark.parametrize("cache_bytes", [1, 1000, 100_000])
    def test_the_smallest_cache(self, tmp_path: Path, cache_bytes: int) -> None:
        trajectories = made(10, T=40)
        with TrajectoryReplayBuffer(cache_bytes=cache_bytes, cache_size=1) as buffer:
            buffer.add_trajectories(trajectories)
            assert_parity(buffer, reference_of(trajectories))
            buffer.save_checkpoint(tmp_path)
            buffer.load_checkpoint(tmp_path)
            assert_parity(buffer, reference_of(trajectories))


class TestLife:
    def test_everything_after_close(self, tmp_path: Path) -> None:
        buffer = TrajectoryReplayBuffer(auto_save=True, auto_save_path=tmp_path / "run")
        buffer.add_trajectories(made(2))
        buffer.close()
        buffer.close()
        buffer.close(wait=False)
        for call in (
            lambda: buffer.add_trajectories(made(1)),
            lambda: buffer.sample(1),
            lambda: buffer.save_checkpoint(tmp_path / "c"),
            lambda: buffer.load_checkpoint(tmp_path / "run"),
        ):
            with pytest.raises(ClosedError, match="closed"):
                call()
        buffer.clear_cache()
        buffer.clear()
        assert len(buffer) == 0
        with trajstore.open(tmp_path / "run") as store:  # clearing afterwards is not for what is on disk
            assert len(rollouts.find(store.trajectories).entries) == 2

    def test_close_without_waiting(self, tmp_path: Path) -> None:
        buffer = TrajectoryReplayBuffer(auto_save=True, auto_save_path=tmp_path / "run")
        buffer.add_trajectories(made(20))
        before = set(threading.enumerate())
        buffer.close(wait=False)
        buffer.clear_cache()
        wait_for_others(before)
        with trajstore.open(tmp_path / "run") as store:
            assert len(rollouts.find(store.trajectories).entries) == 20

    def test_clear_cache_at_any_time(self, tmp_path: Path) -> None:
        trajectories = made(4)
        reference = reference_of(trajectories[:2], seed=3)
        with TrajectoryReplayBuffer(seed=3) as buffer:
            buffer.clear_cache()
            buffer.add_trajectories(trajectories[:2])
            buffer.clear_cache()
            assert_parity(buffer, reference)
            buffer.clear_cache()
            buffer.add_trajectories(trajectories[2:])
            buffer.clear_cache()
            buffer.save_checkpoint(tmp_path)
            buffer.clear_cache()
            buffer.load_checkpoint(tmp_path)
            assert_parity(buffer, reference_of(trajectories, seed=3))
            buffer.clear_cache()
            buffer.clear()
            assert_parity(buffer, reference_of([]))
            buffer.add_trajectories([Trajectory(rewards=torch.arange(2.0).view(2, 1))])  # other fields than before
            assert sorted(buffer.sample(2)) == ["rewards"]
            assert len(buffer) == 1

    def test_what_is_not_saved_is_bounded_on_disk(self) -> None:
        window, trajectories = 5, made(100, T=20)
        reference = ReferenceBuffer(sample_window_size=window)
        one = sum(t.nbytes for t in tensors(fields(trajectories[0])))
        with TrajectoryReplayBuffer(auto_save=False, sample_window_size=window) as buffer:
            for trajectory in trajectories:
                buffer.add_trajectories([trajectory])
                reference.add([trajectory])
                assert_same(buffer.sample(3), reference.sample(3))
                assert buffer.store is not None
                assert len(rollouts.find(buffer.store.trajectories).entries) <= 2 * window
                files = [path for path in Path(buffer.store.url).rglob("segments/**/*") if path.is_file()]
                assert sum(path.stat().st_size for path in files) < 3 * window * one
            assert_parity(buffer, reference)  # whose counts are of all

    def test_everything_is_kept_with_a_window_of_0(self) -> None:
        trajectories = made(30)
        with TrajectoryReplayBuffer(auto_save=False, sample_window_size=0) as buffer:
            buffer.add_trajectories(trajectories)
            assert_parity(buffer, reference_of(trajectories, sample_window_size=0))

    def test_samples_while_another_thread_adds(self) -> None:
        count = 150
        failures: list[BaseException] = []
        with TrajectoryReplayBuffer(sample_window_size=10) as buffer:
            buffer.add_trajectories([numbered(0)])

            def add() -> None:
                try:
                    for number in range(1, count):
                        buffer.add_trajectories([numbered(number)])
                except BaseException as error:
                    failures.append(error)

            adder = threading.Thread(target=add)
            adder.start()
            drawn = 0
            while adder.is_alive() or not drawn:
                batch = buffer.sample(64)
                assert torch.equal(batch["actions"], batch["rewards"][:, None].expand(-1, 3) * 2)
                assert torch.equal(batch["next_obs"]["states"], batch["curr_obs"]["states"] + 1)
                drawn += 1
            adder.join()
            assert not failures
            assert len(buffer) == count
            numbers = buffer.sample(1000)["rewards"] // 1000
            assert set(numbers.int().tolist()) == set(range(count - 10, count))


def numbered(number: int) -> Trajectory:
    steps, envs = 6, 2
    values = 1000.0 * number + torch.arange(steps * envs).view(steps, envs)
    states = torch.arange(steps + 1.0)[:, None, None].expand(-1, envs, 4) + number
    return Trajectory(
        rewards=values,
        actions=2 * values[..., None].expand(-1, -1, 3),
        curr_obs={"states": states[:-1]},
        next_obs={"states": states[1:]},
    )


def tensors(tree: dict[str, Any]) -> Iterator[torch.Tensor]:
    for value in tree.values():
        if isinstance(value, dict):
            yield from tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


class TestCheckpoints:
    def test_twice_at_the_same_place(self, tmp_path: Path) -> None:
        trajectories = made(5)
        with TrajectoryReplayBuffer(seed=9, auto_save=True, auto_save_path=tmp_path / "run") as buffer:
            buffer.add_trajectories(trajectories[:3])
            buffer.save_checkpoint(tmp_path / "c")
            first = {path for path in (tmp_path / "c" / "segments").rglob("*") if path.is_file()}
            buffer.save_checkpoint(tmp_path / "c")
            assert {path for path in (tmp_path / "c" / "segments").rglob("*") if path.is_file()} == first
            buffer.add_trajectories(trajectories[3:])
            buffer.save_checkpoint(tmp_path / "c")
        for path in first:
            assert path.stat().st_nlink == 2  # of the run and of the checkpoint
        shutil.rmtree(tmp_path / "run")
        with TrajectoryReplayBuffer() as buffer:
            buffer.load_checkpoint(tmp_path / "c")
            assert_parity(buffer, reference_of(trajectories, seed=9))

    def test_a_copy_shares_nothing_and_a_reference_everything(self, tmp_path: Path) -> None:
        trajectories = made(3)
        with TrajectoryReplayBuffer(seed=9, auto_save=True, auto_save_path=tmp_path / "run") as buffer:
            buffer.add_trajectories(trajectories)
            buffer.save_checkpoint(tmp_path / "copy", share="copy")
            buffer.save_checkpoint(tmp_path / "reference", share="reference")
        for path in (tmp_path / "copy").rglob("*"):
            assert path.is_dir() or path.stat().st_nlink == 1
        assert not (tmp_path / "reference" / "segments").exists()
        for name in ("copy", "reference"):
            with TrajectoryReplayBuffer() as buffer:
                buffer.load_checkpoint(tmp_path / name)
                assert_parity(buffer, reference_of(trajectories, seed=9))

    def test_a_reference_to_a_temporary_folder_would_not_last(self, tmp_path: Path) -> None:
        with TrajectoryReplayBuffer() as buffer:
            buffer.add_trajectories(made(1))
            with pytest.raises(SelectionError, match="temporary"):
                buffer.save_checkpoint(tmp_path / "c", share="reference")
        assert not (tmp_path / "c").exists()

    @pytest.mark.parametrize("form", ["store", "pt"])
    def test_of_nothing(self, tmp_path: Path, form: str) -> None:
        with TrajectoryReplayBuffer(trajectory_format=form) as buffer:
            buffer.save_checkpoint(tmp_path / "empty")
            buffer.add_trajectories(made(2))
            buffer.save_checkpoint(tmp_path / "full")
            buffer.load_checkpoint(tmp_path / "empty")
            assert_parity(buffer, reference_of([]))
            buffer.add_trajectories(made(1))
            assert_parity(buffer, reference_of(made(1)))
            buffer.clear()
            buffer.save_checkpoint(tmp_path / "full")  # takes the place of what is there
            buffer.load_checkpoint(tmp_path / "full")
            assert_parity(buffer, reference_of([]))

    @pytest.mark.parametrize("form", ["store", "pt"])
    def test_a_place_that_holds_one_of_the_other_kind(self, tmp_path: Path, form: str) -> None:
        reference = saved_at(tmp_path / "c", made(2), trajectory_format={"store": "pt", "pt": "store"}[form])
        with TrajectoryReplayBuffer(trajectory_format=form) as buffer:
            buffer.add_trajectories(made(3))
            with pytest.raises(StoreExistsError, match="another folder"):
                buffer.save_checkpoint(tmp_path / "c")
            buffer.load_checkpoint(tmp_path / "c")
            assert_parity(buffer, reference)

    def test_going_on_with_a_run(self, tmp_path: Path) -> None:
        trajectories = made(5)
        run = {"auto_save": True, "auto_save_path": tmp_path / "run"}
        with TrajectoryReplayBuffer(seed=9, **run) as buffer:
            buffer.add_trajectories(trajectories[:3])
        with TrajectoryReplayBuffer(**run) as buffer:
            for _ in range(2):
                with pytest.raises(StoreExistsError, match=r"load_checkpoint\(\) it to go on"):
                    buffer.add_trajectories(trajectories[3:])
            assert_parity(buffer, reference_of([]))
            with pytest.raises(SelectionError, match="auto_save_path of its own"):
                buffer.load_checkpoint(tmp_path / "run", is_distributed=True, local_rank=0, world_size=2)
            buffer.load_checkpoint(tmp_path / "run")
            reference = reference_of(trajectories[:3], seed=9)
            assert_parity(buffer, reference)
            buffer.add_trajectories(trajectories[3:])
            reference.add(trajectories[3:])
            assert_parity(buffer, reference)
        with trajstore.open(tmp_path / "run") as store:
            assert [entry.id for entry in rollouts.find(store.trajectories).entries] == [0, 1, 2, 3, 4]

    def test_another_checkpoint_takes_the_place_of_a_run_whose_versions_stay(self, tmp_path: Path) -> None:
        run = {"auto_save": True, "auto_save_path": tmp_path / "run"}
        with TrajectoryReplayBuffer(seed=9, **run) as buffer:
            buffer.add_trajectories(made(1))
            buffer.save_checkpoint(tmp_path / "c")
            buffer.add_trajectories(made(2, first=1))
        with TrajectoryReplayBuffer(**run) as buffer:
            buffer.load_checkpoint(tmp_path / "c")
            assert_parity(buffer, reference_of(made(1), seed=9))
            assert buffer.store is not None
            versions = buffer.store.versions()
        found = set()
        for version in versions.index:
            with trajstore.open(tmp_path / "run", version=version) as store:
                found.add(len(rollouts.find(store.trajectories).entries))
        assert {1, 3} <= found

    def test_a_checkpoint_is_as_it_was_saved_whatever_the_buffer_does_next(self, tmp_path: Path) -> None:
        with TrajectoryReplayBuffer(seed=9, sample_window_size=2, auto_save=False) as buffer:
            buffer.add_trajectories(made(2))
            buffer.save_checkpoint(tmp_path / "c")
            for number in range(2, 20):  # the first segments are given back
                buffer.add_trajectories(made(1, first=number))
                buffer.sample(1)
            buffer.clear()
        with TrajectoryReplayBuffer(sample_window_size=2) as buffer:
            buffer.load_checkpoint(tmp_path / "c")
            assert_parity(buffer, reference_of(made(2), seed=9, sample_window_size=2))


@pytest.fixture(params=also_slow(["disk", "memory", "s3"], ["disk", "s3"]))
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Callable[[str], str], dict[str, Any]]]:
    """The URL of a name, and keywords that its storage needs."""
    if request.param == "disk":
        yield lambda name: str(tmp_path / name), {}
    elif request.param == "memory":
        yield lambda name: f"memory://{tmp_path}/{name}", {}
        fsspec.filesystem("memory").store.clear()
    else:
        bucket_name = request.getfixturevalue("bucket")
        given = {"storage_options": request.getfixturevalue("options")}
        yield lambda name: f"s3://{bucket_name}/{name}", given


class TestPlaces:
    """A URL works everywhere a path does."""

    @pytest.mark.parametrize("form", also_slow(["store", "pt"], ["store"]))
    def test_a_run_and_its_checkpoints(
        self, place: tuple[Callable[[str], str], dict[str, Any]], tmp_path: Path, form: str
    ) -> None:
        url, given = place
        trajectories = made(6)
        reference = reference_of(trajectories[:4], seed=9)
        run = {"auto_save": True, "auto_save_path": url("run"), "trajectory_format": form, **given}
        with TrajectoryReplayBuffer(seed=9, **run) as buffer:
            buffer.add_trajectories(trajectories[:4])
            assert_parity(buffer, reference)
            buffer.save_checkpoint(url("c"))
            buffer.save_checkpoint(tmp_path / "local")  # from a bucket to the disk
            buffer.add_trajectories(trajectories[4:])
            reference.add(trajectories[4:])
            assert_parity(buffer, reference)
        for where in (url("c"), tmp_path / "local"):
            with TrajectoryReplayBuffer(trajectory_format=form, **given) as buffer:  # in a temporary folder
                buffer.load_checkpoint(where)
                reference = reference_of(trajectories[:4], seed=9)
                assert_parity(buffer, reference)
                buffer.add_trajectories(trajectories[4:])
                reference.add(trajectories[4:])
                assert_parity(buffer, reference)
                buffer.save_checkpoint(url("again"))
                buffer.save_checkpoint(tmp_path / "again")
            for again in (url("again"), tmp_path / "again"):
                with TrajectoryReplayBuffer(**given) as buffer:
                    buffer.load_checkpoint(again, is_distributed=True, local_rank=1, world_size=2)
                    mine = ReferenceBuffer(seed=9)
                    mine.trajectories = list(enumerate(trajectories))[3:]
                    assert_parity(buffer, mine)
        with TrajectoryReplayBuffer(**run) as buffer:
            with pytest.raises(StoreExistsError, match="earlier run"):
                buffer.add_trajectories(trajectories)
            buffer.load_checkpoint(url("run"))
            assert_parity(buffer, reference_of(trajectories, seed=9))

    def test_a_checkpoint_taken_into_a_run_elsewhere(
        self, place: tuple[Callable[[str], str], dict[str, Any]], tmp_path: Path
    ) -> None:
        url, given = place
        trajectories = made(3)
        saved_at(tmp_path / "local", trajectories)
        run = {"auto_save": True, "auto_save_path": url("run"), **given}
        with TrajectoryReplayBuffer(**run) as buffer:
            buffer.load_checkpoint(tmp_path / "local")
            assert_parity(buffer, reference_of(trajectories, seed=9))
            buffer.save_checkpoint(url("c"))
        shutil.rmtree(tmp_path / "local")
        with TrajectoryReplayBuffer(**given) as buffer:
            buffer.load_checkpoint(url("c"))
            assert_parity(buffer, reference_of(trajectories, seed=9))


def test_files_name_what_rlinf_expects(tmp_path: Path) -> None:
    saved_at(tmp_path, made(2), trajectory_format="pt")
    names = sorted(os.listdir(tmp_path))
    assert names == ["metadata.json", "trajectory_0_weights.pt", "trajectory_1_weights.pt", "trajectory_index.json"]
    assert json.loads((tmp_path / "metadata.json").read_text())["trajectory_format"] == "pt"


def test_a_failed_save_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = saved_at(tmp_path / "c", made(2))
    with TrajectoryReplayBuffer(seed=3) as buffer:
        buffer.add_trajectories(made(3))
        buffer.sample(1)

        def fail(*_: Any, **__: Any) -> None:
            raise OSError(28, "no space left on device")

        monkeypatch.setattr(os, "link", fail)
        monkeypatch.setattr("trajstore.storage.local.LocalFilesystem._write", fail)
        with pytest.raises(OSError, match="no space"):
            buffer.save_checkpoint(tmp_path / "c")
        monkeypatch.undo()
        buffer.load_checkpoint(tmp_path / "c")
        assert_parity(buffer, reference)
