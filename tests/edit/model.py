"""What stores hold, as plain lists: the obvious version of everything that editing does.

Invariant: a trajectory is a number (``tests.edit.stores``) and what was computed for it since; nothing here is read from a
store, so a store is held against it.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tests.edit.stores import length_of, metadata_of, numbered
from trajstore.names import flatten
from trajstore.storage.filesystem import ObjectInfo
from trajstore.storage.local import LocalFilesystem
from trajstore.view import View


@dataclass(frozen=True)
class Row:
    """One trajectory of a version.

    Attributes:
        id: Its id there.
        number: What it holds.
        homes: Names of the stores in whose folders its steps and derived values may lie.
        lineage: Identity of the store that it was appended to and its id there, once it has been merged or split.
        derived: Derived column -> factor by which it was computed.
    """

    id: int
    number: int
    homes: frozenset[str]
    lineage: tuple[str, int] | None = None
    derived: tuple[tuple[str, int], ...] = ()

    @property
    def metadata(self) -> dict[str, Any]:
        """All its fields."""
        named = {} if self.lineage is None else {"source_store": self.lineage[0], "source_id": self.lineage[1]}
        return {**metadata_of(self.number), **named}

    @property
    def columns(self) -> dict[str, Any]:
        """All its columns, by path."""
        flat = flatten(numbered(self.number))
        return {**flat, **{name: derive(flat, name, factor) for name, factor in self.derived}}

    def with_derived(self, name: str, factor: int) -> Row:
        """With values computed, in the place of earlier ones."""
        return replace(self, derived=tuple(sorted({**dict(self.derived), name: factor}.items())))


DERIVED = {"value": "reward", "more/potential": "obs/state"}  # a row per step, and one more


def derive(flat: Mapping[str, Any], name: str, factor: int) -> Any:
    """Values of a derived column, from columns by path."""
    return flat[DERIVED[name]] * factor


@dataclass(frozen=True)
class Version:
    """What a version holds.

    Attributes:
        rows: In order.
        places: Store -> folder where this version expects it.
    """

    rows: tuple[Row, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)

    def next(self, rows: Iterable[Row]) -> Version:
        """The same store with other trajectories."""
        return replace(self, rows=tuple(rows))

    def needs(self, own: str) -> set[str]:
        """Other stores that it refers to."""
        return {home for row in self.rows for home in row.homes} - {own}


@dataclass
class Model:
    """A store.

    Attributes:
        name: Of it.
        folder: Where it is.
        uuid: Its identity.
        versions: Those that can be opened.
        expired: Those that vacuum has emptied.
        given: Ids of what was appended here, by number.
        tags: Name -> version.
        next_id: Of the next trajectory.
        waiting: For each handle the numbers of what it has not committed.
    """

    name: str
    folder: str
    uuid: str = ""
    versions: dict[int, Version] = field(default_factory=lambda: {0: Version()})
    expired: set[int] = field(default_factory=set)
    given: dict[int, int] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)
    next_id: int = 0
    waiting: dict[int, list[int]] = field(default_factory=lambda: {0: [], 1: []})

    @property
    def latest(self) -> int:
        """The latest version's number."""
        return max(self.versions)

    @property
    def now(self) -> Version:
        """The latest version."""
        return self.versions[self.latest]

    @property
    def ids(self) -> list[int]:
        """Of the latest version's trajectories."""
        return [row.id for row in self.now.rows]

    def commit(self, rows: Iterable[Row]) -> None:
        """One version more."""
        self.versions[self.latest + 1] = self.now.next(rows)

    def flushed(self, handle: int) -> None:
        """What waits becomes a version."""
        numbers, self.waiting[handle] = self.waiting[handle], []
        if numbers:
            added = [Row(self.next_id + n, number, frozenset({self.name})) for n, number in enumerate(numbers)]
            self.next_id += len(added)
            self.given.update((row.number, row.id) for row in added)
            self.commit([*self.now.rows, *added])

    def deleted(self, gone: Collection[int]) -> None:
        """One version more, without some."""
        self.commit(row for row in self.now.rows if row.id not in gone)

    def derived(self, rows: Iterable[Row], name: str, factor: int, *, replaced: bool) -> list[Row]:
        """Rows with a column computed where it is lacking, or everywhere."""
        return [
            replace(row.with_derived(name, factor), homes=row.homes | {self.name})
            if replaced or name not in dict(row.derived)
            else row
            for row in rows
        ]

    def kept(self, count: int, marked: Collection[int]) -> set[int]:
        """Versions that a vacuum leaves."""
        latest = self.latest
        return {n for n in self.versions if n > latest - count or n in marked or n == latest}

    def vacuumed(self, kept: Collection[int]) -> None:
        """Only these can still be opened."""
        gone = {number for number in self.versions if number and number not in kept}
        self.expired |= gone
        self.versions = {number: one for number, one in self.versions.items() if number not in gone}

    def readable(self, version: Version, folders: Mapping[str, str]) -> bool:
        """Whether the stores that a version refers to are where it expects them.

        Args:
            version: Of this store.
            folders: Where stores are.
        """
        return all(
            os.path.realpath(version.places[name]) == os.path.realpath(folders[name])
            for name in version.needs(self.name)
        )


class Aged(LocalFilesystem):
    """A disk on which all that is there was written a month before what a vacuum writes."""

    def list_objects(self, prefix: str) -> list[ObjectInfo]:
        """As the disk has them, but for their age."""
        month = dt.timedelta(days=30)
        return [
            info if prefix == "vacuum" else dataclasses.replace(info, modified=info.modified and info.modified - month)
            for info in super().list_objects(prefix)
        ]


def taken(rows: Sequence[Row], homes: Iterable[str], *, first_id: int) -> list[Row]:
    """Rows as another store gets them, whose steps may be in any of some stores."""
    return [replace(row, id=first_id + n, homes=frozenset(homes)) for n, row in enumerate(rows)]


def with_lineage(rows: Iterable[Row], uuid: str) -> list[Row]:
    """Rows that say where they came from."""
    return [replace(row, lineage=row.lineage or (uuid, row.id)) for row in rows]


def assert_rows(view: View, rows: Sequence[Row]) -> None:
    """Fail unless a view shows exactly these, every bit, column by column and together."""
    assert view.ids.tolist() == [row.id for row in rows]
    assert view.lengths.tolist() == [length_of(row.number) for row in rows]
    for stored, row in zip(view, rows, strict=True):
        assert stored.metadata == row.metadata
        assert (stored.terminated, stored.truncated) == (row.number % 2 == 0, row.number % 3 == 0)
        expected = row.columns
        assert set(stored.columns) == set(expected), row
        for path, value in expected.items():
            found = stored.column(path)[:]
            if path == "points":
                assert [part.tolist() for part in found] == [part.tolist() for part in value]
            else:
                assert found.dtype == value.dtype, path
                np.testing.assert_array_equal(found, value, err_msg=f"{path} of {row}")
    if rows:
        batch = view.gather(np.arange(len(rows)), view.lengths - 1, columns=["action", "next_obs/state"])
        assert batch["action"][:, 0].tolist() == [row.number for row in rows]
        assert batch["next_obs"]["state"].tolist() == [row.number + length_of(row.number) / 64 for row in rows]
