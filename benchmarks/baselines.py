"""What a user would write otherwise. The only place in this repository where a dense d_out x d_in offset exists."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_by_batch(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    """The ancestor: one selection for the whole batch (`index`, `coefficient` [P]), added to the frozen weight."""
    offset = torch.einsum("p,pro,pri->oi", coefficient.to(x.dtype), B[index], A[index])  # [d_out, d_in]
    return F.linear(x, weight + offset)


def dense_by_sample(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    """The same for each sample's own selection: one dense weight per sample."""
    scaled = coefficient.to(x.dtype)[:, :, None, None] * B[index]  # [B, P, R, d_out]
    offset = torch.bmm(scaled.flatten(1, 2).transpose(1, 2), A[index].flatten(1, 2))  # [B, d_out, d_in]
    return torch.bmm(x, (weight + offset).transpose(1, 2))


def smart_eager(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    """Gather, two thin batched products, one add; gradients left to autograd."""
    low = torch.bmm(x, A[index].flatten(1, 2).transpose(1, 2))  # [B, S, P * R]
    low = low * coefficient.to(x.dtype).repeat_interleave(A.shape[1], dim=1).unsqueeze(1)
    return torch.baddbmm(F.linear(x, weight), low, B[index].flatten(1, 2))


def frozen(x: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    """The linear alone: the floor, not a rival."""
    return F.linear(x, weight)


def normalise_matmul_topk(query: Tensor, keys: Tensor, top_m: int) -> tuple[Tensor, Tensor]:
    similarity, index = (F.normalize(query, dim=1) @ F.normalize(keys, dim=1).t()).topk(top_m, dim=1)
    positive = similarity.clamp(min=0)
    return positive / positive.sum(1, keepdim=True), index


def repeat_cosine_topk(query: Tensor, keys: Tensor, top_m: int, groups: int = 4) -> tuple[Tensor, Tensor]:
    """The ancestor: the query repeated for every key, cosine per chunk, mean over chunks and batch."""
    pairs = query.unsqueeze(1).repeat(1, keys.shape[0], 1).unflatten(2, (groups, -1))  # [B, N, G, D / G]
    cosine = F.cosine_similarity(pairs, keys.unflatten(1, (groups, -1)).unsqueeze(0), dim=-1)
    similarity, index = cosine.mean(2).mean(0).topk(top_m)
    return similarity / similarity.sum(), index
