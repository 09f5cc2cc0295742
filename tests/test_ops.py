"""Every op on every backend in every dtype on every case, by one procedure: outputs and gradients against float64.

A backend enters by its line in `ops_helpers.BACKENDS`; an op by its entry in `OPS`, a case by its op's `cases.py`. The
error may be at most twice that of plain PyTorch in the same dtype, and three times for gradients. Empty memory holds
NaN, and everything runs a second time on views: with other strides, from an offset on, amid NaN.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from cllava_fast import ops
from cllava_fast.ops import triton_backend
from cllava_fast.ops.aggregate import cases as aggregate_cases
from cllava_fast.ops.inject import cases as inject_cases
from cllava_fast.ops.merge import cases as merge_cases
from cllava_fast.ops.select import cases as select_cases
from cllava_fast.ops.select_aggregate import cases as select_aggregate_cases
from tests.ops_helpers import DTYPES, LOW, Backend, backends, error, framed, leaf, on, transposed

SCALE = 0.5  # of inject


class Op(NamedTuple):
    """What the procedure needs to know of an op. Functions take the case and then the inputs."""

    cases: tuple[Any, ...]
    make: Callable[..., tuple[Any, ...]]  # (case, dtype, rng) -> inputs
    call: Callable[..., tuple[torch.Tensor, ...]]  # the public function
    formula: Callable[..., tuple[torch.Tensor, ...]]  # the same straight from the definition, in the inputs' dtype
    plain: Callable[..., tuple[torch.Tensor, ...]]  # plain PyTorch in the same dtype; runs on the reference
    trained: tuple[int, ...]  # inputs that get a gradient, where they are given
    source: tuple[int, ...]  # outputs that it comes from
    shapes: Callable[[Any], list[tuple[int, ...]]]  # of those
    limit: Callable[[Measured], float]  # of the error
    dtypes: tuple[torch.dtype, ...] = DTYPES
    draws: int = 1  # of plain's error: one draw of a few numbers may be lucky
    repeated: tuple[int, ...] = ()  # cases that must repeat themselves bit for bit
    redraws: int = 0  # at most, where very few numbers are small differences of large ones, which are all rounding


class Measured(NamedTuple):
    """One output or gradient, and what the limit of its error depends on."""

    ours: torch.Tensor
    exact: torch.Tensor  # in float64
    terms: torch.Tensor  # the sum that `exact` is, of its terms' absolute values
    plain_error: float
    gradient: bool
    dtype: torch.dtype  # of the inputs
    outputs: list[torch.Tensor]  # all that are exact


class Result(NamedTuple):
    outputs: list[torch.Tensor]
    grads: list[torch.Tensor]


def run(op: Op, function: Callable[..., Any], case: Any, inputs: tuple[Any, ...], upstream: list[Any]) -> Result:
    outputs = function(case, *inputs)
    sources = [outputs[i] for i in op.source]
    wanted = [inputs[i] for i in op.trained if i < len(inputs)]
    upstream = [up.to(out.dtype) for up, out in zip(upstream, sources, strict=True)]
    grads = torch.autograd.grad(sources, wanted, upstream, allow_unused=True) if wanted else []
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted, strict=True)]
    return Result([output.detach() for output in outputs], grads)


def changed(inputs: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Any, ...]:
    """Inputs whose tensors went through `change`, leaves as before."""
    return tuple(
        change(t.detach()).detach().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
        for t in inputs
    )


def to_double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def to_magnitude(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().abs() if tensor.is_floating_point() else tensor


def any_view(rng: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: (transposed, framed)[torch.randint(2, (), generator=rng)](tensor)


# -- the ops ---------------------------------------------------------------------------------------------------------


def select(case: Any, query: Any, keys: Any, allowed: Any) -> tuple[torch.Tensor, ...]:
    return ops.select(query, keys, case.M, allowed, case.groups, case.reduce)


def select_formula(case: Any, query: Any, keys: Any, allowed: Any) -> tuple[torch.Tensor, ...]:
    chunks = [F.normalize(t.reshape(len(t), case.groups, case.D // case.groups), dim=2) for t in (query, keys)]
    table = torch.einsum("bgd,ngd->bn", *chunks) / case.groups
    allowed = torch.ones_like(table, dtype=torch.bool) if allowed is None else allowed.expand(table.shape)
    if case.reduce == "batch":
        table, allowed = table.mean(0).expand(table.shape), allowed.all(0).expand(table.shape)
    ranked = table.float().masked_fill(~allowed, -torch.inf).sort(dim=1, descending=True, stable=True)
    index = ranked.indices[:, : case.M]
    similarity = table.gather(1, index)
    positive = similarity.clamp(min=0)
    total = positive.sum(1, keepdim=True)
    return index, torch.where(total < 1e-6, 1 / case.M, positive / total), similarity


def select_plain(case: Any, query: Any, keys: Any, allowed: Any) -> tuple[torch.Tensor, ...]:
    exact = torch.promote_types(keys.dtype, torch.float32)
    index, weight, similarity = select_formula(case, query.to(exact), keys.to(exact), allowed)
    return index, weight.float(), similarity


def make_select(case: Any, dtype: torch.dtype, rng: torch.Generator) -> tuple[Any, ...]:
    """Inputs whose ranks float32 can tell apart."""
    while True:
        query, keys, allowed = select_cases.make(case, dtype, rng)
        if (ranked(case, query, keys, allowed).diff(dim=1) < -1e-6).all():
            return query, leaf(keys), allowed


def ranked(case: Any, query: Any, keys: Any, allowed: Any) -> torch.Tensor:
    """Similarities of the selected rows and of the next one, if there is one."""
    one_more = case._replace(M=min(case.M + 1, case.N))
    return select_formula(one_more, query.double(), keys.double(), allowed)[2]


def select_limit(m: Measured) -> float:
    eps = torch.finfo(m.ours.dtype).eps
    if m.ours.dtype == torch.float64:  # in one dimension the gradient is 0, and all of it rounding
        return (
            1e-12 / (m.exact.abs().max().item() or 1e-12) if m.gradient and (m.outputs[2].abs() == 1).all() else 1e-12
        )
    if m.gradient:
        return max(3 * m.plain_error, 2 * eps)
    # in float32, cosines close to 0 are not as close to each other
    share = m.outputs[2].clamp(min=0).sum(1).min().clamp(1e-3, 1).item() if len(m.ours) else 1.0
    return min(1e-6 / share, max(2 * m.plain_error, 2 * eps / share))


def aggregate(case: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:
    return ops.aggregate(*inputs)


def aggregate_formula(
    case: Any, index: Any, weight: Any, row_task: Any, row_mean: Any, context: Any
) -> tuple[torch.Tensor, ...]:
    own = row_task[index].unsqueeze(2)  # [B, M, 1]
    reads = row_task < own  # [B, M, N]
    past = (weight.unsqueeze(2) * torch.where(reads, context[own, row_task] * row_mean, 0)).sum(1)  # [B, N]
    every = torch.arange(case.N, device=index.device).expand(case.B, case.N)
    return torch.cat([index, every], 1), torch.cat([weight, past], 1)


def make_aggregate(case: Any, dtype: torch.dtype, rng: torch.Generator) -> tuple[Any, ...]:
    index, weight, *rest, context = aggregate_cases.make(case, dtype, rng)
    return index, leaf(some_zero(weight)), *rest, leaf(context)


def select_aggregate(case: Any, query: Any, keys: Any, allowed: Any, *tasks: Any) -> tuple[torch.Tensor, ...]:
    return ops.select_aggregate(query, keys, case.M, *tasks, allowed, case.groups, case.reduce)


def select_aggregate_formula(case: Any, query: Any, keys: Any, allowed: Any, *tasks: Any) -> tuple[torch.Tensor, ...]:
    index, weight, _ = select_formula(case, query, keys, allowed)
    return aggregate_formula(case, index, weight, *tasks)


def select_aggregate_plain(case: Any, query: Any, keys: Any, allowed: Any, *tasks: Any) -> tuple[torch.Tensor, ...]:
    index, weight, _ = select_plain(case, query, keys, allowed)
    return ops.aggregate(index, weight, *tasks)


def make_select_aggregate(case: Any, dtype: torch.dtype, rng: torch.Generator) -> tuple[Any, ...]:
    """Similarities as for select, and not so small that the weights are less exact than what becomes of them."""
    while True:
        query, keys, allowed, row_task, row_mean, context = select_aggregate_cases.make(case, dtype, rng)
        similarity = ranked(case, query, keys, allowed)
        total = similarity[:, : case.M].clamp(min=0).sum(1)
        if (similarity.diff(dim=1) < -1e-6).all() and ((total == 0) | (total > 0.1)).all():
            return query, keys, allowed, row_task, row_mean, leaf(context)


def select_aggregate_limit(m: Measured) -> float:
    return min(1e-5, max((3 if m.gradient else 2) * m.plain_error, 20 * torch.finfo(torch.float32).eps))


def mix_factors(case: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:
    return ops.mix_factors(*inputs)


def mix_factors_formula(case: Any, A: Any, B: Any, coefficient: Any, index: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.einsum("bp,bprd->brd", coefficient, factor[index]) for factor in (A, B))


def make_mix_factors(case: Any, dtype: torch.dtype, rng: torch.Generator) -> tuple[Any, ...]:
    A, B, coefficient, index = aggregate_cases.make_mix(case, dtype, rng)
    return leaf(A), leaf(B), leaf(some_zero(coefficient)), index


def aggregate_limit(m: Measured) -> float:
    return rounding_limit(m, 3e-6)


def mix_factors_limit(m: Measured) -> float:
    return rounding_limit(m, 2e-5)


def rounding_limit(m: Measured, most: float) -> float:
    """The rule, and never more than one rounding of an exact result, or `most` in float32. As plain may be lucky, a few
    roundings of the sum of its terms' absolute values are no error."""
    eps = torch.finfo(m.ours.dtype).eps
    if m.ours.dtype == torch.float64:
        return 1e-12
    condition = (m.terms.max() / m.exact.abs().max().clamp(min=1e-12)).item() if m.exact.numel() else 1.0
    rule = max((3 if m.gradient else 2) * m.plain_error, 2 * eps, 4 * torch.finfo(torch.float32).eps * condition)
    return min(rule, most if m.ours.dtype == torch.float32 else 1.01 * eps)


