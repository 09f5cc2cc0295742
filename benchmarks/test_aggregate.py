"""aggregate beside its formula written out over all pairs of rows."""

from __future__ import annotations

import torch

from benchmarks import baselines, measure
from benchmarks.measure import Unavailable, Way, Work
from cllava_fast import ops
from cllava_fast.ops.aggregate import cases

OP = "aggregate"
WAYS = ("aggregate", "all pairs", "compiled")


def points(device, quick):
    return measure.points(cases.QUICK if quick else cases.BENCH, [torch.float32], device)


def inputs(case, dtype, device):
    tensors = [t.to(device) for t in cases.make(case, dtype, torch.Generator().manual_seed(0))]
    tensors[1].requires_grad_()  # weight
    tensors[4].requires_grad_()  # context
    return tuple(tensors)


def way(name, point, tensors):
    if name == "compiled":
        if not torch.cuda.is_available() and point.case in cases.QUICK:
            raise Unavailable("compiling takes longer than a quick run")
        return Way(measure.compiled(baselines.aggregate_pairwise), exact, tensors)
    if name == "all pairs":
        return Way(baselines.aggregate_pairwise, exact, tensors)
    backend = ops.dispatch.AUTO if name == "aggregate" else name
    return Way(lambda *tensors: ops.aggregate(*tensors)[1], exact, tensors, backend=backend)


def exact(index, weight, row_task, row_mean, context):
    """Sample by sample and row by row."""
    past = []
    for rows, strengths in zip(index, weight, strict=True):
        seen = torch.zeros_like(row_mean)
        for row, strength in zip(rows, strengths, strict=True):
            task = row_task[row]
            seen = seen + torch.where(row_task < task, strength * context[task, row_task] * row_mean, 0)
        past.append(seen)
    return torch.cat([weight, torch.stack(past)], 1)


def work(point):
    case = point.case
    pairs = case.B * (case.M + case.N)
    rows = case.N * 12 + case.T * case.T * 4 + case.B * case.M * 12
    directions = 2 if point.direction == measure.BOTH else 1
    return Work(directions * (rows + pairs * 12), directions * 3 * case.B * case.M * case.N)


def test_aggregate(comparison):
    comparison()
