"""merge in plain PyTorch, whose matrix products no kernel of ours has beaten: csrc/README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from cllava_fast.ops.checks import exact_dtype


def merge(
    weight: Tensor,  # [d_out, d_in]
    A: Tensor,  # [N, R, d_in]
    B: Tensor,  # [N, R, d_out]
    index: Tensor,  # [P]
    coefficient: Tensor,  # [P]
    scale: float,
) -> Tensor:
    # A GPU's products of bfloat16 are several times as fast, and round the sum twice.
    exact = exact_dtype(weight)
    strength = (coefficient.to(exact) * scale).repeat_interleave(A.shape[1]).unsqueeze(1)  # [K, 1]
    columns_A, columns_B = (f.index_select(0, index).to(exact).flatten(0, 1) for f in (A, B))  # [K, d], copies
    return torch.addmm(weight.to(exact), columns_B.mul_(strength).t(), columns_A).to(weight.dtype)
