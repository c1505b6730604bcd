"""Statistics of the columns of a view, and the document that keeps those of a version.

Invariant: numbers that were kept are those that were measured, bit for bit; a document says by hash of which snapshot it is,
and one that does not fit is no answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from trajstore.errors import CorruptionError, SelectionError, UnknownColumnError
from trajstore.format.document import seal, unseal
from trajstore.format.layout import FORMAT_VERSION
from trajstore.format.schemas import validate
from trajstore.stored import Array

_POOLED_ABOVE = 16  # values of a column that are one row each in a table; more are pooled into one


@dataclass(frozen=True, eq=False)
class ColumnStatistics:
    """Statistics of one column, or of one number per trajectory.

    Arrays have the shape ``reduced``, which broadcasts against one step's value: the column's own shape, or 1 in the
    dimensions over which values were taken together.

    Attributes:
        path: Name.
        dtype: Of the column.
        shape: Of one step's value.
        count: int64, finite values.
        nan_count: int64, values that are NaN or infinite; they enter nothing else.
        mean: float64; NaN if there is no finite value.
        std: float64, of the population (divided by ``count``); NaN if there is no finite value.
        min: Of integers in the column's dtype, of bools uint8, else float64.
        max: As ``min``.
        quantiles: Fraction -> float64, by linear interpolation between neighbours, as ``numpy.quantile`` does.
        sampled: Values, of each entry of the arrays, that the quantiles were taken from; 0 if from all of them. The rank of
            quantile ``q`` then has the standard error ``sqrt(q * (1 - q) / sampled)``.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    count: Array
    nan_count: Array
    mean: Array
    std: Array
    min: Array
    max: Array
    quantiles: Mapping[float, Array]
    sampled: int = 0

    @property
    def reduced(self) -> tuple[int, ...]:
        """Shape of the arrays."""
        shape: tuple[int, ...] = self.mean.shape
        return shape

    def quantile(self, q: float) -> Array:
        """One of the quantiles that were asked for.

        Raises:
            SelectionError: Another one.
        """
        if q not in self.quantiles:
            known = ", ".join(map(str, self.quantiles)) or "none"
            raise SelectionError(
                f"quantile {q} of {self.path!r} was not asked for; there are {known}: statistics(quantiles=...)"
            )
        return self.quantiles[q]

    def with_quantiles(self, quantiles: Iterable[float]) -> ColumnStatistics:
        """Only these."""
        return replace(self, quantiles={q: self.quantile(q) for q in quantiles})

    def pooled(self) -> ColumnStatistics:
        """All entries taken together as values of one thing; quantiles cannot be, and are left out."""
        count = self.count.sum()
        weights = self.count / max(int(count), 1)
        known = self.count > 0
        nothing = not known.any()
        mean = np.nan if nothing else np.sum((self.mean * weights)[known])
        spread = np.nan if nothing else np.sum(((self.std**2 + (self.mean - mean) ** 2) * weights)[known])
        return replace(
            self,
            count=np.asarray(count),
            nan_count=np.asarray(self.nan_count.sum()),
            mean=np.asarray(mean),
            std=np.asarray(np.sqrt(spread)),
            min=np.asarray(np.nan if nothing else self.min[known].min()),
            max=np.asarray(np.nan if nothing else self.max[known].max()),
            quantiles={},
        )

    def to_json(self) -> dict[str, Any]:
        """As a member of a document: arrays flat, in row-major order; NaN is null."""
        return {
            "path": self.path,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "reduced": list(self.reduced),
            **{name: _plain(getattr(self, name)) for name in ("count", "nan_count", "mean", "std", "min", "max")},
            "quantiles": [[q, _plain(values)] for q, values in self.quantiles.items()],
            "sampled": self.sampled,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ColumnStatistics:
        """The inverse of ``to_json``."""
        reduced = tuple(document["reduced"])
        ends = extremes_dtype(document["dtype"])
        kinds = {
            "count": np.int64,
            "nan_count": np.int64,
            "mean": np.float64,
            "std": np.float64,
            "min": ends,
            "max": ends,
        }
        return cls(
            document["path"],
            document["dtype"],
            tuple(document["shape"]),
            **{name: _array(document[name], kind, reduced) for name, kind in kinds.items()},
            quantiles={float(q): _array(values, np.float64, reduced) for q, values in document["quantiles"]},
            sampled=document["sampled"],
        )


@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, ColumnStatistics]):
    """Statistics of a view: a mapping from columns, and numbers about whole trajectories.

    Attributes:
        columns: By name.
        length: Of the trajectories' lengths, in steps.
        reward_sum: Of their undiscounted returns; ``nan_count`` counts those that have none.
        trajectories: Of the view.
        steps: Of the view.
        version: Of the store.

    Examples:
        >>> import numpy as np, trajstore
        >>> with trajstore.open("memory://docs/statistics", mode="a") as store:
        ...     _ = store.append({"obs": np.array([[0.0, 1.0], [2.0, 1.0]]), "action": np.array([1, 3])})
        ...     store.flush()
        ...     stats = store.trajectories.statistics(quantiles=[0.5])
        >>> stats["obs"].mean, stats["obs"].std
        (array([1., 1.]), array([1., 0.]))
        >>> print(stats.to_pandas()[["count", "mean", "min", "max", "q0.5"]].rename_axis(None))
                count  mean  min  max  q0.5
        length      1   2.0  2.0  2.0   2.0
        obs[0]      2   1.0  0.0  2.0   1.0
        obs[1]      2   1.0  1.0  1.0   1.0
        action      2   2.0  1.0  3.0   2.0
    """

    columns: Mapping[str, ColumnStatistics]
    length: ColumnStatistics
    reward_sum: ColumnStatistics
    trajectories: int
    steps: int
    version: int

    def __getitem__(self, path: str) -> ColumnStatistics:
        try:
            return self.columns[path]
        except KeyError:
            raise UnknownColumnError(
                f"no statistics of column {path!r}; there are those of {', '.join(map(repr, self.columns)) or 'none'}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def __contains__(self, path: object) -> bool:
        return path in self.columns

    def __repr__(self) -> str:
        return (
            f"Statistics(version={self.version}, trajectories={self.trajectories}, steps={self.steps}, "
            f"columns={list(self.columns)})"
        )

    def to_pandas(self, *, elements: bool | None = None) -> pd.DataFrame:
        """A table to look at: one row per entry of each column, after lengths and returns.

        Args:
            elements: Show each entry; False to take those of a column together, in one row that has no quantiles; by
                default only where there are more than 16.

        Returns:
            Indexed by ``column``: ``obs/state[3]`` is an entry; columns ``count``, ``nan_count``, ``mean``, ``std``,
            ``min``, one for each quantile, ``max``. The ends are float64, or int64 if all are integers; objects if there
            are integers among them that float64 cannot hold.
        """
        of_trajectories = [self.length] + ([self.reward_sum] if int(self.reward_sum.count) else [])
        parts = [*of_trajectories, *self.columns.values()]
        asked = list(dict.fromkeys(q for part in parts for q in part.quantiles))
        names: list[str] = []
        rows: list[list[Any]] = []
        for part in parts:
            single = part.mean.size > _POOLED_ABOVE if elements is None else not elements
            shown = part.pooled() if single and part.mean.size > 1 else part
            for place in np.ndindex(shown.reduced):
                varying = [str(i) for i, n in zip(place, shown.reduced, strict=True) if n > 1]
                names.append(f"{part.path}[{', '.join(varying)}]" if varying else part.path)
                between = [float(shown.quantiles[q][place]) if q in shown.quantiles else np.nan for q in asked]
                ends = [
                    getattr(shown, name)[place].item() for name in ("count", "nan_count", "mean", "std", "min", "max")
                ]
                rows.append([*ends[:5], *between, ends[5]])
        columns = ["count", "nan_count", "mean", "std", "min", *(f"q{q:g}" for q in asked), "max"]
        frame = pd.DataFrame(rows, columns=columns, index=pd.Index(names, name="column"))
        for name in ("min", "max"):
            values = [row[columns.index(name)] for row in rows]
            if any(isinstance(value, int) and int(float(value)) != value for value in values):  # float64 would round it
                frame[name] = pd.Series(values, index=frame.index, dtype=object)
        return frame

    def to_json(self) -> dict[str, Any]:
        """As plain values, for ``json.dumps``; NaN is null."""
        return {
            "version": self.version,
            "trajectories": self.trajectories,
            "steps": self.steps,
            "length": self.length.to_json(),
            "reward_sum": self.reward_sum.to_json(),
            "columns": [column.to_json() for column in self.columns.values()],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Statistics:
        """The inverse of ``to_json``."""
        columns = [ColumnStatistics.from_json(column) for column in document["columns"]]
        return cls(
            {column.path: column for column in columns},
            ColumnStatistics.from_json(document["length"]),
            ColumnStatistics.from_json(document["reward_sum"]),
            document["trajectories"],
            document["steps"],
            document["version"],
        )

    def to_bytes(self, *, snapshot_sha256: str) -> bytes:
        """The document that keeps these as the statistics of a whole version."""
        return seal({"format": FORMAT_VERSION, "snapshot_sha256": snapshot_sha256, **self.to_json()})

    @classmethod
    def from_bytes(cls, data: bytes, *, snapshot_sha256: str, key: str) -> Statistics:
        """Parse and check.

        Raises:
            CorruptionError: It is no such document, or one of another snapshot.
            FormatVersionError: It was written by a newer trajstore.
        """
        document = unseal(data, key=key)
        validate(json.loads(data), "statistics", key=key)
        if document["snapshot_sha256"] != snapshot_sha256:
            raise CorruptionError(f"{key} is of another snapshot; remove it, and it is measured anew")
        try:
            return cls.from_json(document)
        except (TypeError, ValueError, OverflowError) as error:
            raise CorruptionError(f"{key}: {error}; remove it, and it is measured anew") from error


def extremes_dtype(dtype: str) -> np.dtype[Any]:
    """The dtype of a column's minimum and maximum."""
    if dtype == "bool":
        return np.dtype(np.uint8)
    return np.dtype(dtype) if dtype.startswith(("int", "uint")) else np.dtype(np.float64)


def _plain(array: Array) -> list[int | float | None]:
    """Python numbers, which JSON writes so that they are read back the same."""
    return [None if isinstance(value, float) and math.isnan(value) else value for value in array.reshape(-1).tolist()]


def _array(values: list[Any], dtype: Any, shape: tuple[int, ...]) -> Array:
    return np.array([np.nan if value is None else value for value in values], dtype).reshape(shape)
