"""Columns of a batch brought to a common scale, where the batch is.

Invariant: what a column is normalized with is fixed when the loader is made, and goes with it to other processes; pages and
the cache hold what was stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from trajstore.errors import SelectionError
from trajstore.format.statistics import Statistics
from trajstore.read.accumulate import is_floating, is_measured
from trajstore.read.selection import Selection
from trajstore.sample.window import WindowSpec
from trajstore.schema import Column
from trajstore.stored import Array

EPS = 1e-8  # smallest scale: a constant column becomes 0

# True, or per column a name of a method or (mean, std).
Normalize: TypeAlias = "bool | Mapping[str, Any] | None"
Measure: TypeAlias = Callable[[Sequence[str]], Statistics]


@dataclass(frozen=True, eq=False)
class ColumnNormalization:
    """How one column is normalized: ``(x - center) / max(scale, 1e-8)``.

    Attributes:
        center: float64, broadcasts against a step's value.
        scale: float64, the same.
    """

    center: Array
    scale: Array

    def apply(self, values: Any) -> Any:
        """Normalized, float32.

        Args:
            values: ``[..., *shape]``, an array or a tensor of any device.

        Examples:
            >>> ColumnNormalization(np.array([1.0, 2.0]), np.array([2.0, 0.0])).apply(np.array([3, 2]))
            array([1., 0.], dtype=float32)
        """
        return self._mapped(values, lambda x, center, scale: (x - center) / scale)

    def undo(self, values: Any) -> Any:
        """What ``apply`` was given, float32: the action that a policy means.

        Args:
            values: ``[..., *shape]``, an array or a tensor of any device.
        """
        return self._mapped(values, lambda x, center, scale: x * scale + center)

    def _mapped(self, values: Any, function: Callable[[Any, Any, Any], Any]) -> Any:
        scale = np.maximum(self.scale, EPS)
        if isinstance(values, torch.Tensor):
            center, width = (torch.from_numpy(np.ascontiguousarray(a)).to(values.device) for a in (self.center, scale))
            return function(
                values.to(torch.float64), center.reshape(self.center.shape), width.reshape(scale.shape)
            ).float()
        return np.asarray(function(np.asarray(values, np.float64), self.center, scale), np.float32)


@dataclass(frozen=True, eq=False)
class Normalization(Mapping[str, ColumnNormalization]):
    """What the columns of a loader are normalized with, by name; ``normalize=`` of another loader takes it as it is."""

    columns: Mapping[str, ColumnNormalization]

    def __getitem__(self, path: str) -> ColumnNormalization:
        return self.columns[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


def resolve_normalization(
    normalize: Normalize, selection: Selection, spec: WindowSpec, measure: Measure
) -> Normalization | None:
    """What ``normalize=`` means for the columns of a batch; ``View.loader`` says it in words.

    Args:
        normalize: As given.
        selection: The trajectories.
        spec: What a window holds.
        measure: Names to their statistics.

    Raises:
        SelectionError: A column that the batch does not hold or that holds no numbers, or no such method.
        UnknownColumnError: A name that nothing has.
    """
    if normalize is None or normalize is False:
        return None
    held = {o.source.path: o.source for o in spec.outputs if isinstance(o.source, Column)}
    if normalize is True:
        wanted: dict[str, Any] = {path: "mean_std" for path, column in held.items() if is_floating(column)}
        if not wanted:
            raise SelectionError(
                "normalize=True, and the batch holds no floating-point column; name integer columns: "
                'normalize={"obs/image": "mean_std"}'
            )
    elif isinstance(normalize, Mapping):
        wanted = _named(normalize, selection, held)
    else:
        raise SelectionError(
            f"normalize={normalize!r}, expected True, or a mapping from columns to 'mean_std', 'min_max' or (mean, std)"
        )
    measured = [path for path, how in wanted.items() if isinstance(how, str)]
    statistics = measure(measured) if measured else {}
    return Normalization({path: _of_column(held[path], how, statistics) for path, how in wanted.items()})


class Normalizer:
    """Normalizes the tensors of batches, on their device. Several threads may share it.

    Args:
        normalization: Of the stored columns.
        spec: What a window holds: every output that shows such a column is normalized, ``next_obs`` as ``obs``.
        device: Of the tensors.
    """

    def __init__(self, normalization: Normalization, spec: WindowSpec, device: torch.device) -> None:
        self._scales: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for output in spec.outputs:
            if isinstance(output.source, Column) and output.source.path in normalization:
                column = normalization[output.source.path]
                # float64 columns are scaled before they are rounded.
                dtype = torch.float64 if output.source.dtype == "float64" else torch.float32
                center, scale = column.center, np.maximum(column.scale, EPS)
                self._scales[output.name] = (
                    torch.tensor(center, dtype=dtype, device=device),
                    torch.tensor(scale, dtype=dtype, device=device),
                )

    def __call__(self, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """Replace what is to be normalized by float32; in its own memory if it is float32 already.

        Args:
            tensors: By name, ``[windows, ...]``.

        Returns:
            Tensors that have memory of their own.
        """
        made = []
        for name, (center, scale) in self._scales.items():
            values = tensors[name]
            if values.dtype == torch.float32:
                values.sub_(center).div_(scale)
                continue
            if values.dtype == torch.float64:
                scaled = values.sub_(center).div_(scale).to(torch.float32)
            else:
                scaled = values.to(torch.float32).sub_(center).div_(scale)
            tensors[name] = scaled
            made.append(scaled)
        return made


def _named(normalize: Mapping[str, Any], selection: Selection, held: Mapping[str, Column]) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    for name, how in normalize.items():
        if name not in selection.schema and (name in selection.schema.metadata):
            raise SelectionError(f"normalize= names {name!r}, a metadata field; only stored columns are normalized")
        for column in selection.schema.select(name):
            if not is_measured(column):
                raise SelectionError(
                    f"normalize= names column {column.path!r}, which is {column.describe()}; only bools, integers and "
                    "floating-point numbers of fixed shape are normalized"
                )
            if column.path not in held:
                lacking = selection.lacking(column)
                reason = f" (it is lacking from {lacking} of {len(selection)} trajectories)" if lacking else ""
                raise SelectionError(
                    f"normalize= names column {column.path!r}, which the batch does not hold{reason}; it holds "
                    f"{', '.join(map(repr, held))}: name it in columns= or window=, or leave it out"
                )
            wanted[column.path] = how
    return wanted


def _of_column(column: Column, how: Any, statistics: Mapping[str, Any]) -> ColumnNormalization:
    if isinstance(how, ColumnNormalization):
        how = (how.center, how.scale)
    if isinstance(how, str):
        found = statistics[column.path]
        if how == "mean_std":
            center, scale = found.mean, found.std
        elif how == "min_max":
            low, high = found.min.astype(np.float64), found.max.astype(np.float64)
            center, scale = low / 2 + high / 2, high / 2 - low / 2
        else:
            raise SelectionError(
                f"normalize={{{column.path!r}: {how!r}}}, expected 'mean_std', 'min_max' or a pair (mean, std)"
            )
        # An entry without a finite value stays as it is.
        known = np.isfinite(center) & np.isfinite(scale)
        return ColumnNormalization(np.where(known, center, 0.0), np.where(known, scale, 1.0))
    try:
        center, scale = (_numbers(part) for part in how)
        fits = np.broadcast_shapes(center.shape, scale.shape, column.shape) == column.shape
    except (TypeError, ValueError) as error:
        raise SelectionError(
            f"normalize= gives {how!r} for column {column.path!r} ({error}), expected 'mean_std', 'min_max' or a pair of "
            f"arrays (mean, std) that broadcast against {list(column.shape)}"
        ) from error
    if not fits:
        raise SelectionError(
            f"normalize= gives a mean of shape {list(center.shape)} and a std of shape {list(scale.shape)} for column "
            f"{column.path!r}, expected shapes that broadcast against {list(column.shape)}"
        )
    if not (np.isfinite(center).all() and np.isfinite(scale).all() and (scale >= 0).all()):
        raise SelectionError(
            f"normalize= gives a mean or std for column {column.path!r} that is not finite, or a negative std"
        )
    return ColumnNormalization(center, scale)


def _numbers(part: Any) -> Array:
    return np.array(part.detach().cpu().double().numpy() if isinstance(part, torch.Tensor) else part, np.float64)
