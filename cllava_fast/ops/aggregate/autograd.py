"""aggregate and mix_factors in torch.library: schemas, fake tensors, autocast, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllava_fast.ops import dispatch, library
from cllava_fast.ops.checks import exact_dtype


def _site(index: Tensor, weight: Tensor, row_task: Tensor, row_mean: Tensor, context: Tensor) -> dispatch.Site:
    sizes = (("B", index.shape[0]), ("M", index.shape[1]), ("N", row_task.shape[0]), ("T", context.shape[0]))
    return dispatch.Site(index.device, exact_dtype(weight, row_mean, context), sizes)


def _backward_site(grad: Tensor, *args: Any) -> dispatch.Site:
    return _site(*args[:5])


def _fake(index: Tensor, weight: Tensor, row_task: Tensor, row_mean: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    shape = (index.shape[0], index.shape[1] + row_task.shape[0])
    return weight.new_empty(shape, dtype=exact_dtype(weight, row_mean, context)), index.new_empty(shape)


def _backward_fake(
    grad: Tensor, index: Tensor, weight: Tensor, row_task: Tensor, row_mean: Tensor, context: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor]:
    return _like(weight, needed[0]), _like(context, needed[1])


def _mix_site(A: Tensor, B: Tensor, coefficient: Tensor, index: Tensor) -> dispatch.Site:
    sizes = zip(("N", "R", "d_in", "d_out", "B", "P"), (*A.shape, B.shape[2], *index.shape), strict=True)
    return dispatch.Site(A.device, torch.promote_types(A.dtype, B.dtype), tuple(sizes))


def _mix_backward_site(grad_A: Tensor, grad_B: Tensor, *args: Any) -> dispatch.Site:
    return _mix_site(*args[:4])


def _mix_fake(A: Tensor, B: Tensor, coefficient: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    samples = index.shape[0]
    return A.new_empty(samples, A.shape[1], A.shape[2]), B.new_empty(samples, B.shape[1], B.shape[2])


def _mix_backward_fake(
    grad_A: Tensor, grad_B: Tensor, A: Tensor, B: Tensor, coefficient: Tensor, index: Tensor, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(A, needed[0]), _like(B, needed[1]), _like(coefficient, needed[2])


def _like(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.new_empty(tensor.shape if needed else 0)


# The floating output comes first: opcheck adds all outputs up in place, and an integer cannot take a float.
AGGREGATE = library.define(
    "aggregate",
    "(Tensor index, Tensor weight, Tensor row_task, Tensor row_mean, Tensor context)"
    " -> (Tensor coefficient, Tensor index)",
    site=_site,
    fake=_fake,
)
AGGREGATE_BACKWARD = library.define(
    "aggregate_backward",
    "(Tensor grad, Tensor index, Tensor weight, Tensor row_task, Tensor row_mean, Tensor context, bool[2] needed)"
    " -> (Tensor weight, Tensor context)",
    site=_backward_site,
    fake=_backward_fake,
)
MIX_FACTORS = library.define(
    "mix_factors",
    "(Tensor A, Tensor B, Tensor coefficient, Tensor index) -> (Tensor A_mix, Tensor B_mix)",
    site=_mix_site,
    fake=_mix_fake,
)
MIX_FACTORS_BACKWARD = library.define(
    "mix_factors_backward",
    "(Tensor grad_A, Tensor grad_B, Tensor A, Tensor B, Tensor coefficient, Tensor index, bool[3] needed)"
    " -> (Tensor A, Tensor B, Tensor coefficient)",
    site=_mix_backward_site,
    fake=_mix_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor, _index: Any) -> tuple[Any, ...]:
    needed = [ctx.needs_input_grad[1], ctx.needs_input_grad[4]]
    weight, context = aggregate_backward(grad, *ctx.saved_tensors, needed)
    return None, weight if needed[0] else None, None, None, context if needed[1] else None


def _mix_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _mix_backward(ctx: Any, grad_A: Tensor, grad_B: Tensor) -> tuple[Any, ...]:
    needed = list(ctx.needs_input_grad[:3])
    grads = mix_factors_backward(grad_A, grad_B, *ctx.saved_tensors, needed)
    return *(grad if wanted else None for grad, wanted in zip(grads, needed, strict=True)), None


aggregate = library.differentiable(AGGREGATE, _backward, _setup_context)
mix_factors = library.differentiable(MIX_FACTORS, _mix_backward, _mix_setup_context)
aggregate_backward = library.no_second_derivative(AGGREGATE_BACKWARD)
mix_factors_backward = library.no_second_derivative(MIX_FACTORS_BACKWARD)
