"""Normalized batches against the batches of a plain loader, scaled by NumPy; what is refused."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import trajstore
from trajstore import Column, SelectionError, UnknownColumnError

SCHEMA = [
    Column(path="obs/state", dtype="float32", shape=(3,), extra=1, page_rows=4),
    Column(path="obs/frame", dtype="uint8", shape=(24, 24, 3)),
    Column(path="action", dtype="float64", shape=(2,)),
    Column(path="half", dtype="float16"),
    Column(path="brain", dtype="bfloat16", shape=(2,)),
    Column(path="count", dtype="int64"),
    Column(path="constant", dtype="float32"),
    Column(path="reward", dtype="float32"),
    Column(path="bonus", dtype="float32", presence="optional"),
    Column(path="value", dtype="float32", presence="derived"),
    Column(path="note", dtype="string"),
]
FLOATS = ["obs/state", "action", "half", "brain", "constant", "reward"]


def trajectory(rng, length):
    return {
        "obs": {
            "state": (rng.normal(size=(length + 1, 3)) * [1, 10, 0.1] + [0, 5, 100]).astype(np.float32),
            "frame": rng.integers(0, 256, (length, 24, 24, 3), np.uint8),
        },
        "action": rng.normal(size=(length, 2)) * 3 + 1e6,
        "half": rng.normal(size=length).astype(np.float16),
        "brain": torch.from_numpy(rng.normal(size=(length, 2)).astype(np.float32)).to(torch.bfloat16),
        "count": rng.integers(0, 1000, length),
        "constant": np.full(length, 0.1, np.float32),
        "reward": rng.normal(size=length).astype(np.float32) + 2,
        "note": ["x"] * length,
    }


@pytest.fixture(scope="module")
def view():
    rng = np.random.default_rng(0)
    with trajstore.open("memory://normalize-tests", "a", schema=SCHEMA) as store:
        for number in range(12):
            rows = trajectory(rng, int(rng.integers(2, 12)))
            if number % 3 == 0:
                rows["bonus"] = np.ones(len(rows["count"]), np.float32)
            store.append(rows, terminated=number % 2 == 0, task="pick", score=float(number))
        store.flush()
        yield store.trajectories


def flat(batch, prefix=""):
    out = {}
    for name, value in batch.items():
        out.update(flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value})
    return out


def rows_of(view, path):
    read = [t[path][:] for t in view]
    return torch.cat(read).double().numpy() if isinstance(read[0], torch.Tensor) else np.concatenate(read).astype(float)


def scaled(view, path, values, how="mean_std"):
    """Two passes over the column, then float64 arithmetic."""
    rows = rows_of(view, path)
    axes = (0, 1, 2) if path == "obs/frame" else 0
    if how == "mean_std":
        center, scale = rows.mean(axis=axes), rows.std(axis=axes)
    else:
        center = (rows.min(axis=axes) + rows.max(axis=axes)) / 2
        scale = (rows.max(axis=axes) - rows.min(axis=axes)) / 2
    if path == "constant":
        center, scale = np.float64(np.float32(0.1)), 0.0
    return (values.double().numpy() - center) / np.maximum(scale, 1e-8)


def assert_normalized(view, plain, normalized, sources):
    """Of each entry of the batch, normalized if ``sources`` names its column, else as it was."""
    plain, normalized = flat(plain), flat(normalized)
    assert list(plain) == list(normalized)
    for name, values in plain.items():
        if name in sources:
            path, how = sources[name] if isinstance(sources[name], tuple) else (sources[name], "mean_std")
            assert normalized[name].dtype == torch.float32
            assert normalized[name].shape == values.shape
            np.testing.assert_allclose(normalized[name].numpy(), scaled(view, path, values, how), rtol=2e-4, atol=2e-5)
        elif isinstance(values, torch.Tensor):
            assert normalized[name].dtype == values.dtype
            assert torch.equal(normalized[name], values)
        else:
            np.testing.assert_array_equal(normalized[name], values)


def batches(view, *, normalize=None, **options):
    options = {"order": "sequential", "batch_size": 7, **options}
    with view.loader(normalize=normalize, **options) as loader:
        return [
            {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in flat(b).items()}
            for b in loader
        ]


def compare(view, normalize, sources, **options):
    plain, normalized = batches(view, **options), batches(view, normalize=normalize, **options)
    assert len(plain) == len(normalized) > 1
    for ours, theirs in zip(normalized, plain, strict=True):
        assert_normalized(view, theirs, ours, sources)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_true_means_every_floating_point_column(view, window, prefetch):
    compare(view, True, {path: path for path in FLOATS}, window=window, prefetch=prefetch)


def test_what_is_normalized_has_mean_zero_and_deviation_one(view):
    steps = torch.cat([b["action"] for b in batches(view, normalize=True, columns=["action"])]).double()
    np.testing.assert_allclose(steps.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(steps.std(0, correction=0), 1, atol=1e-6)
    assert all((b["constant"] == 0).all() for b in batches(view, normalize=True, columns=["constant"]))


def test_columns_by_name_and_method(view):
    compare(
        view,
        {"obs": "mean_std", "action": "min_max", "count": "min_max"},
        {
            "obs/state": "obs/state",
            "obs/frame": "obs/frame",
            "action": ("action", "min_max"),
            "count": ("count", "min_max"),
        },
    )
    low_high = torch.cat([b["action"] for b in batches(view, normalize={"action": "min_max"}, columns=["action"])])
    assert (low_high.min(), low_high.max()) == (-1, 1)


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, list])
def test_given_numbers(view, kind):
    pair = (kind([1e6, 1e6]), kind([2.0, 0.0]))
    plain = batches(view, columns=["action", "reward"])
    ours = batches(view, columns=["action", "reward"], normalize={"action": pair, "reward": (0.5, 4)})
    for a, b in zip(ours, plain, strict=True):
        expected = (b["action"].numpy() - 1e6) / [2.0, 1e-8]
        np.testing.assert_allclose(a["action"].numpy(), expected.astype(np.float32), rtol=1e-6)
        np.testing.assert_allclose(a["reward"].numpy(), (b["reward"].numpy() - 0.5) / 4, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("pad", ["edge", "zero"])
def test_padding_is_normalized_as_the_rest(view, pad):
    columns = ["obs/state", "reward", "step", "is_last", "score", "task", "note", "terminated"]
    compare(view, True, {"obs/state": "obs/state", "reward": "reward"}, window=4, pad=pad, columns=columns)


def test_whatever_shows_a_column_is_normalized_alike(view):
    window = {"obs/state": [-1, 0], "next_obs/state": 0, "goal": trajstore.future("obs/state"), "reward": 0}
    names = {"obs/state": "obs/state", "next_obs/state": "obs/state", "goal": "obs/state", "reward": "reward"}
    compare(view, True, names, window=window, seed=3)


def test_rewards_are_normalized_before_they_are_summed(view):
    options = {"columns": ["obs/state", "reward"], "n_step": 3, "gamma": 0.5}
    plain, ours = batches(view, **options), batches(view, normalize=True, **options)
    rewards = rows_of(view, "reward")
    each = iter(np.concatenate([(t["reward"][:] - rewards.mean()) / rewards.std() for t in view]).tolist())
    by_trajectory = [[next(each) for _ in range(len(t))] for t in view]
    sums = [sum(r * 0.5**k for k, r in enumerate(row[at : at + 3])) for row in by_trajectory for at in range(len(row))]
    np.testing.assert_allclose(torch.cat([b["reward"] for b in ours]).numpy(), sums, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a["discount"], b["discount"])
        np.testing.assert_allclose(
            a["next_obs/state"].numpy(), scaled(view, "obs/state", b["next_obs/state"]), atol=1e-3
        )


def test_the_cache_keeps_what_was_stored(view):
    before = batches(view)
    batches(view, normalize={"obs": "mean_std", "reward": "mean_std"})
    for a, b in zip(batches(view), before, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_priorities_and_tensordicts(view):
    options = {"order": "prioritized", "batch_size": 8, "columns": ["reward"], "prefetch": 0}
    with view.loader(**options) as plain, view.loader(normalize=True, **options) as loader:
        ours, theirs = next(iter(loader)), next(iter(plain))
        assert_normalized(view, theirs, ours, {"reward": "reward"})
    with view.loader(8, columns=["obs", "note"], order="sequential", normalize=True, output="tensordict") as loader:
        batch = next(iter(loader))
        assert batch["obs", "frame"].dtype == torch.uint8
        assert batch["obs", "state"].abs().max() < 10


def test_resumption_is_what_it_is_without(view):
    options = {"order": "shuffle", "batch_size": 5, "epochs": 2, "columns": ["obs/state"]}
    with view.loader(normalize=True, **options) as loader:
        whole = [b["obs"]["state"].clone() for b in loader]
    with view.loader(normalize=True, **options) as loader, view.loader(**options) as plain:
        batch = iter(loader)
        for _ in range(3):
            next(batch)
        state = loader.state_dict()
        plain.load_state_dict(state)  # what a batch holds is the same
    with view.loader(normalize=True, **options) as loader:
        loader.load_state_dict(state)
        rest = [b["obs"]["state"].clone() for b in loader]
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[3:], strict=True))


def test_the_numbers_can_be_deployed(view):
    with view.loader(4, normalize={"action": "min_max", "obs/state": "mean_std"}, seed=1) as loader:
        normalization = pickle.loads(pickle.dumps(loader.normalization))
        batch = next(iter(loader))
    with view.loader(4, seed=1) as loader:
        assert loader.normalization is None
        plain = next(iter(loader))
    with view.loader(4, normalize=normalization, seed=1) as loader:  # of a smaller view, for instance
        again = next(iter(loader))
    assert list(normalization) == ["action", "obs/state"]
    assert torch.equal(again["action"], batch["action"])
    for values in (plain["action"], plain["action"].numpy()):
        applied = normalization["action"].apply(values)
        assert type(applied) is type(values)
        np.testing.assert_allclose(np.asarray(applied), batch["action"].numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            np.asarray(normalization["action"].undo(applied)), plain["action"].numpy(), rtol=1e-6
        )


def test_other_processes_normalize_alike(tmp_path):
    rng = np.random.default_rng(0)
    with trajstore.open(tmp_path / "s", "x") as store:
        for _ in range(4):
            store.append({"x": rng.normal(size=(6, 2)).astype(np.float32)})
        store.flush()
    with (
        trajstore.open(tmp_path / "s") as store,
        store.trajectories.loader(3, order="sequential", normalize=True) as loader,
    ):
        elsewhere = pickle.loads(pickle.dumps(loader))
        with elsewhere:
            assert all(torch.equal(a["x"], b["x"]) for a, b in zip(loader, elsewhere, strict=True))


def test_a_loader_that_follows_keeps_its_numbers():
    with trajstore.open("memory://normalize-follow", "a") as store:
        store.append({"x": np.array([1.0, 3.0])})
        store.flush()
        with store.trajectories.loader(64, follow=True, normalize=True, prefetch=0) as loader:
            assert set(next(iter(loader))["x"].tolist()) == {-1.0, 1.0}
            store.append({"x": np.array([7.0, 7.0])})
            assert set(next(iter(loader))["x"].tolist()) == {-1.0, 1.0, 5.0}


def test_an_entry_without_a_finite_value_stays_as_it_is():
    with trajstore.open("memory://normalize-nan", "a") as store:
        store.append({"x": np.array([[1.0, np.nan], [3.0, np.inf]])})
        store.flush()
        with store.trajectories.loader(2, order="sequential", normalize=True) as loader:
            batch = next(iter(loader))["x"]
    np.testing.assert_array_equal(batch.numpy(), [[-1, np.nan], [1, np.inf]])


@pytest.mark.parametrize(
    ("normalize", "error", "message"),
    [
        ({"nothing": "mean_std"}, UnknownColumnError, "no column 'nothing'"),
        ({"note": "mean_std"}, SelectionError, "'note', which is string"),
        ({"score": "mean_std"}, SelectionError, "'score', a metadata field"),
        ({"step": "mean_std"}, UnknownColumnError, "no column 'step'"),
        ({"bonus": "mean_std"}, SelectionError, "'bonus', which the batch does not hold .it is lacking from 8 of 12"),
        ({"value": "mean_std"}, SelectionError, "'value', which the batch does not hold .it is lacking from 12 of 12"),
        ({"action": "median"}, SelectionError, "'median'.*expected 'mean_std', 'min_max'"),
        ({"action": 3}, SelectionError, "expected 'mean_std', 'min_max' or a pair"),
        ({"action": (1.0, "x")}, SelectionError, "expected 'mean_std', 'min_max' or a pair"),
        ({"action": ([1.0] * 3, 1.0)}, SelectionError, r"against \[2\]"),
        ({"action": (np.zeros((5, 2)), 1.0)}, SelectionError, r"mean of shape \[5, 2\]"),
        ({"action": (0.0, -1.0)}, SelectionError, "negative std"),
        ({"action": (np.nan, 1.0)}, SelectionError, "not finite"),
        ("mean_std", SelectionError, "normalize='mean_std', expected True, or a mapping"),
    ],
)
def test_refused(view, normalize, error, message):
    with pytest.raises(error, match=message):
        view.loader(4, normalize=normalize)


def test_nothing_to_normalize_is_refused(view):
    with pytest.raises(SelectionError, match="holds no floating-point column"):
        view.loader(4, columns=["obs/frame", "count"], normalize=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("cache_device", [None, "cuda"])
def test_on_a_device(view, cache_device):
    options = {"columns": ["obs", "action", "brain", "reward"], "device": "cuda", "cache_device": cache_device}
    on_device = batches(view, normalize={"obs": "mean_std", "action": "mean_std"}, **options)
    for ours, theirs in zip(on_device, batches(view, columns=options["columns"]), strict=True):
        assert all(value.device.type == "cuda" for value in ours.values())
        moved = {name: value.cpu() for name, value in ours.items()}
        assert_normalized(view, theirs, moved, {path: path for path in ("obs/state", "obs/frame", "action")})
