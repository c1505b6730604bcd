"""The ring, held against a list of rows and a write pointer."""

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import trajstore
from tests.support.rare import examples
from trajstore.buffers.ring import Ring
from trajstore.buffers.ring_store import RingStore, chunk_rows
from trajstore.buffers.rows import RowFormat
from trajstore.errors import (
    BufferFullError,
    ColumnNameError,
    ColumnShapeError,
    ColumnTypeError,
    EmptyBufferError,
    IndexRangeError,
    LengthError,
    MissingColumnError,
    SchemaConflictError,
    SchemaError,
    SelectionError,
    UnknownColumnError,
)
from trajstore.schema import Column


class ListRing:
    """The obvious ring: a list with a place per row."""

    def __init__(self, capacity):
        self.rows = [None] * capacity
        self.pointer = 0

    def add(self, row):
        self.rows[self.pointer] = row
        self.pointer = (self.pointer + 1) % len(self.rows)

    def held(self):
        return [row for row in self.rows if row is not None]


def row(number):
    """One row that tells which it is."""
    return {
        "obs": {"state": torch.tensor([number, -number], dtype=torch.float32), "mask": torch.tensor([number % 2 == 0])},
        "action": torch.tensor(number),
        "value": torch.tensor(number % 256, dtype=torch.bfloat16),
    }


def batch(numbers):
    rows = [row(number) for number in numbers]
    return {
        "obs": {key: torch.stack([r["obs"][key] for r in rows]) for key in ("state", "mask")},
        "action": torch.stack([r["action"] for r in rows]),
        "value": torch.stack([r["value"] for r in rows]),
    }


def assert_holds(ring, model):
    held = model.held()
    assert (len(ring), ring.size, ring.pointer) == (len(held), len(held), model.pointer)
    if held:
        found = ring.gather(torch.arange(len(held)))
        wanted = batch(held)
        assert torch.equal(found["obs/state"], wanted["obs"]["state"])
        assert torch.equal(found["obs/mask"], wanted["obs"]["mask"])
        assert torch.equal(found["action"], wanted["action"])
        assert torch.equal(found["value"], wanted["value"])


def bad_rows(good):
    """Rows that do not fit beside ``good``, and what says so."""
    yield {**good, "extra": good["action"]}, UnknownColumnError
    yield {name: value for name, value in good.items() if name != "action"}, MissingColumnError
    yield {**good, "action": good["action"].float()}, ColumnTypeError
    yield {**good, "action": good["action"].tolist()}, ColumnTypeError
    yield {**good, "action": torch.stack([good["action"]] * 2, -1)}, ColumnShapeError
    yield {**good, "action": good["action"].to("meta")}, ColumnTypeError
    yield {**good, "obs": {"state": good["obs"]["state"]}}, MissingColumnError
    yield {}, LengthError


class RingMachine(RuleBasedStateMachine):
    @initialize(capacity=st.integers(1, 7))
    def start(self, capacity):
        self.ring, self.model, self.count, self.saves = Ring(capacity), ListRing(capacity), 0, 0
        self.url = f"memory://ring-{id(self)}-{np.random.default_rng().integers(1 << 60)}"

    def numbers(self, n):
        self.count += n
        return range(self.count - n, self.count)

    @rule()
    def add_one(self):
        (number,) = self.numbers(1)
        self.ring.add_one(row(number))
        self.model.add(number)

    @rule(n=st.integers(1, 16), flat=st.booleans())
    def add(self, n, flat):
        numbers = self.numbers(n)
        rows = batch(numbers)
        if flat:
            rows = {**{f"obs/{key}": value for key, value in rows.pop("obs").items()}, **rows}
        if n > self.ring.capacity:
            with pytest.raises(BufferFullError):
                self.ring.add(rows)
        self.ring.add(rows, keep_last=True)
        for number in numbers:
            self.model.add(number)

    @rule(which=st.integers(0, 7))
    def refuse(self, which):
        if not len(self.ring.schema):
            return
        rows, error = list(bad_rows(batch(range(3))))[which]
        with pytest.raises(error):
            self.ring.add(rows, keep_last=True)
        single, error = list(bad_rows(row(3)))[which]
        with pytest.raises(error):
            self.ring.add_one(single)

    @rule()
    def clear(self):
        self.ring.clear()
        self.model = ListRing(self.ring.capacity)

    @rule()
    def through_a_store(self):
        if not len(self.ring.schema):
            with pytest.raises(EmptyBufferError):
                self.ring.save(self.url)
            return
        self.saves += 1
        assert self.ring.save(self.url) == self.saves
        self.ring = Ring(self.ring.capacity)
        self.ring.load(self.url)

    @rule()
    def through_a_state(self):
        state = self.ring.state_dict()
        self.ring = Ring(self.ring.capacity)
        self.ring.load_state_dict(state)

    @invariant()
    def holds_the_same(self):
        if hasattr(self, "ring"):
            assert_holds(self.ring, self.model)


