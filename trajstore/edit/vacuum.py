"""Give back the bytes that no kept version needs.

Invariant: an object goes only if no version that stands names it and it was older than the grace, by the storage's clock,
before this vacuum committed a version of its own. A version's slot is emptied before anything that it names goes; it is
never removed, and never filled again.

In this order, each step durable before the next:

1. Announce which versions may go (``vacuum/<uuid>.json``). From now on they can be neither tagged nor pinned; whoever did so
   before is seen in step 2.
2. Look for marks, and decide which versions do go (``vacuum/<uuid>.decided.json``, created, so that it is decided once). If
   another vacuum found the announcement undecided it has decided that none goes, and this one ends.
3. Empty their slots. If this vacuum is killed, the next one does.
4. List objects, leave the young ones and those that a standing version names.
5. Commit a version. A writer that was paused before its commit loses the race, checks the age of its objects again, and
   has to give up; a commit that landed before is read.
6. Remove what neither these versions name.

A vacuum that is exclusive needs no version of its own, and no announcement if no version goes: other stores may still pin.
"""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from trajstore.edit.marks import farewells, marked_versions
from trajstore.edit.needed import Needed, is_waste, needed
from trajstore.errors import CommitError, SelectionError, UnsupportedStorageError
from trajstore.format import layout
from trajstore.format.marks import Farewell
from trajstore.format.snapshot import Base, Snapshot
from trajstore.progress import byte_progress
from trajstore.storage.age import GRACE, in_days
from trajstore.storage.changes import MergedManifests, ReadManifests
from trajstore.storage.commit import EMPTIED_NOTE, History, Version
from trajstore.storage.filesystem import Filesystem, ObjectInfo
from trajstore.storage.workers import Workers

KEPT_VERSIONS = 100
KEPT_FOR = dt.timedelta(days=7)
_READ_TOGETHER = 64
_REMOVED_TOGETHER = 1000
_FEW_SLOTS = 64  # are read; of more, the folder is listed
_NOTED_EVERY = 16  # slots
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class Keep:
    """Which versions stay, besides those that are tagged or pinned.

    Attributes:
        versions: The latest so many.
        age: Those younger than this.
        grace: Objects younger than this stay, whoever wrote them: a commit may be under way.
    """

    versions: int = KEPT_VERSIONS
    age: dt.timedelta = KEPT_FOR
    grace: dt.timedelta = GRACE

    def __post_init__(self) -> None:
        if self.versions < 1:
            raise SelectionError(f"keep_versions={self.versions}, expected at least 1: the latest version always stays")
        for name, time in (("keep_for", self.age), ("grace", self.grace)):
            if time < dt.timedelta(0):
                raise SelectionError(f"{name} of {in_days(time)} days, expected zero or more")


LATEST_ONLY = Keep(versions=1, age=dt.timedelta(0), grace=dt.timedelta(0))


@dataclass(frozen=True)
class Amount:
    """So many objects, with so many bytes in all."""

    objects: int = 0
    nbytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.objects + other.objects, self.nbytes + other.nbytes)


@dataclass(frozen=True)
class Vacuumed:
    """What was given back, or would be.

    Attributes:
        dry_run: Whether nothing was done.
        versions: That can no longer be opened.
        kept_versions: That can still be opened, this vacuum's own included.
        manifests: That went.
        segments: Objects of segments that went.
        other: Statistics of versions that went, and temporary files and holds of what was killed.
        young: Objects that nothing refers to and that stay, because they are younger than the grace.
        unused_bases: Of other stores, where no kept version needs this store's pin; for ``release_pins``.
        used_bases: Those that kept versions need.
    """

    dry_run: bool
    versions: tuple[int, ...] = ()
    kept_versions: int = 0
    manifests: Amount = Amount()
    segments: Amount = Amount()
    other: Amount = Amount()
    young: Amount = Amount()
    unused_bases: tuple[Base, ...] = ()
    used_bases: tuple[Base, ...] = ()

    @property
    def objects(self) -> int:
        """How many went."""
        return (self.manifests + self.segments + self.other).objects

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return (self.manifests + self.segments + self.other).nbytes

    def __str__(self) -> str:
        parts = [_counted(len(self.versions), "version"), _counted(self.manifests.objects, "manifest")]
        parts += [f"{_counted(self.segments.objects, 'object')} of segments", f"{self.other.objects} other"]
        told = f"{'would remove' if self.dry_run else 'removed'} {', '.join(parts)}: {self.nbytes:,} bytes"
        young = f"; {self.young.nbytes:,} bytes may go when they are older" if self.young.objects else ""
        stand = "stands" if self.kept_versions == 1 else "stand"
        return f"{told}; {_counted(self.kept_versions, 'version')} {stand}{young}"


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


