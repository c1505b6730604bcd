"""Several stores with two handles each, beside their models: what machines of edits have in common.

Invariant: after each step the store that was touched last is what its model says, for somebody who opens it anew; at the end
every version of every store is, and ``verify`` finds no error.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import trajstore
from tests.edit.model import Model, Row, Version, assert_rows, taken, with_lineage
from tests.edit.stores import SCHEMA, append
from trajstore.errors import VersionExpiredError
from trajstore.read.bases import absolute

HANDLES = st.sampled_from([0, 1])
MOST_STORES = 4
MOST_ROWS = 24


class World(RuleBasedStateMachine):
    """The model never asks a store, but for who refers to whom, and for marks."""

    @initialize(per_commit=st.lists(st.integers(1, 3), min_size=2, max_size=3), look=st.booleans())
    def create(self, per_commit: list[int], look: bool) -> None:
        """A store with a few versions, and one that refers to it."""
        self.folder = tempfile.mkdtemp()
        self.stores: dict[str, Model] = {}
        self.handles: dict[str, list[trajstore.Store]] = {}
        self.looked: set[tuple[str, int]] = set()
        self.reading: list[tuple[str, Any, list[Row]]] = []  # views taken earlier, with what they must hold
        self.next_name = self.next_number = 0
        self.touched = ""
        self.moved = False
        owner, borrower = self.fresh_store(), self.fresh_store()
        self.attach(owner)
        for count in per_commit:
            for number in self.numbers(count):
                append(self.handles[owner.name][0], number)
                owner.waiting[0].append(number)
            self.flush(owner, 0)
        trajstore.merge([owner.folder], borrower.folder, share="reference")
        self.made(borrower, with_lineage(owner.now.rows, owner.uuid), "reference")
        for store in (owner, borrower) if look else ():
            for handle in (0, 1):
                self.handles[store.name][handle].refresh()
                self.see(store, handle)

    # What there is

    def fresh_store(self) -> Model:
        name = f"s{self.next_name}"
        self.next_name += 1
        return Model(name, os.path.join(self.folder, name))

    def attach(self, store: Model) -> None:
        self.stores[store.name] = store
        self.handles[store.name] = [trajstore.open(store.folder, "a", schema=SCHEMA) for _ in range(2)]
        store.uuid = self.handles[store.name][0].uuid
        self.touched = store.name

    def forget_views(self, store: Model) -> None:
        self.reading = [one for one in self.reading if one[0] != store.name]

    def detach(self, store: Model) -> None:
        self.forget_views(store)
        self.looked -= {(store.name, 0), (store.name, 1)}
        for number, handle in enumerate(self.handles.pop(store.name)):
            handle.close()
            store.flushed(number)

    @property
    def folders(self) -> dict[str, str]:
        return {name: store.folder for name, store in self.stores.items()}

    def draw_store(self, data: st.DataObject) -> Model:
        store = self.stores[data.draw(st.sampled_from(sorted(self.stores)), label="store")]
        self.touched = store.name
        return store

    def numbers(self, count: int) -> list[int]:
        self.next_number += count
        return list(range(self.next_number - count, self.next_number))

    def flush(self, store: Model, *numbers: int) -> trajstore.Store:
        """Commit what waits; the first of the handles."""
        for number in numbers:
            self.handles[store.name][number].flush()
            store.flushed(number)
        return self.handles[store.name][numbers[0]]

    def fresh(self, store: Model, number: int) -> trajstore.Store:
        """A handle that shows the latest version, and nothing else."""
        handle = self.flush(store, number)
        handle.refresh()
        return handle

    def readable(self, store: Model, version: Version | None = None) -> bool:
        return store.readable(version or store.now, self.folders)

    def see(self, store: Model, number: int) -> Any:
        """What a handle shows; the first look commits."""
        view = self.handles[store.name][number].trajectories
        if (store.name, number) not in self.looked:
            self.looked.add((store.name, number))
            store.flushed(number)
        return view

    def bases(self, store: Model) -> dict[str, str]:
        """Stores that the latest version refers to, and where it expects them."""
        names = {other.uuid: other.name for other in self.stores.values()}
        with trajstore.open(store.folder) as opened:
            bases = opened._head.snapshot.bases
        return {
            names[base.store_uuid]: absolute(base.url, seen_from=store.folder)
            for base in bases
            if base.store_uuid in names
        }

    def restored(self, store: Model, version: int) -> None:
        """An old version is the latest again."""
        old = store.versions[version]
        store.versions[store.latest + 1] = Version(old.rows, {**old.places, **self.bases(store)})
        self.heal(store)

    # What became of edits

    def marked(self, store: Model) -> set[int]:
        pins = self.handles[store.name][0].pins()
        return {*pins["version"].tolist(), *store.tags.values()}

    def emptied(self, store: Model, kept: set[int]) -> None:
        """Views of what is gone are, too; and no pin stays that nobody needs."""
        self.forget_views(store)
        store.vacuumed(kept)
        needed = set()
        for number in store.versions:
            if number:
                with trajstore.open(store.folder, version=number) as old:
                    needed |= {base.pin for base in old._head.snapshot.bases}
        for name in self.stores if not self.moved else ():  # what is at an old place cannot be let go of
            pins = self.handles[name][0].pins()
            assert name == store.name or set(pins.index[pins["borrower_uuid"] == store.uuid]) <= needed

    def heal(self, store: Model) -> None:
        """Tell a store where those are that its latest version refers to."""
        for name in sorted(store.now.needs(store.name)):
            place = self.stores[name].folder
            was = store.now.places[name]
            if was != place:
                version = self.fresh(store, 0).relocate(was, place)
                store.versions[store.latest + 1] = Version(store.now.rows, {**store.now.places, name: place})
                assert version == store.latest
        assert self.readable(store)

    def made(self, target: Model, rows: Sequence[Row], share: str) -> None:
        """A new store with one version."""
        self.attach(target)
        found = taken(rows, {target.name, *self.bases(target)}, first_id=0)
        target.versions[1] = Version(tuple(found), {name: s.folder for name, s in self.stores.items()})
        target.next_id = len(found)

    def room(self) -> bool:
        return len(getattr(self, "stores", ())) < MOST_STORES

    # Looking

    @rule(data=st.data(), handle=HANDLES)
    def reopen(self, data: st.DataObject, handle: int) -> None:
        store = self.draw_store(data)
        self.handles[store.name][handle].close()
        store.flushed(handle)
        self.handles[store.name][handle] = trajstore.open(store.folder, "a", schema=SCHEMA)
        self.looked.discard((store.name, handle))
        self.forget_views(store)

    @rule(data=st.data(), handle=HANDLES)
    def look(self, data: st.DataObject, handle: int) -> None:
        store = self.draw_store(data)
        if not self.readable(store):
            return
        self.handles[store.name][handle].refresh()
        view = self.see(store, handle)
        waiting = [Row(-1, number, frozenset()) for number in store.waiting[handle]]
        rows = [*store.now.rows, *waiting]
        assert_rows(view, rows)
        self.reading.append((store.name, view, rows))

    @rule()
    def views_never_change(self) -> None:
        """But for the ids of what was not committed, which a view learns with the handle that it is of."""
        for name, view, rows in self.reading[-2:]:
            given = self.stores[name].given
            learnt = [
                replace(row, id=given[row.number]) if row.id == -1 and view.ids[n] != -1 else row
                for n, row in enumerate(rows)
            ]
            assert_rows(view, learnt)

    @rule(data=st.data())
    def time_travel(self, data: st.DataObject) -> None:
        store = self.draw_store(data)
        version = data.draw(st.sampled_from(sorted({*store.versions, *store.expired} - {0}) or [0]))
        if version in store.expired:
            with pytest.raises(VersionExpiredError):
                trajstore.open(store.folder, version=version)
        elif version:
            self.assert_version(store, version)
            with trajstore.open(store.folder) as latest:
                before, now = {row.id for row in store.versions[version].rows}, set(store.ids)
                diff = latest.diff(version)
                assert (diff.added.tolist(), diff.removed.tolist()) == (sorted(now - before), sorted(before - now))

    def assert_version(self, store: Model, version: int) -> None:
        with trajstore.open(store.folder, version=version) as opened:
            assert opened.num_trajectories == len(store.versions[version].rows)
            if self.readable(store, store.versions[version]):
                assert_rows(opened.trajectories, store.versions[version].rows)

    @invariant()
    def the_latest_version_is_what_was_committed(self) -> None:
        if not self.touched:
            return
        store = self.stores[self.touched]
        with trajstore.open(store.folder) as opened:
            assert opened.version == store.latest
            assert opened.uuid == store.uuid
            assert opened.num_trajectories == len(store.now.rows)
            if self.readable(store):
                assert_rows(opened.trajectories, store.now.rows)
            assert opened.tags()["version"].to_dict() == store.tags

    def teardown(self) -> None:
        try:
            if sys.exception() is None:
                for store in list(getattr(self, "stores", {}).values()):
                    self.detach(store)
                    self.assert_store(store)
        finally:
            for handles in getattr(self, "handles", {}).values():
                for handle in handles:
                    with contextlib.suppress(trajstore.TrajstoreError):
                        handle.close()
            if hasattr(self, "folder"):
                shutil.rmtree(self.folder)

    def assert_store(self, store: Model) -> None:
        """Everything, as somebody who knows nothing finds it."""
        for number in store.versions:
            if number:
                self.assert_version(store, number)
        for number in sorted(store.expired)[-2:]:
            with pytest.raises(VersionExpiredError):
                trajstore.open(store.folder, version=number)
        for name, number in store.tags.items():
            with trajstore.open(store.folder, version=name) as opened:
                assert opened.version == number
        with trajstore.open(store.folder) as opened:
            assert opened.versions().index.tolist() == sorted(set(store.versions) - {0}, reverse=True)
            report = opened.verify(deep=True)
        if all(self.readable(store, version) for version in store.versions.values()):
            assert not report.errors, str(report)
