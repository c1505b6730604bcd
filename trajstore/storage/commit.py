"""The history of a store: find the latest version, read one, add one.

Invariant: creating ``snapshots/<v+1>.json`` is the commit, and nothing else makes data visible. Who loses the race for a
version reads the winner, rebases its change onto it and tries the next one; segments and manifests are reused. Before each
try, and after the version that it builds on was read, it is checked that nothing new which it names is older than half the
grace of vacuum. A vacuum that removes anything commits a version first: whoever was slower loses the race and is checked.
"""

from __future__ import annotations

import datetime as dt
import itertools
import logging
import random
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from trajstore.errors import (
    CommitError,
    CorruptionError,
    IndexRangeError,
    MissingObjectError,
    StorageError,
    TrajstoreError,
    VersionNotFoundError,
)
from trajstore.format import layout
from trajstore.format.manifest import (
    Manifest,
    decode_manifest,
    encode_manifest,
    manifest_entry,
    merge_manifests,
    most_rows,
)
from trajstore.format.marks import Farewell
from trajstore.format.snapshot import (
    EMPTY,
    NO_PARENT,
    ManifestEntry,
    Snapshot,
    digest,
    next_timestamp,
)
from trajstore.storage.age import Moment, check_age, since_boot_s
from trajstore.storage.changes import Change, MergedManifests
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.retry import race_pause_s
from trajstore.storage.tiers import merge_from

_log = logging.getLogger(__name__)

_HINT_INTERVAL_S = 1.0
_CACHED_MANIFESTS = 64
_READ_TOGETHER = 64  # snapshots
_CACHED_MANIFEST_ROWS = 4096
EMPTIED_NOTE = "0" * 32  # what vacuum calls its note that a version's slot is empty, and all before it


@dataclass(frozen=True)
class Version:
    """A snapshot as it was read or written, with the hash of its bytes.

    Attributes:
        snapshot: What the version holds.
        sha256: Of its bytes.
        shows: The earlier version whose content this shows, because its own bytes are damaged; 0 where no version can be
            read; None for a version that is as it was written.
    """

    snapshot: Snapshot
    sha256: str
    shows: int | None = None

    @property
    def number(self) -> int:
        """The version."""
        return self.snapshot.version


EMPTY_VERSION = Version(EMPTY, NO_PARENT)


class Named(Protocol):
    """Which version: a ``Version``, or its name alone."""

    @property
    def number(self) -> int:
        """The version."""

    @property
    def sha256(self) -> str:
        """Of the snapshot's bytes."""


@dataclass(frozen=True)
class VersionName:
    """A version of which only that is known: to parse a snapshot takes longer than to hash it."""

    number: int
    sha256: str


