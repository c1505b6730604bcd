"""What it costs to arrange data anew: merge, split, compact and drop, beside what else does it.

Every opponent gets the same data in the same run: pyarrow on the manifests of the same trajectories, a merge of
``.pt`` files by RLinf's rules, a store written in one go, Minari on datasets of the same episodes.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator, Mapping

import torch

from benchmarks.editing_compact import compaction
from benchmarks.editing_files import merge_of_files
from benchmarks.editing_merge import merge_and_split
from benchmarks.editing_peers import MISSING, drop_and_merge
from benchmarks.harness import Context, Measurement, Report, cores, scratch_directory


def run(context: Context) -> Report:
    """Measure every item; a missed bar is reported like a met one."""
    torch.set_num_threads(cores())
    busy = os.getloadavg()[0]
    measurements: list[Measurement] = []
    for name, item in ITEMS.items():
        if context.wants(name):
            context.say(name)
            with scratch_directory(context.scratch) as scratch:  # what an item wrote goes before the next begins
                measurements.extend(item(dataclasses.replace(context, scratch=scratch)))
            gc.collect()
    conclusions = [f"not measured: {peer}: {reason}" for peer, reason in MISSING.items() if context.wants("drop")]
    if busy > 0.5:
        conclusions.append(f"the load average was {busy:.1f} at the beginning: measure again alone")
    return Report(measurements=measurements, conclusions=conclusions)


ITEMS: Mapping[str, Callable[[Context], Iterator[Measurement]]] = {
    "merge": merge_and_split,
    "files": merge_of_files,
    "compact": compaction,
    "drop": drop_and_merge,
}
