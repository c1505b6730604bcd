"""The page cache: its bound, what it evicts, what it counts, and threads that share it."""

from __future__ import annotations

import collections
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trajstore
from tests.support.rare import examples
from tests.support.watched import Gate, WatchedDisk
from trajstore import Column, StorageError
from trajstore.read.arena import Need
from trajstore.read.cache import DEFAULT_CACHE_BYTES, Demand, DoesNotFitError, PageCache
from trajstore.read.fetch import PageFetcher
from trajstore.read.segment import SegmentReaders
from trajstore.storage.workers import Workers

TIMEOUT_S = 60
PAGE_ROWS = 4
PAGE_BYTES = PAGE_ROWS * 32
SCHEMA = [
    Column(path="obs", dtype="int64", shape=(4,), page_rows=PAGE_ROWS),
    Column(path="image", dtype="int64", shape=(64,), page_rows=2),
    Column(path="state", dtype="int64", shape=(2,), page_rows=16, extra=1),
    Column(path="action", dtype="int64"),
]
PLACE = ["trajectory", "step"]


def write(folder, lengths, *, flush_each=False):
    """A store in which every row says where it is from: trajectory * 1000 + step."""
    with trajstore.open(folder, "x", schema=SCHEMA) as store:
        for number, length in enumerate(lengths):
            rows = 1000 * number + np.arange(length + 1)
            columns = {c.path: np.broadcast_to(wide(rows, c), (length + 1, *c.shape)) for c in SCHEMA}
            store.append({path: data if path == "state" else data[:-1] for path, data in columns.items()}, name="a")
            if flush_each:
                store.flush()
    return str(folder)


def wide(rows, column):
    return rows.reshape(-1, *[1] * len(column.shape))


def check(batch):
    """Every row of a batch is the one that it should be."""
    expected = 1000 * batch["trajectory"] + batch["step"]
    for name in batch.keys() & {"obs", "image", "state", "action"}:
        assert (batch[name].reshape(*expected.shape, -1) == expected[..., None]).all(), name


def check_bound(stats, nbytes):
    assert 0 <= stats.used_bytes <= stats.capacity_bytes <= nbytes


def until(condition):
    """Wait for what another thread is about to do."""
    pause = threading.Event()
    for _ in range(TIMEOUT_S * 1000):
        if condition():
            return
        pause.wait(0.001)
    raise TimeoutError


@pytest.fixture(params=[False, True], ids=["disk", "bucket"])
def disk(tmp_path, request):
    """80 pages of ``obs`` in one segment."""
    return WatchedDisk(write(tmp_path / "s", [40] * 8), like_a_bucket=request.param)


@pytest.fixture(scope="module")
def long_store(tmp_path_factory):
    """One store for all examples."""
    return write(tmp_path_factory.mktemp("bound") / "s", [3, 70, 1, 40, 200, 8, 16, 33, 64, 5], flush_each=True)


@given(
    nbytes=st.integers(5_000, 200_000),
    loaders=st.lists(
        st.tuples(
            st.lists(st.sampled_from([c.path for c in SCHEMA]), min_size=1, max_size=4, unique=True),
            st.integers(1, 40),
            st.sampled_from([None, 1, 3, 8]),
            st.sampled_from(["random", "shuffle", "sequential"]),
        ),
        min_size=1,
        max_size=3,
    ),
)
@settings(deadline=None, derandomize=True, max_examples=examples(15), suppress_health_check=list(HealthCheck))
def test_the_arenas_never_take_more_than_the_cache_s_bytes(long_store, nbytes, loaders):
    disk = WatchedDisk(long_store)
    with disk.open(nbytes) as store:
        running = []
        disk.before = lambda run: [check_bound(loader.stats().cache, nbytes) for loader in running]
        for names, batch_size, window, order in loaders:
            try:
                loader = store.trajectories.loader(
                    batch_size,
                    window=window,
                    order=order,
                    block_bytes=2000 if order == "shuffle" else None,
                    columns=[*names, *PLACE],
                    seed=len(running),
                )
            except trajstore.CacheTooSmallError:
                continue
            running.append(loader)
        for _ in range(3):
            for loader in running:
                for batch in itertools.islice(loader, 4):
                    check(batch)
                    check_bound(loader.stats().cache, nbytes)


