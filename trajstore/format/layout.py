"""Every key of a store is built here, and nowhere else. Keys are relative to the store, separated by ``/``."""

from __future__ import annotations

import re

FORMAT_VERSION = 1

STORE_DOCUMENT = "trajstore.json"
LATEST_HINT = "snapshots/LATEST"
SNAPSHOTS = "snapshots"
MANIFESTS = "manifests"
SEGMENTS = "segments"
TAGS = "tags"
PINS = "pins"
VACUUM = "vacuum"
STATISTICS = "statistics"

STEPS_FILE = "steps.arrow"
STATES_FILE = "states.arrow"
PAGES_FILE = "pages.arrow"
ZARR_METADATA = "zarr.json"

_HOLD = ".hold.json"
_STATISTICS = re.compile(r"^statistics/(\d{20})\.json$")
_SNAPSHOT = re.compile(r"^snapshots/(\d{20})\.json$")


def snapshot_key(version: int) -> str:
    """Key of a version's snapshot; 20 digits, so that names sort as numbers do.

    Examples:
        >>> snapshot_key(7)
        'snapshots/00000000000000000007.json'
    """
    return f"{SNAPSHOTS}/{version:020d}.json"


def snapshot_version(key: str) -> int | None:
    """The version of a snapshot's key, or None for any other key."""
    match = _SNAPSHOT.match(key)
    return int(match.group(1)) if match else None


def manifest_key(uuid: str) -> str:
    """Key of a manifest."""
    return f"{MANIFESTS}/{uuid}.parquet"


def tag_key(name: str) -> str:
    """Key of a tag."""
    return f"{TAGS}/{name}.json"


def pin_key(uuid: str) -> str:
    """Key of a pin."""
    return f"{PINS}/{uuid}.json"


def hold_key(uuid: str) -> str:
    """Key of a pin by which an edit of the store itself keeps a version while it is under way.

    Examples:
        >>> hold_key("00ff")
        'pins/00ff.hold.json'
    """
    return f"{PINS}/{uuid}{_HOLD}"


def is_hold(key: str) -> bool:
    """Whether a key is one of ``hold_key``."""
    return key.startswith(f"{PINS}/") and key.endswith(_HOLD)


def farewell_key(uuid: str) -> str:
    """Key of the versions that a vacuum is about to empty."""
    return f"{VACUUM}/{uuid}.json"


def decision_key(uuid: str) -> str:
    """Key of those that it empties.

    Examples:
        >>> decision_key("00ff")
        'vacuum/00ff.decided.json'
    """
    return f"{VACUUM}/{uuid}.decided.json"


def statistics_key(version: int) -> str:
    """Key of the statistics of a version, which are measured again if they are not there.

    Examples:
        >>> statistics_key(7)
        'statistics/00000000000000000007.json'
    """
    return f"{STATISTICS}/{version:020d}.json"


def statistics_version(key: str) -> int | None:
    """The version of a key of statistics, or None for any other key."""
    match = _STATISTICS.match(key)
    return int(match.group(1)) if match else None


def segment_folder(segment: str) -> str:
    """Prefix of a segment's objects."""
    return f"{SEGMENTS}/{segment}"


def segment_of(key: str) -> str | None:
    """The segment of an object's key, or None for any other key.

    Examples:
        >>> segment_of("segments/00ff/obs/c.0")
        '00ff'
    """
    parts = key.split("/")
    return parts[1] if len(parts) > 2 and parts[0] == SEGMENTS else None


def segment_key(segment: str, name: str) -> str:
    """Key of an object inside a segment."""
    return f"{SEGMENTS}/{segment}/{name}"


def same_object_in(segment: str, key: str) -> str:
    """Key of what is the same object in another segment.

    Examples:
        >>> same_object_in("11ee", "segments/00ff/obs/c.0")
        'segments/11ee/obs/c.0'
    """
    return segment_key(segment, key.split("/", 2)[2])


def shard_name(path: str, rank: int) -> str:
    """Name inside a segment of the one shard that holds a tensor column.

    Args:
        path: The column.
        rank: Dimensions of the Zarr array, the row dimension included.

    Examples:
        >>> shard_name("obs/image", 4)
        'obs/image/c.0.0.0.0'
    """
    return f"{path}/c" + ".0" * rank
