"""The store as users hold it: group commit, streaming, time travel, handles."""

import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pandas as pd
import pytest
import torch

import trajstore
from trajstore import Column


def trajectory(length, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "obs": {
            "image": rng.integers(0, 256, (length + 1, 8, 8, 3), np.uint8),
            "state": rng.normal(size=(length + 1, 3)),
        },
        "action": rng.integers(0, 4, length),
        "reward": rng.normal(size=length).astype(np.float32),
    }


def same(stored, given):
    return all(
        np.array_equal(stored[path][:], value)
        for path, value in {
            "obs/image": given["obs"]["image"],
            "obs/state": given["obs"]["state"],
            "action": given["action"],
            "reward": given["reward"],
        }.items()
    )


@pytest.fixture(params=["local", "memory"])
def url(request, tmp_path):
    return str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path}"


def test_nobody_else_sees_anything_before_the_commit_and_all_of_it_after(url):
    with trajstore.open(url, "a") as store, trajstore.open(url) as other:
        refs = [store.append(trajectory(5, seed), number=seed) for seed in range(3)]
        assert (len(other.trajectories), store.pending, store.version) == (0, 3, 0)
        assert [ref.id for ref in refs] == [None] * 3
        store.flush()
        assert (other.refresh(), len(other.trajectories)) == (1, 3)
        assert (len(store.trajectories), store.pending, store.version) == (3, 0, 1)
        assert [ref.id for ref in refs] == [0, 1, 2]
        assert [t.uuid for t in store.trajectories] == [ref.uuid for ref in refs]
        assert all(same(t, trajectory(5, seed)) for seed, t in enumerate(store.trajectories))


def test_flush_with_nothing_new_makes_no_version(url):
    with trajstore.open(url, "a") as store:
        store.flush()
        assert store.version == 0
        store.append(trajectory(2))
        store.flush()
        store.flush()
        assert store.version == 1
    with trajstore.open(url, "a"):
        pass
    assert trajstore.open(url).version == 1


def test_the_background_commits_on_its_own_by_time_and_by_size(url):
    with trajstore.open(url, "a", commit_interval_s=0.05) as store:
        store.append(trajectory(5))
        wait_until(lambda: store.pending == 0)
        assert store.version == 1
    with trajstore.open(url, "a", segment_bytes=10_000) as store:
        for seed in range(10):  # 10 trajectories of 8 kB
            store.append(trajectory(40, seed))
        wait_until(lambda: store.pending <= 1)
        assert store.version >= 3


