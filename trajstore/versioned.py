"""What a store's handle says of versions: which there are, their names, what keeps them, how they differ.

Invariant: what a version holds is never changed; restoring one makes another that holds the same.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from typing import Any

import pandas as pd

from trajstore.edit.marks import (
    all_pins,
    all_tags,
    check_tagged,
    find_pins,
    find_tag,
    held,
    tag,
    tag_in,
    unpin,
    untag,
)
from trajstore.edit.versions import Diff, Restore, compare
from trajstore.errors import MissingObjectError, SelectionError
from trajstore.read.access import StoreAccess
from trajstore.read.table import TrajectoryTable
from trajstore.storage.commit import History, Version
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.turns import Turns
from trajstore.storage.workers import Workers
from trajstore.view import View
from trajstore.write.writer import Writer


class Versioned:
    """The part of a ``Store`` that is about its versions."""

    _filesystem: Filesystem
    _history: History
    _access: StoreAccess
    _workers: Workers
    _turns: Turns
    uuid: str

    @property
    @abstractmethod
    def url(self) -> str:
        """Where the store is."""

    @property
    @abstractmethod
    def trajectories(self) -> View:
        """All trajectories."""

    @abstractmethod
    def refresh(self) -> int:
        """Move on to the latest version."""

    @abstractmethod
    def _check_open(self) -> None: ...

    @abstractmethod
    def _writing(self) -> Writer: ...

    @abstractmethod
    def _current(self) -> Version: ...

    @abstractmethod
    def _table_of(self, version: Version) -> TrajectoryTable: ...

    def versions(self, limit: int = 1000) -> pd.DataFrame:
        """The latest versions that can be opened, newest first: when, by what operation, and what they hold.

        ``written_bytes`` are those of all segments committed so far, wherever they lie: those of versions before it, and
        what was deleted or compacted since, are counted as well (``usage()`` says what the version needs).

        Args:
            limit: At most so many.
        """
        self._check_open()
        if limit < 0:
            raise SelectionError(f"limit={limit}, expected zero or more")
        names: dict[int, list[str]] = {}
        for one in all_tags(self._filesystem):
            names.setdefault(one.version, []).append(one.name)
        rows: list[dict[str, Any]] = []
        latest = self._history.latest(self._current().number)
        for version in itertools.islice(self._history.standing(latest, past_damage=True), limit):
            snapshot = version.snapshot
            rows.append(
                {
                    "version": version.number,
                    "created_at": pd.Timestamp(snapshot.created_at),
                    "operation": snapshot.operation,
                    "tags": ", ".join(names.get(version.number, ())),
                    "trajectories": snapshot.totals.trajectories,
                    "steps": snapshot.totals.steps,
                    "written_bytes": snapshot.totals.nbytes,
                    "manifests": len(snapshot.manifests),
                }
            )
        columns = ["version", "created_at", "operation", "tags", "trajectories", "steps", "written_bytes", "manifests"]
        return pd.DataFrame(rows, columns=columns).set_index("version")

    def tag(self, name: str, version: int | str | None = None, *, move: bool = False) -> int:
        """Give a version a name, by which it can be opened, and which keeps it from vacuum.

        Args:
            name: Letters, digits, ``.``, ``_`` and ``-``.
            version: Which; the one that this handle shows by default. What was appended before is flushed.
            move: Take the name from another version.

        Returns:
            The version.

        Raises:
            TagNameError: A text that cannot be a name.
            TagExistsError: Another version has the name.
            VersionNotFoundError: No such version, or it was emptied by vacuum.

        Examples:
            >>> import numpy as np, trajstore
            >>> with trajstore.open("memory://docs/tag", mode="a") as store:
            ...     _ = store.append({"action": np.arange(3)})
            ...     _ = store.tag("paper")
            ...     _ = store.append({"action": np.arange(4)})
            >>> len(trajstore.open("memory://docs/tag", version="paper").trajectories)
            1
        """
        self._writing().flush()
        found = self._current() if version is None else self._version(version)
        return tag(self._filesystem, self._history, name, found, move=move).version

    def untag(self, name: str) -> None:
        """Take a name away; the version stays as long as vacuum lets it.

        Raises:
            VersionNotFoundError: There is no such tag.
        """
        self._writing()
        untag(self._filesystem, name)

    def tags(self) -> pd.DataFrame:
        """Names of versions: which, and when they were given."""
        self._check_open()
        rows = [(one.name, one.version, pd.Timestamp(one.created_at)) for one in all_tags(self._filesystem)]
        return pd.DataFrame(rows, columns=["tag", "version", "created_at"]).set_index("tag")

    def pins(self) -> pd.DataFrame:
        """Other stores that refer to segments of this one: which version they keep, and where they were then."""
        self._check_open()
        rows = [
            (one.uuid, one.version, one.borrower_url, one.borrower_uuid, pd.Timestamp(one.created_at))
            for one in all_pins(self._filesystem)
        ]
        columns = ["pin", "version", "borrower_url", "borrower_uuid", "created_at"]
        return pd.DataFrame(rows, columns=columns).set_index("pin")

    def unpin(self, pin: str) -> None:
        """Let go of what a store that is gone referred to. A store that still refers to it breaks with the next vacuum.

        Raises:
            MissingObjectError: There is no such pin.
        """
        self._writing()
        if not find_pins(self._filesystem, [pin]):
            known = ", ".join(one.uuid for one in all_pins(self._filesystem, past_damage=True)) or "none at all"
            raise MissingObjectError(f"{self.url} has no pin {pin!r}; it has {known}")
        unpin(self._filesystem, pin)

    def diff(self, first: int | str, second: int | str | None = None) -> Diff:
        """What changed from one version to another: ids of trajectories, columns, metadata fields; ``print`` tells it.

        Args:
            first: A version or a tag.
            second: Another; the one that this handle shows by default.

        Raises:
            VersionNotFoundError: No such version.
        """
        self._check_open()
        later = self._current() if second is None else self._version(second)
        return compare(self._table_of(self._version(first)), self._table_of(later))

    def restore(self, version: int | str) -> int:
        """Make a new version that holds what an old one held. What was appended before is flushed, and stays in its version.

        Stores that it refers to are looked for where the latest version has them, if they were relocated since.

        Args:
            version: Which, or a tag.

        Returns:
            The new version.

        Raises:
            VersionNotFoundError: No such version, or it was emptied by vacuum.
        """
        writer = self._writing()
        old = self._version(version)
        began = self._history.moment()
        with self._turns.storing("restore()"), held(self._filesystem, self._history, old):
            return writer.commit(Restore(old.snapshot), since=began).number

    def _version(self, version: int | str) -> Version:
        name = tag_in(version)
        if name is not None:
            marked = find_tag(self._filesystem, name)
            found = self._history.load(marked.version)
            check_tagged(self._filesystem, marked, found)
            return found
        return self._history.load(int(version) if isinstance(version, str) else version)
