"""Write the trajectories of many small segments into a few large ones.

Invariant: every trajectory reads back as before, in this version and in earlier ones; what others append or delete meanwhile
stays appended or deleted. Whatever was committed when the work is broken off is not done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from trajstore.edit.rewrite import rewrite
from trajstore.edit.transfer import Piece, copy_trajectories
from trajstore.errors import SelectionError
from trajstore.format.manifest import TABLE_FIELDS, Manifest, SegmentEntry
from trajstore.format.snapshot import ManifestEntry
from trajstore.progress import byte_progress
from trajstore.read.fetch import PageFetcher
from trajstore.read.segment import SegmentReaders
from trajstore.read.table import TrajectoryTable
from trajstore.schema import Schema
from trajstore.storage.commit import History, Version
from trajstore.storage.filesystem import Filesystem
from trajstore.storage.workers import Workers
from trajstore.write.blocks import BlockPool
from trajstore.write.segment import SegmentBuilder

DEFAULT_SEGMENT_BYTES = 256 << 20
COMMIT_INTERVAL_S = 30.0
_COMMIT_PART = 10  # committing takes a tenth of the time at most
_BLOCK_BYTES = 64 << 20
_KEPT_INDEXES = 512
_START_BITS = 40  # of a row number in a segment: enough for 10^12 rows
_VARIABLE_ROW_BYTES = 16  # of a text or list, at least
_METADATA_BYTES = 1024  # of a segment for each column, about: what is no page


@dataclass(frozen=True)
class Compacted:
    """What came of it.

    Attributes:
        version: The latest version then.
        trajectories: That were written again.
        segments_before: That held them.
        segments_after: That hold them now.
    """

    version: int
    trajectories: int
    segments_before: int
    segments_after: int


@dataclass(frozen=True, eq=False)
class _Written:
    """A large segment, already stored.

    Attributes:
        entry: How manifests name it.
        pieces: What it was made of.
        begins: The step and the trajectory of the segment with which each of them begins.
    """

    entry: SegmentEntry
    pieces: Sequence[Piece]
    begins: Sequence[tuple[int, int]]


def compact(
    filesystem: Filesystem,
    history: History,
    head: Version,
    workers: Workers,
    *,
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    preset: str | None = None,
    commit_interval_s: float = COMMIT_INTERVAL_S,
    progress: bool | None = None,
) -> Compacted:
    """Write what lies in small segments of the store's own into large ones, with its derived columns.

    A segment that lies in another store, or of which a derived column does, stays as it is. Others may append, delete,
    compact, and add columns meanwhile.

    Args:
        filesystem: Where the store is.
        history: Its versions.
        head: The latest version known.
        workers: Decode and encode pages.
        segment_bytes: Of a large segment, before compression (texts and lists as stored). Segments of at least half of that
            stay, unless most of their steps are of deleted trajectories.
        preset: Of codecs.
        commit_interval_s: What is finished is committed so often.
        progress: Show a bar on standard error; by default in a terminal, if there is much to do.

    Returns:
        What came of it; with the version of ``head`` if there was nothing to do.

    Raises:
        SelectionError: ``segment_bytes`` is not positive.
        CorruptionError: What is to be copied is damaged.
        CommitError: Others rewrote the store again and again.
    """
    if segment_bytes < 1:
        raise SelectionError(f"segment_bytes={segment_bytes}, expected at least 1")
    table = TrajectoryTable(history, head)
    groups = plan(table, segment_bytes)
    pieces = [piece for group in groups for piece in group]
    job = _Job(filesystem, workers, table.schema, preset)
    written: list[_Written] = []
    since, commit_at = history.moment(), time.monotonic() + commit_interval_s
    with byte_progress("compacting", int(sum(piece.raw_bytes for piece in pieces)), shown=progress) as advance:
        for number, group in enumerate(groups, 1):
            written.append(job.write(group, advance))
            if time.monotonic() < commit_at and number < len(groups):
                continue
            began = time.monotonic()
            moves = _Moves(written)
            head = rewrite(
                filesystem,
                history,
                head,
                moves.change,
                operation="compact",
                nbytes=sum(target.entry.total_bytes for target in written),
                affected={piece.segment.uuid for target in written for piece in target.pieces},
                since=since,
            )
            written, since, now = [], history.moment(), time.monotonic()
            commit_at = now + max(commit_interval_s, _COMMIT_PART * (now - began))
    return Compacted(head.number, sum(len(piece.starts) for piece in pieces), len(pieces), len(groups))


def plan(table: TrajectoryTable, segment_bytes: int = DEFAULT_SEGMENT_BYTES) -> list[list[Piece]]:
    """What ``compact`` would write into one segment each."""
    return list(_groups(_worth_writing_again(table, segment_bytes), segment_bytes))


def _worth_writing_again(table: TrajectoryTable, segment_bytes: int) -> list[Piece]:
    """What lies in small or mostly deleted segments of the store's own, in the order of the table."""
    numbers: dict[tuple[str, ...], int] = {}  # several manifests may name one segment
    entries: list[SegmentEntry] = []
    number_of = np.full(len(table.segments), -1, np.int64)
    for place, entry in enumerate(table.segments):
        if entry.is_own:
            number_of[place] = numbers.setdefault(entry.key, len(entries))
            if number_of[place] == len(entries):
                entries.append(entry)
    if not entries:
        return []
    segment = number_of[table.segment]
    order = np.lexsort((table.start, segment))
    order = order[segment[order] >= 0]
    again = (np.diff(segment[order]) == 0) & (np.diff(table.start[order]) == 0)
    order = order[np.append(True, ~again)]  # a version may show a trajectory twice
    bounds = np.searchsorted(segment[order], np.arange(len(entries) + 1))
    first_row = np.minimum.reduceat(order, bounds[:-1])
    row_bytes = [_row_bytes(entry, table.schema) for entry in entries]
    found = []
    for number in np.argsort(first_row, kind="stable").tolist():
        entry, rows = entries[number], order[bounds[number] : bounds[number + 1]]
        lengths = table.length[rows]
        raw_bytes = float(lengths.sum()) * row_bytes[number]
        if raw_bytes < segment_bytes / 2 or int(lengths.sum()) < entry.steps / 2:
            found.append(Piece(entry, table.start[rows], table.ordinal[rows], lengths, raw_bytes))
    return found


