"""Zarr v3 metadata of a segment, from our own templates.

Invariant: zarr-python writes the same metadata for the same arrays, and reads these segments (a test holds both). Making
them with zarr-python itself takes 3 ms per array, which is longer than a whole commit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trajstore.format.codecs import Codec
from trajstore.format.layout import ZARR_METADATA
from trajstore.schema import Column


@dataclass(frozen=True)
class ZarrArray:
    """One tensor column of one segment."""

    column: Column
    rows: int
    page_rows: int
    codec: Codec

    @property
    def pages(self) -> int:
        """Pages of the column; the last may be partly filled."""
        return -(-self.rows // self.page_rows)

    def metadata(self) -> dict[str, Any]:
        """The array's ``zarr.json``."""
        column = self.column
        itemsize = column.physical_dtype.itemsize
        endian = {} if itemsize == 1 else {"configuration": {"endian": "little"}}
        return {
            "shape": [self.rows, *column.shape],
            "data_type": column.physical_dtype.name,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.pages * self.page_rows, *column.shape]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": _fill_value(column),
            "codecs": [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": [self.page_rows, *column.shape],
                        "codecs": [{"name": "bytes", **endian}, *self.codec.zarr_json(itemsize)],
                        "index_codecs": [
                            {"name": "bytes", "configuration": {"endian": "little"}},
                            {"name": "crc32c"},
                        ],
                        "index_location": "end",
                    },
                }
            ],
            "attributes": {"dtype": column.dtype, "extra": column.extra},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }


def group_documents(arrays: Sequence[ZarrArray]) -> dict[str, bytes]:
    """Every ``zarr.json`` of a segment: name inside the segment -> bytes; the root holds the others consolidated."""
    members: dict[str, dict[str, Any]] = {}
    for array in arrays:
        parts = array.column.path.split("/")
        for depth in range(1, len(parts)):
            members.setdefault("/".join(parts[:depth]), _group())
        members[array.column.path] = array.metadata()
    documents = {f"{path}/{ZARR_METADATA}": _dump(document) for path, document in members.items()}
    consolidated = {"kind": "inline", "must_understand": False, "metadata": dict(sorted(members.items()))}
    documents[ZARR_METADATA] = _dump({**_group(), "consolidated_metadata": consolidated})
    return documents


def _group() -> dict[str, Any]:
    return {"attributes": {}, "zarr_format": 3, "node_type": "group"}


def _fill_value(column: Column) -> Any:
    kind = column.physical_dtype.kind
    return {"b": False, "f": 0.0, "c": [0.0, 0.0]}.get(kind, 0)


def _dump(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
