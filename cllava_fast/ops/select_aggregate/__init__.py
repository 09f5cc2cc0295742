"""select_aggregate: `select` and `aggregate` in one call, on a GPU often in one launch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from cllava_fast.ops import checks, dispatch, triton_backend
from cllava_fast.ops import native as native_backend
from cllava_fast.ops.aggregate import check_tasks
from cllava_fast.ops.select import check, check_numbers, triton_accepts
from cllava_fast.ops.select import native as select_native
from cllava_fast.ops.select_aggregate import autograd, native, reference

dispatch.register("reference", {"select_aggregate": reference.select_aggregate})
native_backend.register("cpu", {"select_aggregate": native.in_two_calls}, select_native.cpu_accepts)
native_backend.register("cuda", {"select_aggregate": native.select_aggregate}, select_native.cuda_accepts)
triton_backend.register("cllava_fast.ops.select_aggregate.triton", "select_aggregate", accepts=triton_accepts)


def select_aggregate(
    query: Tensor,
    keys: Tensor,
    top_m: int,
    row_task: Tensor,
    row_mean: Tensor,
    context: Tensor,
    allowed: Tensor | None = None,
    groups: int = 1,
    reduce: Literal["sample", "batch"] = "sample",
    *,
    check_values: bool = True,
) -> tuple[Tensor, Tensor]:
    """Pick rows for each sample and join them with the context that they were trained with.

        index, weight, _ = select(query, keys, top_m, allowed, groups, reduce)
        index, coefficient = aggregate(index, weight, row_task, row_mean, context)

    to the same bits, as long as the same backend runs both. Arguments are those of the two functions, and so are the
    errors.

    Args:
        query: `[B, D]`. keys: `[N, D]`. top_m: M. allowed: bool `[N]` or `[B, N]`. groups, reduce: see `select`.
        row_task: int64 `[N]`. row_mean: float32 `[N]`. context: float32 `[T, T]`: see `aggregate`.
        check_values: also check values, as both functions do.

    Returns:
        index int64 `[B, P]`, coefficient float32 `[B, P]` (float64 if row_mean or context is), P = M + N pairs: the
        first M are the selected rows with their weights, pair M + n is row n with its contextual coefficient.
        The only gradient is to `context`.

    Raises:
        ValueError: for shapes, dtypes, devices or values that do not fit, before anything runs.
    """
    check(query, keys, top_m, allowed, groups, reduce)
    _check_tasks(query, keys, row_task, row_mean, context)
    if check_values:
        check_numbers(query, keys, top_m, allowed, reduce)
        checks.within("row_task", row_task, context.shape[0], "T")
    coefficient, index = autograd.select_aggregate(
        query, keys, top_m, allowed, groups, reduce == "batch", row_task, row_mean, context
    )
    return index, coefficient


@checks.once
def _check_tasks(query: Tensor, keys: Tensor, row_task: Tensor, row_mean: Tensor, context: Tensor) -> None:
    check_tasks(row_task, row_mean, context, {"N": keys.shape[0]}, query)
