"""Views: a fixed selection of trajectories of one version, and the trajectories in it.

Invariant: a view never changes; it holds index arrays, no step data. Filtering and slicing make new views.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import pandas as pd
import pyarrow as pa

from trajstore.edit.combine import Share, Source, combine
from trajstore.edit.lineage import lineage as where_from
from trajstore.errors import IndexRangeError, SelectionError
from trajstore.follows import Follows
from trajstore.format.manifest import table_schema
from trajstore.interop import arrow, frames
from trajstore.interop.steps import StepReader
from trajstore.read.access import StoreAccess
from trajstore.read.bases import same_place
from trajstore.read.segment import RowRange
from trajstore.read.selection import Selection
from trajstore.read.table import TrajectoryTable
from trajstore.sampling import Sampled
from trajstore.schema import Column, Schema
from trajstore.storage.connect import connect
from trajstore.stored import Array, Stored
from trajstore.trajectory import Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trajstore.plot import Kind

_LARGE_STEP_VALUES = 16


class View(Sampled):
    """A fixed selection of trajectories.

    Indexing with a number gives a ``Trajectory``; with a slice, a boolean mask or an array of positions, a ``View``.
    (Not a ``collections.abc.Sequence``: Polars would make a table of Python objects of one.)

    Examples:
        >>> import numpy as np, trajstore
        >>> with trajstore.open("memory://docs/view", mode="a") as store:
        ...     for n in (3, 5):
        ...         _ = store.append({"action": np.arange(n)}, task="pick" if n == 5 else "place")
        ...     store.flush()
        ...     view = store.trajectories.filter("length > 4 and task == 'pick'")
        ...     view[0]["action"][1:3]
        array([1, 2])
    """

    def __init__(
        self,
        table: TrajectoryTable,
        access: StoreAccess,
        rows: Array | None = None,
        *,
        follows: Follows | None = None,
    ) -> None:
        self._table = table
        self._rows = table.all_rows if rows is None else rows  # (n,) int64, rows of the table
        super().__init__(Selection(table, self._rows, whole=rows is None), access, follows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, key: int) -> Trajectory: ...
    @overload
    def __getitem__(self, key: slice | Sequence[int] | Array) -> View: ...
    def __getitem__(self, key: int | slice | Sequence[int] | Array) -> Trajectory | View:
        if isinstance(key, int | np.integer):
            position = int(key) + (len(self) if key < 0 else 0)
            if not 0 <= position < len(self):
                raise IndexRangeError(f"trajectory {int(key)} of a view of {len(self)}")
            return Trajectory(self, int(self._rows[position]))
        if isinstance(key, slice):
            return self._selected(self._rows[key])
        return self.take(key)

    def __iter__(self) -> Iterator[Trajectory]:
        return (Trajectory(self, int(row)) for row in self._rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the store again: only index arrays travel."""
        growth = self._table.growth
        if growth is not None and (self._rows >= len(growth.base)).any():
            raise SelectionError(
                "a view of trajectories that were not yet committed when it was taken cannot go to another process: flush() "
                "the store and take the view again"
            )
        return self._access.reopening(), (self.version, self._rows)

    def __repr__(self) -> str:
        return f"View(trajectories={len(self)}, steps={self.num_steps}, version={self.version})"

    @property
    def version(self) -> int:
        """The version of the store that the view shows."""
        return self._table.version.number

    @property
    def schema(self) -> Schema:
        """Columns and metadata fields of that version."""
        return self._table.schema

    @property
    def ids(self) -> Array:
        """``(n,)`` int64: numbers in the store."""
        return self._table.id[self._rows]

    @property
    def lengths(self) -> Array:
        """``(n,)`` int64: steps."""
        return self._table.length[self._rows]

    @property
    def num_steps(self) -> int:
        """Steps of all trajectories."""
        return int(self.lengths.sum())

    @cached_property
    def common_columns(self) -> tuple[Column, ...]:
        """Columns that every trajectory of the view has."""
        return self._selection.common_columns

    def first(self, n: int) -> View:
        """The oldest ``n`` trajectories, or all if there are fewer."""
        return self._selected(self._rows[: _count(n)], self._followed("first", n))

    def last(self, n: int) -> View:
        """The newest ``n`` trajectories, or all if there are fewer."""
        return self._selected(self._rows[max(len(self) - _count(n), 0) :], self._followed("last", n))

    def take(self, positions: Sequence[int] | Array) -> View:
        """The trajectories at these positions, in this order, or those where a boolean mask is true."""
        chosen = np.asarray(positions)
        if chosen.size == 0 and chosen.dtype != bool:
            chosen = chosen.astype(np.int64)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iub":
            raise SelectionError(
                f"positions of dtype {chosen.dtype} and {chosen.ndim} dimensions; expected 1-d integers"
            )
        if chosen.dtype == bool:
            if len(chosen) != len(self):
                raise SelectionError(f"a mask of {len(chosen)} for a view of {len(self)} trajectories")
            return self._selected(self._rows[chosen])
        if chosen.size and not (-len(self) <= chosen.min() and chosen.max() < len(self)):
            raise IndexRangeError(f"positions {chosen.min()}..{chosen.max()} of a view of {len(self)}")
        return self._selected(self._rows[chosen])

    def filter(self, expression: str, **variables: Any) -> View:
        """The trajectories for which an expression over the trajectory table holds.

        Args:
            expression: As ``pandas.DataFrame.query`` takes it: ``"length > 100 and task == 'pick'"``. Missing values
                are treated as pandas does: they match ``!=`` for texts and floats, and no other comparison.
            **variables: Values that the expression names with ``@``: ``filter("task in @tasks", tasks=["pick"])``.

        Raises:
            SelectionError: An unknown field, or no expression at all.
        """
        chosen = self._rows[frames.query(self._full(), expression, variables)]
        return self._selected(chosen, self._followed("filter", expression, **variables))

    def having(self, *columns: str) -> View:
        """The trajectories that have all of these columns.

        Args:
            *columns: Names; of a parent, all columns under it.

        Raises:
            UnknownColumnError: The store has no such column.

        Examples:
            >>> import numpy as np, trajstore
            >>> with trajstore.open("memory://docs/having", mode="a") as store:
            ...     _ = store.append({"reward": np.ones(3)})
            ...     _ = store.add_column("return", lambda t: t["reward"][::-1].cumsum()[::-1])
            ...     _ = store.append({"reward": np.ones(2)})
            ...     store.flush()
            ...     len(store.trajectories), len(store.trajectories.having("return"))
            (2, 1)
        """
        chosen = np.ones(len(self), bool)
        for column in self._columns(columns):
            presence = self._table.column_presence.get(column.path)
            if presence is not None:
                chosen &= presence[self._table.segment[self._rows]]
        return self._selected(self._rows[chosen], self._followed("having", *columns))

    def to_pandas(self) -> pd.DataFrame:
        """One row per trajectory, indexed by id: uuid, length, flags, return, time, then metadata fields."""
        return frames.trajectory_frame(self._full())

    def to_arrow(self) -> pa.Table:
        """One row per trajectory: id, uuid (text), length, flags, return, time, then metadata fields.

        The view itself is such a table to whatever takes the Arrow stream protocol: ``duckdb.sql("select ... from view")``,
        ``polars.DataFrame(view)``, ``pyarrow.table(view)``.

        Examples:
            >>> import numpy as np, pyarrow, trajstore
            >>> with trajstore.open("memory://docs/arrow", mode="a") as store:
            ...     _ = store.append({"action": np.arange(3)}, terminated=True, task="pick")
            ...     pyarrow.table(store.trajectories).select(["id", "length", "task"]).to_pylist()
            [{'id': 0, 'length': 3, 'task': 'pick'}]
        """
        return arrow.trajectory_table(self._full())

    def __arrow_c_schema__(self) -> Any:
        return arrow.trajectory_schema(table_schema(self.schema.metadata)).__arrow_c_schema__()

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    def steps(self, columns: Sequence[str] | None = None, n: int | None = None) -> pd.DataFrame:
        """One row per step, indexed by (trajectory id, step).

        Args:
            columns: Names; by default all that are small. Vectors become one column per entry, larger shapes one array per
                cell. Of a column with ``extra=1`` the final observation is left out.
            n: At most this many steps, from the beginning of the view; all by default.

        Raises:
            UnknownColumnError: A trajectory lacks one of the columns.
        """
        reader, chosen = self._steps_of(columns, n)
        trajectories, steps = reader.index(0, reader.rows)
        return frames.step_frame(trajectories, steps, [(c.path, reader.values(c)) for c in chosen])

    def steps_arrow(
        self, columns: Sequence[str] | None = None, n: int | None = None, *, batch_bytes: int = 32 * 1024 * 1024
    ) -> arrow.StepTable:
        """One row per step as an Arrow table that is read while it is streamed, so it may be larger than memory.

        DuckDB and Polars take it as it is: ``duckdb.sql("select trajectory, avg(reward) from steps group by all")``,
        ``polars.DataFrame(steps)``. Vectors and larger tensors are nested fixed-size lists.

        Args:
            columns: Names; by default all that are small: name images if they are wanted, they are read even if a query
                does not use them. Null where a trajectory lacks the column. Of a column with ``extra=1`` the final
                observation is left out.
            n: At most this many steps, from the beginning of the view; all by default.
            batch_bytes: Memory of one batch of rows, about.

        Raises:
            SelectionError: A column named ``trajectory`` or ``step``, as the id and the number of each step are.
        """
        reader, chosen = self._steps_of(columns, n)
        if columns is None:
            chosen = [column for column in chosen if column.path not in arrow.INDEX_COLUMNS]
        return arrow.StepTable(reader, chosen, batch_bytes)

    def plot(
        self,
        kind: Kind = "overview",
        *,
        by: str | None = None,
        x: Literal["id", "created_at", "steps"] = "id",
        trajectory: int | Sequence[int] | None = None,
        columns: str | Sequence[str] | None = None,
        rows: int = 3,
        frames: int = 8,
        title: str | None = None,
        path: str | os.PathLike[str] | None = None,
        show: bool = False,
    ) -> Figure:
        """A picture of these trajectories, which notebooks show when it is the last value of a cell.

        Args:
            kind: ``"overview"``; ``"returns"``: return of each trajectory and its running mean; ``"lengths"``: how long they
                are and how they ended; ``"trajectory"``: rewards, actions or other columns of one over its steps;
                ``"frames"``: images of some at evenly spaced steps.
            by: A field of the trajectory table that colours returns: ``"task"``, ``"source_store"``.
            x: What returns are drawn over: number of the trajectory, time, or steps taken before its end in this view.
            trajectory: Id, or several for frames; by default the first, or for frames evenly spaced ones.
            columns: Names, for kind ``"trajectory"``; the image column for frames. By default reward and actions, and the
                first column that looks like images.
            rows: Trajectories in frames, at most.
            frames: Steps of each.
            title: Above the picture.
            path: Where to save it: ``.png``, ``.pdf`` or ``.svg``.
            show: Open a window, and return when it is closed.

        Raises:
            SelectionError: An empty view, no such trajectory, field or image column, or nothing that can open a window.
            ImportError: matplotlib is missing; the message says what to install.
        """
        from trajstore import plot

        return plot.plot(
            self,
            kind,
            by=by,
            x=x,
            trajectory=trajectory,
            columns=columns,
            rows=rows,
            frames=frames,
            title=title,
            path=path,
            show=show,
        )

    def _steps_of(self, columns: Sequence[str] | None, n: int | None) -> tuple[StepReader, list[Column]]:
        self._access.check_open()
        lengths = self.lengths
        if n is not None:
            before = np.cumsum(lengths) - lengths
            lengths = np.clip(_count(n) - before, 0, lengths)
        chosen = self._columns(columns) if columns is not None else self._small_columns()
        return StepReader(self._selection, self._access.readers, lengths), chosen

    def save(
        self,
        url: str | os.PathLike[str],
        *,
        share: Share = "link",
        replace: bool = False,
        lineage: bool = True,
        allow_unpinned: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        progress: bool | None = None,
    ) -> int:
        """Make a store of these trajectories, without decoding a step.

        Args:
            url: Where, as for ``trajstore.open``.
            share: ``"link"``: a store of its own, whose segments are hard-linked on one disk, copied by the server within
                one bucket, else copied here. ``"copy"``: always bytes of its own. ``"reference"``: it refers to the segments
                where they are, and pins them there, so that vacuum leaves them.
            replace: Of a store that is there, make a new version that holds these trajectories only.
            lineage: Say in the metadata fields ``source_store`` and ``source_id`` where each came from, as ``merge`` does.
            allow_unpinned: Also refer to a store that cannot be written, where nothing keeps vacuum from removing segments.
            storage_options: For that place.
            progress: Show bytes copied on standard error; by default in a terminal, if there are many.

        Returns:
            Its version.

        Raises:
            StoreExistsError: A store is there, and ``replace`` is false.
            SchemaConflictError: With ``lineage``, columns or other fields of these names.
            SelectionError: Some trajectories are not yet committed.
            ReadOnlyError: A store that is referred to cannot be written, and ``allow_unpinned`` is false.
        """
        source = self.source()
        with contextlib.closing(connect(url, storage_options=storage_options)) as target:
            own = same_place(target.url, source.filesystem.url)
            with self._access.turns.storing("save()") if own else contextlib.nullcontext():
                combined = combine(
                    [source],
                    target,
                    share=share,
                    fields=where_from([source]) if lineage else None,
                    instead=replace,
                    operation="save",
                    pins="where possible" if allow_unpinned else "required",
                    progress=progress,
                )
        return combined.version.number

    def source(self) -> Source:
        """These trajectories as a part of another store; for edits."""
        self._access.check_open()
        return Source(self._selection, self._access.filesystem, self._access.store_uuid, self._access.bases)

    def _full(self) -> pa.Table:
        """All that is known of these trajectories, in their order."""
        return self._table.full if self._selection.whole else self._table.full.take(self._rows)

    def _selected(self, rows: Array, follows: Follows | None = None) -> View:
        return View(self._table, self._access, rows, follows=follows)

    def _followed(self, method: str, *arguments: Any, **variables: Any) -> Follows | None:
        """How to choose the same way from a later view."""
        if self._follows is None:
            return None
        return Follows(self._follows.latest, (*self._follows.steps, (method, arguments, variables)))

    def _columns(self, names: Sequence[str]) -> list[Column]:
        return [column for name in names for column in self.schema.select(name)]

    def _small_columns(self) -> list[Column]:
        return [c for c in self.common_columns if not c.ragged and np.prod(c.shape) <= _LARGE_STEP_VALUES]

    def _read_rows(self, row: int, column: Column, start: int, stop: int) -> Stored:
        table = self._table
        first = int(table.start[row]) + (int(table.ordinal[row]) if column.extra else 0)
        reader = self._access.readers.open(table.segments[int(table.segment[row])], self.schema)
        return reader.read(column.path, RowRange(first + start, first + stop))


def _count(n: int) -> int:
    if n < 0:
        raise SelectionError(f"n={n}, expected zero or more")
    return int(n)
