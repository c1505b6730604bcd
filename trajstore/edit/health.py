"""How a store stands, besides what it holds: versions, their names, ties to other stores, and how small its segments are.

Invariant: only listings and marks are read, no segment, so that it costs a few requests however large the store is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trajstore.edit.compact import plan
from trajstore.edit.marks import all_pins, all_tags
from trajstore.format import layout
from trajstore.format.marks import Pin, Tag
from trajstore.format.snapshot import Base
from trajstore.read.bases import absolute
from trajstore.read.table import TrajectoryTable
from trajstore.storage.filesystem import Filesystem

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
        compacted_segments: How many it would make of them.
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
    groups = plan(table)
    return Health(
        versions=sum(1 for number, nbytes in listed if number and nbytes),
        tags=tuple(all_tags(filesystem)),
        pins=tuple(all_pins(filesystem)),
        others=_others(table.version.snapshot.bases, filesystem.url),
        small_segments=sum(map(len, groups)),
        compacted_segments=len(groups),
    )


def _others(bases: Sequence[Base], url: str) -> tuple[OtherStore, ...]:
    pinned: dict[str, bool] = {}
    for base in bases:
        place = absolute(base.url, seen_from=url)
        pinned[place] = pinned.get(place, True) and base.pin is not None
    return tuple(OtherStore(place, is_pinned) for place, is_pinned in sorted(pinned.items()))
