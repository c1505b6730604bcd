"""What of an Arrow file is no page: the magic and schema before the pages, and the footer behind them.

Invariant: trajstore reads its pages without these bytes, so nothing else vouches for them. They are held against what
pyarrow writes for the same columns and pages; only where it writes both ends otherwise, as another release may have, is it
asked what they say.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from trajstore.format.pages import PageSource, arrow_schema, ipc_options
from trajstore.schema import Column

_MAGIC_BYTES = 8  # with its padding
_PREFIX_BYTES = 8  # of a message: a marker, and the size of its metadata
# A record batch as the footer lists it (apache/arrow, format/File.fbs, "Block").
_BLOCK = np.dtype([("offset", "<i8"), ("metadata", "<i4"), ("padding", "<i4"), ("body", "<i8")])


def metadata_bytes(page: bytes) -> int:
    """Bytes of a record-batch message before its body."""
    return _PREFIX_BYTES + int.from_bytes(page[4:_PREFIX_BYTES], "little")


def ends_problem(
    columns: Sequence[Column], source: PageSource, metadata: Sequence[int], head: bytes, tail: bytes
) -> str | None:
    """What is wrong with the ends of an Arrow file, or None.

    Args:
        columns: Of the file, in its order.
        source: Its pages, none of which is damaged.
        metadata: Of each page, see ``metadata_bytes``.
        head: All bytes before the first page.
        tail: All bytes behind the last.
    """
    expected_head, expected_tail = _as_written(columns, source, np.array(metadata, np.int64))
    wrong = [what for what, same in ((_HEAD, head == expected_head), (_TAIL, tail == expected_tail)) if not same]
    if len(wrong) == 2 and _says(columns, source, head, tail):
        return None
    return f"{' and '.join(wrong)} not what was written" if wrong else None


_HEAD, _TAIL = "the magic and schema at its beginning are", "the footer at its end is"


def _as_written(columns: Sequence[Column], source: PageSource, metadata: np.ndarray) -> tuple[bytes, bytes]:
    """Both ends: those of a file of as many empty pages, with the places of the real ones in its footer."""
    schema = arrow_schema(columns)
    empty = pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=ipc_options(source.codec)) as writer:
        for _ in source.offsets:
            writer.write_batch(empty)
    file = sink.getvalue().to_pybytes()
    reader = pa.BufferReader(file[_MAGIC_BYTES:])
    pa.ipc.read_message(reader)
    first = _MAGIC_BYTES + reader.tell()
    pa.ipc.read_message(reader)
    page = _MAGIC_BYTES + reader.tell() - first
    count = len(source.offsets)
    before = metadata_bytes(file[first : first + _PREFIX_BYTES])
    listed = _blocks(first + page * np.arange(count), np.full(count, before), np.full(count, page))
    tail = file[first + page * count :].replace(listed, _blocks(source.offsets, metadata, source.nbytes))
    return file[:first], tail


def _blocks(offsets: np.ndarray, metadata: np.ndarray, nbytes: np.ndarray) -> bytes:
    blocks = np.zeros(len(offsets), _BLOCK)
    blocks["offset"], blocks["metadata"], blocks["body"] = offsets, metadata, nbytes - metadata
    return blocks.tobytes()


def _says(columns: Sequence[Column], source: PageSource, head: bytes, tail: bytes) -> bool:
    """Whether pyarrow finds these columns and so many pages."""
    try:
        before = pa.ipc.read_schema(pa.BufferReader(head[_MAGIC_BYTES:]))
        file = pa.ipc.open_file(pa.PythonFile(_Ends(head, int(source.nbytes.sum()), tail), mode="r"))
        schema = arrow_schema(columns)
        return bool(before == schema == file.schema and file.num_record_batches == len(source.offsets))
    except (pa.ArrowException, OSError, EOFError, ValueError):
        return False


class _Ends(io.RawIOBase):
    """A file of which only the ends are at hand; what is between them reads as zeros."""

    def __init__(self, head: bytes, between: int, tail: bytes) -> None:
        self._parts = (head, between, tail)
        self._size = len(head) + between + len(tail)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        head, between, tail = self._parts
        start, stop = self._at, self._size if size < 0 else min(self._at + size, self._size)
        self._at = max(start, stop)
        behind = len(head) + between
        zeros = max(0, min(stop, behind) - max(start, len(head)))
        return head[start:stop] + bytes(zeros) + tail[max(start - behind, 0) : max(stop - behind, 0)]
