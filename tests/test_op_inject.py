"""`inject` and `inject_add` on every backend against loops written straight from their formula, in float64; gradients,
memory. The Triton kernels run both of their ways, and all empty memory holds NaN."""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cllava_fast import ops
from cllava_fast.ops import triton_backend
from cllava_fast.ops.inject import cases as inject_cases
from cllava_fast.ops.inject import reference as inject_reference
from tests.ops_helpers import LIBRARY, LOW, close, error, leaf, nan_in_empty_memory, run, trained
from tests.ops_helpers import inject_inputs as cpu_inputs

DEVICE = "cuda" if torch.cuda.is_available() and not triton_backend.INTERPRETED else "cpu"
TRITON = "cllava_fast.ops.inject.triton"


@pytest.fixture(params=["reference", "triton-gather", "triton-whole"])
def backend(request, monkeypatch):
    """The name of the backend that the test runs on."""
    name, _, way = request.param.partition("-")
    if way:
        refusal = triton_backend.usable()
        if refusal is not None:
            pytest.skip(refusal)
        monkeypatch.setattr(importlib.import_module(TRITON), "plan", lambda *sizes: way)
    with nan_in_empty_memory(), ops.backend(name):
        yield name


def skip_refused(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels have no float64")
    if backend == "triton" and dtype == torch.bfloat16 and triton_backend.INTERPRETED:
        pytest.skip("bfloat16 products are wrong in the interpreter")


def inject_inputs(case, dtype, rng):
    tensors = cpu_inputs(case, dtype, rng)
    return tuple(leaf(t.to(DEVICE)) if t.requires_grad else t.to(DEVICE) for t in tensors)


def normal(*shape, rng):
    return torch.randn(shape, generator=rng).to(DEVICE)


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


def limit(dtype, plain, exact, terms):
    """Twice the error of plain PyTorch in the same dtype. As plain may be lucky, at least two roundings of the result
    and a few roundings, in the accumulator (float32), of the sum of its terms' absolute values; very few numbers may
    all be small differences of large ones, which low precision rounds first."""
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    condition = (terms.max() / exact.abs().max().clamp(min=1e-12)).item() if exact.numel() else 1.0
    few = condition if exact.numel() < 8 else 1.0
    floor = max(2 * torch.finfo(dtype).eps * few, 4 * torch.finfo(accumulator).eps * condition)
    return max(2 * error(plain, exact), floor)


def check_against_loop(inputs, upstream):
    dtype = inputs[0].dtype
    y, grads = run(ops.inject, inputs, upstream, scale=0.5)
    exact_inputs, exact_upstream = doubled(inputs), upstream.to(dtype).double()
    exact_y, exact_grads = run(loop_inject, exact_inputs, exact_upstream, scale=0.5)
    absolute = tuple(leaf(t.abs()) if t.requires_grad else t.abs() for t in exact_inputs)
    terms_y, terms_grads = run(loop_inject, absolute, exact_upstream.abs(), scale=0.5)
    plain_y, plain_grads = run(plain_inject, inputs, upstream, scale=0.5)
    close(y, exact_y, limit(dtype, plain_y, exact_y, terms_y))
    assert y.dtype == dtype and y.is_contiguous()
    for grad, plain, exact, terms, tensor in zip(
        grads, plain_grads, exact_grads, terms_grads, trained(inputs), strict=True
    ):
        assert grad.dtype == tensor.dtype
        close(grad, exact, limit(dtype, plain, exact, terms))


@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("case", inject_cases.CASES + inject_cases.ODD, ids=str)
def test_inject_matches_loop(case, dtype, backend, rng):
    skip_refused(backend, dtype)
    check_against_loop(inject_inputs(case, dtype, rng), normal(case.B, case.S, case.d_out, rng=rng))


@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
def test_inject_add_is_inject_on_top(dtype, backend, rng):
    skip_refused(backend, dtype)
    x, weight, A, B, index, coefficient, _ = inject_inputs(inject_cases.CASES[3], dtype, rng)
    base = leaf(F.linear(x, weight))
    before = base.detach().clone()
    y = ops.inject_add(base, x, A, B, index, coefficient, 2.0)
    upstream = normal(*y.shape, rng=rng).to(dtype)
    exact_inputs = tuple(t.detach().double() for t in (x, weight, A, B, coefficient))
    exact, terms = (
        loop_inject(*tensors[:4], index, tensors[4], scale=2.0)
        for tensors in (exact_inputs, tuple(t.abs() for t in exact_inputs))
    )
    plain = plain_inject(x, weight, A, B, index, coefficient, scale=2.0)
    close(y, exact, limit(dtype, plain, exact, terms))
    if backend == "reference":  # the kernels of inject write the increments first, and so round in another order
        assert torch.equal(y, ops.inject(x, weight, A, B, index, coefficient, scale=2.0))
    assert torch.equal(base.detach(), before)
    grads = torch.autograd.grad(y, (base, x, A, B, coefficient), upstream)
    whole = torch.autograd.grad(
        ops.inject(x, weight, A, B, index, coefficient, scale=2.0), (x, A, B, coefficient), upstream
    )
    assert torch.equal(grads[0], upstream)
    assert all(torch.equal(a, b) for a, b in zip(grads[2:], whole[1:], strict=True))
    close(grads[1].double() + upstream.double() @ weight.double(), whole[0].double(), 4 * torch.finfo(dtype).eps)


def test_inject_gradcheck_in_every_subset(rng):  # in float64: of the reference
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
def test_inject_float32_factors_under_a_half_precision_model(dtype, backend, rng):
    skip_refused(backend, dtype)
    case = inject_cases.CASES[1]
    x, weight, A, B, index, coefficient, bias = inject_inputs(case, dtype, rng)
    A32, B32 = leaf(A.float()), leaf(B.float())
    upstream = normal(case.B, case.S, case.d_out, rng=rng)
    y, grads = run(ops.inject, (x, weight, A32, B32, index, coefficient, bias), upstream)
    same, same_grads = run(ops.inject, (x, weight, A, B, index, coefficient, bias), upstream)
    assert y.dtype == dtype and torch.equal(y, same)  # A32 holds values that dtype can hold
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32, torch.float32]
    assert torch.equal(grads[1].to(dtype), same_grads[1]) and torch.equal(grads[2].to(dtype), same_grads[2])


