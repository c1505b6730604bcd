"""Damage: flipped bytes, cut, missing and exchanged objects give an error that names the object, or equal data.

Every byte of every object of a small store is flipped. Bytes that a complete read never asks the storage for cannot change
what it returns; by default those are flipped all at once, under `slow` every single byte gets its own read.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

import trajstore
from tests.support.rare import also_slow
from tests.support.strategies import bits
from trajstore import Column, TrajstoreError
from trajstore.format.pages import decode_page_index

MEMORY = fsspec.filesystem("memory")
COLUMNS = [
    Column(path="obs/image", dtype="uint8", shape=(2, 2), extra=1, page_rows=4),
    Column(path="obs/age", dtype="float32", extra=1),
    Column(path="phase", dtype="complex64", page_rows=4),
    Column(path="action", dtype="int64"),
    Column(path="text", dtype="string"),
    Column(path="boxes", dtype="float32", shape=(2,), ragged=True),
]
CODECS = {"compressed": None, "uncompressed": "none"}
SEGMENT_OBJECTS = (
    "zarr.json",
    "obs/zarr.json",
    "obs/image/zarr.json",
    "obs/image/c.0.0.0",
    "phase/zarr.json",
    "phase/c.0",
    "steps.arrow",
    "states.arrow",
    "pages.arrow",
)
COMMITS = 2
# Objects by what they are: their keys hold random identifiers.
ROLES = [
    "trajstore.json",
    "snapshots/LATEST",
    *(f"snapshots/{n + 1:020d}.json" for n in range(COMMITS)),
    *(f"manifest {n}" for n in range(COMMITS)),
    *(f"segment {n}: {name}" for n, name in itertools.product(range(COMMITS), SEGMENT_OBJECTS)),
]
# Codecs change pages only, so the other objects are flipped in one of the variants.
FLIPPED = [("compressed", role) for role in ROLES]
FLIPPED += [("uncompressed", role) for role in ROLES if role.endswith((".0", "steps.arrow", "states.arrow"))]
EVERY = 10  # so many bytes one is flipped, of which the others lie around it
FLIPS = (lambda offset: 0xFF, lambda offset: 1 << (offset % 8))


@dataclass
class Damaged:
    """A store in memory, what it holds, and which bytes a complete read asks for."""

    url: str
    keys: dict[str, str]  # role -> key
    expected: object
    asked: dict[str, set[int]]  # key -> offsets

    def buffer(self, role: str) -> memoryview:
        return MEMORY.store[self.path(role)].getbuffer()

    def path(self, role: str) -> str:
        return MEMORY._strip_protocol(f"{self.url}/{self.keys[role]}")

    @contextlib.contextmanager
    def replaced(self, role: str, data: bytes | None):
        """The object with other bytes, or without it."""
        path = self.path(role)
        before = MEMORY.store.pop(path)
        try:
            if data is not None:
                MEMORY.pipe_file(path, data)
            yield
        finally:
            MEMORY.store[path] = before


def trajectory(rng, length):
    return {
        "obs/image": rng.integers(0, 256, (length + 1, 2, 2), dtype=np.uint8),
        "obs/age": rng.random(length + 1, dtype=np.float32),
        "phase": (rng.random(length) + 1j * rng.random(length)).astype(np.complex64),
        "action": rng.integers(0, 9, length),
        "text": [f"step {i}" for i in range(length)],
        "boxes": [rng.random((i % 3, 2), dtype=np.float32) for i in range(length)],
    }


def read_everything(url: str) -> object:
    """Every value that the store holds, through both ways of reading."""
    with trajstore.open(url) as store:
        view = store.trajectories
        found = [store.version, store.uuid, view.ids.tolist(), view.lengths.tolist()]
        found += [bits(view.read(column.path)) for column in view.schema]
        for one in view:
            found.append(
                (one.id, one.uuid, one.terminated, one.truncated, one.created_at, one.reward_sum, one.metadata)
            )
            found += [bits(one.column(path)[:]) for path in one.columns]
        found.append(view.to_pandas().to_csv())
        return found


def make_store(url: str, codec: str | None, seed: int) -> dict[str, str]:
    """A store of two versions; its keys by role."""
    rng = np.random.default_rng(seed)
    with trajstore.open(url, "x", schema=COLUMNS, codec=codec) as store:
        for commit in range(COMMITS):
            for length in (3 + commit, 6):
                store.append(trajectory(rng, length), terminated=True, task=f"task {commit}", score=length / 2)
            store.flush()
    root = MEMORY._strip_protocol(url) + "/"
    keys = sorted(path.removeprefix(root) for path in MEMORY.store if path.startswith(root))
    roles = {key: key for key in keys if not key.startswith(("manifests/", "segments/"))}
    for key in keys:
        if not key.startswith("manifests/"):
            continue
        table = pq.read_table(pa.BufferReader(MEMORY.cat_file(root + key)))
        number = int(table["task"][0].as_py().removeprefix("task "))
        roles[f"manifest {number}"] = key
        segment = table.schema.metadata[b"trajstore.segments"].decode().split('"uuid":"')[1][:32]
        roles.update({f"segment {number}: {name}": f"segments/{segment}/{name}" for name in SEGMENT_OBJECTS})
    assert sorted(roles) == sorted(ROLES)
    assert sorted(roles.values()) == keys, "an object of the store is not tested"
    return roles


@pytest.fixture(scope="module")
def stores():
    made: dict[str, Damaged] = {}
    for name, codec in CODECS.items():
        url = f"memory://corruption/{name}"
        keys = make_store(url, codec, seed=1)
        made[name] = Damaged(url, keys, read_everything(url), _asked(url, keys))
    yield made
    MEMORY.rm("/corruption", recursive=True)


def _asked(url, keys):
    """Which bytes of which objects a complete read asks the storage for."""
    asked = {key: set() for key in keys.values()}
    root = MEMORY._strip_protocol(url) + "/"
    original = MemoryFileSystem.cat_file

    def recording(self, path, start=None, end=None, **kwargs):
        data = original(self, path, start=start, end=end, **kwargs)
        asked[self._strip_protocol(path).removeprefix(root)].update(range(start or 0, (start or 0) + len(data)))
        return data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", recording)
        read_everything(url)
    return asked


def pages_at(damaged, role):
    """Pages of a segment's object: (from, to, number, columns) each."""
    if ": " not in role or not role.endswith(("steps.arrow", "states.arrow", "c.0", "c.0.0.0")):
        return []
    segment, name = role.split(": ")
    index = bytes(damaged.buffer(f"{segment}: pages.arrow"))
    (source,) = [source for source in decode_page_index(index) if source.object == name]
    ranges = zip(source.offsets.tolist(), source.nbytes.tolist(), strict=True)
    return [(start, start + size, number, source.columns) for number, (start, size) in enumerate(ranges)]


