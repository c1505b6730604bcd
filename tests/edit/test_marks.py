"""Tags and pins: names, documents, and what is in the way."""

from __future__ import annotations

import datetime as dt

import pytest

from tests.edit.histories import Clock, append, filled, history_on
from tests.edit.memory import NOON, MemoryDisk
from trajstore.edit.marks import (
    all_pins,
    all_tags,
    find_pins,
    find_tag,
    held,
    marked_versions,
    pin,
    tag,
    unpin,
    untag,
)
from trajstore.errors import (
    CorruptionError,
    MissingObjectError,
    StorageError,
    TagExistsError,
    TagNameError,
    VersionExpiredError,
    VersionNotFoundError,
)
from trajstore.format import layout
from trajstore.format.marks import Farewell, Pin, Tag, check_tag_name
from trajstore.storage.commit import EMPTY_VERSION


@pytest.fixture
def store():
    """A storage, its history, and three versions."""
    disk, clock = MemoryDisk(), Clock()
    filled(disk, clock, 3)
    history = history_on(disk, clock)
    return disk, history, [history.load(n) for n in (1, 2, 3)]


def test_a_tag_names_a_version_until_it_is_taken_away(store):
    disk, history, versions = store
    made = tag(disk, history, "paper-v1", versions[1])
    assert (made.name, made.version, made.snapshot_sha256) == ("paper-v1", 2, versions[1].sha256)
    assert find_tag(disk, "paper-v1") == made
    tag(disk, history, "best", versions[0])
    assert [t.name for t in all_tags(disk)] == ["best", "paper-v1"]
    assert marked_versions(disk) == {1, 2}
    untag(disk, "paper-v1")
    assert [t.name for t in all_tags(disk)] == ["best"]


def test_a_tag_is_given_once_and_moved_only_when_asked(store):
    disk, history, versions = store
    first = tag(disk, history, "best", versions[0])
    assert tag(disk, history, "best", versions[0]) == first
    with pytest.raises(TagExistsError, match=r"'best' of memory://test is at version 1; .*move=True"):
        tag(disk, history, "best", versions[2])
    assert tag(disk, history, "best", versions[2], move=True).version == 3
    assert find_tag(disk, "best").version == 3
    assert not list(disk.list_objects(layout.PINS))


@pytest.mark.parametrize("name", ["", "12", ".x", "-x", "a/b", "a b", "x" * 201, "ä", "x\n", None, 7, "٣x"])
def test_a_text_that_cannot_be_a_name_is_refused(store, name):
    disk, history, versions = store
    with pytest.raises(TagNameError, match="begins with a letter or digit"):
        tag(disk, history, name, versions[0])
    with pytest.raises(TagNameError):
        find_tag(disk, name)
    with pytest.raises(TagNameError):
        untag(disk, name)


def test_no_tag_is_named_like_the_version_without_a_name(store):
    disk, history, versions = store
    for attempt in (lambda: tag(disk, history, "latest", versions[0]), lambda: find_tag(disk, "latest")):
        with pytest.raises(TagNameError, match=r"'latest': no tag has this name.*leave out the version"):
            attempt()


@pytest.mark.parametrize("name", ["latest-good", "a", "v1", "1a", "2026-11-21", "A.b_c-d", "x" * 200])
def test_names(name):
    check_tag_name(name)


def test_a_tag_that_is_not_there_says_which_are(store):
    disk, history, versions = store
    with pytest.raises(VersionNotFoundError, match="has no tag 'a'; its tags are none"):
        find_tag(disk, "a")
    tag(disk, history, "b", versions[0])
    with pytest.raises(VersionNotFoundError, match="its tags are 'b'"):
        untag(disk, "a")


def test_the_empty_version_cannot_be_tagged_and_needs_no_hold(store):
    disk, history, _ = store
    with pytest.raises(VersionNotFoundError, match="append something first"):
        tag(disk, history, "nothing", EMPTY_VERSION)
    with held(disk, history, EMPTY_VERSION):
        assert not list(disk.list_objects(layout.PINS))


