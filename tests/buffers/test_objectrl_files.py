"""What ObjectRL's buffer saves and loads."""

import os
import pickle
import re
import shutil
from contextlib import nullcontext

import pytest
import torch

import trajstore
from tests.buffers.transitions import assert_are, assert_holds, filled, transition
from trajstore.buffers import objectrl
from trajstore.buffers.objectrl import ReplayBuffer
from trajstore.buffers.ring_store import RingStore
from trajstore.buffers.stored_ring import StoredRing
from trajstore.errors import (
    CorruptionError,
    EmptyBufferError,
    MissingObjectError,
    SchemaConflictError,
    SelectionError,
)
from trajstore.storage import single_file


@pytest.fixture(params=["memory", "disk"])
def buffer(request, tmp_path):
    """An empty buffer of 10."""
    with ReplayBuffer("cpu", "cpu" if request.param == "memory" else f"disk:{tmp_path}/experience", 10) as made:
        yield made


def test_a_file_of_objectrls_own(tmp_path):
    torch.save({"buffer_size": 20, "data_size": 7, "pointer": 7}, tmp_path / "theirs.metadata")
    buffer = ReplayBuffer("cpu", "cpu", 10)
    buffer.load(tmp_path / "theirs")
    assert (buffer.buffer_size, buffer.data_size, buffer.pointer) == (20, 7, 7)
    assert len(buffer) == buffer.size == 0
    with pytest.raises(EmptyBufferError):
        buffer.sample_batch(2)
    buffer.add(transition(0))
    assert (buffer.data_size, buffer.pointer, len(buffer)) == (1, 1, 1)
    torch.save({"buffer_size": 20, "data_size": 9, "pointer": 9}, tmp_path / "theirs.metadata")
    buffer.load(tmp_path / "theirs")  # what is there stays, and the numbers that go with it
    assert_are(buffer.sample_all(), [0])
    assert (buffer.data_size, buffer.pointer) == (1, 1)
    other = ReplayBuffer("cpu", "cpu", 10)
    model = filled(other, 3)
    with pytest.raises(SelectionError, match=re.escape("reset(20)")):
        other.load(tmp_path / "theirs")
    assert_holds(other, model)


def test_our_file_is_one_that_objectrl_reads(buffer, tmp_path):
    filled(buffer, 14)
    buffer.save(tmp_path / "ours")
    numbers = torch.load(tmp_path / "ours.metadata", weights_only=True)
    assert {key: numbers[key] for key in ("buffer_size", "data_size", "pointer")} == {
        "buffer_size": 10,
        "data_size": 10,
        "pointer": 4,
    }


