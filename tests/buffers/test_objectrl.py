"""ObjectRL's buffer, in memory and in a store, held against a list."""

import os
import pickle
import re
import shutil
import sys
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tensordict import NonTensorData, TensorDict

import trajstore
from tests.buffers.test_ring import ListRing
from trajstore.buffers import objectrl, stored_ring
from trajstore.buffers.objectrl import ReplayBuffer
from trajstore.buffers.ring_store import RingStore
from trajstore.buffers.stored_ring import StoredRing
from trajstore.errors import (
    ClosedError,
    ColumnShapeError,
    ColumnTypeError,
    CorruptionError,
    EmptyBufferError,
    IndexRangeError,
    LengthError,
    MissingColumnError,
    MissingObjectError,
    SchemaConflictError,
    SelectionError,
    UnknownColumnError,
)
from trajstore.storage import single_file

FIELDS = ("state", "next_state", "action", "reward", "terminated", "step", ("info", "note"))


def transition(number):
    return TensorDict(
        {
            "state": torch.tensor([number, number + 0.5]),
            "next_state": torch.tensor([number + 1, number + 1.5]),  # also the store's name for a state one step on
            "action": torch.tensor([number % 7]),
            "reward": torch.tensor(float(-number)),
            "terminated": torch.tensor(number % 3 == 0),
            "step": torch.tensor(number + 1000),  # also one of the store's virtual columns
            "info": {"note": torch.tensor(number % 100, dtype=torch.bfloat16)},
        }
    )


def transitions(numbers):
    return torch.stack([transition(number) for number in numbers])


def assert_are(batch, numbers):
    wanted = transitions(numbers)
    assert isinstance(batch, TensorDict)
    assert batch.batch_size == torch.Size([len(numbers)])
    assert batch.device == torch.device("cpu")
    assert set(batch.keys(True, True)) == set(FIELDS)
    for field in FIELDS:
        assert batch[field].dtype is wanted[field].dtype
        assert torch.equal(batch[field], wanted[field])


def assert_holds(buffer, model):
    held = model.held()
    assert len(buffer) == buffer.size == buffer.data_size == len(held)
    assert (buffer.buffer_size, buffer.pointer) == (len(model.rows), model.pointer)
    if held:
        assert_are(buffer.sample_all(), held)
    else:
        with pytest.raises(EmptyBufferError):
            buffer.sample_all()


def bad_transitions(good):
    yield good.clone().set("more", good["reward"]), UnknownColumnError
    yield good.exclude("reward"), MissingColumnError
    yield good.clone().set("reward", good["reward"].double()), ColumnTypeError
    yield {**dict(good.items()), "action": torch.zeros(*good.batch_size, 2, dtype=torch.int64)}, ColumnShapeError
    yield {**dict(good.items()), "action": good["action"].to("meta")}, ColumnTypeError
    yield {**dict(good.items()), "action": "left"}, ColumnTypeError
    yield good.clone().set("action", NonTensorData("left", batch_size=good.batch_size)), ColumnTypeError
    yield good["reward"], ColumnTypeError
    yield {}, LengthError


