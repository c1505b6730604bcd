"""Tags and pins of a store: made, found, removed.

Invariant: a mark is written first, and only then is it looked whether its version still stands and no vacuum has announced
its end; vacuum announces first, and only then looks for marks. So one of the two always sees the other.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import replace

from trajstore.errors import (
    CorruptionError,
    StorageError,
    TagExistsError,
    VersionExpiredError,
    VersionNotFoundError,
)
from trajstore.format import layout
from trajstore.format.marks import Farewell, Pin, Tag, check_tag_name
from trajstore.read.bases import absolute
from trajstore.storage.age import check_age
from trajstore.storage.commit import History, Named, Version
from trajstore.storage.filesystem import Filesystem

_log = logging.getLogger(__name__)


def tag(filesystem: Filesystem, history: History, name: str, version: Version, *, move: bool = False) -> Tag:
    """Give a version a name.

    Args:
        filesystem: Where the store is.
        history: Its versions.
        name: The name.
        version: The version.
        move: Take the name from another version.

    Raises:
        TagNameError: A text that cannot be a name.
        TagExistsError: Another version has it.
        VersionExpiredError: Vacuum was faster.
    """
    check_tag_name(name)
    if not version.number:
        raise VersionNotFoundError("version 0 is the empty store and cannot be tagged; append something first")
    made = Tag(name, version.number, version.sha256, dt.datetime.now(dt.UTC))
    key = layout.tag_key(name)
    if filesystem.create(key, made.to_bytes()):
        _check_or_remove(filesystem, history, version, key)
        return made
    found = find_tag(filesystem, name)
    same = found.snapshot_sha256 == made.snapshot_sha256
    if not same and not move:
        raise TagExistsError(
            f"the tag {name!r} of {filesystem.description} is at version {found.version}; choose another name, or move it "
            "(move=True)"
        )
    began = history.moment()
    with held(filesystem, history, version):  # so that the name is not taken from one version and given to none
        check_age(history.moment() - began, where=filesystem.description)  # who sleeps for days is held no more
        if not same:
            filesystem.overwrite(key, made.to_bytes(), durable=True)
    return found if same else made


def untag(filesystem: Filesystem, name: str) -> None:
    """Take a name away; the version stays as long as vacuum lets it.

    Raises:
        VersionNotFoundError: There is no such tag.
    """
    check_tag_name(name)
    key = layout.tag_key(name)
    if filesystem.read(key) is None:
        raise _no_tag(filesystem, name)
    filesystem.remove([key])


def tag_in(version: int | str | None) -> str | None:
    """The name of a tag, if a version is given by one; a number that is given as text is none.

    >>> tag_in("paper"), tag_in("12"), tag_in(12)
    ('paper', None, None)
    """
    return version if isinstance(version, str) and not version.isdecimal() else None


def find_tag(filesystem: Filesystem, name: str) -> Tag:
    """A tag.

    Raises:
        VersionNotFoundError: There is none of this name.
    """
    check_tag_name(name)
    key = layout.tag_key(name)
    data = filesystem.read(key)
    if data is None:
        raise _no_tag(filesystem, name)
    return Tag.from_bytes(data, key=f"{key} in {filesystem.description}")


def check_tagged(filesystem: Filesystem, tag: Tag, version: Version) -> None:
    """Raise ``VersionNotFoundError`` unless a version is the one that was tagged."""
    if version.sha256 != tag.snapshot_sha256:
        raise VersionNotFoundError(
            f"the tag {tag.name!r} of {filesystem.description} is of another version {tag.version} than the one there is: "
            "parts of the store were restored from different copies; give the tag anew (move=True)"
        )


def all_tags(filesystem: Filesystem) -> list[Tag]:
    """Every tag, by name."""
    found = _read_all(filesystem, layout.TAGS).items()
    return [Tag.from_bytes(data, key=f"{key} in {filesystem.description}") for key, data in found]


def all_pins(filesystem: Filesystem, *, past_damage: bool = False) -> list[Pin]:
    """Every pin of another store; where that is, as an absolute URL.

    Args:
        filesystem: Where the store is.
        past_damage: Leave those out that are damaged: not for who wants to know all that is needed.

    Raises:
        CorruptionError: One is damaged.
    """
    found = _pins_and_holds(filesystem, past_damage=past_damage)
    return [pin for key, pin in found if not layout.is_hold(key)]


def find_pins(filesystem: Filesystem, uuids: Iterable[str]) -> list[Pin]:
    """Those of some pins that are there; where the other store is, as an absolute URL.

    Raises:
        CorruptionError: One of them is damaged.
    """
    keys = [layout.pin_key(uuid) for uuid in sorted(uuids)]
    data = zip(keys, filesystem.read_many(keys), strict=True)
    return [_pin_from(filesystem, key, found) for key, found in data if found is not None]


def _pins_and_holds(filesystem: Filesystem, *, past_damage: bool = False) -> list[tuple[str, Pin]]:
    found = []
    for key, data in _read_all(filesystem, layout.PINS).items():
        try:
            found.append((key, _pin_from(filesystem, key, data)))
        except CorruptionError:
            if not past_damage:
                raise
    return found


def _pin_from(filesystem: Filesystem, key: str, data: bytes) -> Pin:
    pin = Pin.from_bytes(data, key=f"{key} in {filesystem.description}")
    return replace(pin, borrower_url=absolute(pin.borrower_url, seen_from=filesystem.url))


def marked_versions(filesystem: Filesystem) -> set[int]:
    """Numbers of the versions that are tagged, pinned or held.

    Pins and holds are looked for first: whoever moves a tag holds its version until the tag is in place.
    """
    pinned = {pin.version for _, pin in _pins_and_holds(filesystem)}
    return pinned | {tag.version for tag in all_tags(filesystem)}


def pin(filesystem: Filesystem, history: History, version: Named, *, borrower_uuid: str, borrower_url: str) -> Pin:
    """Keep a version for another store, which refers to its segments.

    Args:
        filesystem: Where the store is that owns the segments.
        history: Its versions.
        version: The version whose segments are referred to.
        borrower_uuid: The other store.
        borrower_url: Where it is, as ``reference`` names it.

    Raises:
        VersionExpiredError: Vacuum was faster.
        StorageError: The store cannot be written.
    """
    made = Pin(uuid.uuid4().hex, version.number, version.sha256, borrower_uuid, borrower_url, dt.datetime.now(dt.UTC))
    _put(filesystem, history, version, layout.pin_key(made.uuid), made)
    return made


def _put(filesystem: Filesystem, history: History, version: Named, key: str, made: Pin) -> None:
    try:
        filesystem.create(key, made.to_bytes())  # whole at once: vacuum may read it any time
    except BaseException:
        _remove_mark(filesystem, key)  # it may be there all the same
        raise
    _check_or_remove(filesystem, history, version, key)


def replace_pin(filesystem: Filesystem, pin: Pin) -> None:
    """Have a pin say something else of its store; it keeps what it kept throughout.

    Raises:
        StorageError: The store cannot be written.
    """
    filesystem.overwrite(layout.pin_key(pin.uuid), pin.to_bytes(), durable=True)


def unpin(filesystem: Filesystem, pin_uuid: str) -> None:
    """Keep it no longer."""
    filesystem.remove([layout.pin_key(pin_uuid)])


@contextlib.contextmanager
def held(filesystem: Filesystem, history: History, version: Named) -> Iterator[None]:
    """Inside the block no vacuum takes this version away: for whoever commits a version that names what it names.

    A vacuum removes what is left of one that was killed, once it is older than the grace. Whoever commits inside says that
    the work began before, so that a commit that comes so late is refused.

    Raises:
        VersionExpiredError: Vacuum was faster.
    """
    if not version.number:
        yield
        return
    made = Pin(uuid.uuid4().hex, version.number, version.sha256, "0" * 32, filesystem.url, dt.datetime.now(dt.UTC))
    key = layout.hold_key(made.uuid)
    _put(filesystem, history, version, key, made)
    try:
        yield
    finally:
        try:
            filesystem.remove([key])
        except StorageError as error:  # what was done inside is done
            _log.warning(
                "%s of %s was not removed, and keeps version %s: %s", key, filesystem.description, version.number, error
            )


def farewells(filesystem: Filesystem) -> dict[str, Farewell]:
    """What vacuums have announced and not yet finished, and what they decided, by key."""
    return {
        key: Farewell.from_bytes(data, key=f"{key} in {filesystem.description}")
        for key, data in _read_all(filesystem, layout.VACUUM).items()
    }


def _check_or_remove(filesystem: Filesystem, history: History, version: Named, key: str) -> None:
    """Fail, without the mark, unless its version still stands now that the mark is there."""
    try:
        _check_stands(filesystem, history, version)
    except BaseException:
        _remove_mark(filesystem, key)
        raise


def _remove_mark(filesystem: Filesystem, key: str) -> None:
    with contextlib.suppress(StorageError):  # a mark that stays behind keeps a version, no more
        filesystem.remove([key])


def _check_stands(filesystem: Filesystem, history: History, version: Named) -> None:
    # Announcements first: one that is not there any more has emptied its slots.
    if any(version.number in farewell.versions for farewell in farewells(filesystem).values()):
        raise VersionExpiredError(
            f"version {version.number} of {filesystem.description} is being removed by vacuum; take a later one "
            "(store.versions() lists them), or, if that vacuum was killed, run it again and try once more"
        )
    if not history.holds(version):
        raise CorruptionError(
            f"version {version.number} of {filesystem.description} is not the one that was read before: the store was "
            "replaced meanwhile; open it again"
        )


def _no_tag(filesystem: Filesystem, name: str) -> VersionNotFoundError:
    names = [tag.name for tag in all_tags(filesystem)]
    return VersionNotFoundError(
        f"{filesystem.description} has no tag {name!r}; its tags are {', '.join(map(repr, names)) or 'none'}"
    )


def _read_all(filesystem: Filesystem, folder: str) -> dict[str, bytes]:
    keys = [info.key for info in filesystem.list_objects(folder) if info.key.endswith(".json")]
    found = zip(keys, filesystem.read_many(keys), strict=True)
    return {key: data for key, data in found if data is not None}  # the others were removed meanwhile