def outcome(damaged, role, expect_words=()):
    """None if the store reads as before; the error's message if it names the object; anything else fails the test."""
    try:
        found = read_everything(damaged.url)
    except TrajstoreError as error:
        message = str(error)
        for word in (damaged.keys[role], *expect_words):
            assert word in message, f"{role}: {message!r} does not name {word!r}"
        return message
    assert found == damaged.expected, f"{role}: wrong data, and no error"
    return None


def flip_each(damaged, role, offsets, flip):
    """Flip one byte at a time; every flip of a page's byte must be an error that names segment, column and page."""
    pages = pages_at(damaged, role)
    view = damaged.buffer(role)
    refused = 0
    for offset in offsets:
        words = []
        for start, stop, number, columns in pages:
            if start <= offset < stop:
                words = [f"page {number} ", *columns]
        before = view[offset]
        view[offset] ^= flip(offset)
        try:
            message = outcome(damaged, role, words)
        finally:
            view[offset] = before
        assert message or not words, f"byte {offset} of {role} lies in a page, and its flip went unseen"
        refused += message is not None
    return refused


@pytest.mark.parametrize(("variant", "role"), FLIPPED)
def test_a_flipped_byte_is_an_error_or_equal_data(stores, variant, role):
    damaged = stores[variant]
    size = len(damaged.buffer(role))
    asked = sorted(damaged.asked[damaged.keys[role]])
    # All bits of a byte or a single one of it by turns.
    for number, flip in enumerate(FLIPS):
        flip_each(damaged, role, asked[::EVERY][number :: len(FLIPS)], flip)
    unread = np.setdiff1d(np.arange(size), asked)
    view = np.frombuffer(damaged.buffer(role), np.uint8)
    view[unread] ^= 0xFF
    try:
        assert outcome(damaged, role) is None
    finally:
        view[unread] ^= 0xFF


