"""zarr-python at the same job: the same array, codec, chunks and shards, at the best of its settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
import zarr
from numcodecs import Blosc, Zstd

from benchmarks.harness import Timing

IMAGE = "obs/image"
# The better of the two is compared. More or less concurrency (async.concurrency 2, 64) made no difference; no
# comparison of every chunk with the fill value and large batches make a write twice as fast.
ZARR_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "zarr, defaults": {},
    "zarr, batched": {"codec_pipeline.batch_size": 1024, "array.write_empty_chunks": True},
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a store laid out its image column, from its Zarr metadata: zarr-python is to write the same."""

    segments: int
    page_rows: int
    shard_rows: int  # of the largest shard
    compressor: Mapping[str, Any]  # as in the Zarr metadata
    codec: Any  # the same of numcodecs
    codec_name: str


def layout_of(store: Path) -> Layout:
    """The layout of a local store's segments."""
    segments = sorted((store / "segments").iterdir())
    (sharding,) = _image_array(segments[0]).metadata.to_dict()["codecs"]
    inner = sharding["configuration"]["codecs"]
    if len(inner) < 2:
        raise ValueError("the image column is stored uncompressed; the comparison is of codecs")
    codec, codec_name = _numcodecs_codec(inner[1])
    return Layout(
        segments=len(segments),
        page_rows=int(sharding["configuration"]["chunk_shape"][0]),
        shard_rows=max(int(_image_array(segment).shards[0]) for segment in segments),
        compressor=inner[1],
        codec=codec,
        codec_name=codec_name,
    )


def _image_array(segment: Path) -> Any:
    return zarr.open_group(segment, mode="r")[IMAGE]


def _numcodecs_codec(compressor: Mapping[str, Any]) -> tuple[Any, str]:
    """The codec object, for pages encoded and decoded without a store, and what to call it."""
    settings = compressor["configuration"]
    if compressor["name"] == "zstd":
        return Zstd(settings["level"]), f"zstd-{settings['level']}"
    shuffle = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}
    name = str(getattr(settings["shuffle"], "value", settings["shuffle"]))
    inner = str(getattr(settings["cname"], "value", settings["cname"]))
    return Blosc(inner, settings["clevel"], shuffle[name]), f"blosc-{inner}-{settings['clevel']}"


def zarr_writer(frames: np.ndarray, layout: Layout, settings: Mapping[str, Any]) -> Callable[[Path], None]:
    """A job that writes ``frames`` to a new array, as the store laid them out."""

    def job(path: Path) -> None:
        with zarr.config.set(dict(settings)), _DefaultBloscThreads():
            array = zarr.create_array(
                path,
                shape=frames.shape,
                dtype=frames.dtype,
                chunks=(layout.page_rows, *frames.shape[1:]),
                shards=(layout.shard_rows, *frames.shape[1:]),
                compressors=zarr.registry.get_codec_class(layout.compressor["name"]).from_dict(layout.compressor),
                filters=None,
                fill_value=0,
            )
            array[:] = frames

    return job


class _DefaultBloscThreads:
    """numcodecs as zarr-python finds it, whatever this package has set."""

    def __enter__(self) -> None:
        self._before = numcodecs.blosc.use_threads
        numcodecs.blosc.use_threads = None

    def __exit__(self, *_error: object) -> None:
        numcodecs.blosc.use_threads = self._before


def best_setting(timings: Mapping[str, Timing], names: Iterable[str]) -> str:
    """The setting with the smallest median."""
    return min(names, key=lambda name: timings[name].median_s)


def stored_pages(segment: Path, page_rows: int, rows: int) -> list[bytes]:
    """The stored pages of the image shard, found through the shard's own index (zarr-specs, sharding)."""
    shard = (segment / IMAGE / "c.0.0.0.0").read_bytes()
    count = -(-rows // page_rows)
    index = np.frombuffer(shard[-(16 * count + 4) : -4], "<u8").reshape(count, 2).astype(np.int64)
    return [shard[offset : offset + nbytes] for offset, nbytes in index]


def zarr_reader(segment: Path, settings: Mapping[str, Any]) -> Callable[[object], object]:
    """A job that reads the whole image column of a segment."""

    def job(_none: object) -> object:
        with zarr.config.set(dict(settings)), _DefaultBloscThreads():
            return _image_array(segment)[:]

    return job
