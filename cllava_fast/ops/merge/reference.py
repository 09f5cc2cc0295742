"""merge in plain PyTorch, whose matrix products no kernel of ours has beaten: csrc/README.md."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(
    weight: Tensor,  # [d_out, d_in]
    A: Tensor,  # [N, R, d_in]
    B: Tensor,  # [N, R, d_out]
    index: Tensor,  # [P]
    coefficient: Tensor,  # [P]
    scale: float,
) -> Tensor:
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    strength = (coefficient.to(exact) * scale).repeat_interleave(A.shape[1]).unsqueeze(1)  # [K, 1]
    columns_A, columns_B = (f.index_select(0, index).flatten(0, 1) for f in (A, B))  # [K, d]
    scaled = strength * columns_B.to(exact)
    if weight.is_cuda and weight.dtype == columns_A.dtype == torch.bfloat16:
        return add_product(weight, columns_A, scaled)
    return torch.addmm(weight.to(exact), scaled.t(), columns_A.to(exact)).to(weight.dtype)


def add_product(weight: Tensor, columns_A: Tensor, scaled: Tensor) -> Tensor:
    """weight + scaled^T columns_A on tensor cores, which multiply bfloat16 exactly and add up in float32: float32
    `scaled [K, d_out]` goes in as two bfloat16 terms, whose sum is off by 2^-17 of it where the result is by 2^-9."""
    high = scaled.bfloat16()
    low = (scaled - high).bfloat16()
    return torch.addmm(weight, torch.cat([high, low]).t(), torch.cat([columns_A, columns_A]))
