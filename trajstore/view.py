"""Views: a fixed selection of trajectories of one version, and the trajectories in it.

Invariant: a view never changes; it holds index arrays, no step data. Filtering and slicing make new views.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import pandas as pd
import torch

from trajstore.edit.combine import Share, Source, combine
from trajstore.errors import IndexRangeError, SelectionError
from trajstore.feed.loader import Loader
from trajstore.feed.options import LoaderOptions
from trajstore.feed.pick import Picker
from trajstore.feed.pipeline import PipelineBuilder, Samples, Supply
from trajstore.follows import Follows
from trajstore.interop import frames
from trajstore.read.access import StoreAccess
from trajstore.read.columns import read_column
from trajstore.read.segment import RowRange
from trajstore.read.selection import Selection
from trajstore.read.table import TrajectoryTable
from trajstore.sample.window import Window
from trajstore.schema import Column, Schema
from trajstore.storage.connect import connect
from trajstore.stored import Array, Stored
from trajstore.trajectory import Trajectory

_LARGE_STEP_VALUES = 16


class View(Sequence["Trajectory"]):
    """A fixed selection of trajectories.

    Indexing with a number gives a ``Trajectory``; with a slice, a boolean mask or an array of positions, a ``View``.

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
        self._access = access
        self._rows = table.all_rows if rows is None else rows  # (n,) int64, rows of the table
        self._follows = follows
        self._selection = Selection(table, self._rows, whole=rows is None)
        self._samples: dict[Any, Samples] = {}  # of sample(), by its arguments
        self._pickers: dict[Any, Picker] = {}  # of gather(), by its arguments

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
        chosen = self._rows[frames.query(self.to_pandas(), expression, variables)]
        return self._selected(chosen, self._followed("filter", expression, **variables))

    def to_pandas(self) -> pd.DataFrame:
        """One row per trajectory, indexed by id: uuid, length, flags, return, time, then metadata fields."""
        return frames.trajectory_frame(self._table.full.take(self._rows))

    def steps(self, columns: Sequence[str] | None = None, n: int | None = None) -> pd.DataFrame:
        """One row per step, indexed by (trajectory id, step).

        Args:
            columns: Names; by default all that are small. Vectors become one column per entry, larger shapes one array
                per
                cell. Of a column with ``extra=1`` the final observation is left out.
            n: At most this many steps, from the beginning of the view; all by default.
        """
        chosen = self._columns(columns) if columns is not None else self._small_columns()
        lengths = self.lengths
        if n is not None:
            before = np.cumsum(lengths) - lengths
            lengths = np.clip(_count(n) - before, 0, lengths)
        kept = np.flatnonzero(lengths)
        values: dict[str, list[Any]] = {c.path: [] for c in chosen}
        for position in kept:
            trajectory = self[int(position)]
            for column in chosen:
                values[column.path].append(trajectory.column(column.path)[: int(lengths[position])])
        joined = [(c.path, _concatenate(values[c.path])) for c in chosen] if len(kept) else []
        return frames.step_frame(self.ids[kept].tolist(), lengths[kept].tolist(), joined)

    def read(self, column: str, out: Array | None = None) -> Any:
        """One column of all trajectories, end to end; neighbours in a segment are read in one go.

        Args:
            column: Name.
            out: Filled and returned instead of a new array: ``(rows, *shape)``, C-contiguous, of the stored dtype.

        Returns:
            ``(rows, *shape)``; rows are steps, and one more per trajectory for a column with ``extra=1``.
        """
        return read_column(self._selection, self._access.readers, column, out)

    def gather(
        self,
        trajectories: Sequence[int] | Array,
        steps: Sequence[int] | Array,
        *,
        columns: Sequence[str] | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Any]:
        """One batch of the steps that are named, in that order; for whoever draws them in a way of their own.

        Args:
            trajectories: ``(n,)`` positions in the view.
            steps: ``(n,)`` steps of these trajectories.
            columns: Names, as for ``loader``.
            device: Where the tensors go; by default main memory.

        Returns:
            Nested mapping of tensors ``[n, ...]``.

        Raises:
            IndexRangeError: A trajectory that is not in the view, or a step that it does not have.
        """
        self._access.check_open()
        key = (None if columns is None else tuple(columns), None if device is None else str(device))
        picker = self._pickers.get(key)
        if picker is None:
            supply = self.supply(LoaderOptions(1, columns=columns, device=device))
            picker = Picker(supply, columns, device=device, buffers=self._access.buffers)
            self._pickers[key] = picker
        return picker.pick(np.asarray(trajectories), np.asarray(steps))

    def sample(
        self,
        n: int,
        *,
        seed: int | None = None,
        window: Window = None,
        dilation: int = 1,
        pad: str = "none",
        n_step: int | None = None,
        gamma: float = 0.99,
        columns: Sequence[str] | None = None,
        anchors: str | Array | None = None,
        weights: str | Sequence[float] | Array | None = None,
    ) -> dict[str, Any]:
        """One random batch, in the calling thread; single steps unless ``window`` says otherwise.

        Args:
            n: Windows.
            seed: Same seed, same windows; by default different each time.
            window: As for ``loader``, like the rest.
            dilation: Steps between the rows of an integer window.
            pad: What rows outside the trajectory are.
            n_step: Rewards in a return.
            gamma: Discount.
            columns: Names.
            anchors: Where windows may begin.
            weights: Of trajectories.

        Returns:
            Nested mapping of tensors ``[n, ...]``.
        """
        self._access.check_open()
        key = None
        if seed is None and isinstance(anchors, str | None) and isinstance(weights, str | None):
            names = None if columns is None else tuple(columns)
            key = (n, repr(window), dilation, pad, n_step, gamma, names, anchors, weights)
            if key in self._samples:
                return self._samples[key].next()
        options = LoaderOptions(
            n,
            window=window,
            dilation=dilation,
            pad=pad,
            n_step=n_step,
            gamma=gamma,
            columns=columns,
            anchors=anchors,
            weights=weights,
            seed=_fresh_seed() if seed is None else operator.index(seed),
            prefetch=0,
        )
        pipeline = PipelineBuilder((self,), (n,), options)()
        if key is not None:
            self._samples[key] = Samples(pipeline)
            return self._samples[key].next()
        try:
            return pipeline.make(0, 1).batches[0]
        finally:
            pipeline.close()

    def loader(
        self,
        batch_size: int,
        *,
        window: Window = None,
        dilation: int = 1,
        pad: str = "none",
        n_step: int | None = None,
        gamma: float = 0.99,
        columns: Sequence[str] | None = None,
        anchors: str | Array | None = None,
        order: str = "random",
        weights: str | Sequence[float] | Array | None = None,
        block_bytes: int | None = None,
        alpha: float = 0.6,
        beta: float = 0.4,
        seed: int = 0,
        epochs: int = 1,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        follow: bool = False,
        refresh_s: float = 5.0,
        device: torch.device | str | None = None,
        prefetch: int = 2,
        timeout_s: float = 300.0,
        cache_bytes: int | None = None,
        cache_device: torch.device | str | None = None,
        output: str = "dict",
        progress: bool = False,
    ) -> Loader:
        """Batches of windows, from the page cache, made ahead by a thread.

        A window never crosses a trajectory. Its anchor is one of the trajectory's steps; offsets are relative to it.
        Rows of a column are the steps, and one more for columns with ``extra=1``: the observation after the last
        action.

        Args:
            batch_size: Windows per batch, over all ranks.
            window: None for single steps, without a time dimension. A number of steps ``W``: every column at offsets
                ``0 .. W - 1``, ``[batch, W, ...]``. A mapping from columns to offsets of their own: ``{"obs": [-1, 0],
                "action": range(16), "reward": 0}``, where one number means no time dimension, a parent's name all
                columns under it, and ``trajstore.future(...)`` a row drawn from the rest of the trajectory.
            dilation: Steps between the rows of an integer window.
            pad: ``"none"``: only anchors whose rows all exist. ``"edge"``, ``"zero"``: every step is an anchor, rows
                outside repeat the nearest one or are zeros, and ``is_pad`` says which.
            n_step: ``reward`` becomes the discounted sum of up to so many rewards, ``next_obs`` the observation behind
                them, ``discount`` what its value counts: ``gamma ** k``, and 0 after a terminal step. Cut at the end of
                the trajectory; where a truncated one has no final observation, those anchors are left out.
            gamma: Discount per step.
            columns: Names, nested ones by their parent too; ``next_<column>`` is a column one step on; metadata fields
                and the virtual columns ``terminated``, ``truncated``, ``is_first``, ``is_last``, ``step`` and
                ``trajectory`` (position in the view) when named. By default all columns of fixed shape that every
                trajectory has.
            anchors: Only these: the name of a column of one bool per step, or ``(steps,)`` bools.
            order: ``"random"``: uniform with replacement, endless. ``"shuffle"``: every anchor once per epoch.
                ``"sequential"``: in order. ``"prioritized"``: in proportion to priorities, endless (Schaul et al.,
                "Prioritized Experience Replay", ICLR 2016); batches have ``index`` and ``weight``; see
                ``Loader.update_priorities``.
            weights: For ``"random"``: a number per trajectory, or the name of a field; a trajectory is drawn in
                proportion to it, then an anchor of it uniformly. ``weights="length"`` draws steps about uniformly.
            block_bytes: For ``"shuffle"``: shuffle blocks of neighbouring rows of about this many bytes, and then the
                anchors of 16 blocks together, so that pages are read about once per epoch as long as the cache holds
                these. Of use when the view exceeds the cache; by default anchors of the whole view are shuffled.
            alpha: Exponent of priorities.
            beta: Exponent of importance weights.
            seed: Same view, arguments and seed: same batches.
            epochs: Per pass, for ``"shuffle"`` and ``"sequential"``.
            drop_last: Leave out the short last batch of an epoch.
            rank: Of this process, which receives ``batch_size / world_size`` windows of every batch.
            world_size: Processes that share the batches.
            follow: Also sample what is appended from now on: through this handle at once, by others every
                ``refresh_s``.
            refresh_s: Seconds.
            device: Where the tensors go; by default main memory, or where ``cache_device`` is. Strings stay where they are.
            prefetch: Batches made ahead; 0 to make them in the calling thread.
            timeout_s: Longest wait for a batch.
            cache_bytes: A page cache of this loader's own, instead of the store's.
            cache_device: A page cache on this device, of ``cache_bytes`` or as large as the store's.
            output: ``"dict"``, or ``"tensordict"``: a ``TensorDict`` of batch size ``[batch_size]`` in which strings and
                ragged columns are ``NonTensorStack``; needs ``pip install 'trajstore[tensordict]'``.
            progress: Show a progress bar on standard error; of several ranks, the first shows it.

        Returns:
            An iterator over nested mappings of tensors ``[batch_size, ...]``; a context manager.

        Raises:
            SelectionError: Arguments that make no sense together, or no anchor that fits.
            UnknownColumnError: A name that nothing has.
            CacheTooSmallError: The cache cannot hold one window; says how much it takes.
        """
        options = LoaderOptions(
            batch_size,
            window=window,
            dilation=dilation,
            pad=pad,
            n_step=n_step,
            gamma=gamma,
            columns=columns,
            anchors=anchors,
            order=order,
            weights=weights,
            block_bytes=block_bytes,
            alpha=alpha,
            beta=beta,
            seed=operator.index(seed),
            epochs=epochs,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            follow=follow,
            refresh_s=refresh_s,
            device=device,
            prefetch=prefetch,
            timeout_s=timeout_s,
            cache_bytes=cache_bytes,
            cache_device=cache_device,
            output=output,
            progress=progress,
        )
        return self._access.opened(Loader(PipelineBuilder((self,), (batch_size,), options), options))

    def save(
        self,
        url: str | os.PathLike[str],
        *,
        share: Share = "link",
        replace: bool = False,
        storage_options: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> int:
        """Make a store of these trajectories, without decoding a step.

        Args:
            url: Where, as for ``trajstore.open``.
            share: ``"link"``: a store of its own, whose segments are hard-linked on one disk, copied by the server within
                one bucket, else copied here. ``"copy"``: always bytes of its own. ``"reference"``: it refers to the segments
                where they are, which must stay.
            replace: Of a store that is there, make a new version that holds these trajectories only.
            storage_options: For that place.
            progress: Show bytes copied on standard error.

        Returns:
            Its version.

        Raises:
            StoreExistsError: A store is there, and ``replace`` is false.
            SelectionError: Some trajectories are not yet committed.
        """
        if share not in ("link", "copy", "reference"):
            raise SelectionError(f"share={share!r}, expected 'link', 'copy' or 'reference'")
        target = connect(url, storage_options=storage_options)
        try:
            combined = combine(
                [self.source()], target, share=share, instead=replace, operation="save", progress=progress
            )
        finally:
            target.close()
        return combined.version.number

    def source(self) -> Source:
        """These trajectories as a part of another store; for edits."""
        self._access.check_open()
        return Source(self._selection, self._access.filesystem, self._access.store_uuid, self._access.bases)

    def supply(self, options: LoaderOptions) -> Supply:
        """What the windows of this view are gathered with; for loaders."""
        self._access.check_open()
        private = options.cache_bytes is not None or options.cache_device is not None
        cache = self._access.cache
        selection = self._selection
        if private:
            cache = self._access.private_cache(options.cache_bytes, options.cache_device)
            selection = selection.committed()
            if len(selection) < len(self) and not options.follow:
                raise SelectionError(
                    f"{len(self) - len(selection)} of {len(self)} trajectories are not yet committed, and only the store's "
                    "own cache has them: flush() and take the view again, or leave out cache_bytes= and cache_device="
                )
        follows = self._follows

        def latest(refresh: bool) -> Selection:
            assert follows is not None
            found = follows.view(refresh)._selection
            return found.committed() if private else found

        return Supply(
            selection,
            cache,
            self._access.readers,
            self.read,
            latest if follows is not None else None,
        )

    def closes(self, loader: Loader) -> Loader:
        """Have a loader closed with the store's handle; for mixes."""
        return self._access.opened(loader)

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


def _fresh_seed() -> int:
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])


def _concatenate(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return torch.cat(parts)  # bfloat16
