"""Every edit of a store in any order, through two handles, against lists of numbers: one list per version."""

from __future__ import annotations

import shutil
import tempfile

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import trajstore
from tests.edit.stores import SCHEMA, append, assert_holds, length_of, metadata_of, numbered
from trajstore.errors import IndexRangeError, VersionExpiredError
from trajstore.schema import flatten, nest

HANDLES = st.sampled_from([0, 1])


def joined(numbers):
    """Columns of several trajectories, end to end."""
    flats = [flatten(numbered(n)) for n in numbers]
    return nest({path: [row for flat in flats for row in flat[path]] for path in flats[0]})


class Edits(RuleBasedStateMachine):
    """The model: for each version a list of (id, number); for each handle what it appended and has not committed."""

    @initialize(look=st.booleans())
    def create(self, look):
        self.folder = tempfile.mkdtemp()
        self.url = f"{self.folder}/store"
        self.versions = {0: []}
        self.next_id = self.next_number = 0
        self.expired = 0  # versions up to this are gone
        self.waiting = {0: [], 1: []}
        self.looked = set()
        self.handles = {}
        self.reading = []  # views taken earlier, with what they must hold
        for number in (0, 1):
            self.handles[number] = trajstore.open(self.url, "a", schema=SCHEMA)
            if look:
                self.look(number)

    @property
    def latest(self):
        return max(self.versions)

    def ids(self):
        return [i for i, _ in self.versions[self.latest]]

    def fresh(self, count):
        numbers = list(range(self.next_number, self.next_number + count))
        self.next_number += count
        return numbers

    def commit(self, handle):
        """Its trajectories become a version, if there are any."""
        numbers, self.waiting[handle] = self.waiting[handle], []
        if numbers:
            added = [(self.next_id + place, n) for place, n in enumerate(numbers)]
            self.next_id += len(added)
            self.versions[self.latest + 1] = self.versions[self.latest] + added

    @rule(handle=HANDLES)
    def append(self, handle):
        (number,) = self.fresh(1)
        append(self.handles[handle], number)
        self.waiting[handle].append(number)

    @rule(handle=HANDLES, count=st.integers(1, 5))
    def append_many(self, handle, count):
        numbers = self.fresh(count)
        if not len(self.handles[handle].schema):  # it was cleared
            self.handles[handle].declare(SCHEMA)
        refs = self.handles[handle].append_many(
            joined(numbers),
            [length_of(n) for n in numbers],
            terminated=[n % 2 == 0 for n in numbers],
            truncated=[n % 3 == 0 for n in numbers],
            metadata=[metadata_of(n) for n in numbers],
        )
        assert len({ref.uuid for ref in refs}) == count
        self.waiting[handle] += numbers

    @rule(handle=HANDLES)
    def flush(self, handle):
        self.handles[handle].flush()
        self.commit(handle)

    @rule(handle=HANDLES, data=st.data(), reclaim=st.booleans())
    def delete(self, handle, data, reclaim):
        if reclaim:  # nobody else writes then, and views of earlier versions are gone
            self.flush(1 - handle)
            self.reading.clear()
        known = [i for i, _ in self.versions[self.latest]]
        gone = set(data.draw(st.lists(st.sampled_from(known), unique=True))) if known else set()
        version = self.handles[handle].delete(gone, reclaim=reclaim)
        self.commit(handle)
        self.versions[self.latest + 1] = [(i, n) for i, n in self.versions[self.latest] if i not in gone]
        assert version == self.latest
        if reclaim:
            self.expired = self.latest - 1

    @rule(handle=HANDLES, offset=st.integers(0, 3))
    def delete_what_is_not_there(self, handle, offset):
        """Uncommitted data is flushed all the same."""
        absent = [-1, self.next_id + len(self.waiting[handle]) + offset]
        gone = set(range(self.next_id)) - set(self.ids())
        with pytest.raises(IndexRangeError):
            self.handles[handle].delete([*absent, *list(gone)[:1]])
        self.commit(handle)

    @rule(handle=HANDLES)
    def clear(self, handle):
        self.flush(1 - handle)  # what waits there has columns of its own to fit
        self.handles[handle].clear()
        self.looked.discard(handle)  # it begins anew: the next look commits
        self.commit(handle)
        self.versions[self.latest + 1] = []

    @rule(handle=HANDLES, data=st.data(), share=st.sampled_from(["link", "copy", "reference"]))
    def replace_by_a_part(self, handle, data, share):
        self.flush(handle)
        self.handles[handle].refresh()
        self.see(handle)
        here = [n for _, n in self.versions[self.latest]]
        chosen = data.draw(st.permutations(range(len(here)))) if here else []
        chosen = chosen[: data.draw(st.integers(0, len(chosen)))]
        version = self.handles[handle].trajectories.take(chosen).save(self.url, share=share, replace=True)
        self.versions[version] = [(self.next_id + place, here[p]) for place, p in enumerate(chosen)]
        self.next_id += len(chosen)
        assert version == self.latest

    @rule(handle=HANDLES)
    def reopen(self, handle):
        self.handles[handle].close()
        self.commit(handle)
        self.handles[handle] = trajstore.open(self.url, "a", schema=SCHEMA)
        self.looked.discard(handle)
        self.reading = [(view, numbers, owner) for view, numbers, owner in self.reading if owner != handle]

    def see(self, handle):
        """Look at a handle that has been refreshed; the first look commits."""
        view = self.handles[handle].trajectories
        if handle not in self.looked:
            self.looked.add(handle)
            self.commit(handle)
        return view

    @rule(handle=HANDLES)
    def look(self, handle):
        self.handles[handle].refresh()
        view = self.see(handle)
        committed = self.versions[self.latest]
        numbers = [n for _, n in committed] + self.waiting[handle]
        assert view.ids.tolist() == [i for i, _ in committed] + [-1] * len(self.waiting[handle])
        assert_holds(view, numbers)
        self.reading.append((view, numbers, handle))

    @rule()
    def views_never_change(self):
        for view, numbers, _ in self.reading[-3:]:
            assert_holds(view, numbers)

    @rule(data=st.data())
    def time_travel(self, data):
        version = data.draw(st.integers(1, self.latest)) if self.latest else 0
        if 0 < version <= self.expired:
            with pytest.raises(VersionExpiredError):
                trajstore.open(self.url, version=version)
            return
        with trajstore.open(self.url, version=version) as store:
            assert store.trajectories.ids.tolist() == [i for i, _ in self.versions[version]]
            assert_holds(store.trajectories, [n for _, n in self.versions[version]])

    @invariant()
    def the_latest_version_is_what_was_committed(self):
        with trajstore.open(self.url) as store:
            assert store.version == self.latest
            assert [(t.id, t.metadata["number"]) for t in store.trajectories] == self.versions[self.latest]
            assert store.num_trajectories == len(self.versions[self.latest])

    def teardown(self):
        for handle in getattr(self, "handles", {}).values():
            handle.close()
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)


RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
Edits.TestCase.settings = settings(stateful_step_count=15, max_examples=25, **RELAXED)
TestEdits = Edits.TestCase


class ManyEdits(Edits):
    """The same for longer."""


ManyEdits.TestCase.settings = settings(stateful_step_count=30, max_examples=200, **RELAXED)
TestManyEdits = pytest.mark.slow(ManyEdits.TestCase)
