"""Hold a whole store against what it says of itself, from versions to manifests to segments, and if asked for to pages.

Invariant: nothing is written, and nothing is believed that a hash does not vouch for; one damaged object does not hide
another, and each fault is told once. A store that others append to meanwhile, or vacuum, gives no finding by that.
"""

from __future__ import annotations

import datetime as dt

from trajstore.edit.check_marks import check_bases, check_documents, check_hint, check_orphans, check_store_document
from trajstore.edit.check_segments import SegmentCounts, check_segments
from trajstore.edit.check_versions import Place, SegmentUse, Versions, check_versions
from trajstore.edit.findings import Counts, Findings, Report
from trajstore.edit.listing import Listing
from trajstore.errors import StorageError
from trajstore.format import layout
from trajstore.progress import byte_progress
from trajstore.read.access import StoreAccess
from trajstore.storage.filesystem import Filesystem


def verify(
    filesystem: Filesystem,
    access: StoreAccess,
    *,
    deep: bool = False,
    progress: bool | None = None,
    now: dt.datetime | None = None,
) -> Report:
    """Check a store.

    Args:
        filesystem: Where it is.
        access: Says which store it is, and opens others that it refers to.
        deep: Also read every page, hold it against its checksum and decode it.
        progress: Show a bar on standard error while pages are read; by default in a terminal, if there is much to read.
        now: Tells old objects from young ones; UTC.

    Returns:
        What was found. Kinds of findings: ``store-document``, ``hint``; ``version-gap``, ``snapshot``, ``format-version``,
        ``parent``, ``created-at``, ``next-id``, ``totals``, ``deleted``, ``manifest-entry``, ``ids``; ``manifest-missing``,
        ``manifest``, ``manifest-rows``, ``segment-table``; ``segment-missing``, ``object-missing``, ``object-size``,
        ``segment-size``, ``page-index``, ``zarr-metadata``, ``abandoned-rows``; with ``deep`` ``page``, ``shard-index`` and
        ``arrow-file``; ``base``, ``base-missing``, ``base-other``, ``base-pin``, ``base-unpinned``; ``tag``, ``pin``,
        ``pin-borrower``, ``pin-unused``, ``statistics``, ``vacuum``; ``orphans``, ``orphans-young``, ``orphans-old``;
        ``unreadable``.

    Raises:
        StorageError: The store's objects cannot even be listed.
    """
    found = Findings()
    # In this order: what is committed from now on is in no listing, and in the versions that are read after it.
    listing = Listing.of(filesystem)
    check_store_document(filesystem, access.store_uuid, found)
    versions = check_versions(filesystem, listing, found)
    check_hint(filesystem, versions, found)
    counts = SegmentCounts()
    by_place: dict[Place, list[SegmentUse]] = {}
    for (place, _), use in sorted(versions.segments.items(), key=lambda item: (item[0][0] or ("", ""), item[0][1])):
        by_place.setdefault(place, []).append(use)
    total = sum(use.entry.nbytes for use in versions.segments.values()) if deep else 0
    with byte_progress("verify", total, shown=progress if deep else False) as advance:
        own = by_place.get(None, [])
        check_segments(filesystem, own, listing.segments, found, counts, deep=deep, advance=advance)
        looked = set()
        for base, elsewhere in check_bases(access.bases, versions, access.store_uuid, found):
            place = (base.url, base.store_uuid)
            if place not in looked:  # several versions of a store may be borrowed from
                looked.add(place)
                check_segments(elsewhere, by_place.get(place, []), None, found, counts, deep=deep, advance=advance)
    if counts.abandoned:
        found.add(
            "note",
            "abandoned-rows",
            layout.SEGMENTS,
            f"{counts.abandoned} segments have rows that no manifest speaks of, of appends that were interrupted; they harm "
            "nothing",
        )
    now = now or dt.datetime.now(dt.UTC)
    orphans = check_documents(filesystem, listing, versions, access.bases, now, found)
    check_orphans(listing, versions, orphans, now, found)
    return Report(
        url=filesystem.url,
        version=versions.latest,
        deep=deep,
        findings=found.settled(emptied=_emptied_meanwhile(filesystem, found), repaired=versions.repaired),
        counts=_counts(versions, counts),
    )


def _emptied_meanwhile(filesystem: Filesystem, found: Findings) -> frozenset[int]:
    """Of the versions that lack something, those that vacuum has emptied while the store was looked at."""
    numbers = found.versions_with_errors()
    try:
        data = filesystem.read_many([layout.snapshot_key(number) for number in numbers])
    except StorageError:
        return frozenset()
    return frozenset(number for number, one in zip(numbers, data, strict=True) if one == b"")


def _counts(versions: Versions, counts: SegmentCounts) -> Counts:
    return Counts(
        versions=len(versions.standing),
        emptied=len(versions.emptied),
        manifests=len(versions.manifests),
        segments=len(versions.segments),
        objects=counts.objects,
        pages=counts.pages,
        pages_read=counts.pages_read,
        nbytes=counts.nbytes,
        nbytes_read=counts.nbytes_read,
    )
