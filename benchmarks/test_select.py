"""select beside normalise + matmul + topk and beside the ancestor's repeat + cosine."""

from __future__ import annotations

import baselines
import pytest
import torch
import torch.nn.functional as F

from cllava_fast import ops
from cllava_fast.ops.select.cases import BENCH, QUICK, make  # noqa: F401

WAYS = ("select", "normalise_matmul_topk", "repeat_cosine_topk")


@pytest.mark.parametrize("way", WAYS)
def test_select(case, way, timed, rng):
    by_batch = case.reduce == "batch"
    if way != "select" and by_batch != (way == "repeat_cosine_topk"):
        pytest.skip("this way has other semantics")
    query, keys, allowed = make(case, torch.float32, rng)
    chunks = query.double().unflatten(1, (case.groups, -1)).unsqueeze(1), keys.double().unflatten(1, (case.groups, -1))
    table = torch.stack([F.cosine_similarity(q, chunks[1], dim=-1).mean(1) for q in chunks[0]])
    table = table.mean(0, keepdim=True).expand_as(table) if by_batch else table
    similarity, index = table.topk(case.M, dim=1)
    weight = similarity.clamp(min=0) / similarity.clamp(min=0).sum(1, keepdim=True)
    if way == "select":
        run = lambda: ops.select(query, keys, case.M, allowed, case.groups, case.reduce)[1::-1]  # noqa: E731
    elif way == "repeat_cosine_topk":
        weight, index = weight[0], index[0]
        run = lambda: baselines.repeat_cosine_topk(query, keys, case.M, case.groups)  # noqa: E731
    else:
        run = lambda: baselines.normalise_matmul_topk(query, keys, case.M)  # noqa: E731
    assert torch.equal(run()[1], index)
    timed(run, (weight, index.double()), 1e-4)
