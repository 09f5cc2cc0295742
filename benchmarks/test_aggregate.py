"""aggregate and mix_factors, forward and backward."""

from __future__ import annotations

import pytest
import torch

from cllava_fast import ops
from cllava_fast.ops.aggregate import cases

QUICK = (*cases.QUICK, *cases.MIX_QUICK)
BENCH = (*cases.BENCH, *cases.MIX_BENCH)


def pairwise(index, weight, row_task, row_mean, context):
    """Every (sample, selected row, row) at once, straight from the formula."""
    of, by = row_task[index].unsqueeze(2), row_task.expand(*index.shape, -1)  # [B, M, 1], [B, M, N]
    past = torch.where(by < of, weight.unsqueeze(2) * context[of, by] * row_mean, 0).sum(1)
    return torch.cat([weight, past], 1)


def gathered_sums(A, B, coefficient, index):
    return tuple(torch.einsum("bp,bprd->brd", coefficient, factor[index]) for factor in (A, B))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_aggregate(case, backward, timed, rng):
    if isinstance(case, cases.MixCase):
        *leaves, index = cases.make_mix(case, torch.float32, rng)
        run_op = lambda A, B, c: ops.mix_factors(A, B, c, index)  # noqa: E731
        run_exact = lambda A, B, c: gathered_sums(A, B, c, index)  # noqa: E731
    else:
        index, weight, row_task, row_mean, context = cases.make(case, torch.float32, rng)
        leaves = [weight, context]
        run_op = lambda w, c: (ops.aggregate(index, w, row_task, row_mean, c)[1],)  # noqa: E731
        run_exact = lambda w, c: (pairwise(index, w, row_task, row_mean.double(), c),)  # noqa: E731

    def run(function, tensors):
        if not backward:
            return function(*tensors)
        tensors = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(sum(output.square().sum() for output in function(*tensors)), tensors)

    timed(lambda: run(run_op, leaves), run(run_exact, [t.double() for t in leaves]), 1e-5)
