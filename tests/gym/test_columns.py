"""What a recorder writes beside the steps, and what it refuses: spaces, info columns, metadata, rewards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import trajstore
from trajstore.errors import (
    ColumnShapeError,
    ColumnTypeError,
    MetadataError,
    MissingColumnError,
    ReadOnlyError,
    SchemaConflictError,
    SchemaError,
    TrajstoreError,
)

gymnasium = pytest.importorskip("gymnasium")

from gymnasium import spaces  # noqa: E402
from gymnasium.vector import AutoresetMode, SyncVectorEnv  # noqa: E402

from tests.support.gym_environments import (  # noqa: E402
    MODES,
    Counter,
    Log,
    Logged,
    assert_same_episodes,
    column,
    counters,
    finished,
    play,
)
from trajstore.gym import RecordTrajectories, schema_of  # noqa: E402


class Endless(Counter):
    """Never ends by itself."""

    def step(self, action: Any) -> Any:
        observation, reward, _, _, info = super().step(action)
        return observation, reward, False, False, info


@pytest.fixture
def store(tmp_path: Any) -> Iterator[Any]:
    with trajstore.open(str(tmp_path / "store"), mode="a") as opened:
        yield opened


# What is refused


@pytest.mark.parametrize(
    ("space", "why"),
    [
        (spaces.Graph(spaces.Box(0, 1, (2,)), None), r"'obs'.*Graph"),
        (spaces.OneOf((spaces.Discrete(2), spaces.Box(0, 1))), r"'obs'.*OneOf"),
        (spaces.Dict(a=spaces.Tuple((spaces.Graph(spaces.Discrete(2), None),))), r"'obs/a/0'.*Graph"),
        (spaces.Sequence(spaces.Text(3)), r"'obs'.*Text"),
        (spaces.Sequence(spaces.Box(0, 1, (2,))), r"'obs'.*Sequence.*schema_of"),
        (spaces.Dict({}), r"'obs'.*empty"),
        (spaces.Dict({"a": spaces.Dict({}), "b": spaces.Discrete(2)}), r"'obs/a'.*empty"),
        (spaces.Dict({3: spaces.Discrete(2)}), r"'obs'.*3"),
        (spaces.Dict({"a": spaces.Discrete(2), "A": spaces.Discrete(2)}), "differs in case"),
        (gymnasium.Space((2,), np.float32), r"'obs'.*Space"),
    ],
)
def test_spaces_without_columns_are_refused_at_construction(store: Any, space: Any, why: str) -> None:
    env = Counter()
    env.observation_space = space
    with pytest.raises(SchemaError, match=why):
        RecordTrajectories(env, store)


def test_an_environment_that_does_not_keep_to_its_space_is_refused(store: Any) -> None:
    class Liar(Counter):
        answer: Any = None

        def step(self, action: Any) -> Any:
            return self.answer, 0.0, False, False, {}

    env = RecordTrajectories(Liar(), store)
    for answer, error in [
        (np.zeros(4, np.int32), ColumnShapeError),
        (np.zeros(3), None),
        ([1, 2, 3], None),
        (np.array([0.5, 0, 0]), ColumnTypeError),
        (np.array([2**40, 0, 0]), ColumnTypeError),
        ("text", ColumnShapeError),
    ]:
        Liar.answer = answer
        env.reset()
        if error is None:
            env.step(0)
        else:
            with pytest.raises(error, match="'obs'"):
                env.step(0)
    env.reset()
    with pytest.raises(ColumnTypeError, match="'action'"):
        env.step(0.5)


def test_a_vector_environment_without_an_autoreset_mode_is_refused(store: Any) -> None:
    raw, _ = counters(1, AutoresetMode.NEXT_STEP)
    raw.metadata, raw.autoreset_mode = {}, None
    with pytest.raises(TrajstoreError, match="autoreset_mode"):
        RecordTrajectories(raw, store)
    raw.metadata = {"autoreset_mode": "NextStep"}
    RecordTrajectories(raw, store)
    with pytest.raises(TypeError, match="gymnasium"):
        RecordTrajectories(object(), store)  # type: ignore[call-overload]


def test_a_reset_mask_that_is_not_heeded_is_refused(store: Any) -> None:
    """The native CartPole resets all of its environments whatever the mask says."""
    env = RecordTrajectories(gymnasium.make_vec("CartPole-v1", 2, "vector_entry_point"), store)
    env.reset(seed=0)
    env.step(np.array([0, 1]))
    with pytest.raises(TrajstoreError, match=r"reset_mask.*sub-environment 0"):
        env.reset(options={"reset_mask": np.array([False, True])})
    with pytest.raises(TrajstoreError, match="call reset"):
        env.step(np.array([0, 1]))
    env.close()
    store.flush()
    assert len(store.trajectories) == 0


def test_a_store_of_other_columns_is_refused_at_construction(store: Any) -> None:
    play(RecordTrajectories(Counter(), store), 10)
    store.flush()
    with pytest.raises(SchemaConflictError, match=r"'obs'.*int32\[3\]"):
        RecordTrajectories(gymnasium.make("CartPole-v1"), store)
    with pytest.raises(ReadOnlyError, match="mode='a'"), trajstore.open(store.url) as reader:
        RecordTrajectories(Counter(), reader)


def test_an_environment_may_be_closed_after_its_store(tmp_path: Any) -> None:
    url, log = str(tmp_path / "store"), []
    with trajstore.open(url, mode="a") as store:
        env = RecordTrajectories(Logged(Counter(), log), store)
        play(env, 10)
        assert not log[-1]["ended"]
    env.close()
    with trajstore.open(url) as store:
        assert len(store.trajectories) == len(finished(log))


def test_long_episodes_go_to_the_store_while_they_run(tmp_path: Any) -> None:
    """Beyond spill_bytes, an episode's steps leave memory; what comes back is the same."""
    log: Log = []
    kwargs: dict[str, Any] = {"spill_bytes": 4096}
    with trajstore.open(str(tmp_path / "store"), mode="a", **kwargs) as store:
        raw = gymnasium.wrappers.TimeLimit(Endless(), max_episode_steps=3000)
        play(RecordTrajectories(Logged(raw, log), store), 7000)
        store.flush()
        assert len(finished(log)) == 2
        assert_same_episodes(store, finished(log), ["obs", "action"])


