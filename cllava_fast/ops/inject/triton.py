"""inject in Triton: what is launched, with which tiles, in which order.

Pairs are gathered inside the kernels, a thin product per sample; a whole pool and the past are projected on by library
products, and a kernel multiplies by the coefficients, which are 0 where a row is not selected. Either way the
increments are written first and the library's product with the frozen weight accumulates on top of them.

Rows that share one A are gathered: a library product projects x on its R columns, which a kernel scales for each row
and token, or which, with coefficients of samples, meet one sum of rows of B.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cllava_fast.ops.inject import reference
from cllava_fast.ops.inject import triton_launch as launch
from cllava_fast.ops.inject.reference import Acting, as_dtype, columns, project, sum_over_all_tokens
from cllava_fast.ops.inject.tiling import choose, one_pass, one_pass_tiles

Result = tuple[Tensor, Tensor, Tensor]


def inject(
    x: Tensor,  # [B, S, d_in]
    weight: Tensor,  # [d_out, d_in]
    bias: Tensor | None,  # [d_out]
    given: Acting,
    save: bool,
) -> Result:
    if _nothing(x, given):
        return reference.inject(x, weight, bias, given, save)
    y, low, past_low = _increments(x, _readable(given, x.dtype), save, bias=bias)
    y.flatten(0, 1).addmm_(x.flatten(0, 1), weight.t())  # the product reads y in its epilogue
    return y, low, past_low


def inject_add(
    y: Tensor,  # [B, S, d_out]
    x: Tensor,  # [B, S, d_in]
    given: Acting,
    save: bool,
) -> Result:
    if _nothing(x, given):
        return reference.inject_add(y, x, given, save)
    return _increments(x, _readable(given, x.dtype), save, base=y)


def _increments(
    x: Tensor, given: Acting, save: bool, *, bias: Tensor | None = None, base: Tensor | None = None
) -> Result:
    """A new y = bias + base + increments, and what the backward pass needs."""
    low: Tensor | None
    if given.whole and not given.shared:
        low = project(x, given.A, given.past_A)
        scaled = launch.weigh(low, None, given, scale_low=True).low
        assert scaled is not None
        y = _expand(scaled, given.B, given.past_B, bias=bias, base=base)
        return y, low if save else x.new_empty(0), x.new_empty(0)
    if given.shared:
        low = project(x, given.A)  # [B, S, R]
        if given.per_token:
            y = launch.expand(launch.weigh_pairs(low, given), given.B, given.index, bias=bias, base=base)
        else:
            sums = _as_rows(given)
            y = launch.expand(low, sums.B, sums.index, bias=bias, base=base)
    else:
        shrunk = launch.shrink(x, given.A, given, choose("shrink", x, given.columns), scaled=True, bare=save)
        low = shrunk.bare
        assert shrunk.scaled is not None
        y = launch.expand(shrunk.scaled, given.B, given.index, bias=bias, base=base)
    past_low = x.new_empty(0)
    if given.past_A is not None and given.past_B is not None:
        past_low = project(x, given.past_A)
        scaled = launch.weigh(past_low, None, given, past_only=True, scale_low=True).low
        assert scaled is not None
        y.flatten(0, 1).addmm_(scaled.flatten(0, 1), columns(given.past_B, x.dtype))
    return y, low if save and low is not None else x.new_empty(0), past_low if save else x.new_empty(0)


def inject_backward(
    grad: Tensor,  # [B, S, d_out]
    x: Tensor | None,  # [B, S, d_in]; None if A has no gradient
    weight: Tensor | None,  # [d_out, d_in]; None for inject_add
    given: Acting,
    low: Tensor,  # as the forward pass returned it; not read if neither B nor the coefficient has a gradient
    past_low: Tensor,  # likewise, for the past's coefficient
    needed: list[bool],  # gradients of x, A, B, coefficient, past_coefficient
) -> tuple[Tensor, ...]:
    """What is not needed comes back empty."""
    if not any(needed) or _nothing(grad, given):
        return reference.inject_backward(grad, x, weight, given, low, past_low, needed)
    grad = grad.contiguous()  # a reduction's gradient is expanded, and is read several times here
    run = _backward_shared if given.shared else _backward_whole if given.whole else _backward_gather
    to_x, to_A, to_B, *others = run(grad, x, _readable(given, grad.dtype), low, past_low, needed)
    if to_x is not None and weight is not None:
        to_x.flatten(0, 1).addmm_(grad.flatten(0, 1), weight)
    to_A = None if to_A is None else as_dtype(to_A, given.A.dtype)
    to_B = None if to_B is None else as_dtype(to_B, given.B.dtype)
    found = to_x, to_A, to_B, *others
    empty = (grad, given.A, given.B, given.coefficient, grad)
    return tuple(like.new_empty(0) if one is None else one for like, one in zip(empty, found, strict=True))


Grads = list[Tensor | None]


def _backward_gather(
    grad: Tensor, x: Tensor | None, given: Acting, low: Tensor, past_low: Tensor, needed: list[bool]
) -> Grads:
    need_x, need_A, need_B, need_coefficient, need_past = needed
    to_x = to_A = to_B = to_coefficient = None
    samples, tokens, _ = grad.shape
    if need_x or need_A or need_coefficient:
        tiles = choose("shrink", grad, given.columns)
        left = None
        if need_B and one_pass(grad.dtype, samples, tokens, given.columns):
            tiles, left = one_pass_tiles(grad.dtype), low
        other = low if need_coefficient and not given.per_token else None
        bare = need_coefficient and given.per_token
        low_grad = launch.shrink(
            grad, given.B, given, tiles, scaled=need_x or need_A, bare=bare, other=other, left=left
        )
        if low_grad.outer is not None:
            to_B = launch.sum_by_row(low_grad.outer, given.B, given, scaled=given.per_token)
            low_grad = low_grad._replace(outer=None)  # up to half of grad's bytes: free before the next are taken
        if low_grad.bare is not None:
            to_coefficient, _ = launch.of_tokens(low, low_grad.bare, given)
        if low_grad.products is not None:
            to_coefficient = launch.sum_products(low_grad.products, None, given.A.shape[1], given.scale)
        if need_A:
            assert x is not None and low_grad.scaled is not None
            to_A = launch.sum_by_row(launch.outer(low_grad.scaled, x), given.A, given, scaled=True)
        if need_x:
            assert low_grad.scaled is not None
            to_x = launch.expand(low_grad.scaled, given.A, given.index)
    if need_B and to_B is None:
        to_B = _gradient_of_B(low, grad, given)
    to_past = _past_backward(to_x, grad, given, past_low, need_past)
    return [to_x, to_A, to_B, to_coefficient, to_past]


def _backward_shared(
    grad: Tensor, x: Tensor | None, given: Acting, low: Tensor, past_low: Tensor, needed: list[bool]
) -> Grads:
    need_x, need_A, need_B, need_coefficient, need_past = needed
    to_x = to_A = to_B = to_coefficient = folded = None
    pairs = _as_rows(given) if given.by_sum else given
    if need_x or need_A or (need_coefficient and not given.by_sum):
        tiles = choose("shrink", grad, pairs.index.shape[1] * given.A.shape[1])
        low_grad = launch.shrink(grad, pairs.B, pairs, tiles, bare=True).bare
        assert low_grad is not None
        if given.by_sum:
            folded = low_grad  # [B, S, R]
        else:
            known = low if need_coefficient else None
            to_coefficient, folded = launch.of_tokens(known, low_grad, given, fold=need_x or need_A)
        if need_A:
            assert x is not None and folded is not None
            to_A = sum_over_all_tokens(folded, x, given.A)
        if need_x:
            assert folded is not None
            to_x = _expand(folded, given.A, None)
    if given.by_sum and (need_B or need_coefficient):
        to_sum = launch.outer(low, grad).sum(1)  # [B, R, d_out]
        to_B, to_coefficient = reference.sum_of_B_backward(to_sum, given, need_B, need_coefficient)
    elif need_B:
        to_B = _gradient_of_B(low, grad, given)
    to_past = _past_backward(to_x, grad, given, past_low, need_past)
    return [to_x, to_A, to_B, to_coefficient, to_past]


def _as_rows(given: Acting) -> Acting:
    """Each sample's sum of B as a row of its own, for kernels that gather rows."""
    samples = len(given.index)
    return replace(
        given,
        B=reference.sum_of_B(given),
        index=torch.arange(samples, device=given.index.device).unsqueeze(1),
        coefficient=given.coefficient.new_ones(samples, 1),
        scale=1.0,
        whole=False,
    )


