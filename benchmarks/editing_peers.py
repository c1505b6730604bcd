"""Dropping one of a thousand episodes, and merging datasets, beside Minari.

Invariant: both sides hold the same episodes, and end with a dataset on disk that opens without what was dropped. Minari's
``filter_episodes`` leaves nothing on disk, so what it keeps is written as a dataset by ``update_episodes``, its own way to
add episodes; it is given the better of its two file formats.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import gymnasium
import numpy as np

import trajstore
from benchmarks.editing_merge import nbytes_below
from benchmarks.harness import Contender, Context, Measurement, paired_ratios, ratio_of_medians

STEPS, PARTS = 200, 10
MERGED = 200  # episodes; with a thousand, `combine_datasets` takes minutes
FORMATS = ("hdf5", "arrow")
MISSING: dict[str, str] = {
    "LeRobot": "0.4.4, the last for Python 3.11, needs torch < 2.11 and torchvision, and this runs beside a later torch"
}


def _minari() -> ModuleType | None:
    try:
        importlib.import_module("h5py")
        return importlib.import_module("minari")
    except ImportError as error:
        MISSING["Minari"] = f"it cannot be imported ({error}); pip install 'minari[hdf5]'"
        return None


def drop_and_merge(context: Context) -> Iterator[Measurement]:
    """Bytes written and time, for the drop of one episode and for the merge of ten datasets."""
    minari = _minari()
    if minari is None:
        return
    episodes = _episodes(context.pick(1000, 50))
    with mock.patch.dict(os.environ, {"MINARI_DATASETS_PATH": str(context.scratch / "minari")}):
        context.say("drop: writing datasets")
        peer = _Minari(minari, episodes)
        _write(context.scratch / "ours" / "all", episodes)
        merged = episodes[:MERGED]
        for part in range(PARTS):
            _write(context.scratch / "ours" / str(part), merged[part::PARTS])
        context.say("drop")
        yield from _drop(context, peer, len(episodes))
        context.say("merge beside Minari")
        yield from _merge(context, peer, len(merged), len(merged) * STEPS)


def _episodes(count: int) -> list[dict[str, np.ndarray]]:
    """States ``(201, 17)``, actions ``(200, 6)`` and rewards of each."""
    rng = np.random.default_rng(0)
    return [
        {
            "obs": rng.standard_normal((STEPS + 1, 17), np.float32),
            "action": rng.standard_normal((STEPS, 6), np.float32),
            "reward": rng.random(STEPS),
        }
        for _ in range(count)
    ]


def _write(place: Path, episodes: list[dict[str, np.ndarray]]) -> None:
    with trajstore.open(place, mode="x") as store:
        for episode in episodes:
            store.append(episode, truncated=True)


class _Minari:
    """Its datasets of the same episodes, and what is done to them; names are below its datasets' folder.

    Args:
        minari: The package.
        episodes: As ``_episodes`` makes them.
    """

    def __init__(self, minari: ModuleType, episodes: list[dict[str, np.ndarray]]) -> None:
        self._minari = minari
        self._buffer = importlib.import_module("minari.data_collector").EpisodeBuffer
        self._storage = importlib.import_module("minari.dataset.minari_storage").MinariStorage
        self._spaces = {
            "observation_space": gymnasium.spaces.Box(-np.inf, np.inf, (17,), np.float32),
            "action_space": gymnasium.spaces.Box(-np.inf, np.inf, (6,), np.float32),
        }
        for form in FORMATS:
            self._create(f"all/{form}-v0", episodes, form)
            for part in range(PARTS):
                self._create(f"part{part}/{form}-v0", episodes[:MERGED][part::PARTS], form)

    def _create(self, name: str, episodes: list[dict[str, np.ndarray]], form: str) -> None:
        buffers = [
            self._buffer(
                id=number,
                observations=episode["obs"],
                actions=episode["action"],
                rewards=list(episode["reward"]),
                terminations=[False] * STEPS,
                truncations=[False] * (STEPS - 1) + [True],
            )
            for number, episode in enumerate(episodes)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody needs to know the author
            self._minari.create_dataset_from_buffers(name, buffers, data_format=form, **self._spaces)

    def drop(self, form: str, number: int) -> Any:
        """A dataset of all episodes but one."""
        old = self._minari.load_dataset(f"all/{form}-v0")
        place = Path(os.environ["MINARI_DATASETS_PATH"]) / "results" / "data"
        place.mkdir(parents=True)
        new = self._storage.new(place, data_format=form, **self._spaces)
        kept = [n for n in range(old.total_episodes) if n != number]
        new.update_episodes(self._as_buffer(episode) for episode in old.storage.get_episodes(kept))
        return new

    def _as_buffer(self, episode: Mapping[str, Any]) -> Any:
        """As ``MinariStorage.update_from_storage`` makes one."""
        names = ("seed", "observations", "actions", "rewards", "terminations", "truncations", "infos")
        return self._buffer(id=None, **{name: episode.get(name) for name in names})

    def merge(self, form: str) -> Any:
        """All parts as one dataset."""
        parts = [self._minari.load_dataset(f"part{part}/{form}-v0") for part in range(PARTS)]
        return self._minari.combine_datasets(parts, "results").storage


def _drop(context: Context, peer: _Minari, count: int) -> Iterator[Measurement]:
    ours, number = context.scratch / "ours" / "all", count // 2

    def delete(work: Path) -> None:
        with trajstore.open(work / "store", mode="a") as store:
            store.delete([number])

    def prepare(work: Path) -> None:
        shutil.copytree(ours, work / "store")

    yield from _beside(
        context,
        "drop",
        f"dropping 1 of {count} episodes",
        "`filter` and writing what stays",
        (prepare, delete, lambda work: _count(work / "store")),
        lambda form: lambda: peer.drop(form, number),
        count - 1,
    )


def _merge(context: Context, peer: _Minari, count: int, steps: int) -> Iterator[Measurement]:
    parts = [context.scratch / "ours" / str(part) for part in range(PARTS)]
    yield from _beside(
        context,
        "merge with Minari",
        f"merging {PARTS} datasets of {count // PARTS} episodes ({steps:,} steps in all)",
        "`combine_datasets`",
        (
            lambda _work: None,
            lambda work: trajstore.merge(parts, work / "merged"),
            lambda work: _count(work / "merged"),
        ),
        lambda form: lambda: peer.merge(form),
        count,
    )


def _count(store: Path) -> int:
    above = str(store.parents[1])  # it may refer to stores beside its parent
    with trajstore.open(store, bases={above: None}) as opened:
        return len(opened.trajectories)


def _beside(
    context: Context,
    name: str,
    what: str,
    how: str,
    ours: tuple[Callable[[Path], object], Callable[[Path], object], Callable[[Path], int]],
    theirs: Callable[[str], Callable[[], Any]],
    expected: int,
) -> Iterator[Measurement]:
    """Time and bytes of an edit on both sides; each must leave ``expected`` episodes.

    Args:
        context: Of the run.
        name: Of the measurements.
        what: Is edited.
        how: Minari does it.
        ours: What is done before the edit in a fresh folder, the edit, and the trajectories that are there afterwards.
        theirs: The edit for a file format; gives the resulting storage.
        expected: Episodes afterwards.
    """
    work, results = context.scratch / "work", context.scratch / "minari" / "results"
    written: dict[str, int] = {}
    prepare, edit, counted = ours
    before = [0]

    def contender(label: str, run: Callable[[], object], left: Callable[[Any], int]) -> Contender:
        outcome: list[Any] = []

        def ready() -> None:
            work.mkdir()
            prepare(work)
            os.sync()
            before[0] = nbytes_below(context.scratch)

        def job(_none: object) -> None:
            outcome[:] = [run()]

        def measure(_none: object) -> None:
            written[label] = nbytes_below(context.scratch) - before[0]
            if left(outcome[0]) != expected:
                raise RuntimeError(f"{label} left {left(outcome[0])} episodes of {expected}: no comparison")
            outcome.clear()
            shutil.rmtree(work)
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(results)

        return Contender(name=label, prepare=ready, run=job, cleanup=measure)

    contenders = [contender("trajstore", lambda: edit(work), lambda _none: counted(work))]
    contenders += [contender(f"Minari, {f}", theirs(f), lambda storage: storage.total_episodes) for f in FORMATS]
    timings = context.measure(contenders, rounds=context.pick(3, 2), warmup=0)
    labels = [f"Minari, {form}" for form in FORMATS]
    faster = min(labels, key=lambda label: timings[label].median_s)
    smaller = min(labels, key=lambda label: written[label])
    yield Measurement(
        name=f"{name}, time",
        what=f"{what}: speed / Minari, {how}",
        measured=ratio_of_medians(timings, faster, "trajstore"),
        timings=timings,
        spread=paired_ratios(timings, faster, "trajstore"),
        details={
            "opponent": faster,
            "versions": {name: importlib.metadata.version(name) for name in ("minari", "h5py")},
        },
    )
    yield Measurement(
        name=f"{name}, bytes",
        what=f"the same: bytes that Minari writes / bytes that trajstore writes ({written['trajstore'] / 1e3:.1f} kB)",
        measured=written[smaller] / written["trajstore"],
        details={"bytes_written": written, "opponent": smaller},
    )
