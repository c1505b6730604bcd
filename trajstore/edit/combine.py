"""A version made of trajectories of other stores: new manifest rows over segments that are shared.

Invariant: every object that the new version names is in place before it is committed, and no step is decoded on the way.
What fails leaves the target as it was, or a store without any version where there was none; what it had written already has
names that nobody else uses, and the next try uses it again.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from trajstore.errors import MissingObjectError, SchemaConflictError, SelectionError
from trajstore.format import layout
from trajstore.format.manifest import Manifest, SegmentEntry, encode_manifest, manifest_entry, table_schema
from trajstore.format.snapshot import Base, ManifestEntry
from trajstore.progress import byte_progress
from trajstore.read.bases import Bases, reference
from trajstore.read.selection import Selection
from trajstore.schema import Schema
from trajstore.storage.attach import find_existing, open_or_create, taken
from trajstore.storage.changes import Append
from trajstore.storage.commit import EMPTY_VERSION, History, Version
from trajstore.storage.filesystem import Filesystem, ObjectInfo
from trajstore.storage.tiers import MAX_MERGED_ROWS
from trajstore.stored import Array

Share = Literal["link", "copy", "reference"]
_LISTED_ONE_BY_ONE = 8  # segments; of more, the whole folder is listed at once


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
        written_bytes: Bytes that were written: manifests, and segments as far as these were copied.
    """

    version: Version
    written_bytes: int


@dataclass(frozen=True, eq=False)
class _Owner:
    """The store whose folder holds a segment."""

    filesystem: Filesystem
    store_uuid: str


def combine(
    sources: Sequence[Source],
    target: Filesystem,
    *,
    share: Share = "link",
    order: Array | None = None,
    fields: Mapping[str, tuple[str, Array]] | None = None,
    instead: bool = False,
    operation: str = "merge",
    progress: bool | None = None,
) -> Combined:
    """Commit trajectories of several stores as one version of another.

    Args:
        sources: Their trajectories, one after the other.
        target: Where the version goes; a store is made if there is none.
        share: ``"link"``: the target gets the segments' objects, by hard links on one disk, copied by the server in one
            bucket, else copied here. ``"copy"``: bytes of its own. ``"reference"``: the segments stay where they are.
        order: ``(n,)`` int64 positions among all trajectories; by default as they come.
        fields: Metadata fields to set: name -> type and ``(n,)`` values, one for each position before ordering.
        instead: Whether the new version holds these trajectories only; otherwise there must be no version yet.
        operation: What ``versions`` calls it.
        progress: Show bytes copied on standard error; by default in a terminal, if there are many.

    Raises:
        SchemaConflictError: Sources whose columns or fields differ.
        SelectionError: Trajectories that are not committed, or none at all.
        StoreExistsError: A store is there, and ``instead`` is false.
        MissingObjectError: A segment is not where it should be.
    """
    history = History(target)
    known = find_existing(target, history)
    if known is not None and known[1].number and not instead:
        raise taken(target)
    _check_committed(sources)
    schema = union_schema([source.selection.schema for source in sources], fields or {})
    owners: dict[str, _Owner] = {}
    entries: dict[str, SegmentEntry] = {}
    numbers = [_collect(source, entries, owners) for source in sources]
    rows = _rows(sources, np.concatenate(numbers) if numbers else np.empty(0, np.int64), schema, fields or {})
    if order is not None:
        rows = rows.take(pa.array(order))
    target_uuid, head = known or ("", EMPTY_VERSION)
    objects = _objects_of(owners, entries)
    foreign = {name: owner for name, owner in owners.items() if owner.store_uuid != target_uuid}
    bases = head.snapshot.bases
    written = 0
    if share == "reference":
        bases = _with_bases(bases, foreign.values(), target.url)
        places = {(base.url, base.store_uuid): number for number, base in enumerate(bases)}
        for name, owner in foreign.items():
            url = reference(owner.filesystem.url, seen_from=target.url)
            entries[name] = replace(entries[name], base=places[url, owner.store_uuid])
    else:
        lots = [(owner, [o for name in names for o in objects[name]]) for owner, names in _by_owner(foreign)]
        written += _copy(target, lots, link=share == "link", progress=progress)
    for name in owners.keys() - (foreign.keys() if share == "reference" else set()):
        entries[name] = replace(entries[name], base=None)
    manifests, nbytes = _write_manifests(target, rows, list(entries.values()))
    if known is None:
        target_uuid, head = open_or_create(target, history, must_be_new=not instead)
    stored = sum(entry.nbytes for entry in entries.values())
    change = Append(schema, manifests, stored, operation=operation, bases=bases, instead=instead, first=not instead)
    version = history.commit(change, head)
    history.write_hint(version.number)
    return Combined(version, written + nbytes)


