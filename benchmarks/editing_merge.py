"""A hundred stores merged into one that refers to them, the result split by a filter, and sampled.

Invariant: bytes written are what all folders together hold more than before, pins and whatever else came into the sources
counted; the opponent reads the manifests that hold the same rows, and writes those rows with the settings of a manifest.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import trajstore
from benchmarks.harness import (
    Bar,
    Contender,
    Context,
    Measurement,
    Timing,
    paired_ratios,
    ratio_of_medians,
)
from benchmarks.sampling_support import PREFETCH, drop_file_cache, loader_feed, measure_feeds, per_batch, warm

TASKS = ("reach", "push", "pick", "place")
CHOSEN = f"task == '{TASKS[0]}'"
OTHERS = f"task != '{TASKS[0]}'"
ROW_BYTES = 17 * 4 + 6 * 4 + 8
BYTES_BAR, TIME_BAR, SAMPLING_BAR = 120.0, 2.0, 1.1
WINDOWS, LENGTH = 256, 4
# As `trajstore.format.manifest` writes one: a dictionary of these columns would repeat them.
_NO_DICTIONARY = ("uuid", "episode", "start", "reward_sum", "created_at")
_ROWS_PER_GROUP = 1 << 18


def merge_and_split(context: Context) -> Iterator[Measurement]:
    """Merge by reference and split by a filter: bytes per trajectory, and time against pyarrow; then sampling."""
    stores, each = context.pick(100, 10), context.pick(10_000, 1_000)
    sources = _sources(context, stores, each)
    yield from _merged(context, sources, stores * each)
    merged = context.scratch / "merged"
    trajstore.merge(sources, merged)
    yield from _split(context, merged, stores * each)
    context.say("merged view, the store beside it")
    plain = context.scratch / "plain"
    trajstore.merge(sources, plain, share="copy")
    with trajstore.open(plain, mode="a") as store:
        store.compact()
    yield from _sampled(context, merged, plain, [context.scratch / "sources", merged])


# --- stores -------------------------------------------------------------------------------------------------


def _sources(context: Context, stores: int, each: int) -> list[Path]:
    """Stores of as many trajectories, each of 2 to 6 steps of states, actions and rewards, with two fields."""
    rng = np.random.default_rng(0)
    places = []
    for number in range(stores):
        context.say(f"store {number + 1} of {stores}")
        lengths = rng.integers(2, 7, each)
        steps = int(lengths.sum())
        columns = {
            "obs": rng.standard_normal((steps, 17), np.float32),
            "action": rng.standard_normal((steps, 6), np.float32),
            "reward": rng.random(steps),
        }
        about = [{"task": TASKS[(number + n) % len(TASKS)], "seed": number * each + n} for n in range(each)]
        places.append(context.scratch / "sources" / f"{number:03}")
        with trajstore.open(places[-1], mode="x") as store:
            store.append_many(columns, lengths, terminated=lengths % 2 == 0, metadata=about)
        context.tick()
    os.sync()
    return places


def nbytes_below(folder: Path) -> int:
    """Bytes of all files below; a file with several names counts once."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            status = path.stat()
            found[status.st_ino] = status.st_size
    return sum(found.values())


def manifests_of(store: Path) -> list[Path]:
    """The manifests that the newest version names, in order."""
    snapshot = json.loads(max((store / "snapshots").glob("*.json")).read_text())
    return [store / entry["path"] for entry in snapshot["manifests"]]


# --- merge and split ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Editing:
    """One edit, done again and again at fresh places; everything that it left is removed in between.

    Attributes:
        context: Of the run; all stores are below its scratch.
        edit: Is given a folder for its results.
    """

    context: Context
    edit: Callable[[Path], object]
    written: list[int] = dataclasses.field(default_factory=list)  # bytes, per run

    def contender(self, name: str) -> Contender:
        return Contender(
            name=name, prepare=self._prepare, run=lambda before: self.edit(before[0]), cleanup=self._measure
        )

    def _prepare(self) -> tuple[Path, int]:
        os.sync()  # what others wrote is not written back at this one's expense
        place = self.context.scratch / "results"
        place.mkdir()
        return place, nbytes_below(self.context.scratch)

    def _measure(self, before: tuple[Path, int]) -> None:
        self.written.append(nbytes_below(self.context.scratch) - before[1])
        shutil.rmtree(before[0])
        for pin in self.context.scratch.glob("sources/*/pins/*"):
            if str(self.context.scratch / "results") in pin.read_text():
                pin.unlink()


