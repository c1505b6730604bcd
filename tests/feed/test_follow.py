"""Loaders that follow: what they number, what they go on with, and what they do when commits fail."""

import numpy as np
import pytest
import torch

import trajstore
from trajstore.opening import open_on
from trajstore.read.selection import Selection
from trajstore.storage.connect import connect

COLUMNS = ["obs", "action", "trajectory", "step"]


def recorded(seed, length=20):
    return {"obs": np.arange(length + 1) + 1000 * seed, "action": np.full((length, 2), seed, np.int16)}


def drawn(loader, batches=1):
    """Trajectories seen, after every window was held against the trajectory whose number it gives."""
    seen = set()
    for _ in range(batches):
        batch = next(loader)
        seeds, steps = batch["action"][:, 0, 0].long(), batch["step"]
        assert torch.equal(batch["obs"], 1000 * seeds[:, None] + steps)
        assert torch.equal(batch["action"], seeds[:, None, None].expand(-1, 4, 2).short())
        seen |= set(zip(batch["trajectory"][:, 0].tolist(), seeds.tolist(), strict=True))
    return seen


@pytest.fixture
def store(tmp_path):
    with trajstore.open(tmp_path / "store", "a") as store:
        yield store


@pytest.mark.parametrize("order", ["random", "prioritized"])
def test_numbers_of_trajectories_stay_while_a_window_of_them_moves_on(store, order):
    for seed in range(5):
        store.append(recorded(seed))
    view = store.trajectories.last(3)
    numbers = {}
    with view.loader(128, window=4, order=order, follow=True, columns=COLUMNS, prefetch=0) as loader:
        for seed in range(5, 40):
            seen = drawn(loader)
            assert {s for _, s in seen} == {seed - 3, seed - 2, seed - 1}
            for number, s in seen:
                assert numbers.setdefault(number, s) == s
            store.append(recorded(seed))
            if seed % 7 == 0:
                store.flush()
    assert len(set(numbers.values())) == len(numbers)


def test_what_a_filter_chooses_is_chosen_again(store):
    store.append(recorded(0), task="pick")
    view = store.trajectories.filter("task in @tasks", tasks=["pick"])
    with view.loader(64, window=4, follow=True, columns=COLUMNS, prefetch=0) as loader:
        for seed in range(1, 12):
            store.append(recorded(seed), task="pick" if seed % 3 == 0 else "place")
            assert {s for _, s in drawn(loader)} == set(range(0, seed + 1, 3))


def test_a_view_chosen_by_position_cannot_be_followed(store):
    store.append(recorded(0))
    store.flush()
    with pytest.raises(trajstore.SelectionError, match="chosen by position"):
        store.trajectories.take([0]).loader(4, follow=True)


def test_a_state_of_a_following_loader_is_taken_up_by_a_later_version(tmp_path):
    with trajstore.open(tmp_path / "s", "a") as store:
        for seed in range(6):
            store.append(recorded(seed))
        view = store.trajectories.last(4)
        with view.loader(32, window=4, order="prioritized", alpha=1.0, follow=True, columns=COLUMNS) as loader:
            for _ in range(4):
                batch = next(loader)
                loader.update_priorities(batch["index"], (batch["action"][:, 0, 0] == 3) * 1000.0 + 1e-3)
            state = loader.state_dict()
            assert state["trajectories"]["id"].tolist() == [2, 3, 4, 5]
        store.append(recorded(6))
        store.append(recorded(7))
    with trajstore.open(tmp_path / "s") as store:
        view = store.trajectories.last(4)
        with (
            view.loader(512, window=4, order="prioritized", alpha=1.0, follow=True, columns=COLUMNS) as other,
            pytest.warns(UserWarning, match="has changed"),
            pytest.raises(trajstore.SelectionError, match="another order"),
        ):
            other.load_state_dict(state)
        with view.loader(32, window=4, order="prioritized", alpha=1.0, follow=True, columns=COLUMNS) as loader:
            with pytest.warns(UserWarning, match="it had 4 trajectories, and now has 4"):
                loader.load_state_dict(state)
            seen = [s for _ in range(40) for s in next(loader)["action"][:, 0, 0].tolist()]
    # 2 and 3 are gone; 4 and 5 keep their small priorities; 6 and 7 are new and have the largest.
    assert set(seen) <= {4, 5, 6, 7}
    assert sum(s in (6, 7) for s in seen) > 0.8 * len(seen)


def test_an_episode_too_long_for_memory_is_seen_as_soon_as_it_ends(tmp_path):
    with trajstore.open(tmp_path / "s", "a", spill_bytes=1 << 12) as store:
        store.append(recorded(0))
        assert len(store.trajectories) == 1
        with store.begin() as episode:
            for step in range(2000):
                episode.add(obs=1000 + step, action=np.full(2, 1, np.int16))
            episode.end(3000)
        view = store.trajectories
        assert view.lengths.tolist() == [20, 2000]
        assert np.array_equal(view[1]["obs"][:], 1000 + np.arange(2001))


def test_what_does_not_fit_beside_a_window_is_committed_and_seen_all_the_same(tmp_path):
    with trajstore.open(tmp_path / "s", "a", cache_bytes=3 << 20) as store:
        store.append({"frame": np.zeros((40, 64, 64), np.uint8)})
        with store.trajectories.loader(4, window=2, follow=True, columns=["frame", "trajectory"], prefetch=0) as loader:
            next(loader)
            for number in range(1, 30):
                store.append({"frame": np.full((40, 64, 64), number, np.uint8)})
                assert len(store.trajectories) == number + 1
                batch = next(loader)
                assert torch.equal(batch["frame"][..., 0, 0].long(), batch["trajectory"])
            assert loader.stats().cache.used_bytes <= 3 << 20
            assert store.version > 1


def test_a_failed_commit_takes_its_trajectories_out_of_later_views(tmp_path):
    filesystem = connect(tmp_path / "s")
    with open_on(filesystem, "a") as store:
        store.append(recorded(0))
        store.flush()
        view = store.trajectories
        with view.loader(64, window=4, follow=True, columns=COLUMNS, prefetch=0) as loader:
            store.append(recorded(1))
            assert {s for _, s in drawn(loader)} == {0, 1}
            whole, filesystem.store = filesystem.store, refuse
            with pytest.raises(trajstore.TrajstoreError, match="not in the store"):
                store.flush()
            filesystem.store = whole
            assert len(store.trajectories) == 1
            assert {s for _, s in drawn(loader)} == {0}
            store.append(recorded(2))
            store.flush()
            assert {s for _, s in drawn(loader)} == {0, 2}


def refuse(*_):
    raise trajstore.StorageError("the disk is gone; put it back")


def test_a_selection_knows_whether_it_extends_another(store):
    store.append(recorded(0))
    one = store.trajectories
    store.append(recorded(1))
    two = store.trajectories
    first, second = one._selection, two._selection
    assert second.extends(first)
    assert not first.extends(second)
    assert not Selection(second.table, second.rows[::-1]).extends(first)


def test_a_store_without_trajectories_says_so(store):
    with pytest.raises(trajstore.SelectionError, match="holds no trajectories"):
        store.trajectories.loader(4)
