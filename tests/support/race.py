"""Many processes that append to one store at the same time, and the proof that every append landed exactly once.

The processes are forked from a server process that has imported everything and has no threads: starting eight of them costs
one import, and no client of the test's own process is inherited.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

import trajstore

_START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Report:
    """What one process has to say."""

    writer: int
    landed: tuple[tuple[str, int], ...]  # uuid and id of each of its trajectories, in the order of appending
    races_lost: int


def race(
    url: str,
    *,
    writers: int,
    commits: int,
    storage_options: dict[str, Any] | None = None,
    timeout_s: float = 280.0,
) -> list[Report]:
    """Let ``writers`` processes start from a barrier and commit one trajectory each, ``commits`` times.

    Args:
        url: Of a store to which all can append.
        writers: Processes.
        commits: Of each.
        storage_options: For the store.
        timeout_s: For all of it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["s3fs", "tests.support.race"])
    barrier = context.Barrier(writers)
    results = context.SimpleQueue()
    processes = [
        context.Process(
            target=_append_many, args=(url, writer, commits, storage_options, barrier, results), daemon=True
        )
        for writer in range(writers)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_s)
        codes = [process.exitcode for process in processes]
        if any(codes):
            raise RuntimeError(f"exit codes {codes}")
        return sorted((results.get() for _ in processes), key=lambda report: report.writer)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
        results.close()


def assert_exactly_once(store: trajstore.Store, reports: list[Report], *, commits: int, before: int = 0) -> None:
    """Every append of the race is in the store once, under the id that its writer was told, with its data.

    Args:
        store: Opened after the race.
        reports: Of all writers.
        commits: Of each writer.
        before: Versions, of no trajectory, that were there before.
    """
    total = len(reports) * commits
    view = store.trajectories
    table = view.to_pandas()
    assert len(view) == total
    assert view.ids.tolist() == list(range(total))
    told = {uuid: number for report in reports for uuid, number in report.landed}
    found = {str(trajectory.uuid): trajectory.id for trajectory in view}
    assert found == told
    assert Counter(zip(table["writer"], table["n"], strict=True)) == Counter(
        (writer, n) for writer in range(len(reports)) for n in range(commits)
    )
    for report in reports:
        numbers = [number for _, number in report.landed]
        assert numbers == sorted(numbers)
    values = np.stack([table["writer"], table["n"]], axis=1).repeat(2, axis=0)
    np.testing.assert_array_equal(view.read("value"), values)
    assert store.version == before + total


def _append_many(
    url: str,
    writer: int,
    commits: int,
    storage_options: dict[str, Any] | None,
    barrier: Any,
    results: Any,
) -> None:
    with trajstore.open(url, "a", storage_options=storage_options) as store:
        barrier.wait(_START_TIMEOUT_S)
        refs = []
        for n in range(commits):
            refs.append(store.append({"value": np.full((2, 2), [writer, n], np.int64)}, writer=writer, n=n))
            store.flush()
        landed = tuple((str(ref.uuid), ref.id) for ref in refs)
        results.put(Report(writer, landed, store._history.races_lost))
