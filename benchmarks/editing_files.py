"""Merging a gigabyte of ``.pt`` files by RLinf's rules, beside stores of the same trajectories.

Invariant: both sides start from the same trajectories, in as many folders, and neither side compresses them: copying moves
the same bytes. The tool for files is ours, after RLinf's rules: ids ascend, for each id ranks take turns, files get new
numbers. "Copied" leaves writing back to the kernel; "fsync" is what ``merge_directories`` does, as stores do; "moved"
renames the files, which leaves the ranks without theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import trajstore
from benchmarks.editing_merge import nbytes_below
from benchmarks.harness import Contender, Context, Measurement, paired_ratios, ratio_of_medians
from trajstore.edit.combine import Share
from trajstore.interop.rlinf_files import RlinfDirectory, merge_directories, plan_merge, write_directory
from trajstore.interop.rlinf_files.documents import index_to_bytes

RANKS, STEPS, ENVIRONMENTS, SIDE = 4, 50, 8, 64
_SHARES: tuple[Share, ...] = ("reference", "link", "copy")
_AGAINST = {
    "files copied": ("copying them", _SHARES),
    "files copied, fsync": ("copying and syncing", ("copy",)),
    "files moved": ("renaming them", ("reference", "link")),
}


def merge_of_files(context: Context) -> Iterator[Measurement]:
    """Stores merged by reference, link and copy; directories of files merged by copying and by moving."""
    each = context.pick(25, 3)
    files, stores = context.scratch / "files", [context.scratch / f"store{rank}" for rank in range(RANKS)]
    nbytes = 0
    for rank in range(RANKS):
        context.say(f"files: rank {rank}")
        trajectories = [_trajectory(rank * each + n) for n in range(each)]
        write_directory(str(files / f"rank_{rank}"), list(enumerate(trajectories)))
        with trajstore.open(stores[rank], mode="x", codec="none") as store:
            for trajectory in trajectories:
                nbytes += sum(tensor.nbytes for tensor in trajectory.values() if isinstance(tensor, torch.Tensor))
                _append(store, trajectory)
    os.sync()
    context.say("files: merge")
    yield from _measured(context, files, stores, nbytes)


def _trajectory(number: int) -> dict[str, Any]:
    """Fields ``[T, B, ...]`` of frames that no codec can shrink, actions, rewards and log-probabilities."""
    generator = torch.Generator().manual_seed(number)
    size = (STEPS, ENVIRONMENTS, SIDE, 2 * SIDE, 3)  # two cameras side by side
    return {
        "max_episode_length": STEPS,
        "model_weights_id": "0",
        "actions": torch.randn(STEPS, ENVIRONMENTS, 7, generator=generator),
        "rewards": torch.rand(STEPS, ENVIRONMENTS, 1, generator=generator),
        "prev_logprobs": torch.randn(STEPS, ENVIRONMENTS, 7, generator=generator),
        "frames": torch.randint(0, 256, size, dtype=torch.uint8, generator=generator),
    }


def _append(store: trajstore.Store, trajectory: dict[str, Any]) -> None:
    """One trajectory of the store per environment."""
    columns = {name: value for name, value in trajectory.items() if isinstance(value, torch.Tensor)}
    for environment in range(ENVIRONMENTS):
        store.append({name: value[:, environment] for name, value in columns.items()})


def _measured(context: Context, files: Path, stores: list[Path], nbytes: int) -> Iterator[Measurement]:
    place = context.scratch / "merged"
    written: dict[str, int] = {}

    def contender(name: str, merge: Callable[[], object], undo: Callable[[], object]) -> Contender:
        before = [0]

        def prepare() -> None:
            os.sync()
            before[0] = nbytes_below(context.scratch)

        def cleanup(_none: object) -> None:
            written[name] = nbytes_below(context.scratch) - before[0]
            undo()
            shutil.rmtree(place)
            for store in stores:
                shutil.rmtree(store / "pins", ignore_errors=True)

        return Contender(name=name, prepare=prepare, run=lambda _none: merge(), cleanup=cleanup)

    def shared(share: Share) -> Contender:
        return contender(
            share, lambda: trajstore.merge(stores, place, order="interleave", share=share, progress=False), lambda: None
        )

    copying, moving = _Files(files, place, shutil.copyfile), _Files(files, place, Path.rename)
    timings = context.measure(
        [
            *(shared(share) for share in _SHARES),
            contender("files copied", copying.merge, lambda: None),
            contender("files copied, fsync", lambda: merge_directories(str(files), str(place)), lambda: None),
            contender("files moved", moving.merge, moving.undo),
        ],
        rounds=context.pick(5, 3),
    )
    size = f"{nbytes / 1e9:.2g} GB of {RANKS} ranks"
    for other, (against, shares) in _AGAINST.items():
        for share in shares:
            yield Measurement(
                name=f"files, {share} against {other}",
                what=f"merging {size}, `share={share!r}`: speed / our tool for `.pt` files after RLinf's rules, {against}",
                measured=ratio_of_medians(timings, other, share),
                timings=timings,
                spread=paired_ratios(timings, other, share),
                details={"bytes": nbytes, "bytes_written": written},
            )


class _Files:
    """A merge of directories that gives every file its new number in another folder; the index is written last.

    Args:
        source: The folder above the ranks.
        target: Where the result goes.
        transfer: Copies or moves a file; nothing is synced.
    """

    def __init__(self, source: Path, target: Path, transfer: Callable[[Path, Path], object]) -> None:
        self._source = source
        self._target = target
        self._transfer = transfer
        self._done: list[tuple[Path, Path]] = []

    def merge(self) -> None:
        ranks = sorted(self._source.iterdir())
        self._target.mkdir()
        self._done.clear()
        entries = []
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(RlinfDirectory(str(rank))) for rank in ranks]
            for number, (rank, trajectory_id) in enumerate(plan_merge([directory.ids for directory in opened])):
                found = opened[rank].select([trajectory_id])[0]
                entry = dataclasses.replace(found.entry, trajectory_id=number)
                old, new = ranks[rank] / found.key, self._target / f"{entry.file_stem()}.pt"
                self._transfer(old, new)
                self._done.append((old, new))
                entries.append(entry)
        (self._target / "trajectory_index.json").write_bytes(index_to_bytes(entries))

    def undo(self) -> None:
        """Move the files back."""
        for old, new in self._done:
            new.rename(old)
