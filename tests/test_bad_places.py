"""Bad places: stores that are newer, damaged, read-only, full, closed, forked or not there."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest

import trajstore
from trajstore import errors
from trajstore.format.document import canonical, seal, unseal
from trajstore.format.layout import snapshot_key
from trajstore.opening import open_on
from trajstore.storage.local import LocalFilesystem


def good(length=3):
    return {"image": np.full((length, 4, 4), length, np.uint8), "action": np.arange(length)}


def files(path):
    return sorted((str(p.relative_to(path)), p.read_bytes()) for p in path.rglob("*") if p.is_file())


@pytest.fixture
def path(tmp_path):
    """A store of two versions."""
    with trajstore.open(tmp_path / "s", "x") as store:
        for length in (3, 5):
            store.append(good(length))
            store.flush()
    return tmp_path / "s"


@pytest.mark.parametrize("key", ["trajstore.json", snapshot_key(2)])
@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_store_of_a_newer_format(path, key, mode):
    document = unseal((path / key).read_bytes(), key=key)
    (path / key).write_bytes(seal({**document, "format": 2, "news": True}))
    before = files(path)
    with pytest.raises(errors.FormatVersionError) as caught:
        trajstore.open(path, mode)
    for word in (key, str(path), "format 2", "reads up to 1", "upgrade"):
        assert word in str(caught.value)
    assert files(path) == before


def test_an_older_version_of_a_store_whose_latest_is_newer_can_be_read(path):
    document = unseal((path / snapshot_key(2)).read_bytes(), key="x")
    (path / snapshot_key(2)).write_bytes(seal({**document, "format": 2}))
    with trajstore.open(path, version=1) as store:
        assert len(store.trajectories) == 1


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_document_without_its_hash(path, mode):
    (path / "trajstore.json").write_bytes(canonical({"format": 1, "store_uuid": "0" * 32}))
    with pytest.raises(errors.CorruptionError, match=r"^trajstore\.json in .* is not a trajstore document"):
        trajstore.open(path, mode)


def test_a_missing_segment(path):
    segments = {p.name: p for p in (path / "segments").iterdir()}
    with trajstore.open(path) as store:
        lost = store.trajectories._table.segments[1].uuid
        kept = store.trajectories[0]["action"][:]
    for child in sorted(segments[lost].rglob("*"), reverse=True):
        child.unlink() if child.is_file() else child.rmdir()
    segments[lost].rmdir()
    with trajstore.open(path) as store:
        assert (store.trajectories[0]["action"][:] == kept).all()
        assert store.trajectories.lengths.tolist() == [3, 5]
        for read in (
            lambda view: view[1]["action"][:],
            lambda view: view.read("image"),
            lambda view: view.last(1).sample(2),
        ):
            with pytest.raises(errors.MissingObjectError, match=f"segments/{lost}/pages.arrow.*restore"):
                read(store.trajectories)


def test_a_missing_shard_is_named(path):
    (shard, *_) = sorted(path.glob("segments/*/image/c.0.0.0"))
    shard.unlink()
    with (
        trajstore.open(path) as store,
        pytest.raises(errors.MissingObjectError, match=f"{shard.parent.parent.name}/image/c.0.0.0"),
    ):
        store.trajectories.read("image")


def test_no_store_there(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path / "nothing", tmp_path, tmp_path / "file", f"memory://{tmp_path}/nothing"):
        with pytest.raises(errors.StoreNotFoundError, match=r"no trajstore at .*trajstore\.json.*mode='a'"):
            trajstore.open(place)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(errors.StorageError, match=str(tmp_path / "file")):
        trajstore.open(tmp_path / "file", "a")


def test_a_protocol_that_nobody_knows():
    with pytest.raises(errors.StorageError, match=r"^florp://x: .*florp"):
        trajstore.open("florp://x")


def test_mode_x_on_a_store_that_exists(path):
    before = files(path)
    with pytest.raises(errors.StoreExistsError, match=rf"already at {path}; open it with mode='a'"):
        trajstore.open(path, "x")
    assert files(path) == before


@pytest.mark.parametrize("mode", ["w", "r+", "", "A", None])
def test_a_mode_that_is_none(tmp_path, mode):
    with pytest.raises(ValueError, match=r"expected 'r' to read, 'a' to append or 'x' for a new store"):
        trajstore.open(tmp_path / "s", mode)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"codec": "best"}, errors.SchemaError, "codec='best'.*fast, small, none"),
        ({"segment_bytes": 0}, ValueError, "segment_bytes=0, expected a positive number"),
        ({"commit_interval_s": -1.0}, ValueError, "commit_interval_s=-1.0"),
        ({"write_buffer_bytes": 0}, ValueError, "write_buffer_bytes=0"),
        ({"spill_bytes": 0}, ValueError, "spill_bytes=0"),
        ({"version": 1}, errors.ReadOnlyError, "version=1 is for reading"),
    ],
    ids=str,
)
def test_options_that_cannot_be(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        trajstore.open(tmp_path / "s", "a", **options)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("mode", ["r", "a"])
def test_an_empty_path_is_not_the_working_directory(mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.StorageError, match=r"is empty; name a folder, or '\.' for the working directory"):
        trajstore.open("", mode)
    assert not files(tmp_path)


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_store_that_lost_its_versions_is_not_an_empty_one(path, mode):
    for version in (1, 2):
        (path / snapshot_key(version)).unlink()
    before = files(path)
    with pytest.raises(errors.CorruptionError, match=r"says that there is a version \d, and there is none.*restore"):
        trajstore.open(path, mode)
    assert files(path) == before


def test_a_place_where_no_folder_can_be_made_is_not_taken_for_a_store_that_lacks_something():
    with pytest.raises(errors.StorageError, match=r"there is no folder /proc/nothing.*check the path"):
        trajstore.open("/proc/nothing", "a").append(good())


def test_writing_through_a_handle_for_reading(path):
    before = files(path)
    with trajstore.open(path) as store:
        for write in (lambda: store.append(good()), store.begin, store.flush):
            with pytest.raises(errors.ReadOnlyError, match=rf"{path} was opened with mode='r'; open it with mode='a'"):
                write()
    with pytest.raises(errors.ReadOnlyError, match="schema= changes the store"):
        trajstore.open(path, schema=[])
    assert files(path) == before


def test_a_version_that_does_not_exist(path):
    for version in (3, 99, 10**19):
        with pytest.raises(errors.VersionNotFoundError, match=rf"{path} has no version {version}; the latest is 2"):
            trajstore.open(path, version=version)
    for version in (-1, 1.5, "12x"):
        with pytest.raises(errors.VersionNotFoundError, match=str(version)):
            trajstore.open(path, version=version)


def test_a_version_that_vacuum_emptied(path):
    (path / snapshot_key(1)).write_bytes(b"")
    with pytest.raises(errors.VersionExpiredError, match=rf"{path}.*version 1 was removed by vacuum.*later one"):
        trajstore.open(path, version=1)
    with trajstore.open(path) as store:
        assert store.version == 2
        assert store.versions().index.tolist() == [2]


def test_use_after_close(path):
    store = trajstore.open(path, "a")
    episode = store.begin()
    store.close()
    store.close()
    for use in (
        lambda: store.append(good()),
        lambda: store.begin(),
        lambda: store.flush(),
        lambda: store.refresh(),
        lambda: store.versions(),
        lambda: store.trajectories,
        lambda: episode.add(image=np.zeros((4, 4), np.uint8), action=1) or episode.end(),
    ):
        with pytest.raises(errors.ClosedError, match="closed; open it again"):
            use()
    assert store.version == 2


def test_use_after_the_end_of_an_episode(path):
    with trajstore.open(path, "a") as store:
        episode = store.begin()
        episode.discard()
        with pytest.raises(errors.ClosedError, match="discarded; begin another one"):
            episode.add(action=1)


class Broken(LocalFilesystem):
    """A disk that refuses to create files, or whose space runs out."""

    code: int | None = None
    free_bytes: int | None = None

    def _create_file(self, path):
        if self.code is not None:
            raise OSError(self.code, os.strerror(self.code), path)
        return super()._create_file(path)

    def _write(self, descriptor, buffers, name):
        if self.free_bytes is not None:
            size = sum(len(memoryview(b).cast("B")) for b in buffers)
            if size > self.free_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.free_bytes -= size
        super()._write(descriptor, buffers, name)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM], ids=errno.errorcode.get)
def test_a_disk_that_refuses_to_write(path, code):
    disk = Broken(str(path))
    with open_on(disk, "a") as store:
        store.append(good(7))
        before = files(path)
        disk.code = code
        with pytest.raises(
            errors.StoragePermissionError, match=r"1 trajector.* appended .* not in the store"
        ) as caught:
            store.flush()
        assert os.strerror(code) in str(caught.value)
        assert str(path) in str(caught.value)
        assert isinstance(caught.value, PermissionError)
        assert files(path) == before
        assert len(store.trajectories) == 2
        disk.code = None
        store.append(good(4))
        store.flush()
        assert store.trajectories.lengths.tolist() == [3, 5, 4]
    disk.code = code
    with pytest.raises(errors.StoragePermissionError, match=os.strerror(code)):
        open_on(Broken_with(str(path.parent / "new"), code), "x")


def Broken_with(root, code):
    disk = Broken(root)
    disk.code = code
    return disk


@pytest.mark.parametrize("free_bytes", [0, 500, 2000, 5000, 9000])
def test_a_disk_that_is_full(path, free_bytes):
    disk = Broken(str(path))
    rng = np.random.default_rng(0)
    with open_on(disk, "a") as store:
        disk.free_bytes = free_bytes
        store.append({"image": rng.integers(0, 256, (600, 4, 4), dtype=np.uint8), "action": np.arange(600)})
        with pytest.raises(errors.StorageError, match=r"free space and append again; 1 trajector.* appended") as caught:
            store.flush()
        assert caught.value.errno == errno.ENOSPC
        assert (store.version, len(store.trajectories)) == (2, 2)
        disk.free_bytes = None
        store.append(good(4))
        store.flush()
        assert store.trajectories.lengths.tolist() == [3, 5, 4]
    with trajstore.open(path) as store:
        assert store.trajectories.lengths.tolist() == [3, 5, 4]
        assert store.trajectories.read("action").tolist() == [*range(3), *range(5), *range(4)]


def test_what_did_not_fit_is_told_by_close(path):
    disk = Broken(str(path))
    store = open_on(disk, "a")
    disk.free_bytes = 0
    store.append(good(7))
    with pytest.raises(errors.StorageError, match=r"1 trajector.* appended .* not in the store"):
        store.close()
    store.close()
    with trajstore.open(path) as again:
        assert len(again.trajectories) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_folder_without_permission(path):
    folders = [path, *(p for p in path.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        with trajstore.open(path) as store:
            assert store.trajectories.lengths.tolist() == [3, 5]
        with trajstore.open(path, "a") as store:
            store.append(good())
            with pytest.raises(errors.StoragePermissionError, match=str(path)):
                store.flush()
    finally:
        for folder in folders:
            folder.chmod(0o755)


_REAL_DISK = """
import subprocess, sys
import numpy as np, trajstore
from trajstore import errors
folder, = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
store = trajstore.open(folder + "/s", "x")
store.append({"action": np.arange(3)})
store.flush()
noise = np.random.default_rng(0).integers(0, 2**62, 100_000)
for attempt in range(2):
    try:
        store.append({"action": noise})
        store.flush()
    except errors.StorageError as error:
        print(error.errno, error)
