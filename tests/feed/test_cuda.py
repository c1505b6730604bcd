"""Batches on a device: those of main memory, never torn, and nobody waits for them.

What needs no CUDA device comes first. The rest is skipped without one.
"""

from __future__ import annotations

import contextlib
import itertools
import time

import numpy as np
import pytest
import torch

import trajstore
from tests.support.recordings import flat_batch, least_cache_bytes
from trajstore import Column
from trajstore.feed.assemble import Assembler

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false here")

SCHEMA = [
    Column(path="obs/image", dtype="uint8", shape=(9, 9, 3), extra=1, page_rows=8),
    Column(path="obs/state", dtype="float32", shape=(3,), extra=1),
    Column(path="place", dtype="int64", shape=(5,), page_rows=16),
    Column(path="reward", dtype="float32"),
    Column(path="flag", dtype="bool"),
    Column(path="half", dtype="bfloat16", shape=(2,)),
    Column(path="moment", dtype="datetime64[us]"),
    Column(path="note", dtype="string"),
    Column(path="points", dtype="int16", ragged=True),
]
OPTIONS = [
    {},
    {"window": 4},
    {"window": 4, "pad": "zero"},
    {"window": 3, "dilation": 2, "pad": "edge", "columns": ["obs", "step", "is_last", "note", "points", "number"]},
    {"window": {"obs": [-3, 0], "place": range(6), "reward": 0, "terminated": 0}, "pad": "zero"},
    {"n_step": 3, "gamma": 0.9},
    {"n_step": 3, "window": {"obs": [-1, 0], "reward": 0, "half": 0}, "pad": "zero"},
    {"columns": ["step", "trajectory"]},
]
ORDERS = [
    {"order": "sequential"},
    {"order": "shuffle", "epochs": 2, "seed": 5},
    {"order": "random", "seed": 6},
    {"order": "prioritized", "seed": 7},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows of ``place`` say where they are from: trajectory * 1000 + step."""
    path = tmp_path_factory.mktemp("device") / "s"
    with trajstore.open(path, "x", schema=SCHEMA) as store:
        for number, length in enumerate([30, 7, 50, 1, 41]):
            rng = np.random.default_rng(number)
            rows = 1000 * number + np.arange(length)
            store.append(
                {
                    "obs": {
                        "image": rng.integers(0, 256, (length + 1, 9, 9, 3), np.uint8),
                        "state": rng.standard_normal((length + 1, 3), np.float32),
                    },
                    "place": np.repeat(rows[:, None], 5, axis=1),
                    "reward": rng.standard_normal(length, np.float32),
                    "flag": rng.integers(0, 2, length).astype(bool),
                    "half": torch.from_numpy(rng.standard_normal((length, 2), np.float32)).bfloat16(),
                    "moment": rows.astype("datetime64[us]"),
                    "note": [f"{row}" for row in rows],
                    "points": [np.arange(row % 3, dtype=np.int16) for row in rows],
                },
                terminated=number % 2 == 0,
                number=number,
            )
            store.flush()
    return path


@pytest.fixture
def view(folder):
    with trajstore.open(folder) as store:
        yield store.trajectories


def assert_same(found, expected, *, device="cpu", count=12):
    """The same batches, all tensors on the device; those of main memory are held against them."""
    pairs = list(zip(itertools.islice(found, count), itertools.islice(expected, count), strict=True))
    assert pairs
    for batch, other in pairs:
        flat, wanted = flat_batch(batch), flat_batch(other)
        assert sorted(flat) == sorted(wanted)
        for name, value in wanted.items():
            parts, others = (flat[name], value) if isinstance(value, tuple) else ((flat[name],), (value,))
            for a, b in zip(parts, others, strict=True):
                if isinstance(b, np.ndarray):
                    np.testing.assert_array_equal(a, b)
                    continue
                assert a.device.type == device, name
                assert (a.dtype, a.shape) == (b.dtype, b.shape), name
                if name == "reward":
                    torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)
                else:
                    assert torch.equal(a.cpu(), b), name


# Without a device


class SplitAssembler(Assembler):
    """Gathers stored columns into a block of their own, as if the cache were on a device that happens to be main memory."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        gatherer = self.gatherers[0]
        extra = [v for v in self._host_values if v not in gatherer.stored_values + gatherer.computed_values]
        self._device_values = gatherer.stored_values
        self._host_values = (*gatherer.computed_values, *extra)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order["order"])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_two_blocks_hold_what_one_does(view, monkeypatch, options, order):
    expected = view.loader(9, **options, **order)
    monkeypatch.setattr("trajstore.feed.pipeline.Assembler", SplitAssembler)
    loader = view.loader(9, **options, **order)
    assert isinstance(loader._pipeline._assembler, SplitAssembler)
    assert_same(loader, expected)