def _row_bytes(entry: SegmentEntry, schema: Schema) -> float:
    """Bytes of a step before compression, as far as that is known without reading."""
    columns = [schema[path] for path in entry.all_columns]
    known = float(sum(_VARIABLE_ROW_BYTES if c.is_variable else c.row_bytes for c in columns))
    if all(not column.is_variable for column in columns):
        return known
    return max(known, (entry.total_bytes - _METADATA_BYTES * (len(columns) + 1)) / entry.steps)


def _groups(pieces: Sequence[Piece], segment_bytes: int) -> Iterator[list[Piece]]:
    """Pieces with the same columns that become one segment each; those that would be alone in theirs are left out."""
    waiting: dict[tuple[frozenset[str], ...], list[Piece]] = {}
    nbytes: dict[tuple[frozenset[str], ...], float] = {}
    for piece in pieces:
        columns = tuple(frozenset(paths) for paths in _column_sets(piece.segment))
        waiting.setdefault(columns, []).append(piece)
        nbytes[columns] = nbytes.get(columns, 0.0) + piece.raw_bytes
        if nbytes[columns] >= segment_bytes:
            del nbytes[columns]
            yield waiting.pop(columns)
    for group in waiting.values():
        if len(group) > 1 or group[0].steps < group[0].segment.steps / 2:
            yield group


def _column_sets(entry: SegmentEntry) -> list[tuple[str, ...]]:
    """Columns of a segment, and of each of its layers."""
    return [entry.columns, *sorted(layer.columns for layer in entry.layers)]


