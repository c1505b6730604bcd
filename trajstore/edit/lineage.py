"""Where trajectories of a store came from that was made of others.

Invariant: two metadata fields say it, ``source_store``, the identity of the store that a trajectory was appended to, and
``source_id``, its id there; they stay when the result is merged, split or saved again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from trajstore.edit.combine import Source
from trajstore.errors import SchemaConflictError
from trajstore.schema import Schema

SOURCE_STORE, SOURCE_ID = "source_store", "source_id"
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
    return not any(table.full[name].null_count for name in LINEAGE)


def _lineage_of(source: Source) -> tuple[pa.Array, pa.Array]:
    table, rows = source.selection.table, source.selection.rows
    stores = pa.repeat(source.store_uuid, len(rows))
    ids = pa.array(table.id[rows])
    known = [name for name in LINEAGE if name in table.schema.metadata]
    if not known:
        return stores, ids
    given = {name: table.values(name, rows) if name in known else pa.nulls(len(rows)) for name in LINEAGE}
    unknown = pc.and_(*(values.is_null() for values in given.values()))
    return (
        pc.if_else(unknown, stores, given[SOURCE_STORE].cast(pa.string())),
        pc.if_else(unknown, ids, given[SOURCE_ID].cast(pa.int64())),
    )


def _check_names(schema: Schema, where: str) -> None:
    for name, kind in LINEAGE.items():
        found = (
            f"a column {name!r}" if name in schema else f"a metadata field {name!r} of type {schema.metadata.get(name)}"
        )
        if name in schema or schema.metadata.get(name, kind) != kind:
            raise SchemaConflictError(
                f"{where} has {found}; merge, split and save set a metadata field {name!r} of type {kind}, which says "
                "where a trajectory came from: use view.save(lineage=False) for a part of one store, or append with another "
                "name"
            )
