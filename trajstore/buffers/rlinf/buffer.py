"""RLinf's ``TrajectoryReplayBuffer`` over a store.

Invariant: the latest version of the store, with what waits to be committed, is what the buffer holds; the same seed and the
same trajectories give the same batches as the original, bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

import trajstore
from trajstore.buffers.rlinf import rollouts
from trajstore.buffers.rlinf.checkpoint import open_checkpoint, rank_of, rollouts_of, warn_of_none
from trajstore.buffers.rlinf.holding import Holding
from trajstore.buffers.rlinf.resources import CacheKnobs, new_log_folder
from trajstore.buffers.rlinf.trajectory import check_list, fields_of
from trajstore.buffers.rlinf.transfer import import_files
from trajstore.edit.combine import Share
from trajstore.errors import (
    ClosedError,
    EmptyBufferError,
    SelectionError,
    StoreExistsError,
    StoreNotFoundError,
)
from trajstore.interop.rlinf_files import RlinfDirectory, is_rlinf_directory, write_directory
from trajstore.progress import is_shown
from trajstore.storage.connect import options_for
from trajstore.store import Store

DEFAULT_CACHE_BYTES = 2 << 30
_FORMATS = ("store", "pt", "pkl")


class TrajectoryReplayBuffer:
    """Rollouts ``[T, B, ...]`` in a store, of which single transitions are drawn.

    Takes the keywords of both generations of RLinf's class; where both name the same thing, give one of them.

    Args:
        seed: Of sampling.
        enable_cache: Keep pages in memory; without, every batch reads its pages again (64 MiB are kept all the same).
        cache_size: The cache holds at least so many trajectories, even if that is more than ``cache_bytes``.
        sample_window_size: Sample from the most recent trajectories, so many of them; 0 for all.
        auto_save: Keep the store at ``auto_save_path``. Otherwise it is in a temporary folder, which is removed with the
            buffer and keeps the newest ``sample_window_size`` trajectories (RLinf's rule); if ``load_checkpoint`` loaded
            more, as many as it loaded.
        auto_save_path: For ``auto_save``: a path, or any URL that trajstore opens; ``""`` for a new folder under ``logs``
            of the working directory. With ``auto_save=False`` it is not used. One buffer at a time may write there.
        trajectory_format: What ``save_checkpoint`` writes: ``"store"`` (the default), or RLinf's files, ``"pt"`` or
            ``"pkl"``.
        storage_dir: First generation: where the store is; ``""`` for a temporary folder that keeps everything.
        storage_format: First generation: as ``trajectory_format``; its temporary folder keeps everything.
        save_trajectories: First generation: with False, nothing outlives the buffer, and there are no checkpoints.
        cache_bytes: Memory for pages, shared by all that samples; 8 MiB at least.
        storage_options: For URLs: credentials, endpoint and so on.
        allow_pickle: Let ``load_checkpoint`` read ``.pkl`` files, which can run any code.
        copy_on_add: Copy tensors in ``add_trajectories`` itself. Otherwise they are read a little later by a thread, and a
            tensor that was changed in place before is an error, as far as torch counts changes: not those that NumPy or
            another process makes in the same memory.
        bases: Where stores may lie to which a checkpoint refers, besides those beside it; see ``trajstore.open``.

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
        copy_on_add: bool = False,
        bases: Mapping[str, Mapping[str, Any] | None] | None = None,
    ) -> None:
        first_generation = storage_dir is not None or save_trajectories is not None
        if first_generation and (auto_save is not None or auto_save_path):
            raise SelectionError(
                "storage_dir= and save_trajectories= are of one generation, auto_save= of another; give one"
            )
        if trajectory_format is not None and storage_format is not None:
            raise SelectionError("trajectory_format= and storage_format= mean the same; give one")
        place = os.fspath(storage_dir or "")
        if auto_save:
            place = os.fspath(auto_save_path) or new_log_folder()
        elif auto_save is None and os.fspath(auto_save_path):
            raise SelectionError(
                f"auto_save_path={os.fspath(auto_save_path)!r} without auto_save=: nothing would be kept there; pass "
                "auto_save=True as well, or auto_save=False to say that nothing should be"
            )
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
        keeps_all = self.auto_save or first_generation or storage_format is not None
        window_only = save_trajectories is False or not keeps_all
        self._allow_pickle = allow_pickle
        self._copy_on_add = copy_on_add
        self._storage_options = storage_options
        self._lock = threading.RLock()
        self._closed = False
        self._closing: Future[None] | None = None  # of close(wait=False)
        self._holding = Holding(
            place,
            keep=sample_window_size if window_only else 0,
            cache=CacheKnobs(cache_bytes, cache_size, enable_cache),
            storage_options=storage_options,
            bases=bases,
        )
        self._reseed(seed)

    # Counts

    def __len__(self) -> int:
        return self.size

    @property
    def size(self) -> int:
        """Trajectories that were added since the buffer was made, cleared or loaded."""
        return self._holding.count

    @property
    def total_samples(self) -> int:
        """``T * B`` of these."""
        return self._holding.num_samples

    def is_ready(self, min_size: int) -> bool:
        """Whether there are at least so many trajectories.

        Raises:
            ClosedError: The buffer is closed, and whoever waits for more would wait for ever.
        """
        self._check_open()
        return self.size >= min_size

    async def is_ready_async(self, min_size: int) -> bool:
        """As ``is_ready``."""
        return self.is_ready(min_size)

    def get_stats(self) -> dict[str, int]:
        """``num_trajectories``, ``total_samples``, and ``cache_size``: trajectories that the cache holds for certain."""
        held = min(self.size, self._holding.keep or self.cache_size) if self.enable_cache else 0
        return {"num_trajectories": self.size, "total_samples": self.total_samples, "cache_size": held}

    # Adding

    def add_trajectories(self, trajectories: Sequence[Any]) -> None:
        """Add rollouts, which can be sampled at once, and are written in the background.

        Their tensors must not be changed in place afterwards, unless the buffer was made with ``copy_on_add=True``.

        Args:
            trajectories: Objects with the fields of ``Trajectory``. One with neither ``prev_logprobs`` nor ``rewards`` is
                skipped.

        Raises:
            ColumnShapeError: Tensors that do not begin with ``[T, B]``; nothing is added.
            ColumnTypeError: Tensors on different devices, values that cannot be stored, or one trajectory that is in no
                list; nothing is added.
            ColumnNameError: Fields that differ between trajectories; nothing is added.
            StoreExistsError: A store with trajectories of an earlier run is at the buffer's place.
            TrajstoreError: What failed in the background since the last call: some that were added before are lost, and of
                this call nothing is added, as a note at the error says.
        """
        with self._lock:
            self._check_open()
            check_list(trajectories)
            try:
                self._holding.begin()
            except Exception as error:
                error.add_note(
                    "This is of trajectories that were added before. Nothing of this call was added: call again."
                )
                raise
            taken = [(fields, rollouts.taken_apart(fields)) for fields in map(fields_of, trajectories)]
            whole = [(fields, rollout) for fields, rollout in taken if rollout is not None]
            if whole:
                self._holding.check([rollout for _, rollout in whole])
            for fields, rollout in whole:
                self._holding.put(fields, rollout.copied() if self._copy_on_add else rollout, seed=self.seed)

    def flush(self) -> None:
        """Return when everything that was added is durable: it is there after a ``kill -9`` then.

        Without, what was added is committed every 30 s, and whenever a segment is full (256 MiB before compression).
        ``clear_cache`` and ``close`` write everything as well.

        Raises:
            TrajstoreError: What failed in the background: those trajectories are lost, and counted no longer.
            CommitError: Somebody else appends to this buffer's store, or deletes from it; ``sample`` and everything that
                would replace what is there raise it too.
        """
        with self._lock:
            self._check_open()
            self._holding.flush()

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
            total = self._holding.samples_in(self.sample_window_size)
            if not total:
                raise EmptyBufferError("cannot sample from an empty buffer; add trajectories first")
            drawn = torch.randint(0, total, (min(num_chunks, total),), generator=self.random_generator)
            return self._holding.gather(self.sample_window_size, drawn.numpy())

    # Checkpoints

    def save_checkpoint(
        self, save_path: str | os.PathLike[str], *, share: Share = "link", progress: bool | None = None
    ) -> None:
        """Save what the buffer holds: everything, or what it keeps if there is no ``auto_save``.

        With ``trajectory_format="store"`` a store of its own: on the same disk its segments are hard links, within one
        bucket the server copies them, otherwise they are copied; a checkpoint that is there becomes its earlier version.
        With ``"pt"`` or ``"pkl"``, RLinf's files. At the buffer's own place there is nothing to do but ``flush``.

        Args:
            save_path: A folder, or any URL that trajstore opens.
            share: ``"reference"`` to refer to the buffer's own store instead, which then must stay; ``"copy"`` for bytes
                that are shared with nothing.
            progress: Show what is copied on standard error; by default in a terminal, if it is much.

        Raises:
            SelectionError: The buffer was made with ``save_trajectories=False``, or a reference to a temporary folder.
            StoreExistsError: There is a checkpoint of the other kind: RLinf's files where a store should go, or a store.
        """
        options = options_for(save_path, self._storage_options)
        with self._lock:
            self._check_open()
            if not self._checkpoints:
                raise SelectionError(
                    "save_trajectories=False keeps no checkpoints; make the buffer with save_trajectories=True"
                )
            if share == "reference" and self._holding.is_temporary:
                raise SelectionError(
                    "share='reference' to a temporary folder, which goes with the buffer; share='link', or make the buffer "
                    "with auto_save=True"
                )
            self._holding.settle()
            self._check_kind(save_path, options)
            if self.trajectory_format != "store":
                write_directory(
                    save_path,
                    self._holding.read(),
                    trajectory_format=self.trajectory_format,
                    seed=self.seed,
                    trajectory_counter=self._holding.next_id,
                    overwrite=True,
                    storage_options=options,
                    total=self._holding.num_kept,
                    progress=is_shown(progress, self._holding.kept_bytes),
                )
            elif self._holding.is_at(save_path):
                self._holding.flush()
            elif not self.size:
                with trajstore.open(save_path, mode="a", storage_options=options) as empty:
                    empty.clear()
            else:
                self._holding.flush()
                self._holding.kept().save(
                    save_path, share=share, replace=True, lineage=False, storage_options=options, progress=progress
                )

    def _check_kind(self, path: str | os.PathLike[str], options: Mapping[str, Any] | None) -> None:
        """Raise where two checkpoints in one folder would leave open which of them is meant."""
        if self.trajectory_format != "store":
            with contextlib.suppress(StoreNotFoundError), trajstore.open(path, storage_options=options):
                raise StoreExistsError(f"{os.fspath(path)} holds a store; save RLinf's files to another folder")
        elif is_rlinf_directory(path, storage_options=options):
            raise StoreExistsError(f"{os.fspath(path)} holds RLinf's files; save the store to another folder")

    def load_checkpoint(
        self,
        load_path: str | os.PathLike[str],
        is_distributed: bool = False,
        local_rank: int | None = None,
        world_size: int | None = None,
        *,
        load_rank: int | None = None,
        load_split_num: int | None = None,
        progress: bool | None = None,
    ) -> None:
        """Hold what a checkpoint holds, instead of what the buffer held before; draw from its seed on.

        All of it is kept, so that loading and saving loses nothing. Without ``auto_save``, the newest trajectories are kept
        from then on, as many as were loaded or ``sample_window_size``, whichever is more, until ``clear`` or the next load.

        Args:
            load_path: A store, or a directory of RLinf's files; a path or a URL.
            is_distributed: Load only this rank's share of the trajectories, consecutive ones. A rank beyond their number
                gets none, as with RLinf, and a ``UserWarning`` says so. Without it all are loaded, whatever the rank.
            local_rank: This rank; ``load_rank`` in the first generation.
            world_size: Ranks; ``load_split_num`` in the first generation.
            load_rank: As ``local_rank``.
            load_split_num: As ``world_size``.
            progress: Show on standard error how far it is; by default in a terminal, if it is much.

        Raises:
            StoreNotFoundError: Neither is there; if there are ``rank_*`` below, the error names them.
            SelectionError: The store is not one of rollouts.
            IndexRangeError: ``world_size`` is below 1, or a rank is not one of so many.
            MissingObjectError: The index names files that are not there.
            CorruptionError: A file is not what it should be; the buffer is as it was.
        """
        rank, ranks = rank_of(local_rank, world_size, load_rank, load_split_num) if is_distributed else (0, 1)
        with self._lock:
            self._check_open()
            options = options_for(load_path, self._storage_options)
            if is_rlinf_directory(load_path, storage_options=options):
                self._load_files(load_path, rank, ranks, progress, counted=not is_distributed)
                return
            url = os.fspath(load_path)
            if "://" not in url:
                url = os.path.abspath(os.path.expanduser(url))
            with open_checkpoint(url, options, self._holding.trusted) as checkpoint:
                # Reads every page index: what is damaged or missing is found before anything changes.
                for problem in checkpoint.usage().problems:
                    raise problem
                view = checkpoint.trajectories
                found = rollouts_of(view, url, options)
                warn_of_none(load_path, len(found.entries), rank, ranks, stacklevel=2)
                self._holding.take_over(view, found, url, rank, ranks, progress=progress)
            self._reseed(self.seed if found.seed is None else found.seed)

    def _load_files(
        self, path: str | os.PathLike[str], rank: int, ranks: int, progress: bool | None, *, counted: bool
    ) -> None:
        """Through a store of their own, so that a damaged file changes nothing."""
        with tempfile.TemporaryDirectory(prefix="trajstore-load-", dir=self._holding.folder) as folder:
            url = os.path.join(folder, "store")
            with (
                RlinfDirectory(path, storage_options=options_for(path, self._storage_options)) as directory,
                trajstore.open(url, mode="x") as staged,
            ):
                warn_of_none(path, len(directory), rank, ranks, stacklevel=3)
                ids = directory.ids[rollouts.share_of(len(directory), rank, ranks)]
                shown = is_shown(progress, sum(file.nbytes for file in directory.select(ids)))
                import_files(directory, staged, ids, allow_pickle=self._allow_pickle, seed=self.seed, progress=shown)
                view = staged.trajectories
                self._holding.take_over(view, rollouts.find(view), url, 0, 1, share="link", progress=progress)
        if counted:  # ids are never given twice, whatever the file says
            self._holding.next_id = max(self._holding.next_id, directory.metadata.trajectory_counter)
        if directory.metadata.seed is not None:
            self._reseed(directory.metadata.seed)

    # Cleaning up

    def clear(self) -> None:
        """Hold nothing, and count from 0; what comes next may have other fields. Earlier versions of the store stay.

        After ``close`` only the counts are cleared: what is on disk stays.

        Raises:
            CommitError: Somebody else writes to the buffer's store; nothing is cleared.
            TrajstoreError: What failed in the thread of ``close(wait=False)``; nothing is cleared.
        """
        self._finish_closing()
        with self._lock:
            self._holding.clear()

    def clear_cache(self) -> None:
        """Write what waits, and give memory and threads back; sampling reads pages again. May be called after ``close``.

        Raises:
            TrajstoreError: As ``flush``, or what failed in the thread of ``close(wait=False)``.
        """
        self._finish_closing()
        with self._lock:
            self._holding.release()

    def close(self, wait: bool = True) -> None:
        """Write what waits, and end. May be called twice.

        Args:
            wait: Until everything is durable; otherwise what waits is written in a thread, for which the next ``close()``,
                ``clear`` or ``clear_cache`` waits.

        Raises:
            TrajstoreError: As ``flush``; the buffer is closed all the same.
        """
        with self._lock:
            closed, self._closed = self._closed, True
            if not closed and wait:
                self._holding.close()
            elif not closed:
                self._closing = Future()
                threading.Thread(target=self._end, args=(self._closing,), name="trajstore-buffer-close").start()
        if wait:
            self._finish_closing()

    def _end(self, done: Future[None]) -> None:
        try:
            with self._lock:
                self._holding.close()
        except BaseException as error:  # noqa: BLE001 - raised at the next call
            done.set_exception(error)
        else:
            done.set_result(None)

    def _finish_closing(self) -> None:
        """Wait for the thread of ``close(wait=False)``, without the lock, which it needs; raise once what failed there."""
        closing = self._closing
        if closing is not None:
            error = closing.exception()
            self._closing = None
            if error is not None:
                raise error

    def __enter__(self) -> TrajectoryReplayBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"TrajectoryReplayBuffer(size={self.size}, total_samples={self.total_samples}, url={self._holding.url!r})"
        )

    @property
    def store(self) -> Store | None:
        """The store that holds the trajectories, to look at; None while it is not open."""
        with self._lock:
            self._holding.settle()
            return self._holding.store

    def _reseed(self, seed: int) -> None:
        self.seed = seed
        self.random_generator = torch.Generator().manual_seed(seed)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the buffer is closed; make another, and load_checkpoint() what it saved")
