"""inject: a frozen linear plus each sample's own low-rank increments, without ever building a sample's dense sum."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cllava_fast.ops import checks, dispatch, triton_backend, tuned
from cllava_fast.ops import native as native_backend
from cllava_fast.ops.inject import autograd, native, reference, tiling

dispatch.register("reference", {"inject": reference.inject, "inject_add": reference.inject_add})
dispatch.register("reference", {"inject_backward": reference.inject_backward})
native_backend.register("cuda", {"inject": native.inject, "inject_add": native.inject_add}, native.cuda_accepts)
native_backend.register(
    "cpu",
    {
        "inject": native.cpu_inject,
        "inject_add": native.cpu_inject_add,
        "inject_backward": native.cpu_inject_backward,
    },
    native.cpu_accepts,
)
triton_backend.register("cllava_fast.ops.inject.triton", "inject", "inject_add", "inject_backward")
tuned.register(tiling.DEFAULTS, tiling.candidates)


class Past(NamedTuple):
    """Frozen rows that all act on every sample, each as strongly as that sample's coefficient says.

    A: `[C, Q, d_in]`, B: `[C, Q, d_out]`, floating; coefficient: float32 `[B, C]`, or `[1, C]`, the same for all
    samples. Then rows whose factors outweigh the frozen weight are added up to one matrix of its size, where there are
    tokens enough for that to be less work.
    """

    A: Tensor
    B: Tensor
    coefficient: Tensor


def inject(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    index: Tensor,
    coefficient: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    *,
    past: Past | None = None,
    check_values: bool = True,
) -> Tensor:
    """A frozen linear plus, for each sample, its own weighted increments.

    The increment of Continual LLaVA (arXiv 2411.02564), with one list of pairs per sample:

        y[b, s] = weight x[b, s] + bias + scale * sum_p coefficient[b, p] * B[index[b, p]]^T (A[index[b, p]] x[b, s])

    and, where earlier tasks are in context, `scale * sum_c past.coefficient[b, c] * past.B[c]^T (past.A[c] x[b, s])`.

    Where a router weighs experts token by token, as in MoELoRA (CoIN, arXiv 2403.08350), each token has coefficients of
    its own, `[B, S, P]`; what its top-k leaves out is 0. Where rows have one projection down in common, as BranchLoRA's
    branches do (arXiv 2506.02041), `A` has one row, which x is projected on once. Both go together.

    Args:
        x: `[B, S, d_in]`, floating; any strides; B, S and P may be 0.
        weight: `[d_out, d_in]`, same dtype as x. **Frozen**: it gets no gradient, and one that asks for a gradient is
            refused rather than silently left without. The same holds for bias.
        A: `[N, R, d_in]`, or `[1, R, d_in]`, which all rows share: its gradient is then the sum over all pairs.
            B: `[N, R, d_out]`, rank-major. Both are floating; their dtype may differ from x's (float32 master factors
            under a bfloat16 model): they are cast to x's inside; their gradients come back in their own.
            They must be finite: where most of a small pool acts, all of it is projected on, and what is not selected
            is multiplied by 0.
        index: int64 `[B, P]`, rows in [0, N); a row may appear more than once in a sample.
        coefficient: float32 `[B, P]`, or `[B, S, P]`, for each token (float64 is taken with float64 x); applied in
            float32 between the two products, or to B where rows share A. A coefficient of 0 with any valid row is
            padding.
        bias: `[d_out]`, or None. scale: a number, without a gradient.
        past: frozen rows that all act on every sample, of their own number C and rank Q (`Past`). The same as more
            pairs, but nothing is gathered and no gradient of these rows exists; the past's coefficient has one.
        check_values: also check, for CPU tensors, that `index` is in range.

    Returns:
        y `[B, S, d_out]` in x's dtype; under autocast x, weight and bias are cast as `F.linear` casts them. Gradients
        go to `x`, `A`, `B`, `coefficient` and `past.coefficient`, computed only where asked for, in a fixed order
        (bit-equal run to run).

    Raises:
        ValueError: for shapes, dtypes, devices or values that do not fit, before anything runs.
    """
    _check_inject(x, weight, bias, A, B, index, coefficient, scale, past)
    if check_values:
        checks.within("index", index, B.shape[0], "N")
    return inject_unchecked(x, weight, A, B, index, coefficient, bias, scale, past and Past(*past))


def inject_unchecked(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, bias: Tensor | None,
    scale: float, past: Past | None,
) -> Tensor:  # fmt: skip
    """`inject` of arguments that are known to fit, as in a patched model's layers, token by token."""
    if past is not None:
        # into the weight itself only where that does not round it away
        exact = torch.finfo(x.dtype).bits >= 32 and not checks.under_autocast(x)
        if adds_up(x, past, products=1 if exact else 3):
            base = weight + added_up(past, scale, x.dtype) if exact else weight
            later = None if exact else past
            return inject_add_unchecked(F.linear(x, base, bias), x, A, B, index, coefficient, scale, later)
    y: Tensor = autograd.inject(x, weight, bias, *_acting(x, A, B, index, coefficient, scale, past))[0]
    return y


