"""Stores that were moved: those that refer to them are told where they are now."""

from __future__ import annotations

import shutil

import pytest

import trajstore
from tests.edit.stores import append, filled, objects_of
from trajstore.edit import relocate as relocating
from trajstore.edit.marks import all_pins
from trajstore.edit.relocate import relocation
from trajstore.errors import CorruptionError, SelectionError, StorageError, StoreNotFoundError, UntrustedBaseError
from trajstore.format.snapshot import Base, Snapshot
from trajstore.opening import _connect_base
from trajstore.read.bases import Bases
from trajstore.storage.commit import History
from trajstore.storage.local import LocalFilesystem


@pytest.fixture
def borrower(tmp_path):
    """Refers to two stores under ``runs`` and to one elsewhere."""
    for n, name in enumerate(("runs/a", "runs/b", "far/c")):
        filled(tmp_path / "here" / name if n < 2 else tmp_path / name, [n])
    url = tmp_path / "here" / "all"
    trajstore.merge([tmp_path / "here/runs/a", tmp_path / "here/runs/b", tmp_path / "far/c"], url)
    return url


def relocate(url, old, new, **trusted):
    """As a store's handle does it."""
    filesystem = LocalFilesystem(str(url))
    history = History(filesystem)
    head = history.latest(0)
    bases = Bases(str(url), _connect_base, trusted=trusted.get("bases"))
    try:
        return history.commit(relocation(head.snapshot, bases, old, new, url=str(url)), head)
    finally:
        bases.close()


def urls_of(url, version=None):
    with trajstore.open(url, version=version) as store:
        return [base.url for base in store._head.snapshot.bases]


def numbers(url, **options):
    with trajstore.open(url, **options) as store:
        view = store.trajectories
        assert view.read("action").shape[0] == view.num_steps
        return [t.metadata["number"] for t in view]


def test_moved_stores_are_found_again(borrower, tmp_path):
    far = {str(tmp_path / "far"): None}
    assert urls_of(borrower) == ["../runs/a", "../runs/b", str(tmp_path / "far/c")]
    shutil.move(tmp_path / "here/runs", tmp_path / "here/kept")
    with trajstore.open(borrower, bases=far) as store, pytest.raises(StoreNotFoundError, match="move it back"):
        store.trajectories.read("action")
    before = objects_of(tmp_path / "here/kept")
    version = relocate(borrower, tmp_path / "here/runs", tmp_path / "here/kept")
    assert (version.number, version.snapshot.operation) == (2, "relocate")
    assert urls_of(borrower) == ["../kept/a", "../kept/b", str(tmp_path / "far/c")]
    assert urls_of(borrower, version=1) == ["../runs/a", "../runs/b", str(tmp_path / "far/c")]
    assert numbers(borrower, bases=far) == [0, 1, 2]
    assert objects_of(tmp_path / "here/kept") == before, "pins moved along"
    assert [b.pin for b in version.snapshot.bases] == [
        b.pin for b in History(LocalFilesystem(str(borrower))).load(1).snapshot.bases
    ]
    shutil.move(tmp_path / "far/c", tmp_path / "here/c")
    relocate(borrower, f"{tmp_path}/far/", f"{tmp_path}/here/")
    assert urls_of(borrower) == ["../kept/a", "../kept/b", "../c"], "below its own folder it is relative"
    assert numbers(borrower) == [0, 1, 2]
    with trajstore.open(borrower, "a") as store:
        append(store, 3)
    assert numbers(borrower) == [0, 1, 2, 3]


def test_a_store_that_moved_itself_says_what_its_relative_urls_were(borrower, tmp_path):
    shutil.move(borrower, tmp_path / "other" / "all")
    bases = {str(tmp_path / "here"): None}
    relocate(tmp_path / "other/all", "..", tmp_path / "here", bases=bases)
    assert urls_of(tmp_path / "other/all")[:2] == [str(tmp_path / "here/runs/a"), str(tmp_path / "here/runs/b")]
    assert numbers(tmp_path / "other/all", bases={**bases, str(tmp_path / "far"): None}) == [0, 1, 2]


