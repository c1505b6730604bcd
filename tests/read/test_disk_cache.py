"""Pages kept on disk: against a dict, between processes, killed, full, damaged, and with hostile names."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trajstore import errors
from trajstore.read.disk_cache import DiskCache, PageName

BLOCK = 4096


def name(number, nbytes, segment="5f" * 16, object="obs/image/c.0.0.0.0"):
    return PageName(segment, object, number, nbytes)


def content(number, nbytes):
    return random.Random(number).randbytes(nbytes)


def put(cache, number, nbytes=BLOCK):
    cache.put_many([name(number, nbytes)], [content(number, nbytes)])


def has(cache, number, nbytes=BLOCK):
    """Whether a page is kept; what is must be whole."""
    (data,) = cache.get_many([name(number, nbytes)])
    assert data is None or data == content(number, nbytes)
    return data is not None


def page_files(folder):
    """Pages and temporary files."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("ledger", "CACHEDIR.TAG"))


def bytes_on_disk(folder):
    """Whole blocks of all pages and temporary files, as a slow walk finds them."""
    total = 0
    for path in page_files(folder):
        try:
            total += (path.stat().st_size + BLOCK - 1) // BLOCK * BLOCK
        except FileNotFoundError:
            continue
    return total


class Clock:
    def __init__(self):
        self.now = 1_700_000_000.0

    def __call__(self):
        return self.now


class Model:
    """What a cache of ``max_bytes`` must hold: page -> (bytes, last use)."""

    def __init__(self, max_bytes):
        self.max_bytes = max_bytes
        self.pages = {}
        self.evictions = 0

    @staticmethod
    def taken(nbytes):
        return (nbytes + BLOCK - 1) // BLOCK * BLOCK

    def kept(self):
        return sum(self.taken(len(data)) for data, _ in self.pages.values())

    def get(self, page, now):
        if page not in self.pages:
            return None
        data, used = self.pages[page]
        if now - used >= 60:
            self.pages[page] = data, now
        return data

    def put(self, page, data, now):
        if page in self.pages or self.taken(len(data)) > 0.9 * self.max_bytes:
            return
        if self.kept() + self.taken(len(data)) > self.max_bytes:
            while self.kept() + self.taken(len(data)) > int(0.9 * self.max_bytes):
                del self.pages[min(self.pages, key=lambda p: self.pages[p][1])]
                self.evictions += 1
        self.pages[page] = data, now


@pytest.mark.parametrize("seed", range(4))
def test_two_handles_keep_what_a_dict_keeps(tmp_path, seed):
    rng = random.Random(seed)
    clock = Clock()
    max_bytes = rng.choice([60_000, 200_000, 500_000])
    handles = [DiskCache(tmp_path, max_bytes=max_bytes, clock=clock) for _ in range(2)]
    model = Model(max_bytes)
    hits = misses = 0
    for _ in range(700):
        clock.now += rng.choice([1, 7, 61, 300])  # later than any earlier use, so that there are no ties
        cache = rng.choice(handles)
        number = min(int(rng.expovariate(0.03)), 200)
        nbytes = 1 + number * 977 % 20_000
        page = name(number, nbytes)
        match rng.randrange(10):
            case 0 | 1 | 2 | 3:
                cache.put_many([page], [content(number, nbytes)])
                model.put(page, content(number, nbytes), clock.now)
            case 4:
                cache.discard(page)
                model.pages.pop(page, None)
            case _:
                expected = model.get(page, clock.now)
                assert cache.get_many([page]) == [expected]
                hits, misses = hits + (expected is not None), misses + (expected is None)
        if rng.random() < 0.02:
            handles[rng.randrange(2)].stats()
            assert bytes_on_disk(tmp_path) == model.kept()
    both = [cache.stats() for cache in handles]
    assert [s.kept_bytes for s in both] == [model.kept()] * 2
    assert (sum(s.hits for s in both), sum(s.misses for s in both)) == (hits, misses)
    assert sum(s.evictions for s in both) == model.evictions > 0
    assert [s.off for s in both] == [None, None]
    every = [name(n, 1 + n * 977 % 20_000) for n in range(201)]
    assert handles[0].get_many(every) == [model.pages[p][0] if p in model.pages else None for p in every]


