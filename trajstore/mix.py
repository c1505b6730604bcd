"""Mixtures: batches that take a fixed share of their windows from each of several views.

Invariant: every batch has the same number of windows of each view, the first view's first. What is drawn of one view
depends on that view, its size and the seed alone, so another's trajectories change nothing in it.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from trajstore.errors import SelectionError
from trajstore.sample.window import Window
from trajstore.view import View

if TYPE_CHECKING:  # what makes batches is imported with the first of them, and torch with it
    import torch

    from trajstore.feed.loader import Loader


def mix(shares: Mapping[View, float]) -> Mix:
    """Views to be sampled together, in fixed shares of every batch.

    Half of each batch from demonstrations and half from what the agent has recorded is the symmetric sampling of RLPD
    (Ball et al., "Efficient Online Reinforcement Learning with Offline Data", ICML 2023, section 4.1).

    Args:
        shares: View -> its share, a positive number; they are divided by their sum. The views may be of different
            stores.

    Raises:
        SelectionError: Fewer than two views, or a share that is not positive.

    Examples:
        >>> import numpy as np, trajstore
        >>> with trajstore.open("memory://docs/mix", mode="a") as store:
        ...     for n in range(20):
        ...         _ = store.append({"action": np.full(5, n)}, expert=n < 4)
        ...     store.flush()
        ...     view = store.trajectories
        ...     mixture = trajstore.mix({view.filter("expert"): 0.25, view.filter("not expert"): 0.75})
        ...     with mixture.loader(8, columns=["action", "source"]) as loader:
        ...         batch = next(iter(loader))
        >>> batch["source"].tolist(), batch["action"].lt(4).tolist().count(True)
        ([0, 0, 1, 1, 1, 1, 1, 1], 2)
    """
    return Mix(tuple(shares), tuple(shares.values()))


class Mix:
    """Several views and their shares; made by ``trajstore.mix``.

    Args:
        views: Two or more.
        shares: Of each view, positive.
    """

    def __init__(self, views: Sequence[View], shares: Sequence[float]) -> None:
        found = [type(view).__name__ for view in views if not isinstance(view, View)]
        if found or len(views) < 2:
            described = found[0] if found else f"{len(views)} view{'s' * (len(views) != 1)}"
            raise SelectionError(
                f"a mix of {described}, expected two views or more: trajstore.mix({{view_a: 0.5, view_b: 0.5}})"
            )
        for number, share in enumerate(shares):
            if not _is_positive(share):
                raise SelectionError(f"the share of view {number} of the mix is {share!r}, expected a positive number")
        self.views = tuple(views)
        total = math.fsum(shares)
        self.shares = tuple(float(share) / total for share in shares)  # they add up to 1
        self._samplers: dict[Any, Loader] = {}  # of sample(), by its arguments
        self._sampling = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the stores again: only index arrays travel."""
        return Mix, (self.views, self.shares)

    def __repr__(self) -> str:
        parts = ", ".join(f"{view!r}: {share:.3g}" for view, share in zip(self.views, self.shares, strict=True))
        return f"Mix({{{parts}}})"

    def sizes(self, batch_size: int) -> tuple[int, ...]:
        """Windows of each view in a batch: by largest remainder, and at least one of every view.

        Raises:
            SelectionError: ``batch_size`` is below the number of views.
        """
        return _apportioned(operator.index(batch_size), self.shares)

    def sample(
        self,
        n: int,
        *,
        seed: int | None = None,
        window: Window = None,
        columns: Sequence[str] | None = None,
        pad: str = "none",
        n_step: int | None = None,
        gamma: float = 0.99,
    ) -> dict[str, Any]:
        """One batch, made in the calling thread; for many, use ``loader``.

        Args:
            n: Windows, of all views together.
            seed: Same seed, same windows; by default different each time.
            window: As for ``loader``, like the rest.
            columns: Names.
            pad: What rows outside the trajectory are.
            n_step: Rewards in a return.
            gamma: Discount.

        Returns:
            Nested mapping of tensors ``[n, ...]``.
        """
        with self._sampling:
            key = (n, seed, repr(window), None if columns is None else tuple(columns), pad, n_step, gamma)
            loader = self._samplers.get(key)
            if loader is None:
                chosen = _fresh_seed() if seed is None else seed
                loader = self.loader(
                    n,
                    window=window,
                    columns=columns,
                    pad=pad,
                    n_step=n_step,
                    gamma=gamma,
                    seed=chosen,
                    prefetch=0,
                )
            if seed is not None:
                with loader:
                    return next(loader)
            self._samplers[key] = loader
            return next(loader)

    def loader(
        self,
        batch_size: int,
        *,
        window: Window = None,
        dilation: int = 1,
        pad: str = "none",
        n_step: int | None = None,
        gamma: float = 0.99,
        columns: Sequence[str] | None = None,
        anchors: str | None = None,
        order: str = "random",
        weights: str | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        follow: bool = False,
        refresh_s: float = 5.0,
        device: torch.device | str | None = None,
        prefetch: int = 2,
        timeout_s: float = 300.0,
        cache_bytes: int | None = None,
        cache_device: torch.device | str | None = None,
        output: str = "dict",
        progress: bool = False,
    ) -> Loader:
        """Batches of windows of all views; arguments that are not named here are those of ``View.loader``.

        Rows ``[0, sizes[0])`` of a batch are the first view's, and so on; ``sizes`` is ``self.sizes(batch_size)``.

        Args:
            batch_size: Windows per batch, over all views and ranks.
            window: See ``View.loader``.
            dilation: See ``View.loader``.
            pad: See ``View.loader``.
            n_step: See ``View.loader``.
            gamma: See ``View.loader``.
            columns: Also ``source``, int64: the position of the window's view in the mix. ``trajectory`` counts within
                it. By default the columns that are common to all views with the same dtype and shape.
            anchors: The name of a column of one bool per step.
            order: ``"random"``.
            weights: The name of a field.
            seed: See ``View.loader``.
            rank: Of this process, which receives its part of each view's windows, in the order of the views.
            world_size: Divides the size of every view.
            follow: See ``View.loader``.
            refresh_s: See ``View.loader``.
            device: See ``View.loader``.
            prefetch: See ``View.loader``.
            timeout_s: See ``View.loader``.
            cache_bytes: A page cache of this size for each view, instead of those of the stores.
            cache_device: See ``View.loader``.
            output: See ``View.loader``.
            progress: See ``View.loader``.

        Raises:
            SelectionError: As ``View.loader``; columns that differ between views; a batch that cannot be divided.
        """
        from trajstore.feed.loader import Loader
        from trajstore.feed.options import LoaderOptions
        from trajstore.feed.pipeline import PipelineBuilder

        if order != "random":
            raise SelectionError(
                f"order={order!r} in a mix, expected 'random': views of different lengths end at different times, and "
                "priorities are of one view; use one loader for each view instead"
            )
        for name, given in (("anchors", anchors), ("weights", weights)):
            if given is not None and not isinstance(given, str):
                raise SelectionError(
                    f"{name}= is an array, which belongs to one view; in a mix, name a column or field"
                )
        options = LoaderOptions(
            batch_size,
            window=window,
            dilation=dilation,
            pad=pad,
            n_step=n_step,
            gamma=gamma,
            columns=columns,
            anchors=anchors,
            weights=weights,
            seed=operator.index(seed),
            rank=rank,
            world_size=world_size,
            follow=follow,
            refresh_s=refresh_s,
            device=device,
            prefetch=prefetch,
            timeout_s=timeout_s,
            cache_bytes=cache_bytes,
            cache_device=cache_device,
            output=output,
            progress=progress,
        )
        sizes = self.sizes(batch_size)
        if any(size % world_size for size in sizes):
            raise SelectionError(
                f"world_size={world_size} must divide the windows of every view; of batch_size={batch_size} these are "
                f"{', '.join(map(str, sizes))}: choose a batch size or shares that give multiples of {world_size}"
            )
        loader = Loader(PipelineBuilder(self.views, sizes, options), options)
        for view in self.views:
            view.closes(loader)
        return loader


