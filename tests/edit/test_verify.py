"""``verify`` finds every fault once, by its name, and nothing where nothing is wrong; ``repair`` leaves out what is lost.

Each test makes one fault in a copy of a healthy store, as a disk, a person or a broken writer would, and compares with what
is to be found, which is written down beside it.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import trajstore
from tests.edit import stores
from tests.support.kinds import every_kind, trajectory_of
from tests.support.s3_server import S3Server
from trajstore.edit.check_arrow import ends_problem, metadata_bytes
from trajstore.edit.combine import Source, combine
from trajstore.edit.findings import Report
from trajstore.edit.marks import pin, tag
from trajstore.edit.repair import repair
from trajstore.edit.verify import verify
from trajstore.errors import CorruptionError
from trajstore.format import layout
from trajstore.format.manifest import Manifest, decode_manifest, encode_manifest, manifest_entry
from trajstore.format.pages import PageSource, arrow_schema, decode_page_index
from trajstore.format.snapshot import Base, Snapshot, digest
from trajstore.read.selection import Selection
from trajstore.storage.age import GRACE
from trajstore.storage.connect import connect

COMMITS = 4
NUMBERS = range(8)
LATER = dt.timedelta(days=1) + GRACE


def looked_at(url: Any, *, deep: bool = False, now: dt.datetime | None = None, **options: Any) -> Report:
    """What ``verify`` finds in a store that is opened anew."""
    with trajstore.open(url, **options) as store:
        return verify(store._filesystem, store._access, deep=deep, now=now)


def facts(report: Report) -> list[tuple[str, str, str]]:
    """Severity, kind and place of each finding."""
    return [(f.severity, f.kind, f.where) for f in report.findings]


def repaired(url: Any, report: Report) -> int | None:
    """The version that repairs a store, if one does."""
    with trajstore.open(url, "a") as store:
        made = repair(store._filesystem, store._history, store._history.latest(store.version), report)
        return None if made is None else made.number


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trajectories in each of four commits, with a tag."""
    folder = tmp_path_factory.mktemp("healthy") / "a"
    stores.filled(folder, NUMBERS, per_commit=2)
    with trajstore.open(folder) as store:
        tag(store._filesystem, store._history, "first", store._history.load(1))
    return folder


@pytest.fixture
def copy(healthy: Path, tmp_path: Path) -> Path:
    """A store of its own to damage."""
    return Path(shutil.copytree(healthy, tmp_path / "a"))


def snapshot(folder: Path, version: int) -> Snapshot:
    return Snapshot.from_bytes((folder / layout.snapshot_key(version)).read_bytes(), version=version)


def reseal(folder: Path, version: int, change: Callable[[Snapshot], Snapshot]) -> str:
    """Change a snapshot as somebody would who also writes its hash; its key."""
    key = layout.snapshot_key(version)
    (folder / key).write_bytes(change(snapshot(folder, version)).to_bytes())
    return key


def manifest_of(folder: Path, version: int) -> tuple[str, Manifest]:
    """Path and content of the last manifest of a version."""
    entry = snapshot(folder, version).manifests[-1]
    return entry.path, decode_manifest(entry, (folder / entry.path).read_bytes())


def segment_of(folder: Path, version: int) -> str:
    """The segment that a version added."""
    return manifest_of(folder, version)[1].segments[0].uuid


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


# Nothing wrong


def test_every_kind_of_column_is_fine(tmp_path):
    columns = every_kind()
    rng = np.random.default_rng(0)
    with trajstore.open(tmp_path / "a", "x", schema=columns) as store:
        for length in (3, 6):
            store.append(trajectory_of(columns, rng, length), task=f"task {length}")
            store.flush()
    report = looked_at(tmp_path / "a", deep=True)
    assert report.findings == ()
    assert (report.counts.versions, report.counts.manifests, report.counts.segments) == (2, 2, 2)
    files = list((tmp_path / "a" / "segments").rglob("*.*"))
    assert report.counts.objects == len(files)
    assert report.counts.nbytes == sum(path.stat().st_size for path in files)
    assert report.counts.pages == report.counts.pages_read > len(columns)


def test_counts_are_those_of_the_disk(healthy):
    shallow, deep = looked_at(healthy), looked_at(healthy, deep=True)
    assert shallow.findings == deep.findings == ()
    assert (shallow.ok, shallow.exit_code, shallow.version) == (True, 0, COMMITS)
    assert (shallow.counts.pages_read, shallow.counts.nbytes_read) == (0, 0)
    assert replace(deep.counts, pages_read=0, nbytes_read=0) == shallow.counts
    stored = 0
    for path in (healthy / "segments").glob("*/pages.arrow"):
        stored += sum(source.stored_bytes for source in decode_page_index(path.read_bytes()))
    assert deep.counts.nbytes_read == stored
    assert str(deep).endswith("pages read: no errors")
    assert json.loads(json.dumps(deep.to_json()))["ok"] is True


