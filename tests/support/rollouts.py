"""Trajectories that are a pure function of (seed, number), and the check of a whole store against them.

Invariant: nothing here asks trajstore what a trajectory should be. What a store shows is computed again from the seed and
number in its metadata, so a torn, swapped or doubled trajectory cannot look right.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

import trajstore
from trajstore.format import codecs
from trajstore.write import shard, writer

_COLUMNS = ("obs/image", "obs/state", "action", "reward", "note")


def make_pages_small(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Some steps fill a page, so that a short episode has many and streams while it runs.

    Args:
        set_attribute: ``setattr``, or one that is undone.
    """
    for module, name, value in (
        (codecs, "TARGET_FRAME_PAGE_BYTES", 512),
        (codecs, "TARGET_PAGE_BYTES", 256),
        (shard, "TARGET_ARROW_PAGE_BYTES", 512),
        (shard, "_BLOCK_BYTES", 1024),
        (writer, "_SUBMIT_BYTES", 1024),
    ):
        assert hasattr(module, name)
        set_attribute(module, name, value)


@dataclass(frozen=True)
class Acknowledged:
    """A trajectory whose flush has returned."""

    seed: int
    number: int
    uuid: str
    digest: str

    def to_line(self) -> bytes:
        """One line for a pipe."""
        return f"{self.seed} {self.number} {self.uuid} {self.digest}\n".encode()

    @classmethod
    def from_line(cls, line: str) -> Acknowledged:
        """The inverse."""
        seed, number, uuid, digest = line.split()
        return cls(int(seed), int(number), uuid, digest)


def rollout(seed: int, number: int, *, length: int | None = None) -> dict[str, np.ndarray]:
    """Columns by path; those of ``obs`` have a final row."""
    rng = np.random.default_rng([seed, number])
    steps = int(rng.integers(1, 9)) if length is None else length
    return {
        "obs/image": rng.integers(0, 255, (steps + 1, 6, 5), dtype=np.uint8),
        "obs/state": rng.standard_normal((steps + 1, 3)).astype(np.float32),
        "action": rng.integers(-9, 9, steps),
        "reward": rng.standard_normal(steps),
        "note": np.array([f"{seed}.{number}.{step}" for step in range(steps)], object),
    }


def nested(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """As ``Store.append`` takes it."""
    obs = {path.removeprefix("obs/"): data for path, data in flat.items() if path.startswith("obs/")}
    return {"obs": obs, **{path: data for path, data in flat.items() if "/" not in path}}


def digest(flat: dict[str, np.ndarray]) -> str:
    """Hash of all columns: names, dtypes, shapes and values."""
    whole = hashlib.sha256()
    for path in _COLUMNS:
        data = flat[path]
        values = "\0".join(data).encode() if data.dtype == object else np.ascontiguousarray(data).tobytes()
        whole.update(f"{path} {data.dtype} {data.shape}".encode() + values)
    return whole.hexdigest()


def append_rollout(store: trajstore.Store, seed: int, number: int, *, batch: int = 0, length: int | None = None) -> Any:
    """Append one; ``batch`` names the flush that it belongs to. Returns the reference."""
    tree = nested(rollout(seed, number, length=length))
    fields = {"seed": seed, "number": number, "batch": batch, "fixed_length": length or 0}
    return store.append(tree, terminated=number % 2 == 0, metadata=fields)


def stream_rollout(
    store: trajstore.Store,
    seed: int,
    number: int,
    *,
    length: int,
    batch: int = 0,
    midway: Callable[[], None] = lambda: None,
) -> Any:
    """The same, step by step; ``midway`` is called when two thirds are added. Returns the reference."""
    flat = rollout(seed, number, length=length)
    fields = {"seed": seed, "number": number, "batch": batch, "fixed_length": length}
    obs = nested(flat)["obs"]
    with store.begin(metadata=fields) as episode:
        for step in range(length):
            if step == 2 * length // 3:
                midway()
            episode.add(
                obs={name: rows[step] for name, rows in obs.items()},
                action=flat["action"][step],
                reward=flat["reward"][step],
                note=flat["note"][step],
            )
        return episode.end({name: rows[-1] for name, rows in obs.items()}, terminated=number % 2 == 0)


def acknowledge(ref: Any, seed: int, number: int, *, length: int | None = None) -> Acknowledged:
    """What is owed from now on. Call after the flush."""
    return Acknowledged(seed, number, str(ref.uuid), digest(rollout(seed, number, length=length)))


def check_store(store: trajstore.Store, acknowledged: Collection[Acknowledged], *, whole_batches: bool = False) -> int:
    """Hold everything that a store shows against the generator, and what was acknowledged against what it shows.

    Args:
        store: An open handle; its current version is checked.
        acknowledged: What must be there.
        whole_batches: The batch numbers of a seed count its flushes of two trajectories each, which must be both there
            or both absent.

    Returns:
        How many trajectories the store shows.
    """
    view = store.trajectories
    shown: dict[tuple[int, int], tuple[str, str]] = {}
    uuids = set()
    batches: Counter[tuple[int, int]] = Counter()
    assert view.ids.tolist() == list(range(len(view))), "ids are given in commit order, without gap or repeat"
    for trajectory in view:
        fields = trajectory.metadata
        who = (fields["seed"], fields["number"])
        expected = rollout(*who, length=fields["fixed_length"] or None)
        found = {path: trajectory.column(path)[:] for path in _COLUMNS}
        assert digest(found) == digest(expected), f"{who} is not what its seed makes"
        assert trajectory.length == len(expected["action"])
        assert trajectory.terminated == (who[1] % 2 == 0)
        assert who not in shown, f"{who} is there twice"
        shown[who] = (str(trajectory.uuid), digest(expected))
        uuids.add(trajectory.uuid)
        batches[fields["seed"], fields["batch"]] += 1
    assert len(uuids) == len(view), "a uuid is there twice"
    for ack in acknowledged:
        assert shown.get((ack.seed, ack.number)) == (ack.uuid, ack.digest), f"{ack} was acknowledged and is lost"
    if whole_batches:
        assert set(batches.values()) <= {2}, "a flush became visible in part"
    return len(view)
