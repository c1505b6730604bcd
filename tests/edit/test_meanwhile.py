"""Edits beside edits, and stores at two places: each case was found by the machine (``test_machine``), and is told here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trajstore
from tests.edit.stores import append, assert_holds, filled, holds
from trajstore.errors import CommitError
from trajstore.format import layout
from trajstore.storage.local import LocalFilesystem


def meanwhile(url: str, act: Any) -> Any:
    """A function for ``add_column`` beside whose first call somebody else acts."""
    done: list[bool] = []

    def function(trajectory: dict[str, Any]) -> Any:
        if not done:
            done.append(True)
            with trajstore.open(url, "a") as other:
                act(other)
        return trajectory["reward"] + 1

    return function


def computed(store: trajstore.Store) -> list[list[float]]:
    return [t["more"][:].tolist() for t in store.trajectories]


def expected(store: trajstore.Store) -> list[list[float]]:
    return [(t["reward"][:] + 1).tolist() for t in store.trajectories]


def test_a_store_that_is_cleared_while_a_column_is_computed_takes_other_columns(tmp_path: Path) -> None:
    url = filled(tmp_path / "store", range(3))
    with trajstore.open(url, "a") as store:
        store.add_column("more", meanwhile(url, lambda other: other.clear()), columns=["reward"], threads=1)
        assert store.num_trajectories == 0
    with trajstore.open(url, "a") as store:
        store.append({"action": np.arange(3)})
        store.flush()
        assert set(store.trajectories[0].columns) == {"action"}


def test_what_is_restored_while_a_column_is_computed_is_not_given_zeros(tmp_path: Path) -> None:
    url = filled(tmp_path / "store", range(6), per_commit=6)
    with trajstore.open(url, "a") as store:
        store.delete([1, 4])
        store.add_column("more", meanwhile(url, lambda other: other.restore(1)), columns=["reward"], threads=1)
        store.refresh()
        assert store.num_trajectories == 6
        store.add_column("more", lambda t: t["reward"] + 1, columns=["reward"])
        assert computed(store) == expected(store)


def restore_with_old_values(store: trajstore.Store) -> None:
    store.restore(2)


def compact(store: trajstore.Store) -> None:
    store.compact()


@pytest.mark.parametrize("act", [restore_with_old_values, compact])
def test_no_version_mixes_values_that_are_replaced_with_old_ones(tmp_path: Path, act: Any) -> None:
    url = filled(tmp_path / "store", range(6), per_commit=6)
    with trajstore.open(url, "a") as store:
        assert store.add_column("more", lambda t: t["reward"] * 0, columns=["reward"]) == 2
        store.delete([1, 2, 3, 4])
        with pytest.raises(CommitError, match="do it again"):
            store.add_column("more", meanwhile(url, act), columns=["reward"], replace=True, threads=1)
        store.refresh()
        assert all(not any(values) for values in computed(store))
        store.add_column("more", lambda t: t["reward"] + 1, columns=["reward"], replace=True)
        assert computed(store) == expected(store)


def test_a_handle_whose_version_was_emptied_compacts_the_latest(tmp_path: Path) -> None:
    url = filled(tmp_path / "store", range(4))
    with trajstore.open(url, "a") as late, trajstore.open(url, "a") as other:
        other.delete([0], reclaim=True)
        other.compact()
        other.delete([1], reclaim=True)
        late.compact()
        assert late.retain(last=1) == 1
    holds(url, [3])


def test_a_pin_stays_as_long_as_its_owner_is_needed_at_any_of_its_places(tmp_path: Path) -> None:
    """The owner was moved, and its old place leads to the new one: old versions of the borrower name the same pin there."""
    owner = tmp_path / "old"
    filled(owner, range(4))
    trajstore.merge([owner], tmp_path / "borrower", share="reference")
    owner.rename(tmp_path / "new")
    owner.symlink_to(tmp_path / "new")
    with trajstore.open(tmp_path / "borrower", "a") as store:
        store.relocate(owner, tmp_path / "new")
        store.vacuum("0s", keep_versions=1, keep_for="0s", exclusive=True)
    with trajstore.open(tmp_path / "new", "a") as store:
        assert len(store.pins()) == 1
        store.delete(range(4), reclaim=True)
    with trajstore.open(tmp_path / "borrower", "a") as store:
        assert store.verify(deep=True).ok
        assert [t["action"][0, 0] for t in store.trajectories] == [0, 1, 2, 3]
        append(store, 9)
        store.flush()
        store.delete(range(4))
        store.vacuum("0s", keep_versions=1, keep_for="0s", exclusive=True)
        assert_holds(store.trajectories, [9])
    with trajstore.open(tmp_path / "new") as store:
        assert not len(store.pins())


def test_versions_that_others_make_and_vacuum_while_the_latest_is_looked_for(tmp_path: Path, monkeypatch: Any) -> None:
    url = filled(tmp_path / "store", range(2))
    reads = LocalFilesystem.read_many
    done: list[bool] = []

    def beside(self: LocalFilesystem, keys: Any) -> Any:
        keys = list(keys)
        if keys == [layout.snapshot_key(4)] and not done:  # after 5 was not there
            done.append(True)
            for number in (3, 4):
                append(writer, number)
                writer.flush()
            writer.vacuum(keep_versions=1, keep_for="0d")
        return reads(self, keys)

    with trajstore.open(url) as reader, trajstore.open(url, "a") as writer:
        append(writer, 2)
        writer.flush()
        monkeypatch.setattr(LocalFilesystem, "read_many", beside)
        assert reader.refresh() == 5
        assert done
        assert_holds(reader.trajectories, range(5))
