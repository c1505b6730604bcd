"""Advantages, returns and targets against plain loops over steps and environments in float64."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.rare import examples
from trajstore import errors
from trajstore.buffers import advantages_triton
from trajstore.buffers.advantages import discounted_returns, gae, n_step_returns, vtrace

CPU_METHODS = ["loop", "scan", "auto"]


# ---- the slow versions: one environment, Python floats, forward sums as the papers write them


def one_environment(tensor, n):
    return None if tensor is None else [float(x) for x in tensor.reshape(len(tensor), -1)[:, n]]


def environment_by_environment(function, like, last, tensors):
    """``function`` of the Python lists of each environment, its results as tensors ``(T, ...)``."""
    last = last.reshape(-1).tolist()
    found = [function(*(one_environment(t, n) for t in tensors), last[n]) for n in range(len(last))]
    found = [f if isinstance(f, tuple) else (f,) for f in found]
    return [
        torch.tensor([f[k] for f in found], dtype=torch.float64).T.reshape(like.shape) for k in range(len(found[0]))
    ]


def next_value(t, values, last, dones, truncated, bootstrap):
    if truncated is not None and truncated[t]:
        return bootstrap[t]
    return (values[t + 1] if t + 1 < len(values) else last) * (1 - dones[t])


def goes_on(t, dones, truncated):
    return 0.0 if truncated is not None and truncated[t] else 1 - dones[t]


def plain_gae(gamma, lam):
    def function(rewards, values, dones, truncated, bootstrap, last):
        deltas = [
            rewards[t] + gamma * next_value(t, values, last, dones, truncated, bootstrap) - values[t]
            for t in range(len(rewards))
        ]
        advantages = []
        for t in range(len(rewards)):
            total, factor = 0.0, 1.0
            for k in range(t, len(rewards)):  # the sum of equation 16
                total += factor * deltas[k]
                factor *= gamma * lam * goes_on(k, dones, truncated)
            advantages.append(total)
        return advantages, [a + v for a, v in zip(advantages, values, strict=True)]

    return function


def plain_n_step(gamma, n):
    def function(rewards, values, dones, truncated, bootstrap, last):
        out = []
        for t in range(len(rewards)):
            total, factor = 0.0, 1.0
            for k in range(t, min(t + n, len(rewards))):
                total += factor * rewards[k]
                if truncated is not None and truncated[k]:
                    total += factor * gamma * bootstrap[k]
                factor *= gamma * goes_on(k, dones, truncated)
            total += factor * (values[t + n] if t + n < len(values) else last)
            out.append(total)
        return out

    return function


def plain_returns(gamma):
    def function(rewards, dones, truncated, bootstrap, last):
        return plain_n_step(gamma, len(rewards))(rewards, [0.0] * len(rewards), dones, truncated, bootstrap, last)

    return function


def plain_vtrace(gamma, lam, rho_bar, c_bar, pg_rho_bar):
    def function(log_ratios, rewards, values, dones, truncated, bootstrap, last):
        ratios = [math.exp(x) for x in log_ratios]
        deltas = [
            min(rho_bar, ratios[t])
            * (rewards[t] + gamma * next_value(t, values, last, dones, truncated, bootstrap) - values[t])
            for t in range(len(rewards))
        ]
        targets = []
        for s in range(len(rewards)):
            total, factor = values[s], 1.0
            for t in range(s, len(rewards)):  # equation 1
                total += factor * deltas[t]
                factor *= gamma * lam * min(c_bar, ratios[t]) * goes_on(t, dones, truncated)
            targets.append(total)
        advantages = [
            min(pg_rho_bar, ratios[t])
            * (rewards[t] + gamma * next_value(t, targets, last, dones, truncated, bootstrap) - values[t])
            for t in range(len(rewards))
        ]
        return targets, advantages

    return function


# ---- inputs


def rollout(seed, steps, shape, *, done_rate=0.2, cut_rate=None, dtype=torch.float64, fractional=False):
    """Rewards, values, last values, dones, truncated, bootstrap values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    def chance(rate):
        return torch.rand(steps, *shape, generator=generator) < rate

    dones = chance(done_rate)
    if fractional:
        dones = torch.rand(steps, *shape, generator=generator, dtype=torch.float64)
    cut = None if cut_rate is None else chance(cut_rate)
    bootstrap = None if cut_rate is None else normal(steps, *shape)
    return normal(steps, *shape), normal(steps, *shape), normal(*shape), dones, cut, bootstrap