def _merged(context: Context, sources: Sequence[Path], count: int) -> Iterator[Measurement]:
    inputs = [manifest for source in sources for manifest in manifests_of(source)]
    ours = _Editing(context, lambda place: trajstore.merge(sources, place / "merged"))
    context.say("merge")
    yield from _against_pyarrow(
        context,
        "merge",
        f"merging {len(sources)} stores of {count // len(sources):,} trajectories by reference",
        ours,
        lambda table: [table],
        inputs,
        count,
    )


def _split(context: Context, merged: Path, count: int) -> Iterator[Measurement]:
    def both(place: Path) -> Mapping[str, int]:
        return trajstore.split(merged, {place / "chosen": CHOSEN, place / "others": OTHERS})

    def one(place: Path) -> Mapping[str, int]:
        return trajstore.split(merged, place / "chosen", where=CHOSEN)

    def parts(table: pa.Table) -> list[pa.Table]:
        chosen = pc.equal(table["task"], TASKS[0])
        return [table.filter(chosen), table.filter(pc.invert(chosen))]

    inputs = manifests_of(merged)
    context.say("split in two")
    yield from _against_pyarrow(
        context, "split", "splitting the result in two by a filter", _Editing(context, both), parts, inputs, count
    )
    context.say("split, one part")
    yield from _against_pyarrow(
        context,
        "split, one part",
        "keeping a quarter of the result by a filter",
        _Editing(context, one),
        lambda table: parts(table)[:1],
        inputs,
        count // len(TASKS),
    )


def _against_pyarrow(
    context: Context,
    name: str,
    what: str,
    ours: _Editing,
    parts: Callable[[pa.Table], Sequence[pa.Table]],
    inputs: Sequence[Path],
    rows: int,
) -> Iterator[Measurement]:
    """Bytes per trajectory written, and time against pyarrow reading ``inputs`` and writing their rows in ``parts``."""

    def one_by_one(place: Path) -> None:
        _write(parts(pa.concat_tables([pq.read_table(path) for path in inputs])), place, sync=False)

    def one_call(place: Path) -> None:
        _write(parts(pq.read_table(list(inputs))), place, sync=False)

    def synced(place: Path) -> None:
        _write(parts(pa.concat_tables([pq.read_table(path) for path in inputs])), place, sync=True)

    contenders = [ours.contender("trajstore")]
    for label, job in (("pyarrow", one_by_one), ("pyarrow, one call", one_call), ("pyarrow, fsync", synced)):
        contenders.append(_Editing(context, job).contender(label))
    timings = context.measure(contenders, rounds=context.pick(7, 3))
    faster = min(("pyarrow", "pyarrow, one call"), key=lambda label: timings[label].median_s)
    yield Measurement(
        name=f"{name}, bytes",
        what=f"{what}: bytes written per trajectory, sources included",
        measured=max(ours.written) / rows,
        unit="B",
        bar=Bar("at most", BYTES_BAR),
        details={"trajectories": rows, "bytes_written": max(ours.written)},
    )
    yield Measurement(
        name=f"{name}, time",
        what=f"{what}, time / pyarrow reading and writing those manifest rows",
        measured=ratio_of_medians(timings, "trajstore", faster),
        bar=Bar("at most", TIME_BAR),
        timings=timings,
        spread=paired_ratios(timings, "trajstore", faster),
        details={
            "opponent": faster,
            "manifests_read": len(inputs),
            "against_pyarrow_fsync": round(ratio_of_medians(timings, "trajstore", "pyarrow, fsync"), 2),
        },
    )


