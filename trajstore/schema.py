"""The columns of a store: names, dtypes, shapes.

Invariant: a ``Schema`` that exists is valid: every path is a legal object key, no path is a prefix of another, every
dtype can be stored. What a name may be is the business of ``trajstore.names``, values of columns (arrays, tensors, lists)
that of ``trajstore.values``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np

from trajstore.errors import (
    ColumnNameError,
    ColumnShapeError,
    ColumnTypeError,
    MetadataError,
    SchemaConflictError,
    SchemaError,
    UnknownColumnError,
)
from trajstore.names import check_column_path, check_metadata_name, check_paths_together

Presence = Literal["required", "optional", "derived"]

NUMERIC_DTYPES = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
]
VARIABLE_DTYPES = ("string", "bytes")
METADATA_TYPES = ("bool", "int64", "float64", "string", "bytes", "timestamp")
CODEC_NAMES = (
    "none",
    "lz4",
    "lz4-shuffle",
    "lz4-bitshuffle",
    "zstd",
    "zstd-shuffle",
    "zstd-bitshuffle",
    "zstd-high",
    "zstd-high-shuffle",
)

_DATETIME = re.compile(r"^(datetime|timedelta)64\[(\d*)(Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\]$")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One per-step value of a trajectory.

    Attributes:
        path: Name, nested by ``/``: ``"obs/image"``.
        dtype: A NumPy numeric name, ``"bool"``, ``"bfloat16"``, ``"datetime64[unit]"``, ``"timedelta64[unit]"``,
            ``"string"`` or ``"bytes"``.
        shape: Shape of one step's value, ``()`` for a scalar. For a ragged column, of one list element.
        extra: 1 for a column with ``length + 1`` rows (states: the last row is the observation after the last action).
        presence: ``"required"``: every trajectory has it; ``"optional"``: some may lack it; ``"derived"``: computed later.
        ragged: Each step holds a list of its own length of values of ``shape``.
        codec: One of ``CODEC_NAMES``, or None for the store's default for this dtype.
        page_rows: Rows per page, a power of two, or None for a default near 128 KiB per page.
    """

    path: str
    dtype: str
    shape: tuple[int, ...] = ()
    extra: Literal[0, 1] = 0
    presence: Presence = "required"
    ragged: bool = False
    codec: str | None = None
    page_rows: int | None = None

    def __post_init__(self) -> None:
        check_column_path(self.path)
        object.__setattr__(self, "dtype", canonical_dtype(self.dtype, path=self.path))
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        if self.dtype in VARIABLE_DTYPES and self.shape:
            raise ColumnShapeError(
                f"column {self.path!r}: dtype {self.dtype!r} with shape {self.shape}: strings and bytes are one value "
                "per step; use ragged=True for several per step"
            )
        if any(n < 1 for n in self.shape):
            raise ColumnShapeError(
                f"column {self.path!r}: shape {self.shape} holds no values; every dimension must be at least 1 "
                "(leave the column out)"
            )
        if self.extra not in (0, 1):
            raise SchemaError(f"column {self.path!r}: extra={self.extra!r}, expected 0 or 1")
        if self.presence not in ("required", "optional", "derived"):
            raise SchemaError(
                f"column {self.path!r}: presence={self.presence!r}, expected 'required', 'optional' or 'derived'"
            )
        if self.codec is not None and self.codec not in CODEC_NAMES:
            raise SchemaError(f"column {self.path!r}: codec {self.codec!r}, expected one of {', '.join(CODEC_NAMES)}")
        if self.page_rows is not None and (self.page_rows < 1 or self.page_rows & (self.page_rows - 1)):
            raise SchemaError(f"column {self.path!r}: page_rows={self.page_rows}, expected a power of two")
        if self.stored_in == "arrow" and (self.codec is not None or self.page_rows is not None):
            raise SchemaError(
                f"column {self.path!r}: codec and page_rows are per column for tensors only; scalars, strings and ragged "
                "columns share the pages of one Arrow file (set codec= on trajstore.open for all of them)"
            )

    @cached_property
    def is_variable(self) -> bool:
        """Whether one step's value has no fixed size (strings, bytes, ragged lists)."""
        return self.ragged or self.dtype in VARIABLE_DTYPES

    @cached_property
    def stored_in(self) -> Literal["zarr", "arrow"]:
        """``"zarr"`` for tensors and complex scalars, ``"arrow"`` for scalars, strings and ragged lists."""
        if self.is_variable:
            return "arrow"
        return "zarr" if self.shape or self.dtype.startswith("complex") else "arrow"

    @cached_property
    def physical_dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of the stored bits: ``uint16`` for bfloat16, ``int64`` for datetimes."""
        return physical_dtype(self.dtype)

    @cached_property
    def array_dtype(self) -> np.dtype[Any] | None:
        """The dtype of arrays that are stored as they are; None if rows are converted (bfloat16, datetimes, text, lists)."""
        return self.physical_dtype if not self.is_variable and self.dtype == self.physical_dtype.name else None

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of one step's value in memory; of one list element if ragged; 0 for strings and bytes."""
        if self.dtype in VARIABLE_DTYPES:
            return 0
        return self.physical_dtype.itemsize * math.prod(self.shape)

    def describe(self) -> str:
        """Dtype and shape as people write them: ``uint8[64, 64, 3]``."""
        inner = f"[{', '.join(map(str, self.shape))}]" if self.shape else ""
        return f"{'list of ' if self.ragged else ''}{self.dtype}{inner}"

    def to_json(self) -> dict[str, Any]:
        """This column as a member of a snapshot document."""
        return {
            "path": self.path,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "extra": self.extra,
            "presence": self.presence,
            "ragged": self.ragged,
            "codec": self.codec,
            "page_rows": self.page_rows,
        }