def test_the_flips_are_seen(stores):
    """The search above finds what it is meant to find: what is read and checked is refused."""
    damaged = stores["compressed"]
    for role in ("trajstore.json", f"snapshots/{COMMITS:020d}.json", "manifest 0", "segment 0: pages.arrow"):
        assert damaged.asked[damaged.keys[role]] == set(range(len(damaged.buffer(role)))), role
        assert flip_each(damaged, role, [30], FLIPS[0]) == 1
    for role in ROLES:
        for start, stop, _, _ in pages_at(damaged, role):
            assert set(range(start, stop)) <= damaged.asked[damaged.keys[role]], role


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("flip", FLIPS, ids=["all bits", "one bit"])
@pytest.mark.parametrize(("variant", "role"), FLIPPED)
def test_every_flipped_byte_alone(stores, variant, role, flip):
    damaged = stores[variant]
    flip_each(damaged, role, range(len(damaged.buffer(role))), flip)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("variant", also_slow(CODECS, list(CODECS)[-1:]))
def test_a_cut_or_grown_object_is_an_error_or_equal_data(stores, variant, role):
    damaged = stores[variant]
    whole = bytes(damaged.buffer(role))
    cuts = {0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 8, len(whole) - 1} - {len(whole)}
    for size in sorted(n for n in cuts if n >= 0):
        with damaged.replaced(role, whole[:size]):
            message = outcome(damaged, role)
        lost = damaged.asked[damaged.keys[role]] - set(range(size))
        optional = role == "snapshots/LATEST"
        assert (message is not None) == bool(lost) or optional, f"{role} cut to {size} bytes: {message}"
    with damaged.replaced(role, whole + b"\0"):
        outcome(damaged, role)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("variant", CODECS)
def test_a_missing_object_is_named_or_not_missed(stores, variant, role):
    damaged = stores[variant]
    with damaged.replaced(role, None):
        if role == "trajstore.json":
            with pytest.raises(trajstore.StoreNotFoundError, match=r"trajstore\.json"):
                read_everything(damaged.url)
        elif role == f"snapshots/{COMMITS:020d}.json":
            # Without its last version a store is the store before it.
            with trajstore.open(damaged.url) as store:
                assert store.version == COMMITS - 1
        else:
            message = outcome(damaged, role)
            assert (message is not None) == bool(damaged.asked[damaged.keys[role]] and role != "snapshots/LATEST")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("variant", also_slow(CODECS, list(CODECS)[:1]))
def test_an_object_of_another_store_is_refused(stores, variant, role):
    damaged = stores[variant]
    url = f"memory://corruption-other/{variant}"
    other = make_store(url, CODECS[variant], seed=2)
    try:
        foreign = MEMORY.cat_file(f"{MEMORY._strip_protocol(url)}/{other[role]}")
        with damaged.replaced(role, foreign):
            if role == "trajstore.json":  # a name tag: whatever it says, the data are the store's
                found = read_everything(damaged.url)
                assert found[1] != damaged.expected[1]
                assert found[2:] == damaged.expected[2:]
            elif role == f"snapshots/{COMMITS:020d}.json":  # a whole version, of objects that are not here
                with pytest.raises(trajstore.MissingObjectError, match=f"{other['manifest 0']}|{other['manifest 1']}"):
                    read_everything(damaged.url)
            else:
                message = outcome(damaged, role)
                checked = role.startswith("manifest") or bool(pages_at(damaged, role)) or "pages.arrow" in role
                assert (message is not None) == checked
    finally:
        MEMORY.rm("/corruption-other", recursive=True)