def wait_until(condition, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_close_flushes_and_may_be_called_twice(url):
    store = trajstore.open(url, "a")
    store.append(trajectory(5))
    store.close()
    store.close()
    assert len(trajstore.open(url).trajectories) == 1
    for use in (
        lambda: store.append(trajectory(5)),
        lambda: store.trajectories,
        store.flush,
        store.begin,
        store.refresh,
    ):
        with pytest.raises(trajstore.ClosedError, match="closed"):
            use()


def test_an_exception_in_the_block_keeps_what_was_appended(url):
    def interrupted():
        with trajstore.open(url, "a") as store:
            store.append(trajectory(5))
            raise ZeroDivisionError

    pytest.raises(ZeroDivisionError, interrupted)
    assert len(trajstore.open(url).trajectories) == 1


def test_a_store_that_nobody_closed_is_flushed_when_the_interpreter_exits(tmp_path):
    code = f"""
        import numpy as np, trajstore
        store = trajstore.open({str(tmp_path / "store")!r}, "a")
        store.append({{"action": np.arange(1000), "frame": np.zeros((1000, 64, 64), np.uint8)}})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)
    assert trajstore.open(tmp_path / "store").trajectories[0].length == 1000


def test_time_travel(url):
    with trajstore.open(url, "a") as store:
        for seed in range(4):
            store.append(trajectory(seed + 1, seed), number=seed)
            store.flush()
        history = store.versions()
    assert history.index.tolist() == [4, 3, 2, 1]
    assert history["trajectories"].tolist() == [4, 3, 2, 1]
    assert history["created_at"].is_monotonic_decreasing
    assert isinstance(history, pd.DataFrame)
    for version in range(5):
        with trajstore.open(url, version=version) as store:
            assert (store.version, store.trajectories.lengths.tolist()) == (version, list(range(1, version + 1)))
    with pytest.raises(trajstore.VersionNotFoundError, match="no version 9; the latest is 4"):
        trajstore.open(url, version=9)


def test_a_reader_stays_at_its_version_until_it_is_refreshed(url):
    with trajstore.open(url, "a") as writer:
        writer.append(trajectory(1))
        writer.flush()
        with trajstore.open(url) as reader:
            view = reader.trajectories
            writer.append(trajectory(2))
            writer.flush()
            assert (reader.version, len(reader.trajectories)) == (1, 1)
            assert reader.refresh() == 2
            assert (len(reader.trajectories), len(view)) == (2, 1)


def test_two_handles_share_one_schema(url):
    with trajstore.open(url, "a") as one, trajstore.open(url, "a") as two:
        one.append({"x": np.zeros(3)}, k=1)
        two.append({"x": np.zeros(3)}, k=2, new="a")
        one.flush()
        two.flush()
        one.append({"x": np.ones(2)}, new="b")
        one.flush()
        frame = trajstore.open(url).trajectories.to_pandas()
        assert frame["k"].isna().tolist() == [False, False, True]
        assert frame["new"].tolist()[1:] == ["a", "b"]


def test_the_loser_of_a_schema_race_is_told_and_can_go_on(url):
    with trajstore.open(url, "a") as one, trajstore.open(url, "a") as two:
        one.append({"x": np.zeros(3)})
        two.append({"x": np.zeros(3, np.float32)})
        two.append({"x": np.zeros(3, np.float32)})
        one.flush()
        with pytest.raises(trajstore.SchemaConflictError, match=r"'x'.*float64.*float32.*2 trajectories"):
            two.flush()
        assert two.pending == 0
        two.append({"x": np.ones(3)})
        two.flush()
    assert trajstore.open(url).trajectories.lengths.tolist() == [3, 3]


def test_optional_columns_can_be_added_to_a_store(url):
    with trajstore.open(url, "a") as store:
        store.append({"x": np.zeros(3)})
    with trajstore.open(url, "a", schema=[Column(path="y", dtype="int64", presence="optional")]) as store:
        with pytest.raises(trajstore.SchemaConflictError, match="'x'"):
            trajstore.open(url, "a", schema=[Column(path="x", dtype="int8")])
        store.append({"x": np.ones(2), "y": np.arange(2)})
        store.append({"x": np.ones(4)})
    with trajstore.open(url) as store:
        view = store.trajectories
        assert [t.columns for t in view] == [("x",), ("x", "y"), ("x",)]
        assert [c.path for c in view.common_columns] == ["x"]
        assert view[1]["y"][:].tolist() == [0, 1]
        assert "y" not in view[0]
        assert list(view.sample(4)) == ["x"]
        with pytest.raises(trajstore.SelectionError, match="'y' is lacking from 2 of 3"):
            view.sample(4, columns=["y"])
        with pytest.raises(trajstore.UnknownColumnError, match="'y'"):
            view[2]["y"]


def test_one_handle_takes_appends_of_many_threads(url):
    with trajstore.open(url, "a", segment_bytes=200_000, commit_interval_s=0.02) as store:

        def work(thread):
            for number in range(20):
                store.append(trajectory(5, 100 * thread + number), seed=100 * thread + number)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    with trajstore.open(url) as store:
        seeds = [t.metadata["seed"] for t in store.trajectories]
        assert sorted(seeds) == sorted(100 * t + n for t in range(6) for n in range(20))
        assert all(same(t, trajectory(5, t.metadata["seed"])) for t in store.trajectories)


def test_an_appended_array_may_be_changed_at_once(url):
    with trajstore.open(url, "a") as store:
        given = trajectory(50)
        copy = trajectory(50)
        store.append(given)
        for leaf in (given["obs"]["image"], given["obs"]["state"], given["action"], given["reward"]):
            leaf[:] = 0
    assert same(trajstore.open(url).trajectories[0], copy)


def test_tensors_in_tensors_out(url):
    given = {
        "x": torch.randn(6, 2, dtype=torch.bfloat16),
        "y": torch.randn(5, requires_grad=True),
        "z": torch.zeros(5).bool(),
    }
    with trajstore.open(url, "a") as store:
        store.append(given)
        store.flush()
        assert store.schema["x"].extra == 1
        batch = store.trajectories.sample(32, seed=0)
        assert {name: value.dtype for name, value in batch.items()} == {
            "x": torch.bfloat16,
            "y": torch.float32,
            "z": torch.bool,
        }
        assert torch.equal(store.trajectories[0]["x"][:], given["x"])


@pytest.mark.parametrize("codec", [None, "fast", "small", "none"])
def test_codec_presets(tmp_path, codec):
    with trajstore.open(tmp_path / "store", "a", codec=codec) as store:
        store.append(trajectory(300))
    with trajstore.open(tmp_path / "store") as store:
        assert same(store.trajectories[0], trajectory(300))
        usage = store.usage()
    image, state = usage.objects["obs/image"], usage.objects["obs/state"]
    assert (image.codec, state.codec) == {
        None: ("zstd", "lz4-shuffle"),
        "fast": ("lz4", "lz4-shuffle"),
        "small": ("zstd-high", "zstd-high-shuffle"),
        "none": ("none", "none"),
    }[codec]
    assert image.logical_bytes == 301 * 8 * 8 * 3


def test_a_streaming_episode_is_on_disk_before_its_end(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    with trajstore.open(tmp_path / "store", "a", spill_bytes=1 << 20) as store:
        with store.begin(task="long") as episode:
            for step in range(2000):  # 25 MB of noise
                episode.add(obs=frame + np.uint8(step % 256), action=step, reward=1)
            wait_until(lambda: stored_bytes(tmp_path / "store") > 10_000_000)
            assert len(store.trajectories) == 0
            ref = episode.end(frame, truncated=True)
        store.append({"obs": np.zeros((2, 64, 64, 3), np.uint8), "action": [1], "reward": [0]}, task="short")
        store.flush()
        long, short = store.trajectories
        assert (long.uuid, long.length, long.reward_sum, long.truncated) == (ref.uuid, 2000, 2000.0, True)
        assert np.array_equal(long["obs"][1234], frame + np.uint8(1234 % 256))
        assert np.array_equal(long["obs"][-1], frame)
        assert (short.length, short.metadata) == (1, {"task": "short"})


def stored_bytes(folder):
    return sum(os.stat(os.path.join(f, n)).st_size for f, _, names in os.walk(folder) for n in names)


def test_an_episode_that_is_left_by_an_exception_is_discarded(url):
    with trajstore.open(url, "a", spill_bytes=100) as store:

        def begun(error):
            with store.begin() as episode:
                episode.add(obs=np.zeros(100), action=0)
                episode.add(obs=np.zeros(100), action=0)
                if error:
                    raise error

        pytest.raises(ZeroDivisionError, begun, ZeroDivisionError)
        with pytest.raises(trajstore.ClosedError, match="neither ended nor discarded"):
            begun(None)
        store.flush()
        assert store.version == 0


def test_a_refused_step_leaves_the_episode_as_it_was(url):
    with trajstore.open(url, "a") as store:
        episode = store.begin()
        episode.add(obs=np.zeros(3, np.float32), action=0)
        for wrong in (
            {"obs": np.zeros(3, np.float32)},
            {"obs": np.zeros(4, np.float32), "action": 1},
            {"obs": np.zeros(3, np.float64), "action": 1},
            {"obs": np.zeros(3, np.float32), "action": 1, "more": 2},
        ):
            with pytest.raises(trajstore.SchemaError):
                episode.add(**wrong)
        episode.add(obs=np.ones(3, np.float32), action=1)
        with pytest.raises(trajstore.LengthError):
            episode.end(final={"action": 3, "obs": np.ones(3, np.float32)})
        with pytest.raises(trajstore.UnknownColumnError, match="'none'"):
            episode.end(final={"none": 1})
        episode.end(np.full(3, 2, np.float32))
        store.flush()
        assert store.trajectories[0]["obs"][:, 0].tolist() == [0, 1, 2]
        assert store.trajectories[0]["action"][:].tolist() == [0, 1]
        episode = store.begin()
        episode.add(obs=np.zeros(3, np.float32), action=0)
        with pytest.raises(trajstore.LengthError, match="final row is missing"):
            episode.end()
        episode.end(np.zeros(3, np.float32))


STREAM = """
import resource, sys
import numpy as np
import trajstore

steps, url = int(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(0)
frames = rng.integers(0, 255, (64, 64, 64, 3), np.uint8)
frames[:, 20:, :, :] = 7  # as compressible as a game's
with trajstore.open(url, "a") as store:
    store.append({"obs": frames[:9], "action": np.arange(8), "reward": np.ones(8)})
    store.flush()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with store.begin() as episode:
        for step in range(steps):
            episode.add(obs=frames[step % 64], action=step, reward=1.0)
        episode.end(frames[steps % 64])
    store.flush()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    stored = store.trajectories[1]
    assert (stored.length, stored.reward_sum) == (steps, steps)
    for step in rng.integers(0, steps, 20).tolist():
        assert np.array_equal(stored["obs"][step], frames[step % 64])
        assert stored["action"][step] == step
    assert np.array_equal(stored["obs"][-1], frames[steps % 64])
print(grown // 1024)
"""


@pytest.mark.parametrize(
    "steps",
    [60_000, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_an_episode_of_any_length_takes_bounded_memory(tmp_path, steps):
    command = [sys.executable, "-c", STREAM, str(steps), str(tmp_path / "store")]
    grown_mib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert steps * 64 * 64 * 3 > 700 * 2**20
    assert grown_mib < 400
