"""`select` against loops written straight from its formula, in float64; ties, guards, gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cllava_fast import ops
from cllava_fast.ops.select import cases as select_cases
from cllava_fast.ops.select import reference as select_reference
from tests.ops_helpers import LOW, close, leaf


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


@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("case", select_cases.CASES, ids=str)
def test_select_matches_loop(case, dtype, rng):
    query, keys, allowed = select_cases.make(case, dtype, rng)
    index, weight, similarity = ops.select(query, keys, case.M, allowed, case.groups, case.reduce)
    wanted = loop_select(loop_similarity(query, keys, case.groups), case.M, allowed, case.reduce)
    assert torch.equal(index, wanted[0])
    assert index.dtype == torch.int64 and weight.dtype == torch.float32
    assert similarity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    close(weight, wanted[1], 1e-6)
    close(similarity, wanted[2], 1e-6)
    for output in (index, weight, similarity):
        assert output.is_contiguous()


def test_select_ties_go_to_the_lowest_row(rng):
    keys = torch.randn(3, 37, generator=rng)[torch.tensor([2, 0, 1, 0, 2, 0, 1, 0])]
    query = keys[1] + 0.1 * torch.randn(5, 37, generator=rng)
    index, weight, _ = ops.select(query, keys, 4)
    assert index.tolist() == [[1, 3, 5, 7]] * 5
    assert torch.equal(weight, torch.full((5, 4), 0.25))
    index, _, _ = ops.select(query, keys, 2, torch.tensor([1, 0, 1, 0, 1, 1, 1, 1]).bool())
    assert index.tolist() == [[5, 7]] * 5


@pytest.mark.parametrize("groups", [1, 4])
def test_select_does_not_depend_on_the_batch(groups, rng):
    query = torch.randn(33, 64, generator=rng)
    keys = torch.randn(40, 64, generator=rng)[torch.randint(40, (200,), generator=rng)]
    together = ops.select(query, keys, 8, groups=groups)
    for b in range(33):
        alone = ops.select(query[b : b + 1], keys, 8, groups=groups)
        assert torch.equal(alone[0][0], together[0][b])
        assert torch.equal(alone[1][0], together[1][b])
    other_layout = ops.select(query.t().contiguous().t(), torch.cat([keys, keys])[: len(keys)], 8, groups=groups)
    assert all(torch.equal(a, b) for a, b in zip(together, other_layout, strict=True))


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


def test_select_unchecked_shortage_gives_no_weight_to_disallowed_rows():
    allowed = torch.tensor([[False, True, False], [False, False, False]])
    query, keys = torch.tensor([[1.0, 0.1], [1.0, 0.1]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    index, weight, similarity = ops.select(query, keys, 2, allowed, check_values=False)
    assert weight.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert index[0, 0] == 1 and similarity[0, 1] == -math.inf


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


@pytest.mark.parametrize("reduce", ["sample", "batch"])
@pytest.mark.parametrize("groups", [1, 3])
def test_select_gradient(groups, reduce, rng):
    query = torch.randn(4, 12, generator=rng, dtype=torch.float64)
    keys = leaf(torch.randn(9, 12, generator=rng, dtype=torch.float64))
    upstream = torch.randn(4, 3, generator=rng, dtype=torch.float64)
    index, weight, similarity = ops.select(query.requires_grad_(), keys, 3, groups=groups, reduce=reduce)
    assert not weight.requires_grad and not index.requires_grad
    grad_query, grad = torch.autograd.grad(similarity, (query, keys), upstream, allow_unused=True)
    assert grad_query is None
    plain = F.cosine_similarity(query.view(4, 1, groups, -1), keys.view(1, 9, groups, -1), dim=-1).mean(-1)
    plain = plain.mean(0).expand(4, 9) if reduce == "batch" else plain
    (wanted,) = torch.autograd.grad(plain.gather(1, index), keys, upstream)
    close(grad, wanted)
    fixed = query.detach()
    assert torch.autograd.gradcheck(lambda k: ops.select(fixed, k, 3, groups=groups, reduce=reduce)[2], keys)


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
