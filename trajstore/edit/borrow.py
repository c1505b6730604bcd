"""What a store borrows: segments that stay in other stores, and pins there that keep them.

Invariant: a version is pinned in the store that owns the segments, then it is looked whether the version still stands, and
only then may anything refer to it. A base names the owner itself, never a store that refers to it in turn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from trajstore.edit.marks import find_pins, pin, unpin
from trajstore.edit.needed import live_parts
from trajstore.errors import CommitOutcomeUnknownError, ReadOnlyError, StorageError, TrajstoreError, VersionExpiredError
from trajstore.format import layout
from trajstore.format.marks import Pin
from trajstore.format.snapshot import Base, Snapshot
from trajstore.read.bases import reference
from trajstore.storage.commit import History, Named, Version, VersionName
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.workers import Workers

Pins = Literal["required", "where possible", "none"]
T = TypeVar("T")

_log = logging.getLogger(__name__)
_STORES_AT_ONCE = 16
_DISKS_AT_ONCE = 4  # a disk answers soon, and of threads that do not wait Python runs one at a time


@dataclass(frozen=True, eq=False)
class Owner:
    """The store whose folder holds some segments.

    Attributes:
        filesystem: Where it is.
        store_uuid: Its identity.
        held: The version that names them, or the pin that another store has for it; None if that has to be found out.
    """

    filesystem: Filesystem
    store_uuid: str
    held: Version | str | None = None

    @property
    def key(self) -> tuple[str, str, int | str | None]:
        """Equal for the same version of the same store."""
        held = self.held.number if isinstance(self.held, Version) else self.held
        return self.filesystem.url, self.store_uuid, held


@dataclass(frozen=True, eq=False)
class Loan:
    """Versions of stores that own segments.

    Attributes:
        versions: The owners, each version of one once; None for a version that is not to be pinned.
        numbers: For each segment, which of these it is in: the number of its base.
    """

    versions: tuple[tuple[Owner, Named | None], ...]
    numbers: dict[str, int]


@dataclass
class Borrowed:
    """What was borrowed.

    Attributes:
        bases: The owners, as the versions of a loan.
        pins: That were made, and where.
    """

    bases: list[Base] = field(default_factory=list)
    pins: list[tuple[Filesystem, Pin]] = field(default_factory=list)

    @property
    def written_bytes(self) -> int:
        """Bytes of the pins."""
        return sum(len(made.to_bytes()) for _, made in self.pins)

    def give_back(self) -> None:
        """Remove the pins: nothing came to refer to the segments. One that cannot be removed is logged, and keeps bytes."""

        def remove(made: tuple[Filesystem, Pin]) -> None:
            filesystem, one = made
            try:
                unpin(filesystem, one.uuid)
            except TrajstoreError as error:
                _log.warning(
                    "the pin %s of %s was not removed, and keeps version %s: %s",
                    one.uuid,
                    filesystem.description,
                    one.version,
                    error,
                )

        in_each(remove, self.pins)


def find_loan(owners: Mapping[str, Owner], pins: Pins) -> Loan:
    """The versions to pin.

    Args:
        owners: Of each segment.
        pins: Whether pins are required, made where that is possible, or none is made at all.

    Raises:
        VersionExpiredError: No version of an owner has its segments any more.
    """
    segments: dict[tuple[str, str, int | str | None], list[str]] = {}
    by_key: dict[tuple[str, str, int | str | None], Owner] = {}
    for name, owner in owners.items():
        by_key.setdefault(owner.key, owner)
        segments.setdefault(owner.key, []).append(name)
    at_once = stores_at_once(owner.filesystem for owner in by_key.values())
    found = in_each(lambda key: _version_of(by_key[key], segments[key], pins), by_key, at_once)
    known: dict[tuple[str, str, int | None], int] = {}
    versions: list[tuple[Owner, Named | None]] = []
    numbers: dict[str, int] = {}
    for (key, owner), version in zip(by_key.items(), found, strict=True):
        number = known.setdefault((*key[:2], version.number if version else None), len(versions))
        if number == len(versions):
            versions.append((owner, version))
        numbers.update(dict.fromkeys(segments[key], number))
    return Loan(tuple(versions), numbers)


def borrow(loan: Loan, target: Filesystem, target_uuid: str, pins: Pins, borrowed: Borrowed) -> None:
    """Pin the versions that own segments.

    Args:
        loan: Which.
        target: The store that will refer to them.
        target_uuid: Its identity.
        pins: As for ``find_loan``; where they are required, an owner that cannot be written is an error.
        borrowed: Is filled in, also where it fails half way: what is in it then has to be given back.

    Raises:
        ReadOnlyError: An owner cannot be written.
        VersionExpiredError: Vacuum was faster.
    """

    def pinned(pair: tuple[Owner, Named | None]) -> Pin | None:
        owner, version = pair
        made = None if version is None else _pin(owner, version, target, target_uuid, pins)
        if made is not None:
            borrowed.pins.append((owner.filesystem, made))
        return made

    at_once = stores_at_once(owner.filesystem for owner, _ in loan.versions)
    for (owner, _), made in zip(loan.versions, in_each(pinned, loan.versions, at_once), strict=True):
        url = reference(owner.filesystem.url, seen_from=target.url)
        borrowed.bases.append(Base(url, owner.store_uuid, made.uuid if made else None))


def _pin(owner: Owner, version: Named, target: Filesystem, target_uuid: str, pins: Pins) -> Pin | None:
    try:
        return pin(
            owner.filesystem,
            History(owner.filesystem),
            version,
            borrower_uuid=target_uuid,
            borrower_url=reference(target.url, seen_from=owner.filesystem.url),
        )
    except (StorageError, CommitOutcomeUnknownError) as error:
        if pins == "where possible":
            _log.warning("%s refers to %s without a pin: %s", target.description, owner.filesystem.description, error)
            return None
        raise ReadOnlyError(
            f"{owner.filesystem.description} cannot be pinned ({error}), so its vacuum might remove segments that "
            f"{target.description} would refer to; pass share='copy' for bytes of its own, or allow_unpinned=True if nobody "
            "vacuums it"
        ) from error


def _version_of(owner: Owner, segments: Collection[str], pins: Pins) -> Named | None:
    """The version to pin; None for none.

    Raises:
        VersionExpiredError: Pins are required, and there is none.
    """
    if pins == "none":
        return None
    history = History(owner.filesystem)
    if isinstance(owner.held, Version):
        return owner.held
    found = (owner.held and _version_pinned(owner, history, owner.held)) or _latest_with(owner, history, segments)
    if found is None and pins == "required":
        raise VersionExpiredError(
            f"{owner.filesystem.description} has no version any more that names segment {min(segments)}, which a source "
            "borrowed without a pin; pass share='copy' for bytes of its own while they are there, or allow_unpinned=True"
        )
    return found or None


def _version_pinned(owner: Owner, history: History, pin_uuid: str) -> Named | None:
    """What another store's pin keeps, or None if the pin is not there."""
    pins = find_pins(owner.filesystem, [pin_uuid])
    if not pins:
        return None
    version = VersionName(pins[0].version, pins[0].snapshot_sha256)
    try:
        return version if history.holds(version) else None
    except VersionExpiredError:
        return None


