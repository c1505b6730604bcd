"""A rollout ``[T, B, ...]`` as columns of trajectories, one environment after the other, and back.

Invariant: the round trip is exact, field by field and bit by bit. What a batch holds becomes columns; everything else
(fields of fewer than two dimensions, rows that batches leave out, numbers and texts) goes along as text in the trajectory's
metadata. An observation that repeats in the next step is stored once: where ``next_obs[t]`` is not ``curr_obs[t + 1]``,
and after each done, a new trajectory begins, whose last state is the observation that would otherwise be lost.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from trajstore.buffers.rows import select_rows
from trajstore.errors import ColumnNameError, ColumnShapeError, ColumnTypeError, CorruptionError, SelectionError
from trajstore.names import nest
from trajstore.schema import Column, Schema, canonical_dtype
from trajstore.stored import Array

EPOCH_FIELDS = ("terminations", "truncations", "dones")  # may have a first row per epoch that batches leave out
_CURRENT, _NEXT = "curr_obs/", "next_obs/"
_ABOUT = {"max_episode_length": int, "model_weights_id": str}
_SHARED_FROM = 0.75  # of the steps have to repeat before an observation is stored once
_UNSAFE = re.compile(r'[\x00-\x1f\x7f/~\\:*?"<>|#%\[\]]')
_ESCAPED = re.compile(r"~([0-9A-F]{2})")
_PAGE_BYTES = 32 * 1024  # steps are drawn one by one: large pages would mostly be read for nothing
_LARGE_ROW_BYTES = 1024


@dataclass(frozen=True, eq=False)
class Rollout:
    """A trajectory in the sense of RLinf, taken apart.

    Attributes:
        steps: ``T``.
        envs: ``B``.
        columns: Path -> ``[T, B, ...]``: what batches hold.
        rest: What they do not hold, as JSON.
        versions: Path -> torch's count of changes in place when it was taken apart, where torch counts them.
    """

    steps: int
    envs: int
    columns: dict[str, torch.Tensor]
    rest: str
    versions: dict[str, int]

    @property
    def num_samples(self) -> int:
        """``T * B``."""
        return self.steps * self.envs

    def copied(self) -> Rollout:
        """The same in memory of its own."""
        columns = {path: tensor.clone() for path, tensor in self.columns.items()}
        return replace(self, columns=columns, versions={})

    def check_unchanged(self) -> None:
        """Raise ``SelectionError`` if a tensor was changed in place since it was taken apart."""
        for path, version in self.versions.items():
            if self.columns[path]._version != version:
                raise SelectionError(
                    f"field {path!r} of a trajectory was changed in place before it was filed, so the trajectory "
                    "is lost; make the buffer with copy_on_add=True, or give each trajectory tensors of its own"
                )


@dataclass(frozen=True, eq=False)
class Pieces:
    """A rollout as trajectories, end to end: environment by environment, each cut where an observation does not go on.

    Attributes:
        columns: Path -> ``[T * B, ...]``, or ``[T * B + n, ...]`` for observations that are stored once.
        lengths: ``(n,)`` int64, steps of each.
        envs: ``(n,)`` int64, its environment.
        terminated: ``(n,)`` bool: whether its last step says so.
        truncated: ``(n,)`` bool: whether its last step says so.
    """

    columns: dict[str, torch.Tensor]
    lengths: Array
    envs: Array
    terminated: Array
    truncated: Array


def take_apart(fields: Mapping[str, Any], steps: int, envs: int, *, taken: Collection[str] = ()) -> Rollout:
    """The columns of a rollout.

    Args:
        fields: Field -> tensor, dict of tensors, number or text; no None.
        steps: ``T``.
        envs: ``B``.
        taken: Names that no column may have; a field that has one is stored under another.

    Raises:
        ColumnShapeError: A tensor of two or more dimensions does not begin with ``[T, B]``.
        ColumnTypeError: Tensors on different devices, or a value that cannot be stored.
    """
    columns: dict[str, torch.Tensor] = {}
    rest: dict[str, Any] = {}
    leaves = list(_leaves(fields, taken))
    devices = {str(value.device): path for path, value in reversed(leaves) if isinstance(value, torch.Tensor)}
    if "meta" in devices and len(devices) == 1:
        raise ColumnTypeError(f"field {devices['meta']!r} is on the device 'meta', where tensors have no values")
    if len(devices) > 1:
        where = ", ".join(f"{path!r} on {device}" for device, path in devices.items())
        raise ColumnTypeError(f"fields lie on different devices: {where}; move them to one before they are added")
    for path, value in leaves:
        if not isinstance(value, torch.Tensor):
            if type(value) is not _ABOUT.get(path):  # which each piece says
                rest[path] = {"value": _plain(path, value)}
            continue
        if value.layout != torch.strided:
            raise ColumnTypeError(f"field {path!r} is a sparse tensor; pass its to_dense()")
        value = value.detach().cpu()
        if value.dim() < 2:
            rest[path] = {"tensor": _encoded(value)}
            continue
        if value.shape[1] != envs or value.shape[0] < steps:
            raise ColumnShapeError(
                f"field {path!r} is {list(value.shape)}, expected [{steps}, {envs}, ...] as `prev_logprobs` or `rewards` say"
            )
        kept, dropped = _split_rows(path, value, steps)
        columns[path] = kept
        if dropped is not None:
            rest[path] = {"rows": _encoded(dropped)}
    versions = {path: tensor._version for path, tensor in columns.items() if not tensor.is_inference()}
    return Rollout(steps, envs, columns, json.dumps(rest) if rest else "", versions)


def put_together(columns: Mapping[str, torch.Tensor], rest: str) -> dict[str, Any]:
    """The fields of a rollout; the inverse of ``take_apart``.

    Args:
        columns: Path -> ``[T, B, ...]``.
        rest: Of the rollout.
    """
    fields: dict[str, Any] = dict(columns)
    for path, entry in json.loads(rest).items() if rest else ():
        if "value" in entry:
            fields[path] = _value(entry["value"])
        elif "tensor" in entry:
            fields[path] = _decoded(entry["tensor"])
        else:
            fields[path] = _join_rows(path, fields[path], _decoded(entry["rows"]))
    empty = [path for path in fields if path.endswith("/")]
    nested = nest({path: value for path, value in fields.items() if not path.endswith("/")})
    for path in empty:
        node = nested
        for part in path.strip("/").split("/"):
            node = node.setdefault(part, {})
    return unescaped_keys(nested)


def shared_observations(rollout: Rollout) -> frozenset[str]:
    """Names under ``curr_obs`` whose next observation is (mostly) the current one of the next step."""
    if rollout.steps < 2:
        return frozenset()
    return frozenset(
        name for name in _in_both(rollout.columns) if float(_repeats(rollout, name).float().mean()) >= _SHARED_FROM
    )


def shared_in(schema: Schema) -> frozenset[str]:
    """The same, of a store that was made with them."""
    return frozenset(c.path.removeprefix(_CURRENT) for c in schema if c.extra and c.path.startswith(_CURRENT))


def schema_of(rollout: Rollout, shared: Collection[str]) -> Schema:
    """The columns of a store for rollouts like this one."""
    columns = []
    for path, tensor in rollout.columns.items():
        if path.startswith(_NEXT) and path.removeprefix(_NEXT) in shared:
            continue
        shape = tuple(tensor.shape[2:])
        column = Column(
            path=path,
            dtype=canonical_dtype(tensor.dtype, path=path),
            shape=shape,
            extra=1 if path.startswith(_CURRENT) and path.removeprefix(_CURRENT) in shared else 0,
        )
        if shape and column.row_bytes >= _LARGE_ROW_BYTES:
            rows = max(_PAGE_BYTES // column.row_bytes, 1)
            column = replace(column, page_rows=1 << (rows.bit_length() - 1))
        columns.append(column)
    return Schema(tuple(columns))


def sample_bytes(schema: Schema) -> int:
    """Bytes of one step of one environment as it is given, with its next observation."""
    return sum((1 + column.extra) * column.row_bytes for column in schema)


def check_like(rollout: Rollout, schema: Schema, shared: Collection[str]) -> None:
    """Raise unless a rollout has the columns of a buffer.

    Raises:
        ColumnNameError: Other fields than before.
        ColumnShapeError: One of another shape.
        ColumnTypeError: One of another dtype.
    """
    theirs = {c.path: c for c in schema}
    repeated = {_NEXT + name for name in shared}
    lacking = sorted((theirs.keys() | repeated) - rollout.columns.keys())
    added = sorted(rollout.columns.keys() - theirs.keys() - repeated)
    if lacking or added:
        told = [f"lacks {', '.join(repr(unescaped(path)) for path in lacking)}"] * bool(lacking)
        told += [f"has {', '.join(repr(unescaped(path)) for path in added)} besides"] * bool(added)
        raise ColumnNameError(f"a trajectory {' and '.join(told)}; all trajectories of a buffer have the same fields")
    for path in [*theirs, *sorted(repeated)]:
        column = theirs[path.replace(_NEXT, _CURRENT, 1) if path in repeated else path]
        tensor = rollout.columns[path]
        if tuple(tensor.shape[2:]) != column.shape:
            raise ColumnShapeError(
                f"field {path!r} is {list(tensor.shape[2:])} per step and environment, {list(column.shape)} before"
            )
        if canonical_dtype(tensor.dtype, path=path) != column.dtype:
            raise ColumnTypeError(f"field {path!r} is {tensor.dtype}, {column.dtype} before")


def pieces(rollout: Rollout, shared: Collection[str]) -> Pieces:
    """A rollout as trajectories; its columns are copied.

    Args:
        rollout: The rollout.
        shared: Observations that are stored once.
    """
    steps, envs, columns = rollout.steps, rollout.envs, rollout.columns
    done = _any(columns.get("dones"))
    terminated, truncated = _any(columns.get("terminations")), _any(columns.get("truncations"))
    if done is None:
        done = _either(terminated, truncated)
    terminated = done if terminated is None and truncated is None else terminated
    cut = np.zeros((steps, envs), bool) if done is None else done.copy()
    for name in shared:
        cut[:-1] |= ~_repeats(rollout, name).numpy()
    cut[-1] = True
    last = np.flatnonzero(cut.T)  # (n,) the last step of each piece, counted environment by environment
    order = np.arange(steps * envs).reshape(steps, envs).T.reshape(-1)  # (T * B,) row of each step as it is given
    lengths = np.diff(last, prepend=-1)
    # A state for each step, and behind the last step of each piece the one that follows it.
    states = np.insert(order, last + 1, order[last])
    final = last + 1 + np.arange(len(last))
    found: dict[str, torch.Tensor] = {}
    for path, tensor in columns.items():
        rows = tensor.reshape(steps * envs, *tensor.shape[2:])
        name = path.split("/", 1)[-1]
        if path.startswith(_CURRENT) and name in shared:
            following = columns[_NEXT + name].reshape(rows.shape)
            found[path] = select_rows(rows, torch.from_numpy(states))
            after = select_rows(following, torch.from_numpy(order[last]))
            _bytes(found[path])[torch.from_numpy(final)] = _bytes(after)
        elif not (path.startswith(_NEXT) and name in shared):
            found[path] = select_rows(rows, torch.from_numpy(order))
    flags = [np.zeros(len(last), bool) if f is None else f.T.reshape(-1)[last] for f in (terminated, truncated)]
    return Pieces(found, lengths, last // steps, flags[0], flags[1])


def columns_of(
    schema: Schema, read: Mapping[str, torch.Tensor], lengths: Sequence[int], steps: int, envs: int
) -> dict[str, torch.Tensor]:
    """Columns of one rollout from the rows of its pieces.

    Args:
        schema: Of the store.
        read: Path -> rows of all pieces, end to end.
        lengths: Steps of each piece.
        steps: ``T``.
        envs: ``B``.

    Returns:
        Path -> ``[T, B, ...]``, contiguous.
    """
    if sum(lengths) != steps * envs:
        raise CorruptionError(f"the pieces of a rollout hold {sum(lengths)} steps, expected {steps} x {envs}")
    found: dict[str, torch.Tensor] = {}
    # Among states, each piece has one row more: the row of a step is its number plus the pieces before it.
    before = torch.repeat_interleave(torch.arange(len(lengths)), torch.as_tensor(list(lengths)))
    rows = torch.arange(steps * envs) + before
    for path, tensor in read.items():
        if schema[path].extra:
            found[path] = _by_step(tensor[rows], steps, envs)
            found[path.replace(_CURRENT, _NEXT, 1)] = _by_step(tensor[rows + 1], steps, envs)
        else:
            found[path] = _by_step(tensor, steps, envs)
    return found


def _by_step(rows: torch.Tensor, steps: int, envs: int) -> torch.Tensor:
    return rows.view(envs, steps, *rows.shape[1:]).transpose(0, 1).contiguous()


def _leaves(tree: Mapping[str, Any], taken: Collection[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if not isinstance(key, str) or not key:
            raise ColumnNameError(f"field {key!r} under {prefix or 'the top'!r}: a name is a text")
        path = prefix + escaped(key, taken=() if prefix else taken)
        if isinstance(value, Mapping):
            if not value:
                yield f"{path}/", None  # an empty dict is kept as such
            yield from _leaves(value, taken, f"{path}/")
        else:
            yield path, value


def escaped(name: str, *, taken: Collection[str] = ()) -> str:
    """A field's name as part of a column's: characters that cannot be there as ``~`` and two hexadecimal digits.

    Args:
        name: Of the field.
        taken: Names that mean something else; their first character is written in that way.

    Examples:
        >>> escaped("observation/image"), unescaped("observation~2Fimage")
        ('observation~2Fimage', 'observation/image')
        >>> escaped("seed", taken=["seed"]), unescaped("~73eed")
        ('~73eed', 'seed')
    """
    text = _UNSAFE.sub(lambda match: f"~{ord(match.group()):02X}", name)
    if text.startswith(("__", " ")) or text in taken:
        text = f"~{ord(text[0]):02X}{text[1:]}"
    if text.endswith((".", " ")):
        text = f"{text[:-1]}~{ord(text[-1]):02X}"
    return text


def unescaped(name: str) -> str:
    """The inverse of ``escaped``."""
    return _ESCAPED.sub(lambda match: chr(int(match.group(1), 16)), name)


def unescaped_keys(tree: dict[str, Any]) -> dict[str, Any]:
    """A nested mapping under the names of its fields."""
    return {unescaped(k): unescaped_keys(v) if isinstance(v, dict) else v for k, v in tree.items()}


def _split_rows(path: str, tensor: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows that batches hold, ``[T, B, ...]``, and those that they do not."""
    extra = tensor.shape[0] - steps
    if not extra:
        return tensor, None
    if path not in EPOCH_FIELDS:
        return tensor[:steps], tensor[steps:]
    if steps % extra:
        raise ColumnShapeError(
            f"field {path!r} has {tensor.shape[0]} rows for {steps} steps: {extra} more, which should be one for each of "
            f"{extra} epochs of equal length"
        )
    epochs = tensor.reshape(extra, steps // extra + 1, *tensor.shape[1:])
    return epochs[:, 1:].reshape(steps, *tensor.shape[1:]), epochs[:, 0]


def _join_rows(path: str, kept: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    if path not in EPOCH_FIELDS:
        return torch.cat([kept, dropped])
    extra, steps = len(dropped), len(kept)
    epochs = kept.reshape(extra, steps // extra, *kept.shape[1:])
    return torch.cat([dropped[:, None], epochs], dim=1).reshape(steps + extra, *kept.shape[1:])


def _in_both(columns: Mapping[str, torch.Tensor]) -> list[str]:
    names = [path.removeprefix(_CURRENT) for path in columns if path.startswith(_CURRENT)]
    return [
        name
        for name in names
        if (following := columns.get(_NEXT + name)) is not None
        and following.shape == columns[_CURRENT + name].shape
        and following.dtype == columns[_CURRENT + name].dtype
    ]


def _repeats(rollout: Rollout, name: str) -> torch.Tensor:
    """``[T - 1, B]`` bool: where the next observation is the current one of the next step, bit for bit."""
    current = _bits(rollout.columns[_CURRENT + name][1:])
    following = _bits(rollout.columns[_NEXT + name][:-1])
    return (current == following).all(-1)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """``[T, B, n]`` integers that hold the bits of each row: NaN is equal to itself there."""
    width = math.prod(tensor.shape[2:])  # -1 would not do where there is nothing
    flat = _packed(tensor.reshape(*tensor.shape[:2], width)).view(torch.uint8)
    for dtype, size in ((torch.int64, 8), (torch.int32, 4)):
        if flat.shape[-1] % size == 0 and flat.storage_offset() % size == 0:
            return flat.view(dtype)
    return flat


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    """``[n, bytes]`` uint8: the same memory, which can be written to whatever the dtype."""
    return rows.view(len(rows), math.prod(rows.shape[1:])).view(torch.uint8)


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """In one block of memory, whose last stride is 1 also where there is but one value."""
    whole = tensor.contiguous()
    return whole if not whole.dim() or whole.stride(-1) == 1 else whole.clone(memory_format=torch.contiguous_format)


def _any(tensor: torch.Tensor | None) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
    """``[T, B]`` bool: whether anything of a step is true."""
    if tensor is None:
        return None
    width = math.prod(tensor.shape[2:])
    flags: np.ndarray[Any, np.dtype[np.bool_]] = (tensor != 0).reshape(*tensor.shape[:2], width).any(-1).numpy()
    return flags


def _either(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a | b


def _encoded(tensor: torch.Tensor) -> dict[str, Any]:
    raw = _packed(tensor.resolve_conj().resolve_neg().reshape(-1)).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "data": base64.b64encode(raw).decode(),
    }


def _decoded(entry: Mapping[str, Any]) -> torch.Tensor:
    dtype = getattr(torch, entry["dtype"], None)
    if not isinstance(dtype, torch.dtype):
        raise CorruptionError(f"a field is of the unknown dtype {entry['dtype']!r}; upgrade torch")
    raw = np.frombuffer(base64.b64decode(entry["data"]), np.uint8).copy()
    return torch.from_numpy(raw).view(dtype).reshape(entry["shape"])


def _plain(path: str, value: Any) -> Any:
    """A value as JSON that says what it was."""
    if isinstance(value, np.bool_ | np.integer | np.floating):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_plain(path, item) for item in value]}
    raise ColumnTypeError(
        f"field {path!r} is a {type(value).__name__}, expected a tensor, a dict of tensors, a number, a text, or a "
        f"list of these"
    )


def _value(entry: Any) -> Any:
    if not isinstance(entry, dict):
        return entry
    ((kind, items),) = entry.items()
    values = [_value(item) for item in items]
    return tuple(values) if kind == "tuple" else values
