"""Datasets over replay buffers: the same batches as by hand, errors where they are expected, and no wait without an end."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.support.rlinf_reference import ReferenceBuffer, assert_same, random_trajectory
from trajstore.buffers.rlinf import (
    PreloadReplayBufferDataset,
    ReplayBufferDataset,
    TrajectoryReplayBuffer,
    datasets,
    replay_buffer_collate_fn,
)
from trajstore.errors import ClosedError, ForkedError, SchemaConflictError, SelectionError, StorageTimeoutError

PATIENCE_S = 30.0


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "trajstore-prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    if threads():  # whose dataset nobody closed
        gc.collect()
    for thread in threads():
        thread.join(PATIENCE_S)
    assert not threads()


def reference(count: int = 3, *, seed: int = 1, values: int = 0) -> ReferenceBuffer:
    """A buffer with trajectories; the same each time."""
    rng = np.random.default_rng(values)
    buffer = ReferenceBuffer(seed=seed)
    buffer.add([random_trajectory(rng, T=4, B=2) for _ in range(count)])
    return buffer


class Numbers:
    """A buffer that counts: sample ``n`` of all that were drawn is ``n``."""

    def __init__(self, *, size: int = 1, fails_at: int | None = None, error: Exception | None = None) -> None:
        self.size = size
        self.drawn = 0
        self.calls = 0
        self.asked = threading.Semaphore(0)  # released by each is_ready
        self.sampled = threading.Semaphore(0)  # released by each sample
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self._fails_at = fails_at
        self._error = error or OSError("the disk is gone")

    def is_ready(self, min_size: int) -> bool:
        self.asked.release()
        return self.size >= min_size

    def sample(self, num_chunks: int) -> dict[str, Any]:
        self.calls += 1
        assert self.may_go_on.wait(PATIENCE_S)
        if self.calls - 1 == self._fails_at:
            raise self._error
        self.drawn += num_chunks
        self.sampled.release()
        return {"x": torch.arange(self.drawn - num_chunks, self.drawn), "obs": {"y": torch.ones(num_chunks, 2)}}


KINDS = [ReplayBufferDataset, PreloadReplayBufferDataset]
Kind = type[ReplayBufferDataset]


@pytest.mark.parametrize("kind", KINDS)
class TestBoth:
    def test_batches_are_those_of_the_buffer(self, kind: Kind) -> None:
        expected = reference()
        with kind(reference(), None, 16, 3, 0) as dataset:
            for _, batch in zip(range(8), dataset, strict=False):
                assert_same(batch, expected.sample(16))

    @pytest.mark.parametrize(("batch_size", "each"), [(8, 4), (9, 4), (2, 1), (3, 1)])
    def test_half_and_half(self, kind: Kind, batch_size: int, each: int) -> None:
        replay, demo = reference(seed=1), reference(seed=2, values=9)
        with kind(reference(seed=1), reference(seed=2, values=9), batch_size, 1, 1) as dataset:
            for _, batch in zip(range(5), dataset, strict=False):
                first, second = replay.sample(each), demo.sample(each)
                assert len(batch["rewards"]) == 2 * each
                assert_same(_rows(batch, slice(0, each)), first)
                assert_same(_rows(batch, slice(each, None)), second)

    def test_over_the_store(self, kind: Kind) -> None:
        rng = np.random.default_rng(5)
        made = [random_trajectory(rng) for _ in range(4)]
        expected = ReferenceBuffer(seed=3)
        expected.add(made)
        with TrajectoryReplayBuffer(seed=3) as buffer, kind(buffer, None, 8, 4, 0) as dataset:
            buffer.add_trajectories(made)
            kept = []
            for _, batch in zip(range(6), dataset, strict=False):
                kept.append((batch, expected.sample(8)))
            for batch, wanted in kept:  # none was overwritten by a later one
                assert_same(batch, wanted)

    def test_through_a_dataloader(self, kind: Kind) -> None:
        expected = reference()
        with kind(reference(), None, 16, 3, 0) as dataset:
            loader = DataLoader(dataset, batch_size=1, num_workers=0, collate_fn=replay_buffer_collate_fn)
            for _, batch in zip(range(4), loader, strict=False):
                assert_same(batch, expected.sample(16))

    def test_not_in_a_worker_process(self, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets, "get_worker_info", object)  # as within a worker
        with kind(Numbers(), None, 4, 1, 0) as dataset, pytest.raises(ForkedError, match="num_workers=0"):
            iter(dataset)

    @pytest.mark.parametrize("waits", ["replay", "demo"])
    def test_waits_until_both_are_ready(self, kind: Kind, waits: str) -> None:
        replay, demo = Numbers(size=5), Numbers(size=7)
        late = replay if waits == "replay" else demo
        enough, late.size = late.size, 0
        found: list[Any] = []
        with kind(replay, demo, 4, 5, 7, poll_s=0.001) as dataset:
            thread = threading.Thread(target=lambda: found.append(next(iter(dataset))))
            thread.start()
            for _ in range(20):
                assert late.asked.acquire(timeout=PATIENCE_S)
            assert not found
            assert replay.calls == demo.calls == 0
            late.size = enough
            thread.join(PATIENCE_S)
            assert found[0]["x"].tolist() == [0, 1, 0, 1]

    def test_a_wait_has_an_end_and_can_be_gone_on_with(self, kind: Kind) -> None:
        buffer = Numbers(size=1)
        with kind(buffer, None, 4, 2, 0, poll_s=0.001, timeout_s=0.05) as dataset:
            batches = iter(dataset)
            for _ in range(2):
                with pytest.raises(
                    StorageTimeoutError, match=r"timeout_s=0\.05: replay_buffer has fewer than min_replay_buffer_size=2"
                ):
                    next(batches)
            buffer.size = 2
            found = None
            while found is None:
                try:
                    found = next(batches)
                except TimeoutError:
                    continue
            assert found["x"].tolist() == [0, 1, 2, 3]

    def test_closing_ends_a_wait(self, kind: Kind) -> None:
        buffer = Numbers(size=0)
        dataset = kind(buffer, None, 4, 1, 0)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(dataset))
        thread.start()
        assert buffer.asked.acquire(timeout=PATIENCE_S)
        dataset.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        assert found == []

    def test_closing_twice_and_using_after(self, kind: Kind) -> None:
        dataset = kind(Numbers(), None, 4, 1, 0)
        batches = iter(dataset)
        next(batches)
        dataset.close()
        dataset.close()
        assert list(batches) == []
        with pytest.raises(ClosedError):
            iter(dataset)
        kind(Numbers(), None, 4, 1, 0).close()  # before anything was asked of it

    def test_an_error_is_raised_by_the_batch_that_would_have_come(self, kind: Kind) -> None:
        error = StorageTimeoutError("the bucket does not answer")
        with kind(Numbers(fails_at=3, error=error), None, 2, 1, 0) as dataset:
            batches = iter(dataset)
            assert [next(batches)["x"].tolist() for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
            with pytest.raises(StorageTimeoutError, match="the bucket does not answer"):
                next(batches)

    def test_an_empty_buffer(self, kind: Kind) -> None:
        with kind(ReferenceBuffer(), None, 2, 0, 0) as dataset, pytest.raises(RuntimeError, match="empty"):
            next(iter(dataset))

    def test_who_waits_is_told_and_not_left_waiting_for_a_buffer_that_is_closed(
        self, kind: Kind, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(datasets, "_SAY_S", 0.0)
        buffer = TrajectoryReplayBuffer()
        with kind(buffer, None, 2, 5, 0, poll_s=0.01) as dataset:
            closing = threading.Timer(0.2, buffer.close)
            closing.start()
            with pytest.raises(ClosedError):
                next(iter(dataset))
            closing.join()
        assert [r.getMessage() for r in caplog.records if "waiting" in r.getMessage()] == [
            "waiting: replay_buffer has fewer than min_replay_buffer_size=5 trajectories"
        ]

    @pytest.mark.parametrize(
        ("replace", "match"),
        [
            ({"z": torch.ones(2)}, r"'z' only in the demo buffer"),
            ({"x": None}, r"'x' only in the replay buffer"),
            ({"obs": {}}, r"'obs/y' only in the replay buffer"),
            (
                {"obs": {"y": torch.ones(2, 2, dtype=torch.float64)}},
                r"'obs/y' is float32\[n, 2\] on cpu .*float64\[n, 2\]",
            ),
            ({"obs": {"y": torch.ones(2, 3)}}, r"'obs/y' is float32\[n, 2\] .*float32\[n, 3\]"),
            ({"obs": torch.ones(2, 2)}, r"'obs' is dict in the replay buffer and float32"),
            ({"x": "text"}, r"'x' is int64\[n\] .* str"),
        ],
    )
    def test_buffers_that_do_not_go_together(self, kind: Kind, replace: dict[str, Any], match: str) -> None:
        class Other(Numbers):
            def sample(self, num_chunks: int) -> dict[str, Any]:
                batch = {**super().sample(num_chunks), **replace}
                return {name: value for name, value in batch.items() if value is not None}

        with kind(Numbers(), Other(), 4, 1, 1) as dataset, pytest.raises(SchemaConflictError, match=match):
            next(iter(dataset))

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"batch_size": 0}, "batch_size=0, expected 1"),
            ({"batch_size": 1, "demo_buffer": Numbers()}, "batch_size=1, expected 2"),
            ({"poll_s": 0.0}, "poll_s"),
            ({"timeout_s": float("inf")}, "timeout_s"),
            ({"timeout_s": float("nan")}, "timeout_s"),
        ],
    )
    def test_sizes_that_give_no_batch(self, kind: Kind, change: dict[str, Any], match: str) -> None:
        sizes = {"batch_size": 4, "min_replay_buffer_size": 1, "min_demo_buffer_size": 1}
        with pytest.raises(SelectionError, match=match):
            kind(**{"replay_buffer": Numbers(), "demo_buffer": None, **sizes, **change})

    def test_further_keywords_are_ignored(self, kind: Kind) -> None:
        with kind(Numbers(), None, 4, 1, 0, anything="else") as dataset:
            assert next(iter(dataset))["x"].tolist() == [0, 1, 2, 3]


class TestAhead:
    def test_so_many_batches_are_made_and_no_more(self) -> None:
        buffer = Numbers()
        with PreloadReplayBufferDataset(buffer, None, 2, 1, 0, prefetch_size=3) as dataset:
            batches = iter(dataset)
            for taken in range(1, 20):
                assert next(batches)["x"].tolist() == [2 * taken - 2, 2 * taken - 1]
                assert buffer.calls <= taken + 3
            for _ in range(19 + 3):
                assert buffer.sampled.acquire(timeout=PATIENCE_S)  # they are indeed made ahead
            assert not buffer.sampled.acquire(timeout=0.05)

    def test_nothing_is_drawn_before_it_is_asked_for(self) -> None:
        buffer = Numbers()
        with PreloadReplayBufferDataset(buffer, None, 2, 1, 0):
            assert not threads()
        assert buffer.calls == 0

    def test_iterators_take_from_one_queue(self) -> None:
        with PreloadReplayBufferDataset(Numbers(), None, 1, 1, 0) as dataset:
            one, other = iter(dataset), iter(dataset)
            assert [int(next(it)["x"]) for it in (one, other, one, one, other)] == [0, 1, 2, 3, 4]
            assert len(threads()) == 1

    def test_what_was_made_before_an_error_comes_first(self) -> None:
        buffer = Numbers(fails_at=2)
        with PreloadReplayBufferDataset(buffer, None, 1, 1, 0) as dataset:
            batches = iter(dataset)
            assert int(next(batches)["x"]) == 0
            for thread in threads():
                thread.join(PATIENCE_S)  # it has failed by now
            assert int(next(batches)["x"]) == 1
            for _ in range(2):
                with pytest.raises(OSError, match="the disk is gone"):
                    next(batches)

    def test_a_slow_sample_is_a_time_out_that_says_so(self) -> None:
        buffer = Numbers()
        buffer.may_go_on.clear()
        with PreloadReplayBufferDataset(buffer, None, 1, 1, 0, timeout_s=0.02) as dataset:
            batches = iter(dataset)
            with pytest.raises(StorageTimeoutError, match="sampling takes longer"):
                next(batches)
            buffer.may_go_on.set()
            assert buffer.sampled.acquire(timeout=PATIENCE_S)

    def test_what_nobody_closed_ends_when_it_is_gone(self) -> None:
        dataset = PreloadReplayBufferDataset(Numbers(), None, 1, 1, 0)
        batches = iter(dataset)
        gone = weakref.ref(dataset)
        del dataset
        assert int(next(batches)["x"]) == 0  # its iterator keeps it
        assert gone() is not None
        del batches
        gc.collect()
        assert gone() is None  # and the fixture waits for its thread

    @pytest.mark.slow
    def test_an_interpreter_that_exits_does_not_wait(self) -> None:
        code = (
            "from trajstore.buffers.rlinf import PreloadReplayBufferDataset\n"
            "class Never:\n"
            "    def is_ready(self, n): return False\n"
            "dataset = PreloadReplayBufferDataset(Never(), None, 1, 1, 0, timeout_s=0.05)\n"
            "try: next(iter(dataset))\n"
            "except TimeoutError: print('late')\n"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
        assert (done.stdout, done.stderr) == ("late\n", "")

    def test_prefetch_size(self) -> None:
        with pytest.raises(SelectionError, match="prefetch_size=0"):
            PreloadReplayBufferDataset(Numbers(), None, 1, 1, 0, prefetch_size=0)
        assert PreloadReplayBufferDataset(Numbers(), None, 1, 1, 0).prefetch_size == 5


def test_collating_is_for_one_batch() -> None:
    batch = {"x": torch.ones(2)}
    assert replay_buffer_collate_fn([batch]) is batch
    for wrong in ([], [batch, batch]):
        with pytest.raises(SelectionError, match="batch_size=1"):
            replay_buffer_collate_fn(wrong)


def _rows(batch: Any, rows: slice) -> Any:
    return {k: _rows(v, rows) for k, v in batch.items()} if isinstance(batch, dict) else batch[rows]
