"""trajstore: a durable, versioned, columnar store of reinforcement-learning trajectories.

import trajstore

with trajstore.open("runs/demo", mode="a") as store:
    store.append({"obs": obs, "action": action, "reward": reward}, terminated=True, task="pick")

for batch in trajstore.open("runs/demo").trajectories.loader(256, window=16):
    ...
"""

import importlib
from typing import TYPE_CHECKING, Any

from trajstore.arrange import merge, split
from trajstore.edit.compact import Compacted
from trajstore.edit.findings import Report
from trajstore.edit.vacuum import Vacuumed
from trajstore.edit.versions import Diff
from trajstore.errors import (
    BufferFullError,
    CacheTooSmallError,
    ClosedError,
    ColumnNameError,
    ColumnShapeError,
    ColumnTypeError,
    CommitError,
    CommitOutcomeUnknownError,
    CommitTooOldError,
    CorruptionError,
    EditUnderWayError,
    EmptyBufferError,
    EnvironmentNotFoundError,
    ForkedError,
    FormatVersionError,
    IndexRangeError,
    LengthError,
    ManifestsChangedError,
    MetadataError,
    MissingColumnError,
    MissingObjectError,
    ReadOnlyError,
    RecordingError,
    SchemaConflictError,
    SchemaError,
    SelectionError,
    StorageError,
    StoragePermissionError,
    StorageTimeoutError,
    StoreExistsError,
    StoreNotFoundError,
    TagExistsError,
    TagNameError,
    TrajstoreError,
    UnknownColumnError,
    UnsupportedStorageError,
    UntrustedBaseError,
    UntrustedPickleError,
    VersionExpiredError,
    VersionNotFoundError,
)
from trajstore.format.statistics import ColumnStatistics, Statistics
from trajstore.mix import Mix, mix
from trajstore.opening import open
from trajstore.read.leases import CacheStats
from trajstore.read.usage import StoreUsage
from trajstore.sample.window import future
from trajstore.schema import Column, Schema
from trajstore.store import Store
from trajstore.trajectory import Trajectory, TrajectoryColumn
from trajstore.view import View
from trajstore.write.batch import TrajectoryRef
from trajstore.write.episode import Episode

if TYPE_CHECKING:
    from trajstore.feed.loader import Loader, LoaderStats
    from trajstore.feed.normalize import ColumnNormalization, Normalization

__version__ = "0.1.0"

__all__ = [
    # what people hold
    "open",
    "merge",
    "split",
    "Store",
    "View",
    "Trajectory",
    "TrajectoryColumn",
    "Episode",
    "TrajectoryRef",
    "Loader",
    "LoaderStats",
    "CacheStats",
    "future",
    "Mix",
    "mix",
    "Column",
    "Schema",
    "__version__",
    # what they are told
    "Statistics",
    "ColumnStatistics",
    "Normalization",
    "ColumnNormalization",
    "StoreUsage",
    "Diff",
    "Report",
    "Compacted",
    "Vacuumed",
    # errors
    "BufferFullError",
    "CacheTooSmallError",
    "ClosedError",
    "ColumnNameError",
    "ColumnShapeError",
    "ColumnTypeError",
    "CommitError",
    "CommitOutcomeUnknownError",
    "CommitTooOldError",
    "CorruptionError",
    "EmptyBufferError",
    "EnvironmentNotFoundError",
    "ForkedError",
    "FormatVersionError",
    "IndexRangeError",
    "LengthError",
    "ManifestsChangedError",
    "MetadataError",
    "MissingColumnError",
    "MissingObjectError",
    "EditUnderWayError",
    "ReadOnlyError",
    "RecordingError",
    "SchemaConflictError",
    "SchemaError",
    "SelectionError",
    "StorageError",
    "StoragePermissionError",
    "StorageTimeoutError",
    "StoreExistsError",
    "StoreNotFoundError",
    "TagExistsError",
    "TagNameError",
    "TrajstoreError",
    "UnknownColumnError",
    "UnsupportedStorageError",
    "UntrustedBaseError",
    "UntrustedPickleError",
    "VersionExpiredError",
    "VersionNotFoundError",
]

# What comes with the first batch, and with torch, which takes seconds to import.
_DEFERRED = {
    "Loader": "trajstore.feed.loader",
    "LoaderStats": "trajstore.feed.loader",
    "Normalization": "trajstore.feed.normalize",
    "ColumnNormalization": "trajstore.feed.normalize",
}


def __getattr__(name: str) -> Any:
    if name not in _DEFERRED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_DEFERRED[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_DEFERRED})