rollouts = st.builds(
    rollout,
    st.integers(0, 2**31),
    st.integers(1, 20),
    st.sampled_from([(), (1,), (3,), (2, 2)]),
    done_rate=st.sampled_from([0.0, 0.2, 1.0]),
    cut_rate=st.sampled_from([None, 0.0, 0.3, 1.0]),
    fractional=st.booleans(),
)
fractions = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def assert_close(found, expected, tolerance=1e-6):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


# ---- every estimator, every way to compute it


@pytest.mark.parametrize("method", CPU_METHODS)
@given(rollouts, fractions, fractions)
@settings(max_examples=examples(40), deadline=None)
def test_gae_is_the_sum_of_the_paper(method, given_rollout, gamma, lam):
    rewards, values, last, dones, truncated, bootstrap = given_rollout
    found = gae(
        rewards,
        values,
        last,
        dones,
        gamma=gamma,
        lam=lam,
        truncated=truncated,
        bootstrap_values=bootstrap,
        method=method,
    )
    expected = environment_by_environment(
        plain_gae(gamma, lam), rewards, last, (rewards, values, dones, truncated, bootstrap)
    )
    assert_close(found.advantages, expected[0])
    assert_close(found.returns, expected[1])


@pytest.mark.parametrize("method", CPU_METHODS)
@given(rollouts, fractions)
@settings(max_examples=examples(40), deadline=None)
def test_discounted_returns_are_sums_of_discounted_rewards(method, given_rollout, gamma):
    rewards, _, last, dones, truncated, bootstrap = given_rollout
    cut = {"truncated": truncated, "bootstrap_values": bootstrap}
    found = discounted_returns(rewards, dones, gamma=gamma, last_values=last, method=method, **cut)
    tensors = (rewards, dones, truncated, bootstrap)
    assert_close(found, environment_by_environment(plain_returns(gamma), rewards, last, tensors)[0])
    zero = torch.zeros_like(last)
    found = discounted_returns(rewards, dones, gamma=gamma, method=method, **cut)
    assert_close(found, environment_by_environment(plain_returns(gamma), rewards, zero, tensors)[0])


@given(rollouts, fractions, st.integers(1, 25))
@settings(max_examples=examples(150), deadline=None)
def test_n_step_returns_sum_n_rewards(given_rollout, gamma, n):
    rewards, values, last, dones, truncated, bootstrap = given_rollout
    found = n_step_returns(
        rewards, values, last, dones, n=n, gamma=gamma, truncated=truncated, bootstrap_values=bootstrap
    )
    expected = environment_by_environment(
        plain_n_step(gamma, n), rewards, last, (rewards, values, dones, truncated, bootstrap)
    )
    assert_close(found, expected[0])


