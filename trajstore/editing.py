"""What a store's handle does to the store as a whole: versions and their names, what is kept, how it is laid out.

Invariant: nothing that a version holds is changed; an edit is a new version, and what no kept version needs goes with
``vacuum``, and only then.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from trajstore.edit.columns import add_column as add_derived
from trajstore.edit.compact import DEFAULT_SEGMENT_BYTES, Compacted, compact
from trajstore.edit.findings import Report
from trajstore.edit.marks import (
    all_pins,
    all_tags,
    check_tagged,
    check_there,
    find_tag,
    held,
    tag,
    tag_in,
    unpin,
    untag,
)
from trajstore.edit.release import Borrower, release_pins
from trajstore.edit.relocate import relocation
from trajstore.edit.repair import repair
from trajstore.edit.retain import kept_positions
from trajstore.edit.turns import Turns
from trajstore.edit.vacuum import LATEST_ONLY, Keep, Vacuumed, parse_duration, vacuum
from trajstore.edit.verify import verify
from trajstore.edit.versions import Diff, Restore, compare
from trajstore.errors import IndexRangeError, SelectionError
from trajstore.read.access import StoreAccess
from trajstore.read.table import TrajectoryTable
from trajstore.schema import Column
from trajstore.storage.changes import Delete
from trajstore.storage.commit import History, Version
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.workers import Workers
from trajstore.stored import Array
from trajstore.view import View
from trajstore.write.writer import Writer

_log = logging.getLogger(__name__)


class Edited:
    """The half of a ``Store`` that edits it."""

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

    # Versions

    def versions(self, limit: int = 1000) -> pd.DataFrame:
        """The latest versions that can be opened, newest first: when, by what operation, and what they hold.

        ``written_bytes`` are those of all segments committed so far: what was deleted or compacted since is counted as well
        (``usage()`` says what the version needs).

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
        check_there(self._filesystem, pin)
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

    # What is kept

    def delete(self, ids: Iterable[int] | Array, *, reclaim: bool = False) -> int:
        """A new version without these trajectories; earlier versions keep them. What was appended before is flushed.

        Args:
            ids: ``view.ids``, or some of them.
            reclaim: Also vacuum at once, keeping this version and those that are tagged or pinned: for a store that nobody
                else reads or writes.

        Returns:
            The version; without ids there is no new one.

        Raises:
            SelectionError: Something else than ids.
            IndexRangeError: A trajectory that the latest version does not hold.
            EditUnderWayError: With ``reclaim``, while another thread compacts, repairs, restores or computes a column;
                nothing is deleted.

        Examples:
            >>> import numpy as np, trajstore
            >>> with trajstore.open("memory://docs/delete", mode="a") as store:
            ...     for n in (3, 5):
            ...         _ = store.append({"action": np.arange(n)})
            ...     store.flush()
            ...     _ = store.delete(store.trajectories.filter("length < 4").ids)
            ...     len(store.trajectories)
            1
        """
        if isinstance(ids, View) or not isinstance(ids, Iterable):
            given = (
                "a view; give its ids: delete(view.ids)"
                if isinstance(ids, View)
                else f"{ids!r}; write delete([{ids!r}])"
            )
            raise SelectionError(f"delete takes ids of trajectories, found {given}")
        chosen = ids if isinstance(ids, np.ndarray) else np.array(list(ids))
        if chosen.size and chosen.dtype.kind not in "iu":
            raise SelectionError(f"ids of dtype {chosen.dtype}, expected integers")
        with self._turns.removing("delete(reclaim=True)") if reclaim else contextlib.nullcontext():
            writer = self._writing()
            if chosen.size:
                version = writer.commit(Delete(np.unique(chosen.astype(np.int64))))
            else:
                writer.flush()
                version = writer.head
            if reclaim:
                self._vacuum(LATEST_ONLY, exclusive=True, progress=False)
        return version.number

    def retain(
        self,
        *,
        last: int | None = None,
        max_steps: int | None = None,
        max_bytes: int | None = None,
        where: str | None = None,
    ) -> int:
        """Keep the newest trajectories that all limits allow, and delete the others: the window of a replay buffer.

        Args:
            last: At most so many trajectories.
            max_steps: At most so many steps in all.
            max_bytes: At most so many stored bytes in all, about.
            where: Only these, as for ``View.filter``; limits count among them.

        Returns:
            How many were deleted; with 0 there is no new version. Earlier versions keep them until ``vacuum``.

        Raises:
            SelectionError: No limit at all, one below zero, or an expression that cannot be understood.

        Examples:
            >>> import numpy as np, trajstore
            >>> with trajstore.open("memory://docs/retain", mode="a") as store:
            ...     for n in (3, 5, 4):
            ...         _ = store.append({"action": np.arange(n)})
            ...     store.retain(max_steps=9), store.trajectories.lengths.tolist()
            (1, [5, 4])
        """
        if last is None and max_steps is None and max_bytes is None and where is None:
            raise SelectionError("retain() without a limit; give last=, max_steps=, max_bytes= or where=")
        while True:
            writer = self._writing()
            writer.flush()
            self.refresh()
            every = self.trajectories
            chosen = every if where is None else every.filter(where)
            kept = chosen.take(
                kept_positions(chosen.source().selection, last=last, max_steps=max_steps, max_bytes=max_bytes)
            )
            gone = np.setdiff1d(every.ids, kept.ids)
            gone = gone[gone >= 0]  # another thread is appending: what has no id yet stays until the next time
            if len(gone):
                try:
                    writer.commit(Delete(gone, operation="retain"))
                except IndexRangeError:  # another writer deleted some meanwhile
                    continue
            return len(gone)

    def vacuum(
        self,
        grace: str | dt.timedelta = "7d",
        *,
        keep_versions: int = 100,
        keep_for: str | dt.timedelta = "7d",
        dry_run: bool = False,
        exclusive: bool = False,
        progress: bool | None = None,
    ) -> Vacuumed:
        """Give back the bytes that no kept version needs. Versions that are not kept can no longer be opened.

        Args:
            grace: Objects younger than this stay, since a commit may be under way: ``"7d"``, ``"36h"``.
            keep_versions: The latest so many stay, and those that are tagged or that other stores refer to.
            keep_for: Those younger than this stay.
            dry_run: Only say what would go.
            exclusive: No other process and no other handle has the store open for writing: needed for a grace below 7 days.
            progress: Show a bar on standard error; by default in a terminal, if there is much to remove.

        Raises:
            SelectionError: A time that cannot be understood, or a short grace without ``exclusive``.
            EditUnderWayError: With ``exclusive``, while another thread compacts, repairs, restores or computes a column.
        """
        keep = Keep(versions=keep_versions, age=parse_duration(keep_for), grace=parse_duration(grace))
        alone = exclusive and not dry_run
        with self._turns.removing("vacuum(exclusive=True)") if alone else contextlib.nullcontext():
            self._writing().flush()
            return self._vacuum(keep, dry_run=dry_run, exclusive=exclusive, progress=progress)

    def _vacuum(
        self, keep: Keep, *, dry_run: bool = False, exclusive: bool = False, progress: bool | None = None
    ) -> Vacuumed:
        writer = self._writing()
        with writer.paused():
            done = vacuum(
                self._filesystem,
                self._history,
                keep,
                dry_run=dry_run,
                exclusive=exclusive,
                in_progress=writer.segments_in_progress,
                start=writer.head.number,
                progress=progress,
            )
        self.refresh()
        if not dry_run:
            borrower = Borrower(self.url, self.uuid, self._access.bases.open)
            now = (
                dt.datetime.now(dt.UTC) if keep.grace else None
            )  # who reclaims every few seconds need not look each time
            for place, why in release_pins(borrower, done.unused_bases, done.used_bases, now=now).kept:
                _log.warning("a pin of %s in %s is no longer needed, and stays: %s", self.url, place, why)
        return done

    # How it is laid out

    def add_column(
        self,
        name: str | Column,
        function: Callable[[dict[str, Any]], Any],
        *,
        columns: Sequence[str] | None = None,
        replace: bool = False,
        threads: int | None = None,
        progress: bool | None = None,
    ) -> int:
        """Compute a column from others, for every trajectory that lacks it: returns, advantages, embeddings, new rewards.

        Only the new column is written, also where trajectories lie in other stores. What was appended before is flushed;
        what is appended later lacks the column until this is called again. What is finished is committed now and then: after
        a crash, call it again to compute the rest.

        Args:
            name: Of the column, nested by ``/``; or a ``Column``, to say what it is before anything is computed.
            function: Is given a nested mapping of one trajectory's arrays, ``[T, ...]``, or ``[T + 1, ...]`` for states with
                a final observation; bfloat16 comes as a tensor. Returns ``[T, ...]``, or ``[T + 1, ...]``: an array, a
                tensor or a list. The first result says what the column is, and all others must have its dtype and shape.
                Called from several threads.
            columns: What the function is given: names of columns or their parents, of metadata fields, and ``terminated``,
                ``truncated``, ``is_first``, ``is_last`` and ``step``, ``[T]`` each. By default all columns of fixed shape
                that the trajectory has.
            replace: For trajectories that have it too; old values stay in earlier versions, and no version mixes the two.
            threads: Segments that are computed at a time; 1 for a function that must not be called twice at once.
            progress: Show a bar on standard error; by default in a terminal, if there is much to read.

        Returns:
            The version.

        Raises:
            SchemaError: One of its subclasses: a name that is taken, or a result unlike the first one; names the trajectory.
            SelectionError: There are no trajectories, or some lack a column that was named.
            CommitError: With ``replace``, others compacted or restored trajectories meanwhile that have old values.

        Examples:
            >>> import numpy as np, trajstore
            >>> with trajstore.open("memory://docs/add_column", mode="a") as store:
            ...     _ = store.append({"reward": np.array([1.0, 0.0, 2.0])})
            ...     _ = store.add_column("return", lambda t: t["reward"][::-1].cumsum()[::-1], columns=["reward"])
            ...     store.trajectories[0]["return"][:]
            array([3., 2., 2.])
        """
        writer = self._writing()
        writer.flush()
        with self._turns.storing("add_column()"):
            writer.head = add_derived(
                self._access,
                self._history,
                self._history.latest(writer.head.number),
                name,
                function,
                columns=columns,
                replace=replace,
                threads=threads,
                preset=writer.options.codec,
                workers=self._workers,
                progress=progress,
            )
        return writer.head.number

    def compact(self, *, segment_bytes: int = DEFAULT_SEGMENT_BYTES, progress: bool | None = None) -> Compacted:
        """Write the trajectories of small segments together into large ones, which are opened and read faster.

        Appends and deletions by others go on meanwhile. The small segments stay for earlier versions, until ``vacuum``.

        Args:
            segment_bytes: Bytes of a large segment, before compression; segments of at least half of that are left alone.
            progress: Show a bar on standard error; by default in a terminal, if there is much to do.
        """
        writer = self._writing()
        writer.flush()
        with self._turns.storing("compact()"):
            done = compact(
                self._filesystem,
                self._history,
                self._history.latest(writer.head.number),
                self._workers,
                segment_bytes=segment_bytes,
                preset=writer.options.codec,
                progress=progress,
            )
        self.refresh()
        return done

    def relocate(self, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> int:
        """After stores that this one refers to were moved: a new version that finds them there.

        Args:
            old: How their URLs or paths began.
            new: How they begin now.

        Returns:
            The version.

        Raises:
            SelectionError: It refers to nothing there.
            UntrustedBaseError: The new place is outside the store's parent folder and the ``bases`` that it was opened with.
            StoreNotFoundError: No store is at the new place.
            CorruptionError: Another store is there.
        """
        writer = self._writing()
        self.refresh()
        change = relocation(self._current().snapshot, self._access.bases, old, new, url=self.url)
        return writer.commit(change).number

    def verify(self, *, deep: bool = False, progress: bool | None = None) -> Report:
        """Check the store from its versions down to its segments; nothing is changed.

        Args:
            deep: Also read every page and hold it against its checksum.
            progress: Show a bar on standard error; by default in a terminal, if there is much to read.
        """
        self._check_open()
        return verify(self._filesystem, self._access, deep=deep, progress=progress)

    def repair(self, report: Report) -> int | None:
        """Make a version without the trajectories that ``verify`` found to be lost, and without damaged derived columns.

        Args:
            report: What ``verify`` found.

        Returns:
            The version; None if there was nothing to repair. Nothing is removed: earlier versions name what they named.
        """
        writer = self._writing()
        writer.flush()
        with self._turns.storing("repair()"):
            version = repair(self._filesystem, self._history, self._current(), report)
        self.refresh()
        return None if version is None else version.number

    def _version(self, version: int | str) -> Version:
        name = tag_in(version)
        if name is not None:
            marked = find_tag(self._filesystem, name)
            found = self._history.load(marked.version)
            check_tagged(self._filesystem, marked, found)
            return found
        return self._history.load(int(version) if isinstance(version, str) else version)
