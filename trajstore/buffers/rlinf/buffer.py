"""RLinf's ``TrajectoryReplayBuffer`` over a store.

Invariant: the latest version of the store, with what waits to be committed, is what the buffer holds; the same seed and the
same trajectories give the same batches as the original, bit for bit.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

import trajstore
from trajstore.buffers.rlinf import columns as parts
from trajstore.buffers.rlinf import rollouts
from trajstore.buffers.rlinf.columns import Rollout
from trajstore.buffers.rlinf.index import RolloutIndex
from trajstore.buffers.rlinf.trajectory import fields_of
from trajstore.buffers.rlinf.transfer import import_files
from trajstore.errors import (
    ClosedError,
    EmptyBufferError,
    IndexRangeError,
    SelectionError,
    StoreExistsError,
    TrajstoreError,
)
from trajstore.interop.rlinf_files import RlinfDirectory, is_rlinf_directory, write_directory
from trajstore.schema import Schema
from trajstore.store import Store
from trajstore.stored import Array
from trajstore.view import View

DEFAULT_CACHE_BYTES = 2 << 30
_UNCACHED_BYTES = 64 << 20  # with enable_cache=False
_FORMATS = ("store", "pt", "pkl")
Share = Literal["link", "copy", "reference"]


class TrajectoryReplayBuffer:
    """Rollouts ``[T, B, ...]`` in a store, of which single transitions are drawn.

    Takes the keywords of both generations of RLinf's class; where both name the same thing, give one of them.

    Args:
        seed: Of sampling.
        enable_cache: Keep pages in memory; without, every batch reads its pages again (64 MiB are kept all the same).
        cache_size: The cache holds at least so many trajectories, even if that is more than ``cache_bytes``.
        sample_window_size: Sample from the most recent trajectories, so many of them; 0 for all.
        auto_save: Keep the store at ``auto_save_path``. Otherwise it is in a temporary folder, which is removed with the
            buffer and keeps ``sample_window_size`` trajectories.
        auto_save_path: A path, or any URL that trajstore opens.
        trajectory_format: What ``save_checkpoint`` writes: ``"store"`` (the default), or RLinf's files, ``"pt"`` or
            ``"pkl"``.
        storage_dir: First generation: where the store is; ``""`` for a temporary folder that keeps everything.
        storage_format: First generation: as ``trajectory_format``.
        save_trajectories: First generation: with False, nothing outlives the buffer, and there are no checkpoints.
        cache_bytes: Memory for pages, shared by all that samples.
        storage_options: For URLs: credentials, endpoint and so on.
        allow_pickle: Let ``load_checkpoint`` read ``.pkl`` files, which can run any code.

    Raises:
        SelectionError: Keywords that contradict each other.

    Examples:
        >>> import torch
        >>> from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer
        >>> with TrajectoryReplayBuffer(seed=1) as buffer:
        ...     buffer.add_trajectories([Trajectory(rewards=torch.arange(6.0).view(3, 2), actions=torch.zeros(3, 2, 4))])
        ...     batch = buffer.sample(num_chunks=4)
        ...     len(buffer), batch["actions"].shape
        (1, torch.Size([4, 4]))
    """

    def __init__(
        self,
        seed: int = 1234,
        enable_cache: bool = True,
        cache_size: int = 5,
        sample_window_size: int = 100,
        auto_save: bool | None = None,
        auto_save_path: str | os.PathLike[str] = "",
        trajectory_format: str | None = None,
        *,
        storage_dir: str | os.PathLike[str] | None = None,
        storage_format: str | None = None,
        save_trajectories: bool | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        storage_options: Mapping[str, Any] | None = None,
        allow_pickle: bool = False,
    ) -> None:
        first_generation = storage_dir is not None or save_trajectories is not None
        if first_generation and (auto_save is not None or auto_save_path):
            raise SelectionError(
                "storage_dir= and save_trajectories= are of one generation, auto_save= of another; give one"
            )
        if trajectory_format is not None and storage_format is not None:
            raise SelectionError("trajectory_format= and storage_format= mean the same; give one")
        if auto_save and not os.fspath(auto_save_path):
            raise SelectionError("auto_save=True needs auto_save_path=, a folder or a URL for the store")
        if auto_save_path and not auto_save:
            raise SelectionError(f"auto_save_path={os.fspath(auto_save_path)!r} needs auto_save=True")
        if save_trajectories is False and not enable_cache:
            raise SelectionError(
                "save_trajectories=False keeps trajectories in the cache only: enable_cache=False leaves nowhere"
            )
        if save_trajectories is False and storage_dir:
            raise SelectionError("save_trajectories=False keeps nothing in storage_dir=; leave it out")
        for name, value, least in (
            ("cache_size", cache_size, 1),
            ("sample_window_size", sample_window_size, 0),
            ("cache_bytes", cache_bytes, 1),
        ):
            if value < least:
                raise SelectionError(f"{name}={value}, expected at least {least}")
        self.trajectory_format = trajectory_format or storage_format or "store"
        if self.trajectory_format not in _FORMATS:
            raise SelectionError(f"trajectory_format={self.trajectory_format!r}, expected 'store', 'pt' or 'pkl'")
        self.enable_cache = enable_cache
        self.cache_size = cache_size
        self.cache_bytes = cache_bytes
        self.sample_window_size = sample_window_size
        self.auto_save = bool(auto_save)
        self._checkpoints = save_trajectories is not False
        self._window_only = (not first_generation and not self.auto_save) or save_trajectories is False
        self._allow_pickle = allow_pickle
        self._storage_options = storage_options
        self._url = os.fspath(storage_dir or auto_save_path or "")
        self._temporary: str | None = None
        self._store: Store | None = None
        self._trusted: dict[str, Mapping[str, Any] | None] = {}
        self._lock = threading.RLock()
        self._closed = False
        self._adopted = False  # whether what is at the URL is what the buffer holds
        self._shared: frozenset[str] = frozenset()
        self._view: View | None = None  # of all that is held
        self._begins: Array = np.empty(0, np.int64)  # (pieces,) steps before each piece of the view
        self._names: list[str] = []  # columns of a batch
        self._reset_counters()
        self._reseed(seed)

    # Counts

    def __len__(self) -> int:
        return self.size

    @property
    def total_samples(self) -> int:
        """``T * B`` of all trajectories that were added."""
        return self._total_samples

    def is_ready(self, min_size: int) -> bool:
        """Whether there are at least so many trajectories."""
        return self.size >= min_size

    async def is_ready_async(self, min_size: int) -> bool:
        """As ``is_ready``."""
        return self.is_ready(min_size)

    def get_stats(self) -> dict[str, int]:
        """``num_trajectories``, ``total_samples`` and ``cache_size``: trajectories that the cache holds for certain."""
        held = (
            min(len(self._index), self.sample_window_size or len(self._index))
            if self._window_only
            else len(self._index)
        )
        return {
            "num_trajectories": self.size,
            "total_samples": self.total_samples,
            "cache_size": min(held, held if self._window_only else self.cache_size) if self.enable_cache else 0,
        }

    # Adding

    def add_trajectories(self, trajectories: Sequence[Any]) -> None:
        """Add rollouts; they are copied at once and can be sampled at once, and are written in the background.

        Args:
            trajectories: Objects with the fields of ``Trajectory``. One with neither ``prev_logprobs`` nor ``rewards`` is
                skipped.

        Raises:
            ColumnShapeError: Tensors that do not begin with ``[T, B]``; nothing is added.
            ColumnTypeError: Tensors on different devices, or values that cannot be stored; nothing is added.
            ColumnNameError: Fields that differ between trajectories; nothing is added.
            StoreExistsError: A store with trajectories of an earlier run is at the buffer's place.
        """
        with self._lock:
            self._check_open()
            taken = [(fields, rollouts.taken_apart(fields)) for fields in map(fields_of, trajectories)]
            whole = [(fields, rollout) for fields, rollout in taken if rollout is not None]
            if not whole:
                return
            schema, shared = self._fitting(whole[0][1])
            for _, rollout in whole:
                parts.check_like(rollout, schema, shared)
            store = self._opened(whole[0][1])
            try:
                for fields, rollout in whole:
                    self._append(store, fields, rollout, self._trajectory_counter)
            except TrajstoreError:
                self._reindex()  # some of it may be lost: count what is there
                raise
            if self._window_only and self.sample_window_size:
                self._forget_old(store)

    def _fitting(self, first: Rollout) -> tuple[Schema, frozenset[str]]:
        """The columns that rollouts must have, and which observations are stored once."""
        if self._store is not None and self._store.schema.columns:
            return self._store.schema, self._shared
        shared = parts.shared_observations(first)
        return parts.schema_of(first, shared), shared

    def _append(self, store: Store, fields: Mapping[str, Any], rollout: Rollout, number: int) -> None:
        entry = rollouts.append(store, fields, rollout, self._shared, number=number, seed=self.seed)
        self._view = None
        self._index.add(entry)
        self._trajectory_counter = number + 1
        self.size += 1
        self._total_samples += entry.num_samples

    def _forget_old(self, store: Store) -> None:
        """A store that nobody else reads keeps twice the window at most."""
        if len(self._index) <= 2 * self.sample_window_size:
            return
        pieces = self._index.drop(len(self._index) - self.sample_window_size)
        store.flush()
        store.delete(store.trajectories.first(pieces).ids, reclaim=True)
        self._view = None

    # Sampling

    def sample(self, num_chunks: int = 0) -> dict[str, Any]:
        """Transitions drawn uniformly, with replacement, from the window.

        Args:
            num_chunks: How many; no more than the window has.

        Returns:
            Nested mapping of tensors ``[num_chunks, ...]``, whose memory is used again once they are dropped.

        Raises:
            EmptyBufferError: There is nothing to sample from.
        """
        return self.sample_chunks(num_chunks)

    def sample_chunks(self, num_chunks: int) -> dict[str, Any]:
        """As ``sample``."""
        if num_chunks < 1:
            raise SelectionError(f"num_chunks={num_chunks}, expected at least 1")
        with self._lock:
            self._check_open()
            window = self._index.window(self.sample_window_size)
            if not window.num_samples:
                raise EmptyBufferError("cannot sample from an empty buffer; add trajectories first")
            count = min(num_chunks, window.num_samples)
            drawn = torch.randint(0, window.num_samples, (count,), generator=self.random_generator)
            view = self._current_view()
            steps = window.stored_steps(drawn.numpy()) + self._begins[window.first_piece]
            rows = np.searchsorted(self._begins, steps, side="right") - 1
            batch = view.gather(rows, steps - self._begins[rows], columns=self._names)
        return rollouts.as_batch(batch)

    def _current_view(self) -> View:
        if self._view is None:
            assert self._store is not None
            self._view = self._store.trajectories
            lengths = self._view.lengths
            self._begins = np.cumsum(lengths) - lengths
            self._names = rollouts.batch_columns([c.path for c in self._store.schema], self._shared)
        return self._view

    # Checkpoints

    def save_checkpoint(
        self, save_path: str | os.PathLike[str], *, share: Share = "link", progress: bool = False
    ) -> None:
        """Save what the buffer holds.

        With ``trajectory_format="store"`` a store of its own: on the same disk its segments are hard links, within one
        bucket the server copies them, otherwise they are copied; a checkpoint that is there becomes its earlier version.
        With ``"pt"`` or ``"pkl"``, RLinf's files.

        Args:
            save_path: A folder, or any URL that trajstore opens.
            share: ``"reference"`` to refer to the buffer's own store instead, which then must stay; ``"copy"`` for bytes
                that are shared with nothing.
            progress: Show what is copied on standard error.

        Raises:
            SelectionError: The buffer was made with ``save_trajectories=False``.
        """
        with self._lock:
            self._check_open()
            if not self._checkpoints:
                raise SelectionError(
                    "save_trajectories=False keeps no checkpoints; make the buffer with save_trajectories=True"
                )
            if self._store is not None:
                self._store.flush()
                self._view = None
            if self.trajectory_format != "store":
                self._save_files(save_path, progress)
            elif self._store is None or not len(self._index):
                with trajstore.open(save_path, mode="a", storage_options=self._storage_options) as empty:
                    empty.clear()
            else:
                self._current_view().save(
                    save_path, share=share, replace=True, storage_options=self._storage_options, progress=progress
                )

    def _save_files(self, path: str | os.PathLike[str], progress: bool) -> None:
        held = iter(()) if self._store is None else rollouts.read(self._current_view(), self._index.entries)
        write_directory(
            path,
            held,
            trajectory_format=self.trajectory_format,
            seed=self.seed,
            trajectory_counter=self._trajectory_counter,
            overwrite=True,
            storage_options=self._storage_options,
            total=len(self._index),
            progress=progress,
        )

    def load_checkpoint(
        self,
        load_path: str | os.PathLike[str],
        is_distributed: bool = False,
        local_rank: int | None = None,
        world_size: int | None = None,
        *,
        load_rank: int | None = None,
        load_split_num: int | None = None,
        progress: bool = False,
    ) -> None:
        """Hold what a checkpoint holds, instead of what the buffer held before; draw from its seed on.

        Args:
            load_path: A store, or a directory of RLinf's files; a path or a URL.
            is_distributed: Load only this rank's share of the trajectories, consecutive ones.
            local_rank: This rank; ``load_rank`` in the first generation.
            world_size: Ranks; ``load_split_num`` in the first generation.
            load_rank: As ``local_rank``.
            load_split_num: As ``world_size``.
            progress: Show on standard error how far reading files is.

        Raises:
            StoreNotFoundError: Neither is there.
            IndexRangeError: A rank that is not one of ``world_size``.
            MissingObjectError: The index names files that are not there.
            CorruptionError: A file is not what it should be; the buffer is as it was.
        """
        rank = _one_of("local_rank", local_rank, "load_rank", load_rank, 0)
        ranks = _one_of("world_size", world_size, "load_split_num", load_split_num, 1)
        if ranks < 1 or not 0 <= rank < ranks:
            raise IndexRangeError(f"rank {rank} of {ranks}, expected 0 to {max(ranks - 1, 0)}")
        if not is_distributed:
            rank, ranks = 0, 1
        with self._lock:
            self._check_open()
            if is_rlinf_directory(load_path, storage_options=self._storage_options):
                self._load_files(load_path, rank, ranks, progress)
                return
            url = os.fspath(load_path)
            if "://" not in url:
                url = os.path.abspath(os.path.expanduser(url))
            with trajstore.open(url, storage_options=self._storage_options, bases=self._trusted) as checkpoint:
                self._hold(checkpoint.trajectories, url, rank, ranks)

    def _load_files(self, path: str | os.PathLike[str], rank: int, ranks: int, progress: bool) -> None:
        """Through a store of their own, so that a damaged file changes nothing."""
        with tempfile.TemporaryDirectory(prefix="trajstore-load-", dir=self._beside()) as folder:
            url = os.path.join(folder, "store")
            with (
                RlinfDirectory(path, storage_options=self._storage_options) as directory,
                trajstore.open(url, mode="x") as staged,
            ):
                ids = directory.ids[rollouts.share_of(len(directory), rank, ranks)]
                import_files(directory, staged, ids, allow_pickle=self._allow_pickle, seed=self.seed, progress=progress)
                self._hold(staged.trajectories, url, 0, 1)
            self._trusted.pop(url, None)
            counter = directory.metadata.trajectory_counter
            self._trajectory_counter = counter if ranks == 1 else max(ids, default=-1) + 1
            if directory.metadata.seed is not None:
                self._reseed(directory.metadata.seed)

    def _hold(self, view: View, url: str, rank: int, ranks: int) -> None:
        """Make the buffer's own store one that holds a rank's share of these rollouts."""
        found = rollouts.find(view)
        chosen = rollouts.share_of(len(found.entries), rank, ranks)
        first = sum(entry.pieces for entry in found.entries[: chosen.start])
        pieces = sum(entry.pieces for entry in found.entries[chosen])
        mine = view.take(found.rows[first : first + pieces])
        here = self._place()
        own = _same_place(url, here)
        if own and ranks > 1:
            raise SelectionError(
                f"{url} is the store of this buffer, of which a share cannot be loaded; give each rank an "
                f"auto_save_path of its own"
            )
        seed = self.seed if found.seed is None else found.seed
        if not own:
            local = "://" not in url and "://" not in here
            self._close_store()
            mine.save(here, share="link" if local else "reference", replace=True, storage_options=self._storage_options)
            if not local:
                self._trusted[url] = self._storage_options
        self._adopted = True
        store = self._open_store()
        if own and len(mine) < len(view):
            store.delete(np.setdiff1d(view.ids, mine.ids))
        self._reindex()
        self._reseed(seed)

    # Cleaning up

    def clear(self) -> None:
        """Hold nothing, and count from 0; what comes next may have other fields. Earlier versions of the store stay."""
        with self._lock:
            self._check_open()
            if self._store is not None:
                self._store.clear()
            self._reset_counters()

    def clear_cache(self) -> None:
        """Write what waits, and give memory and threads back; sampling reads pages again."""
        with self._lock:
            if not self._closed:
                self._close_store()

    def close(self, wait: bool = True) -> None:
        """Write what waits, and end. May be called twice.

        Args:
            wait: Until everything is durable; otherwise what waits is written in a thread, at the latest at the
                interpreter's end.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if not wait and self._store is not None and self._temporary is None:
                threading.Thread(target=self._close_store, name="trajstore-buffer-close").start()
                return
            try:
                self._close_store()
            finally:
                if self._temporary is not None:
                    self._finalizer()

    def __enter__(self) -> TrajectoryReplayBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TrajectoryReplayBuffer(size={self.size}, total_samples={self.total_samples}, url={self._place()!r})"

    @property
    def store(self) -> Store | None:
        """The store that holds the trajectories, to look at; None until there are any."""
        return self._store

    # The store

    def _place(self) -> str:
        """Where the store is."""
        if self._url:
            return self._url
        if self._temporary is None:
            self._temporary = tempfile.mkdtemp(prefix="trajstore-buffer-")
            self._finalizer = weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        return os.path.join(self._temporary, "store")

    def _beside(self) -> str | None:
        """A folder on the disk of the store, if it is on one."""
        here = self._place()
        if "://" in here:
            return None
        parent = os.path.dirname(os.path.abspath(os.path.expanduser(here)))
        os.makedirs(parent, exist_ok=True)
        return parent

    def _opened(self, first: Rollout) -> Store:
        """The store; made for rollouts like this one if there is none."""
        store = self._store
        if store is None:
            store = self._open_store(self.cache_size * sum(tensor.nbytes for tensor in first.columns.values()))
            held = 0 if self._adopted else store.num_trajectories
            if held:
                self._close_store()
                raise StoreExistsError(
                    f"{self._place()} holds {held} trajectories of an earlier run: load_checkpoint() it to go on with "
                    f"them, or "
                    "choose another auto_save_path"
                )
            self._adopted = True
        if not store.schema.columns:
            schema, self._shared = self._fitting(first)
            store.declare(schema)
        return store

    def _open_store(self, least_cache_bytes: int = 0) -> Store:
        cache_bytes = max(self.cache_bytes, least_cache_bytes) if self.enable_cache else _UNCACHED_BYTES
        self._store = trajstore.open(
            self._place(),
            mode="a",
            cache_bytes=cache_bytes,
            write_buffer_bytes=max(cache_bytes // 2, 1),
            storage_options=self._storage_options,
            bases=self._trusted,
        )
        return self._store

    def _close_store(self) -> None:
        store, self._store, self._view = self._store, None, None
        if store is not None:
            store.close()

    def _reindex(self) -> None:
        """Count what the store holds."""
        self._reset_counters()
        if self._store is None:
            return
        self._shared = parts.shared_in(self._store.schema)
        for entry in rollouts.find(self._store.trajectories).entries:
            self._index.add(entry)
            self.size += 1
            self._total_samples += entry.num_samples
            self._trajectory_counter = max(self._trajectory_counter, entry.id + 1)

    def _reset_counters(self) -> None:
        self._index = RolloutIndex()
        self._view = None
        self._trajectory_counter = 0
        self._total_samples = 0
        self.size = 0

    def _reseed(self, seed: int) -> None:
        self.seed = seed
        self.random_generator = torch.Generator().manual_seed(seed)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the buffer is closed; make another, and load_checkpoint() what it saved")


def _one_of(name: str, value: int | None, other_name: str, other: int | None, default: int) -> int:
    if value is not None and other is not None:
        raise SelectionError(f"{name}= and {other_name}= mean the same; give one")
    return next((given for given in (value, other) if given is not None), default)


def _same_place(url: str, other: str) -> bool:
    if "://" in url or "://" in other:
        return url.rstrip("/") == other.rstrip("/")
    return os.path.realpath(os.path.expanduser(url)) == os.path.realpath(os.path.expanduser(other))
