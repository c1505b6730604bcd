"""Other readers: FORMAT.md's lines of pyarrow and zarr read back what was appended, in a process without trajstore."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

import trajstore
from tests.support.kinds import every_kind, trajectory_of
from tests.support.strategies import VARIABLE
from trajstore import Column
from trajstore.format.layout import snapshot_key
from trajstore.format.schemas import schemas_folder
from trajstore.format.snapshot import next_timestamp

READER = Path(__file__).with_name("read_without_trajstore.py")
FORMAT_MD = schemas_folder() / "FORMAT.md"
SMALL = [Column(path="obs/state", dtype="float32", shape=(3,), extra=1), Column(path="action", dtype="int64")]


class Model:
    """What was appended: a plain list beside the store, in commit order."""

    def __init__(self, path, schema):
        self.path, self.schema = str(path), schema
        self.rows: list[dict] = []
        self.columns: list[dict] = []

    def append(self, store, columns, **metadata):
        ref = store.append(columns, **metadata)
        length = len(columns[self.schema[0].path]) - self.schema[0].extra
        self.rows.append({"uuid": ref.uuid.bytes, "length": length, **metadata})
        self.columns.append(columns)

    def keep(self, positions):
        self.rows = [self.rows[i] for i in positions]
        self.columns = [self.columns[i] for i in positions]


def plain(rows, column):
    """The bits of rows as a user handed them in."""
    if column.ragged:
        return [(len(one), list(one) if column.dtype in VARIABLE else array_of(one).tobytes()) for one in rows]
    if column.dtype in VARIABLE:
        return list(rows)
    array = array_of(rows)
    return (list(array.shape), array.tobytes())


def array_of(values):
    if isinstance(values, torch.Tensor):
        return values.contiguous().view(torch.int16).numpy() if values.dtype == torch.bfloat16 else values.numpy()
    return np.ascontiguousarray(values)


def read_elsewhere(tmp_path, models, rows_of):
    """What another process finds; ``rows_of(model, column)`` says for which rows of the table to read a column."""
    request = [(m.path, {c.path: rows_of(m, c) for c in m.schema}) for m in models]
    (tmp_path / "request").write_bytes(pickle.dumps(request))
    script = [READER, tmp_path / "request", FORMAT_MD, tmp_path / "answer"]
    # Isolated from this checkout, and any complaint of zarr or pyarrow is a failure.
    command = [sys.executable, "-I", "-W", "error", "-W", "ignore::ResourceWarning", *map(str, script)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return pickle.loads((tmp_path / "answer").read_bytes())


def check(model, found, ids=None):
    table, columns = found
    assert table["uuid"] == [row["uuid"] for row in model.rows]
    assert table["id"] == (list(range(len(model.rows))) if ids is None else ids)
    assert table["length"] == [row["length"] for row in model.rows]
    fields = {name for row in model.rows for name in row} - {"uuid", "length"}
    assert fields - {"terminated", "truncated"} == set(table) & {"task", "score", "late"}
    for name in fields:
        assert table[name] == [row.get(name) for row in model.rows], name
    by_path = {column.path: column for column in model.schema}
    for (path, row), values in columns.items():
        assert values == plain(model.columns[row][path], by_path[path]), f"{path} of row {row}"


def every_row(model, column):
    return list(range(len(model.rows)))


def test_the_blocks_are_there_and_short():
    text = Path(str(FORMAT_MD)).read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 110
    assert len(text.splitlines()) <= 120
    assert text.count("```python table") == text.count("```python column") == 1


@pytest.mark.parametrize("codec", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "small"))])
def test_every_kind_of_column_reads_back(tmp_path, codec):
    kinds, rng = every_kind(), np.random.default_rng(3)
    model = Model(tmp_path / "store", kinds)
    with trajstore.open(model.path, "x", schema=kinds, codec=codec) as store:
        model.append(store, trajectory_of(kinds, rng, 5), terminated=True)
        model.append(store, trajectory_of(kinds, rng, 1), truncated=True)
        store.flush()
        model.append(store, trajectory_of(kinds, rng, 2))
    model.rows = [{"terminated": False, "truncated": False, **row} for row in model.rows]
    # Each column of the last two trajectories, and a few of the first.
    (found,) = read_elsewhere(tmp_path, [model], lambda m, c: [1, 2] if c.extra else [0, 2])
    assert len(found[1]) == 2 * len(kinds)
    check(model, found)


def test_long_histories_lost_races_and_late_fields_read_back(tmp_path):
    models = [_two_hundred_commits(tmp_path / "long"), _lost_races(tmp_path / "raced"), _late_field(tmp_path / "late")]
    found = read_elsewhere(tmp_path, models, lambda m, c: list(range(0, len(m.rows), 1 + len(m.rows) // 20)))
    for model, one in zip(models, found, strict=True):
        check(model, one)


def test_deleted_ranges_are_left_out(tmp_path):
    model = Model(tmp_path / "store", SMALL)
    rng = np.random.default_rng(5)
    with trajstore.open(model.path, "x", schema=SMALL) as store:
        for _ in range(2):
            for length in (2, 3, 4, 5):
                model.append(store, trajectory_of(SMALL, rng, length), task=f"{length}")
            store.flush()
        _delete(store, {0: ((0, 1), (2, 3)), 1: ((1, 4),)})
    model.keep([1, 3, 4])
    with trajstore.open(model.path) as store:
        assert store.trajectories.ids.tolist() == [1, 3, 4]
        assert [one.uuid.bytes for one in store.trajectories] == [row["uuid"] for row in model.rows]
    (found,) = read_elsewhere(tmp_path, [model], every_row)
    check(model, found, ids=[1, 3, 4])


def _two_hundred_commits(path):
    model, rng = Model(path, SMALL), np.random.default_rng(4)
    with trajstore.open(path, "x", schema=SMALL) as store:
        for number in range(200):
            model.append(store, trajectory_of(SMALL, rng, 1 + number % 3), task=f"task {number}", score=number / 4)
            store.flush()
        assert store.version == 200
        manifests = store._current().snapshot.manifests
        assert len(manifests) < 30, "manifests were merged"
        ids = [store._history.read_manifests([entry])[0].table["id"].null_count for entry in manifests]
        assert 0 in ids, "a merged manifest has its ids written out"
    return model


def _lost_races(path):
    model, rng = Model(path, SMALL), np.random.default_rng(6)
    with trajstore.open(path, "x", schema=SMALL) as one, trajstore.open(path, "a", schema=SMALL) as other:
        for _ in range(3):
            for store in (one, other):  # the other has not seen the commit of the one
                model.append(store, trajectory_of(SMALL, rng, 2), task="race")
                store.flush()
        assert one._history.races_lost + other._history.races_lost >= 3
    return model


def _late_field(path):
    model, rng = Model(path, SMALL), np.random.default_rng(7)
    with trajstore.open(path, "x", schema=SMALL) as store:
        model.append(store, trajectory_of(SMALL, rng, 2))
        store.flush()
        model.append(store, trajectory_of(SMALL, rng, 3), task="pick")
        store.flush()
        model.append(store, trajectory_of(SMALL, rng, 1), late=True)
        model.append(store, trajectory_of(SMALL, rng, 1), task="place", late=False)
        store.flush()
    return model


def _delete(store, ranges):
    """Commit a version that leaves out rows of manifests, as the format describes it."""
    head = store._current()
    manifests = list(head.snapshot.manifests)
    for number, deleted in ranges.items():
        gone = sum(hi - lo for lo, hi in deleted)
        manifests[number] = dataclasses.replace(
            manifests[number], deleted=deleted, trajectories=manifests[number].trajectories - gone
        )
    snapshot = dataclasses.replace(
        head.snapshot,
        version=head.number + 1,
        commit_id=uuid.uuid4().hex,
        parent_sha256=head.sha256,
        created_at=next_timestamp(head.snapshot.created_at, head.snapshot.created_at),
        operation="delete",
        manifests=tuple(manifests),
    )
    assert store._filesystem.create(snapshot_key(snapshot.version), snapshot.to_bytes())
