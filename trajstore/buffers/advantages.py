"""Advantages, returns and value targets of rollouts, computed backwards over time.

Invariant: every estimator here is one reverse linear recurrence, ``x[t] = offsets[t] + slopes[t] * x[t + 1]``; the ways to
compute it (``method``) give the same numbers up to rounding.

All tensors are ``(T, ...)``: time first, then any shape, usually environments. ``dones[t]`` says that the episode ended with
step ``t``, however it ended: nothing flows back over that step, and no value is bootstrapped there. It is a boolean, or a
number that multiplies as ``1 - dones``. Steps that only a time limit ended may be marked in ``truncated``; there
``bootstrap_values[t]``, the value of the observation that followed step ``t`` (the final one, before the reset), is
bootstrapped (Pardo et al. 2018, "Time Limits in Reinforcement Learning"). Leave a step that is both terminated and truncated
unmarked. Whoever lacks the final observations may pass ``bootstrap_values=values``, as legged-robot trainers do.

Results carry no gradient. They have the wider dtype of rewards and values; half precision is computed in float32.

How it is computed:

==========  ===================================================================================================
method
==========  ===================================================================================================
``loop``    one vectorised operation per step
``scan``    an associative scan: ``log2 T`` vectorised steps (Blelloch 1990, "Prefix Sums and Their Applications")
``triton``  one kernel, the loop over time inside
``auto``    on CUDA ``triton`` where it is installed, else ``scan``; on the CPU by shape, the faster of the other two
==========  ===================================================================================================
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Literal, NamedTuple

import torch

from trajstore.buffers import advantages_triton
from trajstore.errors import ColumnShapeError, ColumnTypeError, LengthError, SelectionError

_SCAN_BELOW = 512  # environments, on the CPU

Method = Literal["auto", "loop", "scan", "triton"]


class Advantages(NamedTuple):
    """What ``gae`` returns.

    Attributes:
        advantages: ``(T, ...)``.
        returns: ``(T, ...)``, advantages plus values: targets of the value function.
    """

    advantages: torch.Tensor
    returns: torch.Tensor


class VTrace(NamedTuple):
    """What ``vtrace`` returns.

    Attributes:
        targets: ``(T, ...)``, ``v_s`` of the paper: targets of the value function.
        advantages: ``(T, ...)``, the factor of the policy gradient, importance weight included.
    """

    targets: torch.Tensor
    advantages: torch.Tensor


@torch.no_grad()
def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    last_values: torch.Tensor,
    dones: torch.Tensor,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    method: Method = "auto",
) -> Advantages:
    """Generalized advantage estimation (Schulman et al. 2016, equation 16).

    Args:
        rewards: ``(T, ...)``.
        values: ``(T, ...)``, the value of each step's observation.
        last_values: ``(...)``, the value of the observation after the last step.
        dones: ``(T, ...)``, the episode ended with this step.
        gamma: Discount, 0 to 1.
        lam: 0 gives one-step TD errors, 1 discounted returns minus values.
        truncated: ``(T, ...)``, only a time limit ended it; see the module.
        bootstrap_values: ``(T, ...)``, used where ``truncated``.
        method: How it is computed; see the module.

    Raises:
        ColumnShapeError: Shapes that do not belong together; a ValueError.
        ColumnTypeError: Tensors on different devices, or complex ones; a TypeError and ValueError.
        SelectionError: gamma or lam outside 0 to 1, or an unknown method; a ValueError.

    Examples:
        >>> import torch
        >>> rewards, values, dones = torch.ones(3, 1), torch.zeros(3, 1), torch.tensor([[0.0], [1.0], [0.0]])
        >>> gae(rewards, values, torch.tensor([4.0]), dones, gamma=0.5, lam=1.0).advantages.squeeze()
        tensor([1.5000, 1.0000, 3.0000])
    """
    _check_shapes(rewards, last=("last_values", last_values), values=values, dones=dones)
    _check_cut(rewards, truncated, bootstrap_values)
    _check_fractions(gamma=gamma, lam=lam)
    chosen = _choose(method, rewards)
    dtype, work = _dtypes(rewards, values)
    if chosen == "triton":
        found = _kernels().gae(
            rewards, values, last_values, dones, truncated, bootstrap_values, gamma=gamma, lam=lam, dtype=work
        )
        return Advantages(found[0].to(dtype), found[1].to(dtype))
    values = values.to(work)
    going_on, following = _following(values, last_values, dones, truncated, bootstrap_values)
    deltas = torch.add(rewards.to(work), following, alpha=gamma).sub_(values)
    advantages = _recurrence(going_on.mul_(gamma * lam), deltas, torch.zeros_like(values[0]), chosen)
    return Advantages(advantages.to(dtype), (advantages + values).to(dtype))


@torch.no_grad()
def discounted_returns(
    rewards: torch.Tensor,
    dones: torch.Tensor,
    *,
    gamma: float = 0.99,
    last_values: torch.Tensor | None = None,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    method: Method = "auto",
) -> torch.Tensor:
    """Discounted returns ``G[t] = rewards[t] + gamma * G[t + 1]`` (Sutton & Barto 2018, equation 3.9), ``(T, ...)``.

    Args:
        rewards: ``(T, ...)``.
        dones: ``(T, ...)``, the episode ended with this step.
        gamma: Discount, 0 to 1.
        last_values: ``(...)``, what follows the last step; None is zero.
        truncated: ``(T, ...)``, only a time limit ended it; see the module.
        bootstrap_values: ``(T, ...)``, used where ``truncated``.
        method: How it is computed; see the module.

    Raises:
        ValueError: As ``gae``.

    Examples:
        >>> import torch
        >>> discounted_returns(torch.ones(3), torch.tensor([False, False, True]), gamma=0.5)
        tensor([1.7500, 1.5000, 1.0000])
    """
    last = rewards.new_zeros(rewards.shape[1:]) if last_values is None else last_values
    _check_shapes(rewards, last=("last_values", last), dones=dones)
    _check_cut(rewards, truncated, bootstrap_values)
    _check_fractions(gamma=gamma)
    dtype, work = _dtypes(rewards, last)
    slopes, offsets = _one_step(rewards.to(work), dones, gamma, truncated, bootstrap_values)
    return _recurrence(slopes, offsets, last.to(work), _choose(method, rewards)).to(dtype)


@torch.no_grad()
def n_step_returns(
    rewards: torch.Tensor,
    values: torch.Tensor,
    last_values: torch.Tensor,
    dones: torch.Tensor,
    *,
    n: int,
    gamma: float = 0.99,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
) -> torch.Tensor:
    """n-step returns (Sutton & Barto 2018, equation 7.1), ``(T, ...)``.

    ``G[t] = rewards[t] + ... + gamma^(n-1) rewards[t+n-1] + gamma^n values[t+n]``, cut where the episode ends. Where fewer
    than ``n`` steps are left, those are summed and ``last_values`` is bootstrapped.
    It takes ``log2 n`` vectorised steps on any device.

    Args:
        rewards: ``(T, ...)``.
        values: ``(T, ...)``, the value of each step's observation.
        last_values: ``(...)``, the value of the observation after the last step.
        dones: ``(T, ...)``, the episode ended with this step.
        n: How many rewards are summed, at least 1.
        gamma: Discount, 0 to 1.
        truncated: ``(T, ...)``, only a time limit ended it; see the module.
        bootstrap_values: ``(T, ...)``, used where ``truncated``.

    Raises:
        ValueError: As ``gae``, or ``n`` below 1.

    Examples:
        >>> import torch
        >>> rewards, values = torch.ones(3), torch.tensor([10.0, 20.0, 30.0])
        >>> n_step_returns(rewards, values, torch.tensor(40.0), torch.zeros(3), n=2, gamma=0.5)
        tensor([ 9.0000, 11.5000, 21.0000])
    """
    _check_shapes(rewards, last=("last_values", last_values), values=values, dones=dones)
    _check_cut(rewards, truncated, bootstrap_values)
    _check_fractions(gamma=gamma)
    if n < 1:
        raise SelectionError(f"n={n}, expected the number of rewards to sum, at least 1")
    dtype, work = _dtypes(rewards, values)
    steps = len(rewards)
    n = min(n, steps)
    # A step maps the value that follows to the return: x -> offset + slope * x. The n-step return is the composition of n
    # of these maps at values[t + n]; compositions of 1, 2, 4, ... maps make it up, as n's binary digits say.
    slopes, offsets = _one_step(rewards.to(work), dones, gamma, truncated, bootstrap_values)
    reached = torch.cat(
        [values.to(work), last_values.to(work)[None]]
    )  # reached[t]: the value after the maps applied so far
    span = 1
    while True:
        if n & span:
            # The maps of steps t to t + span - 1; those beyond the end are missing, which leaves last_values.
            after = torch.cat([reached[span:], reached[-1:].expand(min(span, steps), *reached.shape[1:])])[:steps]
            reached = torch.cat([torch.addcmul(offsets, slopes, after), reached[-1:]])
        if span * 2 > n:
            return reached[:-1].to(dtype)
        offsets = torch.cat([torch.addcmul(offsets[:-span], slopes[:-span], offsets[span:]), offsets[-span:]])
        slopes = torch.cat([slopes[:-span] * slopes[span:], slopes[-span:]])
        span *= 2


@torch.no_grad()
def vtrace(
    log_ratios: torch.Tensor,
    rewards: torch.Tensor,
    values: torch.Tensor,
    last_values: torch.Tensor,
    dones: torch.Tensor,
    *,
    gamma: float = 0.99,
    lam: float = 1.0,
    rho_bar: float | None = 1.0,
    c_bar: float = 1.0,
    pg_rho_bar: float | None = 1.0,
    truncated: torch.Tensor | None = None,
    bootstrap_values: torch.Tensor | None = None,
    method: Method = "auto",
) -> VTrace:
    """V-trace targets and policy-gradient advantages (Espeholt et al. 2018, equation 1 and section 4.2).

    Args:
        log_ratios: ``(T, ...)``, log-probability of the action under the learner's policy minus that under the actor's.
        rewards: ``(T, ...)``.
        values: ``(T, ...)``, the value of each step's observation.
        last_values: ``(...)``, the value of the observation after the last step.
        dones: ``(T, ...)``, the episode ended with this step.
        gamma: Discount, 0 to 1.
        lam: Factor of the traces (remark 2 of the paper), 0 to 1.
        rho_bar: Bound of the importance weights of TD errors; None for no bound.
        c_bar: Bound of the traces.
        pg_rho_bar: Bound of the importance weights of the policy gradient; None for no bound.
        truncated: ``(T, ...)``, only a time limit ended it; see the module.
        bootstrap_values: ``(T, ...)``, used where ``truncated``.
        method: How it is computed; see the module.

    Raises:
        ValueError: As ``gae``, or a bound that is not positive.

    Examples:
        >>> import torch
        >>> on_policy, rewards, values = torch.zeros(3), torch.ones(3), torch.zeros(3)
        >>> vtrace(on_policy, rewards, values, torch.tensor(0.0), torch.zeros(3), gamma=0.5).targets
        tensor([1.7500, 1.5000, 1.0000])
    """
    last = ("last_values", last_values)
    _check_shapes(rewards, last=last, values=values, dones=dones, log_ratios=log_ratios)
    _check_cut(rewards, truncated, bootstrap_values)
    _check_fractions(gamma=gamma, lam=lam)
    for name, bound in (("rho_bar", rho_bar), ("c_bar", c_bar), ("pg_rho_bar", pg_rho_bar)):
        if bound is not None and not bound > 0:
            raise SelectionError(f"{name}={bound}, expected a positive bound of the importance weights")
    dtype, work = _dtypes(rewards, values)
    rewards, values = rewards.to(work), values.to(work)
    ratios = log_ratios.to(work).exp()
    rhos = ratios if rho_bar is None else ratios.clamp(max=rho_bar)
    going_on, following = _following(values, last_values, dones, truncated, bootstrap_values)
    deltas = torch.add(rewards, following, alpha=gamma).sub_(values).mul_(rhos)
    slopes = ratios.clamp(max=c_bar).mul_(gamma * lam).mul_(going_on)
    targets = values + _recurrence(slopes, deltas, torch.zeros_like(values[0]), _choose(method, rewards))
    _, following = _following(targets, last_values, dones, truncated, bootstrap_values)
    weights = ratios if pg_rho_bar is None else ratios.clamp(max=pg_rho_bar)
    advantages = torch.add(rewards, following, alpha=gamma).sub_(values).mul_(weights)
    return VTrace(targets.to(dtype), advantages.to(dtype))


# ---- one step


def _following(
    values: torch.Tensor,
    last_values: torch.Tensor,
    dones: torch.Tensor,
    truncated: torch.Tensor | None,
    bootstrap_values: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the episode goes on after each step, and the value of what follows it: both ``(T, ...)``, new tensors."""
    going_on = 1 - dones.to(values.dtype)
    following = torch.cat([values[1:], last_values.to(values.dtype)[None]]).mul_(going_on)
    if truncated is not None and bootstrap_values is not None:
        cut = truncated != 0
        following = torch.where(cut, bootstrap_values.to(values.dtype), following)
        going_on.masked_fill_(cut, 0)
    return going_on, following


