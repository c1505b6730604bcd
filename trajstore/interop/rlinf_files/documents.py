"""What ``metadata.json`` and ``trajectory_index.json`` say. No files here.

Invariant: what ``parse_*`` accepts is whole: every id of the list has an entry, and every entry a number of samples that its
shape agrees with. What ``Metadata.to_bytes`` and ``index_to_bytes`` give is what ``json.dump`` of RLinf's own dicts would.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trajstore.errors import ColumnShapeError, ColumnTypeError, CorruptionError, MetadataError, SelectionError

METADATA_KEY = "metadata.json"
INDEX_KEY = "trajectory_index.json"
INDEX_KEYS = (INDEX_KEY, "trajector_index.json")  # the second is a misspelling that RLinf's tools have written
FORMATS = ("pt", "pkl")


@dataclass(frozen=True)
class Entry:
    """What the index says of a trajectory.

    Attributes:
        trajectory_id: Its number in this directory.
        num_samples: T * B.
        max_episode_length: Steps.
        shape: Of ``prev_logprobs``, or of ``rewards``: (T, B, ...).
        model_weights_id: Of the policy that made it.
    """

    trajectory_id: int
    num_samples: int
    max_episode_length: int
    shape: tuple[int, ...]
    model_weights_id: str

    def file_stem(self) -> str:
        """Name of its file, without the ending."""
        return f"trajectory_{self.trajectory_id}_{self.model_weights_id}"


@dataclass(frozen=True)
class Metadata:
    """What ``metadata.json`` says of a directory.

    Attributes:
        trajectory_format: Of its files, ``"pt"`` or ``"pkl"``; also written as ``storage_format``.
        size: Trajectories.
        total_samples: Of all of them.
        trajectory_counter: The id that the next trajectory gets.
        seed: Of the buffer that wrote it; None if it had none.
        storage_dir: Where a buffer of the first generation kept its trajectories; None if it does not say.
    """

    trajectory_format: str
    size: int
    total_samples: int
    trajectory_counter: int
    seed: int | None
    storage_dir: str | None = None

    def to_bytes(self) -> bytes:
        """As RLinf writes it."""
        return json.dumps(
            {
                "trajectory_format": self.trajectory_format,
                "size": self.size,
                "total_samples": self.total_samples,
                "trajectory_counter": self.trajectory_counter,
                "seed": self.seed,
            }
        ).encode()


def parse_metadata(data: bytes, *, where: str) -> Metadata:
    """The inverse of ``Metadata.to_bytes``; takes the keys of both generations.

    Args:
        data: The file's bytes.
        where: Names the file in errors.

    Raises:
        CorruptionError: It is something else.
    """
    document = _json(data, where)
    trajectory_format = document.get("trajectory_format", document.get("storage_format", "pt"))
    if trajectory_format not in FORMATS:
        raise CorruptionError(
            f"{where} has trajectory_format {trajectory_format!r}, expected 'pt' or 'pkl'; restore it from a copy"
        )
    seed, storage_dir = document.get("seed"), document.get("storage_dir")
    return Metadata(
        trajectory_format=trajectory_format,
        size=_count(document, "size", where),
        total_samples=_count(document, "total_samples", where),
        trajectory_counter=_count(document, "trajectory_counter", where),
        seed=None if seed is None else _integer(seed, "seed", where),
        storage_dir=storage_dir if isinstance(storage_dir, str) and storage_dir else None,
    )


def parse_index(data: bytes, *, where: str) -> list[Entry]:
    """Entries in the order of ``trajectory_id_list``.

    Args:
        data: The file's bytes.
        where: Names the file in errors.

    Raises:
        CorruptionError: It is something else, or does not agree with itself.
    """
    document = _json(data, where)
    index, ids = document.get("trajectory_index"), document.get("trajectory_id_list")
    if not isinstance(index, dict) or not isinstance(ids, list):
        raise CorruptionError(
            f"{where} has keys {sorted(document)}, expected 'trajectory_index' (an object) and 'trajectory_id_list' (a "
            "list); restore it from a copy"
        )
    numbers = [_integer(number, "trajectory_id_list", where) for number in ids]
    absent = [number for number in numbers if not isinstance(index.get(str(number)), dict)]
    if absent or len(set(numbers)) < len(numbers):
        fault = f"no entry for trajectory {absent[0]}" if absent else "a trajectory twice"
        raise CorruptionError(f"{where} has {fault} of its trajectory_id_list; restore it from a copy")
    return [_entry(number, index[str(number)], f"{where}, trajectory {number}") for number in numbers]


def index_to_bytes(entries: Sequence[Entry]) -> bytes:
    """The index, as RLinf writes it."""
    index = {
        str(e.trajectory_id): {
            "num_samples": e.num_samples,
            "trajectory_id": e.trajectory_id,
            "max_episode_length": e.max_episode_length,
            "shape": list(e.shape),
            "model_weights_id": e.model_weights_id,
        }
        for e in entries
    }
    return json.dumps({"trajectory_index": index, "trajectory_id_list": [e.trajectory_id for e in entries]}).encode()


def entry_of(trajectory_id: int, fields: Mapping[str, Any]) -> Entry:
    """What the index says of a trajectory with these fields.

    Raises:
        SchemaError: Its shape cannot be told, or its metadata are no metadata.
    """
    shape = leading_shape(fields)
    if shape is None:
        raise ColumnShapeError(
            f"trajectory {trajectory_id} has neither prev_logprobs nor rewards, so its T and B are unknown; leave it out, "
            "as RLinf does"
        )
    weights, steps = fields.get("model_weights_id", ""), fields.get("max_episode_length", 0)
    if not isinstance(weights, str) or not set(weights).isdisjoint("/\\\0"):
        raise MetadataError(
            f"model_weights_id={weights!r} of trajectory {trajectory_id} cannot be part of a file's name; expected a text "
            "without slashes"
        )
    if type(steps) is not int:
        raise MetadataError(
            f"max_episode_length={steps!r} of trajectory {trajectory_id} is {type(steps).__name__}, expected an int"
        )
    return Entry(trajectory_id, shape[0] * shape[1], steps, shape, weights)


def leading_shape(fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Shape of ``prev_logprobs`` if there is one, else of ``rewards``: ``(T, B, ...)``; None if there is neither.

    Raises:
        ColumnTypeError: It is no tensor.
        ColumnShapeError: It has fewer than two dimensions, or no samples.

    Examples:
        >>> leading_shape({"rewards": torch.zeros(5, 2)})
        (5, 2)
        >>> leading_shape({"actions": torch.zeros(5, 2)}) is None
        True
    """
    for name in ("prev_logprobs", "rewards"):
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, torch.Tensor):
            raise ColumnTypeError(f"{name} is {type(value).__name__}, expected a tensor [T, B, ...]")
        shape = tuple(value.shape)
        if len(shape) < 2 or 0 in shape[:2]:
            raise ColumnShapeError(
                f"{name} has shape {list(shape)}, expected [T, B, ...] with T >= 1 steps of B >= 1 environments"
            )
        return shape
    return None


