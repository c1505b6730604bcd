"""Snapshots: there and back, chained by hash and by time, and refused when they are not what their name says."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.strategies import columns
from trajstore import CorruptionError, FormatVersionError, Schema, VersionExpiredError
from trajstore.format import snapshot as s
from trajstore.format.document import seal
from trajstore.format.layout import snapshot_key, snapshot_version
from trajstore.format.schemas import validate

counts = st.integers(0, 2**53)
hexes = st.integers(0, 2**128 - 1).map(lambda n: f"{n:032x}")
hashes = st.integers(0, 2**256 - 1).map(lambda n: f"{n:064x}")
times = st.datetimes(dt.datetime(1970, 1, 1), dt.datetime(2200, 1, 1), timezones=st.just(dt.UTC))
spans = st.lists(st.integers(0, 99), unique=True, max_size=6).map(
    lambda cuts: tuple(zip(sorted(cuts)[::2], sorted(cuts)[1::2], strict=False))
)
entries = st.builds(
    s.ManifestEntry,
    path=hexes.map(lambda h: f"manifests/{h}.parquet"),
    footer_sha256=hashes,
    crc32c=st.integers(0, 2**32 - 1),
    nbytes=st.integers(12, 2**40),
    rows=st.integers(100, 2**40),
    first_id=counts,
    trajectories=counts,
    steps=counts,
    deleted=spans,
)
bases = st.builds(s.Base, url=st.sampled_from(["../other", "s3://b/x"]), store_uuid=hexes, pin=st.none() | hexes)
snapshots = st.builds(
    s.Snapshot,
    version=st.integers(1, 10**20 - 1),
    commit_id=hexes,
    parent_sha256=hashes,
    created_at=times,
    operation=st.sampled_from(["append", "merge"]),
    schema=st.builds(Schema, columns().map(tuple), st.dictionaries(st.sampled_from(["x_1", "x_2"]), st.just("int64"))),
    next_id=counts,
    totals=st.builds(s.Totals, counts, counts, counts),
    bases=st.lists(bases, max_size=2).map(tuple),
    manifests=st.lists(entries, max_size=3).map(tuple),
)


@given(snapshots)
def test_from_bytes_is_the_inverse_of_to_bytes(snapshot):
    data = snapshot.to_bytes()
    assert s.Snapshot.from_bytes(data, version=snapshot.version) == snapshot
    validate(json.loads(data), "snapshot")
    assert s.digest(data) == hashlib.sha256(data).hexdigest()


@given(hexes)
def test_a_store_document_round_trips(store_uuid):
    data = s.StoreDocument(store_uuid).to_bytes()
    assert s.StoreDocument.from_bytes(data, key="trajstore.json").store_uuid == store_uuid
    validate(json.loads(data), "store")


@given(times, times)
def test_time_moves_on_even_where_clocks_do_not(now, parent):
    found = s.next_timestamp(now, parent)
    assert found > parent
    assert found >= now
    assert found in (now, parent + dt.timedelta(microseconds=1))


def test_the_snapshot_of_another_version_is_refused():
    data = dataclasses.replace(s.EMPTY, version=3).to_bytes()
    with pytest.raises(CorruptionError, match=r"^snapshots/0{19}4\.json holds version 3"):
        s.Snapshot.from_bytes(data, version=4)


def test_an_emptied_snapshot_is_expired():
    with pytest.raises(VersionExpiredError, match=r"version 4 .*snapshots/0{19}4\.json.*open a later one"):
        s.Snapshot.from_bytes(b"", version=4)


def members(**changes):
    document = json.loads(dataclasses.replace(s.EMPTY, version=4).to_bytes())
    return {k: v for k, v in {**document, **changes}.items() if k != "sha256" and v is not ...}


@pytest.mark.parametrize(
    "changes",
    [
        {"version": ...},
        {"schema": {}},
        {"schema": {"columns": [{"path": "a"}], "metadata": {}}},
        {"schema": {"columns": [], "metadata": {"length": "int64"}}},
        {"totals": {"trees": 1}},
        {"totals": 3},
        {"bases": [{"url": "x"}]},
        {"manifests": [{"path": "x"}]},
        {"manifests": None},
        {"created_at": "yesterday"},
        {"created_at": 7},
    ],
    ids=str,
)
def test_a_sealed_document_that_is_no_snapshot_is_refused(changes):
    with pytest.raises(CorruptionError, match=r"^snapshots/0{19}4\.json is not a snapshot"):
        s.Snapshot.from_bytes(seal(members(**changes)), version=4)


def test_a_snapshot_of_a_newer_format_is_refused():
    with pytest.raises(FormatVersionError, match=r"snapshots/0{19}4\.json has format 2, .* reads up to 1; upgrade"):
        s.Snapshot.from_bytes(seal(members(format=2)), version=4)


@pytest.mark.parametrize("changes", [{"store_uuid": ...}, {"store_uuid": 7}])
def test_a_sealed_document_that_is_no_store_is_refused(changes):
    document = {k: v for k, v in {"format": 1, "store_uuid": "x", **changes}.items() if v is not ...}
    with pytest.raises(CorruptionError, match=r"^trajstore\.json has no store_uuid"):
        s.StoreDocument.from_bytes(seal(document), key="trajstore.json")


@given(st.integers(0, 10**20 - 1))
def test_keys_sort_as_versions_do(version):
    assert snapshot_version(snapshot_key(version)) == version
    assert (snapshot_key(version) < snapshot_key(10**20 - 1)) == (version < 10**20 - 1)


@pytest.mark.parametrize("key", ["snapshots/LATEST", "snapshots/1.json", "snapshots/.x.tmp", f"x/{0:020d}.json"])
def test_other_names_are_no_version(key):
    assert snapshot_version(key) is None
