"""A store on anything that fsspec reaches: memory, S3, Google Cloud Storage, Azure, HTTP (to read).

Invariant: objects other than versions have names that nobody else will ever use, so writing one twice is harmless and every
transient failure is retried; versions go through ``publish.create``.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import glob
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.spec import AbstractBufferedFile

from trajstore.errors import (
    CorruptionError,
    ForkedError,
    MissingObjectError,
    StorageError,
    StoragePermissionError,
    StorageTimeoutError,
    TrajstoreError,
)
from trajstore.storage import publish
from trajstore.storage.filesystem import Buffer, Filesystem, ObjectInfo, ObjectStream, ReadRun, read_in_pieces
from trajstore.storage.retry import error_codes, retrying
from trajstore.storage.workers import FORKED

_log = logging.getLogger(__name__)

_COPIED_TOGETHER = 64
_REMOVED_TOGETHER = 1000
_PART_BYTES = 16 * 1024 * 1024
# How S3, Google, Azure, file servers and fsspec's memory call the time of writing.
_MODIFIED = ("LastModified", "updated", "last_modified", "mtime", "modified", "created")


class RemoteFilesystem(Filesystem):
    """A folder of an fsspec filesystem.

    Args:
        fs: The filesystem.
        root: Path of the store on it.
        url: As the user gave it.
        single_writer: See ``publish.create``.
    """

    stream_threshold_bytes = 8 * 1024 * 1024
    max_gap_bytes = 256 * 1024
    overlaps_reads = True

    def __init__(self, fs: AbstractFileSystem, root: str, *, url: str, single_writer: bool = False) -> None:
        self.fs = fs
        self.root = root.rstrip("/")
        self.url = url
        self.description = url
        self.single_writer = single_writer
        self._pid = os.getpid()
        # s3fs asks for the size of a whole object first, to fetch a large one in parts: one GET is what these objects need.
        whole_in_one_get = "max_concurrency" in inspect.signature(getattr(fs, "_cat_file", fs.cat_file)).parameters
        self._cat_options = {"max_concurrency": 1} if whole_in_one_get else {}

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Whole objects, concurrently; None for one that is not there."""
        found = self._cat([(key, None, None) for key in keys])
        out: list[bytes | None] = []
        for key, data in zip(keys, found, strict=True):
            if isinstance(data, FileNotFoundError):
                out.append(None)
            elif isinstance(data, BaseException):
                with self.errors(key):
                    raise data
            else:
                out.append(data)
        return out

    def read_runs(self, runs: Sequence[ReadRun]) -> list[Buffer]:
        """The bytes of each run, concurrently."""
        out: list[Buffer] = []
        for run, data in zip(runs, self._cat([(r.key, r.start, r.stop) for r in runs]), strict=True):
            with self.errors(run.key):
                if isinstance(data, BaseException):
                    raise data
            if len(data) != run.stop - run.start:
                raise CorruptionError(
                    f"{run.key} in {self.url} gave {len(data)} bytes of [{run.start}, {run.stop}); restore it from a copy"
                )
            out.append(data)
        return out

    def stream(self, key: str) -> ObjectStream:
        """Begin a large object: a multipart upload where the storage has such."""
        with self.errors(key):
            return _RemoteStream(self, key, self.fs.open(self._path(key), "wb", block_size=_PART_BYTES))

    def store(self, objects: Mapping[str, Sequence[Buffer]], streams: Sequence[ObjectStream] = ()) -> None:
        """Write whole objects concurrently and finish streams."""
        for stream in streams:
            if not isinstance(stream, _RemoteStream):
                raise TypeError(f"{stream!r} is not a stream of this filesystem")
            stream.finish()
        if not objects:
            return
        data = {self._path(key): b"".join(buffers) for key, buffers in objects.items()}
        with self.errors(", ".join(list(objects)[:3])):
            for attempt in retrying():
                with attempt:
                    self.fs.pipe(data)

    def create(self, key: str, data: bytes) -> bool:
        """Put-if-absent by the filesystem's own condition."""
        with self.errors(key):
            return publish.create(
                self.fs,
                self._path(key),
                data,
                single_writer=self.single_writer,
                read_back=lambda: self.read(key),
            )

    def overwrite(self, key: str, data: bytes, *, durable: bool = False) -> None:  # noqa: ARG002 - a put always is
        """Replace a small object that nothing depends on."""
        with self.errors(key):
            self.fs.pipe_file(self._path(key), data)

    def list_objects(self, prefix: str) -> Iterable[ObjectInfo]:
        """All objects under a prefix."""
        top = self._path(prefix) if prefix else self.root
        with self.errors(prefix):
            found = self._find(top)
        for path, info in sorted(found.items()):
            yield ObjectInfo(path[len(self.root) + 1 :], int(info["size"]), _modified(info))

    def list_folders(self) -> list[str]:
        """Names of the folders at the top, sorted."""
        with self.errors(self.url):
            try:
                found = self.fs.ls(self.root, detail=True)
            except FileNotFoundError:
                return []
        folders = (info["name"].rstrip("/") for info in found if info["type"] == "directory")
        return sorted(path.rsplit("/", 1)[-1] for path in folders)

    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects, many with one request where the storage can."""
        for lot in [keys[i : i + _REMOVED_TOGETHER] for i in range(0, len(keys), _REMOVED_TOGETHER)]:
            with self.errors(", ".join(lot[:3])):
                for attempt in retrying():
                    with attempt:
                        self._remove_together([self._path(key) for key in lot])

    def copy_from(
        self,
        source: Filesystem,
        objects: Sequence[ObjectInfo],
        *,
        link: bool = True,  # noqa: ARG002 - no bucket has links
        names: Mapping[str, str] | None = None,
        done: Callable[[ObjectInfo], None] = lambda _: None,
    ) -> int:
        """Copied by the server where both are on one, else through this machine."""
        keys = {info.key: (names or {}).get(info.key, info.key) for info in objects}
        folders = {os.path.dirname(key) for key in keys.values()}
        here = {o.key: o.nbytes for o in self.list_objects(os.path.commonpath(folders))} if folders else {}
        absent = [info for info in objects if here.get(keys[info.key]) != info.nbytes]
        for info in objects:
            if here.get(keys[info.key]) == info.nbytes:
                done(info)
        for lot in [absent[i : i + _COPIED_TOGETHER] for i in range(0, len(absent), _COPIED_TOGETHER)]:
            if isinstance(source, RemoteFilesystem) and source.fs is self.fs:
                self._copy_on_server(source, {info.key: keys[info.key] for info in lot})
            else:
                for info in lot:
                    self._copy_through(source, info, keys[info.key])
            for info in lot:
                done(info)
        return sum(info.nbytes for info in absent)

    @contextlib.contextmanager
    def errors(self, key: str) -> Iterator[None]:
        """Translate whatever a client library raises: fsspec, botocore, aiohttp and the like share no base class."""
        where = f"{key} in {self.url}"
        if os.getpid() != self._pid:  # the client's event loop stayed in the parent: a request would never return
            raise ForkedError(FORKED)
        try:
            yield
        except TrajstoreError:
            raise
        except FileNotFoundError as error:
            raise MissingObjectError(
                f"{where} is not there ({error}); check that the bucket exists, or restore the object from a copy"
            ) from error
        except PermissionError as error:
            raise StoragePermissionError(f"{where}: access refused ({error}); check the credentials") from error
        except Exception as error:
            if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
                raise StorageTimeoutError(
                    f"{where}: no answer in time ({error}); check the network and try again"
                ) from error
            if "NoCredentials" in type(error).__name__ or error_codes(error) & {"401", "403"}:
                raise StoragePermissionError(f"{where}: access refused ({error}); check the credentials") from error
            raise StorageError(
                getattr(error, "errno", None) or errno.EIO, f"{where}: {str(error) or repr(error)}"
            ) from error

    def _remove_together(self, paths: Sequence[str]) -> None:
        # ``rm`` takes what a shell would expand for a pattern, and would remove the objects of other stores.
        one_by_one = [path for path in paths if glob.has_magic(path)]
        together = [path for path in paths if not glob.has_magic(path)]
        try:
            if together:
                self.fs.rm(together)
        except FileNotFoundError:  # some filesystems end at the first that is not there
            one_by_one = list(paths)
        for path in one_by_one:
            with contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(path)

    def _copy_on_server(self, source: RemoteFilesystem, keys: Mapping[str, str]) -> None:
        with source.errors(", ".join(list(keys)[:3])):
            for attempt in retrying():
                with attempt:
                    self.fs.copy([source._path(key) for key in keys], [self._path(key) for key in keys.values()])

    def _copy_through(self, source: Filesystem, info: ObjectInfo, key: str) -> None:
        if info.nbytes < self.stream_threshold_bytes:
            self.store({key: list(read_in_pieces(source, info))})
            return
        stream = self.stream(key)
        try:
            for piece in read_in_pieces(source, info):
                stream.write([piece])
            self.store({}, [stream])
        except BaseException:
            stream.abandon()
            raise

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def _find(self, top: str) -> dict[str, Any]:
        while True:
            try:
                return self.fs.find(top, detail=True)  # type: ignore[no-any-return]
            except RuntimeError as error:  # fsspec's memory, which another thread wrote to meanwhile
                if "changed size during iteration" not in str(error):
                    raise

    def _cat(self, requests: Sequence[tuple[str, int | None, int | None]]) -> list[Any]:
        """Bytes or the error of each request; transient failures are tried again."""
        if os.getpid() != self._pid:
            raise ForkedError(FORKED)
        results: list[Any] = [None] * len(requests)
        pending = list(range(len(requests)))
        try:
            for attempt in retrying():
                with attempt:
                    # Whole objects without a range, ranges with both ends: neither needs a HEAD first.
                    got = self.fs.cat_ranges(
                        [self._path(requests[i][0]) for i in pending],
                        [requests[i][1] for i in pending],
                        [requests[i][2] for i in pending],
                        on_error="return",
                        **self._cat_options,
                    )
                    for i, data in zip(pending, got, strict=True):
                        results[i] = data
                    pending = [
                        i
                        for i in pending
                        if isinstance(results[i], BaseException) and not isinstance(results[i], FileNotFoundError)
                    ]
                    if pending:
                        raise results[pending[0]]  # noqa: TRY301 - how an attempt is told that it failed
        except Exception as error:  # noqa: BLE001 - every caller raises what stands in its request's place
            for i in pending:
                results[i] = results[i] if isinstance(results[i], BaseException) else error
        return results


def _modified(info: Mapping[str, Any]) -> dt.datetime | None:
    """When an object was written, of what a listing says about it; UTC."""
    found = next((info[name] for name in _MODIFIED if info.get(name) is not None), None)
    if isinstance(found, str):
        try:
            found = dt.datetime.fromisoformat(found)
        except ValueError:
            return None
    if isinstance(found, int | float):
        return dt.datetime.fromtimestamp(found, dt.UTC)
    if not isinstance(found, dt.datetime):
        return None
    return found.astimezone(dt.UTC) if found.tzinfo else found.replace(tzinfo=dt.UTC)


class _RemoteStream(ObjectStream):
    """An upload that grows."""

    def __init__(self, filesystem: RemoteFilesystem, key: str, file: Any) -> None:
        self.key = key
        self._filesystem = filesystem
        self._file = file

    def write(self, buffers: Sequence[Buffer]) -> None:
        with self._filesystem.errors(self.key):
            for data in buffers:
                self._file.write(data)

    def finish(self) -> None:
        with self._filesystem.errors(self.key):
            self._file.close()

    def abandon(self) -> None:
        try:
            with self._filesystem.errors(self.key):
                self._file.discard()
        except StorageError as error:
            _log.warning("an upload that was given up stays behind: %s", error)
        finally:
            if isinstance(self._file, AbstractBufferedFile):
                self._file.closed = True  # else it would be finished when it is garbage-collected
