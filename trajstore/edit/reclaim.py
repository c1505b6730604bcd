"""Give back the bytes that the latest version does not need, and with them every earlier version.

Invariant: what the latest version shows stays, and so does what is still being written; a version's slot is emptied, never
removed, so that numbers are not used twice, and the oldest first, so that one that is not empty has no empty one after it.
For a store that nobody else reads or writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from trajstore.format import layout
from trajstore.format.manifest import live_rows
from trajstore.storage.commit import History
from trajstore.storage.filesystem import Filesystem


def reclaim(
    filesystem: Filesystem,
    history: History,
    start: int,
    *,
    in_progress: Callable[[], Collection[str]] = frozenset,
) -> int:
    """Remove all objects that the latest version does not need.

    Args:
        filesystem: Where the store is.
        history: Its versions.
        start: The latest version known.
        in_progress: Segments that are being written; asked after the objects were listed.

    Returns:
        Bytes given back.
    """
    # In this order: what was begun since the listing is not in it, and what was committed since is in the latest version.
    objects = [*filesystem.list_objects(layout.MANIFESTS), *filesystem.list_objects(layout.SEGMENTS)]
    needed = set(in_progress())
    head = history.latest(start)
    entries = head.snapshot.manifests
    manifests = {entry.path for entry in entries}
    for entry, manifest in zip(entries, history.read_manifests(entries, ["segment"]), strict=True):
        used = set(live_rows(entry, manifest.table.select(["segment"]))["segment"].to_pylist())
        needed.update(manifest.segments[n].uuid for n in used)
    _empty_versions(filesystem, before=head.number)
    gone = [o for o in objects if o.key not in manifests and layout.segment_of(o.key) not in needed]
    filesystem.remove([o.key for o in gone])
    return sum(o.nbytes for o in gone)


def _empty_versions(filesystem: Filesystem, *, before: int) -> None:
    keys = []
    for number in range(before - 1, 0, -1):
        key = layout.snapshot_key(number)
        if not filesystem.read(key):
            break  # this one and those before it were emptied earlier
        keys.append(key)
    for key in reversed(keys):
        filesystem.overwrite(key, b"")
