"""Windows of a selection, gathered from the page cache.

Invariant: no interpreter work per window. Rows are planned by array arithmetic, looked up once per group of columns that
share their pages, and copied by one ``index_select`` per column into memory that is used again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trajstore.errors import CorruptionError, SchemaConflictError
from trajstore.feed.fields import field_dtype, trajectory_values
from trajstore.feed.layout import Target, Value, torch_dtype
from trajstore.feed.windows import Lookup, Rows, WindowPlan, Windows
from trajstore.read.arena import Need, group_name
from trajstore.read.cache import PageCache
from trajstore.read.extents import extent_rows
from trajstore.read.leases import Demand, DoesNotFitError, Reservation
from trajstore.read.segment import SegmentReaders
from trajstore.read.selection import Selection
from trajstore.read.table import TrajectoryTable
from trajstore.sample.window import Output, WindowSpec
from trajstore.schema import Column, Schema
from trajstore.stored import Array, ragged_values, to_user

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PARALLEL_BYTES = 4 << 20
_NONE = np.empty(0, np.int64)


class Gatherer:
    """Gathers windows of one selection.

    Args:
        selection: The trajectories.
        spec: What a window holds.
        cache: Where pages are kept.
        readers: Page indexes, for columns of variable size.
        source: Position of the view in a mix.
    """

    def __init__(
        self,
        selection: Selection,
        spec: WindowSpec,
        cache: PageCache,
        readers: SegmentReaders,
        *,
        source: int = 0,
    ) -> None:
        self.selection = selection
        self._source = source
        self.spec = spec
        self._cache = cache
        self._readers = readers
        self._stored = [o for o in spec.outputs if isinstance(o.source, Column) and not o.source.is_variable]
        self._texts = [o for o in spec.outputs if isinstance(o.source, Column) and o.source.is_variable]
        self._fields = [o for o in spec.outputs if isinstance(o.source, str)]
        self._per_trajectory = {o.name: trajectory_values(str(o.source), selection) for o in self._fields}
        table = selection.table
        self.segments = cache.number_segments(table.segments)  # (segments,) int64, the cache's numbers
        self._check_places(selection.rows)
        self._check_reach()
        self._numbers: Array | None = None  # of trajectories, where these are not their positions
        if self._texts:
            cache.variable_pages()  # they take their part before the rest is divided
        self._reservation = self._reserve()
        weakref.finalize(self, self._reservation.release).atexit = False  # of what nobody closed
        self._terminated = selection.terminated if spec.n_step is not None else None
        self.stored_values = tuple(self._value(o, torch_dtype(o.source)) for o in self._stored)  # type: ignore[arg-type]
        self.computed_values = tuple(self._computed_values())
        # Plain windows of stored columns need not know how long their trajectories are.
        self._needs_lengths = bool(self.computed_values) or any(o.future is not None for o in spec.outputs)

    def close(self) -> None:
        """The cache need not keep its arenas for this any longer. May be called twice."""
        self._reservation.release()

    @property
    def objects(self) -> bool:
        """Whether a batch holds what is no tensor: texts or ragged lists."""
        return bool(self._texts) or any(self._per_trajectory[o.name].dtype == object for o in self._fields)

    @property
    def row_bytes(self) -> int:
        """Bytes of one step of all stored columns that are read."""
        return sum({c.path: c.row_bytes for o in self._stored if isinstance(c := o.source, Column)}.values())

    @property
    def device(self) -> torch.device:
        """Where rows are gathered."""
        return self._cache.device

    def warm(self, windows: Windows) -> bool:
        """Have the pages of windows read, as far as they fit; they are gathered soon. Whether they were counted."""
        windows.plan = self._plan(windows)
        lookups = windows.plan.lookups
        try:
            if lookups:
                self._cache.acquire([Demand(k.group, k.segments, k.pages) for k in lookups]).release()
        except DoesNotFitError:
            return False  # they are read when they are gathered, in parts
        return True

    def gather(
        self,
        windows: Windows,
        stored: Target,
        computed: Target,
        first: int,
        *,
        warmed: bool = False,
        on_resident: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Fill windows ``first`` to ``first + len(windows)`` of a batch.

        Args:
            windows: Which.
            warmed: Whether ``warm`` has counted their look-ups.
            stored: For ``stored_values``, on ``device``.
            computed: For ``computed_values``, in main memory.
            first: Where they begin.
            on_resident: Called when the pages of all windows are there, and stay until they are copied.

        Returns:
            What is no tensor: object arrays, and pairs of values and offsets for ragged columns.
        """
        plan = windows.plan or self._plan(windows)
        rows, table_rows, lookups = plan.rows, plan.table_rows, plan.lookups
        if self.computed_values:
            self._compute(windows, rows, plan.lengths, computed, first)
        if lookups:
            self._copy(lookups, stored, first, 0, len(windows), counted=warmed, on_resident=on_resident)
        if self.spec.pad == "zero":
            for output in self._stored:
                outside = rows[output.key].outside
                if outside is not None and outside.any():
                    mask = torch.from_numpy(outside.reshape(-1)).to(self.device)
                    stored.rows(output, first, first + len(windows))[mask] = 0
        return self._objects(windows, rows, table_rows)

    def check_types(self, schema: Schema) -> None:
        """Raise ``SchemaConflictError`` if a column has another type than before: the store was cleared meanwhile."""
        if not self._cache.admits(schema):
            raise SchemaConflictError(
                "the store was cleared, and columns of the same name have other types now; make a new loader"
            )

    def number_segments(self, table: TrajectoryTable) -> Array:
        """The cache's numbers of a newer table's segments, ``(segments,)`` int64."""
        known = len(self.segments)
        growth = self.selection.table.growth
        if growth is not None and table.growth is growth:
            if len(table.segments) == known:
                return self.segments
            return np.concatenate([self.segments, self._cache.number_segments(table.segments[known:])])
        return self._cache.number_segments(table.segments)

    def follow(self, selection: Selection, numbers: Array | None, *, extended: bool) -> None:
        """Gather from a newer view.

        Args:
            selection: The view.
            numbers: What ``trajectory`` calls its trajectories; None for their positions.
            extended: Whether it is the view before and further trajectories.
        """
        before = len(self.selection) if extended else 0
        self.segments = self.number_segments(selection.table)
        self.selection, self._numbers = selection, numbers
        fresh = Selection(selection.table, selection.rows[before:]) if extended else selection
        if not len(fresh):
            return
        if not extended:  # what this handle appended itself lies where it says
            self._check_places(fresh.rows)
        for output in self._fields:
            values = trajectory_values(str(output.source), fresh)
            kept = self._per_trajectory[output.name]
            self._per_trajectory[output.name] = np.concatenate([kept, values]) if extended else values
        if self._terminated is not None:
            self._terminated = np.concatenate([self._terminated, fresh.terminated]) if extended else fresh.terminated

    # Planning

    def _plan(self, windows: Windows) -> WindowPlan:
        table_rows = self.selection.rows[windows.trajectories]
        lengths = self.selection.table.length[table_rows] if self._needs_lengths else _NONE
        rows = self._rows(windows, lengths)
        return WindowPlan(table_rows, lengths, rows, self._lookups(rows, table_rows))

    def _rows(self, windows: Windows, lengths: Array) -> dict[Any, Rows]:
        planned: dict[Any, Rows] = {}
        for output in self.spec.outputs:
            key = output.key
            if key not in planned:
                planned[key] = self._relative(output, windows, lengths)
        return planned

    def _relative(self, output: Output, windows: Windows, lengths: Array) -> Rows:
        if output.future is not None:
            ahead = lengths + output.extra - 1 - windows.steps
            jump = output.future.draw(ahead, windows.uniforms[output.name])
            return Rows((windows.steps + jump)[:, None], None)
        base = windows.steps
        returns = self.spec.n_step
        if output.bootstrap and returns is not None:
            base = base + np.minimum(returns.steps, lengths - windows.steps)
        relative = base[:, None] + output.offsets
        is_reward = returns is not None and output.name == "reward"
        if self.spec.pad == "none" and not output.bootstrap and not is_reward:
            return Rows(relative, None)
        last = (lengths + (output.extra - 1))[:, None]
        outside = (relative < 0) | (relative > last)
        return Rows(np.clip(relative, 0, last), None if is_reward or self.spec.pad == "none" else outside)

    def _lookups(self, rows: Mapping[Any, Rows], table_rows: Array) -> list[Lookup]:
        table = self.selection.table
        segments = self.segments[table.segment[table_rows]]
        starts = table.start[table_rows]
        found: dict[Any, Lookup] = {}
        for output in self._stored:
            assert isinstance(output.source, Column)
            group = self._cache.group(group_name(output.source))
            key = (group.name, output.key)
            if key in found:
                found[key].outputs.append(output)
                continue
            unknown = group.base[segments] < 0
            if unknown.any():
                self._cache.open_segments(segments[unknown])
                group = self._cache.group(group.name)
                if (group.base[segments] < 0).any():
                    raise CorruptionError(
                        f"column {output.source.path!r} is missing from the page index of a segment whose manifest names it"
                    )
            first = starts + table.ordinal[table_rows] if output.extra else starts
            absolute = rows[output.key].relative + first[:, None]
            if group.common_shift is not None and group.common_shift >= 0:
                pages = absolute >> group.common_shift
                absolute &= (1 << group.common_shift) - 1
            else:
                pages = absolute >> group.shift[segments][:, None]
                absolute &= group.mask[segments][:, None]
            found[key] = Lookup(group, segments, pages, absolute, [output])
        return list(found.values())

    # Copying

    def _copy(
        self,
        lookups: Sequence[Lookup],
        target: Target,
        first: int,
        lo: int,
        hi: int,
        *,
        counted: bool = False,
        on_resident: Callable[[], None] | None = None,
    ) -> None:
        """Copy windows ``[lo, hi)``, in halves if their pages do not fit into the cache at once."""
        demands = [Demand(k.group, k.segments[lo:hi], k.pages[lo:hi]) for k in lookups]
        try:
            lease = self._cache.acquire(demands, counted=counted)
        except DoesNotFitError:
            if hi - lo > 1:
                middle = (lo + hi) // 2
                self._copy(lookups, target, first, lo, middle, counted=True)
                self._copy(lookups, target, first, middle, hi, counted=True)
                return
            lease = self._cache.acquire(demands, alone=True, counted=True)
        try:  # not ``with``, which Ctrl-C can enter without leaving
            if on_resident is not None:
                on_resident()
            for lookup, begins in zip(lookups, lease.starts, strict=True):
                begins += lookup.inside[lo:hi]
                index = torch.from_numpy(begins.reshape(-1)).to(self.device)
                for output in lookup.outputs:
                    assert isinstance(output.source, Column)
                    _select(lookup.group.arenas[output.source.path], index, target.rows(output, first + lo, first + hi))
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # until then the pages must stay
        finally:
            lease.release()

    # What is computed rather than copied

    def _value(self, output: Output, dtype: torch.dtype, name: str | None = None) -> Value:
        time = () if output.squeezed else (len(output.offsets),)
        inner = output.source.shape if isinstance(output.source, Column) and name is None else ()
        return Value(name or output.name, dtype, (*time, *inner))

    def _computed_values(self) -> list[Value]:
        values = [
            self._value(output, field_dtype(str(output.source), self.selection.schema))
            for output in self._fields
            if self._per_trajectory[output.name].dtype != object
        ]
        values += [self._value(output, torch.bool, name) for name, output in self._pad_masks().items()]
        if self.spec.n_step is not None:
            values.append(Value("discount", torch.float32, ()))
            values.append(Value(REWARDS, torch.int64, ()))
        return values

    def _pad_masks(self) -> dict[str, Output]:
        """Names of the masks, and the outputs that they describe."""
        if self.spec.pad == "none":
            return {}
        if self.spec.by_column:
            return {f"is_pad/{o.name}": o for o in self.spec.outputs if o.future is None and not self._is_reward(o)}
        plain = next((o for o in self.spec.outputs if not (o.bootstrap or o.future or self._is_reward(o))), None)
        if plain is None:
            return {}
        offsets = plain.offsets - plain.offsets[0]
        return {"is_pad": Output("is_pad", "step", offsets, plain.squeezed)}

    def _is_reward(self, output: Output) -> bool:
        return self.spec.n_step is not None and output.name == "reward"

    def _compute(
        self, windows: Windows, rows: Mapping[Any, Rows], lengths: Array, computed: Target, first: int
    ) -> None:
        data = computed.data.numpy()

        def put(name: str, values: Array) -> None:
            target = computed.block.array(data, name)[first : first + len(windows)]
            target.reshape(-1).view(values.dtype).reshape(values.shape)[...] = values

        for output in self._fields:
            if self._per_trajectory[output.name].dtype == object:
                continue
            values = self._virtual(output, windows, rows[output.key], lengths)
            put(output.name, values)
        for name, output in self._pad_masks().items():
            planned = rows[output.key] if name != "is_pad" else self._relative(output, windows, lengths)
            outside = planned.outside
            put(name, np.zeros(planned.relative.shape, bool) if outside is None else outside)
        returns = self.spec.n_step
        if returns is not None:
            count = np.minimum(returns.steps, lengths - windows.steps)
            discount = np.power(returns.gamma, count, dtype=np.float64)
            assert self._terminated is not None
            discount[self._terminated[windows.trajectories] & (windows.steps + count == lengths)] = 0.0
            put("discount", discount.astype(np.float32))
            put(REWARDS, count)

    def _virtual(self, output: Output, windows: Windows, rows: Rows, lengths: Array) -> Array:
        """``(n, w)`` values of a virtual column or a metadata field."""
        name, steps = str(output.source), rows.relative
        if name in ("terminated", "truncated", "is_last", "is_first", "step"):
            values: Array = steps == 0 if name == "is_first" else steps
            if name in ("terminated", "truncated", "is_last"):
                values = steps == (lengths - 1)[:, None]
            if name in ("terminated", "truncated"):
                values = values & self._per_trajectory[output.name][windows.trajectories][:, None]
            if self.spec.pad == "zero" and rows.outside is not None:
                values = np.where(rows.outside, values.dtype.type(0), values)
            return values
        if name == "source":
            return np.full(steps.shape, self._source)
        of_window = windows.trajectories if self._numbers is None else self._numbers[windows.trajectories]
        if name != "trajectory":
            of_window = self._per_trajectory[output.name][windows.trajectories]
        values = np.broadcast_to(of_window[:, None], steps.shape)
        if name == "trajectory" and self.spec.pad == "zero" and rows.outside is not None:
            values = np.where(rows.outside, 0, values)
        return values

    # Texts and ragged lists

    def _objects(self, windows: Windows, rows: Mapping[Any, Rows], table_rows: Array) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for output in self._fields:
            per_trajectory = self._per_trajectory[output.name]
            if per_trajectory.dtype == object:
                shape = (len(windows), len(output.offsets))
                values = np.broadcast_to(per_trajectory[windows.trajectories][:, None], shape).copy()
                found[output.name] = values[:, 0] if output.squeezed else values
        for output in self._texts:
            found[output.name] = self._text(output, rows[output.key], table_rows)
        return found

    def _text(self, output: Output, rows: Rows, table_rows: Array) -> Any:
        column, table = output.source, self.selection.table
        assert isinstance(column, Column)
        first = table.start[table_rows] + (table.ordinal[table_rows] if column.extra else 0)
        absolute = rows.relative + first[:, None]
        segments = np.broadcast_to(table.segment[table_rows][:, None], absolute.shape)
        absent = np.zeros(absolute.shape, bool)
        if self.spec.pad == "zero" and rows.outside is not None:
            absent = rows.outside
        wanted, places, before = {}, np.empty(absolute.size, np.int64), 0
        for number in np.unique(segments).tolist():
            mine = np.flatnonzero(segments.reshape(-1) == number)
            reader = self._readers.open(table.segments[number], self.selection.schema)
            wanted[reader] = absolute.reshape(-1)[mine]
            places[mine] = np.arange(before, before + len(mine))
            before += len(mine)
        taken = self._cache.variable_pages().take(column, wanted, places, absent=absent.reshape(-1))
        if column.ragged:
            offsets = taken.offsets.to_numpy().astype(np.int64)
            values = ragged_values(column, taken)
            if isinstance(values, np.ndarray) and values.dtype.kind in "mM":
                values = values.view(np.int64)
            if isinstance(values, np.ndarray) and values.dtype != object:
                values = torch.from_numpy(np.ascontiguousarray(values))
            return values, torch.from_numpy(offsets - offsets[0])
        texts = to_user(column, taken).reshape(absolute.shape)
        return texts[:, 0] if output.squeezed else texts

    # Set-up

    def _check_places(self, rows: Array) -> None:
        """A manifest must not send anybody beyond the end of a segment."""
        table = self.selection.table
        numbers = table.segment[rows]
        if len(rows) < len(table.segments):
            chosen, numbers = np.unique(numbers, return_inverse=True)
        else:
            chosen = np.arange(len(table.segments))
        steps = np.fromiter((table.segments[n].steps for n in chosen.tolist()), np.int64, len(chosen))
        starts = table.start[rows]
        if (starts < 0).any() or (starts + table.length[rows] > steps[numbers]).any():
            raise CorruptionError("a manifest places trajectories outside their segment; restore it from a copy")

    def _check_reach(self) -> None:
        """Whoever would miss a store that some segment lies in hears of it now, and not in the middle of an epoch."""
        entries = (self.selection.table.segments[n] for n in self.selection.segments.tolist())
        for problem in self._readers.out_of_reach(entries).values():
            raise problem

    def _reserve(self) -> Reservation:
        pages: dict[str, int] = {}
        for output in self._stored:
            assert isinstance(output.source, Column)
            name = group_name(output.source)
            pages[name] = pages.get(name, 0) + self.spec.pages_per_window(output, self._page_rows(name))
        schema = self.selection.schema
        needs = {}
        for name, count in pages.items():
            columns = tuple(c for c in schema if not c.is_variable and group_name(c) == name)
            needs[name] = Need(columns, count, self._rows_in_extents(columns[0].extra, self._page_rows(name)))
        segments = self.segments[self.selection.segments]
        return self._cache.reserve(needs, segments, schema)

    def _rows_in_extents(self, extra: int, page_rows: int) -> int:
        """Rows that all segments of the selection take in an arena, about."""
        entries = [self.selection.table.segments[n] for n in self.selection.segments.tolist()]
        whole = [e.steps + (e.trajectories if extra else 0) for e in entries if e.pages_sha256]  # not what still grows
        return sum(extent_rows(n) if n <= page_rows else -(-n // page_rows) * extent_rows(page_rows) for n in whole)

    def _page_rows(self, name: str) -> int:
        """Rows of a group's pages in the longest segment."""
        table = self.selection.table
        longest = max(self.selection.segments.tolist(), key=lambda n: table.segments[n].steps)
        return self._readers.open(table.segments[longest], self.selection.schema).page_rows_of(name)


# Not for users: how many rewards each return has; the return is computed from it on the device.
REWARDS = "n_step rewards"


def _select(arena: torch.Tensor, index: torch.Tensor, target: torch.Tensor) -> None:
    """``target[i] = arena[index[i]]`` for rows of bytes."""
    width = arena.shape[1]
    integer = _INTEGERS.get(width)
    if integer is not None:  # one number per row: no copy of slices
        arena, target = arena.view(integer).view(-1), target.view(integer).view(-1)
    if arena.device.type == "cpu" and len(index) * width < _PARALLEL_BYTES:
        # One thread: where processors are shared, threads that wait for each other make a small copy twenty times slower.
        np.take(arena.numpy(), index.numpy(), axis=0, out=target.numpy(), mode="clip")
    else:
        torch.index_select(arena, 0, index, out=target)