def test_main_memory_is_a_device_too(view):
    assert_same(view.loader(9, device="cpu", seed=1), view.loader(9, seed=1))
    assert_same(view.loader(9, cache_device="cpu", seed=1), view.loader(9, seed=1))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_default_device_and_inference_mode_change_nothing(folder, view, prefetch):
    expected = view.loader(9, window=3, pad="zero", seed=1)
    for mode in (torch.device("meta"), torch.inference_mode()):
        with trajstore.open(folder) as store, mode:
            loader = store.trajectories.loader(9, window=3, pad="zero", seed=1, prefetch=prefetch)
            sample = store.trajectories.sample(5, columns=["points", "reward"])
            first = next(loader)
            assert sample["reward"].device.type == "cpu"
            batches = [first, *itertools.islice(loader, 20)]
        assert_same(batches, expected, count=21)
        expected = view.loader(9, window=3, pad="zero", seed=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("options", [{"device": "cuda"}, {"cache_device": "cuda:0"}])
def test_a_device_that_is_not_there(view, options):
    with pytest.raises(trajstore.SelectionError, match=r"device='cuda(:0)?'.*finds 0 CUDA devices"):
        view.loader(9, **options)


# With one


@needs_cuda
@pytest.mark.parametrize(
    "places", [{"device": "cuda"}, {"cache_device": "cuda"}, {"device": "cuda", "cache_device": "cuda"}]
)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order["order"])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_batches_on_a_device_are_those_of_main_memory(view, options, order, places):
    expected = view.loader(9, **options, **order)
    for prefetch in (0, 2):
        assert_same(view.loader(9, prefetch=prefetch, **options, **order, **places), expected, device="cuda")
        expected = view.loader(9, **options, **order)


@needs_cuda
@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
def test_a_cache_on_a_device_that_holds_one_window_at_a_time(view, device):
    options = {"window": 6, "pad": "zero", "order": "shuffle", "block_bytes": 4000}
    least = least_cache_bytes(view, 16, **options)
    loader = view.loader(16, cache_bytes=least, cache_device="cuda", device=device, **options)
    assert_same(loader, view.loader(16, **options), device=device or "cuda", count=100)
    stats = loader.stats().cache
    assert stats.evictions > 50
    assert stats.used_bytes <= stats.capacity_bytes <= least


@needs_cuda
@pytest.mark.parametrize("where", ["thread", "caller"])
@pytest.mark.parametrize(
    "options", [{}, {"cache_device": "cuda"}, {"columns": ["place", "trajectory", "step", "note"]}]
)
def test_no_batch_is_ever_torn(view, options, where):
    """Kernels that are late, batches that are dropped at once, buffers that are used again."""
    columns = {"columns": ["place", "trajectory", "step"], **options}
    loader = view.loader(32, window=8, seed=1, device="cuda", prefetch=0 if where == "caller" else 2, **columns)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
    rng = np.random.default_rng(2)
    torch.cuda.synchronize()
    for number, batch in enumerate(itertools.islice(loader, 10_000)):
        which = number // 64 % 2
        if which:  # receive on the default stream, work on another, as a consumer may that says so
            streams[1].wait_stream(streams[0])
        with torch.cuda.stream(streams[which]):
            if rng.random() < 0.1:
                torch.cuda._sleep(int(rng.integers(10_000, 2_000_000)))
            expected = 1000 * batch["trajectory"] + batch["step"]
            wrong[which] += (batch["place"] != expected[..., None]).sum()
        if which:
            for value in batch.values():
                if isinstance(value, torch.Tensor):
                    value.record_stream(streams[1])
        del batch, expected
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0]
    assert loader.stats().buffers_made < 20


@needs_cuda
def test_the_consumer_and_its_stream_do_not_wait_for_copies(view):
    loader = view.loader(64, window=8, device="cuda", seed=1)
    for _ in range(40):
        next(loader)
    torch.cuda.synchronize()
    cycles = sleeping_cycles(0.5)
    asleep = torch.cuda.Event()
    torch.cuda._sleep(cycles)
    asleep.record()
    begun = time.perf_counter()
    batch = next(loader)
    assert time.perf_counter() - begun < 0.2, "the thread waited for its own stream"
    arrived = loader._arrival._event
    while not arrived.query():
        assert time.perf_counter() - begun < 10
    assert not asleep.query(), "the copy waited for the consumer's stream"
    del batch
    torch.cuda.synchronize()
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    time.sleep(0.2)  # the next lot is ready
    before.record()
    next(loader)
    after.record()
    torch.cuda.synchronize()
    assert before.elapsed_time(after) < 20, "the consumer's stream waited for a copy that had long ended"


def sleeping_cycles(seconds):
    """For ``torch.cuda._sleep``."""
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(1000)
    begun.record()
    torch.cuda._sleep(10_000_000)
    ended.record()
    torch.cuda.synchronize()
    return int(10_000_000 * seconds * 1000 / begun.elapsed_time(ended))


@needs_cuda
@pytest.mark.parametrize("cache_device", [None, "cuda"])
def test_a_device_that_falls_behind_does_not_fill_with_batches(view, cache_device):
    loader = view.loader(
        512, window=32, pad="edge", columns=["obs/image", "note"], device="cuda", cache_device=cache_device
    )
    batch = next(loader)
    nbytes = batch["obs"]["image"].nbytes
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    cycles = sleeping_cycles(0.005)
    for _ in range(100):
        torch.cuda._sleep(cycles)
        batch = next(loader)
        batch["obs"]["image"].sum()
        del batch
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - held < 20 * nbytes


@needs_cuda
def test_the_current_device_of_the_caller_is_meant(view):
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last):
        loaders = [view.loader(9, device="cuda", seed=1), view.loader(9, cache_device="cuda", seed=1)]
    for loader in loaders:
        assert next(loader)["reward"].device == torch.device("cuda", last)


@needs_cuda
def test_modes_of_the_caller_change_nothing(view):
    for mode in (torch.device("cuda"), torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream())):
        with contextlib.ExitStack() as stack:
            stack.enter_context(mode)
            loader = view.loader(9, cache_device="cuda", seed=1, prefetch=0)
            batches = [next(loader) for _ in range(3)]
            torch.cuda.synchronize()
        batches += itertools.islice(loader, 20)
        assert_same(batches, view.loader(9, seed=1), device="cuda", count=23)
