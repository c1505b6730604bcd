"""``output="tensordict"``: the same batches in another wrapping."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import trajstore
from tests.support.recordings import recording_of, view_of
from tests.support.strategies import bits
from trajstore import Column

tensordict = pytest.importorskip("tensordict")

SCHEMA = [
    Column(path="obs/image", dtype="uint8", shape=(4, 4), extra=1, page_rows=4),
    Column(path="obs/state", dtype="bfloat16", shape=(3,), extra=1),
    Column(path="reward", dtype="float64"),
    Column(path="note", dtype="string"),
    Column(path="obs/points", dtype="int16", shape=(2,), ragged=True),
    Column(path="words", dtype="string", ragged=True),
]
NAMES = ["obs", "reward", "note", "words", "task_name", "step"]
OPTIONS = [
    {"columns": NAMES},
    {"columns": NAMES, "window": 3, "pad": "zero"},
    {"columns": NAMES, "n_step": 3},
    {"window": {"obs/points": range(2), "words": 0, "note": [0], "reward": [0, 1]}, "pad": "edge"},
    {"columns": ["words", "obs/points"]},
    {"order": "prioritized"},
]


@pytest.fixture(scope="module")
def view():
    with view_of(recording_of(np.random.default_rng(3), SCHEMA, [7, 2, 30, 12]), flush_after=(1,)) as view:
        yield view


def assert_same(found, batch):
    """Every entry of a tensordict against the plain batch."""
    assert isinstance(found, tensordict.TensorDict)
    assert sorted(found.keys()) == sorted(batch)
    for name, expected in batch.items():
        if isinstance(expected, Mapping):
            assert_same(found.get(name), expected)
        elif isinstance(expected, torch.Tensor):
            assert found[name].dtype == expected.dtype
            assert bits(found[name]) == bits(expected)
        elif isinstance(expected, np.ndarray):
            assert found.get(name).batch_size == expected.shape
            assert listed(found[name]) == expected.tolist()
        else:
            values, offsets = expected
            lists = [values[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]
            shape = found.get(name).batch_size
            assert shape.numel() == len(lists)
            flat = listed(found[name]) if len(shape) == 1 else [item for row in listed(found[name]) for item in row]
            assert flat == lists


def listed(value):
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    return [listed(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_entries_equal_those_of_the_plain_batch(view, options):
    with view.loader(6, seed=2, **options) as plain, view.loader(6, seed=2, output="tensordict", **options) as loader:
        for batch, found in itertools.islice(zip(plain, loader, strict=False), 5):
            assert found.batch_size == torch.Size([6])
            assert_same(found, batch)


def test_indexing_means_the_same_for_all_entries(view):
    knobs = {"columns": NAMES, "window": 3, "seed": 1}
    with view.loader(6, **knobs) as plain, view.loader(6, output="tensordict", **knobs) as loader:
        batch, found = next(plain), next(loader)
    values, offsets = batch["obs"]["points"]
    one = found[4]
    assert torch.equal(one["obs", "image"], batch["obs"]["image"][4])
    assert listed(one["note"]) == batch["note"][4].tolist()
    points = [values[a:b].tolist() for a, b in itertools.pairwise(offsets[4 * 3 : 5 * 3 + 1].tolist())]
    assert listed(one["obs", "points"]) == points
    twice = torch.cat([found, found[:2]])
    assert twice.batch_size == torch.Size([8])
    assert listed(twice["note"]) == [*batch["note"].tolist(), *batch["note"][:2].tolist()]
    assert found.get("note").batch_size == torch.Size([6, 3])


def test_a_short_last_batch(view):
    with view.loader(20, order="sequential", output="tensordict") as loader:
        assert [batch.batch_size[0] for batch in loader] == [20, 20, 11]


def test_of_a_mix(view):
    mixture = trajstore.mix({view: 1, view[:2]: 1})
    knobs = {"columns": ["note", "obs/points", "source"], "seed": 5}
    with mixture.loader(4, **knobs) as plain, mixture.loader(4, output="tensordict", **knobs) as loader:
        assert_same(next(loader), next(plain))


def test_through_a_data_loader(view):
    with view.loader(4, order="sequential", columns=["reward", "obs/state"], output="tensordict") as loader:
        expected = [batch.clone() for batch in loader]
        found = list(DataLoader(loader, batch_size=None, collate_fn=lambda batch: batch))
    for batch, wanted in zip(found, expected, strict=True):
        assert batch.batch_size == wanted.batch_size
        assert bits(batch["reward"]) == bits(wanted["reward"])
        assert bits(batch["obs", "state"]) == bits(wanted["obs", "state"])


@pytest.mark.slow
def test_without_the_package_it_says_what_to_install():
    code = (
        "import sys; sys.modules['tensordict'] = None\n"
        "import numpy as np, trajstore\n"
        "store = trajstore.open('memory://tensordict', 'a')\n"
        "store.append({'action': np.zeros(3)}); store.flush()\n"
        "store.trajectories.loader(2).close()\n"
        "store.trajectories.loader(2, output='tensordict')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "pip install 'trajstore[tensordict]'" in result.stderr.splitlines()[-1]
