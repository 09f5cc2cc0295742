"""What the tests of the ops share."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch

from cllava_fast.ops.inject import cases as inject_cases

LIBRARY: Any = torch.ops.cllava_fast
LOW = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def nan_in_empty_memory():
    """What torch.empty and its like return holds NaN: an output that is not written completely shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which also fills what is uninitialised
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.ones(0).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def error(tensor, exact):
    """Largest error against float64, relative to the largest entry."""
    if exact.numel() == 0:
        assert tensor.shape == exact.shape
        return 0.0
    return ((tensor.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-12)).item()


def close(tensor, exact, limit=1e-12):
    assert tensor.shape == exact.shape
    assert error(tensor, exact) <= limit


def inject_inputs(case, dtype, rng):
    x, weight, A, B, index, coefficient, bias = inject_cases.make(case, dtype, rng)
    return leaf(x), weight, leaf(A), leaf(B), index, leaf(coefficient), bias


def trained(inputs):
    return inputs[0], inputs[2], inputs[3], inputs[5]


def run(function, inputs, upstream, **options):
    y = function(*inputs, **options)
    grads = torch.autograd.grad(y, trained(inputs), upstream.to(y.dtype), allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, trained(inputs), strict=True)]
    return y.detach(), grads