class BufferMachine(RuleBasedStateMachine):
    """One buffer through everything that can happen to it."""

    stored = False

    def __init__(self):
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.rows_per_trajectory = stored_ring.chunk_rows
        stored_ring.chunk_rows = lambda schema: 3
        self.count = 0
        self.saved = None

    @initialize(capacity=st.integers(1, 12))
    def start(self, capacity):
        self.model = ListRing(capacity)
        self.open()

    def open(self):
        url = os.path.join(self.folder, "experience") if self.stored else None
        self.buffer = ReplayBuffer("cpu", "cpu", len(self.model.rows), url=url)

    def numbers(self, n):
        self.count += n
        return range(self.count - n, self.count)

    @rule()
    def add(self):
        (number,) = self.numbers(1)
        self.buffer.add(transition(number))
        self.model.add(number)

    @rule(n=st.integers(1, 20))
    def add_batch(self, n):
        numbers = self.numbers(n)
        self.buffer.add_batch(transitions(numbers))
        for number in numbers:
            self.model.add(number)

    @rule(which=st.integers(0, 8))
    def refuse(self, which):
        if self.model.held():
            rows, error = list(bad_transitions(transitions(range(2))))[which]
            with pytest.raises(error):
                self.buffer.add_batch(rows)
            row, error = list(bad_transitions(transition(2)))[which]
            with pytest.raises(error):
                self.buffer.add(row)

    @rule(data=st.data())
    def by_index(self, data):
        held = self.model.held()
        if held:
            indices = data.draw(st.lists(st.integers(0, len(held) - 1), max_size=10))
            wanted = [held[i] for i in indices]
            if wanted:
                assert_are(self.buffer.sample_by_index(indices), wanted)
            found = self.buffer.sample_by_index_fields(torch.tensor(indices), ["step", "info"])
            assert set(found.keys(True, True)) == {"step", ("info", "note")}
            assert found["step"].tolist() == [n + 1000 for n in wanted]
            with pytest.raises(IndexRangeError):
                self.buffer.sample_by_index([len(held)])

    @rule(n=st.integers(1, 9))
    def random(self, n):
        if self.model.held():
            numbers = (self.buffer.sample_batch(n)["step"] - 1000).tolist()
            assert set(numbers) <= set(self.model.held())
            assert len(numbers) == n

    @rule(batch_size=st.integers(1, 5), n_epochs=st.integers(1, 2))
    def epochs(self, batch_size, n_epochs):
        held = self.model.held()
        if held:
            steps = self.buffer.get_steps_and_iterator(n_epochs, 0, batch_size)
            found = [(self.buffer.get_next_batch(batch_size)["step"] - 1000).tolist() for _ in range(steps)]
            assert found == [held[i : i + batch_size] for i in range(0, len(held), batch_size)] * n_epochs
            with pytest.raises(StopIteration):
                self.buffer.get_next_batch(batch_size)

    @rule(capacity=st.none() | st.integers(1, 12))
    def reset(self, capacity):
        self.buffer.reset(capacity)
        self.model = ListRing(capacity or len(self.model.rows))

    @rule()
    def save(self):
        self.buffer.save(os.path.join(self.folder, "checkpoint"))
        self.saved = ListRing(len(self.model.rows))
        self.saved.rows, self.saved.pointer = list(self.model.rows), self.model.pointer

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self):
        self.buffer.load(os.path.join(self.folder, "checkpoint"))
        self.model.rows, self.model.pointer = list(self.saved.rows), self.saved.pointer

    @invariant()
    def holds_the_same(self):
        if hasattr(self, "buffer"):
            assert_holds(self.buffer, self.model)

    def teardown(self):
        stored_ring.chunk_rows = self.rows_per_trajectory
        if hasattr(self, "buffer"):
            self.buffer.close()
        shutil.rmtree(self.folder)


class StoredBufferMachine(BufferMachine):
    stored = True

    @rule()
    def flush(self):
        self.buffer.flush()

    @rule()
    def open_again(self):
        self.buffer.close()
        self.open()

    @rule()
    def crash(self):
        """What was flushed survives: the same folder as another process finds it."""
        self.buffer.flush()
        shutil.copytree(os.path.join(self.folder, "experience"), os.path.join(self.folder, "crashed"))
        self.buffer.close()
        shutil.rmtree(os.path.join(self.folder, "experience"))
        os.rename(os.path.join(self.folder, "crashed"), os.path.join(self.folder, "experience"))
        self.open()