class History:
    """The versions of one store. Used by several threads.

    Args:
        filesystem: Where the store is.
        now: The clock, UTC.
        since_boot_s: A clock that nobody sets, seconds.
        rng: Randomness for pauses after lost races.
        commit_timeout_s: How long a commit may lose races before it gives up.
        race_pause_base_s: First pause after a lost race, at most.
        past_damage: Where the latest version is damaged, let what the last readable one holds stand for it.
    """

    def __init__(
        self,
        filesystem: Filesystem,
        *,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
        since_boot_s: Callable[[], float] = since_boot_s,
        rng: random.Random | None = None,
        commit_timeout_s: float = 300.0,
        race_pause_base_s: float = 0.002,
        past_damage: bool = False,
    ) -> None:
        self._filesystem = filesystem
        self._now = now
        self._since_boot_s = since_boot_s
        self._rng = rng or random.Random()  # noqa: S311 - spreads writers in time, keeps no secret
        self._commit_timeout_s = commit_timeout_s
        self._race_pause_base_s = race_pause_base_s
        self._past_damage = past_damage
        self._lock = threading.Lock()
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()
        self._hinted_at = float("-inf")
        self._hinted = 0  # the last version written to the hint
        self.races_lost = 0

    def moment(self) -> Moment:
        """Now: what ``commit`` wants to know from whoever is about to store objects."""
        return Moment(self._now(), self._since_boot_s())

    def parse_hint(self, data: bytes | None) -> int:
        """The version that ``LATEST`` names, or 0: the hint is never trusted."""
        text = (data or b"").strip()
        return int(text) if text.isdigit() and len(text) <= 20 else 0

    def latest(self, start: int) -> Version:
        """The latest version.

        Args:
            start: A version that may exist: the hint, or the last one seen.

        Raises:
            CorruptionError: It is damaged; says which version can be read, and how to go on from it.
        """
        known = self._read_versions([start, start + 1]) if start else {0: b"", **self._read_versions([1])}
        if start not in known:  # a hint that lies
            return self.latest(0)
        lo, step = start, 1
        while lo + step in known:  # gallop; versions are numbered without gaps
            lo += step
            step *= 2
            known.update(self._read_versions([lo + step]))
        hi = lo + step
        while hi - lo > 1:  # lo exists, hi does not
            middle = (lo + hi) // 2
            known.update(self._read_versions([middle]))
            lo, hi = (middle, hi) if middle in known else (lo, middle)
        return self._newest(lo, known[lo])

    def load(self, version: int) -> Version:
        """One version.

        Raises:
            VersionNotFoundError: There is none of this number.
            VersionExpiredError: Vacuum emptied it.
        """
        if not isinstance(version, int):
            raise VersionNotFoundError(f"version={version!r}, expected a whole number; store.versions() lists them")
        data = self._filesystem.read(layout.snapshot_key(version)) if version else b""
        if data is None:
            raise VersionNotFoundError(
                f"{self._filesystem.description} has no version {version}; the latest is {self.latest(0).number}"
            )
        return self._parse(version, data)

    def holds(self, version: Named) -> bool:
        """Whether a version is there as it was read before; otherwise another one has its number.

        Raises:
            VersionNotFoundError: None has its number.
            VersionExpiredError: Vacuum emptied it.
        """
        data = self._filesystem.read(layout.snapshot_key(version.number))
        if data and digest(data) == version.sha256:
            return True  # the same bytes: no need to parse them again
        return self.load(version.number).sha256 == version.sha256

    def load_standing(self, versions: Sequence[int]) -> list[Version]:
        """Those of some versions that vacuum has not emptied, read concurrently.

        Raises:
            VersionNotFoundError: There is none of some number.
        """
        found = self._read_versions(versions)
        missing = [version for version in versions if version not in found]
        if missing:
            raise VersionNotFoundError(
                f"{self._filesystem.description} has no version {missing[0]}, and has later ones; restore it from a copy"
            )
        return [self._parse(version, found[version]) for version in versions if found[version]]

    def standing(self, latest: Version, *, past_damage: bool = False) -> Iterator[Version]:
        """Every version that can be opened, the latest first; those that vacuum emptied are passed over.

        Args:
            latest: The latest.
            past_damage: Pass over those that are damaged, too: not for who wants to know all that is needed.

        Raises:
            CorruptionError: One is damaged.
        """
        if latest.number:
            yield latest
        emptied = self.noted_emptied() if latest.number > _READ_TOGETHER else 0
        last = latest.number - 1
        while last > emptied:
            numbers = range(last, max(last - _READ_TOGETHER, emptied), -1)
            data = self._filesystem.read_many([layout.snapshot_key(number) for number in numbers])
            for number, found in zip(numbers, data, strict=True):
                if not found:
                    continue
                try:
                    version = self._parse(number, found)
                except CorruptionError:
                    if past_damage:
                        continue
                    raise
                yield version
            last = numbers[-1] - 1

    def noted_emptied(self) -> int:
        """A version whose slot is empty, like all before it, as far as vacuum noted it; 0 if it did not."""
        key = layout.decision_key(EMPTIED_NOTE)
        data = self._filesystem.read(key)
        return 0 if data is None else max(Farewell.from_bytes(data, key=key).versions, default=0)

    def commit(self, change: Change, head: Version, *, since: Moment | None = None) -> Version:
        """Make a change visible on top of the latest version.

        Args:
            change: Its objects are durable.
            head: The latest version known; a newer one is found if need be.
            since: When the first of its objects began to be stored; None for a change that stores none.

        Raises:
            SchemaConflictError: The change no longer fits.
            IndexRangeError: What it deletes is no longer there.
            CommitTooOldError: Its objects are so old that a vacuum may have removed them.
            CommitError: No try won within the time allowed.
            CommitOutcomeUnknownError: The storage never said whether it landed.
        """
        commit_id = uuid.uuid4().hex
        merged = None
        if change.merges:
            since = since or self.moment()  # a manifest that is merged here is stored as well
            try:
                merged = self._merge_manifests(head.snapshot)
            except MissingObjectError as error:
                head = self._after(head, error)
        deadline = time.monotonic() + self._commit_timeout_s
        lost = 0
        while True:
            try:
                changed = change.apply(head.snapshot, merged, self.read_manifests)
            except (IndexRangeError, MissingObjectError) as error:
                head = self._after(head, error)
                continue
            now = self.moment()
            snapshot = replace(
                changed,
                version=head.number + 1,
                commit_id=commit_id,
                parent_sha256=head.sha256,
                created_at=next_timestamp(now.wall, head.snapshot.created_at),
            )
            data = snapshot.to_bytes()
            if since is not None:
                check_age(now - since, where=self._filesystem.description)
            if self._filesystem.create(layout.snapshot_key(snapshot.version), data):
                if merged is None:  # the hint may lag: a merging commit has written enough
                    self._hint(snapshot.version)
                return Version(snapshot, digest(data))
            lost += 1
            self.races_lost += 1
            if time.monotonic() > deadline:
                raise CommitError(
                    f"lost {lost} races for a version of {self._filesystem.description} in {self._commit_timeout_s:.0f} s; "
                    "append fewer times per second (raise commit_interval_s), then append these trajectories again"
                )
            time.sleep(race_pause_s(lost, base_s=self._race_pause_base_s, rng=self._rng))
            head = self.latest(head.number)

    def remember(self, entry: ManifestEntry, manifest: Manifest) -> None:
        """Keep a small manifest at hand for the merge that it will soon be part of."""
        if entry.rows <= _CACHED_MANIFEST_ROWS:
            with self._lock:
                self._manifests[entry.path] = manifest
                while len(self._manifests) > _CACHED_MANIFESTS:
                    self._manifests.popitem(last=False)

    def read_manifests(self, entries: Sequence[ManifestEntry], columns: Sequence[str] | None = None) -> list[Manifest]:
        """Manifests, read concurrently.

        Raises:
            MissingObjectError: One is not there.
            CorruptionError: One is not what the snapshot names.
        """
        with self._lock:
            read = {e.path: self._manifests[e.path] for e in entries if e.path in self._manifests}
        wanted = [e for e in entries if e.path not in read]
        for entry, data in zip(wanted, self._filesystem.read_many([e.path for e in wanted]), strict=True):
            if data is None:
                raise MissingObjectError(
                    f"{entry.path} of {self._filesystem.description} is not there; restore it from a copy"
                )
            read[entry.path] = decode_manifest(entry, data, columns)
        return [read[e.path] for e in entries]

    def _after(self, head: Version, error: TrajstoreError) -> Version:
        """A later version: it may have what is not in this one, and another handle may have reclaimed what this one needs.

        Raises:
            TrajstoreError: The error, if there is none.
        """
        latest = self.latest(head.number)
        if latest.number == head.number:
            raise error
        return latest

    def _merge_manifests(self, parent: Snapshot) -> MergedManifests | None:
        first = merge_from([entry.rows for entry in parent.manifests])
        if first is None:
            return None
        replaced = parent.manifests[first:]
        manifest = merge_manifests(
            list(zip(replaced, self.read_manifests(replaced), strict=True)), parent.schema.metadata
        )
        data = encode_manifest(manifest)
        path = layout.manifest_key(uuid.uuid4().hex)
        self._filesystem.store({path: [data]})
        entry = manifest_entry(path, data, manifest, first_id=0)
        self.remember(entry, manifest)
        return MergedManifests(first, replaced, entry)

    def _hint(self, version: int) -> None:
        """Some storages allow one write per second and name, and the hint may lag: readers look further on."""
        if time.monotonic() - self._hinted_at < _HINT_INTERVAL_S:
            return
        self._hinted_at = time.monotonic()
        try:
            self._filesystem.overwrite(layout.LATEST_HINT, str(version).encode())
            self._hinted = version
        except StorageError as error:
            _log.warning("the hint %s was not written: %s", layout.LATEST_HINT, error)

    def write_hint(self, version: int) -> None:
        """Write the hint now: what ``close`` does, so that the next opening is one step."""
        if version == self._hinted:
            return
        self._hinted_at = float("-inf")
        self._hint(version)

    def _read_versions(self, versions: Sequence[int]) -> dict[int, bytes]:
        found = self._filesystem.read_many([layout.snapshot_key(v) for v in versions])
        return {v: data for v, data in zip(versions, found, strict=True) if data is not None}

    def _newest(self, number: int, data: bytes) -> Version:
        """The latest version, whose bytes these are."""
        if number and not data and self._read_versions([number + 1]):
            return self.latest(number + 1)  # others went on meanwhile, and a vacuum has emptied this one
        try:
            return self._parse(number, data, emptied=False)
        except CorruptionError as error:
            readable = next(self._readable_before(number), None)
            if self._past_damage:
                return self._stand_in(number, data, readable or EMPTY_VERSION)
            advice = "no version before it can be read either"
            if readable is not None:
                advice = (
                    f"version {readable.number} is the last that can be read: open it with version={readable.number}, or "
                    f"make a new version of what it holds: trajstore verify "
                    f"{self._filesystem.url} --repair, in Python open(..., 'a', past_damage=True) and "
                    f"restore({readable.number}); the damaged one is not overwritten"
                )
            error.args = (f"{error}; {advice}",)
            raise

    def _readable_before(self, number: int) -> Iterator[Version]:
        damaged = replace(EMPTY_VERSION, snapshot=replace(EMPTY, version=number))
        return itertools.islice(self.standing(damaged, past_damage=True), 1, None)

    def _stand_in(self, number: int, data: bytes, readable: Version) -> Version:
        """What a readable version holds, in the place of a damaged one, whose bytes the next commit names as its parent's.

        Ids that the damaged version may have given are not given again: those of all rows that it can have added.
        """
        named = {entry.path for entry in readable.snapshot.manifests}
        others = [o.key for o in self._filesystem.list_objects(layout.MANIFESTS) if o.key not in named]
        given = 0
        for first in range(0, len(others), _READ_TOGETHER):
            for found in self._filesystem.read_many(others[first : first + _READ_TOGETHER]):
                given += 0 if found is None else most_rows(found)
        snapshot = replace(readable.snapshot, version=number, next_id=readable.snapshot.next_id + given)
        return Version(snapshot, digest(data), shows=readable.number)

    def _parse(self, version: int, data: bytes, *, emptied: bool = True) -> Version:
        """A version; ``emptied`` says whether vacuum may have been there, which leaves the latest as it is."""
        if version == 0:
            return EMPTY_VERSION
        if not data and not emptied:
            raise CorruptionError(
                f"{self._filesystem.description}: {layout.snapshot_key(version)} is empty, and vacuum never empties the "
                "latest version; restore it from a copy"
            )
        try:
            return Version(Snapshot.from_bytes(data, version=version), digest(data))
        except TrajstoreError as error:
            error.args = (f"{self._filesystem.description}: {error}",)
            raise
