"""`select` against loops written straight from its formula, in float64; ties, guards, gradients; on every backend.

Every test runs with uninitialised memory full of NaN.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cllava_fast import ops
from cllava_fast.ops import dispatch, triton_backend
from cllava_fast.ops.select import cases as select_cases
from cllava_fast.ops.select import reference as select_reference
from tests.ops_helpers import LOW, close, error, leaf, nan_in_empty_memory

on_every_backend = pytest.mark.usefixtures("backend")
SPLIT = 2100  # rows enough for a scan in pieces and a merge


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    if request.param == "triton":
        dtype = request.node.callspec.params.get("dtype", torch.float32)
        site = dispatch.Site(torch.device("cpu"), dtype, ())
        reason = triton_backend.usable() or ("not for float64" if dtype == torch.float64 else None)
        reason = reason or triton_backend.accepts("select", site._replace(dtype=torch.float32), True)
        if reason:
            pytest.skip(reason)
    with nan_in_empty_memory(), ops.backend(request.param):
        yield request.param


def loop_similarity(query, keys, groups):
    """Cosine per chunk, mean over chunks, one number at a time."""
    table = torch.zeros(len(query), len(keys), dtype=torch.float64)
    for b, q in enumerate(query.double()):
        for n, k in enumerate(keys.double()):
            for q_chunk, k_chunk in zip(q.chunk(groups), k.chunk(groups), strict=True):
                length = math.sqrt(float(q_chunk @ q_chunk)) * math.sqrt(float(k_chunk @ k_chunk))
                table[b, n] += float(q_chunk @ k_chunk) / length / groups if length > 0 else 0.0
    return table


def loop_select(table, top_m, allowed, reduce):
    samples, rows = table.shape
    allowed = torch.ones(rows, dtype=torch.bool) if allowed is None else allowed
    allowed = allowed.expand(samples, rows)
    if reduce == "batch":
        table = table.mean(0).expand(samples, rows)
        allowed = allowed.all(0).expand(samples, rows)
    found = []
    for b in range(samples):
        ranked = sorted((n for n in range(rows) if allowed[b, n]), key=lambda n, b=b: (-table[b, n].float().item(), n))
        found.append(ranked[:top_m])
    index = torch.tensor(found, dtype=torch.int64).reshape(samples, top_m)
    similarity = table.gather(1, index)
    weight = torch.zeros_like(similarity)
    for b in range(samples):
        positive = [max(float(s), 0.0) for s in similarity[b]]
        weight[b] = torch.tensor([p / sum(positive) if sum(positive) >= 1e-6 else 1 / top_m for p in positive])
    return index, weight, similarity


@on_every_backend
@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("case", select_cases.CASES, ids=str)
def test_select_matches_loop(case, dtype, backend, rng):
    query, keys, allowed = select_cases.make(case, dtype, rng)
    index, weight, similarity = ops.select(query, keys, case.M, allowed, case.groups, case.reduce)
    wanted = loop_select(loop_similarity(query, keys, case.groups), case.M, allowed, case.reduce)
    assert torch.equal(index, wanted[0])
    assert index.dtype == torch.int64 and weight.dtype == torch.float32
    assert similarity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    limit = 1e-6
    if backend != "reference" and case.B > 0:  # in float32, cosines close to 0 are not as close to each other
        limit /= wanted[2].clamp(min=0).sum(1).min().clamp(1e-3, 1).item()
    close(weight, wanted[1], limit)
    close(similarity, wanted[2], limit)
    for output in (index, weight, similarity):
        assert output.is_contiguous()


@on_every_backend
def test_select_ties_go_to_the_lowest_row(rng):
    keys = torch.randn(3, 37, generator=rng)[torch.tensor([2, 0, 1, 0, 2, 0, 1, 0])]
    query = keys[1] + 0.1 * torch.randn(5, 37, generator=rng)
    index, weight, _ = ops.select(query, keys, 4)
    assert index.tolist() == [[1, 3, 5, 7]] * 5
    assert torch.equal(weight, torch.full((5, 4), 0.25))
    index, _, _ = ops.select(query, keys, 2, torch.tensor([1, 0, 1, 0, 1, 1, 1, 1]).bool())
    assert index.tolist() == [[5, 7]] * 5


@on_every_backend
@pytest.mark.parametrize("groups", [1, 4])
def test_select_does_not_depend_on_the_batch(groups, backend, rng):
    samples, rows = (33, 200) if backend == "reference" else (17, 90)  # the interpreter is slow
    query = torch.randn(samples, 64, generator=rng)
    keys = torch.randn(40, 64, generator=rng)[torch.randint(40, (rows,), generator=rng)]
    together = ops.select(query, keys, 8, groups=groups)
    for b in range(samples):
        alone = ops.select(query[b : b + 1], keys, 8, groups=groups)
        assert torch.equal(alone[0][0], together[0][b])
        assert torch.equal(alone[1][0], together[1][b])
    other_layout = ops.select(query.t().contiguous().t(), torch.cat([keys, keys])[: len(keys)], 8, groups=groups)
    assert all(torch.equal(a, b) for a, b in zip(together, other_layout, strict=True))


@on_every_backend
def test_select_weights_guards():
    query = torch.tensor([[1.0, 0.0]])
    index, weight, similarity = ops.select(query, torch.tensor([[-1.0, 0.0], [-1.0, 1.0]]), 2)
    assert index.tolist() == [[1, 0]] and weight.tolist() == [[0.5, 0.5]] and (similarity < 0).all()
    _, weight, similarity = ops.select(query, torch.tensor([[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0]]), 3)
    assert weight[0, 2] == 0 and similarity[0, 2] == -1
    assert torch.allclose(weight[0, :2], torch.tensor([1.0, 0.5**0.5]) / (1 + 0.5**0.5))
    _, weight, _ = ops.select(query, torch.tensor([[9e-7, 1.0], [-1.0, 0.0]]), 2)
    assert weight.tolist() == [[0.5, 0.5]]
    _, weight, _ = ops.select(query, torch.tensor([[2e-6, 1.0], [-1.0, 0.0]]), 2)
    assert weight.tolist() == [[1.0, 0.0]]
    _, weight, similarity = ops.select(torch.zeros(1, 2), torch.tensor([[1.0, 2.0], [0.0, 0.0]]), 2)
    assert weight.tolist() == [[0.5, 0.5]] and similarity.tolist() == [[0.0, 0.0]]


@on_every_backend
def test_select_unchecked_shortage_gives_no_weight_to_disallowed_rows():
    allowed = torch.tensor([[False, True, False], [False, False, False]])
    query, keys = torch.tensor([[1.0, 0.1], [1.0, 0.1]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    index, weight, similarity = ops.select(query, keys, 2, allowed, check_values=False)
    assert weight.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert index[0, 0] == 1 and similarity[0, 1] == -math.inf
    keys = torch.ones(SPLIT, 2)
    index, weight, similarity = ops.select(query, keys, 3, torch.arange(SPLIT) == SPLIT - 1, check_values=False)
    assert index.tolist() == [[SPLIT - 1, 0, 1]] * 2 and weight.tolist() == [[1.0, 0.0, 0.0]] * 2
    assert (similarity[:, 1:] == -math.inf).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(3, 4, 5)}, "query: expected 2 dimensions"),
        ({"keys": torch.randn(6, 7)}, r"keys: expected \[N, D\] with D = 8"),
        ({"query": torch.ones(3, 8).long()}, "query: expected a floating dtype"),
        ({"groups": 3}, "groups: expected a divisor of D = 8, got 3"),
        ({"groups": 0}, "groups: "),
        ({"top_m": 0}, "top_m: expected at least 1, got 0"),
        ({"top_m": 7}, "top_m: expected at most the 6 rows"),
        ({"reduce": "mean"}, "reduce: expected 'sample' or 'batch', got 'mean'"),
        ({"allowed": torch.ones(6)}, "allowed: expected torch.bool"),
        ({"allowed": torch.ones(5).bool()}, "allowed: expected .* N = 6"),
        ({"allowed": torch.ones(2, 6).bool()}, "allowed: expected .* B = 3"),
        ({"allowed": torch.arange(6) == 1}, "top_m = 2 rows are wanted, but there are only 1 of 6"),
        ({"allowed": torch.arange(18).reshape(3, 6) < 13}, "sample 2 has only 1 of 6"),
        ({"allowed": torch.eye(3, 6).bool() | (torch.arange(6) == 5), "reduce": "batch"}, "only 1 of 6"),
        ({"query": torch.tensor([[0.0] * 8, [math.nan] * 8, [0.0] * 8])}, r"query: expected finite .* at \(1, 0\)"),
        ({"keys": torch.full((6, 8), math.inf)}, "keys: expected finite"),
        ({"keys": torch.randn(6, 8, device="meta")}, "keys: is on meta, expected cpu"),
    ],
)
def test_select_refuses(change, message):
    arguments = {"query": torch.randn(3, 8), "keys": torch.randn(6, 8), "top_m": 2} | change
    with pytest.raises(ValueError, match=message):
        ops.select(**arguments)


@on_every_backend
@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("reduce", ["sample", "batch"])
@pytest.mark.parametrize("groups", [1, 3])
def test_select_gradient(groups, reduce, dtype, rng):
    query = torch.randn(4, 12, generator=rng, dtype=torch.float64).to(dtype)
    keys = leaf(torch.randn(9, 12, generator=rng, dtype=torch.float64).to(dtype))
    upstream = torch.randn(4, 3, generator=rng, dtype=torch.float64)
    index, weight, similarity = ops.select(query.requires_grad_(), keys, 3, groups=groups, reduce=reduce)
    assert not weight.requires_grad and not index.requires_grad
    upstream = upstream.to(similarity.dtype)
    grad_query, grad = torch.autograd.grad(similarity, (query, keys), upstream, allow_unused=True)
    assert grad_query is None and grad.dtype == dtype and grad.is_contiguous()

    def plain(query, keys):
        table = F.cosine_similarity(query.view(4, 1, groups, -1), keys.view(1, 9, groups, -1), dim=-1).mean(-1)
        table = table.mean(0).expand(4, 9) if reduce == "batch" else table
        return torch.autograd.grad(table.gather(1, index), keys, upstream.to(table.dtype))[0]

    wanted = plain(query.detach().double(), leaf(keys.double()))
    if dtype == torch.float64:
        close(grad, wanted)
        fixed = query.detach()
        assert torch.autograd.gradcheck(lambda k: ops.select(fixed, k, 3, groups=groups, reduce=reduce)[2], keys)
    else:
        close(grad, wanted, max(3 * error(plain(query.detach(), keys), wanted), 2 * torch.finfo(dtype).eps))


def errors(case, dtype, rng, function):
    """Of similarity, weight and gradient against float64, and whether the rows are the same."""
    query, keys, allowed = select_cases.make(case, dtype, rng)
    upstream = torch.randn(case.B, case.M, generator=rng)
    rest = case.groups, case.reduce == "batch"
    exact = select_reference.select(query.double(), keys.double(), case.M, allowed, *rest)
    exact_grad = select_reference.select_backward(
        upstream.double(), query.double(), keys.double(), exact[2], *rest
    )  # fmt: skip
    similarity, weight, index, grad = function(query, keys, allowed, upstream, exact[2])
    found = (similarity, exact[0]), (weight, exact[1].double()), (grad, exact_grad)
    return torch.tensor([error(*pair) for pair in found]), torch.equal(index, exact[2])


@on_every_backend
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("case", select_cases.CASES, ids=str)
def test_select_errors_are_those_of_plain_float32(case, dtype, rng):
    rest = case.groups, case.reduce == "batch"

    def plain(query, keys, allowed, upstream, index):
        found = select_reference.select(query, keys, case.M, allowed, *rest, compute_dtype=torch.float32)
        return *found, select_reference.select_backward(upstream, query, keys, index, *rest, torch.float32)

    def ours(query, keys, allowed, upstream, _):
        keys.requires_grad_()
        index, weight, similarity = ops.select(query, keys, case.M, allowed, case.groups, case.reduce)
        return similarity.detach(), weight, index, torch.autograd.grad(similarity, keys, upstream)[0]

    # one draw of a few numbers may be lucky
    draws = [errors(case, dtype, rng, plain) for _ in range(30)]
    usual = torch.stack([found for found, same_rows in draws if same_rows]).max(0).values
    eps = torch.tensor([torch.finfo(t).eps for t in (torch.float32, torch.float32, dtype)])
    found, same_rows = errors(case, dtype, rng, ours)
    assert same_rows
    assert (found <= torch.maximum(usual * torch.tensor([2, 2, 3]), 2 * eps)).all()


@on_every_backend
@pytest.mark.parametrize("case", [select_cases.CASES[i] for i in (3, 5, 10)], ids=str)
def test_select_repeats_itself_bit_for_bit(case, rng):
    query, keys, allowed = select_cases.make(case, torch.float32, rng)
    keys.requires_grad_()
    upstream = torch.randn(case.B, case.M, generator=rng)
    runs = []
    for _ in range(2):
        found = ops.select(query, keys, case.M, allowed, case.groups, case.reduce)
        runs.append([*found, *torch.autograd.grad(found[2], keys, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@on_every_backend
@pytest.mark.parametrize("rows", [60, SPLIT])
def test_select_gives_equal_keys_one_similarity(rows, rng):
    few = torch.randn(7, 45, generator=rng)
    of = torch.randint(7, (rows,), generator=rng)
    query = torch.randn(3, 45, generator=rng)
    index, _, similarity = ops.select(query, few[of], 60)
    alone = ops.select(query, few, 7)
    table = torch.empty(3, 7).scatter(1, alone[0], alone[2])
    if rows == 60:
        assert torch.equal(similarity, table.gather(1, of[index]))
    for b in range(3):
        order = sorted(range(rows), key=lambda n, b=b: (-table[b, of[n]].item(), n))
        assert index[b].tolist() == order[:60]


@on_every_backend
def test_select_in_pieces_does_not_depend_on_the_batch(rng):
    query = torch.randn(10, 31, generator=rng)
    keys = torch.randn(50, 31, generator=rng)[torch.randint(50, (SPLIT,), generator=rng)]
    together = ops.select(query, keys, 6)
    for b in (0, 7, 8, 9):
        assert all(
            torch.equal(a[0], t[b]) for a, t in zip(ops.select(query[b : b + 1], keys, 6), together, strict=True)
        )


def test_select_in_several_rounds_per_program(rng, monkeypatch):
    kernels = pytest.importorskip("cllava_fast.ops.select.triton")
    if not triton_backend.INTERPRETED:
        pytest.skip("on the CPU only under TRITON_INTERPRET=1")
    monkeypatch.setattr(kernels, "MOST_SLICES", 3)
    query, keys, allowed = select_cases.make(select_cases.Case(2, SPLIT, 24, 9, allowed="sample"), torch.float32, rng)
    assert kernels.plan(SPLIT, 24, 9, 1).rounds > 1
    wanted = select_reference.select(query, keys, 9, allowed, 1, False)
    found = kernels.select(query, keys, 9, allowed, 1, False)
    assert torch.equal(found[2], wanted[2])
    close(found[0], wanted[0].double(), 1e-6)


@on_every_backend
@pytest.mark.parametrize("rows", [30, SPLIT])
def test_select_reads_views_as_they_lie(rows, rng):
    wide = torch.randn(2 * rows + 1, 44, generator=rng)
    queries = torch.randn(13, 50, generator=rng)
    masks = torch.rand(4, 2 * rows, generator=rng) < 0.5
    masks[:, ::7] = True
    views = queries[1::3, 3:40], wide[1::2, 5:42], masks[:, ::2]
    outputs = []
    for query, keys, allowed in (views, [view.clone(memory_format=torch.contiguous_format) for view in views]):
        keys = keys.detach().requires_grad_()
        upstream = torch.arange(12.0).view(3, 4).t()
        for mask, columns in ((allowed, keys), (allowed[2], keys.t().contiguous().t())):
            found = ops.select(query, columns, 3, mask)
            outputs.append([*found, *torch.autograd.grad(found[2], keys, upstream)])
    for first, second in zip(outputs[:2], outputs[2:], strict=True):
        assert torch.equal(first[0], second[0])
        for a, b in zip(first[1:], second[1:], strict=True):
            close(a, b.double(), 1e-6)


@on_every_backend
def test_select_reaches_rows_beyond_32_bits():
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:  # pages that nobody touches cost nothing
        far = torch.empty(2**32 + 16, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("this machine promises no 8 GiB, not even of untouched memory")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    keys = far.as_strided((3, 16), (2**30, 1), 2**31)  # an offset cut to 32 bits lands inside, on zeros
    keys.copy_(torch.eye(3, 16))
    query = torch.eye(3, 16)[[2, 1]] + torch.eye(3, 16)[[0, 0]] / 2
    keys = keys.requires_grad_()
    index, _, similarity = ops.select(query, keys, 2)
    assert index.tolist() == [[2, 0], [1, 0]]
    (grad,) = torch.autograd.grad(similarity[:, 0].sum(), keys)
    close(grad[2, :3], torch.tensor([0.2**0.5, 0, 0]).double(), 1e-3)


@on_every_backend
@pytest.mark.parametrize("reduce", ["sample", "batch"])
def test_select_empty_batch_has_zero_gradient(reduce):
    keys = leaf(torch.randn(5, 6))
    index, weight, similarity = ops.select(torch.empty(0, 6), keys, 2, reduce=reduce)
    assert index.shape == weight.shape == similarity.shape == (0, 2)
    similarity.sum().backward()
    assert torch.equal(keys.grad, torch.zeros(5, 6))


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_select_query_of_another_dtype(dtype, backend, rng):
    query, keys = torch.randn(3, 24, generator=rng).to(dtype), torch.randn(11, 24, generator=rng)
    index, _, similarity = ops.select(query, keys, 4)
    wanted = select_reference.select(query.double(), keys.double(), 4, None, 1, False)
    assert torch.equal(index, wanted[2]) and similarity.dtype == torch.float32
    close(similarity, wanted[0], 1e-6)


@pytest.mark.skipif(not triton_backend.INTERPRETED, reason="on the CPU only under TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("D", "top_m", "dtype", "reason"),
    [
        (8, 65, torch.float32, "M = 65 is above 64"),
        (8193, 1, torch.float32, "D = 8193 is above 8192"),
        (8, 1, torch.float64, "float64 is not one of"),
    ],
)
def test_select_in_triton_refuses_what_it_cannot_do(D, top_m, dtype, reason):
    with ops.backend("triton"), pytest.raises(dispatch.BackendError, match=reason):
        ops.select(torch.randn(1, D), torch.randn(70, D, dtype=dtype), top_m)


@on_every_backend
def test_select_gradient_of_zero_norms_is_zero(rng):
    query = torch.randn(2, 8, generator=rng)
    query[0, :4] = 0
    keys = torch.randn(3, 8, generator=rng)
    keys[1] = 0
    keys[2, 4:] = 0
    keys.requires_grad_()
    ops.select(query, keys, 3, groups=2)[2].sum().backward()
    assert keys.grad.isfinite().all()
    assert (keys.grad[1] == 0).all() and (keys.grad[2, 4:] == 0).all() and (keys.grad[2, :4] != 0).any()


def test_select_low_precision_compute_is_there_for_comparison(rng):
    query, keys, _ = select_cases.make(select_cases.Case(4, 20, 32, 3), torch.float32, rng)
    low = select_reference.select(query, keys, 3, None, 1, False, compute_dtype=torch.float32)
    assert torch.allclose(low[0], ops.select(query, keys, 3)[2], atol=1e-6)