def inject(case: Any, x: Any, weight: Any, A: Any, B: Any, index: Any, coefficient: Any, bias: Any, *past: Any) -> Any:
    return (ops.inject(x, weight, A, B, index, coefficient, bias, SCALE, past=past or None),)


def dense_offset(A: Any, B: Any, index: Any, coefficient: Any, *past: Any) -> torch.Tensor:
    """Each sample's increment as a dense matrix, [B, 1, d_out, d_in], or each token's, [B, S, d_out, d_in]."""
    by_token = coefficient if coefficient.dim() == 3 else coefficient.unsqueeze(1)
    dense = torch.einsum("bsp,bpro,bpri->bsoi", by_token, B[index], A.expand(len(B), -1, -1)[index])
    if past:
        dense = dense + torch.einsum("bc,cro,cri->boi", past[2], past[1], past[0]).unsqueeze(1)
    return SCALE * dense


def inject_formula(case: Any, x: Any, weight: Any, *rest: Any) -> Any:
    *pairs, bias = rest[:5]
    return (on_dense(x, weight + dense_offset(*pairs, *rest[5:])) + bias,)


def on_dense(x: Any, dense: Any) -> torch.Tensor:
    """Of all tokens where dense has one for each sample."""
    return torch.einsum("bsi,bsoi->bso", x, dense)


