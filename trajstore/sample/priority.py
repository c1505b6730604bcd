"""Proportional prioritized experience replay: which anchors are drawn, how often, and what each one weighs.

Invariant: what is drawn is a pure function of the priorities and of (seed, rank, batch number, size). The mass of an anchor
that may be drawn is above zero, also where a power underflows; a mass of zero means that its trajectory was retired.

Source: Schaul, Quan, Antonoglou, Silver, "Prioritized Experience Replay", ICLR 2016 (arXiv:1511.05952), sections 3.3 and 3.4
and appendix B.2.1. Weights are divided by the largest weight that any anchor would have, as in OpenAI Baselines, TorchRL and
cpprb.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from trajstore.errors import IndexRangeError, SelectionError
from trajstore.sample.sum_tree import MAX_MASS, SumTree
from trajstore.stored import Array

_STATE = ("masses", "runs", "starts", "additions", "beta", "max_priority", "ignored_updates")
_MIN_MASS = float(np.finfo(np.float64).tiny)

# Numbers as a caller has them: a tensor on any device, an array, or a list.
Values: TypeAlias = "torch.Tensor | Array | Sequence[Any]"


class PrioritySampler:
    """Draws anchors with probability proportional to ``(priority + eps) ** alpha``, with importance weights.

    Anchors are numbered over all trajectories, in the order in which these were added: ``counts[i]`` anchors of trajectory
    ``i``. With ``world_size > 1`` each rank holds the priorities of its own slice of the anchors given at construction and
    of those of each `extend`: of the ``n`` anchors of addition ``k``, slice ``s = (rank + k) % world_size``, which is
    ``[n * s // world_size, n * (s + 1) // world_size)``. The slices of an addition differ by one anchor at most, and they go
    round. A rank draws its rows of a batch from its own anchors only. So the rows of rank r follow P(i) = mass_i / (mass of
    rank r): within a rank exactly the paper's distribution; over all ranks an anchor of rank r comes with probability
    P(i) / world_size, which is the paper's only as far as the ranks hold equal mass. Weights are computed with this true
    P(i), ``(N * P(i)) ** -beta`` for the N anchors of the rank that are not retired, and divided by the largest such weight
    of the rank: N and the rank's mass cancel, which leaves ``(smallest mass / mass_i) ** beta``.

    A new anchor has the largest priority that `update` was ever given on this rank, 1.0 at first. All methods may be called
    from several threads.

    Args:
        counts: ``(n,)`` number of anchors of each trajectory; 0 is allowed.
        alpha: how strongly priorities count; 0 is uniform.
        beta: how far weights make up for it; 1 fully. It may be set later, to anneal it.
        seed: of the random numbers.
        rank: which of the slices this sampler holds.
        world_size: how many slices there are.
        eps: added to each priority, so that none is zero.

    Raises:
        SelectionError: an argument out of range.

    Examples:
        >>> sampler = PrioritySampler([3, 2], alpha=1.0, beta=1.0, seed=0)
        >>> sampler.update([0, 1, 2, 3, 4], [1.0, 1.0, 1.0, 1.0, 4.0])
        >>> anchors, weights = sampler.draw(0, 8)
        >>> anchors
        array([0, 1, 2, 3, 4, 4, 4, 4])
        >>> [round(float(weight), 3) for weight in weights]
        [1.0, 1.0, 1.0, 1.0, 0.25, 0.25, 0.25, 0.25]
        >>> sampler.retire([1])
        >>> set(sampler.draw(1, 100)[0].tolist())
        {0, 1, 2}
    """

    def __init__(
        self,
        counts: Values,
        *,
        alpha: float,
        beta: float,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        eps: float = 1e-6,
    ) -> None:
        for name, value, positive in (("alpha", alpha, False), ("beta", beta, False), ("eps", eps, True)):
            _check_exponent(name, value, positive=positive)
        if not (world_size >= 1 and 0 <= rank < world_size):
            raise SelectionError(f"rank={rank} of world_size={world_size}, expected 0 <= rank < world_size")
        self._alpha, self._beta, self._eps = float(alpha), float(beta), float(eps)
        self._rank, self._world_size = rank, world_size
        self._lock = threading.Lock()
        self._bits = np.random.Philox(key=seed % 2**64 | rank << 64)
        self._start: Any = self._bits.state
        self._random = np.random.Generator(self._bits)
        self._tree = SumTree()
        self._starts = np.zeros(
            16, np.int64
        )  # (>= num_trajectories + 1,) first anchor of each trajectory, then their number
        self._trajectories = 0
        self._additions = 0
        # Runs of anchors that this rank holds, (m, 2): first anchor, and how many anchors it holds before it.
        self._runs = np.zeros((0, 2), np.int64)
        self._max_priority = 1.0
        self._ignored = 0
        self.extend(counts)

    @property
    def beta(self) -> float:
        """How far weights make up for the priorities; set it to anneal it."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        _check_exponent("beta", value, positive=False)
        self._beta = float(value)

    @property
    def num_anchors(self) -> int:
        """Anchors of all ranks, the retired ones too."""
        return int(self._starts[self._trajectories])

    @property
    def max_priority(self) -> float:
        """The largest priority given so far, which new anchors have."""
        return self._max_priority

    @property
    def ignored_updates(self) -> int:
        """How many priorities were given for anchors that had been retired."""
        return self._ignored

    def extend(self, counts: Values) -> None:
        """Add trajectories: ``counts`` ``(n,)``, their numbers of anchors. The anchors have the largest priority so far.

        Raises:
            SelectionError: counts that are not integers, or negative.
        """
        added = _integers("counts", counts)
        if added.size and added.min() < 0:
            raise SelectionError(f"counts has {added.min()}, expected numbers of anchors, 0 or more")
        with self._lock:
            first = self.num_anchors
            end = self._trajectories + len(added)
            if end >= len(self._starts):
                self._starts = np.concatenate([self._starts, np.zeros(end + 1, np.int64)])
            self._starts[self._trajectories + 1 : end + 1] = first + np.cumsum(added)
            self._trajectories = end
            anchors = self.num_anchors - first
            part = (self._rank + self._additions) % self._world_size
            low, high = (anchors * edge // self._world_size for edge in (part, part + 1))
            self._additions += 1
            if high == low:
                return
            held = len(self._tree)
            if not len(self._runs) or first + low != self._runs[-1, 0] + held - self._runs[-1, 1]:
                self._runs = np.concatenate([self._runs, np.array([[first + low, held]], np.int64)])
            self._tree.append(np.full(high - low, self._masses(np.array([self._max_priority]))[0]))

    def retire(self, trajectories: Values) -> None:
        """Give the anchors of trajectories (numbers in the order in which they were added) no mass; again is allowed.

        Raises:
            IndexRangeError: a trajectory that was never added; none was retired.
        """
        which = _integers("trajectories", trajectories)
        with self._lock:
            if which.size and (which.min() < 0 or which.max() >= self._trajectories):
                raise IndexRangeError(
                    f"trajectories {which.min()} to {which.max()}, expected 0 to {self._trajectories - 1}: extend() first"
                )
            low, high = self._held_before(self._starts[which]), self._held_before(self._starts[which + 1])
            lengths = high - low
            within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            self._tree.set(np.repeat(low, lengths) + within, np.zeros(len(within)))

    def draw(self, batch: int, size: int) -> tuple[Array, Array]:
        """``size`` anchors for this rank's rows of batch ``batch``, one from each of ``size`` equal parts of its mass.

        Returns:
            ``(size,)`` int64 anchors, ascending, and ``(size,)`` float32 importance weights in (0, 1]. They depend on
            nothing but the priorities, ``seed``, ``rank``, ``batch`` and ``size``.

        Raises:
            SelectionError: no anchor is left on this rank, or ``size`` is below 1.
        """
        if size < 1 or batch < 0:
            raise SelectionError(f"batch={batch}, size={size}, expected batch >= 0 and size >= 1")
        with self._lock:
            # Philox(key=seed | rank << 64, counter=[0, 0, 0, batch]); a new one would take as long as drawing does.
            self._start["state"]["counter"][3] = batch
            self._bits.state = self._start
            uniforms = self._random.random(size)
            smallest = self._tree.smallest
            if smallest == math.inf:
                raise SelectionError(
                    f"rank {self._rank} of {self._world_size} has no anchor to draw: {len(self._tree)} given, all retired; "
                    "extend() with trajectories first"
                )
            held = self._tree.sample(uniforms)
            masses = self._tree.leaves[held]
            if len(self._runs) == 1:
                anchors = held + self._runs[0, 0]
            else:
                run = np.searchsorted(self._runs[:, 1], held, side="right") - 1
                anchors = held + (self._runs[:, 0] - self._runs[:, 1])[run]
            beta = self._beta
        return anchors, ((smallest / masses) ** beta).astype(np.float32)

    def update(self, index: Values, priorities: Values) -> None:
        """Give anchor ``index[i]`` the priority ``priorities[i]``, such as a TD error's magnitude; both of one shape.

        Of an anchor that is named twice the last priority counts. Those of retired anchors are ignored, and counted.

        Raises:
            SelectionError: priorities that are NaN, infinite, negative, or too large, or shapes that differ.
            IndexRangeError: an anchor that does not exist, or that another rank holds. In each case nothing was changed.
        """
        anchors, given = _integers("index", index), _floats("priorities", priorities)
        if np.shape(index) != np.shape(priorities):
            raise SelectionError(
                f"index of shape {tuple(np.shape(index))} with priorities of shape "
                f"{tuple(np.shape(priorities))}, expected the same; reshape one like the other"
            )
        if not anchors.size:
            return
        if not given.min() >= 0 or given.max() == math.inf:
            wrong = int(np.flatnonzero(~((given >= 0) & (given < math.inf)))[0])
            raise SelectionError(
                f"priorities[{wrong}] is {given[wrong]}, expected a finite number, 0 or more; "
                "pass the absolute TD error, and look for the cause of a NaN"
            )
        if self._alpha * math.log(given.max() + self._eps) > math.log(MAX_MASS):
            raise SelectionError(
                f"priority {given.max()} to the power alpha={self._alpha} exceeds {MAX_MASS:.3g}; clip it"
            )
        masses = self._masses(given)
        with self._lock:
            held = self._held(anchors)
            retired = self._tree.leaves[held] == 0
            if retired.any():
                self._ignored += int(np.count_nonzero(retired))
                held, masses, given = held[~retired], masses[~retired], given[~retired]
            self._tree.set(held, masses)
            if given.size:
                self._max_priority = max(self._max_priority, float(given.max()))

    def state_dict(self) -> dict[str, Any]:
        """All that `draw` depends on besides ``seed``: arrays and plain numbers, all copies."""
        with self._lock:
            return {
                "masses": self._tree.leaves.copy(),  # (anchors that this rank holds,) float64
                "runs": self._runs.copy(),
                "starts": self._starts[: self._trajectories + 1].copy(),
                "additions": self._additions,
                "beta": self._beta,
                "max_priority": self._max_priority,
                "ignored_updates": self._ignored,
                **self._identity(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``, which `state_dict` gave on a sampler with the same trajectories, however they were added.

        Raises:
            SelectionError: a state of other trajectories, another rank, world size, alpha or eps, or a damaged one; nothing
                was changed.
        """
        missing = [name for name in (*_STATE, *self._identity()) if name not in state]
        if missing:
            raise SelectionError(f"the state lacks {', '.join(missing)}; pass what state_dict() gave")
        for name, mine in self._identity().items():
            if state[name] != mine:
                raise SelectionError(
                    f"the state has {name}={state[name]}, this sampler {mine}; construct it with the same"
                )
        starts, runs = (np.array(state[name], np.int64) for name in ("starts", "runs"))
        tree = SumTree(state["masses"])
        with self._lock:
            if not np.array_equal(starts, self._starts[: self._trajectories + 1]):
                raise SelectionError(
                    f"the state has {starts[-1]} anchors in {len(starts) - 1} trajectories, this sampler {self.num_anchors} "
                    f"in {self._trajectories}, or of other lengths; load it with the trajectories that it was saved with"
                )
            if not _runs_fit(runs, len(tree), self.num_anchors, self._world_size):
                raise SelectionError(
                    f"the state's {len(tree)} masses do not belong to its {len(runs)} runs of {self.num_anchors} anchors: "
                    "it is damaged; pass what state_dict() gave"
                )
            self._tree, self._runs = tree, runs
            self._beta = float(state["beta"])
            self._additions = int(state["additions"])
            self._max_priority = float(state["max_priority"])
            self._ignored = int(state["ignored_updates"])

    def adopt(self, state: Mapping[str, Any], places: Values) -> None:
        """Take over priorities from the state of a sampler of other trajectories; what it did not know is new here.

        Args:
            state: Of a sampler of one rank.
            places: ``(n,)``: numbers here of that sampler's trajectories, in its order; -1 for what is not here.

        Raises:
            SelectionError: Several ranks, another alpha or eps, or trajectories of other lengths; nothing was changed.
        """
        for name, mine in self._identity().items():
            if state[name] != mine or (name == "world_size" and mine != 1):
                raise SelectionError(
                    f"the state has {name}={state[name]}, this sampler {mine}; priorities of a view that has changed since "
                    "are taken over by one rank of the same arguments only"
                )
        places = _integers("places", places)
        starts = np.asarray(state["starts"], np.int64)
        counts, here = np.diff(starts), places >= 0
        with self._lock:
            mine_starts = self._starts[: self._trajectories + 1]
            if not np.array_equal(np.diff(mine_starts)[places[here]], counts[here]):
                raise SelectionError("the state's trajectories have other lengths than those of this view")
            sizes = counts[here]
            within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            masses = np.asarray(state["masses"], np.float64)[np.repeat(starts[:-1][here], sizes) + within]
            self._max_priority = max(self._max_priority, float(state["max_priority"]))
            self._tree.set(
                np.arange(len(self._tree)), np.full(len(self._tree), self._masses(np.array([self._max_priority]))[0])
            )
            self._tree.set(np.repeat(mine_starts[places[here]], sizes) + within, masses)
            self._beta = float(state["beta"])
            self._ignored = int(state["ignored_updates"])

    def _identity(self) -> dict[str, Any]:
        return {"alpha": self._alpha, "eps": self._eps, "rank": self._rank, "world_size": self._world_size}

    def _masses(self, priorities: Array) -> Array:
        """``(priority + eps) ** alpha``, above zero also where it would underflow."""
        powers = (priorities + self._eps) ** self._alpha
        return np.maximum(powers, _MIN_MASS, out=powers)

    def _held_before(self, anchors: Array) -> Array:
        """How many of the anchors below each of ``anchors`` this rank holds."""
        if not len(self._runs):
            return np.zeros_like(anchors)
        run = np.searchsorted(self._runs[:, 0], anchors, side="right") - 1
        ends = np.append(self._runs[1:, 1], len(self._tree))
        return np.where(run < 0, 0, np.minimum(self._runs[run, 1] + anchors - self._runs[run, 0], ends[run]))

    def _held(self, anchors: Array) -> Array:
        """The leaves of ``anchors``; an error unless this rank holds them all."""
        if anchors.min() < 0 or anchors.max() >= self.num_anchors:
            wrong = int(anchors[(anchors < 0) | (anchors >= self.num_anchors)][0])
            raise IndexRangeError(f"anchor {wrong}, expected 0 to {self.num_anchors - 1}; pass the batch's own index")
        if self._world_size == 1:
            return anchors
        held = self._held_before(anchors)
        foreign = np.flatnonzero(self._held_before(anchors + 1) == held)
        if len(foreign):
            raise IndexRangeError(
                f"anchor {anchors[foreign[0]]} (and {len(foreign) - 1} more) is held by another rank than {self._rank} of "
                f"{self._world_size}; update each rank with the index of its own batches"
            )
        return held


def _runs_fit(runs: Array, held: int, anchors: int, world_size: int) -> bool:
    """Whether ``runs`` are ascending parts of ``anchors`` anchors that have ``held`` together."""
    if runs.ndim != 2 or runs.shape[1] != 2 or (world_size == 1 and held != anchors):
        return False
    lengths = np.diff(runs[:, 1], append=held)
    limits = np.append(runs[1:, 0], anchors)
    return bool(
        int(lengths.sum()) == held
        and (lengths > 0).all()
        and (runs[:, 0] >= 0).all()
        and (runs[:, 0] + lengths <= limits[: len(runs)]).all()
    )


def _check_exponent(name: str, value: float, *, positive: bool) -> None:
    if not (value >= 0 and value < math.inf) or (positive and value == 0):
        raise SelectionError(f"{name}={value}, expected a finite number {'above 0' if positive else '>= 0'}")


def _integers(name: str, values: Values) -> Array:
    """``values`` flat as int64; not changed when it is that already."""
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise SelectionError(f"{name} is of {array.dtype}, expected integers")
    return array.reshape(-1).astype(np.int64, copy=False)


def _floats(name: str, values: Values) -> Array:
    """``values`` flat as float64; float types of torch that NumPy lacks are taken too."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64 if values.is_floating_point() else values.dtype).numpy()
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iuf":
        raise SelectionError(f"{name} is of {array.dtype}, expected real numbers")
    return array.reshape(-1).astype(np.float64, copy=False)
