"""Frames in and out: flushed throughput and whole-segment reads, beside the codec alone and zarr-python."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numcodecs.blosc
import numpy as np

import trajstore
from benchmarks import data
from benchmarks.harness import (
    Bar,
    Contender,
    Context,
    Measurement,
    cores,
    paired_ratios,
    ratio_of_medians,
)
from benchmarks.peers import (
    IMAGE,
    ZARR_SETTINGS,
    best_setting,
    layout_of,
    stored_pages,
    zarr_reader,
    zarr_writer,
)


def flushed_throughput(context: Context) -> Iterator[Measurement]:
    """All appends and one ``flush``, against encoding alone, writing alone, and zarr-python."""
    kinds: dict[str, Callable[[], np.ndarray]] = {
        "Breakout": lambda: data.atari_small(context.pick(24_000, 4_000)),
        "MsPacman": lambda: data.atari_small(context.pick(24_000, 4_000), "MsPacman"),
        "camera-like": lambda: data.camera(context.pick(8_000, 1_000)),
    }
    for kind, make in kinds.items():
        if context.only is None or context.only in f"flush {kind}" or context.only == "flush":
            yield from _flushed(context, kind, make())


def _flushed(context: Context, kind: str, distinct: np.ndarray) -> Iterator[Measurement]:
    repeats = 2
    frames = np.concatenate([distinct] * repeats)
    episodes = np.array_split(frames, len(frames) // 500)

    def write_store(store: trajstore.Store) -> None:
        for episode in episodes:
            store.append({"obs": {"image": episode}})
        store.flush()

    sample = context.scratch / "layout"
    with trajstore.open(str(sample), mode="a") as store:
        write_store(store)
    layout = layout_of(sample)
    stored = sum(p.stat().st_size for p in sample.rglob("c.0.0.0.0"))
    shutil.rmtree(sample)

    codec = layout.codec
    pages = [frames[start : start + layout.page_rows] for start in range(0, len(frames), layout.page_rows)]
    encoded = b"".join(codec.encode(page) for page in pages)
    running = context.scratch / "running"
    with ThreadPoolExecutor(cores()) as pool, trajstore.open(str(running), mode="a") as store:
        edges = np.linspace(0, len(pages), cores() + 1).astype(int)

        def encode(_none: object) -> None:
            list(pool.map(lambda i: [codec.encode(page) for page in pages[edges[i] : edges[i + 1]]], range(cores())))

        def write(path: Path) -> None:
            descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL)
            view = memoryview(encoded)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            os.close(descriptor)

        def fresh() -> Path:
            return context.scratch / uuid.uuid4().hex

        contenders = [
            Contender(name="trajstore", run=lambda _none: write_store(store)),
            Contender(name="encode", run=encode),
            Contender(name="write + fsync", prepare=fresh, run=write, cleanup=Path.unlink),
        ]
        for name, settings in ZARR_SETTINGS.items():
            job = zarr_writer(frames, layout, settings)
            contenders.append(Contender(name=name, prepare=fresh, run=job, cleanup=shutil.rmtree))
        timings = context.measure(contenders, rounds=context.pick(7, 3), warmup=1)
    shutil.rmtree(running)
    slower = max(("encode", "write + fsync"), key=lambda name: timings[name].median_s)
    best = best_setting(timings, ZARR_SETTINGS)
    details = {
        "raw_mb": frames.nbytes / 1e6,
        "stored_ratio": round(frames.nbytes / stored, 2),
        "codec": layout.codec_name,
        "page_rows": layout.page_rows,
        "shard_rows": layout.shard_rows,
        "segments": layout.segments,
        "trajstore_gb_s": round(frames.nbytes / timings["trajstore"].median_s / 1e9, 3),
        "slower_of_encode_and_write": slower,
        "best_zarr_setting": best,
    }
    held = kind != "camera-like"  # the bar is on recorded frames; the others are stated beside it
    label = f"{kind} 64x64x3 frames, {layout.codec_name}, {details['stored_ratio']}:1"
    yield Measurement(
        name=f"flush {kind}",
        what=f"append + flush of {label}: throughput / the slower of encoding on all cores and write + fsync",
        measured=ratio_of_medians(timings, slower, "trajstore"),
        bar=Bar("at least", 0.85) if held else None,
        timings=timings,
        spread=paired_ratios(timings, slower, "trajstore"),
        details=details,
    )
    yield Measurement(
        name=f"flush {kind} zarr",
        what=f"append + flush of {kind} frames: throughput / zarr-python's sharded write, unsynced",
        measured=ratio_of_medians(timings, best, "trajstore"),
        bar=Bar("at least", 1.5) if held else None,
        timings={name: timings[name] for name in ("trajstore", best)},
        spread=paired_ratios(timings, best, "trajstore"),
        details={"best_zarr_setting": best},
    )


def read_segment(context: Context) -> Iterator[Measurement]:
    """One whole segment, against decoding its pages on all cores and against zarr-python."""
    frames = data.atari_small(context.pick(24_000, 4_000), "MsPacman")
    for label, preset, zarr_bar in (("zstd", None, 1.4), ("lz4", "fast", 3.0)):
        path = context.scratch / f"read-{label}"
        with trajstore.open(str(path), mode="a", codec=preset, segment_bytes=1 << 40) as store:
            for episode in np.array_split(frames, len(frames) // 500):
                store.append({"obs": {"image": episode}})
        yield from _read(context, path, frames, label, zarr_bar)


def _read(context: Context, path: Path, frames: np.ndarray, label: str, zarr_bar: float) -> Iterator[Measurement]:
    (segment,) = sorted((path / "segments").iterdir())
    layout = layout_of(path)
    pages = stored_pages(segment, layout.page_rows, len(frames))
    codec = layout.codec
    numcodecs.blosc.use_threads = False
    with trajstore.open(str(path)) as store, ThreadPoolExecutor(cores()) as pool:
        view = store.trajectories
        edges = np.linspace(0, len(pages), cores() + 1).astype(int)

        def decode_share(out: np.ndarray, share: int) -> None:
            for page in range(edges[share], edges[share + 1]):
                target = out[page * layout.page_rows : (page + 1) * layout.page_rows]
                if len(target) == layout.page_rows:
                    codec.decode(pages[page], target)
                else:  # the last page is stored whole, filled up
                    whole = np.empty((layout.page_rows, *frames.shape[1:]), frames.dtype)
                    target[:] = codec.decode(pages[page], whole)[: len(target)]

        touched = np.zeros_like(frames)

        def decode(_none: object) -> None:
            list(pool.map(lambda share: decode_share(touched, share), range(cores())))

        def read_into(_none: object) -> None:
            view.read(IMAGE, out=touched)

        def read(_none: object) -> object:
            return view.read(IMAGE)

        for fill in (decode, read_into):
            touched[:] = 0
            fill(None)
            if not np.array_equal(touched, frames):
                raise RuntimeError("a contender did not read what was written")
        contenders = [
            Contender(name="trajstore, into memory at hand", run=read_into),
            Contender(name="decode, into memory at hand", run=decode),
            Contender(name="trajstore", run=read),
        ]
        for name, settings in ZARR_SETTINGS.items():
            contenders.append(Contender(name=name, run=zarr_reader(segment, settings)))
        timings = context.measure(contenders, rounds=context.pick(15, 3), warmup=2)
    best = best_setting(timings, ZARR_SETTINGS)
    details = {
        "raw_mb": frames.nbytes / 1e6,
        "codec": layout.codec_name,
        "page_rows": layout.page_rows,
        "trajstore_gb_s": round(frames.nbytes / timings["trajstore"].median_s / 1e9, 3),
        "best_zarr_setting": best,
    }
    pair = ("decode, into memory at hand", "trajstore, into memory at hand")
    yield Measurement(
        name=f"read {label}",
        what=f"reading a segment of frames, {layout.codec_name}: speed / decoding its pages on all cores",
        measured=ratio_of_medians(timings, *pair),
        bar=Bar("at least", 0.85),
        timings=timings,
        spread=paired_ratios(timings, *pair),
        details=details,
    )
    yield Measurement(
        name=f"read {label} zarr",
        what=f"reading a segment of frames, {layout.codec_name}: speed / zarr-python on the same segment",
        measured=ratio_of_medians(timings, best, "trajstore"),
        bar=Bar("at least", zarr_bar),
        timings={name: timings[name] for name in ("trajstore", best)},
        spread=paired_ratios(timings, best, "trajstore"),
        details={"best_zarr_setting": best},
    )
