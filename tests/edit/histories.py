"""Histories of trajectories without columns, for tests of what versions name: fast enough to try everything."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.edit.memory import NOON, MemoryDisk
from trajstore.edit.vacuum import Keep, Vacuumed, vacuum
from trajstore.format import layout
from trajstore.format.manifest import SegmentEntry, TrajectoryRow, build_table, encode_manifest, manifest_entry
from trajstore.schema import Schema
from trajstore.storage.age import Moment
from trajstore.storage.changes import Append, Delete
from trajstore.storage.commit import EMPTY_VERSION, History, Version

DAY = dt.timedelta(days=1)
ONE = Keep(versions=1, age=dt.timedelta(0))


class Clock:
    """A clock that a test moves."""

    def __init__(self, time: dt.datetime = NOON) -> None:
        self.time = time

    def __call__(self) -> dt.datetime:
        return self.time

    @property
    def boot_s(self) -> float:
        return (self.time - NOON).total_seconds()

    def wait(self, **time: float) -> None:
        self.time += dt.timedelta(**time)


def history_on(disk: MemoryDisk, clock: Clock) -> History:
    """Without pauses after lost races."""
    return History(disk, now=clock, since_boot_s=lambda: clock.boot_s, race_pause_base_s=0.0)


def segment_entry(name: str, **given: Any) -> SegmentEntry:
    """A segment of one trajectory of one step, or of more."""
    return SegmentEntry(**{
        "uuid": name, "steps": 1, "trajectories": 1, "nbytes": 1, "columns": ("a",), "zarr_sha256": "0" * 64,
        "pages_sha256": "0" * 64, **given,
    })  # fmt: skip


def stored(disk: MemoryDisk, segments: Sequence[SegmentEntry], rows: int = 1, **given: Any) -> Append:
    """Store segments of this store, ``rows`` trajectories in each, and a manifest; nobody sees them yet."""
    for part in (part for segment in segments for part in segment.parts):
        if part.base is None:
            disk.store({layout.segment_key(part.uuid, "c.0"): [part.uuid.encode()]})
    table = [
        TrajectoryRow(uuid.uuid4().bytes, s.uuid, n, n, 1, False, False, None, NOON, {})
        for s in segments
        for n in range(rows)
    ]
    manifest = build_table(table, segments, {})
    data = encode_manifest(manifest)
    path = layout.manifest_key(uuid.uuid4().hex)
    disk.store({path: [data]})
    return Append(Schema(), (manifest_entry(path, data, manifest, first_id=0),), 1, **given)


def append(
    disk: MemoryDisk, history: History, head: Version, *, since: Moment | None = None, rows: int = 1, **given: Any
) -> Version:
    """A version with one segment more."""
    change = stored(disk, [segment_entry(uuid.uuid4().hex, steps=rows, trajectories=rows)], rows, **given)
    return history.commit(change, head, since=since)


def delete(history: History, head: Version, ids: Sequence[int]) -> Version:
    """A version with fewer trajectories."""
    return history.commit(Delete(np.array(ids, np.int64)), head)


def latest(history: History) -> Version:
    """The latest version."""
    return history.latest(0)


def filled(disk: MemoryDisk, clock: Clock, versions: int) -> Version:
    """So many versions, one a day."""
    history, head = history_on(disk, clock), EMPTY_VERSION
    for _ in range(versions):
        head = append(disk, history, head)
        clock.wait(days=1)
    return head


def standing(disk: MemoryDisk) -> dict[int, list[str]]:
    """What the versions that stand name, read the slow way: version -> keys, as far as trajectories in it need them."""
    found: dict[int, list[str]] = {}
    history = History(disk)
    for key, (data, _) in list(disk.objects.items()):
        number = layout.snapshot_version(key)
        if number is None or not data:
            continue
        keys = []
        for entry in history.load(number).snapshot.manifests:
            keys.append(entry.path)
            if entry.path not in disk.objects:
                continue  # whoever compares sees that it is not there
            (manifest,) = history.read_manifests([entry])
            gone = {row for lo, hi in entry.deleted for row in range(lo, hi)}
            for row, number_of_segment in enumerate(manifest.table["segment"].to_pylist()):
                segment = manifest.segments[number_of_segment]
                if row not in gone:
                    own = [part for part in (segment, *segment.layers) if part.base is None]
                    keys += [layout.segment_key(part.uuid, "c.0") for part in own]
        found[number] = sorted(set(keys))
    return found


def assert_whole(disk: MemoryDisk) -> None:
    """Fail unless everything that a standing version needs is there."""
    for number, keys in standing(disk).items():
        missing = [key for key in keys if key not in disk.objects]
        assert not missing, f"version {number} lacks {missing}"


def run(disk: MemoryDisk, clock: Clock, keep: Keep = ONE, **options: Any) -> Vacuumed:
    """A vacuum of this moment."""
    return vacuum(disk, history_on(disk, clock), keep, now=clock, progress=False, **{"dry_run": False, **options})


def old_store(versions: int = 4) -> tuple[MemoryDisk, Clock, Version]:
    """Versions that each delete what the one before added, all of it older than the grace."""
    disk, clock = MemoryDisk(), Clock()
    disk.clock = clock
    history, head = history_on(disk, clock), EMPTY_VERSION
    for _ in range(versions):
        head = append(disk, history, head, instead=bool(head.number))
        clock.wait(days=1)
    clock.wait(days=10)
    return disk, clock, head
