"""inject in csrc: for few tokens a sample (one, on a CPU) the library's product, and the increments added in place.

The kernels add what pairs select; the past, in which all rows act on all samples, is two matrix products. For more
tokens, and for gradients, a CPU does what `reference` does, in one call (csrc/cpu/inject_many.cpp).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cllava_fast.ops import dispatch, native
from cllava_fast.ops.inject import reference
from cllava_fast.ops.inject.reference import Acting, Lows
from cllava_fast.ops.native import dense_rows, factors

CUDA_TOKENS = 16  # of one sample, as csrc/cuda/ops.cuh says
# One limit for all CPUs: with AVX-512 matrix products are as fast beyond, with AVX2 not always (csrc/README.md).
CPU_TOKENS = 1

Result = tuple[Tensor, Tensor, Tensor]


def cuda_accepts(op: str, site: dispatch.Site, asked: bool) -> str | None:
    return _beyond_pairs(dict(site.sizes)) or dispatch.above(site, {"S": CUDA_TOKENS})


def cpu_accepts(op: str, site: dispatch.Site, asked: bool) -> str | None:
    sizes = dict(site.sizes)
    if op != "inject_backward" and sizes.get("S", CPU_TOKENS) <= CPU_TOKENS:
        return _beyond_pairs(sizes)
    if sizes.get("shared") and not sizes.get("per_token"):
        return "has no kernel for rows that share one A and are added up for each sample"
    return None


def _beyond_pairs(sizes: dict[str, int]) -> str | None:
    if sizes.get("per_token"):
        return "has no kernel for coefficients of each token"
    return "has no kernel for rows that share one A" if sizes.get("shared") else None


def inject(
    library: Any,
    x: Tensor,  # [B, S, d_in]
    weight: Tensor,  # [d_out, d_in]
    bias: Tensor | None,  # [d_out]
    given: Acting,
    save: bool,
) -> Result:
    y = F.linear(x, weight, bias).contiguous()  # [B, S, d_out]
    return y, *add_(library, y, x, given, save)


def inject_add(
    library: Any,
    y: Tensor,  # [B, S, d_out]
    x: Tensor,  # [B, S, d_in]
    given: Acting,
    save: bool,
) -> Result:
    y = y.clone(memory_format=torch.contiguous_format)
    return y, *add_(library, y, x, given, save)


def add_(library: Any, y: Tensor, x: Tensor, given: Acting, save: bool) -> Lows:
    past_low = reference.past_projection(x, given)
    reference.add_past_(y, past_low, given)
    A, B = factors(given.A, given.B, x.dtype)
    index, coefficient = given.index.contiguous(), given.coefficient.contiguous()
    library.inject_add(dense_rows(x), A, B, index, coefficient, given.scale, y)
    low = reference.shrink(x, given.A, given) if save else past_low
    return reference.lows(low, past_low, given, save)


def decode(
    x: Tensor,  # [B, S, d_in], S of a few
    weight: Tensor,  # [d_out, d_in]
    bias: Tensor | None,
    A: Tensor,  # [N, R, d_in], in x's dtype or float32
    B: Tensor,  # [N, R, d_out], in A's dtype
    index: Tensor,  # [B, P]
    coefficient: Tensor,  # [B, P]
    scale: float,
    arrived: Tensor,  # int32 [B], zeros, for calls of one stream
) -> Tensor:
    """`inject` without gradients by the native kernel and nothing around it, for a GPU that waits for each launch."""
    y = F.linear(x, weight, bias)
    try:
        torch.ops.cllava_fast_native.inject_add(dense_rows(x), A, B, index, coefficient, scale, y, arrived)
    except RuntimeError as error:
        native.refuse_without_memory("inject", error)
        raise
    return y


def cpu_inject(library: Any, x: Tensor, weight: Tensor, bias: Tensor | None, given: Acting, save: bool) -> Result:
    if x.shape[1] <= CPU_TOKENS:
        return inject(library, x, weight, bias, given, save)
    return many(library, x, weight, bias, None, given, save)


def cpu_inject_add(library: Any, y: Tensor, x: Tensor, given: Acting, save: bool) -> Result:
    if x.shape[1] <= CPU_TOKENS:
        return inject_add(library, y, x, given, save)
    return many(library, x, None, None, y, given, save)


def many(
    library: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, base: Tensor | None, given: Acting, save: bool
) -> Result:
    """`reference.inject`, or `inject_add` to a base, in one call."""
    try:
        y, low, past_low = library.inject(
            x, weight, bias, base, given.A, given.B, given.index, given.coefficient, given.past_A, given.past_B,
            given.past_coefficient, given.scale, given.whole, reference.GATHERED, save,
        )  # fmt: skip
    except RuntimeError as error:
        _raise_unless_left(error)
        if weight is None:
            assert base is not None
            return reference.inject_add(base, x, given, save)
        return reference.inject(x, weight, bias, given, save)
    return (y, *reference.lows(low, past_low, given, save)) if given.whole else (y, low, past_low)


def cpu_inject_backward(
    library: Any,
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    given: Acting,
    low: Tensor,
    past_low: Tensor,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    of_pairs, of_past = reference.split_lows(low, past_low, given) if given.whole else (low, past_low)
    try:
        found: tuple[Tensor, ...] = library.inject_backward(
            grad, x, weight, given.A, given.B, given.index, given.coefficient, given.past_A, given.past_B,
            given.past_coefficient, given.scale, given.whole, reference.GATHERED, of_pairs, of_past, *needed,
        )  # fmt: skip
    except RuntimeError as error:
        _raise_unless_left(error)
        return reference.inject_backward(grad, x, weight, given, low, past_low, needed)
    return found


def _raise_unless_left(error: RuntimeError) -> None:
    """What a call leaves to `reference`: factors with gaps or of a third dtype, a sparse weight, and to say why torch
    refused (no memory), of which the stable ABI keeps no text."""
    said = str(error)
    left = isinstance(error, NotImplementedError) or "left to the reference" in said or "API call failed" in said
    if not left:
        raise error
