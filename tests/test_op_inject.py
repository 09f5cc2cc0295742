"""`inject` and `inject_add`: memory, what is never read, tiles, float32 factors, refusals; on every backend.

Their values and gradients on every case are in `test_ops.py`.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cllava_fast import ops
from cllava_fast.ops import dispatch, native
from cllava_fast.ops.inject import cases as inject_cases
from cllava_fast.ops.inject import reference as inject_reference
from cllava_fast.ops.inject import tiling
from cllava_fast.ops.inject.reference import Acting
from tests.ops_helpers import (
    DTYPES,
    INJECT,
    INJECT_TRITON,
    LIBRARY,
    LOW,
    close,
    far_apart,
    flat_acting,
    inject_backward,
    inject_inputs,
    leaf,
    on,
    on_every_backend,
    run,
)
from tests.test_ops import OPS, check

everywhere = on_every_backend("inject")
in_gathering_triton = on_every_backend("inject", only="triton-gather")
# Backends whose kernels are Python, to be called bare.
MODULES = {"reference": inject_reference.__name__, "triton": INJECT_TRITON}


@everywhere
@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
def test_inject_add_is_inject_on_top(dtype, backend, rng):
    case = inject_cases.CASES[3]
    x, weight, A, B, index, coefficient, _ = inject_inputs(case, dtype, rng, backend.device)
    base = leaf(F.linear(x, weight))
    before = base.detach().clone()
    y = ops.inject_add(base, x, A, B, index, coefficient, 2.0)
    whole = ops.inject(x, weight, A, B, index, coefficient, scale=2.0)
    if backend.name == "reference":  # the others may write the increments first, and so round in another order
        assert torch.equal(y, whole)
    assert torch.equal(base.detach(), before)
    upstream = torch.randn(y.shape, generator=rng).to(y)
    grads = torch.autograd.grad(y, (base, x, A, B, coefficient), upstream)
    whole_grads = torch.autograd.grad(whole, (x, A, B, coefficient), upstream)
    assert torch.equal(grads[0], upstream)
    assert all(torch.equal(a, b) for a, b in zip(grads[2:], whole_grads[1:], strict=True))
    close(grads[1].double() + upstream.double() @ weight.double(), whole_grads[0].double(), 4 * torch.finfo(dtype).eps)


@on_every_backend("inject", only="reference")
def test_inject_gradcheck_in_every_subset(backend, rng):  # in float64: of the reference
    case = inject_cases.Case(2, 3, 5, 4, 3, 2, 4, past=2, Q=3)
    x, weight, A, B, index, coefficient, bias = inject_inputs(case, torch.float64, rng)
    past_A, past_B, past_coefficient = inject_cases.make_past(case, torch.float64, rng)
    everything = (x, A, B, coefficient, leaf(past_coefficient))

    def on_linear(x, A, B, c, past):
        return ops.inject(x, weight, A, B, index, c, bias, 0.7, past=(past_A, past_B, past))

    def on_any(x, A, B, c, past):
        return ops.inject_add(x[..., :4] * 2, x, A, B, index, c, 0.7, past=(past_A, past_B, past))

    for subset in ((0,), (1,), (2,), (3,), (4,), (1, 2), (0, 3), (0, 4), (0, 1, 2, 3, 4)):
        args = [t if i in subset else t.detach() for i, t in enumerate(everything)]
        assert torch.autograd.gradcheck(on_linear, args)
        assert torch.autograd.gradcheck(on_any, args)


@on_every_backend("inject", only="reference")
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
def test_inject_gradcheck_of_routers(per_token, shared, backend, rng):
    case = inject_cases.Case(2, 3, 5, 4, 3, 2, 4, past=2, Q=3, per_token=per_token, shared=shared)
    x, weight, A, B, index, coefficient, bias = inject_inputs(case, torch.float64, rng)
    past = inject_cases.make_past(case, torch.float64, rng)

    def call(x, A, B, coefficient):
        return ops.inject(x, weight, A, B, index, coefficient, bias, 0.7, past=past)

    for subset in ((0,), (1,), (2,), (3,), (1, 2), (0, 3), (0, 1, 2, 3)):
        args = [t if i in subset else t.detach() for i, t in enumerate((x, A, B, coefficient))]
        assert torch.autograd.gradcheck(call, args)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_past_is_the_same_as_more_pairs(dtype, backend, rng):
    case = inject_cases.CASES[9]
    x, weight, A, B, index, coefficient, bias = inject_inputs(case, dtype, rng, backend.device)
    past = on(backend.device, inject_cases.make_past(case, dtype, rng))
    y = ops.inject(x, weight, A, B, index, coefficient, bias, past=past)
    both = torch.cat([A, past.A]), torch.cat([B, past.B])
    every = torch.arange(case.past, device=backend.device).expand(case.B, -1) + case.N
    pairs = torch.cat([index, every], 1), torch.cat([coefficient, past.coefficient], 1)
    close(y, ops.inject(x, weight, *both, *pairs, bias).double(), 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize(
    ("tokens", "rows", "added_up"),  # in inject, and in inject_add, where the sum takes part in two products more
    [(64, 2, (False, False)), (64, 4, (True, False)), (6, 4, (False, False)), (64, 8, (True, True))],
)
@pytest.mark.parametrize("on_top", [False, True])
def test_a_past_that_acts_alike_is_added_up_where_that_is_less(tokens, rows, added_up, on_top, rng, monkeypatch):
    case = inject_cases.Case(B=2, S=tokens, d_in=16, d_out=32, N=3, R=2, P=2, past=rows, Q=4, alike=True)
    x, weight, A, B, index, coefficient, bias = inject_inputs(case, torch.float64, rng)
    alike = inject_cases.make_past(case, torch.float64, rng)
    by_sample = alike._replace(coefficient=alike.coefficient.expand(2, -1))
    sums = count_sums(monkeypatch)
    upstream, found = torch.randn(2, tokens, 32, generator=rng, dtype=torch.float64), []
    for past in alike, by_sample:
        past = past._replace(coefficient=leaf(past.coefficient))
        if on_top:
            y = ops.inject_add(x @ weight.t(), x, A, B, index, coefficient, 0.5, past=past)
        else:
            y = ops.inject(x, weight, A, B, index, coefficient, bias, 0.5, past=past)
        *grads, to_past = torch.autograd.grad(y, (x, A, B, coefficient, past.coefficient), upstream)
        found.append((y, *grads, to_past.sum(0)))
    assert len(sums) == added_up[on_top]
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_past_that_is_added_up_is_not_rounded_away_in_the_weight(autocast, rng, monkeypatch):
    """Its entries are below half of a weight's last bit, and over d_in they come to a few units."""
    dtype = torch.float32 if autocast else torch.bfloat16
    x, weight = torch.ones(2, 64, 256, dtype=dtype), 1.25 - 2.5 * (torch.arange(256) % 2).to(dtype).expand(8, -1)
    past = ops.Past(torch.ones(16, 1, 256), torch.ones(16, 1, 8), torch.full((1, 16), 0.003 / 16))
    nothing = torch.zeros(1, 1, 256), torch.zeros(1, 1, 8), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1)
    sums = count_sums(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ops.inject(x, weight, *nothing, past=past)
    assert len(sums) == 1
    close(y.double(), torch.full_like(y, 256 * 0.003).double(), 2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [2, 64])  # at which the past is not added up, and is
def test_inject_of_meta_tensors_has_a_shape(tokens, dtype, rng):
    case = inject_cases.Case(B=2, S=tokens, d_in=16, d_out=32, N=3, R=2, P=2, past=8, Q=4, alike=True)
    x, weight, A, B, index, coefficient, bias = on("meta", inject_inputs(case, dtype, rng))
    past = on("meta", inject_cases.make_past(case, dtype, rng))
    y = ops.inject(x, weight, A, B, index, coefficient, bias, past=past)
    again = ops.inject_add(y, x, A, B, index, coefficient, past=past)
    assert again.device.type == "meta" and again.dtype == y.dtype == dtype and again.shape == y.shape == (2, tokens, 32)
    with pytest.raises(ValueError, match="weight: has dtype torch.float64"):
        ops.inject(x, weight.double(), A, B, index, coefficient, past=past)


def count_sums(monkeypatch):
    """A list that grows by one each time a past is added up."""
    module, sums = importlib.import_module(INJECT), []
    added_up = module.added_up
    monkeypatch.setattr(module, "added_up", lambda *given: sums.append(given) or added_up(*given))
    return sums


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_inject_float32_factors_under_a_half_precision_model(dtype, backend, rng):
    case = inject_cases.CASES[1]
    x, weight, A, B, index, coefficient, bias = inject_inputs(case, dtype, rng, backend.device)
    A32, B32 = leaf(A.float()), leaf(B.float())
    upstream = torch.randn(case.B, case.S, case.d_out, generator=rng).to(backend.device)
    y, grads = run(ops.inject, (x, weight, A32, B32, index, coefficient, bias), upstream)
    same, same_grads = run(ops.inject, (x, weight, A, B, index, coefficient, bias), upstream)
    assert y.dtype == dtype and torch.equal(y, same)  # A32 holds values that dtype can hold
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32, torch.float32]
    assert torch.equal(grads[1].to(dtype), same_grads[1]) and torch.equal(grads[2].to(dtype), same_grads[2])