def test_merged_deleted_tagged_and_derived_is_fine(tmp_path):
    url = stores.filled(tmp_path / "a", range(40))
    with trajstore.open(url, "a") as store:
        store.delete([3, 4, 20])
        store.add_column("return", lambda t: t["reward"].cumsum(), columns=["reward"])
        stores.append(store, 40)
        store.flush()
        store.delete([id for id in store.trajectories.ids.tolist() if id < 30])
        tag(store._filesystem, store._history, "best", store._history.load(store.version))
        assert len({e.path for v in range(1, store.version) for e in snapshot(tmp_path / "a", v).manifests}) > 41
    for deep in (False, True):
        assert looked_at(url, deep=deep).findings == ()


def test_an_empty_store_is_fine(tmp_path):
    trajstore.open(tmp_path / "a", "x").close()
    report = looked_at(tmp_path / "a", deep=True)
    assert (report.findings, report.version) == ((), 0)


def test_a_store_merged_with_itself_is_fine(tmp_path):
    url = stores.filled(tmp_path / "a", range(3))
    trajstore.merge([url, url], tmp_path / "b", share="copy")
    assert looked_at(tmp_path / "b", deep=True).findings == ()


def test_a_store_in_a_bucket(tmp_path):
    with S3Server() as server:
        name = f"bucket-{uuid.uuid4().hex}"
        server.make_bucket(name)
        options = {"storage_options": server.storage_options()}
        url = stores.filled(f"s3://{name}/runs/demo", range(6), per_commit=2, **options)
        assert looked_at(url, deep=True, **options).findings == ()
        with trajstore.open(url, "a", **options) as store:
            victim = store.trajectories._table.segments[1].uuid
            keys = [o.key for o in store._filesystem.list_objects(layout.segment_folder(victim))]
            store._filesystem.remove([key for key in keys if key.endswith("steps.arrow")])
        expected = [("error", "object-missing", layout.segment_key(victim, "steps.arrow"))]
        assert facts(looked_at(url, deep=True, **options)) == expected


def test_vacuum_leaves_empty_slots(copy):
    for version in (1, 3):  # a tag keeps the one in the middle
        (copy / layout.snapshot_key(version)).write_bytes(b"")
    (copy / layout.tag_key("first")).unlink()
    report = looked_at(copy)
    assert report.findings == ()
    assert (report.counts.versions, report.counts.emptied) == (2, 2)


def test_segments_without_trajectories_left_may_be_gone(copy):
    """Of a manifest that is still needed, one segment may not be."""
    with trajstore.open(copy, "a") as store:
        store.delete([0, 1])
    for version in range(1, COMMITS + 1):
        (copy / layout.snapshot_key(version)).write_bytes(b"")
    (copy / layout.tag_key("first")).unlink()
    report = looked_at(copy, deep=True)
    assert report.ok
    assert report.counts.segments == COMMITS - 1


# One byte


WHERE = {
    "store-document": lambda f: (layout.STORE_DOCUMENT, 30, False),
    "snapshot": lambda f: (layout.snapshot_key(2), 30, False),
    "manifest": lambda f: (manifest_of(f, 2)[0], 30, False),
    "page-index": lambda f: (layout.segment_key(segment_of(f, 2), "pages.arrow"), 200, False),
    "zarr-metadata": lambda f: (layout.segment_key(segment_of(f, 2), "zarr.json"), 30, False),
    "zarr-metadata of a group": lambda f: (layout.segment_key(segment_of(f, 2), "obs/zarr.json"), 3, False),
    "zarr-metadata of a column": lambda f: (layout.segment_key(segment_of(f, 2), "obs/image/zarr.json"), 12, False),
    "page": lambda f: (layout.segment_key(segment_of(f, 2), "obs/image/c.0.0.0"), 0, True),
    "page of scalars": lambda f: (layout.segment_key(segment_of(f, 2), "steps.arrow"), -900, True),
    "shard-index": lambda f: (layout.segment_key(segment_of(f, 2), "action/c.0.0"), -1, True),
    "tag": lambda f: (layout.tag_key("first"), 30, False),
    "manifest footer": lambda f: (manifest_of(f, 2)[0], -20, False),
}


