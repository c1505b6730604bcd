"""Any schema, any sequence of operations: the store equals a dictionary."""

import shutil
import tempfile
import uuid

import hypothesis.strategies as st
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

import trajstore
from tests.support.rare import examples
from tests.support.strategies import bits, columns, trajectory
from trajstore.names import nest

RELAXED = settings(deadline=None, suppress_health_check=list(HealthCheck))


def read_back(stored):
    return {path: bits(stored.column(path)[:]) for path in stored.columns}


def expected_of(schema, flat):
    """What was handed in, as bits; ragged numbers come back as a list of arrays."""
    return {path: bits(value) for path, value in flat.items()}


@given(
    schema=columns(),
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    data=st.data(),
)
@RELAXED
def test_what_is_appended_is_read_back(schema, seed, lengths, data):
    rng = np.random.default_rng(seed)
    url = f"memory://properties/{uuid.uuid4().hex}"
    codec = data.draw(st.sampled_from([None, "fast", "small", "none"]))
    appended = []
    with trajstore.open(url, "a", schema=schema, codec=codec) as store:
        for length in lengths:
            flat = trajectory(rng, schema, length)
            store.append(nest(flat), terminated=bool(length % 2), truncated=bool(length % 3 == 0), number=length)
            appended.append((length, flat))
            if data.draw(st.booleans()):
                store.flush()
    with trajstore.open(url) as store:
        view = store.trajectories
        assert view.ids.tolist() == list(range(len(lengths)))
        for stored, (length, flat) in zip(view, appended, strict=True):
            assert stored.length == length
            assert stored.metadata == {"number": length}
            assert (stored.terminated, stored.truncated) == (bool(length % 2), length % 3 == 0)
            assert read_back(stored) == expected_of(schema, flat)
            for path, value in flat.items():
                rows = len(value)
                a, b = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
                assert bits(stored.column(path)[a:b]) == bits(value[a:b])


@given(
    schema=columns(4), seed=st.integers(0, 2**32 - 1), length=st.integers(1, 60), spill=st.sampled_from([1, 500, 10**9])
)
@RELAXED
def test_an_episode_equals_the_same_trajectory_appended(schema, seed, length, spill):
    rng = np.random.default_rng(seed)
    url = f"memory://properties/{uuid.uuid4().hex}"
    flat = trajectory(rng, schema, length)
    with trajstore.open(url, "a", schema=schema, spill_bytes=spill) as store:
        store.append(nest(flat))
        with store.begin() as episode:
            for step in range(length):
                episode.add(**nest({path: value[step] for path, value in flat.items()}))
            finals = nest({c.path: flat[c.path][length] for c in schema if c.extra and c.path in flat})
            episode.end(final=finals)
    with trajstore.open(url) as store:
        whole, streamed = store.trajectories
        assert streamed.length == length
        assert read_back(whole) == read_back(streamed) == expected_of(schema, flat)


