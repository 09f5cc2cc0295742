"""`inject` and `inject_add` against loops written straight from their formula, in float64; gradients, memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cllava_fast import ops
from cllava_fast.ops.inject import cases as inject_cases
from cllava_fast.ops.inject import reference as inject_reference
from tests.ops_helpers import LIBRARY, LOW, close, error, inject_inputs, leaf, run, trained


def loop_inject(x, weight, A, B, index, coefficient, bias=None, scale=1.0):
    """Per sample, per pair, the increment as a dense matrix: the formula itself."""
    samples = []
    for b in range(len(x)):
        dense = weight
        for c, n in zip(coefficient[b], index[b].tolist(), strict=True):
            dense = dense + scale * c * (B[n].t() @ A[n])
        samples.append(x[b] @ dense.t() + (0 if bias is None else bias))
    return torch.stack(samples) if samples else x @ weight.t()


def plain_inject(x, weight, A, B, index, coefficient, bias=None, scale=1.0):
    """What a user would write in the model's dtype, left to autograd."""
    y = F.linear(x, weight, bias)
    low = torch.einsum("bsd,bprd->bspr", x, A[index].to(x.dtype)) * (scale * coefficient).to(x.dtype)[:, None, :, None]
    return y + torch.einsum("bspr,bpro->bso", low, B[index].to(x.dtype))


def doubled(inputs):
    return tuple(leaf(t.double()) if t.requires_grad else (t.double() if t.is_floating_point() else t) for t in inputs)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("case", inject_cases.CASES, ids=str)
def test_inject_matches_loop(case, dtype, rng):
    inputs = inject_inputs(case, dtype, rng)
    upstream = torch.randn(case.B, case.S, case.d_out, generator=rng)
    y, grads = run(ops.inject, inputs, upstream, scale=0.5)
    exact_y, exact_grads = run(loop_inject, doubled(inputs), upstream.to(dtype).double(), scale=0.5)
    plain_y, plain_grads = run(plain_inject, inputs, upstream, scale=0.5)
    floor = 2 * torch.finfo(dtype).eps
    close(y, exact_y, max(2 * error(plain_y, exact_y), floor))
    assert y.dtype == dtype
    for grad, plain, exact, tensor in zip(grads, plain_grads, exact_grads, trained(inputs), strict=True):
        assert grad.dtype == tensor.dtype
        close(grad, exact, max(3 * error(plain, exact), floor))


@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
def test_inject_add_is_inject_on_top(dtype, rng):
    x, weight, A, B, index, coefficient, _ = inject_inputs(inject_cases.CASES[3], dtype, rng)
    base = leaf(F.linear(x, weight))
    before = base.detach().clone()
    y = ops.inject_add(base, x, A, B, index, coefficient, 2.0)
    upstream = torch.randn(y.shape, generator=rng).to(dtype)
    assert torch.equal(y, ops.inject(x, weight, A, B, index, coefficient, scale=2.0))
    assert torch.equal(base.detach(), before)
    grads = torch.autograd.grad(y, (base, x, A, B, coefficient), upstream)
    whole = torch.autograd.grad(
        ops.inject(x, weight, A, B, index, coefficient, scale=2.0), (x, A, B, coefficient), upstream
    )
    assert torch.equal(grads[0], upstream)
    assert all(torch.equal(a, b) for a, b in zip(grads[2:], whole[1:], strict=True))
    close(grads[1].double() + upstream.double() @ weight.double(), whole[0].double(), 4 * torch.finfo(dtype).eps)


