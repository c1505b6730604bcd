"""Small segments become large ones: against the trajectories that were appended, in every version."""

from __future__ import annotations

import dataclasses
import datetime as dt
import errno
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trajstore
from tests.edit.killed import again, kill_everywhere
from tests.edit.small_segments import small_segments
from tests.edit.stores import (
    SCHEMA,
    HeldDisk,
    append,
    assert_holds,
    filled,
    holds,
    numbered,
    numbers_in,
    objects_of,
    segments_of,
)
from tests.support.faulty import FaultyDisk
from tests.support.rare import examples
from trajstore.edit.combine import combine
from trajstore.edit.compact import Compacted, compact
from trajstore.edit.transfer import Piece, _slices
from trajstore.edit.versions import Restore
from trajstore.errors import CommitTooOldError, CorruptionError, SelectionError, TrajstoreError
from trajstore.format.manifest import SegmentEntry
from trajstore.opening import open_on
from trajstore.schema import Schema
from trajstore.storage.age import GRACE
from trajstore.storage.commit import History
from trajstore.storage.local import LocalFilesystem

MANY = 12


def compact_store(store, **options) -> Compacted:
    """What ``Store.compact`` does, on the latest version."""
    history = store._history
    return compact(store._filesystem, history, history.latest(store.version), store._workers, **options)


def compact_at(url, **options) -> Compacted:
    with trajstore.open(url, "a") as store:
        return compact_store(store, **options)


def restore(store, version):
    store._history.commit(Restore(store._history.load(version).snapshot), store._head)


def segments(url) -> int:
    with trajstore.open(url) as store:
        return len({entry.uuid for entry in store._latest_table().segments})


def identities(url, version=None):
    """Everything of the table that a compaction must not change."""
    with trajstore.open(url, version=version) as store:
        return [(t.id, t.uuid, t.metadata, t.terminated, t.truncated, len(t)) for t in store.trajectories]


@pytest.fixture
def url(tmp_path):
    """One trajectory per commit."""
    return filled(tmp_path / "store", range(MANY))


def test_all_versions_read_as_before(url):
    before = {version: identities(url, version) for version in range(1, MANY + 1)}
    done = compact_at(url)
    assert (done.trajectories, done.segments_before, done.segments_after) == (MANY, MANY, 1)
    assert done.version == MANY + 1
    assert segments(url) == 1
    holds(url, range(MANY))
    for version, found in before.items():
        assert identities(url, version) == found
        with trajstore.open(url, version=version) as store:
            assert_holds(store.trajectories, range(version))
    assert identities(url) == before[MANY]


def kinds(number):
    """Every type that a column may have; some columns are lacking now and then."""
    rng = np.random.default_rng(number)
    length = 1 + number % 5
    tree = {
        name.replace("_", ""): rng.integers(0, 2, (length, 3)).astype(name)
        for name in ("bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16")
    }
    tree |= {
        "float32": rng.random((length + 1, 2), dtype=np.float32),
        "float64": rng.random(length),
        "complex64": rng.random(length).astype(np.complex64),
        "datetime": np.datetime64("2026-01-01", "us") + rng.integers(0, 10**6, length).astype("timedelta64[us]"),
        "bfloat16": torch.tensor(rng.random((length, 4))).to(torch.bfloat16),
        "text": [f"{number}-{step}" * (step % 3) for step in range(length)],
        "bytes": [bytes([number, step]) for step in range(length)],
        "ragged": [np.arange(step, dtype=np.float32) for step in range(length)],
        "final_text": [str(step) for step in range(length + 1)],
    }
    if number % 2:
        tree["optional"] = {"a": np.full(length, number, np.int16)}
    if number % 3:
        tree["optional_text"] = ["x" * number] * length
    return tree


def contents(view):
    return [{path: t.column(path)[:] for path in sorted(t.columns)} | {"": (t.uuid, t.id, t.metadata)} for t in view]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert one.pop("") == other[""]
        for path, value in one.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == other[path].dtype
                assert torch.equal(value, other[path])
                continue
            assert getattr(value, "dtype", None) == getattr(other[path], "dtype", None)
            for a, b in zip(value, other[path], strict=True):
                np.testing.assert_array_equal(a, b)


