"""What every filesystem promises; each implementation inherits the same tests."""

from __future__ import annotations

import datetime as dt
import errno
import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.support.faulty import Faults, faulty_bucket
from trajstore.errors import (
    CommitOutcomeUnknownError,
    CorruptionError,
    MissingObjectError,
    StorageError,
    StoragePermissionError,
    TrajstoreError,
    UnsupportedStorageError,
)
from trajstore.storage import local
from trajstore.storage.connect import connect
from trajstore.storage.filesystem import ByteRange, Filesystem, ObjectInfo, ReadRun
from trajstore.storage.local import LocalFilesystem
from trajstore.storage.remote import RemoteFilesystem


class FilesystemConformance:
    """Inherit, and give a fixture ``filesystem`` of an empty folder."""

    def test_objects_are_read_back_in_the_order_asked(self, filesystem: Filesystem) -> None:
        filesystem.store({"a/b/one": [b"1"], "two": [b"2", bytearray(b"2"), memoryview(b"2")], "a/three": []})
        assert filesystem.read_many(["two", "gone", "a/b/one", "a/three", "two"]) == [b"222", None, b"1", b"", b"222"]
        assert filesystem.read("a/b/none") is None
        assert filesystem.read("two/under-a-file") is None
        assert filesystem.read_many([]) == []

    def test_storing_an_object_of_many_buffers_joins_them(self, filesystem: Filesystem) -> None:
        parts = [bytes([n % 251]) * (n % 7) for n in range(5000)]  # more than one writev takes, some empty
        filesystem.store({"many": parts})
        assert filesystem.read("many") == b"".join(parts)

    def test_runs_are_read_to_the_byte(self, filesystem: Filesystem) -> None:
        data = os.urandom(10_000)
        filesystem.store({"x/data": [data], "y": [b"0123456789"]})
        runs = [ReadRun("x/data", n * 400, n * 400 + 300, ()) for n in range(20)] + [ReadRun("y", 3, 5, ())]
        found = filesystem.read_runs(runs)
        assert [bytes(f) for f in found] == [data[r.start : r.stop] for r in runs[:-1]] + [b"34"]
        assert filesystem.read_runs([]) == []

    def test_ranges_are_read_in_any_order_and_may_overlap(self, filesystem: Filesystem) -> None:
        data = os.urandom(1000)
        filesystem.store({"a": [data], "b": [data[::-1]]})
        asked = [("a", 900, 1000), ("b", 0, 10), ("a", 5, 500), ("a", 0, 20), ("b", 3, 3)]
        found = filesystem.read_ranges([ByteRange(*r) for r in asked])
        assert [bytes(f) for f in found] == [(data if k == "a" else data[::-1])[i:j] for k, i, j in asked]

    def test_reading_beyond_the_end_is_corruption_and_names_the_object(self, filesystem: Filesystem) -> None:
        filesystem.store({"folder/short": [b"12345"]})
        with pytest.raises(CorruptionError, match="folder/short"):
            filesystem.read_runs([ReadRun("folder/short", 3, 9, ())])

    def test_ranges_of_an_object_that_is_not_there_name_it(self, filesystem: Filesystem) -> None:
        filesystem.store({"here": [b"1"]})
        with pytest.raises(MissingObjectError, match="folder/gone"):
            filesystem.read_runs([ReadRun("here", 0, 1, ()), ReadRun("folder/gone", 0, 1, ())])

    def test_a_stream_is_an_object_once_stored(self, filesystem: Filesystem) -> None:
        stream = filesystem.stream("deep/down/stream")
        stream.write([b"one ", b"two "])
        stream.write([])
        stream.write([memoryview(b"three")])
        filesystem.store({"beside": [b"1"]}, [stream])
        assert filesystem.read_many(["deep/down/stream", "beside"]) == [b"one two three", b"1"]

    def test_an_abandoned_stream_leaves_others_alone(self, filesystem: Filesystem) -> None:
        given_up, kept = filesystem.stream("given-up"), filesystem.stream("kept")
        given_up.write([b"x" * 100])
        kept.write([b"y"])
        given_up.abandon()
        given_up.abandon()
        filesystem.store({}, [kept])
        kept.abandon()  # too late to matter
        assert filesystem.read("kept") == b"y"

    def test_only_the_first_creation_of_a_key_succeeds(self, filesystem: Filesystem) -> None:
        assert filesystem.create("snapshots/1", b"first")
        assert not filesystem.create("snapshots/1", b"second")
        assert filesystem.read("snapshots/1") == b"first"
        assert filesystem.create("snapshots/2", b"second")

    def test_of_many_threads_that_create_a_key_one_wins(self, filesystem: Filesystem) -> None:
        threads, keys = 16, 20
        barrier = threading.Barrier(threads)

        def create_all(mine: int) -> list[bool]:
            won = []
            for key in range(keys):
                barrier.wait(30)
                won.append(filesystem.create(f"races/{key}", f"{mine} {uuid.uuid4()}".encode()))
            return won

        with ThreadPoolExecutor(threads) as pool:
            won = list(pool.map(create_all, range(threads)))
        for key in range(keys):
            winners = [thread for thread in range(threads) if won[thread][key]]
            assert len(winners) == 1
            content = filesystem.read(f"races/{key}")
            assert content is not None
            assert int(content.split()[0]) == winners[0]

    def test_creating_leaves_nothing_else_behind(self, filesystem: Filesystem) -> None:
        filesystem.create("left/1", b"won")
        filesystem.create("left/1", b"lost")
        assert [(info.key, info.nbytes) for info in filesystem.list_objects("left")] == [("left/1", 3)]

    def test_overwriting_replaces_the_whole(self, filesystem: Filesystem) -> None:
        filesystem.store({"hints/x": [b"something long"]})
        filesystem.overwrite("hints/x", b"short")
        assert filesystem.read("hints/x") == b"short"
        filesystem.overwrite("hints/new", b"1")
        assert filesystem.read("hints/new") == b"1"
        assert {info.key for info in filesystem.list_objects("hints")} == {"hints/x", "hints/new"}

    def test_listing_is_by_folder(self, filesystem: Filesystem) -> None:
        filesystem.store({"a/1": [b"1"], "a/b/2": [b"22"], "ab/3": [b"333"], "4": [b""]})
        assert {(i.key, i.nbytes) for i in filesystem.list_objects("a")} == {("a/1", 1), ("a/b/2", 2)}
        assert {i.key for i in filesystem.list_objects("")} == {"a/1", "a/b/2", "ab/3", "4"}
        assert list(filesystem.list_objects("none")) == []

    def test_folders_at_the_top(self, filesystem: Filesystem) -> None:
        assert filesystem.list_folders() == []
        filesystem.store({"b/1": [b"1"], "a/c/2": [b"22"], "ab/3": [b"333"], "4": [b""]})
        assert filesystem.list_folders() == ["a", "ab", "b"]

    def test_a_listing_says_when_objects_were_written(self, filesystem: Filesystem) -> None:
        begun = dt.datetime.now(dt.UTC) - dt.timedelta(
            seconds=2
        )  # storages count in seconds, or in ticks of the kernel
        filesystem.store({"a/1": [b"1"]})
        filesystem.create("a/2", b"2")
        filesystem.overwrite("a/3", b"3")
        stream = filesystem.stream("a/4")
        stream.write([b"4"])
        filesystem.store({}, [stream])
        filesystem.copy_from(filesystem, [ObjectInfo("a/1", 1)], names={"a/1": "a/5"})
        ended = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=2)
        found = {info.key: info.modified for info in filesystem.list_objects("a")}
        assert sorted(found) == ["a/1", "a/2", "a/3", "a/4", "a/5"]
        assert all(time is not None and begun <= time <= ended for time in found.values())

    def test_what_is_removed_is_gone_and_nothing_else(self, filesystem: Filesystem) -> None:
        names = ["a/1", "a/b/2", "a/b/3", "a/c/4", "d/5", "6"]
        filesystem.store({name: [name.encode()] for name in names})
        assert bytes(filesystem.read_runs([ReadRun("a/b/2", 0, 3, ())])[0]) == b"a/b"
        filesystem.remove(["a/b/2", "a/c/4", "6"])
        assert {i.key for i in filesystem.list_objects("")} == {"a/1", "a/b/3", "d/5"}
        assert filesystem.read_many(names) == [b"a/1", None, b"a/b/3", None, b"d/5", None]
        with pytest.raises(MissingObjectError, match="a/b/2"):
            filesystem.read_runs([ReadRun("a/b/2", 0, 3, ())])
        filesystem.store({"a/b/2": [b"again"], "a/c/4": [b"too"]})  # the name can be used again, and its folder
        assert filesystem.read_many(["a/b/2", "a/c/4"]) == [b"again", b"too"]
        assert bytes(filesystem.read_runs([ReadRun("a/b/2", 0, 5, ())])[0]) == b"again"

    def test_removing_what_is_not_there_is_no_error_and_the_rest_goes(self, filesystem: Filesystem) -> None:
        filesystem.store({"a/1": [b"1"], "a/2": [b"2"], "b/3": [b"3"]})
        filesystem.remove([])
        filesystem.remove(["gone", "a/1", "a/gone", "nowhere/at/all", "b/3"])
        assert {i.key for i in filesystem.list_objects("")} == {"a/2"}
        filesystem.remove(["a/1"])
        filesystem.remove(["a/2"])
        filesystem.remove(["a/2"])
        assert list(filesystem.list_objects("")) == []

    def test_signs_that_a_shell_would_expand_are_part_of_a_name(self, filesystem: Filesystem) -> None:
        names = [f"{run}/x" for run in ("run[1]", "run1", "run?", "runs", "run*", "run[!1]")]
        filesystem.store({name: [name.encode()] for name in names})
        assert filesystem.read_many(names) == [name.encode() for name in names]
        assert [i.key for i in filesystem.list_objects("run[1]")] == ["run[1]/x"]
        infos = [i for i in filesystem.list_objects("") if i.key.startswith("run[")]
        filesystem.copy_from(filesystem, infos, names={i.key: f"copy[1]/{i.key}" for i in infos}, link=False)
        filesystem.remove(["run[1]/x", "run?/x", "run*/x", "run[!1]/x", "run[2]/gone"])
        assert {i.key for i in filesystem.list_objects("")} == {
            *("run1/x", "runs/x", "copy[1]/run[1]/x", "copy[1]/run[!1]/x")
        }

    def test_many_objects_are_removed(self, filesystem: Filesystem) -> None:
        filesystem.store({f"many/{n % 10}/{n}": [b"x"] for n in range(120)})
        filesystem.remove([f"many/{n % 10}/{n}" for n in range(120) if n != 77])
        assert {i.key for i in filesystem.list_objects("")} == {"many/7/77"}

    def test_objects_are_copied_from_a_filesystem_of_any_kind(self, filesystem: Filesystem, tmp_path: Path) -> None:
        content = {"s/a/1": b"one", "s/a/deep/er/2": os.urandom(3000), "s/b/3": b"", "s/b/not-asked": b"x"}
        disk = LocalFilesystem(str(tmp_path / "origin"))
        memory = connect(f"memory://copied-{uuid.uuid4().hex}")
        for number, source in enumerate((disk, memory, faulty_bucket({}, Faults()))):
            source.store({key: [data] for key, data in content.items()})
            asked = [info for info in source.list_objects("s") if not info.key.endswith("not-asked")]
            names = {info.key: f"copy-{number}/{info.key}" for info in asked}
            done: list[str] = []
            written = filesystem.copy_from(source, asked, names=names, done=lambda info, d=done: d.append(info.key))
            linked = isinstance(filesystem, LocalFilesystem) and source is disk
            assert written == (0 if linked else sum(info.nbytes for info in asked))
            assert sorted(done) == sorted(names)
            assert filesystem.read_many([names[i.key] for i in asked]) == [content[i.key] for i in asked]
            assert {i.key for i in filesystem.list_objects(f"copy-{number}")} == set(names.values())
            assert filesystem.copy_from(source, [], names=names) == 0
        disk.close()
        fsspec.filesystem("memory").rm(memory.root, recursive=True)  # type: ignore[attr-defined]

    def test_objects_are_copied_within_one_storage(self, filesystem: Filesystem) -> None:
        content = {f"s/{n}": os.urandom(n) for n in range(70)}
        filesystem.store({key: [data] for key, data in content.items()})
        infos = list(filesystem.list_objects("s"))
        names = {info.key: f"t/{info.key}" for info in infos}
        filesystem.copy_from(filesystem, infos, names=names)
        assert filesystem.read_many([names[k] for k in content]) == list(content.values())
        filesystem.copy_from(filesystem, infos, names={k: f"u/{k}" for k in content}, link=False)
        filesystem.remove([*content, *names.values()])
        assert filesystem.read_many([f"u/{k}" for k in content]) == list(content.values())

    def test_what_is_there_already_is_not_copied_again(self, filesystem: Filesystem, tmp_path: Path) -> None:
        source = connect(f"memory://copied-{uuid.uuid4().hex}")
        source.store({"s/1": [b"one"], "s/2": [b"two!"], "s/3": [b"three"]})
        filesystem.store({"s/1": [b"one"], "s/3": [b"th"]})  # whole, and cut short
        done: list[str] = []
        written = filesystem.copy_from(source, list(source.list_objects("s")), done=lambda info: done.append(info.key))
        assert written == len(b"two!") + len(b"three")
        assert sorted(done) == ["s/1", "s/2", "s/3"]
        assert filesystem.read_many(["s/1", "s/2", "s/3"]) == [b"one", b"two!", b"three"]
        fsspec.filesystem("memory").rm(source.root, recursive=True)  # type: ignore[attr-defined]

    def test_an_object_that_is_not_there_cannot_be_copied_and_its_store_is_named(
        self, filesystem: Filesystem, tmp_path: Path
    ) -> None:
        disk = LocalFilesystem(str(tmp_path / "origin"))
        memory = connect(f"memory://copied-{uuid.uuid4().hex}")
        for source in (disk, memory):
            source.store({"s/1": [b"1"]})
            asked = [*source.list_objects("s"), ObjectInfo("s/gone", 5)]
            for link in (True, False):
                with pytest.raises(MissingObjectError, match=f"s/gone in {source.description}"):
                    filesystem.copy_from(source, asked, link=link)
                assert filesystem.read("s/gone") is None
        disk.close()
        fsspec.filesystem("memory").rm(memory.root, recursive=True)  # type: ignore[attr-defined]

    def test_a_source_that_changes_under_the_copy_is_noticed(self, filesystem: Filesystem) -> None:
        source = faulty_bucket({}, Faults())
        source.store({"s/1": [b"short"]})
        with pytest.raises(CorruptionError, match="s/1"):
            filesystem.copy_from(source, [ObjectInfo("s/1", 50)])
        assert filesystem.read("s/1") is None

    def test_large_objects_are_copied_in_pieces(self, filesystem: Filesystem, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(filesystem, "stream_threshold_bytes", 1000)
        data = os.urandom(17 * 1024 * 1024)  # more than one piece
        source = connect(f"memory://copied-{uuid.uuid4().hex}")
        source.store({"s/1": [data]})
        assert filesystem.copy_from(source, list(source.list_objects("s"))) == len(data)
        assert filesystem.read("s/1") == data
        fsspec.filesystem("memory").rm(source.root, recursive=True)  # type: ignore[attr-defined]

    def test_what_clients_raise_is_translated(self, filesystem: Filesystem) -> None:
        for raised, expected in (
            (FileNotFoundError("x"), MissingObjectError),
            (PermissionError(errno.EACCES, "x"), StoragePermissionError),
            (OSError(errno.ENOSPC, "No space left"), StorageError),
        ):
            with pytest.raises(expected, match="some/key") as caught, filesystem.errors("some/key"):
                raise raised
            assert caught.value.__cause__ is raised
            assert isinstance(caught.value, TrajstoreError)

    def test_it_may_be_closed_twice(self, filesystem: Filesystem) -> None:
        filesystem.store({"a": [b"1"]})
        filesystem.close()
        filesystem.close()


class TestLocalFilesystem(FilesystemConformance):
    @pytest.fixture
    def filesystem(self, tmp_path: Path) -> Any:
        filesystem = LocalFilesystem(str(tmp_path / "not" / "yet" / "there"))
        yield filesystem
        filesystem.close()

    def test_a_hard_link_is_as_young_as_the_link(self, filesystem: LocalFilesystem) -> None:
        filesystem.store({"a": [b"1"]})
        os.utime(os.path.join(filesystem.root, "a"), (0, 0))
        filesystem.copy_from(filesystem, [ObjectInfo("a", 1)], names={"a": "b"})
        for info in filesystem.list_objects(""):
            assert info.modified is not None
            assert dt.datetime.now(dt.UTC) - info.modified < dt.timedelta(minutes=1)

    def test_a_folder_in_the_place_of_an_object_is_an_error(self, filesystem: LocalFilesystem) -> None:
        filesystem.store({"folder/a": [b"1"]})
        with pytest.raises(StorageError, match="folder"):
            filesystem.read("folder")

    def test_a_file_in_the_place_of_a_folder_is_an_error(self, filesystem: LocalFilesystem) -> None:
        filesystem.store({"file": [b"1"]})
        with pytest.raises(StorageError, match="file/a"):
            filesystem.store({"file/a": [b"1"]})

    def test_without_hard_links_a_rename_that_replaces_nothing_is_used(
        self, filesystem: LocalFilesystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(filesystem, "_link", _unsupported)
        used = []
        rename = filesystem._rename_no_replace
        monkeypatch.setattr(filesystem, "_rename_no_replace", lambda *paths: (used.append(paths), rename(*paths)))
        self.test_only_the_first_creation_of_a_key_succeeds(filesystem)
        self.test_creating_leaves_nothing_else_behind(filesystem)
        self.test_of_many_threads_that_create_a_key_one_wins(filesystem)
        assert used

    def test_without_either_a_creation_is_refused_and_nothing_written(
        self, filesystem: LocalFilesystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(filesystem, "_link", _unsupported)
        monkeypatch.setattr(filesystem, "_rename_no_replace", _unsupported)
        with pytest.raises(UnsupportedStorageError, match="single_writer=True"):
            filesystem.create("snapshots/1", b"x")
        assert list(filesystem.list_objects("")) == []

    def test_without_either_a_single_writer_may_look_first(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        filesystem = LocalFilesystem(str(tmp_path / "alone"), single_writer=True)
        monkeypatch.setattr(filesystem, "_link", _unsupported)
        monkeypatch.setattr(filesystem, "_rename_no_replace", _unsupported)
        self.test_only_the_first_creation_of_a_key_succeeds(filesystem)
        self.test_creating_leaves_nothing_else_behind(filesystem)
        filesystem.close()

    def test_a_c_library_without_renameat2_counts_as_not_supporting_it(
        self, filesystem: LocalFilesystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(filesystem, "_link", _unsupported)
        monkeypatch.setattr(local.ctypes, "CDLL", lambda *_, **__: object())
        with pytest.raises(UnsupportedStorageError):
            filesystem.create("snapshots/1", b"x")

    def test_a_link_that_fails_for_another_reason_is_an_error(
        self, filesystem: LocalFilesystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_space(source: str, target: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(filesystem, "_link", no_space)
        with pytest.raises(StorageError, match="free space"):
            filesystem.create("snapshots/1", b"x")
        assert list(filesystem.list_objects("")) == []

    def test_a_created_object_whose_folder_cannot_be_synced_is_of_unknown_outcome(
        self, filesystem: LocalFilesystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        filesystem.create("snapshots/1", b"x")

        def broken(path: str) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(filesystem, "_fsync_directory", broken)
        with pytest.raises(CommitOutcomeUnknownError, match="snapshots/2"):
            filesystem.create("snapshots/2", b"x")

    def test_a_temporary_file_that_cannot_be_removed_fails_no_creation(
        self, filesystem: LocalFilesystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(path: str) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(filesystem, "_unlink", broken)
        assert filesystem.create("snapshots/1", b"x")
        assert not filesystem.create("snapshots/1", b"y")
        assert filesystem.read("snapshots/1") == b"x"

    def test_folders_above_are_synced_once_for_stores_that_were_there_and_again_for_later_ones(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[str] = []
        original = LocalFilesystem._fsync_directory

        def noted(filesystem: LocalFilesystem, path: str) -> None:
            original(filesystem, path)
            synced.append(path)

        monkeypatch.setattr(LocalFilesystem, "_fsync_directory", noted)
        above = tmp_path / "stores"
        for name in ("a", "b"):
            (above / name).mkdir(parents=True)
        first, second = LocalFilesystem(str(above / "a")), LocalFilesystem(str(above / "b"))

        def syncs_above(filesystem: LocalFilesystem) -> int:
            synced.clear()
            filesystem.create(f"pins/{uuid.uuid4().hex}", b"x")
            assert filesystem.root in synced
            return synced.count(str(above))

        assert [syncs_above(one) for one in (first, second)] == [1, 0]
        assert syncs_above(LocalFilesystem(str(above / "b"))) == 1, "nobody has synced since this one found it"
        assert syncs_above(LocalFilesystem(str(above / "c"))) >= 1, "its own name is new"
        for filesystem in (first, second):
            filesystem.close()

    def test_an_object_is_never_written_over(self, filesystem: LocalFilesystem) -> None:
        filesystem.store({"a": [b"1"]})
        with pytest.raises(StorageError, match="a in"):
            filesystem.store({"a": [b"2"]})
        assert filesystem.read("a") == b"1"

    def test_links_share_the_file_and_copies_do_not(self, filesystem: LocalFilesystem, tmp_path: Path) -> None:
        source = LocalFilesystem(str(tmp_path / "origin"))
        source.store({"s/1": [b"one"]})
        infos = list(source.list_objects("s"))
        assert filesystem.copy_from(source, infos) == 0
        assert filesystem.copy_from(source, infos, link=False, names={"s/1": "t/1"}) == 3
        nodes = {os.stat(path).st_ino for path in (f"{source.root}/s/1", f"{filesystem.root}/s/1")}
        assert len(nodes) == 1
        assert os.stat(f"{filesystem.root}/t/1").st_ino not in nodes
        filesystem.remove(["s/1"])
        assert source.read("s/1") == b"one"

    @pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
    def test_where_no_link_is_possible_it_copies(
        self, filesystem: LocalFilesystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        def refused(source: str, target: str) -> None:
            raise OSError(code, os.strerror(code))

        source = LocalFilesystem(str(tmp_path / "origin"))
        source.store({"s/1": [b"one"]})
        monkeypatch.setattr(filesystem, "_link", refused)
        assert filesystem.copy_from(source, list(source.list_objects("s"))) == 3
        assert filesystem.read("s/1") == b"one"

    def test_a_copy_that_fails_leaves_no_half_of_it(
        self, filesystem: LocalFilesystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = LocalFilesystem(str(tmp_path / "origin"))
        source.store({"s/1": [b"one"]})

        def full(descriptor: int, name: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(filesystem, "_fsync_file", full)
        with pytest.raises(StorageError, match="free space"):
            filesystem.copy_from(source, list(source.list_objects("s")), link=False)
        assert list(filesystem.list_objects("")) == []

    def test_folders_that_are_left_empty_go_and_the_store_s_own_stay(self, filesystem: LocalFilesystem) -> None:
        filesystem.store({"segments/1/deep/down/x": [b"1"], "segments/2/y": [b"2"], "manifests/z": [b"3"]})
        filesystem.remove(["segments/1/deep/down/x", "segments/2/y", "manifests/z"])
        assert sorted(os.listdir(filesystem.root)) == ["manifests", "segments"]
        assert os.listdir(f"{filesystem.root}/segments") == []

    def test_a_file_that_cannot_be_removed_is_an_error(
        self, filesystem: LocalFilesystem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(path: str) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        filesystem.store({"a/1": [b"1"]})
        monkeypatch.setattr(filesystem, "_unlink", refused)
        with pytest.raises(StoragePermissionError, match="a/1"):
            filesystem.remove(["a/1"])
        assert filesystem.read("a/1") == b"1"

    def test_a_stream_of_another_filesystem_is_refused(self, filesystem: LocalFilesystem) -> None:
        stream = faulty_bucket({}, Faults()).stream("x")
        with pytest.raises(TypeError):
            filesystem.store({}, [stream])

    def test_no_descriptor_stays_open(self, filesystem: LocalFilesystem, monkeypatch: pytest.MonkeyPatch) -> None:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(5):
            stream = filesystem.stream(f"s/{number}")
            filesystem.store({f"a/{number}": [b"1"]}, [stream])
            filesystem.stream(f"s/abandoned-{number}").abandon()
            filesystem.create(f"c/{number}", b"1")
            filesystem.overwrite("c/hint", b"1")
        monkeypatch.setattr(filesystem, "_fsync_file", _unsupported)
        with pytest.raises(TrajstoreError):
            filesystem.store({"b/1": [b"1"], "b/2": [b"1"]}, [filesystem.stream("s/x")])
        with pytest.raises(TrajstoreError):
            filesystem.create("c/x", b"1")
        assert len(os.listdir("/proc/self/fd")) == before


class TestMemoryFilesystem(FilesystemConformance):
    @pytest.fixture
    def filesystem(self) -> Any:
        name = f"memory://conformance-{uuid.uuid4().hex}"
        yield connect(name)
        fsspec.filesystem("memory").rm(name, recursive=True) if fsspec.filesystem("memory").exists(name) else None


class TestBucket(FilesystemConformance):
    """The bucket of the fault tests, in good health: what is tested on it counts."""

    @pytest.fixture
    def filesystem(self) -> Any:
        return faulty_bucket({}, Faults())


def test_a_storage_that_cannot_create_atomically_is_refused_with_the_way_out(tmp_path: Path) -> None:
    fs = fsspec.filesystem("file", auto_mkdir=True)  # looks first, writes afterwards
    filesystem = RemoteFilesystem(fs, str(tmp_path / "store"), url="file")
    with pytest.raises(UnsupportedStorageError, match="single_writer=True"):
        filesystem.create("snapshots/1", b"x")
    assert list(tmp_path.iterdir()) == []
    alone = RemoteFilesystem(fs, str(tmp_path / "store"), url="file", single_writer=True)
    assert alone.create("snapshots/1", b"x")
    assert not alone.create("snapshots/1", b"y")
    assert alone.read("snapshots/1") == b"x"


def test_urls_lead_to_their_filesystem(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}", tmp_path):
        filesystem = connect(url)
        assert isinstance(filesystem, LocalFilesystem)
        assert filesystem.root == str(tmp_path)
    assert isinstance(connect("memory://a/b"), RemoteFilesystem)
    with pytest.raises(StorageError, match="nosuchthing"):
        connect("nosuchthing://a/b")
    with pytest.raises(StorageError, match="storage_options"):
        connect(str(tmp_path), storage_options={"key": "x"})


def _unsupported(*_: Any) -> None:
    raise OSError(errno.ENOTSUP, "Operation not supported")