@pytest.mark.parametrize("name", WHERE)
def test_a_flipped_byte(copy, name):
    key, offset, needs_deep = WHERE[name](copy)
    pages = 0
    if name == "page of scalars":
        index = decode_page_index((copy / layout.segment_key(segment_of(copy, 2), "pages.arrow")).read_bytes())
        offset = next(int(s.offsets[0]) for s in index if s.object == "steps.arrow")
    flip(copy / key, offset)
    if name == "store-document":
        with trajstore.open(copy.parent / "b", "x"), pytest.raises(CorruptionError):
            trajstore.open(copy)
        return
    kind = name.split(" ")[0]
    suffix = f" page {pages}" if kind == "page" else ""
    expected = [("error", kind, key + suffix)]
    if kind == "snapshot":
        expected.append(("note", "orphans", ""))
    if kind == "manifest":
        expected.append(("note", "orphans", ""))
    assert facts(looked_at(copy, deep=True)) == expected
    assert facts(looked_at(copy)) == ([] if needs_deep else expected)


def test_the_store_document_while_the_store_is_open(copy):
    with trajstore.open(copy) as store:
        flip(copy / layout.STORE_DOCUMENT, 30)
        report = verify(store._filesystem, store._access)
        assert facts(report) == [("error", "store-document", layout.STORE_DOCUMENT)]
        (copy / layout.STORE_DOCUMENT).unlink()
        report = verify(store._filesystem, store._access)
        assert facts(report) == [("error", "store-document", layout.STORE_DOCUMENT)]


@pytest.mark.parametrize("name", ["steps.arrow", "states.arrow"])
def test_every_byte_of_an_arrow_file_beside_its_pages(tmp_path, monkeypatch, name):
    """Readers other than trajstore need them."""
    monkeypatch.setattr("trajstore.write.shard.TARGET_ARROW_PAGE_BYTES", 64)
    with trajstore.open(tmp_path / "a", "x") as store:
        store.declare([*stores.SCHEMA, trajstore.Column(path="flag", dtype="bool", extra=1)])
        store.append({**stores.numbered(6), "flag": np.ones(8, bool)})
    path = tmp_path / "a" / layout.segment_key(segment_of(tmp_path / "a", 1), name)
    index = decode_page_index((path.parent / "pages.arrow").read_bytes())
    (source,) = (s for s in index if s.object == name)
    whole = path.read_bytes()
    pages = range(int(source.offsets[0]), int(source.offsets[-1] + source.nbytes[-1]))
    assert len(source.offsets) > 1
    with trajstore.open(tmp_path / "a") as store:
        assert store.verify(deep=True).findings == ()
        for offset in [o for o in range(len(whole)) if o not in pages][::7]:
            data = bytearray(whole)
            data[offset] ^= 255
            path.write_bytes(data)
            found = facts(store.verify(deep=True))
            assert [(severity, kind) for severity, kind, _ in found] == [("error", "arrow-file")], offset
            assert found[0][2].endswith(name)


def test_ends_of_an_arrow_file_that_another_pyarrow_wrote():
    """Other bytes that say the same."""
    columns = [trajstore.Column(path="x", dtype="float64")]
    schema = arrow_schema(columns)
    metadata = {"written": "otherwise"}
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema.with_metadata(metadata)) as writer:
        writer.write_batch(pa.record_batch([pa.array([1.0, 2.0])], schema=schema.with_metadata(metadata)))
    file = sink.getvalue().to_pybytes()
    reader = pa.BufferReader(file[8:])
    pa.ipc.read_message(reader)
    first = 8 + reader.tell()
    pa.ipc.read_message(reader)
    last = 8 + reader.tell()
    one = np.array([1])
    source = PageSource("steps.arrow", ("x",), 2, 2, "none", one * first, one * (last - first), one)
    sizes = [metadata_bytes(file[first : first + 8])]
    assert ends_problem(columns, source, sizes, file[:first], file[last:]) is None
    for head, tail in ((file[:first], b"?" + file[last:-1]), (b"", file[last:])):
        assert "not what was written" in str(ends_problem(columns, source, sizes, head, tail))


def test_damaged_pages_of_an_object_are_one_finding(tmp_path):
    with trajstore.open(tmp_path / "a", "x", codec="none") as store:
        store.declare([trajstore.Column(path="x", dtype="uint8", shape=(8,), page_rows=4)])
        store.append({"x": np.zeros((40, 8), np.uint8)})
    segment = segment_of(tmp_path / "a", 1)
    for page in (2, 3, 4, 8):
        flip(tmp_path / "a" / layout.segment_key(segment, "x/c.0.0"), page * 32)
    (finding,) = looked_at(tmp_path / "a", deep=True).findings
    assert finding.where == layout.segment_key(segment, "x/c.0.0") + " pages 2-4, 8"
    assert (finding.kind, finding.segment) == ("page", segment)
    assert "column x" in finding.message


# Whole objects


