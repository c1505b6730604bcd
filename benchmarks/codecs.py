"""Which codec and page size should be the default for which data.

For every kind of data, page size and codec: the ratio, and the speed of encoding and of decoding into memory
that is there already, on one thread and on one per core. Each thread takes its own share of the pages, the
codecs' own threads are switched off, and codecs are run in turn on the same pages.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import google_crc32c
import numcodecs.blosc
import numpy as np
import pyarrow as pa
from numcodecs import LZ4, Blosc, Zstd

from benchmarks import data
from benchmarks.harness import Contender, Context, Measurement, Report, cores

T = TypeVar("T")

PAGE_BYTES = (1 << 16, 1 << 17, 1 << 18, 1 << 19)
ARROW_ROWS = (1024, 4096, 16384)
SHUFFLES = {"no": Blosc.NOSHUFFLE, "byte": Blosc.SHUFFLE, "bit": Blosc.BITSHUFFLE}


class Codec(Protocol):
    """What this benchmark needs of a codec of numcodecs."""

    def encode(self, buf: Any) -> Any:
        """A page, stored."""

    def decode(self, buf: Any, out: Any = None) -> Any:
        """A stored page, put into ``out``."""


class NoCodec:
    """Stored as it is: one copy each way, as a page that is written or read costs."""

    def encode(self, buf: Any) -> Any:
        """A copy as bytes."""
        return buf.tobytes()

    def decode(self, buf: Any, out: Any = None) -> Any:
        """A copy into ``out``."""
        flat = out.reshape(-1).view(np.uint8)
        flat[:] = np.frombuffer(buf, np.uint8)
        return out


def codecs() -> dict[str, Codec]:
    """The codecs that are compared, by the name used in the results."""
    found: dict[str, Codec] = {
        "none": NoCodec(),
        "zstd-1": Zstd(1),
        "zstd-3": Zstd(3),
        "zstd-fast1": Zstd(-1),
    }
    found["lz4"] = LZ4()
    found["blosc-zstd-3-byte"] = Blosc("zstd", 3, Blosc.SHUFFLE)
    for inner, level in (("lz4", 5), ("zstd", 1)):
        for name, shuffle in SHUFFLES.items():
            found[f"blosc-{inner}-{level}-{name}"] = Blosc(inner, level, shuffle)
    return found


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of data, and what it stands for."""

    name: str
    family: str  # "frames", "floats" or "integers"
    make: Callable[[], np.ndarray]


