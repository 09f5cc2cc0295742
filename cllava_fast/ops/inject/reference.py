"""inject in plain PyTorch: the definition of right.

Pairs are gathered: the P of a sample are joined to K = P * R columns, and two thin batched products do the rest, so
nothing of the size of the frozen weight is ever allocated. Where many pairs act, samples take turns: their rows of
factors, gathered for all at once, would outweigh the activations. The past, and a pool that is projected on whole, need
no gathering: all their rows act on every sample, some with strength 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

GATHERED = 2**21  # entries of a factor that may be gathered at once, if that is not less than one sample's


@dataclass(slots=True)
class Acting:
    """What acts, and how: arguments that every form of inject has, in this order."""

    A: Tensor  # [N, R, d_in]
    B: Tensor  # [N, R, d_out]
    index: Tensor  # [B, P]
    coefficient: Tensor  # [B, P]
    past_A: Tensor | None  # [C, Q, d_in]
    past_B: Tensor | None  # [C, Q, d_out]
    past_coefficient: Tensor | None  # [B, C]
    scale: float
    whole: bool  # whether activations are projected on all rows of the pool, or on each sample's pairs

    @property
    def columns(self) -> int:
        """K: what activations are projected on, the past aside."""
        return (self.A.shape[0] if self.whole else self.index.shape[1]) * self.A.shape[1]

    @property
    def past_columns(self) -> int:
        return 0 if self.past_A is None else self.past_A.shape[0] * self.past_A.shape[1]


# x projected on the pairs [B, S, K] and on the past [B, S, C * Q]; of a whole pool both in one [B, S, K + C * Q], and
# nothing. Empty if not asked for.
Lows = tuple[Tensor, Tensor]


def inject(
    x: Tensor,  # [B, S, d_in]
    weight: Tensor,  # [d_out, d_in]
    bias: Tensor | None,  # [d_out]
    given: Acting,
    save: bool,  # whether a backward pass will ask for what x was projected to
) -> tuple[Tensor, Tensor, Tensor]:
    y = F.linear(x, weight, bias).contiguous()  # [B, S, d_out]
    return y, *add_(y, x, given, save)


def inject_add(
    y: Tensor,  # [B, S, d_out]
    x: Tensor,  # [B, S, d_in]
    given: Acting,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    total = y.clone(memory_format=torch.contiguous_format)
    return total, *add_(total, x, given, save)


def add_(y: Tensor, x: Tensor, given: Acting, save: bool) -> Lows:
    """Adds the increments to y."""
    past_low = add_past_(y, x, given)
    low = shrink(x, given.A, given)
    expand_(y, times(low, strength(given), x.dtype), given.B, given)
    return lows(low, past_low, given, save)


def lows(low: Tensor, past_low: Tensor, given: Acting, save: bool) -> Lows:
    if not save:
        return low.new_empty(0), low.new_empty(0)  # two, since results of an op must not be one tensor
    if given.whole and given.past_A is not None:
        return torch.cat([low, past_low], 2), low.new_empty(0)
    return low, past_low


def add_past_(y: Tensor, x: Tensor, given: Acting) -> Tensor:
    if given.past_A is None or given.past_B is None:
        return x.new_empty(0)
    low = project(x, given.past_A)
    scaled = times(low, past_strength(given), x.dtype)
    y.flatten(0, 1).addmm_(scaled.flatten(0, 1), columns(given.past_B, x.dtype))
    return low


def inject_backward(
    grad: Tensor,  # [B, S, d_out]
    x: Tensor | None,  # [B, S, d_in]; None if A has no gradient
    weight: Tensor | None,  # [d_out, d_in]; None for inject_add
    given: Acting,
    low: Tensor,  # as the forward pass returned it; not read if neither B nor the coefficient has a gradient
    past_low: Tensor,  # likewise, for the past's coefficient
    needed: list[bool],  # gradients of x, A, B, coefficient, past_coefficient
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What is not needed comes back empty."""
    need_x, need_A, need_B, need_coefficient, need_past = needed
    to_x = to_past = grad.new_empty(0)
    to_A, to_B, to_coefficient = (t.new_empty(0) for t in (given.A, given.B, given.coefficient))
    grad = grad.contiguous()  # a reduction's gradient is expanded, and is read several times here
    if given.whole and low.dim() == 3:
        low, past_low = low.split([given.columns, given.past_columns], 2)
    strengths = strength(given)
    if need_B:
        to_B = _sum_over_tokens(times(low, strengths, grad.dtype), grad, given.B, given)
    if need_x or need_A or need_coefficient:
        low_grad = shrink(grad, given.B, given)  # [B, S, K]
        if need_coefficient:
            to_coefficient = _sum_of_products(low_grad, low, given.A.shape[1], given)
            to_coefficient = to_coefficient.gather(1, given.index) if given.whole else to_coefficient
            to_coefficient = as_dtype(to_coefficient, given.coefficient.dtype)
        low_grad = times(low_grad, strengths, grad.dtype)
        if need_A:
            assert x is not None
            to_A = _sum_over_tokens(low_grad, x, given.A, given)
        if need_x:
            to_x = grad.new_zeros(*grad.shape[:2], given.A.shape[2]) if weight is None else grad @ weight
            expand_(to_x, low_grad, given.A, given)
    if given.past_A is not None and given.past_B is not None and (need_x or need_past):
        low_grad = project(grad, given.past_B)  # [B, S, C * Q]
        if need_past:
            assert given.past_coefficient is not None
            to_past = _sum_of_products(low_grad, past_low, given.past_A.shape[1], given)
            to_past = as_dtype(to_past, given.past_coefficient.dtype)
        if need_x:
            scaled = times(low_grad, past_strength(given), grad.dtype)
            to_x.flatten(0, 1).addmm_(scaled.flatten(0, 1), columns(given.past_A, grad.dtype))
    return to_x, to_A, to_B, to_coefficient, to_past


