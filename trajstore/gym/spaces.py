"""Gymnasium spaces as columns, and samples of these spaces as values of the columns.

Invariant: a value that leaves this module has exactly its column's dtype and shape, and shares no memory with
    the
sample that it was made from (environments reuse their buffers).

A ``Dict`` nests by its keys, a ``Tuple`` by ``"0"``, ``"1"``, ...; ``Box``, ``Discrete``, ``MultiDiscrete``
and ``MultiBinary`` are tensors or scalars, ``Text`` is a string column, a ``Sequence`` of any of the array
spaces is a ragged column. ``Graph``, ``OneOf`` and custom spaces have no columnar form and are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from trajstore.errors import ColumnNameError, ColumnShapeError, ColumnTypeError, SchemaError
from trajstore.schema import Column, Schema
from trajstore.stored import Array

_ARRAY_SPACES = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


@dataclass(frozen=True)
class _Leaf:
    column: Column
    dtype: np.dtype[Any] | None  # None for text

    def encode(self, sample: Any) -> Any:
        if self.column.dtype == "string":
            return _text(sample, self.column)
        if self.column.ragged:
            if len(sample) == 0:
                return []  # an array of no elements has no dtype that a column would take
            return self._array(sample, (len(sample), *self.column.shape))  # each step a length of its own
        return self._array(sample, self.column.shape)

    def encode_batch(self, samples: Any, num_envs: int) -> Any:
        if self.column.is_variable:  # batched as a tuple of one sample per environment
            rows = list(samples)
            if len(rows) != num_envs:
                raise _wrong_shape(self.column, f"{len(rows)} samples", f"{num_envs}, one per environment")
            return [self.encode(row) for row in rows]
        return self._array(samples, (num_envs, *self.column.shape))

    def _array(self, sample: Any, shape: tuple[int, ...]) -> Array:
        """A fresh array of the column's dtype.

        Floats are rounded to the declared precision, as gymnasium's vector environments round them; nothing
        else may change.
        """
        if hasattr(sample, "detach"):  # a torch tensor, perhaps on a GPU
            sample = sample.detach().cpu()
        try:
            array = np.asarray(sample)
        except ValueError as error:
            raise _wrong_shape(self.column, f"parts of different shapes ({error})", str(shape)) from None
        if array.shape != shape:
            raise _wrong_shape(self.column, f"shape {array.shape}", f"shape {shape}")
        if array.dtype == self.dtype:
            return array.copy()
        return _cast(array, self.column)


@dataclass(frozen=True)
class _Branch:
    path: str
    children: tuple[tuple[str, str | int, _Leaf | _Branch], ...]  # (name in the path, key in the sample, subspace)

    def encode(self, sample: Any) -> dict[str, Any]:
        return {name: child.encode(self._take(sample, key)) for name, key, child in self.children}

    def encode_batch(self, samples: Any, num_envs: int) -> dict[str, Any]:
        return {name: child.encode_batch(self._take(samples, key), num_envs) for name, key, child in self.children}

    def _take(self, sample: Any, key: str | int) -> Any:
        try:
            return sample[key]
        except (KeyError, IndexError, TypeError):
            raise SchemaError(
                f"column {self.path!r}: found a {type(sample).__name__} without the part {key!r} that the "
                "environment's space declares; correct the environment or its space"
            ) from None


class SpaceColumns:
    """The columns of one space.

    Args:
        space: The space of one environment (``single_observation_space`` of a vector environment).
        path: Where its columns are: ``"obs"``.
        extra: 1 for observations, which have ``length + 1`` rows.

    Attributes:
        columns: One per leaf of the space, in the space's order.

    Raises:
        SchemaError: The space, or a part of it, cannot be stored as columns; the message names it.

    Examples:
        >>> from gymnasium.spaces import Box, Dict, Discrete
        >>> import numpy as np
        >>> columns = SpaceColumns(Dict(image=Box(0, 255, (8, 8), np.uint8), goal=Discrete(3)), "obs")
        >>> sorted((column.path, column.describe()) for column in columns.columns)
        [('obs/goal', 'int64'), ('obs/image', 'uint8[8, 8]')]
    """

    def __init__(self, space: spaces.Space[Any], path: str, *, extra: bool = False) -> None:
        found: list[Column] = []
        self._root = _node(space, path, extra, found)
        self.columns = Schema(tuple(found)).columns  # names that collide are refused here

    def encode(self, sample: Any) -> Any:
        """One sample of the space as nested values: dicts of arrays ``[*shape]`` and strings.

        Raises:
            SchemaError: The sample does not have the dtype or shape that the space declares.
        """
        return self._root.encode(sample)

    def encode_batch(self, samples: Any, num_envs: int) -> Any:
        """A batch of a vector environment as nested values: dicts of arrays ``[num_envs, *shape]`` and lists.

        Raises:
            SchemaError: As ``encode``, or the batch does not have ``num_envs`` rows.
        """
        return self._root.encode_batch(samples, num_envs)


def row_of(batch: Any, index: int | np.integer[Any]) -> Any:
    """Row ``index`` of what ``encode_batch`` made: what ``encode`` makes of one sample. Arrays are views."""
    if isinstance(batch, dict):
        return {name: row_of(value, index) for name, value in batch.items()}
    return batch[index]


def same_values(left: Any, right: Any) -> bool:
    """Whether two encoded samples are equal; NaN equals NaN."""
    if isinstance(left, dict):
        return all(same_values(value, right[name]) for name, value in left.items())
    if isinstance(left, np.ndarray | np.generic):
        return np.array_equal(left, right, equal_nan=left.dtype.kind in "fc")
    return bool(left == right)


def _node(space: spaces.Space[Any], path: str, extra: bool, found: list[Column]) -> _Leaf | _Branch:
    parts: Iterable[tuple[Any, spaces.Space[Any]]]
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = list(space.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces))
        if not parts:
            raise SchemaError(f"{path!r}: the space {space} is empty: there is nothing to store; leave it out")
        children = []
        for key, part in parts:
            if not isinstance(key, str | int) or (isinstance(space, spaces.Dict) and not isinstance(key, str)):
                raise ColumnNameError(f"{path!r}: the key {key!r} of {space} is not a string; rename it")
            children.append((str(key), key, _node(part, f"{path}/{key}", extra, found)))
        return _Branch(path, tuple(children))
    ragged = isinstance(space, spaces.Sequence)
    element = space.feature_space if isinstance(space, spaces.Sequence) else space
    shape: tuple[int, ...] = ()
    if isinstance(element, spaces.Text) and not ragged:
        dtype = "string"
    elif isinstance(element, _ARRAY_SPACES):
        dtype, shape = np.dtype(element.dtype).name, element.shape or ()
    else:
        raise SchemaError(
            f"{path!r}: the space {space} ({type(element).__name__}) cannot be stored as columns; wrap the "
            "environment (gymnasium.wrappers.TransformObservation or TransformAction) so that it is a Box, "
            "Discrete, MultiDiscrete, MultiBinary, Text, a Sequence of arrays, or a Dict or Tuple of these"
        )
    column = Column(path=path, dtype=dtype, shape=shape, extra=1 if extra else 0, ragged=ragged)
    found.append(column)
    return _Leaf(column, None if column.dtype == "string" else column.physical_dtype)


def _text(sample: Any, column: Column) -> str:
    if not isinstance(sample, str):
        raise ColumnTypeError(
            f"column {column.path!r}: found a {type(sample).__name__}, expected a string, as the space says"
        )
    return str(sample)


def _cast(array: Array, column: Column) -> Array:
    dtype = column.physical_dtype
    try:
        with np.errstate(all="ignore"):
            cast = array.astype(dtype)
    except (TypeError, ValueError):
        cast = None
    rounded = array.dtype.kind == "f" and dtype.kind == "f"
    if cast is None or not (rounded or np.array_equal(cast, array)):
        raise ColumnTypeError(
            f"column {column.path!r}: found values of dtype {array.dtype} that do not fit {dtype}, which the "
            "environment's space declares; correct the space, or convert in the environment"
        )
    return cast


def _wrong_shape(column: Column, found: str, expected: str) -> ColumnShapeError:
    return ColumnShapeError(
        f"column {column.path!r}: found {found}, expected {expected}, as the environment's space declares; "
        "correct the environment or its space"
    )