TestRingMachine = RingMachine.TestCase
TestRingMachine.settings = settings(max_examples=examples(25), stateful_step_count=20, deadline=None, derandomize=True)


@pytest.fixture
def full():
    """A ring of 5 that has wrapped around, and its model."""
    ring, model = Ring(5), ListRing(5)
    for number in range(7):
        ring.add_one(row(number))
        model.add(number)
    return ring, model


@pytest.mark.parametrize("which", range(8))
def test_refused_first_rows_define_nothing(which):
    good = batch(range(3))
    rows, _ = list(bad_rows(good))[which]
    ring = Ring(2)
    with pytest.raises((SchemaError, BufferFullError)):
        ring.add({**rows, "ragged": torch.zeros(4)} if which != 7 else rows)
    with pytest.raises(BufferFullError):
        ring.add(good)
    assert not len(ring.schema)
    ring.add_one({"other": torch.zeros(3)})
    assert list(ring.columns) == ["other"]


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, LengthError),
        ({"a": torch.zeros(0)}, LengthError),
        ({"a": torch.tensor(1.0)}, ColumnShapeError),
        ({"a": torch.zeros(2, 0)}, ColumnShapeError),
        ({"a:b": torch.zeros(2)}, ColumnNameError),
        ({"a": torch.zeros(2), "A": torch.zeros(2)}, ColumnNameError),
        ({"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}, ColumnTypeError),
        ({"a": torch.zeros(2, device="meta")}, ColumnTypeError),
        ({"a": np.zeros(2)}, ColumnTypeError),
        ({"a": torch.zeros(2, dtype=torch.float8_e5m2)}, ColumnTypeError),
        ({"a": {}}, ColumnNameError),
        ({}, LengthError),
    ],
)
def test_first_rows_that_fit_nothing(rows, error):
    ring = Ring(4)
    with pytest.raises(error):
        ring.add(rows)
    assert not len(ring.schema)
    assert not len(ring)


@pytest.mark.parametrize("capacity", [0, -1, True, 2.5, "3"])
def test_a_capacity_is_a_whole_number_of_rows(capacity):
    with pytest.raises(SelectionError, match="capacity"):
        Ring(capacity)


def test_declared_columns():
    ring = Ring(3, columns=[Column(path="obs", dtype="uint8", shape=(2,))])
    assert ring.columns["obs"].shape == (3, 2)
    with pytest.raises(ColumnTypeError):
        ring.add_one({"obs": torch.zeros(2)})
    with pytest.raises(SchemaConflictError):
        ring.declare([Column(path="more", dtype="uint8")])
    for column in (
        Column(path="text", dtype="string"),
        Column(path="when", dtype="datetime64[us]"),
        Column(path="many", dtype="int64", ragged=True),
        Column(path="states", dtype="int64", extra=1),
    ):
        with pytest.raises(ColumnTypeError):
            Ring(3, columns=[column])


def test_rows_with_gradients_are_stored_without():
    ring = Ring(2)
    weights = torch.ones(2, requires_grad=True)
    ring.add({"value": weights * 2})
    ring.add_one({"value": (weights * 3)[0]})
    assert not ring.columns["value"].requires_grad
    assert ring.gather(torch.tensor([0, 1]))["value"].tolist() == [3.0, 2.0]


def test_rows_are_copied():
    ring = Ring(2)
    rows = torch.ones(4)[::2]  # strided, too
    ring.add({"value": rows})
    rows.zero_()
    taken = ring.gather(torch.tensor([0]))["value"]
    ring.add({"value": torch.full((2,), 7.0)})
    assert taken.tolist() == [1.0]


def test_gather_names_and_bounds(full):
    ring, _ = full
    assert list(ring.gather(torch.tensor([4, 0]), names=["action"])) == ["action"]
    assert ring.gather(torch.tensor([4, 0], dtype=torch.int32))["action"].tolist() == [4, 5]
    for indices in ([5], [-1], [0, 99]):
        with pytest.raises(IndexRangeError, match="holds 5"):
            ring.gather(torch.tensor(indices))
    for indices in (torch.tensor([[0]]), torch.tensor([0.0]), torch.tensor([True])):
        with pytest.raises(SelectionError):
            ring.gather(indices)
    with pytest.raises(UnknownColumnError, match="'action'"):
        ring.gather(torch.tensor([0]), names=["actions"])