def union_schema(schemas: Sequence[Schema], fields: Mapping[str, tuple[str, Array]]) -> Schema:
    """One schema for trajectories of several stores.

    Raises:
        SchemaConflictError: A column or field that differs.
    """
    if not schemas:
        raise SelectionError("nothing to combine; name a store or a view at least")
    whole = schemas[0]
    for number, schema in enumerate(schemas[1:], 1):
        if not whole.columns or not schema.columns:
            whole = whole.merged_with(schema)
            continue
        lacking = {c.path for c in whole if c.path not in schema} | {c.path for c in schema if c.path not in whole}
        try:
            whole = _relaxed(whole, lacking).merged_with(_relaxed(schema, lacking))
        except SchemaConflictError as error:
            raise SchemaConflictError(f"store {number} and those before it do not fit together: {error}") from error
    return whole.with_metadata({name: kind for name, (kind, _) in fields.items()})


def _relaxed(schema: Schema, lacking: set[str]) -> Schema:
    """Columns that not every store has are optional in the union."""
    columns = [replace(c, presence="optional") if c.path in lacking and c.presence == "required" else c for c in schema]
    return Schema(tuple(columns), schema.metadata)


def _check_committed(sources: Sequence[Source]) -> None:
    for source in sources:
        waiting = len(source.selection) - len(source.selection.committed())
        if waiting:
            raise SelectionError(
                f"{waiting} trajectories of {source.filesystem.description} are not yet committed: flush() the store "
                f"and take "
                "the view again"
            )


def _collect(source: Source, entries: dict[str, SegmentEntry], owners: dict[str, _Owner]) -> Array:
    """Note the segments of a source, each once; for each of its trajectories, the number of its segment among all."""
    table = source.selection.table
    own = _Owner(source.filesystem, source.store_uuid)
    bases = table.version.snapshot.bases
    numbering = {name: number for number, name in enumerate(entries)}
    numbers = np.full(len(table.segments), -1, np.int64)
    for n in source.selection.segments.tolist():
        entry = table.segments[n]
        if entry.uuid not in entries:
            base = None if entry.base is None else bases[entry.base]
            owners[entry.uuid] = own if base is None else _Owner(source.bases.open(base), base.store_uuid)
            numbering[entry.uuid] = len(entries)
            entries[entry.uuid] = entry
        numbers[n] = numbering[entry.uuid]
    return numbers[table.segment[source.selection.rows]]


def _rows(
    sources: Sequence[Source], segments: Array, schema: Schema, fields: Mapping[str, tuple[str, Array]]
) -> pa.Table:
    """All trajectories as rows of a fresh manifest; ``segment`` counts all segments."""
    wanted = table_schema(schema.metadata)
    parts = []
    for source in sources:
        full = source.selection.table.full.take(pa.array(source.selection.rows))
        columns = [
            full[f.name].cast(f.type) if f.name in full.column_names else pa.nulls(full.num_rows, f.type)
            for f in wanted
        ]
        parts.append(pa.Table.from_arrays(columns, schema=wanted))
    rows = pa.concat_tables(parts)
    given: dict[str, Any] = {"segment": pa.array(segments), "id": pa.nulls(rows.num_rows, pa.int64())}
    given.update({name: pa.array(values) for name, (_, values) in fields.items()})
    for name, values in given.items():
        where = wanted.get_field_index(name)
        rows = rows.set_column(where, wanted.field(where), values.cast(wanted.field(where).type))
    return rows


