"""What an edit writes: rows about trajectories, never their steps. Bytes are counted on the disk, sources included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trajstore

STORES, EACH, STEPS = 20, 1000, 8
TASKS = ("reach", "push", "pick", "place")
# A result's own documents, and in each source one pin.
FIXED_BYTES, PIN_BYTES = 16_384, 1_024
MAX_ROW_BYTES = 48  # the uuid and the rest of a manifest's row; 120 are allowed with everything else
SEGMENT_BYTES = 1_024  # what a manifest says about a segment


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of stores, whose steps fill 640 bytes a trajectory."""
    top = tmp_path_factory.mktemp("cost")
    rng = np.random.default_rng(0)
    for number in range(STORES):
        columns = {"obs": rng.random((EACH * STEPS, 10)), "reward": rng.random(EACH * STEPS)}
        about = [{"task": TASKS[n % len(TASKS)], "seed": number * EACH + n} for n in range(EACH)]
        with trajstore.open(top / "sources" / f"{number:02}", mode="x") as store:
            store.append_many(columns, np.full(EACH, STEPS), terminated=True, metadata=about)
    return top


def nbytes(folder: Path) -> int:
    """Bytes of every file below; a hard link adds none."""
    found = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum({(status.st_dev, status.st_ino): status.st_size for status in found}.values())


def allowed(rows: int, segments: int, results: int = 1) -> int:
    """Bytes that ``results`` stores of so many rows may take, each of which names so many segments."""
    return MAX_ROW_BYTES * rows + results * (FIXED_BYTES + segments * (SEGMENT_BYTES + PIN_BYTES))


@pytest.mark.parametrize("share", ["reference", "link"])
def test_a_merge_writes_rows(folder, share):
    sources = sorted((folder / "sources").iterdir())
    before = nbytes(folder)
    assert trajstore.merge(sources, folder / f"merged-{share}", share=share) == STORES * EACH
    written = nbytes(folder) - before
    assert written <= allowed(STORES * EACH, STORES)
    assert written <= 120 * STORES * EACH


def test_a_split_writes_rows(folder):
    sources = sorted((folder / "sources").iterdir())
    trajstore.merge(sources, folder / "all")
    before = nbytes(folder)
    found = trajstore.split(folder / "all", {folder / "chosen": "task == 'pick'", folder / "others": "task != 'pick'"})
    assert list(found.values()) == [STORES * EACH // 4, 3 * STORES * EACH // 4]
    written = nbytes(folder) - before
    assert written <= allowed(STORES * EACH, STORES, results=2)
    assert written <= 120 * STORES * EACH


def test_a_split_of_one_trajectory_pins_one_store(folder):
    trajstore.merge(sorted((folder / "sources").iterdir()), folder / "whole")
    before = nbytes(folder)
    assert list(trajstore.split(folder / "whole", folder / "one", first=1).values()) == [1]
    assert nbytes(folder) - before <= allowed(1, 1)


def test_a_deletion_writes_a_version_and_no_row(folder):
    place = folder / "sources" / "00"
    with trajstore.open(place, mode="a") as store:
        before = nbytes(folder)
        store.delete(store.trajectories.filter("task == 'pick'").ids[:10])
        assert nbytes(folder) - before <= 4_096
        assert store.num_trajectories == EACH - 10
