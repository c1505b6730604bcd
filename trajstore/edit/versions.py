"""Versions compared, and an old one made the latest again.

Invariant: nothing is rewritten: a restored version names the manifests of the old one. Its pins still hold what it borrows,
since a version that stands keeps them; only where the owners are is taken from the latest version, which knows better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from trajstore.format.snapshot import Snapshot
from trajstore.read.table import TrajectoryTable
from trajstore.schema import Schema
from trajstore.storage.changes import MergedManifests, ReadManifests
from trajstore.stored import Array

_RANGES_TOLD = 8


@dataclass(frozen=True)
class Restore:
    """Make the content of an old version the latest. Ids that were given since are not given again."""

    snapshot: Snapshot
    merges: bool = field(default=False, init=False)

    @property
    def operation(self) -> str:
        """What ``versions`` calls it."""
        return f"restore {self.snapshot.version}"

    def apply(self, parent: Snapshot, merged: MergedManifests | None, read: ReadManifests) -> Snapshot:  # noqa: ARG002
        """The next snapshot."""
        old = self.snapshot
        urls: dict[str, list[str]] = {}
        for base in parent.bases:
            urls.setdefault(base.store_uuid, []).append(base.url)
        bases = tuple(
            base if base.url in urls.get(base.store_uuid, [base.url]) else replace(base, url=urls[base.store_uuid][0])
            for base in old.bases
        )
        return replace(
            parent,
            operation=self.operation,
            schema=old.schema,
            totals=old.totals,
            bases=bases,
            manifests=old.manifests,
        )


@dataclass(frozen=True, eq=False)
class Diff:
    """What a version holds that another does not. False if they hold the same.

    Attributes:
        added: ``(n,)`` int64, ids of trajectories that only the second has.
        removed: ``(m,)`` int64, ids of those that only the first has.
        added_columns: Of the schema.
        removed_columns: Of the schema.
        added_fields: Metadata fields.
        removed_fields: Metadata fields.
    """

    added: Array
    removed: Array
    added_columns: Sequence[str]
    removed_columns: Sequence[str]
    added_fields: Sequence[str]
    removed_fields: Sequence[str]

    def __bool__(self) -> bool:
        names = (self.added_columns, self.removed_columns, self.added_fields, self.removed_fields)
        return bool(len(self.added) or len(self.removed) or any(names))

    def __str__(self) -> str:
        found = []
        for how, ids in (("added", self.added), ("removed", self.removed)):
            if len(ids):
                found.append(
                    f"{len(ids)} {'trajectory' if len(ids) == 1 else 'trajectories'} {how} (ids {_ranges(ids)})"
                )
        for what in ("columns", "fields"):
            for how in ("added", "removed"):
                names: Sequence[str] = getattr(self, f"{how}_{what}")
                if names:
                    found.append(f"{what} {how}: {', '.join(names)}")
        return "; ".join(found) or "no difference"


def compare(first: TrajectoryTable, second: TrajectoryTable) -> Diff:
    """What changed from one version to another."""
    old, new = first.schema, second.schema
    return Diff(
        np.setdiff1d(second.id, first.id),
        np.setdiff1d(first.id, second.id),
        _only(new, old),
        _only(old, new),
        [name for name in new.metadata if name not in old.metadata],
        [name for name in old.metadata if name not in new.metadata],
    )


def _ranges(ids: Array) -> str:
    """Ascending numbers as people write them; of many ranges, the first few.

    >>> _ranges(np.array([1, 2, 3, 7, 9, 10]))
    '1-3, 7, 9-10'
    """
    breaks = np.flatnonzero(np.diff(ids) != 1)
    firsts = ids[[0, *(breaks + 1)]].tolist()
    lasts = ids[[*breaks, -1]].tolist()
    spans = [f"{lo}-{hi}" if hi > lo else f"{lo}" for lo, hi in zip(firsts, lasts, strict=True)]
    return ", ".join(spans if len(spans) <= _RANGES_TOLD else [*spans[:_RANGES_TOLD], "..."])


def _only(schema: Schema, other: Schema) -> list[str]:
    return [column.path for column in schema if column.path not in other]
