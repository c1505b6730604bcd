"""All versions of a store, oldest first: snapshots, the manifests that they name, and which segments trajectories need.

Invariant: memory is that of the index of one version's manifests, and of one entry per segment, however many versions there
are; each manifest is read once, unless a version that was restored brings it back.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trajstore.edit.check_manifests import ManifestIndex, check_bytes, read_index
from trajstore.edit.findings import Findings
from trajstore.edit.listing import Listing, lots, read_each, sizes
from trajstore.errors import CorruptionError, FormatVersionError, StorageError, VersionExpiredError
from trajstore.format import layout
from trajstore.format.manifest import SegmentEntry, live_mask
from trajstore.format.schemas import validate
from trajstore.format.snapshot import NO_PARENT, Base, ManifestEntry, Snapshot, digest
from trajstore.schema import Schema
from trajstore.storage.filesystem import Filesystem

Place = tuple[str, str] | None  # url and uuid of another store; None for this one


@dataclass(eq=False)
class SegmentUse:
    """A segment, or layer, that trajectories of some version need.

    Attributes:
        entry: As a manifest names it, without its layers.
        base: The other store in which it lies; None for this one.
        schema: Of a version that names it.
        last: The last version with a trajectory in it.
    """

    entry: SegmentEntry
    base: Base | None
    schema: Schema
    last: int = 0


@dataclass(eq=False)
class Versions:
    """What all versions together name.

    Attributes:
        standing: Hash of each version that can be opened.
        emptied: Versions that vacuum has emptied.
        latest: The latest version; 0 for none.
        repaired: The last version that a repair made; 0 for none.
        manifests: Path -> the last version that names it.
        named: Segments that manifests name, whether or not a trajectory is left in them.
        segments: Those with trajectories, by place and uuid.
        bases: Base -> the last version with trajectories there.
        complete: Whether every version and manifest could be read, so that nothing is named that is not here.
    """

    standing: dict[int, str] = field(default_factory=dict)
    emptied: set[int] = field(default_factory=set)
    latest: int = 0
    repaired: int = 0
    manifests: dict[str, int] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)
    segments: dict[tuple[Place, str], SegmentUse] = field(default_factory=dict)
    bases: dict[Base, int] = field(default_factory=dict)
    complete: bool = True


@dataclass(eq=False)
class _Named:
    """A manifest as the version before named it."""

    entry: ManifestEntry
    segments: list[SegmentEntry]
    ids: tuple[int, int] | None
    bases: tuple[Base, ...]
    schema: Schema
    last: int


def check_versions(filesystem: Filesystem, listing: Listing, found: Findings) -> Versions:
    """Check all snapshots and manifests.

    Args:
        filesystem: Where the store is.
        listing: Its objects.
        found: Is added to.
    """
    check = _Check(filesystem, listing, found)
    check.run()
    return check.versions


class _Check:
    def __init__(self, filesystem: Filesystem, listing: Listing, found: Findings) -> None:
        self._filesystem = filesystem
        self._listing = listing
        self._found = found
        self.versions = Versions()
        self._previous: Snapshot | None = None  # the one before that could be read
        self._difference = (0, 0)  # of the totals and their sums, in the version before
        self._named: dict[str, _Named] = {}  # of the version before
        self._indexes: dict[str, ManifestIndex | None] = {}  # of manifests in use; None for one that is no good
        self._problems: dict[str, list[tuple[str, str]]] = {}  # path -> kind and message
        self._first_entries: dict[str, ManifestEntry] = {}
        self._valid_entries: Collection[str] = ()  # as JSON, of the version before
        self._told: set[tuple[str, ...]] = set()

    def run(self) -> None:
        """Look at everything."""
        snapshots = self._listing.snapshots
        self.versions.latest = max(snapshots, default=0)
        self.versions.emptied = {number for number, info in snapshots.items() if not info.nbytes}
        self._gaps()
        keys = [
            (layout.snapshot_key(n), snapshots[n].nbytes) for n in sorted(snapshots) if n not in self.versions.emptied
        ]
        for lot in lots(keys):
            self._lot(lot)
        self._latest_is_not_empty()
        self._pass_on(list(self._named))
        for path, problems in self._problems.items():
            self.versions.complete = False
            for kind, message in problems:
                self._found.add("error", kind, path, message, version=self.versions.manifests[path])

    def _gaps(self) -> None:
        number = 1
        for version in sorted(self._listing.snapshots):
            if version > number:
                which = f"version {number} has" if version == number + 1 else f"versions {number} to {version - 1} have"
                self._found.add(
                    "error",
                    "version-gap",
                    layout.snapshot_key(number),
                    f"{which} no file, expected one, if an empty one, for each version up to {self.versions.latest}; "
                    "restore it from a copy before anybody writes, who might not find the versions after it",
                )
                self.versions.complete = False
            number = version + 1

    def _lot(self, keys: Sequence[str]) -> None:
        snapshots = []
        for key, data in zip(keys, read_each(self._filesystem, keys), strict=True):
            number = layout.snapshot_version(key) or 0
            if data == b"":  # vacuum was here since the listing
                self.versions.emptied.add(number)
                continue
            snapshot = self._parsed(key, number, data)
            if snapshot is None:
                self.versions.complete = False
            else:
                snapshots.append(snapshot)
        known = self._indexes.keys() | self._problems.keys()  # the latter are no good
        fresh: dict[str, tuple[ManifestEntry, Schema]] = {}
        for snapshot in snapshots:
            for entry in snapshot.manifests:
                if entry.path not in known:  # if versions disagree, the first is the one whose commit wrote it
                    fresh.setdefault(entry.path, (entry, snapshot.schema))
        self._read_manifests(fresh)
        for snapshot in snapshots:
            self._snapshot(snapshot)
        self._indexes = {path: index for path, index in self._indexes.items() if path in self._named}

    def _parsed(self, key: str, number: int, data: bytes | StorageError | None) -> Snapshot | None:
        if isinstance(data, StorageError):
            self._found.add("error", "unreadable", key, f"{data}; look again", version=number)
            return None
        if data is None:
            self._found.add("error", "version-gap", key, "it was there and is gone; restore it from a copy")
            return None
        try:
            snapshot = Snapshot.from_bytes(data, version=number)
        except FormatVersionError as error:
            self._found.add("error", "format-version", key, str(error), version=number)
            return None
        except (CorruptionError, VersionExpiredError) as error:
            self._damaged(number, str(error), version=number)
            return None
        try:
            validate(self._without_known_entries(data), "snapshot", key=key)
        except CorruptionError as error:
            self._found.add("error", "snapshot", key, f"{error}; restore it from a copy", version=number)
        self.versions.standing[number] = digest(data)
        return snapshot

    def _damaged(self, number: int, what: str, *, version: int | None) -> None:
        """Note that a version cannot be read; ``version`` as for the finding."""
        if number == self.versions.latest and self.versions.standing:
            what += f"; or repair: a new version then holds what version {max(self.versions.standing)} holds"
        self._found.add("error", "snapshot", layout.snapshot_key(number), what, version=version)
        self.versions.complete = False

    def _latest_is_not_empty(self) -> None:
        """Vacuum empties old versions, never the latest."""
        latest = self.versions.latest
        if latest in self.versions.emptied:
            (later,) = read_each(self._filesystem, [layout.snapshot_key(latest + 1)])
            if later is None:  # else it was the latest when the store was listed, and is no longer
                self.versions.emptied.remove(latest)
                what = "it is empty, and vacuum never empties the latest version; restore it from a copy"
                self._damaged(latest, what, version=None)  # of a version that is empty, nothing else is missed

    def _without_known_entries(self, data: bytes) -> dict[str, Any]:
        """A document without manifests that the one before named in the same words: a schema takes its time."""
        document: dict[str, Any] = json.loads(data)
        entries = {json.dumps(entry): entry for entry in document["manifests"]}
        document["manifests"] = [entry for text, entry in entries.items() if text not in self._valid_entries]
        self._valid_entries = entries.keys()
        return document

    def _snapshot(self, snapshot: Snapshot) -> None:
        versions, number, key = self.versions, snapshot.version, layout.snapshot_key(snapshot.version)
        self._lineage(snapshot, key)
        totals = snapshot.totals
        sums = (sum(e.trajectories for e in snapshot.manifests), sum(e.steps for e in snapshot.manifests))
        difference = totals.trajectories - sums[0], totals.steps - sums[1]
        if difference != self._difference and difference != (0, 0):
            self._found.add(
                "error",
                "totals",
                key,
                f"its totals are {totals.trajectories} trajectories and {totals.steps} steps, its manifests have "
                f"{sums[0]} and {sums[1]}; restore a version before it",
            )
        self._difference = difference
        self._pass_on(self._named.keys() - {entry.path for entry in snapshot.manifests})
        last_id = -1
        for entry in snapshot.manifests:
            if versions.manifests.get(entry.path) == number:
                self._found.add(
                    "error", "manifest-entry", key, f"it names {entry.path} twice; restore a version before it"
                )
            versions.manifests[entry.path] = number
            ids = self._entry(snapshot, key, entry)
            if ids is not None:
                self._ids(snapshot, key, entry, ids, last_id)
                last_id = ids[1]
        if snapshot.operation == "repair":
            versions.repaired = number
        self._previous = replace(snapshot, manifests=())

    def _lineage(self, snapshot: Snapshot, key: str) -> None:
        """Hash and time of the version before."""
        number, previous = snapshot.version, self._previous
        before = NO_PARENT if number == 1 else self.versions.standing.get(number - 1)
        if before is not None and snapshot.parent_sha256 != before:
            self._found.add(
                "error",
                "parent",
                key,
                f"its parent_sha256 is {snapshot.parent_sha256}, version {number - 1} has {before}: one of the two was "
                "changed; restore both from a copy",
                version=number,
            )
        if previous is None:
            return
        if snapshot.created_at <= previous.created_at:
            self._found.add(
                "error",
                "created-at",
                key,
                f"it was made at {_text(snapshot.created_at)}, version {previous.version} before it at "
                f"{_text(previous.created_at)}, expected a later time; restore a version before it",
                version=number,
            )
        if snapshot.next_id < previous.next_id:
            self._found.add(
                "error",
                "next-id",
                key,
                f"its next_id is {snapshot.next_id}, that of version {previous.version} before it {previous.next_id}: ids "
                "would be given twice; restore it from a copy",
            )

    def _entry(self, snapshot: Snapshot, key: str, entry: ManifestEntry) -> tuple[int, int] | None:
        """Check how a version names a manifest, if otherwise than the one before; its first and last id."""
        before = self._named.get(entry.path)
        # Bases come at the end, but a store that was moved changes one where it stands.
        if before is not None and before.entry == entry and snapshot.bases[: len(before.bases)] == before.bases:
            before.last = snapshot.version
            return before.ids
        first = self._first_entries.setdefault(entry.path, replace(entry, deleted=()))
        facts = [(e.footer_sha256, e.crc32c, e.nbytes, e.rows, e.first_id) for e in (first, entry)]
        if facts[0] != facts[1]:
            self._found.add(
                "error",
                "manifest-entry",
                key,
                f"it names {entry.path} with another size, hash or first_id than an earlier version; restore it from a copy",
            )
            return None
        index = self._indexes.get(entry.path)
        if index is None or not self._deleted(key, entry):
            return None
        live = live_mask(entry)
        steps = index.live_steps(live)
        if steps != entry.steps:
            self._found.add(
                "error",
                "manifest-entry",
                key,
                f"it says {entry.steps} steps of {entry.path}, whose rows have {steps}; restore a version before it",
            )
        self._pass_on([entry.path] if before is not None else [])
        ids = index.id_range(entry, live)
        self._named[entry.path] = _Named(
            entry, index.live_segments(live), ids, snapshot.bases, snapshot.schema, snapshot.version
        )
        return ids

    def _deleted(self, key: str, entry: ManifestEntry) -> bool:
        """Whether the deleted rows are such, and what is left is as many as said."""
        edges = [0, *(edge for span in entry.deleted for edge in span), entry.rows]
        empty = any(lo >= hi for lo, hi in entry.deleted)
        if empty or any(a > b for a, b in itertools.pairwise(edges)):
            self._found.add(
                "error",
                "deleted",
                key,
                f"the deleted rows of {entry.path} are {_shown(entry.deleted)}, expected ascending ranges apart from each "
                f"other within {entry.rows} rows; restore a version before it",
            )
            return False
        left = entry.rows - sum(hi - lo for lo, hi in entry.deleted)
        if left != entry.trajectories:
            self._found.add(
                "error",
                "manifest-entry",
                key,
                f"it says {entry.trajectories} trajectories of {entry.path}, of whose rows {left} are left; restore a "
                "version before it",
            )
        return True

    def _ids(self, snapshot: Snapshot, key: str, entry: ManifestEntry, ids: tuple[int, int], last_id: int) -> None:
        if ids[0] <= last_id and ("order", entry.path) not in self._told:
            self._told.add(("order", entry.path))
            self._found.add(
                "error",
                "ids",
                key,
                f"the ids of {entry.path} begin with {ids[0]}, a manifest before it has {last_id}, expected ascending ones; "
                "restore a version before it",
            )
        if ids[1] >= snapshot.next_id and ("next", entry.path) not in self._told:
            self._told.add(("next", entry.path))
            self._found.add(
                "error",
                "ids",
                key,
                f"{entry.path} has the id {ids[1]}, expected ids below next_id={snapshot.next_id}; restore a "
                "version before it",
            )

    def _pass_on(self, paths: Iterable[str]) -> None:
        """Manifests that are no longer named as they were: their segments were needed until then."""
        for path in paths:
            named = self._named.pop(path, None)
            if named is not None:
                for part in (part for segment in named.segments for part in segment.parts):
                    self._need(path, named, part)

    def _need(self, path: str, named: _Named, part: SegmentEntry) -> None:
        if part.base is not None and not 0 <= part.base < len(named.bases):
            if (path, part.uuid) not in self._told:
                self._told.add((path, part.uuid))
                self._problem(
                    path, "segment-table", f"segment {part.uuid} lies in base {part.base}, of {len(named.bases)}"
                )
            return
        base = None if part.base is None else named.bases[part.base]
        place = None if base is None else (base.url, base.store_uuid)
        plain = replace(part, base=None, layers=())
        use = self.versions.segments.setdefault((place, part.uuid), SegmentUse(plain, base, named.schema))
        if use.entry != plain and (path, part.uuid) not in self._told:
            self._told.add((path, part.uuid))
            self._problem(
                path, "segment-table", f"it describes segment {part.uuid} otherwise than another manifest does"
            )
        use.last = max(use.last, named.last)
        if base is not None:
            self.versions.bases[base] = max(self.versions.bases.get(base, 0), named.last)

    def _problem(self, path: str, kind: str, message: str) -> None:
        self._problems.setdefault(path, []).append((kind, message))

    def _read_manifests(self, fresh: dict[str, tuple[ManifestEntry, Schema]]) -> None:
        for lot in lots(sizes(self._listing.manifests, fresh)):
            for path, data in zip(lot, read_each(self._filesystem, lot), strict=True):
                self._indexes[path] = self._read_manifest(path, *fresh[path], data)

    def _read_manifest(
        self, path: str, entry: ManifestEntry, schema: Schema, data: bytes | StorageError | None
    ) -> ManifestIndex | None:
        if isinstance(data, StorageError):
            self._problem(path, "unreadable", f"{data}; look again")
            return None
        if data is None:
            self._problem(
                path,
                "manifest-missing",
                "it is not there; restore it from a copy, or restore a version that does not name it",
            )
            return None
        wrong = check_bytes(entry, data)
        if wrong is not None:
            self._problem(path, "manifest", wrong)
            return None
        index, problems = read_index(entry, data, schema)
        for problem in problems:
            self._problem(path, "manifest-rows", problem)
        if index is not None:
            self.versions.named.update(part.uuid for segment in index.segments for part in segment.parts)
        return index


def _text(time: dt.datetime) -> str:
    return time.isoformat(timespec="microseconds")


def _shown(spans: Sequence[tuple[int, int]], most: int = 8) -> str:
    shown = ", ".join(f"[{lo}, {hi})" for lo, hi in spans[:most])
    return f"{shown} and {len(spans) - most} more" if len(spans) > most else shown
