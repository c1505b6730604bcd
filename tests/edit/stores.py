"""Trajectories that tell which they are, and what a store should hold of them.

Invariant: a trajectory is a pure function of its number, so what a store shows is computed again and never copied from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import trajstore
from tests.support.faulty import FaultyDisk
from trajstore.edit.lineage import LINEAGE
from trajstore.schema import Column
from trajstore.storage.local import LocalFilesystem
from trajstore.view import View

SCHEMA = [
    Column(path="obs/image", dtype="uint8", shape=(4, 3), extra=1, page_rows=4),
    Column(path="obs/state", dtype="float64", extra=1),
    Column(path="action", dtype="int32", shape=(2,)),
    Column(path="reward", dtype="float64"),
    Column(path="note", dtype="string"),
    Column(path="points", dtype="int16", ragged=True),
]


def numbered(number: int) -> dict[str, Any]:
    """Columns of a trajectory: tensors, a scalar, texts and lists; two have a final row."""
    rng = np.random.default_rng(number)
    length = length_of(number)
    return {
        "obs": {
            "image": rng.integers(0, 256, (length + 1, 4, 3), dtype=np.uint8),
            "state": number + np.arange(length + 1) / 64,
        },
        "action": np.full((length, 2), number, np.int32),
        "reward": np.arange(length) + number / 8,
        "note": np.array([f"{number}.{step}" for step in range(length)], object),
        "points": [np.arange(step % 3, dtype=np.int16) + number for step in range(length)],
    }


def length_of(number: int) -> int:
    """Its steps."""
    return 1 + number % 7


def metadata_of(number: int) -> dict[str, Any]:
    """Its fields; one is null now and then."""
    return {"number": number, **({"task": f"task-{number % 3}"} if number % 4 else {})}


def append(store: trajstore.Store, number: int) -> Any:
    """Append it; returns the reference."""
    if not len(store.schema):
        store.declare(SCHEMA)
    return store.append(
        numbered(number), terminated=number % 2 == 0, truncated=number % 3 == 0, metadata=metadata_of(number)
    )


def filled(url: str | Path, numbers: Sequence[int], *, per_commit: int = 1, **options: Any) -> str:
    """A store of these, some per commit; its URL."""
    with trajstore.open(url, "a", **options) as store:
        for count, number in enumerate(numbers, 1):
            append(store, number)
            if count % per_commit == 0:
                store.flush()
    return str(url)


def numbers_in(view: View) -> list[int]:
    """Which ones a view shows, by their fields."""
    return [trajectory.metadata["number"] for trajectory in view]


def assert_holds(view: View, numbers: Sequence[int]) -> None:
    """Fail unless a view shows exactly these, in this order, every bit, trajectory by trajectory and column by column.

    The fields that say where one came from, after a merge, are not looked at.
    """
    assert numbers_in(view) == list(numbers)
    assert view.lengths.tolist() == [length_of(n) for n in numbers]
    for stored, number in zip(view, numbers, strict=True):
        tree = numbered(number)
        flat = {**{f"obs/{k}": v for k, v in tree.pop("obs").items()}, **tree}
        assert {k: v for k, v in stored.metadata.items() if k not in LINEAGE} == metadata_of(number)
        assert (stored.terminated, stored.truncated) == (number % 2 == 0, number % 3 == 0)
        assert set(stored.columns) == set(flat)
        for path, value in flat.items():
            found = stored.column(path)[:]
            if path == "points":
                assert [part.tolist() for part in found] == [part.tolist() for part in value]
            else:
                assert found.dtype == value.dtype
                np.testing.assert_array_equal(found, value)
    if numbers:
        np.testing.assert_array_equal(
            view.read("action"), np.repeat(np.array(numbers, np.int32), view.lengths)[:, None].repeat(2, 1)
        )
        where, step = np.arange(len(numbers)), view.lengths - 1
        batch = view.gather(where, step, columns=["action", "next_obs/state", "trajectory", "step"])
        assert batch["action"][:, 0].tolist() == list(numbers)
        assert batch["next_obs"]["state"].tolist() == [n + length_of(n) / 64 for n in numbers]
        assert (batch["trajectory"].tolist(), batch["step"].tolist()) == (where.tolist(), step.tolist())


def holds(url: str | Path, numbers: Sequence[int], **options: Any) -> None:
    """``assert_holds`` of the latest version of a store, as a reader who knows nothing finds it."""
    with trajstore.open(url, **options) as store:
        assert_holds(store.trajectories, numbers)
        assert store.num_trajectories == len(numbers)


def objects_of(folder: str | Path) -> dict[str, bytes]:
    """Every file under a folder, by its path; nothing if it is not there."""
    root = Path(folder)
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def segments_of(folder: str | Path) -> set[str]:
    """Uuids of the segments that have a folder."""
    top = Path(folder) / "segments"
    return {p.name for p in top.iterdir()} if top.exists() else set()


class CountingDisk(FaultyDisk):
    """A healthy disk that counts the system calls that change it."""

    def __init__(self, root: str) -> None:
        super().__init__(root, 0, at=-1)


class HeldDisk(LocalFilesystem):
    """A disk that calls ``around_create`` in place of every creation of a version."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.around_create: Any = lambda key, create: create()

    def create(self, key: str, data: bytes) -> bool:
        """As asked, when the test lets it."""
        create = super().create
        if not key.startswith("snapshots/"):
            return create(key, data)
        won: bool = self.around_create(key, lambda: create(key, data))
        return won
