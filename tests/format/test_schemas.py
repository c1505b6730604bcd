"""The JSON Schemas: what is written fits them, and every broken example is refused at the place that its name says."""

from __future__ import annotations

import datetime as dt
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import trajstore
from tests.support.kinds import every_kind, trajectory_of
from tests.support.strategies import columns
from trajstore import CorruptionError, FormatVersionError, Schema
from trajstore.format import layout
from trajstore.format.document import canonical, seal, unseal
from trajstore.format.schemas import SCHEMA_NAMES, load_schema, schemas_folder, validate
from trajstore.format.snapshot import EMPTY, Snapshot, StoreDocument

EXAMPLES = Path(str(schemas_folder())) / "examples"
VALID = sorted((EXAMPLES / "valid").glob("*.json"))
BROKEN = sorted((EXAMPLES / "broken").glob("*.json"))


def parsed(path):
    return json.loads(path.read_text(encoding="utf-8"))


def schema_of(path):
    return path.stem.split("--")[0]


def stem(path):
    return path.stem


def test_every_schema_has_valid_and_broken_examples():
    assert {schema_of(p) for p in VALID} == set(SCHEMA_NAMES) == {schema_of(p) for p in BROKEN}
    assert {p.name for p in EXAMPLES.parent.glob("*.json")} == {f"{name}.schema.json" for name in SCHEMA_NAMES}


def test_the_page_on_the_format_names_every_schema_and_every_folder():
    tree = (schemas_folder() / "FORMAT.md").read_text(encoding="utf-8").split("```")[1]
    assert set(re.findall(r"([\w-]+)\.schema\.json", tree)) == set(SCHEMA_NAMES)
    marks = {layout.TAGS, layout.PINS, layout.VACUUM}
    folders = {layout.SNAPSHOTS, layout.MANIFESTS, layout.SEGMENTS, layout.STATISTICS, *marks}
    assert set(re.findall(r"^STORE/(\w+)/", tree, re.MULTILINE)) == folders
    keys = [layout.STORE_DOCUMENT, layout.LATEST_HINT, layout.snapshot_key(7), layout.statistics_key(7)]
    assert all(f"STORE/{key} " in tree for key in keys)


@pytest.mark.parametrize("path", VALID, ids=stem)
def test_a_valid_example_passes_and_can_be_read(path):
    document = parsed(path)
    validate(document, schema_of(path))
    data = path.read_bytes()
    if schema_of(path) == "store":
        assert StoreDocument.from_bytes(data, key=path.name).store_uuid == document["store_uuid"]
    if schema_of(path) == "snapshot":
        snapshot = Snapshot.from_bytes(data, version=document["version"])
        assert json.loads(snapshot.to_bytes()) == document


@pytest.mark.parametrize("path", BROKEN, ids=stem)
def test_a_broken_example_is_refused_at_one_place(path):
    document, name = parsed(path), schema_of(path)
    errors = list(Draft202012Validator(load_schema(name)).iter_errors(document))
    (place,) = {error.json_path for error in errors}  # an example breaks one thing
    with pytest.raises(CorruptionError) as caught:
        validate(document, name, key="the/key.json")
    assert str(caught.value).startswith(f"the/key.json: {place}: ")


@pytest.mark.parametrize("path", [p for p in BROKEN if schema_of(p) == "snapshot"], ids=stem)
def test_a_broken_example_differs_from_a_valid_one_in_one_member(path):
    good, bad = parsed(EXAMPLES / "valid" / "snapshot--every-kind-of-column.json"), parsed(path)
    changed = {k for k in good.keys() | bad.keys() if json.dumps(good.get(k)) != json.dumps(bad.get(k))}
    assert len(changed - {"sha256"}) == 1
    if "sha256" in bad:
        assert unseal(seal({k: v for k, v in bad.items() if k != "sha256"}), key="x")


