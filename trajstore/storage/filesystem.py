"""What the store asks of a disk or a bucket.

Invariant: ``store`` returns only when the objects are durable, and ``create`` never replaces an object: at most one caller
in the world gets True for a key. Every implementation inherits the same conformance tests.
"""

from __future__ import annotations

import datetime as dt
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class ByteRange:
    """Bytes ``[start, stop)`` of an object."""

    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class ReadRun:
    """One read that serves several ranges of an object."""

    key: str
    start: int
    stop: int
    members: tuple[int, ...]  # positions in the request


@dataclass(frozen=True)
class ObjectInfo:
    """An object as a listing shows it.

    Attributes:
        key: Its name.
        nbytes: Its size.
        modified: When it was written or got its name, UTC, by the storage's clock; None where the storage does not say. Of
            an upload in parts, some storages say when it was begun.
    """

    key: str
    nbytes: int
    modified: dt.datetime | None = field(default=None, compare=False)


class ObjectStream(ABC):
    """An object that is written from front to back; it exists once ``Filesystem.store`` was given the stream."""

    key: str

    @abstractmethod
    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append bytes."""

    @abstractmethod
    def abandon(self) -> None:
        """Give the object up; what was written of it may stay as an orphan. Never fails; may be called twice."""


class Filesystem(ABC):
    """A folder on a disk or under a bucket. Keys are relative to it."""

    url: str
    description: str  # for messages
    single_writer: bool  # the caller promises that nobody else writes
    # How many bytes an object may have before it is streamed while it grows instead of kept until it is whole.
    stream_threshold_bytes: int
    # Whether ``read_runs`` has all its requests under way at once; if not, callers read from several threads.
    overlaps_reads: bool
    # Distance of two ranges that are cheaper to read in one go than in two.
    max_gap_bytes: int

    @abstractmethod
    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        """Whole objects, concurrently; None for one that is not there."""

    @abstractmethod
    def read_runs(self, runs: Sequence[ReadRun]) -> list[Buffer]:
        """The bytes of each run, concurrently.

        Raises:
            MissingObjectError: An object is not there.
            CorruptionError: An object ends before a run does.
        """

    def read_into(self, key: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill buffers, one after the other, with the bytes of an object from ``start`` on.

        Raises:
            MissingObjectError: It is not there.
            CorruptionError: It ends too early.
        """
        stop = start + sum(len(buffer) for buffer in buffers)
        data = memoryview(self.read_runs([ReadRun(key, start, stop, (0,))])[0])
        done = 0
        for buffer in buffers:
            buffer[:] = data[done : done + len(buffer)]
            done += len(buffer)

    @abstractmethod
    def stream(self, key: str) -> ObjectStream:
        """Begin an object too large to be held in memory."""

    @abstractmethod
    def store(self, objects: Mapping[str, Sequence[Buffer]], streams: Sequence[ObjectStream] = ()) -> None:
        """Write whole objects and finish streams; when this returns, all of them are durable."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Put an object only if there is none.

        Returns:
            True if the object now holds ``data`` because of this call; False if somebody else's is there.

        Raises:
            CommitOutcomeUnknownError: The storage never said which.
            UnsupportedStorageError: It cannot tell.
        """

    @abstractmethod
    def overwrite(self, key: str, data: bytes, *, durable: bool = False) -> None:
        """Replace a small object: whoever reads it sees its former bytes or the new ones, never a mixture.

        Args:
            key: Of the object.
            data: The new bytes.
            durable: Return only when they would outlive a power loss; otherwise nothing depends on them.
        """

    @abstractmethod
    def list_objects(self, prefix: str) -> Iterable[ObjectInfo]:
        """All objects under ``prefix/``, or of the whole store for ``""``; nothing if there are none."""

    def list_folders(self) -> list[str]:
        """Names of the folders at the top, sorted, some of which may be empty. Does not look into them where it can."""
        return sorted({info.key.split("/", 1)[0] for info in self.list_objects("") if "/" in info.key})

    @abstractmethod
    def remove(self, keys: Sequence[str]) -> None:
        """Remove objects that nothing refers to; one that is not there is none to remove."""

    @abstractmethod
    def copy_from(
        self,
        source: Filesystem,
        objects: Sequence[ObjectInfo],
        *,
        link: bool = True,
        names: Mapping[str, str] | None = None,
        done: Callable[[ObjectInfo], None] = lambda _: None,
    ) -> int:
        """Have immutable objects of another store; when this returns, they are durable.

        Args:
            source: Where they are.
            objects: Which. One of this key and size that is here already is the same, and stays.
            link: Let both stores share the bytes if the disk can (hard links).
            names: Keys under which they are to be here, where these differ.
            done: Called after each, maybe from several threads.

        Returns:
            Bytes that were written.

        Raises:
            MissingObjectError: One is not there.
        """

    @abstractmethod
    def errors(self, key: str) -> AbstractContextManager[Any]:
        """Translate what the storage raises inside the block into the tree of ``trajstore.errors``."""

    def close(self) -> None:
        """Let go of threads and connections. May be called twice."""
        return

    def read(self, key: str) -> bytes | None:
        """One whole object, or None."""
        return self.read_many([key])[0]

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[Buffer]:
        """The bytes of each range, neighbours read together."""
        runs = coalesce(ranges, max_gap_bytes=self.max_gap_bytes)
        out: list[Buffer] = [b""] * len(ranges)
        for run, data in zip(runs, self.read_runs(runs), strict=True):
            view = memoryview(data)
            for member in run.members:
                wanted = ranges[member]
                out[member] = view[wanted.start - run.start : wanted.stop - run.start]
        return out


def read_in_pieces(source: Filesystem, info: ObjectInfo, *, piece_bytes: int = 16 * 1024 * 1024) -> Iterator[Buffer]:
    """A whole object, in memory one piece at a time.

    Raises:
        MissingObjectError: It is not there.
    """
    for start in range(0, info.nbytes, piece_bytes):
        stop = min(start + piece_bytes, info.nbytes)
        yield source.read_runs([ReadRun(info.key, start, stop, (0,))])[0]


def coalesce(
    ranges: Sequence[ByteRange], *, max_gap_bytes: int, max_run_bytes: int = 32 * 1024 * 1024
) -> list[ReadRun]:
    """Plan as few reads as possible for these ranges. Pure: no I/O.

    Args:
        ranges: In any order; they may overlap.
        max_gap_bytes: Ranges of one object closer than this are read together.
        max_run_bytes: No run grows beyond this by joining.

    Examples:
        >>> coalesce([ByteRange("a", 8, 12), ByteRange("a", 0, 8), ByteRange("b", 0, 4)], max_gap_bytes=0)
        [ReadRun(key='a', start=0, stop=12, members=(1, 0)), ReadRun(key='b', start=0, stop=4, members=(2,))]
    """
    order = sorted(range(len(ranges)), key=lambda i: (ranges[i].key, ranges[i].start, ranges[i].stop))
    runs: list[ReadRun] = []
    members: list[int] = []
    key, start, stop = "", 0, 0
    for i in order:
        r = ranges[i]
        if members and r.key == key and r.start <= stop + max_gap_bytes and max(r.stop, stop) - start <= max_run_bytes:
            members.append(i)
            stop = max(stop, r.stop)
            continue
        if members:
            runs.append(ReadRun(key, start, stop, tuple(members)))
        members, key, start, stop = [i], r.key, r.start, r.stop
    if members:
        runs.append(ReadRun(key, start, stop, tuple(members)))
    return runs