def inject_plain(case: Any, x: Any, weight: Any, *rest: Any) -> Any:
    """What a user would write in the model's dtype."""
    *pairs, bias = rest[:5]
    return inject_add_plain(case, F.linear(x, weight, bias), x, *pairs, *rest[5:])


def make_inject(case: Any, dtype: torch.dtype, rng: torch.Generator) -> tuple[Any, ...]:
    x, weight, A, B, index, coefficient, bias = inject_cases.make(case, dtype, rng)
    past = inject_cases.make_past(case, dtype, rng)
    past = () if past is None else (past.A, past.B, leaf(some_zero(past.coefficient)))
    return leaf(x), weight, leaf(A), leaf(B), index, leaf(some_zero(coefficient)), bias, *past


def inject_add(case: Any, y: Any, x: Any, A: Any, B: Any, index: Any, coefficient: Any, *past: Any) -> Any:
    return (ops.inject_add(y, x, A, B, index, coefficient, SCALE, past=past or None),)


def inject_add_formula(case: Any, y: Any, x: Any, *pairs: Any) -> Any:
    return (y + on_dense(x, dense_offset(*pairs)),)


def inject_add_plain(case: Any, y: Any, x: Any, A: Any, B: Any, index: Any, coefficient: Any, *past: Any) -> Any:
    y = y + rows_on(x, A.expand(len(B), -1, -1)[index], B[index], coefficient)
    if past:
        every = torch.arange(len(past[0]), device=x.device).expand(len(x), -1)
        y = y + rows_on(x, past[0][every], past[1][every], past[2])
    return (y,)