def check_ids(ids: Sequence[int], wanted: Sequence[int], *, where: str) -> None:
    """Ids that were asked for are there.

    Raises:
        SelectionError: One is not.
    """
    unknown = sorted(set(wanted) - set(ids))
    if unknown:
        raise SelectionError(
            f"{where} has no trajectory {unknown[0]}; its {len(ids)} ids are in [{min(ids, default=0)}, "
            f"{max(ids, default=0)}]"
        )


def _entry(number: int, document: Mapping[str, Any], where: str) -> Entry:
    shape = document.get("shape")
    if not isinstance(shape, list) or len(shape) < 2 or not all(type(n) is int and n >= 0 for n in shape):
        raise CorruptionError(f"{where}: shape {shape!r}, expected a list of two or more sizes; restore it from a copy")
    samples = _count(document, "num_samples", where)
    if samples != math.prod(shape[:2]):
        raise CorruptionError(
            f"{where}: num_samples {samples} is not T * B of shape {shape}, {math.prod(shape[:2])}; restore it from a copy"
        )
    return Entry(
        trajectory_id=number,
        num_samples=samples,
        max_episode_length=_integer(document.get("max_episode_length", 0), "max_episode_length", where),
        shape=tuple(shape),
        model_weights_id=str(document.get("model_weights_id", "")),
    )


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptionError(f"{where} is not JSON ({error}); restore it from a copy") from error
    if not isinstance(document, dict):
        raise CorruptionError(f"{where} holds a {type(document).__name__}, expected an object; restore it from a copy")
    return document


def _count(document: Mapping[str, Any], name: str, where: str) -> int:
    value = _integer(document.get(name), name, where)
    if value < 0:
        raise CorruptionError(f"{where}: {name} is {value}, expected a number from 0 on; restore it from a copy")
    return value


def _integer(value: Any, name: str, where: str) -> int:
    if type(value) is not int:
        raise CorruptionError(f"{where}: {name} is {value!r}, expected an integer; restore it from a copy")
    return value
