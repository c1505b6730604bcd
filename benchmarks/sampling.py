"""What sampling promises about speed: hot, cold, larger than memory, growing, from a bucket, beside the best of its peers.

Every opponent gets the same rows in the same run: memcpy into touched memory, TorchRL and cpprb at the best of their
settings (``torchrl_peers``), bare reads of the same pages from as many threads, bare requests for the same ranges.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator, Mapping

import torch

from benchmarks.harness import Context, Measurement, Report, cores, scratch_directory
from benchmarks.sampling_cold import block_shuffle, cold_windows, compressed_peer, peak_memory
from benchmarks.sampling_hot import image_windows, state_windows, training_step, transitions
from benchmarks.sampling_s3 import from_s3
from benchmarks.sampling_scale import after_appends, many_segments, many_trajectories


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
    # Threads of OpenMP that wait for their turn make a batch of 0.3 ms take 16 ms, and it is the peers that use it most.
    disturbed = f"the load average was {busy:.1f} at the beginning: peers are slower than they are; measure again alone"
    return Report(measurements=measurements, conclusions=[disturbed] if busy > 0.5 else [])


ITEMS: Mapping[str, Callable[[Context], Iterator[Measurement]]] = {
    "images": image_windows,
    "states": state_windows,
    "transitions": transitions,
    "training": training_step,
    "follow": after_appends,
    "index": many_trajectories,
    "segments": many_segments,
    "cold": cold_windows,
    "blocks": block_shuffle,
    "compressed": compressed_peer,
    "s3": from_s3,
    "memory": peak_memory,
}
