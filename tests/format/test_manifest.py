"""Manifests against a plain list of rows: there and back, merged, with deleted rows and fields that came later."""

from __future__ import annotations

import dataclasses
import datetime as dt
import io
import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trajstore import CorruptionError, MetadataError
from trajstore.format import manifest as m
from trajstore.format.manifest import SegmentEntry, TrajectoryRow
from trajstore.format.schemas import validate
from trajstore.names import RESERVED_METADATA
from trajstore.schema import METADATA_TYPES

NOW = dt.datetime(2026, 3, 1, 12, 0, 0, 1, tzinfo=dt.UTC)
FIELDS = {"task": "string", "score": "float64", "n": "int64", "ok": "bool", "raw": "bytes", "when": "timestamp"}
VALUES = {
    "task": st.text(st.characters(codec="utf-8"), max_size=5),
    "score": st.floats(allow_nan=False),
    "n": st.integers(-(2**63), 2**63 - 1),
    "ok": st.booleans(),
    "raw": st.binary(max_size=5),
    "when": st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2200, 1, 1), timezones=st.just(dt.UTC)),
}
metadata = st.fixed_dictionaries({}, optional=VALUES)


def segment(number: int, **changes) -> SegmentEntry:
    entry = SegmentEntry(f"{number:032x}", 100, 9, 12345, ("a", "b"), "0" * 64, "1" * 64)
    return dataclasses.replace(entry, **changes)


def row(number: int, segment_uuid: str, fields=None, **changes) -> TrajectoryRow:
    made = TrajectoryRow(
        number.to_bytes(16), segment_uuid, number * 3, number, number + 1, True, False, 1.5, NOW, fields or {}
    )
    return dataclasses.replace(made, **changes)


def stored(rows, segments, fields, *, first_id=0, deleted=()):
    """A manifest as it is found: its snapshot's entry and its bytes."""
    built = m.build_table(rows, segments, fields)
    data = m.encode_manifest(built)
    entry = m.manifest_entry("manifests/x.parquet", data, built, first_id)
    gone = sum(hi - lo for lo, hi in deleted)
    return dataclasses.replace(entry, deleted=tuple(deleted), trajectories=entry.trajectories - gone), data


def expected_row(number, one, segments, fields):
    return {
        **{f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.name not in ("segment", "metadata")},
        "id": number,
        "segment": [s.uuid for s in segments].index(one.segment),
        **{name: one.metadata.get(name) for name in fields},
    }


@st.composite
def manifests(draw, first=0):
    segments = [segment(draw(st.integers(0, 2**100)), columns=tuple(draw(st.lists(st.text(max_size=3), max_size=3))))]
    layers = [segment(2**121 + n, columns=(f"derived {n}",), base=n or None) for n in range(2)]
    segments += [
        segment(2**120 + n, layers=tuple(layers[: draw(st.integers(0, 2))]), base=n or None)
        for n in range(draw(st.integers(0, 2)))
    ]
    fields = {name: FIELDS[name] for name in FIELDS if draw(st.booleans())}
    count = draw(st.integers(1, 6))
    rows = []
    for number in range(first, first + count):
        values = {k: v for k, v in draw(metadata).items() if k in fields}
        reward = draw(st.none() | st.floats(allow_nan=False))
        rows.append(
            row(
                number,
                draw(st.sampled_from(segments)).uuid,
                values,
                reward_sum=reward,
                terminated=draw(st.booleans()),
                truncated=draw(st.booleans()),
                episode=draw(st.none() | st.binary(min_size=16, max_size=16)),
                first_step=draw(st.integers(0, 2**40)),
            )
        )
    cuts = sorted(draw(st.sets(st.integers(0, count), max_size=4)))
    return rows, segments, fields, list(zip(cuts[::2], cuts[1::2], strict=False))


