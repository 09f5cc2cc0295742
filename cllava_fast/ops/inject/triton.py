"""inject in Triton: what is launched, with which tiles, in which order.

Two ways, chosen by `plan`. "gather": a thin product per sample whose factor rows are picked inside the kernel. "whole":
a pool of few columns is projected on entirely, by library products, and what is not selected is multiplied by 0. In
both, the increments are written first and the library's product with the frozen weight accumulates on top of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cllava_fast.ops.inject import triton_launch as launch
from cllava_fast.ops.inject.triton_launch import Pairs, Shrunk, shipped, shrink_tiles

__all__ = ["inject", "inject_add", "inject_backward", "shipped"]

# Projecting on this many columns still costs little more than reading the activations once.
WHOLE_COLUMNS = 256


def plan(samples: int, pairs: int, rows: int, rank: int) -> str:
    """The way to go: "whole" while the pool is small and samples would gather no fewer rows than it has."""
    return "whole" if rows * rank <= WHOLE_COLUMNS and rows <= samples * pairs else "gather"


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
    if _nothing(x.shape[0] * x.shape[1], A, B, index):
        return F.linear(x, weight, bias).contiguous()
    pairs = Pairs(index.contiguous(), coefficient.contiguous(), scale)
    if plan(*index.shape, *A.shape[:2]) == "whole":
        scaled = launch.weigh(_project(x, A), None, A.shape[1], pairs, scale_low=True).low
        assert scaled is not None
        rows = scaled.flatten(0, 1), _whole(B, x.dtype)
        y = torch.mm(*rows) if bias is None else torch.addmm(bias, *rows)  # [B * S, d_out]
    else:
        y = launch.expand(_scaled_shrink(x, A, pairs), B, pairs.rows, bias=bias).flatten(0, 1)
    y.addmm_(x.flatten(0, 1), weight.t())  # the product reads y in its epilogue
    return y.view(*x.shape[:2], -1)


def inject_add(
    y: Tensor,  # [B, S, d_out]
    x: Tensor,  # [B, S, d_in]
    A: Tensor,
    B: Tensor,
    index: Tensor,
    coefficient: Tensor,
    scale: float,
) -> Tensor:
    if _nothing(x.shape[0] * x.shape[1], A, B, index):
        return y.clone(memory_format=torch.contiguous_format)
    pairs = Pairs(index.contiguous(), coefficient.contiguous(), scale)
    return launch.expand(_scaled_shrink(x, A, pairs), B, pairs.rows, base=y)


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
    samples, tokens, _ = grad.shape
    grad = grad.contiguous()  # a reduction's gradient is expanded, and is read up to three times here
    pairs = Pairs(index.contiguous(), coefficient.contiguous(), scale)
    need_x, *need_factors = needed
    to_x: Tensor | None = None
    if not any(needed) or _nothing(samples * tokens, A, B, index):
        others = [
            t.new_zeros(t.shape) if need else None for t, need in zip((A, B, coefficient), need_factors, strict=True)
        ]
    elif plan(*index.shape, *A.shape[:2]) == "whole":
        to_x, *others = _backward_whole(grad, x, A, B, pairs, needed)
    else:
        to_x, *others = _backward_gather(grad, x, A, B, pairs, needed)
    if need_x:
        if to_x is None:
            to_x = grad.new_zeros(samples, tokens, A.shape[2])
        if weight is not None:
            to_x.flatten(0, 1).addmm_(grad.flatten(0, 1), weight)
    to_A, to_B, to_coefficient = others
    return (
        grad.new_empty(0) if to_x is None else to_x,
        A.new_empty(0) if to_A is None else to_A,
        B.new_empty(0) if to_B is None else to_B,
        coefficient.new_empty(0) if to_coefficient is None else to_coefficient,
    )


Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _backward_gather(grad: Tensor, x: Tensor | None, A: Tensor, B: Tensor, pairs: Pairs, needed: list[bool]) -> Grads:
    need_x, need_A, need_B, need_coefficient = needed
    to_x = to_A = to_B = to_coefficient = None
    samples, tokens, _ = grad.shape
    columns = pairs.rows.shape[1] * A.shape[1]
    low = Shrunk()
    if need_B or need_coefficient:
        assert x is not None
        tiles = shrink_tiles(x.dtype, samples, tokens, columns)
        low = launch.shrink(x, A, pairs, tiles, scaled=need_B, exact=need_coefficient)  # recomputed rather than saved
    if need_x or need_A or need_coefficient:
        tiles = shrink_tiles(grad.dtype, samples, tokens, columns)
        left = None
        if need_B and launch.one_pass(grad.dtype, samples, tokens, columns):
            tiles, left = launch.one_pass_tiles(grad.dtype), low.scaled
        low_grad = launch.shrink(grad, B, pairs, tiles, scaled=need_x or need_A, other=low.exact, left=left)
        if low_grad.outer is not None:
            to_B = launch.sum_by_row(low_grad.outer, B, pairs.rows)
            low_grad = low_grad._replace(outer=None)  # up to half of grad's bytes: free before the next are taken
        if low_grad.products is not None:
            by_pair = low_grad.products.sum(1).view(*pairs.rows.shape, -1).sum(2)
            to_coefficient = by_pair * pairs.scale
        if need_A:
            assert x is not None and low_grad.scaled is not None
            to_A = launch.sum_by_row(launch.outer(low_grad.scaled, x), A, pairs.rows)
        if need_x:
            assert low_grad.scaled is not None
            to_x = launch.expand(low_grad.scaled, A, pairs.rows)
    if need_B and to_B is None:
        assert low.scaled is not None
        to_B = launch.sum_by_row(launch.outer(low.scaled, grad), B, pairs.rows)
    return to_x, to_A, to_B, to_coefficient


def _backward_whole(grad: Tensor, x: Tensor | None, A: Tensor, B: Tensor, pairs: Pairs, needed: list[bool]) -> Grads:
    need_x, need_A, need_B, need_coefficient = needed
    to_x = to_A = to_B = to_coefficient = None
    low = low_grad = None
    if need_B or need_coefficient:
        assert x is not None
        low = _project(x, A)
    if need_x or need_A or need_coefficient:
        low_grad = _project(grad, B)
    weighed = launch.weigh(
        low, low_grad, A.shape[1], pairs, scale_low=need_B, scale_grad=need_x or need_A, multiply=need_coefficient
    )
    if weighed.products is not None:
        by_row = weighed.products.sum(1).view(-1, *A.shape[:2]).sum(2)  # [B, N]
        to_coefficient = by_row.gather(1, pairs.rows) * pairs.scale
    if weighed.low is not None:
        to_B = (weighed.low.flatten(0, 1).t() @ grad.flatten(0, 1)).view(B.shape).to(B.dtype)
    if weighed.grad is not None:
        scaled = weighed.grad.flatten(0, 1)
        if need_A:
            assert x is not None
            to_A = (scaled.t() @ x.flatten(0, 1)).view(A.shape).to(A.dtype)
        if need_x:
            to_x = (scaled @ _whole(A, grad.dtype)).view(*grad.shape[:2], -1)
    return to_x, to_A, to_B, to_coefficient


def _scaled_shrink(x: Tensor, A: Tensor, pairs: Pairs) -> Tensor:  # -> [B, S, K]
    tiles = shrink_tiles(x.dtype, x.shape[0], x.shape[1], pairs.rows.shape[1] * A.shape[1])
    scaled = launch.shrink(x, A, pairs, tiles, scaled=True).scaled
    assert scaled is not None
    return scaled


def _nothing(tokens: int, A: Tensor, B: Tensor, index: Tensor) -> bool:
    return 0 in (tokens, index.shape[1], A.shape[1], A.shape[2], B.shape[2])


def _whole(factor: Tensor, dtype: torch.dtype) -> Tensor:  # [N, R, d] -> [N * R, d]
    return factor.to(dtype).flatten(0, 1)


def _project(x: Tensor, factor: Tensor) -> Tensor:  # [B, S, d], [N, R, d] -> [B, S, N * R]
    return (x.flatten(0, 1) @ _whole(factor, x.dtype).t()).view(*x.shape[:2], -1)