def test_inject_gradcheck_in_every_subset(rng):
    x, weight, A, B, index, coefficient, bias = inject_inputs(
        inject_cases.Case(2, 3, 5, 4, 3, 2, 4), torch.float64, rng
    )
    everything = (x, A, B, coefficient)
    for subset in ((0,), (1,), (2,), (3,), (1, 2), (0, 3), (0, 1, 2, 3)):
        args = [t if i in subset else t.detach() for i, t in enumerate(everything)]
        whole = lambda x, A, B, c: ops.inject(x, weight, A, B, index, c, bias, 0.7)  # noqa: E731
        added = lambda x, A, B, c: ops.inject_add(x[..., :4] * 2, x, A, B, index, c, 0.7)  # noqa: E731
        assert torch.autograd.gradcheck(whole, args)
        assert torch.autograd.gradcheck(added, args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inject_float32_factors_under_a_half_precision_model(dtype, rng):
    case = inject_cases.CASES[1]
    x, weight, A, B, index, coefficient, bias = inject_inputs(case, dtype, rng)
    A32, B32 = leaf(A.float()), leaf(B.float())
    upstream = torch.randn(case.B, case.S, case.d_out, generator=rng)
    y, grads = run(ops.inject, (x, weight, A32, B32, index, coefficient, bias), upstream)
    same, same_grads = run(ops.inject, (x, weight, A, B, index, coefficient, bias), upstream)
    assert y.dtype == dtype and torch.equal(y, same)  # A32 holds values that dtype can hold
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32, torch.float32]
    assert torch.equal(grads[1].to(dtype), same_grads[1]) and torch.equal(grads[2].to(dtype), same_grads[2])


def test_inject_views(rng):
    case = inject_cases.CASES[1]
    x, weight, A, B, index, coefficient, bias = (t.detach() for t in inject_inputs(case, torch.float32, rng))
    wanted = ops.inject(x, weight, A, B, index, coefficient, bias)

    def odd(tensor):  # same values, other strides, an offset
        wide = torch.stack([tensor, tensor]).transpose(0, -1).contiguous().transpose(0, -1)
        return wide[1]

    views = [odd(t) for t in (x, weight, A, B, index, coefficient, bias)]
    assert not views[0].is_contiguous()
    y = ops.inject(*views)
    assert y.is_contiguous() and torch.allclose(y, wanted, atol=1e-5)
    inputs = tuple(
        leaf(v) if i in (0, 2, 3, 5) else v for i, v in enumerate((x, weight, A, B, index, coefficient, bias))
    )
    upstream = torch.randn(wanted.shape, generator=rng)
    _, grads = run(ops.inject, inputs, upstream)
    _, view_grads = run(
        ops.inject, tuple(v.requires_grad_(i in (0, 2, 3, 5)) for i, v in enumerate(views)), odd(upstream)
    )
    for grad, view_grad in zip(grads, view_grads, strict=True):
        assert torch.allclose(grad, view_grad, atol=1e-4)


def test_inject_is_the_frozen_linear_without_increments(rng):
    x, weight, A, B, index, coefficient, bias = inject_cases.make(inject_cases.CASES[1], torch.float32, rng)
    frozen = F.linear(x, weight, bias)
    assert torch.equal(ops.inject(x, weight, A, B, index, torch.zeros_like(coefficient), bias), frozen)
    assert torch.equal(ops.inject(x, weight, A, torch.zeros_like(B), index, coefficient, bias), frozen)
    assert torch.equal(ops.inject(x, weight, A, B, index[:, :0], coefficient[:, :0], bias), frozen)
    added = ops.inject_add(frozen, x, A, B, index[:, :0], coefficient[:, :0])
    assert torch.equal(added, frozen) and added.data_ptr() != frozen.data_ptr()