def _one_step(
    rewards: torch.Tensor,
    dones: torch.Tensor,
    gamma: float,
    truncated: torch.Tensor | None,
    bootstrap_values: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slopes and offsets ``(T, ...)`` of what each step makes of the return that follows it."""
    slopes = (1 - dones.to(rewards.dtype)).mul_(gamma)
    if truncated is None or bootstrap_values is None:
        return slopes, rewards
    cut = truncated != 0
    offsets = torch.where(cut, torch.add(rewards, bootstrap_values.to(rewards.dtype), alpha=gamma), rewards)
    return slopes.masked_fill_(cut, 0), offsets


# ---- the recurrence


def _recurrence(
    slopes: torch.Tensor, offsets: torch.Tensor, last: torch.Tensor, method: Literal["loop", "scan", "triton"]
) -> torch.Tensor:
    """``x[t] = offsets[t] + slopes[t] * x[t + 1]`` with ``x[T] = last``: ``(T, ...)``, of one floating dtype."""
    if method == "triton":
        out: torch.Tensor = _kernels().recurrence(slopes, offsets, last)
        return out
    return _loop(slopes, offsets, last) if method == "loop" else _scan(slopes, offsets, last)


def _loop(slopes: torch.Tensor, offsets: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(offsets, memory_format=torch.contiguous_format)
    x = last
    # unbind makes all views in one call; indexing would cost as much as the arithmetic.
    for slope, offset, place in zip(
        reversed(slopes.unbind()), reversed(offsets.unbind()), reversed(out.unbind()), strict=True
    ):
        x = torch.addcmul(offset, slope, x, out=place)
    return out


def _scan(slopes: torch.Tensor, offsets: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    # After the pass of a span, slopes and offsets [t] are the composition of the maps of steps t to t + 2 * span - 1.
    offsets = offsets.clone()
    offsets[-1] += slopes[-1] * last
    span = 1
    while span < len(offsets):
        following = torch.addcmul(offsets[:-span], slopes[:-span], offsets[span:])
        if span * 2 < len(offsets):
            slopes = torch.cat([slopes[:-span] * slopes[span:], slopes[-span:]])
        offsets[:-span] = following
        span *= 2
    return offsets


def _choose(method: Method, like: torch.Tensor) -> Literal["loop", "scan", "triton"]:
    if method not in ("auto", "loop", "scan", "triton"):
        raise SelectionError(f"method={method!r}, expected 'auto', 'loop', 'scan' or 'triton'")
    if method != "auto":
        return method
    if like.is_cuda:
        return "triton" if _kernels_work() else "scan"
    # Measured on one and on two x86 cores: a step of the loop costs 4 us and then as much per environment as a pass of the
    # scan, of which there are log2 T. They meet near 512 environments, whatever T.
    return "scan" if like[0].numel() < _SCAN_BELOW else "loop"


def _kernels() -> ModuleType:
    if not advantages_triton.installed:
        raise SelectionError("method='triton' and Triton is not installed; pip install triton, or leave method='auto'")
    return advantages_triton


@functools.cache
def _kernels_work() -> bool:
    """Whether Triton is installed and can compile here; tried once."""
    if not advantages_triton.installed:
        return False
    one = torch.ones(1, 1, device="cuda")
    try:
        advantages_triton.recurrence(one, one, one[0])
    except (RuntimeError, OSError) as e:  # no C compiler, a driver that is too old
        warnings.warn(f"Triton is installed but cannot compile here, so a slower scan is used: {e}", stacklevel=4)
        return False
    return True


# ---- checks


def _check_shapes(rewards: torch.Tensor, *, last: tuple[str, torch.Tensor], **others: torch.Tensor) -> None:
    """Raise unless all are ``(T, ...)`` like the rewards, T at least 1, ``last`` is ``(...)``, and all are on one device."""
    if rewards.ndim < 1 or rewards.shape[0] < 1:
        raise LengthError(f"rewards has shape {tuple(rewards.shape)}, expected (T, ...): time first, at least one step")
    for other, tensor, shape in [(k, v, rewards.shape) for k, v in others.items()] + [(*last, rewards.shape[1:])]:
        if tensor.shape != shape:
            raise ColumnShapeError(
                f"{other} has shape {tuple(tensor.shape)}, expected {tuple(shape)} for rewards of shape "
                f"{tuple(rewards.shape)}; squeeze a trailing dimension of 1, or pass time first"
            )
        if tensor.device != rewards.device:
            raise ColumnTypeError(
                f"{other} is on {tensor.device}, rewards are on {rewards.device}; move them to one device"
            )
        if tensor.is_complex():
            raise ColumnTypeError(f"{other} is {tensor.dtype}, expected real numbers")


def _check_cut(rewards: torch.Tensor, truncated: torch.Tensor | None, bootstrap_values: torch.Tensor | None) -> None:
    if (truncated is None) != (bootstrap_values is None):
        given, other = (
            ("truncated", "bootstrap_values") if bootstrap_values is None else ("bootstrap_values", "truncated")
        )
        raise SelectionError(
            f"{given}= without {other}=: pass both; bootstrap_values are the values of the observations that followed the "
            "truncated steps (values=, the values of the steps themselves, is what to pass where those are lost)"
        )
    if truncated is not None and bootstrap_values is not None:
        last = ("truncated[0]", truncated[0] if truncated.ndim else truncated)
        _check_shapes(rewards, last=last, truncated=truncated, bootstrap_values=bootstrap_values)


def _check_fractions(**given: float) -> None:
    for name, value in given.items():
        if not 0 <= value <= 1:
            raise SelectionError(f"{name}={value}, expected a number from 0 to 1")


def _dtypes(rewards: torch.Tensor, values: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of the results, and of the arithmetic."""
    dtype = torch.promote_types(rewards.dtype, values.dtype)
    if dtype.is_complex:
        raise ColumnTypeError(f"rewards are {rewards.dtype} and values {values.dtype}, expected real numbers")
    if not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    return dtype, torch.promote_types(dtype, torch.float32)
