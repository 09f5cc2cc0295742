"""csrc/cuda on the CPU: the kernels as they are, under an emulation of CUDA's execution model.

Held to float64: at most twice the error of plain PyTorch in the same dtype, three times for gradients. Every tensor
lies between stretches of NaN, outputs and workspaces begin as NaN, and threads run in another order in every test.
"""

from __future__ import annotations

import ctypes
import itertools
import operator
import subprocess

import pytest
import torch

from cllava_fast.ops.aggregate import cases as aggregate_cases
from cllava_fast.ops.aggregate import mix
from cllava_fast.ops.aggregate import reference as aggregate_reference
from cllava_fast.ops.inject import reference as inject_reference
from cllava_fast.ops.inject.reference import Acting
from cllava_fast.ops.select import cases as select_cases
from cllava_fast.ops.select import reference as select_reference
from cllava_fast.ops.select_aggregate import cases as select_aggregate_cases
from tests.cuda_emulator import library
from tests.cuda_emulator.library import Guarded, guarded
from tests.ops_helpers import LOW, error, flat_acting

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="needs g++")
dtypes = pytest.mark.parametrize("dtype", LOW, ids=str)
SelectCase, MixCase = select_cases.Case, aggregate_cases.MixCase


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return library.build(tmp_path_factory.mktemp("cuda_emulated"))


@pytest.fixture
def kernels(built, rng):
    built.emulator_seed(ctypes.c_uint(int(torch.randint(2**31, (), generator=rng))))
    return built


def wide(tensor, odd):
    """The same rows, further apart; with `odd` at addresses that no vector load can take."""
    apart = tensor.shape[-1] + (3 if odd else 16)
    memory = guarded(tensor.new_full((*tensor.shape[:-1], apart), float("nan")), int(odd))
    memory[..., : tensor.shape[-1]] = tensor
    return memory[..., : tensor.shape[-1]]


DRAWS = 20  # of plain's error: one draw of a few numbers may be lucky


def limit(dtype, usual, slack, exact=None, terms=None):
    """The rule. As plain may be lucky, a few roundings in float32 of `terms`, the sums of absolute values in it, are
    no error."""
    floor = 2 * torch.finfo(dtype).eps
    if terms is not None and exact.numel():
        condition = (terms.max() / exact.abs().max().clamp(min=1e-12)).item()
        floor = max(floor, 4 * torch.finfo(torch.float32).eps * condition)
    return max(slack * usual, floor)


def select(kernels, query, keys, top_m, allowed=None, groups=1, by_batch=False, outputs=None, **tail):
    if allowed is not None and by_batch and allowed.dim() == 2:
        allowed = allowed.all(0)
    if allowed is not None and allowed.dim() == 1:
        allowed = allowed.expand(1 if by_batch else len(query), -1)
    strides = {}
    if allowed is not None:
        strides = dict(zip(("allowed_stride_b", "allowed_stride_n"), allowed.stride(), strict=True))
        allowed = allowed.view(torch.uint8)
    shape = len(query), top_m
    types = {"similarity": torch.float32, "weight": torch.float32, "index": torch.int64}
    outputs = outputs or {name: Guarded(shape, dtype) for name, dtype in types.items()}
    library.call(
        kernels, "Select", outputs, query=query, keys=keys, allowed=allowed,
        type=keys.dtype, B=len(query), N=len(keys), D=keys.shape[1], M=top_m, groups=groups, key_stride=keys.stride(0),
        by_batch=by_batch, **strides, **tail,
    )  # fmt: skip
    return tuple(output.tensor for output in outputs.values())


def select_backward(kernels, grad, query, keys, index, groups=1, by_batch=False):
    outputs = {"out": Guarded(tuple(keys.shape), keys.dtype)}
    library.call(
        kernels, "SelectBackward", outputs, grad=grad, query=query, keys=keys, index=index,
        type=keys.dtype, B=len(query), N=len(keys), D=keys.shape[1], M=index.shape[1], groups=groups,
        key_stride=keys.stride(0), by_batch=by_batch,
    )  # fmt: skip
    return outputs["out"].tensor


