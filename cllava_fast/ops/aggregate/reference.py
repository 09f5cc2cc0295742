"""aggregate in plain PyTorch: the definition of right.

`where`, never a product with 0, keeps out what the formula does not read: an untrained task may hold anything, NaN too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllava_fast.ops.checks import exact_dtype


def aggregate(
    index: Tensor,  # [B, M]
    weight: Tensor,  # [B, M]
    row_task: Tensor,  # [N]
    row_mean: Tensor,  # [N]
    context: Tensor,  # [T, T]
) -> tuple[Tensor, Tensor]:
    """coefficient, index, each [B, M + N]."""
    exact = exact_dtype(weight, row_mean, context)
    looks, read = _looks_back(index, row_task, context.shape[0])
    scalars = torch.where(looks, context[row_task[index]].to(exact), 0)  # [B, M, T]
    by_task = (weight.to(exact).unsqueeze(2) * scalars).sum(1)  # [B, T]
    past = torch.where(read, by_task[:, row_task] * row_mean.to(exact), 0)  # [B, N]
    rows = torch.arange(row_task.shape[0], device=index.device).expand(index.shape[0], -1)  # [B, N]
    return torch.cat([weight.to(exact), past], dim=1), torch.cat([index, rows], dim=1)


def aggregate_backward(
    grad: Tensor,  # [B, M + N]
    index: Tensor,  # [B, M]
    weight: Tensor,  # [B, M]
    row_task: Tensor,  # [N]
    row_mean: Tensor,  # [N]
    context: Tensor,  # [T, T]
    needed: list[bool],  # weight, context
) -> tuple[Tensor, Tensor]:
    exact = exact_dtype(weight, row_mean, context)
    tasks = context.shape[0]
    every_task = torch.arange(tasks, device=index.device)
    looks, read = _looks_back(index, row_task, tasks)
    own, past = grad[:, : index.shape[1]].to(exact), grad[:, index.shape[1] :].to(exact)
    members = (row_task.unsqueeze(1) == every_task).to(exact)  # [N, T]
    by_task = torch.where(read, past * row_mean.to(exact), 0) @ members  # [B, T]
    grad_weight, grad_context = weight.new_empty(0), context.new_empty(0)
    if needed[0]:
        scalars = context[row_task[index]].to(exact)  # [B, M, T]
        grad_weight = (own + torch.where(looks, scalars * by_task.unsqueeze(1), 0).sum(2)).to(weight.dtype)
    if needed[1]:
        from_task = (row_task[index].unsqueeze(2) == every_task).to(exact)  # [B, M, T]
        mass = (from_task * weight.to(exact).unsqueeze(2)).sum(1)  # [B, T]
        earlier = every_task < every_task.unsqueeze(1)  # [T, T]
        grad_context = torch.where(earlier, mass.t() @ by_task, 0).to(context.dtype)
    return grad_weight, grad_context


def _looks_back(index: Tensor, row_task: Tensor, tasks: int) -> tuple[Tensor, Tensor]:
    """Which tasks each selected row looks back at `[B, M, T]`, and which rows a sample reads at all `[B, N]`."""
    looks = torch.arange(tasks, device=index.device) < row_task[index].unsqueeze(2)
    return looks, looks.any(1)[:, row_task]