@given(manifests(), st.integers(0, 2**40))
def test_decoding_is_the_inverse_of_encoding(made, first_id):
    rows, segments, fields, deleted = made
    entry, data = stored(rows, segments, fields, first_id=first_id, deleted=deleted)
    found = m.decode_manifest(entry, data)
    assert found.segments == tuple(segments)
    assert found.table.to_pylist() == [expected_row(None, one, segments, fields) for one in rows]
    live = [n for n in range(len(rows)) if not any(lo <= n < hi for lo, hi in deleted)]
    expected = [expected_row(first_id + n, rows[n], segments, fields) for n in live]
    assert m.live_rows(entry, found.table).to_pylist() == expected
    assert (entry.rows, entry.trajectories) == (len(rows), len(live))
    assert entry.steps == sum(one.length for one in rows)
    some = m.decode_manifest(entry, data, ["length", "id", "unheard of"])
    assert some.table.column_names == ["length", "id"]
    assert m.live_rows(entry, some.table)["id"].to_pylist() == [one["id"] for one in expected]


@given(st.lists(manifests(), min_size=1, max_size=4))
def test_merging_is_concatenation(made):
    parts, expected, first_id = [], [], 0
    for rows, segments, fields, deleted in made:
        entry, data = stored(rows, segments, fields, first_id=first_id, deleted=deleted)
        parts.append((entry, m.decode_manifest(entry, data)))
        for n, one in enumerate(rows):
            if not any(lo <= n < hi for lo, hi in deleted):
                found = {**dict.fromkeys(FIELDS), **expected_row(first_id + n, one, segments, fields)}
                expected.append({**found, "segment": segments[found["segment"]]})
        first_id += len(rows)
    merged = m.merge_manifests(parts, FIELDS)
    assert len({(s.uuid, s.base, s.layers) for s in merged.segments}) == len(merged.segments)
    found = [{**one, "segment": merged.segments[one["segment"]].uuid} for one in merged.table.to_pylist()]
    assert found == [{**one, "segment": one["segment"].uuid} for one in expected]
    data = m.encode_manifest(merged)
    again = m.decode_manifest(m.manifest_entry("manifests/y.parquet", data, merged, 0), data)
    assert again.table.equals(merged.table)
    assert again.segments == merged.segments
    # The ids are written out: another first_id changes nothing.
    moved = m.manifest_entry("manifests/y.parquet", data, merged, 999)
    assert m.live_rows(moved, again.table)["id"].to_pylist() == [one["id"] for one in expected]


def segment_table(data):
    return json.loads(pq.read_schema(io.BytesIO(data)).metadata[b"trajstore.segments"])


def with_segment_table(data, described):
    table = pq.read_table(io.BytesIO(data))
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"trajstore.segments": json.dumps(described).encode()}), sink)
    return sink.getvalue()


def test_layers_are_entries_after_those_that_rows_name():
    layers = [segment(7, columns=("x",)), segment(8, columns=("y",)), segment(9, columns=("x",))]
    segments = [segment(1, layers=tuple(layers[:2]), base=0), segment(2), segment(3, layers=(layers[2],))]
    entry, data = stored([row(n, segments[n].uuid) for n in range(3)], segments, {})
    described = segment_table(data)
    validate(described, "segment-table")
    assert [s["uuid"] for s in described["segments"]] == [s.uuid for s in (*segments, *layers)]
    assert [s["layers"] for s in described["segments"]] == [[s.uuid for s in one.layers] for one in segments] + [[]] * 3
    found = m.decode_manifest(entry, data).segments
    assert found == tuple(segments)
    assert found[0].all_columns == ("a", "b", "x", "y")
    assert found[0].total_bytes == 3 * 12345
    assert [s.key for s in found] == [(s.uuid, *(layer.uuid for layer in s.layers)) for s in segments]
    replaced = segments[0].with_layer(layers[2])
    assert [layer.uuid for layer in replaced.layers] == [layers[1].uuid, layers[2].uuid]


def test_versions_of_a_segment_with_other_layers_stay_apart_when_merged():
    layer = segment(7, columns=("x",))
    plain, layered = segment(1), segment(1, layers=(layer,))
    parts = []
    for number, one in enumerate((plain, layered, plain)):
        entry, data = stored([row(number, one.uuid)], [one], {}, first_id=number)
        parts.append((entry, m.decode_manifest(entry, data)))
    merged = m.merge_manifests(parts, {})
    assert merged.segments == (plain, layered)
    assert merged.table["segment"].to_pylist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["segments"].pop(), "does not describe it"),
        (lambda t: t["segments"][1].update(steps=99), "99 steps of 9 trajectories"),
        (lambda t: t["segments"].reverse(), "layers stand before"),
    ],
    ids=["gone", "of other rows", "first"],
)
def test_layers_that_make_no_sense_are_corruption(change, message):
    one = segment(1, layers=(segment(7, columns=("x",)),))
    _, data = stored([row(0, one.uuid)], [one], {})
    described = segment_table(data)
    change(described)
    bad = with_segment_table(data, described)
    manifest = m.build_table([row(0, one.uuid)], [one], {})
    with pytest.raises(CorruptionError, match=rf"manifests/x\.parquet.*{message}"):
        m.decode_manifest(m.manifest_entry("manifests/x.parquet", bad, manifest, 0), bad)


