"""A store in a bucket does what a store on a disk does."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import trajstore
from tests.s3.trajectories import assert_holds, trajectory
from tests.support.s3_server import Refuse, Request
from trajstore.errors import StorageError, StoreExistsError, VersionNotFoundError
from trajstore.storage.remote import RemoteFilesystem

PART_BYTES = 16 << 20


def test_every_version_holds_what_it_held(anywhere):
    url, options = anywhere
    expected = [trajectory(seed, length=1 + seed) for seed in range(9)]
    with trajstore.open(url, "x", storage_options=options) as store:
        for n, tree in enumerate(expected, 1):
            store.append(tree, terminated=bool(n % 2), number=n)
            store.flush()
            assert store.version == n
    for version in range(len(expected) + 1):
        with trajstore.open(url, version=version, storage_options=options) as store:
            assert_holds(store.trajectories, expected[:version])
    with trajstore.open(url, storage_options=options) as store:
        assert store.version == len(expected)
        assert store.trajectories.to_pandas()["number"].tolist() == list(range(1, 10))
        assert store.trajectories.to_pandas()["terminated"].tolist() == [bool(n % 2) for n in range(1, 10)]
    with pytest.raises(VersionNotFoundError, match="no version 10; the latest is 9"):
        trajstore.open(url, version=10, storage_options=options)


def test_a_store_is_made_once(anywhere):
    url, options = anywhere
    with trajstore.open(url, "x", storage_options=options) as store:
        store.append(trajectory(0))
    with pytest.raises(StoreExistsError):
        trajstore.open(url, "x", storage_options=options)
    with trajstore.open(url, storage_options=options) as again:
        assert again.uuid == store.uuid
        assert_holds(again.trajectories, [trajectory(0)])


def test_two_handles_see_each_other_after_a_refresh(anywhere):
    url, options = anywhere
    with (
        trajstore.open(url, "a", storage_options=options) as one,
        trajstore.open(url, "a", storage_options=options) as two,
    ):
        one.append(trajectory(1))
        one.flush()
        two.append(trajectory(2))  # its handle knows nothing of the first
        two.flush()
        assert two.version == 2
        assert_holds(two.trajectories, [trajectory(1), trajectory(2)])
        assert_holds(one.trajectories, [trajectory(1)])
        assert one.refresh() == 2
        assert_holds(one.trajectories, [trajectory(1), trajectory(2)])


def test_a_streaming_episode_larger_than_a_part_is_uploaded_while_it_runs(s3, open_store):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2 * PART_BYTES // (512 * 512) + 9, 512, 512), np.uint8)  # it does not compress
    bounded = {"codec": "none", "spill_bytes": 4 << 20, "write_buffer_bytes": 4 << 20}
    with s3.recording() as log, open_store("x", **bounded) as store:
        with store.begin(task="film") as episode:
            for frame in frames[:-1]:
                episode.add(obs=frame, action=1)
            uploaded_before_the_end = sum(r.nbytes for r in log if r.is_multipart)
            episode.end(frames[-1], truncated=True)
        store.flush()

    assert uploaded_before_the_end >= PART_BYTES
    parts = [r for r in log if r.method == "PUT" and r.is_multipart]
    assert len(parts) >= 2
    assert sum(r.nbytes for r in parts) >= frames.nbytes
    assert not [r for r in log if r.is_multipart and "/segments/" not in r.key], "commits are one PUT each"
    with open_store() as store:
        found = store.trajectories[0]
        np.testing.assert_array_equal(found["obs"][:], frames)
        assert (found.length, found.truncated, found.metadata) == (len(frames) - 1, True, {"task": "film"})


def test_a_large_segment_is_read_back_from_ceph_and_moto_alike(anywhere):
    url, options = anywhere
    frames = np.random.default_rng(0).integers(0, 256, (90, 512, 512), np.uint8)  # two parts
    with trajstore.open(url, "x", codec="none", storage_options=options) as store:
        store.append({"frame": frames})
    with trajstore.open(url, storage_options=options) as store:
        np.testing.assert_array_equal(store.trajectories.read("frame"), frames)


def test_a_discarded_streaming_episode_leaves_no_upload_behind(s3, open_store, bucket):
    frame = np.random.default_rng(0).integers(0, 256, (512, 512), np.uint8)
    with open_store("x", codec="none", spill_bytes=4 << 20, write_buffer_bytes=4 << 20) as store:
        with s3.recording() as log:
            episode = store.begin()
            while not any(r.is_multipart and r.method == "PUT" for r in log):
                episode.add(obs=frame, action=1)
            episode.discard()
        store.append({"obs": np.stack([frame, frame]), "action": [1]})
    client = s3.client()
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)
    client.close()
    assert len(open_store().trajectories) == 1


def add_for_ever(episode: trajstore.Episode, frame: np.ndarray) -> None:
    for n in itertools.count():
        episode.add(obs=frame, action=n)


def test_a_streaming_episode_whose_upload_is_refused_is_an_error_and_the_store_goes_on(s3, open_store, impatient):
    frame = np.random.default_rng(0).integers(0, 256, (512, 512), np.uint8)
    bounded = {"codec": "none", "spill_bytes": 4 << 20, "write_buffer_bytes": 4 << 20}
    with open_store("x", storage_options=impatient, **bounded) as store:
        store.append({"obs": np.stack([frame, frame]), "action": [1]})
        store.flush()
        with s3.failing(lambda request: Refuse(403, "AccessDenied") if request.is_multipart else None):
            episode = store.begin()
            with pytest.raises(PermissionError):  # aborting the upload is refused as well
                add_for_ever(episode, frame)
        episode.discard()
        store.append({"obs": np.stack([frame, frame]), "action": [2]})
        store.flush()
    np.testing.assert_array_equal(open_store().trajectories.read("action"), [1, 2])


def test_the_conditional_put_of_a_commit_is_one_put_whatever_its_size(s3, open_store):
    with open_store("x") as store:
        filesystem: Any = store._filesystem
        assert isinstance(filesystem, RemoteFilesystem)
        data = bytes(60 << 20)  # s3fs goes over to multipart at 100 MB, or at twice its chunk size
        with s3.recording() as log:
            assert filesystem.create("snapshots/large", data)
            assert not filesystem.create("snapshots/large", data[:-1])
    assert [(r.method, r.if_none_match, r.is_multipart, r.status) for r in log if r.method == "PUT"] == [
        ("PUT", "*", False, 200),
        ("PUT", "*", False, 412),
    ]


def test_what_fails_in_the_background_is_raised_by_the_next_call_and_later_appends_land(
    s3, open_store, impatient, bucket
):
    with open_store("x", storage_options=impatient, commit_interval_s=0.01) as store:
        store.append(trajectory(0))
        store.flush()

        def deny(request: Request) -> Refuse | None:
            return Refuse(403, "AccessDenied") if request.method == "PUT" else None

        with s3.failing(deny):
            store.append(trajectory(1))  # committed in the background at once
            with pytest.raises(StorageError, match=r"1 trajector.* not in the store") as raised:
                store.flush()
        assert isinstance(raised.value, PermissionError)

        store.append(trajectory(2))
        store.flush()
    assert_holds(open_store().trajectories, [trajectory(0), trajectory(2)])


def test_closing_raises_what_failed(s3, open_store, impatient):
    store = open_store("x", storage_options=impatient)
    store.append(trajectory(0))
    with (
        s3.failing(lambda request: Refuse(403, "AccessDenied")),
        pytest.raises(StorageError, match="injected by the test"),
    ):
        store.close()
    assert len(open_store().trajectories) == 0


def test_objects_are_listed_under_the_store_alone(s3, open_store, bucket):
    with open_store("x") as store:
        store.append(trajectory(0))
    client = s3.client()
    client.put_object(Bucket=bucket, Key="runs/demonstration", Body=b"another's")
    found = {o["Key"]: o["Size"] for o in client.list_objects_v2(Bucket=bucket, Prefix="runs/demo/")["Contents"]}
    client.close()
    listed = {f"runs/demo/{o.key}": o.nbytes for o in open_store()._filesystem.list_objects("")}
    assert listed == found
