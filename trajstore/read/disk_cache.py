"""Stored pages of a remote store, kept on a local disk by all processes of a machine.

Invariant: a page's file is renamed into place whole, or is not there. Names of pages only enter file names as a digest, so
no name leads out of the folder. Nothing waits for another process: what is gone is a miss, what does not fit is not kept,
and the one lock (``flock``, who counts and evicts) belongs to the kernel, which drops it with its process.

The files lie in a folder of their own inside the one given::

    trajstore-pages-1/ledger               bytes kept: as counted last, and what every process has added or taken since
    trajstore-pages-1/3f/<digest>-<page>   one page; its modification time is its last use, to the minute
    trajstore-pages-1/3f/.tmp-<random>     a page being written, or left by a process that was killed

Files are not synced: after a power loss one may be short, empty or full of zeros. The length finds some of these, the
caller's checksum the rest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import stat
import struct
import threading
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trajstore.errors import StorageError, StoragePermissionError
from trajstore.storage.filesystem import Buffer

_log = logging.getLogger(__name__)

_FOLDER = "trajstore-pages-1"
_LEDGER = "ledger"
_TEMPORARY = ".tmp-"
_SHARDS = 256
_BLOCK_BYTES = 4096  # what a file of one byte takes on most disks
_KEEP = 0.9  # of max_bytes, after evicting
_TOUCH_S = 60.0  # a use is noted on disk at most this often
_RECOUNT_S = 3600.0  # processes that were killed leave the ledger wrong
_STALE_S = 600.0  # nobody takes this long to write a page
_LOT_BYTES = 8 << 20  # reserved in the ledger at once
_KNOWN_OBJECTS = 1 << 16
_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
# https://bford.info/cachedir/: backup programs leave such folders out.
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Pages kept by trajstore; may be deleted at any time.\n"


class PageName(NamedTuple):
    """A stored page. A plain tuple of these four will do: one is made per page, and dataclasses take four times as long."""

    segment: str  # uuid
    object: str  # name inside the segment
    page: int
    nbytes: int  # as stored; a file of another length is not this page


@dataclass(frozen=True)
class DiskCacheStats:
    """Numbers of one ``DiskCache``; ``kept_bytes`` is of the folder, the others of this process since it was opened."""

    hits: int  # pages
    misses: int  # pages
    stored: int  # pages written
    evictions: int  # pages removed for lack of room
    discarded: int  # pages that failed their checksum
    kept_bytes: int  # on disk, of all processes; each page is counted in whole blocks of 4096 bytes
    max_bytes: int
    off: str | None  # why no more pages are stored; None while they are


class DiskCache:
    """Pages on disk, the least recently used removed first.

    Any number of threads and processes may use one folder, each process through a ``DiskCache`` of its own. They should
    agree on ``max_bytes``: the smallest one counts.

    Args:
        folder: On a local disk; made if it is missing.
        max_bytes: Most bytes of all pages in the folder, whoever stored them. Exceeded at most by what other processes
            are writing while one of them counts.
        clock: Seconds since 1970.

    Raises:
        ValueError: ``max_bytes`` is not positive.
        StoragePermissionError: The folder cannot be written.
        StorageError: It cannot be made or used for another reason.

    Examples:
        >>> import tempfile
        >>> cache = DiskCache(tempfile.mkdtemp(), max_bytes=1 << 20)
        >>> names = [PageName("5f0c", "obs/image/c.0.0.0.0", page, 3) for page in range(2)]
        >>> cache.put_many(names[:1], [b"abc"])
        >>> cache.get_many(names)
        [b'abc', None]
        >>> cache.stats().hits, cache.stats().misses, cache.stats().kept_bytes
        (1, 1, 4096)
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, max_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        if max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes}, expected a positive number of bytes to keep on disk")
        self.folder = os.path.abspath(os.fspath(folder))
        self.max_bytes = max_bytes
        self._clock = clock
        self._root = os.path.join(self.folder, _FOLDER)
        self._ledger = _Ledger(f"{self._root}/{_LEDGER}")
        self._shards = [f"{self._root}/{shard:02x}" for shard in range(_SHARDS)]
        self._objects: dict[tuple[str, str], tuple[int, str]] = {}  # first shard, digest
        self._lock = threading.Lock()  # of the numbers below
        self._hits = self._misses = self._stored = self._evictions = self._discarded = 0
        self._off: str | None = None
        self._warned_of_reads = False
        try:
            os.makedirs(self._root, exist_ok=True)
            self._write_file(f"{self._root}/CACHEDIR.TAG", _TAG)
            self._reserve(0)
        except OSError as error:
            kind = StoragePermissionError if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else StorageError
            raise kind(
                error.errno,
                f"{self.folder} cannot keep pages: {error.strerror or error}; pass a folder on a local disk with free space "
                "that you may write, or none",
            ) from error

    def get_many(self, names: Sequence[PageName]) -> list[bytes | None]:
        """The stored bytes of each page; None for one that is not here. Not verified: that is the caller's part.

        Never fails: a page that cannot be read is a miss.
        """
        now = self._clock()
        found = [self._read(name, now) for name in names]
        misses = sum([data is None for data in found])
        with self._lock:
            self._hits += len(found) - misses
            self._misses += misses
        return found

    def put_many(self, names: Sequence[PageName], datas: Sequence[Buffer]) -> None:
        """Keep pages, removing others for them.

        Never fails for want of room or permission: then ``stats().off`` says why nothing more is stored. A page larger than
        nine tenths of ``max_bytes`` is not kept, nor is anything that does not fit while another process makes room.

        Raises:
            ValueError: A page has not the length that its name says.
        """
        lot: list[tuple[str, Buffer]] = []
        lot_bytes = 0
        for name, data in zip(names, datas, strict=True):
            size = memoryview(data).nbytes
            if size != name[3]:
                raise ValueError(f"page {tuple(name)} has {size} bytes, expected {name[3]}; pass the bytes as stored")
            taken = _on_disk(size)
            if self._off is not None or taken > _KEEP * self.max_bytes:
                continue
            # Small lots: those that others have under way while one counts are what may exceed the bound.
            if lot and lot_bytes + taken > min(_LOT_BYTES, self.max_bytes // 64):
                self._store(lot)
                lot, lot_bytes = [], 0
            path = self._path(name)
            if not _has_length(path, size):  # another process may have fetched it as well
                lot.append((path, data))
                lot_bytes += taken
        if lot:
            self._store(lot)

    def discard(self, name: PageName) -> None:
        """Remove a page that failed its checksum, so that it is fetched again. Never fails."""
        freed = self._remove(self._path(name))
        if freed:
            with contextlib.suppress(OSError):
                self._ledger.add(-freed)
        with self._lock:
            self._discarded += 1

    def stats(self) -> DiskCacheStats:
        """Numbers as of now."""
        balance = None
        with contextlib.suppress(OSError):
            balance = self._ledger.add(0)
        with self._lock:
            return DiskCacheStats(
                hits=self._hits,
                misses=self._misses,
                stored=self._stored,
                evictions=self._evictions,
                discarded=self._discarded,
                kept_bytes=0 if balance is None else balance.kept_bytes,
                max_bytes=self.max_bytes,
                off=self._off,
            )

    def _path(self, name: PageName) -> str:
        known = self._objects.get(name[:2])
        if known is None:
            # ascii() tells every pair of strings apart and takes every character that a string can hold.
            digest = hashlib.blake2b(ascii(name[:2]).encode(), digest_size=16).hexdigest()
            if len(self._objects) >= _KNOWN_OBJECTS:
                self._objects.clear()
            known = self._objects[name[:2]] = int(digest[:2], 16), digest
        return f"{self._shards[known[0] + name[2] & _SHARDS - 1]}/{known[1]}-{name[2]}"

    def _read(self, name: PageName, now: float) -> bytes | None:
        # This runs between decodes on all worker threads, which take turns with the interpreter: few calls.
        try:
            descriptor = os.open(self._path(name), _READ)
            try:
                status = os.fstat(descriptor)
                if status.st_size != name[3]:
                    return None
                data = os.read(descriptor, name[3])
                if not -_TOUCH_S < now - status.st_mtime < _TOUCH_S:
                    with contextlib.suppress(OSError):  # a file of another user is only read
                        os.utime(descriptor, (now, now))
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            return None
        except OSError as error:
            with self._lock:
                first, self._warned_of_reads = not self._warned_of_reads, True
            if first:
                _log.warning("pages kept in %s cannot be read and are fetched again: %s", self.folder, error)
            return None
        return data if len(data) == name[3] else None

    def _store(self, lot: Sequence[tuple[str, Buffer]]) -> None:
        reserved = sum(_on_disk(memoryview(data).nbytes) for _, data in lot)
        stored = 0
        try:
            if not self._reserve(reserved):
                return
            for path, data in lot:
                self._write_file(path, data)
                stored += 1
        except FileNotFoundError:
            pass  # somebody is clearing the folder: not kept
        except OSError as error:
            with self._lock:
                first = self._off is None
                self._off = f"{error.strerror or error} ({self.folder})"
            if first:
                _log.warning(
                    "no more pages are kept in %s: %s; reading goes on without. Free space or restore access, and open the "
                    "store again",
                    self.folder,
                    error.strerror or error,
                )
        finally:
            with self._lock:
                self._stored += stored

    def _write_file(self, path: str, data: Buffer) -> None:
        folder = os.path.dirname(path)
        if folder == self._root:
            folder = self._shards[0]  # where counting finds what a killed process has left
        temporary = f"{folder}/{_TEMPORARY}{uuid.uuid4().hex}"
        try:
            descriptor = os.open(temporary, _CREATE, 0o666)
        except FileNotFoundError:  # a shard's first page, or somebody has cleared the folder
            os.makedirs(folder, exist_ok=True)
            descriptor = os.open(temporary, _CREATE, 0o666)
        try:
            try:
                rest = memoryview(data).cast("B")
                while len(rest):
                    rest = rest[os.write(descriptor, rest) :]
                now = self._clock()
                os.utime(descriptor, (now, now))
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _remove(self, path: str) -> int:
        """Bytes freed on disk; 0 if the file is gone already or cannot be removed."""
        try:
            size = os.stat(path, follow_symlinks=False).st_size
            os.unlink(path)
        except OSError:
            return 0
        return _on_disk(size)

    def _reserve(self, nbytes: int) -> bool:
        """Whether ``nbytes`` more may be written. They count from now on."""
        # Reserve first, then look: two processes that look first would both find room.
        balance = self._ledger.add(nbytes)
        if self._is_settled(balance) or self._count_and_evict(nbytes):
            return True
        if balance is not None and balance.kept_bytes <= self.max_bytes:
            return True
        self._ledger.add(-nbytes)
        return False

    def _is_settled(self, balance: _Balance | None) -> bool:
        if balance is None or not 0 <= balance.kept_bytes <= self.max_bytes:
            return False
        return abs(self._clock() - balance.counted_at) < _RECOUNT_S

    def _count_and_evict(self, reserved: int) -> bool:
        """Count the files, and remove the oldest if they and ``reserved`` bytes exceed the bound.

        Returns:
            False if another process or thread is at it.
        """
        os.makedirs(self._root, exist_ok=True)
        descriptor = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                pass  # a disk without locks: two may count at once, which costs time only
            balance = self._ledger.add(0)
            if self._is_settled(balance):
                return True  # another one was quicker
            kept, ages, sizes = self._count()
            # Over the bound by the ledger is over, though fewer files are there: the rest is being written.
            believed = kept + reserved if balance is None else max(kept + reserved, balance.kept_bytes)
            excess = kept + reserved - int(_KEEP * self.max_bytes)
            if believed > self.max_bytes and excess > 0:
                kept -= self._evict(ages, sizes, excess)
            latest = self._ledger.add(0)
            # What others added meanwhile may be counted twice, which errs on the side of the bound.
            added = max(0, latest.kept_bytes - balance.kept_bytes) if latest and balance else 0
            self._write_file(self._ledger.path, self._ledger.first(kept + reserved + added, self._clock()))
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child forked meanwhile has the descriptor as well
            os.close(descriptor)
        return True

    def _count(self) -> tuple[int, array[int], array[int]]:
        """Bytes on disk of all files, and of each page its last use in ns and its bytes on disk."""
        ages, sizes = array("q"), array("q")  # 16 bytes per page; paths would take ten times as much
        kept = 0
        stale_ns = int((self._clock() - _STALE_S) * 1e9)
        for entry, status in self._files():
            if not entry.name.startswith(_TEMPORARY):
                ages.append(status.st_mtime_ns)
                sizes.append(_on_disk(status.st_size))
            elif status.st_mtime_ns < stale_ns and self._remove(entry.path):
                continue
            kept += _on_disk(status.st_size)
        return kept, ages, sizes

    def _evict(self, ages: array[int], sizes: array[int], excess: int) -> int:
        """Remove the least recently used pages, ``excess`` bytes or a little more; returns the bytes freed."""
        used_at, taken = np.frombuffer(ages, np.int64), np.frombuffer(sizes, np.int64)
        order = np.argsort(used_at, kind="stable")
        last = min(int(np.searchsorted(np.cumsum(taken[order]), excess)), len(order) - 1)
        if last < 0:
            return 0
        limit = int(used_at[order[last]])
        freed = evictions = 0
        for entry, status in self._files():
            # A page that was used since it was counted stays.
            if status.st_mtime_ns <= limit and not entry.name.startswith(_TEMPORARY):
                size = self._remove(entry.path)
                freed += size
                evictions += size > 0
        with self._lock:
            self._evictions += evictions
        return freed

    def _files(self) -> Iterator[tuple[os.DirEntry[str], os.stat_result]]:
        """Every file in the shards, those aside that go away meanwhile."""
        for shard in self._shards:
            try:
                entries = os.scandir(shard)
            except FileNotFoundError:
                continue
            with entries:
                for entry in entries:
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if stat.S_ISREG(status.st_mode):
                        yield entry, status


@dataclass(frozen=True)
class _Balance:
    kept_bytes: int
    counted_at: float  # seconds since 1970


class _Ledger:
    """Bytes that all processes keep in the folder.

    A file of int64: a random number that tells one count from the next, when it was made (ns), the bytes counted, then one
    change after the other. An append of 8 bytes is atomic, so no process waits for another; whoever counts anew replaces
    the file, and a change that goes to the old one at that moment is wrong until the next count.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.Lock()  # of what was read so far
        self._count = b""  # which count the two numbers below belong to
        self._offset = 0
        self._total = 0

    def add(self, change: int) -> _Balance | None:
        """Note a change and return the balance; None if there is no ledger that makes sense."""
        with self._lock:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
            try:
                if change:
                    os.write(descriptor, struct.pack("<q", change))
                head = os.pread(descriptor, 16, 0)
                if head != self._count:
                    self._count, self._offset, self._total = head, 16, 0
                while data := os.pread(descriptor, 1 << 20, self._offset):
                    if len(data) % 8:
                        return None
                    self._total += sum(value for (value,) in struct.iter_unpack("<q", data))
                    self._offset += len(data)
            finally:
                os.close(descriptor)
            if self._offset == 16:
                return None
            return _Balance(self._total, struct.unpack("<q", head[8:])[0] / 1e9)

    @staticmethod
    def first(kept_bytes: int, counted_at: float) -> bytes:
        """What a ledger begins with after a count of the files."""
        return os.urandom(8) + struct.pack("<qq", int(counted_at * 1e9), kept_bytes)


def _on_disk(nbytes: int) -> int:
    return -(-nbytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _has_length(path: str, nbytes: int) -> bool:
    try:
        return os.stat(path, follow_symlinks=False).st_size == nbytes
    except OSError:
        return False