def test_the_least_recently_used_page_goes_first(disk):
    with disk.open(10 * PAGE_BYTES) as store:
        # A text among the columns: batches are gathered one by one.
        loader = store.trajectories.loader(1, columns=["obs", "name", *PLACE], prefetch=0)
        room = loader.stats().cache.capacity_bytes // PAGE_BYTES
        assert 4 <= room <= 10
        model = collections.OrderedDict()
        reads = evictions = 0
        for batch in itertools.islice(loader, 400):
            check(batch)
            page = (40 * int(batch["trajectory"]) + int(batch["step"])) // PAGE_ROWS
            if page not in model:
                reads += 1
                if len(model) == room:
                    model.popitem(last=False)
                    evictions += 1
            model[page] = None
            model.move_to_end(page)
            assert sum(disk.runs.values()) == reads
        stats = loader.stats().cache
    assert (stats.misses, stats.hits, stats.pages_read, stats.evictions) == (reads, 400 - reads, reads, evictions)
    assert evictions > 100


def test_counters_in_a_simple_case(disk):
    with disk.open() as store:
        view = store.trajectories.first(2)  # 80 steps: 20 pages of obs, which are a part of the only shard
        loader = view.loader(40, order="sequential", columns=["obs"], prefetch=0)
        before = loader.stats()
        assert (before.cache.hits, before.cache.misses, before.cache.pages_read, before.cache.used_bytes) == (
            0,
            0,
            0,
            0,
        )
        assert len(list(loader)) == 2
        stored = sum(run.stop - run.start for run in disk.runs)
        once = loader.stats()
        assert once.batches == 2
        assert (once.cache.misses, once.cache.hits) == (80, 0)
        assert (once.cache.pages_read, once.cache.bytes_read, once.cache.evictions) == (20, stored, 0)
        assert once.cache.bytes_decoded == once.cache.used_bytes == 20 * PAGE_BYTES
        assert len(list(loader)) == 2
        twice = loader.stats().cache
        assert (twice.misses, twice.hits, twice.pages_read, twice.bytes_read) == (80, 80, 20, stored)


def test_short_columns_take_little(tmp_path):
    lengths = np.random.default_rng(3).integers(1, 100, 10).tolist()
    schema = [
        Column(path="image", dtype="uint8", shape=(32, 32, 3)),
        Column(path="action", dtype="float32", shape=(7,)),
    ]
    with trajstore.open(tmp_path / "s", "a", schema=schema) as store:
        nbytes = 0
        for length in lengths:
            image, action = np.zeros((length, 32, 32, 3), np.uint8), np.zeros((length, 7), np.float32)
            nbytes += image.nbytes + action.nbytes
            store.append({"image": image, "action": action})
            store.flush()
    with trajstore.open(tmp_path / "s") as store:
        loader = store.trajectories.loader(64, order="sequential")
        assert sum(len(batch["action"]) for batch in loader) == sum(lengths)
        stats = loader.stats().cache
    assert nbytes <= stats.used_bytes <= 2.2 * nbytes


def test_short_segments_of_a_small_column_stay_whole_beside_a_large_one(tmp_path):
    """Their only pages are as long as they are, and extents are powers of two: 4 x 1,100 rows take 4 x 2,048."""
    schema = [
        Column(path="image", dtype="uint8", shape=(4096,), page_rows=2),
        Column(path="reward", dtype="float32", shape=(1,)),
    ]
    with trajstore.open(tmp_path / "s", "x", schema=schema) as store:
        for number in range(4):
            store.append(
                {"image": np.full((1100, 4096), number, np.uint8), "reward": np.full((1100, 1), number, np.float32)}
            )
            store.flush()
    with trajstore.open(tmp_path / "s") as store, store.trajectories.loader(128, cache_bytes=4 << 20) as loader:
        for _ in range(10):
            batch = next(loader)
            assert torch.equal(batch["image"][:, :1].float(), batch["reward"])
        stats = loader.stats().cache
    assert stats.pages_read <= 4 + 10 * 128, "no batch was made in parts, each of which reads the small pages anew"


# Leases


class Bare:
    """A cache of the column ``obs`` of one segment, without a loader."""

    def __init__(self, disk, pages):
        self.store = disk.open()
        table = self.store.trajectories._table
        self.workers = Workers(2, name="test")
        readers = SegmentReaders(disk, self.workers)
        self.cache = PageCache(pages * PAGE_BYTES, readers, PageFetcher(self.workers))
        self.segments = self.cache.number_segments(table.segments)
        obs = table.schema["obs"]
        self.cache.reserve({"obs": Need((obs,), 1, 0)}, self.segments, table.schema)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.workers.close()
        self.store.close()

    def acquire(self, pages, **options):
        wanted = np.array([pages], np.int64)
        return self.cache.acquire([Demand(self.cache.group("obs"), self.segments[:1], wanted)], **options)

    def first_values(self, lease):
        """The first number of each page."""
        arena = self.cache.group("obs").arenas["obs"].numpy().view(np.int64)
        return arena[lease.starts[0].reshape(-1), 0].tolist()


def first_value(page):
    trajectory, step = divmod(page * PAGE_ROWS, 40)
    return 1000 * trajectory + step


