"""Where the bytes of a store are.

Invariant: an object counts once, however many manifests name it, and with whatever layers. What lies in a store that cannot
be opened is counted as far as the manifests tell, and named.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trajstore.errors import TrajstoreError
from trajstore.read.arena import group_name
from trajstore.read.segment import SegmentReaders
from trajstore.read.table import TrajectoryTable


@dataclass
class ObjectUsage:
    """One tensor or derived column, or all columns of an Arrow file, over all segments."""

    columns: tuple[str, ...]
    description: str  # dtype and shape of the first column, or how many columns
    codec: str
    rows: int = 0
    logical_bytes: int | None = 0  # in memory; None where rows have no fixed size
    stored_bytes: int = 0
    pages: int = 0


@dataclass
class StoreUsage:
    """What a version holds and what it costs."""

    version: int
    trajectories: int
    steps: int
    segments: int
    manifests: int
    manifest_bytes: int
    segment_bytes: int  # stored, with all metadata
    objects: dict[str, ObjectUsage] = field(default_factory=dict)
    out_of_reach: int = 0  # segments of which ``objects`` knows nothing: they lie in stores that cannot be opened
    problems: tuple[TrajstoreError, ...] = ()  # why not, one per store


def measure_usage(table: TrajectoryTable, readers: SegmentReaders) -> StoreUsage:
    """Add up the page indexes of all segments that are within reach: one small read per segment."""
    snapshot = table.version.snapshot
    nbytes = {part.uuid: part.nbytes for segment in table.segments for part in segment.parts}
    segments = {segment.key: segment for segment in table.segments}
    out_of_reach = readers.out_of_reach(segments.values())
    usage = StoreUsage(
        version=table.version.number,
        trajectories=len(table),
        steps=int(table.length.sum()),
        segments=len({segment.uuid for segment in table.segments}),
        manifests=len(snapshot.manifests),
        manifest_bytes=sum(entry.nbytes for entry in snapshot.manifests),
        segment_bytes=sum(nbytes.values()),
        out_of_reach=len({segments[key].uuid for key in out_of_reach}),
        problems=tuple({id(problem): problem for problem in out_of_reach.values()}.values()),
    )
    counted: set[tuple[str, str]] = set()  # uuid of a segment or layer, group of columns
    for key, segment in segments.items():
        if key in out_of_reach:
            continue
        reader = readers.open(segment, snapshot.schema)
        for source in {id(s): s for s in reader.sources.values()}.values():
            name = group_name(snapshot.schema[source.columns[0]])
            place = (reader.holder(name).entry.uuid, name)
            if place in counted:
                continue
            counted.add(place)
            columns = [snapshot.schema[path] for path in source.columns]
            described = columns[0].describe() if name == columns[0].path else ", ".join(c.path for c in columns)
            entry = usage.objects.setdefault(name, ObjectUsage(source.columns, described, source.codec))
            entry.rows += source.rows
            entry.pages += len(source.offsets)
            entry.stored_bytes += source.stored_bytes
            if any(c.is_variable for c in columns):
                entry.logical_bytes = None
            elif entry.logical_bytes is not None:
                entry.logical_bytes += source.rows * sum(c.row_bytes for c in columns)
    return usage