@pytest.mark.parametrize("name", ["steps.arrow", "obs/image/c.0.0.0", "states.arrow", "pages.arrow", "obs/zarr.json"])
def test_a_missing_object(copy, name):
    key = layout.segment_key(segment_of(copy, 2), name)
    (copy / key).unlink()
    kind = "zarr-metadata" if name.endswith("json") else "object-missing"
    assert facts(looked_at(copy)) == facts(looked_at(copy, deep=True)) == [("error", kind, key)]


@pytest.mark.parametrize("name", ["steps.arrow", "obs/image/c.0.0.0"])
def test_a_cut_object(copy, name):
    key = layout.segment_key(segment_of(copy, 2), name)
    (copy / key).write_bytes((copy / key).read_bytes()[: 100 if name == "steps.arrow" else -1])
    assert facts(looked_at(copy)) == [("error", "object-size", key)]


def test_an_arrow_file_cut_behind_its_pages(copy):
    segment = segment_of(copy, 2)
    path = copy / layout.segment_key(segment, "steps.arrow")
    path.write_bytes(path.read_bytes()[:-1])
    assert facts(looked_at(copy)) == [("error", "segment-size", layout.segment_folder(segment))]


def test_a_missing_segment(copy):
    segment = segment_of(copy, 2)
    shutil.rmtree(copy / layout.segment_folder(segment))
    (finding,) = looked_at(copy, deep=True).findings
    assert (finding.severity, finding.kind, finding.where) == (
        "error",
        "segment-missing",
        layout.segment_folder(segment),
    )
    assert (finding.version, finding.segment) == (COMMITS, segment)


def test_two_segments_that_changed_places(copy):
    folders = [copy / layout.segment_folder(segment_of(copy, version)) for version in (2, 3)]
    folders[0].rename(copy / "aside")
    folders[1].rename(folders[0])
    (copy / "aside").rename(folders[1])
    found = looked_at(copy).findings
    assert {f.kind for f in found} == {"page-index", "zarr-metadata"}
    assert sorted(f.where for f in found if f.kind == "page-index") == sorted(
        f"segments/{folder.name}/pages.arrow" for folder in folders
    )


def test_two_shards_that_changed_places(tmp_path):
    with trajstore.open(tmp_path / "a", "x", codec="none") as store:
        for number in range(2):
            store.append({"x": np.full((4, 8), number, np.uint8)})
            store.flush()
    paths = [tmp_path / "a" / layout.segment_key(segment_of(tmp_path / "a", v), "x/c.0.0") for v in (1, 2)]
    first, second = (path.read_bytes() for path in paths)
    assert len(first) == len(second)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    assert looked_at(tmp_path / "a").findings == ()  # sizes are all that the shallow one sees of pages
    found = looked_at(tmp_path / "a", deep=True).findings
    assert sorted(f.where for f in found) == sorted(f"{p.relative_to(tmp_path / 'a')} page 0" for p in paths)


def test_a_missing_manifest_does_not_hide_a_missing_segment(copy):
    path, _ = manifest_of(copy, 2)
    (copy / path).unlink()
    segment = segment_of(copy, 4)
    shutil.rmtree(copy / layout.segment_folder(segment))
    assert facts(looked_at(copy)) == [
        ("error", "manifest-missing", path),
        ("error", "segment-missing", layout.segment_folder(segment)),
        ("note", "orphans", ""),
    ]


# Snapshots that somebody changed, with a hash that holds


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("totals", lambda s: replace(s, totals=replace(s.totals, trajectories=9))),
        ("totals", lambda s: replace(s, totals=replace(s.totals, steps=1))),
        ("totals", lambda s: replace(s, manifests=s.manifests[1:])),
        ("parent", lambda s: replace(s, parent_sha256="1" * 64)),
        ("created-at", lambda s: replace(s, created_at=dt.datetime(2020, 1, 1, tzinfo=dt.UTC))),
        ("snapshot", lambda s: replace(s, operation="Not a word\n")),
        ("ids", lambda s: replace(s, manifests=s.manifests[::-1])),
        ("manifest-entry", lambda s: replace(s, manifests=(replace(s.manifests[0], crc32c=7), *s.manifests[1:]))),
        ("deleted", lambda s: with_deleted(s, [(1, 3)])),
        ("deleted", lambda s: with_deleted(s, [(1, 2), (0, 1)])),
        ("deleted", lambda s: with_deleted(s, [(0, 2), (1, 2)])),
        ("deleted", lambda s: with_deleted(s, [(1, 1)])),
        ("manifest-entry", lambda s: with_deleted(s, [(0, 1)])),
    ],
)
def test_a_changed_snapshot(copy, kind, change):
    key = reseal(copy, COMMITS, change)
    found = looked_at(copy).findings
    assert {(f.severity, f.kind, f.where) for f in found} == {("error", kind, key)}
    if kind not in ("ids", "manifest-entry"):  # several orders and several numbers are wrong
        assert len(found) == 1