def test_fields_that_came_later_are_null():
    entry, data = stored([row(0, segment(1).uuid, {"n": 1})], [segment(1)], {"n": "int64"})
    table = m.live_rows(entry, m.decode_manifest(entry, data).table, m.table_schema(FIELDS))
    assert table.schema.equals(m.table_schema(FIELDS))
    assert table.select(list(FIELDS)).to_pylist() == [{**dict.fromkeys(FIELDS), "n": 1}]


def test_a_changed_manifest_is_corruption():
    entry, data = stored([row(n, segment(1).uuid) for n in range(3)], [segment(1)], {})
    for bad in (data[:-1], data + b"x", b"", data[:100] + bytes([data[100] ^ 1]) + data[101:]):
        with pytest.raises(CorruptionError, match=r"manifests/x\.parquet does not match"):
            m.decode_manifest(entry, bad)


def test_pages_carry_checksums_and_the_footer_has_its_hash():
    entry, data = stored([row(0, segment(1).uuid)], [segment(1)], {})
    table = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read()
    assert table.num_rows == 1
    assert data.endswith(m.parquet_footer(data))
    assert m.parquet_footer(data).endswith(b"PAR1")
    assert len(m.parquet_footer(data)) == int.from_bytes(data[-8:-4], "little") + 8
    assert len(entry.footer_sha256) == 64


@pytest.mark.parametrize(
    ("value", "kind", "plain"),
    [
        (True, "bool", True),
        (np.True_, "bool", True),
        (7, "int64", 7),
        (np.int8(-7), "int64", -7),
        (-(2**63), "int64", -(2**63)),
        (np.uint64(2**63 - 1), "int64", 2**63 - 1),
        (1.5, "float64", 1.5),
        (np.float32(0.5), "float64", 0.5),
        (math.inf, "float64", math.inf),
        ("ü", "string", "ü"),
        (np.str_("x"), "string", "x"),
        (b"\0", "bytes", b"\0"),
        (dt.datetime(2026, 1, 1), "timestamp", dt.datetime(2026, 1, 1, tzinfo=dt.UTC)),
        (np.datetime64("2026-01-01T00:00:00.5"), "timestamp", dt.datetime(2026, 1, 1, 0, 0, 0, 500_000, tzinfo=dt.UTC)),
    ],
    ids=repr,
)
def test_the_type_of_a_metadata_value(value, kind, plain):
    assert m.metadata_type("x", value) == (kind, plain)
    assert kind in METADATA_TYPES
    stored_values, added = m.check_metadata({"x": value}, {})
    assert (stored_values, added) == ({"x": plain}, {"x": kind})


@pytest.mark.parametrize(
    "value", [2**63, -(2**63) - 1, [1], {}, 1j, object(), "\ud800", dt.date(2026, 1, 1), np.zeros(2)]
)
def test_what_is_no_metadata_value(value):
    with pytest.raises(MetadataError, match="metadata field 'x'"):
        m.metadata_type("x", value)


@pytest.mark.parametrize(
    ("wanted", "value"),
    [("int64", 1.0), ("int64", True), ("bool", 1), ("string", b"x"), ("float64", 2**53 + 1), ("timestamp", "2026")],
)
def test_a_value_of_another_type_is_refused(wanted, value):
    with pytest.raises(MetadataError, match=f"metadata field 'x' is {wanted} in this store, found"):
        m.check_metadata({"x": value}, {"x": wanted})


def test_whole_numbers_fit_a_float_field_and_none_is_no_value():
    assert m.check_metadata({"x": 3, "y": None}, {"x": "float64"}) == ({"x": 3.0}, {})


def test_every_field_of_the_table_is_reserved():
    assert {field.name for field in m.TABLE_FIELDS} <= RESERVED_METADATA
