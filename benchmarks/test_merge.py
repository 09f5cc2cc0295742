"""merge beside one product of gathered rows; it is for inference and has no gradient."""

from __future__ import annotations

import functools

import torch

from benchmarks import baselines, measure
from benchmarks.measure import Way, Work
from cllava_fast import ops
from cllava_fast.ops.merge import cases

OP = "merge"
WAYS = ("merge", "gather, addmm")


def points(device, quick):
    chosen = cases.QUICK if quick else cases.BENCH if device == "cpu" else cases.BENCH_GPU
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return measure.points(chosen, [dtype], device, lambda case: (measure.FORWARD,))


def inputs(case, dtype, device):
    return tuple(tensor.to(device) for tensor in cases.make(case, dtype, torch.Generator().manual_seed(0)))


def way(name, point, tensors):
    if name == "gather, addmm":
        return Way(baselines.merge_by_gather, exact, tensors)
    merge = functools.partial(ops.merge, check_values=False)
    return Way(merge, exact, tensors, backend=ops.dispatch.AUTO if name == "merge" else name)


def exact(weight, A, B, index, coefficient):
    increments = (c * (B[n].t() @ A[n]) for c, n in zip(coefficient, index.tolist(), strict=True))
    return weight + sum(increments)


def work(point):
    case, size = point.case, point.dtype.itemsize
    weight, columns = case.d_in * case.d_out, case.P * case.R
    rows = min(case.N, case.P) * case.R * (case.d_in + case.d_out)
    return Work((2 * weight + rows) * size, 2 * columns * weight)


def test_merge(comparison):
    comparison()