def with_deleted(old: Snapshot, spans: list[tuple[int, int]]) -> Snapshot:
    return replace(old, manifests=(replace(old.manifests[0], deleted=tuple(spans)), *old.manifests[1:]))


def test_a_changed_version_in_the_middle_is_seen_by_the_next(copy):
    reseal(copy, 2, lambda s: replace(s, commit_id="1" * 32))
    assert facts(looked_at(copy)) == [("error", "parent", layout.snapshot_key(3))]


def test_a_next_id_that_gives_ids_twice(copy):
    key = reseal(copy, COMMITS, lambda s: replace(s, next_id=1))
    assert {f.kind for f in looked_at(copy).findings} == {"next-id", "ids"}
    assert {f.where for f in looked_at(copy).findings} == {key}


def test_wrong_totals_are_told_once_by_all_versions_that_inherit_them(copy):
    key = reseal(copy, COMMITS, lambda s: replace(s, totals=replace(s.totals, steps=s.totals.steps + 5)))
    with trajstore.open(copy, "a") as store:
        for number in (8, 9):
            stores.append(store, number)
            store.flush()
    assert facts(looked_at(copy)) == [("error", "totals", key)]


ROWS = {
    "its steps are not within its segment": ("start", 10_000),
    "its segment is not one of": ("segment", 3),
    "its ordinal cannot be": ("ordinal", 5),
    "its steps are another trajectory's too": ("start", 0),
}


@pytest.mark.parametrize("problem", ROWS)
def test_a_manifest_that_its_writer_got_wrong(copy, problem):
    name, value = ROWS[problem]
    path, manifest = manifest_of(copy, COMMITS)
    table = manifest.table
    values = table[name].to_pylist()
    values[1] = value
    where = table.schema.get_field_index(name)
    changed = table.set_column(where, table.schema.field(where), pa.array(values, table.schema.field(where).type))
    data = encode_manifest(Manifest(changed, manifest.segments))
    (copy / path).write_bytes(data)

    def named_so(old: Snapshot) -> Snapshot:
        entry = manifest_entry(path, data, Manifest(changed, manifest.segments), old.manifests[-1].first_id)
        return replace(old, manifests=(*old.manifests[:-1], entry))

    reseal(copy, COMMITS, named_so)
    found = [f for f in looked_at(copy).findings if f.severity == "error"]
    assert [(f.kind, f.where) for f in found if problem in f.message] == [("manifest-rows", path)]
    assert {f.kind for f in found} == {"manifest-rows"}


# Versions, marks, hints, orphans


def test_a_version_that_is_gone(copy):
    (copy / layout.snapshot_key(2)).unlink()
    assert facts(looked_at(copy, version=COMMITS)) == [
        ("error", "version-gap", layout.snapshot_key(2)),
        ("note", "orphans", ""),
    ]


@pytest.mark.parametrize("data", [b"", b"four", b"9", None])
def test_a_hint_is_only_noted(copy, data):
    path = copy / layout.LATEST_HINT
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    report = looked_at(copy)
    severity = "warning" if data == b"9" else "note"  # the versions up to it may be lost
    assert facts(report) == [(severity, "hint", layout.LATEST_HINT)]
    assert report.exit_code == 0


def test_a_tag_without_its_version(copy):
    (copy / layout.snapshot_key(1)).write_bytes(b"")
    key = layout.tag_key("first")
    assert facts(looked_at(copy)) == [("error", "tag", key)]
    (copy / layout.snapshot_key(1)).unlink()  # that is told already
    assert [f.kind for f in looked_at(copy, version=COMMITS).findings] == ["version-gap", "orphans"]


def test_a_tag_of_another_version(copy):
    reseal(copy, COMMITS, lambda s: s)
    with trajstore.open(copy) as store:
        tag(store._filesystem, store._history, "last", store._history.load(COMMITS))
    reseal(copy, COMMITS, lambda s: replace(s, commit_id="1" * 32))
    assert facts(looked_at(copy)) == [("error", "tag", layout.tag_key("last"))]


def test_orphans_are_young_or_old(copy):
    before = looked_at(copy).counts
    stray = copy / layout.segment_folder(uuid.uuid4().hex)
    stray.mkdir()
    (stray / "zarr.json").write_bytes(b"x" * 10)
    (copy / layout.manifest_key(uuid.uuid4().hex)).write_bytes(b"y" * 20)
    (copy / "snapshots" / f".{uuid.uuid4().hex}.tmp").write_bytes(b"z" * 30)
    (copy / "notes.txt").write_text("somebody's own")
    (young,) = looked_at(copy).findings
    assert (young.severity, young.kind) == ("note", "orphans-young")
    assert "3 objects of 60 bytes" in young.message
    (old,) = looked_at(copy, now=dt.datetime.now(dt.UTC) + LATER).findings
    assert (old.severity, old.kind) == ("warning", "orphans-old")
    assert "3 objects of 60 bytes" in old.message
    assert looked_at(copy).counts == before


