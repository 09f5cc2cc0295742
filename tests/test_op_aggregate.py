"""`aggregate` and `mix_factors` against loops written straight from their formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from cllava_fast import ops
from cllava_fast.ops.aggregate import cases as aggregate_cases
from tests.ops_helpers import LOW, close, leaf


def loop_aggregate(index, weight, row_task, row_mean, context):
    samples, rows = len(index), len(row_task)
    past = [[weight.new_zeros(()) for _ in range(rows)] for _ in range(samples)]
    for b in range(samples):
        for n in range(rows):
            for c, i in zip(weight[b], index[b].tolist(), strict=True):
                if row_task[n] < row_task[i]:
                    past[b][n] = past[b][n] + c * context[row_task[i], row_task[n]] * row_mean[n]
    every = torch.arange(rows).expand(samples, rows)
    past = torch.stack([torch.stack(row) for row in past]) if samples else weight.new_zeros(0, rows)
    return torch.cat([index, every], 1), torch.cat([weight, past], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", aggregate_cases.CASES, ids=str)
def test_aggregate_matches_loop(case, dtype, rng):
    index, weight, row_task, row_mean, context = aggregate_cases.make(case, dtype, rng)
    weight, context = leaf(weight), leaf(context)
    found = ops.aggregate(index, weight, row_task, row_mean, context)
    exact = leaf(weight.double()), leaf(context.double())
    wanted = loop_aggregate(index, exact[0], row_task, row_mean.double(), exact[1])
    limit = 1e-12 if dtype == torch.float64 else 3e-6
    assert torch.equal(found[0], wanted[0]) and found[1].dtype == dtype
    close(found[1], wanted[1], limit)
    upstream = torch.randn(wanted[1].shape, generator=rng, dtype=dtype)
    grads = torch.autograd.grad(found[1], (weight, context), upstream)
    exact_grads = torch.autograd.grad(wanted[1], exact, upstream.double(), allow_unused=True)
    for grad, exact_grad, tensor in zip(grads, exact_grads, exact, strict=True):
        close(grad, torch.zeros_like(tensor) if exact_grad is None else exact_grad, limit)
    assert (grads[1].triu() == 0).all()


def test_aggregate_never_reads_what_the_formula_does_not():
    context = torch.full((4, 4), math.nan, dtype=torch.float64)
    context[2, 0], context[2, 1], context[1, 0] = 0.5, 0.25, 2.0
    row_mean = torch.tensor([0.3, 0.4, math.nan, math.nan], dtype=torch.float64)
    index, weight = torch.tensor([[2, 2], [2, 1]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    context.requires_grad_()
    weight.requires_grad_()
    _, coefficient = ops.aggregate(index, weight, torch.arange(4), row_mean, context)
    close(coefficient[:, 2:], torch.tensor([[0.15, 0.1, 0, 0], [0.375, 0.05, 0, 0]]).double(), 1e-7)
    coefficient.sum().backward()
    close(weight.grad, torch.tensor([[1.25, 1.25], [1.25, 1.6]]).double(), 1e-7)
    wanted = torch.zeros(4, 4).double()
    wanted[2, 0], wanted[2, 1], wanted[1, 0] = 0.45, 0.6, 0.15
    close(context.grad, wanted, 1e-7)


def test_aggregate_gradcheck(rng):
    index, weight, row_task, row_mean, context = aggregate_cases.make(aggregate_cases.CASES[3], torch.float64, rng)
    run = lambda w, c: ops.aggregate(index, w, row_task, row_mean, c)[1]  # noqa: E731
    assert torch.autograd.gradcheck(run, (leaf(weight), leaf(context)))
    assert torch.autograd.gradcheck(lambda c: run(weight, c), leaf(context))
    assert torch.autograd.gradcheck(lambda w: run(w, context), leaf(weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.zeros(2, 3).int()}, "index: expected torch.int64"),
        ({"index": torch.full((2, 3), 5)}, r"index: expected entries in \[0, N\) = \[0, 5\), got 5..5"),
        ({"index": torch.full((2, 3), -1)}, "index: "),
        ({"weight": torch.zeros(2, 4)}, "weight: expected .* M = 3"),
        ({"weight": torch.zeros(2, 3).bfloat16()}, "weight: expected torch.float32"),
        ({"row_task": torch.tensor([0, 1, 2, 0, 1])}, r"row_task: expected entries in \[0, T\) = \[0, 2\)"),
        ({"row_mean": torch.zeros(4)}, "row_mean: expected .* N = 5"),
        ({"context": torch.zeros(2, 3)}, "context: expected .* T = 2"),
    ],
)
def test_aggregate_refuses(change, message):
    arguments = {
        "index": torch.zeros(2, 3).long(),
        "weight": torch.zeros(2, 3),
        "row_task": torch.zeros(5).long(),
        "row_mean": torch.zeros(5),
        "context": torch.zeros(2, 2),
    }
    with pytest.raises(ValueError, match=message):
        ops.aggregate(**(arguments | change))


def loop_mix(A, B, coefficient, index):
    mixed = []
    for factor in (A, B):
        total = factor.new_zeros(len(index), *factor.shape[1:]) + 0 * factor.sum()  # a graph even when empty
        for b in range(len(index)):
            for c, n in zip(coefficient[b], index[b].tolist(), strict=True):
                total = total.index_add(0, torch.tensor([b]), (c * factor[n]).unsqueeze(0))
        mixed.append(total)
    return mixed


@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("case", aggregate_cases.MIX_CASES, ids=str)
def test_mix_factors_matches_loop(case, dtype, rng):
    *inputs, index = aggregate_cases.make_mix(case, dtype, rng)
    inputs = [leaf(tensor) for tensor in inputs]
    exact = [leaf(tensor.double()) for tensor in inputs]
    found, wanted = ops.mix_factors(*inputs, index), loop_mix(*exact, index)
    limit = {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 1.01 * torch.finfo(dtype).eps)
    upstream = [torch.randn(t.shape, generator=rng, dtype=torch.float64).to(dtype) for t in wanted]
    grads = torch.autograd.grad(found, inputs, upstream)
    exact_grads = torch.autograd.grad(wanted, exact, [t.double() for t in upstream], allow_unused=True)
    for tensor, reference in zip(found, wanted, strict=True):
        assert tensor.dtype == dtype
        close(tensor, reference.detach(), limit)
    for grad, exact_grad, tensor in zip(grads, exact_grads, inputs, strict=True):
        assert grad.dtype == tensor.dtype
        close(grad, torch.zeros_like(tensor).double() if exact_grad is None else exact_grad, limit)


def test_mix_factors_gradcheck_and_refusals(rng):
    *inputs, index = aggregate_cases.make_mix(aggregate_cases.MixCase(2, 3, 4, 2, 3, 5), torch.float64, rng)
    assert torch.autograd.gradcheck(lambda *t: ops.mix_factors(*t, index), [leaf(t) for t in inputs])
    with pytest.raises(ValueError, match="B: expected .* R = 2"):
        ops.mix_factors(inputs[0], inputs[1][:, :1], inputs[2], index)
    with pytest.raises(ValueError, match="index: expected entries"):
        ops.mix_factors(*inputs, index + 4)
