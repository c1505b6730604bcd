"""Stores of many segments with one trajectory each, made by one commit.

Invariant: such a store differs from one that was written as usual only in its segments.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trajstore.format import layout
from trajstore.format.manifest import build_table, encode_manifest, manifest_entry
from trajstore.opening import open_on
from trajstore.schema import Schema
from trajstore.storage.changes import Append
from trajstore.storage.local import LocalFilesystem
from trajstore.values import check_trajectory
from trajstore.write.batch import Ending, total_reward
from trajstore.write.blocks import BlockPool
from trajstore.write.segment import SegmentBuilder


class UnsyncedDisk(LocalFilesystem):
    """A disk that forgets what it holds when the power fails, but is fast: a segment is several files."""

    def _fsync_file(self, descriptor: int, name: str) -> None:
        return

    def _fsync_directory(self, path: str) -> None:
        return


def small_segments(
    url: str | Path, schema: Schema, trajectories: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> None:
    """Make a store.

    Args:
        url: Folder.
        schema: With all metadata fields.
        trajectories: Columns and metadata of each.
    """
    disk = UnsyncedDisk(str(url))
    blocks = BlockPool(1 << 26)
    rows, segments = [], []
    with open_on(disk, "a") as store:
        for tree, metadata in trajectories:
            checked, _ = check_trajectory(tree, schema)
            builder = SegmentBuilder(
                [column for column in schema if column.path in checked.columns],
                preset=None,
                filesystem=disk,
                workers=store._workers,
                blocks=blocks,
            )
            builder.append_rows(checked.columns)
            ending = Ending(checked.length, False, False, total_reward(schema, checked.columns), metadata)
            rows.append(ending.row(builder, uuid=uuid.uuid4().bytes, created_at=dt.datetime.now(dt.UTC)))
            builder.close_pages()
            segment = builder.finish()
            disk.store(segment.objects)
            segments.append(segment.entry)
        manifest = build_table(rows, segments, schema.metadata)
        data = encode_manifest(manifest)
        path = layout.manifest_key(uuid.uuid4().hex)
        disk.store({path: [data]})
        nbytes = sum(segment.nbytes for segment in segments)
        store._history.commit(Append(schema, (manifest_entry(path, data, manifest, 0),), nbytes), store._head)