class Allocations(TorchDispatchMode):
    """Sizes of everything that any op returned."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, tensor.numel())
        return result


def test_inject_never_allocates_a_dense_offset(rng):
    case = inject_cases.Case(B=2, S=3, d_in=96, d_out=80, N=6, R=4, P=5)
    x, weight, A, B, index, coefficient, bias = inject_cases.make(case, torch.float32, rng)
    with Allocations() as seen:  # a mode sees nothing inside an op of torch.library: the kernels are called bare
        y = inject_reference.inject(x, weight, bias, A, B, index, coefficient, 1.0)
        inject_reference.inject_backward(y, x, weight, A, B, index, coefficient, 1.0, [True] * 4)
    gathered = case.B * case.P * case.R * case.d_in
    assert gathered <= seen.largest < case.d_in * case.d_out


def test_inject_backward_keeps_and_computes_only_what_is_needed(rng):
    x, weight, A, B, index, coefficient, bias = inject_inputs(inject_cases.CASES[1], torch.float32, rng)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.inject(x, weight, A.detach(), B.detach(), index, coefficient.detach(), bias)
        assert x.data_ptr() not in [t.data_ptr() for t in saved]
        saved.clear()
        ops.inject(x, weight, A, B, index, coefficient, bias)
    pointers = {t.data_ptr() for t in (x, weight, A, B, index, coefficient)}
    assert {t.data_ptr() for t in saved} == pointers  # aliases, no copies
    args = torch.ones(2, 3, 24), None, None, A, B, index, coefficient, 1.0
    assert [t.numel() for t in LIBRARY.inject_backward(*args[:2], weight, *args[3:], [True] + [False] * 3)] == [
        240,
        0,
        0,
        0,
    ]


def test_inject_is_deterministic(rng):
    inputs = inject_inputs(inject_cases.CASES[5], torch.float32, rng)
    upstream = torch.randn(2, 5, 32, generator=rng)
    first_y, first = run(ops.inject, inputs, upstream)
    for _ in range(3):
        y, grads = run(ops.inject, inputs, upstream)
        assert torch.equal(y, first_y) and all(torch.equal(a, b) for a, b in zip(grads, first, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 8)}, "x: expected 3 dimensions"),
        ({"weight": torch.zeros(6, 7)}, "weight: expected .* d_in = 8"),
        ({"weight": torch.zeros(6, 8).bfloat16()}, "weight: has dtype torch.bfloat16 but x has torch.float32"),
        ({"weight": torch.zeros(6, 8, requires_grad=True)}, "weight: requires a gradient.*frozen"),
        ({"bias": torch.zeros(5)}, "bias: expected .* d_out = 6"),
        ({"bias": torch.zeros(6, requires_grad=True)}, "bias: requires a gradient.*frozen"),
        ({"A": torch.zeros(5, 2, 7)}, "A: expected .* d_in = 8"),
        ({"A": torch.zeros(5, 2, 8).int()}, "A: expected a floating dtype"),
        ({"B": torch.zeros(4, 2, 6)}, "B: expected .* N = 5"),
        ({"B": torch.zeros(5, 3, 6)}, "B: expected .* R = 2"),
        ({"index": torch.zeros(3, 3).long()}, "index: expected .* B = 2"),
        ({"index": torch.full((2, 3), 5)}, r"index: expected entries in \[0, N\) = \[0, 5\)"),
        ({"coefficient": torch.zeros(2, 4)}, "coefficient: expected .* P = 3"),
        ({"coefficient": torch.zeros(2, 3).half()}, "coefficient: expected torch.float32"),
        ({"coefficient": torch.zeros(2, 3).double()}, "coefficient: expected torch.float32"),
    ],
)
def test_inject_refuses(change, message):
    arguments = {
        "x": torch.zeros(2, 4, 8),
        "weight": torch.zeros(6, 8),
        "A": torch.zeros(5, 2, 8),
        "B": torch.zeros(5, 2, 6),
        "index": torch.zeros(2, 3).long(),
        "coefficient": torch.zeros(2, 3),
    }
    with pytest.raises(ValueError, match=message):
        ops.inject(**(arguments | change))
    if not {"weight", "bias"} & set(change):
        del arguments["weight"]
        with pytest.raises(ValueError, match=message):
            ops.inject_add(torch.zeros(2, 4, 6), **(arguments | change))
