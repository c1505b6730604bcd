"""A storage in a dictionary, whose clock stands until a test moves it and whose calls a test can count, stop or break."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from trajstore.errors import MissingObjectError
from trajstore.storage.filesystem import Buffer, Filesystem, ObjectInfo, ObjectStream, ReadRun

NOON = dt.datetime(2030, 1, 1, 12, tzinfo=dt.UTC)


class MemoryDisk(Filesystem):
    """Every call is atomic, but for ``remove`` of many, which is one call each.

    Args:
        objects: Key -> bytes and time; shared by all handles of a store.
        before: Called with the name and key of each call before it is done.
    """

    stream_threshold_bytes = 1 << 30
    max_gap_bytes = 0
    overlaps_reads = False
    single_writer = False
    url = description = "memory://test"

    def __init__(
        self,
        objects: dict[str, tuple[bytes, dt.datetime]] | None = None,
        *,
        before: Callable[[str, str], None] = lambda name, key: None,
        clock: Callable[[], dt.datetime] = lambda: NOON,
    ) -> None:
        self.objects = {} if objects is None else objects
        self.before = before
        self.clock = clock

    def read_many(self, keys: Sequence[str]) -> list[bytes | None]:
        out = []
        for key in keys:
            self.before("read", key)
            out.append(self.objects[key][0] if key in self.objects else None)
        return out

    def read_runs(self, runs: Sequence[ReadRun]) -> list[Buffer]:
        return [self.objects[run.key][0][run.start : run.stop] for run in runs]

    def stream(self, key: str) -> ObjectStream:
        raise NotImplementedError

    def store(self, objects: Mapping[str, Sequence[Buffer]], streams: Sequence[ObjectStream] = ()) -> None:
        for key, buffers in objects.items():
            self.before("store", key)
            self.objects[key] = b"".join(bytes(b) for b in buffers), self.clock()

    def create(self, key: str, data: bytes) -> bool:
        self.before("create", key)
        if key in self.objects:
            return False
        self.objects[key] = data, self.clock()
        return True

    def overwrite(self, key: str, data: bytes, *, durable: bool = False) -> None:
        self.before("overwrite", key)
        self.objects[key] = data, self.clock()

    def list_objects(self, prefix: str) -> Iterable[ObjectInfo]:
        self.before("list", prefix)
        return [
            ObjectInfo(key, len(data), time)
            for key, (data, time) in sorted(self.objects.items())
            if key.startswith(f"{prefix}/")
        ]

    def remove(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.before("remove", key)
            self.objects.pop(key, None)

    def copy_from(
        self,
        source: Filesystem,
        objects: Sequence[ObjectInfo],
        *,
        link: bool = True,
        names: Mapping[str, str] | None = None,
        done: Callable[[ObjectInfo], None] = lambda _: None,
    ) -> int:
        copied = 0
        for info in objects:
            key = (names or {}).get(info.key, info.key)
            self.before("copy", key)
            if key not in self.objects or len(self.objects[key][0]) != info.nbytes:
                (data,) = source.read_many([info.key])
                if data is None:
                    raise MissingObjectError(info.key)
                self.objects[key] = data, self.clock()
                copied += info.nbytes
            done(info)
        return copied

    def errors(self, key: str) -> Any:
        return contextlib.nullcontext()
