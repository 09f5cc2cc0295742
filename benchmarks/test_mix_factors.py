"""mix_factors beside a gather with a weighted sum, and beside one product with the whole pool."""

from __future__ import annotations

import functools

import torch

from benchmarks import baselines, measure
from benchmarks.measure import Unavailable, Way, Work
from cllava_fast import ops
from cllava_fast.ops.aggregate import cases

OP = "mix_factors"
WAYS = ("mix_factors", "gather, bmm", "whole pool", "compiled")
FUNCTIONS = {"gather, bmm": baselines.gathered_sums, "whole pool": baselines.whole_pool_sums}


def points(device, quick):
    if quick:
        return measure.points(cases.MIX_QUICK, [torch.float32], device)
    if device == "cpu":
        return measure.points(cases.MIX_BENCH, [torch.float32], device)
    return measure.points(cases.MIX_BENCH_GPU, [torch.bfloat16], device)


def inputs(case, dtype, device):
    A, B, coefficient, index = (t.to(device) for t in cases.make_mix(case, dtype, torch.Generator().manual_seed(0)))
    return *(t.requires_grad_() for t in (A, B, coefficient)), index


def way(name, point, tensors):
    form = as_they_are if point.direction == measure.FORWARD else joined
    if name == "compiled":
        if not torch.cuda.is_available() and point.case in cases.MIX_QUICK:
            raise Unavailable("compiling takes longer than a quick run")
        return Way(measure.compiled(form(baselines.gathered_sums)), form(exact), tensors)
    if name in FUNCTIONS:
        return Way(form(FUNCTIONS[name]), form(exact), tensors)
    backend = ops.dispatch.AUTO if name == "mix_factors" else name
    return Way(form(ops.mix_factors), form(exact), tensors, backend=backend)


def as_they_are(function):
    return function


@functools.cache
def joined(function):
    """Gradients start from one output, here from both at once."""
    return lambda *tensors: torch.cat(function(*tensors), 2)


def exact(A, B, coefficient, index):
    return tuple(torch.einsum("bp,bprd->brd", coefficient, factor[index]) for factor in (A, B))


def work(point):
    case, size = point.case, point.dtype.itemsize
    width = case.R * (case.d_in + case.d_out)
    rows = min(case.N, case.B * case.P) * width * size
    sums = case.B * width * size
    flops = 2 * case.B * case.P * width
    forward, backward = Work(rows + sums, flops), Work(sums + rows + case.N * width * size, 2 * flops)
    return forward.then(backward, point.direction)


def test_mix_factors(comparison):
    comparison()