def _write(tables: Sequence[pa.Table], place: Path, *, sync: bool) -> None:
    """Parquet files with the settings of a manifest, one per table."""
    for number, table in enumerate(tables):
        path = place / f"{number}.parquet"
        pq.write_table(
            table,
            path,
            compression="zstd",
            use_dictionary=[name for name in table.column_names if name not in _NO_DICTIONARY],
            write_page_checksum=True,
            row_group_size=_ROWS_PER_GROUP,
        )
        if sync:
            for target in (path, place):
                descriptor = os.open(target, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)


# --- sampling -----------------------------------------------------------------------------------------------


def _sampled(context: Context, merged: Path, plain: Path, folders: Sequence[Path]) -> Iterator[Measurement]:
    """Windows of the merged view and of a store that holds the same trajectories, hot and cold, in turn."""
    with trajstore.open(merged) as store:
        cache_bytes = 3 * int(store.trajectories.num_steps) * ROW_BYTES
    options: dict[str, Any] = {"window": LENGTH, "seed": 0, "prefetch": PREFETCH}
    context.say("merged view, hot")
    with (
        trajstore.open(merged, cache_bytes=cache_bytes) as one,
        trajstore.open(plain, cache_bytes=cache_bytes) as other,
    ):
        _require_same(one.trajectories, other.trajectories, options)
        warm(one.trajectories)
        warm(other.trajectories)
        with (
            one.trajectories.loader(WINDOWS, **options) as ours,
            other.trajectories.loader(WINDOWS, **options) as theirs,
        ):
            batches = context.pick(300, 50)
            hot = measure_feeds(
                context,
                [loader_feed("merged", ours, batches=batches), loader_feed("one store", theirs, batches=batches)],
                rounds=context.pick(15, 3),
            )
    yield _beside(f"{WINDOWS} windows x {LENGTH} steps of the merged view, hot", "merged, hot", hot, {})
    context.say("merged view, cold")
    yield _cold(context, merged, plain, folders, options, cache_bytes)


def _cold(
    context: Context,
    merged: Path,
    plain: Path,
    folders: Sequence[Path],
    options: Mapping[str, Any],
    cache_bytes: int,
) -> Measurement:
    batches = context.pick(100, 20)

    def contender(name: str, url: Path, below: Sequence[Path]) -> Contender:
        def fresh() -> trajstore.Store:
            store = trajstore.open(url, cache_bytes=cache_bytes)
            len(store.trajectories)
            for folder in below:
                drop_file_cache(folder)
            return store

        def draw(store: trajstore.Store) -> None:
            with store.trajectories.loader(WINDOWS, **options) as loader:
                batch = iter(loader)
                for _ in range(batches):
                    next(batch)

        return Contender(name=name, prepare=fresh, run=draw, cleanup=trajstore.Store.close)

    os.sync()
    timings = context.measure(
        [contender("merged", merged, folders), contender("one store", plain, [plain])], rounds=context.pick(9, 3)
    )
    timings = {name: per_batch(timing, batches) for name, timing in timings.items()}
    what = f"the same, the first {batches} batches, file cache dropped, page indexes of all segments included"
    return _beside(what, "merged, cold", timings, {"batches": batches})


def _beside(what: str, name: str, timings: Mapping[str, Timing], details: Mapping[str, Any]) -> Measurement:
    return Measurement(
        name=name,
        what=f"{what}, time / one store of the same trajectories",
        measured=ratio_of_medians(timings, "merged", "one store"),
        bar=Bar("at most", SAMPLING_BAR),
        timings=timings,
        spread=paired_ratios(timings, "merged", "one store"),
        details=details,
    )


def _require_same(one: trajstore.View, other: trajstore.View, options: Mapping[str, Any]) -> None:
    """Fail unless the first batches of both are equal."""
    batches = []
    for view in (one, other):
        with view.loader(WINDOWS, **options) as loader:
            batches.append({name: np.array(column) for name, column in next(iter(loader)).items()})
    same = batches[0].keys() == batches[1].keys()
    if not same or any(not np.array_equal(batches[0][name], batches[1][name]) for name in batches[0]):
        raise RuntimeError("the merged view and the store beside it give different batches: no comparison")
