"""The memory of a page cache: arenas for groups of columns, how it is divided among them, and who has to go for whom.

Invariant: the arenas never take more than the cache's bytes; every group in use has room for one window; pages of segments
that are being written survive a new division. There is no lock here: the cache's lock guards everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trajstore.deferred import torch
from trajstore.errors import CacheTooSmallError
from trajstore.read.arena import Need, PageGroup
from trajstore.read.division import Claim, divide
from trajstore.read.leases import Pages

_VARIABLE_PART = 8  # of the cache's bytes, one for strings and lists, if they are read


@dataclass(frozen=True)
class Division:
    """How the memory is, or would be, divided; all by group.

    Attributes:
        needs: What is needed of it.
        largest: Rows of the largest extent that some page needs.
        capacities: Rows of its arenas.
    """

    needs: Mapping[str, Need]
    largest: Mapping[str, int]
    capacities: Mapping[str, int]


class Arenas:
    """The arenas of all groups.

    Args:
        nbytes: Hard bound of all of them.
        device: Where they are.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes = nbytes
        self.groups: dict[str, PageGroup] = {}
        self.needs: dict[str, Need] = {}
        self.evictions = 0
        self._device = device
        self._users: dict[str, int] = {}
        self._set_aside = False

    @property
    def used_bytes(self) -> int:
        """Bytes that hold pages."""
        return sum(group.used_bytes for group in self.groups.values())

    @property
    def capacity_bytes(self) -> int:
        """Bytes of all arenas."""
        return sum(group.capacity_bytes for group in self.groups.values())

    def set_aside(self) -> int:
        """Leave a part for strings and lists from the next division on; returns its bytes."""
        self._set_aside = True
        return self.nbytes // _VARIABLE_PART

    def begin_use(self, names: Iterable[str]) -> None:
        """Somebody more needs these groups."""
        for name in names:
            self._users[name] = self._users.get(name, 0) + 1

    def end_use(self, names: Iterable[str]) -> None:
        """Somebody needs them no longer."""
        for name in names:
            if name in self._users:
                self._users[name] -= 1

    def clear(self) -> None:
        """Give all memory up."""
        self.groups.clear()
        self.needs.clear()
        self._users.clear()

    def division(self, needs: Mapping[str, Need], largest: Mapping[str, int]) -> Division:
        """What would serve these needs and all that are in use.

        Args:
            needs: By group.
            largest: Rows of the largest extent that some pages need, by group.

        Raises:
            CacheTooSmallError: One window needs more than there is; says how much.
        """
        wanted = {name: need for name, need in self.needs.items() if self._users.get(name)}
        wanted |= {name: need.joined(wanted.get(name)) for name, need in needs.items()}
        rows = {n: max(largest.get(n, 1), self.groups[n].largest if n in self.groups else 1) for n in wanted}
        return Division(wanted, rows, self._capacities(wanted, rows))

    def serve(self, division: Division) -> bool:
        """Whether the arenas that there are will do as well: to make them anew costs what they hold."""
        return self.capacity_bytes <= self._arena_bytes and all(self._serves(name, division) for name in division.needs)

    def divide(self, division: Division, *, segments: int) -> None:
        """Make arenas anew; nobody may have a lease. Nothing stays resident but what must.

        Args:
            division: How.
            segments: How many the cache knows.

        Raises:
            CacheTooSmallError: What must stay does not fit.
        """
        kept = {name: _pinned_pages(group) for name, group in self.groups.items()}
        groups = {}
        for group in self.groups.values():
            group.free()  # before more memory is asked for
        for name, capacity in division.capacities.items():
            columns = division.needs[name].columns
            group = self.groups.get(name) or PageGroup(name, columns, self._device)
            group.columns = columns
            group.largest = division.largest[name]
            group.know_segments(segments)
            group.allocate(capacity)
            for page, data in kept.get(name, {}).items():
                start = group.extents.take(int(group.extent_of_page[page]))
                if start is None:
                    raise CacheTooSmallError(
                        f"cache_bytes={self.nbytes} cannot hold what was appended and is not yet committed beside what one "
                        "window needs; flush() the store before, or pass more cache_bytes"
                    )
                group.row_of_page[page] = start
                for path, rows_of_page in data.items():
                    group.arenas[path][start : start + len(rows_of_page)].copy_(rows_of_page)
            groups[name] = group
        self.needs, self.groups = dict(division.needs), groups

    def make_room(self, missing: Sequence[Pages], *, floor: int) -> bool:
        """Take an extent for every page, evicting others; all or none.

        Args:
            missing: Pages that are to be loaded.
            floor: What was used since this tick stays.
        """
        taken: list[tuple[PageGroup, int, int]] = []
        for group, pages in missing:
            victims = self.evicting(group, floor)
            sizes = group.extent_of_page[pages]
            for page in pages[np.argsort(-sizes, kind="stable")].tolist():  # large ones find places first
                size = int(group.extent_of_page[page])
                start = group.extents.take(size)
                while start is None and next(victims, False):
                    start = group.extents.take(size)
                if start is None:
                    for other, number, where in taken:
                        other.extents.give(where, int(other.extent_of_page[number]))
                    return False
                taken.append((group, page, start))
        for group, page, start in taken:
            group.begin_load(page, start)
        return True

    def evicting(self, group: PageGroup, floor: int) -> Iterator[bool]:
        """Each step evicts the least recently used page that no lease covers."""
        for page in group.evictable(floor).tolist():
            group.evict(page)
            self.evictions += 1
            yield True

    @property
    def _arena_bytes(self) -> int:
        return self.nbytes - (-(-self.nbytes // _VARIABLE_PART) if self._set_aside else 0)

    def _serves(self, name: str, division: Division) -> bool:
        """Whether a group's arenas will do; they need not be the best."""
        group, need = self.groups.get(name), division.needs[name]
        if group is None or not set(need.columns) <= set(group.columns) or division.largest[name] > group.largest:
            return False
        return group.extents.capacity >= max(need.pages * group.largest, division.capacities[name] // 2)

    def _capacities(self, needs: Mapping[str, Need], largest: Mapping[str, int]) -> dict[str, int]:
        """Rows of each group's arenas."""
        names = list(needs)
        widths = {n: sum(c.row_bytes for c in needs[n].columns) for n in names}
        wanted = [Claim(widths[n], needs[n].pages * largest[n], largest[n], needs[n].rows) for n in names]
        capacities = divide(self._arena_bytes, wanted)
        if capacities is None:
            least = sum(claim.row_bytes * claim.least for claim in wanted)
            if self._set_aside:
                least = -(-least * _VARIABLE_PART // (_VARIABLE_PART - 1))
            widest = max(range(len(names)), key=lambda i: wanted[i].row_bytes * wanted[i].least)
            raise CacheTooSmallError(
                f"cache_bytes={self.nbytes} is below what one window needs resident at once ({least} bytes, most of them "
                f"pages of {needs[names[widest]].columns[0].path!r}); pass cache_bytes >= {least}"
            )
        return dict(zip(names, capacities, strict=True))


def _pinned_pages(group: PageGroup) -> dict[int, dict[str, torch.Tensor]]:
    """Copies of the pages that must survive a new division, by page and column."""
    pages = [
        page for number in group.pinned for page in group.pages_of(number).tolist() if group.row_of_page[page] >= 0
    ]
    found = {}
    for page in pages:
        start = int(group.row_of_page[page])
        stop = start + int(group.extent_of_page[page])
        found[page] = {path: arena[start:stop].clone() for path, arena in group.arenas.items()}
    return found
