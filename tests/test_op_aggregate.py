"""`aggregate` and `mix_factors` against loops written straight from their formulas, in float64; on every backend.

Tests that reach a kernel take `backend`, and run with uninitialised memory full of NaN.
"""

from __future__ import annotations

import math

import pytest
import torch

from cllava_fast import ops
from cllava_fast.ops import dispatch, triton_backend
from cllava_fast.ops.aggregate import cases as aggregate_cases
from tests.ops_helpers import LOW, close, error, leaf, nan_in_empty_memory

on_every_backend = pytest.mark.usefixtures("backend")


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    dtype = request.node.callspec.params.get("dtype", torch.float32)
    if request.param == "triton":
        site = dispatch.Site(torch.device("cpu"), dtype, ())
        reason = triton_backend.usable() or triton_backend.accepts("aggregate", site, True)
        if reason:
            pytest.skip(reason)
    with nan_in_empty_memory(), ops.backend(request.param):
        yield request.param


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


@on_every_backend
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


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_aggregate_never_reads_what_the_formula_does_not(dtype):
    limit = 3e-7
    context = torch.full((4, 4), math.nan, dtype=dtype)
    context[2, 0], context[2, 1], context[1, 0] = 0.5, 0.25, 2.0
    row_mean = torch.tensor([0.3, 0.4, math.nan, math.nan], dtype=dtype)
    index, weight = torch.tensor([[2, 2], [2, 1]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=dtype)
    context.requires_grad_()
    weight.requires_grad_()
    _, coefficient = ops.aggregate(index, weight, torch.arange(4), row_mean, context)
    close(coefficient[:, 2:], torch.tensor([[0.15, 0.1, 0, 0], [0.375, 0.05, 0, 0]]).double(), limit)
    coefficient.sum().backward()
    close(weight.grad, torch.tensor([[1.25, 1.25], [1.25, 1.6]]).double(), limit)
    wanted = torch.zeros(4, 4).double()
    wanted[2, 0], wanted[2, 1], wanted[1, 0] = 0.45, 0.6, 0.15
    close(context.grad, wanted, limit)


@on_every_backend
def test_aggregate_lets_no_gradient_through_what_was_not_read():
    index, weight = torch.tensor([[0], [3]]), leaf(torch.ones(2, 1))
    context = leaf(torch.full((3, 3), 0.5))
    row_mean = torch.tensor([1.0, 1.0, 3.0, math.nan])  # the last task is not committed yet
    _, coefficient = ops.aggregate(index, weight, torch.tensor([0, 1, 1, 2]), row_mean, context)
    assert coefficient.tolist() == [[1, 0, 0, 0, 0], [1, 0.5, 0.5, 1.5, 0]]
    upstream = torch.ones_like(coefficient)
    upstream[0, 1:] = math.nan  # constants: a row of the first task looks back at nothing
    upstream[1, 4] = math.nan
    grads = torch.autograd.grad(coefficient, (weight, context), upstream)
    assert grads[0].tolist() == [[1], [3.5]]
    assert grads[1].tolist() == [[0, 0, 0], [0, 0, 0], [1, 4, 0]]
    _, coefficient = ops.aggregate(
        index[:1], torch.full((1, 1), math.inf), torch.tensor([0, 1, 1, 2]), row_mean, context
    )
    assert coefficient.tolist() == [[math.inf, 0, 0, 0, 0]]


def aggregate_grads(inputs, upstream):
    index, weight, row_task, row_mean, context = inputs
    weight, context = weight.detach().requires_grad_(), context.detach().requires_grad_()
    rows, coefficient = ops.aggregate(index, weight, row_task, row_mean, context)
    return rows, coefficient.detach(), torch.autograd.grad(coefficient, (weight, context), upstream)


def mix_grads(A, B, coefficient, index, upstream):
    inputs = [tensor.detach().requires_grad_() for tensor in (A, B, coefficient)]
    mixed = ops.mix_factors(*inputs, index)
    return [tensor.detach() for tensor in mixed], torch.autograd.grad(mixed, inputs, upstream)


def check_rule(found, plain, exact, slack):
    """No less exact than plain PyTorch in the same dtype, give or take `slack`, or within two roundings."""
    for ours, theirs, wanted in zip(found, plain, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert error(ours, wanted) <= max(slack * error(theirs, wanted), 2 * torch.finfo(ours.dtype).eps)


@on_every_backend
@pytest.mark.parametrize("case", aggregate_cases.CASES, ids=str)
def test_aggregate_is_as_exact_as_plain_pytorch(case, rng):
    inputs = aggregate_cases.make(case, torch.float32, rng)
    upstream = torch.randn(case.B, case.M + case.N, generator=rng)
    found = aggregate_grads(inputs, upstream)
    with ops.backend("reference"):
        plain = aggregate_grads(inputs, upstream)
        doubles = [t.double() if t.is_floating_point() else t for t in inputs]
        exact = aggregate_grads(doubles, upstream.double())
    assert torch.equal(found[0], plain[0])
    check_rule([found[1]], [plain[1]], [exact[1]], 2)
    check_rule(found[2], plain[2], exact[2], 3)


@on_every_backend
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", aggregate_cases.MIX_CASES, ids=str)
def test_mix_factors_is_as_exact_as_plain_pytorch(case, dtype, rng):
    inputs = aggregate_cases.make_mix(case, dtype, rng)
    upstream = [torch.randn(case.B, case.R, d, generator=rng).to(dtype) for d in (case.d_in, case.d_out)]
    found = mix_grads(*inputs, upstream)
    with ops.backend("reference"):
        plain = mix_grads(*inputs, upstream)
        doubles = [t.double() if t.is_floating_point() else t for t in inputs]
        exact = mix_grads(*doubles, [t.double() for t in upstream])
    check_rule(found[0], plain[0], exact[0], 2)
    check_rule(found[1], plain[1], exact[1], 3)


def same_bits(ours, before, backend):
    if backend == "reference":  # whose matrix products depend on the strides
        close(ours, before.double(), 2 * torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0)
    else:
        assert torch.equal(ours, before)


def scattered(tensor):
    """The same values, every second entry of a larger tensor from its second on."""
    wide = tensor.new_empty(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


@on_every_backend
def test_aggregate_takes_views_and_gives_the_same_bits_each_time(backend, rng):
    inputs = aggregate_cases.make(aggregate_cases.CASES[-1], torch.float32, rng)
    upstream = torch.randn(len(inputs[0]), inputs[0].shape[1] + len(inputs[2]), generator=rng)
    first = aggregate_grads(inputs, upstream)
    views = [scattered(tensor) for tensor in inputs]
    views[1] = inputs[1].t().contiguous().t()
    for again in (aggregate_grads(inputs, upstream), aggregate_grads(views, scattered(upstream))):
        for ours, before in zip((*again[:2], *again[2]), (*first[:2], *first[2]), strict=True):
            same_bits(ours, before, backend)


@on_every_backend
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_mix_factors_takes_views_and_gives_the_same_bits_each_time(dtype, backend, rng):
    A, B, coefficient, index = aggregate_cases.make_mix(aggregate_cases.MIX_CASES[2], dtype, rng)
    upstream = [torch.randn(2, 3, d, generator=rng).to(dtype) for d in (17, 33)]
    first = mix_grads(A, B, coefficient, index, upstream)
    layers = torch.stack([torch.full_like(A, math.nan), A], 1)  # the rows of one layer stand two rows apart
    views = layers[:, 1], scattered(B), coefficient.t().contiguous().t(), scattered(index)
    wide = torch.full((2, 3, 40), math.nan, dtype=dtype)
    wide[..., 3:20] = upstream[0]
    shifted = [wide[..., 3:20], upstream[1].transpose(0, 1).contiguous().transpose(0, 1)]
    again = mix_grads(A, B, coefficient, index, upstream), mix_grads(*views, shifted)
    for mixed, grads in again:
        for ours, before in zip((*mixed, *grads), (*first[0], *first[1]), strict=True):
            same_bits(ours, before, backend)


@on_every_backend
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_mix_factors_adds_up_repeated_rows(dtype, rng):
    A, B, _, _ = aggregate_cases.make_mix(aggregate_cases.MixCase(1, 1, 3, 2, 5, 7), dtype, rng)
    index, coefficient = torch.tensor([[1, 1, 2, 1], [1, 2, 2, 2]]), torch.tensor([[1.0, 2, 0, 4], [8, 0.5, 0.25, 0]])
    upstream = [torch.ones(2, 2, 5, dtype=dtype), 2 * torch.ones(1, dtype=dtype).expand(2, 2, 7)]
    mixed, grads = mix_grads(A, B, coefficient, index, upstream)
    for factor, out, grad, one in zip((A, B), mixed, grads, (1, 2), strict=False):
        close(out, torch.stack([7 * factor[1], 8 * factor[1] + 0.75 * factor[2]]).double(), torch.finfo(dtype).eps)
        assert torch.equal(grad, one * torch.tensor([0, 15, 0.75]).to(dtype).view(3, 1, 1).expand_as(factor))
    along = (A.double().sum((1, 2)) + 2 * B.double().sum((1, 2)))[index]
    close(grads[2], along, 1e-6)


@on_every_backend
def test_only_the_gradients_asked_for(rng):
    A, B, coefficient, index = aggregate_cases.make_mix(aggregate_cases.MIX_CASES[1], torch.float32, rng)
    inputs = [leaf(A), leaf(B), leaf(coefficient)]
    every = torch.autograd.grad([t.sum() for t in ops.mix_factors(*inputs, index)], inputs)
    for i, grad in enumerate(every):
        one = [tensor.detach() for tensor in inputs]
        one[i].requires_grad_()
        assert torch.equal(torch.autograd.grad(sum(t.sum() for t in ops.mix_factors(*one, index)), one[i])[0], grad)


@on_every_backend
def test_float64_arguments_beside_float32_ones_are_not_rounded(rng):
    index, weight, row_task, row_mean, _ = aggregate_cases.make(aggregate_cases.CASES[3], torch.float32, rng)
    context = leaf(torch.randn(9, 9, generator=rng, dtype=torch.float64))
    _, coefficient = ops.aggregate(index, weight, row_task, row_mean, context)
    wanted = loop_aggregate(index, weight.double(), row_task, row_mean.double(), context)[1]
    close(coefficient.detach(), wanted.detach(), 1e-12)
    close(torch.autograd.grad(coefficient.sum(), context)[0], torch.autograd.grad(wanted.sum(), context)[0], 1e-12)
    A, B, strength, index = aggregate_cases.make_mix(aggregate_cases.MIX_CASES[1], torch.float32, rng)
    B = torch.randn(B.shape, generator=rng, dtype=torch.float64)
    mixed, grads = mix_grads(A, B, strength, index, [torch.ones(3, 8, 40), torch.ones(3, 8, 24).double()])
    close(mixed[1], loop_mix(B, B, strength.double(), index)[1], 1e-12)
    assert [t.dtype for t in grads] == [torch.float32, torch.float64, torch.float32]


def test_triton_refuses_float64(rng):
    inputs = aggregate_cases.make_mix(aggregate_cases.MIX_CASES[1], torch.float64, rng)
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


def loop_mix(A, B, coefficient, index):
    mixed = []
    for factor in (A, B):
        total = factor.new_zeros(len(index), *factor.shape[1:]) + 0 * factor.sum()  # a graph even when empty
        for b in range(len(index)):
            for c, n in zip(coefficient[b], index[b].tolist(), strict=True):
                total = total.index_add(0, torch.tensor([b]), (c * factor[n]).unsqueeze(0))
        mixed.append(total)
    return mixed


@on_every_backend
@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("case", aggregate_cases.MIX_CASES, ids=str)
def test_mix_factors_matches_loop(case, dtype, rng):
    *inputs, index = aggregate_cases.make_mix(case, dtype, rng)
    inputs = [leaf(tensor) for tensor in inputs]
    exact = [leaf(tensor.double()) for tensor in inputs]
    found, wanted = ops.mix_factors(*inputs, index), loop_mix(*exact, index)
    limit = {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 1.01 * torch.finfo(dtype).eps)
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
