"""Object stores to test against: moto always, Ceph where it is installed and asked for."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

import trajstore
from tests.support import ceph, s3_server
from tests.support.s3_server import S3Server


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One server per test process."""
    with S3Server() as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """A fresh bucket of that server."""
    name = f"bucket-{uuid.uuid4().hex}"
    s3.make_bucket(name)
    return name


@pytest.fixture
def options(s3: S3Server) -> dict[str, Any]:
    """storage_options for that server."""
    return s3.storage_options()


@pytest.fixture
def impatient(s3: S3Server) -> dict[str, Any]:
    """storage_options with which botocore never tries again: what follows is trajstore's own doing."""
    return s3.storage_options(config_kwargs={"retries": {"max_attempts": 0}})


@pytest.fixture
def open_store(bucket: str, options: dict[str, Any]) -> Iterator[Callable[..., trajstore.Store]]:
    """``trajstore.open`` on a store in the fresh bucket; whatever is opened is closed."""
    opened: list[trajstore.Store] = []

    def open_store(mode: str = "r", **knobs: Any) -> trajstore.Store:
        store = trajstore.open(f"s3://{bucket}/runs/demo", mode, **{"storage_options": options, **knobs})
        opened.append(store)
        return store

    yield open_store
    for store in opened:
        store.close()


@pytest.fixture(scope="session")
def ceph_url() -> Iterator[str]:
    """The gateway of a Ceph cluster of this test process."""
    missing = ceph.missing_binaries()
    if missing:
        pytest.skip(f"Ceph is not installed: no {', '.join(missing)}")
    folder = Path(tempfile.mkdtemp(prefix="ceph"))  # short: sockets are made in it
    try:
        with ceph.ceph_server(folder / "c") as url:
            yield url
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["moto", pytest.param("ceph", marks=pytest.mark.ceph)])
def anywhere(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """URL of a store to be, and storage_options: on every server there is."""
    name = f"bucket-{uuid.uuid4().hex}"
    if request.param == "moto":
        server: S3Server = request.getfixturevalue("s3")
        server.make_bucket(name)
        options = server.storage_options()
    else:
        url: str = request.getfixturevalue("ceph_url")
        options = s3_server.s3fs_options(url, client_kwargs={})  # it knows no regions
        s3fs.S3FileSystem(**options).mkdir(name)
    return f"s3://{name}/runs/demo", options
