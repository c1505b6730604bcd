"""Snapshots: one committed version of a store, as an immutable value and as a JSON document.

Invariant: a snapshot names its parent by hash and its commit by a fresh ``commit_id``, so a history cannot fork unseen and
a writer can tell its own commit from another's.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trajstore.errors import CorruptionError, TrajstoreError, VersionExpiredError
from trajstore.format.document import seal, unseal
from trajstore.format.layout import FORMAT_VERSION, snapshot_key
from trajstore.schema import Schema

NO_PARENT = "0" * 64


@dataclass(frozen=True)
class StoreDocument:
    """``trajstore.json``: created once, says that a store is here."""

    store_uuid: str

    def to_bytes(self) -> bytes:
        """The document's bytes."""
        return seal({"format": FORMAT_VERSION, "store_uuid": self.store_uuid})

    @classmethod
    def from_bytes(cls, data: bytes, *, key: str) -> StoreDocument:
        """Parse and check; raises ``CorruptionError`` or ``FormatVersionError``."""
        document = unseal(data, key=key)
        if not isinstance(document.get("store_uuid"), str):
            raise CorruptionError(f"{key} has no store_uuid; restore it from a copy")
        return cls(document["store_uuid"])


@dataclass(frozen=True)
class Base:
    """Another store whose segments this one refers to."""

    url: str
    store_uuid: str
    pin: str | None = None


@dataclass(frozen=True)
class ManifestEntry:
    """A manifest as a snapshot names it."""

    path: str
    footer_sha256: str  # of the Parquet footer, its length and the magic: what a reader of some columns checks
    crc32c: int  # of the whole file: what a reader of the whole file checks
    nbytes: int
    rows: int
    first_id: int  # id of row 0 where the manifest's own ids are null
    trajectories: int  # rows less deleted ones
    steps: int  # of those
    deleted: tuple[tuple[int, int], ...] = ()  # half-open row ranges


@dataclass(frozen=True)
class Totals:
    """What a version holds."""

    trajectories: int = 0
    steps: int = 0
    nbytes: int = 0  # stored bytes of the segments committed so far


@dataclass(frozen=True)
class Snapshot:
    """One version of a store. Version 0 is the empty store and has no document."""

    version: int
    commit_id: str
    parent_sha256: str
    created_at: dt.datetime  # UTC, strictly later than the parent's
    operation: str
    schema: Schema = field(default_factory=Schema)
    next_id: int = 0
    totals: Totals = Totals()
    bases: tuple[Base, ...] = ()
    manifests: tuple[ManifestEntry, ...] = ()

    def to_bytes(self) -> bytes:
        """The document's bytes."""
        return seal(
            {
                "format": FORMAT_VERSION,
                "version": self.version,
                "commit_id": self.commit_id,
                "parent_sha256": self.parent_sha256,
                "created_at": self.created_at.isoformat(timespec="microseconds"),
                "operation": self.operation,
                "schema": self.schema.to_json(),
                "next_id": self.next_id,
                # vars, not asdict: these are flat, and a deep copy of 30 entries takes as long as an fsync.
                "totals": vars(self.totals),
                "bases": [vars(base) for base in self.bases],
                "manifests": [_entry_json(entry) for entry in self.manifests],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, version: int) -> Snapshot:
        """Parse and check a snapshot.

        Raises:
            VersionExpiredError: The slot was emptied by vacuum.
            CorruptionError: Changed bytes, or another version's document.
            FormatVersionError: Written by a newer trajstore.
        """
        key = snapshot_key(version)
        if not data:
            raise VersionExpiredError(
                f"version {version} was removed by vacuum ({key} is empty); open a later one (store.versions() lists them)"
            )
        document = unseal(data, key=key)
        try:
            snapshot = cls(
                version=document["version"],
                commit_id=document["commit_id"],
                parent_sha256=document["parent_sha256"],
                created_at=dt.datetime.fromisoformat(document["created_at"]),
                operation=document["operation"],
                schema=Schema.from_json(document["schema"]),
                next_id=document["next_id"],
                totals=Totals(**document["totals"]),
                bases=tuple(Base(**base) for base in document["bases"]),
                manifests=tuple(_entry_from_json(entry) for entry in document["manifests"]),
            )
        except (KeyError, TypeError, ValueError, TrajstoreError) as error:
            raise CorruptionError(f"{key} is not a snapshot ({error!r}); restore it from a copy") from error
        if snapshot.version != version:
            raise CorruptionError(f"{key} holds version {snapshot.version}; restore it from a copy")
        return snapshot


EMPTY = Snapshot(
    version=0,
    commit_id="0" * 32,
    parent_sha256=NO_PARENT,
    created_at=dt.datetime.fromtimestamp(0, dt.UTC),
    operation="create",
)


def digest(data: bytes) -> str:
    """SHA-256 of an object's bytes, in hexadecimal: what the next snapshot stores as ``parent_sha256``."""
    return hashlib.sha256(data).hexdigest()


def next_timestamp(now: dt.datetime, parent: dt.datetime) -> dt.datetime:
    """``max(now, parent + 1 us)``: versions are ordered in time even where clocks are not."""
    return max(now, parent + dt.timedelta(microseconds=1))


def _entry_json(entry: ManifestEntry) -> dict[str, Any]:
    return {**vars(entry), "deleted": [list(span) for span in entry.deleted]}


def _entry_from_json(document: Mapping[str, Any]) -> ManifestEntry:
    deleted = tuple((int(lo), int(hi)) for lo, hi in document["deleted"])
    return ManifestEntry(**{**document, "deleted": deleted})
