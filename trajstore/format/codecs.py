"""The closed list of page codecs: what they are called, what Zarr calls them, and how they run.

Invariant: a name outside the list is an error, never a look-up in somebody's registry; data cannot choose code.

Defaults by measurement (``benchmarks/codecs.py``): frames (unsigned bytes) compress best and fastest with plain Zstandard
at level 1; wider numbers only compress once their bytes are shuffled, and LZ4 then costs a third of Zstandard's time.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numcodecs.blosc
import numpy as np
from numcodecs import Blosc, Zstd

from trajstore.errors import CorruptionError, SchemaError
from trajstore.schema import Column

# Pages are decoded by our own threads, one page each; c-blosc's internal pool would hold the interpreter lock.
numcodecs.blosc.use_threads = False

PRESETS = ("fast", "small", "none")
ARROW_CODECS = ("none", "lz4", "zstd")
# A page costs 25-40 us beside its bytes. Frames compress and decode better in larger pages, and a window of them spans
# several pages anyway; vectors are read a few rows at a time.
TARGET_FRAME_PAGE_BYTES = 256 * 1024
TARGET_PAGE_BYTES = 128 * 1024
TARGET_ARROW_PAGE_BYTES = 96 * 1024  # 4096 rows of reward, action and a flag
MAX_PAGE_ROWS = 65536


@dataclass(frozen=True)
class Codec:
    """One member of the closed list."""

    name: str
    compressor: str  # "none", "zstd" or "blosc"
    cname: str = ""  # blosc's inner compressor
    level: int = 0
    shuffle: str = "noshuffle"

    def zarr_json(self, itemsize: int) -> list[dict[str, Any]]:
        """The bytes-to-bytes codecs of Zarr v3 metadata; empty for no compression."""
        if self.compressor == "none":
            return []
        if self.compressor == "zstd":
            return [{"name": "zstd", "configuration": {"level": self.level, "checksum": False}}]
        return [
            {
                "name": "blosc",
                "configuration": {
                    "typesize": itemsize,
                    "cname": self.cname,
                    "clevel": self.level,
                    "shuffle": self.shuffle,
                    "blocksize": 0,
                },
            }
        ]

    def encode(self, page: np.ndarray[Any, Any]) -> bytes | memoryview:
        """Compress one C-contiguous page. For ``none`` the result is a view of the page itself."""
        if self.compressor == "none":
            return memoryview(page.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        return _implementation(self.name).encode(page.reshape(-1))  # type: ignore[no-any-return]

    def decode_into(self, stored: Any, out: np.ndarray[Any, Any]) -> None:
        """Decompress one page into ``out``, C-contiguous, exactly as large as the page.

        Raises:
            CorruptionError: The bytes are not a page of this codec and size; the caller adds which page.
        """
        if self.compressor == "none":
            source = np.frombuffer(stored, np.uint8)
            if source.nbytes != out.nbytes:
                raise CorruptionError(f"{source.nbytes} stored bytes, expected {out.nbytes}")
            out.reshape(-1).view(np.uint8)[:] = source
            return
        # numcodecs takes an `out` that is too large and leaves its rest as it was; Blosc reads on behind a cut page.
        promised = _decoded_nbytes(self.compressor, stored)
        if promised != out.nbytes:
            raise CorruptionError(f"{self.name} would decode it to {promised} bytes, expected {out.nbytes}")
        try:
            _implementation(self.name).decode(stored, out=out.reshape(-1).view(np.uint8))
        except (RuntimeError, ValueError) as error:
            raise CorruptionError(f"{self.name} cannot decode it: {error}") from error


CODECS: Mapping[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("none", "none"),
        Codec("lz4", "blosc", "lz4", 5),
        Codec("lz4-shuffle", "blosc", "lz4", 5, "shuffle"),
        Codec("lz4-bitshuffle", "blosc", "lz4", 5, "bitshuffle"),
        Codec("zstd", "zstd", level=1),
        Codec("zstd-shuffle", "blosc", "zstd", 1, "shuffle"),
        Codec("zstd-bitshuffle", "blosc", "zstd", 1, "bitshuffle"),
        Codec("zstd-high", "zstd", level=5),
        Codec("zstd-high-shuffle", "blosc", "zstd", 5, "shuffle"),
    )
}


def codec_named(name: str) -> Codec:
    """The codec of this name.

    Raises:
        SchemaError: It is not on the list.
    """
    try:
        return CODECS[name]
    except KeyError:
        raise SchemaError(f"codec {name!r}, expected one of {', '.join(CODECS)}") from None


def check_preset(preset: str | None) -> None:
    """Raise ``SchemaError`` unless ``preset`` is None or one of ``PRESETS``."""
    if preset is not None and preset not in PRESETS:
        raise SchemaError(f"codec={preset!r}, expected None (a default per dtype) or one of {', '.join(PRESETS)}")


def tensor_codec(column: Column, preset: str | None) -> Codec:
    """The codec of a tensor column: its own, or the preset's, or the default for its dtype."""
    if column.codec is not None:
        return codec_named(column.codec)
    single_byte = column.physical_dtype.itemsize == 1
    name = {
        None: "zstd" if single_byte else "lz4-shuffle",
        "fast": "lz4" if single_byte else "lz4-shuffle",
        "small": "zstd-high" if single_byte else "zstd-high-shuffle",
        "none": "none",
    }[preset]
    return codec_named(name)