def test_pins_hold_versions_for_others(store):
    disk, history, versions = store
    made = pin(disk, history, versions[1], borrower_uuid="b" * 32, borrower_url="s3://bucket/other")
    assert all_pins(disk) == [made]
    assert find_pins(disk, [made.uuid, "f" * 32]) == [made]
    with held(disk, history, versions[0]):
        assert marked_versions(disk) == {1, 2}
        assert all_pins(disk) == [made], "a hold is no pin of another store"
    with pytest.raises(ZeroDivisionError), held(disk, history, versions[0]):
        _ = 1 / 0
    assert marked_versions(disk) == {2}
    unpin(disk, made.uuid)
    unpin(disk, made.uuid)
    assert not find_pins(disk, [made.uuid])


def test_a_version_whose_end_is_announced_can_no_longer_be_marked(store):
    disk, history, versions = store
    disk.store({layout.farewell_key("a" * 32): [Farewell("a" * 32, (1, 2)).to_bytes()]})
    with pytest.raises(VersionExpiredError, match="is being removed by vacuum"):
        tag(disk, history, "late", versions[1])
    with pytest.raises(VersionExpiredError):
        pin(disk, history, versions[0], borrower_uuid="b" * 32, borrower_url="/other")
    assert not marked_versions(disk)
    tag(disk, history, "fine", versions[2])


def test_a_version_of_a_store_that_was_replaced_is_noticed(store):
    versions = store[2]
    other, clock = MemoryDisk(), Clock()
    append(other, history_on(other, clock), EMPTY_VERSION)
    with pytest.raises(CorruptionError, match="the store was replaced"):
        tag(other, history_on(other, clock), "x", versions[0])
    assert not all_tags(other)


def test_a_storage_that_fails_while_it_is_looked_leaves_no_mark(store):
    disk, history, versions = store

    def fail(name, key):
        if (name, key) == ("read", layout.snapshot_key(1)):
            raise MissingObjectError("the network is gone")

    disk.before = fail
    with pytest.raises(MissingObjectError):
        tag(disk, history, "x", versions[0])
    assert not all_tags(disk)


DOCUMENTS = {
    "tag": Tag("paper", 7, "0" * 64, NOON),
    "pin": Pin("a" * 32, 7, "0" * 64, "b" * 32, "/other", NOON),
    "vacuum": Farewell("a" * 32, (1, 2, 4)),
}


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_documents_come_back(document):
    assert type(document).from_bytes(document.to_bytes(), key="k") == document


@pytest.mark.parametrize(
    "broken",
    [
        Tag("a/b", 7, "0" * 64, NOON),
        Tag("paper", 0, "0" * 64, NOON),
        Tag("paper", True, "0" * 64, NOON),
        Pin("../x", 7, "0" * 64, "b" * 32, "/other", NOON),
        Pin("a" * 32, -1, "0" * 64, "b" * 32, "/other", NOON),
        Farewell("x", ()),
        Farewell("a" * 32, (0,)),
        Farewell("a" * 32, ("1",)),
    ],
    ids=repr,
)
def test_documents_that_make_no_sense_are_corruption(broken):
    with pytest.raises(CorruptionError, match=r"^the/key is not"):
        type(broken).from_bytes(broken.to_bytes(), key="the/key")


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_flipped_bit_is_corruption(document):
    data = bytearray(document.to_bytes())
    data[20] ^= 1
    with pytest.raises(CorruptionError, match="the/key"):
        type(document).from_bytes(bytes(data), key="the/key")


def test_times_are_utc():
    assert DOCUMENTS["tag"].created_at.tzinfo is dt.UTC


def test_a_hold_that_cannot_be_removed_is_logged_and_fails_nothing(store, monkeypatch, caplog):
    disk, history, versions = store
    remove = disk.remove

    def fails(keys):
        if any(map(layout.is_hold, keys)):
            raise StorageError("input/output error")
        remove(keys)

    monkeypatch.setattr(disk, "remove", fails)
    with held(disk, history, versions[0]):
        pass
    assert "was not removed, and keeps version 1" in caplog.text