def test_files_that_cannot_be_loaded(buffer, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    model = filled(buffer, 4)
    with pytest.raises(MissingObjectError, match="nothing"):
        buffer.load(tmp_path / "nothing")
    buffer.save(tmp_path / "saved")
    with pytest.raises(MissingObjectError, match=r"without .metadata.*saved'"):
        buffer.load(tmp_path / "saved.metadata")
    (tmp_path / "evil.metadata").write_bytes(pickle.dumps({"buffer_size": Evil()}, protocol=2))
    torch.save({"buffer_size": Evil(), "data_size": 1, "pointer": 1}, tmp_path / "worse.metadata")
    (tmp_path / "empty.metadata").write_bytes(b"")
    torch.save({"buffer_size": 10, "data_size": 1}, tmp_path / "short.metadata")
    torch.save([1, 2], tmp_path / "list.metadata")
    buffer.save(tmp_path / "half")
    whole = (tmp_path / "half.metadata").read_bytes()
    (tmp_path / "half.metadata").write_bytes(whole[: len(whole) // 2])
    for name in ("evil", "worse", "empty", "short", "list", "half"):
        with pytest.raises(CorruptionError, match=name):
            buffer.load(tmp_path / name)
    assert not (tmp_path / "executed").exists()
    buffer.save(tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone.store")
    with pytest.raises(FileNotFoundError):
        buffer.load(tmp_path / "alone")
    assert_holds(buffer, model)


@pytest.mark.parametrize("where", ["rows", "file", "deletion"])
def test_a_save_that_fails_leaves_a_whole_state(buffer, tmp_path, monkeypatch, where):
    model = filled(buffer, 7)
    buffer.save(tmp_path / "checkpoint")
    buffer.add(transition(7))

    def fail(*_, **__):
        raise KeyboardInterrupt

    if where == "rows":
        monkeypatch.setattr(RingStore, "write", fail)
    elif where == "file":
        monkeypatch.setattr(objectrl, "replace_file", fail)
    else:
        monkeypatch.setattr(RingStore, "prune", fail)
        model.add(7)
    with pytest.raises(KeyboardInterrupt):
        buffer.save(tmp_path / "checkpoint")
    monkeypatch.undo()
    loaded = ReplayBuffer("cpu", "cpu", 1)
    loaded.load(tmp_path / "checkpoint")
    assert_holds(loaded, model)
    buffer.save(tmp_path / "checkpoint")
    with trajstore.open(tmp_path / "checkpoint.store") as store:
        assert len(store.trajectories) == 1


def test_the_file_is_replaced_whole(tmp_path, monkeypatch):
    path = str(tmp_path / "numbers")
    single_file.replace_file(path, b"old")

    def fail(*_):
        raise OSError(28, "no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        single_file.replace_file(path, b"new")
    monkeypatch.undo()
    assert single_file.read_file(path) == b"old"
    single_file.replace_file(path, b"new")
    assert single_file.read_file(path) == b"new"


def test_save_and_load_under_a_url(buffer):
    model = filled(buffer, 14)
    buffer.save("memory://objectrl/checkpoint")
    loaded = ReplayBuffer("cpu", "cpu", 3)
    loaded.load("memory://objectrl/checkpoint")
    assert_holds(loaded, model)


def test_other_fields_over_an_earlier_save(buffer, tmp_path):
    model = filled(buffer, 4)
    buffer.save(tmp_path / "saved")
    other = ReplayBuffer("cpu", "cpu", 10)
    other.add({"reward": torch.tensor(1.0)})
    both = r"saved\.store holds .*'state' float32.*; these have 'reward' float32.* another place"
    with pytest.raises(SchemaConflictError, match=both):
        other.save(tmp_path / "saved")
    other.save(tmp_path / "other")
    with (
        pytest.raises(SchemaConflictError, match="'reward'") if isinstance(buffer._ring, StoredRing) else nullcontext()
    ):
        buffer.load(tmp_path / "other")
    buffer.reset()
    buffer.load(tmp_path / "saved")
    assert_holds(buffer, model)
    shutil.rmtree(tmp_path / "saved.store")
    other.save(tmp_path / "saved")
    buffer.reset()
    buffer.load(tmp_path / "saved")
    assert buffer.sample_all()["reward"].tolist() == [1.0]


def test_storage_options_are_for_urls(tmp_path):
    buffer = ReplayBuffer("cpu", "cpu", 10, storage_options={"anon": True})
    model = filled(buffer, 4)
    for place in (tmp_path / "by_path", f"file://{tmp_path}/by_url"):
        buffer.save(place)
        loaded = ReplayBuffer("cpu", "cpu", 10, storage_options={"anon": True})
        loaded.load(place)
        assert_holds(loaded, model)


def test_a_damaged_save_leaves_a_buffer_on_disk_as_it_was(tmp_path):
    with ReplayBuffer("cpu", "cpu", 40) as memory:
        filled(memory, 30)
        memory.save(tmp_path / "saved")
    for path in (tmp_path / "saved.store" / "segments").rglob("*"):
        if path.name.startswith("c.") or path.name == "steps.arrow":
            data = bytearray(path.read_bytes())
            data[len(data) // 3] ^= 1
            path.write_bytes(data)
    with ReplayBuffer("cpu", "cpu", 40, url=tmp_path / "live") as buffer:
        model = filled(buffer, 25)
        buffer.flush()
        with pytest.raises(CorruptionError):
            buffer.load(tmp_path / "saved")
        assert_holds(buffer, model)
    with ReplayBuffer("cpu", "cpu", 40, url=tmp_path / "live") as buffer:
        assert_holds(buffer, model)


def test_numbers_without_experience_outlive_a_save(tmp_path):
    torch.save({"buffer_size": 100, "data_size": 70, "pointer": 70}, tmp_path / "theirs.metadata")
    buffer = ReplayBuffer("cpu", "cpu", 10)
    buffer.load(tmp_path / "theirs")
    buffer.save(tmp_path / "ours")
    again = ReplayBuffer("cpu", "cpu", 10)
    again.load(tmp_path / "ours")
    assert (again.buffer_size, again.data_size, again.pointer) == (100, 70, 70)
