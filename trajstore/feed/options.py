"""What a loader was asked for, checked.

Invariant: options that exist are consistent in themselves; whether they suit a view is found out when the loader is made.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trajstore.errors import SelectionError
from trajstore.feed.normalize import Normalization
from trajstore.sample.window import Window

ORDERS = ("random", "shuffle", "sequential", "prioritized")
_ENDLESS = ("random", "prioritized")


@dataclass(frozen=True)
class LoaderOptions:
    """The arguments of ``View.loader``, which says what they mean."""

    batch_size: int
    window: Window = None
    dilation: int = 1
    pad: str = "none"
    n_step: int | None = None
    gamma: float = 0.99
    columns: Sequence[str] | None = None
    anchors: Any = None
    order: str = "random"
    weights: Any = None
    block_bytes: int | None = None
    alpha: float = 0.6
    beta: float = 0.4
    seed: int = 0
    epochs: int = 1
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1
    follow: bool = False
    refresh_s: float = 5.0
    device: torch.device | str | None = None
    prefetch: int = 2
    timeout_s: float = 300.0
    cache_bytes: int | None = None
    cache_device: torch.device | str | None = None
    output: str = "dict"
    progress: bool = False
    normalization: Normalization | None = None  # resolved: True and names have become numbers

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "world_size"):
            if operator.index(getattr(self, name)) < 1:
                raise SelectionError(f"{name}={getattr(self, name)}, expected at least 1")
        if self.order not in ORDERS:
            raise SelectionError(f"order={self.order!r}, expected one of {', '.join(map(repr, ORDERS))}")
        if not 0 <= operator.index(self.rank) < self.world_size:
            raise SelectionError(
                f"rank={self.rank} of world_size={self.world_size}, expected 0 to {self.world_size - 1}"
            )
        if self.batch_size % self.world_size:
            raise SelectionError(
                f"batch_size={self.batch_size} is the size over all ranks, so world_size={self.world_size} must divide it"
            )
        if operator.index(self.prefetch) < 0:
            raise SelectionError(f"prefetch={self.prefetch}, expected 0 (no thread) or more batches")
        for name in ("timeout_s", "refresh_s"):
            if not getattr(self, name) > 0:
                raise SelectionError(f"{name}={getattr(self, name)}, expected a positive number of seconds")
        if self.weights is not None and self.order != "random":
            raise SelectionError(f"weights= are for order='random', found order={self.order!r}")
        if self.block_bytes is not None and (self.order != "shuffle" or self.block_bytes < 1):
            raise SelectionError(
                f"block_bytes={self.block_bytes} with order={self.order!r}; it is a positive number for order='shuffle'"
            )
        if self.follow and self.order not in _ENDLESS:
            raise SelectionError(f"follow=True needs an endless order, 'random' or 'prioritized'; found {self.order!r}")
        if self.follow and (self.anchors is not None or self.weights is not None):
            raise SelectionError("follow=True with anchors= or weights=: these are of one fixed view")
        for name in ("device", "cache_device"):
            _check_device(name, getattr(self, name))
        if self.output not in ("dict", "tensordict"):
            raise SelectionError(f"output={self.output!r}, expected 'dict' or 'tensordict'")
        if self.cache_bytes is not None and self.cache_bytes < 1:
            raise SelectionError(f"cache_bytes={self.cache_bytes}, expected a positive number")

    @property
    def endless(self) -> bool:
        """Whether batches never end."""
        return self.order in _ENDLESS

    def order_fingerprint(self) -> list[Any]:
        """What decides which windows a batch holds, besides view and window; not how it is split among ranks."""
        return [
            self.batch_size,
            self.order,
            self.seed,
            self.epochs,
            self.drop_last,
            None if self.block_bytes is None else int(self.block_bytes),
            [self.alpha, self.beta] if self.order == "prioritized" else None,
        ]


def _check_device(name: str, device: torch.device | str | None) -> None:
    if device is None:
        return
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise SelectionError(f"{name}={device!r}: {error}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise SelectionError(
            f"{name}={str(device)!r}: torch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices here; choose "
            f"another, or leave {name}= out"
        )
