"""A replay buffer on files, at the same job: how RLinf's works, written anew for the comparison.

Invariant: it takes the steps that RLinf's takes, none more. A trajectory is a file of ``torch.save``, written by one of 20
threads in the background; the newest ``cache_size`` also lie flattened, ``[T * B, ...]``, in one buffer per field that is
allocated once. ``sample`` looks at its draws one by one, loads whole trajectories where they are not in memory, lays those
end to end, gathers rows and copies them to their places. ``sample_vectorised`` is what that could be at its best: one
``index_select`` per field, for trajectories that are all in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Iterable, Mapping
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
        save: Write the files; without it all that is sampled has to fit the cache.
    """

    def __init__(
        self,
        directory: Path,
        *,
        cache_size: int = 5,
        sample_window_size: int = 100,
        seed: int = 1234,
        save: bool = True,
    ) -> None:
        self._directory = directory
        self._window_size = sample_window_size
        self._generator = torch.Generator().manual_seed(seed)
        self._trajectories: list[_Known] = []
        self._cache = _Cache(cache_size)
        self._pool = ThreadPoolExecutor(SAVING_THREADS, thread_name_prefix="save")
        self._save = save
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
            if self._save:
                self._saving.append(self._pool.submit(_save, trajectory, self._file(known.number)))
            self._cache.put(known.number, _flat(trajectory, known))
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
        window, which, within = self._draw(num_chunks)
        groups: dict[int, list[tuple[int, int]]] = {}  # RLinf makes them of every draw, one by one
        for place in range(num_chunks):
            groups.setdefault(window[int(which[place])].number, []).append((place, int(within[place])))
        numbers = torch.tensor([window[int(position)].number for position in which])
        cached = torch.isin(numbers, torch.tensor(self._cache.numbers))
        places = torch.arange(num_chunks)
        batch: Fields = {}
        if cached.any():
            slots = torch.tensor([self._cache.slot(number) for number in numbers[cached].tolist()])
            rows = slots * self._cache.samples + within[cached]
            _fill(batch, self._cache.buffers, rows, places[cached], num_chunks)
        missing = ~cached
        if missing.any():
            needed = torch.unique(numbers[missing]).tolist()
            loaded = [self._load(self._trajectories[number]) for number in needed]
            together = {name: torch.cat([fields[name] for fields in loaded]) for name in loaded[0]}
            stops = itertools.accumulate((self._trajectories[number].samples for number in needed), initial=0)
            starts = dict(zip(needed, stops, strict=False))
            rows = torch.tensor([starts[number] for number in numbers[missing].tolist()]) + within[missing]
            _fill(batch, together, rows, places[missing], num_chunks)
        return _nested(batch)

    def sample_vectorised(self, num_chunks: int) -> dict[str, Any]:
        """The same batch by one ``index_select`` per field; every trajectory of the window has to be in memory."""
        window, which, within = self._draw(num_chunks)
        slots = torch.tensor([self._cache.slot(known.number) for known in window])
        rows = slots[which] * self._cache.samples + within
        return _nested({name: buffer.index_select(0, rows) for name, buffer in self._cache.buffers.items()})

    def _draw(self, num_chunks: int) -> tuple[list[_Known], torch.Tensor, torch.Tensor]:
        """The window, the position in it of each draw, and the row of that trajectory."""
        window = self._trajectories[-self._window_size :]
        samples = torch.tensor([known.samples for known in window])
        stops = samples.cumsum(0)
        drawn = torch.randint(0, int(stops[-1]), (num_chunks,), generator=self._generator)
        which = torch.bucketize(drawn, stops, right=True)
        return window, which, drawn - (stops - samples)[which]

    def _load(self, known: _Known) -> Fields:
        return _flat(torch.load(self._file(known.number), map_location="cpu", weights_only=True), known)

    def _file(self, number: int) -> Path:
        return self._directory / f"trajectory_{number}_.pt"


class _Cache:
    """The newest trajectories, flattened, one slot each of a buffer per field that is allocated at the first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.samples = 0  # of a slot: those of the first trajectory; the others are alike
        self.buffers: Fields = {}  # name -> (size * samples, ...)
        self._slots: dict[int, int] = {}  # trajectory -> slot, oldest first

    @property
    def numbers(self) -> list[int]:
        return list(self._slots)

    def slot(self, number: int) -> int:
        return self._slots[number]

    def put(self, number: int, fields: Fields) -> None:
        if not self.buffers:
            self.samples = len(next(iter(fields.values())))
            self.buffers = {
                name: torch.empty((self._size * self.samples, *tensor.shape[1:]), dtype=tensor.dtype)
                for name, tensor in fields.items()
            }
        slot = len(self._slots)
        if slot == self._size:
            slot = self._slots.pop(next(iter(self._slots)))
        for name, tensor in fields.items():
            self.buffers[name][slot * self.samples : (slot + 1) * self.samples] = tensor
        self._slots[number] = slot


def _fill(batch: Fields, source: Fields, rows: torch.Tensor, places: torch.Tensor, size: int) -> None:
    """Rows of ``source`` to ``places`` of the batch, which is allocated at the first call."""
    for name, tensor in source.items():
        if name not in batch:
            batch[name] = torch.empty((size, *tensor.shape[1:]), dtype=tensor.dtype)
        batch[name][places] = tensor.index_select(0, rows)


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


def save_all(trajectories: Iterable[Mapping[str, Any]], directory: Path, *, sync: bool = False) -> None:
    """``torch.save`` of each, one after the other; with ``sync``, all of it is on the disk when it returns."""
    for number, trajectory in enumerate(trajectories):
        with (directory / f"trajectory_{number}_.pt").open("wb") as file:
            torch.save(dict(trajectory), file)
            if sync:
                file.flush()
                os.fsync(file.fileno())


def save_all_in_threads(trajectories: Iterable[Mapping[str, Any]], directory: Path) -> None:
    """``torch.save`` of each, by as many threads as the buffer has; returns when all are written."""
    with ThreadPoolExecutor(SAVING_THREADS) as pool:
        files = (directory / f"trajectory_{number}_.pt" for number in itertools.count())
        for _ in pool.map(torch.save, map(dict, trajectories), files):
            pass


def _save(trajectory: Mapping[str, Any], file: Path) -> None:
    torch.save(_cloned(trajectory), file)  # cloned first: a view would be saved with all that it is a view of


def _cloned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _cloned(inner) for name, inner in value.items()}
    return value.contiguous().clone() if isinstance(value, torch.Tensor) else value
