"""The ring in a store: what is there when it is made again, whoever else wrote, and whatever was cut short."""

import contextlib
import gc
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trajstore
from tests.buffers.transitions import assert_are, filled, transition, transitions
from tests.support.rare import examples
from tests.support.threads import wait_for_others
from trajstore.buffers import stored_ring
from trajstore.buffers.objectrl import ReplayBuffer
from trajstore.buffers.ring_store import RingStore
from trajstore.buffers.stored_ring import StoredRing
from trajstore.buffers.stored_rows import StoredRows
from trajstore.errors import (
    ClosedError,
    CommitError,
    SchemaConflictError,
    SelectionError,
    StorageError,
    UnknownColumnError,
)
from trajstore.schema import Column
from trajstore.storage.local import LocalFilesystem


@pytest.fixture
def short(monkeypatch):
    """Three rows to a trajectory."""
    monkeypatch.setattr(stored_ring, "chunk_rows", lambda schema: 3)


def numbered(numbers):
    return {"n": torch.tensor(list(numbers))}


def by_age(ring):
    """The numbers that a ring holds, the oldest first, and where the index 0 is among them."""
    if not len(ring):
        return []
    held = ring.gather(torch.arange(len(ring)))["n"].tolist()
    return held if len(ring) < ring.capacity else held[ring.pointer :] + held[: ring.pointer]


def test_a_stored_buffer_goes_on(tmp_path):
    url = tmp_path / "experience"
    with ReplayBuffer("cpu", "cpu", 10, url=url) as buffer:
        filled(buffer, 23)
    with ReplayBuffer("cpu", "cpu", 10, url=url) as buffer:
        assert (buffer.size, buffer.pointer) == (10, 3)
        assert_are(buffer.sample_all(), [20, 21, 22, *range(13, 20)])
        buffer.add(transition(23))
        assert_are(buffer.sample_by_index(range(4)), [20, 21, 22, 23])
    with ReplayBuffer("cpu", "cpu", 6, url=url) as buffer:  # the newest, from index 0
        assert_are(buffer.sample_all(), range(18, 24))
    with ReplayBuffer("cpu", "cpu", 30, url=url) as buffer:
        held = (buffer.sample_all()["step"] - 1000).tolist()
        assert held == list(range(24))[-len(held) :]
        assert len(held) >= 6
        with pytest.raises(SelectionError, match="lives at"):
            StoredRing.write_to(buffer._ring, RingStore(url))
    with pytest.raises(ClosedError):
        buffer.sample_all()


def test_overwritten_experience_is_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(stored_ring, "chunk_rows", lambda schema: 8)
    with ReplayBuffer("cpu", "cpu", 64, url=tmp_path / "experience") as buffer:
        for start in range(0, 1000, 20):
            buffer.add_batch(transitions(range(start, start + 20)))
            with trajstore.open(tmp_path / "experience") as store:
                assert store.trajectories.num_steps <= 64 + 64 // 4 + 2 * 8
        assert sorted((buffer.sample_all()["step"] - 1000).tolist()) == list(range(936, 1000))


def test_pending_rows(tmp_path):
    with StoredRing(tmp_path / "ring", 100) as ring:
        ring.add({"a": torch.arange(5)})
        assert ring.pending == 5
        ring.flush()
        assert ring.pending == 0
        with trajstore.open(tmp_path / "ring") as store:
            assert store.trajectories.num_steps == 5


def test_a_store_of_something_else_is_refused(tmp_path):
    with trajstore.open(tmp_path / "else", "x") as store:
        store.append({"action": [1, 2]})
    with pytest.raises(SelectionError, match="no ring's"):
        ReplayBuffer("cpu", "cpu", 10, url=tmp_path / "else")
    buffer = ReplayBuffer("cpu", "cpu", 10)
    filled(buffer, 3)
    buffer.save(tmp_path / "saved")
    with pytest.raises(SelectionError, match="load"):
        ReplayBuffer("cpu", "cpu", 10, url=tmp_path / "saved.store")
    with ReplayBuffer("cpu", "cpu", 10, url=tmp_path / "other") as other:
        other.add({"reward": torch.tensor(1.0)})
        with pytest.raises(SchemaConflictError, match="'reward'"):
            other.load(tmp_path / "saved")
        assert len(other) == 1


