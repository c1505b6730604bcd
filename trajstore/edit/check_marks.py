"""Everything of a store beside its versions and segments: its document, the hint, tags and pins, other stores, orphans.

Invariant: no other store is opened but those that reading would open: beside this one, or named by the caller.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from trajstore.edit.check_versions import Versions
from trajstore.edit.findings import MISSING_STORE, Findings, Severity
from trajstore.edit.listing import Listing, lots, read_each
from trajstore.errors import (
    CorruptionError,
    FormatVersionError,
    MissingObjectError,
    StorageError,
    StoreNotFoundError,
    TrajstoreError,
    UntrustedBaseError,
)
from trajstore.format import layout
from trajstore.format.document import unseal
from trajstore.format.marks import Pin, Tag
from trajstore.format.schemas import SCHEMA_NAMES, validate
from trajstore.format.snapshot import Base, StoreDocument, digest
from trajstore.read.bases import Bases, absolute
from trajstore.storage.age import GRACE, in_days
from trajstore.storage.commit import History
from trajstore.storage.filesystem import Filesystem, ObjectInfo

Mark = TypeVar("Mark", Tag, Pin)


def check_store_document(filesystem: Filesystem, store_uuid: str, found: Findings) -> None:
    """``trajstore.json``: its hash, its schema, and whether it is still the store that was opened."""
    key = layout.STORE_DOCUMENT
    (data,) = read_each(filesystem, [key])
    if data is None:
        found.add("error", "store-document", key, "it is not there, so nobody finds the store; restore it from a copy")
        return
    if isinstance(data, StorageError):
        found.add("error", "unreadable", key, f"{data}; look again")
        return
    try:
        document = StoreDocument.from_bytes(data, key=key)
        validate(json.loads(data), "store", key=key)
    except (CorruptionError, FormatVersionError) as error:
        found.add("error", "store-document", key, str(error))
        return
    if document.store_uuid != store_uuid:
        found.add(
            "error",
            "store-document",
            key,
            f"it says store {document.store_uuid}, {store_uuid} was opened; open it again",
        )


def check_hint(filesystem: Filesystem, versions: Versions, found: Findings) -> None:
    """The hint, which nobody trusts: a bad one costs readers time."""
    key = layout.LATEST_HINT
    (data,) = read_each(filesystem, [key])
    todo = "the next commit writes it"
    if isinstance(data, StorageError):
        found.add("note", "hint", key, f"{data}; look again")
    elif data is None:
        if versions.latest:
            found.add(
                "note", "hint", key, f"it is not there, so readers look for version {versions.latest} from 1 on; {todo}"
            )
    elif not data.strip().isdigit() or len(data) > 20:
        found.add("note", "hint", key, f"it holds {data[:40]!r}, expected the number of a version; {todo}")
    elif int(data) > versions.latest and not _is_there(filesystem, int(data)):
        found.add(
            "warning",
            "hint",
            key,
            f"it says {int(data)}, the latest version is {versions.latest}: if nobody is committing, later versions are "
            f"lost, restore them from a copy; otherwise {todo}",
        )


def check_documents(
    filesystem: Filesystem, listing: Listing, versions: Versions, bases: Bases, now: dt.datetime, found: Findings
) -> list[ObjectInfo]:
    """Tags, pins, statistics and what vacuum left: hashes, schemas, and whether their versions stand.

    Returns:
        Statistics of versions that do not stand.
    """
    orphans = []
    names = _PinsNamed()
    infos = {info.key: info for info in listing.documents}
    for lot in lots((key, info.nbytes) for key, info in sorted(infos.items())):
        for key, data in zip(lot, read_each(filesystem, lot), strict=True):
            version = layout.statistics_version(key)
            if version is not None and version not in versions.standing and versions.complete:
                orphans.append(infos[key])
            elif data is not None and _is_document(key, data, found):
                assert isinstance(data, bytes)
                if key.startswith(layout.TAGS + "/"):
                    _check_tag(filesystem, key, data, versions, found)
                elif key.startswith(layout.PINS + "/") and not layout.is_hold(key):
                    _check_pin(filesystem, key, data, versions, bases, names, now, found)
    return orphans


def _is_document(key: str, data: bytes | StorageError, found: Findings) -> bool:
    """Whether a document is what its hash and its schema say."""
    kind, todo = {
        layout.TAGS: ("tag", "remove it, and tag the version again"),
        layout.PINS: ("pin", "restore it from a copy, or remove it if no other store refers to this one"),
        layout.STATISTICS: ("statistics", "remove it: statistics are measured again"),
    }.get(key.partition("/")[0], ("vacuum", "restore it from a copy, or run vacuum again"))
    if isinstance(data, StorageError):
        found.add("error", "unreadable", key, f"{data}; look again")
        return False
    severity: Severity = "error" if kind in ("tag", "pin") else "warning"
    try:
        unseal(data, key=key)
        if kind in SCHEMA_NAMES:
            validate(json.loads(data), kind, key=key)
    except (CorruptionError, FormatVersionError) as error:
        found.add(severity, kind, key, f"{error}; or {todo}")
        return False
    return True


def _check_tag(filesystem: Filesystem, key: str, data: bytes, versions: Versions, found: Findings) -> None:
    tag = _parsed(Tag.from_bytes, key, data, "tag", found)
    if tag is None:
        return
    if layout.tag_key(tag.name) != key:
        found.add("error", "tag", key, f"it says that its name is {tag.name!r}; remove it, and tag the version again")
    wrong = _version_problem(filesystem, versions, tag.version, tag.snapshot_sha256)
    if wrong:
        found.add("error", "tag", key, f"{wrong}; untag({tag.name!r}), or restore the version from a copy")


def _check_pin(
    filesystem: Filesystem,
    key: str,
    data: bytes,
    versions: Versions,
    bases: Bases,
    names: _PinsNamed,
    now: dt.datetime,
    found: Findings,
) -> None:
    pin = _parsed(Pin.from_bytes, key, data, "pin", found)
    if pin is None:
        return
    pin = replace(pin, borrower_url=absolute(pin.borrower_url, seen_from=filesystem.url))
    wrong = _version_problem(filesystem, versions, pin.version, pin.snapshot_sha256)
    if wrong:
        found.add(
            "error",
            "pin",
            key,
            f"{wrong}, and {pin.borrower_url} refers to its segments; restore the version from a copy, or make that store "
            "self-contained",
        )
    try:
        borrower = bases.open(Base(pin.borrower_url, pin.borrower_uuid))
    except UntrustedBaseError:
        found.add(
            "note",
            "pin-borrower",
            key,
            f"it keeps version {pin.version} for {pin.borrower_url}, which was not looked at",
        )
    except (StoreNotFoundError, MissingObjectError, CorruptionError) as error:
        found.add(
            "warning",
            "pin-borrower",
            key,
            f"it keeps version {pin.version} for the store {pin.borrower_uuid} at {pin.borrower_url}, which is not there "
            f"({type(error).__name__}). If this store was moved, relocate() in that one mends the pin; if that store was "
            "moved, it still needs it; if it was deleted, remove the pin: unpin()",
        )
    except TrajstoreError as error:
        found.add(
            "note",
            "pin-borrower",
            key,
            f"it keeps version {pin.version} for {pin.borrower_url}, not looked at: {error}",
        )
    else:
        _check_used(pin, key, borrower, names, now, found)


def _check_used(pin: Pin, key: str, borrower: Filesystem, names: _PinsNamed, now: dt.datetime, found: Findings) -> None:
    """Note a pin that its store, which is there, does not name."""
    try:
        used = pin.uuid in names.by(borrower)
    except TrajstoreError as error:
        found.add(
            "note",
            "pin-borrower",
            key,
            f"it keeps version {pin.version} for {pin.borrower_url}, of which not every version can be read, so that it has "
            f"to stay: {error}",
        )
        return
    if not used and now - pin.created_at > GRACE:
        found.add(
            "warning",
            "pin-unused",
            key,
            f"it keeps version {pin.version} for {pin.borrower_url}, of which no version names it: a merge was killed; "
            "vacuum of that store removes it, or unpin()",
        )


class _PinsNamed:
    """The pins that standing versions of other stores name, each store looked at once."""

    def __init__(self) -> None:
        self._by: dict[str, set[str | None]] = {}

    def by(self, filesystem: Filesystem) -> set[str | None]:
        """Uuids of those that one store names."""
        if filesystem.url not in self._by:
            history = History(filesystem)
            latest = history.latest(history.parse_hint(filesystem.read(layout.LATEST_HINT)))
            self._by[filesystem.url] = {
                base.pin for version in history.standing(latest) for base in version.snapshot.bases
            }
        return self._by[filesystem.url]


def _parsed(parse: Callable[..., Mark], key: str, data: bytes, kind: str, found: Findings) -> Mark | None:
    try:
        return parse(data, key=key)
    except (CorruptionError, FormatVersionError) as error:
        found.add("error", kind, key, str(error))
        return None


def _version_problem(filesystem: Filesystem, versions: Versions, number: int, sha256: str) -> str | None:
    if number in versions.standing:
        if versions.standing[number] == sha256:
            return None
        return f"it names version {number} with sha256 {sha256}, the version there has {versions.standing[number]}"
    if number in versions.emptied:
        return f"vacuum has emptied version {number}, which it names"
    if number <= versions.latest or _is_there(filesystem, number):
        return None  # what is wrong with that version was told, or it was made meanwhile
    return f"it names version {number}, the latest is {versions.latest}"


def _is_there(filesystem: Filesystem, number: int) -> bool:
    """Whether a version was committed since the listing."""
    return read_each(filesystem, [layout.snapshot_key(number)])[0] is not None


def check_bases(
    bases: Bases, versions: Versions, store_uuid: str, found: Findings
) -> Iterator[tuple[Base, Filesystem]]:
    """Other stores that this one needs: whether they are there, and keep what is needed.

    Yields:
        Those that can be read.
    """
    for base, last in versions.bases.items():
        # What only earlier versions lack was left behind, by moving it or by making copies.
        severity: Severity = "error" if last == versions.latest else "warning"
        try:
            filesystem = bases.open(base)
        except UntrustedBaseError as error:
            found.add(severity, "base", base.url, f"its segments were not looked at: {error}", version=last)
            continue
        except StoreNotFoundError as error:
            found.add(severity, MISSING_STORE, base.url, f"{error}; repair leaves out what lies there", version=last)
            continue
        except CorruptionError as error:
            found.add(severity, "base-other", base.url, str(error), version=last)
            continue
        except TrajstoreError as error:
            found.add(severity, "base", base.url, f"its segments were not looked at: {error}", version=last)
            continue
        _check_base_pin(base, filesystem, store_uuid, last, severity, found)
        yield base, filesystem


def _check_base_pin(
    base: Base, filesystem: Filesystem, store_uuid: str, last: int, severity: Severity, found: Findings
) -> None:
    """Whether another store keeps a version for this one."""
    todo = "make this store self-contained, or combine them again"
    if base.pin is None:
        found.add(
            "warning",
            "base-unpinned",
            base.url,
            f"it keeps no version for this store: its vacuum may remove segments that are needed; {todo}",
            version=last,
        )
        return
    where = f"{layout.pin_key(base.pin)} in {filesystem.description}"
    (data,) = read_each(filesystem, [layout.pin_key(base.pin)])
    if isinstance(data, StorageError):
        found.add("error", "unreadable", where, f"{data}; look again", version=last)
        return
    if data is None:
        found.add(
            severity,
            "base-pin",
            where,
            f"the pin is not there: vacuum of that store may remove segments; {todo}",
            version=last,
        )
        return
    pin = _parsed(Pin.from_bytes, where, data, "base-pin", found)
    if pin is None:
        return
    (snapshot,) = read_each(filesystem, [layout.snapshot_key(pin.version)])
    if not snapshot or (isinstance(snapshot, bytes) and digest(snapshot) != pin.snapshot_sha256):
        what = "another one is there" if snapshot else "it is not there"
        found.add(severity, "base-pin", where, f"it keeps version {pin.version}, and {what}; {todo}", version=last)
    if pin.borrower_uuid != store_uuid:
        found.add(
            "warning",
            "base-pin",
            where,
            f"it was made for the store {pin.borrower_uuid}, this is {store_uuid}; {todo}",
            version=last,
        )


def check_orphans(
    listing: Listing, versions: Versions, more: list[ObjectInfo], now: dt.datetime, found: Findings
) -> None:
    """Objects that no standing version names: young ones may be of a commit under way, old ones are vacuum's.

    Args:
        listing: The store's objects, listed before its versions were read.
        versions: What they name.
        more: Others that nobody needs.
        now: UTC.
        found: Is added to.
    """
    if not versions.complete:
        found.add(
            "note",
            "orphans",
            "",
            "objects that nobody needs were not looked for: some version or manifest cannot be read, and may name them",
        )
        return
    count, nbytes = {True: 0, False: 0}, {True: 0, False: 0}
    example: dict[bool, str] = {}
    for key, size, modified, objects in _orphans(listing, versions, more):
        young = modified is None or now - modified < GRACE
        count[young] += objects
        nbytes[young] += size
        example.setdefault(young, key)
    if count[True]:
        found.add(
            "note",
            "orphans-young",
            example[True],
            f"{count[True]} objects of {nbytes[True]} bytes are named by no version and younger than {in_days(GRACE)} days: "
            "a commit may be under way; nothing is to be done",
        )
    if count[False]:
        found.add(
            "warning",
            "orphans-old",
            example[False],
            f"{count[False]} objects of {nbytes[False]} bytes are named by no version; vacuum() gives their bytes back",
        )


def _orphans(
    listing: Listing, versions: Versions, more: list[ObjectInfo]
) -> Iterator[tuple[str, int, dt.datetime | None, int]]:
    """Key, bytes, age and number of objects."""
    loose = [info for key, info in sorted(listing.manifests.items()) if key not in versions.manifests]
    for info in (*loose, *listing.temporary, *more):
        yield info.key, info.nbytes, info.modified, 1
    for segment, folder in sorted(listing.segments.items()):
        if segment not in versions.named:
            yield layout.segment_folder(segment), sum(folder.sizes.values()), folder.modified, len(folder.sizes)
