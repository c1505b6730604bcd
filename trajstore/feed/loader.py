"""The loader: batches of windows of a fixed view, in an order that depends on nothing but its arguments."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trajstore.errors import ClosedError, SelectionError
from trajstore.sample.gather import gather, resolve_columns
from trajstore.sample.order import check_order, random_anchors, sequential_anchors
from trajstore.sample.window import AnchorIndex
from trajstore.schema import nest

if TYPE_CHECKING:
    from trajstore.view import View


class Loader:
    """An iterable of batches; see ``View.loader`` for the arguments.

    Each ``iter(loader)`` begins anew.
    """

    def __init__(
        self,
        view: View,
        *,
        batch_size: int,
        window: int | None,
        order: str,
        seed: int,
        columns: Sequence[str] | None,
        epochs: int,
        drop_last: bool,
        device: torch.device | str | None,
    ) -> None:
        check_order(order)
        self._batch_size = operator.index(batch_size)
        self._epochs = operator.index(epochs)
        if self._batch_size < 1 or self._epochs < 1:
            raise SelectionError(f"batch_size={batch_size} and epochs={epochs}, expected at least 1 each")
        self._view = view
        self._anchors = AnchorIndex(view.lengths, 1 if window is None else operator.index(window))
        self._single_steps = window is None
        self._order = order
        self._seed = operator.index(seed)
        self._columns, self._virtual = resolve_columns(view, columns)
        if not self._columns and not self._virtual:
            raise SelectionError("no column to load: all are strings or ragged; name them in columns=")
        self._drop_last = drop_last
        self._device = None if device is None else torch.device(device)
        self._closed = False

    def __len__(self) -> int:
        """Batches until the end; a ``random`` loader has none.

        Raises:
            TypeError: The order is endless.
        """
        if self._order == "random":
            raise TypeError("a loader with order='random' is endless; take as many batches as you need")
        return self._epochs * self._batches_per_epoch()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batch = 0
        while self._order == "random" or batch < len(self):
            if self._closed:
                raise ClosedError("the loader is closed; make another one with view.loader(...)")
            yield self._load(batch)
            batch += 1

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """No more batches. May be called twice."""
        self._closed = True

    def _batches_per_epoch(self) -> int:
        whole, rest = divmod(len(self._anchors), self._batch_size)
        return whole + (1 if rest and not self._drop_last else 0)

    def _load(self, batch: int) -> dict[str, Any]:
        count, size = len(self._anchors), self._batch_size
        if self._order == "random":
            anchors = random_anchors(count, seed=self._seed, batch=batch, size=size)
        else:
            anchors = sequential_anchors(count, batch=batch % self._batches_per_epoch(), size=size)
        trajectories, steps = self._anchors.locate(anchors)
        flat = gather(self._view, self._columns, self._virtual, trajectories, steps, self._anchors.window)
        return nest({path: self._finished(value) for path, value in flat.items()})

    def _finished(self, value: Any) -> Any:
        if isinstance(value, tuple):  # ragged: values and offsets
            return tuple(v.to(self._device) if isinstance(v, torch.Tensor) else v for v in value)
        if self._single_steps:
            value = value[:, 0]
        return value.to(self._device) if isinstance(value, torch.Tensor) else value
