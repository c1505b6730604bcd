"""A version made of trajectories of other stores: new manifest rows over segments that are shared.

Invariant: every object that the new version names is in place, and every version that it refers to is pinned, before it is
committed; no step is decoded on the way. What fails leaves the target as it was, or a store without any version where there
was none, and removes its pins and manifests again (a process that is killed may leave some). Segments that were copied until
then are in nobody's way: the next try makes use of them if there is no version yet, and else vacuum removes them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from trajstore.edit.borrow import Borrowed, Loan, Owner, Pins, borrow, find_loan, in_each, stores_at_once
from trajstore.edit.bring import Brought, Instead, find_objects
from trajstore.edit.marks import held
from trajstore.errors import (
    CommitOutcomeUnknownError,
    ManifestsChangedError,
    SchemaConflictError,
    SelectionError,
    StorageError,
    TrajstoreError,
)
from trajstore.format import layout
from trajstore.format.manifest import (
    INDEX_FIELDS,
    Manifest,
    SegmentEntry,
    as_type,
    encode_manifest,
    live_rows,
    manifest_entry,
    table_schema,
)
from trajstore.format.snapshot import ManifestEntry
from trajstore.read.bases import Bases
from trajstore.read.selection import Selection
from trajstore.schema import Column, Schema
from trajstore.storage.attach import find_existing, open_or_create, taken
from trajstore.storage.changes import Append
from trajstore.storage.commit import EMPTY_VERSION, History, Version
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.tiers import MAX_MERGED_ROWS
from trajstore.storage.workers import Workers
from trajstore.stored import Array

Share = Literal["link", "copy", "reference"]
_log = logging.getLogger(__name__)
_MOST_PLANS = 10  # of which each but the last found that others dropped segments meanwhile
_ENCODED_AT_ONCE = 4


@dataclass(frozen=True, eq=False)
class Source:
    """Trajectories of one store.

    Attributes:
        selection: Which, in their order; all of them committed.
        filesystem: Where the store is.
        store_uuid: Its identity.
        bases: Opens the stores that it refers to.
    """

    selection: Selection
    filesystem: Filesystem
    store_uuid: str
    bases: Bases


@dataclass(frozen=True)
class Combined:
    """What came of it.

    Attributes:
        version: The new version of the target.
        written_bytes: Bytes that were written: manifests, pins, and segments as far as these were copied.
    """

    version: Version
    written_bytes: int


def combine(
    sources: Sequence[Source],
    target: Filesystem,
    *,
    share: Share = "link",
    order: Array | None = None,
    fields: Mapping[str, tuple[str, Any]] | None = None,
    instead: bool = False,
    operation: str = "merge",
    pins: Pins = "required",
    progress: bool | None = None,
) -> Combined:
    """Commit trajectories of several stores as one version of another.

    Args:
        sources: Their trajectories, one after the other.
        target: Where the version goes; a store is made if there is none.
        share: ``"link"``: the target gets the segments' objects, by hard links on one disk, copied by the server in one
            bucket, else copied here. ``"copy"``: bytes of its own. ``"reference"``: the segments stay where they are.
        order: ``(n,)`` int64 positions among all trajectories; by default as they come.
        fields: Metadata fields to set: name -> type and Arrow array ``(n,)``, chunked or not, one for each position before
            ordering.
        instead: Whether the new version holds these trajectories only; otherwise there must be no version yet.
        operation: What ``versions`` calls it.
        pins: Of versions that are referred to: ``"required"``, ``"where possible"`` for stores that may be read-only,
            ``"none"`` for a target that does not outlive this process.
        progress: Show bytes copied on standard error; by default in a terminal, if there are many.

    Raises:
        SchemaConflictError: Sources whose columns or fields differ.
        SelectionError: Trajectories that are not committed, no source at all, or no such way to share.
        StoreExistsError: A store is there, and ``instead`` is false.
        MissingObjectError: A segment is not where it should be.
        ReadOnlyError: A store that is referred to cannot be written, so it cannot be pinned.
        VersionExpiredError: Vacuum was faster: a version that is referred to is no longer there.
    """
    if share not in ("link", "copy", "reference"):
        raise SelectionError(f"share={share!r}, expected 'link', 'copy' or 'reference'")
    history = History(target)
    since = history.moment()
    known = find_existing(target, history)
    if known is not None and known[1].number and not instead:
        raise taken(target)
    _check_committed(sources)
    schemas = [source.selection.schema for source in sources]
    schema = union_schema(schemas, fields or {}, [source.filesystem.description for source in sources])
    segments = _Segments(target, known[0] if known else None)
    numbers = [segments.collect(source) for source in sources]
    objects = find_objects(segments.owners, segments.parts)
    foreign = {name: owner for name, owner in segments.owners.items() if owner.filesystem is not target}
    lent, copied = (foreign, {}) if share == "reference" else ({}, foreign)
    loan = find_loan(lent, pins)
    brought = Brought(target, segments.parts, copied, objects, link=share == "link", progress=progress)
    planned = known[1] if known else EMPTY_VERSION
    brought.bring(planned, history.read_manifests)
    target_uuid, head = known or open_or_create(target, history, must_be_new=not instead)
    nbytes = sum(part.nbytes for part in segments.parts.values())
    draft = _Draft(target, lambda: _rows(sources, np.concatenate(numbers), schema, fields or {}, order))

    def entries() -> list[SegmentEntry]:
        return segments.named(brought.names, loan.numbers)

    def change() -> Append:
        bases = tuple(draft.borrowed.bases)
        if not instead:
            return Append(schema, draft.manifests, nbytes, operation, bases, first=True)
        return Instead(schema, draft.manifests, nbytes, operation, bases, planned_on=planned.number, kept=brought.kept)

    with _held(target, history, segments.owners):
        with draft.undone_by(BaseException):
            draft.prepare(entries(), loan, target_uuid, pins)
        with draft.undone_by(TrajstoreError):  # anything else may come when the version is there already
            for plans_left in reversed(range(_MOST_PLANS)):
                try:
                    version = history.commit(change(), head, since=since)
                    break
                except ManifestsChangedError:
                    if not plans_left:
                        raise
                planned = head = history.latest(head.number)
                brought.bring(planned, history.read_manifests)
                draft.store_again(entries())
    history.write_hint(version.number)
    written = brought.written_bytes + draft.borrowed.written_bytes + sum(entry.nbytes for entry in draft.manifests)
    return Combined(version, written)


class _Draft:
    """Manifests and pins of a version that is not committed yet.

    Args:
        target: Where the version goes.
        rows: Makes its rows, which takes a while.
    """

    def __init__(self, target: Filesystem, rows: Callable[[], pa.Table]) -> None:
        self._target = target
        self._rows = functools.cache(rows)
        self._stored: list[str] = []  # keys of manifests, each noted before it is stored
        self.manifests: tuple[ManifestEntry, ...] = ()
        self.borrowed = Borrowed()

    def prepare(self, entries: Sequence[SegmentEntry], loan: Loan, target_uuid: str, pins: Pins) -> None:
        """Pin what is referred to, and store manifests beside it: pins wait for disks, and encoding for a processor.

        Args:
            entries: The segments, as manifests of the target name them.
            loan: What is referred to.
            target_uuid: Identity of the target.
            pins: As for ``combine``.
        """

        def pin() -> None:
            borrow(loan, self._target, target_uuid, pins, self.borrowed)

        def store() -> None:
            self.manifests = _store_manifests(self._target, self._rows(), entries, self._stored)

        in_each(lambda job: job(), [pin, store] if loan.versions else [store])

    def store_again(self, entries: Sequence[SegmentEntry]) -> None:
        """Store manifests that name the segments otherwise, in the place of those that are there."""
        self._target.remove(self._stored)
        self._stored.clear()
        self.manifests = _store_manifests(self._target, self._rows(), entries, self._stored)

    @contextlib.contextmanager
    def undone_by(self, kind: type[BaseException]) -> Iterator[None]:
        """What fails inside with such an error leaves neither manifests nor pins, unless the version may be there."""
        try:
            yield
        except CommitOutcomeUnknownError:
            raise
        except kind:
            self.borrowed.give_back()
            try:
                self._target.remove(self._stored)
            except StorageError as error:
                _log.warning("%s keeps %s, which no version names: %s", self._target.description, self._stored, error)
            raise


class _Segments:
    """The segments of all sources, each once, and whose they are.

    Args:
        target_uuid: Identity of the target, if it is a store already.
        target: Where it is.
    """

    def __init__(self, target: Filesystem, target_uuid: str | None) -> None:
        self._target = target
        self._target_uuid = target_uuid
        self._numbers: dict[tuple[str, ...], int] = {}  # by key
        self._entries: list[SegmentEntry] = []
        self.parts: dict[str, SegmentEntry] = {}  # segments and layers
        self.owners: dict[str, Owner] = {}  # of each of these

    def collect(self, source: Source) -> Array:
        """Note the segments of a source; for each of its trajectories, the number of its segment among all."""
        table, rows = source.selection.table, source.selection.rows
        bases = table.version.snapshot.bases
        # What was committed after a growing table was taken is in a later version.
        later = table.growth is not None and len(rows) and int(rows.max()) >= len(table.growth.base)
        owners: dict[int | None, Owner] = {
            None: self._own_or(source.filesystem, source.store_uuid, None if later else table.version)
        }
        numbers = np.full(len(table.segments), -1, np.int64)
        for n in source.selection.segments.tolist():
            entry = table.segments[n]
            for part in entry.parts:
                if part.uuid in self.parts:
                    continue
                if part.base not in owners:
                    base = bases[part.base or 0]
                    owners[part.base] = self._own_or(source.bases.open(base), base.store_uuid, base.pin)
                self.owners[part.uuid] = owners[part.base]
                self.parts[part.uuid] = part
            if entry.key not in self._numbers:
                self._numbers[entry.key] = len(self._entries)
                self._entries.append(entry)
            numbers[n] = self._numbers[entry.key]
        return numbers[table.segment[rows]]

    def named(self, names: Mapping[str, str], bases: Mapping[str, int]) -> list[SegmentEntry]:
        """How manifests of the target name them.

        Args:
            names: What those are called there that were brought.
            bases: Number of the base of each segment and layer that lies in another store.
        """

        def here(part: SegmentEntry) -> SegmentEntry:
            return replace(part, uuid=names.get(part.uuid, part.uuid), base=bases.get(part.uuid))

        return [replace(here(entry), layers=tuple(map(here, entry.layers))) for entry in self._entries]

    def _own_or(self, filesystem: Filesystem, store_uuid: str, version: Version | str | None) -> Owner:
        return Owner(self._target if store_uuid == self._target_uuid else filesystem, store_uuid, version)


@contextlib.contextmanager
def _held(target: Filesystem, history: History, owners: Mapping[str, Owner]) -> Iterator[None]:
    """Inside the block no vacuum takes versions of the target itself away that have some of these segments."""
    own = {name: owner for name, owner in owners.items() if owner.filesystem is target}
    with contextlib.ExitStack() as marks:
        for _, version in find_loan(own, "required").versions:
            if version is not None:
                marks.enter_context(held(target, history, version))
        yield


def union_schema(
    schemas: Sequence[Schema], fields: Mapping[str, tuple[str, Any]], names: Sequence[str] | None = None
) -> Schema:
    """One schema for trajectories of several stores. A column that not every store requires is optional in it.

    Args:
        schemas: Of the stores.
        fields: Metadata fields to set: name -> type first.
        names: Of the stores, for messages.

    Raises:
        SelectionError: There are none.
        SchemaConflictError: Columns or fields that differ; all of them are named.
    """
    if not schemas:
        raise SelectionError("nothing to combine; name a store or a view at least")
    _check_alike(schemas, names or [f"store {number}" for number in range(len(schemas))])
    required = [schema.required for schema in schemas if schema.columns]
    everywhere = frozenset.intersection(*required) if required else frozenset()
    whole = Schema()
    for number, schema in enumerate(schemas):
        if number and schema == schemas[number - 1]:
            continue
        columns = [replace(c, presence="optional") if c.path in schema.required - everywhere else c for c in schema]
        whole = whole.merged_with(Schema(tuple(columns), schema.metadata))
    return whole.with_metadata({name: kind for name, (kind, _) in fields.items()})


def _check_alike(schemas: Sequence[Schema], names: Sequence[str]) -> None:
    """Raise ``SchemaConflictError`` if columns or fields of the same name mean different things."""
    meant: dict[tuple[str, str], dict[str, str]] = {}  # name and attribute -> value -> the first store that has it
    for number, (schema, name) in enumerate(zip(schemas, names, strict=True)):
        if number and schema == schemas[number - 1]:
            continue
        for column in schema:
            for attribute, value in _told_apart_by(column).items():
                meant.setdefault((f"column {column.path!r}", attribute), {}).setdefault(value, name)
        for field, kind in schema.metadata.items():
            meant.setdefault((f"metadata field {field!r}", "type"), {}).setdefault(kind, name)
    told = [
        f"{what} has {', '.join(f'{attribute}={value} in {where}' for value, where in values.items())}"
        for (what, attribute), values in meant.items()
        if len(values) > 1
    ]
    if told:
        raise SchemaConflictError(
            f"the stores do not fit together: {'; '.join(told)}; combine those that agree, or append the trajectories of "
            "the others to a store with columns like these"
        )


def _told_apart_by(column: Column) -> dict[str, str]:
    """What stores must agree on."""
    return {
        "dtype": column.dtype,
        "shape": str(column.shape),
        "extra": str(column.extra),
        "ragged": str(column.ragged),
        "presence": "derived" if column.presence == "derived" else "appended",
    }


def _check_committed(sources: Sequence[Source]) -> None:
    for source in sources:
        waiting = len(source.selection) - len(source.selection.committed())
        if waiting:
            raise SelectionError(
                f"{waiting} trajectories of {source.filesystem.description} are not yet committed: flush() the store and "
                "take the view again"
            )


def _rows(
    sources: Sequence[Source],
    segments: Array,
    schema: Schema,
    fields: Mapping[str, tuple[str, Any]],
    order: Array | None,
) -> pa.Table:
    """All trajectories as rows of a fresh manifest; ``segment`` counts all segments."""
    wanted = table_schema(schema.metadata)
    given: dict[str, Any] = {"segment": pa.array(segments), "id": pa.nulls(len(segments), pa.int64())}
    given.update({name: values for name, (_, values) in fields.items()})
    names = [f.name for f in wanted if f.name not in given]
    unread = [source for source in sources if not _is_read(source)]
    at_once = stores_at_once(source.filesystem for source in unread)
    read = dict(zip(map(id, unread), in_each(lambda source: _chosen(source, names), unread, at_once), strict=True))
    tables = [read[id(source)] if id(source) in read else _chosen(source, names) for source in sources]
    columns = []
    for f in wanted:
        if f.name in given:
            columns.append(as_type(_chunked(given[f.name]), f.type))
            continue
        chunks: list[pa.Array] = []
        for table in tables:
            absent = f.name not in table.column_names
            chunks += [pa.nulls(table.num_rows, f.type)] if absent else as_type(table[f.name], f.type).chunks
        columns.append(pa.chunked_array(chunks, f.type))
    rows = pa.Table.from_arrays(columns, schema=wanted)
    return rows if order is None else rows.combine_chunks().take(pa.array(order))


def _is_read(source: Source) -> bool:
    """Whether all columns of its table are at hand."""
    table = source.selection.table
    return table.growth is not None or "full" in vars(table)


def _chosen(source: Source, names: Sequence[str]) -> pa.Table:
    """Some columns of the chosen rows of a table; metadata fields that the store lacks are left out."""
    table, rows = source.selection.table, source.selection.rows
    if _is_read(source):
        chosen = table.full.select([name for name in names if name in table.full.column_names])
    else:
        chosen = _read(source, [name for name in names if name not in INDEX_FIELDS])
        for name in set(names).intersection(INDEX_FIELDS):
            chosen = chosen.append_column(name, pa.array(getattr(table, name)))
    first, count = (int(rows[0]), len(rows)) if len(rows) else (0, 0)
    if np.array_equal(rows, np.arange(first, first + count)):
        return chosen.slice(first, count)
    if (np.diff(rows) > 0).all():
        wanted = np.zeros(len(table), bool)
        wanted[rows] = True
        return chosen.filter(pa.array(wanted))  # chunk by chunk
    return chosen.combine_chunks().take(pa.array(rows))


def _read(source: Source, names: Sequence[str]) -> pa.Table:
    """Columns of all rows of a table, besides those that it holds anyway."""
    entries = source.selection.table.version.snapshot.manifests
    manifests = History(source.filesystem).read_manifests(entries, names)
    parts = [
        live_rows(entry, manifest.table.select([name for name in names if name in manifest.table.column_names]))
        for entry, manifest in zip(entries, manifests, strict=True)
    ]
    return pa.concat_tables(parts, promote_options="default") if parts else pa.table({name: [] for name in names})


def _chunked(values: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    return values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([values])


def _store_manifests(
    target: Filesystem, rows: pa.Table, entries: Sequence[SegmentEntry], keys: list[str]
) -> tuple[ManifestEntry, ...]:
    """Store the rows in manifests of bounded size, each as soon as it is encoded; how a snapshot names them.

    Args:
        target: Where.
        rows: They.
        entries: The segments.
        keys: To which that of each manifest is added before it is stored.
    """

    def stored(first: int) -> ManifestEntry:
        part = rows.slice(first, MAX_MERGED_ROWS)
        numbers = distinct[part["segment"].to_numpy()]
        used = np.flatnonzero(np.bincount(numbers, minlength=len(entries)))
        renumbered = np.zeros(len(entries), np.int32)
        renumbered[used] = np.arange(len(used))
        part = part.set_column(where, rows.schema.field(where), pa.array(renumbered[numbers]))
        manifest = Manifest(part, tuple(entries[n] for n in used.tolist()))
        data = encode_manifest(manifest)
        key = layout.manifest_key(uuid.uuid4().hex)
        keys.append(key)
        target.store({key: [data]})
        return manifest_entry(key, data, manifest, first_id=0)

    where = rows.schema.get_field_index("segment")
    first: dict[tuple[str, ...], int] = {}  # of segments that the sources have under several names
    distinct = np.array([first.setdefault(entry.key, n) for n, entry in enumerate(entries)], np.int64)
    workers = Workers(_ENCODED_AT_ONCE, name="trajstore-manifest")
    try:
        return tuple(workers.map(stored, range(0, rows.num_rows, MAX_MERGED_ROWS)))
    finally:
        workers.close()