def rows_on(x: Any, A: Any, B: Any, coefficient: Any) -> torch.Tensor:  # A [B, P, R, d_in], B [B, P, R, d_out]
    by_token = coefficient if coefficient.dim() == 3 else coefficient.unsqueeze(1)
    strength = (SCALE * by_token).to(x.dtype).unsqueeze(3)
    low = torch.einsum("bsi,bpri->bspr", x, A.to(x.dtype)) * strength
    return torch.einsum("bspr,bpro->bso", low, B.to(x.dtype))


def make_inject_add(case: Any, dtype: torch.dtype, rng: torch.Generator) -> tuple[Any, ...]:
    x, weight, A, B, index, coefficient, bias, *past = make_inject(case, dtype, rng)
    return leaf(F.linear(x, weight, bias)), x, A, B, index, coefficient, *past


def merge(case: Any, *inputs: Any) -> Any:
    return (ops.merge(*inputs, SCALE),)


def merge_formula(case: Any, weight: Any, A: Any, B: Any, index: Any, coefficient: Any) -> Any:
    return (weight + SCALE * torch.einsum("p,pro,pri->oi", coefficient, B[index], A[index]),)


def merge_plain(case: Any, weight: Any, A: Any, B: Any, index: Any, coefficient: Any) -> Any:
    scaled = (SCALE * coefficient).to(weight.dtype)[:, None, None] * B[index]
    return (weight + torch.einsum("pro,pri->oi", scaled, A[index]),)


def inject_limit(m: Measured) -> float:
    """Twice the error of plain PyTorch in the same dtype. As plain may be lucky, at least two roundings of the result
    and a few roundings, in the accumulator (float32), of the sum of its terms' absolute values; very few numbers may
    all be small differences of large ones, which low precision rounds first."""
    accumulator = torch.float64 if m.dtype == torch.float64 else torch.float32
    condition = (m.terms.max() / m.exact.abs().max().clamp(min=1e-12)).item() if m.exact.numel() else 1.0
    few = condition if m.exact.numel() < 8 else 1.0
    floor = max(2 * torch.finfo(m.dtype).eps * few, 4 * torch.finfo(accumulator).eps * condition)
    return max(2 * m.plain_error, floor)


