"""What the drop-in buffers promise about speed: RLinf's, ObjectRL's and ApexRL's calls, beside what those projects do.

Every opponent gets the same data in the same run: a buffer on ``torch.save``-d files that works as RLinf's does
(``rlinf_files_peer``), TorchRL's ``TensorDictReplayBuffer`` on ``LazyMemmapStorage``, which is what ObjectRL wraps, plain
indexing into preallocated tensors, the plain loop of generalized advantage estimation.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator, Mapping

import torch

from benchmarks.buffers_rings import apexrl_sample, gae_of_a_rollout, objectrl_add, objectrl_add_batch, objectrl_sample
from benchmarks.buffers_rlinf import rlinf_add, rlinf_checkpoint, rlinf_sample
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
    disturbed = f"the load average was {busy:.1f} at the beginning: measure again alone"
    return Report(measurements=measurements, conclusions=[disturbed] if busy > 0.5 else [])


ITEMS: Mapping[str, Callable[[Context], Iterator[Measurement]]] = {
    "rlinf sample": rlinf_sample,
    "rlinf add": rlinf_add,
    "rlinf checkpoint": rlinf_checkpoint,
    "objectrl add": objectrl_add,
    "objectrl add_batch": objectrl_add_batch,
    "objectrl sample": objectrl_sample,
    "apexrl sample": apexrl_sample,
    "gae": gae_of_a_rollout,
}
