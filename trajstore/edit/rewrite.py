"""Put manifests in the place of others that hold the same trajectories: what compaction and derived columns are.

Invariant: whoever reads sees every trajectory, before and after, and beside appends and deletions by others. Manifests that
others have rewritten meanwhile are planned again; those that still stand, and all segments, are used again, so that a writer
who commits all the time holds up no one.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection

from trajstore.errors import CommitError, ManifestsChangedError
from trajstore.format import layout
from trajstore.format.manifest import Manifest, encode_manifest, live_mask, manifest_entry, merge_manifests
from trajstore.format.snapshot import ManifestEntry, Snapshot
from trajstore.schema import Schema
from trajstore.storage.age import Moment
from trajstore.storage.changes import Replacement, Rewrite
from trajstore.storage.commit import History, Version
from trajstore.storage.filesystem import Filesystem

_MAX_PLANS = 50
_STORED_TOGETHER_BYTES = 64 << 20

ChangeManifest = Callable[[ManifestEntry, Manifest], Manifest | None]


def rewrite(
    filesystem: Filesystem,
    history: History,
    head: Version,
    change: ChangeManifest,
    *,
    operation: str,
    nbytes: int,
    columns: Schema | None = None,
    affected: Collection[str] | None = None,
    since: Moment | None = None,
) -> Version:
    """Commit a version in which some manifests say otherwise where their trajectories are.

    Args:
        filesystem: Where the store is.
        history: Its versions.
        head: The latest version known.
        change: Is given a manifest with its live rows only, ids written out; gives what takes its place, with the same rows
            in the same order, or None to leave it. Called again for manifests that others changed meanwhile.
        operation: What ``versions`` calls it.
        nbytes: Stored bytes of the segments that are new.
        columns: Are added to the store's.
        affected: Segments of which one at least must be in a manifest for ``change`` to be asked; None for all manifests.
        since: When the first of the new segments began to be stored; None if there are none.

    Returns:
        The version; ``head``, or a later one by others, if nothing was to be changed.

    Raises:
        CommitError: Others rewrote the store again and again.
        CommitTooOldError: The segments are so old that a vacuum may have removed them.
        SchemaConflictError: Another writer added other columns of these names.
    """
    added = columns or Schema()
    since = since or history.moment()
    plan = _Plan(filesystem, history, change, affected)
    for _ in range(_MAX_PLANS):
        replacements = plan.for_snapshot(head.snapshot)
        if not replacements:  # nor are columns added that nobody has: a store that was cleared takes other ones
            return head
        try:
            return history.commit(Rewrite(replacements, operation, nbytes, added), head, since=since)
        except ManifestsChangedError:
            head = history.latest(head.number)
    raise CommitError(
        f"{operation}: others rewrote {filesystem.description} {_MAX_PLANS} times meanwhile; do it again when they are done"
    )


class _Plan:
    """What takes the place of which manifest, for one version after the other.

    Args:
        filesystem: Receives manifests.
        history: Reads manifests.
        change: See ``rewrite``.
        affected: See ``rewrite``.
    """

    def __init__(
        self, filesystem: Filesystem, history: History, change: ChangeManifest, affected: Collection[str] | None
    ) -> None:
        self._filesystem = filesystem
        self._history = history
        self._change = change
        self._affected = affected
        self._known: dict[str, tuple[ManifestEntry, Replacement | None]] = {}  # by path, with the entry as it was then

    def for_snapshot(self, snapshot: Snapshot) -> dict[str, Replacement]:
        """By path of the old manifest; the new ones are stored."""
        known, self._known = self._known, {}
        fresh: dict[str, bytes] = {}
        for entry in snapshot.manifests:
            if entry.path in known and not _has_rows_again(entry, known[entry.path][0]):
                self._known[entry.path] = known.pop(entry.path)
                continue
            self._known[entry.path] = entry, self._replacement(entry, snapshot, fresh)
            if sum(map(len, fresh.values())) >= _STORED_TOGETHER_BYTES:
                self._store(fresh)
        self._store(fresh)
        # Nothing refers to those that were planned for manifests that have changed.
        self._filesystem.remove([planned.new.path for _, planned in known.values() if planned is not None])
        return {path: planned for path, (_, planned) in self._known.items() if planned is not None}

    def _replacement(self, entry: ManifestEntry, snapshot: Snapshot, fresh: dict[str, bytes]) -> Replacement | None:
        (manifest,) = self._history.read_manifests([entry])
        if self._affected is not None and not any(segment.uuid in self._affected for segment in manifest.segments):
            return None
        changed = self._change(entry, merge_manifests([(entry, manifest)], snapshot.schema.metadata))
        if changed is None:
            return None
        data = encode_manifest(changed)
        key = layout.manifest_key(uuid.uuid4().hex)
        fresh[key] = data
        return Replacement(entry, manifest_entry(key, data, changed, first_id=0))

    def _store(self, fresh: dict[str, bytes]) -> None:
        if fresh:
            self._filesystem.store({key: [data] for key, data in fresh.items()})
            fresh.clear()


def _has_rows_again(now: ManifestEntry, then: ManifestEntry) -> bool:
    """Whether rows that were deleted are back: a restored version has them."""
    return bool((live_mask(now) & ~live_mask(then)).any())