def test_a_closed_ring(tmp_path):
    ring = StoredRing(tmp_path / "ring", 10)
    ring.add(numbered(range(4)))
    ring.close()
    ring.close()
    for attempt in (
        lambda: ring.add_one({"n": torch.tensor(4)}),
        lambda: ring.add(numbered(range(2))),
        lambda: ring.gather(torch.tensor([0])),
        lambda: ring.sample_indices(1),
        ring.clear,
        ring.flush,
        lambda: ring.write_to(None),
        lambda: ring.read_from(None),
    ):
        with pytest.raises(ClosedError, match="ring is closed"):
            attempt()
    with StoredRing(tmp_path / "ring", 10) as ring:
        assert by_age(ring) == [0, 1, 2, 3]


@pytest.mark.parametrize("lengths", [[], [1], [4, 1, 3], [2, 2, 2, 5]])
@pytest.mark.parametrize("stop", [11, 0])
def test_rows_are_numbered_backwards_from_the_last(lengths, stop):
    rows = StoredRows(range(len(lengths)), lengths, stop)
    places = [(trajectory, step) for trajectory, length in enumerate(lengths) for step in range(length)]
    numbers = range(stop - len(places), stop)  # negative ones are as good as others
    assert (len(rows), rows.newest(len(lengths)), rows.next) == (len(lengths), len(places), stop)
    if places:
        assert list(zip(*(found.tolist() for found in rows.locate(np.array(numbers))), strict=True)) == places
    for number, (trajectory, _) in zip(numbers, places, strict=True):
        assert rows.whole_before(number) == (trajectory, sum(lengths[:trajectory]))
    for n in range(len(lengths) + 1):
        assert rows.newest(n) == sum(lengths[len(lengths) - n :])


def test_three_rings_on_one_store(tmp_path, short):
    url = tmp_path / "ring"
    rings = [StoredRing(url, 100) for _ in range(3)]
    for number in range(30):
        with contextlib.suppress(CommitError):
            rings[number % 3].add_one({"n": torch.tensor(number)})
    for ring in rings:
        with contextlib.suppress(CommitError):
            ring.close()
    with StoredRing(url, 100) as ring:
        held = by_age(ring)
        assert sorted(held) == list(range(30))
        assert [[n for n in held if n % 3 == k] for k in range(3)] == [list(range(k, 30, 3)) for k in range(3)]
        ring.add(numbered(range(30, 35)))
    with StoredRing(url, 33) as ring:
        assert by_age(ring) == [*held, *range(30, 35)][-33:]
        assert ring.pointer == 0  # the oldest is at index 0


def test_a_ring_that_finds_another_deletes_nothing(tmp_path, short):
    url = tmp_path / "ring"
    a, b = StoredRing(url, 12), StoredRing(url, 12)
    a.add(numbered(range(12)))
    a.flush()
    b.add(numbered(range(12, 15)))
    with pytest.raises(CommitError, match="of 5 trajectories there 4 are not of this one, and 0 that it knows of"):
        b.flush()
    for start in range(15, 60, 3):  # many times its capacity
        with pytest.raises(CommitError, match="another buffer"):
            b.add(numbered(range(start, start + 3)))
    with pytest.raises(CommitError, match="another buffer"):
        b.clear()
    with pytest.raises(CommitError, match="another buffer"):
        b.close()
    with trajstore.open(url) as store:
        assert store.trajectories.read("n").tolist() == list(range(60))
    with pytest.raises(CommitError, match="another buffer"):
        a.flush()
    with pytest.raises(CommitError, match="another buffer"):
        a.gather(torch.tensor([0]))
    with pytest.raises(CommitError, match="another buffer"):
        a.close()
    with StoredRing(url, 12) as ring:
        assert by_age(ring) == list(range(48, 60))
        ring.add(numbered(range(60, 66)))  # alone again: what is overwritten goes
        with trajstore.open(url) as store:
            assert store.trajectories.num_steps <= 12 + 6 + 3
    with StoredRing(url, 12) as ring:
        assert by_age(ring) == list(range(54, 66))


