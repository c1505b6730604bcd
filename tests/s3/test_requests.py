"""How many requests the store makes, and how many of them wait for one another.

Counted are the requests that reach the server, tries that failed included. Round trips are the longest chain of requests
each of which was sent after the answer to the one before; the server takes long enough for that to be measured.
"""

from __future__ import annotations

import math
import uuid

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import trajstore
from tests.s3.trajectories import NESTED_GROUPS, TENSOR_COLUMNS, assert_holds, trajectory
from tests.support.s3_server import RequestLog
from trajstore.storage.tiers import merge_from

LATENCY_S = 0.25
COMMIT_LIMIT = 7 + 2 * TENSOR_COLUMNS + NESTED_GROUPS


def test_opening_a_store_written_in_one_go_takes_six_requests_in_three_round_trips(s3, open_store):
    expected = [trajectory(seed) for seed in range(12)]
    with open_store("x") as store:
        for tree in expected:
            store.append(tree, terminated=True, task="pick")

    with s3.recording(latency_s=LATENCY_S) as log:
        store = open_store()
        assert len(store.trajectories) == 12

    assert len(log) <= 6, str(log)
    assert log.round_trips() <= 3, str(log)
    assert log.by_method()["GET"] == len(log), str(log)
    assert_holds(store.trajectories, expected)


def test_opening_by_tag_takes_one_request_more_than_by_number(s3, open_store):
    with open_store("x") as store:
        for seed in range(5):
            store.append(trajectory(seed, length=1))
            store.flush()
        store.tag("best", 3)

    with s3.recording() as by_number:
        assert open_store(version=3).version == 3
    with s3.recording() as by_tag:
        store = open_store(version="best")

    assert store.version == 3
    assert len(by_tag) <= len(by_number) + 1, str(by_tag)
    assert_holds(store.trajectories, [trajectory(seed, length=1) for seed in range(3)])


def test_a_store_whose_hint_was_never_written_opens_in_few_requests(s3, open_store, bucket):
    with open_store("x") as store:
        for seed in range(20):
            store.append(trajectory(seed, length=1))
            store.flush()
    s3.client().delete_object(Bucket=bucket, Key="runs/demo/snapshots/LATEST")

    with s3.recording() as log:
        assert open_store().version == 20

    assert len(log) <= 2 + 2 * math.log2(20) + 2, str(log)  # gallop up, bisect down


@pytest.fixture(scope="module")
def commit_logs(s3) -> list[RequestLog]:
    """The requests of each of 40 commits of one trajectory through one handle; creating the store is not among them."""
    name = f"bucket-{uuid.uuid4().hex}"
    s3.make_bucket(name)
    logs = []
    with trajstore.open(f"s3://{name}/demo", "x", storage_options=s3.storage_options()) as store:
        for seed in range(20):
            with s3.recording() as log:
                store.append(trajectory(seed), terminated=True, task="pick")
                store.flush()
            logs.append(log)
    return logs


def test_no_commit_of_one_trajectory_takes_more_requests_than_allowed(commit_logs):
    for log in commit_logs:
        assert len(log) <= COMMIT_LIMIT, str(log)
        assert log.by_method()["PUT"] == len(log), str(log)


def test_commits_that_merge_manifests_are_among_them(commit_logs):
    merging = [log for log in commit_logs if sum(key.startswith("demo/manifests/") for key in log.keys("PUT")) == 2]
    assert len(merging) >= 3
    assert all(len(log) <= COMMIT_LIMIT for log in merging)


def test_a_commit_without_any_tensor_column_and_closing_take_six_requests(s3, open_store):
    with open_store("x") as store, s3.recording() as log:
        store.append({"reward": [1.0, 2.0]})
        store.flush()
    # Group metadata, page index, steps, manifest, snapshot; the hint.
    assert len(log) <= 6, str(log)


def test_a_commit_through_a_fresh_handle_costs_one_request_more_for_each_manifest_that_it_merges(s3, open_store):
    most_read = 0
    for seed in range(12):
        with open_store("a") as store, s3.recording() as log:
            store.append(trajectory(seed))
            store.flush()
        read = log.keys("GET")
        most_read = max(most_read, len(read))
        assert all("/manifests/" in key for key in read), str(log)
        assert len(log) - len(read) <= COMMIT_LIMIT, str(log)
    assert most_read > 0
    assert len(open_store().trajectories) == 12