def test_every_kind_of_column_and_combination(tmp_path):
    with trajstore.open(tmp_path / "inferred", "a") as store:
        store.append(kinds(1))  # has them all
        schema = [
            dataclasses.replace(c, presence="optional") if c.path.startswith("optional") else c for c in store.schema
        ]
    with trajstore.open(tmp_path / "s", "a", schema=schema) as store:
        for number in range(13):
            store.append(kinds(number), number=number)
            store.flush()
    with trajstore.open(tmp_path / "s") as store:
        before = contents(store.trajectories)
    done = compact_at(tmp_path / "s")
    assert done.segments_after == 4  # with and without either optional column
    with trajstore.open(tmp_path / "s") as store:
        assert_same(contents(store.trajectories), before)


def test_a_store_that_needs_nothing_gets_no_version(url):
    done = compact_at(url)
    files = objects_of(url)
    again_done = compact_at(url)
    assert again_done == Compacted(done.version, 0, 0, 0)
    assert objects_of(url).keys() == files.keys()


def test_an_empty_store(tmp_path):
    trajstore.open(tmp_path / "s", "a", schema=SCHEMA).close()
    assert compact_at(tmp_path / "s").segments_after == 0


@pytest.mark.parametrize(("nbytes", "expected"), [(1, MANY), (2000, None), (1 << 50, 1)])
def test_sizes(url, nbytes, expected):
    done = compact_at(url, segment_bytes=nbytes)
    holds(url, range(MANY))
    if expected is None:
        assert 1 < segments(url) < MANY
        assert compact_at(url, segment_bytes=nbytes).version == done.version  # they are large enough now
    else:
        assert segments(url) == expected


def test_a_size_that_is_none(url):
    with pytest.raises(SelectionError, match="segment_bytes=0"):
        compact_at(url, segment_bytes=0)


def test_deleted_trajectories_are_dropped(url):
    with trajstore.open(url, "a") as store:
        store.delete([0, 3, 4, 11])
    kept = [n for n in range(MANY) if n not in (0, 3, 4, 11)]
    compact_at(url)
    holds(url, kept)
    with trajstore.open(url) as store:
        assert store.trajectories.ids.tolist() == kept
        assert store.usage().steps == store.trajectories.lengths.sum() == store._table.segments[0].steps
    with trajstore.open(url, version=MANY) as store:
        assert_holds(store.trajectories, range(MANY))


def test_a_large_segment_of_mostly_deleted_trajectories(tmp_path):
    url = filled(tmp_path / "s", range(40), per_commit=40)
    assert compact_at(url, segment_bytes=1).segments_before == 0
    gone = [n for n in range(40) if n % 3]
    with trajstore.open(url, "a") as store:
        store.delete(gone)
    assert compact_at(url, segment_bytes=1).segments_before == 1
    holds(url, [n for n in range(40) if n not in gone])
    assert compact_at(url, segment_bytes=1).segments_before == 0


def test_long_trajectories_are_copied_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("trajstore.edit.transfer._LOT_BYTES", 100)
    url = filled(tmp_path / "s", range(60), per_commit=20)
    with trajstore.open(url, "a") as store:
        store.delete([1, 2, 7, 20, 39, 41])
    compact_at(url)
    assert segments(url) == 1
    holds(url, [n for n in range(60) if n not in (1, 2, 7, 20, 39, 41)])


def test_segments_of_others_are_left_alone(url, tmp_path):
    target = tmp_path / "target"
    with trajstore.open(url) as store:
        combine([store.trajectories.source()], LocalFilesystem(str(target)), share="reference")
    with trajstore.open(target, "a") as store:
        for number in (100, 101, 102):
            append(store, number)
            store.flush()
        done = compact_store(store)
        assert (done.segments_before, done.segments_after) == (3, 1)
    with trajstore.open(target) as store:
        assert_holds(store.trajectories, [*range(MANY), 100, 101, 102])
    assert len(segments_of(target)) == 4


