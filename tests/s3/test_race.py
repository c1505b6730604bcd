"""Processes that append to one store in a bucket at the same time."""

from __future__ import annotations

import uuid

import pytest
import s3fs

import trajstore
from tests.support.race import assert_exactly_once, race
from tests.support.s3_server import s3fs_options


def race_and_check(url: str, options: dict, *, writers: int, commits: int) -> int:
    """Races lost, after every append was found exactly once."""
    trajstore.open(url, "x", storage_options=options).close()
    reports = race(url, writers=writers, commits=commits, storage_options=options)
    with trajstore.open(url, storage_options=options) as store:
        assert_exactly_once(store, reports, commits=commits)
    return sum(report.races_lost for report in reports)


def test_four_processes_lose_races_and_no_append(bucket, options):
    lost = race_and_check(f"s3://{bucket}/race", options, writers=4, commits=8)
    assert lost >= 5


@pytest.mark.slow
def test_eight_processes_lose_races_and_no_append(bucket, options):
    lost = race_and_check(f"s3://{bucket}/race", options, writers=8, commits=50)
    assert lost >= 20


@pytest.mark.ceph
def test_eight_processes_lose_races_and_no_append_on_ceph(ceph_url):
    options = s3fs_options(ceph_url, client_kwargs={})
    name = f"bucket-{uuid.uuid4().hex}"
    s3fs.S3FileSystem(**options).mkdir(name)
    lost = race_and_check(f"s3://{name}/race", options, writers=8, commits=50)
    assert lost >= 20