@dataclass(frozen=True)
class Vacuuming:
    """The change of a vacuum that is not exclusive: nothing but a version, so that paused writers lose their race."""

    operation: str = field(default="vacuum", init=False)
    merges: bool = field(default=False, init=False)

    def apply(self, parent: Snapshot, merged: MergedManifests | None, read: ReadManifests) -> Snapshot:  # noqa: ARG002
        """The next snapshot."""
        return replace(parent, operation=self.operation)


def vacuum(
    filesystem: Filesystem,
    history: History,
    keep: Keep,
    *,
    dry_run: bool,
    exclusive: bool = False,
    in_progress: Callable[[], Collection[str]] = frozenset,
    start: int | None = None,
    now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    progress: bool | None = None,
) -> Vacuumed:
    """Empty the slots of versions that are not kept, remove what no version needs any more.

    Args:
        filesystem: Where the store is.
        history: Its versions.
        keep: Which stay.
        dry_run: Only say what would be done. Nothing is written, so ages are taken by this machine's clock.
        exclusive: The caller promises that no other process has the store open for writing, and that no commit of this
            one is under way.
        in_progress: Segments that this handle is writing; asked after objects were listed.
        start: A version that may exist; None for the hint.
        now: The clock, UTC, for the age of versions.
        progress: Show bytes removed on standard error; by default in a terminal, if there are many.

    Raises:
        SelectionError: A grace that is shorter than what all writers count on, and not exclusive.
        CommitError: Another vacuum began meanwhile, and ended this one.
        UnsupportedStorageError: The storage does not say when objects were written.
    """
    if keep.grace < GRACE and not exclusive:
        raise SelectionError(
            f"grace of {in_days(keep.grace)} days, expected at least {in_days(GRACE)}: writers count on it; pass "
            "exclusive=True if no other process has the store open for writing"
        )
    one = _Vacuum(filesystem, history, keep, exclusive, in_progress, now)
    head = history.latest(history.parse_hint(filesystem.read(layout.LATEST_HINT)) if start is None else start)
    if not head.number:  # who makes the first version may use what a killed attempt left
        return Vacuumed(dry_run)
    return one.plan(head) if dry_run else one.run(head, progress=progress)


def parse_duration(text: str | dt.timedelta) -> dt.timedelta:
    """A time as people write it.

    Raises:
        SelectionError: It cannot be understood.

    >>> parse_duration("7d"), parse_duration("90m")
    (datetime.timedelta(days=7), datetime.timedelta(seconds=5400))
    """
    if isinstance(text, dt.timedelta):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", text, re.ASCII) if isinstance(text, str) else None
    try:
        if match is not None:
            return dt.timedelta(**{_UNITS[match.group(2)]: float(match.group(1))})
        found = f"{text!r} is no duration"
    except OverflowError:
        found = f"{text!r} is too long"
    raise SelectionError(f"{found}; write 30m, 12h, 7d or 2w")


@dataclass(frozen=True)
class _Waste:
    """Objects that no version needs.

    Attributes:
        old: May go.
        young: Stay for now.
    """

    old: tuple[ObjectInfo, ...]
    young: tuple[ObjectInfo, ...]


@dataclass(frozen=True)
class _Standing:
    """Versions whose slots are not empty.

    Attributes:
        kept: Stay; the latest is the last.
        candidates: Go, unless they are marked meanwhile; ascending.
        bases: Of all of them.
    """

    kept: tuple[Version, ...]
    candidates: tuple[int, ...]
    bases: frozenset[Base]

    def without(self, gone: Collection[int], load: Callable[[Sequence[int]], Sequence[Version]]) -> _Standing:
        """When some have gone, and the other candidates stay."""
        spared = load([number for number in self.candidates if number not in gone])
        return replace(self, kept=tuple(sorted((*self.kept, *spared), key=lambda v: v.number)), candidates=())


