"""Codecs: a closed list, each the inverse of itself, and none that fills a page with anything but what was written."""

from __future__ import annotations

import numcodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trajstore import Column, CorruptionError, SchemaError
from trajstore.format import codecs
from trajstore.format.codecs import ARROW_CODECS, CODECS, PRESETS
from trajstore.schema import CODEC_NAMES

names = pytest.mark.parametrize("name", CODECS)
DTYPES = ["uint8", "bool", "int16", "float32", "float64", "complex128"]


def page_of(data: bytes, dtype: str) -> np.ndarray:
    raw = np.frombuffer(data, np.uint8)
    return (raw & 1).astype(bool) if dtype == "bool" else raw[: len(raw) // 16 * 16].view(dtype)


def test_the_list_is_closed():
    assert tuple(CODECS) == CODEC_NAMES
    for name in ("gzip", "pickle", "blosc", "numcodecs.zstd", ""):
        with pytest.raises(SchemaError, match="expected one of none, lz4"):
            codecs.codec_named(name)
        with pytest.raises(SchemaError, match="column 'a': codec"):
            Column(path="a", dtype="uint8", shape=(2,), codec=name)


@names
@given(data=st.binary(min_size=16, max_size=5000), dtype=st.sampled_from(DTYPES), repeat=st.integers(1, 40))
def test_decoding_is_the_inverse_of_encoding(name, data, dtype, repeat):
    page = np.tile(page_of(data, dtype), repeat)
    stored = bytes(CODECS[name].encode(page))
    for given_as in (stored, memoryview(stored), memoryview(b"x" + stored)[1:]):
        out = np.full_like(page, 1)
        CODECS[name].decode_into(given_as, out)
        assert out.tobytes() == page.tobytes()


@pytest.mark.parametrize("nbytes", [1, 15, 255, 256, 257, 65535, 65536, 65791, 65792, 1 << 20])
@names
def test_pages_of_every_size_round_trip(name, nbytes):
    page = np.random.default_rng(nbytes).integers(0, 4, nbytes, dtype=np.uint8)
    out = np.empty_like(page)
    CODECS[name].decode_into(bytes(CODECS[name].encode(page)), out)
    assert (out == page).all()


@names
def test_pages_of_many_dimensions_round_trip(name):
    page = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    out = np.empty_like(page)
    CODECS[name].decode_into(bytes(CODECS[name].encode(page)), out)
    assert (out == page).all()


@names
@pytest.mark.parametrize("found", [1, 63, 65, 128, 256])
def test_a_page_of_another_size_is_refused(name, found):
    stored = bytes(CODECS[name].encode(np.arange(64, dtype=np.uint8)))
    with pytest.raises(CorruptionError, match=f"64 .*expected {found}"):
        CODECS[name].decode_into(stored, np.zeros(found, np.uint8))


@names
def test_a_page_cut_anywhere_is_refused(name):
    page = np.random.default_rng(0).integers(0, 4, 400, dtype=np.uint8)
    stored = bytes(CODECS[name].encode(page))
    for size in range(len(stored)):
        with pytest.raises(CorruptionError):
            CODECS[name].decode_into(stored[:size], np.empty_like(page))


@names
@given(noise=st.binary(max_size=64))
def test_noise_is_refused(name, noise):
    if name != "none":
        with pytest.raises(CorruptionError):
            CODECS[name].decode_into(noise, np.empty(1000, np.uint8))


@names
def test_other_readers_decode_the_same_bytes(name):
    page = np.arange(1000, dtype=np.float64)
    stored = bytes(CODECS[name].encode(page))
    if name == "none":
        assert stored == page.tobytes()
        return
    (described,) = CODECS[name].zarr_json(8)
    other = numcodecs.get_codec({"id": described["name"]})
    assert bytes(other.decode(stored)) == page.tobytes()


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_every_preset_gives_codecs_of_the_list(preset):
    codecs.check_preset(preset)
    assert codecs.arrow_codec(preset) in ARROW_CODECS
    for dtype in DTYPES:
        column = Column(path="a", dtype=dtype, shape=(7,))
        assert codecs.tensor_codec(column, preset) in CODECS.values()
    own = Column(path="a", dtype="float32", shape=(7,), codec="zstd-bitshuffle")
    assert codecs.tensor_codec(own, preset).name == "zstd-bitshuffle"


def test_an_unknown_preset_is_an_error():
    with pytest.raises(SchemaError, match=r"codec='best', expected None .* fast, small, none"):
        codecs.check_preset("best")


@given(st.floats(0, 1e12, allow_nan=False), st.integers(0, 1 << 24))
def test_page_rows_are_the_largest_power_of_two_that_fits(row_bytes, target):
    rows = codecs.power_of_two_rows(row_bytes, target)
    fitting = [1 << n for n in range(17) if (1 << n) * max(row_bytes, 1) <= target]
    assert rows == max(fitting, default=1)