@everywhere
def test_inject_is_the_frozen_linear_without_increments(backend, rng):
    inputs = inject_cases.make(inject_cases.CASES[1], torch.float32, rng)
    x, weight, A, B, index, coefficient, bias = on(backend.device, inputs)
    frozen = F.linear(x, weight, bias)
    for y in (
        ops.inject(x, weight, A, B, index, torch.zeros_like(coefficient), bias),
        ops.inject(x, weight, A, torch.zeros_like(B), index, coefficient, bias),
    ):
        # bit for bit where both add the bias to the same product
        assert torch.equal(y, frozen) if backend.device == "cpu" else torch.allclose(y, frozen, atol=1e-5)
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


@everywhere
def test_inject_never_allocates_a_dense_offset(backend, rng):
    case = inject_cases.Case(B=2, S=3, d_in=96, d_out=80, N=6, R=4, P=5)
    inputs = inject_cases.make(case, torch.float32, rng)
    x, weight, A, B, index, coefficient, bias = on(backend.device, inputs)
    module = MODULES.get(backend.name)
    if module is None:
        pytest.skip("what is no PyTorch inside allocates nothing that a mode could see")
    run_by = importlib.import_module(module)
    given = Acting(*flat_acting(A, B, index, coefficient, whole=backend.way == "whole"))
    with Allocations() as seen:  # a mode sees nothing inside an op of torch.library: the kernels are called bare
        y, *lows = run_by.inject(x, weight, bias, given, True)
        run_by.inject_backward(y, x, weight, given, *lows, [True] * 5)
    assert A.numel() <= seen.largest < case.d_in * case.d_out