@dataclass(frozen=True)
class _Vacuum:
    """One run."""

    filesystem: Filesystem
    history: History
    keep: Keep
    exclusive: bool
    in_progress: Callable[[], Collection[str]]
    now: Callable[[], dt.datetime]

    def plan(self, head: Version) -> Vacuumed:
        """What ``run`` would do."""
        standing = self._standing(head)
        waste = self._waste(self.now())
        rest = needed(self.history, standing.kept)
        rest.segments.update(self.in_progress())
        return self._told(standing.candidates, standing, rest, self._unneeded(waste, rest), dry_run=True)

    def run(self, head: Version, *, progress: bool | None) -> Vacuumed:
        """Do it."""
        self._finish_others()
        standing = self._standing(head)
        gone: Sequence[int] = ()
        farewell = (
            Farewell(uuid.uuid4().hex, standing.candidates) if standing.candidates or not self.exclusive else None
        )
        if farewell is not None:
            gone, clock = self._agree(farewell)
        else:
            clock = self._clock() if self.keep.grace else self.now()
        self._empty(gone)
        standing = standing.without(gone, self.history.load_standing)
        waste = self._waste(clock)
        rest = needed(self.history, standing.kept)
        rest.segments.update(self.in_progress())
        unneeded = self._unneeded(waste, rest)
        later = self._later(standing.kept[-1], commit=bool(unneeded.old) and not self.exclusive)
        if later:
            rest |= needed(self.history, later)
            unneeded = self._unneeded(unneeded, rest)
            bases = standing.bases.union(*(version.snapshot.bases for version in later))
            standing = replace(standing, kept=(*standing.kept, *later), bases=bases)
        self._remove(unneeded.old, progress=progress)
        if farewell is not None:
            self._take_back(farewell)
        self._note_emptied(standing)
        return self._told(gone, standing, rest, unneeded, dry_run=False)

    # Versions

    def _standing(self, head: Version) -> _Standing:
        marked = marked_versions(self.filesystem)
        kept: list[Version] = []
        candidates: list[int] = []
        bases: set[Base] = set()
        now = self.now()
        for version in self._read(self._slots(head.number), head):
            bases.update(version.snapshot.bases)
            # Clocks differ: without a limit, one that is made in the future is not young either.
            young = bool(self.keep.age) and now - version.snapshot.created_at < self.keep.age
            # Numbers count from the latest, so that who empties a version does not shift the others.
            recent = version.number > head.number - self.keep.versions
            if recent or young or version.number in marked or version.number == head.number:
                kept.append(version)
            else:
                candidates.append(version.number)
        return _Standing(tuple(kept), tuple(candidates), frozenset(bases))

    def _slots(self, head: int) -> list[int]:
        """Numbers of all slots that may not be empty, ascending, without the head's."""
        first = self.history.noted_emptied() + 1
        if head - first <= _FEW_SLOTS:
            return list(range(first, head))
        listed = [(layout.snapshot_version(o.key), o.nbytes) for o in self.filesystem.list_objects(layout.SNAPSHOTS)]
        return sorted(number for number, nbytes in listed if number is not None and nbytes and number < head)

    def _read(self, numbers: Sequence[int], head: Version) -> Iterator[Version]:
        for first in range(0, len(numbers), _READ_TOGETHER):
            yield from self.history.load_standing(numbers[first : first + _READ_TOGETHER])
        yield head

    def _later(self, known: Version, *, commit: bool) -> list[Version]:
        """Versions after the latest one known, among them one that this vacuum commits if it has to."""
        head = self.history.commit(Vacuuming(), known) if commit else self.history.latest(known.number)
        return list(self._read(range(known.number + 1, head.number), head)) if head.number > known.number else []

    def _empty(self, versions: Sequence[int]) -> None:
        """The oldest first, and all of them durable."""

        def overwrite(number: int) -> None:
            self.filesystem.overwrite(layout.snapshot_key(number), b"")

        if not versions:
            return
        if len(versions) > _FEW_SLOTS:
            workers = Workers(16, name="trajstore-vacuum")
            try:
                workers.map(overwrite, versions[:-1])
            finally:
                workers.close()
        else:
            for number in versions[:-1]:
                overwrite(number)
        # They are in one folder: what makes the last name durable makes all of them.
        self.filesystem.overwrite(layout.snapshot_key(versions[-1]), b"", durable=True)

    def _note_emptied(self, standing: _Standing) -> None:
        """Say up to which version all slots are empty. None of them is ever filled again, so this stays true."""
        emptied = standing.kept[0].number - 1
        if emptied >= self.history.noted_emptied() + _NOTED_EVERY:
            note = Farewell(EMPTIED_NOTE, (emptied,))
            self.filesystem.overwrite(layout.decision_key(EMPTIED_NOTE), note.to_bytes(), durable=True)

    # Between vacuums, and those who tag and pin

    def _finish_others(self) -> None:
        """End vacuums that were killed, or are under way: what they decided is done, what they did not decide is not."""
        found = farewells(self.filesystem)
        for key, farewell in list(found.items()):
            if key != layout.farewell_key(farewell.uuid):
                continue
            decision = layout.decision_key(farewell.uuid)
            if decision not in found and not self.filesystem.create(decision, Farewell(farewell.uuid, ()).to_bytes()):
                data = self.filesystem.read(decision)
                if data is None:
                    continue  # it is through
                found[decision] = Farewell.from_bytes(data, key=f"{decision} in {self.filesystem.description}")
            if decision in found:
                self._empty(found[decision].versions)
            # A decision that nothing goes stays for good: a vacuum that sleeps must find it when it wakes.
            self.filesystem.remove([key])

    def _agree(self, farewell: Farewell) -> tuple[tuple[int, ...], dt.datetime]:
        """Announce, look for marks, decide: the versions that go, and the time by the storage's clock before all that."""
        key, decision = layout.farewell_key(farewell.uuid), layout.decision_key(farewell.uuid)
        self.filesystem.create(key, farewell.to_bytes())
        try:
            clock = self._modified(key) if self.keep.grace else self.now()
            marked = marked_versions(self.filesystem) if farewell.versions else set()
        except BaseException:
            self.filesystem.remove([key])
            raise
        gone = tuple(number for number in farewell.versions if number not in marked)
        if not self.filesystem.create(decision, replace(farewell, versions=gone).to_bytes()):
            raise CommitError(
                f"another vacuum of {self.filesystem.description} began meanwhile, so this one removed nothing; let one run "
                "at a time"
            )
        return gone, clock

    def _take_back(self, farewell: Farewell) -> None:
        """The announcement before the decision: one without the other must not look undecided."""
        self.filesystem.remove([layout.farewell_key(farewell.uuid)])
        self.filesystem.remove([layout.decision_key(farewell.uuid)])

    # Objects

    def _clock(self) -> dt.datetime:
        """The time by the storage's clock."""
        key = f"{layout.VACUUM}/{uuid.uuid4().hex}.clock"
        self.filesystem.store({key: [b"0"]})
        try:
            return self._modified(key)
        finally:
            self.filesystem.remove([key])

    def _modified(self, key: str) -> dt.datetime:
        listed = {info.key: info.modified for info in self.filesystem.list_objects(layout.VACUUM)}
        modified = listed.get(key)
        if modified is None:
            raise UnsupportedStorageError(
                f"{self.filesystem.description} does not say when objects were written, so none can be told to be old "
                'enough; pass grace="0s" and exclusive=True if no other process has the store open for writing'
            )
        return modified

    def _waste(self, clock: dt.datetime) -> _Waste:
        """All objects that a vacuum may ever remove, by age."""
        old: list[ObjectInfo] = []
        young: list[ObjectInfo] = []
        folders = [layout.MANIFESTS, layout.SEGMENTS]
        if self.keep.grace:  # what is not worth a listing when bytes are reclaimed every few seconds
            folders += [layout.SNAPSHOTS, layout.STATISTICS, layout.TAGS, layout.PINS, layout.VACUUM]
        for folder in folders:
            for info in self.filesystem.list_objects(folder):
                if self.keep.grace and (info.modified is None or clock - info.modified < self.keep.grace):
                    young.append(info)
                else:
                    old.append(info)
        return _Waste(tuple(old), tuple(young))

    def _unneeded(self, waste: _Waste, rest: Needed) -> _Waste:
        return _Waste(
            tuple(info for info in waste.old if is_waste(info.key, rest)),
            tuple(info for info in waste.young if is_waste(info.key, rest)),
        )

    def _remove(self, objects: Sequence[ObjectInfo], *, progress: bool | None) -> None:
        with byte_progress("removing", sum(o.nbytes for o in objects), shown=progress) as advance:
            for first in range(0, len(objects), _REMOVED_TOGETHER):
                lot = objects[first : first + _REMOVED_TOGETHER]
                self.filesystem.remove([o.key for o in lot])
                advance(sum(o.nbytes for o in lot))

    def _told(
        self, gone: Sequence[int], standing: _Standing, rest: Needed, waste: _Waste, *, dry_run: bool
    ) -> Vacuumed:
        kinds = {kind: Amount() for kind in ("manifests", "segments", "other")}
        for info in waste.old:
            folder = info.key.partition("/")[0]
            kinds[folder if folder in kinds else "other"] += Amount(1, info.nbytes)
        young = sum((Amount(1, info.nbytes) for info in waste.young), Amount())
        used = {base.pin for base in rest.bases}  # under another URL, perhaps: the owner was moved
        unused = sorted(standing.bases - rest.bases, key=lambda base: (base.url, base.pin or ""))
        return Vacuumed(
            dry_run,
            versions=tuple(gone),
            kept_versions=len(standing.kept),
            young=young,
            unused_bases=tuple(base for base in unused if base.pin is not None and base.pin not in used),
            used_bases=tuple(rest.bases),
            **kinds,
        )
