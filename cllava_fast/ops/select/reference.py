"""select in plain PyTorch: the definition of right."""

from __future__ import annotations

import torch
from torch import Tensor

from cllava_fast.ops.checks import exact_dtype

SUM_FLOOR = 1e-6  # below this the weights are uniform


def select(
    query: Tensor,  # [B, D]
    keys: Tensor,  # [N, D]
    top_m: int,
    allowed: Tensor | None,  # [N] or [B, N]
    groups: int,
    by_batch: bool,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """similarity, weight, index, each [B, M].

    `compute_dtype` is for comparisons; the default is what makes a choice independent of the batch around it.
    """
    query_units, _ = _units(query, groups, compute_dtype)
    key_units, _ = _units(keys, groups, compute_dtype)
    similarity = query_units.flatten(1) @ key_units.flatten(1).t() / groups  # [B, N]
    if by_batch:
        similarity = similarity.mean(0, keepdim=True)  # [1, N]
        if allowed is not None and allowed.dim() == 2:
            allowed = allowed.all(0)
    similarity = similarity.to(exact_dtype(keys))
    if allowed is not None:
        similarity = similarity.masked_fill(~allowed, float("-inf"))
    # Ranked as float32: two sums that differ in their last float64 bits only (another batch size, another position of
    # the same key) are one number then, and the stable sort gives it to the lowest row.
    index = similarity.float().sort(dim=1, descending=True, stable=True).indices[:, :top_m]  # [B, M]
    similarity = similarity.gather(1, index)
    weight = _weights(similarity)
    if by_batch:
        shape = (query.shape[0], top_m)
        index, weight, similarity = index.expand(shape), weight.expand(shape), similarity.expand(shape)
    return similarity.contiguous(), weight.contiguous(), index.contiguous()


def select_backward(
    grad: Tensor,  # [B, M], of similarity
    query: Tensor,  # [B, D]
    keys: Tensor,  # [N, D]
    index: Tensor,  # [B, M]
    groups: int,
    by_batch: bool,
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """d cos(q, k) / dk = (q^ - cos k^) / |k|, so one weighted sum of queries per row is all that is needed."""
    query_units, _ = _units(query, groups, compute_dtype)  # [B, G, D/G]
    key_units, key_norms = _units(keys, groups, compute_dtype)
    grad = grad.to(compute_dtype)
    if by_batch and query.shape[0] > 0:
        grad = grad.sum(0, keepdim=True).expand_as(grad) / query.shape[0]
    # The rows of one sample are distinct, so this scatter has no collisions and no order to depend on.
    per_row = grad.new_zeros(query.shape[0], keys.shape[0]).scatter(1, index, grad)  # [B, N]
    pull = (per_row.t() @ query_units.flatten(1)).view_as(key_units)  # [N, G, D/G]
    across = pull - key_units * (key_units * pull).sum(-1, keepdim=True)
    across = torch.where(key_norms > 0, across / (key_norms * groups), 0)
    return across.flatten(1).to(keys.dtype)


def in_range(query: Tensor) -> Tensor:  # [B, D]
    """For backends that compute in float32, whose range a float64 row may exceed: its length makes no difference."""
    if query.dtype != torch.float64 or query.numel() == 0:
        return query
    return query / query.abs().amax(1, keepdim=True).clamp(min=torch.finfo(query.dtype).tiny)


def _weights(similarity: Tensor) -> Tensor:  # [B, M] -> [B, M]
    positive = similarity.clamp(min=0)
    total = positive.sum(1, keepdim=True)
    usable = (similarity != float("-inf")).to(similarity.dtype)  # all ones, unless the caller skipped the count
    uniform = usable / usable.sum(1, keepdim=True).clamp(min=1)
    return torch.where(total < SUM_FLOOR, uniform, positive / total).float()


def _units(vectors: Tensor, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Chunks of length one (or zero, where the norm is zero) `[n, G, D/G]`, and their norms `[n, G, 1]`."""
    chunks = vectors.to(dtype).reshape(vectors.shape[0], groups, vectors.shape[1] // groups)
    norms = torch.linalg.vector_norm(chunks, dim=-1, keepdim=True)
    return torch.where(norms > 0, chunks / norms, torch.where(norms.isnan(), chunks, 0)), norms
