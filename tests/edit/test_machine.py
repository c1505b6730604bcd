"""Every edit of several stores in any order, through two handles each, against plain lists (``tests.edit.model``)."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import os
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

import trajstore
from tests.edit.machine import HANDLES, MOST_ROWS, World
from tests.edit.model import DERIVED, Aged, Model, Row, Version, derive, taken, with_lineage
from tests.edit.stores import SCHEMA, append, length_of, metadata_of, numbered
from tests.support.rare import examples
from trajstore.edit.release import Borrower, release_pins
from trajstore.edit.vacuum import Keep, vacuum
from trajstore.errors import CommitError, IndexRangeError, SelectionError, VersionExpiredError, VersionNotFoundError
from trajstore.names import flatten, nest
from trajstore.storage.age import GRACE
from trajstore.storage.commit import History

SHARES = st.sampled_from(["reference", "reference", "link", "copy"])
FACTORS = st.integers(2, 9)


def joined(numbers: Sequence[int]) -> Any:
    """Columns of several trajectories, end to end."""
    flats = [flatten(numbered(n)) for n in numbers]
    return nest({path: [row for flat in flats for row in flat[path]] for path in flats[0]})


def computing(name: str, factor: int) -> Any:
    """What ``add_column`` is given."""
    return lambda trajectory: derive(flatten(trajectory), name, factor)


class Stores(World):
    """Each rule does the same to a store and to its model."""

    # Appending

    @rule(
        data=st.data(),
        handle=HANDLES,
        count=st.integers(1, 4),
        how=st.sampled_from(["append", "append_many", "episode"]),
        flush=st.booleans(),
    )
    def append(self, data: st.DataObject, handle: int, count: int, how: str, flush: bool) -> None:
        store = self.draw_store(data)
        writing = self.handles[store.name][handle]
        if not len(writing.schema):  # it was cleared
            writing.declare(SCHEMA)
        numbers = self.numbers(count)
        if how == "append_many":
            writing.append_many(
                joined(numbers),
                [length_of(n) for n in numbers],
                terminated=[n % 2 == 0 for n in numbers],
                truncated=[n % 3 == 0 for n in numbers],
                metadata=[metadata_of(n) for n in numbers],
            )
        for number in numbers:
            if how == "append":
                append(writing, number)
            elif how == "episode":
                self.stream(writing, number)
        store.waiting[handle] += numbers
        if flush:
            self.flush(store, handle)

    def stream(self, writing: trajstore.Store, number: int) -> None:
        flat = flatten(numbered(number))
        with writing.begin(metadata=metadata_of(number)) as episode:
            for step in range(length_of(number)):
                episode.add(**nest({path: values[step] for path, values in flat.items()}))
            final = {name: flat[f"obs/{name}"][-1] for name in ("image", "state")}
            episode.end(final, terminated=number % 2 == 0, truncated=number % 3 == 0)

    # Versions

    @rule(data=st.data(), handle=HANDLES, reclaim=st.booleans())
    def delete(self, data: st.DataObject, handle: int, reclaim: bool) -> None:
        store = self.draw_store(data)
        if reclaim:  # nobody else writes then
            self.flush(store, 0, 1)
        gone = set(data.draw(st.lists(st.sampled_from(store.ids), unique=True))) if store.ids else set()
        version = self.handles[store.name][handle].delete(sorted(gone), reclaim=reclaim)
        store.flushed(handle)
        store.deleted(gone)
        assert version == store.latest
        if reclaim:
            self.emptied(store, store.kept(1, self.marked(store)))

    @rule(data=st.data(), handle=HANDLES)
    def delete_what_is_not_there(self, data: st.DataObject, handle: int) -> None:
        store = self.draw_store(data)
        with pytest.raises(IndexRangeError):
            self.handles[store.name][handle].delete([-1, *store.ids[:1]])
        store.flushed(handle)

    @rule(data=st.data(), handle=HANDLES, last=st.none() | st.integers(0, 6), steps=st.none() | st.integers(0, 40))
    def retain(self, data: st.DataObject, handle: int, last: int | None, steps: int | None) -> None:
        store = self.draw_store(data)
        where = None if last is None and steps is None else data.draw(st.sampled_from([None, "length > 2"]))
        where = "length > 2" if last is None and steps is None else where
        writing = self.fresh(store, handle)
        chosen = [row for row in store.now.rows if where is None or length_of(row.number) > 2]
        kept = set()
        for row in reversed(chosen):
            within = last is None or len(kept) < last
            lengths = sum(length_of(r.number) for r in chosen if r.id in kept) + length_of(row.number)
            if not within or (steps is not None and lengths > steps):
                break
            kept.add(row.id)
        gone = set(store.ids) - kept
        assert writing.retain(last=last, max_steps=steps, where=where) == len(gone)
        if gone:
            store.deleted(gone)

    @rule(data=st.data(), handle=HANDLES)
    def clear(self, data: st.DataObject, handle: int) -> None:
        store = self.draw_store(data)
        self.flush(store, 0, 1)  # what waits has columns of its own to fit
        self.handles[store.name][handle].clear()
        self.looked.discard((store.name, handle))  # it begins anew: the next look commits
        store.commit([])

    @rule(data=st.data(), handle=HANDLES, name=st.sampled_from(["a", "b.1"]), move=st.booleans())
    def tag(self, data: st.DataObject, handle: int, name: str, move: bool) -> None:
        store = self.draw_store(data)
        version = data.draw(st.sampled_from(sorted(store.versions | dict.fromkeys(store.expired))))
        tagging = self.flush(store, handle)
        if not version or version in store.expired:
            with pytest.raises(VersionNotFoundError):
                tagging.tag(name, version, move=move)
        elif store.tags.get(name, version) != version and not move:
            with pytest.raises(trajstore.TrajstoreError, match="is at version"):
                tagging.tag(name, version)
        else:
            assert tagging.tag(name, version, move=move) == version
            store.tags[name] = version

    @rule(data=st.data(), handle=HANDLES)
    def untag(self, data: st.DataObject, handle: int) -> None:
        store = self.draw_store(data)
        if store.tags:
            name = data.draw(st.sampled_from(sorted(store.tags)))
            self.handles[store.name][handle].untag(name)
            del store.tags[name]

    @rule(data=st.data(), handle=HANDLES)
    def restore(self, data: st.DataObject, handle: int) -> None:
        store = self.draw_store(data)
        version = data.draw(st.sampled_from(sorted({*store.versions, *store.expired} - {0}) or [0]))
        if not version:
            return
        restoring = self.handles[store.name][handle]
        if version in store.expired:
            with pytest.raises(VersionExpiredError):
                restoring.restore(version)
            return
        number = restoring.restore(next((t for t, v in store.tags.items() if v == version), version))
        store.flushed(handle)
        self.restored(store, version)
        assert number == store.latest

    # What is kept

    @rule(data=st.data(), handle=HANDLES, keep=st.sampled_from([1, 1, 3]))
    def vacuum(self, data: st.DataObject, handle: int, keep: int) -> None:
        """Nobody else writes; only the latest versions stay."""
        store = self.draw_store(data)
        self.flush(store, 0, 1)
        kept = store.kept(keep, self.marked(store))
        gone = sorted(set(store.versions) - kept - {0})
        handles = self.handles[store.name]
        handles[handle].refresh()
        done = handles[handle].vacuum("0s", keep_versions=keep, keep_for="0s", exclusive=True)
        assert list(done.versions) == gone
        self.emptied(store, kept)

    @rule(data=st.data(), keep=st.sampled_from([1, 1, 3]))
    def vacuum_beside_writers(self, data: st.DataObject, keep: int) -> None:
        """All that is there is old; what waits in handles has not been stored."""
        store = self.draw_store(data)
        kept = store.kept(keep, self.marked(store))
        disk = Aged(store.folder)
        with contextlib.closing(disk):
            done = vacuum(disk, History(disk), Keep(keep, dt.timedelta(0), GRACE), dry_run=False)
            assert list(done.versions) == sorted(set(store.versions) - kept - {0})
            borrower = Borrower(store.folder, store.uuid, self.handles[store.name][0]._access.bases.open)
            release_pins(borrower, done.unused_bases, done.used_bases, now=dt.datetime.now(dt.UTC))
            if History(disk).latest(0).number > store.latest:
                store.commit(store.now.rows)
                kept.add(store.latest)
        self.forget_views(store)
        store.vacuumed(kept)

    # How it is laid out

    @rule(data=st.data(), handle=HANDLES, segment_bytes=st.sampled_from([1, 500, 2000, 1 << 20]))
    def compact(self, data: st.DataObject, handle: int, segment_bytes: int) -> None:
        store = self.draw_store(data)
        done = self.fresh(store, handle).compact(segment_bytes=segment_bytes)
        if done.version > store.latest:
            store.commit(store.now.rows)
        assert done.version == store.latest

    @rule(data=st.data(), handle=HANDLES, name=st.sampled_from(sorted(DERIVED)), factor=FACTORS, replaced=st.booleans())
    def add_column(self, data: st.DataObject, handle: int, name: str, factor: int, replaced: bool) -> None:
        store = self.draw_store(data)
        deriving = self.flush(store, handle)
        if not self.readable(store):
            return
        if not store.ids:
            with pytest.raises(SelectionError):
                deriving.add_column(name, computing(name, factor))
            return
        number = deriving.add_column(
            name, computing(name, factor), columns=[DERIVED[name]], replace=replaced, threads=1
        )
        rows = store.derived(store.now.rows, name, factor, replaced=replaced)
        if number > store.latest:
            store.commit(rows)
        assert number == store.latest
        assert [row.derived for row in store.now.rows] == [row.derived for row in rows]

    # Stores made of stores

    def draw_source(self, data: st.DataObject, stack: contextlib.ExitStack) -> tuple[Model, Any, list[Row]] | None:
        """A view of some store, and what it shows."""
        store = self.stores[data.draw(st.sampled_from(sorted(self.stores)), label="source")]
        kind = data.draw(st.sampled_from(["url", "handle", "version", "part"]))
        self.flush(store, 0, 1)
        if kind == "handle":
            number = data.draw(HANDLES)
            source: Any = self.fresh(store, number)
            self.see(store, number)
            rows = list(store.now.rows)
        elif kind == "url":
            source, rows = store.folder, list(store.now.rows)
        else:
            standing = sorted(n for n, one in store.versions.items() if n and self.readable(store, one))
            if not standing:
                return None
            version = data.draw(st.sampled_from(standing))
            source = stack.enter_context(trajstore.open(store.folder, version=version)).trajectories
            rows = list(store.versions[version].rows)
            if kind == "part":
                chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6)) if rows else []
                source, rows = source.take(chosen), [rows[place] for place in chosen]
            return store, source, rows
        return (store, source, rows) if self.readable(store) else None

    @precondition(World.room)
    @rule(data=st.data(), count=st.integers(1, 3), share=SHARES, interleave=st.booleans())
    def merge(self, data: st.DataObject, count: int, share: str, interleave: bool) -> None:
        with contextlib.ExitStack() as stack:
            found = [self.draw_source(data, stack) for _ in range(count)]
            sources = [one for one in found if one is not None]
            if not sources or sum(len(rows) for _, _, rows in sources) > MOST_ROWS:
                return
            target = self.fresh_store()
            trajstore.merge(
                [source for _, source, _ in sources],
                target.folder,
                order="interleave" if interleave else "concat",
                share=share,
            )
        rows = [row for store, _, rows in sources for row in with_lineage(rows, store.uuid)]
        self.made(target, sorted(rows, key=lambda row: row.id) if interleave else rows, share)

    @precondition(World.room)
    @rule(data=st.data(), share=SHARES, how=st.sampled_from(["first", "where", "parts"]))
    def split(self, data: st.DataObject, share: str, how: str) -> None:
        with contextlib.ExitStack() as stack:
            found = self.draw_source(data, stack)
            if found is None:
                return
            store, source, rows = found
            parts = [self.fresh_store(), self.fresh_store()]
            if how == "where":
                expected = [[row for row in rows if length_of(row.number) > 3]]
                counts = trajstore.split(source, parts[0].folder, where="length > 3", share=share)
            elif how == "first" and rows:
                expected = [rows[: (len(rows) + 1) // 2]]
                counts = trajstore.split(source, parts[0].folder, first=len(expected[0]), share=share)
            else:
                expected = [[row for row in rows if row.number % 2], [row for row in rows if row.number % 2 == 0]]
                wanted = {parts[0].folder: "number % 2 == 1", parts[1].folder: "number % 2 == 0"}
                if not rows:  # perhaps nothing was ever appended, and there is no such field
                    return
                counts = trajstore.split(source, wanted, share=share)
        assert list(counts.values()) == [len(part) for part in expected]
        for target, part in zip(parts, expected, strict=False):
            self.made(target, with_lineage(part, store.uuid), share)

    @rule(data=st.data(), share=SHARES)
    def save(self, data: st.DataObject, share: str) -> None:
        """To a new store, or in the place of what one holds, be it the same store."""
        names = [*sorted(self.stores), *(["new"] if self.room() else [])]
        name = data.draw(st.sampled_from(names), label="target")
        for number in (0, 1) if name != "new" else ():
            self.flush(self.stores[name], number)
        with contextlib.ExitStack() as stack:
            found = self.draw_source(data, stack)
            if found is None:
                return
            owner, source, rows = found
            rows = with_lineage(rows, owner.uuid)
            if isinstance(source, str):
                source = stack.enter_context(trajstore.open(source))
            view = source if isinstance(source, trajstore.View) else source.trajectories
            target = self.fresh_store() if name == "new" else self.stores[name]
            number = view.save(target.folder, share=share, replace=name != "new")
        if name == "new":
            self.made(target, rows, share)
        else:
            fresh = taken(rows, {target.name, *self.bases(target)}, first_id=target.next_id)
            target.next_id += len(fresh)
            places = {other.name: other.folder for other in self.stores.values()}
            target.versions[target.latest + 1] = Version(tuple(fresh), places)
        assert number == target.latest
        self.touched = target.name

    @rule(data=st.data(), leave_link=st.booleans())
    def move(self, data: st.DataObject, leave_link: bool) -> None:
        """To another folder of the same parent; those that refer to it are told."""
        store = self.draw_store(data)
        self.detach(store)
        self.moved = True
        self.reading.clear()
        old = store.folder
        store.folder = os.path.join(self.folder, f"{store.name}.{self.next_name}")
        self.next_name += 1
        os.rename(old, store.folder)
        if leave_link:
            os.symlink(store.folder, old)
        self.attach(store)
        for other in self.stores.values():
            self.heal(other)

    @precondition(lambda self: len(getattr(self, "stores", ())) > 1)
    @rule(data=st.data())
    def destroy(self, data: st.DataObject) -> None:
        """A store goes to which no other one refers, and what it pinned is let go of."""
        needed = {name for s in self.stores.values() for v in s.versions.values() for name in v.needs(s.name)}
        free = sorted(set(self.stores) - needed)
        if len(free) < 1:
            return
        store = self.stores[data.draw(st.sampled_from(free))]
        self.detach(store)
        del self.stores[store.name]
        shutil.rmtree(store.folder)
        for name in self.stores:
            owner = self.handles[name][0]
            pins = owner.pins()
            for pin in pins.index[pins["borrower_uuid"] == store.uuid]:
                owner.unpin(pin)
        self.touched = sorted(self.stores)[0]

    # Two at once

    @rule(
        data=st.data(),
        first=st.sampled_from(["append", "compact", "add_column", "replace_column", "delete", "restore", "vacuum"]),
        second=st.sampled_from(["append", "compact", "add_column", "replace_column", "delete", "restore", "clear"]),
        factors=st.tuples(FACTORS, FACTORS),
    )
    def race(self, data: st.DataObject, first: str, second: str, factors: tuple[int, int]) -> None:
        """One edit has stored its objects when another one, by another handle, is committed before it."""
        store = self.draw_store(data)
        self.flush(store, 0, 1)
        if not self.readable(store):
            return
        one, other = self.handles[store.name]
        one.refresh()
        old = [row.id for row in store.now.rows]
        gone = set(data.draw(st.lists(st.sampled_from(old), unique=True))) if old else set()
        versions = [n for n, v in store.versions.items() if n and self.readable(store, v)]
        versions = [data.draw(st.sampled_from(sorted(versions))) if versions else 0 for _ in range(2)]
        numbers = self.numbers(2)
        parts = [gone, set()] if first == "delete" else [set(), gone]
        commit = one._history.commit
        done: list[bool] = []

        def loses(*args: Any, **kwargs: Any) -> Any:
            one._history.commit = commit  # type: ignore[method-assign]
            self.act(store, other, second, numbers[1], parts[1], versions[1], factors[1])
            done.append(True)
            return commit(*args, **kwargs)

        one._history.commit = loses  # type: ignore[method-assign]
        try:
            self.act(store, one, first, numbers[0], parts[0], versions[0], factors[0], done=done)
        finally:
            one._history.commit = commit  # type: ignore[method-assign]
        if first == "clear" or second == "clear":
            self.looked -= {(store.name, 0), (store.name, 1)}
        self.touched = store.name

    def act(
        self,
        store: Model,
        handle: trajstore.Store,
        kind: str,
        number: int,
        gone: set[int],
        version: int,
        factor: int,
        *,
        done: list[bool] | None = None,
    ) -> None:
        """One of two edits; the model is told when the store has done it."""
        known = store.next_id
        match kind:
            case "append":
                append(handle, number)
                handle.flush()
                store.waiting[0].append(number)  # of which handle does not matter: nothing else waits
                store.flushed(0)
            case "compact":
                handle.compact(segment_bytes=1 << 20)
                self.learn(store, handle, list(store.now.rows))
            case "add_column" | "replace_column":
                if not store.ids:
                    return
                replaced = kind == "replace_column"
                try:
                    handle.add_column(
                        "value", computing("value", factor), columns=["reward"], replace=replaced, threads=1
                    )
                except CommitError:  # others computed or moved old values meanwhile
                    assert done, "nobody was in the way"
                    assert replaced
                    return
                self.learn(store, handle, list(store.now.rows), factor, kind)
                left = [dict(row.derived) for row in store.now.rows if row.id < known]
                assert all("value" in derived for derived in left)
                assert not replaced or all(derived["value"] == factor for derived in left)
            case "delete":
                try:
                    handle.delete(sorted(gone))
                except IndexRangeError:
                    assert not gone <= set(store.ids)
                else:
                    store.deleted(gone)
            case "restore" if version:
                handle.restore(version)
                self.restored(store, version)
            case "clear":
                handle.clear()
                store.commit([])
            case "vacuum":
                disk = Aged(store.folder)
                vacuum(disk, handle._history, Keep(100, dt.timedelta(0), GRACE), dry_run=False)
                self.learn(store, handle, list(store.now.rows))

    def learn(
        self,
        store: Model,
        handle: trajstore.Store,
        rows: list[Row],
        factor: int = 0,
        kind: str = "",
    ) -> None:
        """Versions that came of an edit: the same rows, and of a column new values where it was to be computed."""
        latest = History(handle._filesystem).latest(store.latest).number
        for number in range(store.latest + 1, latest + 1):
            with trajstore.open(store.folder, version=number) as found:
                view = found.trajectories
                assert view.ids.tolist() == [row.id for row in rows]
                learnt = []
                for row, trajectory in zip(rows, view, strict=True):
                    one = dataclasses.replace(row, homes=row.homes | {store.name}).with_derived("value", factor)
                    computed = "value" in trajectory.columns and (
                        trajectory["value"][:].tolist() == one.columns["value"].tolist()
                    )
                    may = kind == "replace_column" or (kind == "add_column" and "value" not in dict(row.derived))
                    learnt.append(one if computed and may else row)
            store.commit(learnt)
            rows = learnt


RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}
Stores.TestCase.settings = settings(stateful_step_count=20, max_examples=examples(12), **RELAXED)
TestStores = Stores.TestCase


class ManyStores(Stores):
    """The same for longer."""


ManyStores.TestCase.settings = settings(stateful_step_count=40, max_examples=300, **RELAXED)
TestManyStores = pytest.mark.slow(pytest.mark.timeout(3600)(ManyStores.TestCase))
