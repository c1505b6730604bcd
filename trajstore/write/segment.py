"""The open segment: trajectories laid end to end, becoming objects.

Invariant: a trajectory lies in one segment, and all trajectories of a segment have the same columns. Row numbers are final
when ``end_trajectory`` returns; bytes are durable when ``Filesystem.store`` has been given what ``finish`` returns.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trajstore.format import layout
from trajstore.format.codecs import arrow_codec, tensor_codec
from trajstore.format.manifest import SegmentEntry
from trajstore.format.pages import encode_page_index
from trajstore.format.zarr_metadata import group_documents
from trajstore.schema import Column
from trajstore.storage.filesystem import Buffer, Filesystem, ObjectStream
from trajstore.storage.workers import Workers
from trajstore.stored import Stored, empty_rows
from trajstore.write.blocks import BlockPool
from trajstore.write.shard import ArrowFileBuilder, ObjectBuilder, ShardBuilder


@dataclass(frozen=True)
class FinishedSegment:
    """Everything of a segment that still has to be stored, and how a manifest names it."""

    entry: SegmentEntry
    objects: Mapping[str, Sequence[Buffer]]
    streams: Sequence[ObjectStream]


class SegmentBuilder:
    """A segment under construction.

    Args:
        columns: Of every trajectory in it.
        preset: Codec preset of the store.
        filesystem: Large objects are streamed to it as they grow.
        workers: Encode pages.
        blocks: Memory for rows whose page is not full.
    """

    def __init__(
        self,
        columns: Sequence[Column],
        *,
        preset: str | None,
        filesystem: Filesystem,
        workers: Workers,
        blocks: BlockPool,
    ) -> None:
        self.uuid = uuid.uuid4().hex
        self.columns = tuple(columns)
        self.steps = 0
        self.trajectories = 0
        self.raw_bytes = 0
        self._gap_steps = self._gap_trajectories = 0  # skipped, and not yet filled
        self._preset = preset
        self._filesystem = filesystem
        self._shards = {
            c.path: ShardBuilder(c, tensor_codec(c, preset), workers, blocks)
            for c in self.columns
            if c.stored_in == "zarr"
        }
        self._arrow_columns = {
            name: tuple(c for c in self.columns if c.stored_in == "arrow" and c.extra == extra)
            for name, extra in ((layout.STEPS_FILE, 0), (layout.STATES_FILE, 1))
        }
        self._arrow_files: dict[str, ArrowFileBuilder] = {}
        self._streams: dict[str, ObjectStream] = {}
        self._draining = threading.Lock()
        self._broken: Exception | None = None

    @property
    def is_streaming(self) -> bool:
        """Whether a part of it is on its way to the storage."""
        return bool(self._streams)

    @property
    def full_bytes(self) -> int:
        """Bytes of rows in full blocks that wait for a worker."""
        return sum(shard.full_bytes for shard in self._shards.values())

    @property
    def encoding_bytes(self) -> int:
        """Bytes of rows that the workers have."""
        return sum(shard.encoding_bytes for shard in self._shards.values())

    @property
    def page_rows(self) -> dict[str, int]:
        """Rows per page: of each tensor column, and of each Arrow file."""
        tensors = {path: shard.page_rows for path, shard in self._shards.items()}
        return {**tensors, **{name: file.page_rows for name, file in self._arrow_files.items()}}

    def append_rows(self, columns: Mapping[str, Stored]) -> None:
        """Copy rows of the trajectory that is being appended; columns may be at different steps."""
        if self._gap_trajectories:
            self._fill_gap(columns)
        self._append(columns, columns)

    def skip(self, steps: int, trajectories: int) -> None:
        """Rows that nobody will read, all zero or empty, so that what follows lies where it does in another segment.

        Args:
            steps: Of all these trajectories.
            trajectories: How many.
        """
        self._gap_steps += steps
        self._gap_trajectories += trajectories
        self.steps += steps
        self.trajectories += trajectories

    def _fill_gap(self, sample: Mapping[str, Stored]) -> None:
        steps, states = self._gap_steps, self._gap_steps + self._gap_trajectories
        self._gap_steps = self._gap_trajectories = 0
        self._append({c.path: empty_rows(c, states if c.extra else steps) for c in self.columns}, sample)

    def _append(self, columns: Mapping[str, Stored], sample: Mapping[str, Stored]) -> None:
        for name, group in self._arrow_columns.items():
            present = [c for c in group if c.path in columns]
            if not present:
                continue
            if name not in self._arrow_files:
                self._arrow_files[name] = ArrowFileBuilder(name, group, arrow_codec(self._preset), sample)
            self._arrow_files[name].append(columns, len(columns[present[0].path]))
            self.raw_bytes += sum(columns[c.path].nbytes for c in present)
        for path, shard in self._shards.items():
            if path in columns:
                data = columns[path]
                shard.append(data)
                self.raw_bytes += data.nbytes

    def end_trajectory(self, length: int) -> tuple[int, int]:
        """Note that a trajectory's rows are complete.

        Returns:
            Its first row, and its number in the segment.
        """
        start, ordinal = self.steps, self.trajectories
        self.steps += length
        self.trajectories += 1
        return start, ordinal

    def close_pages(self) -> None:
        """No more rows will come."""
        if self._gap_trajectories:
            self._fill_gap({c.path: empty_rows(c, 1) for c in self.columns})
        for shard in self._shards.values():
            shard.close_pages()

    def encode_arrow(self, *, last: bool = False) -> None:
        """Encode full Arrow pages, or with ``last`` all; not beside ``append_rows``."""
        for file in self._arrow_files.values():
            file.encode_full_pages(last=last)

    def drain(self, *, wait: bool = False) -> None:
        """Encode full blocks and take what is encoded; stream objects that have grown large.

        May run beside ``append_rows``.
        """
        with self._draining:
            if self._broken is not None:
                raise self._broken
            try:
                self._drain(wait=wait)
            except Exception as error:
                # Pages are missing from now on: whoever commits this segment must hear of it, whoever drained it before.
                self._broken = error
                raise

    def finish(self) -> FinishedSegment:
        """Encode what is left and build the metadata. Call ``close_pages`` before."""
        self.encode_arrow(last=True)
        self.drain(wait=True)
        sources = [shard.finish() for shard in self._shards.values()]
        sources += [file.finish() for file in self._arrow_files.values()]
        documents = group_documents([shard.zarr_array() for shard in self._shards.values()])
        pages = encode_page_index(sources)
        objects: dict[str, Sequence[Buffer]] = {
            self._key(name): [document] for name, document in {**documents, layout.PAGES_FILE: pages}.items()
        }
        nbytes = sum(len(document) for document in documents.values()) + len(pages)
        for built in self._objects():
            nbytes += built.nbytes
            if built.name in self._streams:
                self._streams[built.name].write(built.take_buffers())
            else:
                objects[self._key(built.name)] = built.take_buffers()
        entry = SegmentEntry(
            uuid=self.uuid,
            steps=self.steps,
            trajectories=self.trajectories,
            nbytes=nbytes,
            columns=tuple(c.path for c in self.columns),
            zarr_sha256=hashlib.sha256(documents[layout.ZARR_METADATA]).hexdigest(),
            pages_sha256=hashlib.sha256(pages).hexdigest(),
        )
        return FinishedSegment(entry, objects, list(self._streams.values()))

    def abandon(self) -> None:
        """Give up; what was streamed may stay as orphans. May be called twice."""
        with self._draining:
            for stream in self._streams.values():
                stream.abandon()
            self._streams.clear()

    def _drain(self, *, wait: bool) -> None:
        for shard in self._shards.values():
            shard.submit()
        for shard in self._shards.values():
            shard.drain(wait=wait)
        for built in self._objects():
            if built.buffered_bytes >= self._filesystem.stream_threshold_bytes:
                if built.name not in self._streams:
                    self._streams[built.name] = self._filesystem.stream(self._key(built.name))
                self._streams[built.name].write(built.take_buffers())

    def _objects(self) -> list[ObjectBuilder]:
        return [s.object for s in self._shards.values()] + [f.object for f in self._arrow_files.values()]

    def _key(self, name: str) -> str:
        return layout.segment_key(self.uuid, name)