def inject_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    index: Tensor,
    coefficient: Tensor,
    scale: float = 1.0,
    *,
    past: Past | None = None,
    check_values: bool = True,
) -> Tensor:
    """`inject` on top of any base layer's output (quantised, wrapped, trained), or of another `inject`.

        out[b, s] = y[b, s] + scale * sum_p coefficient[b, p] * B[index[b, p]]^T (A[index[b, p]] x[b, s])

    Args:
        y: `[B, S, d_out]`, same dtype as x; not modified. The rest as for `inject`.

    Returns:
        a new `[B, S, d_out]`. Gradients go to `y` and as for `inject`. Under autocast y and x are cast.

    Raises:
        ValueError: for shapes, dtypes, devices or values that do not fit, before anything runs.
    """
    _check_inject_add(y, x, A, B, index, coefficient, scale, past)
    if check_values:
        checks.within("index", index, B.shape[0], "N")
    return inject_add_unchecked(y, x, A, B, index, coefficient, scale, past and Past(*past))


def inject_add_unchecked(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, scale: float, past: Past | None
) -> Tensor:
    """`inject_add` of arguments that are known to fit."""
    if past is not None and adds_up(x, past, products=3):
        y, past = y + F.linear(x, added_up(past, scale, x.dtype)), None
    total: Tensor = autograd.inject_add(y, x, *_acting(x, A, B, index, coefficient, scale, past))[0]
    return total


def adds_up(x: Tensor, past: Past, products: int) -> bool:
    """Whether the past is added up before tokens meet it: where its sum is smaller than its factors, and than what x is
    projected to on them, and where there is less to multiply. Tokens then take part in that many `products` of the
    sum's size: its gradient, and where it stands beside the frozen weight, y and x's gradient."""
    (rows, rank, d_out), d_in = past.B.shape, x.shape[2]
    tokens, columns = x.shape[0] * x.shape[1], rows * rank
    factors, total = columns * (d_in + d_out), d_in * d_out
    fewer = (products * tokens + 2 * columns) * total < 2 * tokens * factors  # multiplications, the gradients' too
    return past.coefficient.shape[0] == 1 and total <= min(factors, tokens * columns) and fewer


def added_up(past: Past, scale: float, dtype: torch.dtype) -> Tensor:  # [d_out, d_in]
    """`scale * sum_c coefficient[c] * B[c]^T A[c]`, with its gradient to the coefficient."""
    weighed = autograd.Weighed.apply(past.B, (past.coefficient * scale).view(-1, 1, 1), dtype)  # [C, Q, d_out]
    return reference.columns(weighed, dtype).t() @ reference.columns(past.A, dtype)


# On a GPU, projecting on this many columns still costs little more than reading the activations once.
WHOLE_COLUMNS = 256


def plan(
    device: str, samples: int, pairs: int, rows: int, rank: int, per_token: bool = False, shared: bool = False
) -> str:
    """How activations are projected. "whole": on all rows of the pool, by library products, while it is small and
    samples would gather no fewer rows than it has; what is not selected is multiplied by 0. "gather": on each sample's
    own rows, which on a CPU is never slower (benchmarks/README.md), but where routers weigh all rows of the pool. On a
    GPU rows that share one A are gathered: a kernel scales x's projection for each row and token."""
    if device != "cuda":
        return "whole" if (per_token or shared) and rows <= pairs else "gather"
    small = not shared and rows * rank <= WHOLE_COLUMNS and rows <= samples * pairs
    return "whole" if small else "gather"


