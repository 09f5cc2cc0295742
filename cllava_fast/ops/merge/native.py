"""merge in csrc: what the native kernels are given, on the CPU and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllava_fast.ops import dispatch
from cllava_fast.ops.native import dense_rows, factors


def accepts(op: str, site: dispatch.Site, asked: bool) -> str | None:
    return None


def merge(
    library: Any, weight: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, scale: float
) -> Tensor:
    if 0 in (weight.numel(), index.numel(), A.shape[1]):
        return weight.clone(memory_format=torch.contiguous_format)
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    A, B = factors(A, B, weight.dtype)
    library.merge(dense_rows(weight), A, B, index.contiguous(), coefficient.contiguous(), scale, merged)
    return merged
