"""A buffer and its store: who else writes there is noticed, and a failure leaves the counts of what is there."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trajstore
from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer
from trajstore.buffers.rlinf.filing import FilingQueue
from trajstore.errors import ClosedError, CommitError, StorageError
from trajstore.storage.local import LocalFilesystem
from trajstore.storage.workers import Workers

STEPS, ENVS = 3, 2


def numbered(*numbers: int) -> list[Trajectory]:
    """Rollouts, each of which holds its number everywhere."""
    return [
        Trajectory(
            rewards=torch.full((STEPS, ENVS), float(number)), actions=torch.full((STEPS, ENVS, 2), float(number))
        )
        for number in numbers
    ]


def at(path: Path, **knobs: Any) -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(seed=1, auto_save=True, auto_save_path=path, **knobs)


def stored(path: Path) -> list[float]:
    """The numbers in a store, one for each environment."""
    with trajstore.open(path) as store:
        return [float(trajectory["rewards"][0]) for trajectory in store.trajectories]


def assert_holds(buffer: TrajectoryReplayBuffer, numbers: list[int]) -> None:
    """Counts, and which rollout each drawn sample is of, drawn as it is drawn here."""
    assert (len(buffer), buffer.total_samples) == (len(numbers), len(numbers) * STEPS * ENVS)
    expected = torch.tensor([float(n) for n in numbers]).repeat_interleave(STEPS * ENVS)
    generator = torch.Generator()
    generator.set_state(buffer.random_generator.get_state())
    for _ in range(3):
        drawn = torch.randint(0, len(expected), (4,), generator=generator)
        assert torch.equal(buffer.sample(4)["rewards"], expected[drawn])


class TestTwoAtOnePlace:
    @pytest.fixture
    def two(self, tmp_path: Path) -> tuple[TrajectoryReplayBuffer, TrajectoryReplayBuffer]:
        """Both empty when they began; of the first, 1 is durable, of the second, 2."""
        first, second = at(tmp_path / "run"), at(tmp_path / "run")
        first.add_trajectories(numbered(1))
        second.add_trajectories(numbered(2))
        first.flush()
        return first, second

    @pytest.mark.parametrize(
        "call",
        [
            lambda buffer, _: buffer.flush(),
            lambda buffer, _: buffer.clear_cache(),
            lambda buffer, _: buffer.clear(),
            lambda buffer, _: buffer.close(),
            lambda buffer, path: buffer.save_checkpoint(path / "c"),
            lambda buffer, path: buffer.load_checkpoint(path / "other"),
        ],
        ids=["flush", "clear_cache", "clear", "close", "save", "load"],
    )
    def test_the_second_says_so_and_nothing_is_lost(
        self, two: tuple[Any, Any], tmp_path: Path, call: Callable[[Any, Path], None]
    ) -> None:
        with at(tmp_path / "other") as other:
            other.add_trajectories(numbered(7))
        first, second = two
        match = r"somebody else writes to .*run: of 4 stored trajectories there 2 are not of this buffer, and 0 of its"
        with pytest.raises(CommitError, match=match):
            call(second, tmp_path)
        assert stored(tmp_path / "run") == [1, 1, 2, 2]
        for buffer in (first, second):
            with contextlib.suppress(CommitError):
                buffer.close()
        with at(tmp_path / "run") as again:
            again.load_checkpoint(tmp_path / "run")
            assert_holds(again, [1, 2])

    def test_no_batch_is_of_the_others_trajectories(self, two: tuple[Any, Any], tmp_path: Path) -> None:
        first, second = two
        with pytest.raises(CommitError):
            second.flush()
        second.add_trajectories(numbered(3))
        state = second.random_generator.get_state()
        for _ in range(2):
            with pytest.raises(CommitError, match="load_checkpoint"):
                second.sample(4)
        assert torch.equal(second.random_generator.get_state(), state)  # nothing was drawn
        second.load_checkpoint(tmp_path / "run")  # which goes on with all that is there
        assert_holds(second, [1, 2, 3])
        second.add_trajectories(numbered(4))
        assert_holds(second, [1, 2, 3, 4])
        second.close()
        with pytest.raises(CommitError, match="of 8 stored trajectories there 6 are not"):
            first.close()

    def test_deleted_by_another_handle(self, tmp_path: Path) -> None:
        buffer = at(tmp_path / "run")
        buffer.add_trajectories(numbered(1, 2, 3))
        buffer.flush()
        assert_holds(buffer, [1, 2, 3])
        with trajstore.open(tmp_path / "run", "a") as store:
            store.delete(store.trajectories.ids[:2])
        buffer.add_trajectories(numbered(4))
        with pytest.raises(CommitError, match="0 are not of this buffer, and 2 of its own were deleted"):
            buffer.flush()
        with pytest.raises(CommitError, match="2 of its own were deleted"):
            buffer.sample(4)
        buffer.load_checkpoint(tmp_path / "run")
        assert_holds(buffer, [2, 3, 4])
        buffer.close()

    def test_segments_deleted_while_they_are_drawn_from(self, tmp_path: Path) -> None:
        buffer = at(tmp_path / "run", enable_cache=False)
        buffer.add_trajectories(numbered(1))
        buffer.clear_cache()
        assert len(buffer) == 1
        buffer._holding.view()
        with trajstore.open(tmp_path / "run", "a") as store:
            store.delete(store.trajectories.ids, reclaim=True)
        with pytest.raises(CommitError, match="2 of its own were deleted"):
            buffer.sample(4)

    def test_other_edits_are_no_matter(self, tmp_path: Path) -> None:
        with at(tmp_path / "run") as buffer:
            for number in range(3):
                buffer.add_trajectories(numbered(number))
                buffer.flush()
            with trajstore.open(tmp_path / "run", "a") as store:
                store.compact()
                store.tag("good")
            buffer.add_trajectories(numbered(3))
            buffer.flush()
            assert_holds(buffer, [0, 1, 2, 3])

    def test_a_checkpoint_at_the_buffers_own_place(self, tmp_path: Path) -> None:
        with at(tmp_path / "run") as buffer:
            buffer.add_trajectories(numbered(1))
            buffer.save_checkpoint(tmp_path / "run/")
            assert stored(tmp_path / "run") == [1, 1]
            buffer.add_trajectories(numbered(2))
            buffer.flush()
            assert_holds(buffer, [1, 2])


class TestFailures:
    @pytest.fixture
    def full(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
        """Inside its block no object can be stored."""

        def fail(*_: Any, **__: Any) -> None:
            raise StorageError("no space left on device")

        def block() -> Any:
            context = monkeypatch.context()
            entered = context.__enter__()
            entered.setattr(LocalFilesystem, "store", fail)
            return context

        return block

    @pytest.mark.parametrize("place", ["run", None])
    @pytest.mark.parametrize("call", ["flush", "save", "clear_cache", "close"])
    def test_of_a_commit(self, tmp_path: Path, full: Callable[[], Any], call: str, place: str | None) -> None:
        buffer = TrajectoryReplayBuffer(seed=1, auto_save=place is not None, auto_save_path=tmp_path / "run")
        buffer.add_trajectories(numbered(1, 2))
        buffer.flush()
        buffer.add_trajectories(numbered(3))
        failing = full()
        calls = {"save": lambda: buffer.save_checkpoint(tmp_path / "c")}
        with pytest.raises(StorageError, match="no space"):
            calls.get(call, lambda: getattr(buffer, call)())()
        failing.__exit__(None, None, None)
        if call == "close":
            assert len(buffer) == 2
            return
        assert_holds(buffer, [1, 2])
        buffer.add_trajectories(numbered(4, 5))
        assert_holds(buffer, [1, 2, 4, 5])
        buffer.save_checkpoint(tmp_path / "c")
        assert stored(tmp_path / "c") == [1, 1, 2, 2, 4, 4, 5, 5]
        buffer.close()

    def test_of_a_commit_in_the_background(self, tmp_path: Path, full: Callable[[], Any]) -> None:
        with at(tmp_path / "run") as buffer:
            buffer.add_trajectories(numbered(1))
            buffer.flush()
            buffer.add_trajectories(numbered(2))
            assert_holds(buffer, [1, 2])
            failing = full()
            with pytest.raises(StorageError, match="no space"):
                buffer.store.flush()  # as the commit that comes every 30 s; somebody else is told of the failure
            failing.__exit__(None, None, None)
            buffer.add_trajectories(numbered(3))
            with pytest.raises(CommitError, match="could not be committed, as an earlier error said"):
                buffer.sample(4)
            assert_holds(buffer, [1, 3])

    def test_the_next_call_is_not_taken_along(self) -> None:
        with TrajectoryReplayBuffer(seed=1) as buffer:
            buffer.add_trajectories(numbered(0))
            changed = self.changed_before_it_is_filed(buffer)
            with pytest.raises(ValueError, match="'rewards' of a trajectory was changed in place") as caught:
                buffer.add_trajectories(numbered(2, 3))
            assert "Nothing of this call was added: call again." in caught.value.__notes__[-1]
            assert changed
            assert_holds(buffer, [0])
            buffer.add_trajectories(numbered(2, 3))
            assert_holds(buffer, [0, 2, 3])

    def changed_before_it_is_filed(self, buffer: TrajectoryReplayBuffer) -> Trajectory:
        gate = threading.Event()
        buffer._holding._filing.put(gate.wait, nbytes=0, max_bytes=1)
        (lost,) = numbered(1)
        buffer.add_trajectories([lost])
        lost.rewards.zero_()
        gate.set()
        while not buffer._holding._filing._waiting[-1][0].done():
            time.sleep(0.001)
        return lost

    def test_a_list_is_added_as_a_whole(self) -> None:
        """Although one of them fails while room is made for the next."""
        with TrajectoryReplayBuffer(seed=1, cache_bytes=1, cache_size=1) as buffer:
            buffer.add_trajectories(numbered(0))
            gate = threading.Event()
            buffer._holding._filing.put(gate.wait, nbytes=5 << 20, max_bytes=8 << 20)
            lost, *others = numbered(1, 2, 3)
            opener = threading.Timer(0.2, lambda: (lost.rewards.zero_(), gate.set()))
            opener.start()
            buffer.add_trajectories([lost, *others])
            opener.join()
            with pytest.raises(ValueError, match="changed in place"):
                buffer.sample(4)
            assert_holds(buffer, [0, 2, 3])


class TestInterrupts:
    def test_who_is_interrupted_waits_again(self) -> None:
        worker = Workers(1, name="test")
        queue, gate, done = FilingQueue(worker), threading.Event(), []
        queue.put(gate.wait, nbytes=1, max_bytes=10)
        queue.put(lambda: done.append(1), nbytes=1, max_bytes=10)
        future, _ = queue._waiting[0]

        def interrupted(timeout: float | None = None) -> BaseException | None:
            del future.exception
            raise KeyboardInterrupt

        future.exception = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            queue.wait()
        assert not done
        gate.set()
        queue.wait()
        assert done == [1]
        worker.close()

    def test_a_flush_after_an_interrupt_is_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with at(tmp_path / "run") as buffer:
            buffer.add_trajectories(numbered(0))
            buffer.sample(1)
            gate = threading.Event()
            buffer._holding._filing.put(gate.wait, nbytes=0, max_bytes=1)
            buffer.add_trajectories(numbered(1))
            future, _ = buffer._holding._filing._waiting[0]

            def interrupted(timeout: float | None = None) -> BaseException | None:
                del future.exception
                threading.Timer(0.2, gate.set).start()
                raise KeyboardInterrupt

            future.exception = interrupted  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                buffer.flush()
            buffer.flush()
            shutil.copytree(tmp_path / "run", tmp_path / "killed")
        assert stored(tmp_path / "killed") == [0, 0, 1, 1]


class TestClosingWithoutWaiting:
    @pytest.mark.parametrize("call", ["clear", "clear_cache", "close"])
    def test_what_waits_is_written_whatever_comes_next(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        end = TrajectoryReplayBuffer._end

        def late(*arguments: Any) -> None:
            time.sleep(0.2)
            end(*arguments)

        monkeypatch.setattr(TrajectoryReplayBuffer, "_end", late)
        buffer = at(tmp_path / "run")
        buffer.add_trajectories(numbered(1))
        buffer.flush()
        buffer.add_trajectories(numbered(2))
        buffer.close(wait=False)
        getattr(buffer, call)()
        assert stored(tmp_path / "run") == [1, 1, 2, 2]
        assert len(buffer) == (0 if call == "clear" else 2)

    @pytest.mark.parametrize("call", ["clear", "clear_cache", "close"])
    def test_what_fails_is_raised_at_the_next_call(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
    ) -> None:
        buffer = at(tmp_path / "run")
        buffer.add_trajectories(numbered(1))

        def fail(*_: Any, **__: Any) -> None:
            raise StorageError("no space left on device")

        monkeypatch.setattr(LocalFilesystem, "store", fail)
        buffer.close(wait=False)
        with pytest.raises(ClosedError):
            buffer.sample(1)
        with pytest.raises(StorageError, match="no space"):
            getattr(buffer, call)()
        getattr(buffer, call)()  # once
        assert len(buffer) == 0