def _gradient_of_B(low: Tensor, grad: Tensor, given: Acting) -> Tensor:
    """Coefficients of samples may come after the sum over tokens."""
    partial = launch.outer(launch.weigh_pairs(low, given) if given.per_token else low, grad)
    return launch.sum_by_row(partial, given.B, given, scaled=given.per_token)


def _past_backward(
    to_x: Tensor | None, grad: Tensor, given: Acting, past_low: Tensor, need_past: bool
) -> Tensor | None:
    """Adds the past's part to x's gradient, where that is needed, and returns its coefficient's."""
    if given.past_A is None or given.past_B is None or (to_x is None and not need_past):
        return None
    past_grad = project(grad, given.past_B)
    known = past_low if need_past else None
    past = launch.weigh(known, past_grad, given, past_only=True, scale_grad=to_x is not None, multiply=need_past)
    if past.grad is not None and to_x is not None:
        to_x.flatten(0, 1).addmm_(past.grad.flatten(0, 1), columns(given.past_A, grad.dtype))
    if past.products is None:
        return None
    return launch.sum_products(past.products, None, given.past_A.shape[1], given.scale)


def _backward_whole(
    grad: Tensor, x: Tensor | None, given: Acting, low: Tensor, past_low: Tensor, needed: list[bool]
) -> Grads:
    need_x, need_A, need_B, need_coefficient, need_past = needed
    to_x = to_A = to_B = to_coefficient = to_past = None
    of_pool = given.A.shape[0] * given.A.shape[1]  # columns
    multiply = need_past or (need_coefficient and not given.per_token)
    known = low if need_B or multiply else None
    low_grad = project(grad, given.B, given.past_B) if need_x or need_A or need_coefficient or need_past else None
    if given.per_token and need_coefficient:
        assert low_grad is not None
        to_coefficient, _ = launch.of_tokens(low, low_grad, given)
    weighed = launch.weigh(known, low_grad, given, scale_low=need_B, scale_grad=need_x or need_A, multiply=multiply)
    if weighed.products is not None:
        if need_coefficient and not given.per_token:
            to_coefficient = launch.sum_products(weighed.products, given.index, given.A.shape[1], given.scale)
        if need_past and given.past_A is not None:
            to_past = launch.sum_products(weighed.products, None, given.past_A.shape[1], given.scale, of_pool)
    if weighed.low is not None:
        to_B = sum_over_all_tokens(weighed.low[..., :of_pool], grad, given.B)
    if weighed.grad is not None:
        if need_A:
            assert x is not None
            to_A = sum_over_all_tokens(weighed.grad[..., :of_pool], x, given.A)
        if need_x:
            to_x = _expand(weighed.grad, given.A, given.past_A)
    return [to_x, to_A, to_B, to_coefficient, to_past]


