"""Frames of a column as pictures that a person can look at.

Invariant: frames of one picture are scaled alike, so they can be compared; what was scaled is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trajstore.schema import Column
from trajstore.stored import Array

_SMALLEST = 8  # pixels: anything smaller is a matrix, not a picture
_MOST_CHANNELS = 16


@dataclass(frozen=True)
class Pictures:
    """Frames ready to be drawn.

    Attributes:
        frames: Each ``(height, width)`` or ``(height, width, 3)``, float from 0 to 1.
        note: What was done to them, for the title; empty if nothing.
    """

    frames: Sequence[Array]
    note: str


def looks_like_images(column: Column) -> bool:
    """Whether each step holds a picture: ``(H, W)``, ``(H, W, channels)`` or ``(channels, H, W)``."""
    if column.is_variable or column.dtype.startswith(("complex", "datetime64", "timedelta64")):
        return False
    shape = column.shape
    if len(shape) == 3:
        shape = shape[1:] if _channels_first(shape) else shape[:2] if shape[2] <= _MOST_CHANNELS else ()
    return len(shape) == 2 and min(shape) >= _SMALLEST


def image_column(columns: Iterable[Column]) -> Column | None:
    """The first column that looks like images; bytes before floats, which may be anything."""
    found = [column for column in columns if looks_like_images(column)]
    return min(found, key=lambda column: column.dtype != "uint8", default=None)


def picture_size(column: Column) -> tuple[int, int]:
    """Height and width in pixels of a column that looks like images."""
    shape = column.shape
    if len(shape) == 3:
        shape = shape[1:] if _channels_first(shape) else shape[:2]
    return shape[0], shape[1]


def to_pictures(frames: Sequence[Any]) -> Pictures:
    """Pictures of frames of one column.

    Args:
        frames: NumPy arrays or torch tensors of one shape and dtype: grey, RGB, RGBA or stacked frames, channels first or
            last. Of stacked frames the last is shown. Integers of 8 bits are 0 to 255; floats are taken to be 0 to 1, -1 to
            1 or 0 to 255 if they fit; anything else is stretched from its least to its greatest value.
    """
    arrays = np.stack([f if isinstance(f, np.ndarray) else f.float().numpy() for f in frames])
    note = ""
    if arrays.ndim == 4:
        arrays = np.moveaxis(arrays, 1, -1) if _channels_first(arrays.shape[1:]) else arrays
        arrays, note = _colours(arrays)
    scaled, stretched = _scaled(arrays)
    return Pictures(list(scaled), ", ".join(filter(None, (note, stretched))))


def _channels_first(shape: tuple[int, ...]) -> bool:
    return shape[0] <= _MOST_CHANNELS and shape[0] < min(shape[1:])


def _colours(arrays: Array) -> tuple[Array, str]:
    """Frames ``(n, H, W, channels)`` as grey or RGB."""
    channels = arrays.shape[3]
    if channels in (1, 3):
        return (arrays[..., 0] if channels == 1 else arrays), ""
    if channels == 2:
        return arrays[..., 1], "last of 2 stacked frames"
    if channels == 4 and (arrays[..., 3] == arrays[0, 0, 0, 3]).all() and arrays[0, 0, 0, 3] in (1, 255):
        return arrays[..., :3], ""  # opaque everywhere
    if channels % 3 == 0:
        return arrays[..., -3:], f"last of {channels // 3} stacked frames"
    return arrays[..., -1], f"last of {channels} stacked frames"


def _scaled(arrays: Array) -> tuple[Array, str]:
    if arrays.dtype == bool:
        return arrays.astype(np.float32), ""
    if arrays.dtype == np.uint8:
        return arrays.astype(np.float32) / 255, ""
    values = arrays.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if arrays.dtype.kind == "f":
        for least, most in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
            if least <= low and high <= most:
                return np.clip(np.nan_to_num((values - least) / (most - least)), 0, 1), ""
    span = (high - low) or 1.0
    return np.clip(np.nan_to_num((values - low) / span), 0, 1), f"black {low:.4g}, white {high:.4g}"