def test_derived_columns_are_compacted_along(url):
    with trajstore.open(url, "a") as store:
        store.delete([2])
        store.add_column("double", lambda t: 2 * t["action"], columns=["action"])
        for number in (MANY, MANY + 1):
            append(store, number)
            store.flush()
    done = compact_at(url)
    assert (done.segments_before, done.segments_after) == (MANY - 1 + 2, 2)
    with trajstore.open(url, "a") as store:
        for trajectory in store.trajectories:
            number = trajectory.metadata["number"]
            assert ("double" in trajectory.columns) == (number < MANY)
            if number < MANY:
                np.testing.assert_array_equal(trajectory.column("double")[:], 2 * numbered(number)["action"])
        assert numbers_in(store.trajectories) == [n for n in range(MANY + 2) if n != 2]
        store.add_column("double", lambda t: 2 * t["action"], columns=["action"])
        assert compact_store(store).segments_before == 2
    assert segments(url) == 1


def trajectories_again(url):
    """The same trajectory several times in a version, in several manifests."""
    with trajstore.open(url, "a") as store:
        view = store.trajectories
        view.take([*range(MANY), 3, 5, 3]).save(url, share="reference", replace=True)


def test_a_version_that_shows_a_trajectory_twice(url):
    trajectories_again(url)
    compact_at(url)
    assert segments(url) == 1
    holds(url, [*range(MANY), 3, 5, 3])


# What others do just before the new version is created.
def _append_much(url):
    filled(url, range(100, 109))  # their manifests are merged with those that compaction replaces


def _delete_some(url):
    with trajstore.open(url, "a") as store:
        store.delete([1, 10])


def _restore(url):
    with trajstore.open(url, "a") as store:
        restore(store, 5)


def _compact(url):
    compact_at(url)


def _derive(url):
    with trajstore.open(url, "a") as store:
        store.add_column("double", lambda t: 2 * t["action"], columns=["action"])


MEANWHILE = {
    "append": (_append_much, [*range(MANY), *range(100, 109)]),
    "delete": (_delete_some, [n for n in range(MANY) if n not in (1, 10)]),
    "restore": (_restore, list(range(5))),
    "compact": (_compact, list(range(MANY))),
    "derive": (_derive, list(range(MANY))),
}


@pytest.mark.parametrize("what", MEANWHILE)
def test_beside_others(url, what):
    action, expected = MEANWHILE[what]
    disk = HeldDisk(url)
    waiting = [action]

    def around(key, create):
        if waiting:
            waiting.pop()(url)
        return create()

    with open_on(disk, "a") as store:
        disk.around_create = around
        compact_store(store)
    assert not waiting
    for _ in range(2):
        with trajstore.open(url) as store:
            assert numbers_in(store.trajectories) == expected
            for trajectory, number in zip(store.trajectories, expected, strict=True):
                assert ("double" in trajectory.columns) == (what == "derive")
                action = numbered(number)["action"]
                np.testing.assert_array_equal(trajectory.column("action")[:], action)
                if what == "derive":
                    np.testing.assert_array_equal(trajectory.column("double")[:], 2 * action)
        if what != "derive":
            holds(url, expected)
        compact_at(url)
        assert segments(url) == 1


def test_what_is_restored_while_it_was_deleted(url):
    """A manifest was planned without a trajectory that is there again."""
    with trajstore.open(url, "a") as store:
        store.delete([1])
    disk = HeldDisk(url)
    waiting = [MANY]

    def around(key, create):
        if waiting:
            with trajstore.open(url, "a") as store:
                restore(store, waiting.pop())
        return create()

    with open_on(disk, "a") as store:
        disk.around_create = around
        compact_store(store)
    holds(url, range(MANY))
    assert segments(url) == 2


