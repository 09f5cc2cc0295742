"""inject in plain PyTorch: the definition of right.

The P pairs of a sample are joined to K = P * R columns; two thin batched products do the rest, so nothing of the size
of the frozen weight is ever allocated. Where many pairs act, samples take turns: their rows of factors, gathered for
all at once, would outweigh the activations.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

GATHERED = 2**21  # entries of a factor that may be gathered at once, if that is not less than one sample's


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
    return _expand_(y, _scaled_shrink(x, A, index, coefficient, scale), B, index)


def inject_add(
    y: Tensor,  # [B, S, d_out]
    x: Tensor,  # [B, S, d_in]
    A: Tensor,
    B: Tensor,
    index: Tensor,
    coefficient: Tensor,
    scale: float,
) -> Tensor:
    total = y.clone(memory_format=torch.contiguous_format)
    return _expand_(total, _scaled_shrink(x, A, index, coefficient, scale), B, index)


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
    strength = _strength(coefficient, scale, A.shape[1], exact)  # [B, 1, K]
    low = low_grad = grad.new_empty(0)
    if need_B or need_coefficient:
        assert x is not None
        low = _shrink(x, A, index).to(exact)  # [B, S, K], recomputed rather than saved
    if need_x or need_A or need_coefficient:
        low_grad = _shrink(grad, B, index).to(exact)  # [B, S, K]
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
        if need_x:
            to_x = grad.new_zeros(*grad.shape[:2], A.shape[2]) if weight is None else grad @ weight
            _expand_(to_x, scaled, A, index)
    return to_x, to_A, to_B, to_coefficient


def _scaled_shrink(x: Tensor, A: Tensor, index: Tensor, coefficient: Tensor, scale: float) -> Tensor:  # -> [B, S, K]
    exact = _exact(x)
    low = _shrink(x, A, index)
    return (low.to(exact) * _strength(coefficient, scale, A.shape[1], exact)).to(x.dtype)


def _strength(coefficient: Tensor, scale: float, rank: int, exact: torch.dtype) -> Tensor:  # [B, P] -> [B, 1, K]
    return (coefficient.to(exact) * scale).repeat_interleave(rank, dim=1).unsqueeze(1)


def _shrink(x: Tensor, factor: Tensor, index: Tensor) -> Tensor:  # [B, S, d] -> [B, S, K]
    parts = [torch.bmm(x[at], _columns(factor, index[at], x.dtype).transpose(1, 2)) for at in _turns(factor, index)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _expand_(y: Tensor, low: Tensor, factor: Tensor, index: Tensor) -> Tensor:  # [B, S, K] added to [B, S, d]
    for at in _turns(factor, index):
        y[at].baddbmm_(low[at], _columns(factor, index[at], y.dtype))
    return y


def _turns(factor: Tensor, index: Tensor) -> Iterator[slice]:
    """Which samples are worked on together."""
    together = max(1, GATHERED // max(1, index.shape[1] * factor.shape[1] * factor.shape[2]))
    for first in range(0, max(1, index.shape[0]), together):
        yield slice(first, first + together)


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
