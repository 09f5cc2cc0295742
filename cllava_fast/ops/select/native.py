"""select in csrc: what the native kernels are given, on the CPU and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cllava_fast.ops import dispatch, native

MOST_ROWS = 2**31 - 1  # a row and its similarity share 64 bits
CUDA_MOST_SELECTED = 64


def cpu_accepts(op: str, site: dispatch.Site, asked: bool) -> str | None:
    if site.dtype != torch.float32:
        return f"keys are {site.dtype}, the CPU's kernel takes float32"
    return _too_many(site)


def cuda_accepts(op: str, site: dispatch.Site, asked: bool) -> str | None:
    top_m = dict(site.sizes)["M"]
    if top_m > CUDA_MOST_SELECTED:
        return f"M = {top_m} is above {CUDA_MOST_SELECTED}, the most that its running top-M holds"
    return _too_many(site)


def _too_many(site: dispatch.Site) -> str | None:
    rows = dict(site.sizes)["N"]
    return f"N = {rows} is above {MOST_ROWS}" if rows > MOST_ROWS else None


def select(
    query: Tensor, keys: Tensor, top_m: int, allowed: Tensor | None, groups: int, by_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """similarity, weight, index, each [B, M]."""
    similarity = query.new_empty((query.shape[0], top_m), dtype=torch.float32)
    weight = torch.empty_like(similarity)
    index = query.new_empty((query.shape[0], top_m), dtype=torch.int64)
    if allowed is not None:
        if allowed.dim() == 1:
            allowed = allowed.expand(1 if by_batch else len(query), -1)
        elif by_batch:
            allowed = allowed.all(0, keepdim=True)
        allowed = allowed.view(torch.uint8)
    native.ops.select(
        query.float().contiguous(), _rows(keys), allowed, groups, by_batch, similarity, weight, index
    )  # fmt: skip
    return similarity, weight, index


def select_backward(grad: Tensor, query: Tensor, keys: Tensor, index: Tensor, groups: int, by_batch: bool) -> Tensor:
    if grad.numel() == 0 or keys.numel() == 0:
        return torch.zeros_like(keys, memory_format=torch.contiguous_format)
    out = torch.empty_like(keys, memory_format=torch.contiguous_format)
    native.ops.select_backward(
        grad.float().contiguous(), query.float().contiguous(), _rows(keys), index.contiguous(), groups, by_batch, out
    )  # fmt: skip
    return out


def _rows(keys: Tensor) -> Tensor:
    """Rows may lie apart (a slice of wider ones), their entries not."""
    return keys if keys.stride(1) == 1 or keys.shape[1] == 1 else keys.contiguous()
