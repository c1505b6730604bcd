"""What buffers write outlives SIGKILL, and what they overwrite gives its disk space back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import trajstore
from tests.support.rare import also_slow
from trajstore.buffers.ring import Ring
from trajstore.buffers.stored_ring import StoredRing


def nbytes_in(folder: Path) -> int:
    """Of all files; small ones count as a block of a disk."""
    return sum(max(path.stat().st_size, 512) for path in folder.rglob("*") if path.is_file())


def rows(first: int, count: int) -> dict[str, torch.Tensor]:
    number = torch.arange(first, first + count)
    generator = torch.Generator().manual_seed(first)
    return {"number": number, "obs": torch.rand(count, 16, generator=generator)}


def test_fifty_saves_take_the_space_of_one(tmp_path: Path) -> None:
    ring = Ring(2000)
    ring.add(rows(0, 2000))
    ring.save(tmp_path / "once")
    for number in range(50):
        ring.add(rows(2000 + 10 * number, 10))
        ring.save(tmp_path / "often")
    assert nbytes_in(tmp_path / "often") < 1.5 * nbytes_in(tmp_path / "once")
    loaded = Ring(2000)
    loaded.load(tmp_path / "often")
    everything = torch.arange(2000)
    assert (loaded.size, loaded.pointer) == (2000, 500)
    for name, expected in ring.gather(everything).items():
        assert torch.equal(loaded.gather(everything)[name], expected)


def test_objectrl_saves_take_the_space_of_one(tmp_path: Path) -> None:
    pytest.importorskip("tensordict")
    from trajstore.buffers.objectrl import ReplayBuffer

    buffer = ReplayBuffer("cpu", "cpu", 2000)
    buffer.add_batch(rows(0, 2000))
    buffer.save(tmp_path / "once")
    for _ in range(20):
        buffer.save(tmp_path / "often")
    assert nbytes_in(tmp_path / "often.store") < 1.5 * nbytes_in(tmp_path / "once.store")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["often.metadata", "once.metadata"]


def test_a_save_leaves_nothing_of_one_that_was_cut_short(tmp_path: Path) -> None:
    ring = Ring(1000)
    ring.add(rows(0, 1000))
    ring.save(tmp_path / "ring")
    once = nbytes_in(tmp_path / "ring")
    with trajstore.open(tmp_path / "ring", "a") as store:
        for part in range(5):
            fields = {"ring_save": 2, "ring_capacity": 1000, "ring_size": 1000, "ring_pointer": 0, "ring_first": 0}
            store.append(rows(900 * part, 900), metadata=fields)
    assert nbytes_in(tmp_path / "ring") > 3 * once
    ring.save(tmp_path / "ring")
    assert nbytes_in(tmp_path / "ring") < 1.5 * once


@pytest.mark.parametrize("batch", [1, 7, 300, 5000])
def test_ten_times_the_capacity_takes_the_space_of_three(tmp_path: Path, batch: int) -> None:
    capacity = 2000
    with StoredRing(tmp_path / "once", capacity) as ring:
        ring.add(rows(0, capacity))
    once = nbytes_in(tmp_path / "once")
    most = added = 0
    with StoredRing(tmp_path / "often", capacity) as ring:
        while added < 10 * capacity:
            ring.add(rows(added, batch), keep_last=True)
            added += batch
            if added % (capacity // 2) < batch:
                ring.flush()
                most = max(most, nbytes_in(tmp_path / "often"))
    assert max(most, nbytes_in(tmp_path / "often")) < 3 * once
    with StoredRing(tmp_path / "often", capacity) as ring:
        numbers = ring.gather(torch.arange(capacity))["number"]
        assert sorted(numbers.tolist()) == list(range(added - capacity, added))
        ring.clear()
        assert nbytes_in(tmp_path / "often") < 0.5 * once


def test_clearing_gives_space_back_and_the_ring_goes_on(tmp_path: Path) -> None:
    with StoredRing(tmp_path / "ring", 500) as ring:
        for round_ in range(20):
            ring.add(rows(500 * round_, 500))
            ring.flush()
            ring.clear()
        assert ring.size == 0
        ring.add(rows(7, 3))
        assert ring.gather(torch.arange(3))["number"].tolist() == [7, 8, 9]
        with StoredRing(tmp_path / "once", 500) as once:
            once.add(rows(0, 500))
        ring.flush()
        assert nbytes_in(tmp_path / "ring") < nbytes_in(tmp_path / "once")


def killed(folder: Path, kind: str, kills: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.buffer_crash", str(folder), str(kills), kind, str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["failure"] is None, report["failure"]
    assert report["threads"] == 1
    return report


@pytest.mark.parametrize("kind", also_slow(["saves", "stored", "added"], ["saves"]))
def test_nothing_acknowledged_is_lost_by_a_kill(tmp_path: Path, kind: str) -> None:
    if kind == "saves":
        pytest.importorskip("tensordict")
    assert killed(tmp_path, kind, 4)["done"] >= 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["saves", "stored", "added"])
def test_nothing_acknowledged_is_lost_by_many_kills(tmp_path: Path, kind: str) -> None:
    if kind == "saves":
        pytest.importorskip("tensordict")
    assert killed(tmp_path, kind, 150)["done"] >= 150
