"""Numbers of trajectories that stay the same while the view changes under a loader.

Invariant: a trajectory that was given a number keeps it for the loader's life, and no other gets it, whatever versions come
and go; a trajectory is known by its segment and its place there, which its commit does not change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.feed.gather import Gatherer
from trajstore.feed.plan import FollowPlanner, PriorityPlanner
from trajstore.read.selection import Selection
from trajstore.stored import Array


@dataclass(frozen=True, eq=False)
class Change:
    """What a new view brought.

    Attributes:
        added: Numbers of trajectories that are new, ascending.
        gone: Numbers of those that are no longer there.
        extended: Whether all that was there kept its place, so that only what was added need be looked at.
    """

    added: Array
    gone: Array
    extended: bool


class Roster:
    """The trajectories that a loader has seen.

    Args:
        selection: Its view at first.
        segments: ``(segments,)`` int64, numbers of the table's segments that never change.
    """

    def __init__(self, selection: Selection, segments: Array) -> None:
        self.latest = selection
        self._segments = segments
        # None while every number is a position in the latest view: nothing then has to be kept for each trajectory.
        self._keys: Array | None = None  # by number
        self._rows: Array | None = None  # by number, in the latest table; -1 if gone

    def __len__(self) -> int:
        """Numbers given."""
        return len(self.latest) if self._keys is None else len(self._keys)

    def rows(self, numbers: Array) -> Array:
        """Rows of the latest table, ``(n,)`` int64; -1 for what is gone."""
        found: Array = (self.latest.rows if self._rows is None else self._rows)[numbers]
        return found

    @property
    def by_number(self) -> Selection:
        """All numbers; what is gone has the place of the first trajectory."""
        if self._rows is None:
            return self.latest
        return Selection(self.latest.table, np.maximum(self._rows, 0))

    @property
    def present(self) -> Array:
        """``(n,)`` int64: numbers of what is there."""
        return np.arange(len(self)) if self._rows is None else np.flatnonzero(self._rows >= 0)

    def state(self) -> dict[str, Any]:
        """Which trajectory each number means, in any process and version."""
        known = self.by_number
        table, rows = known.table, known.rows
        used, segment = np.unique(table.segment[rows], return_inverse=True)
        return {
            "segments": [table.segments[n].uuid for n in used.tolist()],
            "segment": segment.astype(np.int32),  # (n,) of these
            "ordinal": table.ordinal[rows],  # (n,) place in the segment
            "id": table.id[rows],  # (n,) -1 where it was not committed when this was taken
        }

    def places(self, state: Mapping[str, Any]) -> Array:
        """Numbers here of the trajectories of another roster's state, ``(n,)`` int64; -1 for what is not here."""
        mine = self.state()
        numbers = {uuid: n for n, uuid in enumerate(mine["segments"])}
        theirs = np.array([numbers.get(uuid, -1) for uuid in state["segments"]], np.int64)
        wanted = theirs[state["segment"]] << 32 | np.asarray(state["ordinal"], np.int64)
        keys = mine["segment"].astype(np.int64) << 32 | mine["ordinal"]
        order = np.argsort(keys, kind="stable")
        place = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
        return np.where(keys[order[place]] == wanted, order[place], -1)

    def update(self, selection: Selection, segments: Array) -> Change:
        """A new view."""
        before = len(self)
        if self._keys is None and selection.extends(self.latest):
            self.latest, self._segments = selection, segments
            return Change(np.arange(before, len(selection)), np.empty(0, np.int64), extended=True)
        known_keys = _keys(self.latest, self._segments) if self._keys is None else self._keys
        keys = _keys(selection, segments)
        order = np.argsort(known_keys, kind="stable")
        place = np.minimum(np.searchsorted(known_keys[order], keys), max(before - 1, 0))
        numbers = order[place] if before else np.zeros(len(keys), np.int64)
        known = known_keys[numbers] == keys if before else np.zeros(len(keys), bool)
        was_there = self.present
        rows = np.full(before, -1, np.int64)
        rows[numbers[known]] = selection.rows[known]
        unchanged = before <= len(keys) and np.array_equal(numbers[:before], np.arange(before)) and known[:before].all()
        self._keys = None if unchanged else np.concatenate([known_keys, keys[~known]])
        self._rows = None if unchanged else np.concatenate([rows, selection.rows[~known]])
        self.latest, self._segments = selection, segments
        return Change(np.arange(before, len(self)), was_there[rows[was_there] < 0], extended=False)


class Following:
    """Keeps one view of a loader up to date.

    Args:
        latest: The view as it would be taken now; with True, after looking for commits of others.
        refresh_s: How often to look for them.
        gatherer: Of its windows.
        planner: Of its windows.
    """

    def __init__(
        self,
        latest: Callable[[bool], Selection],
        refresh_s: float,
        gatherer: Gatherer,
        planner: FollowPlanner | PriorityPlanner,
    ) -> None:
        self._latest = latest
        self._refresh_s = refresh_s
        self._gatherer = gatherer
        self._planner = planner
        self.roster = Roster(gatherer.selection, gatherer.segments)
        self._refreshed_at = time.monotonic()

    def refresh(self) -> None:
        """Take what has come since."""
        others = time.monotonic() - self._refreshed_at >= self._refresh_s
        selection = self._latest(others)
        if others:
            self._refreshed_at = time.monotonic()
        before = self.roster.latest
        if selection.table is before.table or (selection.extends(before) and len(selection) == len(before)):
            return
        self._gatherer.check_types(selection.schema)
        segments = self._gatherer.number_segments(selection.table)
        change = self.roster.update(selection, segments)
        spec = self._gatherer.spec
        if isinstance(self._planner, PriorityPlanner):
            self._gatherer.follow(self.roster.by_number, None, extended=change.extended)
            self._planner.grow(self._anchors_of(change.added), change.gone)
        elif change.extended:
            self._gatherer.follow(selection, None, extended=True)
            self._planner.grow(self._anchors_of(change.added))
        else:
            numbers = self.roster.present
            there = Selection(selection.table, self.roster.rows(numbers))
            terminated = there.terminated if spec.n_step is not None else None
            self._gatherer.follow(there, numbers, extended=False)
            self._planner.replace(spec.anchors(there.lengths, terminated))

    def _anchors_of(self, numbers: Array) -> Array:
        """How many each trajectory has."""
        spec = self._gatherer.spec
        fresh = Selection(self.roster.latest.table, self.roster.rows(numbers))
        return spec.anchor_counts(fresh.lengths, fresh.terminated if spec.n_step is not None and len(fresh) else None)


def _keys(selection: Selection, segments: Array) -> Array:
    table, rows = selection.table, selection.rows
    keys: Array = (segments[table.segment[rows]] << 32) | table.ordinal[rows]
    return keys
