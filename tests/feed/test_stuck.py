"""Stuck nowhere: a cache that is too small, readers that die, storages that hang, consumers that leave, and Ctrl-C."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import trajstore
from tests.support.interrupts import interruptible
from tests.support.rare import also_slow
from tests.support.recordings import least_cache_bytes
from tests.support.watched import Gate, WatchedDisk
from trajstore import Column, StorageError

TIMEOUT_S = 60
SCHEMA = [
    Column(path="obs", dtype="int64", shape=(4,), page_rows=4),
    Column(path="image", dtype="uint8", shape=(16, 16, 3), page_rows=2, extra=1),
    Column(path="action", dtype="int64"),
    Column(path="reward", dtype="float32"),
]
PLACE = ["trajectory", "step"]


def write(folder, trajectories=8, length=40):
    """A store in which every row of ``obs`` and ``action`` says where it is from: trajectory * 1000 + step."""
    with trajstore.open(folder, "x", schema=SCHEMA) as store:
        for number in range(trajectories):
            rows = 1000 * number + np.arange(length)
            image = np.random.default_rng(number).integers(0, 256, (length + 1, 16, 16, 3), np.uint8)
            columns = {"obs": np.repeat(rows[:, None], 4, axis=1), "action": rows, "image": image}
            store.append({**columns, "reward": np.ones(length, np.float32)})
    return str(folder)


def check(batch):
    """Every row of a batch is the one that it should be."""
    expected = 1000 * batch["trajectory"] + batch["step"]
    for name in batch.keys() & {"obs", "action"}:
        assert (batch[name].reshape(*expected.shape, -1) == expected[..., None]).all(), name


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "trajstore-prefetch"]


def joined(threads):
    """Whether threads end, given some time."""
    deadline = time.monotonic() + TIMEOUT_S
    for thread in threads:
        thread.join(deadline - time.monotonic())
    return not any(thread.is_alive() for thread in threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("stuck") / "s")


@pytest.fixture(params=[False, True], ids=["disk", "bucket"])
def disk(folder, request):
    return WatchedDisk(folder, like_a_bucket=request.param)


# A cache below one window's need


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 16},
        {"window": 5, "dilation": 7, "pad": "zero"},
        {"columns": ["image"], "window": 40},
        {"window": {"obs": [-30, 0, 30], "image": range(8), "action": 0}, "pad": "edge"},
        {"window": {"obs": 0, "goal": trajstore.future("obs")}},
        {"columns": ["obs", "reward", "image"], "n_step": 3},
    ],
    ids=range(7),
)
def test_a_cache_that_cannot_hold_one_window_says_what_would_do_and_that_does(folder, options, shared):
    with trajstore.open(folder) as store:
        view = store.trajectories
        expected = view.loader(32, order="sequential", prefetch=0, **options)
        least = least_cache_bytes(view, 32, **options)
        with pytest.raises(trajstore.CacheTooSmallError, match=f"cache_bytes >= {least}"):
            view.loader(32, cache_bytes=least - 1, **options)
        if not shared:
            assert_same(view.loader(32, order="sequential", cache_bytes=least, **options), expected)
            return
        with trajstore.open(folder, cache_bytes=least - 1) as small, pytest.raises(trajstore.CacheTooSmallError):
            small.trajectories.loader(32, **options)
        with trajstore.open(folder, cache_bytes=least) as small:
            assert_same(small.trajectories.loader(32, order="sequential", **options), expected)


def assert_same(loader, expected):
    batches = list(loader)  # all are held at once
    count = 0
    for batch, other in zip(batches, expected, strict=True):
        count += 1
        for found, wanted in zip(leaves(batch), leaves(other), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert count == len(expected)


def leaves(batch):
    for value in batch.values():
        yield from leaves(value) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_that_are_kept_stay_as_they_are(folder, prefetch):
    with trajstore.open(folder, cache_bytes=100_000) as store:
        options = {
            "columns": ["obs", "action", *PLACE],
            "window": 3,
            "order": "shuffle",
            "seed": 1,
            "block_bytes": 4000,
        }
        loader = store.trajectories.loader(7, prefetch=prefetch, **options)
        batches = list(loader)
        assert loader.stats().buffers_made > 2
        copies = [batch["obs"].clone() for batch in store.trajectories.loader(7, prefetch=prefetch, **options)]
        for batch, copy in zip(batches, copies, strict=True):
            check(batch)
            assert torch.equal(batch["obs"], copy)


# Readers that fail


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    "error",
    [
        StorageError(5, "the disk failed"),
        trajstore.StorageTimeoutError("no answer"),
        MemoryError("no more"),
        SystemExit("a library"),
        KeyboardInterrupt("a library"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_fails_behind_is_raised_by_next_and_tried_again(disk, prefetch, error):
    with disk.open() as store:
        view = store.trajectories
        expected = list(view.loader(10, order="sequential", columns=["obs"], cache_bytes=1 << 20))
        loader = view.loader(10, order="sequential", columns=["obs"], prefetch=prefetch)
        failures = iter([error, error])

        def fail_twice(run):
            if found := next(failures, None):
                raise found

        disk.before = fail_twice
        with pytest.raises(type(error)) as raised:
            next(loader)
        assert raised.value is error
        assert loader.stats().batches == 0
        failed = 1
        while True:
            try:
                found = [next(loader)]
                break
            except type(error):
                failed += 1
        assert failed <= 2
        found += loader
        assert len(found) == len(expected)
        assert all(torch.equal(a["obs"], b["obs"]) for a, b in zip(found, expected, strict=True))


def test_an_error_of_the_storage_has_its_cause(disk):
    with disk.open() as store:
        loader = store.trajectories.loader(4, columns=["obs"])

        def fail(run):
            with disk.errors(run.key):
                raise OSError(5, "Input/output error")

        disk.before = fail
        with pytest.raises(StorageError, match=r"segments/.*obs.*Input/output error") as raised:
            next(loader)
        assert type(raised.value.__cause__) is OSError


# Storages that hang


@pytest.mark.parametrize(
    ("like_a_bucket", "place"),
    also_slow([(False, "first"), (True, "first"), (False, "later")], [(True, "first")]),
)
def test_a_storage_that_hangs_is_a_timeout_and_keeps_nobody_from_closing(folder, like_a_bucket, place):
    disk = WatchedDisk(folder, like_a_bucket=like_a_bucket)
    gate = Gate()
    before = set(prefetch_threads())
    try:
        store = disk.open()
        loader = store.trajectories.loader(4, columns=["obs", *PLACE], timeout_s=0.3, cache_bytes=4000)
        if place == "later":
            next(loader)
        disk.before = gate
        with pytest.raises(trajstore.StorageTimeoutError, match=r"no batch within timeout_s=0\.3"):
            list(itertools.islice(loader, 1000))
        with pytest.raises(TimeoutError):
            next(loader)  # still waiting
        begun = time.monotonic()
        loader.close()
        store.close()
        assert time.monotonic() - begun < 8
        with pytest.raises(trajstore.ClosedError):
            next(loader)
    finally:
        gate.open()
    assert joined(set(prefetch_threads()) - before)


def test_a_storage_that_answers_late_after_all(disk):
    with disk.open() as store:
        loader = store.trajectories.loader(4, order="sequential", columns=["obs", *PLACE], timeout_s=0.05)
        disk.before = gate = Gate()
        try:
            with pytest.raises(trajstore.StorageTimeoutError):
                next(loader)
        finally:
            gate.open()
        found = []
        while len(found) < len(loader):
            try:
                found.append(next(loader))
            except trajstore.StorageTimeoutError:
                continue
        for batch in found:
            check(batch)
        assert torch.cat([batch["step"] for batch in found]).tolist() == [*range(40)] * 8


# Consumers that leave


def test_a_consumer_that_stops_early_and_forgets_its_loader(folder):
    with trajstore.open(folder) as store:
        before = set(prefetch_threads())
        for batch in store.trajectories.loader(4, columns=["obs", *PLACE]):
            check(batch)
            break
        gc.collect()
        assert joined(set(prefetch_threads()) - before)


def test_a_loader_that_failed_can_be_forgotten_too(disk):
    with disk.open() as store:
        before = set(prefetch_threads())
        loader = store.trajectories.loader(4, columns=["obs"])

        def fail(run):
            raise StorageError(5, "the disk failed")

        disk.before = fail
        with pytest.raises(StorageError):
            next(loader)
        forgotten = weakref.ref(loader)
        del loader
        gc.collect()
        assert forgotten() is None
        assert joined(set(prefetch_threads()) - before)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_closing_twice_and_what_comes_after(folder, prefetch):
    with trajstore.open(folder) as store:
        before = set(prefetch_threads())
        loader = store.trajectories.loader(4, columns=["obs", *PLACE], prefetch=prefetch)
        batch = next(loader)
        loader.close()
        loader.close()
        assert set(prefetch_threads()) <= before
        for use in (lambda: next(loader), lambda: iter(loader), lambda: loader.load_state_dict({})):
            with pytest.raises(trajstore.ClosedError, match="make another one"):
                use()
        check(batch)
        assert loader.stats().batches == 1
        assert loader.state_dict()["batches"] == 1


def test_closing_while_another_thread_waits_for_a_batch(disk):
    with disk.open() as store, ThreadPoolExecutor(1) as pool:
        loader = store.trajectories.loader(4, columns=["obs"])
        disk.before = gate = Gate()
        waiting = pool.submit(next, loader)
        assert gate.reached.wait(TIMEOUT_S)
        closing = threading.Thread(target=loader.close)
        closing.start()
        with pytest.raises(trajstore.ClosedError):
            waiting.result(TIMEOUT_S)
        gate.open()
        assert joined([closing])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_closing_the_store_closes_its_loaders(folder, prefetch):
    store = trajstore.open(folder)
    view = store.trajectories
    loader = view.loader(4, columns=["obs", *PLACE], prefetch=prefetch)
    batch = next(loader)
    kept = view.sample(3, columns=["obs", *PLACE])
    store.close()
    store.close()
    check(batch)
    check(kept)
    with pytest.raises(trajstore.ClosedError):
        next(loader)
    for use in (
        lambda: view.sample(3, columns=["obs", *PLACE]),
        lambda: view.loader(4),
        lambda: view.sample(2, seed=0),
    ):
        with pytest.raises(trajstore.ClosedError, match="open it again"):
            use()


def test_closing_the_store_while_loaders_run(folder):
    for _ in range(10):
        store = trajstore.open(folder, cache_bytes=20_000)
        loaders = [store.trajectories.loader(4, columns=["obs", *PLACE], seed=seed) for seed in range(3)]
        for batch in itertools.chain.from_iterable(
            zip(*(itertools.islice(loader, 3) for loader in loaders), strict=True)
        ):
            check(batch)
        store.close()
        for loader in loaders:
            with pytest.raises(trajstore.ClosedError):
                next(loader)


# Several threads and processes


@pytest.mark.parametrize("prefetch", [0, 2])
def test_threads_that_share_a_loader_get_each_batch_once(folder, prefetch):
    with trajstore.open(folder) as store, ThreadPoolExecutor(4) as pool:
        loader = store.trajectories.loader(2, order="shuffle", columns=["obs", *PLACE], epochs=5, prefetch=prefetch)

        def take_all():
            places = []
            while True:
                try:
                    batch = next(loader)
                except StopIteration:
                    return places
                check(batch)
                places += (1000 * batch["trajectory"] + batch["step"]).tolist()

        iter(loader)
        found = [place for done in [pool.submit(take_all) for _ in range(4)] for place in done.result(TIMEOUT_S)]
    everything = [1000 * trajectory + step for trajectory in range(8) for step in range(40)]
    assert sorted(found) == sorted(everything * 5)


FORKED = """
import os, sys, trajstore
store = trajstore.open({folder!r})
view = store.trajectories
loader = view.loader(4, columns=["obs"])
next(loader)
for _ in range(2):
    child = os.fork()
    if not child:
        for use in (lambda: next(loader), lambda: iter(loader), lambda: view.loader(4), lambda: view.sample(2)):
            try:
                use()
            except trajstore.ForkedError as error:
                assert "spawn" in str(error), error
            else:
                os._exit(3)
        loader.close()
        sys.exit(7)  # with everything that runs at exit
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    next(loader)
print("done")
"""


def python(code, **options):
    """A fresh interpreter that runs some code."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=os.getcwd(),
        **options,
    )


