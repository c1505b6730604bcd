"""What a commit changes: each change says what the next snapshot is, given the one that it lands on.

Invariant: a change holds no version. Who loses the race for one applies the same change to the winner's snapshot, and a
change that no longer makes sense there raises; nothing is stored again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from trajstore.errors import CommitError, IndexRangeError, ManifestsChangedError, StoreExistsError
from trajstore.format.manifest import Manifest, live_mask, live_rows
from trajstore.format.snapshot import Base, ManifestEntry, Snapshot, Totals
from trajstore.schema import Schema
from trajstore.stored import Array

ReadManifests = Callable[[Sequence[ManifestEntry], Sequence[str]], Sequence[Manifest]]

_NAMED = 10  # ids in a message


@dataclass(frozen=True)
class MergedManifests:
    """One manifest, already stored, that can take the place of several neighbours in a snapshot."""

    first: int
    replaces: tuple[ManifestEntry, ...]
    entry: ManifestEntry

    def fits(self, manifests: Sequence[ManifestEntry]) -> bool:
        """Whether the ones that were merged still stand where they stood."""
        return tuple(manifests[self.first : self.first + len(self.replaces)]) == self.replaces


class Change(Protocol):
    """A change of a store. Its objects are stored before it is committed."""

    @property
    def merges(self) -> bool:
        """Whether the commit also merges small manifests, if it is time."""

    def apply(self, parent: Snapshot, merged: MergedManifests | None, read: ReadManifests) -> Snapshot:
        """The next snapshot, but for its identity.

        Args:
            parent: The snapshot that it lands on.
            merged: A merged manifest that may take the place of several.
            read: Reads columns of manifests.
        """


@dataclass(frozen=True)
class Append:
    """Adds trajectories: it can be rebased onto any history whose schema admits its own.

    Attributes:
        schema: Of the trajectories.
        entries: Fresh manifests, already stored; none for a change of schema only.
        nbytes: Stored bytes of their segments.
        operation: What ``versions`` calls it.
        bases: All bases that the numbers in the manifests mean; empty if all segments are this store's own.
        instead: Whether they take the place of all trajectories that were there.
        first: Whether they must be the store's first version.
    """

    schema: Schema
    entries: tuple[ManifestEntry, ...]
    nbytes: int
    operation: str = "append"
    bases: tuple[Base, ...] = ()
    instead: bool = False
    first: bool = False

    @property
    def merges(self) -> bool:
        """As manifests come one by one, they are merged now and then."""
        return not self.instead

    def apply(self, parent: Snapshot, merged: MergedManifests | None, read: ReadManifests) -> Snapshot:  # noqa: ARG002
        """The next snapshot.

        Raises:
            SchemaConflictError: Another writer gave the store a schema that this change does not fit.
            CommitError: Another writer gave the store other bases.
            StoreExistsError: Another writer was first.
        """
        if self.first and parent.version:
            raise StoreExistsError("another writer made a store there meanwhile; choose another place, or replace it")
        manifests = () if self.instead else parent.manifests
        if merged is not None and merged.fits(manifests):
            after = merged.first + len(merged.replaces)
            manifests = (*manifests[: merged.first], merged.entry, *manifests[after:])
        if self.bases and self.bases[: len(parent.bases)] != parent.bases:
            raise CommitError("another writer gave the store other bases meanwhile; do it again")
        fresh = []
        next_id = parent.next_id
        for entry in self.entries:
            fresh.append(replace(entry, first_id=next_id))
            next_id += entry.rows
        before = Totals() if self.instead else parent.totals
        return replace(
            parent,
            operation=self.operation,
            schema=self.schema if self.instead else parent.schema.merged_with(self.schema),
            next_id=next_id,
            totals=Totals(
                before.trajectories + sum(entry.trajectories for entry in fresh),
                before.steps + sum(entry.steps for entry in fresh),
                before.nbytes + self.nbytes,
            ),
            bases=self.bases or parent.bases,
            manifests=(*manifests, *fresh),
        )


@dataclass(frozen=True, eq=False)
class Delete:
    """Removes trajectories; their bytes stay for earlier versions.

    Attributes:
        ids: ``(n,)`` int64, ascending, each once.
        operation: What ``versions`` calls it.
    """

    ids: Array
    operation: str = "delete"
    merges: bool = field(default=False, init=False)

    def apply(self, parent: Snapshot, merged: MergedManifests | None, read: ReadManifests) -> Snapshot:  # noqa: ARG002
        """The next snapshot.

        Raises:
            IndexRangeError: One is not there.
        """
        entries: list[ManifestEntry] = []
        found = [np.empty(0, np.int64)]
        manifests = read(parent.manifests, ["id", "length"])
        for entry, manifest in zip(parent.manifests, manifests, strict=True):
            rows = live_rows(replace(entry, deleted=()), manifest.table.select(["id", "length"]))
            live = live_mask(entry)
            gone = np.isin(rows["id"].to_numpy(), self.ids) & live
            found.append(rows["id"].to_numpy()[gone])
            if not gone.any():
                entries.append(entry)
                continue
            live &= ~gone
            if live.any():
                steps = int(rows["length"].to_numpy()[live].sum())
                count = int(live.sum())
                entries.append(replace(entry, trajectories=count, steps=steps, deleted=spans(~live)))
        lacking = np.setdiff1d(self.ids, np.concatenate(found)).tolist()
        if lacking:
            named = ", ".join(map(str, lacking[:_NAMED])) + (", ..." if len(lacking) > _NAMED else "")
            raise IndexRangeError(
                f"{len(lacking)} of {len(self.ids)} trajectories to delete are not in version {parent.version}: {named}; "
                "take ids from a fresh view"
            )
        totals = Totals(sum(e.trajectories for e in entries), sum(e.steps for e in entries), parent.totals.nbytes)
        return replace(parent, operation=self.operation, totals=totals, manifests=tuple(entries))


@dataclass(frozen=True)
class Replacement:
    """A manifest, already stored, that says otherwise where the trajectories of another one are.

    Attributes:
        old: The other one, as the new one was made from it.
        new: Has the rows of ``old`` that were not deleted then, in the same order, with ids of their own.
    """

    old: ManifestEntry
    new: ManifestEntry

    def carried_over(self, now: ManifestEntry) -> ManifestEntry | None:
        """The new entry without what was deleted since; None if nothing is left.

        Args:
            now: The old entry as it is in the latest version.

        Raises:
            ManifestsChangedError: Some rows are there again.
        """
        before, after = live_mask(self.old), live_mask(now)
        if (after & ~before).any():
            raise ManifestsChangedError(f"{now.path} has rows again that were deleted before")
        gone = ~after[before]
        if not gone.any():
            return self.new
        return (
            None
            if gone.all()
            else replace(self.new, trajectories=now.trajectories, steps=now.steps, deleted=spans(gone))
        )


@dataclass(frozen=True)
class Rewrite:
    """Puts manifests in the place of others that hold the same trajectories; what is deleted meanwhile stays deleted.

    Attributes:
        replacements: By path of the old manifest.
        operation: What ``versions`` calls it.
        nbytes: Stored bytes of segments that are new.
        columns: Schema with columns that are new.
    """

    replacements: Mapping[str, Replacement]
    operation: str
    nbytes: int
    columns: Schema = field(default_factory=Schema)
    merges: bool = field(default=False, init=False)

    def apply(self, parent: Snapshot, merged: MergedManifests | None, read: ReadManifests) -> Snapshot:  # noqa: ARG002
        """The next snapshot.

        Raises:
            ManifestsChangedError: A manifest that was replaced is no longer there.
            SchemaConflictError: Another writer added other columns of these names.
        """
        missing = self.replacements.keys() - {entry.path for entry in parent.manifests}
        if missing:
            raise ManifestsChangedError(f"{len(missing)} manifests are not in version {parent.version} any more")
        entries = []
        for entry in parent.manifests:
            replacement = self.replacements.get(entry.path)
            kept = entry if replacement is None else replacement.carried_over(entry)
            if kept is not None:
                entries.append(kept)
        return replace(
            parent,
            operation=self.operation,
            schema=parent.schema.extended_by(self.columns),
            totals=replace(parent.totals, nbytes=parent.totals.nbytes + self.nbytes),
            manifests=tuple(entries),
        )


def spans(mask: Array) -> tuple[tuple[int, int], ...]:
    """Where a mask is true, as half-open ranges.

    >>> spans(np.array([True, True, False, True]))
    ((0, 2), (3, 4))
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return tuple((int(lo), int(hi)) for lo, hi in edges.reshape(-1, 2))