def _readable(given: Acting, dtype: torch.dtype) -> Acting:
    """Kernels read these without strides, and factors in the activations' dtype or in float32."""
    past = given.past_coefficient
    A, B = (f if f.dtype in (dtype, torch.float32) else f.float() for f in (given.A, given.B))
    return replace(
        given,
        A=A,
        B=B,
        index=given.index.contiguous(),
        coefficient=given.coefficient.contiguous(),
        past_coefficient=None if past is None else past.contiguous(),
    )


def _nothing(x: Tensor, given: Acting) -> bool:
    """Whether a kernel would have nothing to do; plain PyTorch takes care of what remains."""
    sizes = (*x.shape, *given.A.shape, *given.B.shape, given.index.shape[1])
    return 0 in sizes or (given.past_A is not None and given.past_A.numel() == 0)


def _expand(
    low: Tensor, factor: Tensor, past: Tensor | None, *, bias: Tensor | None = None, base: Tensor | None = None
) -> Tensor:  # [B, S, C] -> [B, S, d]
    rows = low.flatten(0, 1), columns(factor, low.dtype, past)
    start = bias if base is None else base.flatten(0, 1)
    assert bias is None or base is None
    return (torch.mm(*rows) if start is None else torch.addmm(start, *rows)).view(*low.shape[:2], -1)
