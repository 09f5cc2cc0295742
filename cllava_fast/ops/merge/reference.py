"""merge in plain PyTorch: the definition of right."""

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
    columns_A, columns_B = A[index].to(exact).flatten(0, 1), B[index].to(exact).flatten(0, 1)  # [K, d]
    # the increments first: their sum is small, and is rounded once more where it meets the weight
    merged = (strength * columns_B).t() @ columns_A + weight.to(exact)
    return merged.to(weight.dtype)