@pytest.mark.slow
def test_a_forked_child_is_told_to_spawn_and_ends(folder):
    child = python(FORKED.format(folder=folder))
    out, err = child.communicate(timeout=TIMEOUT_S)
    assert (out.strip(), child.returncode) == ("done", 0), err


HANGING = """
import trajstore
from tests.support.watched import Gate, WatchedDisk

disk = WatchedDisk({folder!r}, like_a_bucket={like_a_bucket})
store = disk.open()
loader = store.trajectories.loader(4, columns=["obs"], timeout_s=0.1)
disk.before = Gate()
try:
    next(loader)
except trajstore.StorageTimeoutError as error:
    print("timeout")
"""


@pytest.mark.parametrize("like_a_bucket", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.slow
def test_a_storage_that_hangs_does_not_keep_the_interpreter_from_exiting(folder, like_a_bucket):
    child = python(HANGING.format(folder=folder, like_a_bucket=like_a_bucket))
    out, err = child.communicate(timeout=TIMEOUT_S)
    assert (out.strip(), child.returncode) == ("timeout", 0), err


INTERRUPTED = """
import trajstore
from tests.support.watched import Gate, WatchedDisk

disk = WatchedDisk({folder!r})
store = disk.open(20_000)
loader = store.trajectories.loader(4, columns=["obs"], prefetch={prefetch})
next(loader)
print("ready", flush=True)
if {hangs}:
    disk.before = Gate()
while True:
    next(loader)
"""


@pytest.mark.parametrize(
    ("prefetch", "hangs"),
    [(2, True), *(pytest.param(*p, marks=pytest.mark.slow) for p in [(2, False), (0, False), (0, True)])],
)
def test_ctrl_c_ends_a_training_loop(folder, prefetch, hangs):
    with interruptible():
        child = python(INTERRUPTED.format(folder=folder, prefetch=prefetch, hangs=hangs))
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.2)  # anywhere in its loop
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert child.returncode == -signal.SIGINT, err
    assert err.strip().endswith("KeyboardInterrupt")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # interrupted within a finalizer