def kinds(context: Context) -> list[Kind]:
    """The kinds of data, about 16 MB each (2 MB in a quick run)."""
    budget = context.pick(16 << 20, 2 << 20)

    def rows_of(row_bytes: int) -> int:
        return max(1, budget // row_bytes)

    small, native, state = 64 * 64 * 3, 210 * 160 * 3, 17 * 4
    found = [
        Kind("breakout 64x64x3", "frames", lambda: data.atari_small(rows_of(small), "Breakout")),
        Kind("pong 64x64x3", "frames", lambda: data.atari_small(rows_of(small), "Pong")),
        Kind("ms-pacman 64x64x3", "frames", lambda: data.atari_small(rows_of(small), "MsPacman")),
        Kind("breakout 210x160x3", "frames", lambda: data.atari_native(rows_of(native), "Breakout")),
        Kind("camera 64x64x3", "frames", lambda: data.camera(rows_of(small))),
        Kind("raw camera 64x64x3", "frames", lambda: data.camera(rows_of(small), noise=3.0)),
        Kind("camera 240x320x3", "frames", lambda: data.camera(rows_of(240 * 320 * 3), 240, 320)),
        Kind("robot states f32[17]", "floats", lambda: data.robot_states(rows_of(state))),
        Kind("white noise f32[17]", "floats", lambda: data.white_noise(rows_of(state))),
        Kind("actions i64[2]", "integers", lambda: data.small_integers(rows_of(16))),
        Kind("tokens i32[16]", "integers", lambda: data.tokens(rows_of(64))),
        Kind("masks bool[32]", "integers", lambda: data.masks(rows_of(32))),
    ]
    if data.has_mujoco():
        steps = context.pick(120_000, 10_000)
        found.insert(6, Kind("half-cheetah f32[17]", "floats", lambda: data.mujoco_states(steps)))
    return found


def page_rows(row_bytes: int, page_bytes: int) -> int:
    """The largest power of two of rows that fits in a page, at least one."""
    return 1 << max(0, (page_bytes // row_bytes).bit_length() - 1)


def split_pages(array: np.ndarray, rows: int) -> list[np.ndarray]:
    """The full pages of ``array`` (all of it, where it is shorter than one)."""
    rows = min(rows, len(array))
    return [array[start : start + rows] for start in range(0, len(array) - rows + 1, rows)]


def shares(count: int, threads: int) -> list[range]:
    """``count`` pages cut into one run of pages per thread."""
    edges = np.linspace(0, count, threads + 1).astype(int)
    return [range(low, high) for low, high in itertools.pairwise(edges)]


@dataclasses.dataclass(frozen=True)
class Pages:
    """The pages of one kind at one size, and the memory that they are decoded into."""

    pages: Sequence[np.ndarray]
    outputs: Sequence[np.ndarray]
    pool: ThreadPoolExecutor
    threads: int

    @property
    def nbytes(self) -> int:
        """Raw bytes of all pages."""
        return sum(page.nbytes for page in self.pages)

    def encode(self, codec: Codec, threads: int) -> list[bytes]:
        """Encode every page, on ``threads`` threads."""

        def some(indices: range) -> list[bytes]:
            return [codec.encode(self.pages[index]) for index in indices]

        return [page for part in self._spread(some, threads) for page in part]

    def decode(self, codec: Codec, encoded: Sequence[bytes], threads: int) -> None:
        """Decode every page into its output, on ``threads`` threads."""

        def some(indices: range) -> None:
            for index in indices:
                codec.decode(encoded[index], self.outputs[index])

        self._spread(some, threads)

    def _spread(self, work: Callable[[range], T], threads: int) -> list[T]:
        parts = shares(len(self.pages), threads)
        if threads == 1:
            return [work(parts[0])]
        return list(self.pool.map(work, parts))


def measure_pages(context: Context, kind: Kind, page_bytes: int, pool: ThreadPoolExecutor) -> Iterator[dict[str, Any]]:
    """One row per codec: ratio, and GB of raw data a second, encoding and decoding."""
    array = kind.make()
    row_bytes = array[0].nbytes
    rows = page_rows(row_bytes, page_bytes)
    raw = split_pages(array, rows)
    pages = Pages(raw, [np.zeros_like(page) for page in raw], pool, cores())
    rounds = context.pick(5, 1)
    known = codecs()
    encoded: dict[str, list[bytes]] = {}
    contenders = []
    for name, codec in known.items():
        encoded[name] = pages.encode(codec, 1)
        pages.decode(codec, encoded[name], 1)
        if not all(map(np.array_equal, pages.outputs, pages.pages)):
            raise RuntimeError(f"{name} did not give back {kind.name}")
        for threads in (1, pages.threads):
            label = "one" if threads == 1 else "all"
            contenders.append(_contender(f"{name} encode {label}", pages.encode, codec, threads))
            contenders.append(_contender(f"{name} decode {label}", pages.decode, codec, encoded[name], threads))
    timings = context.measure(contenders, rounds=rounds)
    for name in known:
        row: dict[str, Any] = {
            "data": kind.name,
            "family": kind.family,
            "page_kib": page_bytes >> 10,
            "page_rows": rows,
            "codec": name,
            "ratio": round(pages.nbytes / sum(map(len, encoded[name])), 3),
        }
        for verb in ("encode", "decode"):
            for label in ("one", "all"):
                speed = pages.nbytes / timings[f"{name} {verb} {label}"].median_s / 1e9
                row[f"{verb}_{label}_gb_s"] = float(f"{speed:.3g}")
        yield row


def _contender(name: str, work: Callable[..., object], *arguments: object) -> Contender:
    return Contender(name=name, run=lambda _prepared: work(*arguments))


def measure_arrow(context: Context) -> Iterator[dict[str, Any]]:
    """One row per table, codec and page length: Arrow record batches of three rank-0 columns."""
    steps = context.pick(1 << 16, 1 << 14)
    rewards, ends, actions = data.atari_rewards(steps)
    rng = np.random.default_rng(0)
    dense = data.robot_states(steps)[:, :8].astype(np.float64).sum(axis=1) + rng.normal(0, 0.01, steps)
    for label, reward in (("sparse rewards", rewards), ("dense rewards", dense)):
        table = pa.table({"reward": reward, "done": ends, "action": actions})
        for rows in ARROW_ROWS:
            messages: dict[str, list[pa.Buffer]] = {}
            contenders = []
            for name in ("none", "lz4", "zstd"):
                compression = None if name == "none" else name
                options = pa.ipc.IpcWriteOptions(compression=compression)
                alone = pa.ipc.IpcWriteOptions(compression=compression, use_threads=False)
                batches = table.to_batches(max_chunksize=rows)
                messages[name] = [_message(batch, options) for batch in batches]
                contenders.append(_contender(f"{name} decode", _read_batches, messages[name], table.schema))
                contenders.append(_contender(f"{name} fill", _fill_slots, messages[name], table.schema, steps))
                contenders.append(_contender(f"{name} alone", _stream_batches, messages[name], table.schema))
                contenders.append(_contender(f"{name} encode", _write_batches, batches, options))
                contenders.append(_contender(f"{name} encode alone", _write_batches, batches, alone))
            timings = context.measure(contenders, rounds=context.pick(15, 3))
            for name, found in messages.items():
                micros = {
                    key.removeprefix(f"{name} "): float(f"{timing.median_s / len(found) * 1e6:.3g}")
                    for key, timing in timings.items()
                    if key.startswith(f"{name} ")
                }
                yield {
                    "data": f"arrow, {label}",
                    "family": "arrow",
                    "page_rows": rows,
                    "codec": name,
                    "ratio": round(steps * 17 / sum(message.size for message in found), 3),
                    "encode_us_a_page": micros["encode"],
                    "encode_without_threads_us_a_page": micros["encode alone"],
                    "decode_us_a_page": micros["decode"],
                    "decode_without_threads_us_a_page": micros["alone"],
                    "decode_and_fill_us_a_page": micros["fill"],
                }


def _message(batch: pa.RecordBatch, options: pa.ipc.IpcWriteOptions) -> pa.Buffer:
    """The one encapsulated message of a batch, compressed as ``options`` say."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)  # the first one brings the schema's message with it
        begin = sink.tell()
        writer.write_batch(batch)
        end = sink.tell()
    return sink.getvalue()[begin:end]


def _write_batches(batches: Sequence[pa.RecordBatch], options: pa.ipc.IpcWriteOptions) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _read_batches(messages: Sequence[pa.Buffer], schema: pa.Schema) -> None:
    for message in messages:
        pa.ipc.read_record_batch(message, schema)


def _stream_batches(messages: Sequence[pa.Buffer], schema: pa.Schema) -> None:
    """Decode through a stream of one batch, the only reader that can be told to start no threads."""
    sink = pa.BufferOutputStream()
    pa.ipc.new_stream(sink, schema).close()
    head = sink.getvalue().to_pybytes()[:-8]  # less the end of the stream
    options = pa.ipc.IpcReadOptions(use_threads=False)
    for message in messages:
        stream = pa.BufferReader(b"".join((head, message)))
        pa.ipc.open_stream(stream, options=options).read_next_batch()


def _fill_slots(messages: Sequence[pa.Buffer], schema: pa.Schema, steps: int) -> None:
    """Decode and copy into columns, bools unpacked: what a reader of this format does with a page."""
    reward, done, action = np.empty(steps), np.empty(steps, np.bool_), np.empty(steps, np.int64)
    at = 0
    for message in messages:
        batch = pa.ipc.read_record_batch(message, schema)
        end = at + batch.num_rows
        reward[at:end] = batch.column(0).to_numpy(zero_copy_only=True)
        done[at:end] = batch.column(1).to_numpy(zero_copy_only=False)
        action[at:end] = batch.column(2).to_numpy(zero_copy_only=True)
        at = end


def crc_speed(context: Context) -> Measurement:
    """What checking a page costs beside decoding it."""
    page = data.white_noise(1 << 11, 16).tobytes()
    timings = context.measure(
        [
            Contender(name="crc32c", run=lambda _none: [google_crc32c.value(page) for _ in range(100)]),
            Contender(name="memcpy", run=lambda _none: [bytearray(page) for _ in range(100)]),
        ],
        rounds=context.pick(15, 3),
    )
    speed = 100 * len(page) / timings["crc32c"].median_s / 1e9
    what = "crc32c of a 128 KiB page"
    return Measurement(name="crc32c", what=what, measured=speed, unit="GB/s", timings=timings)


def default_of(kind: str) -> tuple[str, int]:
    """The default codec and page size (KiB) of trajstore for a kind of data: by the bytes of one value."""
    single_byte = kind.endswith(("x3", "bool[32]"))
    return ("zstd-1", 256) if single_byte else ("blosc-lz4-5-byte", 128)


def stated(rows: Sequence[Mapping[str, Any]]) -> list[Measurement]:
    """Of all cells those of the default codec and page size."""
    found = []
    for row in rows:
        if row["family"] == "arrow" or (row["codec"], row["page_kib"]) != default_of(row["data"]):
            continue
        speeds = f"encode {row['encode_all_gb_s']}, decode {row['decode_all_gb_s']} GB/s"
        what = f"compression of {row['data']}, {row['codec']}, {row['page_kib']} KiB pages ({speeds})"
        found.append(Measurement(name=f"ratio {row['data']}", what=what, measured=row["ratio"]))
    return found


def run(context: Context) -> Report:
    """Measure everything; the numbers stated are those of the default codecs."""
    numcodecs.blosc.use_threads = False
    rows: list[Mapping[str, Any]] = []
    measurements: list[Measurement] = []
    with ThreadPoolExecutor(cores()) as pool:
        for kind in kinds(context):
            if not context.wants(kind.name):
                continue
            for page_bytes in PAGE_BYTES:
                context.say(f"{kind.name}, {page_bytes >> 10} KiB")
                rows.extend(measure_pages(context, kind, page_bytes, pool))
    if context.wants("arrow"):
        context.say("Arrow record batches")
        rows.extend(measure_arrow(context))
    measurements.append(crc_speed(context))
    measurements.extend(stated(rows))
    return Report(measurements=measurements, rows=rows)
