"""The objects of a store as one listing shows them, and objects read so that a bad one does not hide the others.

Invariant: nothing is known of an object here but its key, its size and its age.
"""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from trajstore.errors import StorageError
from trajstore.format import layout
from trajstore.storage.filesystem import Filesystem, ObjectInfo

_DOCUMENTS = (layout.TAGS, layout.PINS, layout.STATISTICS, layout.VACUUM)
_READ_BYTES = 64 << 20
_READ_TOGETHER = 256


@dataclass
class Folder:
    """A segment's objects.

    Attributes:
        sizes: Name inside the segment -> bytes.
        modified: When the youngest was written; None if the storage does not say.
    """

    sizes: dict[str, int] = field(default_factory=dict)
    modified: dt.datetime | None = None

    def add(self, name: str, info: ObjectInfo) -> None:
        """Note an object."""
        self.sizes[sys.intern(name)] = info.nbytes
        if info.modified is not None and (self.modified is None or info.modified > self.modified):
            self.modified = info.modified


@dataclass
class Listing:
    """A store's objects.

    Attributes:
        snapshots: Version -> the object.
        manifests: Key -> the object.
        segments: Uuid -> its objects.
        documents: Tags, pins and the like.
        temporary: Of writers and edits that were killed, or are at work.
    """

    snapshots: dict[int, ObjectInfo] = field(default_factory=dict)
    manifests: dict[str, ObjectInfo] = field(default_factory=dict)
    segments: dict[str, Folder] = field(default_factory=dict)
    documents: list[ObjectInfo] = field(default_factory=list)
    temporary: list[ObjectInfo] = field(default_factory=list)

    @classmethod
    def of(cls, filesystem: Filesystem) -> Listing:
        """All objects of a store."""
        found = cls()
        for info in filesystem.list_objects(""):
            found.add(info)
        return found

    def add(self, info: ObjectInfo) -> None:
        """Note an object; other people's are passed over."""
        top = info.key.partition("/")[0]
        segment = layout.segment_of(info.key)
        version = layout.snapshot_version(info.key)
        if info.key.endswith(".tmp") or layout.is_hold(info.key):
            self.temporary.append(info)
        if info.key.endswith(".tmp"):
            return
        if segment is not None:
            self.segments.setdefault(segment, Folder()).add(
                info.key.removeprefix(layout.segment_folder(segment) + "/"), info
            )
        elif version is not None:
            self.snapshots[version] = info
        elif top == layout.MANIFESTS:
            self.manifests[info.key] = info
        elif top in _DOCUMENTS and info.key.endswith(".json"):
            self.documents.append(info)


def list_segment(filesystem: Filesystem, segment: str) -> Folder:
    """The objects of one segment."""
    folder = Folder()
    prefix = layout.segment_folder(segment) + "/"
    for info in filesystem.list_objects(layout.segment_folder(segment)):
        if not info.key.endswith(".tmp"):
            folder.add(info.key.removeprefix(prefix), info)
    return folder


def read_each(filesystem: Filesystem, keys: Sequence[str]) -> list[bytes | StorageError | None]:
    """Whole objects, concurrently; None for one that is not there, the error for one that the storage does not give."""
    try:
        return list(filesystem.read_many(keys))
    except StorageError as error:
        if len(keys) == 1:
            return [error]
    return [one for key in keys for one in read_each(filesystem, [key])]


def lots(items: Iterable[tuple[str, int]]) -> Iterator[list[str]]:
    """Keys in lots that are read together: of bounded number, and of bounded bytes but for the first of each.

    Args:
        items: Keys and their sizes.

    Examples:
        >>> [len(lot) for lot in lots([("a", 1), ("b", 65 << 20), ("c", 1)])]
        [1, 1, 1]
    """
    lot: list[str] = []
    nbytes = 0
    for key, size in items:
        if lot and (len(lot) == _READ_TOGETHER or nbytes + size > _READ_BYTES):
            yield lot
            lot, nbytes = [], 0
        lot.append(key)
        nbytes += size
    if lot:
        yield lot


def sizes(infos: Mapping[str, ObjectInfo], keys: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Keys with their sizes, 0 where an object is not listed."""
    for key in keys:
        info = infos.get(key)
        yield key, 0 if info is None else info.nbytes
