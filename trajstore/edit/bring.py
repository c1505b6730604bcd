"""Segments of other stores brought into one: their objects found, linked or copied, and what they are called there.

Invariant: what is brought never takes the name of an object that a vacuum of the target may have found to be waste. Where
the version that the commit lands on names the same segment for a trajectory, nothing is brought. In a store without a
version, which no vacuum touches, a segment keeps its name; else it gets one that nobody has used, and that begins like the
former one, so that it is known again. No byte of a segment says its name.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trajstore.edit.borrow import Owner
from trajstore.edit.needed import own_segments
from trajstore.errors import ManifestsChangedError, MissingObjectError
from trajstore.format import layout
from trajstore.format.manifest import SegmentEntry
from trajstore.format.snapshot import Snapshot
from trajstore.progress import byte_progress
from trajstore.storage.changes import Append, MergedManifests, ReadManifests
from trajstore.storage.commit import Version
from trajstore.storage.filesystem import Filesystem, ObjectInfo

_KNOWN_BY = 16  # hexadecimal digits at the beginning of a name
_LISTED_ONE_BY_ONE = 8  # segments; of more, the whole folder is listed at once


@dataclass(frozen=True)
class Instead(Append):
    """Trajectories in the place of all that were there: what those referred to is referred to no more.

    Attributes:
        planned_on: The version whose segments were looked at.
        kept: Segments that were not brought, as that version names them.
    """

    instead: bool = True
    planned_on: int = 0
    kept: frozenset[str] = frozenset()

    def apply(self, parent: Snapshot, merged: MergedManifests | None, read: ReadManifests) -> Snapshot:
        """The next snapshot.

        Raises:
            ManifestsChangedError: It does not name all of these segments any more, so that vacuum may remove them.
        """
        if self.kept and parent.version != self.planned_on and not self.kept <= own_segments(parent, read).keys():
            raise ManifestsChangedError(
                f"version {parent.version} does not name segments any more that were to be used again; do it again"
            )
        return super().apply(replace(parent, bases=()), merged, read)


class Brought:
    """Segments and layers of other stores that are to be in this one.

    Args:
        target: This one.
        parts: They.
        owners: Where each is.
        objects: Of each.
        link: Let both stores share the bytes if the disk can.
        progress: Show bytes on standard error; by default in a terminal, if there are many.
    """

    def __init__(
        self,
        target: Filesystem,
        parts: Mapping[str, SegmentEntry],
        owners: Mapping[str, Owner],
        objects: Mapping[str, Sequence[ObjectInfo]],
        *,
        link: bool,
        progress: bool | None,
    ) -> None:
        self._target = target
        self._parts = parts
        self._owners = owners
        self._objects = objects
        self._link = link
        self._progress = progress
        self._fresh: dict[str, str] = {}  # names that nobody has used
        self._kept: dict[str, str] = {}
        self.written_bytes = 0

    @property
    def names(self) -> dict[str, str]:
        """What each is called there."""
        return {**self._kept, **self._fresh}

    @property
    def kept(self) -> frozenset[str]:
        """Names there that were in use before, or may be."""
        return frozenset(self._kept.values())

    def bring(self, head: Version, read: ReadManifests) -> None:
        """Have all of them in the target, for a commit on a version of it; what was copied for another version stays.

        Raises:
            MissingObjectError: One is not where it should be.
        """
        there: dict[tuple[object, ...], str] = {}
        if self._owners:
            there = {_same(part): name for name, part in own_segments(head.snapshot, read).items()}
        self._kept, wanted = {}, {}
        for name in self._owners:
            if name in self._fresh:
                continue
            known = there.get(_same(self._parts[name]))
            if known is not None:
                self._kept[name] = known
            elif head.number:
                wanted[name] = self._fresh[name] = name[:_KNOWN_BY] + uuid.uuid4().hex[_KNOWN_BY:]
            else:
                wanted[name] = self._kept[name] = name
        if wanted:
            self._copy(wanted)

    def _copy(self, names: Mapping[str, str]) -> None:
        """Have segments in the target under these names."""
        lots = [
            (filesystem, [o for name in few for o in self._objects[name]])
            for filesystem, few in by_owner({name: self._owners[name] for name in names})
        ]
        keys = {o.key: layout.same_object_in(here, o.key) for name, here in names.items() for o in self._objects[name]}
        on_disks = "://" not in "".join([self._target.url, *(filesystem.url for filesystem, _ in lots)])
        title = "linking, or copying between disks" if self._link and on_disks else "copying"
        total = sum(o.nbytes for _, objects in lots for o in objects)
        with byte_progress(title, total, shown=self._progress) as advance:
            for filesystem, objects in lots:
                self.written_bytes += self._target.copy_from(
                    filesystem, objects, link=self._link, names=keys, done=lambda o: advance(o.nbytes)
                )


def _same(part: SegmentEntry) -> tuple[object, ...]:
    """Equal for copies of one segment: they come from the same name, and have the same page checksums."""
    return part.uuid[:_KNOWN_BY], part.nbytes, part.columns, part.zarr_sha256, part.pages_sha256


def find_objects(owners: Mapping[str, Owner], entries: Mapping[str, SegmentEntry]) -> dict[str, list[ObjectInfo]]:
    """The objects of all segments, by segment.

    Raises:
        MissingObjectError: Some are not there.
    """
    found: dict[str, list[ObjectInfo]] = {}
    for filesystem, names in by_owner(owners):
        found.update(_objects(filesystem, [entries[name] for name in names]))
    return found


def by_owner(owners: Mapping[str, Owner]) -> list[tuple[Filesystem, list[str]]]:
    """Segments of each store."""
    found: dict[int, tuple[Filesystem, list[str]]] = {}
    for name, owner in owners.items():
        found.setdefault(id(owner.filesystem), (owner.filesystem, []))[1].append(name)
    return list(found.values())


def _objects(filesystem: Filesystem, segments: Sequence[SegmentEntry]) -> dict[str, list[ObjectInfo]]:
    """The objects of segments, whose sizes add up to what the manifest says."""
    names = {entry.uuid for entry in segments}
    found: dict[str, list[ObjectInfo]] = {name: [] for name in names}
    prefixes = [layout.SEGMENTS]
    if len(names) <= _LISTED_ONE_BY_ONE:
        prefixes = [layout.segment_folder(name) for name in sorted(names)]
    for prefix in prefixes:
        for info in filesystem.list_objects(prefix):
            name = layout.segment_of(info.key)
            if name in names:
                found[name].append(info)
    for entry in segments:
        nbytes = sum(o.nbytes for o in found[entry.uuid])
        if nbytes < entry.nbytes:
            raise MissingObjectError(
                f"{layout.segment_folder(entry.uuid)} in {filesystem.description} holds {nbytes} bytes, its manifest says "
                f"{entry.nbytes}; restore it from a copy"
            )
    return found
