"""Sampling while others append, and several loaders on one store and one small cache."""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import trajstore
from tests.support.rare import also_slow
from tests.support.recordings import anchors_of, append, check_batch, least_cache_bytes, recording_of, view_of
from tests.support.reference import Recording, reference_anchors
from trajstore import Column

SCHEMA = [
    Column(path="obs", dtype="uint8", shape=(4, 4), extra=1, page_rows=4),
    Column(path="action", dtype="float32"),
    Column(path="note", dtype="string"),
    Column(path="points", dtype="int16", shape=(2,), ragged=True),
]
NAMES = ["obs", "action", "note", "points", "is_last", "terminated", "truncated", "task_name", "trajectory", "step"]
OPTIONS = {"window": 3, "columns": NAMES, "pad": "edge"}
TIMEOUT_S = 60


@pytest.fixture
def recording() -> Recording:
    lengths = np.random.default_rng(7).integers(1, 30, 120)
    return recording_of(np.random.default_rng(8), SCHEMA, lengths.tolist())


@pytest.fixture
def store(recording):
    """An empty store of the recording's columns, to append to."""
    url = f"memory://live/{uuid.uuid4().hex}"
    with trajstore.open(url, "a", schema=recording.schema, segment_bytes=20_000) as store:
        yield store


def within(recording, count):
    """The first trajectories of a recording, as those appended so far."""
    return Recording(recording.schema, recording.trajectories[:count])


def test_a_view_holds_what_was_appended_before_it_was_taken_committed_or_not(store, recording):
    for number, recorded in enumerate(recording.trajectories[:9]):
        append(store, recorded)
        if number == 3:
            store.flush()
    view = store.trajectories
    assert view.lengths.tolist() == [t.length for t in recording.trajectories[:9]]
    with view.loader(16, order="sequential", **OPTIONS) as loader:
        batches = iter(loader)
        seen = check_batch(next(batches), recording, OPTIONS)
        for recorded in recording.trajectories[9:]:  # neither these nor their commits move the view
            append(store, recorded)
        store.flush()
        seen += [anchor for batch in batches for anchor in check_batch(batch, recording, OPTIONS)]
    assert seen == reference_anchors(within(recording, 9), **OPTIONS)


def test_the_same_view_gives_the_same_batches_before_and_after_its_commit(store, recording):
    for recorded in recording.trajectories[:20]:
        append(store, recorded)
    before = store.trajectories
    store.flush()
    for view in (before, store.trajectories):
        with view.loader(16, seed=3, **OPTIONS) as loader:
            places = [check_batch(batch, recording, OPTIONS) for batch in itertools.islice(loader, 10)]
        if view is before:
            expected = places
    assert places == expected


@pytest.mark.parametrize("commit", [False, True])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_appended_trajectory_is_sampled_at_once(store, prefetch, commit):
    recording = recording_of(np.random.default_rng(1), SCHEMA, [1, 9, 81, 729])
    append(store, recording.trajectories[0])
    if commit:
        store.flush()
    with store.trajectories.loader(64, follow=True, prefetch=prefetch, timeout_s=TIMEOUT_S, **OPTIONS) as loader:
        batches = iter(loader)
        assert {t for t, _ in check_batch(next(batches), recording, OPTIONS)} == {0}
        for number in (1, 2, 3):
            append(store, recording.trajectories[number])
            if commit:
                store.flush()
            # What was planned before the append may still come; nine of ten anchors of the batch after are new.
            upcoming = [check_batch(next(batches), recording, OPTIONS) for _ in range(prefetch + 2)]
            assert number in {t for t, _ in upcoming[-1]}
            if prefetch == 0:
                assert number in {t for t, _ in upcoming[0]}


def test_commits_of_another_handle_are_sampled_after_refresh_s(store, recording):
    append(store, recording.trajectories[0])
    store.flush()
    with (
        trajstore.open(store.url) as reader,
        reader.trajectories.loader(64, follow=True, refresh_s=0.01, timeout_s=TIMEOUT_S, **OPTIONS) as loader,
    ):
        next(iter(loader))
        for recorded in recording.trajectories[1:40]:
            append(store, recorded)
        store.flush()
        deadline = time.monotonic() + TIMEOUT_S
        seen = set()
        while len(seen) < 30 and time.monotonic() < deadline:
            seen |= {t for t, _ in check_batch(next(iter(loader)), recording, OPTIONS)}
        assert len(seen) >= 30


@pytest.mark.parametrize("prefetch", [0, 3])
def test_every_batch_is_right_while_a_thread_appends(store, recording, prefetch):
    append(store, recording.trajectories[0])
    more = threading.Semaphore(0)  # one trajectory per batch, so that both go on in turn

    def write():
        for number, recorded in enumerate(recording.trajectories[1:], 1):
            if not more.acquire(timeout=TIMEOUT_S):
                return
            append(store, recorded)
            if number % 25 == 0:
                store.flush()

    writing = threading.Thread(target=write)
    allowed = set(reference_anchors(recording, **OPTIONS))
    seen: set[int] = set()
    with store.trajectories.loader(32, follow=True, prefetch=prefetch, timeout_s=TIMEOUT_S, **OPTIONS) as loader:
        writing.start()
        try:
            for batch in itertools.islice(loader, 140):
                more.release()
                places = check_batch(batch, recording, OPTIONS)
                assert set(places) <= allowed
                seen |= {t for t, _ in places}
        finally:
            for _ in recording.trajectories:
                more.release()
            writing.join(TIMEOUT_S)
    assert len(seen) > 100


@pytest.mark.filterwarnings("ignore:the view holds")
@pytest.mark.parametrize("pages", also_slow([1, 4], [4]))
def test_two_loaders_share_a_small_cache(recording, pages):
    """Each needs pages that the other would have to let go: nothing hangs, and nothing is overwritten while it is read."""
    with view_of(recording, flush_after=(40, 80)) as view:
        least = max(least_cache_bytes(view, 16, order=order, **OPTIONS) for order in ("random", "shuffle"))
    with view_of(recording, flush_after=(40, 80), cache_bytes=pages * least) as view:

        def load(order, seed):
            knobs = {"order": order, "seed": seed, "epochs": 3, "prefetch": 2, "timeout_s": TIMEOUT_S}
            with view.loader(16, **OPTIONS, **knobs) as loader:
                return [check_batch(batch, recording, OPTIONS) for batch in itertools.islice(loader, 40)]

        alone = {arguments: load(*arguments) for arguments in (("random", 1), ("shuffle", 2))}
        with ThreadPoolExecutor(2) as pool:
            running = {arguments: pool.submit(load, *arguments) for arguments in alone}
            for arguments, future in running.items():
                assert future.result(2 * TIMEOUT_S) == alone[arguments]


def test_two_iterations_of_one_loader_share_its_place(recording):
    """Threads that take turns on one loader get each batch once."""
    with view_of(recording) as view, view.loader(16, order="shuffle", **OPTIONS) as loader:
        batches = iter(loader)
        lock = threading.Lock()
        taken = []

        def consume():
            while True:
                with lock:
                    batch = next(batches, None)
                if batch is None:
                    return
                taken.append(anchors_of(batch))

        with ThreadPoolExecutor(3) as pool:
            for running in [pool.submit(consume) for _ in range(3)]:
                running.result(TIMEOUT_S)
    assert sorted(anchor for batch in taken for anchor in batch) == reference_anchors(recording, **OPTIONS)
