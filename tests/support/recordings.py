"""Random recordings, stores of them, and options of loaders; and how a batch is held against the reference.

Invariant: what is drawn is valid for the batch contract, except that a window may leave no anchor.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import trajstore
from tests.support.reference import VIRTUAL, Anchor, Recorded, Recording, reference_batch
from tests.support.strategies import bits, columns, trajectory
from trajstore import Column, Schema, View
from trajstore.names import nest

METADATA = {
    "flagged": "bool",
    "number": "int64",
    "quality": "float64",
    "task_name": "string",
    "raw_bytes": "bytes",
    "seen_at": "timestamp",
}
KEEP = Column(path="is_kept", dtype="bool")
PADS = ("none", "edge", "zero")


def metadata(rng: np.random.Generator) -> dict[str, Any]:
    """Fields of one trajectory; those that may be null are so at times."""
    seen_at = dt.datetime(1960, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=int(rng.integers(0, 2**51)))
    fields: dict[str, Any] = {"flagged": bool(rng.integers(2)), "number": int(rng.integers(-(2**63), 2**63 - 1))}
    fields |= {"seen_at": seen_at, "quality": float(rng.normal()), "task_name": "pick é", "raw_bytes": b"\0\xff"}
    return {k: v for k, v in fields.items() if k in ("flagged", "number", "seen_at") or rng.integers(4)}


def recording_of(rng: np.random.Generator, schema: Sequence[Column], lengths: Sequence[int]) -> Recording:
    """A trajectory of each length; optional columns are there half of the time."""
    made = []
    for length in lengths:
        ended = int(rng.integers(4))  # terminated, truncated, neither, both
        rows = trajectory(rng, list(schema), length)
        made.append(Recorded(rows, length, ended in (0, 3), ended in (1, 3), metadata(rng)))
    return Recording(Schema(tuple(schema), METADATA), made)


@st.composite
def recordings(draw: st.DrawFn, max_trajectories: int = 6) -> Recording:
    """Columns of any kind, and a boolean one to choose anchors by; trajectories of 1 to 40 steps."""
    schema = [c for c in draw(columns(4)) if c.path.split("/")[0] not in VIRTUAL]
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=max_trajectories))
    return recording_of(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), [*schema, KEEP], lengths)


@contextlib.contextmanager
def view_of(
    recording: Recording,
    *,
    flush_after: Sequence[int] = (),
    committed: bool = True,
    cache_bytes: int | None = 16 * 1024 * 1024,
    **options: Any,
) -> Iterator[View]:
    """A store in memory that holds a recording.

    Args:
        recording: What is appended.
        flush_after: Trajectories after which a segment ends.
        committed: Whether what follows the last of them is flushed too.
        cache_bytes: Of the store, more than any recording needs; None for the default.
        **options: Of ``trajstore.open``.
    """
    if cache_bytes is not None:
        options["cache_bytes"] = cache_bytes
    url = f"memory://sampling/{uuid.uuid4().hex}"
    with trajstore.open(url, "a", schema=recording.schema, **options) as store:
        for number, recorded in enumerate(recording.trajectories):
            append(store, recorded)
            if number in flush_after:
                store.flush()
        if committed:
            store.flush()
        yield store.trajectories


def append(store: trajstore.Store, recorded: Recorded) -> None:
    """Append one trajectory to a store."""
    ended = {"terminated": recorded.terminated, "truncated": recorded.truncated}
    store.append(nest(recorded.columns), metadata=recorded.metadata, **ended)


def taken(recording: Recording, positions: Sequence[int]) -> Recording:
    """What ``view.take(positions)`` holds."""
    return replace(recording, trajectories=[recording.trajectories[p] for p in positions])


@st.composite
def windows(draw: st.DrawFn, recording: Recording, *, located: bool = True) -> dict[str, Any]:
    """Options of a loader that say what a batch is made of.

    Args:
        draw: Hypothesis'.
        recording: What is sampled.
        located: Whether every batch says where its windows are from: see ``anchors_of``.
    """
    common = recording.common_paths
    parents = {p.split("/")[0] for p in common if "/" in p}
    parents = {p for p in parents if all(c.path in common for c in recording.schema.select(p))}
    pool = [*common, *sorted(parents), *(f"next_{p}" for p in common), *VIRTUAL, *METADATA]
    names: list[str] = []
    for name in draw(st.lists(st.sampled_from(pool), min_size=1, max_size=6)):
        if not any(name == n or n.startswith(f"{name}/") or name.startswith(f"{n}/") for n in names):
            names.append(name)
    if located:
        names = [n for n in names if n not in ("trajectory", "step")] + ["trajectory", "step"]
    options: dict[str, Any] = {"pad": draw(st.sampled_from(PADS))}
    form = draw(st.sampled_from(["steps", "window", "mapping"]))
    if form == "mapping":
        offset = st.integers(-4, 4)
        offsets = offset | st.lists(offset, min_size=1, max_size=4) | st.integers(1, 6).map(range)
        options["window"] = {n: 0 if located and n in ("trajectory", "step") else draw(offsets) for n in names}
    else:
        options["columns"] = names
    if form == "window":
        options["window"] = draw(st.integers(1, 6))
        options["dilation"] = draw(st.sampled_from([1, 1, 2, 3]))
    chosen = draw(st.sampled_from(["all", "all", "column", "array"]))
    if chosen == "column":
        options["anchors"] = KEEP.path
    elif chosen == "array":
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        options["anchors"] = rng.random(recording.num_steps) < 0.5
    return options


def anchors_of(batch: Mapping[str, Any]) -> list[Anchor]:
    """Where the windows of a batch are from, which has the virtual columns ``trajectory`` and ``step``."""
    trajectories, steps = batch["trajectory"], batch["step"]
    if steps.dim() == 2:
        trajectories, steps = trajectories[:, 0], steps[:, 0]
    return list(zip(trajectories.tolist(), steps.tolist(), strict=True))


def check_batch(batch: Mapping[str, Any], recording: Recording, options: Mapping[str, Any]) -> list[Anchor]:
    """Fail unless a batch equals the reference's for the anchors that it says it has; returns them."""
    anchors = anchors_of(batch)
    close = ("reward", "discount") if options.get("n_step") else ()
    assert_same_batch(batch, reference_batch(recording, anchors, **options), close=close)
    return anchors


