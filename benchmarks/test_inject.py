"""inject, forward and forward + backward, beside what a user would write otherwise."""

from __future__ import annotations

import baselines
import pytest
import torch

from cllava_fast import ops
from cllava_fast.ops.inject.cases import BENCH, QUICK, make  # noqa: F401

WAYS = {
    "inject": ops.inject,
    "smart_eager": baselines.smart_eager,
    "dense_by_sample": baselines.dense_by_sample,
    "dense_by_batch": baselines.dense_by_batch,
    "frozen": baselines.frozen,
}
LIMIT = 1e-5


def inputs(case, way, rng):
    x, weight, A, B, index, coefficient, _ = make(case, torch.float32, rng)
    if way == "dense_by_batch":
        index, coefficient = index[0], coefficient[0]
    return x, weight, A, B, index, coefficient


def exact(way, arguments):
    """In float64, by the dense form: slow, and independent of the op that is measured."""
    x, weight, A, B, index, coefficient = arguments
    if way == "frozen":
        return x @ weight.t()
    index, coefficient = index.expand(len(x), -1), coefficient.expand(len(x), -1)
    samples = []
    for b in range(len(x)):
        offset = sum(c * (B[n].t() @ A[n]) for c, n in zip(coefficient[b], index[b].tolist(), strict=True))
        samples.append(x[b] @ (weight + offset).t())
    return torch.stack(samples)


def doubles(arguments):
    return [t.double() if t.is_floating_point() else t for t in arguments]


@pytest.mark.parametrize("way", WAYS)
def test_forward(case, way, timed, rng):
    arguments = inputs(case, way, rng)
    timed(lambda: (WAYS[way](*arguments),), (exact(way, doubles(arguments)),), LIMIT)


@pytest.mark.parametrize("way", WAYS)
def test_forward_backward(case, way, timed, rng):
    arguments = inputs(case, way, rng)
    upstream = torch.randn(case.B, case.S, case.d_out, generator=rng)
    positions = (0,) if way == "frozen" else (0, 2, 3, 5)

    def gradients(function, tensors, grad):
        leaves = [tensors[i].detach().requires_grad_() for i in positions]
        tensors = list(tensors)
        for i, tensor in zip(positions, leaves, strict=True):
            tensors[i] = tensor
        return torch.autograd.grad(function(*tensors), leaves, grad)

    wanted = gradients(lambda *tensors: exact(way, tensors), doubles(arguments), upstream.double())
    timed(lambda: gradients(WAYS[way], arguments, upstream), wanted, LIMIT)
