"""Pages of a bucket kept on a local disk: read once by all processes of a machine, and again where they are damaged."""

from __future__ import annotations

import itertools

import pytest
import torch

import trajstore
from tests.s3.trajectories import trajectory
from tests.support.recordings import flat_batch

OPTIONS = {"window": 3, "order": "shuffle", "seed": 1}


@pytest.fixture
def filled(open_store):
    """A store of two segments."""
    with open_store("x") as store:
        for seed in range(24):
            store.append(trajectory(seed), terminated=True)
            if seed == 11:
                store.flush()
    return open_store


def epoch(open_store, **knobs):
    """Batches of one epoch through a new handle."""
    with open_store(**knobs) as store:
        return list(store.trajectories.loader(32, **OPTIONS))


def assert_same(found, expected):
    for batch, other in itertools.zip_longest(found, expected):
        flat, wanted = flat_batch(batch), flat_batch(other)
        assert sorted(flat) == sorted(wanted)
        assert all(torch.equal(flat[name], value) for name, value in wanted.items())


def step_data(log):
    """Requests of pages; page indexes are small and read by every handle."""
    return [r for r in log if "/segments/" in r.key and not r.key.endswith("pages.arrow")]


def page_files(folder):
    return [p for p in folder.rglob("*") if p.is_file() and "-" in p.name and not p.name.startswith(".")]


def test_a_second_handle_reads_no_page_from_the_bucket(s3, filled, tmp_path):
    expected = epoch(filled)
    with s3.recording() as first:
        assert_same(epoch(filled, cache_dir=tmp_path), expected)
    assert step_data(first)
    assert page_files(tmp_path)
    with s3.recording() as second:
        assert_same(epoch(filled, cache_dir=tmp_path), expected)
    assert not step_data(second), str(second)
    for log in (first, second):
        assert log.by_method()["HEAD"] == 0, str(log)
        assert log.by_method()["GET"] == len(log), str(log)


def test_no_page_is_read_twice_by_one_handle(s3, filled):
    with filled() as store, s3.recording() as log:
        view = store.trajectories
        expected = list(view.loader(32, **OPTIONS))
        pages = step_data(log)
        assert len({(r.key, r.range) for r in pages}) == len(pages) > 0, str(log)
        assert_same(view.loader(32, **OPTIONS), expected)
        assert step_data(log) == pages


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "zeros"])
def test_a_damaged_page_is_fetched_again_and_mended(s3, filled, tmp_path, damage):
    expected = epoch(filled, cache_dir=tmp_path)
    kept = sorted(page_files(tmp_path))
    spoiled = kept[:: max(1, len(kept) // 3)]
    for path in spoiled:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes({"flipped": data, "cut": data[:-1], "empty": b"", "zeros": bytes(len(data))}[damage])
    with s3.recording() as log:
        assert_same(epoch(filled, cache_dir=tmp_path), expected)
    assert 1 <= len(step_data(log)) <= len(spoiled), str(log)
    with s3.recording() as log:
        assert_same(epoch(filled, cache_dir=tmp_path), expected)
    assert not step_data(log), str(log)


def test_a_folder_shared_by_two_stores(s3, filled, bucket, options, tmp_path):
    """Pages are kept under the store's address too."""
    expected = epoch(filled, cache_dir=tmp_path)
    url = f"s3://{bucket}/runs/other"
    with trajstore.open(url, "x", storage_options=options) as store:
        store.append(trajectory(99))
    with trajstore.open(url, storage_options=options, cache_dir=tmp_path) as store:
        (batch,) = store.trajectories.loader(32, order="sequential", columns=["action"])
        torch.testing.assert_close(batch["action"].numpy(), trajectory(99)["action"], rtol=0, atol=0)
    assert_same(epoch(filled, cache_dir=tmp_path), expected)
