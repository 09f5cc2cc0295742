"""select_aggregate in csrc: one native call on a GPU, unless the pool is large; two on the CPU."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from cllava_fast.ops.aggregate.native import aggregate
from cllava_fast.ops.select.native import prepared, select
from cllava_fast.ops.select_aggregate.reference import one_after_the_other

# In one call a single block computes all coefficients of a sample: for so many rows, that costs less than a launch.
MOST_ROWS = 2048


def select_aggregate(
    library: Any,
    query: Tensor,
    keys: Tensor,
    top_m: int,
    allowed: Tensor | None,
    groups: int,
    by_batch: bool,
    row_task: Tensor,
    row_mean: Tensor,
    context: Tensor,
) -> tuple[Tensor, Tensor]:
    """coefficient, index, each [B, M + N]."""
    tasks = row_task, row_mean, context
    if len(keys) > MOST_ROWS:
        return in_two_calls(library, query, keys, top_m, allowed, groups, by_batch, *tasks)
    shape = len(query), top_m + len(keys)
    coefficient, rows = row_mean.new_empty(shape), row_task.new_empty(shape)
    dense = (tensor.contiguous() for tensor in tasks)
    library.select_aggregate(*prepared(query, keys, allowed, by_batch), groups, by_batch, *dense, coefficient, rows)
    return coefficient, rows


def in_two_calls(library: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    return one_after_the_other(partial(select, library), partial(aggregate, library))(*arguments)
