"""Copy trajectories from many segments to the end of one that is under construction.

Invariant: every page that holds wanted rows is read and decoded once, pages of many segments together; what is in memory at
once is bounded, however long a trajectory is and however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from trajstore.errors import CorruptionError
from trajstore.format.manifest import SegmentEntry
from trajstore.format.pages import PageSource
from trajstore.read.fetch import PageFetcher, PageRequest
from trajstore.read.segment import SegmentReader, SegmentReaders
from trajstore.schema import Column, Schema
from trajstore.stored import Array, Stored
from trajstore.write.segment import SegmentBuilder

_LOT_BYTES = 16 << 20  # decoded pages in memory
_ENCODING_BYTES = 64 << 20  # rows that wait for a worker
_OPENED_TOGETHER = 256  # page indexes
_ONLY_PAGE = np.zeros(1, np.int64)
_COMPRESSED_PART = 4  # texts and lists are about four times as large in memory as stored


@dataclass(frozen=True, eq=False)
class Piece:
    """Trajectories of one segment, by where they begin in it, each once.

    Attributes:
        segment: Which.
        starts: ``(n,)`` int64, first rows, ascending.
        ordinals: ``(n,)`` int64, trajectories before each.
        lengths: ``(n,)`` int64, steps.
        raw_bytes: Of their rows, about.
    """

    segment: SegmentEntry
    starts: Array
    ordinals: Array
    lengths: Array
    raw_bytes: float

    @property
    def steps(self) -> int:
        """Of all of them."""
        return int(self.lengths.sum())

    def runs(self, *, extra: int) -> tuple[Array, Array]:
        """Where neighbours lie in a column: ``(m,)`` int64 first rows, and the same of the rows after the last ones."""
        lows = self.starts + extra * self.ordinals
        highs = lows + self.lengths + extra
        if len(lows) == 1:
            return lows, highs
        apart = lows[1:] != highs[:-1]
        return lows[np.append(True, apart)], highs[np.append(apart, True)]


def copy_trajectories(
    pieces: Sequence[Piece],
    builders: Sequence[SegmentBuilder],
    schema: Schema,
    readers: SegmentReaders,
    fetcher: PageFetcher,
    advance: Callable[[int], None],
) -> list[tuple[int, int]]:
    """Append all trajectories of some pieces to a segment and its layers.

    Args:
        pieces: All with the same columns.
        builders: Of the segment, then of its layers; each column is in one of them.
        schema: Of all these columns.
        readers: Open the segments.
        fetcher: Reads pages.
        advance: Is told of raw bytes that were copied.

    Returns:
        For each piece the step and the trajectory of the new segment with which it begins there.

    Raises:
        CorruptionError: A page is not what was written, or a manifest names rows that are not there.
    """
    begins = []
    lot = _Lot(builders, fetcher)
    groups = [(builder, columns) for builder in builders for columns in _sharing_pages(builder.columns)]
    for first in range(0, len(pieces), _OPENED_TOGETHER):
        together = pieces[first : first + _OPENED_TOGETHER]
        opened = readers.open_many([piece.segment for piece in together], schema)
        for piece, reader in zip(together, opened, strict=True):
            begins.append((builders[0].steps, builders[0].trajectories))
            runs = [piece.runs(extra=extra) for extra in (0, 1)]
            for builder, columns in groups:
                for chunk in _chunks(reader, runs, builder, columns):
                    lot.add(chunk)
            for builder in builders:
                for length in piece.lengths.tolist():
                    builder.end_trajectory(length)
            advance(int(piece.raw_bytes))
    lot.finish()
    return begins


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Neighbouring pages of one object of a segment, and which of their rows go where.

    Attributes:
        builder: Receives the rows.
        requests: The pages.
        fixed: Column -> rows of all the pages, to be filled.
        variable: Columns of texts and lists.
        slices: Rows of the pages that are wanted, as half-open ranges.
        nbytes: In memory, about.
    """

    builder: SegmentBuilder
    requests: Sequence[PageRequest]
    fixed: dict[str, Array]
    variable: Sequence[str]
    slices: Sequence[tuple[int, int]]
    nbytes: int

    def append(self) -> None:
        """Append the rows; the pages have been read."""
        rows: dict[str, Stored] = dict(self.fixed)
        for path in self.variable:
            rows[path] = pa.concat_arrays([request.arrays[path] for request in self.requests if request.arrays])
        for start, stop in self.slices:
            self.builder.append_rows({path: data[start:stop] for path, data in rows.items()})


