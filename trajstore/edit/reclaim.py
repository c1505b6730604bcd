"""Give back the bytes that the latest version does not need, and with them every earlier version.

Invariant: what the latest version names stays, and so does what is still being written; a version's slot is emptied, never
removed, so that numbers are not used twice. For a store that nobody else reads or writes.
"""

from __future__ import annotations

from collections.abc import Collection

from trajstore.format import layout
from trajstore.storage.commit import History, Version
from trajstore.storage.filesystem import Filesystem


def reclaim(filesystem: Filesystem, history: History, head: Version, *, in_progress: Collection[str] = ()) -> int:
    """Remove all objects that a version does not need.

    Args:
        filesystem: Where the store is.
        history: Its versions.
        head: The latest.
        in_progress: Segments that are being written.

    Returns:
        Bytes given back.
    """
    entries = head.snapshot.manifests
    manifests = {entry.path for entry in entries}
    segments = set(in_progress)
    for manifest in history.read_manifests(entries, ["id"]):
        segments.update(segment.uuid for segment in manifest.segments)
    for number in range(head.number - 1, 0, -1):
        key = layout.snapshot_key(number)
        if not filesystem.read(key):
            break  # this one and those before it were emptied earlier
        filesystem.overwrite(key, b"")
    gone = [o for o in filesystem.list_objects(layout.MANIFESTS) if o.key not in manifests]
    gone += [o for o in filesystem.list_objects(layout.SEGMENTS) if layout.segment_of(o.key) not in segments]
    filesystem.remove([o.key for o in gone])
    return sum(o.nbytes for o in gone)