TestBufferInMemory = BufferMachine.TestCase
TestBufferInMemory.settings = settings(
    max_examples=20, stateful_step_count=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestBufferInAStore = StoredBufferMachine.TestCase
TestBufferInAStore.settings = settings(
    max_examples=15, stateful_step_count=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(params=["memory", "url", "disk"])
def buffer(request, tmp_path):
    """An empty buffer of 10."""
    if request.param == "memory":
        made = ReplayBuffer(device=torch.device("cpu"), storing_device=torch.device("cpu"), buffer_size=10)
    elif request.param == "url":
        made = ReplayBuffer("cpu", "cpu", 10, url=tmp_path / "experience")
    else:
        made = ReplayBuffer("cpu", f"disk:{tmp_path}/experience", 10, print_gc_warning=True)
    with made:
        yield made


def filled(buffer, n):
    buffer.add_batch(transitions(range(n)))
    model = ListRing(buffer.buffer_size)
    for number in range(n):
        model.add(number)
    return model


def test_the_page(tmp_path):
    """The blocks of ObjectRL's page, with the import changed."""
    buffer = ReplayBuffer(
        device=torch.device("cpu"),  # Training device
        storing_device=torch.device("cpu"),  # Storage device
        buffer_size=100_000,  # Maximum number of transitions
    )
    single_experience = TensorDict({"obs": torch.zeros(3), "action": torch.tensor(1)})
    batch_experience = TensorDict({"obs": torch.ones(700, 3), "action": torch.arange(700)}, batch_size=[700])
    buffer.add(single_experience)  # Single transition
    buffer.add_batch(batch_experience)  # Batch of transitions
    batch = buffer.sample_batch(64)
    assert batch.batch_size == torch.Size([64])
    batch = buffer.sample_by_index([0, 5, 9])
    assert batch["action"].tolist() == [1, 4, 8]
    obs_act = buffer.sample_by_index_fields([0, 5], fields=["obs", "action"])
    assert set(obs_act.keys()) == {"obs", "action"}
    all_data = buffer.sample_all()
    assert len(all_data) == 701
    iterator = buffer.create_epoch_iterator(batch_size=64, n_epochs=5)
    assert sum(len(batch) for batch in iterator) == 5 * 701
    n_steps = buffer.get_steps_and_iterator(n_epochs=10, max_iter=0, batch_size=64)
    assert n_steps == 10 * 11
    n_steps = buffer.get_steps_and_iterator(
        n_epochs=0,  # Disables epoch-based iterator
        max_iter=1,  # Number of learning updates at each step
        batch_size=64,
    )
    assert n_steps == 1
    assert len(buffer.get_next_batch(64)) == 64
    buffer.save(str(tmp_path / "checkpoints/buffer"))  # Saves to checkpoints/buffer.metadata
    buffer.load(str(tmp_path / "checkpoints/buffer"))
    assert os.path.exists(tmp_path / "checkpoints/buffer.metadata")
    assert len(buffer) == buffer.size == 701


def test_attributes(buffer):
    assert buffer.device == torch.device("cpu")
    assert buffer.storing_device == torch.device("cpu") or buffer.storing_device.startswith("disk:")
    assert (buffer.buffer_size, buffer.data_size, buffer.pointer, len(buffer)) == (10, 0, 0, 0)
    filled(buffer, 14)
    assert (buffer.buffer_size, buffer.data_size, buffer.pointer, len(buffer)) == (10, 10, 4, 10)
    assert "size=10" in repr(buffer)


def test_nothing_to_sample(buffer):
    for again in range(2):
        for attempt in (
            lambda: buffer.sample_batch(4),
            lambda: buffer.sample_random(4),
            lambda: buffer.sample_by_index([0]),
            lambda: buffer.sample_by_index_fields([0], ["reward"]),
            buffer.sample_all,
            lambda: buffer.create_epoch_iterator(4),
            lambda: buffer.get_next_batch(4),  # of the original: AttributeError
            lambda: buffer.get_steps_and_iterator(1, 0, 4),
        ):
            with pytest.raises(EmptyBufferError):
                attempt()
        assert buffer.calculate_num_batches(4) == 0
        if not again:
            filled(buffer, 3)
            buffer.reset()


def test_batches_are_random_before_there_is_an_iterator(buffer):
    filled(buffer, 10)
    torch.manual_seed(5)
    first = buffer.get_next_batch(200)
    torch.manual_seed(5)
    assert torch.equal(first["step"], buffer.sample_batch(200)["step"])
    assert len(first["step"].unique()) == 10
    assert buffer.get_steps_and_iterator(1, 0, 4) == 3
    assert [len(buffer.get_next_batch(4)) for _ in range(3)] == [4, 4, 2]
    assert buffer.get_steps_and_iterator(0, 17, 4) == 17
    assert len(buffer.get_next_batch(6)) == 6


def test_indices_of_every_kind(buffer):
    filled(buffer, 10)
    for indices in ([3, 1, 9], torch.tensor([3, 1, 9]), torch.tensor([3, 1, 9], dtype=torch.uint8), (3, 1, 9)):
        assert_are(buffer.sample_by_index(indices), [3, 1, 9])
    assert_are(buffer.sample_by_index(range(8, 2, -2)), [8, 6, 4])
    assert len(buffer.sample_by_index([])) == len(buffer.sample_by_index(range(0))) == 0
    for outside in ([10], [-1], range(5, 12), torch.tensor([3, 10])):
        with pytest.raises(IndexRangeError):
            buffer.sample_by_index(outside)
    for wrong in ([0.5], torch.tensor([True, False])):
        with pytest.raises(ColumnTypeError):
            buffer.sample_by_index(wrong)


def test_fields(buffer):
    filled(buffer, 4)
    for fields in (["info", "reward"], [("info", "note"), "reward"], ["reward", "info/note", "info"]):
        found = buffer.sample_by_index_fields([2, 0], fields)
        assert set(found.keys(True, True)) == {("info", "note"), "reward"}
        assert found["reward"].tolist() == [-2, 0]
    with pytest.raises(UnknownColumnError, match="'rewards'"):
        buffer.sample_by_index_fields([0], ["rewards"])
    with pytest.raises(SelectionError, match="list of names"):
        buffer.sample_by_index_fields([0], "reward")


def test_batch_sizes_that_do_not_fit(buffer):
    model = filled(buffer, 4)
    with pytest.raises(ColumnShapeError, match="add_batch"):
        buffer.add(transitions(range(1)))
    with pytest.raises(ColumnShapeError, match="call add "):
        buffer.add_batch(transition(1))
    with pytest.raises(LengthError):
        buffer.add_batch(transitions(range(2))[:0])
    for wrong in (lambda: buffer.sample_batch(0), lambda: buffer.create_epoch_iterator(0)):
        with pytest.raises(SelectionError):
            wrong()
    assert_holds(buffer, model)


@pytest.mark.parametrize("size", [0, -3, 2.5])
def test_sizes_that_do_not_fit(buffer, size):
    model = filled(buffer, 4)
    with pytest.raises(SelectionError, match="capacity"):
        buffer.reset(size)
    assert_holds(buffer, model)


def test_refused_first_transition_defines_nothing(buffer):
    with pytest.raises(ColumnTypeError):
        buffer.add({"reward": torch.tensor(1.0), "action": "left"})
    with pytest.raises(LengthError):
        buffer.add_batch({"reward": torch.zeros(3), "action": torch.zeros(2)})
    filled(buffer, 3)


def test_plain_mappings_are_fine(buffer):
    buffer.add(dict(transition(0).items()))
    buffer.add_batch(transitions(range(1, 5)).to_dict())
    assert_are(buffer.sample_all(), range(5))


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
    buffer.load(tmp_path / "theirs")  # what is there stays
    assert_are(buffer.sample_all(), [0])
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


def test_two_places_are_refused(tmp_path):
    with pytest.raises(SelectionError, match="both say where"):
        ReplayBuffer("cpu", f"disk:{tmp_path / 'a'}", 10, url=tmp_path / "b")


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


def test_without_tensordict(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensordict", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'trajstore[tensordict]'")):
        ReplayBuffer("cpu", "cpu", 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda"), ("cuda", "disk")])
def test_devices(devices, tmp_path):
    device, storing = devices
    with ReplayBuffer(device, f"disk:{tmp_path}/x" if storing == "disk" else storing, 10) as buffer:
        buffer.add_batch(transitions(range(7)))
        buffer.add_batch(transitions(range(7, 12)).to("cuda"))
        buffer.add(transition(12).to("cuda"))
        found = buffer.sample_all()
        assert found.device.type == device
        assert all(value.device.type == device for value in found.values(True, True))
        assert_are(found.to("cpu"), [10, 11, 12, *range(3, 10)])
        assert len(buffer.sample_batch(256)) == 256
        buffer.save(tmp_path / "saved")
        loaded = ReplayBuffer(device, "cuda", 1)
        loaded.load(tmp_path / "saved")
        assert_are(loaded.sample_all().to("cpu"), [10, 11, 12, *range(3, 10)])
