"""How the values of a batch lie in one block of memory.

Invariant: every value is contiguous and aligned, so that one block is one copy to a device, and cutting it into batches
makes views only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from trajstore.read.buffer_pool import aligned
from trajstore.sample.window import Output
from trajstore.schema import Column
from trajstore.stored import Array

_TORCH_DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}


@dataclass(frozen=True)
class Value:
    """One tensor of a batch: ``[batch, *shape]``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]  # of one window: (w, *column shape), or the column's shape

    @cached_property
    def window_bytes(self) -> int:
        """Bytes of one window."""
        return self.dtype.itemsize * math.prod(self.shape)


def torch_dtype(column: Column) -> torch.dtype:
    """The dtype in which a column is delivered; datetimes are int64 in their unit."""
    return _TORCH_DTYPES.get(column.dtype, torch.int64)


class Block:
    """Where the values of ``windows`` windows lie.

    Args:
        values: In their order.
        windows: How many.
    """

    def __init__(self, values: Sequence[Value], windows: int) -> None:
        self.windows = windows
        self.values = tuple(values)
        self.places: dict[str, slice] = {}  # bytes of each value
        self.nbytes = 0
        for value in self.values:
            stop = self.nbytes + windows * value.window_bytes
            self.places[value.name] = slice(self.nbytes, stop)
            self.nbytes = aligned(stop)

    def rows(self, data: torch.Tensor, name: str, row_bytes: int) -> torch.Tensor:
        """The memory of a value as ``(rows, row_bytes)`` uint8."""
        return data[self.places[name]].view(-1, row_bytes)

    def array(self, data: Array, name: str) -> np.ndarray[Any, Any]:
        """The memory of a value as bytes, ``(windows, window_bytes)`` uint8."""
        return data[self.places[name]].reshape(self.windows, -1)

    def tensors(self, data: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of all values, ``[windows, *shape]`` each."""
        out = {}
        for value in self.values:
            out[value.name] = data[self.places[value.name]].view(value.dtype).view(self.windows, *value.shape)
        return out


@dataclass(frozen=True, eq=False)
class Target:
    """Memory that a block describes."""

    block: Block
    data: torch.Tensor  # (nbytes,) uint8

    def rows(self, output: Output, lo: int, hi: int) -> torch.Tensor:
        """Memory of an output's rows for windows ``[lo, hi)``, ``(rows, row_bytes)`` uint8."""
        assert isinstance(output.source, Column)
        width = len(output.offsets)
        return self.block.rows(self.data, output.name, output.source.row_bytes)[lo * width : hi * width]
