"""A store on a disk of this machine.

Invariant: an object is acknowledged only after fsync of the file and of every directory that leads to it; a version is
created by linking a finished, fsynced file to its name, which fails if the name is taken. ``LocalFileSystem.pipe_file`` of
fsspec looks first and writes afterwards, so two writers can both win there.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime as dt
import errno
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from trajstore.errors import (
    CommitOutcomeUnknownError,
    CorruptionError,
    MissingObjectError,
    StorageError,
    StoragePermissionError,
    TrajstoreError,
    UnsupportedStorageError,
)
from trajstore.storage.above import FoldersAbove
from trajstore.storage.descriptors import OpenFiles
from trajstore.storage.filesystem import Buffer, Filesystem, ObjectInfo, ObjectStream, ReadRun, read_in_pieces
from trajstore.storage.workers import Workers

_IOV_MAX = 1024
_SYNCED_IN_TURN = 2  # folders: to start threads takes longer
_OPEN_TOGETHER = 256  # files that are written before they are synced; a process may often have 1024 open
_RENAME_NOREPLACE = 1
_AT_FDCWD = -100
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})
_NO_RENAME_FLAG = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


class LocalFilesystem(Filesystem):
    """A folder of a local disk.

    Args:
        root: Absolute path of the folder.
        single_writer: The caller promises that nobody else writes this store, so a disk that can create no file atomically
            will do.
        threads: Concurrent fsyncs and reads. A journaling filesystem settles concurrent fsyncs in one go.
    """

    stream_threshold_bytes = 1 << 20
    max_gap_bytes = 4096  # a block of the disk: another read costs little here
    overlaps_reads = False

    def __init__(self, root: str, *, single_writer: bool = False, threads: int = 8) -> None:
        self.root = root
        self.url = root
        self.description = root
        self.single_writer = single_writer
        self._workers = Workers(threads, name="trajstore-disk")
        self._open_files = OpenFiles()
        self._known_directories: set[str] = set()
        self._synced_in_root: set[str] = set()
        self._above = FoldersAbove(root)

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Whole objects; None for one that is not there."""
        return [self._read_whole(key) for key in keys]

    def read_runs(self, runs: Sequence[ReadRun]) -> list[Buffer]:
        """The bytes of each run."""
        return [self._read_run(run) for run in runs]

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Straight into memory, by one system call."""
        with self.errors(key):
            file = self._open_files.get(self._path(key))
            expected = sum(len(buffer) for buffer in buffers)
            found = os.preadv(file.number, buffers, start)
            if found < expected:
                # A file that is too short, or a read of over 2 GiB: once more, piece by piece.
                for buffer in buffers:
                    data = self._read_run(ReadRun(key, start, start + len(buffer), (0,)))
                    buffer[:] = data
                    start += len(buffer)

    def stream(self, key: str) -> ObjectStream:
        """Begin a large object."""
        with self.errors(key):
            self._ensure_directory(os.path.dirname(key))
            return _LocalStream(self, key, self._create_file(self._path(key)))

    def store(self, objects: Mapping[str, Sequence[Buffer]], streams: Sequence[ObjectStream] = ()) -> None:
        """Write whole objects and finish streams, durably."""
        dirty = {os.path.dirname(key) for key in objects} | {os.path.dirname(s.key) for s in streams}
        opened: list[tuple[int, str]] = []
        try:
            for stream in streams:
                if not isinstance(stream, _LocalStream):
                    raise TypeError(f"{stream!r} is not a stream of this filesystem")
                opened.append((stream.take_descriptor(), stream.key))
            for key, buffers in objects.items():
                with self.errors(key):
                    self._ensure_directory(os.path.dirname(key))
                    opened.append((self._create_file(self._path(key)), key))
                    self._write(opened[-1][0], buffers, key)
                if len(opened) >= _OPEN_TOGETHER:
                    self._sync_and_close(opened)
            self._sync_and_close(opened)
        finally:
            for descriptor, _ in opened:
                os.close(descriptor)
        self._sync_directories(dirty)

    def create(self, key: str, data: bytes) -> bool:
        """Put-if-absent by ``link``, else by ``renameat2(RENAME_NOREPLACE)``."""
        target = self._path(key)
        directory = os.path.dirname(target)
        temporary = os.path.join(directory, f".{uuid.uuid4().hex}.tmp")
        with self.errors(key):
            self._ensure_directory(os.path.dirname(key))
            descriptor = self._create_file(temporary)
            try:
                self._write(descriptor, [data], temporary)
                self._fsync_file(descriptor, temporary)
            except OSError:
                self._remove_temporary(temporary)
                raise
            finally:
                os.close(descriptor)
            try:
                won = self._publish(temporary, target)
            finally:
                self._remove_temporary(temporary)
            if won:
                try:
                    self._sync_directories([os.path.dirname(key)])
                except StorageError as error:
                    raise CommitOutcomeUnknownError(
                        f"{key} was created in {self.root} but its directory could not be synced ({error}); it is visible "
                        "now and may be gone after a power loss"
                    ) from error
            return won

    def overwrite(self, key: str, data: bytes, *, durable: bool = False) -> None:
        """Replace a small object, by renaming."""
        folder = os.path.dirname(key)
        temporary = self._path(f"{folder}/.{uuid.uuid4().hex}.tmp" if folder else f".{uuid.uuid4().hex}.tmp")
        with self.errors(key):
            if durable:
                self._ensure_directory(folder)
            descriptor = self._create_file(temporary)
            try:
                self._write(descriptor, [data], temporary)
                if durable:
                    self._fsync_file(descriptor, temporary)
                self._rename(temporary, self._path(key))
            except OSError:
                self._remove_temporary(temporary)
                raise
            finally:
                os.close(descriptor)
        if durable:
            self._sync_directories([folder])

    def list_objects(self, prefix: str) -> Iterable[ObjectInfo]:
        """All objects under a prefix."""
        top = self._path(prefix) if prefix else self.root
        for folder, _, names in os.walk(top):
            above = folder[len(self.root) :].lstrip(os.sep)
            for name in sorted(names):
                with contextlib.suppress(FileNotFoundError):  # a temporary file of a commit in progress
                    found = os.stat(os.path.join(folder, name))
                    # A hard link has the time of the original's bytes; its inode changed when it was made.
                    changed = dt.datetime.fromtimestamp(found.st_ctime, dt.UTC)
                    yield ObjectInfo(f"{above}/{name}" if above else name, found.st_size, changed)

    def list_folders(self) -> list[str]:
        """Names of the folders at the top, sorted."""
        with (
            self.errors(""),
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(self.root) as found,
        ):
            return sorted(entry.name for entry in found if entry.is_dir())
        return []

    def remove(self, keys: Sequence[str]) -> None:
        """Remove files, and folders that they leave empty."""
        folders: set[str] = set()
        for key in keys:
            with self.errors(key), contextlib.suppress(FileNotFoundError):
                self._open_files.forget(self._path(key))
                self._unlink(self._path(key))
            parts = key.split("/")
            folders.update("/".join(parts[:depth]) for depth in range(2, len(parts)))
        for folder in sorted(folders, key=len, reverse=True):
            self._known_directories.discard(folder)
            with contextlib.suppress(OSError):  # it is not empty
                self._remove_directory(self._path(folder))

    def copy_from(
        self,
        source: Filesystem,
        objects: Sequence[ObjectInfo],
        *,
        link: bool = True,
        names: Mapping[str, str] | None = None,
        done: Callable[[ObjectInfo], None] = lambda _: None,
    ) -> int:
        """Hard links where both are on one disk, whose bytes were synced when they were written; else copies."""
        keys = {info.key: (names or {}).get(info.key, info.key) for info in objects}
        dirty = {os.path.dirname(key) for key in keys.values()}
        for folder in dirty:
            with self.errors(folder):
                self._ensure_directory(folder)
        copied = sum(self._workers.map(lambda info: self._copy_one(source, info, keys[info.key], link, done), objects))
        self._sync_directories(dirty)
        return copied

    @contextlib.contextmanager
    def errors(self, key: str) -> Iterator[None]:
        """Translate OSError."""
        where = f"{key} in {self.root}"
        try:
            yield
        except TrajstoreError:
            raise
        except FileNotFoundError as error:
            if os.path.isdir(self.root):
                raise MissingObjectError(f"{where} is not there; restore it from a copy") from error
            raise MissingObjectError(
                f"{where}: there is no folder {self.root}, or none can be made there; check the path, or restore it from a "
                "copy"
            ) from error
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise StoragePermissionError(
                    f"{where}: {error.strerror}; check the permissions of the folder, choose another place, or open "
                    "with mode='r'"
                ) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError(error.errno, f"{where}: {error.strerror}; free space and append again") from error
            if error.errno == errno.ENOTDIR:
                raise StorageError(
                    error.errno, f"{where}: a file is where a folder should be; choose a folder, or another place"
                ) from error
            raise StorageError(error.errno, f"{where}: {error.strerror or error}") from error

    def close(self) -> None:
        """End the threads, close files."""
        self._workers.close()
        self._open_files.close()

    def _path(self, key: str) -> str:
        return os.path.join(self.root, *key.split("/"))

    def _read_whole(self, key: str) -> bytes | None:
        with self.errors(key):
            try:
                with open(self._path(key), "rb", buffering=0) as file:
                    return file.read()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def _read_run(self, run: ReadRun) -> Buffer:
        with self.errors(run.key):
            file = self._open_files.get(self._path(run.key))
            data = os.pread(file.number, run.stop - run.start, run.start)
            while len(data) < run.stop - run.start:  # one pread returns 2 GiB at most
                more = os.pread(file.number, run.stop - run.start - len(data), run.start + len(data))
                if not more:
                    raise self._ended(run.key, run.start + len(data), run.stop)
                data += more
            return data

    def _copy_one(
        self, source: Filesystem, info: ObjectInfo, key: str, link: bool, done: Callable[[ObjectInfo], None]
    ) -> int:
        target = self._path(key)
        with self.errors(key):
            # An object gets its name when it is whole and synced, so one of this size is the one.
            there = os.path.exists(target) and os.path.getsize(target) == info.nbytes
            if not there and link and isinstance(source, LocalFilesystem):
                there = self._linked(source._path(info.key), target)
            if not there:
                self._copy(read_in_pieces(source, info), target)
        done(info)
        return 0 if there else info.nbytes

    def _linked(self, origin: str, target: str) -> bool:
        try:
            self._link(origin, target)
        except FileExistsError:
            return True
        except FileNotFoundError:
            return False  # copying says which of the two is not there
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            return False
        return True

    def _copy(self, pieces: Iterable[Buffer], target: str) -> None:
        temporary = f"{target}.{uuid.uuid4().hex}.tmp"
        descriptor = self._create_file(temporary)
        try:
            for piece in pieces:
                self._write(descriptor, [piece], temporary)
            self._fsync_file(descriptor, temporary)
            self._rename(temporary, target)
        except BaseException:
            self._remove_temporary(temporary)
            raise
        finally:
            os.close(descriptor)

    def _ended(self, key: str, end: int, expected: int) -> CorruptionError:
        return CorruptionError(f"{key} in {self.root} ends at byte {end}, expected {expected}; restore it from a copy")

    def _ensure_directory(self, folder: str) -> None:
        """Make a folder of the store. Its name is durable once ``_sync_directories`` has run."""
        if folder in self._known_directories:
            return
        path = self._path(folder) if folder else self.root
        missing = []
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process made it meanwhile
                self._make_directory(path)
            if len(path) <= len(self.root):
                self._fsync_directory(os.path.dirname(path))
                self._above.root_made()
        if len(self._known_directories) > 4096:  # every segment has folders of its own
            self._known_directories.clear()
        self._known_directories.add(folder)

    def _sync_directories(self, folders: Iterable[str]) -> None:
        """Make the names in these folders, and of all folders on the way from the root, durable."""
        wanted: set[str] = set()
        for folder in folders:
            parts = folder.split("/") if folder else []
            wanted.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
            # Names in the root never change after the store's own folders are made: once per handle is enough.
            if not parts or parts[0] not in self._synced_in_root:
                wanted.add("")
        if "" in wanted:
            self._above.sync(self._sync_above)
        if len(wanted) <= _SYNCED_IN_TURN:
            for folder in sorted(wanted):
                self._sync_directory(folder)
        else:
            self._workers.map(self._sync_directory, sorted(wanted))
        self._synced_in_root.update(folder.split("/")[0] for folder in folders)

    def _remove_temporary(self, path: str) -> None:
        # A rename may have moved it; and a leftover must not turn a commit that landed into one that failed.
        with contextlib.suppress(OSError):
            self._unlink(path)

    def _publish(self, temporary: str, target: str) -> bool:
        try:
            self._link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
        else:
            return True
        try:
            self._rename_no_replace(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_RENAME_FLAG:
                raise
        else:
            return True
        if not self.single_writer:
            raise UnsupportedStorageError(
                f"{self.root} has neither hard links nor renameat2(RENAME_NOREPLACE), so two writers could overwrite each "
                "other's commits; put the store elsewhere, or pass single_writer=True if nobody else writes it"
            )
        if os.path.exists(target):
            return False
        self._rename(temporary, target)
        return True

    def _sync_and_close(self, opened: list[tuple[int, str]]) -> None:
        """Make files durable; leaves the list empty, or as it was if one could not be synced."""
        self._workers.map(self._fsync_one, opened)
        while opened:
            os.close(opened.pop()[0])

    def _fsync_one(self, opened: tuple[int, str]) -> None:
        with self.errors(opened[1]):
            self._fsync_file(*opened)

    def _sync_directory(self, folder: str) -> None:
        with self.errors(folder):
            self._fsync_directory(self._path(folder) if folder else self.root)

    def _sync_above(self, path: str) -> None:
        with self.errors(path), contextlib.suppress(PermissionError):  # those of other users exist already
            self._fsync_directory(path)

    # One method per system call that changes the disk: a test records them and cuts the power after each.

    def _make_directory(self, path: str) -> None:
        os.mkdir(path)

    def _remove_directory(self, path: str) -> None:
        os.rmdir(path)

    def _create_file(self, path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def _write(self, descriptor: int, buffers: Sequence[Buffer], name: str) -> None:  # noqa: ARG002 - for recorders
        pending = [memoryview(b).cast("B") for b in buffers if len(b)]
        first = 0
        while first < len(pending):
            written = os.writev(descriptor, pending[first : first + _IOV_MAX])
            while first < len(pending) and written >= len(pending[first]):
                written -= len(pending[first])
                first += 1
            if written:
                pending[first] = pending[first][written:]

    def _fsync_file(self, descriptor: int, name: str) -> None:  # noqa: ARG002 - for recorders
        os.fsync(descriptor)

    def _fsync_directory(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _link(self, source: str, target: str) -> None:
        os.link(source, target)

    def _rename(self, source: str, target: str) -> None:
        os.replace(source, target)

    def _rename_no_replace(self, source: str, target: str) -> None:
        function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if function is None:
            raise OSError(errno.ENOSYS, "this C library has no renameat2")
        if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), target)

    def _unlink(self, path: str) -> None:
        os.unlink(path)


class _LocalStream(ObjectStream):
    """A file that grows."""

    def __init__(self, filesystem: LocalFilesystem, key: str, descriptor: int) -> None:
        self.key = key
        self._filesystem = filesystem
        self._descriptor: int | None = descriptor

    def write(self, buffers: Sequence[Buffer]) -> None:
        if self._descriptor is None:
            raise ValueError(f"{self.key} is finished")
        with self._filesystem.errors(self.key):
            self._filesystem._write(self._descriptor, buffers, self.key)

    def take_descriptor(self) -> int:
        """Hand the open file over to whoever syncs and closes it."""
        if self._descriptor is None:
            raise ValueError(f"{self.key} is finished")
        descriptor, self._descriptor = self._descriptor, None
        return descriptor

    def abandon(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
