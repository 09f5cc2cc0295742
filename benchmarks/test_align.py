"""One step of alignment: the block's keys move to the batch's queries. It needs no model, and is all launches."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks import baselines, measure, models
from benchmarks.measure import Job, Point, Work
from cllava_fast import ops

OP = OWN = "align"
WAYS = ("align", "normalise, matmul, topk", "repeat, cosine, topk")
BACKENDS = ("reference",)
GROUPS = 4  # chunks of the ancestor's keys


class Case(NamedTuple):
    B: int
    N: int
    D: int

    def __str__(self):
        return "-".join(f"{name}{value}" for name, value in self._asdict().items())


def points(device, quick):
    width = 64 if quick else 384
    launch = measure.HOST if device == "cpu" else measure.IDLE
    return [Point(Case(B=32, N=models.ROWS, D=width), torch.float32, "align", launch)]


def inputs(case, dtype, device):
    rng = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, case.D, generator=rng, dtype=dtype).to(device) for rows in (case.B, case.N))


def way(name, point, tensors):
    query, keys = tensors[0], tensors[1].clone().requires_grad_()
    if name == "repeat, cosine, topk":
        similarity = lambda: baselines.repeat_cosine_topk(query, keys, models.TOP_M, GROUPS)[0]  # noqa: E731
        return Job(step(similarity, keys), right(query, keys, by_batch=True), measure.BY_BATCH)
    if name == "normalise, matmul, topk":
        similarity = lambda: baselines.normalise_matmul_topk(query, keys, models.TOP_M)[0]  # noqa: E731
        return Job(step(similarity, keys), right(query, keys), rival=True)
    similarity = lambda: ops.select(query, keys, models.TOP_M, check_values=False)[2]  # noqa: E731
    backend = ops.dispatch.AUTO if name == OWN else name
    return Job(step(similarity, keys), right(query, keys), backend=backend)


def step(similarity, keys):
    """At a learning rate of 0, which is as much work, so that the keys stay those that were checked."""
    optimizer = torch.optim.AdamW([keys], lr=0.0, weight_decay=0.01)

    def run():
        loss = -similarity().mean()
        loss.backward()
        gradient = keys.grad
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach(), gradient

    return run


def right(query, keys, by_batch=False):
    def error(found):
        finer = keys.detach().double().requires_grad_()
        groups = GROUPS if by_batch else 1
        pair = (tensor.unflatten(1, (groups, -1)) for tensor in (query.double(), finer))
        unit = (tensor / tensor.square().sum(2, keepdim=True).sqrt() for tensor in pair)
        cosine = torch.einsum("bgd,ngd->bn", *unit) / groups
        cosine = cosine.mean(0, keepdim=True) if by_batch else cosine
        loss = -cosine.sort(dim=1, descending=True).values[:, : models.TOP_M].mean()
        return measure.error(found, (loss.detach(), *torch.autograd.grad(loss, [finer])))

    return error


def work(point):
    case = point.case
    thin = 2 * case.B * case.N * case.D
    # AdamW reads and writes the keys and both of their moments
    return Work((case.B + 8 * case.N) * case.D * point.dtype.itemsize, 3 * thin)


def test_align(comparison):
    comparison()
