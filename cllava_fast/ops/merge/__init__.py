"""merge: a frozen weight with increments added for good, for inference when one selection serves every sample."""

from __future__ import annotations

from torch import Tensor

from cllava_fast.ops import checks, dispatch
from cllava_fast.ops.merge import autograd, reference

dispatch.register("reference", {"merge": reference.merge})


def merge(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    index: Tensor,
    coefficient: Tensor,
    scale: float = 1.0,
    *,
    check_values: bool = True,
) -> Tensor:
    """One dense weight that acts as `inject` does with one list of pairs for all samples.

        W = W0 + scale * sum_p coefficient[p] * B[index[p]]^T A[index[p]]

    summed in float32 (float64 for a float64 weight) and rounded once. Merge from the frozen weight each time: adding
    to a merged one would round again.

    Args:
        weight: W0 `[d_out, d_in]`, floating; not modified.
        A: `[N, R, d_in]`, B: `[N, R, d_out]`, floating; their dtype may differ from the weight's.
        index: int64 `[P]`, rows in [0, N). coefficient: float32 `[P]` (float64 with a float64 weight).
        scale: a number.
        check_values: also check, for CPU tensors, that `index` is in range.

    Returns:
        a new W `[d_out, d_in]` in the weight's dtype. No gradients.

    Raises:
        ValueError: for shapes, dtypes, devices or values that do not fit, before anything runs.
    """
    sizes: dict[str, int] = {}
    checks.shape("weight", weight, "d_out d_in", sizes)
    checks.shape("A", A, "N R d_in", sizes)
    checks.shape("B", B, "N R d_out", sizes)
    checks.shape("index", index, "P", sizes)
    checks.shape("coefficient", coefficient, "P", sizes)
    checks.floating(weight=weight, A=A, B=B)
    checks.integer(index=index)
    checks.full_precision(weight.dtype.itemsize == 8, coefficient=coefficient)
    checks.device(weight, A=A, B=B, index=index, coefficient=coefficient)
    if check_values:
        checks.within("index", index, sizes["N"], "N")
    frozen = (tensor.detach() for tensor in (weight, A, B, index, coefficient))
    merged: Tensor = autograd.MERGE(*frozen, scale)
    return merged
