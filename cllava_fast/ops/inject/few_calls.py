"""inject in training where a GPU waits for Python, so that what counts is how many calls there are.

All samples' tokens are projected on one list of rows, the open pool's and the past's, by library products alone. How
strongly each column acts is the same in every layer, so it is worked out once for all of them (`column_strength`).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cllava_fast.ops import checks, library
from cllava_fast.ops.checks import exact_dtype
from cllava_fast.ops.inject import reference
from cllava_fast.ops.inject.reference import as_dtype, columns, sum_over_all_tokens

DEVICES = ("cuda",)  # with a CPU nobody waits, and projecting on rows that do not act is work
# Multiplications in a layer: as many as three samples of 656 tokens have in a 7B model. By way of the op, Python kept
# an H200 busy for 171 ms in a step of one sample, whose work is a quarter of the 177 ms that four took. With more, the
# device has enough to do meanwhile, and fewer passes over the activations count for more.
WORK = 2**35


def wins(x: Tensor, d_out: int, columns: int, *frozen: Tensor | None) -> bool:
    """Whether `inject` is the way for a layer's x, in training, beside so many columns of the open pool.

    The past's count on neither side: the op projects on them by library products as well.
    """
    # in float16 a row that does not act may overflow, which `reference` looks after
    if x.device.type not in DEVICES or x.dtype == torch.float16:
        return False
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if any(tensor is not None and tensor.dtype != x.dtype for tensor in frozen):
        return False
    # a region of another dtype would cast what is multiplied here; one of this dtype casts nothing
    if checks.under_autocast(x) and torch.get_autocast_dtype(x.device.type) != x.dtype:
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    samples, tokens, d_in = x.shape
    return samples * tokens * (d_in * d_out + columns * (d_in + d_out)) <= WORK


def column_strength(
    index: Tensor,  # [B, P], of rows
    coefficient: Tensor,  # [B, P]
    rows: int,  # N of the pool
    rank: int,
    past: Tensor | None,  # [B, C] or [1, C], of rows that all act
    past_rank: int,
    scale: float,
) -> Tensor:  # [B, 1, K], with its gradient
    """Of each column, N * rank of the pool's and C * past_rank of the past's; 0 where a row is not selected."""
    found = reference.of_columns(reference.over_pool(index, coefficient, rows), rank)
    if past is not None:
        found = torch.cat([found, reference.of_columns(past.expand(len(index), -1), past_rank)], 2)
    return reference.by_scale(found, scale)


def inject(
    x: Tensor,  # [B, S, d_in]
    weight: Tensor | None,  # [d_out, d_in]; None where there is a base
    bias: Tensor | None,  # [d_out]
    base: Tensor | None,  # [B, S, d_out], on which the increments are added
    A: Tensor,  # [N, R, d_in]
    B: Tensor,  # [N, R, d_out]
    past_A: Tensor | None,  # [C, Q, d_in]
    past_B: Tensor | None,  # [C, Q, d_out]
    strength: Tensor,  # [B, 1, K]
) -> Tensor:  # [B, S, d_out]
    """`ops.inject` or `ops.inject_add`, whose `index` and coefficients are in `strength`; gradients as there."""
    y: Tensor = _apply(x, weight, bias, base, A, B, past_A, past_B, strength)
    return y


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, A: Tensor, B: Tensor,
        past_A: Tensor | None, past_B: Tensor | None, strength: Tensor,
    ) -> Tensor:  # fmt: skip
        low = F.linear(x, columns(A, x.dtype, past_A))  # [B, S, K]
        weighed = _times(low, strength)
        if base is None:
            assert weight is not None
            if bias is None:
                y = F.linear(x, weight)
            else:  # of which torch would return a view, and what comes next is written into it
                y = x.new_empty(*x.shape[:2], len(weight))
                torch.addmm(bias, x.flatten(0, 1), weight.t(), out=y.flatten(0, 1))
        else:
            y = base.clone(memory_format=torch.contiguous_format)
        y.flatten(0, 1).addmm_(weighed.flatten(0, 1), columns(B, x.dtype, past_B))
        # joined rows are made again rather than kept: in a large model they outweigh x, and low and weighed do not
        of_A = x if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(of_A, weight, A, B, past_A, past_B, strength, low, weighed)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        # a region around the backward pass would cast some of the products, and not others
        cast = checks.under_autocast(grad)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False) if cast else nullcontext():
            found = _gradients(grad, saved, ctx.needs_input_grad)
        if torch.is_grad_enabled():
            of = grad, *(tensor for tensor in saved if tensor is not None)
            found = tuple(None if gradient is None else _Once.apply(gradient, *of) for gradient in found)
        to_x, to_A, to_B, to_strength = found
        return to_x, None, None, grad if ctx.needs_input_grad[3] else None, to_A, to_B, None, None, to_strength


_apply = library.apply_of(_Inject)


def _times(low: Tensor, strength: Tensor) -> Tensor:
    """`reference.times` to the bit, with the rounding in the same launch."""
    return torch.mul(low, strength, out=torch.empty_like(low))


def _gradients(grad: Tensor, saved: Any, needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """Of x, A, B and strength."""
    x, weight, A, B, past_A, past_B, strength, low, weighed = saved
    need_x, _, _, _, need_A, need_B, _, _, need_strength = needed
    to_x = to_A = to_B = to_strength = None
    own = A.shape[0] * A.shape[1]  # columns of the pool
    grads = grad.flatten(0, 1)  # [T, d_out]
    if need_B:
        to_B = sum_over_all_tokens(weighed[..., :own], grad, B)
    if need_x or need_A or need_strength:
        low_grad = F.linear(grad, columns(B, grad.dtype, past_B))  # [B, S, K]
        if need_strength:
            products = as_dtype(low_grad, exact_dtype(low)) * low
            to_strength = as_dtype(products.sum(1, keepdim=True), strength.dtype)
        weighed_grad = _times(low_grad, strength)
        if need_A:
            to_A = sum_over_all_tokens(weighed_grad[..., :own], x, A)
        if need_x:
            low_grads, rows = weighed_grad.flatten(0, 1), columns(A, grad.dtype, past_A)
            to_x = low_grads @ rows if weight is None else (grads @ weight).addmm_(low_grads, rows)
            to_x = to_x.view(*grad.shape[:2], rows.shape[1])
    return to_x, to_A, to_B, to_strength


class _Once(torch.autograd.Function):
    """A gradient, `of` what it depends on, which nobody can derive once more."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *of: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(library.NO_SECOND_DERIVATIVE)