# Other stores


@pytest.fixture
def borrower(copy: Path) -> Path:
    """A store whose segments all lie in ``copy``, which keeps them for it."""
    target = copy.parent / "b"
    borrow(copy, target, pins="required")
    return target


def borrow(owner: Path, target: Path, *, pins: Any) -> None:
    filesystem = connect(target)
    with trajstore.open(owner) as store:
        view = store.trajectories
        source = Source(
            Selection(view._table, np.arange(len(view))), store._filesystem, store.uuid, store._access.bases
        )
        combine([source], filesystem, share="reference", pins=pins)
    filesystem.close()


def test_borrowed_segments_are_looked_at(copy, borrower):
    for url in (borrower, copy):
        assert looked_at(url, deep=True).findings == ()
    assert looked_at(borrower, deep=True).counts.segments == COMMITS
    segment = segment_of(copy, 2)
    flip(copy / layout.segment_key(segment, "obs/image/c.0.0.0"), 0)
    assert looked_at(borrower).ok
    (found,) = looked_at(borrower, deep=True).findings
    assert (found.kind, found.segment) == ("page", segment)
    assert str(copy) in found.where


def test_a_store_that_borrows_without_a_pin(copy):
    borrow(copy, copy.parent / "b", pins="none")
    report = looked_at(copy.parent / "b", deep=True)
    assert facts(report) == [("warning", "base-unpinned", "../a")]
    assert report.exit_code == 0


def test_a_pin_that_is_gone_or_whose_version_is(copy, borrower):
    (path,) = (copy / "pins").glob("*.json")
    expected = [("error", "base-pin", f"pins/{path.name} in {copy}")]
    slot = copy / layout.snapshot_key(COMMITS)
    kept = slot.read_bytes()
    slot.write_bytes(b"")
    assert facts(looked_at(borrower)) == expected
    slot.write_bytes(kept)
    assert looked_at(borrower).ok
    path.unlink()
    assert facts(looked_at(borrower)) == expected


def test_a_base_that_moved(copy, borrower):
    expected_segments = looked_at(borrower).counts.segments
    copy.rename(copy.parent / "elsewhere")
    report = looked_at_without_table(borrower)
    assert facts(report) == [("error", "base-missing", "../a")]
    assert report.counts.segments == expected_segments
    trajstore.open(copy, "x").close()
    assert facts(looked_at_without_table(borrower)) == [("error", "base-other", "../a")]


looked_at_without_table = looked_at  # opening a store does not open its bases


def test_a_base_that_is_not_trusted(copy):
    away = copy.parent / "deep" / "b"
    away.parent.mkdir()
    borrow(copy, away, pins="required")
    assert facts(looked_at(away)) == [("error", "base", str(copy))]
    assert looked_at(away, bases={str(copy): None}).findings == ()
    (pin_file,) = (copy / "pins").glob("*.json")
    assert looked_at(copy).ok
    shutil.rmtree(away)
    expected = [("warning", "pin-borrower", f"pins/{pin_file.name}")]
    assert facts(looked_at(copy)) == expected


def test_a_borrower_that_is_gone_or_elsewhere(copy, borrower):
    (path,) = (copy / "pins").glob("*.json")
    shutil.rmtree(borrower)
    assert facts(looked_at(copy)) == [("warning", "pin-borrower", f"pins/{path.name}")]
    path.unlink()
    with trajstore.open(copy) as store:
        made = pin(
            store._filesystem,
            store._history,
            store._history.load(2),
            borrower_uuid=uuid.uuid4().hex,
            borrower_url="s3://somebody-else/store",
        )
    assert facts(looked_at(copy)) == [("note", "pin-borrower", layout.pin_key(made.uuid))]


def test_a_base_number_that_is_none(copy, borrower):
    reseal(borrower, 1, lambda s: replace(s, bases=()))
    path = snapshot(borrower, 1).manifests[0].path
    found = looked_at(borrower).findings
    assert {(f.kind, f.where) for f in found if f.severity == "error"} == {("segment-table", path)}
    assert Base  # the snapshot names none


# A latest version that cannot be read