def test_a_loop_that_was_interrupted_goes_on(folder):
    """Ctrl-C at many moments, as in a notebook: no batch is torn, and the position is that of the batches."""
    with trajstore.open(folder, cache_bytes=20_000) as store:
        for prefetch in (0, 2):
            loader = store.trajectories.loader(
                4, order="sequential", columns=["obs", *PLACE], prefetch=prefetch, epochs=40
            )
            places = list(range(320)) * 40
            rng = np.random.default_rng(prefetch)
            before = signal.signal(signal.SIGALRM, interrupt)
            interrupted = 0
            try:
                while loader.stats().batches < len(loader):
                    try:
                        batch = interrupted_next(loader, rng.exponential(0.001))
                    except InterruptedLoopError:
                        interrupted += 1
                        continue
                    check(batch)
                    end = 4 * loader.stats().batches
                    assert (40 * batch["trajectory"] + batch["step"]).tolist() == places[end - 4 : end]
            finally:
                signal.signal(signal.SIGALRM, before)
            assert interrupted > 10


class InterruptedLoopError(KeyboardInterrupt):
    """As Ctrl-C."""


def interrupt(*_):
    raise InterruptedLoopError


def interrupted_next(loader, after_s):
    """``next(loader)``, interrupted once after so long if it is still at work."""
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        return next(loader)
    except RuntimeError as error:
        if isinstance(error.__context__, InterruptedLoopError):  # in an unlucky place of threading.Condition.wait
            raise InterruptedLoopError from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
