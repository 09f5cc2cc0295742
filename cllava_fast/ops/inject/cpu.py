"""inject on the CPU where plain gathering is slow: three ways, chosen by what benchmarks/native_cpu.py measured.

"native": one token, or few and few columns; csrc/cpu reads the rows where they lie. "whole": where as many rows act
as there are, all activations are projected on the whole pool, and what is not selected is multiplied by 0: no
gathering, and gradients need no sum over pairs. "gather": everything else, which the reference does best.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cllava_fast.ops import dispatch, native
from cllava_fast.ops.inject import native as native_inject

NATIVE_TOKENS = 4  # of one sample
NATIVE_COLUMNS = 64  # pairs * rank, for more than one token


def plan(tokens: int, pairs: int, rows: int, rank: int) -> str:
    few = tokens <= 1 or (tokens <= NATIVE_TOKENS and pairs * rank <= NATIVE_COLUMNS)
    if few and native.cpu_usable() is None:
        return "native"
    return "whole" if rows <= pairs else "gather"


def accepts(op: str, site: dispatch.Site, asked: bool) -> str | None:
    if asked:
        return None
    sizes = dict(site.sizes)
    way = plan(sizes["S"], sizes["P"], sizes["N"], sizes["R"])
    if way == "gather" or (way == "native" and op == "inject_backward"):
        return "few of many rows act: gathering them is as fast"
    return None


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
    return _add_(F.linear(x, weight, bias).contiguous(), x, A, B, index, coefficient, scale)


def inject_add(
    y: Tensor,  # [B, S, d_out]
    x: Tensor,  # [B, S, d_in]
    A: Tensor,
    B: Tensor,
    index: Tensor,
    coefficient: Tensor,
    scale: float,
) -> Tensor:
    return _add_(y.clone(memory_format=torch.contiguous_format), x, A, B, index, coefficient, scale)


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
    """The whole pool's way; what is not needed comes back empty."""
    need_x, need_A, need_B, need_coefficient = needed
    to_x, to_A, to_B, to_coefficient = grad.new_empty(0), A.new_empty(0), B.new_empty(0), coefficient.new_empty(0)
    grad = grad.contiguous()  # a reduction's gradient is expanded, and is read several times here
    rows_A, rows_B = (factor.to(grad.dtype).flatten(0, 1) for factor in (A, B))  # [C, d], C = N * R
    strength = _strength(A, index, coefficient, scale)  # [B, 1, C]
    low = low_grad = grad.new_empty(0)
    if need_B or need_coefficient:
        assert x is not None
        low = (x @ rows_A.t()).float()  # [B, S, C], recomputed rather than saved
    if need_x or need_A or need_coefficient:
        low_grad = (grad @ rows_B.t()).float()
    if need_coefficient:
        by_row = (low_grad * low).sum(1).view(-1, *A.shape[:2]).sum(2)  # [B, N]
        to_coefficient = by_row.gather(1, index) * scale
    if need_B:
        scaled = _times(low, strength, grad.dtype).flatten(0, 1)
        to_B = (scaled.t() @ grad.flatten(0, 1)).view(B.shape).to(B.dtype)
    if need_x or need_A:
        scaled = _times(low_grad, strength, grad.dtype).flatten(0, 1)
        if need_A:
            assert x is not None
            to_A = (scaled.t() @ x.flatten(0, 1)).view(A.shape).to(A.dtype)
        if need_x:
            to_x = scaled @ rows_A if weight is None else (grad.flatten(0, 1) @ weight).addmm_(scaled, rows_A)
            to_x = to_x.view(*grad.shape[:2], A.shape[2])
    return to_x, to_A, to_B, to_coefficient


def _add_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, scale: float
) -> Tensor:  # [B, S, d_out]
    if plan(x.shape[1], index.shape[1], *A.shape[:2]) == "native":
        native_inject.add_(torch.ops.cllava_fast_native, y, x, A, B, index, coefficient, scale)
        return y
    return add_whole_(y, x, A, B, index, coefficient, scale)


def add_whole_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, scale: float
) -> Tensor:  # [B, S, d_out]
    low = (x @ A.to(x.dtype).flatten(0, 1).t()).float()  # [B, S, C]
    scaled = _times(low, _strength(A, index, coefficient, scale), x.dtype)
    y.flatten(0, 1).addmm_(scaled.flatten(0, 1), B.to(x.dtype).flatten(0, 1))
    return y


def _strength(A: Tensor, index: Tensor, coefficient: Tensor, scale: float) -> Tensor:  # -> [B, 1, N * R]
    """Of every row of the pool; a row that appears twice in a sample counts twice."""
    chosen = index.unsqueeze(2) == torch.arange(A.shape[0], device=index.device)  # [B, P, N]
    by_row = torch.where(chosen, coefficient.unsqueeze(2), 0).sum(1) * scale
    return by_row.repeat_interleave(A.shape[1], dim=1).unsqueeze(1)


def _times(low: Tensor, strength: Tensor, dtype: torch.dtype) -> Tensor:
    """`where`, so that an overflow in a row that is not selected stays there."""
    return torch.where(strength != 0, low * strength, 0).to(dtype)
