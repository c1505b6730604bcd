"""One column of a segment under construction, page by page: a Zarr shard, or an Arrow file of several columns.

Invariant: pages lie in the object in row order, without gaps; every page but the last is full, and a short last page of a
tensor is filled up with zeros, because a Zarr chunk always has its full shape. An only page has the column's own length.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from trajstore.format.codecs import (
    TARGET_ARROW_PAGE_BYTES,
    Codec,
    power_of_two_rows,
    tensor_page_rows,
)
from trajstore.format.layout import shard_name
from trajstore.format.pages import PageSource, arrow_schema, checksum, encode_record_batch, ipc_options
from trajstore.format.zarr_metadata import ZarrArray
from trajstore.schema import Column
from trajstore.storage.filesystem import Buffer
from trajstore.storage.workers import Workers
from trajstore.stored import Array, Stored
from trajstore.write.blocks import Block, BlockPool

_BLOCK_BYTES = 1 << 20
_IPC_MAGIC_BYTES = 8
_EncodedPages = list[tuple[bytes, int]]
_FullBlock = tuple[Block, Array, int]  # memory, its rows, how many are filled


class ObjectBuilder:
    """Bytes of an object under construction, and where its pages lie."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nbytes = 0
        self.buffered_bytes = 0  # not yet streamed
        self._buffers: list[Buffer] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._checksums: list[int] = []

    def add_page(self, data: bytes, crc32c: int) -> None:
        """Append a page."""
        self._offsets.append(self.nbytes)
        self._sizes.append(len(data))
        self._checksums.append(crc32c)
        self.add(data)

    def add(self, data: Buffer) -> None:
        """Append bytes that are no page."""
        self._buffers.append(data)
        self.nbytes += len(data)
        self.buffered_bytes += len(data)

    def take_buffers(self) -> list[Buffer]:
        """Everything not yet streamed; it is the caller's now."""
        buffers, self._buffers = self._buffers, []
        self.buffered_bytes = 0
        return buffers

    def source(self, columns: Sequence[str], rows: int, page_rows: int, codec: str) -> PageSource:
        """The page index's entry of the finished object."""
        return PageSource(
            self.name,
            tuple(columns),
            rows,
            page_rows,
            codec,
            np.array(self._offsets, np.int64),
            np.array(self._sizes, np.int64),
            np.array(self._checksums, np.uint32),
        )

    def shard_index(self) -> bytes:
        """The index of a Zarr shard: offset and size of every inner chunk, then its CRC-32C (zarr-specs, sharding)."""
        index = np.empty((len(self._offsets), 2), "<u8")
        index[:, 0] = self._offsets
        index[:, 1] = self._sizes
        data = index.tobytes()
        return data + checksum(data).to_bytes(4, "little")