def test_samples_are_uniform_and_repeat_with_the_seed(full):
    ring, _ = full
    draws = [ring.sample_indices(1000, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    assert sorted(draws[0].unique().tolist()) == [0, 1, 2, 3, 4]
    with pytest.raises(SelectionError):
        ring.sample_indices(0)
    ring.clear()
    with pytest.raises(EmptyBufferError):
        ring.sample_indices(1)


DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16"]
DTYPES += ["float32", "float64", "complex64", "complex128"]


def test_every_dtype_comes_back_from_a_store(tmp_path):
    ring = Ring(4)
    rows = {}
    for name in DTYPES:
        values = torch.arange(6).to(getattr(torch, name))
        rows[f"scalar/{name}"], rows[f"vector/{name}"] = values[:3], values.view(3, 2)
    ring.add(rows)
    ring.save(tmp_path / "ring")
    loaded = Ring(4)
    loaded.load(tmp_path / "ring")
    found = loaded.gather(torch.arange(3))
    assert set(found) == set(rows)
    for name, values in rows.items():
        assert found[name].dtype is values.dtype
        assert torch.equal(found[name].view(torch.uint8), values.contiguous().view(torch.uint8))


def test_rows_of_many_trajectories_come_back(tmp_path):
    ring = Ring(10_000)
    ring.add({"n": torch.arange(12_345), "v": torch.arange(2 * 12_345).view(-1, 2)}, keep_last=True)
    ring.save(tmp_path / "ring")
    with trajstore.open(tmp_path / "ring") as store:
        assert store.trajectories.lengths.tolist() == [4096, 4096, 10_000 - 2 * 4096]
    loaded = Ring(10_000)
    loaded.load(tmp_path / "ring")
    assert loaded.pointer == 2345
    for name, arena in ring.columns.items():
        assert torch.equal(loaded.columns[name], arena)


def test_wide_rows_make_short_trajectories():
    assert chunk_rows(RowFormat([Column(path="a", dtype="uint8", shape=(1 << 20,))]).schema) == 8
    assert chunk_rows(RowFormat([Column(path="a", dtype="uint8", shape=(1 << 25,))]).schema) == 1
    assert chunk_rows(RowFormat([Column(path="a", dtype="uint8")]).schema) == 4096


def test_a_save_cut_short_leaves_the_one_before(full, tmp_path):
    ring, model = full
    url = tmp_path / "ring"
    ring.save(url)
    ring.add_one(row(7))
    with trajstore.open(url, "a") as store:  # the first part of a second save, as a crash would leave it
        fields = {"ring_save": 2, "ring_capacity": 5, "ring_size": 5, "ring_pointer": 3, "ring_first": 0}
        store.append(batch(range(2)), metadata=fields)
    loaded = Ring(5)
    loaded.load(url)
    assert_holds(loaded, model)
    with pytest.raises(SelectionError, match="no complete save 2"):
        loaded.load(url, save=2)
    assert_holds(loaded, model)
    assert ring.save(url) == 3
    model.add(7)
    loaded.load(url)
    assert_holds(loaded, model)
    with trajstore.open(url) as store:
        assert len(store.trajectories) == 1


def test_a_save_whose_deletion_failed_is_the_newest_all_the_same(full, tmp_path):
    ring, model = full
    ring.save(tmp_path / "ring")
    ring.add_one(row(7))
    with RingStore(tmp_path / "ring", "a") as store:
        assert ring.write_to(store) == 2
    loaded = Ring(5)
    loaded.load(tmp_path / "ring", save=1)
    assert_holds(loaded, model)
    model.add(7)
    loaded.load(tmp_path / "ring")
    assert_holds(loaded, model)


def test_a_ring_that_does_not_fit_is_not_loaded(full, tmp_path):
    ring, model = full
    ring.save(tmp_path / "ring")
    other = Ring(6)
    with pytest.raises(SelectionError, match="capacity of 5"):
        other.load(tmp_path / "ring")
    different = Ring(5)
    different.add_one({"action": torch.tensor(1)})
    with pytest.raises(SchemaConflictError, match="'action' int64"):
        different.load(tmp_path / "ring")
    with pytest.raises(SchemaError):
        different.save(tmp_path / "ring")
    assert different.gather(torch.tensor([0]))["action"].tolist() == [1]
    loaded = Ring(5)
    loaded.load(tmp_path / "ring")
    assert_holds(loaded, model)
    with trajstore.open(tmp_path / "else", "x") as store:
        store.append({"action": [1, 2]})
    for attempt in (different.save, different.load):
        with pytest.raises(SelectionError, match="no save of a ring"):
            attempt(tmp_path / "else")
    with pytest.raises(FileNotFoundError):
        different.load(tmp_path / "nowhere")


def test_states_that_do_not_fit_change_nothing(full):
    ring, model = full
    state = ring.state_dict()
    columns = state["columns"]
    for wrong, error in [
        ({**state, "capacity": 6}, SelectionError),
        ({**state, "size": 3}, SelectionError),
        ({**state, "size": 6, "pointer": 6}, SelectionError),
        ({**state, "pointer": 5}, SelectionError),
        ({**state, "size": 4, "pointer": 4}, LengthError),
        ({**state, "columns": {}}, LengthError),
        ({**state, "columns": {**columns, "action": columns["action"].float()}}, ColumnTypeError),
        ({**state, "columns": {**columns, "more": columns["action"]}}, UnknownColumnError),
        ({key: value for key, value in state.items() if key != "pointer"}, SelectionError),
    ]:
        with pytest.raises(error):
            ring.load_state_dict(wrong)
        assert_holds(ring, model)
