"""select: which rows of the pool answer each sample, and how strongly."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from cllava_fast.ops import checks, dispatch, triton_backend
from cllava_fast.ops import native as native_backend
from cllava_fast.ops.select import autograd, native, reference

dispatch.register("reference", {"select": reference.select, "select_backward": reference.select_backward})
native_backend.register("cpu", native.KERNELS, native.cpu_accepts)
native_backend.register("cuda", native.KERNELS, native.cuda_accepts)


# The most that its running top-M holds, the widest row of its backward, the rows that its numbers can tell apart.
TRITON_LIMITS = {"M": 64, "D": 8192, "N": 2**31}


def triton_accepts(op: str, site: dispatch.Site, asked: bool) -> str | None:
    return dispatch.above(site, TRITON_LIMITS) or triton_backend.accepts(op, site, asked)


triton_backend.register("cllava_fast.ops.select.triton", "select", "select_backward", accepts=triton_accepts)


def select(
    query: Tensor,
    keys: Tensor,
    top_m: int,
    allowed: Tensor | None = None,
    groups: int = 1,
    reduce: Literal["sample", "batch"] = "sample",
    *,
    check_values: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pick the `top_m` most similar rows for each sample.

    The intrinsic selection of Continual LLaVA (arXiv 2411.02564): with `s_n = cos(query, key_n)` over the allowed rows,
    the top M rows are taken, with weights

        c_m = max(s_m, 0) / sum_m max(s_m, 0),        or 1/M where that sum is below 1e-6.

    With `groups` > 1 both vectors are cut into that many equal chunks and `s_n` is the mean of the chunks' cosines; a
    chunk of norm zero has cosine 0. (On a GPU squares are summed in float32: norms should lie between 1e-15 and 1e18.)

    Args:
        query: `[B, D]`, floating. `B` may be 0.
        keys: `[N, D]`, floating (its dtype may differ from the query's).
        top_m: M, from 1 to the number of allowed rows.
        allowed: bool `[N]` or `[B, N]`; None allows every row.
        groups: number of chunks, a divisor of D.
        reduce: `"sample"`: each sample has its own rows. `"batch"` (the ancestor's choice): similarities are averaged
            over the batch first, all samples share one selection; a row is then allowed if every sample allows it.
        check_values: also look for NaN, infinities and too few allowed rows. On a GPU that waits for the device; a
            caller that knows the counts passes False. Never done while compiling or capturing a graph. Unchecked,
            missing rows are filled with disallowed ones of weight 0 and similarity -inf.

    Returns:
        index int64 `[B, M]`, weight float32 `[B, M]`, similarity float32 `[B, M]` (raw, may be negative; float64 for
        float64 keys), in descending similarity. Rows whose similarity is equal in float32 come lowest row first.

    The only gradient is to `keys`, through `similarity`: `index` and `weight` carry none, and `query` gets none.

    Raises:
        ValueError: for shapes, dtypes, devices or values that do not fit, before anything runs.
    """
    check(query, keys, top_m, allowed, groups, reduce)
    if check_values:
        check_numbers(query, keys, top_m, allowed, reduce)
    by_batch = reduce == "batch"
    similarity, weight, index = autograd.select(query, keys, top_m, allowed, groups, by_batch)
    return index, weight, similarity


@checks.once
def check(query: Tensor, keys: Tensor, top_m: int, allowed: Tensor | None, groups: int, reduce: str) -> None:
    sizes: dict[str, int] = {}
    checks.shape("query", query, "B D", sizes)
    checks.shape("keys", keys, "N D", sizes)
    checks.floating(query=query, keys=keys)
    checks.device(query, keys=keys, allowed=allowed)
    checks.count("groups", groups)
    checks.count("top_m", top_m)
    if groups < 1 or sizes["D"] % groups != 0:
        raise ValueError(f"groups: expected a divisor of D = {sizes['D']}, got {groups}. Pad both with zeros.")
    if reduce not in ("sample", "batch"):
        raise ValueError(f"reduce: expected 'sample' or 'batch', got {reduce!r}.")
    if top_m < 1:
        raise ValueError(f"top_m: expected at least 1, got {top_m}.")
    if top_m > sizes["N"]:
        raise ValueError(
            f"top_m: expected at most the {sizes['N']} rows of keys, got {top_m}. Lower it, or add rows to the pool."
        )
    if allowed is not None:
        if allowed.dtype != torch.bool:
            raise ValueError(f"allowed: expected torch.bool, got {allowed.dtype}. Cast it with allowed.bool().")
        checks.shape("allowed", allowed, "N" if allowed.dim() == 1 else "B N", sizes)


def check_numbers(query: Tensor, keys: Tensor, top_m: int, allowed: Tensor | None, reduce: str) -> None:
    if checks.can_read(query, cuda=True):
        checks.finite("query", query)
        checks.finite("keys", keys)
        if allowed is not None:
            _enough_rows(allowed, top_m, reduce)


def _enough_rows(allowed: Tensor, top_m: int, reduce: str) -> None:
    if allowed.dim() == 2 and reduce == "batch":
        allowed = allowed.all(0)
    counts = allowed.sum(-1).reshape(-1)
    short = (counts < top_m).nonzero()
    if short.numel():
        first = int(short[0])
        who = f"sample {first} has" if allowed.dim() == 2 else "there are"
        raise ValueError(
            f"allowed: top_m = {top_m} rows are wanted, but {who} only {int(counts[first])} of {allowed.shape[-1]} "
            "allowed. Lower top_m, or allow more rows."
        )