class ShardBuilder:
    """A tensor column.

    Args:
        column: The column.
        codec: Of its pages.
        workers: Encode pages.
        blocks: Where rows wait until their pages are full.
    """

    def __init__(self, column: Column, codec: Codec, workers: Workers, blocks: BlockPool) -> None:
        self.column = column
        self.codec = codec
        self.page_rows = tensor_page_rows(column)
        self.rows = 0
        self.object = ObjectBuilder(shard_name(column.path, 1 + len(column.shape)))
        self._workers = workers
        self._blocks = blocks
        self._row_bytes = column.row_bytes
        self._block_rows = max(1, _BLOCK_BYTES // (self.page_rows * self._row_bytes)) * self.page_rows
        self._block: Block | None = None
        self._staged: Array | None = None  # (block_rows, *shape), a view of the block
        self._filled = 0  # rows in the block
        self._full: deque[_FullBlock] = deque()
        self._encoding: deque[tuple[int, Future[_EncodedPages]]] = deque()
        # Each only grows, and by one thread: the first by the one that appends, the others by the one that drains.
        self._filled_bytes = 0  # in blocks that were full
        self._submitted_bytes = 0  # of those, handed to the workers
        self._drained_bytes = 0  # of those, moved to the object

    @property
    def full_bytes(self) -> int:
        """Bytes in full blocks that wait for a worker."""
        return self._filled_bytes - self._submitted_bytes

    @property
    def encoding_bytes(self) -> int:
        """Bytes that the workers have."""
        return self._submitted_bytes - self._drained_bytes

    def append(self, rows: Array) -> None:
        """Copy rows in: ``(n, *shape)`` of the column's physical dtype.

        Full blocks wait for ``submit``: workers that start while the next block is being copied would take turns with
        the copy, and ``append`` would take several times as long.
        """
        done = 0
        while done < len(rows):
            if self._staged is None:
                self._open_block()
            n = min(len(rows) - done, self._block_rows - self._filled)
            assert self._staged is not None
            np.copyto(self._staged[self._filled : self._filled + n], rows[done : done + n])
            self._filled += n
            done += n
            if self._filled == self._block_rows:
                self._close_block()
        self.rows += len(rows)

    def close_pages(self) -> None:
        """No more rows will come: the last block is as full as it gets."""
        if self.rows < self.page_rows:
            self.page_rows = self.rows  # the only page is no longer than it must be
        if self._filled:
            self._close_block()

    def submit(self) -> None:
        """Hand full blocks to the workers: a run of neighbours each, since a task costs as much as half a page."""
        blocks = [self._full.popleft() for _ in range(len(self._full))]
        size = -(-len(blocks) // self._workers.threads) or 1
        for first in range(0, len(blocks), size):
            run = blocks[first : first + size]
            nbytes = sum(filled for _, _, filled in run) * self._row_bytes
            self._submitted_bytes += nbytes
            self._encoding.append((nbytes, self._workers.submit(self._encode, run)))

    def drain(self, *, wait: bool) -> None:
        """Move encoded pages to the object, in order; with ``wait``, all that were submitted."""
        while self._encoding and (wait or self._encoding[0][1].done()):
            nbytes, future = self._encoding.popleft()
            for data, crc32c in future.result():
                self.object.add_page(data, crc32c)
            self._drained_bytes += nbytes

    def finish(self) -> PageSource:
        """End the object with its shard index. All pages must have been drained."""
        self.object.add(self.object.shard_index())
        return self.object.source([self.column.path], self.rows, self.page_rows, self.codec.name)

    def zarr_array(self) -> ZarrArray:
        """The finished column for the Zarr metadata."""
        return ZarrArray(self.column, self.rows, self.page_rows, self.codec)

    def _open_block(self) -> None:
        nbytes = self._block_rows * self._row_bytes
        self._block = self._blocks.take(nbytes)
        flat = self._block[:nbytes].view(self.column.physical_dtype)
        self._staged = flat.reshape(self._block_rows, *self.column.shape)
        self._filled = 0

    def _close_block(self) -> None:
        assert self._block is not None
        assert self._staged is not None
        self._filled_bytes += self._filled * self._row_bytes
        self._full.append((self._block, self._staged, self._filled))
        self._block = self._staged = None
        self._filled = 0

    def _encode(self, blocks: Sequence[_FullBlock]) -> _EncodedPages:
        pages = []
        for block, staged, filled in blocks:
            try:
                for start in range(0, filled, self.page_rows):
                    stop = start + self.page_rows
                    if stop > filled:
                        staged[filled:stop] = 0
                    data = bytes(self.codec.encode(staged[start:stop]))
                    pages.append((data, checksum(data)))
            finally:
                self._blocks.give(block)
        return pages


class ArrowFileBuilder:
    """All scalar, string and ragged columns of a segment with the same number of rows, in one IPC file.

    Args:
        name: Of the object.
        columns: In file order.
        codec: Body compression, ``"none"``, ``"lz4"`` or ``"zstd"``.
        sample: Rows of the first trajectory: they tell how large a row of strings or lists is.
    """

    def __init__(self, name: str, columns: Sequence[Column], codec: str, sample: Mapping[str, Stored]) -> None:
        self.columns = tuple(columns)
        self.codec = codec
        self.rows = 0
        self.object = ObjectBuilder(name)
        sampled = max(len(sample[columns[0].path]), 1)
        row_bytes = sum(sample[c.path].nbytes for c in columns) / sampled
        self.page_rows = power_of_two_rows(row_bytes, TARGET_ARROW_PAGE_BYTES)
        self._waiting: dict[str, list[Stored]] = {c.path: [] for c in columns}
        self._waiting_rows = 0
        self._sink = _PartsSink()

    def append(self, rows: Mapping[str, Stored], count: int) -> None:
        """Add rows of all columns. NumPy rows are copied, since their owner may change them."""
        for column in self.columns:
            data = rows[column.path]
            self._waiting[column.path].append(data.copy() if isinstance(data, np.ndarray) else data)
        self._waiting_rows += count
        self.rows += count

    def encode_full_pages(self, *, last: bool) -> None:
        """Encode what is full; with ``last``, the short last page too."""
        while self._waiting_rows >= self.page_rows or (last and self._waiting_rows):
            n = min(self.page_rows, self._waiting_rows)
            self._encode({c.path: _take(self._waiting[c.path], n) for c in self.columns})
            self._waiting_rows -= n

    def finish(self) -> PageSource:
        """End the object with the IPC footer. All pages must have been encoded."""
        self._writer.close()
        self.object.add(self._take_written())
        return self.object.source([c.path for c in self.columns], self.rows, self.page_rows, self.codec)

    @cached_property
    def _writer(self) -> pa.RecordBatchFileWriter:
        return pa.ipc.new_file(self._sink, arrow_schema(self.columns), options=ipc_options(self.codec))

    def _encode(self, rows: Mapping[str, Stored]) -> None:
        self._writer.write_batch(encode_record_batch(self.columns, rows))
        data = self._take_written()
        if not self.object.nbytes:  # magic and schema come before the first batch
            head = _first_batch_offset(data)
            self.object.add(data[:head])
            data = data[head:]
        self.object.add_page(data, checksum(data))

    def _take_written(self) -> bytes:
        data = b"".join(self._sink.parts)
        self._sink.parts.clear()
        return data


class _PartsSink(io.RawIOBase):
    """Collects what the IPC writer writes, so that each batch can be taken as soon as it is written."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.parts.append(bytes(data))
        return len(self.parts[-1])


def _first_batch_offset(data: bytes) -> int:
    """Where the first record batch begins in an IPC file: after the padded magic and the schema message."""
    reader = pa.BufferReader(data[_IPC_MAGIC_BYTES:])
    pa.ipc.read_message(reader)
    return _IPC_MAGIC_BYTES + int(reader.tell())


def _take(parts: list[Stored], count: int) -> Stored:
    """Remove the first ``count`` rows from a list of row blocks, as one block."""
    taken: list[Stored] = []
    while count:
        head = parts[0]
        n = min(count, len(head))
        taken.append(head[:n])
        if n == len(head):
            parts.pop(0)
        else:
            parts[0] = head[n:]
        count -= n
    if isinstance(taken[0], np.ndarray):
        return taken[0] if len(taken) == 1 else np.concatenate(taken)
    # A slice of a list array still refers to all its values: concatenation writes only what is in it.
    return pa.concat_arrays(taken)
