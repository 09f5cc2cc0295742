"""The ops in torch.library: opcheck, compilation, autocast, checkpointing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from cllava_fast import ops
from cllava_fast.ops.aggregate import cases as aggregate_cases
from cllava_fast.ops.inject import cases as inject_cases
from cllava_fast.ops.select import cases as select_cases
from tests.ops_helpers import LIBRARY, inject_inputs, leaf, run


def samples(rng):
    """One call of each op, most with a gradient to compute; the backward ops too."""
    query, keys, allowed = select_cases.make(select_cases.CASES[4], torch.float32, rng)
    index, _, grad = (t.detach() for t in ops.select(query, keys, 2, allowed, 3))
    yield LIBRARY.select, (query, leaf(keys), 2, allowed, 3, False)
    yield LIBRARY.select, (query, leaf(keys), 4, None, 1, True)
    yield LIBRARY.select_backward, (grad, query, keys, index, 3, True)
    index, weight, *rest, context = aggregate_cases.make(aggregate_cases.CASES[1], torch.float32, rng)
    yield LIBRARY.aggregate, (index, leaf(weight), *rest, leaf(context))
    yield LIBRARY.aggregate_backward, (torch.ones(4, 28), index, weight, *rest, context, [True, True])
    A, B, coefficient, index = aggregate_cases.make_mix(aggregate_cases.MIX_CASES[1], torch.bfloat16, rng)
    yield LIBRARY.mix_factors, (leaf(A), leaf(B), leaf(coefficient), index)
    grads = torch.ones(3, 8, 40).bfloat16(), torch.ones(3, 8, 24).bfloat16()
    yield LIBRARY.mix_factors_backward, (*grads, A, B, coefficient, index, [True, False, True])
    x, weight, A, B, index, coefficient, bias = inject_inputs(inject_cases.CASES[1], torch.float32, rng)
    pairs = A, B, index, coefficient, 0.5
    y = torch.ones(2, 3, 24)
    yield LIBRARY.inject, (x, weight, bias, *pairs)
    yield LIBRARY.inject, (leaf(x.transpose(0, 1)[:2]), weight, None, leaf(A.bfloat16()), *pairs[1:])
    yield LIBRARY.inject_add, (leaf(y), x, *pairs)
    yield LIBRARY.inject_add, (leaf(y), x, A.detach(), B.detach(), index, coefficient.detach(), 0.5)
    frozen = A.detach(), B.detach(), index, coefficient.detach(), 0.5
    yield LIBRARY.inject_backward, (y, x.detach(), None, *frozen, [True, True, True, True])
    yield LIBRARY.inject_backward, (y, None, weight, *frozen, [True, False, False, False])


def test_opcheck(rng):
    for op, args in samples(rng):
        opcheck(op.default, args)


def chain(query, keys, row_task, row_mean, context, x, weight, A, B):
    """All of the ops in one function, as a patched layer runs them."""
    index, strength, similarity = ops.select(query, keys, 2, groups=2)
    index, coefficient = ops.aggregate(index, strength, row_task, row_mean, context)
    y = ops.inject(x, weight, A, B, index, coefficient, scale=0.5)
    A_mix, B_mix = ops.mix_factors(A, B, coefficient, index)
    own = torch.arange(len(x), device=x.device).unsqueeze(1)
    return ops.inject_add(y, x, A_mix, B_mix, own, torch.ones_like(own, dtype=torch.float32)), similarity


def chain_inputs(rng, samples=3, tokens=4):
    normal = lambda *shape: torch.randn(shape, generator=rng)  # noqa: E731
    query, keys, context = normal(samples, 8), normal(6, 8), normal(3, 3)
    x, weight, A, B = normal(samples, tokens, 12), normal(10, 12), normal(6, 2, 12), normal(6, 2, 10)
    row_task, row_mean = torch.arange(6) // 2, torch.rand(6, generator=rng)
    return query, leaf(keys), row_task, row_mean, leaf(context), leaf(x), weight, leaf(A), leaf(B)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_whole_with_dynamic_shapes(rng, autocast):
    torch._dynamo.reset()
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True, dynamic=True)
    for samples_, tokens in ((3, 4), (5, 7), (2, 9)):
        inputs = chain_inputs(rng, samples_, tokens)
        leaves = [t for t in inputs if t.requires_grad]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            wanted, found = chain(*inputs), compiled(*inputs)
        assert found[0].dtype == wanted[0].dtype == (torch.bfloat16 if autocast else torch.float32)
        grads = [torch.autograd.grad(out[0].sum() + out[1].sum(), leaves) for out in (wanted, found)]
        for a, b in zip((*wanted, *grads[0]), (*found, *grads[1]), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    torch._dynamo.reset()


def test_autocast_follows_linear(rng):
    x, weight, A, B, index, coefficient, bias = inject_inputs(inject_cases.CASES[1], torch.float32, rng)
    upstream = torch.randn(2, 3, 24, generator=rng)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, weight.half(), bias).dtype == torch.bfloat16
        y, grads = run(ops.inject, (x, weight, A, B, index, coefficient, bias), upstream)  # backward inside as well
        added = ops.inject_add(F.linear(x, weight, bias), x, A, B, index, coefficient)
        index64, weights, similarity = ops.select(x[:, 0], A[:, 0].detach(), 2)
        _, mixed = ops.mix_factors(A, B, coefficient, index)
    half = leaf(x.detach().bfloat16()), weight.bfloat16(), A, B, index, coefficient, bias.bfloat16()
    wanted, wanted_grads = run(ops.inject, half, upstream)
    assert y.dtype == torch.bfloat16 and torch.equal(y, wanted) and torch.equal(added, y)
    assert [g.dtype for g in grads] == [torch.float32] * 4
    assert all(torch.equal(a, b.float()) for a, b in zip(grads, wanted_grads, strict=True))
    plain = ops.select(x[:, 0], A[:, 0].detach(), 2)
    assert all(torch.equal(a, b) for a, b in zip((index64, weights, similarity), plain, strict=True))
    assert torch.equal(mixed, ops.mix_factors(A, B, coefficient, index)[1]) and mixed.dtype == torch.float32


def test_activation_checkpointing(rng):
    inputs = chain_inputs(rng)
    leaves = [t for t in inputs if t.requires_grad]
    plain, again = chain(*inputs), checkpoint(chain, *inputs, use_reentrant=False)
    grads = [torch.autograd.grad(out[0].sum() + out[1].sum(), leaves) for out in (plain, again)]
    for a, b in zip((*plain, *grads[0]), (*again, *grads[1]), strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_are_refused(rng):
    *inputs, A, B = chain_inputs(rng)
    similarity = ops.select(inputs[0], inputs[1], 2)[2]
    mixed = ops.mix_factors(A, B, torch.ones(1, 2), torch.zeros(1, 2).long())[0]
    _, past = ops.aggregate(torch.full((1, 1), 5), torch.ones(1, 1), *inputs[2:5])
    y = ops.inject(inputs[5], inputs[6], A, B, torch.zeros(3, 1).long(), torch.ones(3, 1))
    for output, tensor in ((similarity, inputs[1]), (mixed, A), (past, inputs[4]), (y, A)):
        square = output.square().sum()
        (grad,) = torch.autograd.grad(square, tensor, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            grad.sum().backward()


def test_values_are_checked_only_where_they_can_be_read(rng):
    inputs = list(chain_inputs(rng))
    inputs[0] = torch.full_like(inputs[0], math.nan)
    with pytest.raises(ValueError, match="query"):
        chain(*inputs)
    torch._dynamo.reset()
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    assert compiled(*inputs)[1].isnan().all()  # visible, not hidden
    meta = [t.detach().to("meta") for t in chain_inputs(rng)]
    assert chain(*meta)[0].shape == (3, 4, 10)
    torch._dynamo.reset()
