"""mix_factors in plain PyTorch: the definition of right."""

from __future__ import annotations

import torch
from torch import Tensor

from cllava_fast.ops.checks import exact_dtype


def mix_factors(
    A: Tensor,  # [N, R, d_in]
    B: Tensor,  # [N, R, d_out]
    coefficient: Tensor,  # [B, P]
    index: Tensor,  # [B, P]
) -> tuple[Tensor, Tensor]:
    return _mix(A, coefficient, index), _mix(B, coefficient, index)


def mix_factors_backward(
    grad_A: Tensor,  # [B, R, d_in], of A_mix
    grad_B: Tensor,  # [B, R, d_out], of B_mix
    A: Tensor,
    B: Tensor,
    coefficient: Tensor,
    index: Tensor,
    needed: list[bool],  # A, B, coefficient
) -> tuple[Tensor, Tensor, Tensor]:
    to_A = _to_rows(grad_A, A, coefficient, index) if needed[0] else A.new_empty(0)
    to_B = _to_rows(grad_B, B, coefficient, index) if needed[1] else B.new_empty(0)
    to_coefficient = coefficient.new_empty(0)
    if needed[2]:
        to_coefficient = _along_rows(grad_A, A, index) + _along_rows(grad_B, B, index)
        to_coefficient = to_coefficient.to(coefficient.dtype)
    return to_A, to_B, to_coefficient


def _mix(factor: Tensor, coefficient: Tensor, index: Tensor) -> Tensor:  # -> [B, R, d]
    exact = exact_dtype(factor)
    mixed = torch.bmm(coefficient.to(exact).unsqueeze(1), _rows(factor, index, exact))  # [B, 1, R * d]
    return mixed.view(index.shape[0], *factor.shape[1:]).to(factor.dtype)


def _to_rows(grad: Tensor, factor: Tensor, coefficient: Tensor, index: Tensor) -> Tensor:  # -> [N, R, d]
    exact = exact_dtype(factor)
    chosen = index.unsqueeze(2) == torch.arange(factor.shape[0], device=index.device)  # [B, P, N]
    strength = (chosen.to(exact) * coefficient.to(exact).unsqueeze(2)).sum(1)  # [B, N]
    return (strength.t() @ grad.to(exact).flatten(1)).view(factor.shape).to(factor.dtype)


def _along_rows(grad: Tensor, factor: Tensor, index: Tensor) -> Tensor:  # -> [B, P]
    exact = exact_dtype(factor)
    grad = grad.to(exact).flatten(1)
    if factor.shape[0] <= min(index.numel(), 16 * index.shape[1]):  # products nobody asked for cost less than copies
        return (grad @ factor.to(exact).flatten(1).t()).gather(1, index)
    return torch.bmm(_rows(factor, index, exact), grad.unsqueeze(2)).squeeze(2)


def _rows(factor: Tensor, index: Tensor, exact: torch.dtype) -> Tensor:  # -> [B, P, R * d]
    rows = factor.index_select(0, index.reshape(-1)).to(exact)
    return rows.view(*index.shape, factor.shape[1] * factor.shape[2])
