"""Statistics of whole versions, kept by the handle and, if it may write, in the store.

Invariant: what is kept can be measured again, so a document that is broken or that cannot be written costs time, is said
in the log, and is never an error.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict

from trajstore.errors import TrajstoreError
from trajstore.format import layout
from trajstore.format.statistics import Statistics
from trajstore.storage.commit import Version
from trajstore.storage.filesystem import Filesystem

_log = logging.getLogger(__name__)

_VERSIONS = 8


class KeptStatistics:
    """The statistics that a handle knows. Used by several threads.

    A version has one document, with all columns and quantiles that anybody asked for. When two handles write it at once, the
    later one stays.

    Args:
        filesystem: Where the store is.
        writes: Whether to keep them in the store as well.
    """

    def __init__(self, filesystem: Filesystem, *, writes: bool = False) -> None:
        self.writes = writes
        self._filesystem = filesystem
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Statistics] = OrderedDict()  # by hash of the snapshot

    def find(self, version: Version) -> Statistics | None:
        """What is known of a version."""
        with self._lock:
            if version.sha256 in self._known:
                self._known.move_to_end(version.sha256)
                return self._known[version.sha256]
        key = layout.statistics_key(version.number)
        try:
            data = self._filesystem.read(key)
            if data is None:
                return None
            named = f"{key} in {self._filesystem.description}"
            found = Statistics.from_bytes(data, snapshot_sha256=version.sha256, key=named)
        except TrajstoreError as error:
            _log.warning("statistics are measured anew: %s", error)
            return None
        self._remember(version, found)
        return found

    def keep(self, version: Version, statistics: Statistics) -> None:
        """Remember the statistics of a version, all that is known of it."""
        self._remember(version, statistics)
        if not self.writes:
            return
        key = layout.statistics_key(version.number)
        try:
            self._filesystem.overwrite(key, statistics.to_bytes(snapshot_sha256=version.sha256), durable=True)
        except TrajstoreError as error:
            _log.warning("the statistics %s were not written: %s", key, error)

    def _remember(self, version: Version, statistics: Statistics) -> None:
        with self._lock:
            self._known[version.sha256] = statistics
            self._known.move_to_end(version.sha256)
            while len(self._known) > _VERSIONS:
                self._known.popitem(last=False)
