"""Finding the latest version, whatever the hint says."""

from __future__ import annotations

import datetime as dt
import random
from typing import Any

import pytest

from tests.support.faulty import Faults, faulty_bucket
from trajstore.errors import CorruptionError, VersionNotFoundError
from trajstore.format import layout
from trajstore.schema import Schema
from trajstore.storage.changes import Append
from trajstore.storage.commit import EMPTY_VERSION, History, Version
from trajstore.storage.filesystem import Filesystem

COUNTS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 64, 100, 257]


class _Bucket:
    """``count`` versions, and what was asked of it since."""

    def __init__(self, count: int) -> None:
        self.objects: dict[str, Any] = {}
        self.faults = Faults()
        self.filesystem: Filesystem = faulty_bucket(self.objects, self.faults)
        self.history = History(self.filesystem)
        self.head: Version = EMPTY_VERSION
        for _ in range(count):
            self.head = self.history.commit(Append(Schema(), (), 0, operation="test"), self.head)
        self.faults.log.clear()


@pytest.fixture(scope="module")
def buckets() -> dict[int, _Bucket]:
    return {count: _Bucket(count) for count in COUNTS}


@pytest.mark.parametrize("count", COUNTS)
def test_the_latest_is_found_from_any_start(buckets: dict[int, _Bucket], count: int) -> None:
    bucket = buckets[count]
    for start in {0, 1, 2, count // 2, max(count - 1, 0), count, count + 1, count + 2, 3 * count + 50, 10**19}:
        assert bucket.history.latest(start).number == count
        assert bucket.history.latest(start) == bucket.head


@pytest.mark.parametrize("count", COUNTS)
def test_looking_for_the_latest_takes_a_logarithmic_number_of_reads(buckets: dict[int, _Bucket], count: int) -> None:
    bucket = buckets[count]
    bucket.faults.log.clear()
    bucket.history.latest(0)
    assert len(bucket.faults.log) <= 2 * count.bit_length() + 2
    bucket.faults.log.clear()
    if count:
        bucket.history.latest(count)
        assert len(bucket.faults.log) == 2, "a right hint costs the version and the look beyond it"


@pytest.mark.parametrize(
    ("hint", "version"),
    [
        (None, 0), (b"", 0), (b"7", 7), (b" 7\n", 7), (b"-7", 0), (b"7.0", 0), (b"seven", 0), (b"\0\0\0", 0),
        (b"\xff\xfe7", 0), (b"\xc2\xb2", 0), (b"9" * 20, 10**20 - 1), (b"9" * 21, 0), (b"1" * 5000, 0),
    ],
)  # fmt: skip
def test_the_hint_is_a_number_or_nothing(buckets: dict[int, _Bucket], hint: bytes | None, version: int) -> None:
    bucket = buckets[5]
    assert bucket.history.parse_hint(hint) == version
    assert bucket.history.latest(bucket.history.parse_hint(hint)).number == 5


def test_a_commit_on_top_of_any_old_version_lands_on_the_latest() -> None:
    bucket = _Bucket(9)
    history = History(bucket.filesystem, rng=random.Random(0), race_pause_base_s=0.0)
    old = history.load(4)
    version = history.commit(Append(Schema(), (), 0), old)
    assert version.number == 10
    assert version.snapshot.parent_sha256 == bucket.head.sha256
    assert history.races_lost == 1
    assert history.latest(0) == version


def test_versions_are_later_than_their_parents_whatever_the_clock_says() -> None:
    bucket = _Bucket(0)
    noon = dt.datetime(2030, 1, 1, 12, tzinfo=dt.UTC)
    told = [noon, noon - dt.timedelta(days=1), noon, noon + dt.timedelta(seconds=1)]
    clock = iter([time for time in told for _ in range(2)])  # when a commit begins, and for the version
    history = History(bucket.filesystem, now=lambda: next(clock))
    head, times = EMPTY_VERSION, []
    for _ in range(4):
        head = history.commit(Append(Schema(), (), 0), head)
        times.append(head.snapshot.created_at)
    assert times == sorted(set(times))
    assert times[0] == noon
    assert times[-1] == noon + dt.timedelta(seconds=1)


def test_a_version_that_is_not_there_names_the_latest(buckets: dict[int, _Bucket]) -> None:
    with pytest.raises(VersionNotFoundError, match="no version 6; the latest is 5"):
        buckets[5].history.load(6)


def test_a_version_under_another_number_is_refused() -> None:
    bucket = _Bucket(3)
    taken = bucket.filesystem.read(layout.snapshot_key(2))
    bucket.filesystem.overwrite("snapshots/other", taken or b"")
    bucket.objects[f"/bucket/store/{layout.snapshot_key(3)}"] = bucket.objects["/bucket/store/snapshots/other"]
    with pytest.raises(CorruptionError, match=layout.snapshot_key(3)):
        bucket.history.latest(0)
