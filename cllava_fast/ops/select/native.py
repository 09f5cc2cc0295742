"""select in csrc: what the native kernels are given, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cllava_fast.ops import dispatch
from cllava_fast.ops.native import dense_rows
from cllava_fast.ops.select.reference import in_range

# The CPU's kernel packs a row into 31 bits, and beyond M a list that is kept in order is no way to a top-M. The limits
# of csrc/cuda/ops.cuh are no lower.
LIMITS = {"M": 64, "groups": 64, "N": 2**31 - 1}
CUDA_BACKWARD_WIDTH = 8192


def cpu_accepts(op: str, site: dispatch.Site, asked: bool) -> str | None:
    if site.dtype != torch.float32:
        return f"keys are {site.dtype}, the CPU's kernel takes float32"
    return dispatch.above(site, LIMITS)


def cuda_accepts(op: str, site: dispatch.Site, asked: bool) -> str | None:
    widest = {"D": CUDA_BACKWARD_WIDTH} if op == "select_backward" else {}
    return dispatch.above(site, LIMITS | widest)


def select(
    library: Any, query: Tensor, keys: Tensor, top_m: int, allowed: Tensor | None, groups: int, by_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """similarity, weight, index, each [B, M]."""
    similarity = query.new_empty((query.shape[0], top_m), dtype=torch.float32)
    weight = torch.empty_like(similarity)
    index = query.new_empty((query.shape[0], top_m), dtype=torch.int64)
    library.select(*prepared(query, keys, allowed, by_batch), groups, by_batch, similarity, weight, index)
    return similarity, weight, index


def prepared(
    query: Tensor, keys: Tensor, allowed: Tensor | None, by_batch: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    allowed = None if allowed is None else as_bytes(allowed, len(query), by_batch)
    return in_range(query).float().contiguous(), dense_rows(keys), allowed


def as_bytes(allowed: Tensor, batch: int, by_batch: bool) -> Tensor:  # bool [N] or [B, N] -> uint8 [B, N], or [1, N]
    if allowed.dim() == 1:
        allowed = allowed.expand(1 if by_batch else batch, -1)
    elif by_batch:
        allowed = allowed.all(0, keepdim=True)
    return allowed.view(torch.uint8)


def select_backward(
    library: Any, grad: Tensor, query: Tensor, keys: Tensor, index: Tensor, groups: int, by_batch: bool
) -> Tensor:
    if grad.numel() == 0 or keys.numel() == 0:
        return torch.zeros_like(keys, memory_format=torch.contiguous_format)
    out = torch.empty_like(keys, memory_format=torch.contiguous_format)
    grad, query = grad.float().contiguous(), in_range(query).float().contiguous()
    library.select_backward(grad, query, dense_rows(keys), index.contiguous(), groups, by_batch, out)
    return out


KERNELS: dict[str, Callable[..., Any]] = {"select": select, "select_backward": select_backward}
