"""Batches out of windows: gathered into one block, moved to the device, reduced there, cut and nested.

Invariant: consecutive batches that are assembled together are views of one block; what each holds does not depend on which
are assembled together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trajstore.feed.cuda import Arrival, DeviceCopier
from trajstore.feed.gather import REWARDS, Gatherer
from trajstore.feed.layout import Block, Target, Value
from trajstore.feed.normalize import Normalization, Normalizer
from trajstore.feed.windows import Windows
from trajstore.read.buffer_pool import Buffer, BufferPool
from trajstore.sample.window import NStep, WindowSpec
from trajstore.stored import Array

Batch = dict[str, Any]


@dataclass(eq=False)
class Lot:
    """Batches that were assembled together.

    Attributes:
        batches: In their order.
        arrival: What the consumer has to wait for before it uses one of them; None in main memory.
    """

    batches: list[Batch]
    arrival: Arrival | None = None


class Assembler:
    """Makes batches.

    Args:
        spec: What a window holds.
        gatherers: One for each view of a mix; their values agree.
        extra: Further values, given with the windows.
        device: Where batches go; None for where rows are gathered.
        buffers: Output buffers; by default of its own.
        keep_buffers: Free ones kept, of its own.
        normalization: Of stored columns.
    """

    def __init__(
        self,
        spec: WindowSpec,
        gatherers: Sequence[Gatherer],
        *,
        extra: Sequence[Value] = (),
        device: torch.device | None = None,
        buffers: BufferPool | None = None,
        keep_buffers: int = 2,
        normalization: Normalization | None = None,
    ) -> None:
        self._spec = spec
        self.gatherers = list(gatherers)
        self._resident = gatherers[0].device  # where the cache has its arenas
        stored, computed = gatherers[0].stored_values, (*gatherers[0].computed_values, *extra)
        # On a device, rows are gathered into its own memory, and only what is computed here is copied to it.
        self._device_values = stored if self._resident.type != "cpu" else ()
        self._host_values = computed if self._resident.type != "cpu" else (*stored, *computed)
        self._device = device or self._resident
        self._to_cuda = self._device.type == "cuda"
        cuda = next((d for d in (self._device, self._resident) if d.type == "cuda"), None)
        self._copier = None if cuda is None else DeviceCopier(cuda)
        self._normalize = None if normalization is None else Normalizer(normalization, spec, self._device)
        self._blocks: dict[int, tuple[Block, Block]] = {}
        self.buffers = buffers or BufferPool(keep_buffers, pinned=self._to_cuda)

    @property
    def window_bytes(self) -> int:
        """Bytes of one window of a batch."""
        return sum(value.window_bytes for value in (*self._device_values, *self._host_values))

    def assemble(
        self,
        parts: Sequence[Windows],
        sizes: Sequence[int],
        extra: Mapping[str, Array] | None = None,
        *,
        warmed: bool = False,
        on_resident: Callable[[], None] | None = None,
    ) -> Lot:
        """Batches of the given sizes.

        Args:
            parts: For each gatherer, its windows; with several gatherers, those of one batch.
            sizes: Windows of each batch.
            extra: Name -> ``(windows,)`` further values.
            warmed: Whether their pages have been asked for before.
            on_resident: See ``Gatherer.gather``.
        """
        with self._copier.stream() if self._copier is not None else contextlib.nullcontext():
            host, resident = self._blocks_of(sum(sizes))
            buffer = self.buffers.take(host.nbytes)
            target = Target(host, buffer.tensor)
            if resident.values:
                target = Target(resident, torch.empty(resident.nbytes, dtype=torch.uint8, device=self._resident))
            objects: list[dict[str, Any]] = []
            first = 0
            for gatherer, windows in zip(self.gatherers, parts, strict=True):
                if len(windows):
                    computed = Target(host, buffer.tensor)
                    objects.append(
                        gatherer.gather(windows, target, computed, first, warmed=warmed, on_resident=on_resident)
                    )
                first += len(windows)
            for name, values in (extra or {}).items():
                host.array(buffer.data, name).reshape(-1).view(values.dtype)[...] = values
            return self._finish(host, buffer, target if resident.values else None, _joined(objects), sizes)

    def _blocks_of(self, windows: int) -> tuple[Block, Block]:
        found = self._blocks.get(windows)
        if found is None:
            found = Block(self._host_values, windows), Block(self._device_values, windows)
            self._blocks[windows] = found
        return found

    def _finish(
        self, host: Block, buffer: Buffer, resident: Target | None, objects: Mapping[str, Any], sizes: Sequence[int]
    ) -> Lot:
        copier = self._copier if self._to_cuda else None
        data = buffer.tensor.to(self._device) if copier is None else copier.copy(buffer)
        tensors = host.tensors(data)
        memory = [data]
        if resident is not None:
            moved = resident.data.to(self._device)
            tensors = {**resident.block.tensors(moved), **tensors}
            memory.append(moved)
        objects = {name: _moved(value, self._device, memory) for name, value in objects.items()}
        if self._normalize is not None:
            memory += self._normalize(tensors)
        if self._spec.n_step is not None:
            tensors["reward"] = discounted_sum(tensors["reward"], tensors.pop(REWARDS), self._spec.n_step)
            memory.append(tensors["reward"])
        arrival = None if copier is None else copier.arrival(memory)
        if len(sizes) == 1:
            return Lot([_nested({**tensors, **objects})], arrival)
        columns = [tensor.split(sizes) for tensor in tensors.values()]  # type: ignore[no-untyped-call]
        return Lot([_nested(dict(zip(tensors, row, strict=True))) for row in zip(*columns, strict=True)], arrival)


def discounted_sum(rewards: torch.Tensor, counts: torch.Tensor, returns: NStep) -> torch.Tensor:
    """The first rewards of each row, discounted and added.

    Args:
        rewards: ``[batch, n]``; integers are added as float32.
        counts: ``[batch]`` int64, how many belong to the return.
        returns: Its discount.

    Returns:
        ``[batch]``.

    Examples:
        >>> discounted_sum(torch.ones(2, 3), torch.tensor([3, 1]), NStep(3, 0.5))
        tensor([1.7500, 1.0000])
    """
    values = rewards if rewards.dtype.is_floating_point else rewards.float()
    total = torch.zeros_like(values[:, 0])
    for step in range(returns.steps):
        total = total + torch.where(counts > step, values[:, step] * returns.gamma**step, 0)
    return total


def _moved(value: Any, device: torch.device, memory: list[torch.Tensor]) -> Any:
    """Values and offsets of a ragged column on the device; anything else as it is."""
    if not isinstance(value, tuple) or device.type == "cpu":
        return value
    parts = [part.to(device) if isinstance(part, torch.Tensor) else part for part in value]
    memory += [part for part in parts if isinstance(part, torch.Tensor)]
    return tuple(parts)


def _nested(flat: dict[str, Any]) -> Batch:
    out: Batch = {}
    for path, value in flat.items():
        if "/" not in path:
            out[path] = value
            continue
        *parents, leaf = path.split("/")
        node = out
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = value
    return out


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is no tensor, from all views of a mix."""
    if len(parts) == 1:
        return dict(parts[0])
    joined: dict[str, Any] = {}
    for name in parts[0] if parts else ():
        values = [part[name] for part in parts]
        if not isinstance(values[0], tuple):
            joined[name] = np.concatenate(values)
            continue
        lists, before = [], 0
        for _, offsets in values:
            lists.append(offsets[1:] + before)
            before += int(offsets[-1])
        ends = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), *lists])
        rows = [rows for rows, _ in values]
        joined[name] = (torch.cat(rows) if isinstance(rows[0], torch.Tensor) else np.concatenate(rows), ends)
    return joined