@pytest.mark.parametrize("name", SCHEMA_NAMES)
def test_a_schema_is_strict_and_says_what_everything_is(name):
    schema = load_schema(name)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"

    def walk(node, where):
        if isinstance(node, dict):
            if node.get("type") == "object":
                assert "additionalProperties" in node, where
                if "properties" in node:
                    assert node["additionalProperties"] is False, where
                    assert set(node["required"]) == set(node["properties"]), where
                    for member, inner in node["properties"].items():
                        assert inner.get("description"), f"{where}.{member} has no description"
            for key, inner in node.items():
                walk(inner, f"{where}.{key}")
        elif isinstance(node, list):
            for number, inner in enumerate(node):
                walk(inner, f"{where}[{number}]")

    walk(schema, name)


def test_an_unknown_schema_name_is_an_error():
    with pytest.raises(ValueError, match=r"'pins', expected one of store, snapshot"):
        load_schema("pins")


def test_documents_of_a_real_store_fit(tmp_path):
    kinds, rng = every_kind(), np.random.default_rng(0)
    with trajstore.open(tmp_path / "s", "x", schema=kinds) as store:
        for commit in range(7):  # enough for a merged manifest
            store.append(trajectory_of(kinds, rng, 3), task="pick")
            if commit == 3:
                store.append(
                    trajectory_of(kinds, rng, 2), score=1.5, when=dt.datetime(2026, 1, 1), ok=True, raw=b"x", n=1
                )
            store.flush()
    root = tmp_path / "s"
    validate(parsed(root / "trajstore.json"), "store")
    versions = sorted((root / "snapshots").glob("*.json"))
    manifests = sorted((root / "manifests").glob("*.parquet"))
    indexes = sorted((root / "segments").glob("*/pages.arrow"))
    assert (len(versions), len(indexes)) == (7, 7)
    assert len(manifests) > 7
    for path in versions:
        validate(parsed(path), "snapshot")
    for path in manifests:
        validate(json.loads(pq.read_schema(path).metadata[b"trajstore.segments"]), "segment-table")
    for path in indexes:
        validate(json.loads(pa.ipc.open_file(path).schema.metadata[b"trajstore.sources"]), "page-index")


@given(columns())
def test_every_schema_that_can_exist_fits(found):
    snapshot = Snapshot(**{**vars(EMPTY), "version": 1, "schema": Schema(found, {"task": "string"})})
    validate(json.loads(snapshot.to_bytes()), "snapshot")


names = st.text(st.characters(codec="utf-8"), max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(names.filter(lambda n: n not in ("sha256", "format")), json_values, max_size=5)


@given(documents)
def test_unseal_is_the_inverse_of_seal(members):
    document = {**members, "format": 1}
    assert unseal(seal(document), key="k") == document
    # Any writing of the same document will do: the hash is of its canonical form.
    assert unseal(json.dumps(json.loads(seal(document)), indent=3).encode(), key="k") == document


@given(documents, st.data())
def test_a_changed_document_does_not_unseal(members, data):
    sealed = bytearray(seal({**members, "format": 1}))
    where = data.draw(st.integers(0, len(sealed) - 1))
    sealed[where] ^= data.draw(st.integers(1, 255))
    try:
        document = unseal(bytes(sealed), key="snapshots/7.json")
    except CorruptionError as error:
        assert "snapshots/7.json" in str(error)  # noqa: PT017 - either outcome is fine
    else:
        assert canonical(document) == canonical({**members, "format": 1})


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"[]",
        b"null",
        b"7",
        b'"x"',
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"sha256": 7}',
        b'{"sha256": NaN, "a": NaN}',
    ],
    ids=repr,
)
def test_what_is_no_document_is_corruption(data):
    with pytest.raises(CorruptionError, match=r"^the/key "):
        unseal(data, key="the/key")


@pytest.mark.parametrize("version", [2, 1000, None, "1", 1.5])
def test_a_document_of_another_format_is_refused(version):
    with pytest.raises((FormatVersionError, CorruptionError), match=r"^the/key has format .*upgrade trajstore"):
        unseal(seal({"format": version}), key="the/key")