def arrow_codec(preset: str | None) -> str:
    """The IPC body compression of a segment's Arrow files: ``"none"``, ``"lz4"`` or ``"zstd"``."""
    return {None: "lz4", "fast": "none", "small": "zstd", "none": "none"}[preset]


def tensor_page_rows(column: Column) -> int:
    """Rows per page of a tensor column: its own, or the power of two below 128 KiB, for single-byte values 256 KiB."""
    if column.page_rows is not None:
        return column.page_rows
    single_byte = column.physical_dtype.itemsize == 1
    return power_of_two_rows(column.row_bytes, TARGET_FRAME_PAGE_BYTES if single_byte else TARGET_PAGE_BYTES)


def power_of_two_rows(row_bytes: float, target_bytes: int) -> int:
    """The largest power of two of rows within ``target_bytes``, at least 1.

    Examples:
        >>> power_of_two_rows(64 * 64 * 3, 128 * 1024)
        8
    """
    rows = int(target_bytes // max(row_bytes, 1))
    return min(1 << max(rows.bit_length() - 1, 0), MAX_PAGE_ROWS)


def _decoded_nbytes(compressor: str, stored: Any) -> int | None:
    """How many bytes a compressed page holds, from its header; None if the header is none of this compressor's.

    Sources: c-blosc, README_CHUNK_FORMAT.rst; Zstandard, RFC 8878, section 3.1.1.1.
    """
    header = bytes(stored[:18])
    if len(header) < (16 if compressor == "blosc" else 6):
        return None
    if compressor == "blosc":
        nbytes, _, stored_nbytes = struct.unpack_from("<3I", header, 4)
        return int(nbytes) if stored_nbytes == len(stored) else None
    descriptor = header[4]
    single_segment = descriptor >> 5 & 1
    start = 6 - single_segment + (0, 1, 2, 4)[descriptor & 3]
    size = (single_segment, 2, 4, 8)[descriptor >> 6]
    if header[:4] != b"\x28\xb5\x2f\xfd" or not size:
        return None
    return int.from_bytes(header[start : start + size], "little") + (256 if size == 2 else 0)


@lru_cache(maxsize=len(CODECS))
def _implementation(name: str) -> Any:
    codec = CODECS[name]
    if codec.compressor == "zstd":
        return Zstd(level=codec.level)
    shuffles = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}
    return Blosc(codec.cname, codec.level, shuffles[codec.shuffle])
