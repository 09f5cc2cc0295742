"""inject and inject_add in torch.library: schemas, fake tensors, autocast, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllava_fast.ops import dispatch, library


def _pairs_site(x: Tensor, A: Tensor, B: Tensor, index: Tensor, samples: int, tokens: int) -> dispatch.Site:
    names = ("N", "R", "d_in", "d_out", "P", "B", "S")
    sizes = (*A.shape, B.shape[2], index.shape[1], samples, tokens)
    return dispatch.Site(x.device, x.dtype, tuple(zip(names, sizes, strict=True)))


def _site(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, index: Tensor, *_: Any
) -> dispatch.Site:
    return _pairs_site(x, A, B, index, x.shape[0], x.shape[1])


def _add_site(y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor, *_: Any) -> dispatch.Site:
    return _pairs_site(x, A, B, index, x.shape[0], x.shape[1])


def _backward_site(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, A: Tensor, B: Tensor, index: Tensor, *_: Any
) -> dispatch.Site:
    return _pairs_site(grad, A, B, index, grad.shape[0], grad.shape[1])


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weight.shape[0])


def _add_fake(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty(y.shape)


def _backward_fake(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    index: Tensor,
    coefficient: Tensor,
    scale: float,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        grad.new_empty((grad.shape[0], grad.shape[1], A.shape[2]) if needed[0] else 0),
        A.new_empty(A.shape if needed[1] else 0),
        B.new_empty(B.shape if needed[2] else 0),
        coefficient.new_empty(coefficient.shape if needed[3] else 0),
    )


INJECT = library.define(
    "inject",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, Tensor index, Tensor coefficient, float scale)"
    " -> Tensor",
    site=_site,
    fake=_fake,
    autocast=("x", "weight", "bias"),
)
INJECT_ADD = library.define(
    "inject_add",
    "(Tensor y, Tensor x, Tensor A, Tensor B, Tensor index, Tensor coefficient, float scale) -> Tensor",
    site=_add_site,
    fake=_add_fake,
    autocast=("y", "x"),
)
BACKWARD = library.define(
    "inject_backward",
    "(Tensor grad, Tensor? x, Tensor? weight, Tensor A, Tensor B, Tensor index, Tensor coefficient, float scale,"
    " bool[4] needed) -> (Tensor x, Tensor A, Tensor B, Tensor coefficient)",
    site=_backward_site,
    fake=_backward_fake,
)


def _save(ctx: Any, x: Tensor, weight: Tensor | None, pairs: tuple[Any, ...], needed: tuple[bool, ...]) -> None:
    *tensors, ctx.scale = pairs
    ctx.needed = list(needed)
    # A layer whose factors are frozen needs no x in its backward: do not keep it alive.
    keep_x = any(needed[1:])
    ctx.save_for_backward(x if keep_x else None, weight if needed[0] else None, *tensors)


def _grads(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    found = BACKWARD(grad, *ctx.saved_tensors, ctx.scale, ctx.needed)
    return [tensor if wanted else None for tensor, wanted in zip(found, ctx.needed, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, *pairs = inputs
    needs = ctx.needs_input_grad
    _save(ctx, x, weight, tuple(pairs), (needs[0], needs[3], needs[4], needs[6]))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, A, B, coefficient = _grads(ctx, grad)
    return x, None, None, A, B, None, coefficient, None


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, *pairs = inputs
    needs = ctx.needs_input_grad
    _save(ctx, x, None, tuple(pairs), (needs[1], needs[2], needs[3], needs[5]))


def _add_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    if not any(ctx.needed):
        return grad, None, None, None, None, None, None
    x, A, B, coefficient = _grads(ctx, grad)
    return grad if ctx.needs_input_grad[0] else None, x, A, B, None, coefficient, None


torch.library.register_autograd(INJECT, _backward, setup_context=_setup_context)
torch.library.register_autograd(INJECT_ADD, _add_backward, setup_context=_add_setup_context)
library.no_second_derivative(BACKWARD)
