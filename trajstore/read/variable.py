"""Pages of strings, bytes and ragged lists: Arrow arrays, the least recently used dropped first.

Invariant: at most ``max_bytes`` are kept. They have no slots in an arena, since their rows have no fixed size.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Mapping, Sequence

import pyarrow as pa

from trajstore.format.pages import arrow_type
from trajstore.read.fetch import PageFetcher, PageRequest
from trajstore.read.segment import SegmentReader
from trajstore.schema import Column
from trajstore.stored import Array

_Key = tuple[str, str, int]  # segment, column, page


class VariablePages:
    """Decoded pages of columns of variable size.

    Args:
        max_bytes: Most bytes kept.
        fetcher: Reads pages.
    """

    def __init__(self, max_bytes: int, fetcher: PageFetcher) -> None:
        self._max_bytes = max_bytes
        self._fetcher = fetcher
        self._lock = threading.Lock()
        self._pages: collections.OrderedDict[_Key, pa.Array] = collections.OrderedDict()
        self._nbytes = 0

    def take(self, column: Column, rows: Mapping[SegmentReader, Array], order: Array, *, absent: Array) -> pa.Array:
        """Rows of a column, from several segments.

        Args:
            column: Of variable size.
            rows: For each segment, rows of the column in it, ``(k,)`` int64.
            order: ``(n,)`` int64: which of all these rows, end to end, is wanted at each place.
            absent: ``(n,)`` bool: places that are empty instead: ``""``, ``b""`` or an empty list.
        """
        pages: list[pa.Array] = []
        positions: list[Array] = []
        before = 0
        for segment, wanted in rows.items():
            begins: dict[int, int] = {}
            whole = segment.variable_page(column.path)
            if whole is not None:
                pages.append(whole)
                positions.append(wanted + before)
                before += len(whole)
                continue
            segment = segment.holder(column.path)
            source = segment.sources[column.path]
            numbers = sorted(set((wanted // source.page_rows).tolist()))
            found = self._pages_of(segment, column, numbers)
            for number in numbers:
                begins[number] = before - number * source.page_rows
                pages.append(found[number])
                before += len(found[number])
            shift = [begins[number] for number in (wanted // source.page_rows).tolist()]
            positions.append(wanted + shift)
        kind = arrow_type(column)
        empty: list[object] = [] if column.ragged else "" if column.dtype == "string" else b""  # type: ignore[assignment]
        rows_of_all = pa.concat_arrays([*pages, pa.array([empty], kind)])
        places = [int(p) for part in positions for p in part]
        taken = [
            len(rows_of_all) - 1 if gone else places[i] for i, gone in zip(order.tolist(), absent.tolist(), strict=True)
        ]
        return rows_of_all.take(pa.array(taken, pa.int64()))

    def _pages_of(self, segment: SegmentReader, column: Column, numbers: Sequence[int]) -> dict[int, pa.Array]:
        found: dict[int, pa.Array] = {}
        with self._lock:
            for number in numbers:
                key = (segment.entry.uuid, column.path, number)
                if key in self._pages:
                    self._pages.move_to_end(key)
                    found[number] = self._pages[key]
        source = segment.sources[column.path]
        requests = [PageRequest(segment, source, n, {}, (column.path,)) for n in numbers if n not in found]
        self._fetcher.fetch(requests)
        with self._lock:
            for request in requests:
                array = (request.arrays or {})[column.path]
                found[request.page] = array
                self._pages[(segment.entry.uuid, column.path, request.page)] = array
                self._nbytes += array.nbytes
            while self._nbytes > self._max_bytes and self._pages:
                self._nbytes -= self._pages.popitem(last=False)[1].nbytes
        return found
