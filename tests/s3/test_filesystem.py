"""A bucket keeps every promise of a filesystem: on a server with moto's habits and on one with Ceph's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.storage.test_filesystem import FilesystemConformance
from trajstore.storage.connect import connect
from trajstore.storage.filesystem import Filesystem


class TestBucket(FilesystemConformance):
    @pytest.fixture
    def filesystem(self, anywhere: tuple[str, dict[str, Any]]) -> Iterator[Filesystem]:
        url, options = anywhere
        filesystem = connect(url, storage_options=options)
        yield filesystem
        filesystem.close()
