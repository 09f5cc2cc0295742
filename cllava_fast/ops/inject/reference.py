"""inject in plain PyTorch: the definition of right.

The P pairs of a sample are joined to K = P * R columns; two thin batched products do the rest, so nothing of the size
of the frozen weight is ever allocated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def inject(
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
    low = _scaled_shrink(x, A, index, coefficient, scale)
    return y.baddbmm_(low, _columns(B, index, x.dtype))


def inject_add(
    y: Tensor,  # [B, S, d_out]
    x: Tensor,  # [B, S, d_in]
    A: Tensor,
    B: Tensor,
    index: Tensor,
    coefficient: Tensor,
    scale: float,
) -> Tensor:
    low = _scaled_shrink(x, A, index, coefficient, scale)
    return torch.baddbmm(y, low, _columns(B, index, x.dtype)).contiguous()


def inject_backward(
    grad: Tensor,  # [B, S, d_out]
    x: Tensor | None,  # [B, S, d_in]; None if only x's own gradient is needed
    weight: Tensor | None,  # [d_out, d_in]; None for inject_add
    A: Tensor,
    B: Tensor,
    index: Tensor,
    coefficient: Tensor,
    scale: float,
    needed: list[bool],  # x, A, B, coefficient
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is not needed comes back empty."""
    need_x, need_A, need_B, need_coefficient = needed
    to_x, to_A, to_B, to_coefficient = grad.new_empty(0), A.new_empty(0), B.new_empty(0), coefficient.new_empty(0)
    grad = grad.contiguous()  # a reduction's gradient is expanded, and is read up to three times here
    exact = _exact(grad)
    columns_A = _columns(A, index, grad.dtype)  # [B, K, d_in]
    strength = _strength(coefficient, scale, A.shape[1], exact)  # [B, 1, K]
    low = low_grad = grad.new_empty(0)
    if need_B or need_coefficient:
        assert x is not None
        low = torch.bmm(x, columns_A.transpose(1, 2)).to(exact)  # [B, S, K], recomputed rather than saved
    if need_x or need_A or need_coefficient:
        columns_B = _columns(B, index, grad.dtype)  # [B, K, d_out]
        low_grad = torch.bmm(grad, columns_B.transpose(1, 2)).to(exact)  # [B, S, K]
    if need_coefficient:
        by_pair = (low_grad * low).sum(1).reshape(*index.shape, A.shape[1]).sum(2)  # [B, P]
        to_coefficient = (by_pair * scale).to(coefficient.dtype)
    if need_B:
        scaled = (low * strength).to(grad.dtype)
        to_B = _sum_by_row(torch.bmm(scaled.transpose(1, 2), grad), B, index)
    if need_x or need_A:
        scaled = (low_grad * strength).to(grad.dtype)
        if need_A:
            assert x is not None
            to_A = _sum_by_row(torch.bmm(scaled.transpose(1, 2), x), A, index)
        if need_x and weight is not None:
            to_x = (grad @ weight).baddbmm_(scaled, columns_A)
        elif need_x:
            to_x = torch.bmm(scaled, columns_A)
    return to_x, to_A, to_B, to_coefficient


def _scaled_shrink(x: Tensor, A: Tensor, index: Tensor, coefficient: Tensor, scale: float) -> Tensor:  # -> [B, S, K]
    exact = _exact(x)
    low = torch.bmm(x, _columns(A, index, x.dtype).transpose(1, 2))
    return (low.to(exact) * _strength(coefficient, scale, A.shape[1], exact)).to(x.dtype)


def _strength(coefficient: Tensor, scale: float, rank: int, exact: torch.dtype) -> Tensor:  # [B, P] -> [B, 1, K]
    return (coefficient.to(exact) * scale).repeat_interleave(rank, dim=1).unsqueeze(1)


def _columns(factor: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:  # [N, R, d] -> [B, K, d]
    if factor.shape[0] <= index.numel():  # whichever is smaller is cast
        factor = factor.to(dtype)
    return factor[index].to(dtype).flatten(1, 2)


def _sum_by_row(by_pair: Tensor, factor: Tensor, index: Tensor) -> Tensor:  # [B, K, d] -> [N, R, d]
    """A one-hot product instead of index_add: no atomics, so one order of summation."""
    exact = _exact(by_pair)
    rows = torch.arange(factor.shape[0], device=index.device).unsqueeze(1)
    chosen = (index.reshape(1, -1) == rows).to(exact)  # [N, B * P]
    by_pair = by_pair.reshape(index.numel(), factor.shape[1] * factor.shape[2]).to(exact)
    return (chosen @ by_pair).view(factor.shape).to(factor.dtype)


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