def strength(given: Acting) -> Tensor:
    """Of every row that x is projected on, one for its R columns: [B, 1, rows, 1]. A row that appears twice in a sample
    counts twice."""
    by_row = given.coefficient
    if given.whole:
        chosen = given.index.unsqueeze(2) == torch.arange(given.A.shape[0], device=given.index.device)  # [B, P, N]
        by_row = torch.where(chosen, by_row.unsqueeze(2), 0).sum(1)
    return (by_row * given.scale)[:, None, :, None]


def past_strength(given: Acting) -> Tensor:  # [B, 1, C, 1]
    assert given.past_coefficient is not None
    return (given.past_coefficient * given.scale)[:, None, :, None]


def times(low: Tensor, strength: Tensor, dtype: torch.dtype) -> Tensor:  # [B, S, rows * R], in strength's precision
    samples, tokens, columns = low.shape
    rows = strength.shape[2]
    by_row = low.view(samples, tokens, rows, columns // rows if rows else 0)
    scaled = by_row * strength
    if low.dtype == torch.float16:  # an overflow in a row that does not act stays there
        scaled = torch.where(strength != 0, scaled, 0)
    return as_dtype(scaled.reshape(samples, tokens, columns), dtype)


def shrink(x: Tensor, factor: Tensor, given: Acting) -> Tensor:  # [B, S, d] -> [B, S, K]
    if given.whole:
        return project(x, factor)
    parts = [torch.bmm(part, rows.transpose(1, 2)) for part, rows in _turns(x, factor, given.index)]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def expand_(y: Tensor, low: Tensor, factor: Tensor, given: Acting) -> None:  # [B, S, K] added to [B, S, d]
    if given.whole:
        y.flatten(0, 1).addmm_(low.flatten(0, 1), columns(factor, y.dtype))
        return
    first = 0
    for part, rows in _turns(y, factor, given.index):
        part.baddbmm_(low[first : first + len(part)], rows)
        first += len(part)


def project(x: Tensor, factor: Tensor) -> Tensor:  # [B, S, d], [N, R, d] -> [B, S, N * R]
    return F.linear(x, columns(factor, x.dtype)).contiguous()


def columns(factor: Tensor, dtype: torch.dtype) -> Tensor:  # [N, R, d] -> [N * R, d]
    return as_dtype(factor, dtype).flatten(0, 1)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _turns(x: Tensor, factor: Tensor, index: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Samples that are worked on together, and the rows of `factor` that act on them: [b, S, d], [b, K, d]."""
    samples = len(index)
    together = max(1, GATHERED // max(1, index.shape[1] * factor.shape[1] * factor.shape[2]))
    if factor.shape[0] <= index.numel():  # whichever is smaller is cast
        factor = as_dtype(factor, x.dtype)
    if together >= samples:
        yield x, _rows(factor, index, x.dtype)
        return
    for first in range(0, samples, together):
        at = slice(first, first + together)
        yield x[at], _rows(factor, index[at], x.dtype)


def _rows(factor: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:  # [N, R, d], [b, P] -> [b, P * R, d]
    # copies whole rows, where factor[index] goes through them entry by entry
    rows = factor.index_select(0, index.reshape(-1))
    return as_dtype(rows, dtype).view(len(index), index.shape[1] * factor.shape[1], factor.shape[2])


def _sum_of_products(low_grad: Tensor, low: Tensor, rank: int, given: Acting) -> Tensor:  # -> [B, rows]
    """The gradient of a coefficient, before its dtype."""
    by_column = (as_dtype(low_grad, _exact(low)) * low).sum(1)  # [B, K]
    return by_column.view(len(low), low.shape[2] // rank, rank).sum(2) * given.scale


def _sum_over_tokens(low: Tensor, x: Tensor, factor: Tensor, given: Acting) -> Tensor:  # -> [N, R, d]
    """The gradient of `factor`, summed in one order."""
    if given.whole:
        return (low.flatten(0, 1).t() @ x.flatten(0, 1)).view(factor.shape).to(factor.dtype)
    rows, size = factor.shape[0], factor.shape[1] * factor.shape[2]
    exact = _exact(x)
    by_pair = as_dtype(torch.bmm(low.transpose(1, 2), x), exact).reshape(given.index.numel(), size)  # [B * P, R * d]
    index = given.index.reshape(-1)
    if x.device.type == "cpu":
        total = by_pair.new_zeros(rows, size).index_add_(0, index, by_pair)
    else:  # where index_add has atomics: a one-hot product
        chosen = (index == torch.arange(rows, device=x.device).unsqueeze(1)).to(exact)  # [N, B * P]
        total = chosen @ by_pair
    return as_dtype(total.view(factor.shape), factor.dtype)


def _exact(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