def test_many_at_once_and_again_by_a_later_process(tmp_path):
    rng = random.Random(0)
    names = [name(n, rng.randrange(300_000)) for n in range(100)]
    datas = [content(n.page, n.nbytes) for n in names]
    first = DiskCache(tmp_path, max_bytes=1 << 30)
    first.put_many(names, [memoryview(bytearray(data)) for data in datas])
    later = DiskCache(tmp_path, max_bytes=1 << 30)
    assert later.get_many(names) == datas
    assert later.get_many([tuple(n) for n in reversed(names)]) == datas[::-1]
    stats = later.stats()
    assert (stats.hits, stats.misses, stats.stored, stats.evictions) == (200, 0, 0, 0)
    assert stats.kept_bytes == bytes_on_disk(tmp_path)
    later.put_many(names, datas)  # they are here
    assert later.stats().stored == 0
    assert later.stats().kept_bytes == stats.kept_bytes
    assert later.get_many([]) == []
    later.put_many([], [])


def test_the_bound_is_held_after_every_put(tmp_path):
    rng = random.Random(0)
    cache = DiskCache(tmp_path, max_bytes=300_000)
    for start in range(0, 600, 15):
        names = [name(n, rng.randrange(1, 30_000)) for n in range(start, start + 15)]
        cache.put_many(names, [content(n.page, n.nbytes) for n in names])
        assert 200_000 < bytes_on_disk(tmp_path) <= 300_000 or start < 60
        assert cache.get_many(names[-1:]) == [content(names[-1].page, names[-1].nbytes)]  # the newest stay
    assert cache.stats().kept_bytes == bytes_on_disk(tmp_path)
    smaller = DiskCache(tmp_path, max_bytes=100_000)
    assert bytes_on_disk(tmp_path) <= 100_000
    put(smaller, 9999, 100_000)  # more than nine tenths
    assert not has(smaller, 9999, 100_000)
    assert smaller.stats().off is None


def test_a_use_is_noted_once_a_minute(tmp_path):
    clock = Clock()
    cache = DiskCache(tmp_path, max_bytes=1 << 20, clock=clock)
    put(cache, 0)
    (path,) = page_files(tmp_path)
    stored_at = path.stat().st_mtime
    assert stored_at == clock.now
    clock.now += 59
    assert has(cache, 0)
    assert path.stat().st_mtime == stored_at
    clock.now += 2
    assert has(cache, 0)
    assert path.stat().st_mtime == clock.now


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * (BLOCK + 1)])
def test_a_file_of_the_wrong_length_is_a_miss_and_is_replaced(tmp_path, damage):
    cache = DiskCache(tmp_path, max_bytes=1 << 20)
    put(cache, 0)
    (path,) = page_files(tmp_path)
    path.write_bytes(damage)
    assert not has(cache, 0)
    put(cache, 0)
    assert has(cache, 0)


def test_a_page_that_fails_its_checksum_is_discarded(tmp_path):
    cache = DiskCache(tmp_path, max_bytes=1 << 20)
    put(cache, 0)
    (path,) = page_files(tmp_path)
    path.write_bytes(bytes(BLOCK))
    assert cache.get_many([name(0, BLOCK)]) == [bytes(BLOCK)]  # the caller knows better
    cache.discard(name(0, BLOCK))
    cache.discard(name(0, BLOCK))
    assert not has(cache, 0)
    assert (cache.stats().discarded, cache.stats().kept_bytes) == (2, 0)
    put(cache, 0)
    assert has(cache, 0)


def test_a_length_that_is_not_the_name_s(tmp_path):
    cache = DiskCache(tmp_path, max_bytes=1 << 20)
    with pytest.raises(ValueError, match=r"page \('a', 'b', 3, 10\) has 2 bytes, expected 10"):
        cache.put_many([PageName("a", "b", 3, 10)], [b"ab"])
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        cache.put_many([PageName("a", "b", 3, 10)], [])