def test_a_ring_whose_rows_another_deleted_says_so(tmp_path, short):
    url = tmp_path / "ring"
    with StoredRing(url, 12) as ring:
        ring.add(numbered(range(12)))
    a, b = StoredRing(url, 12), StoredRing(url, 12)
    a.add(numbered(range(12, 60)), keep_last=True)  # alone, as far as it can see: b has written nothing
    a.flush()
    with pytest.raises(CommitError, match="another buffer"):
        b.gather(torch.arange(12))
    with pytest.raises(CommitError, match="another buffer"):
        b.add(numbered(range(60, 64)))  # taken all the same
    for ring in (b, a):
        with pytest.raises(CommitError, match="another buffer"):
            ring.close()
    with StoredRing(url, 12) as ring:
        assert by_age(ring) == list(range(52, 64))


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "add", "one", "flush", "close"]), st.integers(0, 2), st.integers(1, 9)),
    min_size=4,
    max_size=20,
)
FEW = settings(max_examples=examples(10), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@FEW
@given(operations=OPERATIONS)
def test_whatever_several_rings_wrote_is_there(short, operations):
    """All that was added, if the rings were closed; all that was flushed, if all of them were killed at once."""
    with tempfile.TemporaryDirectory() as folder:
        url, rings = Path(folder, "ring"), {}
        added, flushed = [[], [], []], [0, 0, 0]
        for what, k, n in operations:
            ring = rings.get(k) or rings.setdefault(k, StoredRing(url, 1000))
            with contextlib.suppress(CommitError):
                if what in ("add", "one"):
                    n = n if what == "add" else 1
                    first = sum(map(len, added))
                    added[k] += range(first, first + n)
                    if what == "add":
                        ring.add(numbered(range(first, first + n)))
                    else:
                        ring.add_one({"n": torch.tensor(first)})
                else:
                    flushed[k] = len(added[k])
                    if what == "close":
                        rings.pop(k)
                    ring.flush() if what == "flush" else ring.close()
        killed = Path(folder, "killed")
        if url.exists():
            shutil.copytree(url, killed)
            with StoredRing(killed, 1000) as ring:
                held = set(by_age(ring))
            for rows, durable in zip(added, flushed, strict=True):
                found = [n for n in rows if n in held]
                assert found == rows[: len(found)]
                assert len(found) >= durable
        for ring in rings.values():
            with contextlib.suppress(CommitError):
                ring.close()
        with StoredRing(url, 1000) as ring:
            held = by_age(ring)
            for rows in added:  # each ring's in their order
                assert [n for n in held if n in set(rows)] == rows
            assert len(held) == ring.size == ring.pointer == sum(map(len, added))


@FEW
@given(
    capacity=st.integers(1, 14),
    writes=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=4, max_size=20),
)
def test_the_newest_rows_of_several_full_rings_are_there(short, capacity, writes):
    with tempfile.TemporaryDirectory() as folder:
        url = Path(folder, "ring")
        rings = [StoredRing(url, capacity) for _ in range(3)]
        total = 0
        for k, n in writes:
            with contextlib.suppress(CommitError):
                rings[k].add(numbered(range(total, total + n)), keep_last=True)
            with contextlib.suppress(CommitError):
                rings[k].flush()
            total += n
        for ring in rings:
            with contextlib.suppress(CommitError):
                ring.close()
        for _ in range(2):
            with StoredRing(url, capacity) as ring:
                assert by_age(ring) == list(range(total))[-capacity:]
                ring.add_one({"n": torch.tensor(total)})
                total += 1


def test_rows_whose_commit_failed_take_no_others_with_them(tmp_path, short, monkeypatch):
    url = tmp_path / "ring"
    ring = StoredRing(url, 100)
    ring.add(numbered(range(6)))
    ring.flush()
    ring.add(numbered(range(6, 9)))

    def fail(*_, **__):
        raise StorageError("no space left on device")

    with monkeypatch.context() as failing:
        failing.setattr(LocalFilesystem, "store", fail)
        with pytest.raises(StorageError, match="no space"):
            ring.flush()
    ring.add(numbered(range(9, 12)))
    with pytest.raises(CommitError, match="could not be committed"):
        ring.flush()
    with pytest.raises(CommitError, match="could not be committed"):
        ring.close()
    with StoredRing(url, 100) as ring:
        assert by_age(ring) == [0, 1, 2, 3, 4, 5, 9, 10, 11]
        assert ring.pointer == 9


