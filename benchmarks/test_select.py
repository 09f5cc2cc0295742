"""select beside normalise + matmul + topk and beside the ancestor's repeat + cosine."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks import baselines, measure
from benchmarks.measure import Unavailable, Way, Work
from cllava_fast import ops
from cllava_fast.ops.select import cases

OP = "select"
WAYS = ("select", "normalise, matmul, topk", "compiled", "repeat, cosine, topk")


def points(device, quick):
    chosen = cases.QUICK if quick else cases.BENCH if device == "cpu" else cases.BENCH_GPU
    directions = lambda case: measure.DIRECTIONS if case.N <= 64 else (measure.FORWARD,)  # noqa: E731
    found = measure.points(chosen, [torch.float32], device, directions)
    if device != "cpu" and not quick:  # where reading the keys takes long enough for their dtype to matter
        found += measure.points([case for case in chosen if case.N > 64], [torch.bfloat16], device, directions)
    return found


def inputs(case, dtype, device):
    query, keys, _ = cases.make(case, dtype, torch.Generator().manual_seed(0))
    return query.float().to(device), keys.to(device).requires_grad_(case.N <= 64)  # a task's block is aligned


def way(name, point, tensors):
    case = point.case
    by_batch = case.reduce == "batch"
    tensors = (*tensors, case.M, case.groups)
    if name == "repeat, cosine, topk":
        note = "" if by_batch else measure.BY_BATCH
        return Way(baselines.repeat_cosine_topk, exact_by_batch, tensors, note, rival=by_batch)
    if name in ("normalise, matmul, topk", "compiled"):
        if by_batch or case.groups > 1:
            raise Unavailable("selects by sample, from whole cosines")
        function = normalise_matmul_topk
        if name == "compiled":
            if point.dtype != torch.float32:
                raise Unavailable("compiled for float32 keys")
            if not torch.cuda.is_available() and case in cases.QUICK and case.N > 64:
                raise Unavailable("compiling takes longer than a quick run")
            function = measure.compiled(function)
        return Way(function, exact_by_sample, tensors)
    backend = ops.dispatch.AUTO if name == "select" else name
    exact = exact_as_by_batch if by_batch else exact_by_sample

    def select(query, keys, top_m, groups):
        # what they hold is known, so nobody needs to look, which would wait for the device
        index, weight, similarity = ops.select(query, keys, top_m, None, groups, case.reduce, check_values=False)
        return similarity, weight, index

    return Way(select, exact, tensors, backend=backend)


def normalise_matmul_topk(query, keys, top_m, groups):
    return baselines.normalise_matmul_topk(query, keys, top_m)


def cosines(query, keys, groups):  # float64 [B, N], one sample at a time
    chunks = keys.unflatten(1, (groups, -1))
    table = [F.cosine_similarity(one.view(1, groups, -1), chunks, dim=-1).mean(1) for one in query]
    return torch.stack(table)


def exact_by_sample(query, keys, top_m, groups):
    similarity, index = cosines(query, keys, groups).topk(top_m, dim=1)
    positive = similarity.clamp(min=0)
    return similarity, positive / positive.sum(1, keepdim=True), index


def exact_by_batch(query, keys, top_m, groups):
    similarity, index = cosines(query, keys, groups).mean(0).topk(top_m)
    return similarity, similarity / similarity.sum(), index


def exact_as_by_batch(query, keys, top_m, groups):
    """One row of results for each sample, all equal."""
    return tuple(result.expand(len(query), -1) for result in exact_by_batch(query, keys, top_m, groups))


def work(point):
    case = point.case
    read = case.N * case.D * point.dtype.itemsize
    queries = case.B * case.D * 4 + case.B * case.M * 16
    forward = Work(read + queries, 2 * case.B * case.N * case.D)
    backward = Work(2 * read + queries, 4 * case.B * case.M * case.D)
    return forward.then(backward, point.direction)


def test_select(comparison):
    comparison()
