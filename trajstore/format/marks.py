"""Small documents beside the versions: tags and pins, which keep one, and farewells, which say that some are about to go.

Invariant: a mark names its version by number and by hash, so that it cannot come to mean another one.
"""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass

from trajstore.errors import CorruptionError, TagNameError
from trajstore.format.document import seal, unseal
from trajstore.format.layout import FORMAT_VERSION

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_RESERVED = (
    "latest"  # what people call the version that is opened by default, which a tag of this name would not follow
)
_UUID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Tag:
    """A name for a version."""

    name: str
    version: int
    snapshot_sha256: str
    created_at: dt.datetime  # UTC

    def to_bytes(self) -> bytes:
        """The document's bytes."""
        return seal({"format": FORMAT_VERSION, **vars(self), "created_at": _text(self.created_at)})

    @classmethod
    def from_bytes(cls, data: bytes, *, key: str) -> Tag:
        """Parse and check; raises ``CorruptionError`` or ``FormatVersionError``."""
        document = unseal(data, key=key)
        try:
            found = cls(
                document["name"], document["version"], document["snapshot_sha256"], _time(document["created_at"])
            )
            check_tag_name(found.name)
            _check_version(found.version)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptionError(f"{key} is not a tag ({error!r}); remove it, and tag the version again") from error
        return found


@dataclass(frozen=True)
class Pin:
    """Another store refers to segments of a version."""

    uuid: str
    version: int
    snapshot_sha256: str
    borrower_uuid: str  # of the other store
    borrower_url: (
        str  # where it was then: relative if it has the parent folder of the store that is pinned, else absolute
    )
    created_at: dt.datetime  # UTC

    def to_bytes(self) -> bytes:
        """The document's bytes."""
        return seal({"format": FORMAT_VERSION, **vars(self), "created_at": _text(self.created_at)})

    @classmethod
    def from_bytes(cls, data: bytes, *, key: str) -> Pin:
        """Parse and check; raises ``CorruptionError`` or ``FormatVersionError``."""
        document = unseal(data, key=key)
        try:
            found = cls(
                document["uuid"],
                document["version"],
                document["snapshot_sha256"],
                document["borrower_uuid"],
                document["borrower_url"],
                _time(document["created_at"]),
            )
            _check_uuid(found.uuid)
            _check_version(found.version)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptionError(f"{key} is not a pin ({error!r}); restore it from a copy") from error
        return found


@dataclass(frozen=True)
class Farewell:
    """Versions that a vacuum is about to empty, or has decided to empty."""

    uuid: str
    versions: tuple[int, ...]  # ascending

    def to_bytes(self) -> bytes:
        """The document's bytes."""
        return seal({"format": FORMAT_VERSION, "uuid": self.uuid, "versions": list(self.versions)})

    @classmethod
    def from_bytes(cls, data: bytes, *, key: str) -> Farewell:
        """Parse and check; raises ``CorruptionError`` or ``FormatVersionError``."""
        document = unseal(data, key=key)
        try:
            found = cls(document["uuid"], tuple(document["versions"]))
            _check_uuid(found.uuid)
            for version in found.versions:
                _check_version(version)
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptionError(f"{key} is not a vacuum's note ({error!r}); restore it from a copy") from error
        return found


def check_tag_name(name: str) -> None:
    """Raise ``TagNameError`` unless a name can be a tag's."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.isdigit():
        raise TagNameError(
            f"tag {name!r}: a name has letters, digits, '.', '_' and '-', begins with a letter or digit, and is no number"
        )
    if name == _RESERVED:
        raise TagNameError(
            f"tag {name!r}: no tag has this name, since the latest version is the one without a name; leave out the version "
            "to open it, and give a tag another name"
        )


def _check_version(version: object) -> None:
    if type(version) is not int or version < 1:
        raise ValueError(f"version {version!r}")


def _check_uuid(uuid: object) -> None:
    if not isinstance(uuid, str) or not _UUID.fullmatch(uuid):
        raise ValueError(f"uuid {uuid!r}")


def _text(time: dt.datetime) -> str:
    return time.isoformat(timespec="microseconds")


def _time(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text)
