"""Zarr: our templates are what zarr-python writes for the same arrays, and it reads our segments without a complaint."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import torch
import zarr
from zarr.codecs import BloscCodec, BytesCodec, ShardingCodec, ZstdCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

import trajstore
from tests.support.kinds import NUMERIC
from tests.support.strategies import numbers
from trajstore import Column
from trajstore.format.codecs import CODECS, Codec
from trajstore.format.zarr_metadata import ZarrArray, group_documents

SHAPES = [(), (3,), (2, 1, 2)]


def column(dtype, shape, codec=None, *, extra=0):
    return Column(path="obs/x", dtype=dtype, shape=shape, extra=extra, codec=codec)


def written_by_zarr(array: ZarrArray):
    """The metadata that zarr-python writes for the same array, asked for in its own words."""
    itemsize = array.column.physical_dtype.itemsize
    codec = array.codec
    if codec.compressor == "none":
        compressors = []
    elif codec.compressor == "zstd":
        compressors = [ZstdCodec(level=codec.level, checksum=False)]
    else:
        compressors = [
            BloscCodec(typesize=itemsize, cname=codec.cname, clevel=codec.level, shuffle=codec.shuffle, blocksize=0)
        ]
    store = MemoryStore()
    zarr.create_array(
        store,
        shape=(array.rows, *array.column.shape),
        dtype=array.column.physical_dtype,
        chunks=(array.page_rows, *array.column.shape),
        shards=(array.pages * array.page_rows, *array.column.shape),
        compressors=compressors,
        filters=[],
        serializer=BytesCodec() if itemsize > 1 else BytesCodec(endian=None),
        chunk_key_encoding={"name": "default", "separator": "."},
        attributes={"dtype": array.column.dtype, "extra": array.column.extra},
        zarr_format=3,
    )
    return parsed(store, "zarr.json")


def parsed(store, key):
    buffer = asyncio.run(store.get(key, default_buffer_prototype()))
    return json.loads(buffer.to_bytes())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", NUMERIC)
def test_the_template_is_what_zarr_writes_for_every_dtype(dtype, shape):
    array = ZarrArray(column(dtype, shape or (1,)), rows=10, page_rows=4, codec=CODECS["zstd"])
    assert array.metadata() == written_by_zarr(array)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "complex128"])
@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
def test_the_template_is_what_zarr_writes_for_every_codec(dtype, codec: Codec):
    array = ZarrArray(column(dtype, (5,), extra=1), rows=8, page_rows=8, codec=codec)
    assert array.metadata() == written_by_zarr(array)


@pytest.mark.parametrize(("rows", "page_rows"), [(1, 1), (1, 64), (64, 64), (65, 64), (1000, 64)])
def test_the_template_is_what_zarr_writes_for_every_length(rows, page_rows):
    array = ZarrArray(column("float32", (5,)), rows=rows, page_rows=page_rows, codec=CODECS["lz4-shuffle"])
    assert array.metadata() == written_by_zarr(array)
    assert isinstance(zarr.core.metadata.ArrayV3Metadata.from_dict(array.metadata()).codecs[0], ShardingCodec)


def test_the_groups_are_what_zarr_writes_and_consolidates():
    arrays = [
        ZarrArray(Column(path=path, dtype="uint8", shape=(2,)), rows=3, page_rows=2, codec=CODECS["zstd"])
        for path in ("obs/camera/left", "obs/state", "action")
    ]
    ours = {key: json.loads(data) for key, data in group_documents(arrays).items()}
    store = MemoryStore()
    zarr.create_group(store, zarr_format=3)
    for array in arrays:
        zarr.open_group(store, mode="a").require_group("/".join(array.column.path.split("/")[:-1]) or "/")
        zarr.create_array(store, name=array.column.path, shape=(3, 2), dtype="u1", chunks=(2, 2), shards=(4, 2))
    with pytest.warns(UserWarning, match="not part in the Zarr format 3"):  # of zarr, about its own writing
        zarr.consolidate_metadata(store)
    theirs = {key: parsed(store, key) for key in ours}
    assert {k: v.get("node_type") for k, v in ours.items()} == {k: v.get("node_type") for k, v in theirs.items()}
    root, root_of_zarr = ours["zarr.json"], theirs["zarr.json"]
    assert root.keys() == root_of_zarr.keys()
    assert {k: root[k] for k in root if k != "consolidated_metadata"} == {
        k: root_of_zarr[k] for k in root_of_zarr if k != "consolidated_metadata"
    }
    members, members_of_zarr = root["consolidated_metadata"], root_of_zarr["consolidated_metadata"]
    assert {k: members[k] for k in ("kind", "must_understand")} == {
        k: members_of_zarr[k] for k in ("kind", "must_understand")
    }
    assert set(members["metadata"]) == set(members_of_zarr["metadata"])
    for path, metadata in members["metadata"].items():
        assert metadata == ours[f"{path}/zarr.json"], "consolidated is what the members say"
    # Groups match member by member, too; zarr notes in each that there is nothing below it to consolidate.
    assert ours["obs/zarr.json"].items() <= theirs["obs/zarr.json"].items()


@pytest.fixture(scope="module")
def segment(tmp_path_factory):
    """A segment with a column per codec, and what was appended."""
    path = tmp_path_factory.mktemp("zarr") / "store"
    rng = np.random.default_rng(0)
    schema = [
        Column(path=f"{dtype}/{codec}", dtype=dtype, shape=(3,), codec=codec, page_rows=4)
        for dtype in ("uint8", "float32", "complex64", "bool")
        for codec in CODECS
    ]
    appended = {c.path: numbers(rng, c.dtype, (10, 3)) for c in schema}
    with trajstore.open(path, "x", schema=schema) as store:
        store.append(appended)
    (folder,) = (path / "segments").iterdir()
    return folder, appended


@pytest.mark.parametrize("consolidated", [True, False, None])
def test_zarr_reads_a_segment_with_and_without_consolidated_metadata(segment, consolidated):
    folder, appended = segment
    group = zarr.open_group(str(folder), mode="r", use_consolidated=consolidated)
    if consolidated is False:  # it lists the folder then, and remarks that pages.arrow is none of its own
        with pytest.warns(zarr.errors.ZarrUserWarning, match=r"pages\.arrow is not recognized"):
            members = dict(group.members(max_depth=None))
    else:
        members = dict(group.members(max_depth=None))
    assert {path for path, member in members.items() if isinstance(member, zarr.Array)} == set(appended)
    for path, values in appended.items():
        assert group[path][:].tobytes() == values.tobytes(), path
        assert group[path][3:7].tobytes() == values[3:7].tobytes(), path


def test_open_consolidated_needs_the_root_only(segment, tmp_path):
    folder, appended = segment
    group = zarr.open_consolidated(str(folder))
    assert group.metadata.consolidated_metadata is not None
    assert {p for p, m in group.members(max_depth=None) if isinstance(m, zarr.Array)} == set(appended)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "zarr.json").write_bytes((folder / "zarr.json").read_bytes())
    assert len(dict(zarr.open_consolidated(str(alone)).members(max_depth=None))) == len(appended) + 4


def test_logical_dtypes_are_in_the_attributes(tmp_path):
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    times = np.arange(12).astype("datetime64[ms]").reshape(4, 3)
    with trajstore.open(tmp_path / "s", "x") as store:
        store.append({"b": values, "t": times, "plain": np.zeros((5, 2))})
    (folder,) = (tmp_path / "s" / "segments").iterdir()
    group = zarr.open_group(str(folder), mode="r")
    assert dict(group["b"].attrs) == {"dtype": "bfloat16", "extra": 0}
    assert dict(group["plain"].attrs) == {"dtype": "float64", "extra": 1}
    assert torch.equal(torch.from_numpy(group["b"][:]).view(torch.bfloat16), values)
    assert (group["t"][:].view(group["t"].attrs["dtype"]) == times).all()
