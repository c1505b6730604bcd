"""GAE and the reverse recurrence as one kernel launch each: a program per block of environments, the loop over time inside.

Invariant: a program reads and writes only the columns of its own environments, so programs never wait for each other.

Triton comes with PyTorch for CUDA. Without it this module can be imported, and ``installed`` is False.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:
    triton = None

installed = triton is not None

_BLOCK = 64  # environments per program: small, since 4,096 environments should occupy every multiprocessor


def _jit(kernel: Callable[..., Any]) -> Any:
    return triton.jit(kernel) if installed else kernel


@_jit
def _gae_kernel(  # type: ignore[no-untyped-def]
    rewards,
    values,
    last_values,
    dones,
    truncated,
    bootstrap_values,
    advantages,
    returns,
    environments,
    last_row,  # offset of row T - 1
    steps,
    gamma_high,
    gamma_low,
    decay_high,
    decay_low,
    HAS_TRUNCATED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    real = advantages.dtype.element_ty
    # Triton passes floats as float32: two of them carry a float64.
    wide = tl.zeros([BLOCK], dtype=tl.float64)
    gamma = (wide + gamma_high + gamma_low).to(real)
    decay = (wide + decay_high + decay_low).to(real)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < environments
    offset = column + last_row
    next_value = tl.load(last_values + column, mask=mask, other=0).to(real)
    advantage = tl.zeros([BLOCK], dtype=real)
    for _ in range(steps):
        value = tl.load(values + offset, mask=mask, other=0).to(real)
        going_on = 1 - tl.load(dones + offset, mask=mask, other=0).to(real)
        following = going_on * next_value
        if HAS_TRUNCATED:
            cut = tl.load(truncated + offset, mask=mask, other=0) != 0
            bootstrap = tl.load(bootstrap_values + offset, mask=mask, other=0).to(real)
            following = tl.where(cut, bootstrap, following)
            going_on = tl.where(cut, 0.0, going_on)
        delta = tl.load(rewards + offset, mask=mask, other=0).to(real) + gamma * following - value
        advantage = delta + decay * going_on * advantage
        tl.store(advantages + offset, advantage, mask=mask)
        tl.store(returns + offset, advantage + value, mask=mask)
        next_value = value
        offset -= environments


@_jit
def _recurrence_kernel(  # type: ignore[no-untyped-def]
    slopes,
    offsets,
    last,
    out,
    environments,
    last_row,  # offset of row T - 1
    steps,
    BLOCK: tl.constexpr,  # noqa: N803
):
    real = out.dtype.element_ty
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = column < environments
    place = column + last_row
    x = tl.load(last + column, mask=mask, other=0).to(real)
    for _ in range(steps):
        slope = tl.load(slopes + place, mask=mask, other=0).to(real)
        x = tl.load(offsets + place, mask=mask, other=0).to(real) + slope * x
        tl.store(out + place, x, mask=mask)
        place -= environments


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    last_values: torch.Tensor,
    dones: torch.Tensor,
    truncated: torch.Tensor | None,
    bootstrap_values: torch.Tensor | None,
    *,
    gamma: float,
    lam: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, ``(T, ...)`` of ``dtype``, of tensors whose shapes have been checked."""
    steps, shape = rewards.shape[0], rewards.shape
    advantages = torch.empty(shape, dtype=dtype, device=rewards.device)
    returns = torch.empty_like(advantages)
    environments = last_values.numel()
    rewards = _plain(rewards)
    with _on(rewards):
        _gae_kernel[(triton.cdiv(environments, _BLOCK),)](
            rewards,
            _plain(values),
            _plain(last_values),
            _plain(dones),
            rewards if truncated is None else _plain(truncated),
            rewards if bootstrap_values is None else _plain(bootstrap_values),
            advantages,
            returns,
            environments,
            (steps - 1) * environments,
            steps,
            *_two_floats(gamma),
            *_two_floats(gamma * lam),
            HAS_TRUNCATED=truncated is not None,
            BLOCK=_BLOCK,
        )
    return advantages, returns


def recurrence(slopes: torch.Tensor, offsets: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """``x[t] = offsets[t] + slopes[t] * x[t + 1]`` with ``x[T] = last``; see ``trajstore.buffers.advantages``."""
    steps, environments = offsets.shape[0], last.numel()
    out = torch.empty(offsets.shape, dtype=offsets.dtype, device=offsets.device)
    with _on(offsets):
        _recurrence_kernel[(triton.cdiv(environments, _BLOCK),)](
            _plain(slopes),
            _plain(offsets),
            _plain(last),
            out,
            environments,
            (steps - 1) * environments,
            steps,
            BLOCK=_BLOCK,
        )
    return out


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the kernels address it: end to end, booleans as bytes."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def _two_floats(number: float) -> tuple[float, float]:
    """Two float32 whose sum is ``number`` to 48 bits."""
    high: float = struct.unpack("f", struct.pack("f", number))[0]
    return high, number - high


def _on(tensor: torch.Tensor) -> torch.cuda.device:
    # Triton launches on the current device; -1, for tensors of the CPU (its interpreter), changes nothing.
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)