def test_a_lease_keeps_its_pages_where_they_are(disk):
    with Bare(disk, pages=4) as bare:
        for page in (7, 0, 5, 6):
            bare.acquire([page]).release()
        with bare.acquire([0, 7]) as held, bare.acquire([10]) as second, bare.acquire([11]) as third:
            # Pages 7 and 0 were the least recently used until they were leased.
            assert bare.first_values(held) == [first_value(0), first_value(7)]
            assert bare.first_values(second) == [first_value(10)]
            assert bare.first_values(third) == [first_value(11)]
        assert bare.cache.stats().evictions == 2


def test_who_finds_no_room_waits_for_a_lease_to_end(disk):
    with Bare(disk, pages=4) as bare, ThreadPoolExecutor(1) as pool:
        events = []

        def three():
            with bare.acquire([10, 11, 12]) as lease:
                events.append("three")
                return bare.first_values(lease)

        with bare.acquire([0, 1]):
            asked = pool.submit(three)
            until(lambda: bare.cache._line)
            events.append("two")
        assert asked.result(TIMEOUT_S) == [first_value(page) for page in (10, 11, 12)]
        assert events == ["two", "three"]


def test_what_can_never_fit_is_said_at_once(disk):
    with Bare(disk, pages=4) as bare:
        with pytest.raises(DoesNotFitError):
            bare.acquire([0, 1, 2, 3, 4])
        assert bare.cache.stats().used_bytes == 0
        with bare.acquire([0, 1, 2, 3]) as lease:
            assert bare.first_values(lease) == [first_value(page) for page in range(4)]
        with bare.acquire([4, 5, 6, 7], alone=True) as lease:
            assert bare.first_values(lease) == [first_value(page) for page in range(4, 8)]


def test_threads_that_each_need_more_than_half_take_turns(disk):
    with Bare(disk, pages=4) as bare, ThreadPoolExecutor(3) as pool:

        def turns(seed, alone):
            rng = np.random.default_rng(seed)
            for _ in range(400):
                pages = rng.choice(80, 3, replace=False).tolist()
                with bare.acquire(pages, alone=alone) as lease:
                    assert bare.first_values(lease) == [first_value(page) for page in pages]
                check_bound(bare.cache.stats(), 4 * PAGE_BYTES)

        for done in [pool.submit(turns, seed, seed == 2) for seed in range(3)]:
            done.result(TIMEOUT_S)


@pytest.mark.parametrize("alone", [False, True])
def test_nobody_is_passed_over_for_ever(tmp_path, alone):
    """Two threads whose pages are always there, against one that needs the whole cache."""
    with Bare(WatchedDisk(write(tmp_path / "s", [40] * 8)), pages=4) as bare, ThreadPoolExecutor(3) as pool:
        stop = threading.Event()
        copied = [np.zeros(1_000_000, np.uint8) for _ in range(2)]
        turns = [0, 0]

        def greedy(number):
            out = np.empty_like(copied[number])
            while not stop.is_set():
                with bare.acquire([78 + number]):
                    np.copyto(out, copied[number])
                turns[number] += 1

        busy = [pool.submit(greedy, number) for number in range(2)]
        try:
            until(lambda: all(turns))
            before = sum(turns)
            for number in range(20):
                bare.acquire(list(range(4 * number, 4 * number + 4)), alone=alone).release()
            assert sum(turns) - before < 20 * 50
        finally:
            stop.set()
        for done in busy:
            done.result(TIMEOUT_S)


# Reads


def test_a_page_that_two_threads_miss_is_read_once(disk):
    with Bare(disk, pages=8) as bare, ThreadPoolExecutor(2) as pool:
        disk.before = gate = Gate()

        def values(pages):
            with bare.acquire(pages) as lease:
                return bare.first_values(lease)

        first = pool.submit(values, [3, 4])
        assert gate.reached.wait(TIMEOUT_S)
        second = pool.submit(values, [4, 3, 5])
        until(lambda: bare.cache.stats().misses == 5)
        gate.open()
        assert first.result(TIMEOUT_S) == [first_value(3), first_value(4)]
        assert second.result(TIMEOUT_S) == [first_value(4), first_value(3), first_value(5)]
    assert sorted(disk.runs.values()) == [1, 1, 1]


def test_a_page_whose_reader_failed_is_read_by_who_waits_for_it(disk):
    with Bare(disk, pages=8) as bare, ThreadPoolExecutor(2) as pool:
        gate = Gate()
        failures = iter([OSError(5, "the disk failed")])

        def fail_once(run):
            gate(run)
            if error := next(failures, None):
                raise error

        disk.before = fail_once

        def value(page):
            with bare.acquire([page]) as lease:
                return bare.first_values(lease)

        first = pool.submit(value, 3)
        assert gate.reached.wait(TIMEOUT_S)
        second = pool.submit(value, 3)
        until(lambda: bare.cache.stats().misses == 2)
        gate.open()
        with pytest.raises(OSError, match="the disk failed"):
            first.result(TIMEOUT_S)
        assert second.result(TIMEOUT_S) == [first_value(3)]
        assert bare.cache.stats().used_bytes == PAGE_BYTES