def test_a_commit_takes_at_most_four_round_trips(s3, open_store):
    with open_store("x") as store:
        for seed in range(7):
            with s3.recording(latency_s=0.1) as log:
                store.append(trajectory(seed))
                store.flush()
            # Segment and manifest; a merged manifest; the snapshot; the hint.
            assert log.round_trips() <= 4, str(log)


def test_a_column_of_one_trajectory_is_one_get_of_the_page_index_and_one_per_page_run(s3, open_store):
    expected = [trajectory(seed, length=50) for seed in range(20)]
    with open_store("x") as store:
        for tree in expected:
            store.append(tree)
    store = open_store()
    found = store.trajectories[7]

    with s3.recording() as log:
        np.testing.assert_array_equal(found["obs/image"][:], expected[7]["obs"]["image"])
    assert [r.key.rsplit("/", 1)[1] for r in log] == ["pages.arrow", "c.0.0.0.0"], str(log)
    assert log[0].range is None
    assert log[1].range is not None
    assert log.by_method() == {"GET": 2}

    with s3.recording() as log:  # the page index is at hand now
        np.testing.assert_array_equal(found["reward"][:], expected[7]["reward"])
    assert [r.method for r in log] == ["GET"], str(log)
    assert log[0].range is not None


def test_page_runs_far_apart_are_one_get_each_and_in_parallel(s3, open_store):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (64, 128, 128, 3), np.uint8)  # 48 KB each: it does not compress
    with open_store("x", codec="none") as store:
        store.append({"image": frames})
    column = open_store().trajectories[0]["image"]

    column[0]  # the page index is at hand now
    with s3.recording(latency_s=LATENCY_S) as log:
        np.testing.assert_array_equal(column[3:60], frames[3:60])
    assert log.by_method() == {"GET": 1}, str(log)
    assert log.round_trips() == 1


def test_reading_everything_sends_no_head(s3, open_store):
    expected = [trajectory(seed) for seed in range(5)]
    with open_store("x") as store:
        for tree in expected:
            store.append(tree, task="pick")
            store.flush()

    with s3.recording() as log:
        store = open_store()
        assert_holds(store.trajectories, expected)
        store.trajectories.to_pandas()
        store.trajectories.sample(16, seed=0)

    assert set(log.by_method()) == {"GET"}, str(log)
    assert len(log.keys("GET")) == len(log)

    with s3.recording() as log:
        assert len(store.versions()) == 5
    assert log.by_method()["HEAD"] <= 1, str(log)  # where no version is tagged, the folder of tags is asked for


def test_a_window_sampler_reads_each_page_run_with_one_get(s3, open_store):
    with open_store("x") as store:
        for seed in range(8):
            store.append(trajectory(seed, length=30))
    view = open_store().trajectories
    view.sample(1, seed=0)

    with s3.recording() as log:
        view.sample(64, seed=1, columns=["action"])
    assert log.by_method()["HEAD"] == 0
    assert len(log) <= 64, str(log)


def commit_many(commits: int) -> tuple[list[int], trajstore.Store]:
    """How many manifests each version has, of so many commits of one step."""
    url = f"memory://{uuid.uuid4().hex}/store"
    counts = []
    with trajstore.open(url, "x") as store:
        for n in range(commits):
            store.append({"reward": np.array([float(n)])})
            store.flush()
            counts.append(len(store._history.load(n + 1).snapshot.manifests))
    return counts, trajstore.open(url)


def test_the_number_of_manifests_stays_logarithmic():
    counts, store = commit_many(600)
    with store:
        assert all(count <= 4 + 4 * math.log(n, 4) for n, count in enumerate(counts, 1)), max(counts)
        np.testing.assert_array_equal(store.trajectories.read("reward"), np.arange(600.0))
    MemoryFileSystem.store.clear()


@pytest.mark.slow
def test_ten_thousand_commits_leave_at_most_thirty_manifests():
    counts, store = commit_many(10_000)
    with store:
        assert max(counts) <= 30
        view = store.trajectories
        assert view.ids.tolist() == list(range(10_000))
        np.testing.assert_array_equal(view.take(range(0, 10_000, 100)).read("reward"), np.arange(0.0, 10_000, 100))
    MemoryFileSystem.store.clear()


def test_the_plan_of_merging_leaves_at_most_thirty_manifests_after_ten_thousand_commits():
    rows: list[int] = []
    most = 0
    for _ in range(10_000):
        first = merge_from(rows)  # what a commit does before it adds its own
        if first is not None:
            rows[first:] = [sum(rows[first:])]
        rows.append(1)
        most = max(most, len(rows))
    assert sum(rows) == 10_000
    assert most <= 30
