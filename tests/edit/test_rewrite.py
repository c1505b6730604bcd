"""Manifests that take the place of others, while others commit."""

from __future__ import annotations

import pytest

import trajstore
from tests.edit.stores import HeldDisk, append, filled, holds, objects_of
from trajstore.edit import rewrite as module
from trajstore.edit.rewrite import rewrite
from trajstore.errors import CommitError
from trajstore.format.manifest import live_mask
from trajstore.format.snapshot import ManifestEntry
from trajstore.opening import open_on
from trajstore.storage.changes import Replacement

FEW = 4


@pytest.fixture
def url(tmp_path):
    """One trajectory in each of four manifests, then forty in one."""
    first = filled(tmp_path / "store", range(40), per_commit=40)
    return filled(first, range(40, 40 + FEW))


def rewriting(disk, change, around, **options):
    """Rewrite a store while others do something before each creation of a version."""
    with open_on(disk, "a") as store:
        disk.around_create = around
        return rewrite(disk, store._history, store._head, change, operation="test", nbytes=0, **options)


def test_only_what_others_changed_is_planned_again(url):
    """Ten writers in a row are faster, and merge the small manifests each time."""
    disk = HeldDisk(url)
    asked, numbers = [], iter(range(100, 110))

    def change(entry, manifest):
        asked.append(entry.path)
        return manifest

    def around(key, create):
        number = next(numbers, None)
        if number is not None:
            with trajstore.open(url, "a") as other:
                append(other, number)
        return create()

    version = rewriting(disk, change, around)
    assert version.number == 1 + FEW + 10 + 1
    assert len(asked) == len(set(asked))
    holds(url, [*range(40 + FEW), *range(100, 110)])
    named = set()
    with trajstore.open(url) as store:
        for number in range(1, version.number + 1):
            named |= {entry.path for entry in store._history.load(number).snapshot.manifests}
    stored = {path for path in objects_of(url) if path.startswith("manifests/")}
    waste = stored - named  # the writers' own, merged in vain or at once
    assert not {path for path in waste if path in asked}


def test_nothing_to_change_gives_no_version(url):
    before = objects_of(url)
    disk = HeldDisk(url)
    assert rewriting(disk, lambda entry, manifest: None, lambda key, create: create()).number == 1 + FEW
    assert objects_of(url).keys() == before.keys()
    assert rewriting(disk, lambda entry, manifest: manifest, None, affected=["no such"]).number == 1 + FEW


def test_it_gives_up_where_others_never_stop(url, monkeypatch):
    monkeypatch.setattr(module, "_MAX_PLANS", 3)
    disk = HeldDisk(url)

    def around(key, create):
        with trajstore.open(url, "a") as other:  # every manifest is another one then
            other.trajectories.save(url, share="reference", replace=True)
        return create()

    with pytest.raises(CommitError, match="3 times"):
        rewriting(disk, lambda entry, manifest: manifest, around)
    holds(url, range(40 + FEW))


def test_a_replacement_carries_deletions_over(url):
    """Against masks: the rows of the new manifest are those that lived when it was made."""
    with trajstore.open(url, "a") as store:
        (old, *_) = store._history.load(store.delete([3, 4, 20])).snapshot.manifests
        (now, *_) = store._history.load(store.delete([0, 5, 39])).snapshot.manifests
    new = ManifestEntry("m", "", "", 1, 37, 0, 37, old.steps)
    carried = Replacement(old, new).carried_over(now)
    assert live_mask(carried).tolist() == [n not in (0, 5, 39) for n in range(40) if n not in (3, 4, 20)]
    assert (carried.trajectories, carried.steps) == (now.trajectories, now.steps)
    assert Replacement(old, new).carried_over(old) == new
