"""A replay buffer on files, at the same job: how RLinf's works, written anew for the comparison.

Invariant: nothing is made harder for it. A trajectory is a file of ``torch.save``; the newest ``cache_size`` also lie
flattened, ``[T * B, ...]``, in one buffer per field that is allocated once. What a batch needs of them is one indexed copy per
field; every other trajectory that it needs is ``torch.load``-ed whole. Files are written by 20 threads in the background.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

Fields = dict[str, torch.Tensor]  # "curr_obs/main_images" -> [T, B, ...]; [T * B, ...] once flattened
SAVING_THREADS = 20
_SEPARATOR = "/"


@dataclasses.dataclass(frozen=True)
class _Known:
    """One trajectory of the buffer."""

    number: int
    steps: int
    environments: int

    @property
    def samples(self) -> int:
        return self.steps * self.environments


class FilesBuffer:
    """Trajectories in files, the newest of them also in memory; samples as RLinf draws them.

    Args:
        directory: Where the files go; it must exist.
        cache_size: Trajectories kept in memory.
        sample_window_size: Samples come from this many of the newest trajectories; 0 for all.
        seed: Of the draws.
    """

    def __init__(
        self, directory: Path, *, cache_size: int = 5, sample_window_size: int = 100, seed: int = 1234
    ) -> None:
        self._directory = directory
        self._window_size = sample_window_size
        self._generator = torch.Generator().manual_seed(seed)
        self._trajectories: list[_Known] = []
        self._cache = _Cache(cache_size)
        self._pool = ThreadPoolExecutor(SAVING_THREADS, thread_name_prefix="save")
        self._saving: deque[Future[None]] = deque()

    def __enter__(self) -> FilesBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add_trajectories(self, trajectories: Iterable[Mapping[str, Any]]) -> None:
        """Take trajectories, field -> tensor ``[T, B, ...]`` or a dict of such; files follow in the background."""
        for trajectory in trajectories:
            steps, environments = trajectory["rewards"].shape[:2]
            known = _Known(len(self._trajectories), int(steps), int(environments))
            self._cache.put(known.number, _flat(trajectory, known))
            self._saving.append(self._pool.submit(torch.save, dict(trajectory), self._file(known.number)))
            self._trajectories.append(known)

    def wait(self) -> None:
        """Return when every file is written."""
        while self._saving:
            self._saving.popleft().result()

    def close(self) -> None:
        """Write what is left and end the threads."""
        self.wait()
        self._pool.shutdown()

    def sample(self, num_chunks: int) -> dict[str, Any]:
        """A nested batch ``[num_chunks, ...]`` of uniform draws from the window, in drawn order."""
        window = self._trajectories[-self._window_size :]
        samples = torch.tensor([known.samples for known in window])
        stops = samples.cumsum(0)
        drawn = torch.randint(0, int(stops[-1]), (num_chunks,), generator=self._generator)
        which = torch.searchsorted(stops, drawn, right=True)  # position in the window
        within = drawn - (stops - samples)[which]
        needed = sorted(set(which.tolist()))
        missing = [position for position in needed if window[position].number not in self._cache]
        if not missing:
            slots = torch.tensor([self._cache.slot(known.number) if known.number in self._cache else -1 for known in window])
            return _nested(self._cache.gather(slots[which], within))
        return _nested(self._from_files(window, needed, which, within))

    def _from_files(
        self, window: Sequence[_Known], needed: Sequence[int], which: torch.Tensor, within: torch.Tensor
    ) -> Fields:
        """What ``needed`` holds is put end to end, from memory or else from files; rows are gathered from there."""
        parts = []
        starts = torch.zeros(len(window), dtype=torch.int64)
        start = 0
        for position in needed:
            known = window[position]
            parts.append(self._cache.get(known.number) if known.number in self._cache else self._load(known))
            starts[position] = start
            start += known.samples
        rows = starts[which] + within
        return {name: torch.cat([part[name] for part in parts]).index_select(0, rows) for name in parts[0]}

    def _load(self, known: _Known) -> Fields:
        return _flat(torch.load(self._file(known.number), map_location="cpu", weights_only=True), known)

    def _file(self, number: int) -> Path:
        return self._directory / f"trajectory_{number}_.pt"


class _Cache:
    """The newest trajectories, flattened, one slot each of a buffer per field that is allocated at the first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._buffers: Fields = {}  # name -> (size * samples of the first trajectory, ...)
        self._samples = 0
        self._slots: dict[int, int] = {}  # trajectory -> slot, oldest first

    def __contains__(self, number: int) -> bool:
        return number in self._slots

    def slot(self, number: int) -> int:
        return self._slots[number]

    def put(self, number: int, fields: Fields) -> None:
        if not self._buffers:
            self._samples = len(next(iter(fields.values())))
            self._buffers = {
                name: torch.empty((self._size * self._samples, *tensor.shape[1:]), dtype=tensor.dtype)
                for name, tensor in fields.items()
            }
        slot = len(self._slots)
        if slot == self._size:
            slot = self._slots.pop(next(iter(self._slots)))
        for name, tensor in fields.items():
            self._buffers[name][slot * self._samples : (slot + 1) * self._samples].copy_(tensor)
        self._slots[number] = slot

    def get(self, number: int) -> Fields:
        start = self._slots[number] * self._samples
        return {name: buffer[start : start + self._samples] for name, buffer in self._buffers.items()}

    def gather(self, slots: torch.Tensor, within: torch.Tensor) -> Fields:
        rows = slots * self._samples + within
        return {name: buffer.index_select(0, rows) for name, buffer in self._buffers.items()}


def _flat(trajectory: Mapping[str, Any], known: _Known) -> Fields:
    """Fields as rows ``t * B + b``: views where the memory allows it. Of ends, the first row of each epoch is dropped."""
    return {
        name: _without_first_rows(tensor, known.steps).reshape(known.samples, *tensor.shape[2:])
        for name, tensor in _leaves(trajectory)
    }


def _without_first_rows(tensor: torch.Tensor, steps: int) -> torch.Tensor:
    epochs = len(tensor) - steps
    if epochs == 0:
        return tensor
    rows = tensor.unflatten(0, (epochs, steps // epochs + 1))[:, 1:]
    return rows.reshape(steps, *tensor.shape[1:])


def _leaves(fields: Mapping[str, Any], prefix: str = "") -> list[tuple[str, torch.Tensor]]:
    leaves = []
    for name, value in fields.items():
        if isinstance(value, Mapping):
            leaves += _leaves(value, f"{prefix}{name}{_SEPARATOR}")
        elif isinstance(value, torch.Tensor):
            leaves.append((prefix + name, value))
    return leaves


def _nested(fields: Fields) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, tensor in fields.items():
        *folders, name = path.split(_SEPARATOR)
        inner = nested
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = tensor
    return nested


def save_all(trajectories: Iterable[Mapping[str, Any]], directory: Path) -> None:
    """``torch.save`` of each, one after the other."""
    for number, trajectory in enumerate(trajectories):
        torch.save(dict(trajectory), directory / f"trajectory_{number}_.pt")


def save_all_in_threads(trajectories: Iterable[Mapping[str, Any]], directory: Path) -> None:
    """``torch.save`` of each, by as many threads as the buffer has; returns when all are written."""
    with ThreadPoolExecutor(SAVING_THREADS) as pool:
        jobs: list[Callable[[], object]] = [
            pool.submit(torch.save, dict(trajectory), directory / f"trajectory_{number}_.pt").result
            for number, trajectory in enumerate(trajectories)
        ]
        for result in jobs:
            result()