@pytest.mark.parametrize("garbage", [b"", b"garbage", b"{}"])
def test_a_damaged_latest_version(copy, garbage):
    key = layout.snapshot_key(COMMITS)
    (copy / key).write_bytes(garbage)
    with pytest.raises(CorruptionError, match="version 3 is the last that can be read") as caught:
        trajstore.open(copy)
    for part in (key, "restore it from a copy", "version=3", "--repair", "past_damage=True"):
        assert part in str(caught.value)
    stores.holds(copy, range(6), version=3)
    report = looked_at(copy, past_damage=True)
    assert facts(report) == [("error", "snapshot", key), ("note", "orphans", "")]
    assert "version 3 holds" in report.errors[0].message
    before = stores.objects_of(copy)
    with trajstore.open(copy, "a", past_damage=True) as store:
        assert store.num_trajectories == 6
        assert store.repair(report) == COMMITS + 1
        assert store.repair(store.verify()) is None
    stores.holds(copy, range(6))
    assert {k: v for k, v in stores.objects_of(copy).items() if k in before and k != layout.LATEST_HINT} == {
        k: v for k, v in before.items() if k != layout.LATEST_HINT
    }
    assert snapshot(copy, COMMITS + 1).parent_sha256 == digest(garbage)
    again = looked_at(copy, deep=True)
    assert again.ok
    assert ("warning", "snapshot", key) in facts(again) or not garbage
    with trajstore.open(copy, "a") as store:
        assert 5 in store.versions().index
        assert COMMITS not in store.versions().index
        stores.append(store, 9)
        store.flush()
        assert store.trajectories.ids[-1] >= 8, "ids 6 and 7 were given by the version that is lost"
    stores.holds(copy, [*range(6), 9])


def test_a_handle_that_was_open_before_the_damage_and_the_repair_do_not_fork_history(copy):
    with trajstore.open(copy, "a") as late:
        (copy / layout.snapshot_key(COMMITS)).write_bytes(b"garbage")
        with trajstore.open(copy, "a", past_damage=True) as store:
            assert store.repair(store.verify()) == COMMITS + 1
        stores.append(late, 9)
        late.flush()
        assert late.version == COMMITS + 2
    stores.holds(copy, [*range(6), 9])


def test_an_earlier_version_can_be_restored_past_a_damaged_one(copy):
    for version in (3, 4):
        (copy / layout.snapshot_key(version)).write_bytes(b"garbage")
    with pytest.raises(CorruptionError, match="version 2 is the last that can be read"):
        trajstore.open(copy, "a")
    with trajstore.open(copy, "a", past_damage=True) as store:
        assert store.restore(1) == COMMITS + 1
    stores.holds(copy, range(2))


def test_a_store_none_of_whose_versions_can_be_read(copy):
    for version in range(1, COMMITS + 1):
        (copy / layout.snapshot_key(version)).write_bytes(b"garbage")
    with pytest.raises(CorruptionError, match="no version before it can be read either"):
        trajstore.open(copy)
    with trajstore.open(copy, "a", past_damage=True) as store:
        report = store.verify()
        assert [f.kind for f in report.errors].count("snapshot") == COMMITS
        assert store.repair(report) is None
    assert not (copy / layout.snapshot_key(COMMITS + 1)).exists()


# Repair


def test_repair_leaves_out_what_is_lost(copy):
    shutil.rmtree(copy / layout.segment_folder(segment_of(copy, 2)))  # 2, 3
    flip(copy / layout.segment_key(segment_of(copy, 4), "obs/image/c.0.0.0"), 0)  # 6, 7
    before = stores.objects_of(copy)
    report = looked_at(copy, deep=True)
    assert len(report.errors) == 2
    assert repaired(copy, report) == COMMITS + 1
    stores.holds(copy, [0, 1, 4, 5])
    again = looked_at(copy, deep=True)
    assert again.ok
    assert {(f.severity, f.kind) for f in again.findings} == {("warning", "segment-missing"), ("warning", "page")}
    assert all("before the repair in version 5" in f.message for f in again.findings)
    assert repaired(copy, again) is None
    after = stores.objects_of(copy)
    assert {key: after[key] for key in before if key != layout.LATEST_HINT} == {
        key: data for key, data in before.items() if key != layout.LATEST_HINT
    }
    with trajstore.open(copy, "a") as store:
        assert store.versions()["operation"].iloc[0] == "repair"
        stores.append(store, 9)
    stores.holds(copy, [0, 1, 4, 5, 9])
    assert looked_at(copy, deep=True).ok


def test_repair_does_nothing_where_nothing_is_lost(copy):
    assert repaired(copy, looked_at(copy, deep=True)) is None
    flip(copy / layout.segment_key(segment_of(copy, 2), "zarr.json"), 30)
    assert repaired(copy, looked_at(copy, deep=True)) is None  # trajstore reads on without it
    stores.holds(copy, list(NUMBERS))
    path, _ = manifest_of(copy, 3)
    (copy / path).unlink()
    assert repaired(copy, looked_at(copy)) is None