SELECT = (
    *(case for case in select_cases.CASES if case.B),
    SelectCase(B=16, N=64, D=64, M=4),
    SelectCase(B=19, N=70, D=600, M=4, groups=2, allowed="sample", reduce="batch"),
    SelectCase(B=2, N=1000, D=12, M=40, allowed="row"),
    SelectCase(B=2, N=900, D=260, M=3),
)
LARGE_SELECT = (  # each in one dtype: they take seconds
    (SelectCase(B=17, N=2100, D=20, M=4, groups=5), True, torch.bfloat16),
    (SelectCase(B=3, N=2600, D=56, M=64, allowed="sample"), False, torch.float16),
    (SelectCase(B=1, N=3000, D=68, M=33, groups=2), False, torch.float32),
)


@pytest.mark.parametrize(
    ("case", "odd", "dtype"), [*itertools.product(SELECT, (False, True), LOW), *LARGE_SELECT], ids=str
)
def test_select(case, odd, dtype, kernels, rng):
    rest = case.groups, case.reduce == "batch"

    def formula(query, keys, allowed, upstream, type, index=None):
        query, keys = query.to(type), keys.to(type)
        *outputs, found = select_reference.select(query, keys, case.M, allowed, *rest, compute_dtype=type)
        index = found if index is None else index
        grad = select_reference.select_backward(upstream.to(type), query, keys, index, *rest, type)
        return [*outputs, grad], index

    def errors(found, wanted):
        return [error(ours, exact.double()) for ours, exact in zip(found, wanted, strict=True)]

    usual = []
    for _ in range(DRAWS):
        drawn = *select_cases.make(case, dtype, rng), torch.randn(case.B, case.M, generator=rng)
        exact, index = formula(*drawn, torch.float64)
        (*plain, grad), _ = formula(*drawn, torch.float32, index)
        usual.append(errors((*plain, grad.to(dtype)), exact))
    query, keys, allowed, upstream = drawn
    query, keys = guarded(query.float(), int(odd)), wide(keys, odd)
    found = select(kernels, query, keys, case.M, allowed, *rest)
    grad = select_backward(kernels, upstream, query, keys, index, *rest)
    assert torch.equal(found[2], index)
    similarity, weight, gradient = map(max, zip(*usual, strict=True))
    limits = limit(torch.float32, similarity, 2), limit(torch.float32, weight, 2), limit(dtype, gradient, 3)
    assert all(map(operator.le, errors((*found[:2], grad), exact), limits))
    again = [*select(kernels, query, keys, case.M, allowed, *rest)]
    again.append(select_backward(kernels, upstream, query, keys, index, *rest))
    assert all(torch.equal(a, b) for a, b in zip((*found, grad), again, strict=True))


@dtypes
@pytest.mark.parametrize("rows", [60, 2100])
def test_select_equal_keys_have_one_similarity_wherever_they_lie(rows, dtype, kernels, rng):
    few = torch.randn(7, 44, generator=rng).to(dtype)
    of = torch.randint(7, (rows,), generator=rng)
    query = guarded(torch.randn(18, 44, generator=rng))
    alone = select(kernels, query, guarded(few), 7, groups=2)
    table = torch.empty(18, 7).scatter(1, alone[2], alone[0])
    ranked = torch.stack([table[b, of].sort(descending=True, stable=True).indices for b in range(18)])
    for keys in (guarded(few[of]), wide(few[of], True)):
        for samples in (1, 3, 18):
            similarity, _, index = select(kernels, query[:samples], keys, 9, groups=2)
            assert torch.equal(index, ranked[:samples, :9])
            assert torch.equal(similarity, table.gather(1, of[ranked])[:samples, :9])


