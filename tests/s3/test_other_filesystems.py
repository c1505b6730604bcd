"""Any other filesystem that fsspec knows: to read if it can be read, to append if it can create atomically."""

from __future__ import annotations

import functools
import http.server
import re
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

import trajstore
from tests.s3.trajectories import assert_holds, trajectory
from trajstore.errors import StorageError, StoreNotFoundError, TrajstoreError, UnsupportedStorageError

EXPECTED = [trajectory(seed) for seed in range(4)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a store ``demo`` of two versions."""
    with trajstore.open(tmp_path / "demo", "x") as store:
        for half in (EXPECTED[:2], EXPECTED[2:]):
            for tree in half:
                store.append(tree, task="pick")
            store.flush()
    return tmp_path


class FileHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and ranges of them if ``ranges``."""

    ranges = True

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if self.ranges else None
        if asked:
            data = data[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(params=[True, False], ids=["with ranges", "without ranges"])
def website(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, bool]]:
    """URL of the folder, and whether its server knows ranges."""
    handler = type("Handler", (FileHandler,), {"ranges": request.param})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", request.param
        server.shutdown()
        thread.join()


def test_a_store_on_a_web_server_can_be_read(website):
    url, knows_ranges = website
    with trajstore.open(f"{url}/demo") as store:
        assert store.version == 2
        assert store.trajectories.to_pandas()["task"].tolist() == ["pick"] * 4
        if knows_ranges:
            assert_holds(store.trajectories, EXPECTED)
        else:  # the whole object instead of the range: never taken for the range
            with pytest.raises(TrajstoreError, match=r"bytes of \["):
                store.trajectories[0]["obs/image"][:]
    with trajstore.open(f"{url}/demo", version=1) as store:
        assert_holds(store.trajectories if knows_ranges else store.trajectories.first(0), EXPECTED[: 2 * knows_ranges])
    with pytest.raises(StoreNotFoundError):
        trajstore.open(f"{url}/nothing")


def test_a_web_server_cannot_be_appended_to(website):
    url, _ = website
    with pytest.raises(UnsupportedStorageError, match="cannot create an object atomically"):
        trajstore.open(f"{url}/new", "a")
    store = trajstore.open(f"{url}/demo", "a")
    store.append(trajectory(5))
    with pytest.raises(StorageError, match=r"1 trajector.* not in the store"):
        store.close()
    with trajstore.open(f"{url}/demo") as store:
        assert store.version == 2


def test_a_store_in_a_zip_archive_can_be_read(folder):
    archive = folder / "demo.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted((folder / "demo").rglob("*")):
            if path.is_file():
                packed.write(path, f"runs/{path.relative_to(folder)}")
    url = f"zip://runs/demo::file://{archive}"
    with trajstore.open(url) as store:
        assert_holds(store.trajectories, EXPECTED)
    with pytest.raises(StorageError):
        trajstore.open(f"zip://runs/new::file://{archive}", "a")


class ShelfFileSystem(LocalFileSystem):
    """As far as anybody knows, it cannot create a file only if there is none."""

    protocol = "shelf"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.removeprefix("shelf://"))


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[str]:
    """URL of a place on it."""
    fsspec.register_implementation("shelf", ShelfFileSystem)
    (tmp_path / "shelf").mkdir()
    yield f"shelf://{tmp_path}/shelf/demo"
    del _registry["shelf"]


@pytest.mark.parametrize("mode", ["a", "x"])
def test_a_filesystem_that_cannot_create_atomically_is_refused_and_left_empty(shelf, tmp_path, mode):
    with pytest.raises(UnsupportedStorageError, match=r"shelf cannot create an object atomically.*single_writer=True"):
        trajstore.open(shelf, mode)
    assert list((tmp_path / "shelf").iterdir()) == []


def test_a_filesystem_that_cannot_create_atomically_takes_a_single_writer(shelf, tmp_path):
    options = {"auto_mkdir": True}
    with trajstore.open(shelf, "a", single_writer=True, storage_options=options) as store:
        for tree in EXPECTED:
            store.append(tree)
            store.flush()
        assert store.version == 4
    with trajstore.open(shelf, storage_options=options) as store:
        assert_holds(store.trajectories, EXPECTED)
    with trajstore.open(tmp_path / "shelf" / "demo") as store:  # it is the same store as on the disk below
        assert_holds(store.trajectories, EXPECTED)


def test_appending_to_a_store_there_without_the_promise_is_refused_at_the_commit(shelf):
    options = {"auto_mkdir": True}
    trajstore.open(shelf, "x", single_writer=True, storage_options=options).close()
    store = trajstore.open(shelf, "a", storage_options=options)
    store.append(EXPECTED[0])
    with pytest.raises(UnsupportedStorageError, match="single_writer=True"):
        store.close()
    with trajstore.open(shelf, storage_options=options) as store:
        assert store.version == 0
