"""Where trajectories of a store came from that was made of others.

Invariant: two metadata fields say it, ``source_store``, the identity of the store that a trajectory was appended to, and
``source_id``, its id there; they stay when the result is merged, split or saved again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from trajstore.edit.combine import Source
from trajstore.errors import SchemaConflictError
from trajstore.schema import Schema

SOURCE_STORE, SOURCE_ID = "source_store", "source_id"
_UUID = "^[0-9a-f]{32}$"
LINEAGE = {SOURCE_STORE: "string", SOURCE_ID: "int64"}


def lineage(sources: Sequence[Source]) -> dict[str, tuple[str, Any]]:
    """Metadata fields for ``combine`` that say where trajectories came from; those that know it already keep it.

    Raises:
        SchemaConflictError: A source has other fields or columns of these names.
    """
    if not sources:
        return {}
    for source in sources:
        _check_names(source.selection.schema, source.filesystem.description)
    if all(_is_known(source) for source in sources):
        return {}  # as it is stored
    pairs = [_lineage_of(source) for source in sources]
    return {
        SOURCE_STORE: (LINEAGE[SOURCE_STORE], pa.chunked_array([stores for stores, _ in pairs])),
        SOURCE_ID: (LINEAGE[SOURCE_ID], pa.chunked_array([ids for _, ids in pairs])),
    }


def _is_known(source: Source) -> bool:
    """Whether each trajectory of a store says where it came from."""
    table = source.selection.table
    if not all(name in table.schema.metadata for name in LINEAGE):
        return False
    if any(table.full[name].null_count for name in LINEAGE):
        return False
    stores = table.full[SOURCE_STORE].unique()  # few: looked at instead of every row
    return all(re.fullmatch(_UUID, one) for one in stores.to_pylist())


def _lineage_of(source: Source) -> tuple[pa.Array, pa.Array]:
    table, rows = source.selection.table, source.selection.rows
    stores = pa.repeat(source.store_uuid, len(rows))
    ids = pa.array(table.id[rows])
    known = [name for name in LINEAGE if name in table.schema.metadata]
    if not known:
        return stores, ids
    given = {
        name: table.values(name, rows).cast(field_type) if name in known else pa.nulls(len(rows), field_type)
        for name, field_type in ((SOURCE_STORE, pa.string()), (SOURCE_ID, pa.int64()))
    }
    there, numbers = given[SOURCE_STORE], given[SOURCE_ID]
    is_lineage = pc.and_(pc.match_substring_regex(pc.fill_null(there, ""), _UUID), numbers.is_valid())
    if pc.any(pc.and_(pc.or_(there.is_valid(), numbers.is_valid()), pc.invert(is_lineage))).as_py():
        raise _taken(source.filesystem.description, f"values of its own in {' and '.join(map(repr, known))}")
    return pc.if_else(is_lineage, there, stores), pc.if_else(is_lineage, numbers, ids)


def _check_names(schema: Schema, where: str) -> None:
    for name, kind in LINEAGE.items():
        if name in schema:
            raise _taken(where, f"a column {name!r}")
        if schema.metadata.get(name, kind) != kind:
            raise _taken(where, f"a metadata field {name!r} of type {schema.metadata[name]}")


def _taken(where: str, found: str) -> SchemaConflictError:
    return SchemaConflictError(
        f"{where} has {found}; merge, split and save set the metadata fields {SOURCE_STORE!r}, the uuid of a store, and "
        f"{SOURCE_ID!r}, a number, which say where a trajectory came from: use view.save(lineage=False) for a part of one "
        "store, or append with other names"
    )