def some_zero(coefficient: torch.Tensor) -> torch.Tensor:
    """Coefficients among which some are padding."""
    return coefficient.where(coefficient.abs() > 0.1, 0)


OPS = {
    "select": Op(
        select_cases.CASES, make_select, select, select_formula, select_plain,
        trained=(1,), source=(2,), shapes=lambda c: [(c.B, c.M)], limit=select_limit, draws=30, repeated=(3, 5, 8),
    ),
    "aggregate": Op(
        aggregate_cases.CASES, make_aggregate, aggregate, aggregate_formula, aggregate,
        trained=(1, 4), source=(1,), shapes=lambda c: [(c.B, c.M + c.N)], limit=aggregate_limit,
        dtypes=(torch.float32, torch.float64), draws=10, repeated=(3, 6), redraws=8,
    ),
    "select_aggregate": Op(
        select_aggregate_cases.CASES,
        make_select_aggregate, select_aggregate, select_aggregate_formula, select_aggregate_plain,
        trained=(5,), source=(1,), shapes=lambda c: [(c.B, c.M + c.N)], limit=select_aggregate_limit,
        draws=10, repeated=(2, 6, 7), redraws=8,
    ),
    "mix_factors": Op(
        aggregate_cases.MIX_CASES, make_mix_factors, mix_factors, mix_factors_formula, mix_factors,
        trained=(0, 1, 2), source=(0, 1), shapes=lambda c: [(c.B, c.R, c.d_in), (c.B, c.R, c.d_out)],
        limit=mix_factors_limit, draws=10, repeated=(2, 4), redraws=8,
    ),
    "inject": Op(
        inject_cases.CASES + inject_cases.ODD + inject_cases.ROUTED, make_inject, inject, inject_formula, inject_plain,
        trained=(0, 2, 3, 5, 9), source=(0,), shapes=lambda c: [(c.B, c.S, c.d_out)], limit=inject_limit,
        repeated=(3, 5, 9, 12, -15, -12, -10),
    ),
    "inject_add": Op(
        (
            *inject_cases.CASES[:4], *inject_cases.CASES[6:], inject_cases.ODD[0], inject_cases.ODD[-1],
            *inject_cases.ROUTED[:5],
        ),
        make_inject_add, inject_add, inject_add_formula, inject_add_plain,
        trained=(0, 1, 2, 3, 5, 8), source=(0,), shapes=lambda c: [(c.B, c.S, c.d_out)], limit=inject_limit,
        repeated=(3, 8),
    ),
    "merge": Op(
        merge_cases.CASES, merge_cases.make, merge, merge_formula, merge_plain,
        trained=(), source=(), shapes=lambda c: [], limit=inject_limit, repeated=(3,),
    ),
}  # fmt: skip


def everything(repeated: bool = False) -> Iterator[Any]:
    for name, op in OPS.items():
        for backend in backends(name):
            for case in [op.cases[i] for i in op.repeated] if repeated else op.cases:
                dtypes = op.dtypes[:2] if repeated else op.dtypes
                for dtype in one_low(dtypes, f"{name}-{case}") if interpreted(backend) else dtypes:
                    yield pytest.param(name, (backend, name), case, dtype, id=f"{name}-{backend}-{case}-{dtype}")


def interpreted(backend: Backend) -> bool:
    return backend.name == "triton" and triton_backend.INTERPRETED


def one_low(dtypes: tuple[torch.dtype, ...], key: str) -> list[torch.dtype]:
    """Of bfloat16 and float16, which take the same way through a kernel, one: the interpreter takes long for each."""
    left_out = LOW[1 + zlib.crc32(f"{os.environ['CLLAVA_TEST_SEED']} {key}".encode()) % 2]
    return [dtype for dtype in dtypes if dtype is not left_out]


