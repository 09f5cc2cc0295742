"""What acts in a layer: a selection as rows of factors, beside which stand the pairs of index and coefficient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cllava_fast import ops
from cllava_fast.methods import Pairs, Selection
from cllava_fast.ops import checks, dispatch
from cllava_fast.ops.inject import adds_up, autograd, check_frozen, few_calls
from cllava_fast.ops.inject.native import CUDA_TOKENS, decode
from cllava_fast.pool import Factors, Pool


def context_rows(selection: Selection, factors: Factors) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` whose first rows the columns of ``selection.context`` stand for."""
    return (factors.mean_A, factors.mean_B) if selection.means else (factors.A, factors.B)


def selected(selection: Selection, factors: Factors) -> list[tuple[Tensor, Tensor, Pairs]]:
    """``(A, B, pairs)`` of what is selected. Committed and open rows stay two pools, so that no gradient of committed
    rows ever exists."""
    found: list[tuple[Tensor, Tensor, Pairs]] = []
    if selection.block is not None:
        assert factors.block_A is not None and factors.block_B is not None
        found.append((*(selection.rows or (factors.block_A, factors.block_B)), selection.block))
    if selection.past is not None:
        # an A that all rows share trains with the open block
        learning = factors.shares_A and selection.block is not None
        A = factors.block_A if learning else factors.A
        assert A is not None
        found.append((A, factors.B, selection.past))
    return found


def terms(selection: Selection, factors: Factors) -> list[tuple[Tensor, Tensor, Pairs]]:
    """``(A, B, pairs)`` whose increments add up to what acts, the context written as pairs too."""
    found = selected(selection, factors)
    if selection.context is not None:
        found.append((*context_rows(selection, factors), selection.context_pairs()))
    return [_mixed(found)] if selection.mix else found


def _mixed(found: list[tuple[Tensor, Tensor, Pairs]]) -> tuple[Tensor, Tensor, Pairs]:
    """Factors summed before they are multiplied: one row a sample."""
    sums = [ops.mix_factors(A, B, pairs.coefficient.to(A.device), pairs.index.to(A.device)) for A, B, pairs in found]
    A = torch.stack([a.float() for a, _ in sums]).sum(0)  # [B, R, d_in]
    B = torch.stack([b.float() for _, b in sums]).sum(0)  # [B, R, d_out]
    return A, B, Pairs.ones(torch.arange(len(A), device=A.device)[:, None])


def pools(
    selection: Selection, factors: Factors, device: torch.device
) -> list[tuple[Tensor, Tensor, Pairs, ops.Past | None]]:
    """``(A, B, pairs, past)`` for each op; the context goes with the first pool that is selected from."""
    if selection.mix:
        return [(*term, None) for term in terms(selection, factors)]
    context, past = selection.context, None
    if context is not None:
        A, B = context_rows(selection, factors)
        rows = context.shape[1]
        past = ops.Past(A[:rows], B[:rows], context.to(device))
    first, *others = selected(selection, factors)
    return [(*first, past), *((*other, None) for other in others)]


def column_strength(selection: Selection, pool: Pool, scale: float) -> Tensor | None:
    """``Selection.column_strength``, decided once a forward pass: a layer that is computed again goes the same way."""
    block = selection.block
    if block is None or selection.past is not None or selection.rows is not None or selection.mix or pool.shares_A:
        return None
    if block.coefficient.dim() != 2 or block.index.device.type not in few_calls.DEVICES:
        return None
    if not torch.is_grad_enabled() or dispatch.wanted() != dispatch.AUTO:
        return None
    past_rank = pool.context_rank if selection.means else pool.rank
    rows, rank, past = pool.block_rows, pool.rank, selection.context
    return few_calls.column_strength(block.index, block.coefficient, rows, rank, past, past_rank, scale)


def train_in_few_calls(
    x: Tensor, linear: nn.Linear | None, base: Tensor | None, selection: Selection, factors: Factors
) -> Tensor | None:
    """The output of a layer that trains where a GPU waits for Python; None of any other."""
    strength = selection.column_strength
    if strength is None:
        return None
    A, B = factors.block_A, factors.block_B
    assert A is not None and B is not None
    weight = bias = None
    if linear is not None and base is None:
        weight, bias = linear.weight, linear.bias
    if not few_calls.wins(x, B.shape[2], A.shape[0] * A.shape[1], weight, bias, base):
        return None
    past_A = past_B = None
    if selection.context is not None:
        rows = selection.context.shape[1]
        past_A, past_B = (factor[:rows] for factor in context_rows(selection, factors))
        if adds_up(x, ops.Past(past_A, past_B, selection.context), products=3):
            return None
    if weight is not None:
        check_frozen(weight, bias)
    return few_calls.inject(x, weight, bias, base, A, B, past_A, past_B, strength.to(x.device))


# Bytes of factors that native decoding may read, sample by sample, before matrix products with the context are better.
NATIVE_BYTES = 2**28


def native_pairs(x: Tensor, selection: Selection, factors: Factors) -> Pairs | None:
    """What acts, where a GPU decodes: it waits for each launch, and the context as more pairs takes none of its own."""
    if (
        not x.is_cuda
        or x.shape[1] > CUDA_TOKENS
        or factors.shares_A
        or _takes_gradients_or_casts()
        or checks.captured()
    ):
        return None
    pairs, (A, B) = selection.joined, (factors.A, factors.B)
    if pairs is None or A.dtype != B.dtype or A.dtype not in (x.dtype, torch.float32):
        return None
    _, rank, d_in = A.shape
    row = rank * (d_in + B.shape[2]) * A.element_size()
    if pairs.index.numel() * row > NATIVE_BYTES or pairs.index.device != x.device:
        return None
    site = autograd.site(x, None, None, A, B, pairs.index, pairs.coefficient)
    return pairs if dispatch.choose("inject", site).backend == "cuda" else None


def decode_natively(
    x: Tensor, linear: nn.Linear, selection: Selection, factors: Factors, scale: float, lasts: bool
) -> Tensor | None:
    """A layer's output, where `native_pairs` finds what acts; None elsewhere. ``lasts``: it would find the same for the
    tokens that follow, so they need not ask."""
    if native_pairs(x, selection, factors) is None:
        return None
    if lasts:
        selection.native.setdefault(factors, set()).add(_like(x))
    return _decode(x, linear.weight, linear.bias, selection, factors, scale)


def decode_as_before(
    x: Tensor, linear: nn.Linear, selection: Selection, factors: Factors, scale: float
) -> Tensor | None:
    """The output of a layer that has decoded natively with this selection; None of any other.

    Each token of an answer comes by here in each layer, and the GPU waits meanwhile: as few calls as there can be.
    """
    if _takes_gradients_or_casts() or torch.compiler.is_compiling():
        return None
    known = selection.native.get(factors)
    if known is None or _like(x) not in known:
        return None
    frozen = linear._parameters  # `nn.Module.__getattr__` is a call each
    weight = frozen.get("weight")
    if weight is None:  # pruned, or parametrized since
        return None
    return _decode(x, weight, frozen["bias"], selection, factors, scale)


def _decode(
    x: Tensor, weight: Tensor, bias: Tensor | None, selection: Selection, factors: Factors, scale: float
) -> Tensor:
    own, pairs = factors._buffers, selection.joined
    A, B = own["A"], own["B"]
    assert A is not None and B is not None and pairs is not None
    return decode(x, weight, bias, A, B, pairs.index, pairs.coefficient, scale, selection.arrived)


def _like(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, dispatch.wanted()


def _takes_gradients_or_casts() -> bool:
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cuda")
