"""ObjectRL's buffer, in memory and in a store, held against a list."""

import os
import re
import shutil
import sys
import tempfile
import warnings

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tensordict import NonTensorData, TensorDict

from tests.buffers.test_ring import ListRing
from tests.buffers.transitions import assert_are, assert_holds, filled, transition, transitions
from tests.support.rare import examples
from trajstore.buffers import stored_ring
from trajstore.buffers.objectrl import ReplayBuffer
from trajstore.errors import (
    ClosedError,
    ColumnShapeError,
    ColumnTypeError,
    CommitError,
    EmptyBufferError,
    IndexRangeError,
    LengthError,
    MissingColumnError,
    SelectionError,
    UnknownColumnError,
)


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
    max_examples=examples(20),
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestBufferInAStore = StoredBufferMachine.TestCase
TestBufferInAStore.settings = settings(
    max_examples=examples(15),
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(params=["memory", "url", "disk"])
def buffer(request, tmp_path):
    """An empty buffer of 10."""
    if request.param == "memory":
        made = ReplayBuffer(device=torch.device("cpu"), storing_device=torch.device("cpu"), buffer_size=10)
    elif request.param == "url":
        made = ReplayBuffer("cpu", "cpu", 10, url=tmp_path / "experience")
    else:
        made = ReplayBuffer("cpu", f"disk:{tmp_path}/experience", 10)
    with made:
        yield made


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


def test_two_places_are_refused(tmp_path):
    with pytest.raises(SelectionError, match="both say where"):
        ReplayBuffer("cpu", f"disk:{tmp_path / 'a'}", 10, url=tmp_path / "b")


def test_places_where_no_store_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "obj.py").write_text("print('kept')")
    for storing_device, url in [("disk:", None), ("disk: ", None), ("cpu", "")]:
        with pytest.raises(SelectionError, match="names no place"):
            ReplayBuffer("cpu", storing_device, 10, url=url)
    for storing_device, url in [
        ("disk:obj.py", None),
        (f"disk:file://{tmp_path}/obj.py", None),
        ("cpu", tmp_path / "obj.py"),
    ]:
        with pytest.raises(SelectionError, match=r"obj.py'.*: a file is there"):
            ReplayBuffer("cpu", storing_device, 10, url=url)
    assert os.listdir(tmp_path) == ["obj.py"]


def test_a_closed_buffer(buffer, tmp_path):
    model = filled(buffer, 4)
    buffer.save(tmp_path / "saved")
    epoch = buffer.create_epoch_iterator(2)
    buffer.close()
    buffer.close()
    for attempt in (
        lambda: buffer.add(transition(4)),
        lambda: buffer.add_batch(transitions(range(2))),
        lambda: buffer.sample_batch(2),
        lambda: buffer.sample_random(2),
        lambda: buffer.sample_by_index([0]),
        lambda: buffer.sample_by_index_fields([0], ["reward"]),
        buffer.sample_all,
        lambda: next(epoch),
        lambda: buffer.create_epoch_iterator(2),
        lambda: buffer.get_next_batch(2),
        lambda: buffer.calculate_num_batches(2),
        lambda: buffer.get_steps_and_iterator(0, 1, 2),
        buffer.flush,
        lambda: buffer.save(tmp_path / "saved"),
        lambda: buffer.load(tmp_path / "saved"),
        buffer.reset,
    ):
        with pytest.raises(ClosedError, match="closed"):
            attempt()
    buffer.close()
    assert (len(buffer), buffer.pointer, buffer.buffer_size) == (4, 4, 10)
    again = ReplayBuffer("cpu", "cpu", 1)
    again.load(tmp_path / "saved")
    assert_holds(again, model)


def test_two_buffers_on_one_place(tmp_path):
    """Neither deletes what the other wrote, and the next buffer has all of it."""

    def make():
        return ReplayBuffer("cpu", f"disk:{tmp_path}/experience", 100_000)

    def numbered(numbers):
        return TensorDict({"n": torch.tensor(list(numbers))}, batch_size=[len(numbers)])

    with make() as buffer:
        buffer.add_batch(numbered(range(4000)))
    a, b = make(), make()
    b.add_batch(numbered(range(4000, 4020)))
    b.flush()
    a.add_batch(numbered(range(4020, 4030)))
    for attempt in (a.flush, lambda: a.sample_batch(2), a.reset, lambda: a.add_batch(numbered([4030])), a.close):
        with pytest.raises(
            CommitError, match=r"another buffer writes to .*experience.*Nothing was lost.*one buffer there"
        ):
            attempt()
    a.close()
    with pytest.raises(CommitError):
        b.close()
    b.close()
    with make() as buffer:
        assert buffer.sample_all()["n"].tolist() == list(range(4031))
        buffer.reset()  # of both
    with make() as buffer:
        assert len(buffer) == 0


def test_the_warning_that_there_is_none():
    with pytest.warns(UserWarning, match="print_gc_warning=True has no effect"):
        ReplayBuffer("cpu", "cpu", 10, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ReplayBuffer("cpu", "cpu", 10, print_gc_warning=False)


def test_fewer_epochs_than_none_are_random_batches(buffer):
    filled(buffer, 3)
    assert buffer.get_steps_and_iterator(-1, 5, 2) == 5  # ObjectRL asks for n_epochs > 0
    assert len(buffer.get_next_batch(7)) == 7


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