@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    window=st.integers(1, 8),
    data=st.data(),
)
@RELAXED
def test_windows_equal_slices_of_what_was_appended(seed, lengths, window, data):
    rng = np.random.default_rng(seed)
    url = f"memory://properties/{uuid.uuid4().hex}"
    model = []
    with trajstore.open(url, "a") as store:
        for length in lengths:
            model.append(
                {"obs": rng.integers(0, 256, (length + 1, 3), dtype=np.uint8), "reward": rng.normal(size=length)}
            )
            store.append(model[-1])
            if data.draw(st.booleans()):
                store.flush()
    with trajstore.open(url) as store:
        anchors = [(t, s) for t, length in enumerate(lengths) for s in range(length - window + 1)]
        if not anchors:
            with np.testing.assert_raises(trajstore.SelectionError):
                store.trajectories.loader(4, window=window)
            return
        columns = ["obs", "reward", "trajectory", "step"]
        with store.trajectories.loader(4, window=window, order="sequential", columns=columns) as loader:
            batches = list(loader)
        assert len(loader) == len(batches) == -(-len(anchors) // 4)
        flat = [(b, i) for b in batches for i in range(len(b["reward"]))]
        for (batch, row), (t, s) in zip(flat, anchors, strict=True):
            assert batch["trajectory"][row].tolist() == [t] * window
            assert batch["step"][row].tolist() == list(range(s, s + window))
            assert bits(batch["obs"][row]) == bits(model[t]["obs"][s : s + window])
            assert bits(batch["reward"][row]) == bits(model[t]["reward"][s : s + window])
        with store.trajectories.loader(16, window=window, seed=seed, columns=columns) as loader:
            batch = next(iter(loader))
        for row in range(16):
            t, s = int(batch["trajectory"][row, 0]), int(batch["step"][row, 0])
            assert (t, s) in anchors
            assert bits(batch["obs"][row]) == bits(model[t]["obs"][s : s + window])


class TwoHandles(RuleBasedStateMachine):
    """Two handles append to one store, in any order, and time travel sees what was committed."""

    def __init__(self):
        super().__init__()
        self.folder = None
        self.handles = {}

    versions = Bundle("versions")

    @initialize(schema=columns(3), local=st.booleans(), seed=st.integers(0, 2**32 - 1))
    def create(self, schema, local, seed):
        self.rng = np.random.default_rng(seed)
        self.schema = schema
        self.folder = tempfile.mkdtemp() if local else None
        self.url = self.folder or f"memory://properties/{uuid.uuid4().hex}"
        self.pending = {0: [], 1: []}  # by handle: what was appended since its last flush
        self.model = {}  # uuid -> (length, columns, metadata)
        self.history = {0: []}  # version -> uuids in id order
        self.following = set()  # handles that have looked at what they append
        for number in (0, 1):
            self.open(number)

    def open(self, number):
        self.handles[number] = trajstore.open(self.url, "a", schema=self.schema)
        self.following.discard(number)

    def settle(self, number):
        """Every version that appeared holds the one before it and the handle's pending trajectories."""
        if self.pending[number]:
            latest = max(self.history)
            self.history[latest + 1] = self.history[latest] + self.pending[number]
            self.pending[number] = []

    @rule(number=st.sampled_from([0, 1]), length=st.integers(1, 20), k=st.none() | st.integers(-5, 5))
    def append(self, number, length, k):
        flat = trajectory(self.rng, self.schema, length)
        ref = self.handles[number].append(nest(flat), marker=k)
        assert ref.id is None
        self.pending[number].append(ref.uuid)
        self.model[ref.uuid] = (length, expected_of(self.schema, flat), {} if k is None else {"marker": k})

    @rule(number=st.sampled_from([0, 1]), length=st.integers(1, 5))
    def stream(self, number, length):
        flat = trajectory(self.rng, self.schema, length)
        with self.handles[number].begin() as episode:
            for step in range(length):
                episode.add(**nest({path: value[step] for path, value in flat.items()}))
            finals = nest({c.path: flat[c.path][length] for c in self.schema if c.extra and c.path in flat})
            ref = episode.end(final=finals)
        self.pending[number].append(ref.uuid)
        self.model[ref.uuid] = (length, expected_of(self.schema, flat), {})

    @rule(number=st.sampled_from([0, 1]))
    def refused(self, number):
        with np.testing.assert_raises(trajstore.SchemaError):
            self.handles[number].append({"no such column": np.zeros(3)})

    @rule(target=versions, number=st.sampled_from([0, 1]))
    def flush(self, number):
        self.handles[number].flush()
        self.settle(number)
        return max(self.history)

    @rule(number=st.sampled_from([0, 1]))
    def reopen(self, number):
        self.handles[number].close()
        self.settle(number)
        self.open(number)

    @rule(number=st.sampled_from([0, 1]))
    def refresh(self, number):
        assert self.handles[number].refresh() == max(self.history)
        view = self.handles[number].trajectories
        if number not in self.following:  # the first look commits
            self.following.add(number)
            self.settle(number)
        self.check(view, max(self.history), self.pending[number])

    @precondition(lambda self: self.history)
    @rule(version=versions)
    def time_travel(self, version):
        with trajstore.open(self.url, version=version) as store:
            self.check(store.trajectories, version)

    def check(self, view, version, waiting=()):
        committed = self.history[version]
        assert [t.uuid for t in view] == [*committed, *waiting]
        assert view.ids.tolist() == [*range(len(committed)), *[-1] * len(waiting)]
        for stored in view:
            length, columns_, metadata = self.model[stored.uuid]
            assert (stored.length, stored.metadata) == (length, metadata)
            assert read_back(stored) == columns_

    @invariant()
    def the_latest_version_is_what_was_flushed(self):
        if self.handles:
            with trajstore.open(self.url) as store:
                assert store.version == max(self.history)
                assert [str(t.uuid) for t in store.trajectories] == [str(u) for u in self.history[store.version]]

    def teardown(self):
        for handle in self.handles.values():
            handle.close()
        if self.folder:
            shutil.rmtree(self.folder)


TwoHandles.TestCase.settings = settings(RELAXED, stateful_step_count=20, max_examples=examples(40))
TestTwoHandles = TwoHandles.TestCase
