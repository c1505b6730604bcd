"""Trajectories of several stores in one: against the concatenation of what they hold."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trajstore
from tests.edit.stores import append, assert_holds, filled, holds, numbers_in, objects_of, segments_of
from tests.s3.conftest import bucket, options, s3  # noqa: F401 - fixtures
from tests.support.rare import examples
from trajstore import Column
from trajstore.edit.combine import combine, union_schema
from trajstore.errors import (
    CorruptionError,
    SchemaConflictError,
    SelectionError,
    StoreExistsError,
    StoreNotFoundError,
    UntrustedBaseError,
)
from trajstore.schema import Schema
from trajstore.storage.connect import connect
from trajstore.storage.local import LocalFilesystem

RELAXED = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SHARES = ["link", "copy", "reference"]


@given(
    stores=st.lists(st.lists(st.integers(0, 40), max_size=6), min_size=1, max_size=4),
    share=st.sampled_from(SHARES),
    data=st.data(),
)
@settings(RELAXED, max_examples=examples(15))
def test_a_combination_is_the_concatenation_in_the_order_asked_for(stores, share, data):
    with tempfile.TemporaryDirectory() as folder:
        opened, sources, expected = [], [], []
        for place, numbers in enumerate(stores):
            url = filled(f"{folder}/{place}", numbers, per_commit=data.draw(st.integers(1, 4)))
            store = trajstore.open(url)
            opened.append(store)
            positions = data.draw(st.lists(st.integers(0, len(numbers) - 1), max_size=6)) if numbers else []
            sources.append(store.trajectories.take(positions).source())
            expected += [numbers[p] for p in positions]
        order = data.draw(st.none() | st.permutations(range(len(expected))))
        marks = [f"mark {place}" for place in range(len(expected))]
        instead = data.draw(st.booleans())
        if instead and data.draw(st.booleans()):
            filled(f"{folder}/target", [90, 91])
        combined = combine(
            sources,
            LocalFilesystem(f"{folder}/target"),
            share=share,
            order=None if order is None else np.array(order, np.int64),
            fields={"mark": ("string", pa.array(marks, pa.string()))},
            instead=instead,
        )
        places = list(range(len(expected))) if order is None else list(order)
        with trajstore.open(f"{folder}/target") as target:
            assert target.version == combined.version.number
            view = target.trajectories
            assert numbers_in(view) == [expected[p] for p in places]
            frame = view.to_pandas()
            assert frame["mark"].tolist() == [marks[p] for p in places]
            for stored in view:
                assert stored["action"][:].tolist() == [[stored.metadata["number"]] * 2] * stored.length
            assert target.versions()["operation"].iloc[0] == "merge"
        for store in opened:
            store.close()


def test_a_field_may_take_the_place_of_one_that_is_there(tmp_path):
    urls = [filled(tmp_path / name, numbers) for name, numbers in (("a", [0, 1]), ("b", [2]))]
    stores = [trajstore.open(url) for url in urls]
    combine(
        [store.trajectories.source() for store in stores],
        LocalFilesystem(str(tmp_path / "c")),
        fields={"number": ("int64", pa.array([7, 8, 9]))},
        order=np.array([2, 0]),
    )
    with trajstore.open(tmp_path / "c") as store:
        assert [t.metadata["number"] for t in store.trajectories] == [9, 7]
        assert store.trajectories.read("action")[:, 0].tolist() == [2] * 3 + [0]
    for store in stores:
        store.close()


def test_one_segment_that_several_refer_to_is_there_once(tmp_path):
    url = filled(tmp_path / "origin", range(4), per_commit=4)
    with trajstore.open(url) as store:
        for name in ("one", "two"):
            store.trajectories.save(tmp_path / name, share="reference")
    with trajstore.open(tmp_path / "one") as one, trajstore.open(tmp_path / "two") as two:
        sources = [one.trajectories.first(3).source(), two.trajectories.last(2).source()]
        combine(sources, LocalFilesystem(str(tmp_path / "both")), share="copy")
    assert len(segments_of(tmp_path / "both")) == 1
    holds(tmp_path / "both", [0, 1, 2, 2, 3])


# Schemas


def column(path, dtype="int64", **more):
    return Column(path=path, dtype=dtype, **more)


def test_columns_that_not_every_store_has_become_optional(tmp_path):
    for name, tree in (("a", {"x": np.arange(3), "y": np.ones(3)}), ("b", {"x": np.arange(2), "z": np.zeros(2)})):
        with trajstore.open(tmp_path / name, "a") as store:
            store.append(tree, **{name: 1})
    with trajstore.open(tmp_path / "a") as a, trajstore.open(tmp_path / "b") as b:
        combine([a.trajectories.source(), b.trajectories.source()], LocalFilesystem(str(tmp_path / "c")))
    with trajstore.open(tmp_path / "c", "a") as store:
        assert {c.path: c.presence for c in store.schema} == {"x": "required", "y": "optional", "z": "optional"}
        assert [sorted(t.columns) for t in store.trajectories] == [["x", "y"], ["x", "z"]]
        assert [t.metadata for t in store.trajectories] == [{"a": 1}, {"b": 1}]
        assert store.trajectories.read("x").tolist() == [0, 1, 2, 0, 1]
        store.append({"x": np.arange(1)})
        assert len(store.trajectories) == 3


@pytest.mark.parametrize(
    ("one", "other", "match"),
    [
        ([column("x")], [column("x", "float64")], "dtype"),
        ([column("x")], [column("x", shape=(2,))], "shape"),
        ([column("x")], [column("x", extra=1)], "extra"),
        ([column("x")], [column("x", ragged=True)], "ragged"),
        ([column("x"), column("a")], [column("x"), column("a/b")], "a"),
    ],
)
def test_columns_that_differ_are_refused(one, other, match):
    with pytest.raises(Exception, match=match) as caught:
        union_schema([Schema(tuple(one)), Schema(tuple(other))], {})
    assert isinstance(caught.value, trajstore.SchemaError)


def test_fields_that_differ_are_refused_and_the_target_stays_empty(tmp_path):
    for name, value in (("a", 1), ("b", "one")):
        with trajstore.open(tmp_path / name, "a") as store:
            store.append({"x": np.arange(2)}, kind=value)
    with trajstore.open(tmp_path / "a") as a, trajstore.open(tmp_path / "b") as b:
        sources = [a.trajectories.source(), b.trajectories.source()]
        with pytest.raises(
            SchemaConflictError, match=r"do not fit together: metadata field 'kind' has type=int64 in .*/a, "
        ):
            combine(sources, LocalFilesystem(str(tmp_path / "c")))
        with pytest.raises(SelectionError, match="nothing to combine"):
            combine([], LocalFilesystem(str(tmp_path / "c")))
    assert not (tmp_path / "c").exists()


def test_a_target_that_is_there_is_refused_and_left_alone(tmp_path):
    url = filled(tmp_path / "a", [0])
    target = filled(tmp_path / "b", [1])
    before = objects_of(target)
    with trajstore.open(url) as store, pytest.raises(StoreExistsError):
        combine([store.trajectories.source()], LocalFilesystem(target))
    assert objects_of(target) == before


def test_an_empty_store_that_somebody_opened_is_taken_and_goes_on(tmp_path):
    """It shows nothing that could be lost; what was appended to it meanwhile comes after."""
    url = filled(tmp_path / "a", [0, 1])
    with trajstore.open(tmp_path / "b", "x") as target:
        append(target, 5)
        with trajstore.open(url) as store:
            store.trajectories.save(tmp_path / "b")
        target.flush()
        assert_holds(target.trajectories, [0, 1, 5])
    holds(tmp_path / "b", [0, 1, 5])


# In a bucket


@pytest.fixture
def place(bucket):  # noqa: F811
    return f"s3://{bucket}/runs"


def s3_filled(url, numbers, options):  # noqa: F811
    with trajstore.open(url, "a", storage_options=options) as store:
        for n in numbers:
            append(store, n)
            store.flush()


def test_within_a_bucket_the_server_copies(place, options, s3):  # noqa: F811
    s3_filled(f"{place}/a", range(3), options)
    with trajstore.open(f"{place}/a", storage_options=options) as store:
        view = store.trajectories
        view.to_pandas()
        with s3.recording() as log:
            view.save(f"{place}/b", storage_options=options)
        read = [r for r in log if r.method == "GET" and "/segments/" in r.key and "/c.0" in r.key]
        assert not read, "no byte of a segment comes here"
        view.take([2, 0]).save(f"{place}/b", storage_options=options, replace=True)
    holds(f"{place}/b", [2, 0], storage_options=options)
    with trajstore.open(f"{place}/b", version=1, storage_options=options) as store:
        assert_holds(store.trajectories, range(3))


def test_a_bucket_s_store_refers_to_its_neighbour_and_to_no_other_bucket(place, options, s3):  # noqa: F811
    s3_filled(f"{place}/a", range(3), options)
    other = f"bucket-{uuid.uuid4().hex}"
    s3.make_bucket(other)
    with trajstore.open(f"{place}/a", storage_options=options) as store:
        for url in (f"{place}/b", f"s3://{other}/runs/b", f"s3://{other}"):
            store.trajectories.save(url, share="reference", storage_options=options)
    holds(f"{place}/b", range(3), storage_options=options)
    for url in (f"s3://{other}/runs/b", f"s3://{other}"):
        with trajstore.open(url, storage_options=options) as store, pytest.raises(UntrustedBaseError, match="bases="):
            store.trajectories.read("action")
        holds(url, range(3), storage_options=options, bases={place: options})
    client = s3.client()
    name = place.removeprefix("s3://").partition("/")[0]
    found = client.list_objects_v2(Bucket=name, Prefix="runs/a/segments/")["Contents"]
    for key in (item["Key"] for item in found if "/c.0" in item["Key"]):
        client.put_object(Bucket=name, Key=key, Body=b"\0" * 4096)
    with trajstore.open(f"{place}/b", storage_options=options) as store:
        first = store.trajectories[0]
        with pytest.raises(CorruptionError, match=rf"segments/.* in {place}/a"):
            first["action"][:]
    client.delete_object(Bucket=name, Key="runs/a/trajstore.json")
    client.close()
    with trajstore.open(f"{place}/b", storage_options=options) as store, pytest.raises(StoreNotFoundError):
        store.trajectories.read("action")


def test_bytes_are_deleted_and_reclaimed_in_a_bucket(place, options):  # noqa: F811
    url = f"{place}/a"
    s3_filled(url, range(5), options)
    with trajstore.open(url, "a", storage_options=options) as store:
        store.delete([0, 2], reclaim=True)
        append(store, 5)
        store.flush()
    holds(url, [1, 3, 4, 5], storage_options=options)
    filesystem = connect(url, storage_options=options)
    segments = {info.key.split("/")[1] for info in filesystem.list_objects("segments")}
    assert len(segments) == 4
    filesystem.close()


def test_from_a_bucket_to_a_disk_and_back(place, options, tmp_path):  # noqa: F811
    s3_filled(f"{place}/a", range(3), options)
    with trajstore.open(f"{place}/a", storage_options=options) as store:
        store.trajectories[::-1].save(tmp_path / "here")
    holds(tmp_path / "here", [2, 1, 0])
    with trajstore.open(tmp_path / "here") as store:
        store.trajectories.save(f"{place}/back", storage_options=options)
    holds(f"{place}/back", [2, 1, 0], storage_options=options)
    assert Path(tmp_path / "here").exists()
