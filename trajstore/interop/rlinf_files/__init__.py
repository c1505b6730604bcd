"""RLinf's own files: read a directory of them, write one, merge those of several ranks, keep the first of one.

Invariant: nothing is used of a directory before all that its index names is known to be there; nothing is unpickled unless
``allow_pickle=True`` was said; a directory that is being written can be loaded only once all its trajectories are in it.

A directory holds ``metadata.json``, ``trajectory_index.json`` and a file per trajectory,
``trajectory_{id}_{model_weights_id}.pt`` or ``.pkl``: a dict of field -> tensor, dict, number or text.

Examples:
    >>> import torch
    >>> fields = {"rewards": torch.ones(3, 2), "max_episode_length": 3, "model_weights_id": "w0"}
    >>> _ = write_directory("memory://doctest/rlinf", [(0, fields)], seed=7)
    >>> with RlinfDirectory("memory://doctest/rlinf") as directory:
    ...     for trajectory_id, entry, read in directory.trajectories():
    ...         print(trajectory_id, entry.shape, read["rewards"].sum())
    0 (3, 2) tensor(6.)
"""

from trajstore.interop.rlinf_files.arrange import merge_directories, plan_merge, plan_split, split_directory
from trajstore.interop.rlinf_files.directory import (
    RlinfDirectory,
    all_ranks_with,
    is_rlinf_directory,
    open_directories,
    rank_folders,
)
from trajstore.interop.rlinf_files.documents import INDEX_KEYS, METADATA_KEY, Entry, Metadata, leading_shape
from trajstore.interop.rlinf_files.writer import RlinfWriter, write_directory

__all__ = [
    "INDEX_KEYS",
    "METADATA_KEY",
    "Entry",
    "Metadata",
    "RlinfDirectory",
    "RlinfWriter",
    "all_ranks_with",
    "is_rlinf_directory",
    "leading_shape",
    "merge_directories",
    "open_directories",
    "plan_merge",
    "plan_split",
    "rank_folders",
    "split_directory",
    "write_directory",
]
