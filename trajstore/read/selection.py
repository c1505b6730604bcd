"""A selection of trajectories as index arrays.

Invariant: nothing here grows with steps, and everything that sampling needs of a trajectory is one element of an array.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trajstore.read.table import TrajectoryTable
from trajstore.schema import Column, Schema
from trajstore.stored import Array


@dataclass(eq=False)
class Selection:
    """Some trajectories of a table, in an order.

    Attributes:
        table: All trajectories of a version.
        rows: ``(n,)`` int64: the chosen ones, as rows of the table.
        whole: Whether these are all rows of the table, in its order.
    """

    table: TrajectoryTable
    rows: Array
    whole: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def schema(self) -> Schema:
        """Columns and metadata fields of the table's version."""
        return self.table.schema

    @property
    def lengths(self) -> Array:
        """``(n,)`` int64: steps."""
        return self.table.length[self.rows]

    @cached_property
    def segments(self) -> Array:
        """Numbers of the table's segments that hold one of them, ``(m,)`` int32, ascending."""
        return np.unique(self.table.segment[self.rows])

    @cached_property
    def common_columns(self) -> tuple[Column, ...]:
        """Columns that every trajectory has."""
        return tuple(c for c in self.schema if not self.lacking(c))

    @cached_property
    def terminated(self) -> Array:
        """``(n,)`` bool: those that ended in a terminal state."""
        return self.table.flags("terminated", self.rows)

    @cached_property
    def truncated(self) -> Array:
        """``(n,)`` bool: those that were cut off."""
        return self.table.flags("truncated", self.rows)

    def committed(self) -> Selection:
        """Only what is committed."""
        return Selection(self.table, self.rows[self.table.id[self.rows] >= 0])

    def extends(self, other: Selection) -> bool:
        """Whether it is all of a growing table, and ``other`` was all of it before."""
        growth = self.table.growth
        if growth is None or other.table.growth is not growth or len(self) < len(other):
            return False
        return self.whole and other.whole

    def lacking(self, column: Column) -> int:
        """How many trajectories lack a column."""
        presence = self.table.column_presence.get(column.path)
        if presence is None or presence[self.segments].all():
            return 0
        return int((~presence[self.table.segment[self.rows]]).sum())