def transposed(tensor):  # same values, other strides, an offset
    wide = torch.stack([tensor, tensor]).transpose(0, -1).contiguous().transpose(0, -1)
    return wide[1]


def framed(tensor):
    """Same values amid ones that nothing may read: NaN, and indices that are out of range."""
    poison = torch.nan if tensor.is_floating_point() else 2**40
    frame = torch.full([size + 3 for size in tensor.shape], poison, dtype=tensor.dtype, device=tensor.device)
    view = frame[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("odd", [transposed, framed])
def test_inject_views(odd, backend, rng):
    case = inject_cases.CASES[1]
    x, weight, A, B, index, coefficient, bias = (t.detach() for t in inject_inputs(case, torch.float32, rng))
    wanted = ops.inject(x, weight, A, B, index, coefficient, bias)
    views = [odd(t) for t in (x, weight, A, B, index, coefficient, bias)]
    assert not views[0].is_contiguous()
    y = ops.inject(*views)
    assert y.is_contiguous() and torch.allclose(y, wanted, atol=1e-5)
    added = ops.inject_add(odd(wanted), *views[:1], *views[2:6])
    assert added.is_contiguous()
    assert torch.allclose(added, ops.inject_add(wanted, x, A, B, index, coefficient), atol=1e-5)
    inputs = tuple(
        leaf(v) if i in (0, 2, 3, 5) else v for i, v in enumerate((x, weight, A, B, index, coefficient, bias))
    )
    upstream = normal(*wanted.shape, rng=rng)
    _, grads = run(ops.inject, inputs, upstream)
    _, view_grads = run(
        ops.inject, tuple(v.requires_grad_(i in (0, 2, 3, 5)) for i, v in enumerate(views)), odd(upstream)
    )
    for grad, view_grad in zip(grads, view_grads, strict=True):
        assert torch.allclose(grad, view_grad, atol=1e-4)


def test_inject_is_the_frozen_linear_without_increments(backend, rng):
    inputs = inject_cases.make(inject_cases.CASES[1], torch.float32, rng)
    x, weight, A, B, index, coefficient, bias = (t.to(DEVICE) for t in inputs)
    frozen = F.linear(x, weight, bias)
    for y in (
        ops.inject(x, weight, A, B, index, torch.zeros_like(coefficient), bias),
        ops.inject(x, weight, A, torch.zeros_like(B), index, coefficient, bias),
    ):
        # bit for bit where both add the bias to the same product
        assert torch.equal(y, frozen) if DEVICE == "cpu" else torch.allclose(y, frozen, atol=1e-5)
    assert torch.equal(ops.inject(x, weight, A, B, index[:, :0], coefficient[:, :0], bias), frozen)
    added = ops.inject_add(frozen, x, A, B, index[:, :0], coefficient[:, :0])
    assert torch.equal(added, frozen) and added.data_ptr() != frozen.data_ptr()
    assert torch.equal(ops.inject_add(frozen, x, A, B, index, torch.zeros_like(coefficient)), frozen)


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


def test_inject_never_allocates_a_dense_offset(backend, rng):
    case = inject_cases.Case(B=2, S=3, d_in=96, d_out=80, N=6, R=4, P=5)
    inputs = inject_cases.make(case, torch.float32, rng)
    x, weight, A, B, index, coefficient, bias = (t.to(DEVICE) for t in inputs)
    run_by = inject_reference if backend == "reference" else importlib.import_module(TRITON)
    with Allocations() as seen:  # a mode sees nothing inside an op of torch.library: the kernels are called bare
        y = run_by.inject(x, weight, bias, A, B, index, coefficient, 1.0)
        run_by.inject_backward(y, x, weight, A, B, index, coefficient, 1.0, [True] * 4)
    assert A.numel() <= seen.largest < case.d_in * case.d_out


def test_inject_backward_keeps_and_computes_only_what_is_needed(backend, rng):
    x, weight, A, B, index, coefficient, bias = inject_inputs(inject_cases.CASES[1], torch.float32, rng)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.inject(x, weight, A.detach(), B.detach(), index, coefficient.detach(), bias)
        assert x.data_ptr() not in [t.data_ptr() for t in saved]
        saved.clear()
        ops.inject(x, weight, A, B, index, coefficient, bias)
    pointers = {t.data_ptr() for t in (x, weight, A, B, index, coefficient)}
    assert {t.data_ptr() for t in saved} == pointers  # aliases, no copies
    grad = torch.ones(2, 3, 24, device=DEVICE)
    pairs = (weight, A, B, index, coefficient, 1.0)
    everything = LIBRARY.inject_backward(grad, x, *pairs, [True] * 4)
    for needed in itertools.product([True, False], repeat=4):
        found = LIBRARY.inject_backward(grad, x if any(needed[1:]) else None, *pairs, needed)
        for wanted, tensor, full in zip(needed, found, everything, strict=True):
            assert torch.allclose(tensor, full, atol=1e-5) if wanted else tensor.numel() == 0


def test_inject_is_deterministic(backend, rng):
    inputs = inject_inputs(inject_cases.CASES[5], torch.float32, rng)
    upstream = normal(2, 5, 32, rng=rng)
    first_y, first = run(ops.inject, inputs, upstream)
    for _ in range(3):
        y, grads = run(ops.inject, inputs, upstream)
        assert torch.equal(y, first_y) and all(torch.equal(a, b) for a, b in zip(grads, first, strict=True))


@pytest.mark.parametrize("backend", ["triton-gather"], indirect=True)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("enough", [1, 10**6])
@pytest.mark.parametrize(("rank", "pairs"), [(3, 4), (3, 25)])
def test_inject_with_the_largest_and_the_smallest_tiles(rank, pairs, enough, dtype, backend, rng, monkeypatch):
    skip_refused(backend, dtype)
    launch = importlib.import_module("cllava_fast.ops.inject.triton_launch")
    monkeypatch.setattr(launch, "ENOUGH_PROGRAMS", enough)
    case = inject_cases.Case(B=2, S=140, d_in=70, d_out=66, N=5, R=rank, P=pairs)
    sizes = dtype, case.B, case.S, rank * pairs
    assert launch.one_pass(*sizes) == (enough == 1 and pairs == 4)
    largest = 128 if pairs == 25 and dtype != torch.float32 else 64
    assert launch.shrink_tiles(*sizes).tokens == (largest if enough == 1 else 16)
    check_against_loop(inject_inputs(case, dtype, rng), normal(case.B, case.S, case.d_out, rng=rng))


@pytest.mark.parametrize("backend", ["triton-gather"], indirect=True)
def test_segments_of_tokens_need_not_be_equal(backend, rng, monkeypatch):
    launch = importlib.import_module("cllava_fast.ops.inject.triton_launch")
    monkeypatch.setattr(launch, "ENOUGH_PROGRAMS", 6)
    left, right = normal(2, 140, 12, rng=rng), normal(2, 140, 70, rng=rng)
    partial = launch.outer(left, right)
    assert partial.shape == (2, 3, 12, 70)  # two tiles of tokens each, and one
    close(partial.sum(1).double(), left.double().transpose(1, 2) @ right.double(), 1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton-gather"], indirect=True)
def test_inject_never_reads_rows_that_nobody_selected(backend, rng):
    x, weight, A, B, index, coefficient, bias = inject_inputs(inject_cases.CASES[5], torch.float32, rng)
    index[index == 7] = 8
    with torch.no_grad():
        A[7], B[7] = torch.nan, torch.nan
    y, grads = run(ops.inject, (x, weight, A, B, index, coefficient, bias), normal(2, 5, 32, rng=rng))
    assert all(t.isfinite().all() for t in (y, *grads))
    assert not grads[1][7].any() and not grads[2][7].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_inject_keeps_an_overflow_in_the_row_that_made_it(backend, rng):
    x, weight, A, B, index, coefficient, bias = inject_inputs(inject_cases.CASES[5], torch.float16, rng)
    index[index == 7] = 8
    with torch.no_grad():
        A[7], B[7] = 6e4, 6e4  # products of this row are infinite
    y, grads = run(ops.inject, (x, weight, A, B, index, coefficient, bias), normal(2, 5, 32, rng=rng))
    assert all(t.isfinite().all() for t in (y, *grads))


def test_inject_beyond_32_bit_offsets(backend, rng):
    far = 2**31
    if DEVICE == "cpu":
        memory = torch.from_numpy(np.empty(far + 1024, np.float16))  # pages that nobody touches cost nothing
    else:
        memory = torch.empty(far + 1024, dtype=torch.float16, device=DEVICE)
    inputs = inject_inputs(inject_cases.Case(B=2, S=3, d_in=8, d_out=16, N=2, R=2, P=3), torch.float16, rng)
    x, weight, A, B, index, coefficient, bias = (t.detach() for t in inputs)

    def spread(tensor, start):
        view = memory[start:].as_strided(tensor.shape, (far, *tensor.stride()[1:]))
        return view.copy_(tensor)

    far_x, far_A, far_B = (spread(t, start) for t, start in ((x, 0), (A, 256), (B, 512)))
    y = ops.inject(x, weight, A, B, index, coefficient, bias)
    far_y = ops.inject(far_x, weight, far_A, far_B, index, coefficient, bias)
    limit = 4 * torch.finfo(torch.float16).eps
    close(far_y.double(), y.double(), limit)
    upstream = normal(*y.shape, rng=rng).half()
    grads = LIBRARY.inject_backward(upstream, x, weight, A, B, index, coefficient, 1.0, [True] * 4)
    far_grads = LIBRARY.inject_backward(upstream, far_x, weight, far_A, far_B, index, coefficient, 1.0, [True] * 4)
    for grad, far_grad in zip(grads, far_grads, strict=True):
        close(far_grad.double(), grad.double(), limit)


def test_the_whole_pool_is_projected_on_while_that_is_cheap():
    plan = pytest.importorskip(TRITON, reason="triton is not installed", exc_type=ImportError).plan
    assert plan(samples=4, pairs=4, rows=8, rank=8) == "whole"
    assert plan(samples=1, pairs=4, rows=8, rank=8) == "gather"
    assert plan(samples=16, pairs=4, rows=40, rank=8) == "gather"


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
