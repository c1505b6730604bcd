"""What a store's handle does to the store as a whole: what is kept, how it is laid out, whether it is whole.

Invariant: nothing that a version holds is changed; an edit is a new version, and what no kept version needs goes with
``vacuum``, and only then.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from trajstore.edit.columns import add_column as add_derived
from trajstore.edit.compact import DEFAULT_SEGMENT_BYTES, Compacted, compact
from trajstore.edit.findings import Report
from trajstore.edit.release import Borrower, release_pins
from trajstore.edit.relocate import readdress_pins, relocation
from trajstore.edit.repair import repair
from trajstore.edit.retain import kept_positions
from trajstore.edit.vacuum import LATEST_ONLY, Keep, Vacuumed, parse_duration, vacuum
from trajstore.edit.verify import verify
from trajstore.errors import IndexRangeError, SelectionError
from trajstore.schema import Column
from trajstore.storage.changes import Delete
from trajstore.stored import Array
from trajstore.versioned import Versioned
from trajstore.view import View

_log = logging.getLogger(__name__)


class Edited(Versioned):
    """The part of a ``Store`` that edits it."""

    # What is kept

    def delete(self, ids: Iterable[int] | Array, *, reclaim: bool = False) -> int:
        """A new version without these trajectories; earlier versions keep them. What was appended before is flushed.

        Args:
            ids: ``view.ids``, or some of them.
            reclaim: Also vacuum at once, keeping this version and those that are tagged or pinned: for a store that nobody
                else reads or writes.

        Returns:
            The version.

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
            version = self._writing().commit(Delete(np.unique(chosen.astype(np.int64))))
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
        version = writer.commit(change)
        readdress_pins(change, version.snapshot, self._access.bases, url=self.url)
        return version.number

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