@dataclass(frozen=True)
class Schema:
    """The columns of a store and the types of its metadata fields.

    Args:
        columns: The columns; their order is kept.
        metadata: Field name -> one of ``METADATA_TYPES``; every field is nullable.
    """

    columns: tuple[Column, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "metadata", dict(self.metadata))
        check_paths_together([column.path for column in self.columns])
        for name, kind in self.metadata.items():
            check_metadata_name(name)
            if kind not in METADATA_TYPES:
                raise MetadataError(
                    f"metadata field {name!r}: type {kind!r}, expected one of {', '.join(METADATA_TYPES)}"
                )
            if any(column.path == name for column in self.columns):
                raise MetadataError(f"metadata field {name!r} has the name of a column; choose another name")
        object.__setattr__(self, "_by_path", {column.path: column for column in self.columns})

    def __iter__(self) -> Iterator[Column]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def __contains__(self, path: object) -> bool:
        return path in self._columns_by_path

    def __getitem__(self, path: str) -> Column:
        try:
            return self._columns_by_path[path]
        except KeyError:
            raise UnknownColumnError(
                f"no column {path!r}; the columns are {', '.join(repr(c.path) for c in self.columns) or 'none yet'}"
            ) from None

    def get(self, path: str) -> Column | None:
        """The column of this path, or None."""
        return self._columns_by_path.get(path)

    @property
    def _columns_by_path(self) -> dict[str, Column]:
        by_path: dict[str, Column] = self.__dict__["_by_path"]
        return by_path

    @cached_property
    def required(self) -> frozenset[str]:
        """Paths that every trajectory has."""
        return frozenset(c.path for c in self.columns if c.presence == "required")

    @cached_property
    def derived(self) -> frozenset[str]:
        """Paths of columns that are computed from others, never appended."""
        return frozenset(c.path for c in self.columns if c.presence == "derived")

    def check_appended(self, paths: Iterable[str]) -> None:
        """Raise ``ColumnNameError`` if a column that somebody appends is derived."""
        given = self.derived.intersection(paths) if self.derived else None
        if given:
            path = min(given)
            raise ColumnNameError(
                f"column {path!r} is derived from others and cannot be appended; leave it out, and compute it with "
                f"store.add_column({path!r}, ...)"
            )

    def select(self, name: str) -> tuple[Column, ...]:
        """The column of this path, or all columns nested under it.

        Raises:
            UnknownColumnError: Neither a column nor a parent of one.
        """
        if name in self._columns_by_path:
            return (self._columns_by_path[name],)
        under = tuple(c for c in self.columns if c.path.startswith(name + "/"))
        return under or (self[name],)

    def merged_with(self, other: Schema) -> Schema:
        """This schema plus what ``other`` adds: optional or derived columns, and metadata fields.

        Raises:
            SchemaConflictError: A shared column differs, or one side lacks a required column of the other.
        """
        if not self.columns or not other.columns or self.columns == other.columns:
            columns = self.columns or other.columns
        else:
            for ours in self.columns:
                if ours.path in other:
                    _check_same_column(ours, other[ours.path])
                elif ours.presence == "required":
                    raise SchemaConflictError(f"required column {ours.path!r} of the store is not in the other schema")
            added = tuple(c for c in other.columns if c.path not in self)
            for column in added:
                if column.presence == "required":
                    raise SchemaConflictError(
                        f"column {column.path!r} is not in the store's schema and cannot be added as required; "
                        "declare it with presence='optional'"
                    )
            columns = self.columns + added
        metadata = dict(self.metadata)
        for name, kind in other.metadata.items():
            if metadata.setdefault(name, kind) != kind:
                raise SchemaConflictError(
                    f"metadata field {name!r} is {metadata[name]} in the store and {kind} in the other schema"
                )
        if columns == self.columns and metadata == self.metadata:
            return self
        return Schema(columns, metadata)

    def extended_by(self, declared: Schema) -> Schema:
        """This schema with columns that a caller declares; an empty one takes them all.

        Raises:
            SchemaConflictError: A column differs, or a new one is required, which stored trajectories cannot satisfy.
        """
        missing = tuple(c for c in self.columns if c.path not in declared)
        return self.merged_with(Schema(missing + declared.columns, declared.metadata))

    def with_metadata(self, fields: Mapping[str, str]) -> Schema:
        """This schema with metadata fields added; no columns change."""
        return replace(self, metadata={**self.metadata, **fields})

    def to_json(self) -> dict[str, Any]:
        """This schema as a member of a snapshot document."""
        return {"columns": [c.to_json() for c in self.columns], "metadata": dict(self.metadata)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Schema:
        """The inverse of ``to_json``."""
        columns = tuple(Column(**{**c, "shape": tuple(c["shape"])}) for c in document["columns"])
        return cls(columns, document["metadata"])


def canonical_dtype(dtype: Any, *, path: str) -> str:
    """The name under which a dtype is stored, from a NumPy or torch dtype or a name.

    Raises:
        ColumnTypeError: It cannot be stored.
    """
    name, hint = _canonical_name(dtype)
    if hint:
        raise ColumnTypeError(f"column {path!r}: dtype {name} cannot be stored: {hint}")
    return name


@lru_cache(maxsize=256)
def _canonical_name(dtype: Any) -> tuple[str, str | None]:
    """The name of a dtype, and if it cannot be stored, what to do instead."""
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name in NUMERIC_DTYPES or name in VARIABLE_DTYPES or _DATETIME.match(name):
        return name, None
    try:
        resolved = np.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is not None:
        if resolved.kind == "U":
            return "string", None
        if resolved.kind == "S":
            return "bytes", None
        if resolved.name in NUMERIC_DTYPES or _DATETIME.match(resolved.name):
            return str(resolved.name), None
    hint = {
        "object": "object arrays have no fixed type; pass an array of numbers, strings or bytes",
        "longdouble": "extended precision differs between machines; use float64",
        "clongdouble": "extended precision differs between machines; use complex128",
        "float128": "extended precision differs between machines; use float64",
        "complex256": "extended precision differs between machines; use complex128",
        "datetime64": "the unit is missing; use datetime64[us], say",
        "timedelta64": "the unit is missing; use timedelta64[us], say",
    }.get(
        resolved.name if resolved is not None else name,
        "use a NumPy numeric dtype, bfloat16, string or bytes",
    )
    if resolved is not None and resolved.names:
        hint = "split the record into one column per field"
    return name, hint


def physical_dtype(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype of the stored bits of a fixed-size logical dtype."""
    if dtype == "bfloat16":
        return np.dtype(np.uint16)
    if dtype.startswith(("datetime64", "timedelta64")):
        return np.dtype(np.int64)
    return np.dtype(dtype)


def _check_same_column(ours: Column, theirs: Column) -> None:
    if (ours.presence == "derived") != (theirs.presence == "derived"):
        raise SchemaConflictError(
            f"column {ours.path!r}: the store has presence={ours.presence!r}, the other schema "
            f"{theirs.presence!r}: what is appended and what is derived need names of their own"
        )
    for name in ("dtype", "shape", "extra", "ragged"):
        if getattr(ours, name) != getattr(theirs, name):
            raise SchemaConflictError(
                f"column {ours.path!r}: the store has {name}={getattr(ours, name)!r}, the other schema "
                f"{name}={getattr(theirs, name)!r}"
            )