def test_select_guards(kernels):
    query = torch.tensor([[1.0, 0.0]])

    def weights(keys, top_m, allowed=None):
        return select(kernels, query, torch.tensor(keys), top_m, allowed)

    similarity, weight, index = weights([[-1.0, 0.0], [-1.0, 1.0]], 2)
    assert index.tolist() == [[1, 0]] and weight.tolist() == [[0.5, 0.5]] and (similarity < 0).all()
    similarity, weight, _ = weights([[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0]], 3)
    assert weight[0, 2] == 0 and similarity[0, 2] == -1
    query = torch.tensor([[9e-7, 1.0]])
    assert weights([[1.0, 0.0], [-1.0, 0.0]], 2)[1].tolist() == [[0.5, 0.5]]
    query = torch.tensor([[2e-6, 1.0]])
    assert weights([[1.0, 0.0], [-1.0, 0.0]], 2)[1].tolist() == [[1.0, 0.0]]
    similarity, weight, index = weights([[1.0, 0.0]] * 3, 3, torch.tensor([False, True, False]))
    assert index.tolist() == [[1, 0, 2]] and weight.tolist() == [[1.0, 0.0, 0.0]]
    assert similarity[0, 1:].tolist() == [-float("inf")] * 2
    assert weights([[1.0, 0.0]] * 2, 2, torch.tensor([False, False]))[1].tolist() == [[0.0, 0.0]]
    nan = float("nan")
    similarity, weight, index = weights([[1.0, 0.0], [-nan, 0.0], [nan, 0.0]], 3)
    assert index.tolist() == [[1, 2, 0]] and weight.isnan().all()
    assert similarity[0].isnan().tolist() == [True, True, False]
    query = torch.tensor([[0.0, 0.0]])
    similarity, weight, _ = weights([[1.0, 2.0], [-0.0, -0.0]], 2)
    assert weight.tolist() == [[0.5, 0.5]] and similarity.tolist() == [[0.0, 0.0]]


@dtypes
@pytest.mark.parametrize("by_batch", [False, True])
def test_select_gradient_of_a_large_pool_and_many_samples(by_batch, dtype, kernels, rng):
    samples, rows, width = 300, 5000, 12

    def draw():
        query, keys = torch.randn(samples, width, generator=rng), torch.randn(rows, width, generator=rng).to(dtype)
        keys[7, :6] = 0
        index = torch.rand(1 if by_batch else samples, 9, generator=rng).argsort(1)[:, :3] * 11 + 7
        grad = torch.randn(samples, 3, generator=rng) + 2  # whose mean over samples is no small difference
        return grad, query, keys, index.expand(samples, 3).contiguous()

    def formula(grad, query, keys, index, type):
        tensors = (tensor.to(type) for tensor in (grad, query, keys))
        return select_reference.select_backward(*tensors, index, 2, by_batch, type)

    draws = [draw() for _ in range(DRAWS)]
    exact = [formula(*drawn, torch.float64) for drawn in draws]
    usual = max(error(formula(*d, torch.float32).to(dtype), wanted) for d, wanted in zip(draws, exact, strict=True))
    grad, query, keys, index = draws[0]
    found = select_backward(kernels, grad, guarded(query), guarded(keys), index, 2, by_batch)
    assert error(found, exact[0]) <= limit(dtype, usual, 3)
    assert (found[7, :6] == 0).all()


def aggregate(kernels, index, weight, row_task, row_mean, context):
    sizes = {"B": index.shape[0], "M": index.shape[1], "N": len(row_task), "T": len(context)}
    shape = sizes["B"], sizes["M"] + sizes["N"]
    outputs = {"coefficient": Guarded(shape, torch.float32), "rows": Guarded(shape, torch.int64)}
    given = {"index": index, "weight": weight, "row_task": row_task, "row_mean": row_mean, "context": context}
    library.call(kernels, "Aggregate", outputs, **given, **sizes)
    return outputs["coefficient"].tensor, outputs["rows"].tensor


def aggregate_backward(kernels, grad, index, weight, row_task, row_mean, context, needed=(True, True)):
    sizes = {"B": index.shape[0], "M": index.shape[1], "N": len(row_task), "T": len(context)}
    names = [name for name, need in zip(("grad_weight", "grad_context"), needed, strict=True) if need]
    shapes = {"grad_weight": tuple(weight.shape), "grad_context": tuple(context.shape)}
    outputs = {name: Guarded(shapes[name], torch.float32) for name in names}
    given = {"index": index, "weight": weight, "row_task": row_task, "row_mean": row_mean, "context": context}
    library.call(kernels, "AggregateBackward", outputs, grad=grad, **given, **sizes)
    return [outputs[name].tensor for name in names]


