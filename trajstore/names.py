"""Names of columns and metadata fields, and how nested mappings map to flat paths.

Invariant: a path that passes the checks is a legal object key on every storage, beside all others that passed together with
it; ``flatten`` and ``nest`` are inverses of each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from trajstore.errors import ColumnNameError, ColumnTypeError, MetadataError

# What the trajectory table already says of every trajectory, and what batches offer as virtual columns.
RESERVED_METADATA = frozenset(
    [
        "uuid",
        "id",
        "segment",
        "start",
        "ordinal",
        "length",
        "episode",
        "first_step",
        "terminated",
        "truncated",
        "reward_sum",
        "created_at",
        "is_first",
        "is_last",
        "step",
        "trajectory",
        "source",
        "is_pad",
        "discount",
        "index",
        "weight",
        "version",
    ]
)
END_FLAGS = ("terminated", "truncated")  # of a trajectory; batches have them as columns
_RESERVED_TOP_LEVEL = frozenset({"zarr.json", "steps.arrow", "states.arrow", "pages.arrow"})
_ILLEGAL_CHARACTERS = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|#%\[\]]')
_MAX_COMPONENT_BYTES = 200


def check_column_path(path: str) -> None:
    """Raise ``ColumnNameError`` unless ``path`` can be an object key on every storage."""
    if not isinstance(path, str):
        raise ColumnNameError(f"column name {path!r} is a {type(path).__name__}, expected a string")
    if not path:
        raise ColumnNameError("a column name is empty")
    if path.startswith("/") or path.endswith("/"):
        raise ColumnNameError(f"column name {path!r}: a name neither begins nor ends with '/'")
    for part in path.split("/"):
        why = None
        if not part:
            why = "has an empty part"
        elif part in (".", ".."):
            why = f"has the part {part!r}"
        elif match := _ILLEGAL_CHARACTERS.search(part):
            why = f"has the character {match.group()!r}, which some storages cannot hold"
        elif part.startswith("__"):
            why = f"has the part {part!r}: Zarr reserves names that begin with '__'"
        elif part != part.strip() or part.endswith("."):
            why = f"has the part {part!r}, which begins or ends with a blank, or ends with a dot"
        elif not part.isprintable():
            why = f"has the part {part!r}, which is not printable"
        elif len(part.encode("utf-8", "surrogatepass")) > _MAX_COMPONENT_BYTES:
            why = f"has a part of more than {_MAX_COMPONENT_BYTES} bytes"
        if why:
            raise ColumnNameError(f"column name {path!r} {why}; rename the column")
    if path.split("/", 1)[0] in _RESERVED_TOP_LEVEL or path.rsplit("/", 1)[-1] == "zarr.json":
        raise ColumnNameError(f"column name {path!r} is the name of one of the store's own files; rename the column")


def check_no_flags(paths: Iterable[str]) -> None:
    """Raise ``ColumnNameError`` if columns that nobody declared have the name of a flag that says how a trajectory ended.

    It would look as if it were taken for the flag, and the trajectory would count as one that goes on.
    """
    for name in END_FLAGS:
        if name in paths:
            raise ColumnNameError(
                f"column {name!r} has the name of the flag that says how a trajectory ended, of which batches and returns "
                f"are made; pass {name}=bool(...) beside the columns, or, if it is to be a column all the same, declare it "
                "(schema= of open, or store.declare)"
            )


def check_derived_name(path: str) -> None:
    """Raise ``ColumnNameError`` if a computed column would hide what batches and the trajectory table have by that name."""
    if path in RESERVED_METADATA:
        raise ColumnNameError(
            f"column {path!r} has a name that batches or the trajectory table give a meaning of their own; choose another "
            "name"
        )


def check_metadata_name(name: str) -> None:
    """Raise ``MetadataError`` unless ``name`` can be a metadata field."""
    if not isinstance(name, str) or not name or not name.isprintable():
        raise MetadataError(f"metadata field {name!r}: a name is a printable, non-empty string")
    if name in RESERVED_METADATA:
        raise MetadataError(f"metadata field {name!r} is reserved by the trajectory table; choose another name")


def check_paths_together(paths: Iterable[str]) -> None:
    """Raise ``ColumnNameError`` if two paths are one, differ in case only, or one is the parent of another."""
    seen: dict[str, str] = {}
    for path in paths:
        folded = path.casefold()
        if folded in seen:
            how = "twice" if seen[folded] == path else f"beside {seen[folded]!r}, which differs in case only"
            raise ColumnNameError(f"column {path!r} is named {how}; rename one of them")
        seen[folded] = path
    for path in seen.values():
        parts = path.casefold().split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            if parent in seen:
                raise ColumnNameError(
                    f"column {seen[parent]!r} is also the parent of column {path!r}; rename one of them"
                )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as ``{path: leaf}``.

    Raises:
        ColumnNameError: A key is not a string, contains ``/`` ambiguously, or a mapping is empty.
        ColumnTypeError: No mapping at all.

    Examples:
        >>> flatten({"obs": {"image": 1, "state": 2}, "action": 3})
        {'obs/image': 1, 'obs/state': 2, 'action': 3}
    """
    if not isinstance(tree, Mapping):
        raise ColumnTypeError(
            f"columns are a {type(tree).__name__}, expected a mapping of names to arrays [T, ...], {{'action': actions}}; a "
            "list of steps is appended one by one: with store.begin() as episode: episode.step(...)"
        )
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ColumnNameError(f"column name {key!r} under {prefix or 'the top'!r} is not a string")
        path = f"{prefix}/{key}" if prefix else key
        nested = type(value) is not np.ndarray and isinstance(value, Mapping)
        leaves = flatten(value, path) if nested else {path: value}
        if not leaves:
            raise ColumnNameError(f"column {path!r} is an empty mapping; leave it out")
        for leaf in leaves:
            if leaf in flat:
                raise ColumnNameError(f"column {leaf!r} is given twice")
        flat.update(leaves)
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``flatten``.

    Examples:
        >>> nest({"obs/image": 1, "obs/state": 2, "action": 3})
        {'obs': {'image': 1, 'state': 2}, 'action': 3}
    """
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree
