"""The store behind a buffer of rollouts: where it is, which rollouts it holds, and what waits to be filed.

Invariant: rollouts are filed in the order in which they were put, by one thread; whoever samples, saves or counts pieces
waits for it first, so that nothing that was put is overlooked. What fails there is raised at the next call, and the counts
are then those of the store. Sampled, saved, deleted and replaced are only the trajectories that were filed here: where the
store holds others, or lacks some of these, that is an error.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import trajstore
from trajstore.buffers.filed import FiledTrajectories
from trajstore.buffers.rlinf import columns as parts
from trajstore.buffers.rlinf import rollouts
from trajstore.buffers.rlinf.columns import Rollout
from trajstore.buffers.rlinf.filing import FilingQueue
from trajstore.buffers.rlinf.index import RolloutIndex
from trajstore.buffers.rlinf.resources import CacheKnobs, Resources
from trajstore.edit.borrow import Pins
from trajstore.edit.combine import Share, combine
from trajstore.errors import (
    CommitError,
    MissingObjectError,
    SelectionError,
    StoreExistsError,
    VersionExpiredError,
)
from trajstore.read.bases import parent_of, same_place
from trajstore.schema import Schema
from trajstore.storage.connect import connect, options_for
from trajstore.store import Store
from trajstore.stored import Array
from trajstore.view import View


class Holding:
    """Rollouts in a store.

    Args:
        url: Where the store is; ``""`` for a temporary folder.
        keep: Rollouts that are kept, the newest, twice as many for a while; 0 for all. For a temporary folder only. If
            more are taken over, so many are kept from then on.
        cache: Memory.
        storage_options: For a URL.
        bases: Where stores may lie that it refers to; see ``trajstore.open``.
    """

    def __init__(
        self,
        url: str,
        *,
        keep: int,
        cache: CacheKnobs,
        storage_options: Mapping[str, Any] | None,
        bases: Mapping[str, Mapping[str, Any] | None] | None,
    ) -> None:
        self._keep = keep
        self._taken = 0  # rollouts that were taken over
        self.storage_options = storage_options
        self.trusted = dict(bases or {})
        self._url = url
        self._cache = cache
        self._rollout_bytes = 0  # of the largest that is known
        self._known = False  # whether what is at the URL is what is held
        self._resources = Resources()
        self._finalizer = weakref.finalize(self, self._resources.close)
        self._filing = FilingQueue(self._resources.filing)
        self.index = RolloutIndex()  # of what is filed
        self._pieces = FiledTrajectories()  # of these
        self.count = 0  # rollouts that were put
        self.num_samples = 0  # of these
        self.next_id = 0
        self._view: View | None = None
        self._begins: Array = np.empty(0, np.int64)  # (pieces,) steps before each piece of the view
        self._names: list[str] = []  # columns of a batch
        self._shared: frozenset[str] = frozenset()  # observations that are stored once

    @property
    def store(self) -> Store | None:
        """The store; None while it is not open."""
        return self._resources.store

    @property
    def url(self) -> str:
        """Where the store is."""
        if self._url:
            return self._url
        if self._resources.folder is None:
            self._resources.folder = tempfile.mkdtemp(prefix="trajstore-buffer-")
        return os.path.join(self._resources.folder, "store")

    @property
    def is_temporary(self) -> bool:
        """Whether the store goes with the buffer."""
        return not self._url

    @property
    def keep(self) -> int:
        """Rollouts that are kept, the newest; 0 for all."""
        return max(self._keep, self._taken) if self._keep else 0

    @property
    def num_kept(self) -> int:
        """How many these are now, once everything is filed."""
        return min(len(self.index), self.keep) if self.keep else len(self.index)

    @property
    def kept_bytes(self) -> int:
        """Bytes of these, as they were given."""
        samples = self.index.window(self.keep).num_samples
        return samples * parts.sample_bytes(self._opened().schema) if samples else 0

    @property
    def folder(self) -> str | None:
        """A folder on the disk of the store; None if that is not on one."""
        if "://" in self.url:
            return None
        parent = os.path.dirname(os.path.abspath(os.path.expanduser(self.url)))
        os.makedirs(parent, exist_ok=True)
        return parent

    # Filing

    def check(self, found: Sequence[Rollout]) -> None:
        """Raise unless rollouts have the columns of those before them; changes nothing."""
        schema, shared = self._fitting(found[0])
        for rollout in found:
            parts.check_like(rollout, schema, shared)

    def begin(self) -> None:
        """Raise what failed since the last call.

        Raises:
            TrajstoreError: What failed: those rollouts are lost.
        """
        self._filing.collect()
        self._raise_failure()

    def put(self, fields: Mapping[str, Any], rollout: Rollout, *, seed: int) -> None:
        """File a checked rollout soon; what fails then is raised by ``begin`` or ``settle``."""
        self._open_for(rollout)
        nbytes = sum(tensor.nbytes for tensor in rollout.columns.values())
        max_bytes = self._cache.bytes_for(0) // 2
        self._filing.put(self._file, fields, rollout, self.next_id, seed, nbytes=nbytes, max_bytes=max_bytes)
        self.next_id += 1
        self.count += 1
        self.num_samples += rollout.num_samples

    def settle(self) -> None:
        """Wait until everything is filed; as ``begin``."""
        self._filing.wait()
        self._raise_failure()

    def _file(self, fields: Mapping[str, Any], rollout: Rollout, number: int, seed: int) -> None:
        assert self.store is not None
        entry, refs = rollouts.append(self.store, fields, rollout, self._shared, number=number, seed=seed)
        self._pieces.add(refs)
        self.index.add(entry)
        self._view = None
        if self.keep and len(self.index) > 2 * self.keep:
            self._drop_oldest(self.store, len(self.index) - self.keep)

    def _drop_oldest(self, store: Store, count: int) -> None:
        pieces = sum(entry.pieces for entry in self.index.entries[:count])
        store.flush()
        store.delete(self._pieces.oldest(pieces))
        self._pieces.forget_oldest(pieces)
        self.index.drop(count)
        at_once = dt.timedelta(0)
        store.vacuum(at_once, keep_versions=1, keep_for=at_once, exclusive=True, progress=False)

    def _raise_failure(self) -> None:
        if self._filing.failure is not None:
            self._filing.wait()
            self._forget_lost(self._filing.failure)
            self._filing.raise_failure()

    def _forget_lost(self, error: BaseException) -> None:
        """After an error that may be of a commit: count the rollouts that it has taken along no longer."""
        for _ in range(2):  # the first may only say what failed before, and leave the newest waiting
            try:
                if self.store is not None:
                    self.store.flush()
                break
            except Exception as later:  # noqa: BLE001 - the first error is raised, which this one belongs to
                error.add_note(f"and then: {later}")
        self.index.keep(self._pieces.forget_lost())
        self._count()

    # Sampling

    def view(self) -> View:
        """All pieces, once everything is filed.

        Raises:
            TrajstoreError: As ``flush``.
        """
        self.settle()
        return self._look() if self._view is None else self._view

    def gather(self, window: int, samples: Array) -> dict[str, Any]:
        """A batch of samples ``(n,)`` of the last ``window`` rollouts."""
        view = self.view()
        chosen = self.index.window(window)
        steps = chosen.stored_steps(samples) + self._begins[chosen.first_piece]
        rows = np.searchsorted(self._begins, steps, side="right") - 1
        try:
            return rollouts.as_batch(view.gather(rows, steps - self._begins[rows], columns=self._names))
        except (MissingObjectError, VersionExpiredError):
            self._settled()  # says so if somebody else has deleted them
            raise

    def samples_in(self, window: int) -> int:
        """Samples of the last ``window`` rollouts."""
        self.settle()
        if len(self.index):
            self.view()  # what failed is counted no longer then
        return self.index.window(window).num_samples

    # As a whole

    def kept(self) -> View:
        """The pieces of the rollouts that are kept."""
        view = self.view()
        return view if not self.keep else view[self.index.window(self.keep).first_piece :]

    def is_at(self, place: str | os.PathLike[str]) -> bool:
        """Whether a path or URL is that of the store that is held."""
        return self._known and same_place(os.fspath(place), self.url)

    def read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Ids and fields of the rollouts that are kept."""
        if not self.count:
            return iter(())
        view = self.kept()
        return rollouts.read(view, self.index.entries[-self.keep :])

    def take_over(
        self,
        view: View,
        found: rollouts.Found,
        url: str,
        rank: int,
        ranks: int,
        *,
        share: Share | None = None,
        progress: bool | None = None,
    ) -> None:
        """Hold a rank's share of the rollouts of a view, instead of what was held. All of the share is kept.

        Args:
            view: Of a store.
            found: Its rollouts.
            url: Of that store.
            rank: Which share.
            ranks: Of how many.
            share: See ``View.save``; by default a store that outlives the buffer stands alone, and a temporary one refers to
                what it cannot share by links.
            progress: Show what is copied; by default in a terminal, if it is much.
        """
        chosen = rollouts.share_of(len(found.entries), rank, ranks)
        first = sum(entry.pieces for entry in found.entries[: chosen.start])
        pieces = sum(entry.pieces for entry in found.entries[chosen])
        mine = view.take(found.rows[first : first + pieces])
        own = same_place(url, self.url)
        if own and ranks > 1:
            raise SelectionError(
                f"{url} is the store of this buffer, of which a share cannot be loaded; give each rank an auto_save_path of "
                "its own"
            )
        self.settle()
        if not own:
            how = share or self._way_of_sharing(url)
            if self._known:
                self._settled()  # what is there is replaced
            self._resources.release_store()
            options = options_for(self.url, self.storage_options)
            with contextlib.closing(connect(self.url, storage_options=options)) as target:
                pins: Pins = "none" if self.is_temporary else "required"  # it goes with this process
                combine(
                    [mine.source()], target, share=how, instead=True, operation="save", pins=pins, progress=progress
                )
            if how == "reference":
                # What that store may refer to, this one now does: all that is beside it.
                self.trusted[parent_of(url) or url] = options_for(url, self.storage_options)
        self._known = True
        self._rollout_bytes = max((entry.num_samples for entry in found.entries), default=0) * parts.sample_bytes(
            view.schema
        )
        if own:
            self._resources.release_store()  # opened with another cache
        store = self._opened()
        if own and len(mine) < len(view):
            store.delete(np.setdiff1d(view.ids, mine.ids))
        self._forget()
        self._take_stock(store)
        self._taken = self.count

    def _way_of_sharing(self, url: str) -> Share:
        if not self.is_temporary:
            return "link"  # or copies, where there are no links
        if "://" in url or "://" in self.url:
            return "reference"
        return "link" if os.stat(url).st_dev == os.stat(self.folder or "/").st_dev else "reference"

    def flush(self) -> None:
        """Wait until everything is durable.

        Raises:
            TrajstoreError: What failed in the background: those rollouts are lost, and counted no longer.
            CommitError: Somebody else appends to the store or deletes from it. What was put is durable all the same.
        """
        self.settle()
        if self.store is not None:
            self._view = None
            self._settled()

    def clear(self) -> None:
        """Hold nothing; what comes next may have other columns.

        Raises:
            CommitError: Somebody else writes to the store; nothing is cleared.
        """
        self.settle()
        if self._known:
            self._settled()
            self._opened().clear()
        self._forget()

    def release(self) -> None:
        """Write what waits, as ``flush``; give memory and threads of the store back. It is opened again when needed."""
        try:
            self.flush()
        finally:
            self._view = None
            self._resources.release_store()

    def close(self) -> None:
        """Write what waits, end the thread, remove a temporary folder. What is at the URL is left alone from then on."""
        try:
            self.release()
        finally:
            self._known = False
            self._finalizer()

    def _opened(self) -> Store:
        store = self._resources.store
        if store is None:
            nbytes = self._cache.bytes_for(self._rollout_bytes)
            store = self._resources.store = trajstore.open(
                self.url,
                mode="a",
                cache_bytes=nbytes,
                write_buffer_bytes=max(nbytes // 2, 1),
                storage_options=options_for(self.url, self.storage_options),
                bases=self.trusted,
            )
        return store

    def _open_for(self, first: Rollout) -> None:
        """Have a store that rollouts like this one can be filed in."""
        if self.store is not None and self.store.schema.columns:
            return
        self._rollout_bytes = self._rollout_bytes or sum(tensor.nbytes for tensor in first.columns.values())
        store = self._opened()
        if store.num_trajectories and not self._known:
            held = store.num_trajectories
            self._resources.release_store()
            raise StoreExistsError(
                f"{self.url} holds {held} trajectories of an earlier run: load_checkpoint() it to go on with them, or "
                "choose another auto_save_path"
            )
        self._known = True
        if not store.schema.columns:
            schema, self._shared = self._fitting(first)
            store.declare(schema)
        # From the first look on, rows stay in the page cache when they are appended: what is drawn soon is not read back.
        self._look()

    def _look(self) -> View:
        store = self._opened()
        with self._losses_forgotten():
            view = store.trajectories
        if not self._pieces.are_all_of(view):  # or an id was told between the two
            view = self._settled()
        lengths = view.lengths
        self._begins = np.cumsum(lengths) - lengths
        self._names = rollouts.batch_columns([c.path for c in store.schema], self._shared)
        self._view = view
        return view

    def _settled(self) -> View:
        """What the latest version of the store holds, once all that was filed is durable; errors as of ``flush``."""
        store = self._opened()
        with self._losses_forgotten():
            store.flush()
            store.refresh()
            view = store.trajectories
        if self._pieces.are_all_of(view):
            return view
        kept = self._pieces.forget_lost()
        self.index.keep(kept)
        self._count()
        if not kept.all():
            raise CommitError(
                f"some of what was added to the store at {self.url} could not be committed, as an earlier error said; it is "
                "counted no longer: call again"
            )
        foreign, gone = self._pieces.differences(view)
        raise CommitError(
            f"somebody else writes to {self.url}: of {len(view)} stored trajectories there {foreign} are not of this "
            f"buffer, and {gone} of its own were deleted. Nothing of them was changed. Close all buffers of that place, "
            "then load_checkpoint() it in one, which goes on with all that is there; use one at a time"
        )

    @contextlib.contextmanager
    def _losses_forgotten(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._forget_lost(error)
            raise

    def _fitting(self, first: Rollout) -> tuple[Schema, frozenset[str]]:
        """The columns that rollouts must have, and which observations are stored once."""
        if self.count and self.store is None:
            self._opened()
        if self.store is not None and self.store.schema.columns and self._known:
            return self.store.schema, self._shared
        shared = parts.shared_observations(first)
        return parts.schema_of(first, shared), shared

    def _take_stock(self, store: Store) -> None:
        """Take the rollouts of a store for those that are held."""
        view = store.trajectories
        found = rollouts.find(view)
        self._shared = parts.shared_in(store.schema)
        self._pieces = FiledTrajectories(view.ids[found.rows])
        self.index = RolloutIndex(found.entries)
        self.next_id = max((entry.id + 1 for entry in found.entries), default=0)
        self._count()

    def _count(self) -> None:
        """Count what is filed, and what was kept no longer."""
        self.count = len(self.index) + self.index.dropped
        self.num_samples = sum(entry.num_samples for entry in self.index.entries) + self.index.dropped_samples
        self._view = None

    def _forget(self) -> None:
        """Count from 0."""
        self.index, self._pieces = RolloutIndex(), FiledTrajectories()
        self.next_id = self._taken = 0
        self._shared = frozenset()
        self._count()
