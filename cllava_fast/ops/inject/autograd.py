"""inject and inject_add in torch.library: schemas, fake tensors, autocast, gradients.

Beside y, both return the small projections of x that a backward pass needs, if `save` asks for them: recomputing those
would read x once more, and they are a few columns where x has thousands.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cllava_fast.ops import dispatch, library
from cllava_fast.ops.inject.reference import Acting

FIELDS = len(fields(Acting))
_ACTING = (
    "Tensor A, Tensor B, Tensor index, Tensor coefficient, Tensor? past_A, Tensor? past_B, Tensor? past_coefficient,"
    " float scale, bool whole"
)


def site(
    x: Tensor, _: Any, __: Any, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, *rest: Any
) -> dispatch.Site:
    rows, rank, d_out = B.shape
    of_A, _, d_in = A.shape
    samples, tokens, _ = x.shape
    sizes: tuple[tuple[str, int], ...] = (
        ("N", rows), ("R", rank), ("d_in", d_in), ("d_out", d_out), ("P", index.shape[1]), ("B", samples), ("S", tokens)
    )  # fmt: skip
    if coefficient.dim() == 3:
        sizes += (("per_token", 1),)
    if of_A != rows:
        sizes += (("shared", 1),)
    return dispatch.Site(x.device, x.dtype, sizes)


def _add_site(y: Tensor, x: Tensor, *increments: Any) -> dispatch.Site:
    return site(x, None, None, *increments)


def _pack(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    return x, weight, bias, Acting(*rest[:FIELDS]), *rest[FIELDS:]


def _add_pack(y: Tensor, x: Tensor, *rest: Any) -> tuple[Any, ...]:
    return y, x, Acting(*rest[:FIELDS]), *rest[FIELDS:]


def _fake_lows(x: Tensor, given: Acting, save: bool) -> tuple[Tensor, Tensor]:
    if not save:
        return x.new_empty(0), x.new_empty(0)
    columns, past = given.columns, given.past_columns
    if given.joined:
        columns, past = columns + past, 0
    nothing = given.past_A is None or given.joined
    return x.new_empty(*x.shape[:2], columns), x.new_empty(0 if nothing else (*x.shape[:2], past))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return x.new_empty(*x.shape[:2], weight.shape[0]), *_fake_lows(x, *_pack(x, weight, bias, *rest)[3:])


def _add_fake(y: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return y.new_empty(y.shape), *_fake_lows(x, *_add_pack(y, x, *rest)[2:])


def _backward_fake(grad: Tensor, x: Tensor | None, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    given, needed = Acting(*rest[:FIELDS]), rest[-1]
    past = given.past_coefficient
    return (
        grad.new_empty((grad.shape[0], grad.shape[1], given.A.shape[2]) if needed[0] else 0),
        given.A.new_empty(given.A.shape if needed[1] else 0),
        given.B.new_empty(given.B.shape if needed[2] else 0),
        given.coefficient.new_empty(given.coefficient.shape if needed[3] else 0),
        grad.new_empty(0) if past is None or not needed[4] else past.new_empty(past.shape),
    )


INJECT = library.define(
    "inject",
    f"(Tensor x, Tensor weight, Tensor? bias, {_ACTING}, bool save) -> (Tensor y, Tensor low, Tensor past_low)",
    site=site,
    fake=_fake,
    pack=_pack,
    autocast=("x", "weight", "bias"),
)
INJECT_ADD = library.define(
    "inject_add",
    f"(Tensor y, Tensor x, {_ACTING}, bool save) -> (Tensor y, Tensor low, Tensor past_low)",
    site=_add_site,
    fake=_add_fake,
    pack=_add_pack,
    autocast=("y", "x"),
)
BACKWARD = library.define(
    "inject_backward",
    f"(Tensor grad, Tensor? x, Tensor? weight, {_ACTING}, Tensor low, Tensor past_low, bool[5] needed)"
    " -> (Tensor x, Tensor A, Tensor B, Tensor coefficient, Tensor past_coefficient)",
    site=site,
    fake=_backward_fake,
    pack=_pack,
)


def save_for(B: Tensor, coefficient: Tensor, past_coefficient: Tensor | None) -> bool:
    """Whether a backward pass will want the projections: x's own gradient does without, A's wants x itself."""
    trained = B.requires_grad or coefficient.requires_grad
    trained |= past_coefficient is not None and past_coefficient.requires_grad
    return torch.is_grad_enabled() and trained


def _save(ctx: Any, x: Tensor, weight: Tensor | None, output: tuple[Tensor, ...], increments: tuple[Any, ...]) -> None:
    *tensors, ctx.scale, ctx.whole, _ = increments
    need_x, need_A, *_ = ctx.needed
    # A layer whose A is frozen needs no x in its backward: do not keep it alive.
    ctx.save_for_backward(x if need_A else None, weight if need_x else None, *tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    *tensors, low, past_low = ctx.saved_tensors
    found = inject_backward(grad, *tensors, ctx.scale, ctx.whole, low, past_low, ctx.needed)
    return [tensor if wanted else None for tensor, wanted in zip(found, ctx.needed, strict=True)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, *increments = inputs
    needs = ctx.needs_input_grad
    ctx.needed = [needs[0], needs[3], needs[4], needs[6], needs[9]]
    _save(ctx, x, weight, output, tuple(increments))


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * (FIELDS + 4)
    x, A, B, coefficient, past_coefficient = _grads(ctx, grad)
    return x, None, None, A, B, None, coefficient, None, None, past_coefficient, None, None, None


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, x, *increments = inputs
    needs = ctx.needs_input_grad
    ctx.needed = [needs[1], needs[2], needs[3], needs[5], needs[8]]
    _save(ctx, x, None, output, tuple(increments))


def _add_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad is None or not any(ctx.needed):
        return grad, *(None,) * (FIELDS + 2)
    x, A, B, coefficient, past_coefficient = _grads(ctx, grad)
    to_y = grad if ctx.needs_input_grad[0] else None
    return to_y, x, A, B, None, coefficient, None, None, past_coefficient, None, None, None


inject = library.differentiable(INJECT, _backward, _setup_context)
inject_add = library.differentiable(INJECT_ADD, _add_backward, _add_setup_context)
inject_backward = library.no_second_derivative(BACKWARD)


class Weighed(torch.autograd.Function):
    """`(rows * strength).to(dtype)` of frozen rows; backward, one copy of them in full precision instead of two."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, strength: Tensor, dtype: torch.dtype) -> Tensor:  # [C, Q, d], [C, 1, 1]
        ctx.save_for_backward(rows, strength)
        return (rows * strength).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        rows, strength = ctx.saved_tensors
        exact = torch.promote_types(rows.dtype, strength.dtype)
        products = grad.to(exact, copy=True).mul_(rows)
        return None, products.sum((1, 2), keepdim=True).to(strength.dtype), None