def doubles(*tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def magnitudes(*tensors):
    return [t.double().abs() if t.is_floating_point() else t for t in tensors]


AGGREGATE = (*(case for case in aggregate_cases.CASES if case.B), aggregate_cases.Case(B=270, M=2, N=90, T=300))


@pytest.mark.parametrize("case", AGGREGATE, ids=str)
def test_aggregate(case, kernels, rng):
    inputs = [guarded(tensor) for tensor in aggregate_cases.make(case, torch.float32, rng)]
    exact, plain = aggregate_reference.aggregate(*doubles(*inputs)), aggregate_reference.aggregate(*inputs)
    terms = aggregate_reference.aggregate(*magnitudes(*inputs))
    found = aggregate(kernels, *inputs)
    assert torch.equal(found[1], exact[1])
    assert error(found[0], exact[0]) <= limit(torch.float32, error(plain[0], exact[0]), 2, exact[0], terms[0])
    upstream = guarded(torch.randn(case.B, case.M + case.N, generator=rng))
    grads = [
        aggregate_reference.aggregate_backward(*tensors, [True, True])
        for tensors in (doubles(upstream, *inputs), (upstream, *inputs), magnitudes(upstream, *inputs))
    ]
    together = aggregate_backward(kernels, upstream, *inputs)
    for ours, wanted, theirs, terms in zip(together, *grads, strict=True):
        assert error(ours, wanted) <= limit(torch.float32, error(theirs, wanted), 3, wanted, terms)
    for i, needed in enumerate(((True, False), (False, True))):
        assert torch.equal(aggregate_backward(kernels, upstream, *inputs, needed)[0], together[i])


def test_aggregate_reads_nothing_that_the_formula_does_not(kernels):
    nan = float("nan")
    context = torch.full((4, 4), nan)
    context[2, 0], context[2, 1], context[1, 0] = 0.5, 0.25, 2.0
    inputs = torch.tensor([[2, 2], [2, 1]]), torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.arange(4)
    inputs = *inputs, torch.tensor([0.5, 0.25, nan, nan]), context
    coefficient, _ = aggregate(kernels, *inputs)
    assert coefficient[:, 2:].tolist() == [[0.25, 0.0625, 0, 0], [0.625, 0.03125, 0, 0]]
    upstream = torch.ones(2, 6)
    upstream[:, 4:] = nan
    grads = aggregate_backward(kernels, upstream, *inputs)
    assert grads[0].tolist() == [[1.3125, 1.3125], [1.3125, 2.0]]
    wanted = torch.zeros(4, 4)
    wanted[2, 0], wanted[2, 1], wanted[1, 0] = 0.75, 0.375, 0.25
    assert torch.equal(grads[1], wanted)
    upstream[0, 2:] = nan  # a row of the first task looks back at nothing
    inputs = torch.tensor([[0], [2]]), torch.ones(2, 1), *inputs[2:]
    grads = aggregate_backward(kernels, upstream[:, 1:].contiguous(), *inputs)
    assert grads[0].tolist() == [[1], [1.3125]]
    assert grads[1].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0.5, 0.25, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("case", [case for case in select_aggregate_cases.CASES if case.B], ids=str)
def test_select_aggregate_has_the_bits_of_the_two(case, kernels, rng):
    query, keys, allowed, *tasks = select_aggregate_cases.make(case, torch.float32, rng)
    query, keys, tasks = guarded(query), guarded(keys), [guarded(tensor) for tensor in tasks]
    shape = case.B, case.M + case.N
    outputs = {"coefficient": Guarded(shape, torch.float32), "rows": Guarded(shape, torch.int64)}
    tail = dict(zip(("row_task", "row_mean", "context"), tasks, strict=True))
    rest = case.groups, case.reduce == "batch"
    _, weight, index = select(kernels, query, keys, case.M, allowed, *rest)
    select(kernels, query, keys, case.M, allowed, *rest, outputs=outputs, T=case.T, **tail)
    coefficient, rows = aggregate(kernels, index, weight, *tasks)
    assert torch.equal(outputs["coefficient"].tensor, coefficient) and torch.equal(outputs["rows"].tensor, rows)


def mix_sizes(A, B, index):
    sizes = {"samples": index.shape[0], "P": index.shape[1], "N": len(A), "type": A.dtype}
    return sizes | {"size_A": A.shape[1], "size_B": B.shape[1], "stride_A": A.stride(0), "stride_B": B.stride(0)}


def mix_factors(kernels, A, B, coefficient, index):
    outputs = {name: Guarded((len(index), t.shape[1]), A.dtype) for name, t in (("A_mix", A), ("B_mix", B))}
    library.call(
        kernels, "MixFactors", outputs, A=A, B=B, coefficient=coefficient, index=index, **mix_sizes(A, B, index)
    )
    return [memory.tensor for memory in outputs.values()]


def mix_factors_backward(kernels, grad_A, grad_B, A, B, coefficient, index, needed=(True, True, True)):
    shapes = {"to_A": (tuple(A.shape), A.dtype), "to_B": (tuple(B.shape), B.dtype)}
    shapes["to_coefficient"] = tuple(coefficient.shape), torch.float32
    outputs = {name: Guarded(*shapes[name]) for name, need in zip(shapes, needed, strict=True) if need}
    library.call(
        kernels, "MixFactorsBackward", outputs, grad_A=grad_A, grad_B=grad_B, A=A, B=B, coefficient=coefficient,
        index=index, **mix_sizes(A, B, index),
    )  # fmt: skip
    return [memory.tensor for memory in outputs.values()]


MIX = (
    *(case for case in aggregate_cases.MIX_CASES if case.B and case.P),
    MixCase(B=2, P=300, N=8, R=2, d_in=24, d_out=16),
    MixCase(B=1, P=3, N=300, R=4, d_in=2100, d_out=8),
)


@dtypes
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("case", MIX, ids=str)
def test_mix_factors(case, odd, dtype, kernels, rng):
    A, B, coefficient, index = aggregate_cases.make_mix(case, dtype, rng)
    coefficient[torch.rand(coefficient.shape, generator=rng) < 0.3] = 0
    A, B = wide(A.flatten(1), odd), wide(B.flatten(1), odd)
    unread = torch.ones(case.N).bool().index_fill(0, index[coefficient != 0], False)
    spoiled = [tensor.clone() for tensor in (A, B)]
    for tensor in spoiled:
        tensor[unread] = float("nan")
    shaped = A.unflatten(1, (case.R, -1)), B.unflatten(1, (case.R, -1))
    exact = mix.mix_factors(*doubles(*shaped, coefficient), index)
    plain = mix.mix_factors(*shaped, coefficient, index)
    all_terms = mix.mix_factors(*magnitudes(*shaped, coefficient), index)
    found = mix_factors(kernels, *(wide(tensor, odd) for tensor in spoiled), coefficient, index)
    few = 4 if case.R * case.d_in < 100 else 1
    for ours, wanted, theirs, terms in zip(found, exact, plain, all_terms, strict=True):
        assert error(ours, wanted.flatten(1)) <= few * limit(dtype, error(theirs, wanted), 2, wanted, terms)
    upstream = [torch.randn(t.shape, generator=rng, dtype=torch.float64).to(dtype) for t in exact]
    flat = [guarded(t.flatten(1), int(odd)) for t in upstream]
    rest = *shaped, coefficient, index
    grads = [
        mix.mix_factors_backward(*tensors, [True] * 3)
        for tensors in (doubles(*upstream, *rest), (*upstream, *rest), magnitudes(*upstream, *rest))
    ]
    together = mix_factors_backward(kernels, *flat, A, B, coefficient, index)
    for ours, wanted, theirs, terms in zip(together, *grads, strict=True):
        wanted, theirs = wanted.view(ours.shape), theirs.view(ours.shape)
        assert error(ours, wanted) <= few * limit(ours.dtype, error(theirs, wanted), 3, wanted, terms)
    for i in range(3):
        alone = mix_factors_backward(kernels, *flat, A, B, coefficient, index, [i == other for other in range(3)])
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("dtype", LOW[1:], ids=str)
def test_every_number_is_read_and_rounded_as_torch_does(dtype, kernels, rng):
    A = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(1, -1).view(dtype).nan_to_num(1.0)
    coefficient = torch.rand(16, 1, generator=rng)
    coefficient[0], coefficient[1] = 1, 1 + 2**-9
    index = torch.zeros(16, 1, dtype=torch.int64)
    for odd in (False, True):
        found = mix_factors(kernels, wide(A, odd), wide(A, odd), coefficient, index)
        assert torch.equal(found[0], (A.float() * coefficient).to(dtype))


def factor_strides(A, B):
    names = ("A_stride_n", "A_stride_r", "B_stride_n", "B_stride_r")
    return dict(zip(names, (*A.stride()[:2], *B.stride()[:2]), strict=True))


def inject_add(kernels, y, x, A, B, index, coefficient, scale, arrived=None):
    output = Guarded(tuple(y.shape), y.dtype)
    output.tensor.copy_(y)
    library.call(
        kernels, "InjectAdd", {"y": output}, arrived=arrived, x=x, A=A, B=B, index=index, coefficient=coefficient,
        type=x.dtype, factor_type=A.dtype, scale=scale, samples=x.shape[0], S=x.shape[1], d_in=x.shape[2],
        d_out=B.shape[2], N=len(A), R=A.shape[1], P=index.shape[1], x_stride_b=x.stride(0), x_stride_s=x.stride(1),
        **factor_strides(A, B),
    )  # fmt: skip
    return output.tensor


def pairs(samples, count, rows, rng):
    """Some rows twice, about a third of the coefficients 0; and which rows nobody reads."""
    index = torch.randint(rows, (samples, count), generator=rng)
    coefficient = torch.randn(samples, count, generator=rng)
    coefficient[torch.rand(samples, count, generator=rng) < 0.3] = 0
    return index, coefficient, torch.ones(rows).bool().index_fill(0, index[coefficient != 0], False)


FACTORS = [(dtype, factor) for dtype in LOW for factor in dict.fromkeys((dtype, torch.float32))]
INJECT = (  # samples, S, d_in, d_out, N, R, P
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 40, 24, 5, 8, 4),
    (3, 1, 1100, 40, 6, 4, 4),
    (2, 16, 72, 264, 4, 3, 7),
    (2, 5, 17, 33, 3, 3, 11),
    (1, 2, 2048, 24, 40, 8, 70),
)


