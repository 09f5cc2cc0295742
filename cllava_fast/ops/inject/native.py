"""inject in csrc, for few tokens a sample: the library's product, then the increments added to it in place.

Forward only: training has many tokens, and gathers them into matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cllava_fast.ops import dispatch
from cllava_fast.ops.native import dense_rows, factors

MOST_TOKENS = 16  # of one sample, as csrc/cuda/ops.cuh says


def accepts(op: str, site: dispatch.Site, asked: bool) -> str | None:
    return dispatch.above(site, {"S": MOST_TOKENS})


def inject(
    library: Any,
    x: Tensor,  # [B, S, d_in]
    weight: Tensor,  # [d_out, d_in]
    bias: Tensor | None,  # [d_out]
    A: Tensor,  # [N, R, d_in]
    B: Tensor,  # [N, R, d_out]
    index: Tensor,  # [B, P]
    coefficient: Tensor,  # [B, P]
    scale: float,
) -> Tensor:
    y = F.linear(x, weight, bias).contiguous()  # [B, S, d_out]
    add_(library, y, x, A, B, index, coefficient, scale)
    return y


def inject_add(
    library: Any,
    y: Tensor,  # [B, S, d_out]
    x: Tensor,  # [B, S, d_in]
    A: Tensor,
    B: Tensor,
    index: Tensor,
    coefficient: Tensor,
    scale: float,
) -> Tensor:
    y = y.clone(memory_format=torch.contiguous_format)
    add_(library, y, x, A, B, index, coefficient, scale)
    return y


def add_(
    library: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, scale: float
) -> None:
    A, B = factors(A, B, x.dtype)
    library.inject_add(dense_rows(x), A, B, index.contiguous(), coefficient.contiguous(), scale, y)