with trajstore.open(folder + "/s") as reader:
    print(reader.trajectories.lengths.tolist(), reader.trajectories[0]["action"][:].tolist())
subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
for mode in ("r", "a"):
    with trajstore.open(folder + "/s", mode) as again:
        print(mode, len(again.trajectories))
        if mode == "a":
            again.append({"action": np.arange(4)})
            try:
                again.flush()
            except errors.StoragePermissionError as error:
                print(error)
try:
    trajstore.open(folder + "/new", "x")
except errors.StoragePermissionError as error:
    print(error)
"""


def test_a_real_disk_that_is_full_and_then_read_only(tmp_path):
    alone = ["unshare", "--map-root-user", "--mount"]
    try:
        subprocess.run([*alone, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=True, capture_output=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("this machine lets nobody mount a small disk")
    command = [*alone, sys.executable, "-c", _REAL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    full, full_again, first, reading, writing, refused, new = result.stdout.splitlines()
    for line in (full, full_again):
        assert line.startswith(f"{errno.ENOSPC} ")
        assert "No space left on device; free space and append again; 1 trajector" in line
    assert first == "[3] [0, 1, 2]"
    assert (reading, writing) == ("r 1", "a 1")
    assert "Read-only file system" in refused
    assert "1 trajector" in refused
    assert "Read-only file system" in new


USES = {
    "append": lambda store, view: store.append(good()),
    "flush": lambda store, view: store.flush(),
    "refresh": lambda store, view: store.refresh(),
    "read": lambda store, view: view[0]["action"][:],
}


def _use_in_child(store, view, use):
    """Exits with 0 if the use is refused as it should be."""
    try:
        USES[use](store, view)
    except errors.ForkedError as error:
        os._exit(0 if "spawn" in str(error) and "open it again in the child" in str(error) else 2)
    except BaseException:
        os._exit(3)
    os._exit(4)


@pytest.mark.parametrize("use", USES)
def test_a_handle_in_a_forked_child(path, use):
    with trajstore.open(f"memory://{path}", "a") as store:
        store.append(good())
        store.flush()
        store.append(good())  # waits, in the parent
        child = multiprocessing.get_context("fork").Process(target=_use_in_child, args=(store, store.trajectories, use))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python >= 3.12, which warns of the same
            child.start()
        child.join(60)
        assert child.exitcode == 0
        store.flush()
        assert len(store.trajectories) == 2