def test_all_appends_land_and_all_compactions_finish(url):
    """Two compactions, a writer, and one who deletes, all at once."""
    stop = threading.Event()
    errors = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    def write():
        with trajstore.open(url, "a") as store:
            for number in range(100, 120):
                append(store, number)
                store.flush()

    def delete():
        with trajstore.open(url, "a") as store:
            for number in range(0, MANY, 2):
                store.delete([number])

    def keep_compacting():
        while not stop.is_set():
            compact_at(url, commit_interval_s=1e-9, segment_bytes=3000)

    threads = [threading.Thread(target=run, args=(f,)) for f in (write, delete, keep_compacting, keep_compacting)]
    for thread in threads:
        thread.start()
    for thread in threads[:2]:
        thread.join()
    stop.set()
    for thread in threads[2:]:
        thread.join()
    assert not errors, errors
    expected = [*range(1, MANY, 2), *range(100, 120)]
    holds(url, expected)
    compact_at(url)
    assert segments(url) == 1
    holds(url, expected)


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_no_failure_loses_anything(tmp_path, every):
    url = filled(tmp_path / "s", range(5))
    for at in range(0, 1000, every):
        copy = tmp_path / str(at)
        shutil.copytree(url, copy)
        disk = FaultyDisk(str(copy), errno.ENOSPC, at)
        try:
            with open_on(disk, "a") as store:
                compact_store(store, segment_bytes=1500, commit_interval_s=1e-9)
        except TrajstoreError:
            pass
        holds(copy, range(5))
        with trajstore.open(copy, version=5) as store:
            assert_holds(store.trajectories, range(5))
        compact_at(copy)
        assert segments(copy) == 1
        holds(copy, range(5))
        if not disk.fired:
            break
        shutil.rmtree(copy)
    assert at > 60


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_nothing(tmp_path):
    url = filled(tmp_path / "s", range(5))
    left = kill_everywhere("compact", url, url, tmp_path / "killed")
    assert len(left) > 20
    for folder in left:
        holds(folder, range(5))
        again("compact", url, folder)
        again("compact", url, folder)
        holds(folder, range(5))
        compact_at(folder)
        assert segments(folder) == 1


def test_damage_is_found_before_anything_is_committed(url):
    victim = next(p for p in sorted(Path(url).glob("segments/*/action/c.*")) if p.is_file())
    data = bytearray(victim.read_bytes())
    data[3] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CorruptionError):
        compact_at(url)
    with trajstore.open(url) as store:
        assert store.version == MANY


def test_what_took_half_the_grace_is_refused(url):
    days = iter(range(0, 1000, GRACE.days))
    with trajstore.open(url, "a") as store:
        history = History(
            store._filesystem,
            now=lambda: dt.datetime(2026, 1, 1, tzinfo=dt.UTC) + dt.timedelta(days=next(days)),
        )
        with pytest.raises(CommitTooOldError):
            compact(store._filesystem, history, store._head, store._workers)
    holds(url, range(MANY))


def test_a_bar_is_shown_on_request(url, capsys):
    compact_at(url, progress=True)
    assert "compacting" in capsys.readouterr().err