@pytest.mark.parametrize("error", [StorageError(5, "the disk failed"), MemoryError("no more"), SystemExit("a library")])
def test_a_failed_read_gives_its_room_back_and_is_tried_again(disk, error):
    with Bare(disk, pages=4) as bare:

        def fail_at_the_third(run):
            if sum(disk.runs.values()) == 3:
                raise error

        disk.before = fail_at_the_third
        with pytest.raises(type(error)):
            bare.acquire([0, 1, 2, 3])
        stats = bare.cache.stats()
        assert (stats.used_bytes, stats.pages_read, stats.bytes_decoded) == (0, 0, 0)
        with bare.acquire([0, 1, 2, 3]) as lease:
            assert bare.first_values(lease) == [first_value(page) for page in range(4)]
        assert bare.cache.stats().pages_read == 4


def test_an_interrupted_wait_leaves_no_read_that_writes_later(tmp_path):
    """Ctrl-C reaches the thread that waits, not those that read: what they read late must go nowhere."""
    disk = WatchedDisk(write(tmp_path / "s", [40] * 8))
    with Bare(disk, pages=4) as bare:
        disk.before = gate = Gate()
        interrupted = InterruptedWorkers(gate.reached)
        bare.cache._fetcher._workers = interrupted
        with pytest.raises(KeyboardInterrupt):
            bare.acquire([0, 1, 2, 3])
        assert bare.cache.stats().used_bytes == 0
        bare.cache._fetcher._workers = bare.workers
        disk.before = lambda run: None
        with bare.acquire([10, 11, 12, 13]) as lease:
            gate.open()
            interrupted.join()
            assert bare.first_values(lease) == [first_value(page) for page in (10, 11, 12, 13)]


class InterruptedWorkers:
    """Workers whose caller is interrupted while they read."""

    threads = 2

    def __init__(self, reached):
        self._workers = Workers(self.threads, name="interrupted")
        self._reached = reached
        self._futures = []

    def map(self, function, items):
        self._futures = [self._workers.submit(function, item) for item in items]
        assert self._reached.wait(TIMEOUT_S)
        raise KeyboardInterrupt

    def join(self):
        for future in self._futures:
            future.exception(TIMEOUT_S)
        self._workers.close()


# Groups that come later


def test_a_loader_of_other_columns_has_the_cache_divided_anew_beside_a_running_one(disk):
    nbytes = 60_000
    with disk.open(nbytes) as store, ThreadPoolExecutor(4) as pool:
        view = store.trajectories
        stop = threading.Event()

        def run(seed, names):
            made = 0
            for _ in range(5 if seed else 1):
                with view.loader(16, window=3, columns=[*names, *PLACE], seed=seed) as loader:
                    for batch in loader:
                        check(batch)
                        check_bound(loader.stats().cache, nbytes)
                        made += 1
                        if seed and made % 10 == 0:
                            break
                        if stop.is_set():
                            return made
            return made

        first = pool.submit(run, 0, ["obs"])
        others = [pool.submit(run, seed, [name]) for seed, name in enumerate(["image", "state", "action"], 1)]
        try:
            for other in others:
                assert other.result(TIMEOUT_S) == 50
        finally:
            stop.set()
        assert first.result(TIMEOUT_S) >= 1


def test_what_was_resident_before_the_division_is_read_again(disk):
    with disk.open() as store:
        view = store.trajectories
        loader = view.loader(8, order="sequential", columns=["obs", "name", *PLACE], epochs=3, prefetch=0)
        for batch in itertools.islice(loader, 40):
            check(batch)
        assert loader.stats().cache.pages_read == 80
        other = view.loader(8, order="sequential", columns=["image", *PLACE], prefetch=0)
        check_bound(other.stats().cache, DEFAULT_CACHE_BYTES)
        for batch in itertools.islice(loader, 40):
            check(batch)
        assert loader.stats().cache.pages_read == 160


def test_a_loader_that_fits_in_what_is_there_divides_nothing(disk):
    with disk.open() as store:
        view = store.trajectories
        first = view.loader(8, order="sequential", columns=["obs", "image", *PLACE], prefetch=0)
        assert len(list(first)) == 40
        read = first.stats().cache.pages_read
        second = view.loader(32, window=3, order="shuffle", columns=["image", *PLACE], prefetch=0)
        for batch in second:
            check(batch)
        assert second.stats().cache.pages_read == read