# Columns and metadata


@pytest.mark.parametrize("mode", [None, *MODES], ids=str)
def test_info_columns_are_those_of_the_step(store: Any, mode: Any) -> None:
    logs: list[Log]
    if mode is None:
        logs = [[]]
        raw: Any = Logged(Counter(), logs[0])
    else:
        raw, logs = counters(2, mode)
    play(RecordTrajectories(raw, store, info_columns=["double", "part"]), 30)
    store.flush()
    view = store.trajectories
    assert len(view) == len(finished(*logs)) > 0
    for i in range(len(view)):
        steps = np.arange(1, view[i].length + 1)
        np.testing.assert_array_equal(column(view[i], "info/double"), 2 * steps)
        np.testing.assert_array_equal(column(view[i], "info/part/inner"), steps / 2)


def test_a_missing_info_key_is_an_error(store: Any) -> None:
    env = RecordTrajectories(Counter(), store, info_columns=["absent"])
    env.reset()
    with pytest.raises(MissingColumnError, match=r"'absent'.*'double'"):
        env.step(0)
    raw, _ = counters(2, AutoresetMode.SAME_STEP)
    vector = RecordTrajectories(raw, store, info_columns=["absent"])
    vector.reset()
    with pytest.raises(MissingColumnError, match=r"'absent'"):
        vector.step(np.zeros(2, np.int64))


def test_metadata_of_the_caller(store: Any) -> None:
    env = RecordTrajectories(Counter(), store, metadata=lambda k: {"number": k, "env_id": "mine", "task": "count"})
    play(env, 12)
    play(RecordTrajectories(Counter(), store, metadata={"task": "again"}), 3)
    store.flush()
    view = store.trajectories
    found = [view[i].metadata for i in range(len(view))]
    assert [m["number"] for m in found if m["task"] == "count"] == list(range(env.episodes_recorded))
    assert all(m["env_id"] == "mine" for m in found if m["task"] == "count")
    assert found[-1]["task"] == "again"
    bad = RecordTrajectories(Counter(), store, metadata=lambda _: 3)  # type: ignore[arg-type,return-value]
    bad.reset()
    with pytest.raises(MetadataError, match="int"):
        bad.step(0)


def test_rewards_keep_one_dtype(store: Any) -> None:
    """Python ints and floats become float64; float32 of a vector environment joins a float64 column."""

    class Mixed(Counter):
        def step(self, action: Any) -> Any:
            observation, _, *rest = super().step(action)
            step = int(observation[2])
            return (observation, [1, 0.5, np.float32(0.25), True, np.int64(3)][step % 5], *rest)

    class Float32(SyncVectorEnv):
        def step(self, actions: Any) -> Any:
            observations, rewards, *rest = super().step(actions)
            return (observations, rewards.astype(np.float32), *rest)

    play(RecordTrajectories(Mixed(), store), 30)
    play(RecordTrajectories(Float32([Mixed, Mixed]), store), 30)
    store.flush()
    view = store.trajectories
    assert len(view) > 15
    for i in range(len(view)):
        found = column(view[i], "reward")
        assert found.dtype == np.float64
        expected = [[1, 0.5, 0.25, 1, 3][step % 5] for step in range(1, view[i].length + 1)]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("stack", [False, True])
def test_sequences_are_ragged_columns_where_the_schema_says_so(tmp_path: Any, stack: bool) -> None:
    class Growing(Counter):
        observation_space = spaces.Sequence(spaces.Box(0, 99, (2,), np.float32), stack=stack)

        def _observation(self) -> Any:
            rows = [np.full(2, self.state[2], np.float32) for _ in range(self.state[2])]
            return np.array(rows, np.float32).reshape(-1, 2) if stack else tuple(rows)

    raw = Growing(1)
    with trajstore.open(str(tmp_path / "store"), mode="a", schema=schema_of(raw)) as store:
        for env in (raw, SyncVectorEnv([lambda: Growing(1), lambda: Growing(2)])):
            play(RecordTrajectories(env, store), 12)
        store.flush()
        view = store.trajectories
        assert len(view) > 5
        for i in range(len(view)):
            found = column(view[i], "obs")
            assert len(found) == view[i].length + 1
            for step, rows in enumerate(found):
                np.testing.assert_array_equal(rows, np.full((step, 2), step, np.float32))


def test_import_without_gymnasium_says_what_to_install() -> None:
    code = "import sys; sys.modules['gymnasium'] = None; import trajstore.gym"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "ImportError" in result.stderr
    assert "pip install 'trajstore[gym]'" in result.stderr
