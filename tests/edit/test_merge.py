"""Merging stores: against plain lists of what they hold, one chain of merges and splits after the other."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trajstore
from tests.edit.stores import append, filled, objects_of, segments_of
from tests.support.rare import examples
from trajstore.errors import (
    ClosedError,
    SchemaConflictError,
    SelectionError,
    StoreExistsError,
    StoreNotFoundError,
    UntrustedBaseError,
)

RELAXED = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SHARES = ("reference", "link", "copy")
FIELDS = ("source_store", "source_id")


def numbers(url, **options) -> list[int]:
    with trajstore.open(url, **options) as store:
        return [t.metadata["number"] for t in store.trajectories]


# Against a plain list


@dataclass
class Plain:
    """A store as a list: what each trajectory holds, by its id."""

    url: str
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)

    def listed(self) -> list[dict[str, Any]]:
        return [self.rows[number] for number in sorted(self.rows)]


def shown(url: str) -> list[dict[str, Any]]:
    """What a reader finds, trajectory by trajectory."""
    with trajstore.open(url) as store:
        assert store.num_trajectories == len(store.trajectories)
        return [
            {
                "columns": {path: t.column(path)[:].tolist() for path in t.columns},
                "metadata": dict(t.metadata),
                "terminated": t.terminated,
                "uuid": t.uuid,
            }
            for t in store.trajectories
        ]


def made(url: str, data: st.DataObject) -> Plain:
    """A store of some trajectories, of which some were deleted again, with columns that not all have."""
    plain = Plain(url)
    optional = data.draw(st.sets(st.sampled_from("yz")), label="columns")
    schema = [trajstore.Column(path="x", dtype="int64"), trajstore.Column(path="s", dtype="float32", extra=1)]
    schema += [trajstore.Column(path=name, dtype="int16", presence="optional") for name in sorted(optional)]
    with trajstore.open(url, "x", schema=schema) as store:
        for number in range(data.draw(st.integers(1, 5), label="trajectories")):
            length = data.draw(st.integers(1, 4))
            tree: dict[str, Any] = {"x": np.arange(length) * 3 + number, "s": np.arange(length + 1, dtype=np.float32)}
            had = data.draw(st.sets(st.sampled_from(sorted(optional)))) if optional else set()
            tree.update({name: np.full(length, ord(name) + number, np.int16) for name in had})
            fields: dict[str, Any] = {"n": number}
            if data.draw(st.booleans()):
                fields["word"] = data.draw(st.sampled_from(["pick", "place", ""]))
            ends = data.draw(st.booleans())
            reference = store.append(tree, terminated=ends, metadata=fields)
            plain.rows[number] = {
                "columns": {path: values.tolist() for path, values in tree.items()},
                "metadata": fields,
                "terminated": ends,
                "uuid": reference.uuid,
                "from": (store.uuid, number),
            }
            if data.draw(st.booleans()):
                store.flush()
        store.flush()
        gone = data.draw(st.sets(st.sampled_from(sorted(plain.rows)), max_size=3), label="deleted")
        if gone:
            store.delete(sorted(gone))
    plain.rows = {number: row for number, row in plain.rows.items() if number not in gone}
    return plain


def merged(sources: list[Plain], order: str) -> list[dict[str, Any]]:
    """One list of several, the slow way."""
    rows = [
        (number, source, plain.rows[number]) for source, plain in enumerate(sources) for number in sorted(plain.rows)
    ]
    if order == "interleave":
        rows.sort(key=lambda row: (row[0], row[1]))
    return [row for _, _, row in rows]


def expected(row: dict[str, Any]) -> dict[str, Any]:
    """As a reader finds it in a store that was merged or split."""
    lineage = dict(zip(FIELDS, row["from"], strict=True))
    return {**{k: v for k, v in row.items() if k != "from"}, "metadata": {**row["metadata"], **lineage}}


@given(data=st.data())
@settings(RELAXED, max_examples=examples(12))
def test_chains_of_merges_and_splits_hold_what_lists_of_the_same_would(data):
    with tempfile.TemporaryDirectory() as folder:
        stores = [made(f"{folder}/{n}", data) for n in range(data.draw(st.integers(1, 3), label="stores"))]
        for step in range(data.draw(st.integers(1, 4), label="steps")):
            url = f"{folder}/result-{step}"
            share = data.draw(st.sampled_from(SHARES), label="share")
            if data.draw(st.booleans(), label="merge"):
                chosen = data.draw(st.lists(st.sampled_from(stores), min_size=1, max_size=3), label="sources")
                order = data.draw(st.sampled_from(["concat", "interleave"]), label="order")
                rows = merged(chosen, order)
                count = trajstore.merge([plain.url for plain in chosen], url, order=order, share=share)
            else:
                chosen = [data.draw(st.sampled_from(stores), label="source")]
                most = data.draw(st.integers(0, 4))
                rows = [row for row in chosen[0].listed() if row["metadata"]["n"] <= most]
                count = trajstore.split(chosen[0].url, url, where=f"n <= {most}", share=share)[url]
            assert count == len(rows)
            assert shown(url) == [expected(row) for row in rows]
            stores.append(Plain(url, dict(enumerate(rows))))
        for plain in stores:  # and no source was changed
            found = shown(plain.url)
            assert [row["uuid"] for row in found] == [row["uuid"] for row in plain.listed()]


@pytest.mark.parametrize("share", SHARES)
def test_a_merge_of_stores_urls_and_views(tmp_path, share):
    a, b = filled(tmp_path / "a", [0, 1, 2]), filled(tmp_path / "b", [3, 4])
    with trajstore.open(a) as store, trajstore.open(tmp_path / "c", "a") as growing:
        append(growing, 5)  # is flushed
        sources = [store.trajectories[::-1], Path(b), growing]
        assert trajstore.merge(sources, tmp_path / "all", share=share) == 6
        assert trajstore.merge(sources, tmp_path / "mixed", share=share, order="interleave") == 6
        assert store.trajectories.num_steps > 0, "what was given open stays open"
        uuids = [store.uuid, growing.uuid]
    assert numbers(tmp_path / "all") == [2, 1, 0, 3, 4, 5]
    assert numbers(tmp_path / "mixed") == [0, 3, 5, 1, 4, 2]
    with trajstore.open(tmp_path / "mixed") as store:
        frame = store.trajectories.to_pandas()
        assert frame.index.tolist() == list(range(6))
        assert frame["source_id"].tolist() == [0, 0, 0, 1, 1, 2]
        assert frame["source_store"].iloc[[0, 2]].tolist() == uuids
        assert store.versions()["operation"].tolist() == ["merge"]
        assert store.versions()["written_bytes"].iloc[0] == sum(
            len(data)
            for url in "abc"
            for name, data in objects_of(tmp_path / url).items()
            if name.startswith("segments/")
        )
    assert segments_of(tmp_path / "all") == (set() if share == "reference" else segments_of(tmp_path / "mixed"))


def test_the_result_goes_on_as_a_store_of_its_own(tmp_path):
    trajstore.merge([filled(tmp_path / "a", [0, 1]), filled(tmp_path / "b", [2])], tmp_path / "all")
    with trajstore.open(tmp_path / "all", "a") as store:
        append(store, 3)
        store.delete([0])
    assert numbers(tmp_path / "all") == [1, 2, 3]
    trajstore.merge([tmp_path / "all"], tmp_path / "again")
    with trajstore.open(tmp_path / "again") as store, trajstore.open(tmp_path / "all") as former:
        frame = store.trajectories.to_pandas()
        assert frame["source_id"].tolist() == [1, 0, 3], "what was appended there came from there"
        assert frame["source_store"].iloc[2] == former.uuid


@pytest.mark.parametrize(
    "fields",
    [
        {"source_id": 7},
        {"source_store": "robot 3"},
        {"source_store": "robot 3", "source_id": 7},
        {"source_store": "0" * 32},
    ],
)
@pytest.mark.parametrize("everywhere", [False, True])
def test_what_people_wrote_into_these_fields_is_not_taken_for_lineage(tmp_path, fields, everywhere):
    filled(tmp_path / "other", [1])
    with trajstore.open(tmp_path / "a", "a") as store:
        store.append({"x": [1]}, metadata=fields)
        if not everywhere:
            store.append({"x": [2]})
    with pytest.raises(SchemaConflictError, match=r"has values of its own in .*say where a trajectory came from"):
        trajstore.merge([tmp_path / "a"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize(("name", "value"), [("source_store", 3), ("source_id", "one"), ("source_id", 0.5)])
def test_a_field_of_that_name_with_another_type_is_refused(tmp_path, name, value):
    with trajstore.open(tmp_path / "a", "a") as store:
        store.append({"x": [1]}, **{name: value})
    with pytest.raises(SchemaConflictError, match=rf"metadata field '{name}' of type .*say where a"):
        trajstore.merge([tmp_path / "a"], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_column_of_that_name_is_refused(tmp_path):
    with trajstore.open(tmp_path / "a", "a") as store:
        store.append({"source_id": [1]})
    with pytest.raises(SchemaConflictError, match="a column 'source_id'"):
        trajstore.split(tmp_path / "a", tmp_path / "b", first=1)
    assert not (tmp_path / "b").exists()


def test_empty_stores_are_merged_too(tmp_path):
    for name in "ab":
        with trajstore.open(tmp_path / name, "a"):
            pass
    assert trajstore.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "none") == 0
    assert trajstore.merge([tmp_path / "a", filled(tmp_path / "c", [4])], tmp_path / "one") == 1
    assert numbers(tmp_path / "one") == [4]
    assert trajstore.merge([tmp_path / "none"], tmp_path / "none again") == 0


@pytest.mark.parametrize("share", SHARES)
def test_derived_columns_come_along_wherever_their_layers_are(tmp_path, share):
    a = filled(tmp_path / "a", [0, 1, 2], per_commit=2)
    with trajstore.open(a, "a") as store:
        store.add_column("twice", lambda t: t["reward"][:] * 2, columns=["reward"])
        append(store, 3)
    trajstore.merge([a], tmp_path / "one")
    with trajstore.open(tmp_path / "one", "a") as store:  # a layer here over segments there
        store.add_column("thrice", lambda t: t["reward"][:] * 3, columns=["reward"])
    b = filled(tmp_path / "b", [4])
    with trajstore.open(a) as plain:
        trajstore.merge([plain, tmp_path / "one", b], tmp_path / "all", share=share)
    trajstore.split(tmp_path / "all", tmp_path / "part", where="number != 1", share=share)
    for url, expected in ((tmp_path / "all", [0, 1, 2, 3, 0, 1, 2, 3, 4]), (tmp_path / "part", [0, 2, 3, 0, 2, 3, 4])):
        with trajstore.open(url) as store:
            assert {c.path for c in store.schema if c.presence == "derived"} == {"twice", "thrice"}
            found = list(store.trajectories)
            assert [t.metadata["number"] for t in found] == expected
            for place, t in enumerate(found):
                reward = np.arange(t.length) + t.metadata["number"] / 8
                had = {"twice"} if t.metadata["number"] < 3 else set()
                had |= {"thrice"} if len(expected) // 2 <= place < len(expected) - 1 else set()
                assert {"twice", "thrice"} & set(t.columns) == had
                for name in had:
                    assert t[name][:].tolist() == (reward * {"twice": 2, "thrice": 3}[name]).tolist()


def test_a_column_that_one_store_has_as_optional_is_optional(tmp_path):
    x, y = trajstore.Column(path="x", dtype="int64"), {"path": "y", "dtype": "int64"}
    with trajstore.open(tmp_path / "a", "a", schema=[x, trajstore.Column(**y)]) as store:
        store.append({"x": [1], "y": [2]})
    with trajstore.open(tmp_path / "b", "a", schema=[x, trajstore.Column(**y, presence="optional")]) as store:
        store.append({"x": [3]})
    for order in ("ab", "ba"):
        trajstore.merge([tmp_path / name for name in order], tmp_path / order)
        with trajstore.open(tmp_path / order, "a") as store:
            assert store.schema["y"].presence == "optional"
            store.append({"x": [5]})
            store.flush()
            assert [sorted(t.columns) for t in store.trajectories].count(["x"]) == 2


# What is refused


def test_all_that_differs_is_named_with_how(tmp_path):
    for name, tree, fields in (
        ("a", {"x": np.ones(2), "y": np.ones((2, 3))}, {"n": 1}),
        ("b", {"x": np.ones(2, np.float32), "y": np.ones((2, 4))}, {"n": "one"}),
    ):
        with trajstore.open(tmp_path / name, "a") as store:
            store.append(tree, metadata=fields)
    with pytest.raises(SchemaConflictError) as caught:
        trajstore.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all")
    told = str(caught.value)
    a, b = tmp_path / "a", tmp_path / "b"
    for part in (
        f"column 'x' has dtype=float64 in {a}, dtype=float32 in {b}",
        f"column 'y' has shape=(3,) in {a}, shape=(4,) in {b}",
        f"metadata field 'n' has type=int64 in {a}, type=string in {b}",
    ):
        assert part in told
    assert not (tmp_path / "all").exists()


def test_what_is_no_store_is_refused(tmp_path):
    a = filled(tmp_path / "a", [0])
    with pytest.raises(StoreNotFoundError, match="no trajstore at"):
        trajstore.merge([a, tmp_path / "nothing"], tmp_path / "all")
    with pytest.raises(SelectionError, match="a source is a int"):
        trajstore.merge([a, 3], tmp_path / "all")  # type: ignore[list-item]
    with pytest.raises(SelectionError, match="is a list of"):
        trajstore.merge(a, tmp_path / "all")
    with pytest.raises(SelectionError, match="nothing to combine"):
        trajstore.merge([], tmp_path / "all")
    with pytest.raises(SelectionError, match="expected 'concat' or 'interleave'"):
        trajstore.merge([a], tmp_path / "all", order="random")  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="expected 'link', 'copy' or 'reference'"):
        trajstore.merge([a], tmp_path / "all", share="move")  # type: ignore[arg-type]
    with trajstore.open(a) as store:
        view = store.trajectories
    with pytest.raises(ClosedError):
        trajstore.merge([view], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_a_place_that_is_taken_or_a_source_is_refused_and_left_alone(tmp_path):
    a, b = filled(tmp_path / "a", [0]), filled(tmp_path / "b", [1])
    with trajstore.open(tmp_path / "empty", "a"):
        pass
    before = [objects_of(url) for url in (a, b, tmp_path / "empty")]
    with pytest.raises(StoreExistsError, match="already at"):
        trajstore.merge([a], b)
    for place in (a, f"{a}/", tmp_path / "b" / ".." / "a"):
        with pytest.raises(SelectionError, match="is one of the sources"):
            trajstore.merge([b, a], place)
    with pytest.raises(SelectionError, match="is one of the sources"):
        trajstore.merge([a, tmp_path / "empty"], tmp_path / "empty")
    assert [objects_of(url) for url in (a, b, tmp_path / "empty")] == before
    assert trajstore.merge([a, b], tmp_path / "empty") == 2, "an empty store shows nothing that could be lost"


def test_a_base_outside_the_trusted_places_is_refused_with_the_line_to_add(tmp_path):
    a = filled(tmp_path / "far" / "a", [0, 1])
    trajstore.merge([a], tmp_path / "near" / "one")
    with pytest.raises(UntrustedBaseError, match=r"open it with bases=\{"):
        trajstore.merge([tmp_path / "near" / "one"], tmp_path / "near" / "two")
    bases = {str(tmp_path / "far"): None}
    assert trajstore.merge([tmp_path / "near" / "one"], tmp_path / "near" / "two", bases=bases) == 2
    assert numbers(tmp_path / "near" / "two", bases=bases) == [0, 1]


def test_one_source_that_fails_to_open_closes_the_others(tmp_path, monkeypatch):
    closed: list[str] = []
    close = trajstore.Store.close
    monkeypatch.setattr(trajstore.Store, "close", lambda self: (closed.append(self.url), close(self))[1])
    urls = [filled(tmp_path / name, [0]) for name in "ab"]
    closed.clear()
    with pytest.raises(StoreNotFoundError):
        trajstore.merge([*urls, tmp_path / "nothing"], tmp_path / "all")
    assert sorted(closed) == sorted(urls)


# Cost


def test_a_merge_and_a_split_write_few_bytes_and_read_no_step(tmp_path, monkeypatch):
    urls = []
    for name in "ab":
        with trajstore.open(tmp_path / name, "a") as store:
            store.append_many({"reward": np.random.default_rng(1).random(20_000)}, [2] * 10_000, task="pick")
        urls.append(tmp_path / name)
    sizes = {url: stored_bytes(url) for url in urls}

    def unread(*args: object) -> None:
        raise AssertionError("a step was read")

    monkeypatch.setattr("trajstore.read.segment.SegmentReader.__init__", unread)
    assert trajstore.merge(urls, tmp_path / "all") == 20_000
    written = stored_bytes(tmp_path / "all") + sum(stored_bytes(url) - sizes[url] for url in urls)
    assert written <= 60 * 20_000
    before = sum(stored_bytes(url) for url in urls)
    assert trajstore.split(tmp_path / "all", tmp_path / "half", where="source_id < 5000") == {
        str(tmp_path / "half"): 10_000
    }
    assert stored_bytes(tmp_path / "half") + sum(stored_bytes(url) for url in urls) - before <= 60 * 10_000


def stored_bytes(url: Path) -> int:
    return sum(len(data) for data in objects_of(url).values())