@everywhere
def test_inject_backward_keeps_and_computes_only_what_is_needed(backend, rng):
    x, weight, A, B, index, coefficient, bias = inject_inputs(inject_cases.CASES[1], torch.float32, rng, backend.device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.inject(x, weight, A.detach(), B.detach(), index, coefficient.detach(), bias)
        assert x.data_ptr() not in [t.data_ptr() for t in saved]
        saved.clear()
        ops.inject(x, weight, A, B, index, coefficient, bias)
    pointers = {t.data_ptr() for t in (x, weight, A, B, index, coefficient)}
    own = [t for t in saved if t.data_ptr() not in pointers]  # beside aliases: x in the small space, and no past
    assert len({t.data_ptr() for t in saved}) == len(pointers) + 1 + (0 in [t.numel() for t in own])
    whole = importlib.import_module("cllava_fast.ops.inject").plan(backend.device, 2, 4, 5, 8) == "whole"
    assert max(t.numel() for t in own) == 2 * 3 * 8 * (5 if whole else 4)


@everywhere
@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_inject_takes_factors_of_any_dtypes(dtypes, backend, rng):
    case = inject_cases.CASES[1]
    x, weight, A, B, index, coefficient, bias = inject_inputs(case, torch.bfloat16, rng, backend.device)

    def results(of_A, of_B):  # which hold the same values, those of bfloat16
        factors = leaf(A.to(of_A)), leaf(B.to(of_B))
        y = ops.inject(x, weight, *factors, index, coefficient, bias)
        acting = flat_acting(*factors, index, coefficient, whole=backend.way == "whole")
        bare = inject_backward(y.detach(), x.detach(), weight, acting, [True] * 5)  # without autograd, which casts
        assert [grad.dtype for grad in bare[1:3]] == [of_A, of_B]
        return y, *torch.autograd.grad(y.sum(), (x, *factors, coefficient))

    for found, exact in zip(results(*dtypes), results(torch.bfloat16, torch.bfloat16), strict=True):
        close(found, exact.double(), 4 * torch.finfo(torch.bfloat16).eps)


@everywhere
def test_inject_returns_projections_only_where_they_are_asked_for(backend, rng):
    case = inject_cases.CASES[9]
    x, weight, A, B, index, coefficient, bias = inject_inputs(case, torch.float32, rng, backend.device)
    past = on(backend.device, inject_cases.make_past(case, torch.float32, rng))
    increments = flat_acting(A, B, index, coefficient, past=past, whole=backend.way == "whole")
    for save in (True, False):
        _, *lows = LIBRARY.inject(x.detach(), weight, bias, *increments, save)
        assert (sum(low.numel() for low in lows) > 0) == save


def routed(case, dtype, rng, backend):
    """Inputs, unless the backend refuses them."""
    refusal = backend.refusal("inject", dtype, case._asdict())
    if refusal is not None:
        pytest.skip(refusal)
    return inject_inputs(case, dtype, rng, backend.device)


@everywhere
@pytest.mark.parametrize("per_token", [False, True], ids=["sample", "token"])
def test_inject_projects_on_a_shared_A_once(per_token, backend, rng):
    case = inject_cases.Case(B=2, S=3, d_in=400, d_out=12, N=6, R=4, P=5, per_token=per_token, shared=True)
    x, weight, A, B, index, coefficient, bias = routed(case, torch.float32, rng, backend)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.inject(x, weight, A, B, index, coefficient, bias)
    pointers = {t.data_ptr() for t in (x, weight, A, B, index, coefficient)}
    assert [t.shape for t in saved if t.data_ptr() not in pointers and t.numel()] == [(2, 3, case.R)]
    if backend.name not in MODULES:
        return  # a mode sees no allocation of what is no PyTorch inside
    run_by = importlib.import_module(MODULES[backend.name])
    given = Acting(*flat_acting(A, B, index, coefficient, whole=backend.way == "whole"))
    with Allocations() as seen:
        y, *lows = run_by.inject(x.detach(), weight, bias, given, True)
        run_by.inject_backward(y, x, weight, given, *lows, [True] * 5)
    assert seen.largest < case.N * case.R * case.d_in


@everywhere
@pytest.mark.parametrize("case", [inject_cases.ROUTED[1], inject_cases.ROUTED[3], inject_cases.ROUTED[5]], ids=str)
def test_inject_of_routers_computes_only_what_is_needed(case, backend, rng):
    only_what_is_needed(case, backend, rng, ((True,) * 5, *itertools.permutations((True, *(False,) * 4), 5)))


@everywhere
def test_inject_backward_computes_only_what_is_needed(backend, rng):
    only_what_is_needed(inject_cases.CASES[9], backend, rng, itertools.product([True, False], repeat=5))


def only_what_is_needed(case, backend, rng, subsets):
    x, weight, A, B, index, coefficient, bias = inject_inputs(case, torch.float32, rng, backend.device)
    past = on(backend.device, inject_cases.make_past(case, torch.float32, rng))
    increments = flat_acting(A, B, index, coefficient, past=past, whole=backend.way == "whole")
    grad = torch.ones(case.B, case.S, case.d_out, device=backend.device)
    _, *lows = LIBRARY.inject(x, weight, bias, *increments, True)
    everything = LIBRARY.inject_backward(grad, x, weight, *increments, *lows, [True] * 5)
    for needed in dict.fromkeys(subsets):
        need_x, need_A, *others = needed
        given = x if need_A else None, weight if need_x else None
        kept = lows if any(others) else [torch.empty(0, device=backend.device)] * 2
        found = LIBRARY.inject_backward(grad, *given, *increments, *kept, needed)
        for wanted, tensor, full in zip(needed, found, everything, strict=True):
            assert torch.allclose(tensor, full, atol=1e-5) if wanted else tensor.numel() == 0


@in_gathering_triton
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("enough", [1, 10**6])
@pytest.mark.parametrize(("rank", "pairs"), [(3, 4), (3, 25)])
def test_inject_with_the_largest_and_the_smallest_tiles(rank, pairs, enough, dtype, backend, rng, monkeypatch):
    monkeypatch.setattr(tiling, "ENOUGH_PROGRAMS", enough)
    case = inject_cases.Case(B=2, S=140, d_in=70, d_out=66, N=5, R=rank, P=pairs)
    sizes = dtype, case.B, case.S, rank * pairs
    assert tiling.one_pass(*sizes) == (enough == 1 and pairs == 4)
    largest = 128 if pairs == 25 and dtype != torch.float32 else 64
    assert tiling.shrink_tiles(*sizes).tokens == (largest if enough == 1 else 16)
    check(OPS["inject"], case, dtype, backend, rng, views=False)


@in_gathering_triton
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_inject_of_routers_in_one_pass(dtype, backend, rng, monkeypatch):
    monkeypatch.setattr(tiling, "ENOUGH_PROGRAMS", 1)
    case = inject_cases.Case(B=1, S=140, d_in=20, d_out=24, N=4, R=3, P=2, per_token=True)
    assert tiling.one_pass(dtype, case.B, case.S, case.P * case.R)
    check(OPS["inject"], case, dtype, backend, rng, views=False)


@in_gathering_triton
def test_segments_of_tokens_need_not_be_equal(backend, rng, monkeypatch):
    launch = importlib.import_module("cllava_fast.ops.inject.triton_launch")
    monkeypatch.setattr(tiling, "ENOUGH_PROGRAMS", 6)
    left, right = (torch.randn(2, 140, width, generator=rng).to(backend.device) for width in (12, 70))
    partial = launch.outer(left, right)
    assert partial.shape == (2, 3, 12, 70)  # two tiles of tokens each, and one
    close(partial.sum(1).double(), left.double().transpose(1, 2) @ right.double(), 1e-5)


@everywhere
def test_inject_never_reads_rows_that_nobody_selected(backend, rng):
    x, weight, A, B, index, coefficient, bias = inject_inputs(inject_cases.CASES[5], torch.float32, rng, backend.device)
    if backend.way == "whole":
        pytest.skip("projects on the whole pool by design, and keeps out what is finite")
    index[index == 7] = 8
    with torch.no_grad():
        A[7], B[7] = torch.nan, torch.nan
    upstream = torch.randn(2, 5, 32, generator=rng).to(backend.device)
    y, grads = run(ops.inject, (x, weight, A, B, index, coefficient, bias), upstream)
    assert all(t.isfinite().all() for t in (y, *grads))
    assert not grads[1][7].any() and not grads[2][7].any()


@everywhere
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_inject_keeps_an_overflow_in_the_row_that_made_it(backend, rng):
    x, weight, A, B, index, coefficient, bias = inject_inputs(inject_cases.CASES[5], torch.float16, rng, backend.device)
    index[index == 7] = 8
    with torch.no_grad():
        A[7], B[7] = 6e4, 6e4  # products of this row are infinite
    upstream = torch.randn(2, 5, 32, generator=rng).to(backend.device)
    y, grads = run(ops.inject, (x, weight, A, B, index, coefficient, bias), upstream)
    assert all(t.isfinite().all() for t in (y, *grads))


@everywhere
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_inject_of_routers_keeps_an_overflow_in_the_row_that_made_it(shared, backend, rng):
    case = inject_cases.ROUTED[0]._replace(shared=shared)
    x, weight, A, B, index, coefficient, bias = routed(case, torch.float16, rng, backend)
    with torch.no_grad():
        index[:] = torch.arange(4)
        coefficient[:, :, 3] = 0
        (B if shared else A)[3] = 6e4  # products of this row are infinite
        B[3] = 6e4
    upstream = torch.randn(2, 5, case.d_out, generator=rng).to(backend.device)
    y, (to_x, to_A, to_B, to_coefficient) = run(ops.inject, (x, weight, A, B, index, coefficient, bias), upstream)
    assert all(t.isfinite().all() for t in (y, to_x, to_A, to_B, to_coefficient[:, :, :3]))


@everywhere
def test_inject_beyond_32_bit_offsets(backend, rng):
    case = inject_cases.Case(B=2, S=3, d_in=8, d_out=16, N=2, R=2, P=3)
    inputs = inject_cases.make(case, torch.float16, rng)
    x, weight, A, B, index, coefficient, bias = on(backend.device, inputs)
    far_x, far_A, far_B = map(far_apart, (x, A, B))
    y = ops.inject(x, weight, A, B, index, coefficient, bias)
    far_y = ops.inject(far_x, weight, far_A, far_B, index, coefficient, bias)
    limit = 4 * torch.finfo(torch.float16).eps
    close(far_y, y.double(), limit)
    upstream = torch.randn(y.shape, generator=rng).to(y)
    whole = backend.way == "whole"
    increments = flat_acting(A, B, index, coefficient, whole=whole)
    far = flat_acting(far_A, far_B, index, coefficient, whole=whole)
    grads = inject_backward(upstream, x, weight, increments, [True] * 5)
    far_grads = inject_backward(upstream, far_x, weight, far, [True] * 5)
    for grad, far_grad in zip(grads, far_grads, strict=True):
        close(far_grad, grad.double(), limit)


def test_the_whole_pool_is_projected_on_while_that_is_cheap():
    plan = importlib.import_module(INJECT).plan
    assert plan("cuda", samples=4, pairs=4, rows=8, rank=8) == "whole"
    assert plan("cuda", samples=1, pairs=4, rows=8, rank=8) == "gather"
    assert plan("cuda", samples=16, pairs=4, rows=40, rank=8) == "gather"
    assert plan("cpu", samples=4, pairs=4, rows=8, rank=8) == "gather"
    assert plan("cpu", samples=4, pairs=8, rows=8, rank=8) == "gather"
    assert plan("cpu", samples=4, pairs=8, rows=8, rank=8, per_token=True) == "whole"
    assert plan("cpu", samples=4, pairs=7, rows=8, rank=8, shared=True) == "gather"
    assert plan("cuda", samples=4, pairs=4, rows=8, rank=8, per_token=True) == "whole"
    assert plan("cuda", samples=4, pairs=4, rows=8, rank=8, shared=True) == "gather"


@pytest.mark.parametrize(("change", "why"), [({"per_token": True}, "of each token"), ({"shared": True}, "share one A")])
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_native_kernels_say_what_they_do_not_carry(backend, change, why):
    case = inject_cases.Case(B=2, S=1, d_in=8, d_out=8, N=4, R=2, P=3)
    device = torch.device("cpu" if backend == "cpu" or native.EMULATED else "cuda")
    for said in ({}, change):
        sizes = tuple(
            {name: int(size) for name, size in (case._asdict() | said).items() if name != "selection"}.items()
        )
        refusal = dispatch._refusal("inject", backend, dispatch.Site(device, torch.float32, sizes), asked=True)
        assert refusal is None or "kernel for" in refusal or backend == "cuda" and "built" in refusal
        if said and "built" not in (refusal or ""):
            assert why in refusal


def test_a_token_s_coefficients_are_its_sample_s_in_decoding(rng):
    case = inject_cases.ROUTED[6]
    x, weight, A, B, index, coefficient, bias = inject_cases.make(case, torch.float32, rng)
    chosen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            dispatch, "choose", lambda op, site, choose=dispatch.choose: chosen.append(site) or choose(op, site)
        )
        y = ops.inject(x, weight, A, B, index, coefficient, bias)
    assert chosen and "per_token" not in dict(chosen[0].sizes)
    assert torch.equal(y, ops.inject(x, weight, A, B, index, coefficient[:, 0], bias))


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
        ({"coefficient": torch.zeros(2, 5, 3)}, "coefficient: expected .* S = 4"),
        ({"coefficient": torch.zeros(2, 4, 2)}, "coefficient: expected .* P = 3"),
        ({"coefficient": torch.zeros(6)}, "coefficient: expected 2 dimensions"),
        ({"A": torch.zeros(1, 3, 8)}, "B: expected .* R = 3"),
        ({"A": torch.zeros(1, 2, 7)}, "A: expected .* d_in = 8"),
        ({"A": torch.zeros(1, 2, 8), "index": torch.full((2, 3), 5)}, r"index: .* \[0, N\) = \[0, 5\)"),
        ({"coefficient": torch.zeros(2, 3).half()}, "coefficient: expected torch.float32"),
        ({"coefficient": torch.zeros(2, 3).double()}, "coefficient: expected torch.float32"),
        ({"x": None}, "x: expected a tensor, got NoneType"),
        ({"A": [1.0]}, "A: expected a tensor, got list"),
        ({"bias": 2.0}, "bias: expected a tensor, got float"),
        ({"scale": None}, "scale: expected a number, got NoneType"),
        ({"scale": torch.nn.Parameter(torch.ones(()))}, "scale: expected a number, got Parameter"),
        ({"past": {"A": 1, "B": 2, "coefficient": 3}}, "past.A: expected a tensor, got str"),
        ({"past": (torch.zeros(4, 7, 9), torch.zeros(4, 7, 6), torch.zeros(2, 4))}, r"past.A: expected .* d_in = 8"),
        ({"past": (torch.zeros(4, 7, 8), torch.zeros(4, 1, 6), torch.zeros(2, 4))}, r"past.B: expected .* Q = 7"),
        ({"past": (torch.zeros(4, 7, 8), torch.zeros(4, 7, 6), torch.zeros(2, 3))}, "past.coefficient: .* C = 4"),
        (
            {"past": (torch.zeros(4, 7, 8, requires_grad=True), torch.zeros(4, 7, 6), torch.zeros(2, 4))},
            "past.A: requires a gradient.*frozen",
        ),
        (
            {"past": (torch.zeros(4, 7, 8), torch.zeros(4, 7, 6), torch.zeros(2, 4).half())},
            "past.coefficient: expected torch.float32",
        ),
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