def draw(op: Op, case: Any, dtype: torch.dtype, device: str, rng: torch.Generator) -> tuple[tuple[Any, ...], list[Any]]:
    """Inputs and gradients of the outputs that have one."""
    inputs = on(device, op.make(case, dtype, rng))
    values = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in op.shapes(case)]
    return inputs, [on(device, value.to(dtype)) for value in values]


@pytest.mark.parametrize(("op", "backend", "case", "dtype"), list(everything()), indirect=["backend"])
def test_conforms(op, case, dtype, backend, rng):
    check(OPS[op], case, dtype, backend, rng)


def is_all_rounding(exact: torch.Tensor, terms: torch.Tensor) -> bool:
    """Whether very few numbers are all small differences of large ones."""
    if not exact.is_floating_point():
        return False
    return 0 < int(terms.count_nonzero()) < 8 and bool(terms.max() > 16 * exact.abs().max())


def check(op: Op, case: Any, dtype: torch.dtype, backend: Any, rng: torch.Generator, views: bool = True) -> None:
    for _ in range(1 + op.redraws):
        inputs, upstream = draw(op, case, dtype, backend.device, rng)
        doubles = [up.double() for up in upstream]
        exact = run(op, op.formula, case, changed(inputs, to_double), doubles)
        terms = run(op, op.formula, case, changed(inputs, to_magnitude), [up.abs() for up in doubles])
        if not any(is_all_rounding(*pair) for pair in zip(flat(exact), flat(terms), strict=True)):
            break
    with ops.backend("reference"):
        plain = run(op, op.plain, case, inputs, upstream)
    plain_errors = [errors(plain, exact)]
    size = sum(t.numel() for t in inputs if isinstance(t, torch.Tensor))
    for _ in range(min(op.draws, 5 + 2**17 // max(1, size)) - 1):
        plain_errors.append(errors_of_plain(op, case, *draw(op, case, dtype, backend.device, rng)))
    usual = [max(column) for column in zip(*plain_errors, strict=True)]

    every = [run(op, op.call, case, inputs, upstream)]
    if views:
        view = any_view(rng)
        every.append(run(op, op.call, case, changed(inputs, view), [view(up) for up in upstream]))
    for found in every:
        assert all(output.is_contiguous() for output in found.outputs)
        for i, (ours, theirs, wanted, term, plain_error) in enumerate(
            zip(*map(flat, (found, plain, exact, terms)), usual, strict=True)
        ):
            assert ours.dtype == theirs.dtype
            if ours.is_floating_point():
                gradient = i >= len(found.outputs)
                measured = Measured(ours, wanted, term, plain_error, gradient, dtype, exact.outputs)
                assert error(ours, wanted) <= op.limit(measured), f"{'gradient' if gradient else 'output'} {i}"
            else:
                assert torch.equal(ours, wanted)


def errors_of_plain(op: Op, case: Any, inputs: tuple[Any, ...], upstream: list[torch.Tensor]) -> list[float]:
    exact = run(op, op.formula, case, changed(inputs, to_double), [up.double() for up in upstream])
    with ops.backend("reference"):
        return errors(run(op, op.plain, case, inputs, upstream), exact)


def flat(result: Result) -> list[torch.Tensor]:
    return [*result.outputs, *result.grads]


def errors(found: Result, exact: Result) -> list[float]:
    return [error(ours, wanted) for ours, wanted in zip(flat(found), flat(exact), strict=True)]


@pytest.mark.parametrize(("op", "backend", "case", "dtype"), list(everything(repeated=True)), indirect=["backend"])
def test_repeats_itself_bit_for_bit(op, case, dtype, backend, rng):
    torch.use_deterministic_algorithms(False)  # which would choose other algorithms of torch than a user's call
    op = OPS[op]
    inputs, upstream = draw(op, case, dtype, backend.device, rng)
    first, second = (flat(run(op, op.call, case, inputs, upstream)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