HOSTILE = [
    "../../../escaped",
    "/etc/escaped",
    "..",
    ".",
    "",
    "a/../../../../escaped",
    "nul\0byte",
    "new\nline",
    "\ud800",
    "Ä" * 5000,
    "x" * 100_000,
    "~/escaped",
    ".tmp-escaped",
    "C:\\escaped",
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_is_a_name_like_any_other(tmp_path, hostile):
    folder = tmp_path / "deep" / "er" / "cache"
    cache = DiskCache(folder, max_bytes=1 << 20)
    names = [name(0, 3, object=hostile), name(0, 3, segment=hostile), PageName(hostile, hostile, 0, 3)]
    cache.put_many(names, [b"abc", b"def", b"ghi"])
    assert cache.get_many(names) == [b"abc", b"def", b"ghi"]
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if "escaped" in p.name] == []
    assert len(page_files(folder)) == 3
    assert len(page_files(tmp_path)) == 3
    cache.discard(names[0])
    assert cache.get_many(names) == [None, b"def", b"ghi"]


def test_a_page_number_is_a_number(tmp_path):
    cache = DiskCache(tmp_path / "cache", max_bytes=1 << 20)
    for number in ("/../../../escaped", "1", 1.0, None):
        with pytest.raises(TypeError):
            cache.put_many([PageName("s", "o", number, 1)], [b"x"])
    cache.put_many([PageName("s", "o", -1, 1), PageName("s", "o", 10**30, 1)], [b"x", b"y"])
    assert cache.get_many([PageName("s", "o", -1, 1), PageName("s", "o", 10**30, 1)]) == [b"x", b"y"]


def test_names_whose_parts_only_join_to_the_same_are_different(tmp_path):
    cache = DiskCache(tmp_path, max_bytes=1 << 20)
    names = [
        PageName("a", "b/c", 1, 1),
        PageName("a/b", "c", 1, 1),
        PageName("a', 'b", "c", 1, 1),
        PageName("a", "b/c-1", 1, 1),
    ]
    cache.put_many(names, [b"0", b"1", b"2", b"3"])
    assert cache.get_many(names) == [b"0", b"1", b"2", b"3"]