class _Job:
    """Writes large segments.

    Args:
        filesystem: Where the store is.
        workers: Decode and encode pages.
        schema: Of the store.
        preset: Of codecs.
    """

    def __init__(self, filesystem: Filesystem, workers: Workers, schema: Schema, preset: str | None) -> None:
        self._filesystem = filesystem
        self._workers = workers
        self._schema = schema
        self._preset = preset
        # Readers and fetcher of its own: the handle's would forget what loaders read for what nobody will read again.
        self._readers = SegmentReaders(filesystem, workers, keep=_KEPT_INDEXES)
        self._fetcher = PageFetcher(workers)
        self._blocks = BlockPool(_BLOCK_BYTES)

    def write(self, group: Sequence[Piece], advance: Callable[[int], None]) -> _Written:
        """Store one segment, with its layers, of the trajectories of several."""
        builders = [
            SegmentBuilder(
                [column for column in self._schema if column.path in paths],
                preset=self._preset,
                filesystem=self._filesystem,
                workers=self._workers,
                blocks=self._blocks,
            )
            for paths in _column_sets(group[0].segment)
        ]
        try:
            begins = copy_trajectories(group, builders, self._schema, self._readers, self._fetcher, advance)
            for builder in builders:
                builder.close_pages()
            parts = [builder.finish() for builder in builders]
            self._filesystem.store(
                {key: buffers for part in parts for key, buffers in part.objects.items()},
                [stream for part in parts for stream in part.streams],
            )
        except BaseException:
            for builder in builders:
                builder.abandon()
            raise
        segment, *layers = (part.entry for part in parts)
        return _Written(replace(segment, layers=tuple(layers)), group, begins)


class _Moves:
    """Where trajectories lie now.

    Args:
        written: The segments that were written, one at least.
    """

    def __init__(self, written: Sequence[_Written]) -> None:
        pieces = [piece for target in written for piece in target.pieces]
        self._numbers = {piece.segment.key: number for number, piece in enumerate(pieces)}
        self._targets = [target.entry for target in written]
        self._target = np.repeat(np.arange(len(written)), [len(target.pieces) for target in written])  # of each piece
        begins = np.array([begin for target in written for begin in target.begins], np.int64)
        counts = [len(piece.starts) for piece in pieces]
        # By piece and former first row, ascending: first row and number in the target.
        self._codes = np.concatenate([(n << _START_BITS) + piece.starts for n, piece in enumerate(pieces)])
        within = np.concatenate([np.cumsum(piece.lengths) - piece.lengths for piece in pieces])
        self._starts = np.repeat(begins[:, 0], counts) + within
        self._ordinals = np.repeat(begins[:, 1], counts) + np.concatenate([np.arange(count) for count in counts])

    def change(self, entry: ManifestEntry, manifest: Manifest) -> Manifest | None:  # noqa: ARG002
        """A manifest whose rows say where the trajectories are now; None if it has none of them.

        Segments that have other layers meanwhile stay as they are, and so do trajectories that were restored.
        """
        numbers = [self._numbers.get(s.key, -1) if s.is_own else -1 for s in manifest.segments]
        segment = manifest.table["segment"].to_numpy()
        start, ordinal = (manifest.table[name].to_numpy().copy() for name in ("start", "ordinal"))
        piece = np.array(numbers, np.int64)[segment]
        codes = (piece << _START_BITS) + start
        places = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        moved = (piece >= 0) & (self._codes[places] == codes)
        if not moved.any():
            return None
        start[moved], ordinal[moved] = self._starts[places[moved]], self._ordinals[places[moved]]
        chosen = np.where(moved, len(manifest.segments) + self._target[piece], segment)
        used, renumbered = np.unique(chosen, return_inverse=True)
        every = [*manifest.segments, *self._targets]
        table = manifest.table
        for name, values in (("segment", renumbered.astype(np.int32)), ("start", start), ("ordinal", ordinal)):
            where = table.schema.get_field_index(name)
            table = table.set_column(where, TABLE_FIELDS[where], pa.array(values))
        return Manifest(table.combine_chunks(), tuple(every[number] for number in used.tolist()))
