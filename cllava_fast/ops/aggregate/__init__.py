"""aggregate: what earlier tasks left behind joins the selected rows; mix_factors: the ancestor's factor form."""

from __future__ import annotations

import torch
from torch import Tensor

from cllava_fast.ops import checks, dispatch, triton_backend
from cllava_fast.ops import native as native_backend
from cllava_fast.ops.aggregate import autograd, mix, native, reference

dispatch.register("reference", {"aggregate": reference.aggregate, "aggregate_backward": reference.aggregate_backward})
dispatch.register("reference", {"mix_factors": mix.mix_factors, "mix_factors_backward": mix.mix_factors_backward})
native_backend.register("cpu", native.KERNELS, native.accepts)
native_backend.register("cuda", native.KERNELS, native.accepts)
triton_backend.register("cllava_fast.ops.aggregate.triton", "aggregate", "aggregate_backward")
triton_backend.register("cllava_fast.ops.aggregate.triton_mix", "mix_factors", "mix_factors_backward")


def aggregate(
    index: Tensor,
    weight: Tensor,
    row_task: Tensor,
    row_mean: Tensor,
    context: Tensor,
    *,
    check_values: bool = True,
) -> tuple[Tensor, Tensor]:
    """Join each sample's selected rows and the context that they were trained with into one list of pairs.

    The contextual part of Continual LLaVA (arXiv 2411.02564), routed by the task of each selected row. With `c` and `i`
    the weights and rows of `select`, t(n) = `row_task[n]`, z = `row_mean`, w = `context`, row n acts on sample b with

        alpha[b, n] = sum_m c[b, m] * ([n == i[b, m]] + w[t(i[b, m]), t(n)] * z[n] * [t(n) < t(i[b, m])])

    which is returned as P = M + N pairs in a fixed order that callers may slice: **pairs 0..M-1 are the selected rows
    with their own weights; pair M + n is row n with its contextual coefficient** (0 where no selected row is of a later
    task than row n).

    Args:
        index: int64 `[B, M]`, rows in [0, N).
        weight: float32 `[B, M]`.
        row_task: int64 `[N]`, the task of each row, in [0, T).
        row_mean: float32 `[N]`, mean selection weight of each row over its own task (z).
        context: float32 `[T, T]`; row = the task that looks back, column = the task looked at. Entries with
            column >= row are never read and get gradient 0; what is not read may be NaN (row_mean likewise).
        check_values: also check, for CPU tensors, that `index` and `row_task` are in range.

    Returns:
        index int64 `[B, P]`, coefficient float32 `[B, P]` (float64 if any of weight, row_mean, context is).
        Gradients go to `context` and `weight`.

    Raises:
        ValueError: for shapes, dtypes, devices or values that do not fit, before anything runs.
    """
    _check_aggregate(index, weight, row_task, row_mean, context)
    if check_values:
        checks.within("row_task", row_task, context.shape[0], "T")
        checks.within("index", index, row_task.shape[0], "N")
    coefficient, rows = autograd.aggregate(index, weight, row_task, row_mean, context)
    return rows, coefficient


@checks.once
def _check_aggregate(index: Tensor, weight: Tensor, row_task: Tensor, row_mean: Tensor, context: Tensor) -> None:
    sizes: dict[str, int] = {}
    checks.shape("index", index, "B M", sizes)
    checks.shape("weight", weight, "B M", sizes)
    check_tasks(row_task, row_mean, context, sizes, index)
    checks.integer(index=index)
    checks.full_precision(True, weight=weight)
    checks.device(index, weight=weight)


def check_tasks(row_task: Tensor, row_mean: Tensor, context: Tensor, sizes: dict[str, int], first: Tensor) -> None:
    """Refuses what does not fit; `sizes` is what the arguments before said, `first` the call's first."""
    checks.shape("row_task", row_task, "N", sizes)
    checks.shape("row_mean", row_mean, "N", sizes)
    checks.shape("context", context, "T T", sizes)
    checks.integer(row_task=row_task)
    checks.full_precision(True, row_mean=row_mean, context=context)
    checks.device(first, row_task=row_task, row_mean=row_mean, context=context)


def mix_factors(
    A: Tensor,
    B: Tensor,
    coefficient: Tensor,
    index: Tensor,
    *,
    check_values: bool = True,
) -> tuple[Tensor, Tensor]:
    """Weighted sums of the input and output factors, each on its own: the ancestor's factor form.

        A_mix[b] = sum_p coefficient[b,p] * A[index[b,p]]        B_mix[b] = sum_p coefficient[b,p] * B[index[b,p]]

    The increment `B_mix[b]^T A_mix[b]` then is one pair of rank R; it differs from the product form
    `sum_p coefficient_p B_p^T A_p` by its cross terms (and squares the coefficients).

    Args:
        A: `[N, R, d_in]`, floating. B: `[N, R, d_out]`, floating.
        coefficient: float32 `[B, P]` (or float64 with float64 factors). index: int64 `[B, P]`, rows in [0, N).
        check_values: also check, for CPU tensors, that `index` is in range.

    Returns:
        A_mix `[B, R, d_in]` and B_mix `[B, R, d_out]`, in the dtypes of A and B, accumulated in float32 (float64 for
        float64). Gradients go to `A`, `B` and `coefficient`.

    Raises:
        ValueError: for shapes, dtypes, devices or values that do not fit, before anything runs.
    """
    _check_mix(A, B, coefficient, index)
    if check_values:
        checks.within("index", index, A.shape[0], "N")
    mixed: tuple[Tensor, Tensor] = autograd.mix_factors(A, B, coefficient, index)
    return mixed


@checks.once
def _check_mix(A: Tensor, B: Tensor, coefficient: Tensor, index: Tensor) -> None:
    sizes: dict[str, int] = {}
    checks.shape("A", A, "N R d_in", sizes)
    checks.shape("B", B, "N R d_out", sizes)
    checks.shape("coefficient", coefficient, "B P", sizes)
    checks.shape("index", index, "B P", sizes)
    checks.floating(A=A, B=B)
    checks.integer(index=index)
    checks.full_precision(A.dtype == B.dtype == torch.float64, coefficient=coefficient)
    checks.device(A, B=B, coefficient=coefficient, index=index)
