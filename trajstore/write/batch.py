"""What waits to be committed together, the reference that its caller holds meanwhile, and the knobs of writing."""

from __future__ import annotations

import datetime as dt
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from trajstore.errors import CommitError, CommitOutcomeUnknownError, TrajstoreError
from trajstore.format.layout import manifest_key
from trajstore.format.manifest import (
    Manifest,
    SegmentEntry,
    TrajectoryRow,
    build_table,
    check_metadata,
    encode_manifest,
    manifest_entry,
)
from trajstore.format.snapshot import ManifestEntry
from trajstore.schema import Schema
from trajstore.storage.commit import Version
from trajstore.storage.filesystem import Filesystem, ObjectStream
from trajstore.stored import Stored
from trajstore.write.segment import SegmentBuilder


@dataclass(frozen=True)
class WriteOptions:
    """Knobs of a store that is written to.

    Attributes:
        codec: Preset ``"fast"``, ``"small"`` or ``"none"``; None for defaults per dtype.
        segment_bytes: A segment is committed once it holds this many bytes, before compression.
        commit_interval_s: Appended trajectories are committed at least this often.
        write_buffer_bytes: ``append`` waits while more bytes than this are waiting to be encoded.
        spill_bytes: A streaming episode writes full pages once it holds this many bytes.
    """

    codec: str | None = None
    segment_bytes: int = 256 * 1024 * 1024
    commit_interval_s: float = 30.0
    write_buffer_bytes: int = 64 * 1024 * 1024  # within reach of a processor's cache: encoding is faster there
    spill_bytes: int = 16 * 1024 * 1024

    def __post_init__(self) -> None:
        for name in ("segment_bytes", "commit_interval_s", "write_buffer_bytes", "spill_bytes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}, expected a positive number")


class TrajectoryRef:
    """What ``append`` returns: the trajectory's identity, known at once, and its number, known once committed."""

    def __init__(self, uuid_bytes: bytes) -> None:
        self._uuid = uuid_bytes
        self._id: int | None = None

    @property
    def uuid(self) -> uuid.UUID:
        """Identity, made at append."""
        return uuid.UUID(bytes=self._uuid)

    @property
    def id(self) -> int | None:
        """Number in the store, in commit order; None until committed."""
        return self._id

    def __repr__(self) -> str:
        return f"TrajectoryRef(uuid={self.uuid}, id={self._id})"


class Follower(Protocol):
    """Who wants to know of trajectories before they are committed."""

    def appended(
        self,
        rows: Sequence[TrajectoryRow],
        columns: Mapping[str, Stored],
        page_rows: Mapping[str, int],
        schema: Schema,
    ) -> bool:
        """Trajectories were appended, end to end; whether they are shown, or else have to be committed first."""

    def committed(self, version: Version, entries: Sequence[SegmentEntry], ids: Mapping[bytes, int]) -> None:
        """Trajectories were committed: their segments, and their numbers by uuid."""

    def lost(self, segments: Sequence[str]) -> None:
        """Trajectories in these segments could not be committed."""

    def advance(self, version: Version) -> None:
        """The store has a newer version."""


@dataclass(frozen=True)
class Ending:
    """What is known of a trajectory besides its columns."""

    length: int  # steps
    terminated: bool
    truncated: bool
    reward_sum: float | None
    metadata: Mapping[str, Any]

    def row(self, builder: SegmentBuilder, *, uuid: bytes, created_at: dt.datetime) -> TrajectoryRow:
        """The manifest's row of the trajectory whose rows a segment received last."""
        start, ordinal = builder.end_trajectory(self.length)
        return TrajectoryRow(
            uuid=uuid,
            segment=builder.uuid,
            start=start,
            ordinal=ordinal,
            length=self.length,
            terminated=bool(self.terminated),
            truncated=bool(self.truncated),
            reward_sum=self.reward_sum,
            created_at=created_at,
            metadata=self.metadata,
        )


