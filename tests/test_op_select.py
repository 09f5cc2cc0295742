"""`select`: ties, guards, refusals, and what a selection may not depend on; on every backend.

Its values and gradients on every case are in `test_ops.py`.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cllava_fast import ops
from cllava_fast.ops import dispatch, triton_backend
from cllava_fast.ops.select import cases as select_cases
from cllava_fast.ops.select import reference as select_reference
from tests.ops_helpers import GPU, close, leaf, on_every_backend

everywhere = on_every_backend("select")


@pytest.mark.parametrize("reduce", ["sample", "batch"])
@pytest.mark.parametrize("groups", [1, 3])
def test_select_gradcheck(groups, reduce, rng):  # in float64: of the reference
    query, keys, _ = select_cases.make(select_cases.Case(4, 9, 12, 3), torch.float64, rng)
    assert torch.autograd.gradcheck(lambda k: ops.select(query, k, 3, groups=groups, reduce=reduce)[2], leaf(keys))
    index, weight, similarity = ops.select(query.requires_grad_(), leaf(keys), 3, groups=groups, reduce=reduce)
    assert not weight.requires_grad and not index.requires_grad
    similarity.sum().backward()
    assert query.grad is None


@everywhere
def test_select_ties_go_to_the_lowest_row(backend, rng):
    keys = torch.randn(3, 37, generator=rng)[torch.tensor([2, 0, 1, 0, 2, 0, 1, 0])]
    query = keys[1] + 0.1 * torch.randn(5, 37, generator=rng)
    query, keys = query.to(backend.device), keys.to(backend.device)
    index, weight, _ = ops.select(query, keys, 4)
    assert index.tolist() == [[1, 3, 5, 7]] * 5
    assert torch.equal(weight, torch.full_like(weight, 0.25))
    allowed = torch.tensor([1, 0, 1, 0, 1, 1, 1, 1], device=backend.device).bool()
    assert ops.select(query, keys, 2, allowed)[0].tolist() == [[5, 7]] * 5


@everywhere
@pytest.mark.parametrize("groups", [1, 4])
def test_select_does_not_depend_on_the_batch(groups, backend, rng):
    samples, rows = (33, 200) if backend.name == "reference" else (10, 90)  # the interpreter is slow
    query = torch.randn(samples, 64, generator=rng).to(backend.device)
    keys = torch.randn(40, 64, generator=rng)[torch.randint(40, (rows,), generator=rng)].to(backend.device)
    together = ops.select(query, keys, 6, groups=groups)
    for b in range(samples):
        alone = ops.select(query[b : b + 1], keys, 6, groups=groups)
        assert all(torch.equal(one[0], of_all[b]) for one, of_all in zip(alone, together, strict=True))
    other_layout = ops.select(query.t().contiguous().t(), torch.cat([keys, keys])[: len(keys)], 6, groups=groups)
    assert all(torch.equal(a, b) for a, b in zip(together, other_layout, strict=True))


@everywhere
@pytest.mark.parametrize(
    ("query", "keys", "index", "weight", "similarity"),
    [
        ([1.0, 0.0], [[-1.0, 0.0], [-1.0, 1.0]], [1, 0], [0.5, 0.5], [-(0.5**0.5), -1.0]),
        (
            [1.0, 0.0],
            [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0]],
            [2, 0, 1],
            [2 - 2**0.5, 2**0.5 - 1, 0.0],
            [1.0, 0.5**0.5, -1.0],
        ),
        ([1.0, 0.0], [[9e-7, 1.0], [-1.0, 0.0]], [0, 1], [0.5, 0.5], [9e-7, -1.0]),
        ([1.0, 0.0], [[2e-6, 1.0], [-1.0, 0.0]], [0, 1], [1.0, 0.0], [2e-6, -1.0]),
        ([0.0, 0.0], [[1.0, 2.0], [0.0, 0.0]], [0, 1], [0.5, 0.5], [0.0, 0.0]),
    ],
    ids=["all negative", "one negative", "sum below the floor", "sum above the floor", "norm zero"],
)
def test_select_weights_guards(query, keys, index, weight, similarity, backend):
    query, keys = (torch.tensor(values, device=backend.device) for values in ([query], keys))
    found = ops.select(query, keys, len(keys))
    assert found[0].tolist() == [index]
    for ours, wanted in zip(found[1:], (weight, similarity), strict=True):
        assert ours[0].tolist() == pytest.approx(wanted, rel=1e-6, abs=0)


@everywhere
def test_select_unchecked_shortage_gives_no_weight_to_disallowed_rows(backend):
    tensor = lambda values: torch.tensor(values, device=backend.device)  # noqa: E731
    allowed = tensor([[False, True, False], [False, False, False]])
    query, keys = tensor([[1.0, 0.1], [1.0, 0.1]]), tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    index, weight, similarity = ops.select(query, keys, 2, allowed, check_values=False)
    assert weight.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert index[0, 0] == 1 and similarity[0, 1] == -math.inf
    keys, last = torch.ones(100, 2, device=backend.device), torch.arange(100, device=backend.device) == 99
    index, weight, similarity = ops.select(query, keys, 3, last, check_values=False)
    assert index.tolist() == [[99, 0, 1]] * 2 and weight.tolist() == [[1.0, 0.0, 0.0]] * 2
    assert (similarity[:, 1:] == -math.inf).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.randn(3, 4, 5)}, "query: expected 2 dimensions"),
        ({"keys": torch.randn(6, 7)}, r"keys: expected \[N, D\] with D = 8"),
        ({"query": torch.ones(3, 8).long()}, "query: expected a floating dtype"),
        ({"groups": 3}, "groups: expected a divisor of D = 8, got 3"),
        ({"groups": 0}, "groups: "),
        ({"groups": 2.0}, "groups: expected a whole number, got 2.0"),
        ({"top_m": 2.0}, "top_m: expected a whole number, got 2.0"),
        ({"allowed": [True] * 6}, "allowed: expected a tensor, got list"),
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


@everywhere
def test_select_gives_equal_keys_one_similarity(backend, rng):
    few = torch.randn(20, 45, generator=rng).to(backend.device)
    of = torch.randint(20, (80,), generator=rng).to(backend.device)
    query = torch.randn(3, 45, generator=rng).to(backend.device)
    index, _, similarity = ops.select(query, few[of], 60)
    alone = ops.select(query, few, 20)
    table = torch.empty(3, 20, device=backend.device).scatter(1, alone[0], alone[2])
    assert torch.equal(similarity, table.gather(1, of[index]))
    for b in range(3):
        order = sorted(range(80), key=lambda n, b=b: (-table[b, of[n]].item(), n))
        assert index[b].tolist() == order[:60]


def test_a_large_pool_is_scanned_in_pieces():
    plan = pytest.importorskip("cllava_fast.ops.select.triton", reason="triton is not installed").plan
    assert plan(rows=2048, width=40, top_m=4, groups=1).slices == 1
    assert plan(rows=2049, width=40, top_m=4, groups=1).slices > 1
    assert plan(rows=65, width=4096, top_m=4, groups=1).slices > 1


@on_every_backend("select", only="triton-split")
def test_select_in_several_rounds_per_program(backend, rng, monkeypatch):
    kernels = pytest.importorskip("cllava_fast.ops.select.triton")
    monkeypatch.setattr(kernels, "MOST_SLICES", 2)
    case = select_cases.Case(2, 600, 24, 9, allowed="sample")
    assert kernels.plan(case.N, case.D, case.M, 1).rounds > 1
    query, keys, allowed = (t.to(backend.device) for t in select_cases.make(case, torch.float32, rng))
    wanted = select_reference.select(query, keys, 9, allowed, 1, False)
    index, _, similarity = ops.select(query, keys, 9, allowed)
    assert torch.equal(index, wanted[2])
    close(similarity, wanted[0].double(), 1e-6)


@everywhere
def test_select_reaches_rows_beyond_32_bits(backend):
    dtype = torch.float32 if backend.name == "cpu" else torch.float16  # which its kernel does not take
    try:
        if backend.device == "cpu":  # through numpy, as torch would fill it: pages that nobody touches cost nothing
            far = torch.from_numpy(np.empty((2**32 + 16) * dtype.itemsize, np.uint8)).view(dtype)
        else:
            far = torch.empty(2**32 + 16, dtype=dtype, device=backend.device)
    except (MemoryError, RuntimeError):
        pytest.skip("there are no 8 GiB here, not even of untouched memory")
    keys = far.as_strided((3, 16), (2**30, 1), 2**31)  # an offset cut to 32 bits lands inside, on other values
    keys.copy_(torch.eye(3, 16))
    unit = torch.eye(3, 16, device=backend.device)
    keys = keys.requires_grad_()
    index, _, similarity = ops.select(unit[[2, 1]] + unit[[0, 0]] / 2, keys, 2)
    assert index.tolist() == [[2, 0], [1, 0]]
    (grad,) = torch.autograd.grad(similarity[:, 0].sum(), keys)
    close(grad[2, :3], torch.tensor([0.2**0.5, 0, 0]).double(), 1e-3)


@everywhere
@pytest.mark.parametrize("reduce", ["sample", "batch"])
def test_select_empty_batch_has_zero_gradient(reduce, backend):
    keys = leaf(torch.randn(5, 6, device=backend.device))
    index, weight, similarity = ops.select(torch.empty(0, 6, device=backend.device), keys, 2, reduce=reduce)
    assert index.shape == weight.shape == similarity.shape == (0, 2)
    similarity.sum().backward()
    assert torch.equal(keys.grad, torch.zeros_like(keys))


@everywhere
@pytest.mark.parametrize("query_dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_select_query_of_another_dtype(query_dtype, backend, rng):
    query, keys = (torch.randn(n, 24, generator=rng).to(backend.device) for n in (3, 11))
    query = query.to(query_dtype)
    index, _, similarity = ops.select(query, keys, 4)
    wanted = select_reference.select(query.double(), keys.double(), 4, None, 1, False)
    assert torch.equal(index, wanted[2]) and similarity.dtype == torch.float32
    close(similarity, wanted[0], 1e-6)


@everywhere
@pytest.mark.parametrize("length", [1e60, 1e-60])  # beyond what float32 holds
def test_select_query_of_any_length(length, backend, rng):
    query, keys = (torch.randn(n, 24, generator=rng).double().to(backend.device) for n in (3, 11))
    keys = leaf(keys.float())
    found, upstream = [], torch.randn(3, 4, generator=rng).to(backend.device)
    for given in (query, query * length):
        index, weight, similarity = ops.select(given, keys, 4)
        found.append((index, weight, similarity, torch.autograd.grad(similarity, keys, upstream)[0]))
    assert torch.equal(found[0][0], found[1][0])
    for of_one, of_other in zip(found[0][1:], found[1][1:], strict=True):
        close(of_other, of_one.double(), 1e-6)


@pytest.mark.skipif(triton_backend.usable() is not None, reason=str(triton_backend.usable()))
@pytest.mark.parametrize(
    ("D", "top_m", "dtype", "reason"),
    [
        (8, 65, torch.float32, "M = 65 is above 64"),
        (8193, 1, torch.float32, "D = 8193 is above 8192"),
        (8, 1, torch.float64, "float64 is not one of"),
    ],
)
def test_select_in_triton_refuses_what_it_cannot_do(D, top_m, dtype, reason):
    query, keys = torch.randn(1, D, device=GPU), torch.randn(70, D, dtype=dtype, device=GPU)
    with ops.backend("triton"), pytest.raises(dispatch.BackendError, match=reason):
        ops.select(query, keys, top_m)


@everywhere
def test_select_gradient_of_zero_norms_is_zero(backend, rng):
    query = torch.randn(2, 8, generator=rng)
    query[0, :4] = 0
    keys = torch.randn(3, 8, generator=rng)
    keys[1] = 0
    keys[2, 4:] = 0
    keys = leaf(keys.to(backend.device))
    ops.select(query.to(backend.device), keys, 3, groups=2)[2].sum().backward()
    assert keys.grad.isfinite().all()
    assert (keys.grad[1] == 0).all() and (keys.grad[2, 4:] == 0).all() and (keys.grad[2, :4] != 0).any()


def test_select_low_precision_compute_is_there_for_comparison(rng):
    query, keys, _ = select_cases.make(select_cases.Case(4, 20, 32, 3), torch.float32, rng)
    low = select_reference.select(query, keys, 3, None, 1, False, compute_dtype=torch.float32)
    assert torch.allclose(low[0], ops.select(query, keys, 3)[2], atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("scale", [1e-25, 1e19, 1e25])
def test_select_of_very_short_and_very_long_vectors(scale, backend, rng):
    query, keys = torch.randn(3, 24, generator=rng), torch.randn(9, 24, generator=rng)
    index, _, similarity = ops.select(query, keys, 4)
    site = dispatch.Site(torch.device("cpu"), torch.float32, ())
    if dispatch._refusal("select", backend, site):
        pytest.skip(f"no backend {backend}")
    with ops.backend(backend):
        for scaled in ((query * scale, keys), (query, keys * scale)):
            found = ops.select(*scaled, 4)
            assert torch.equal(found[0], index)
            close(found[2], similarity.double(), 1e-6)
