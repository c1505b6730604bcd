"""The page index and Arrow pages: there and back, and an error for whatever is neither."""

from __future__ import annotations

import json

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.kinds import every_kind
from tests.support.strategies import bits, columns, rows
from trajstore import CorruptionError
from trajstore.format import pages
from trajstore.format.codecs import CODECS
from trajstore.format.pages import PageSource
from trajstore.stored import to_user
from trajstore.values import check_rows, rows_of

SOURCES = [
    {"object": "obs/image/c.0.0", "columns": ["obs/image"], "rows": 7, "page_rows": 4, "codec": "zstd"},
    {"object": "steps.arrow", "columns": ["action", "reward"], "rows": 6, "page_rows": 8, "codec": "lz4"},
]


def index_file(sources=SOURCES, *, key=b"trajstore.sources", text=None, number=(0, 0, 1), drop=None):
    """``pages.arrow`` built by hand."""
    table = {"source": number, "offset": (0, 50, 80), "nbytes": (50, 20, 9), "crc32c": (1, 2**32 - 1, 3)}
    types = {"source": pa.int32(), "offset": pa.int64(), "nbytes": pa.int64(), "crc32c": pa.uint32()}
    arrays = {name: pa.array(values, types[name]) for name, values in table.items() if name != drop}
    described = pa.table(arrays).replace_schema_metadata({key: json.dumps(sources) if text is None else text})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, described.schema) as writer:
        writer.write_table(described)
    return sink.getvalue().to_pybytes()


def plain(source: PageSource):
    arrays = [source.offsets.tolist(), source.nbytes.tolist(), source.crc32c.tolist()]
    return (source.object, source.columns, source.rows, source.page_rows, source.codec, *arrays)


def test_an_index_built_by_hand_is_understood():
    assert [plain(source) for source in pages.decode_page_index(index_file())] == [
        ("obs/image/c.0.0", ("obs/image",), 7, 4, "zstd", [0, 50], [50, 20], [1, 2**32 - 1]),
        ("steps.arrow", ("action", "reward"), 6, 8, "lz4", [80], [9], [3]),
    ]


@st.composite
def page_sources(draw):
    page_rows, count = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    total = draw(st.integers((count - 1) * page_rows + 1, count * page_rows))
    numbers = st.lists(st.integers(0, 2**62), min_size=count, max_size=count)
    arrow = draw(st.booleans())
    return PageSource(
        "steps.arrow" if arrow else draw(st.sampled_from(["a/c.0", "b/ü/c.0.0"])),
        tuple(draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=3))),
        total,
        page_rows,
        draw(st.sampled_from(["none", "lz4", "zstd"] if arrow else list(CODECS))),
        np.array(draw(numbers), np.int64),
        np.array(draw(numbers), np.int64),
        np.array([n % 2**32 for n in draw(numbers)], np.uint32),
    )


@given(st.lists(page_sources(), min_size=1, max_size=4))
def test_decoding_an_index_is_the_inverse_of_encoding(sources):
    found = pages.decode_page_index(pages.encode_page_index(sources))
    assert [plain(s) for s in found] == [plain(s) for s in sources]
    for source in found:
        held = [source.rows_of_page(n) for n in range(len(source.offsets))]
        assert sum(held) == source.rows
        assert all(n == source.page_rows for n in held[:-1])
        assert source.stored_bytes == sum(source.nbytes.tolist())


def changed(number, **members):
    return [{**s, **members} if n == number else s for n, s in enumerate(SOURCES)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read"),
        (b"ARROW1\0\0", "cannot be read"),
        (index_file()[:-9], "cannot be read"),
        (index_file(key=b"other"), "cannot be read"),
        (index_file(text="{"), "cannot be read"),
        (index_file(text="7"), "cannot be read"),
        (index_file(text="[7]"), "cannot be read"),
        (index_file(drop="crc32c"), "cannot be read"),
        (index_file([{}, {}]), "cannot be read"),
        (index_file(changed(0, page_rows=0)), "cannot be read"),
        (index_file(changed(0, rows="7")), "cannot be read"),
        (index_file(changed(0, rows=9)), r"obs/image/c\.0\.0 has 2 pages for 9 rows"),
        (index_file(number=(0, 1, 1)), r"obs/image/c\.0\.0 has 1 pages for 7 rows"),
        (index_file(changed(0, codec="pickle")), r"codec 'pickle' of obs/image/c\.0\.0 is not one of none, lz4"),
        (index_file(changed(0, codec=None)), r"codec None of obs/image/c\.0\.0 is not one of none, lz4"),
        (
            index_file(changed(1, codec="lz4-shuffle")),
            r"codec 'lz4-shuffle' of steps\.arrow is not one of none, lz4, zstd$",
        ),
    ],
)
def test_what_is_no_index_is_corruption(data, message):
    with pytest.raises(CorruptionError, match=message):
        pages.decode_page_index(data)


def record_batch(chosen, count, seed, codec):
    rng = np.random.default_rng(seed)
    given_rows = {c.path: rows(rng, c, count) for c in chosen}
    stored = {c.path: check_rows(c, rows_of(c.path, given_rows[c.path], c)) for c in chosen}
    return given_rows, message_of(pages.encode_record_batch(chosen, stored), codec)


def message_of(batch, codec):
    """The record-batch message alone, between the schema's and the end of the stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pages.ipc_options(codec)) as writer:
        writer.write_batch(batch)
    data = sink.getvalue().to_pybytes()
    reader = pa.BufferReader(data)
    pa.ipc.read_message(reader)
    return data[reader.tell() : -8]


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
@given(found=columns(), count=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_decoding_a_record_batch_is_the_inverse_of_encoding(codec, found, count, seed):
    chosen = tuple(c for c in found if c.stored_in == "arrow")
    if not chosen:
        return
    given_rows, data = record_batch(chosen, count, seed, codec)
    decoded = pages.decode_record_batch(chosen, data, codec=codec)
    for column in chosen:
        back, rows_given = to_user(column, decoded[column.path]), given_rows[column.path]
        if column.ragged and column.dtype not in ("string", "bytes"):
            assert [bits(a) for a in back] == [bits(a) for a in rows_given]
        elif column.is_variable:
            assert [list(a) if column.ragged else a for a in back] == rows_given
        else:
            assert bits(back) == bits(rows_given)


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_what_is_no_record_batch_is_corruption(codec):
    chosen = tuple(c for c in every_kind() if c.stored_in == "arrow" and not c.ragged and not c.extra)
    _, data = record_batch(chosen, 3, 0, codec)
    for bad in (b"", bytes(8), bytes(data)[: len(data) // 2], bytes(data)[8:]):
        with pytest.raises(CorruptionError, match="not a record batch of steps/fixed/bool_0d"):
            pages.decode_record_batch(chosen, bad, codec=codec)


@given(st.binary(max_size=100))
def test_the_checksum_is_crc32c(data):
    expected = int.from_bytes(google_crc32c.Checksum(data).digest(), "big")
    assert pages.checksum(data) == pages.checksum(memoryview(b"x" + data)[1:]) == expected


def test_the_checksum_of_the_standard_example():
    assert pages.checksum(b"123456789") == 0xE3069283  # RFC 3720, and every catalogue of CRCs
    assert pages.checksum(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
