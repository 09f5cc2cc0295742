"""select_aggregate in torch.library: schema, fake tensors, autocast, gradient to the context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cllava_fast.ops import dispatch, library
from cllava_fast.ops.aggregate.autograd import aggregate_backward
from cllava_fast.ops.checks import exact_dtype


def _site(
    query: Tensor,
    keys: Tensor,
    top_m: int,
    allowed: Tensor | None,
    groups: int,
    by_batch: bool,
    row_task: Tensor,
    row_mean: Tensor,
    context: Tensor,
) -> dispatch.Site:
    sizes = (("B", query.shape[0]), ("D", query.shape[1]), ("N", keys.shape[0]), ("M", top_m), ("groups", groups))
    exact = exact_dtype(row_mean, context)
    return dispatch.Site(query.device, exact if exact == torch.float64 else keys.dtype, sizes)


def _fake(query: Tensor, keys: Tensor, top_m: int, *args: Any) -> tuple[Tensor, Tensor]:
    *_, row_task, row_mean, context = args
    shape = (query.shape[0], top_m + keys.shape[0])
    return row_mean.new_empty(shape, dtype=exact_dtype(row_mean, context)), row_task.new_empty(shape)


# The floating output comes first: opcheck adds all outputs up in place, and an integer cannot take a float.
SELECT_AGGREGATE = library.define(
    "select_aggregate",
    "(Tensor query, Tensor keys, SymInt top_m, Tensor? allowed, SymInt groups, bool by_batch, Tensor row_task,"
    " Tensor row_mean, Tensor context) -> (Tensor coefficient, Tensor index)",
    site=_site,
    fake=_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, ctx.top_m, *_, row_task, row_mean, context = inputs
    coefficient, index = output
    ctx.mark_non_differentiable(index)
    if ctx.needs_input_grad[8]:
        ctx.save_for_backward(index, coefficient, row_task, row_mean, context)


def _backward(ctx: Any, grad: Tensor, _index: Any) -> tuple[Any, ...]:
    to_context = None
    if ctx.needs_input_grad[8]:
        index, coefficient, *tasks = ctx.saved_tensors
        selected = index[:, : ctx.top_m], coefficient[:, : ctx.top_m]
        _, to_context = aggregate_backward(grad, *selected, *tasks, [False, True])
    return *[None] * 8, to_context


select_aggregate = library.differentiable(SELECT_AGGREGATE, _backward, _setup_context)
