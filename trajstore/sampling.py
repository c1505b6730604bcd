"""Sampling from a view: one batch, batches of steps that are named, loaders.

Invariant: what a batch holds depends on the trajectories and the arguments, never on what the cache holds.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from trajstore.errors import SelectionError
from trajstore.follows import Follows
from trajstore.format.statistics import Statistics
from trajstore.read.access import StoreAccess
from trajstore.read.columns import read_column
from trajstore.read.selection import Selection
from trajstore.read.statistics import QUANTILES, view_statistics
from trajstore.sample.window import Window
from trajstore.stored import Array

if TYPE_CHECKING:  # what makes batches is imported with the first of them, and torch with it
    import torch

    from trajstore.feed.loader import Loader
    from trajstore.feed.normalize import Normalize
    from trajstore.feed.options import LoaderOptions
    from trajstore.feed.pick import Picker
    from trajstore.feed.pipeline import Samples, Supply


class Sampled:
    """Trajectories that batches are drawn from: the sampling half of a ``View``.

    Args:
        selection: The trajectories.
        access: The reading half of the store's handle.
        follows: How to choose them again from a later version; None if that makes no sense.
    """

    def __init__(self, selection: Selection, access: StoreAccess, follows: Follows | None) -> None:
        self._selection = selection
        self._access = access
        self._follows = follows
        self._samples: dict[Any, Samples] = {}  # of sample(), by its arguments
        self._pickers: dict[Any, Picker] = {}  # of gather(), by its arguments

    def read(self, column: str, out: Array | None = None) -> Any:
        """One column of all trajectories, end to end; neighbours in a segment are read in one go.

        Args:
            column: Name.
            out: Filled and returned instead of a new array: ``(rows, *shape)``, C-contiguous, of the stored dtype.

        Returns:
            ``(rows, *shape)``; rows are steps, and one more per trajectory for a column with ``extra=1``.
        """
        return read_column(self._selection, self._access.readers, column, out)

    def statistics(
        self,
        columns: Sequence[str] | None = None,
        quantiles: Sequence[float] = QUANTILES,
        progress: bool | None = None,
    ) -> Statistics:
        """Mean, standard deviation, extremes and quantiles of columns, and of the trajectories' lengths and returns.

        Each value of a step has its own, if a step has at most 1024; of larger shapes each channel has (the last dimension
        if it is at most 4, else the first if that is), or all values together. NaN and infinite values are counted apart
        and enter nothing else; bools are 0 and 1; columns with ``extra=1`` include the final observations. The columns are
        read once, one after the other, in bounded memory, past the page cache.

        Moments are float64, combined as in Chan et al. (1983); of columns of at most 16 bits all is exact, quantiles
        included. Other quantiles come from all values if there are at most 65,536, or else from so many that are drawn
        without replacement (fewer of large steps, at most 64 MiB), the same ones each time: see ``ColumnStatistics.sampled``
        for their error.

        Of a view of a whole version the result is kept by the handle, and if that may write, in the store
        (``statistics/<version>.json``); columns or quantiles that are asked for later are added to it.

        Args:
            columns: Names, nested ones by their parent too; by default all bools, integers and floating-point numbers of
                fixed shape that every trajectory has.
            quantiles: Fractions from 0 to 1.
            progress: Show a progress bar on standard error; by default in a terminal, if there is much to read.

        Returns:
            A mapping from columns; ``to_pandas`` shows it.

        Raises:
            SelectionError: A column that holds no numbers or that some trajectories lack; a view of no trajectories.
            UnknownColumnError: A name that nothing has.

        Examples:
            >>> import numpy as np, trajstore
            >>> with trajstore.open("memory://docs/measure", mode="a") as store:
            ...     action, reward = np.array([[0.0, 1.0], [4.0, 1.0]], np.float32), np.array([1.0, 2.0])
            ...     _ = store.append({"action": action, "reward": reward})
            ...     store.flush()
            ...     stats = store.trajectories.statistics(["action"], quantiles=[0.5])
            >>> stats["action"].std, stats["action"].quantile(0.5), stats.reward_sum.mean.item()
            (array([2., 0.]), array([2., 1.]), 3.0)
        """
        self._access.check_open()
        return view_statistics(
            self._selection,
            self._access.readers,
            self._access.statistics,
            columns=columns,
            quantiles=quantiles,
            progress=progress,
        )

    def gather(
        self,
        trajectories: Sequence[int] | Array,
        steps: Sequence[int] | Array,
        *,
        columns: Sequence[str] | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Any]:
        """One batch of the steps that are named, in that order; for whoever draws them in a way of their own.

        Args:
            trajectories: ``(n,)`` positions in the view.
            steps: ``(n,)`` steps of these trajectories.
            columns: Names, as for ``loader``.
            device: Where the tensors go; by default main memory.

        Returns:
            Nested mapping of tensors ``[n, ...]``.

        Raises:
            IndexRangeError: A trajectory that is not in the view, or a step that it does not have.
        """
        self._access.check_open()
        key = (None if columns is None else tuple(columns), None if device is None else str(device))
        picker = self._pickers.get(key)
        if picker is None:
            from trajstore.feed.options import LoaderOptions
            from trajstore.feed.pick import Picker

            supply = self.supply(LoaderOptions(1, columns=columns, device=device))
            picker = Picker(supply, columns, device=device, buffers=self._access.buffers)
            self._pickers[key] = picker
        return picker.pick(np.asarray(trajectories), np.asarray(steps))

    def sample(
        self,
        n: int,
        *,
        seed: int | None = None,
        window: Window = None,
        dilation: int = 1,
        pad: str = "none",
        n_step: int | None = None,
        gamma: float = 0.99,
        columns: Sequence[str] | None = None,
        anchors: str | Array | None = None,
        weights: str | Sequence[float] | Array | None = None,
    ) -> dict[str, Any]:
        """One random batch, in the calling thread; single steps unless ``window`` says otherwise.

        Args:
            n: Windows.
            seed: Same seed, same windows; by default different each time.
            window: As for ``loader``, like the rest.
            dilation: Steps between the rows of an integer window.
            pad: What rows outside the trajectory are.
            n_step: Rewards in a return.
            gamma: Discount.
            columns: Names.
            anchors: Where windows may begin.
            weights: Of trajectories.

        Returns:
            Nested mapping of tensors ``[n, ...]``.
        """
        self._access.check_open()
        key = None
        if seed is None and isinstance(anchors, str | None) and isinstance(weights, str | None):
            names = None if columns is None else tuple(columns)
            key = (n, repr(window), dilation, pad, n_step, gamma, names, anchors, weights)
            if key in self._samples:
                return self._samples[key].next()
        from trajstore.feed.options import LoaderOptions
        from trajstore.feed.pipeline import PipelineBuilder, Samples

        options = LoaderOptions(
            n,
            window=window,
            dilation=dilation,
            pad=pad,
            n_step=n_step,
            gamma=gamma,
            columns=columns,
            anchors=anchors,
            weights=weights,
            seed=_fresh_seed() if seed is None else operator.index(seed),
            prefetch=0,
        )
        pipeline = PipelineBuilder((self,), (n,), options)()
        if key is not None:
            self._samples[key] = Samples(pipeline)
            return self._samples[key].next()
        try:
            return pipeline.make(0, 1).batches[0]
        finally:
            pipeline.close()

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
        anchors: str | Array | None = None,
        order: str = "random",
        weights: str | Sequence[float] | Array | None = None,
        block_bytes: int | None = None,
        alpha: float = 0.6,
        beta: float = 0.4,
        seed: int = 0,
        epochs: int = 1,
        drop_last: bool = False,
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
        normalize: Normalize = None,
        progress: bool = False,
    ) -> Loader:
        """Batches of windows, from the page cache, made ahead by a thread.

        A window never crosses a trajectory. Its anchor is one of the trajectory's steps; offsets are relative to it.
        Rows of a column are the steps, and one more for columns with ``extra=1``: the observation after the last
        action.

        Args:
            batch_size: Windows per batch, over all ranks.
            window: None for single steps, without a time dimension. A number of steps ``W``: every column at offsets
                ``0 .. W - 1``, ``[batch, W, ...]``. A mapping from columns to offsets of their own: ``{"obs": [-1, 0],
                "action": range(16), "reward": 0}``, where one number means no time dimension, a parent's name all
                columns under it, and ``trajstore.future(...)`` a row drawn from the rest of the trajectory.
            dilation: Steps between the rows of an integer window.
            pad: ``"none"``: only anchors whose rows all exist. ``"edge"``, ``"zero"``: every step is an anchor, rows
                outside repeat the nearest one or are zeros, and ``is_pad`` says which.
            n_step: ``reward`` becomes the discounted sum of up to so many rewards, ``next_obs`` the observation behind
                them, ``discount`` what its value counts: ``gamma ** k``, and 0 after a terminal step. Cut at the end of
                the trajectory; where a truncated one has no final observation, those anchors are left out.
            gamma: Discount per step.
            columns: Names, nested ones by their parent too; ``next_<column>`` is a column one step on; metadata fields
                and the virtual columns ``terminated``, ``truncated``, ``is_first``, ``is_last``, ``step`` and
                ``trajectory`` (position in the view) when named. By default all columns of fixed shape that every
                trajectory has.
            anchors: Only these: the name of a column of one bool per step, or ``(steps,)`` bools.
            order: ``"random"``: uniform with replacement, endless. ``"shuffle"``: every anchor once per epoch.
                ``"sequential"``: in order. ``"prioritized"``: in proportion to priorities, endless (Schaul et al.,
                "Prioritized Experience Replay", ICLR 2016); batches have ``index`` and ``weight``; see
                ``Loader.update_priorities``.
            weights: For ``"random"``: a number per trajectory, or the name of a field; a trajectory is drawn in
                proportion to it, then an anchor of it uniformly. ``weights="length"`` draws steps about uniformly.
            block_bytes: For ``"shuffle"``: shuffle blocks of neighbouring rows of about this many bytes, and then the
                anchors of 16 blocks together, so that pages are read about once per epoch as long as the cache holds
                these. Of use when the view exceeds the cache; by default anchors of the whole view are shuffled.
            alpha: Exponent of priorities.
            beta: Exponent of importance weights.
            seed: Same view, arguments and seed: same batches.
            epochs: Per pass, for ``"shuffle"`` and ``"sequential"``.
            drop_last: Leave out the short last batch of an epoch.
            rank: Of this process, which receives ``batch_size / world_size`` windows of every batch.
            world_size: Processes that share the batches.
            follow: Also sample what is appended from now on: through this handle at once, by others every
                ``refresh_s``.
            refresh_s: Seconds.
            device: Where the tensors go; by default main memory, or where ``cache_device`` is. Strings stay where they are.
            prefetch: Batches made ahead; 0 to make them in the calling thread.
            timeout_s: Longest wait for a batch.
            cache_bytes: A page cache of this loader's own, instead of the store's.
            cache_device: A page cache on this device, of ``cache_bytes`` or as large as the store's.
            output: ``"dict"``, or ``"tensordict"``: a ``TensorDict`` of batch size ``[batch_size]`` in which strings and
                ragged columns are ``NonTensorStack``; needs ``pip install 'trajstore[tensordict]'``.
            normalize: True: every floating-point column, also rewards, as ``(x - mean) / max(std, 1e-8)`` in float32, by the
                statistics of this view, which are measured first if they are not known (see ``statistics``). A mapping
                from columns to ``"mean_std"``, ``"min_max"`` (to -1 .. 1) or a pair of arrays ``(mean, std)``, integers
                too; or the ``normalization`` of another loader. It is done where the batch goes; whatever shows such a
                column is normalized alike: ``next_obs`` as ``obs``, padding as the rest, rewards before they are summed
                for ``n_step``. ``Loader.normalization`` says with what. A loader that follows keeps the numbers that it
                began with.
            progress: Show a progress bar on standard error; of several ranks, the first shows it.

        Returns:
            An iterator over nested mappings of tensors ``[batch_size, ...]``; a context manager.

        Raises:
            SelectionError: Arguments that make no sense together, or no anchor that fits.
            UnknownColumnError: A name that nothing has.
            CacheTooSmallError: The cache cannot hold one window; says how much it takes.
        """
        from trajstore.feed.agreement import agreed_windows
        from trajstore.feed.loader import Loader
        from trajstore.feed.normalize import resolve_normalization
        from trajstore.feed.options import LoaderOptions
        from trajstore.feed.pipeline import PipelineBuilder

        options = LoaderOptions(
            batch_size,
            window=window,
            dilation=dilation,
            pad=pad,
            n_step=n_step,
            gamma=gamma,
            columns=columns,
            anchors=anchors,
            order=order,
            weights=weights,
            block_bytes=block_bytes,
            alpha=alpha,
            beta=beta,
            seed=operator.index(seed),
            epochs=epochs,
            drop_last=drop_last,
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
        if normalize is not None and normalize is not False:
            spec = agreed_windows([self._selection], options)[0]

            def measure(names: Sequence[str]) -> Statistics:
                return self.statistics(names, quantiles=())

            options = replace(options, normalization=resolve_normalization(normalize, self._selection, spec, measure))
        return self._access.opened(Loader(PipelineBuilder((self,), (batch_size,), options), options))

    def supply(self, options: LoaderOptions) -> Supply:
        """What the windows of this view are gathered with; for loaders."""
        from trajstore.feed.pipeline import Supply

        self._access.check_open()
        private = options.cache_bytes is not None or options.cache_device is not None
        cache = self._access.cache_for(self._selection.schema)
        selection = self._selection
        if private:
            cache = self._access.private_cache(options.cache_bytes, options.cache_device)
            selection = selection.committed()
            waiting = len(self._selection) - len(selection)
            if waiting and not options.follow:
                raise SelectionError(
                    f"{waiting} of {len(self._selection)} trajectories are not yet committed, and only the store's own "
                    "cache has them: flush() and take the view again, or leave out cache_bytes= and cache_device="
                )
        follows = self._follows

        def latest(refresh: bool) -> Selection:
            assert follows is not None
            found = follows.view(refresh)._selection
            return found.committed() if private else found

        return Supply(
            selection,
            cache,
            self._access.readers,
            self.read,
            latest if follows is not None else None,
        )

    def closes(self, loader: Loader) -> Loader:
        """Have a loader closed with the store's handle; for mixes."""
        return self._access.opened(loader)


def _fresh_seed() -> int:
    return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