def _latest_with(owner: Owner, history: History, segments: Collection[str]) -> Version | None:
    """The latest version that names all of these segments, or None."""
    named: dict[str, frozenset[str]] = {}  # by path of a manifest without deleted rows
    latest = history.latest(history.parse_hint(owner.filesystem.read(layout.LATEST_HINT)))
    for version in history.standing(latest):
        names = set().union(*_segments_named(history, version.snapshot, named))
        if names.issuperset(segments):
            return version
    return None


def _segments_named(history: History, snapshot: Snapshot, known: dict[str, frozenset[str]]) -> Iterator[frozenset[str]]:
    """The segments and layers that each manifest of a version names for trajectories that are not deleted."""
    unknown = [entry for entry in snapshot.manifests if entry.deleted or entry.path not in known]
    for entry, manifest in zip(unknown, history.read_manifests(unknown, ["segment"]), strict=True):
        names = frozenset(part.uuid for part in live_parts(entry, manifest) if part.base is None)
        if entry.deleted:
            yield names
        else:
            known[entry.path] = names
    yield from (known[entry.path] for entry in snapshot.manifests if not entry.deleted)


def stores_at_once(filesystems: Iterable[Filesystem]) -> int:
    """How many of these stores to wait for at a time."""
    return _STORES_AT_ONCE if any(one.overlaps_reads for one in filesystems) else _DISKS_AT_ONCE


def in_each(function: Callable[..., T], items: Iterable[object], at_once: int = _STORES_AT_ONCE) -> list[T]:
    """``[function(item) for item in items]``, ``at_once`` at the same time: each waits for another store."""
    workers = Workers(at_once, name="trajstore-borrow")
    try:
        return workers.map(function, items)
    finally:
        workers.close()