@pytest.mark.parametrize(
    ("old", "new", "error", "match"),
    [
        ("{0}/here/runs", "{0}/here/nothing", StoreNotFoundError, "which is not there"),
        ("{0}/here/runs/a", "{0}/here/runs/b", CorruptionError, "another one is there"),
        ("{0}/here/runs", "{0}/far", UntrustedBaseError, r"open it with bases=\{"),
        ("{0}/here/run", "{0}/here/kept", SelectionError, "refers to no store whose URL begins with .*it refers to"),
        ("{0}/here/runs/a/more", "{0}/here/kept", SelectionError, "begins with"),
    ],
)
def test_what_is_not_the_store_that_was_meant_is_refused(borrower, tmp_path, old, new, error, match):
    before = objects_of(borrower)
    with pytest.raises(error, match=match):
        relocate(borrower, old.format(tmp_path), new.format(tmp_path))
    assert objects_of(borrower) == before


def test_a_base_that_another_writer_added_meanwhile_stays(borrower, tmp_path):
    filesystem = LocalFilesystem(str(borrower))
    snapshot: Snapshot = History(filesystem).latest(0).snapshot
    shutil.copytree(tmp_path / "here/runs", tmp_path / "here/kept")
    bases = Bases(str(borrower), _connect_base)
    change = relocation(snapshot, bases, tmp_path / "here/runs", tmp_path / "here/kept", url=str(borrower))
    bases.close()
    added = Base("../runs/d", "d" * 32)
    fields = {**vars(snapshot), "bases": (*snapshot.bases, added)}
    found = change.apply(Snapshot(**fields), None, lambda *_: [])
    assert [base.url for base in found.bases][:2] == ["../kept/a", "../kept/b"]
    assert found.bases[3] == added


def pin_in(url):
    [pin] = all_pins(LocalFilesystem(str(url)))
    return pin


def test_the_pin_in_a_store_that_was_moved_says_again_who_needs_it(tmp_path):
    filled(tmp_path / "n1/x", range(3))
    trajstore.merge([tmp_path / "n1/x"], tmp_path / "n1/s")
    (tmp_path / "n2").mkdir()
    shutil.move(tmp_path / "n1/x", tmp_path / "n2/x")
    assert pin_in(tmp_path / "n2/x").borrower_url == str(tmp_path / "n2/s"), "where nothing ever was"
    with trajstore.open(tmp_path / "n2/x") as store:
        [finding] = [f for f in store.verify().findings if f.kind == "pin-borrower"]
    assert "If this store was moved, relocate() in that one mends the pin" in finding.message
    with trajstore.open(tmp_path / "n1/s", "a", bases={str(tmp_path / "n2"): None}) as store:
        store.relocate(tmp_path / "n1/x", tmp_path / "n2/x")
    assert pin_in(tmp_path / "n2/x").borrower_url == str(tmp_path / "n1/s")
    with trajstore.open(tmp_path / "n2/x", bases={str(tmp_path / "n1"): None}) as store:
        assert not [f for f in store.verify().findings if f.kind.startswith("pin")]


def test_a_pin_that_cannot_say_where_its_store_is_stays_as_it_was(tmp_path, monkeypatch, caplog):
    filled(tmp_path / "n1/x", range(3))
    trajstore.merge([tmp_path / "n1/x"], tmp_path / "n1/s")
    (tmp_path / "n2").mkdir()
    shutil.move(tmp_path / "n1/x", tmp_path / "n2/x")

    def fails(owner, pin):
        raise StorageError("the disk is read-only")

    monkeypatch.setattr(relocating, "replace_pin", fails)
    with trajstore.open(tmp_path / "n1/s", "a", bases={str(tmp_path / "n2"): None}) as store:
        assert store.relocate(tmp_path / "n1/x", tmp_path / "n2/x") == 2
        assert "still says where it was" in caplog.text
        assert len(store.trajectories.read("reward")) == 1 + 2 + 3
