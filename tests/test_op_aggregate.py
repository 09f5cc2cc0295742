"""`aggregate` and `mix_factors`: what the formulas do not read, repeated rows, dtypes side by side, refusals.

Their values and gradients on every case are in `test_ops.py`.
"""

from __future__ import annotations

import math

import pytest
import torch

from cllava_fast import ops
from cllava_fast.ops import triton_backend
from cllava_fast.ops.aggregate import cases as aggregate_cases
from tests.ops_helpers import GPU, LIBRARY, LOW, close, far_apart, leaf, on, on_every_backend
from tests.test_ops import aggregate_formula, mix_factors_formula

everywhere = on_every_backend("aggregate")
mix_everywhere = on_every_backend("mix_factors")


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_aggregate_never_reads_what_the_formula_does_not(dtype, backend):
    limit = 3e-7
    context = torch.full((4, 4), math.nan, dtype=dtype)
    context[2, 0], context[2, 1], context[1, 0] = 0.5, 0.25, 2.0
    row_mean = torch.tensor([0.3, 0.4, math.nan, math.nan], dtype=dtype)
    index, weight = torch.tensor([[2, 2], [2, 1]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=dtype)
    index, weight, row_task, row_mean, context = on(
        backend.device, (index, weight.requires_grad_(), torch.arange(4), row_mean, context.requires_grad_())
    )
    _, coefficient = ops.aggregate(index, weight, row_task, row_mean, context)
    close(coefficient[:, 2:], torch.tensor([[0.15, 0.1, 0, 0], [0.375, 0.05, 0, 0]]).double(), limit)
    coefficient.sum().backward()
    close(weight.grad, torch.tensor([[1.25, 1.25], [1.25, 1.6]]).double(), limit)
    wanted = torch.zeros(4, 4).double()
    wanted[2, 0], wanted[2, 1], wanted[1, 0] = 0.45, 0.6, 0.15
    close(context.grad, wanted, limit)


@everywhere
def test_aggregate_lets_no_gradient_through_what_was_not_read(backend):
    index, weight = torch.tensor([[0], [3]]), leaf(torch.ones(2, 1))
    context = leaf(torch.full((3, 3), 0.5))
    row_mean = torch.tensor([1.0, 1.0, 3.0, math.nan])  # the last task is not committed yet
    inputs = index, weight, torch.tensor([0, 1, 1, 2]), row_mean, context
    index, weight, row_task, row_mean, context = on(backend.device, inputs)
    _, coefficient = ops.aggregate(index, weight, row_task, row_mean, context)
    assert coefficient.tolist() == [[1, 0, 0, 0, 0], [1, 0.5, 0.5, 1.5, 0]]
    upstream = torch.ones_like(coefficient)
    upstream[0, 1:] = math.nan  # constants: a row of the first task looks back at nothing
    upstream[1, 4] = math.nan
    grads = torch.autograd.grad(coefficient, (weight, context), upstream)
    assert grads[0].tolist() == [[1], [3.5]]
    assert grads[1].tolist() == [[0, 0, 0], [0, 0, 0], [1, 4, 0]]
    weight = torch.full((1, 1), math.inf, device=backend.device)
    _, coefficient = ops.aggregate(index[:1], weight, row_task, row_mean, context)
    assert coefficient.tolist() == [[math.inf, 0, 0, 0, 0]]


def mix_grads(A, B, coefficient, index, upstream):
    inputs = [tensor.detach().requires_grad_() for tensor in (A, B, coefficient)]
    mixed = ops.mix_factors(*inputs, index)
    return [tensor.detach() for tensor in mixed], torch.autograd.grad(mixed, inputs, upstream)


@mix_everywhere
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_mix_factors_adds_up_repeated_rows(dtype, backend, rng):
    A, B, _, _ = aggregate_cases.make_mix(aggregate_cases.MixCase(1, 1, 3, 2, 5, 7), dtype, rng)
    A, B = A.abs(), B.abs()  # of which no sum cancels
    index, coefficient = torch.tensor([[1, 1, 2, 1], [1, 2, 2, 2]]), torch.tensor([[1.0, 2, 0, 4], [8, 0.5, 0.25, 0]])
    upstream = [torch.ones(2, 2, 5, dtype=dtype), 2 * torch.ones(1, dtype=dtype).expand(2, 2, 7)]
    A, B, coefficient, index, upstream = on(backend.device, (A, B, coefficient, index, upstream))
    mixed, grads = mix_grads(A, B, coefficient, index, upstream)
    for factor, out, grad, one in zip((A, B), mixed, grads, (1, 2), strict=False):
        close(out, torch.stack([7 * factor[1], 8 * factor[1] + 0.75 * factor[2]]).double(), torch.finfo(dtype).eps)
        assert torch.equal(grad, one * torch.tensor([0, 15, 0.75]).to(factor).view(3, 1, 1).expand_as(factor))
    along = (A.double().sum((1, 2)) + 2 * B.double().sum((1, 2)))[index]
    close(grads[2], along, 1e-6)


@mix_everywhere
def test_mix_factors_padding_does_not_spread(backend, rng):
    """What a coefficient of 0 names may be infinite, forward a row and backward a sample's gradient; plain PyTorch
    multiplies it by 0."""
    if backend.name == "reference":
        pytest.skip("the definition is a sum of products")
    A, B = torch.randn(4, 2, 5, generator=rng), torch.randn(4, 2, 7, generator=rng)
    A[3] = math.inf
    index, coefficient = torch.tensor([[0, 3], [1, 3], [2, 2]]), torch.tensor([[1.0, 0], [1, 0], [1, -1]])
    upstream = [torch.full((3, 2, 5), math.inf), torch.ones(3, 2, 7)]
    upstream[0][1] = 1
    A, B, coefficient, index, upstream = on(backend.device, (A, B, coefficient, index, upstream))
    mixed, grads = mix_grads(A, B, coefficient, index, upstream)
    assert mixed[0][:2].isfinite().all() and torch.equal(mixed[0][:2], A[:2])
    assert grads[0].isfinite().all((1, 2)).tolist() == [False, True, True, True]


@mix_everywhere
def test_mix_factors_only_the_gradients_asked_for(backend, rng):
    case = aggregate_cases.MIX_CASES[1]
    A, B, coefficient, index = on(backend.device, aggregate_cases.make_mix(case, torch.float32, rng))
    inputs = [leaf(A), leaf(B), leaf(coefficient)]
    every = torch.autograd.grad([t.sum() for t in ops.mix_factors(*inputs, index)], inputs)
    for i, grad in enumerate(every):
        one = [tensor.detach() for tensor in inputs]
        one[i].requires_grad_()
        assert torch.equal(torch.autograd.grad(sum(t.sum() for t in ops.mix_factors(*one, index)), one[i])[0], grad)


def test_aggregate_does_not_round_float64_arguments_beside_float32_ones(rng):  # by the choice of backend
    case = aggregate_cases.CASES[3]
    index, weight, row_task, row_mean, _ = aggregate_cases.make(case, torch.float32, rng)
    context = leaf(torch.randn(9, 9, generator=rng, dtype=torch.float64))
    _, coefficient = ops.aggregate(index, weight, row_task, row_mean, context)
    wanted = aggregate_formula(case, index, weight.double(), row_task, row_mean.double(), context)[1]
    close(coefficient, wanted)
    close(torch.autograd.grad(coefficient.sum(), context)[0], torch.autograd.grad(wanted.sum(), context)[0])


def test_mix_factors_does_not_round_float64_arguments_beside_float32_ones(rng):
    case = aggregate_cases.MIX_CASES[1]
    A, B, coefficient, index = aggregate_cases.make_mix(case, torch.float32, rng)
    B = torch.randn(B.shape, generator=rng, dtype=torch.float64)
    upstream = [torch.ones(3, 8, 40), torch.ones(3, 8, 24).double()]
    mixed, grads = mix_grads(A, B, coefficient, index, upstream)
    close(mixed[1], mix_factors_formula(case, B, B, coefficient.double(), index)[1])
    assert [t.dtype for t in grads] == [torch.float32, torch.float64, torch.float32]


@mix_everywhere
def test_mix_factors_beyond_32_bit_offsets(backend, rng):
    case = aggregate_cases.MixCase(B=2, P=3, N=2, R=2, d_in=8, d_out=16)
    A, B, coefficient, index = on(backend.device, aggregate_cases.make_mix(case, torch.float16, rng))
    far_A, far_B = far_apart(A), far_apart(B)
    grads = torch.ones_like(A), torch.ones_like(B)
    near = (
        *LIBRARY.mix_factors(A, B, coefficient, index),
        *LIBRARY.mix_factors_backward(*grads, A, B, coefficient, index, [True] * 3),
    )
    far = (
        *LIBRARY.mix_factors(far_A, far_B, coefficient, index),
        *LIBRARY.mix_factors_backward(*grads, far_A, far_B, coefficient, index, [True] * 3),
    )
    for ours, wanted in zip(far, near, strict=True):
        close(ours, wanted.double(), 2 * torch.finfo(ours.dtype).eps)


@pytest.mark.skipif(triton_backend.usable() is not None, reason=str(triton_backend.usable()))
def test_triton_refuses_float64(rng):
    inputs = on(GPU, aggregate_cases.make_mix(aggregate_cases.MIX_CASES[1], torch.float64, rng))
    with ops.backend("triton"), pytest.raises(ops.BackendError, match="mix_factors: backend 'triton'"):
        ops.mix_factors(*inputs)


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


def test_mix_factors_gradcheck_and_refusals(rng):
    *inputs, index = aggregate_cases.make_mix(aggregate_cases.MixCase(2, 3, 4, 2, 3, 5), torch.float64, rng)
    assert torch.autograd.gradcheck(lambda *t: ops.mix_factors(*t, index), [leaf(t) for t in inputs])
    with pytest.raises(ValueError, match="B: expected .* R = 2"):
        ops.mix_factors(inputs[0], inputs[1][:, :1], inputs[2], index)
    with pytest.raises(ValueError, match="index: expected entries"):
        ops.mix_factors(*inputs, index + 4)


@mix_everywhere
def test_mix_factors_of_two_dtypes(backend, rng):
    A, B, coefficient, index = on(
        backend.device, aggregate_cases.make_mix(aggregate_cases.MIX_CASES[1], torch.float16, rng)
    )
    upstream = on(backend.device, [torch.ones(3, 8, 40).half(), torch.ones(3, 8, 24)])
    mixed, grads = mix_grads(A, B.float(), coefficient, index, upstream)
    same, same_grads = mix_grads(A.float(), B.float(), coefficient, index, [upstream[0].float(), upstream[1]])
    for found, wanted in zip((*mixed, *grads), (*same, *same_grads), strict=True):
        close(found, wanted.double(), 1.01 * torch.finfo(found.dtype).eps)
    assert [t.dtype for t in (*mixed, *grads)] == [torch.float16, torch.float32] * 2 + [torch.float32]


@mix_everywhere
@pytest.mark.parametrize(("d_in", "d_out"), [(0, 5), (5, 0)])
def test_mix_factors_of_one_empty_factor(d_in, d_out, backend, rng):
    case = aggregate_cases.MixCase(B=2, P=3, N=4, R=2, d_in=d_in, d_out=d_out)
    A, B, coefficient, index = on(backend.device, aggregate_cases.make_mix(case, torch.float32, rng))
    mixed, grads = mix_grads(A, B, coefficient, index, [torch.ones_like(A[:2]), torch.ones_like(B[:2])])
    for found, wanted in zip(mixed, mix_factors_formula(case, A, B, coefficient, index), strict=True):
        close(found, wanted.double(), 1e-6)
    assert grads[0].shape == A.shape and grads[1].shape == B.shape and grads[2].abs().sum() > 0