def least_cache_bytes(view: View, batch_size: int, **options: Any) -> int:
    """The smallest cache that a loader takes, as its error says."""
    message = "cache_bytes >= 1"
    try:
        view.loader(batch_size, cache_bytes=1, **options).close()
    except trajstore.CacheTooSmallError as error:
        message = str(error)
    named = re.search(r"cache_bytes ?>= ?(\d+)", message)
    assert named is not None, message
    return int(named[1])


def assert_same_batch(found: Mapping[str, Any], expected: Mapping[str, Any], *, close: Sequence[str] = ()) -> None:
    """Fail unless a loader's batch holds what the reference's does: same names, dtypes and shapes, the same bits.

    Args:
        found: The loader's.
        expected: The reference's.
        close: Names of floating values that need only be close: sums, whose order is free.
    """
    flat, wanted = flat_batch(found), flat_batch(expected)
    for name in [n for n in flat if n.startswith("is_pad/") and n not in wanted]:
        del flat[name]  # left open
    assert sorted(flat) == sorted(wanted)
    for name, value in wanted.items():
        if name in close:
            assert (flat[name].dtype, flat[name].shape) == (value.dtype, value.shape), name
            tolerance = 16 * torch.finfo(value.dtype).eps
            torch.testing.assert_close(flat[name], value, rtol=max(tolerance, 1e-6), atol=tolerance, equal_nan=True)
        else:
            assert_same_bits(flat[name], value, name)


def assert_same_bits(found: Any, expected: Any, name: str = "value") -> None:
    """Fail unless both are tensors, object arrays, or pairs of those (ragged), of the same bits."""
    if isinstance(expected, tuple):
        assert isinstance(found, tuple), f"{name}: {type(found)}"
        assert len(found) == len(expected), name
        for part, (f, e) in enumerate(zip(found, expected, strict=True)):
            assert_same_bits(f, e, f"{name}[{part}]")
        return
    assert type(found) is type(expected), f"{name}: {type(found)}, expected {type(expected)}"
    assert found.dtype == expected.dtype, f"{name}: {found.dtype}, expected {expected.dtype}"
    assert found.shape == expected.shape, f"{name}: {found.shape}, expected {expected.shape}"
    if isinstance(expected, torch.Tensor):
        assert bits(found) == bits(expected), f"{name} differs"
    else:
        pairs = list(zip(found.reshape(-1).tolist(), expected.reshape(-1).tolist(), strict=True))
        assert all(type(f) is type(e) and f == e for f, e in pairs), f"{name}: {found}, expected {expected}"


def flat_batch(batch: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested batch as ``{path: value}``."""
    flat: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Mapping):
            flat.update(flat_batch(value, f"{prefix}{key}/"))
        else:
            flat[prefix + key] = value
    return flat