def test_repair_says_that_old_versions_are_damaged(copy):
    with trajstore.open(copy, "a") as store:
        store.delete([2, 3])
    shutil.rmtree(copy / layout.segment_folder(segment_of(copy, 2)))
    report = looked_at(copy)
    assert [(f.kind, f.version) for f in report.errors] == [("segment-missing", COMMITS)]
    assert repaired(copy, report) == COMMITS + 2
    stores.holds(copy, [0, 1, 4, 5, 6, 7])
    assert looked_at(copy).ok


def test_repair_keeps_trajectories_whose_derived_column_is_lost(copy):
    with trajstore.open(copy, "a") as store:
        store.add_column("return", lambda t: t["reward"].cumsum(), columns=["reward"])
        (layer,) = store.trajectories._table.segments[1].layers
    (source,) = decode_page_index((copy / layout.segment_key(layer.uuid, "pages.arrow")).read_bytes())
    flip(copy / layout.segment_key(layer.uuid, "steps.arrow"), int(source.offsets[0]))
    report = looked_at(copy, deep=True)
    assert [(f.kind, f.segment) for f in report.errors] == [("page", layer.uuid)]
    assert repaired(copy, report) is not None
    assert looked_at(copy, deep=True).ok
    with trajstore.open(copy, "a") as store:
        assert stores.numbers_in(store.trajectories) == list(NUMBERS)
        assert ["return" in trajectory.columns for trajectory in store.trajectories] == [
            n not in (2, 3) for n in NUMBERS
        ]
        store.add_column("return", lambda t: t["reward"].cumsum(), columns=["reward"])
        for trajectory in store.trajectories:
            np.testing.assert_array_equal(trajectory["return"][:], trajectory["reward"][:].cumsum())
    assert looked_at(copy, deep=True).ok


def test_repair_leaves_out_what_lies_in_a_store_that_is_gone(copy):
    target = copy.parent / "b"
    borrow(copy, target, pins="required")
    with trajstore.open(target, "a") as store:
        stores.append(store, 8)
    trajstore.merge([target, stores.filled(copy.parent / "c", [9])], copy.parent / "all")
    shutil.rmtree(copy)
    report = looked_at(copy.parent / "all", deep=True)
    assert facts(report) == [("error", "base-missing", "../a")]
    assert report.errors[0].message.count("restore it from a copy") == 1
    assert repaired(copy.parent / "all", report) == 2
    stores.holds(copy.parent / "all", [8, 9])
    again = looked_at(copy.parent / "all", deep=True)
    assert facts(again) == [("warning", "base-missing", "../a")]
    assert repaired(copy.parent / "all", again) is None


def test_repair_keeps_trajectories_whose_derived_column_lies_in_a_store_that_is_gone(copy):
    """Segments of one store, derived columns of another."""
    target = copy.parent / "b"
    borrow(copy, target, pins="required")
    with trajstore.open(target, "a") as store:
        store.add_column("double", lambda t: t["reward"] * 2, columns=["reward"])
    trajstore.merge([target], copy.parent / "all")
    shutil.rmtree(target)
    report = looked_at(copy.parent / "all")
    assert facts(report)[0] == ("error", "base-missing", "../b")
    assert repaired(copy.parent / "all", report) is not None
    assert looked_at(copy.parent / "all", deep=True).ok
    with trajstore.open(copy.parent / "all") as store:
        assert stores.numbers_in(store.trajectories) == list(NUMBERS)
        assert all("double" not in trajectory.columns for trajectory in store.trajectories)


def test_repair_leaves_alone_what_lies_in_a_store_that_is_not_trusted(copy):
    away = copy.parent / "deep" / "b"
    away.parent.mkdir()
    borrow(copy, away, pins="required")
    report = looked_at(away)
    assert not report.ok
    assert repaired(away, report) is None


def test_vacuum_at_the_same_time_is_no_damage(copy, monkeypatch):
    """What a version lacks that is emptied meanwhile is not missed."""
    with trajstore.open(copy, "a") as store:
        store.delete([2, 3])
    (copy / layout.tag_key("first")).unlink()
    segment = copy / layout.segment_folder(segment_of(copy, 2))
    with trajstore.open(copy) as store:
        filesystem = store._filesystem
        read = filesystem.read_many

        def vacuumed(keys: Any) -> Any:
            found = read(keys)
            if any(key == layout.snapshot_key(COMMITS) for key in keys) and segment.exists():
                for version in range(1, COMMITS + 1):
                    (copy / layout.snapshot_key(version)).write_bytes(b"")
                shutil.rmtree(segment)
            return found

        monkeypatch.setattr(filesystem, "read_many", vacuumed)
        assert verify(filesystem, store._access, deep=True).findings == ()
        assert not segment.exists()