def _acting(
    x: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, scale: float, past: Past | None
) -> tuple[Any, ...]:
    """The arguments that both ops have last."""
    past_A, past_B, past_coefficient = (None, None, None) if past is None else past
    if past_coefficient is not None and past_coefficient.shape[0] != x.shape[0]:
        past_coefficient = past_coefficient.expand(x.shape[0], -1).contiguous()
    rows, rank, _ = B.shape
    per_token = coefficient.dim() == 3
    if per_token and x.shape[1] == 1:  # decoding: of the one token is of the sample
        coefficient, per_token = coefficient.squeeze(1), False
    samples, pairs = index.shape
    whole = plan(x.device.type, samples, pairs, rows, rank, per_token, A.shape[0] != rows) == "whole"
    save = autograd.save_for(B, coefficient, past_coefficient)
    return A, B, index, coefficient, past_A, past_B, past_coefficient, scale, whole, save


def check_frozen(weight: Tensor, bias: Tensor | None) -> None:
    for name, frozen in (("weight", weight), ("bias", bias)):
        if frozen is not None and frozen.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, but inject computes none for it: the base layer must be frozen. "
                f"Call {name}.requires_grad_(False), or run the trained layer yourself and use inject_add."
            )


@checks.once
def _check_inject(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor,
    scale: float, past: Past | None,
) -> None:  # fmt: skip
    sizes: dict[str, int] = {}
    checks.shape("x", x, "B S d_in", sizes)
    checks.shape("weight", weight, "d_out d_in", sizes)
    checks.floating(x=x)
    checks.same_dtype("weight", weight, "x", x)
    if bias is not None:
        checks.shape("bias", bias, "d_out", sizes)
        checks.same_dtype("bias", bias, "x", x)
    check_frozen(weight, bias)
    checks.device(x, weight=weight, bias=bias)
    checks.scale(scale)
    _check_pairs(x, A, B, index, coefficient, past, sizes)


@checks.once
def _check_inject_add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, scale: float, past: Past | None
) -> None:
    sizes: dict[str, int] = {}
    checks.shape("y", y, "B S d_out", sizes)
    checks.shape("x", x, "B S d_in", sizes)
    checks.floating(y=y, x=x)
    checks.same_dtype("x", x, "y", y)
    checks.device(y, x=x)
    checks.scale(scale)
    _check_pairs(x, A, B, index, coefficient, past, sizes)


def _check_past(x: Tensor, past: Past, sizes: dict[str, int]) -> None:
    names = {f"past.{name}": tensor for name, tensor in past._asdict().items()}
    checks.tensors(**names)
    coefficients = "1 C" if past.coefficient.dim() == 2 and past.coefficient.shape[0] == 1 else "B C"
    for (name, tensor), pattern in zip(names.items(), ("C Q d_in", "C Q d_out", coefficients), strict=True):
        checks.shape(name, tensor, pattern, sizes)
    for name, factor in list(names.items())[:2]:
        if factor.requires_grad:
            raise ValueError(
                f"{name}: requires a gradient, but inject computes none for it: the past is frozen. "
                "Give rows that train as A and B."
            )
    checks.floating(**names)
    checks.full_precision(x.dtype == torch.float64, **{"past.coefficient": past.coefficient})
    checks.device(x, **names)


def _check_pairs(
    x: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, past: Past | None, sizes: dict[str, int]
) -> None:
    checks.tensors(A=A, B=B, coefficient=coefficient)
    one = A.dim() == B.dim() == 3 and A.shape[0] == 1 < B.shape[0]
    checks.shape("A", A, "1 R d_in" if one else "N R d_in", sizes)
    checks.shape("B", B, "N R d_out", sizes)
    checks.shape("index", index, "B P", sizes)
    checks.shape("coefficient", coefficient, "B S P" if coefficient.dim() == 3 else "B P", sizes)
    checks.floating(A=A, B=B)
    checks.integer(index=index)
    checks.full_precision(x.dtype == torch.float64, coefficient=coefficient)
    checks.device(x, A=A, B=B, index=index, coefficient=coefficient)
    if past is not None:
        _check_past(x, Past(*past), sizes)