@pytest.mark.parametrize(("dtype", "factor_dtype"), FACTORS, ids=str)
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("sizes", INJECT, ids=str)
def test_inject_add(sizes, odd, dtype, factor_dtype, kernels, rng):
    samples, tokens, d_in, d_out, rows, rank, count = sizes
    x = wide(torch.randn(samples, tokens, d_in, generator=rng).to(dtype), odd)
    y = torch.randn(samples, tokens, d_out, generator=rng).to(dtype)
    A = (torch.randn(rows, rank, d_in, generator=rng) / d_in**0.5).to(factor_dtype)
    B = torch.randn(rows, rank, d_out, generator=rng).to(factor_dtype)
    index, coefficient, unread = pairs(samples, count, rows, rng)
    given = y, x, A, B, index, coefficient
    exact, plain, terms = (
        inject_reference.inject_add(y, x, Acting(*flat_acting(*rest, scale=0.5)), False)[0]
        for y, x, *rest in (doubles(*given), given, magnitudes(*given))
    )
    A[unread] = B[unread] = float("nan")
    found = [inject_add(kernels, y, x, wide(A, odd), wide(B, odd), index, coefficient, 0.5) for _ in range(2)]
    few = 4 if samples * tokens * d_out < 100 else 1
    assert error(found[0], exact) <= few * limit(dtype, error(plain, exact), 2, exact, terms)
    assert torch.equal(*found)