class _Lot:
    """Chunks of many segments that are read together and appended in order.

    Args:
        builders: Receive them.
        fetcher: Reads pages.
    """

    def __init__(self, builders: Sequence[SegmentBuilder], fetcher: PageFetcher) -> None:
        self._builders = builders
        self._fetcher = fetcher
        self._chunks: list[_Chunk] = []
        self._nbytes = 0

    def add(self, chunk: _Chunk) -> None:
        """Add a chunk; those that fill the lot are copied."""
        self._chunks.append(chunk)
        self._nbytes += chunk.nbytes
        if self._nbytes >= _LOT_BYTES:
            self.finish()

    def finish(self) -> None:
        """Copy what is waiting."""
        chunks, self._chunks, self._nbytes = self._chunks, [], 0
        self._fetcher.fetch([request for chunk in chunks for request in chunk.requests])
        for chunk in chunks:
            chunk.append()
        for builder in self._builders:
            builder.encode_arrow()
            builder.drain(wait=builder.full_bytes + builder.encoding_bytes >= _ENCODING_BYTES)


def _sharing_pages(columns: Sequence[Column]) -> list[tuple[Column, ...]]:
    """Columns of a segment by the object in which they lie: one each, or an Arrow file."""
    files: dict[tuple[str, object], list[Column]] = {}
    for column in columns:
        key = ("arrow", column.extra) if column.stored_in == "arrow" else ("zarr", column.path)
        files.setdefault(key, []).append(column)
    return [tuple(group) for group in files.values()]


def _chunks(
    reader: SegmentReader, runs: Sequence[tuple[Array, Array]], builder: SegmentBuilder, columns: Sequence[Column]
) -> Iterator[_Chunk]:
    """Rows of an object of a segment, in parts that fit a lot; ``runs`` are those of its columns without and with extra."""
    path = columns[0].path
    source, holder = reader.sources[path], reader.holder(path)
    lows, highs = runs[columns[0].extra]
    if highs[-1] > source.rows:
        raise CorruptionError(
            f"{source.object} of segment {holder.entry.uuid} has {source.rows} rows, its manifest says {highs[-1]}; restore "
            "the store from a copy"
        )
    fixed = [c for c in columns if not c.is_variable]
    variable = [c.path for c in columns if c.is_variable]
    for pages in _batches(source, lows, highs, sum(c.row_bytes for c in fixed), compressed=bool(variable)):
        size = source.page_rows
        arrays = {c.path: np.empty((len(pages) * size, *c.shape), c.physical_dtype) for c in fixed}
        requests = []
        for place, page in enumerate(pages.tolist()):
            rows = holder.decoded_rows(source, page)
            slots = {
                name: data[place * size : place * size + rows].reshape(rows, -1).view(np.uint8)
                for name, data in arrays.items()
            }
            requests.append(PageRequest(holder, source, page, slots, variable))
        yield _Chunk(
            builder,
            requests,
            arrays,
            variable,
            _slices(lows, highs, pages, size),
            max(int(source.nbytes[pages].sum()), sum(data.nbytes for data in arrays.values())),
        )


def _batches(source: PageSource, lows: Array, highs: Array, row_bytes: int, *, compressed: bool) -> list[Array]:
    """Pages that hold some of these rows, ``(n,)`` int64 each, ascending: as many as take a lot of memory, one at least."""
    if len(source.offsets) == 1:  # thousands of small segments
        return [_ONLY_PAGE]
    change = np.zeros(len(source.offsets) + 1, np.int64)
    np.add.at(change, lows // source.page_rows, 1)
    np.add.at(change, (highs - 1) // source.page_rows + 1, -1)
    pages = np.flatnonzero(np.cumsum(change[:-1]))
    sizes = np.full(len(pages), source.page_rows * row_bytes, np.int64)
    if compressed:
        sizes += _COMPRESSED_PART * source.nbytes[pages]
    lots = (np.cumsum(sizes) - sizes) // _LOT_BYTES
    return np.split(pages, np.flatnonzero(np.diff(lots)) + 1)


def _slices(lows: Array, highs: Array, pages: Array, page_rows: int) -> list[tuple[int, int]]:
    """Where wanted rows lie in pages that were read one behind the other.

    >>> _slices(np.array([1, 9]), np.array([3, 14]), np.array([0, 2, 3]), 4)
    [(1, 3), (5, 10)]
    """
    if len(pages) == 1 and len(lows) == 1 and lows[0] // page_rows == (highs[0] - 1) // page_rows:
        return [(int(lows[0]) % page_rows, (int(highs[0]) - 1) % page_rows + 1)]
    here = (highs > pages[0] * page_rows) & (lows < (pages[-1] + 1) * page_rows)
    first = np.maximum(lows[here], pages[0] * page_rows)
    last = np.minimum(highs[here], (pages[-1] + 1) * page_rows)
    starts = np.searchsorted(pages, first // page_rows) * page_rows + first % page_rows
    return list(zip(starts.tolist(), (starts + last - first).tolist(), strict=True))
