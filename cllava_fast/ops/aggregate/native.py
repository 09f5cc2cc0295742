"""aggregate and mix_factors in csrc: what the native kernels are given, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cllava_fast.ops import dispatch
from cllava_fast.ops.aggregate import mix


def accepts(op: str, site: dispatch.Site, asked: bool) -> str | None:
    if op.startswith("aggregate") and site.dtype != torch.float32:
        return f"{site.dtype} is not torch.float32"
    return None


def aggregate(
    library: Any, index: Tensor, weight: Tensor, row_task: Tensor, row_mean: Tensor, context: Tensor
) -> tuple[Tensor, Tensor]:
    """coefficient, index, each [B, M + N]."""
    shape = len(index), index.shape[1] + len(row_task)
    coefficient, rows = weight.new_empty(shape), index.new_empty(shape)
    library.aggregate(*dense(index, weight, row_task, row_mean, context), coefficient, rows)
    return coefficient, rows


def aggregate_backward(
    library: Any,
    grad: Tensor,
    index: Tensor,
    weight: Tensor,
    row_task: Tensor,
    row_mean: Tensor,
    context: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor]:
    if index.numel() == 0 or len(row_task) == 0:
        own = grad[:, : index.shape[1]].to(weight.dtype, copy=True)
        return own if needed[0] else weight.new_empty(0), torch.zeros_like(context if needed[1] else context[:0, 0])
    to_weight = weight.new_empty(weight.shape) if needed[0] else None
    to_context = context.new_empty(context.shape) if needed[1] else None
    library.aggregate_backward(*dense(grad.float(), index, weight, row_task, row_mean, context), to_weight, to_context)
    return (
        weight.new_empty(0) if to_weight is None else to_weight,
        context.new_empty(0) if to_context is None else to_context,
    )


def mix_factors(library: Any, A: Tensor, B: Tensor, coefficient: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    if A.dtype != B.dtype:  # the kernels know one dtype a call
        dtype = torch.promote_types(A.dtype, B.dtype)
        A_mix, B_mix = mix_factors(library, A.to(dtype), B.to(dtype), coefficient, index)
        return A_mix.to(A.dtype), B_mix.to(B.dtype)
    if 0 in (index.numel(), A.numel(), B.numel()):  # no pointer to give to a kernel
        return mix.mix_factors(A, B, coefficient, index)
    A_mix, B_mix = (factor.new_empty(len(index), *factor.shape[1:]) for factor in (A, B))
    library.mix_factors(adjacent(A), adjacent(B), *dense(coefficient, index), A_mix, B_mix)
    return A_mix, B_mix


def mix_factors_backward(
    library: Any,
    grad_A: Tensor,
    grad_B: Tensor,
    A: Tensor,
    B: Tensor,
    coefficient: Tensor,
    index: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    if A.dtype != B.dtype:
        dtype = torch.promote_types(A.dtype, B.dtype)
        grad_A, grad_B, A_cast, B_cast = (tensor.to(dtype) for tensor in (grad_A, grad_B, A, B))
        found = mix_factors_backward(library, grad_A, grad_B, A_cast, B_cast, coefficient, index, needed)
        return found[0].to(A.dtype), found[1].to(B.dtype), found[2]
    if 0 in (index.numel(), A.numel(), B.numel()):
        return mix.mix_factors_backward(grad_A, grad_B, A, B, coefficient, index, needed)
    like = (A, B, coefficient)
    outs = [t.new_empty(t.shape) if need else None for t, need in zip(like, needed, strict=True)]
    library.mix_factors_backward(*dense(grad_A, grad_B), adjacent(A), adjacent(B), *dense(coefficient, index), *outs)
    to_A, to_B, to_coefficient = (t.new_empty(0) if out is None else out for t, out in zip(like, outs, strict=True))
    return to_A, to_B, to_coefficient


def dense(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def adjacent(factor: Tensor) -> Tensor:
    """[N, R, d] with the R * d entries of each row adjacent; a copy only if need be."""
    is_so = factor.stride(2) == 1 and (factor.shape[1] == 1 or factor.stride(1) == factor.shape[2])
    return factor if is_so else factor.contiguous()


KERNELS: dict[str, Callable[..., Any]] = {
    "aggregate": aggregate,
    "aggregate_backward": aggregate_backward,
    "mix_factors": mix_factors,
    "mix_factors_backward": mix_factors_backward,
}