def left_alone(url):
    """A ring of rows that are in memory only, and that nobody holds any more, but for itself."""
    ring = StoredRing(url, 100)
    ring.itself = ring
    ring.add(numbered(range(7)))


def test_a_ring_that_nobody_closes(tmp_path):
    ring = StoredRing(tmp_path / "ring", 100)
    ring.add(numbered(range(7)))
    del ring
    with StoredRing(tmp_path / "ring", 100) as ring:
        assert by_age(ring) == list(range(7))


def test_a_ring_that_is_collected_in_another_thread(tmp_path):
    before = set(threading.enumerate())
    gc.disable()
    try:
        left_alone(tmp_path / "ring")
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()
    finally:
        gc.enable()
    wait_for_others(before)
    with StoredRing(tmp_path / "ring", 100) as ring:
        assert by_age(ring) == list(range(7))


@pytest.mark.slow
def test_a_ring_that_is_open_when_the_interpreter_ends(tmp_path):
    code = """
import gc, os, sys, torch
from trajstore.buffers.objectrl import ReplayBuffer
buffer = ReplayBuffer("cpu", f"disk:{sys.argv[1]}", 1000)
buffer.add_batch({"n": torch.arange(10)})
child = os.fork()
if not child:
    del buffer  # a copy of the rows, which are the parent's to write
    gc.collect()
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "ring"], capture_output=True, text=True, check=True)
    assert not done.stderr
    with StoredRing(tmp_path / "ring", 1000) as ring:
        assert by_age(ring) == list(range(10))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bfloat16, torch.complex64])
def test_rows_of_any_dtype_in_the_store_and_in_memory(tmp_path, short, dtype):
    rows = {"number": torch.arange(4).to(dtype), "vector": torch.arange(8).view(4, 2).to(dtype)}
    order = [3, 0, 2, 3]  # three rows are in the store, the last one is in memory
    with StoredRing(tmp_path / "ring", 100) as ring:
        ring.add(rows)
        found = ring.gather(torch.tensor(order))
    for name, expected in rows.items():
        assert found[name].dtype is dtype
        assert torch.equal(found[name].view(torch.uint8), torch.stack([expected[k] for k in order]).view(torch.uint8))


@pytest.mark.parametrize("reopened", [False, True])
def test_other_columns_after_clear(tmp_path, short, reopened):
    url = tmp_path / "ring"
    with StoredRing(url, 12) as ring:
        ring.add(numbered(range(8)))
        ring.clear()
        assert not len(ring.schema)
        ring.add(numbered(range(8, 12)))
        assert by_age(ring) == [8, 9, 10, 11]
        ring.clear()
        if not reopened:
            ring.add({"x": torch.ones(7, 3), "n": torch.arange(7)})
    with StoredRing(url, 12) as ring:
        if reopened:
            ring.add({"x": torch.ones(7, 3), "n": torch.arange(7)})
        assert by_age(ring) == list(range(7))
        assert ring.gather(torch.tensor([6]))["x"].tolist() == [[1.0, 1.0, 1.0]]


def test_columns_that_were_declared_stay(tmp_path):
    column = Column(path="a", dtype="int64", shape=(2,), page_rows=64)
    rows = {"a": torch.arange(6).view(3, 2)}
    with trajstore.open(tmp_path / "ring", "x", schema=[column]) as store:
        store.append(rows)
        store.flush()
        store.delete(store.trajectories.ids)
    with StoredRing(tmp_path / "ring", 12) as ring:
        with pytest.raises(UnknownColumnError, match="'x' is not one of"):
            ring.add({"x": torch.ones(3)})
        ring.add(rows)
        ring.clear()
        ring.add(rows)
    with trajstore.open(tmp_path / "ring") as store:
        assert store.schema["a"] == column


def test_rows_of_another_ring_are_not_cleared_with_the_columns(tmp_path, short):
    url = tmp_path / "ring"
    a = StoredRing(url, 12)
    a.add(numbered(range(6)))
    a.clear()
    b = StoredRing(url, 12)
    b.add(numbered(range(6, 9)))
    b.flush()
    with pytest.raises(CommitError, match="another buffer"):
        a.add({"x": torch.ones(3)})
    with pytest.raises(CommitError, match="another buffer"):
        a.close()
    b.close()
    with StoredRing(url, 12) as ring:
        assert by_age(ring) == [6, 7, 8]