def _fresh_seed() -> int:
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])


def _is_positive(share: Any) -> bool:
    try:
        return bool(math.isfinite(share) and share > 0)
    except TypeError:
        return False


def _apportioned(total: int, shares: Sequence[float]) -> tuple[int, ...]:
    """``total`` divided by largest remainder, the earlier first among equals, with at least one for each share.

    >>> _apportioned(10, [0.5, 0.25, 0.25])
    (5, 3, 2)
    >>> _apportioned(10, [0.98, 0.01, 0.01])
    (8, 1, 1)
    """
    if total < len(shares):
        raise SelectionError(
            f"batch_size={total} for a mix of {len(shares)} views, expected at least one window of each"
        )
    sizes = [0] * len(shares)
    left = set(range(len(shares)))
    # Exact fractions: equal shares must have equal remainders.
    exact = [Fraction(share) for share in shares]
    while True:
        rest = total - sum(sizes)
        whole = sum(exact[i] for i in left)
        below_one = {i for i in left if exact[i] * rest < whole}
        if not below_one:
            break
        for i in below_one:
            sizes[i] = 1
        left -= below_one
    quotas = {i: exact[i] * rest / whole for i in left}
    for i, quota in quotas.items():
        sizes[i] = math.floor(quota)
    by_remainder = sorted(left, key=lambda i: (sizes[i] - quotas[i], i))
    for i in by_remainder[: total - sum(sizes)]:
        sizes[i] += 1
    return tuple(sizes)
