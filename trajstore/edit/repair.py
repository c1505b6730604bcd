"""Leave out of a store what is lost.

Invariant: only versions are made, nothing else is touched: what can still be read of earlier versions stays readable, and
the trajectories that remain lie where they lay.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np

from trajstore.edit.findings import LOSSES, MISSING_STORE, Report
from trajstore.edit.rewrite import rewrite
from trajstore.errors import CommitError, IndexRangeError
from trajstore.format.manifest import Manifest, live_rows
from trajstore.format.snapshot import ManifestEntry, Snapshot
from trajstore.storage.changes import Delete, MergedManifests, ReadManifests
from trajstore.storage.commit import History, Version
from trajstore.storage.filesystem import Filesystem
from trajstore.stored import Array

_MAX_TRIES = 50
_OPERATION = "repair"


@dataclass(frozen=True, eq=False)
class LeaveOut:
    """Removes trajectories that are lost, or, with none, says that what is there is whole.

    Attributes:
        ids: ``(n,)`` int64, ascending, each once.
    """

    ids: Array
    operation: str = field(default=_OPERATION, init=False)
    merges: bool = field(default=False, init=False)

    def apply(self, parent: Snapshot, merged: MergedManifests | None, read: ReadManifests) -> Snapshot:
        """The next snapshot.

        Raises:
            IndexRangeError: One is not there.
        """
        left = Delete(self.ids).apply(parent, merged, read) if len(self.ids) else parent
        return replace(left, operation=_OPERATION)


def repair(filesystem: Filesystem, history: History, head: Version, report: Report) -> Version | None:
    """Make a version without the trajectories whose segments are missing or damaged, or lie in a store that is not there.

    Derived columns that are damaged are left out too, and can be computed again: ``add_column``. What only earlier versions
    lack is a warning from then on. Where the latest version itself is damaged, the new one comes after it and holds what the
    last readable one holds.

    Args:
        filesystem: Where the store is.
        history: Its versions.
        head: The latest version known.
        report: Of ``verify``; pages are known to be damaged only with ``deep=True``.

    Returns:
        The version; None if no new version would make the store better: it is fine, or what is damaged are objects that only
        another copy brings back, such as a manifest of the latest version, or other stores that may be looked at later.

    Raises:
        CorruptionError: A manifest of the latest version is damaged: no new version can be made of it. Restore a version
            that does not name it.
        CommitError: Others were faster again and again.
    """
    head = history.latest(head.number)
    if head.shows == 0:  # nothing can be read: only a copy helps
        return None
    before = head
    lost = {f.segment for f in report.errors if f.kind in LOSSES and f.segment is not None}
    lost |= _in_missing_stores(history, head, {f.where for f in report.errors if f.kind == MISSING_STORE})
    if lost:
        head = _without_layers(filesystem, history, head, lost)
    for _ in range(_MAX_TRIES):
        ids = _lost_ids(history, head, lost) if lost else np.empty(0, np.int64)
        behind = any(f.version is not None and f.version < head.number for f in report.errors)
        if not len(ids) and head.shows is None and (head is not before or not behind):
            return head if head is not before else None
        try:
            return history.commit(LeaveOut(ids), head)
        except IndexRangeError:
            head = history.latest(head.number)
    raise CommitError(f"others deleted trajectories {_MAX_TRIES} times meanwhile; repair again when they are done")


def _in_missing_stores(history: History, head: Version, urls: Collection[str]) -> set[str]:
    """Segments and layers of a version that lie in stores of these URLs."""
    numbers = {n for n, base in enumerate(head.snapshot.bases) if base.url in urls}
    manifests = history.read_manifests(head.snapshot.manifests, ["id", "segment"]) if numbers else []
    parts = (part for manifest in manifests for segment in manifest.segments for part in segment.parts)
    return {part.uuid for part in parts if part.base in numbers}


def _without_layers(filesystem: Filesystem, history: History, head: Version, lost: Collection[str]) -> Version:
    """A version without the derived columns that are damaged; ``head`` if there are none."""

    def change(_: ManifestEntry, manifest: Manifest) -> Manifest | None:
        segments = tuple(
            replace(segment, layers=tuple(layer for layer in segment.layers if layer.uuid not in lost))
            for segment in manifest.segments
        )
        return None if segments == manifest.segments else Manifest(manifest.table, segments)

    return rewrite(filesystem, history, head, change, operation=_OPERATION, nbytes=0)


def _lost_ids(history: History, head: Version, lost: Collection[str]) -> Array:
    """``(n,)`` int64: the trajectories of a version that lie in these segments."""
    found = [np.empty(0, np.int64)]
    for entry in head.snapshot.manifests:
        (manifest,) = history.read_manifests([entry], ["id", "segment"])
        numbers = [n for n, segment in enumerate(manifest.segments) if segment.uuid in lost]
        if numbers:
            rows = live_rows(entry, manifest.table.select(["id", "segment"]))
            found.append(rows["id"].to_numpy()[np.isin(rows["segment"].to_numpy(), numbers)])
    return np.unique(np.concatenate(found))
