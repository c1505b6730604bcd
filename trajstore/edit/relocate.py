"""Say where the stores are now that a store refers to, after they were moved.

Invariant: a base gets another URL only after the store there was found to be the one that was meant; its pin says where the
store is that made it, as seen from there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trajstore.edit.marks import find_pins, replace_pin
from trajstore.errors import SelectionError, TrajstoreError
from trajstore.format.snapshot import Base, Snapshot
from trajstore.read.bases import Bases, absolute, moved, reference, same_place
from trajstore.storage.changes import MergedManifests, ReadManifests

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Relocate:
    """Gives bases other URLs; a base that another writer added meanwhile stays as it is.

    Attributes:
        urls: Old URL and identity of a store -> new URL.
    """

    urls: Mapping[tuple[str, str], str]
    operation: str = field(default="relocate", init=False)
    merges: bool = field(default=False, init=False)

    def apply(self, parent: Snapshot, merged: MergedManifests | None, read: ReadManifests) -> Snapshot:  # noqa: ARG002
        """The next snapshot."""
        bases = tuple(replace(b, url=self.urls.get((b.url, b.store_uuid), b.url)) for b in parent.bases)
        return replace(parent, operation=self.operation, bases=bases)


def relocation(
    snapshot: Snapshot, bases: Bases, old: str | os.PathLike[str], new: str | os.PathLike[str], *, url: str
) -> Relocate:
    """The change that follows stores to where they were moved.

    Args:
        snapshot: The store's latest version.
        bases: Opens the stores that it refers to.
        old: Where they were: a URL that their URLs begin with, or the text that the store has for it (``"../runs"``).
        new: What their URLs begin with now.
        url: Where the store itself is.

    Raises:
        SelectionError: The store refers to nothing there.
        UntrustedBaseError: The new place is outside the store's parent and the prefixes that it was opened with.
        StoreNotFoundError: No store is at the new place.
        CorruptionError: Another store is there.
    """
    was, to = os.fspath(old), absolute(os.fspath(new))
    urls: dict[tuple[str, str], str] = {}
    as_stored = any(moved(base.url, was, to) for base in snapshot.bases)  # else it is seen from the working directory
    for base in snapshot.bases:
        place = moved(base.url, was, to) if as_stored else moved(absolute(base.url, seen_from=url), absolute(was), to)
        if place is None:
            continue
        found = Base(reference(place, seen_from=url), base.store_uuid)
        bases.open(found)
        urls[base.url, base.store_uuid] = found.url
    if not urls:
        known = ", ".join(sorted({repr(absolute(base.url, seen_from=url)) for base in snapshot.bases})) or "none at all"
        raise SelectionError(f"{url} refers to no store whose URL begins with {was!r}; it refers to {known}")
    return Relocate(urls)


def readdress_pins(change: Relocate, snapshot: Snapshot, bases: Bases, *, url: str) -> None:
    """Have the pins of a store in those that were moved say where it is, seen from where they are now.

    Args:
        change: Which were moved.
        snapshot: The version that came of it.
        bases: Opens the stores that it refers to.
        url: Where it is itself.
    """
    for base in snapshot.bases:
        if base.pin is None or base.url not in change.urls.values():
            continue
        try:
            owner = bases.open(base)
            for pin in find_pins(owner, [base.pin]):
                if not same_place(pin.borrower_url, url):
                    replace_pin(owner, replace(pin, borrower_url=reference(url, seen_from=owner.url)))
        except TrajstoreError as error:  # a pin that says another place keeps what it keeps
            _log.warning("the pin of %s in %s still says where it was: %s", url, base.url, error)
