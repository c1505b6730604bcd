"""A bucket that is not there, refuses, forgets to answer, or does not do what it says."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest
import s3fs
from fsspec.registry import _registry

import trajstore
from tests.s3.trajectories import assert_holds, trajectory
from tests.support.rare import also_slow
from tests.support.s3_server import Fault, Hang, IgnoreCondition, LoseReply, Refuse, Request
from trajstore.errors import (
    CommitOutcomeUnknownError,
    MissingObjectError,
    StorageError,
    StoragePermissionError,
    StorageTimeoutError,
    StoreExistsError,
    StoreNotFoundError,
    UnsupportedStorageError,
)

Spoil = Callable[[Request], Fault | None]

TROUBLES = {
    "conflict": Refuse(409, "ConditionalRequestConflict"),
    "slow down": Refuse(503, "SlowDown"),
    "too many": Refuse(429, "TooManyRequests"),
    "internal error": Refuse(500, "InternalError"),
    "done and error": LoseReply(500),
    "done and gone": LoseReply(),
}


def nth_put(n: int, fault: Fault) -> Spoil:
    """The fault at the n-th PUT, counted from 0."""
    puts = itertools.count()
    return lambda request: fault if request.method == "PUT" and next(puts) == n else None


def commits(fault: Fault) -> Spoil:
    """The fault at every PUT of a version."""
    return lambda request: fault if request.method == "PUT" and request.key.endswith(".json") and "/snapshots/" in (
        request.key
    ) else None  # fmt: skip


def is_conditional(request: Request) -> bool:
    return request.if_none_match is not None


class TestNoBucket:
    URL = "s3://no-such-bucket/runs/demo"

    def test_there_is_no_store_to_read(self, options):
        with pytest.raises(StoreNotFoundError, match=r"no-such-bucket.*check the path or bucket"):
            trajstore.open(self.URL, storage_options=options)

    @pytest.mark.parametrize("mode", ["a", "x"])
    def test_there_is_nowhere_to_make_one(self, options, mode):
        with pytest.raises(MissingObjectError, match=r"no-such-bucket.*check that the bucket exists"):
            trajstore.open(self.URL, mode, storage_options=options)

    def test_one_that_goes_away_is_an_error_at_the_next_flush(self, s3, bucket, open_store):
        store = open_store("x")
        with s3.failing(lambda request: Refuse(404, "NoSuchBucket")):
            store.append(trajectory(0))
            with pytest.raises(MissingObjectError, match="1 trajector"):
                store.flush()


@pytest.mark.parametrize("mode", ["r", "a", "x"])
class TestNoAccess:
    @pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken"])
    def test_wrong_credentials_are_named_at_once(self, s3, open_store, mode, code):
        with (
            s3.recording() as log,
            s3.failing(lambda request: Refuse(403, code, f"about {code}")),
            pytest.raises(StoragePermissionError, match=rf"about {code}.*check the credentials"),
        ):
            open_store(mode)
        assert len(log) <= 2, str(log)

    def test_no_credentials_at_all(self, s3, bucket, mode, monkeypatch, tmp_path):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
        options = s3.storage_options()
        del options["key"], options["secret"]
        with pytest.raises(StoragePermissionError, match=r"credentials"):
            trajstore.open(f"s3://{bucket}/demo", mode, storage_options=options)

    @pytest.mark.ceph
    @pytest.mark.parametrize("wrong", [{"key": "another"}, {"secret": "another"}])
    def test_ceph_checks_credentials(self, ceph_url, mode, wrong):
        options = {"endpoint_url": ceph_url, "key": "AK", "secret": "SKSKSKSK", **wrong}
        with pytest.raises(StoragePermissionError, match="check the credentials"):
            trajstore.open("s3://bucket/demo", mode, storage_options=options)


class TestNoClient:
    def test_a_missing_s3fs_is_named_with_how_to_install_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "s3fs", None)
        monkeypatch.delitem(_registry, "s3", raising=False)
        with pytest.raises(StorageError, match=r"pip install 'trajstore\[s3\]'"):
            trajstore.open("s3://bucket/demo")

    def test_an_unknown_protocol_is_named(self):
        with pytest.raises(StorageError, match="no-such-protocol"):
            trajstore.open("no-such-protocol://bucket/demo")

    def test_an_option_that_the_client_does_not_know_is_an_error(self, options):
        with pytest.raises(Exception, match="colour"):
            trajstore.open("s3://bucket/demo", storage_options={**options, "colour": "red"})


class TestNoConditionalPut:
    """A server that takes If-None-Match and overwrites all the same."""

    @pytest.fixture(autouse=True)
    def ignoring(self, s3):
        with s3.failing(lambda request: IgnoreCondition()):
            yield

    @pytest.mark.parametrize("mode", ["a", "x"])
    def test_no_store_is_made_and_nothing_looks_like_one(self, open_store, bucket, s3, mode):
        for _ in range(2):
            with pytest.raises(UnsupportedStorageError, match=r"If-None-Match.*single_writer=True"):
                open_store(mode)
        with pytest.raises(StoreNotFoundError):
            open_store("r")
        client = s3.client()
        keys = [o["Key"] for o in client.list_objects_v2(Bucket=bucket)["Contents"]]
        client.close()
        assert keys == ["runs/demo/snapshots/LATEST"]

    def test_the_place_can_be_used_once_the_server_honours_the_condition(self, open_store, s3):
        with pytest.raises(UnsupportedStorageError):
            open_store("a")
        s3.fault = lambda request: None
        with open_store("a") as store:
            store.append(trajectory(0))
        assert_holds(open_store().trajectories, [trajectory(0)])

    def test_a_store_that_is_there_is_not_replaced(self, open_store, s3):
        s3.fault = lambda request: None
        with open_store("x") as store:
            store.append(trajectory(0))
        s3.fault = lambda request: IgnoreCondition()
        with pytest.raises(UnsupportedStorageError):
            open_store("x")
        again = open_store()
        assert again.uuid == store.uuid
        assert_holds(again.trajectories, [trajectory(0)])

    def test_a_single_writer_may(self, open_store):
        with open_store("a", single_writer=True) as store:
            store.append(trajectory(0))
        assert_holds(open_store().trajectories, [trajectory(0)])


class TestUnknownCondition:
    """A server that refuses the header."""

    @pytest.fixture(autouse=True)
    def refusing(self, s3):
        with s3.failing(lambda request: Refuse(501, "NotImplemented") if is_conditional(request) else None):
            yield

    def test_it_cannot_be_used_by_many(self, open_store, s3, bucket):
        with pytest.raises(UnsupportedStorageError, match=r"If-None-Match.*single_writer=True"):
            open_store("a")
        client = s3.client()
        assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0
        client.close()

    def test_a_single_writer_may(self, open_store):
        with open_store("x", single_writer=True) as store:
            store.append(trajectory(0))
            store.flush()
            store.append(trajectory(1))
        assert_holds(open_store().trajectories, [trajectory(0), trajectory(1)])
        with pytest.raises(StoreExistsError):
            open_store("x", single_writer=True)


@pytest.mark.parametrize("trouble", also_slow(TROUBLES, ["conflict", "done and gone"]))
class TestTrouble:
    def test_at_any_put_of_a_commit_costs_nothing(self, s3, open_store, impatient, trouble):
        spoilt = 0
        with open_store("x", storage_options=impatient) as store:
            for n in itertools.count(list(TROUBLES).index(trouble) % 2, 2):
                store._history._hinted_at = float("-inf")  # each commit writes the hint, so each has the same PUTs
                with s3.recording() as log, s3.failing(nth_put(n, TROUBLES[trouble])):
                    store.append({"reward": np.array([float(spoilt)])})
                    store.flush()
                if log.by_method()["PUT"] <= n:
                    break
                spoilt += 1
        assert spoilt >= 3
        with open_store() as store:
            assert store.version == spoilt + 1
            np.testing.assert_array_equal(store.trajectories.read("reward"), np.arange(spoilt + 1.0))

    def test_when_the_client_repeats_its_own_landed_put_the_append_lands_once(self, s3, open_store, trouble):
        with open_store("x") as store:  # botocore as it comes: it tries up to five times
            with s3.recording() as log, s3.failing(once(is_version, TROUBLES[trouble])):
                ref = store.append(trajectory(0))
                store.flush()
            assert ref.id == 0
        assert sum(map(is_version, log)) >= 2, str(log)
        with open_store() as store:
            assert store.version == 1
            assert_holds(store.trajectories, [trajectory(0)])

    def test_at_any_read_costs_nothing(self, s3, open_store, impatient, trouble):
        expected = [trajectory(seed) for seed in range(2)]
        with open_store("x") as store:
            for tree in expected:
                store.append(tree)
        fault = TROUBLES[trouble]
        for n in itertools.count(list(TROUBLES).index(trouble) % 3, 3):  # all of them together meet each request twice
            gets = itertools.count()

            def spoil(request: Request, n: int = n, gets=gets) -> Fault | None:
                return fault if next(gets) == n else None

            with s3.recording() as log, s3.failing(spoil), open_store(storage_options=impatient) as store:
                assert_holds(store.trajectories, expected)
            if len(log) <= n:
                break
        assert n >= 8


def is_version(request: Request) -> bool:
    return request.method == "PUT" and "/snapshots/0" in request.key


def once(which: Callable[[Request], bool], fault: Fault) -> Spoil:
    """The fault at the first such request."""
    left = [fault]
    return lambda request: left.pop() if left and which(request) else None


def test_a_commit_that_lost_its_reply_and_then_the_race_is_found_to_be_ours(s3, open_store, impatient):
    """Another writer has gone on from our landed version before we ask what became of it."""
    with open_store("x", storage_options=impatient) as store, open_store("a") as rival:

        def overtake(request: Request) -> Fault | None:
            if is_version(request) and request.key.endswith("1.json"):
                return LoseReply()
            return None

        with s3.failing(overtake):
            store.append(trajectory(0))
            store.flush()
        rival.append(trajectory(1))
        rival.flush()
        store.append(trajectory(2))
        store.flush()
    with open_store() as store:
        assert store.version == 3
        assert_holds(store.trajectories, [trajectory(seed) for seed in range(3)])


def test_a_commit_whose_outcome_stays_unknown_says_so(s3, open_store, impatient):
    with open_store("x", storage_options=impatient) as store:

        def deaf(request: Request) -> Fault | None:
            if is_version(request):
                return LoseReply()  # it lands
            return Refuse(503, "SlowDown") if request.method == "GET" else None

        with s3.failing(deaf):
            ref = store.append(trajectory(0))
            with pytest.raises(CommitOutcomeUnknownError, match=r"may or may not be in the store"):
                store.flush()
        store.append(trajectory(1))
        store.flush()
    found = open_store().trajectories
    assert found[0].uuid == ref.uuid
    assert_holds(found, [trajectory(0), trajectory(1)])


class TestHang:
    """A server that takes requests and never answers. How long a request may take is the caller's: s3fs's read_timeout."""

    @pytest.fixture
    def hasty(self, s3):
        return s3.storage_options(config_kwargs={"read_timeout": 0.3, "retries": {"max_attempts": 0}})

    def test_reading_ends_with_an_error(self, s3, open_store, hasty):
        open_store("x").close()
        begun = time.monotonic()
        with s3.failing(lambda request: Hang()), pytest.raises(StorageTimeoutError, match="no answer in time"):
            open_store(storage_options=hasty)
        assert time.monotonic() - begun < 30

    def test_a_commit_ends_with_an_error_of_unknown_outcome(self, s3, open_store, hasty):
        with open_store("x", storage_options=hasty) as store:
            store.append(trajectory(0))
            begun = time.monotonic()
            with (
                s3.failing(lambda request: Hang() if is_version(request) else None),
                pytest.raises(CommitOutcomeUnknownError),
            ):
                store.flush()
            assert time.monotonic() - begun < 30

    def test_a_flush_with_a_limit_waits_no_longer_and_the_commit_goes_on(self, s3, open_store):
        with open_store("x") as store:
            with s3.failing(lambda request: Hang() if is_version(request) else None):
                store.append(trajectory(0))
                with pytest.raises(StorageTimeoutError, match="goes on in the background"):
                    store.flush(timeout_s=0.2)
            store.flush()
        assert_holds(open_store().trajectories, [trajectory(0)])


def test_a_server_that_keeps_refusing_is_an_error_and_not_for_ever(s3, open_store, impatient):
    with (
        s3.recording() as log,
        s3.failing(lambda request: Refuse(503, "SlowDown")),
        pytest.raises(StorageError, match="injected by the test"),
    ):
        open_store(storage_options=impatient)
    assert len(log) <= 12, str(log)


def test_the_client_of_others_keeps_its_own_retries(s3, open_store, options):
    open_store("x")
    assert s3fs.S3FileSystem(**options).retries == s3fs.S3FileSystem.retries
