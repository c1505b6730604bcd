"""How a store stands, besides what it holds: versions, their names, ties to other stores, and how small its segments are.

Invariant: only listings and marks are read, no segment, so that it costs a few requests however large the store is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trajstore.edit.compact import DEFAULT_SEGMENT_BYTES
from trajstore.edit.marks import all_pins, all_tags
from trajstore.format import layout
from trajstore.format.manifest import SegmentEntry
from trajstore.format.marks import Pin, Tag
from trajstore.format.snapshot import Base
from trajstore.read.bases import absolute
from trajstore.read.table import TrajectoryTable
from trajstore.schema import Schema
from trajstore.storage.filesystem import Filesystem

_VARIABLE_ROW_BYTES = 16  # of a text or list, at least
_MANY_SMALL = 10  # fewer make nothing slow


@dataclass(frozen=True)
class OtherStore:
    """A store that this one refers to.

    Attributes:
        url: Where it is.
        pinned: Whether it keeps what this store needs of it.
    """

    url: str
    pinned: bool


@dataclass(frozen=True)
class Health:
    """How a store stands.

    Attributes:
        versions: That can be opened.
        tags: By name.
        pins: Of other stores that refer to this one.
        others: Stores that the version refers to.
        small_segments: Of the version, its own, that ``compact`` would write together with others.
        compacted_segments: About how many it would make of them.
    """

    versions: int
    tags: tuple[Tag, ...]
    pins: tuple[Pin, ...]
    others: tuple[OtherStore, ...]
    small_segments: int
    compacted_segments: int

    @property
    def compacting_pays(self) -> bool:
        """Whether there are so many small segments that reading would be faster with a few large ones."""
        return self.small_segments >= _MANY_SMALL and self.compacted_segments <= self.small_segments / 2


def measure_health(filesystem: Filesystem, table: TrajectoryTable) -> Health:
    """Look at a store.

    Args:
        filesystem: Where it is.
        table: The trajectories of the version in question.
    """
    listed = ((layout.snapshot_version(info.key), info.nbytes) for info in filesystem.list_objects(layout.SNAPSHOTS))
    small, compacted = _small_segments(table)
    return Health(
        versions=sum(1 for number, nbytes in listed if number and nbytes),
        tags=tuple(all_tags(filesystem)),
        pins=tuple(all_pins(filesystem)),
        others=_others(table.version.snapshot.bases, filesystem.url),
        small_segments=small,
        compacted_segments=compacted,
    )


def _others(bases: Sequence[Base], url: str) -> tuple[OtherStore, ...]:
    pinned: dict[str, bool] = {}
    for base in bases:
        place = absolute(base.url, seen_from=url)
        pinned[place] = pinned.get(place, True) and base.pin is not None
    return tuple(OtherStore(place, is_pinned) for place, is_pinned in sorted(pinned.items()))


def _small_segments(table: TrajectoryTable) -> tuple[int, int]:
    """How many segments ``compact`` would replace, and by about how many."""
    live = np.bincount(table.segment, weights=table.length, minlength=len(table.segments))
    steps: dict[str, float] = {}  # several manifests may name one segment
    entries: dict[str, SegmentEntry] = {}
    for entry, count in zip(table.segments, live.tolist(), strict=True):
        if entry.base is None and count:
            steps[entry.uuid] = steps.get(entry.uuid, 0.0) + count
            entries[entry.uuid] = entry
    nbytes: dict[tuple[str, ...], list[float]] = {}  # by columns: only segments with the same can become one
    for uuid, entry in entries.items():
        raw = steps[uuid] * _step_bytes(entry, table.schema)
        if raw < DEFAULT_SEGMENT_BYTES / 2:
            nbytes.setdefault(tuple(sorted(entry.all_columns)), []).append(raw)
    groups = [group for group in nbytes.values() if len(group) > 1]
    return sum(map(len, groups)), sum(max(math.ceil(sum(group) / DEFAULT_SEGMENT_BYTES), 1) for group in groups)


def _step_bytes(entry: SegmentEntry, schema: Schema) -> float:
    """Bytes of a step before compression, as far as the manifest tells."""
    columns = [schema[path] for path in entry.all_columns]
    known = sum(_VARIABLE_ROW_BYTES if column.is_variable else column.row_bytes for column in columns)
    return max(known, entry.total_bytes / entry.steps) if any(c.is_variable for c in columns) else known