ONE_TOKEN = (  # samples, d_in, d_out, N, R, P: one group of rows, several, many; more columns than threads take at once
    (2, 1, 1, 1, 1, 1),
    (3, 1100, 40, 6, 4, 2),
    (2, 72, 264, 4, 3, 7),
    (2, 17, 33, 3, 3, 11),
    (4, 256, 2048, 5, 8, 4),
    (2, 512, 4160, 40, 8, 70),
)


@pytest.mark.parametrize(("dtype", "factor_dtype"), FACTORS, ids=str)
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("sizes", ONE_TOKEN, ids=str)
def test_inject_add_in_one_launch(sizes, odd, dtype, factor_dtype, kernels, rng):
    samples, d_in, d_out, rows, rank, count = sizes
    x = wide(torch.randn(samples, 1, d_in, generator=rng).to(dtype), odd)
    y = torch.randn(samples, 1, d_out, generator=rng).to(dtype)
    A = (torch.randn(rows, rank, d_in, generator=rng) / d_in**0.5).to(factor_dtype)
    B = torch.randn(rows, rank, d_out, generator=rng).to(factor_dtype)
    index, coefficient, unread = pairs(samples, count, rows, rng)
    coefficient[-1] = 0  # a sample of padding alone
    unread |= torch.ones(rows).bool().index_fill(0, index[coefficient != 0], False)
    given = y, x, A, B, index, coefficient
    exact, plain, terms = (
        inject_reference.inject_add(y, x, Acting(*flat_acting(*rest, scale=0.5)), False)[0]
        for y, x, *rest in (doubles(*given), given, magnitudes(*given))
    )
    A[unread] = B[unread] = float("nan")
    arrived = torch.zeros(samples, dtype=torch.int32)
    found = [inject_add(kernels, y, x, wide(A, odd), wide(B, odd), index, coefficient, 0.5, arrived) for _ in range(3)]
    few = 4 if samples * d_out < 100 else 1
    assert error(found[0], exact) <= few * limit(dtype, error(plain, exact), 2, exact, terms)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0][-1], y[-1]) and not arrived.any()


