"""RLinf's replay buffer over a store: change the import, keep the training code.

    from trajstore.buffers.rlinf import Trajectory, TrajectoryReplayBuffer

Trajectories ``[T, B, ...]`` lie in the store environment by environment, one stored trajectory per episode or part of one,
with the metadata fields ``trajectory_id``, ``env``, ``model_weights_id``, ``max_episode_length``; ``trajstore info`` and
``store.trajectories.to_pandas()`` show them.
"""

from trajstore.buffers.rlinf.arrange import merge_or_split
from trajstore.buffers.rlinf.buffer import TrajectoryReplayBuffer
from trajstore.buffers.rlinf.datasets import (
    PreloadReplayBufferDataset,
    ReplayBufferDataset,
    replay_buffer_collate_fn,
)
from trajstore.buffers.rlinf.trajectory import Trajectory
from trajstore.buffers.rlinf.transfer import export_files, import_directories, import_files

__all__ = [
    "PreloadReplayBufferDataset",
    "ReplayBufferDataset",
    "Trajectory",
    "TrajectoryReplayBuffer",
    "export_files",
    "import_directories",
    "import_files",
    "merge_or_split",
    "replay_buffer_collate_fn",
]
