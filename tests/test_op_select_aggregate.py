"""`select_aggregate`: the bits of the two ops that it joins, what the formula does not read, refusals.

Its values and gradients on every case are in `test_ops.py`.
"""

from __future__ import annotations

import math

import pytest
import torch

from cllava_fast import ops
from cllava_fast.ops.select_aggregate import cases
from tests.ops_helpers import close, leaf, on, on_every_backend

everywhere = on_every_backend("select_aggregate")


def both(case, query, keys, allowed, *tasks):
    """index, coefficient and the gradient to context: of the one op, and of the two."""
    selected, weight, _ = ops.select(query, keys, case.M, allowed, case.groups, case.reduce)
    joined = ops.select_aggregate(query, keys, case.M, *tasks, allowed, case.groups, case.reduce)
    for index, coefficient in (joined, ops.aggregate(selected, weight, *tasks)):
        yield index, coefficient.detach(), *torch.autograd.grad(coefficient.square().sum(), tasks[2:])


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_same_bits_as_select_and_aggregate(case, dtype, backend, rng):
    *inputs, context = on(backend.device, cases.make(case, dtype, rng))
    for ours, wanted in zip(*both(case, *inputs, leaf(context)), strict=True):
        assert torch.equal(ours, wanted)


@everywhere
@pytest.mark.parametrize("reduce", ["sample", "batch"])
@pytest.mark.parametrize(("rows", "width"), [(4, 4), (40, 4096)])  # the larger one is split between blocks
def test_never_reads_what_the_formula_does_not(rows, width, reduce, backend):
    context = torch.full((4, 4), math.nan)
    context[2, 0], context[2, 1], context[1, 0] = 0.5, 0.25, 2.0
    row_mean = torch.full((rows,), math.nan)
    row_mean[:2] = torch.tensor([0.5, 0.25])
    query, keys = torch.zeros(2, width), torch.eye(rows, width)
    query[:, :4] = torch.tensor([0.0, 1, 3, 0])
    if reduce == "sample":
        query[1, :4] = torch.tensor([1.0, 0, 0, 0])
    query, keys, *tasks = on(backend.device, (query, keys, torch.arange(rows).clamp(max=3), row_mean, leaf(context)))
    index, coefficient = ops.select_aggregate(query, keys, 2, *tasks, reduce=reduce)
    first = [0.75, 0.25, 0.75 * 0.25 + 0.25, 0.75 * 0.0625]
    second = [1.0, 0, 0, 0] if reduce == "sample" else first
    close(coefficient[:, :4], torch.tensor([first, second]).double(), 3e-7)
    assert (coefficient[:, 4:] == 0).all()
    assert index[:, :2].tolist() == [[2, 1], [0, 1] if reduce == "sample" else [2, 1]]
    assert torch.equal(index[:, 2:].cpu(), torch.arange(rows).expand(2, rows))
    coefficient[:1].sum().backward()
    wanted = torch.zeros(4, 4).double()
    wanted[2, 0], wanted[2, 1], wanted[1, 0] = 0.375, 0.1875, 0.125
    close(tasks[2].grad, wanted, 3e-7)


def test_float64_arguments_beside_float32_ones(rng):  # by the choice of backend
    case = cases.CASES[1]
    *inputs, row_mean, context = cases.make(case, torch.float32, rng)
    ours, wanted = both(case, *inputs, row_mean.double(), leaf(context))
    assert ours[1].dtype == torch.float64
    close(ours[1], wanted[1], 1e-6)
    assert torch.equal(ours[0], wanted[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3, 7)}, "keys: expected .* D = 7"),
        ({"query": torch.full((3, 8), math.nan)}, "query: expected finite"),
        ({"top_m": 6}, "top_m: expected at most the 5 rows"),
        ({"allowed": torch.arange(5) == 1}, "allowed: top_m = 2 rows are wanted"),
        ({"row_task": torch.zeros(4).long()}, "row_task: expected .* N = 5"),
        ({"row_task": torch.full((5,), 2)}, r"row_task: expected entries in \[0, T\) = \[0, 2\)"),
        ({"row_mean": torch.zeros(5).half()}, "row_mean: expected torch.float32"),
        ({"context": torch.zeros(2, 3)}, "context: expected .* T = 2"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "query": torch.ones(3, 8),
        "keys": torch.ones(5, 8),
        "top_m": 2,
        "row_task": torch.zeros(5).long(),
        "row_mean": torch.zeros(5),
        "context": torch.zeros(2, 2),
    }
    with pytest.raises(ValueError, match=message):
        ops.select_aggregate(**(arguments | change))
