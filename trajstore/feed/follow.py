"""Numbers of trajectories that stay the same while the view changes under a loader.

Invariant: a trajectory that was given a number keeps it for the loader's life, and no other gets it, whatever versions come
and go; a trajectory is known by its segment and its place there, which its commit does not change.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

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
        self._selection = selection
        self._keys = _keys(selection, segments)  # by number
        self._rows = selection.rows  # by number, in the latest table; -1 if gone

    @property
    def whole(self) -> Selection:
        """The latest view."""
        return self._selection

    @property
    def selection(self) -> Selection:
        """By number; what is gone has the place of the first trajectory."""
        return Selection(self._selection.table, np.maximum(self._rows, 0))

    @property
    def present(self) -> Array:
        """``(n,)`` int64: numbers of what is there."""
        return np.flatnonzero(self._rows >= 0)

    def update(self, selection: Selection, segments: Array) -> Change:
        """A new view."""
        before = len(self._keys)
        none = np.empty(0, np.int64)
        if selection.extends(self._selection) and before == len(self._selection):
            fresh = Selection(selection.table, selection.rows[before:])
            self._keys = np.concatenate([self._keys, _keys(fresh, segments)]) if len(fresh) else self._keys
            self._selection, self._rows = selection, selection.rows
            return Change(np.arange(before, len(self._keys)), none, extended=True)
        keys = _keys(selection, segments)
        order = np.argsort(self._keys, kind="stable")
        place = np.minimum(np.searchsorted(self._keys[order], keys), max(before - 1, 0))
        numbers = order[place] if before else np.zeros(len(keys), np.int64)
        known = self._keys[numbers] == keys if before else np.zeros(len(keys), bool)
        was_there = np.flatnonzero(self._rows >= 0)
        rows = np.full(before, -1, np.int64)
        rows[numbers[known]] = selection.rows[known]
        self._keys = np.concatenate([self._keys, keys[~known]])
        self._rows = np.concatenate([rows, selection.rows[~known]])
        self._selection = selection
        return Change(np.arange(before, len(self._keys)), was_there[rows[was_there] < 0], extended=False)


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
        self._roster = Roster(gatherer.selection, gatherer.segments)
        self._refreshed_at = time.monotonic()

    def refresh(self) -> None:
        """Take what has come since."""
        others = time.monotonic() - self._refreshed_at >= self._refresh_s
        selection = self._latest(others)
        if others:
            self._refreshed_at = time.monotonic()
        before = self._gatherer.selection.table
        if selection.table is before or (
            selection.extends(self._roster.whole) and len(selection) == len(self._roster.whole)
        ):
            return
        segments = self._gatherer.number_segments(selection.table)
        change = self._roster.update(selection, segments)
        spec = self._gatherer.spec
        fresh = Selection(selection.table, self._roster.selection.rows[change.added])
        terminated = fresh.terminated if spec.n_step is not None and len(fresh) else None
        added = spec.anchor_counts(fresh.lengths, terminated)
        if isinstance(self._planner, PriorityPlanner):
            self._gatherer.follow(self._roster.selection, None, extended=change.extended)
            self._planner.grow(added, change.gone)
        elif change.extended and self._planner.numbers is None:
            self._gatherer.follow(selection, None, extended=True)
            self._planner.grow(added)
        else:
            numbers = self._roster.present
            present = Selection(selection.table, self._roster.selection.rows[numbers])
            self._gatherer.follow(present, numbers, extended=False)
            self._planner.replace(
                spec.anchors(present.lengths, present.terminated if spec.n_step is not None else None), numbers
            )


def _keys(selection: Selection, segments: Array) -> Array:
    table, rows = selection.table, selection.rows
    keys: Array = (segments[table.segment[rows]] << 32) | table.ordinal[rows]
    return keys