@pytest.mark.parametrize("method", CPU_METHODS)
@given(
    rollouts, fractions, fractions, st.sampled_from([0.7, 1.0, None]), st.sampled_from([0.5, 1.0]), st.integers(0, 9)
)
@settings(max_examples=examples(40), deadline=None)
def test_vtrace_is_equation_1(method, given_rollout, gamma, lam, rho_bar, c_bar, seed):
    rewards, values, last, dones, truncated, bootstrap = given_rollout
    log_ratios = torch.randn(rewards.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pg_rho_bar = rho_bar and rho_bar * 1.5
    found = vtrace(
        log_ratios,
        rewards,
        values,
        last,
        dones,
        gamma=gamma,
        lam=lam,
        rho_bar=rho_bar,
        c_bar=c_bar,
        pg_rho_bar=pg_rho_bar,
        truncated=truncated,
        bootstrap_values=bootstrap,
        method=method,
    )
    expected = environment_by_environment(
        plain_vtrace(gamma, lam, rho_bar or math.inf, c_bar, pg_rho_bar or math.inf),
        rewards,
        last,
        (log_ratios, rewards, values, dones, truncated, bootstrap),
    )
    assert_close(found.targets, expected[0])
    assert_close(found.advantages, expected[1])


def test_vtrace_on_policy_gives_the_n_step_bellman_targets():
    rewards, values, last, dones, *_ = rollout(0, 30, (4,))
    found = vtrace(torch.zeros_like(rewards), rewards, values, last, dones, gamma=0.9)
    assert_close(found.targets, discounted_returns(rewards, dones, gamma=0.9, last_values=last))
    assert_close(found.targets, gae(rewards, values, last, dones, gamma=0.9, lam=1.0).returns)


@pytest.mark.parametrize("method", CPU_METHODS)
@pytest.mark.parametrize(("steps", "environments"), [(1000, 3), (40, 600)])
def test_long_rollouts_in_float32_stay_close_to_float64(method, steps, environments):
    rewards, values, last, dones, *_ = rollout(1, steps, (environments,), done_rate=0.01)
    exact = gae(rewards, values, last, dones, method="loop")
    found = gae(rewards.float(), values.float(), last.float(), dones.float(), method=method)
    assert found.advantages.dtype == torch.float32
    assert_close(found.advantages, exact.advantages, tolerance=2e-5)


# ---- dtypes, memory, gradients


def test_dtypes_of_results():
    rewards, values, last, dones, *_ = rollout(2, 5, (3,))
    exact = gae(rewards, values, last, dones).advantages
    for dtype in (torch.float16, torch.bfloat16):
        found = gae(rewards.to(dtype), values.to(dtype), last.to(dtype), dones)
        assert found.advantages.dtype == found.returns.dtype == dtype
        assert_close(found.advantages, exact, tolerance=0.1)
    assert gae(rewards.float(), values, last, dones).advantages.dtype == torch.float64
    assert discounted_returns(torch.ones(3, dtype=torch.int64), dones[:3, 0]).dtype == torch.float32


@pytest.mark.parametrize("method", CPU_METHODS)
def test_inputs_are_left_alone_and_results_carry_no_gradient(method):
    rewards, values, last, dones, truncated, bootstrap = given_tensors = rollout(3, 9, (2,), cut_rate=0.2)
    before = [t.clone() for t in given_tensors]
    values.requires_grad_()
    cut = {"truncated": truncated, "bootstrap_values": bootstrap}
    found = [
        *gae(rewards, values, last, dones, method=method, **cut),
        *vtrace(torch.zeros_like(rewards), rewards, values, last, dones, method=method, **cut),
        discounted_returns(rewards, dones, last_values=last, method=method, **cut),
        discounted_returns(rewards, dones, last_values=last, method=method),
        n_step_returns(rewards, values, last, dones, n=3, **cut),
        n_step_returns(rewards, values, last, dones, n=1),
    ]
    assert not any(t.requires_grad for t in found)
    assert all(torch.equal(a, b) for a, b in zip(given_tensors, before, strict=True))
    memory = {t.untyped_storage().data_ptr() for t in given_tensors}
    assert not memory & {t.untyped_storage().data_ptr() for t in found}


def test_strided_inputs_are_read_as_they_are_indexed():
    rewards, values, last, dones, *_ = rollout(4, 7, (5,))
    turned = [t.T.contiguous().T for t in (rewards, values)]
    for method in CPU_METHODS:
        assert_close(
            gae(*turned, last, dones, method=method).returns, gae(rewards, values, last, dones, method=method).returns
        )


# ---- what is refused


def test_bad_input_is_refused_by_name():
    rewards, values, last, dones, truncated, bootstrap = rollout(5, 4, (3,), cut_rate=0.5)
    for call, error, words in [
        (lambda: gae(rewards, values[:-1], last, dones), errors.ColumnShapeError, "values has shape"),
        (lambda: gae(rewards, values, last[:, None], dones), errors.ColumnShapeError, "last_values has shape"),
        (lambda: gae(rewards, values, last, dones.T), errors.ColumnShapeError, "dones has shape"),
        (lambda: gae(rewards[:0], values[:0], last, dones[:0]), errors.LengthError, "at least one step"),
        (lambda: discounted_returns(torch.tensor(1.0), dones), errors.LengthError, "time first"),
        (lambda: gae(rewards, values, last, dones.to("meta")), errors.ColumnTypeError, "dones is on meta"),
        (lambda: gae(rewards, values + 1j, last, dones), errors.ColumnTypeError, "real numbers"),
        (lambda: gae(rewards, values, last, dones, gamma=99.0), errors.SelectionError, "gamma=99.0"),
        (lambda: gae(rewards, values, last, dones, lam=-1), errors.SelectionError, "lam=-1"),
        (lambda: gae(rewards, values, last, dones, lam=float("nan")), errors.SelectionError, "lam=nan"),
        (lambda: gae(rewards, values, last, dones, truncated=truncated), errors.SelectionError, "bootstrap_values="),
        (lambda: gae(rewards, values, last, dones, bootstrap_values=bootstrap), errors.SelectionError, "truncated="),
        (
            lambda: gae(rewards, values, last, dones, truncated=truncated[0], bootstrap_values=bootstrap),
            errors.ColumnShapeError,
            "truncated has shape",
        ),
        (lambda: gae(rewards, values, last, dones, method="fast"), errors.SelectionError, "method='fast'"),
        (lambda: n_step_returns(rewards, values, last, dones, n=0), errors.SelectionError, "n=0"),
        (lambda: vtrace(rewards[1:], rewards, values, last, dones), errors.ColumnShapeError, "log_ratios has shape"),
        (lambda: vtrace(rewards, rewards, values, last, dones, rho_bar=0), errors.SelectionError, "rho_bar=0"),
    ]:
        with pytest.raises(error, match=words) as caught:
            call()
        assert isinstance(caught.value, ValueError)


# ---- Triton


@pytest.mark.skipif(advantages_triton.installed, reason="needs an environment without Triton")
def test_without_triton_the_error_says_what_to_do():
    rewards, values, last, dones, *_ = rollout(5, 4, (3,))
    with pytest.raises(errors.SelectionError, match="pip install triton"):
        gae(rewards, values, last, dones, method="triton")


UNDER_THE_INTERPRETER = """
import itertools
import torch
from tests.buffers.test_advantages import assert_close, rollout
from trajstore.buffers.advantages import discounted_returns, gae, vtrace

cases = itertools.product([1, 2, 9], [(), (1,), (3, 5), (130,)], [None, 0.3], [torch.float64, torch.float32])
for seed, (steps, shape, cut_rate, dtype) in enumerate(cases):
    rewards, values, last, dones, truncated, bootstrap = rollout(seed, steps, shape, cut_rate=cut_rate, dtype=dtype)
    if seed % 2:
        dones = dones.to(dtype)
        rewards = rewards.T.contiguous().T if rewards.ndim == 2 else rewards
    cut = {"truncated": truncated, "bootstrap_values": bootstrap}
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    def compare(function):
        found, expected = function("triton"), function("loop")
        found, expected = ((x,) if isinstance(x, torch.Tensor) else x for x in (found, expected))
        for f, e in zip(found, expected, strict=True):
            assert f.dtype == e.dtype == dtype
            assert_close(f, e.double(), tolerance)
    compare(lambda m: gae(rewards, values, last, dones, gamma=0.99, lam=0.95, method=m, **cut))
    compare(lambda m: discounted_returns(rewards, dones, gamma=0.97, last_values=last, method=m, **cut))
    compare(lambda m: vtrace(values, rewards, values, last, dones, method=m, **cut))
half = [t.half() for t in rollout(0, 5, (3,))[:3]]
dones = torch.zeros(5, 3)
assert_close(gae(*half, dones, method="triton").returns, gae(*half, dones, method="loop").returns.double(), 1e-3)
print("kernels agree")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_agree_with_the_loop_under_tritons_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", UNDER_THE_INTERPRETER],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "kernels agree" in done.stdout


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("method", ["auto", "scan", "loop"])
@pytest.mark.parametrize(("steps", "shape"), [(1, (1,)), (24, (4096,)), (1000, (7, 9))])
def test_on_a_gpu_all_ways_agree_with_the_cpu(method, steps, shape):
    given_tensors = rollout(6, steps, shape, cut_rate=0.1)
    rewards, values, last, dones, truncated, bootstrap = given_tensors
    moved = [t.cuda() for t in given_tensors]
    cut = {"truncated": truncated, "bootstrap_values": bootstrap}
    moved_cut = {"truncated": moved[4], "bootstrap_values": moved[5]}
    expected = gae(rewards, values, last, dones, method="loop", **cut)
    found = gae(*moved[:4], method=method, **moved_cut)
    assert_close(found.advantages.cpu(), expected.advantages)
    assert_close(found.returns.cpu(), expected.returns)
    assert_close(
        discounted_returns(moved[0], moved[3], last_values=moved[2], method=method, **moved_cut).cpu(),
        discounted_returns(rewards, dones, last_values=last, method="loop", **cut),
    )


@needs_gpu
@pytest.mark.parametrize("method", ["auto", "scan"])
def test_on_a_gpu_more_steps_do_not_mean_more_kernels(method):
    def launches(steps):
        moved = [t.cuda() for t in rollout(7, steps, (16,))[:4]]
        gae(*moved, method=method)  # compile first
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            gae(*moved, method=method)
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())

    assert launches(512) <= launches(64) + 3 * 4  # three more passes of the scan, a few kernels each
