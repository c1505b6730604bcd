"""Where a store's bytes are, told from its page indexes, against the files that there are."""

from __future__ import annotations

import numpy as np

import trajstore

LENGTHS = [4, 5, 6, 7]


def filled(folder):
    with trajstore.open(folder, "x") as store:
        for length in LENGTHS:
            store.append({"obs": np.zeros((length, 3), np.float32), "reward": np.arange(length)})
    return folder


def bytes_under(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_what_several_rows_of_the_table_name_counts_once(tmp_path):
    whole = filled(tmp_path / "a")
    trajstore.merge([whole, whole, whole], tmp_path / "thrice")
    with trajstore.open(whole) as one, trajstore.open(tmp_path / "thrice") as many:
        once, thrice = one.usage(), many.usage()
    assert (thrice.trajectories, thrice.steps) == (3 * len(LENGTHS), 3 * sum(LENGTHS))
    assert (thrice.segments, thrice.segment_bytes) == (1, bytes_under(whole / "segments"))
    assert thrice.objects == once.objects
    assert {name: found.rows for name, found in once.objects.items()} == {
        "obs": sum(LENGTHS),
        "steps.arrow": sum(LENGTHS),
    }


def test_a_segment_that_is_named_with_layers_and_without_counts_once(tmp_path):
    whole = filled(tmp_path / "a")
    with trajstore.open(whole, "a") as store:
        store.trajectories[1:].save(tmp_path / "before")  # refers to the segment as it is now
        store.add_column("return", lambda t: t["reward"][::-1].cumsum()[::-1], columns=["reward"])
        expected = store.usage()
    trajstore.merge([tmp_path / "before", whole], tmp_path / "both")
    with trajstore.open(tmp_path / "both") as store:
        found = store.usage()
        assert len(store._table.segments) == 2
    assert (found.segments, found.segment_bytes) == (1, bytes_under(whole / "segments"))
    assert found.objects == expected.objects
    assert found.objects["return"].rows == sum(LENGTHS)
