"""Stores that refer to segments of others: whom they trust, and what happens when the others move, change or vanish."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import trajstore
from tests.edit.stores import append, assert_holds, filled, holds, segments_of
from tests.support.faulty import Faults, faulty_bucket
from tests.support.rare import examples
from trajstore.errors import CorruptionError, StoreNotFoundError, UntrustedBaseError
from trajstore.format import layout
from trajstore.format.snapshot import Base, Snapshot, StoreDocument
from trajstore.read.bases import Bases, parent_of, reference
from trajstore.storage.connect import connect
from trajstore.storage.filesystem import Filesystem

UUID = "ab" * 16


@pytest.fixture
def runs(tmp_path):
    """A folder with a store, and two that refer to it: one by one, and through the other."""
    folder = tmp_path / "runs"
    filled(folder / "origin", range(6), per_commit=2)
    with trajstore.open(folder / "origin") as store:
        store.trajectories.take([4, 1]).save(folder / "part", share="reference")
    with trajstore.open(folder / "part", "a") as store:
        append(store, 10)
        store.flush()
        store.trajectories[::-1].save(folder / "deep" / "chained", share="reference")
    return folder


def bases_of(url, **options):
    with trajstore.open(url, **options) as store:
        return [base.url for base in store._head.snapshot.bases]


def save_reference(source, target, **options):
    with trajstore.open(source, **options) as store:
        store.trajectories.save(target, share="reference", replace=True)


def test_a_store_shows_what_lies_in_another(runs):
    holds(runs / "part", [4, 1, 10])
    assert bases_of(runs / "part") == ["../origin"]
    assert len(segments_of(runs / "part")) == 1


def test_references_are_flat_and_name_the_store_that_has_the_bytes(runs, tmp_path):
    with trajstore.open(runs / "deep" / "chained") as store, pytest.raises(UntrustedBaseError):
        store.trajectories.read("action")  # outside its own parent
    trusted = {str(runs): None}
    holds(runs / "deep" / "chained", [10, 1, 4], bases=trusted)
    assert sorted(bases_of(runs / "deep" / "chained", bases=trusted)) == [str(runs / "origin"), str(runs / "part")]
    save_reference(runs / "part", runs / "beside")
    assert sorted(bases_of(runs / "beside")) == ["../origin", "../part"]
    shutil.move(runs / "part", tmp_path / "away")
    with trajstore.open(runs / "beside") as store, pytest.raises(StoreNotFoundError, match="part, which is not there"):
        store.trajectories.read("action")
    with trajstore.open(tmp_path / "away", bases=trusted) as store, pytest.raises(StoreNotFoundError):
        store.trajectories.read("action")  # what was beside it is not


def test_a_whole_folder_can_be_moved(runs, tmp_path):
    save_reference(runs / "part", runs / "beside")
    shutil.move(runs, tmp_path / "elsewhere")
    holds(tmp_path / "elsewhere" / "part", [4, 1, 10])
    holds(tmp_path / "elsewhere" / "beside", [4, 1, 10])


def test_a_referring_store_goes_on_like_any_other(runs):
    with trajstore.open(runs / "part", "a") as store:
        assert_holds(store.trajectories, [4, 1, 10])
        for n in range(11, 20):  # manifests of both kinds are merged
            append(store, n)
            store.flush()
        store.delete(store.trajectories.filter("number == 4 or number == 12").ids)
        kept = [1, 10, 11, *range(13, 20)]
        assert_holds(store.trajectories, kept)
        with store.trajectories.loader(8, order="sequential", columns=["action"]) as loader:
            seen = [n for batch in loader for n in batch["action"][:, 0].tolist()]
        assert [n for n, _ in itertools.groupby(seen)] == kept
        assert store.usage().segments == 10
    holds(runs / "part", kept)
    with trajstore.open(runs / "part", "a") as store:  # nothing of the other store is reclaimed
        store.delete(store.trajectories.filter("number > 1").ids, reclaim=True)
        assert len(segments_of(runs / "part")) == 1, "the one that a third store has pinned"
    holds(runs / "part", [1])
    holds(runs / "origin", range(6))


@pytest.mark.parametrize("share", ["link", "copy"])
def test_a_referring_store_can_be_given_bytes_of_its_own(runs, share):
    """By an open handle, too, which may have read them elsewhere before."""
    with trajstore.open(runs / "part") as reader:
        assert_holds(reader.trajectories, [4, 1, 10])
        with trajstore.open(runs / "part") as store:
            store.trajectories.save(runs / "part", share=share, replace=True)
        shutil.rmtree(runs / "origin")
        reader.refresh()
        assert_holds(reader.trajectories, [4, 1, 10])
    holds(runs / "part", [4, 1, 10])


def test_each_version_has_bases_of_its_own(runs):
    filled(runs / "other", [30, 31])
    with trajstore.open(runs / "part", "a") as store:
        for source in ("other", "origin", "other"):
            save_reference(runs / source, runs / "part")
            store.refresh()
            append(store, 40)
            store.flush()
        assert_holds(store.trajectories, [30, 31, 40])
        assert [b.url for b in store._current().snapshot.bases] == ["../other"], "each version has its own"
    for version, expected in ((2, [4, 1, 10]), (3, [30, 31]), (5, range(6)), (6, [*range(6), 40]), (8, [30, 31, 40])):
        with trajstore.open(runs / "part", version=version) as store:
            assert_holds(store.trajectories, list(expected))


# Whom a store trusts


def test_a_place_that_was_not_named_is_not_opened_and_the_message_says_what_to_add(runs, tmp_path):
    target = tmp_path / "far" / "store"
    save_reference(runs / "origin", target)
    with trajstore.open(target) as store:
        assert store.num_trajectories == 6
        with pytest.raises(UntrustedBaseError, match=rf"bases=\{{'{runs}/origin': None\}}") as caught:
            store.trajectories.read("action")
        assert isinstance(caught.value, PermissionError)
    for prefix in (f"{runs}/origin", f"{runs}/origin/", str(runs), f"{runs}/", str(tmp_path)):
        holds(target, range(6), bases={prefix: None})
    for prefix in (f"{runs}/orig", f"{runs}/origin/x", f"{runs}/part", str(runs)[:-1], "", "/"):
        with trajstore.open(target, bases={prefix: None}) as store, pytest.raises(UntrustedBaseError):
            store.trajectories.read("action")
    with trajstore.open(target, "a") as store, pytest.raises(UntrustedBaseError):
        store.trajectories.sample(2)  # to append needs no trust, to read does


def test_another_process_trusts_what_this_one_was_told(runs, tmp_path):
    import pickle

    target = tmp_path / "far" / "store"
    save_reference(runs / "origin", target)
    with trajstore.open(target, bases={str(runs): None}) as store:
        copied = pickle.loads(pickle.dumps(store.trajectories.first(2)))
    assert_holds(copied, [0, 1])
    copied._access.close()


def never(url: str, options: Any) -> Filesystem:
    raise AssertionError(f"{url} was opened")


def opens(store: str, base: str, trusted: dict[str, Any] | None = None, options: Any = None) -> tuple[str, Any]:
    """What would be opened, with which options."""
    seen = []

    def connect(url: str, storage_options: Any) -> Filesystem:
        seen.append((url, storage_options))
        filesystem = faulty_bucket({}, Faults())
        filesystem.store({layout.STORE_DOCUMENT: [StoreDocument(UUID).to_bytes()]})
        return filesystem

    bases = Bases(store, connect, options=options, trusted=trusted)
    opened = bases.open(Base(base, UUID))
    assert bases.open(Base(base, UUID)) is opened, "once"
    bases.close()
    (only,) = seen
    return only


@pytest.mark.parametrize(
    ("store", "base", "found"),
    [
        ("/data/a", "../b", "/data/b"),
        ("/data/a/", "../b", "/data/b"),
        ("/data/a", "../deep/er/b", "/data/deep/er/b"),
        ("/data/a", "/data/b", "/data/b"),
        ("/a", "../b", "/b"),
        ("s3://bucket/runs/a", "../b", "s3://bucket/runs/b"),
        ("s3://bucket/runs/a", "s3://bucket/runs/b", "s3://bucket/runs/b"),
        ("s3://bucket/a", "../b", "s3://bucket/b"),
        ("http://host/runs/a", "../b", "http://host/runs/b"),
        ("memory://x/a", "../a..b", "memory://x/a..b"),
    ],
)
def test_neighbours_are_trusted_with_the_store_s_own_options(store, base, found):
    assert opens(store, base, {"s3://other": {"key": "other"}}, {"key": "own"}) == (found, {"key": "own"})


@pytest.mark.parametrize(
    ("store", "base"),
    [
        ("/data/a", "../../b"),
        ("/data/a", "../b/../../c"),
        ("/data/a", "../b/.."),
        ("/data/a", "../b/../c"),
        ("/a", "../"),
        ("/data/a", ".."),
        ("/data/a", "../."),
        ("/data/a", "..//etc"),
        ("/data/a", "..//"),
        ("/data/a", "../b//c"),
        ("/data/a", "../b/"),
        ("/data/a", "b"),
        ("/data/a", "./b"),
        ("/data/a", ""),
        ("/data/a", "/"),
        ("/data/a", "/database/b"),
        ("/data/a", "/data/../etc"),
        ("/data/a", "/data/x/../../etc"),
        ("/data/a", "/etc"),
        ("/data/a", "file:///data/b"),
        ("/data/a", "s3://bucket/b"),
        ("/data/a", "zip://b::/data/x.zip"),
        ("/data/a", "../b::s3://bucket"),
        ("/data/a", "simplecache::s3://bucket/b"),
        ("s3://bucket/runs/a", "s3://bucket/other/b"),
        ("s3://bucket/runs/a", "s3://bucket/runs2/b"),
        ("s3://bucket/runs/a", "s3://bucket/runs/../other"),
        ("s3://bucket/runs/a", "s3a://bucket/runs/b"),
        ("s3://bucket", "../other"),
        ("s3://bucket", "s3://other"),
        ("s3://bucket", "s3://other/b"),
        ("s3://bucket/", "../other"),
        ("http://host", "../other.example/b"),
        ("http://host", "http://other/b"),
        ("zip://runs/a::/data/x.zip", "../y.zip"),
        ("zip://runs/a::/data/x.zip", "/data/y"),
    ],
)
def test_everything_else_is_refused_before_it_is_opened(store, base):
    with pytest.raises(UntrustedBaseError):
        Bases(store, never).open(Base(base, UUID))


@pytest.mark.parametrize(
    ("base", "prefix", "trusted"),
    [
        ("s3://bucket/runs/b", "s3://bucket/runs", True),
        ("s3://bucket/runs/b", "s3://bucket/runs/b", True),
        ("s3://bucket/runs/b", "s3://bucket", True),
        ("s3://bucket/runs/b", "s3://bucket/runs/b/c", False),
        ("s3://bucket/runs/b", "s3://bucket/run", False),
        ("s3://bucket/runs/../b", "s3://bucket", False),
        ("s3://bucket-2/b", "s3://bucket", False),
        ("/data/b", "/", False),
        ("/data/b::s3://bucket", "/data", False),
    ],
)
def test_a_prefix_ends_at_a_slash_and_brings_its_own_options(base, prefix, trusted):
    given_options = {prefix: {"key": "theirs"}, "s3://unrelated": {"key": "other"}}
    if trusted:
        assert opens("/data/a", base, given_options) == (base, {"key": "theirs"})
        return
    with pytest.raises(UntrustedBaseError):
        Bases("/elsewhere/a", never, trusted=given_options).open(Base(base, UUID))


parts = st.lists(st.sampled_from(["a", "b", "..", ".", "", "a..", "::"]), min_size=1, max_size=5)


@given(store=parts, base=parts, relative=st.booleans())
@settings(deadline=None, derandomize=True, max_examples=examples(300), suppress_health_check=list(HealthCheck))
def test_nothing_outside_the_parent_is_ever_opened(store, base, relative):
    own = "/root/" + "/".join(p for p in store if p in ("a", "b")) + "/store"
    parent = os.path.dirname(own)
    url = ("../" if relative else "/root/") + "/".join(base)
    try:
        found, _ = opens(own, url)
    except UntrustedBaseError:
        return
    assert os.path.normpath(found).startswith(f"{parent}/") or os.path.normpath(found) == parent
    assert ".." not in found.split("/")


@given(folder=parts, to=parts)
@settings(deadline=None, derandomize=True, max_examples=examples(200), suppress_health_check=list(HealthCheck))
def test_a_reference_leads_back_to_where_it_was_made_of(folder, to):
    here, there = (["/root", *(p for p in names if p in ("a", "b"))] for names in (folder, to))
    store, other = "/".join([*here, "store"]), "/".join([*there, "other"])
    url = reference(other, seen_from=store)
    if url.startswith("../"):
        assert opens(store, url) == (other, None)
    else:
        assert url == other
        assert not other.startswith(f"{parent_of(store)}/")


# What is not as it was


def test_another_store_in_the_place_of_a_base_is_told_apart(runs):
    shutil.rmtree(runs / "origin")
    filled(runs / "origin", range(6), per_commit=2)
    with trajstore.open(runs / "part") as store, pytest.raises(CorruptionError, match="another one is there"):
        store.trajectories.read("action")


def test_a_base_that_is_not_there_says_so(runs):
    shutil.rmtree(runs / "origin")
    with trajstore.open(runs / "part") as store:
        with pytest.raises(StoreNotFoundError, match=rf"{runs}/part refers to .* {runs}/origin, which is not there"):
            store.trajectories.read("action")
        assert store.num_trajectories == 3
    filled(runs / "part2", [1])  # others go on


def gone(runs: Path) -> dict[str, Any]:
    shutil.rmtree(runs / "origin")
    return {"error": StoreNotFoundError, "match": "origin, which is not there"}


def another(runs: Path) -> dict[str, Any]:
    shutil.rmtree(runs / "origin")
    filled(runs / "origin", [1])
    return {"error": CorruptionError, "match": "another one is there"}


def untrusted(runs: Path) -> dict[str, Any]:
    shutil.move(runs / "origin", runs.parent / "far")
    with trajstore.open(runs / "part", "a") as store:
        moved = [replace(base, url=str(runs.parent / "far")) for base in store._head.snapshot.bases]
        store._history.commit(Rebased(tuple(moved)), store._head)
    return {"error": UntrustedBaseError, "match": "outside its own parent folder"}


@dataclass(frozen=True)
class Rebased:
    """Other stores, put down without being looked at."""

    bases: tuple[Base, ...]
    operation: str = "rebase"
    merges: bool = False

    def apply(self, parent: Snapshot, merged: Any, read: Any) -> Snapshot:
        return replace(parent, bases=self.bases)


@pytest.mark.parametrize("out_of_reach", [gone, another, untrusted])
def test_only_what_lies_in_a_base_needs_it(runs, out_of_reach):
    """Everything but its steps can be looked at and edited."""
    expected = out_of_reach(runs)
    raises = functools.partial(pytest.raises, expected["error"], match=expected["match"])
    with trajstore.open(runs / "part", "a") as store:
        view = store.trajectories
        assert view.to_pandas()["number"].tolist() == [4, 1, 10]
        own, lent = view.filter("number == 10"), view.filter("number < 10")
        assert_holds(own, [10])
        assert own.sample(5)["action"].shape == (5, 2)
        with own.loader(4, window=2) as loader:
            next(loader)
        assert own.statistics(["action"])["action"].mean.tolist() == [10, 10]
        for whole in (view, lent):
            with raises():
                whole.read("action")
            with raises():
                whole.sample(2)
            with raises():
                whole.loader(2)
            with raises():
                whole.statistics(["action"])
            with raises():
                whole.save(runs / "saved", share="copy")
        usage = store.usage()
        assert (usage.segments, usage.out_of_reach, usage.objects["action"].rows) == (3, 2, 4)
        with raises():
            (problem,) = usage.problems
            raise problem
        assert len(store.diff(1).removed) == 0
        assert len(store.diff(1).added) == 1
        append(store, 11)
        store.flush()
        store.delete(store.trajectories.filter("number == 4").ids)
        assert store.versions()["operation"].iloc[0] == "delete"
        assert [t.metadata["number"] for t in store.trajectories] == [1, 10, 11]
        assert_holds(store.trajectories.filter("number >= 10"), [10, 11])
        store.delete(store.trajectories.filter("number == 1").ids)
    holds(runs / "part", [10, 11])


def test_a_loader_says_at_once_that_one_of_many_segments_is_out_of_reach(runs):
    """It looks at a few before it begins, and may come to that one much later."""
    filled(runs / "many", range(12, 30))
    with trajstore.open(runs / "many") as many, trajstore.open(runs / "part") as part:
        trajstore.merge([many.trajectories, part.trajectories], runs / "all")
    shutil.rmtree(runs / "part")
    with trajstore.open(runs / "all") as store:
        assert len(store.trajectories) == 21
        with pytest.raises(StoreNotFoundError, match="part, which is not there"):
            store.trajectories.loader(2, columns=["action"])


def test_a_base_is_opened_once_and_when_it_is_first_read(runs, monkeypatch):
    opened = []
    check = Bases._checked

    def counted(self: Bases, base: Base) -> Filesystem:
        opened.append(base.url)
        return check(self, base)

    monkeypatch.setattr(Bases, "_checked", counted)
    with trajstore.open(runs / "part") as store:
        view = store.trajectories
        view.filter("number > 1").to_pandas()
        assert opened == []
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: view.read("action"), range(16)))
        with view.loader(2, epochs=2, order="shuffle") as loader:
            assert len(list(loader)) > 3
        assert opened == ["../origin"]


def test_a_base_that_comes_back_is_read(runs, tmp_path):
    with trajstore.open(runs / "part") as store:
        shutil.move(runs / "origin", tmp_path / "away")
        with pytest.raises(StoreNotFoundError):
            store.trajectories.read("action")
        shutil.move(tmp_path / "away", runs / "origin")
        assert_holds(store.trajectories, [4, 1, 10])


def test_bytes_of_a_base_that_were_changed_name_the_store_that_holds_them(runs):
    changed = 0
    for path in sorted((runs / "origin" / "segments").rglob("*")):
        if path.is_file() and path.name.startswith("c."):
            path.write_bytes(bytes(byte ^ 255 for byte in path.read_bytes()))
            changed += 1
    assert changed
    place = rf"segments/\w+/.* in {runs}/origin\b"
    with trajstore.open(runs / "part") as store:
        view = store.trajectories
        with pytest.raises(CorruptionError, match=place):
            view[0]["obs/image"][:]
        with pytest.raises(CorruptionError, match=place):
            view.read("obs/image")
        with pytest.raises(CorruptionError, match=place):
            view.gather([0], [0], columns=["obs/image"])
        with view.first(2).loader(4, columns=["action"]) as loader, pytest.raises(CorruptionError, match=place):
            next(loader)
        assert view[2]["action"][:].tolist() == [[10, 10]] * 4, "its own are whole"


def test_a_segment_of_a_base_that_was_reclaimed_is_named(runs):
    with trajstore.open(runs / "origin", "a") as store:
        store.delete([4], reclaim=True)
        holds(runs / "part", [4, 1, 10])  # it is pinned
        for pin in store.pins().index:
            store.unpin(pin)
        store.delete([5], reclaim=True)
    with trajstore.open(runs / "part") as store:
        with pytest.raises(FileNotFoundError, match=rf"in {runs}/origin"):
            store.trajectories[0]["action"][:]
        assert store.trajectories[1]["action"][0].tolist() == [1, 1]


def test_in_memory_too():
    name = f"bases-{uuid.uuid4().hex}"
    filled(f"memory://{name}/origin", range(3))
    save_reference(f"memory://{name}/origin", f"memory://{name}/part")
    holds(f"memory://{name}/part", range(3))
    fsspec.filesystem("memory").mv(f"/{name}", f"/{name}-moved", recursive=True)
    holds(f"memory://{name}-moved/part", range(3))
    fsspec.filesystem("memory").rm(f"/{name}-moved", recursive=True)


def test_pages_of_a_base_are_kept_in_the_disk_cache(runs, tmp_path):
    options = {"cache_dir": tmp_path / "cache"}
    holds(runs / "part", [4, 1, 10], **options)
    holds(runs / "part", [4, 1, 10], **options)
    assert any(Path(tmp_path / "cache").rglob("*"))


def test_a_base_that_takes_long_to_open_keeps_nobody_from_another(runs):
    opening, go = threading.Event(), threading.Event()

    def slow(url, options):
        if url.endswith("part"):
            opening.set()
            assert go.wait(60)
        return connect(url)

    bases = Bases(str(runs / "other"), slow)
    stores = {}
    for name in ("part", "origin"):
        with trajstore.open(runs / name) as store:
            stores[name] = Base(f"../{name}", store.uuid, None)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(bases.open, stores["part"])
        assert opening.wait(60)
        try:
            assert pool.submit(bases.open, stores["origin"]).result(60).url.endswith("origin")
            assert not first.done()
        finally:
            go.set()
        assert first.result(60) is bases.open(stores["part"])
    bases.close()
