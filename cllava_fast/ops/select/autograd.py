"""select in torch.library: schema, fake tensors, autocast, gradient to the keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllava_fast.ops import dispatch, library
from cllava_fast.ops.checks import exact_dtype


def _site(
    query: Tensor, keys: Tensor, top_m: int, allowed: Tensor | None, groups: int, by_batch: bool
) -> dispatch.Site:
    sizes = (("B", query.shape[0]), ("D", query.shape[1]), ("N", keys.shape[0]), ("M", top_m), ("groups", groups))
    return dispatch.Site(query.device, keys.dtype, sizes)


def _backward_site(
    grad: Tensor, query: Tensor, keys: Tensor, index: Tensor, groups: int, by_batch: bool
) -> dispatch.Site:
    return _site(query, keys, grad.shape[1], None, groups, by_batch)


def _fake(query: Tensor, keys: Tensor, top_m: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (query.shape[0], top_m)
    return (
        query.new_empty(shape, dtype=exact_dtype(keys)),
        query.new_empty(shape, dtype=torch.float32),
        query.new_empty(shape, dtype=torch.int64),
    )


def _backward_fake(grad: Tensor, query: Tensor, keys: Tensor, *_: Any) -> Tensor:
    return keys.new_empty(keys.shape)


# The floating outputs come first: opcheck adds all outputs up in place, and an integer cannot take a float.
SELECT = library.define(
    "select",
    "(Tensor query, Tensor keys, SymInt top_m, Tensor? allowed, SymInt groups, bool by_batch)"
    " -> (Tensor similarity, Tensor weight, Tensor index)",
    site=_site,
    fake=_fake,
)
BACKWARD = library.define(
    "select_backward",
    "(Tensor grad, Tensor query, Tensor keys, Tensor index, SymInt groups, bool by_batch) -> Tensor",
    site=_backward_site,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, keys, _, _, ctx.groups, ctx.by_batch = inputs
    _, weight, index = output
    ctx.mark_non_differentiable(weight, index)
    if ctx.needs_input_grad[1]:
        ctx.save_for_backward(query, keys, index)


def _backward(ctx: Any, grad: Tensor, _weight: Any, _index: Any) -> tuple[Any, ...]:
    grad_keys = None
    if ctx.needs_input_grad[1]:
        query, keys, index = ctx.saved_tensors
        grad_keys = select_backward(grad, query, keys, index, ctx.groups, ctx.by_batch)
    return None, grad_keys, None, None, None, None


select = library.differentiable(SELECT, _backward, _setup_context)
select_backward = library.no_second_derivative(BACKWARD)