def test_a_failed_launch_names_the_kernel(kernels):
    nobody = torch.empty(0, 1)
    with pytest.raises(RuntimeError, match=r"aggregate coefficients: launch failed: invalid config.*grid 0 x 1"):
        aggregate(kernels, nobody.long(), nobody, torch.zeros(1).long(), torch.zeros(1), torch.zeros(1, 1))


FAULTS = {
    "right": ("shared[threadIdx.x] = threadIdx.x; __syncthreads(); *out = shared[63 - threadIdx.x];", ""),
    "a barrier that one thread misses": ("if (threadIdx.x) __syncthreads();", "thread 0 has returned"),
    "two barriers at once": ("if (threadIdx.x < 32) __syncthreads();\nelse __syncthreads();", "deadlock"),
    "a lane that does not come": ("if (threadIdx.x) __shfl_sync(~0u, 1, 0);", "thread 0 has returned"),
    "a lane outside its mask": ("__ballot_sync(1u, true);", "a lane outside its own mask"),
    "a value from outside the mask": ("if (threadIdx.x % 32 < 2) __shfl_sync(3u, 1, 5);", "reads one outside the mask"),
    "no barrier": ("shared[threadIdx.x] = 0; if (shared[63 - threadIdx.x] != 0) *out = 1;", "wrong result"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_sees_faults(fault, tmp_path):
    body, message = FAULTS[fault]
    (tmp_path / "kernel.cpp").write_text(
        f"""#include <cuda_runtime.h>
        #include <cstdio>
        void kernel(float* out) {{ __shared__ float shared[64]; (void)shared; {body} }}
        int main() {{
          cudaLaunchConfig_t config{{}};
          config.blockDim = 64;
          float out = 0;
          try {{ cudaLaunchKernelEx(&config, kernel, &out); }} catch (const std::exception& e) {{ puts(e.what()); }}
          if (out == 1) puts("wrong result");
        }}"""
    )
    command = [library.compiler(), *library.FLAGS, f"-I{library.HERE}", "kernel.cpp", "-o", "kernel"]
    subprocess.run(command, cwd=tmp_path, check=True)
    done = subprocess.run(["./kernel"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout and bool(message) == bool(done.stdout)