def _with_bases(bases: tuple[Base, ...], owners: Any, url: str) -> tuple[Base, ...]:
    found = list(bases)
    for owner in owners:
        base = Base(reference(owner.filesystem.url, seen_from=url), owner.store_uuid)
        if all((b.url, b.store_uuid) != (base.url, base.store_uuid) for b in found):
            found.append(base)
    return tuple(found)


def _copy(
    target: Filesystem, lots: Sequence[tuple[Filesystem, Sequence[ObjectInfo]]], *, link: bool, progress: bool | None
) -> int:
    """Have objects of other stores in the target; bytes written."""
    total = sum(o.nbytes for _, objects in lots for o in objects)
    on_disks = "://" not in "".join([target.url, *(filesystem.url for filesystem, _ in lots)])
    title = "linking, or copying between disks" if link and on_disks else "copying"
    with byte_progress(title, total, shown=progress) as advance:
        return sum(
            target.copy_from(filesystem, objects, link=link, done=lambda o: advance(o.nbytes))
            for filesystem, objects in lots
        )


def _by_owner(owners: Mapping[str, _Owner]) -> list[tuple[Filesystem, list[str]]]:
    """Segments of each store."""
    found: dict[int, tuple[Filesystem, list[str]]] = {}
    for name, owner in owners.items():
        found.setdefault(id(owner.filesystem), (owner.filesystem, []))[1].append(name)
    return list(found.values())


def _objects_of(owners: Mapping[str, _Owner], entries: Mapping[str, SegmentEntry]) -> dict[str, list[ObjectInfo]]:
    """The objects of all segments, by segment.

    Raises:
        MissingObjectError: Some are not there.
    """
    found: dict[str, list[ObjectInfo]] = {}
    for filesystem, names in _by_owner(owners):
        found.update(_objects(filesystem, [entries[name] for name in names]))
    return found


def _objects(filesystem: Filesystem, segments: Sequence[SegmentEntry]) -> dict[str, list[ObjectInfo]]:
    """The objects of segments, whose sizes add up to what the manifest says."""
    names = {entry.uuid for entry in segments}
    found: dict[str, list[ObjectInfo]] = {name: [] for name in names}
    prefixes = [layout.SEGMENTS]
    if len(names) <= _LISTED_ONE_BY_ONE:
        prefixes = [layout.segment_folder(name) for name in sorted(names)]
    for prefix in prefixes:
        for info in filesystem.list_objects(prefix):
            name = layout.segment_of(info.key)
            if name in names:
                found[name].append(info)
    for entry in segments:
        nbytes = sum(o.nbytes for o in found[entry.uuid])
        if nbytes < entry.nbytes:
            raise MissingObjectError(
                f"{layout.segment_folder(entry.uuid)} in {filesystem.description} holds {nbytes} bytes, its manifest says "
                f"{entry.nbytes}; restore it from a copy"
            )
    return found


def _write_manifests(
    target: Filesystem, rows: pa.Table, entries: Sequence[SegmentEntry]
) -> tuple[tuple[ManifestEntry, ...], int]:
    """Store the rows in manifests of bounded size; how a snapshot names them, and bytes written."""
    where = rows.schema.get_field_index("segment")
    named: list[ManifestEntry] = []
    for first in range(0, rows.num_rows, MAX_MERGED_ROWS):
        part = rows.slice(first, MAX_MERGED_ROWS)
        used, numbers = np.unique(part["segment"].to_numpy(), return_inverse=True)
        part = part.set_column(where, rows.schema.field(where), pa.array(numbers.astype(np.int32)))
        manifest = Manifest(part.combine_chunks(), tuple(entries[n] for n in used.tolist()))
        data = encode_manifest(manifest)
        path = layout.manifest_key(uuid.uuid4().hex)
        target.store({path: [data]})
        named.append(manifest_entry(path, data, manifest, first_id=0))
    return tuple(named), sum(entry.nbytes for entry in named)
