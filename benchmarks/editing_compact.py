"""Ten thousand segments of one trajectory each become large ones; what opening and cold reading cost before and after.

Invariant: all three stores hold the same trajectories in the same order; before each timed run the kernel has forgotten the
contents of the files of that store.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import trajstore
from benchmarks.harness import Bar, Contender, Context, Measurement, cores, paired_ratios, ratio_of_medians
from benchmarks.sampling_support import drop_file_cache
from trajstore.format.layout import manifest_key
from trajstore.format.manifest import SegmentEntry, TrajectoryRow, build_table, encode_manifest, manifest_entry
from trajstore.schema import Schema
from trajstore.storage.attach import open_or_create
from trajstore.storage.changes import Append
from trajstore.storage.commit import History
from trajstore.storage.connect import connect
from trajstore.storage.workers import Workers
from trajstore.write.batch import Ending
from trajstore.write.blocks import BlockPool
from trajstore.write.segment import SegmentBuilder

STEPS, AFTER_BAR = 32, 1.2
_BLOCK_BYTES = 64 << 20
_STORED_TOGETHER = 200  # segments: each object is an open file until all of them are there
COLUMNS = (
    trajstore.Column(path="obs", dtype="float32", shape=(128,)),
    trajstore.Column(path="action", dtype="float32", shape=(6,)),
    trajstore.Column(path="reward", dtype="float64"),
)
_NAMES = {"before": "before `compact`", "after": "after it"}


def compaction(context: Context) -> Iterator[Measurement]:
    """``compact``, then opening and reading everything cold against a store written in one go."""
    count = context.pick(10_000, 300)
    places = {name: context.scratch / name for name in ("before", "after", "one go")}
    context.say("compact: writing stores")
    columns = _columns(count)
    _write_one_by_one(places["before"], columns)
    _write_in_one_go(places["one go"], columns)
    del columns
    shutil.copytree(places["before"], places["after"])
    os.sync()
    with trajstore.open(places["before"]) as store:
        small = len(store.trajectories._table.segments)
    if small != count:
        raise RuntimeError(f"{small} segments, expected {count} of one trajectory each")
    context.say("compact")
    with trajstore.open(places["after"], mode="a") as store:
        timings = context.measure([Contender(name="compact", run=lambda _none: store.compact())], rounds=1, warmup=0)
        large = len(store.trajectories._table.segments)
    os.sync()
    yield Measurement(
        name="compact",
        what=f"`compact` of {count:,} segments of one trajectory each into {large}: time",
        measured=timings["compact"].median_s,
        unit="s",
        timings=timings,
        details={"trajectories": count, "steps": count * STEPS, "segments_after": large},
    )
    _require_same(places)
    yield from _compared(context, places, count)


def _columns(count: int) -> dict[str, np.ndarray]:
    """As many trajectories end to end: 128 floats, six more and a reward per step."""
    rng = np.random.default_rng(0)
    steps = count * STEPS
    return {
        "obs": rng.standard_normal((steps, 128), np.float32),
        "action": rng.standard_normal((steps, 6), np.float32),
        "reward": rng.random(steps),
    }


def _write_in_one_go(place: Path, columns: Mapping[str, np.ndarray]) -> None:
    with trajstore.open(place, mode="x", commit_interval_s=1e6) as store:
        store.append_many(columns, np.full(len(columns["reward"]) // STEPS, STEPS), terminated=True, task="bench")


def _write_one_by_one(place: Path, columns: Mapping[str, np.ndarray]) -> None:
    """A segment per trajectory, all of them in one commit: what a writer with ``segment_bytes=1`` leaves, sooner."""
    schema = Schema(COLUMNS, {"task": "string"})
    rows: list[TrajectoryRow] = []
    entries: list[SegmentEntry] = []
    # What is prepared need not outlive a power cut: ten thousand times seven fsyncs would take longer than the rest.
    with (
        mock.patch.object(os, "fsync"),
        contextlib.closing(connect(str(place))) as filesystem,
        contextlib.closing(Workers(cores(), name="small")) as workers,
    ):
        history = History(filesystem)
        _, head = open_or_create(filesystem, history, must_be_new=True)
        blocks = BlockPool(_BLOCK_BYTES)
        for first in range(0, len(columns["reward"]), STEPS * _STORED_TOGETHER):
            objects: dict[str, Any] = {}
            for start in range(first, min(first + STEPS * _STORED_TOGETHER, len(columns["reward"])), STEPS):
                one = {path: array[start : start + STEPS] for path, array in columns.items()}
                builder = SegmentBuilder(COLUMNS, preset=None, filesystem=filesystem, workers=workers, blocks=blocks)
                builder.append_rows(one)
                ending = Ending(STEPS, True, False, float(one["reward"].sum()), {"task": "bench"})
                rows.append(ending.row(builder, uuid=uuid.uuid4().bytes, created_at=dt.datetime.now(dt.UTC)))
                builder.close_pages()
                segment = builder.finish()
                entries.append(segment.entry)
                objects.update(segment.objects)
            filesystem.store(objects)
        manifest = build_table(rows, entries, schema.metadata)
        data, key = encode_manifest(manifest), manifest_key(uuid.uuid4().hex)
        filesystem.store({key: [data]})
        entry = manifest_entry(key, data, manifest, first_id=0)
        history.commit(Append(schema, (entry,), sum(e.nbytes for e in entries)), head)


def _require_same(places: Mapping[str, Path]) -> None:
    """Fail unless all stores hold the same steps."""
    found = []
    for place in places.values():
        with trajstore.open(place) as store:
            view = store.trajectories
            found.append((len(view), float(np.sum(view.read("obs"), dtype=np.float64)), float(view.read("reward")[-1])))
    if len(set(found)) != 1:
        raise RuntimeError(f"the stores hold different steps: {found}")


def _compared(context: Context, places: Mapping[str, Path], count: int) -> Iterator[Measurement]:
    for name, (about, contender) in _JOBS.items():
        context.say(f"compact: {about}")
        for label, rounds, warmup, bar in (
            ("after", context.pick(15, 3), 1, Bar("at most", AFTER_BAR)),
            ("before", context.pick(3, 2), 0, None),
        ):
            timings = context.measure(
                [contender(label, places[label]), contender("one go", places["one go"])], rounds=rounds, warmup=warmup
            )
            yield Measurement(
                name=f"{name}, {label}",
                what=f"{about}, {count:,} segments of one trajectory, {_NAMES[label]}, time / a store written in one go",
                measured=ratio_of_medians(timings, label, "one go"),
                bar=bar,
                timings=timings,
                spread=paired_ratios(timings, label, "one go"),
            )


def _opening(name: str, place: Path) -> Contender:
    def job(_none: object) -> None:
        with trajstore.open(place) as store:
            len(store.trajectories)

    folders = _folders_of(place)
    return Contender(name=name, prepare=lambda: _forget(folders), run=job)


def _reading(name: str, place: Path) -> Contender:
    folders = _folders_of(place)

    def fresh() -> trajstore.Store:
        store = trajstore.open(place)
        len(store.trajectories)
        _forget(folders)
        return store

    def job(store: trajstore.Store) -> None:
        for column in store.schema:
            store.trajectories.read(column.path)

    return Contender(name=name, prepare=fresh, run=job, cleanup=trajstore.Store.close)


def _folders_of(place: Path) -> list[Path]:
    """Where the files lie that the latest version needs; what compaction left for earlier ones is not among them."""
    with trajstore.open(place) as store:
        segments = [place / "segments" / entry.uuid for entry in store.trajectories._table.segments]
    return [place / "snapshots", place / "manifests", *segments]


def _forget(folders: Iterable[Path]) -> None:
    for folder in folders:
        drop_file_cache(folder)


_JOBS: Mapping[str, tuple[str, Callable[[str, Path], Contender]]] = {
    "opening": ("opening, file cache dropped", _opening),
    "reading": ("reading every column, file cache dropped", _reading),
}
