"""Numbers that describe many values, gathered from parts of them.

Invariant: parts may be measured in any thread, and are added in their order, so that the result depends on the values and
their order alone; what has at most 16 bits is counted value by value, exactly.

Moments of parts are combined as in Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance: Analysis and
Recommendations" (The American Statistician 37(3), 1983), eq. 2.1, on differences from the first value: a column that is
constant has a deviation of 0 whatever its value, and large offsets (time stamps) cost no digits.

Quantiles of wider values come from rows drawn at random without replacement, known before the first is read. This is
simpler, more exact in the tails and the same each time, where sketches (KLL: 0.7 % of the rank at 2 KB, at a fiftieth of the
speed) are not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.deferred import torch
from trajstore.format.statistics import ColumnStatistics, extremes_dtype
from trajstore.schema import Column
from trajstore.stored import Array

MAX_ENTRIES = 1024
MAX_CHANNELS = 4
SAMPLED = 1 << 16
SAMPLE_BYTES = 64 << 20
_MAX_BINS = 1 << 21  # 16 MiB
_BLOCK_VALUES = 1 << 16  # that fit a processor's cache as float64
_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Reduction:
    """Which values of a step are taken together.

    A step's values in row-major order are ``(before, entries, after)``; those of one entry are taken together.
    """

    before: int
    entries: int
    after: int
    shape: tuple[int, ...]  # of the result, which broadcasts against a step

    @property
    def together(self) -> int:
        """Values of a step that one entry gets."""
        return self.before * self.after


def reduction_of(shape: tuple[int, ...]) -> Reduction:
    """Each value of a step apart, if these are few; else each channel, if there is such a dimension; else all together.

    Examples:
        >>> reduction_of((7,)).shape, reduction_of((64, 64, 3)).shape, reduction_of((3, 64, 64)).shape
        ((7,), (1, 1, 3), (3, 1, 1))
        >>> reduction_of((84, 84)).shape
        (1, 1)
    """
    size, ones = math.prod(shape), (1,) * (len(shape) - 1)
    if size <= MAX_ENTRIES:
        return Reduction(1, size, 1, shape)
    if shape[-1] <= MAX_CHANNELS:
        return Reduction(size // shape[-1], shape[-1], 1, (*ones, shape[-1]))
    if shape[0] <= MAX_CHANNELS:
        return Reduction(1, shape[0], size // shape[0], (shape[0], *ones))
    return Reduction(size, 1, 1, (1, *ones))


def is_measured(column: Column) -> bool:
    """Whether a column has statistics: bools, integers and floating-point numbers of fixed shape."""
    return not column.is_variable and (column.dtype == "bool" or column.dtype.startswith(("int", "uint", *_FLOATS)))


def is_floating(column: Column) -> bool:
    """Whether a column holds floating-point numbers of fixed shape."""
    return not column.is_variable and column.dtype in _FLOATS


class Accumulator(ABC):
    """Gathers the statistics of one column.

    Args:
        column: The column.
        quantiles: Fractions.
    """

    def __init__(self, column: Column, quantiles: Sequence[float]) -> None:
        self.column = column
        self.reduction = reduction_of(column.shape)
        self.quantiles = tuple(quantiles)

    @abstractmethod
    def begin(self, rows: Array) -> None:
        """Learn of the first rows; before anything is measured."""

    @abstractmethod
    def measure(self, rows: Array, first: int) -> Any:
        """What a part holds. Called by several threads.

        Args:
            rows: ``(n, *shape)`` stored bits, C-contiguous.
            first: Number of the first among all rows.
        """

    @abstractmethod
    def add(self, part: Any) -> None:
        """Add what was measured; in the order of the rows."""

    @abstractmethod
    def result(self) -> ColumnStatistics:
        """Of all that was added."""

    def _made(self, *, sampled: int, quantiles: Array, **arrays: Array) -> ColumnStatistics:
        """From arrays ``(entries,)`` and ``(quantiles, entries)``."""
        ends = extremes_dtype(self.column.dtype)
        shape = self.reduction.shape
        finite = {
            name: np.where(np.isfinite(arrays[name]), arrays[name], np.nan).reshape(shape) for name in ("mean", "std")
        }
        return ColumnStatistics(
            self.column.path,
            self.column.dtype,
            self.column.shape,
            arrays["count"].astype(np.int64).reshape(shape),
            arrays["nan_count"].astype(np.int64).reshape(shape),
            finite["mean"],
            finite["std"],
            arrays["min"].astype(ends).reshape(shape),
            arrays["max"].astype(ends).reshape(shape),
            {q: quantiles[i].reshape(shape) for i, q in enumerate(self.quantiles)},
            sampled,
        )


def accumulator(column: Column, quantiles: Sequence[float], rows: int) -> Accumulator:
    """For a column of so many rows."""
    narrow = column.physical_dtype.itemsize <= 2
    if narrow and reduction_of(column.shape).entries << (8 * column.physical_dtype.itemsize) <= _MAX_BINS:
        return Histogram(column, quantiles)
    return Moments(column, quantiles, rows)


class Histogram(Accumulator):
    """Counts each value of a column of at most 16 bits."""

    def __init__(self, column: Column, quantiles: Sequence[float]) -> None:
        super().__init__(column, quantiles)
        bits = 8 * column.physical_dtype.itemsize
        codes = np.arange(1 << bits).astype(np.uint8 if bits == 8 else np.uint16)
        values: Array
        if column.dtype == "bfloat16":
            values = (codes.astype(np.uint32) << 16).view(np.float32)
        else:
            values = codes if column.dtype == "bool" else codes.view(column.physical_dtype)
        with np.errstate(invalid="ignore"):  # signalling NaNs are among them
            self._values = values.astype(np.float64)
        self._counts = np.zeros((self.reduction.entries, 1 << bits), np.int64)

    def begin(self, rows: Array) -> None:
        """Nothing to learn."""

    def measure(self, rows: Array, first: int) -> Array:  # noqa: ARG002 - all are counted
        """``(entries, bins)`` int64."""
        entries, bins = self._counts.shape
        codes = torch.from_numpy(
            rows.view(np.uint8 if bins == 256 else np.uint16).reshape(-1, entries, self.reduction.after)
        )
        if bins > 256:
            codes = codes.to(torch.int32)
        if entries <= MAX_CHANNELS:
            return np.stack([torch.bincount(codes[:, n].reshape(-1), minlength=bins).numpy() for n in range(entries)])
        offsets = torch.arange(entries, dtype=torch.int32)[:, None] * bins
        counts = torch.bincount((codes.to(torch.int32) + offsets).reshape(-1), minlength=entries * bins)
        return counts.numpy().reshape(entries, bins)

    def add(self, part: Array) -> None:
        """Add counts."""
        self._counts += part

    def result(self) -> ColumnStatistics:
        """Exact but for the last rounding."""
        finite = np.isfinite(self._values)
        order = np.argsort(self._values[finite], kind="stable")
        values, counts = self._values[finite][order], self._counts[:, finite][:, order]
        count = counts.sum(axis=1)
        some = np.maximum(count, 1)
        # Products of 16-bit values and counts up to 2**37 add up without rounding.
        mean = np.where(count > 0, counts @ values / some, np.nan)
        std = np.sqrt([c @ (values - m) ** 2 for c, m in zip(counts, mean, strict=True)] / some)
        ends = np.cumsum(counts, axis=1)
        quantiles = np.full((len(self.quantiles), len(count)), np.nan)
        low, high = np.full(len(count), np.nan), np.full(len(count), np.nan)
        for entry in np.flatnonzero(count):
            ranks = np.array(self.quantiles) * (count[entry] - 1)
            below = np.floor(ranks)
            at = [values[np.searchsorted(ends[entry], r, side="right")] for r in (below, np.ceil(ranks))]
            quantiles[:, entry] = at[0] + (at[1] - at[0]) * (ranks - below)
            present = np.flatnonzero(counts[entry])
            low[entry], high[entry] = values[present[0]], values[present[-1]]
        nan_count = self._counts[:, ~finite].sum(axis=1)
        return self._made(
            count=count, nan_count=nan_count, mean=mean, std=std, min=low, max=high, quantiles=quantiles, sampled=0
        )


@dataclass(frozen=True, eq=False)
class Part:
    """Moments of some values, ``(entries,)`` each."""

    count: Array  # int64, finite ones
    nan_count: Array  # int64
    mean: Array  # float64, of differences from the first value
    squares: Array  # float64, sum of squared differences from the mean
    min: Array  # in the column's dtype
    max: Array

    def joined(self, other: Part) -> Part:
        """Of both together."""
        count = self.count + other.count
        some = np.maximum(count, 1)
        between = other.mean - self.mean
        return Part(
            count,
            self.nan_count + other.nan_count,
            self.mean + between * (other.count / some),
            self.squares + other.squares + between**2 * (self.count * (other.count / some)),
            np.minimum(self.min, other.min),
            np.maximum(self.max, other.max),
        )


class Moments(Accumulator):
    """Gathers moments of wide values, and values to take quantiles from.

    Args:
        column: The column.
        quantiles: Fractions.
        rows: How many there will be.
        sample: Values per entry, at most, that quantiles are taken from.
    """

    def __init__(self, column: Column, quantiles: Sequence[float], rows: int, *, sample: int = SAMPLED) -> None:
        super().__init__(column, quantiles)
        entries, together = self.reduction.entries, self.reduction.together
        self._dtype = np.dtype(np.float32) if column.dtype == "bfloat16" else column.physical_dtype
        self._floating = self._dtype.kind == "f"
        if self._dtype == np.bool_:
            self._dtype = np.dtype(np.uint8)
        self._first = np.zeros((entries, 1), self._dtype)
        self._total: Part | None = None
        values = rows * together
        kept = min(values, sample, max(SAMPLE_BYTES // (entries * self._dtype.itemsize), 1)) if quantiles else 0
        self._sampled = kept if kept < values and quantiles else 0
        # Numbers of the values that are kept, ascending. The same rows each time: a result can be measured again.
        self._drawn: Array = np.arange(kept)
        if self._sampled:
            self._drawn = np.sort(np.random.default_rng(0).choice(values, kept, replace=False, shuffle=False))
        self._kept = np.empty((kept, entries), self._dtype)

    def begin(self, rows: Array) -> None:
        """Differences are taken from the first row."""
        first = self._numbers(rows[:1]).reshape(-1, self.reduction.entries, self.reduction.after)[0, :, :1]
        self._first = np.where(np.isfinite(first), first, 0).astype(self._dtype)

    def measure(self, rows: Array, first: int) -> Part:
        """Moments of the rows; those that were drawn are kept."""
        numbers = self._numbers(rows)
        self._keep(numbers, first)
        values = numbers.reshape(-1, self.reduction.entries, self.reduction.after)
        step = max(_BLOCK_VALUES // (values.shape[1] * values.shape[2]), 1)
        total: Part | None = None
        for start in range(0, len(values), step):
            part = self._moments(values[start : start + step])
            total = part if total is None else total.joined(part)
        assert total is not None
        return total

    def add(self, part: Part) -> None:
        """Combine moments."""
        with np.errstate(all="ignore"):
            self._total = part if self._total is None else self._total.joined(part)

    def result(self) -> ColumnStatistics:
        """Moments of all, quantiles of those that were kept."""
        total = self._total
        assert total is not None
        some = np.maximum(total.count, 1)
        present = total.count > 0
        with np.errstate(all="ignore"):
            mean = np.where(present, self._first[:, 0].astype(np.float64) + total.mean, np.nan)
            std = np.where(present, np.sqrt(total.squares / some), np.nan)
        low, high = (np.where(present, e, np.nan) if self._floating else e for e in (total.min, total.max))
        return self._made(
            count=total.count,
            nan_count=total.nan_count,
            mean=np.clip(mean, low, high),  # the last rounding may lead outside
            std=std,
            min=low,
            max=high,
            quantiles=self._quantiles(low.astype(np.float64), high.astype(np.float64)),
            sampled=self._sampled,
        )

    def _numbers(self, rows: Array) -> Array:
        if self.column.dtype == "bfloat16":
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.view(np.uint8) if rows.dtype == np.bool_ else rows

    def _keep(self, numbers: Array, first: int) -> None:
        together, after = self.reduction.together, self.reduction.after
        bounds = np.array([first, first + len(numbers)]) * together
        lo, hi = np.searchsorted(self._drawn, bounds).tolist()
        if lo < hi:
            row, place = np.divmod(self._drawn[lo:hi] - bounds[0], together)
            cells = numbers.reshape(-1, self.reduction.before, self.reduction.entries, after)
            self._kept[lo:hi] = cells[row, place // after, :, place % after]

    def _moments(self, values: Array) -> Part:
        """Of ``(n, entries, after)``."""
        together = values.shape[0] * values.shape[2]
        with np.errstate(all="ignore"):
            away = self._differences(values)
            finite = np.isfinite(values) if self._floating else None
            if finite is None or finite.all():
                count = np.full(values.shape[1], together)
                low, high = values.min(axis=(0, 2)), values.max(axis=(0, 2))
                mean = away.sum(axis=(0, 2)) / together
                away -= mean[:, None]
            else:
                count = finite.sum(axis=(0, 2))
                low = np.where(finite, values, np.inf).min(axis=(0, 2))
                high = np.where(finite, values, -np.inf).max(axis=(0, 2))
                mean = np.where(finite, away, 0).sum(axis=(0, 2)) / np.maximum(count, 1)
                away = np.where(finite, away - mean[:, None], 0)
            squares = np.square(away, out=away).sum(axis=(0, 2))
        return Part(count, together - count, mean, squares, low, high)

    def _differences(self, values: Array) -> Array:
        """From the first, float64; of integers rounded once."""
        if self._floating or values.dtype.itemsize < 8:
            wide = np.float64 if self._floating else np.int64
            return (values.astype(wide) - self._first.astype(wide)).astype(np.float64)
        ours, first = values.view(np.uint64), self._first.view(np.uint64)  # differences modulo 2**64
        below = values < self._first
        return np.where(below, -(first - ours).astype(np.float64), (ours - first).astype(np.float64))

    def _quantiles(self, low: Array, high: Array) -> Array:
        """``(quantiles, entries)``; those at 0 and 1 are the extremes."""
        found = np.full((len(self.quantiles), self._kept.shape[1]), np.nan)
        for entry in range(found.shape[1] if self.quantiles else 0):
            values = self._kept[:, entry]
            values = values[np.isfinite(values)].astype(np.float64)
            if len(values):
                with np.errstate(all="ignore"):
                    found[:, entry] = np.quantile(values, self.quantiles)
        for n, q in enumerate(self.quantiles):
            if q in (0, 1):
                found[n] = high if q else low
        return found