@dataclass(eq=False)
class Batch:
    """Trajectories that become visible together."""

    number: int
    shared: dict[tuple[str, ...], SegmentBuilder] = field(default_factory=dict)
    builders: list[SegmentBuilder] = field(default_factory=list)
    rows: list[tuple[TrajectoryRef, TrajectoryRow]] = field(default_factory=list)
    schema: Schema | None = None
    opened_at: float = 0.0

    def uses(self, field_name: str) -> bool:
        """Whether a trajectory has this metadata field."""
        return any(field_name in row.metadata for _, row in self.rows)

    def store(self, filesystem: Filesystem, schema: Schema) -> tuple[ManifestEntry, Manifest]:
        """Store the segments and a manifest of them; when this returns, all of it is durable and nobody sees it yet."""
        for builder in self.builders:
            builder.close_pages()
        segments = [builder.finish() for builder in self.builders]
        fields = {name: kind for name, kind in schema.metadata.items() if self.uses(name)}
        manifest = build_table([row for _, row in self.rows], [s.entry for s in segments], fields)
        data = encode_manifest(manifest)
        path = manifest_key(uuid.uuid4().hex)
        objects: dict[str, Any] = {path: [data]}
        streams: list[ObjectStream] = []
        for segment in segments:
            objects.update(segment.objects)
            streams += segment.streams
        # The manifest need not wait for the segments: nobody sees either before the snapshot.
        filesystem.store(objects, streams)
        return manifest_entry(path, data, manifest, first_id=0), manifest


def checked_metadata(metadata: Mapping[str, Any], schema: Schema) -> tuple[dict[str, Any], Schema]:
    """Metadata as it is stored, and the schema with the fields that it adds."""
    stored, added = check_metadata(metadata, schema.metadata)
    return stored, schema.with_metadata(added) if added else schema


def endings_of(
    columns: Mapping[str, Stored],
    lengths: Sequence[int],
    terminated: Sequence[bool],
    truncated: Sequence[bool],
    metadata: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    schema: Schema,
) -> tuple[list[Ending], Schema]:
    """What is known of several trajectories, and the schema with the fields that they add."""
    common, schema = checked_metadata(shared, schema)
    checked = []
    for values in metadata:
        fields, schema = checked_metadata(values, schema)
        checked.append({**common, **fields})
    rewards = total_rewards(schema, columns, lengths)
    endings = [Ending(*e) for e in zip(lengths, terminated, truncated, rewards, checked, strict=True)]
    return endings, schema


def total_reward(schema: Schema, columns: Mapping[str, Stored]) -> float | None:
    """Sum of the scalar numeric column ``reward`` in float64, or None without one."""
    return float(columns["reward"].sum(dtype=np.float64)) if _has_reward(schema, columns) else None


def total_rewards(schema: Schema, columns: Mapping[str, Stored], lengths: Sequence[int]) -> Sequence[float | None]:
    """The same for each of several trajectories, end to end."""
    if not _has_reward(schema, columns):
        return [None] * len(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    sums: list[float | None] = np.add.reduceat(columns["reward"].astype(np.float64), starts).tolist()
    return sums


def _has_reward(schema: Schema, columns: Mapping[str, Stored]) -> bool:
    column = schema.get("reward")
    if column is None or "reward" not in columns or column.shape or column.is_variable or column.extra:
        return False
    kind = column.physical_dtype.kind
    return column.dtype != "bfloat16" and kind != "c" and not column.dtype.startswith(("date", "time"))


class FreshUuids:
    """Random (version 4) UUIDs, RFC 9562; asking the kernel for each costs more than copying 100 kB."""

    def __init__(self) -> None:
        self._entropy = b""

    def next(self) -> bytes:
        """The next."""
        if not self._entropy:
            self._entropy = os.urandom(16 * 256)
        raw, self._entropy = bytearray(self._entropy[:16]), self._entropy[16:]
        raw[6] = raw[6] & 0x0F | 0x40
        raw[8] = raw[8] & 0x3F | 0x80
        return bytes(raw)


def lost_error(error: Exception, count: int) -> Exception:
    """The error as the user gets it: with what it means for the data."""
    if not isinstance(error, TrajstoreError):
        wrapped = CommitError(f"committing failed: {error!r}")
        wrapped.__cause__ = error
        error = wrapped
    if count:
        certain = "may or may not be" if isinstance(error, CommitOutcomeUnknownError) else "are not"
        told = f"{error}; {count} trajectories appended since the last commit {certain} in the store"
        error.args = (*error.args[:-1], told)
    return error
