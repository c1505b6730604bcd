"""What versions name, and so what no version names.

Invariant: a segment is needed if a version holds a trajectory in it; a manifest, if a version names it at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from trajstore.format import layout
from trajstore.format.manifest import Manifest, SegmentEntry, live_mask, live_rows
from trajstore.format.snapshot import Base, ManifestEntry, Snapshot
from trajstore.storage.changes import ReadManifests
from trajstore.storage.commit import History, Version
from trajstore.stored import Array

_READ_TOGETHER = 64


@dataclass
class Needed:
    """What versions name, as far as rows that they hold do.

    Attributes:
        manifests: Keys.
        segments: Uuids of segments and layers in this store.
        bases: Other stores in which segments or layers lie.
        versions: Numbers.
    """

    manifests: set[str] = field(default_factory=set)
    segments: set[str] = field(default_factory=set)
    bases: set[Base] = field(default_factory=set)
    versions: set[int] = field(default_factory=set)

    def __or__(self, other: Needed) -> Needed:
        return Needed(
            self.manifests | other.manifests,
            self.segments | other.segments,
            self.bases | other.bases,
            self.versions | other.versions,
        )


def needed(history: History, versions: Iterable[Version]) -> Needed:
    """What these versions need. A segment of which all trajectories are deleted in all of them is not."""
    found = Needed()
    live: dict[str, tuple[ManifestEntry, Array]] = {}
    seen: set[tuple[str, tuple[tuple[int, int], ...]]] = set()
    readers: dict[str, list[Snapshot]] = {}  # versions that name a manifest, one for each list of bases
    for version in versions:
        snapshot = version.snapshot
        found.versions.add(version.number)
        for entry in snapshot.manifests:
            if (entry.path, ()) not in seen and (entry.path, entry.deleted) not in seen:  # mostly it is the same
                seen.add((entry.path, entry.deleted))
                mask = live_mask(entry)
                live[entry.path] = (entry, live[entry.path][1] | mask if entry.path in live else mask)
            named = readers.setdefault(entry.path, [])
            if all(other.bases != snapshot.bases for other in named):
                named.append(snapshot)
    found.manifests.update(live)
    entries = list(live.values())
    for first in range(0, len(entries), _READ_TOGETHER):
        lot = entries[first : first + _READ_TOGETHER]
        manifests = history.read_manifests([entry for entry, _ in lot], ["segment"])
        for (entry, mask), manifest in zip(lot, manifests, strict=True):
            used = np.unique(manifest.table["segment"].to_numpy()[mask]).tolist()
            for part in (part for n in used for part in manifest.segments[n].parts):
                if part.base is None:
                    found.segments.add(part.uuid)
                else:
                    found.bases.update(snapshot.bases[part.base] for snapshot in readers[entry.path])
    return found


def own_segments(snapshot: Snapshot, read: ReadManifests) -> dict[str, SegmentEntry]:
    """Segments and layers in a store's own folder that one of its versions names for a trajectory, by uuid.

    Args:
        snapshot: The version.
        read: Reads columns of manifests.
    """
    manifests = zip(snapshot.manifests, read(snapshot.manifests, ["segment"]), strict=True)
    return {
        part.uuid: part for entry, manifest in manifests for part in live_parts(entry, manifest) if part.base is None
    }


def live_parts(entry: ManifestEntry, manifest: Manifest) -> list[SegmentEntry]:
    """Segments and layers that a manifest names for rows that its snapshot holds.

    Args:
        entry: The snapshot's entry.
        manifest: Its column ``segment`` at least.
    """
    used = np.unique(live_rows(entry, manifest.table.select(["segment"]))["segment"].to_numpy())
    return [part for n in used.tolist() for part in manifest.segments[n].parts]


def is_waste(key: str, rest: Needed) -> bool:
    """Whether an object may go once it is old enough; what vacuum does not know stays."""
    if key.endswith((".tmp", ".clock")) or layout.is_hold(key):  # of a commit, a vacuum, an edit that was killed
        return True
    segment = layout.segment_of(key)
    if segment is not None:
        return segment not in rest.segments
    if key.startswith(f"{layout.MANIFESTS}/"):
        return key not in rest.manifests
    version = layout.statistics_version(key)
    return version is not None and version not in rest.versions
