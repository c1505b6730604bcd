"""Columns in layers, read every way there is, against the same computed trajectory by trajectory in plain Python."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import trajstore
from tests.support.rare import also_slow
from tests.support.reference import Recorded, Recording, reference_anchors, reference_batch
from trajstore import Column
from trajstore.errors import CorruptionError, SelectionError
from trajstore.read.arena import group_name

LENGTHS = [3, 17, 1, 40, 5, 5, 29, 2]


def appended(number: int) -> dict[str, Any]:
    rng = np.random.default_rng(number)
    length = LENGTHS[number % len(LENGTHS)]
    return {
        "obs": rng.normal(size=(length + 1, 3)).astype(np.float32),
        "action": np.full((length, 2), number, np.int32),
        "reward": rng.normal(size=length),
        "done": np.arange(length) == length - 1,
    }


DERIVED = {
    "adv": lambda t: np.asarray(t["reward"])[::-1].cumsum()[::-1],
    "extra/value": lambda t: np.asarray(t["obs"]).sum(1),
    "extra/embedding": lambda t: np.tile(np.asarray(t["obs"])[:-1], (1, 2)) + 1,
    "extra/state": lambda t: np.asarray(t["obs"]) * 2,
    "note": lambda t: np.array([f"{r:.3f}" for r in np.asarray(t["reward"])], object),
    "parts": lambda t: [np.arange(i % 3, dtype=np.int16) for i in range(len(t["reward"]))],
    "flag": lambda t: np.asarray(t["reward"]) > 0,
}


def expected(number: int) -> dict[str, Any]:
    tree = appended(number)
    return {**tree, **{path: function(tree) for path, function in DERIVED.items()}}


def filled(url, numbers, *, per_commit=2, derived=tuple(DERIVED), **options):
    with trajstore.open(url, "a", **options) as store:
        for count, number in enumerate(numbers, 1):
            store.append(appended(number), terminated=number % 2 == 0, number=number)
            if count % per_commit == 0:
                store.flush()
        store.flush()
        for path in derived:
            store.add_column(path, DERIVED[path])
    return url


@pytest.fixture
def url(tmp_path):
    return filled(tmp_path / "store", range(8), per_commit=3)


def equal(found, value):
    if isinstance(value, list):
        assert [part.tolist() for part in found] == [part.tolist() for part in value]
    else:
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)


def assert_shows(view, numbers):
    """Every column of every trajectory, as it was appended or as plain Python computes it."""
    assert [one.metadata["number"] for one in view] == list(numbers)
    for one in view:
        tree = expected(one.metadata["number"])
        assert set(one.columns) == set(tree)
        for path, value in tree.items():
            equal(one.column(path)[:], value)
            equal(one[path][1:], value[1:])


def recording(view, numbers):
    """The view as it must be, from what was appended and computed."""
    told = [(expected(n), one) for n, one in zip(numbers, view, strict=True)]
    return Recording(
        view.schema, [Recorded(t, one.length, one.terminated, one.truncated, one.metadata) for t, one in told]
    )


def test_trajectories_show_them(url):
    with trajstore.open(url) as store:
        assert store.schema["adv"] == Column(path="adv", dtype="float64", presence="derived")
        assert store.schema["extra/state"].extra == 1
        assert store.schema["extra/value"].extra == 1
        assert_shows(store.trajectories, range(8))
        assert store.version == 3 + len(DERIVED)


def test_whole_columns_end_to_end(url):
    with trajstore.open(url) as store:
        view = store.trajectories.take([7, 1, 2, 3, 0])
        for path in DERIVED:
            parts = [expected(n)[path] for n in (7, 1, 2, 3, 0)]
            found = view.read(path)
            if path == "parts":
                equal(found, list(itertools.chain(*parts)))
            else:
                equal(found, np.concatenate(parts))
        out = np.empty((view.num_steps, 6), np.float32)
        assert view.read("extra/embedding", out) is out
        equal(out, np.concatenate([expected(n)["extra/embedding"] for n in (7, 1, 2, 3, 0)]))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 3, "columns": ["adv", "reward", "extra/embedding", "obs"]},
        {"columns": ["extra", "adv", "flag", "next_extra/value", "done"]},
        {"window": 4, "pad": "zero", "columns": ["adv", "flag", "extra/state"]},
        {"window": {"adv": [-1, 0, 1], "extra/state": 0, "action": range(2)}, "pad": "edge"},
        {"n_step": 3, "columns": ["obs", "extra/value", "reward", "adv"]},
    ],
    ids=lambda o: "-".join(o),
)
@pytest.mark.parametrize("cache_bytes", also_slow([None, 40_000], [40_000]))
def test_loaders_gather_them_beside_others(url, options, cache_bytes):
    with trajstore.open(url) as store:
        view = store.trajectories
        known = recording(view, range(8))
        chosen = reference_anchors(known, **options)
        wanted = reference_batch(known, chosen, **options)
        loader = view.loader(16, order="sequential", cache_bytes=cache_bytes, **options)
        with loader:
            found = list(loader)
        assert found
        for name, value in flat(wanted).items():
            whole = torch.cat([flat(batch)[name] for batch in found])
            assert torch.equal(whole, torch.as_tensor(value)), name


def flat(tree, prefix=""):
    out = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        out.update(flat(value, f"{path}/") if isinstance(value, dict) else {path: value})
    return out


def test_by_default_batches_have_them_all(url):
    with trajstore.open(url) as store:
        batch = flat(store.trajectories.sample(5))
        assert set(batch) == {
            "obs",
            "action",
            "reward",
            "done",
            "adv",
            "flag",
            "extra/value",
            "extra/embedding",
            "extra/state",
        }


def test_texts_and_lists_in_batches(url):
    with trajstore.open(url) as store:
        view = store.trajectories
        where = [(t, s) for t in range(8) for s in range(LENGTHS[t])]
        with view.loader(200, order="sequential", columns=["note", "parts", "adv"]) as loader:
            (batch,) = list(loader)
        assert batch["note"].tolist() == [expected(t)["note"][s] for t, s in where]
        values, offsets = batch["parts"]
        for i, (t, s) in enumerate(where):
            assert values[offsets[i] : offsets[i + 1]].tolist() == expected(t)["parts"][s].tolist()
        picked = view.gather([6, 0, 3], [28, 1, 7], columns=["note", "adv", "extra/value"])
        assert picked["note"].tolist() == [expected(t)["note"][s] for t, s in [(6, 28), (0, 1), (3, 7)]]
        assert picked["adv"].tolist() == [expected(t)["adv"][s] for t, s in [(6, 28), (0, 1), (3, 7)]]


def test_tables_of_steps_and_of_trajectories(url):
    with trajstore.open(url) as store:
        view = store.trajectories
        frame = view.steps(["adv", "extra/value", "note"])
        assert frame["adv"].tolist() == np.concatenate([expected(n)["adv"] for n in range(8)]).tolist()
        assert (
            frame["extra/value"].tolist()
            == np.concatenate([expected(n)["extra/value"][:-1] for n in range(8)]).tolist()
        )
        assert frame["note"].tolist() == list(np.concatenate([expected(n)["note"] for n in range(8)]))
        assert "adv" in view.steps(n=3).columns
        assert view.to_pandas()["number"].tolist() == list(range(8))


def test_usage_counts_their_bytes(url):
    with trajstore.open(url) as store:
        usage = store.usage()
        assert usage.objects["adv"].rows == sum(LENGTHS)
        assert usage.objects["adv"].logical_bytes == 8 * sum(LENGTHS)
        assert usage.objects["extra/state"].rows == sum(LENGTHS) + len(LENGTHS)
        assert usage.objects["steps.arrow"].columns == ("reward", "done")
        assert usage.segment_bytes == sum(p.stat().st_size for p in (url / "segments").rglob("*") if p.is_file())
        assert usage.segment_bytes == store._current().snapshot.totals.nbytes


def test_versions_share_what_the_cache_holds_of_their_segments(url):
    with trajstore.open(url, "a") as store:
        old = trajstore.open(url, version=3)
        assert "adv" not in old.trajectories[0]
        assert set(old.trajectories[0].columns) == {"obs", "action", "reward", "done"}
        old.close()
        where = np.repeat(np.arange(8), LENGTHS), np.concatenate([np.arange(n) for n in LENGTHS])
        before = store.trajectories
        before.gather(*where, columns=["reward", "obs"])
        cache = store._access.cache_for(store.schema)
        read = cache.stats().pages_read
        store.add_column("double", lambda t: t["reward"] * 2, columns=["reward"])
        after = store.trajectories
        batch = after.gather(*where, columns=["reward", "obs"])
        assert cache.stats().pages_read == read, "pages of the same segments were read again"
        assert torch.equal(after.gather(*where, columns=["double"])["double"], batch["reward"] * 2)
        assert cache.stats().pages_read == read + 3, "one page of each of three layers"
        store.add_column("double", lambda t: t["reward"] * 3, columns=["reward"], replace=True)
        again = store.trajectories
        assert torch.equal(again.gather(*where, columns=["double"])["double"], batch["reward"] * 3)
        assert torch.equal(after.gather(*where, columns=["double"])["double"], batch["reward"] * 2), "a view is fixed"
        equal(after[3]["double"][:], appended(3)["reward"] * 2)
        equal(again[3]["double"][:], appended(3)["reward"] * 3)


def test_old_versions_open_without_them(url):
    with trajstore.open(url, version=3) as store:
        assert "adv" not in store.schema
        assert set(flat(store.trajectories.sample(2))) == {"obs", "action", "reward", "done"}
    with trajstore.open(url, version=4) as store:
        assert set(store.trajectories[0].columns) == {"obs", "action", "reward", "done", "adv"}


def test_what_is_appended_later_lacks_them_and_loaders_say_what_to_do(url):
    with trajstore.open(url, "a") as store:
        for number in (8, 9):
            store.append(appended(number), number=number)
        for view in (store.trajectories, store.trajectories):  # not yet committed, then committed
            assert "adv" not in view[8]
            assert set(flat(view.sample(3))) == {"obs", "action", "reward", "done"}
            with pytest.raises(
                SelectionError, match=r"lacking from 2 of 10 .*view.having\('adv'\).*store.add_column\('adv'"
            ):
                view.loader(4, columns=["adv"])
            having = view.having("adv", "extra")
            assert having.ids.tolist() == list(range(8))
            with having.loader(200, order="sequential", columns=["adv"]) as loader:
                assert next(loader)["adv"].tolist() == np.concatenate([expected(n)["adv"] for n in range(8)]).tolist()
            store.flush()
        assert len(store.trajectories.having("reward")) == 10
        assert len(store.trajectories.having()) == 10
        with pytest.raises(trajstore.UnknownColumnError):
            store.trajectories.having("nothing")


def test_a_loader_that_follows_takes_them_up(tmp_path):
    url = filled(tmp_path / "store", range(4), derived=())
    with trajstore.open(url, "a") as store:
        store.add_column("adv", DERIVED["adv"])
        with store.trajectories.having("adv").loader(8, columns=["adv", "reward"], follow=True, prefetch=0) as loader:
            next(loader)
            store.append(appended(6), number=6)
            store.flush()
            store.add_column("adv", DERIVED["adv"])
            assert [one.metadata["number"] for one in store.trajectories.having("adv")] == [0, 1, 2, 3, 6]
            sums = {round(float(v), 9) for n in (0, 1, 2, 3, 6) for v in expected(n)["adv"]}
            for _ in range(20):
                assert {round(v, 9) for v in next(loader)["adv"].tolist()} <= sums


def test_stored_pages_of_layers_are_kept_on_disk_under_their_own_name(url, tmp_path):
    options = {"cache_dir": tmp_path / "cache", "cache_dir_bytes": 1 << 24}
    for _ in range(2):
        with trajstore.open(url, **options) as store:
            batch = store.trajectories.gather([0, 3], [1, 5], columns=["adv", "reward"])
            assert batch["adv"].tolist() == [expected(0)["adv"][1], expected(3)["adv"][5]]
            assert batch["reward"].tolist() == [expected(0)["reward"][1], expected(3)["reward"][5]]


def test_layers_over_segments_of_another_store(tmp_path):
    filled(tmp_path / "origin", range(6), derived=())
    with trajstore.open(tmp_path / "origin") as origin:
        chosen = origin.trajectories.take([4, 1, 3])
        chosen.save(tmp_path / "part", share="reference")
    before = {p: p.read_bytes() for p in (tmp_path / "origin" / "segments").rglob("*") if p.is_file()}
    filled(tmp_path / "part", [7], per_commit=1)
    assert before == {p: p.read_bytes() for p in (tmp_path / "origin" / "segments").rglob("*") if p.is_file()}
    with trajstore.open(tmp_path / "part") as store:
        assert_shows(store.trajectories, [4, 1, 3, 7])
        bases = {(s.base, *(layer.base for layer in s.layers)) for s in store.trajectories._table.segments}
        assert bases == {(0, *[None] * len(DERIVED)), (None, *[None] * len(DERIVED))}
        batch = store.trajectories.gather([0, 3], [0, 1], columns=["adv", "reward"])
        assert batch["adv"].tolist() == [expected(4)["adv"][0], expected(7)["adv"][1]]


def test_a_changed_byte_of_a_layer_names_it(url):
    with trajstore.open(url) as store:
        entry = store.trajectories._table.segments[0]
        layer = next(layer for layer in entry.layers if layer.columns == ("adv",))
    path = url / "segments" / layer.uuid / "steps.arrow"
    data = bytearray(path.read_bytes())
    for at in range(len(data)):
        data[at] ^= 255
    path.write_bytes(bytes(data))
    with trajstore.open(url) as store:
        with pytest.raises(CorruptionError, match=f"{layer.uuid}/steps.arrow.*column adv"):
            store.trajectories[0]["adv"][:]
        with pytest.raises(CorruptionError, match=f"{layer.uuid}/steps.arrow.*column adv"):
            store.trajectories.gather([0], [0], columns=["adv"])
        assert store.trajectories.gather([0], [0], columns=["reward"])["reward"].tolist() == [expected(0)["reward"][0]]


def test_a_derived_column_is_a_group_of_its_own():
    for column in (
        Column(path="a", dtype="float32"),
        Column(path="a", dtype="string"),
        Column(path="a", dtype="int8", extra=1),
    ):
        derived = Column(path="a/b", dtype=column.dtype, extra=column.extra, presence="derived")
        assert group_name(derived) == "a/b"
        assert group_name(column).endswith(".arrow")