def test_runs_join_neighbours():
    entry = SegmentEntry("a", 20, 4, 0, (), "", "")
    piece = Piece(entry, np.array([0, 3, 9]), np.array([0, 1, 3]), np.array([3, 2, 4]), 0.0)
    assert [a.tolist() for a in piece.runs(extra=0)] == [[0, 9], [5, 13]]
    assert [a.tolist() for a in piece.runs(extra=1)] == [[0, 12], [7, 17]]


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.sampled_from([1, 2, 4, 8]), st.data())
@settings(deadline=None, derandomize=True)
def test_slices_of_pages(widths, page_rows, data):
    """Against rows picked one by one."""
    edges = np.cumsum([data.draw(st.integers(0, 3)), *widths])
    wanted = data.draw(st.lists(st.booleans(), min_size=len(widths), max_size=len(widths)).filter(any))
    lows, highs = edges[:-1][wanted], edges[1:][wanted]
    rows = [row for lo, hi in zip(lows, highs, strict=True) for row in range(lo, hi)]
    pages = np.unique(np.array(rows) // page_rows)
    cut = data.draw(st.integers(0, len(pages)))
    found = []
    for part in (pages[:cut], pages[cut:]):
        if len(part):
            there = [page * page_rows + row for page in part.tolist() for row in range(page_rows)]
            found += [row for lo, hi in _slices(lows, highs, part, page_rows) for row in there[lo:hi]]
    assert found == rows


@given(st.data())
@settings(max_examples=examples(12), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_history(data):
    """Appends, deletions and compactions in any order, against a list for each version."""
    with tempfile.TemporaryDirectory() as folder, trajstore.open(f"{folder}/s", "a", schema=SCHEMA) as store:
        versions = {0: []}
        fresh = 0
        for _ in range(data.draw(st.integers(1, 12))):
            now = versions[max(versions)]
            what = data.draw(st.sampled_from(["append", "append", "delete", "compact"]))
            if what == "append":
                count = data.draw(st.integers(1, 4))
                for number in range(fresh, fresh + count):
                    append(store, number)
                store.flush()
                versions[store.version] = [*now, *range(fresh, fresh + count)]
                fresh += count
            elif what == "delete" and now:
                gone = data.draw(st.lists(st.sampled_from(now), unique=True, min_size=1))
                versions[store.delete(gone)] = [n for n in now if n not in gone]  # ids are numbers here
            elif what == "compact":
                done = compact_store(store, segment_bytes=data.draw(st.sampled_from([1, 800, 3000, 1 << 30])))
                versions[done.version] = now
                store.refresh()
            assert store.version == max(versions)
        for version, numbers in versions.items():
            if version:
                with trajstore.open(f"{folder}/s", version=version) as old:
                    assert old.trajectories.ids.tolist() == numbers
                    assert_holds(old.trajectories, numbers)


@pytest.mark.slow
def test_ten_thousand_segments(tmp_path):
    """Afterwards the store is like one that was written in one go."""
    trees = [
        ({"obs": np.full((1 + n % 9, 16), n % 251, np.uint8), "t": [str(n)] * (n % 9)}, {}) for n in range(1, 10_001)
    ]
    trees = [tree for tree in trees if tree[0]["t"]]
    with trajstore.open(tmp_path / "one", "a") as store:
        for tree, _ in trees:
            store.append(tree)
    with trajstore.open(tmp_path / "one") as store:
        schema = Schema(store.schema.columns)
    small_segments(tmp_path / "many", schema, trees)
    assert segments(tmp_path / "many") == len(trees)
    compact_at(tmp_path / "many")
    with trajstore.open(tmp_path / "one") as one, trajstore.open(tmp_path / "many") as many:
        assert many.usage().segments == 1
        assert many.usage().objects == one.usage().objects  # the same pages
        for path in ("obs", "t"):
            np.testing.assert_array_equal(
                np.asarray(many.trajectories.read(path)), np.asarray(one.trajectories.read(path))
            )


_HUNGRY = """
import resource, sys, trajstore
from tests.edit.test_compact import compact_store
with trajstore.open(sys.argv[1], "a") as store:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    compact_store(store, segment_bytes=1 << 40)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """Segments of 200 MB each, one long trajectory in one of them, become one of 800 MB."""
    rng = np.random.default_rng(0)
    with trajstore.open(tmp_path / "s", "a", segment_bytes=1) as store:
        for steps in (200_000, 50_000, 150_000, 200_000, 200_000):
            store.append({"x": rng.integers(0, 256, (steps, 1000), dtype=np.uint8), "reward": rng.random(steps)})
            store.flush()
    child = [sys.executable, "-c", _HUNGRY, str(tmp_path / "s")]
    done = subprocess.run(child, cwd=Path(__file__).parents[2], capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) < 300 * 1024, done.stdout
    assert segments(tmp_path / "s") == 1
