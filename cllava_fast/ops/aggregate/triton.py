"""aggregate in Triton: the product form's coefficients in one launch, and their gradients to weight and context.

Nothing is masked by a product with 0: what the formula does not read is not loaded, or not let through a `where`.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cllava_fast.ops.aggregate.native import dense
from cllava_fast.ops.triton_backend import Shipped

COLUMNS = 256  # pairs of one sample, or rows of the pool, at a time
UNROLL = 4  # selected rows whose loads are in flight together
TILE = 16  # tasks, or samples, on each side of a tile


@triton.jit
def coefficient_kernel(
    index, weight, row_task, row_mean, context, coefficient, rows,
    M, N, T, tiles,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    own = column < M
    n = column - M
    task = tl.load(row_task + n, mask=(n >= 0) & (n < N), other=T)  # of task T: earlier than none
    past = tl.zeros((BLOCK,), dtype=tl.float32)
    read = tl.zeros((BLOCK,), dtype=tl.int1)
    for first in range(0, M, UNROLL):
        for step in tl.static_range(UNROLL):
            m = first + step
            chosen = tl.load(index + sample * M + m, mask=m < M, other=0)
            strength = tl.load(weight + sample * M + m, mask=m < M, other=0)
            from_task = tl.load(row_task + chosen, mask=m < M, other=-1)
            looks = task < from_task
            past += strength * tl.load(context + from_task * T + task, mask=looks, other=0)
            read |= looks
    mean = tl.load(row_mean + n, mask=read, other=0)
    value = tl.load(weight + sample * M + column, mask=own, other=0)
    value = tl.where(own, value, tl.where(read, past * mean, 0))
    row = tl.load(index + sample * M + column, mask=own, other=0)
    place = sample * (M + N) + column
    tl.store(coefficient + place, value, mask=n < N)
    tl.store(rows + place, tl.where(own, row, n.to(tl.int64)), mask=n < N)


@triton.jit
def weight_gradient_kernel(
    grad, index, row_task, row_mean, context, grad_weight,
    M, N, T,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each selected row of each sample."""
    pair = tl.program_id(0).to(tl.int64)
    upstream = grad + (pair // M) * (M + N)
    from_task = tl.load(row_task + tl.load(index + pair))
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        task = tl.load(row_task + n, mask=n < N, other=T)
        looks = task < from_task
        scalar = tl.load(context + from_task * T + task, mask=looks, other=0)
        mean = tl.load(row_mean + n, mask=looks, other=0)
        total += scalar * (mean * tl.load(upstream + M + n, mask=looks, other=0))
    own = tl.load(upstream + pair % M)
    tl.store(grad_weight + pair, own + tl.sum(total, axis=0))


@triton.jit
def task_sum_kernel(
    grad, row_task, row_mean, task_sum,
    M, N, T, tiles,
    TASKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """task_sum[b, t] = sum over the rows n of task t of grad[b, M + n] * row_mean[n]. NaN where task t holds NaN."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    t = (tl.program_id(0) % tiles) * TASKS + tl.arange(0, TASKS)
    total = tl.zeros((TASKS, BLOCK), dtype=tl.float32)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        task = tl.load(row_task + n, mask=n < N, other=-1)
        mean = tl.load(row_mean + n, mask=n < N, other=0)
        value = mean * tl.load(grad + sample * (M + N) + M + n, mask=n < N, other=0)
        total += tl.where(task[None, :] == t[:, None], value[None, :], 0)
    tl.store(task_sum + sample * T + t, tl.sum(total, axis=1), mask=t < T)


@triton.jit
def context_gradient_kernel(
    index, weight, row_task, task_sum, grad_context,
    B, M, T, tiles,
    TILE: tl.constexpr,
):  # fmt: skip
    """One tile [TILE, TILE] of the gradient, over the samples in fixed order."""
    t = (tl.program_id(0) // tiles) * TILE + tl.arange(0, TILE)
    s = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    # above the diagonal there is nothing to add up
    samples = tl.where(tl.program_id(0) % tiles <= tl.program_id(0) // tiles, B, 0)
    for first in range(0, samples, TILE):
        b = (first + tl.arange(0, TILE)).to(tl.int64)
        inside = b < samples
        mass = tl.zeros((TILE, TILE), dtype=tl.float32)  # weight that each sample puts on rows of each task
        present = tl.zeros((TILE, TILE), dtype=tl.int1)
        for m in range(0, M):
            chosen = tl.load(index + b * M + m, mask=inside, other=0)
            strength = tl.load(weight + b * M + m, mask=inside, other=0)
            same = tl.load(row_task + chosen, mask=inside, other=-1)[:, None] == t[None, :]
            mass += tl.where(same, strength[:, None], 0)
            present |= same
        by_task = tl.load(
            task_sum + b[:, None] * T + s[None, :], mask=inside[:, None] & (s[None, :] < T), other=0
        )  # [b, s]
        each = tl.where(present[:, :, None], mass[:, :, None] * by_task[:, None, :], 0)  # [b, t, s]
        total += tl.sum(each, axis=0)
    total = tl.where(s[None, :] < t[:, None], total, 0)
    place = t[:, None].to(tl.int64) * T + s[None, :]
    tl.store(grad_context + place, total, mask=(t[:, None] < T) & (s[None, :] < T))


def aggregate(
    index: Tensor, weight: Tensor, row_task: Tensor, row_mean: Tensor, context: Tensor
) -> tuple[Tensor, Tensor]:
    index, weight, row_task, row_mean, context = dense(index, weight, row_task, row_mean, context)
    (samples, chosen), pool = index.shape, len(row_task)
    coefficient = weight.new_empty(samples, chosen + pool, dtype=torch.float32)
    rows = index.new_empty(samples, chosen + pool)
    if coefficient.numel():
        tiles = triton.cdiv(chosen + pool, COLUMNS)
        coefficient_kernel[(samples * tiles,)](
            index, weight, row_task, row_mean, context, coefficient, rows,
            chosen, pool, len(context), tiles,
            BLOCK=COLUMNS, UNROLL=UNROLL, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return coefficient, rows


def aggregate_backward(
    grad: Tensor,
    index: Tensor,
    weight: Tensor,
    row_task: Tensor,
    row_mean: Tensor,
    context: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:
    grad, index, weight, row_task, row_mean, context = dense(grad.float(), index, weight, row_task, row_mean, context)
    (samples, chosen), pool, tasks = index.shape, len(row_task), len(context)
    grad_weight, grad_context = weight.new_empty(0), context.new_empty(0)
    if needed[0]:
        grad_weight = weight.new_empty(samples, chosen)
        if samples * chosen:
            weight_gradient_kernel[(samples * chosen,)](
                grad, index, row_task, row_mean, context, grad_weight,
                chosen, pool, tasks,
                BLOCK=COLUMNS, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    if needed[1] and samples * chosen * pool == 0:
        grad_context = torch.zeros_like(context)
    elif needed[1]:
        grad_context = torch.empty_like(context)
        task_sum = grad.new_empty(samples, tasks)
        tiles = triton.cdiv(tasks, TILE)
        task_sum_kernel[(samples * tiles,)](
            grad, row_task, row_mean, task_sum,
            chosen, pool, tasks, tiles,
            TASKS=TILE, BLOCK=COLUMNS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        context_gradient_kernel[(tiles * tiles,)](
            index, weight, row_task, task_sum, grad_context,
            samples, chosen, tasks, tiles,
            TILE=TILE, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return grad_weight, grad_context


def shipped() -> list[Shipped]:
    """float32 throughout: float64 is left to the reference."""
    types = {"index": "*i64", "rows": "*i64", "row_task": "*i64"} | dict.fromkeys(("B", "M", "N", "T", "tiles"), "i32")
    blocks = {"BLOCK": COLUMNS, "UNROLL": UNROLL, "TILE": TILE, "TASKS": TILE}
    kernels = (coefficient_kernel, weight_gradient_kernel, task_sum_kernel, context_gradient_kernel)
    return [
        Shipped(
            kernel=kernel,
            signature={name: types.get(name, "*fp32") for name in kernel.arg_names if name not in blocks},
            constants={name: blocks[name] for name in kernel.arg_names if name in blocks},
        )
        for kernel in kernels
    ]
