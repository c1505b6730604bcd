"""Pins in other stores that this one needs no longer.

Invariant: a pin goes only if no standing version of this store names it, if it is this store's and not that of a copy of it
that somebody made by hand, and, unless a version named it before, if it is so old that no commit may still come to name it.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from trajstore.edit.borrow import in_each
from trajstore.edit.marks import all_pins, find_pins, unpin
from trajstore.errors import CorruptionError, StoreNotFoundError, TrajstoreError
from trajstore.format import layout
from trajstore.format.marks import Pin
from trajstore.format.snapshot import Base
from trajstore.read.bases import same_place
from trajstore.storage.age import GRACE
from trajstore.storage.filesystem import Filesystem

OpenBase = Callable[[Base], Filesystem]


@dataclass(frozen=True)
class Borrower:
    """The store that has pins in others.

    Attributes:
        url: Where it is.
        store_uuid: Its identity.
        open_base: Opens another store for writing, or raises ``TrajstoreError``.
    """

    url: str
    store_uuid: str
    open_base: OpenBase


@dataclass
class ReleasedPins:
    """What became of pins that are no longer needed.

    Attributes:
        released: That were removed, and where.
        kept: Where some stay, and why.
    """

    released: list[tuple[str, Pin]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)


def release_pins(
    borrower: Borrower,
    unused: Iterable[Base],
    used: Iterable[Base],
    *,
    now: dt.datetime | None = None,
) -> ReleasedPins:
    """Remove pins that no standing version names.

    Args:
        borrower: Whose they are.
        unused: That only versions named which are gone, as ``vacuum`` found them.
        used: That standing versions name.
        now: UTC. Given, pins are looked for that no version ever named: those of a merge that was killed. None looks only
            for ``unused``, with fewer requests.
    """
    used = list(used)
    needed = {base.pin for base in used}
    stores: dict[tuple[str, str], list[Base]] = {}
    for base in [*unused, *(used if now is not None else ())]:
        stores.setdefault((base.url, base.store_uuid), []).append(base)
    done = ReleasedPins()

    def release(bases: Sequence[Base]) -> None:
        try:
            owner = borrower.open_base(bases[0])
            for pin in _candidates(owner, borrower, bases, needed, now):
                other = _elsewhere(pin, borrower)
                if other:
                    done.kept.append((owner.description, f"the pin {pin.uuid} stays: {other}"))
                else:
                    unpin(owner, pin.uuid)
                    done.released.append((owner.url, pin))
        except TrajstoreError as error:
            if any(base.pin is not None and base.pin not in needed for base in bases):
                done.kept.append((bases[0].url, str(error)))

    in_each(release, stores.values())
    return done


def _candidates(
    owner: Filesystem, borrower: Borrower, bases: Sequence[Base], needed: set[str | None], now: dt.datetime | None
) -> Iterator[Pin]:
    """Pins in a store that may go, unless they are those of a copy."""
    named = {base.pin for base in bases if base.pin is not None} - needed
    yield from (pin for pin in find_pins(owner, named) if pin.borrower_uuid == borrower.store_uuid)
    if now is None:
        return
    written = {info.key: info.modified for info in owner.list_objects(layout.PINS)}
    for pin in all_pins(owner, past_damage=True):
        modified = written.get(layout.pin_key(pin.uuid))
        if pin.uuid in needed or pin.uuid in named or pin.borrower_uuid != borrower.store_uuid or modified is None:
            continue
        # By two clocks, that of the storage and that of whoever made it: a commit may be under way that will name it.
        if now - max(modified, pin.created_at) > GRACE:
            yield pin


def _elsewhere(pin: Pin, borrower: Borrower) -> str | None:
    """Why a pin may be that of another store with the identity of this one; None if it is this one's."""
    if same_place(pin.borrower_url, borrower.url):
        return None
    try:
        borrower.open_base(Base(pin.borrower_url, pin.borrower_uuid))
    except (StoreNotFoundError, CorruptionError):  # this store was moved from there
        return None
    except TrajstoreError as error:
        return f"it was made for {pin.borrower_url}, and whether that is still there is not known ({error})"
    return f"it was made for {pin.borrower_url}, of which {borrower.url} is a copy"