def test_files_of_others_in_the_folder_stay(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "data-1").write_bytes(bytes(50_000))
    cache = DiskCache(tmp_path, max_bytes=100_000)
    for number in range(100):
        put(cache, number)
    assert cache.stats().evictions > 0
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "ab" / "data-1").stat().st_size == 50_000
    assert (tmp_path / "trajstore-pages-1" / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f")


def test_a_folder_that_is_cleared_meanwhile(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path / "cache", max_bytes=100_000)
    put(cache, 0)
    shutil.rmtree(tmp_path / "cache")
    assert not has(cache, 0)
    assert cache.stats().kept_bytes == 0
    put(cache, 0)
    assert has(cache, 0)
    assert cache.stats().kept_bytes == BLOCK
    for number in range(100):
        put(cache, number)
    assert has(cache, 99)
    assert bytes_on_disk(tmp_path) <= 100_000
    # Pages that go away between being listed and looked at, and between being looked at and removed.
    removed = DiskCache._remove
    monkeypatch.setattr(DiskCache, "_remove", lambda self, path: os.unlink(path) or removed(self, path))
    for number in range(200, 230):
        put(cache, number)
    assert has(cache, 229)
    # And a shard that goes away while a page is written there.
    with monkeypatch.context() as patch:
        replace = os.replace
        patch.setattr(os, "replace", lambda source, target: os.unlink(source) or replace(source, target))
        put(cache, 300)
    assert not has(cache, 300)
    assert cache.stats().off is None
    put(cache, 300)
    assert has(cache, 300)


@pytest.mark.parametrize("damage", [None, b"", b"junk", bytes(16), b"\xff" * 800, b"\x7f" * 800])
def test_a_ledger_that_is_damaged_is_made_anew(tmp_path, damage):
    cache = DiskCache(tmp_path, max_bytes=100_000)
    for number in range(20):
        put(cache, number)
    ledger = tmp_path / "trajstore-pages-1" / "ledger"
    ledger.unlink() if damage is None else ledger.write_bytes(damage)
    for number in range(20, 60):
        put(cache, number)
        assert has(cache, number)
        assert bytes_on_disk(tmp_path) <= 100_000
    assert cache.stats().kept_bytes == bytes_on_disk(tmp_path)


def test_what_killed_processes_left_is_found_within_the_hour(tmp_path):
    clock = Clock()
    cache = DiskCache(tmp_path, max_bytes=1 << 20, clock=clock)
    put(cache, 0)
    (path,) = page_files(tmp_path)
    fresh, stale = path.with_name(".tmp-fresh"), path.with_name(".tmp-stale")
    for temporary in (fresh, stale):
        temporary.write_bytes(bytes(BLOCK))
    path.with_name("f" * 32 + "-1").write_bytes(bytes(BLOCK))  # was not entered into the ledger
    clock.now += 3601
    os.utime(fresh, (clock.now - 10, clock.now - 10))
    os.utime(stale, (clock.now - 700, clock.now - 700))
    assert cache.stats().kept_bytes == BLOCK
    put(cache, 1)
    assert cache.stats().kept_bytes == 4 * BLOCK == bytes_on_disk(tmp_path)
    assert fresh.exists()
    assert not stale.exists()


def test_counting_evicts_nothing_below_the_bound(tmp_path):
    clock = Clock()
    cache = DiskCache(tmp_path, max_bytes=100 * BLOCK, clock=clock)
    for number in range(97):
        put(cache, number)
    clock.now += 3601
    put(cache, 97)
    assert cache.stats().evictions == 0
    assert len(page_files(tmp_path)) == 98


def test_room_is_made_for_what_others_are_writing(tmp_path):
    first, second = (DiskCache(tmp_path, max_bytes=100 * BLOCK) for _ in range(2))
    for number in range(95):
        put(first, number)
    assert second._reserve(5 * BLOCK)  # and is slow to write it
    put(first, 95)
    assert len(page_files(tmp_path)) == 90


def test_what_others_store_during_a_count_is_counted(tmp_path, monkeypatch):
    clock = Clock()
    first, second = (DiskCache(tmp_path, max_bytes=100 * BLOCK, clock=clock) for _ in range(2))
    put(first, 0)
    clock.now += 3601
    count = DiskCache._count

    def counting(self):
        found = count(self)
        put(second, 2)
        return found

    monkeypatch.setattr(DiskCache, "_count", counting)
    put(first, 1)
    assert first.stats().kept_bytes == 3 * BLOCK == bytes_on_disk(tmp_path)


def test_nobody_waits_for_a_process_that_makes_room(tmp_path):
    cache = DiskCache(tmp_path, max_bytes=100_000)
    for number in range(24):
        put(cache, number)
    descriptor = os.open(tmp_path / "trajstore-pages-1", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        put(cache, 100)
        assert not has(cache, 100)
        assert bytes_on_disk(tmp_path) == 24 * BLOCK == cache.stats().kept_bytes
        DiskCache(tmp_path, max_bytes=100_000)
        assert has(cache, 3)
    finally:
        os.close(descriptor)
    put(cache, 100)
    assert has(cache, 100)
    assert cache.stats().evictions > 0


def test_several_threads(tmp_path):
    cache = DiskCache(tmp_path, max_bytes=500_000)
    failures = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(60):
                names = [name(n, 5000 + n) for n in (rng.randrange(150) for _ in range(8))]
                for page, data in zip(names, cache.get_many(names), strict=True):
                    assert data is None or data == content(page.page, page.nbytes)
                cache.put_many(names, [content(n.page, n.nbytes) for n in names])
                if rng.random() < 0.1:
                    cache.discard(names[0])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    stats = cache.stats()
    assert stats.hits + stats.misses == 4 * 60 * 8
    assert stats.hits > 0
    assert stats.evictions > 0
    # Two threads that store the same page both reserve room for it: the ledger errs on the side of the bound.
    assert bytes_on_disk(tmp_path) <= stats.kept_bytes <= 500_000


def _hammer(folder, seed, max_bytes, connection):
    """Put, get and discard random pages; sends (hits, evictions, off)."""
    rng = random.Random(seed)
    cache = DiskCache(folder, max_bytes=max_bytes)
    connection.send("ready")
    connection.recv()
    for _ in range(80):
        names = [name(n, 3000 + 50 * n) for n in (min(int(rng.expovariate(0.01)), 400) for _ in range(6))]
        found = cache.get_many(names)
        for page, data in zip(names, found, strict=True):
            assert data is None or data == content(page.page, page.nbytes), page
        absent = [page for page, data in zip(names, found, strict=True) if data is None]
        cache.put_many(absent, [content(n.page, n.nbytes) for n in absent])
        if rng.random() < 0.05:
            cache.discard(names[0])
    stats = cache.stats()
    connection.send((stats.hits, stats.evictions, stats.off))


def test_two_processes_share_a_folder(tmp_path):
    max_bytes = 1_000_000
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    for seed in range(2):
        ours, theirs = context.Pipe()
        process = context.Process(target=_hammer, args=(tmp_path, seed, max_bytes, theirs))
        process.start()
        theirs.close()
        processes.append(process)
        connections.append(ours)
    try:
        for connection in connections:
            assert connection.recv() == "ready"
        for connection in connections:
            connection.send("go")
        most = 0
        while not all(connection.poll(0.01) for connection in connections):
            most = max(most, bytes_on_disk(tmp_path))
        results = [connection.recv() for connection in connections]
    finally:
        for process in processes:
            process.join(60)
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert all(hits > 0 and off is None for hits, _, off in results)
    assert sum(evictions for _, evictions, _ in results) > 0
    # What one writes while the other counts: a lot each, of at most one page here.
    in_flight = 2 * 24_576
    assert max_bytes / 2 < most <= max_bytes + in_flight
    assert bytes_on_disk(tmp_path) <= max_bytes + in_flight
    cache = DiskCache(tmp_path, max_bytes=max_bytes)
    for number in range(1000, 1400):
        put(cache, number)
    assert bytes_on_disk(tmp_path) <= max_bytes


# Dies in the given system call, after as many of them as it is told. Each child is a fork of one process that imports once.
_KILLED = """
import itertools, json, os, signal, sys
import trajstore.read.disk_cache as module
from tests.read.test_disk_cache import put

def die(folder, call, left):
    real = getattr(os, call)
    def dying(*args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            if call == "write":
                real(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(os, call, dying)
    cache = module.DiskCache(folder, max_bytes=100_000)
    for number in itertools.count():
        put(cache, number % 200)

for folder, call, left in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        die(folder, call, left)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""
# Among them: in the middle of a page, of a line of the ledger, between writing and renaming, and while evicting.
_DEATHS = [("write", n) for n in range(10, 14)] + [
    ("utime", 12),
    ("replace", 12),
    ("unlink", 0),
    ("unlink", 1),
    ("replace", 27),
    ("replace", 1),
]


def check_after_a_kill(folder):
    clock = Clock()
    clock.now = os.stat(folder).st_mtime + 7200
    cache = DiskCache(folder, max_bytes=100_000, clock=clock)
    assert not [p for p in page_files(folder) if p.name.startswith(".tmp-")]
    assert sum(has(cache, number) for number in range(200)) == len(page_files(folder))
    for number in range(300, 340):
        put(cache, number)
        assert has(cache, number)
        assert bytes_on_disk(folder) <= 100_000
    assert cache.stats().kept_bytes == bytes_on_disk(folder)


def test_a_writer_killed_at_work_leaves_a_cache_that_works(tmp_path):
    cases = [(str(tmp_path / f"{call}-{after}"), call, after) for call, after in _DEATHS]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", _KILLED, json.dumps(cases)], timeout=120, check=True, env=environment)
    left = 0
    for folder, _, _ in cases:
        files = page_files(Path(folder))
        left += sum(p.name.startswith(".tmp-") for p in files)
        assert files
        check_after_a_kill(Path(folder))
    assert left >= 4  # so they did die at work


def _put_for_ever(folder):
    cache = DiskCache(folder, max_bytes=100_000)
    for number in itertools.count():
        put(cache, number % 200)


@pytest.mark.slow
def test_a_writer_killed_at_any_time(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_put_for_ever, args=(tmp_path,))
    process.start()
    try:
        while len(page_files(tmp_path)) < 10:
            assert process.is_alive()
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    check_after_a_kill(tmp_path)


@pytest.mark.parametrize("call", ["open", "write", "replace", "utime"])
@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO], ids=errno.errorcode.get
)
def test_a_disk_that_fails_while_writing(tmp_path, monkeypatch, caplog, call, code):
    cache = DiskCache(tmp_path, max_bytes=1 << 20)
    put(cache, 0)
    real = getattr(os, call)

    def failing(target, *args, **kwargs):
        if call != "open" or ".tmp-" in str(target):
            raise OSError(code, os.strerror(code))
        return real(target, *args, **kwargs)

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        for number in range(1, 5):
            put(cache, number)
    (record,) = caplog.records
    assert os.strerror(code) in record.getMessage()
    assert str(tmp_path) in record.getMessage()
    assert os.strerror(code) in cache.stats().off
    assert len(page_files(tmp_path)) == 1  # no temporary file is left
    assert has(cache, 0)
    put(cache, 5)
    assert not has(cache, 5)  # it stays off
    assert caplog.records == [record]
    again = DiskCache(tmp_path, max_bytes=1 << 20)
    put(again, 5)
    assert has(again, 5)
    assert again.stats().off is None


def test_a_disk_that_fails_while_reading(tmp_path, monkeypatch, caplog):
    cache = DiskCache(tmp_path, max_bytes=1 << 20)
    put(cache, 0)

    def failing(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(os, "read", failing)
        assert cache.get_many([name(0, BLOCK)] * 3) == [None] * 3
    (record,) = caplog.records
    assert "Input/output error" in record.getMessage()
    assert has(cache, 0)


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_a_bound_that_is_none(tmp_path, max_bytes):
    with pytest.raises(ValueError, match=f"max_bytes={max_bytes}, expected a positive number"):
        DiskCache(tmp_path / "cache", max_bytes=max_bytes)
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            errors.StorageError, match=rf"^{folder} cannot keep pages: .*; pass a folder on a local disk"
        ):
            DiskCache(folder, max_bytes=1 << 20)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC], ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, code):
    def failing(path, *args, **kwargs):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(os, "open", failing)
    kind = errors.StorageError if code == errno.ENOSPC else errors.StoragePermissionError
    with pytest.raises(kind, match=rf"^{tmp_path} cannot keep pages: {os.strerror(code)}; pass a folder") as caught:
        DiskCache(tmp_path, max_bytes=1 << 20)
    assert caught.value.errno == code


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(errors.StoragePermissionError, match=str(tmp_path)):
            DiskCache(tmp_path, max_bytes=1 << 20)
    finally:
        tmp_path.chmod(0o755)


_REAL_DISK = """
import json, logging, subprocess, sys
from trajstore import errors
from trajstore.read.disk_cache import DiskCache
from tests.read.test_disk_cache import put, has
folder, = sys.argv[1:]
warnings = []
handler = logging.Handler()
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("trajstore").addHandler(handler)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
cache = DiskCache(folder, max_bytes=1 << 20)
for number in range(200):
    put(cache, number)
full = [has(cache, number) for number in range(200)]
stats = cache.stats()
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
cache.discard((1, 2, 3, 4))
read_only = [has(cache, number) for number in range(200)]
try:
    DiskCache(folder, max_bytes=1 << 20)
except errors.StoragePermissionError as error:
    refused = str(error)
print(json.dumps([full, read_only, stats.off, stats.stored, warnings, refused]))
"""


def test_a_real_disk_that_is_full_and_then_read_only(tmp_path):
    alone = ["unshare", "--map-root-user", "--mount"]
    try:
        subprocess.run([*alone, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody mount a small disk")
    command = [*alone, sys.executable, "-c", _REAL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    full, read_only, off, stored, warnings, refused = json.loads(result.stdout)
    assert 30 < sum(full) == stored < 64
    assert full == [True] * stored + [False] * (200 - stored)
    assert read_only == full
    assert off.startswith("No space left on device")
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0]
    assert "Read-only file system; pass a folder on a local disk" in refused
