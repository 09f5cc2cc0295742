"""inject in plain PyTorch: the definition of right.

Pairs are gathered: the P of a sample are joined to K = P * R columns, and two thin batched products do the rest, so
nothing of the size of the frozen weight is ever allocated. Where many pairs act, samples take turns: their rows of
factors, gathered for all at once, would outweigh the activations. The past, and a pool that is projected on whole, need
no gathering: all their rows act on every sample, some with strength 0.

Rows may share one A: x is projected on its R columns once. Where coefficients are those of samples, their B are summed
up before they meet the tokens (`sum_of_B`); where every token has its own, that projection is scaled for each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from cllava_fast.ops.checks import exact_dtype

GATHERED = 2**21  # entries of a factor that may be gathered at once, if that is not less than one sample's


@dataclass
class Acting:
    """What acts, and how: arguments that every form of inject has, in this order."""

    A: Tensor  # [N, R, d_in], or [1, R, d_in]: all rows share it
    B: Tensor  # [N, R, d_out]
    index: Tensor  # [B, P]
    coefficient: Tensor  # [B, P], or [B, S, P]: each token has its own
    past_A: Tensor | None  # [C, Q, d_in]
    past_B: Tensor | None  # [C, Q, d_out]
    past_coefficient: Tensor | None  # [B, C]
    scale: float
    whole: bool  # whether activations are projected on all rows of the pool, or on each sample's pairs

    @property
    def shared(self) -> bool:
        """Whether all rows have one A."""
        return self.A.shape[0] != self.B.shape[0]

    @property
    def per_token(self) -> bool:
        return self.coefficient.dim() == 3

    @property
    def by_sum(self) -> bool:
        """Whether a sample's rows meet its tokens as one sum of their B."""
        return self.shared and not self.per_token

    @cached_property
    def in_order(self) -> bool:
        """Whether a sample's pairs are seen to be the pool's rows one by one, as a router of all experts lists them."""
        rows, index = self.B.shape[0], self.index
        if index.shape[1] != rows or index.device.type != "cpu":  # a GPU would have to be waited for
            return False
        return torch.equal(index, _order(rows).expand_as(index))

    def all_act(self, factor: Tensor) -> bool:
        """Whether all rows of A or B act on every sample: those of a whole pool, and the one A that rows share."""
        return self.whole or factor.shape[0] != self.B.shape[0]

    @property
    def columns(self) -> int:
        """K: what x is projected on, the past aside."""
        return (self.A.shape[0] if self.whole or self.shared else self.index.shape[1]) * self.A.shape[1]

    @property
    def joined(self) -> bool:
        """Whether x is projected on the pairs and on the past at once."""
        return self.whole and self.past_A is not None and not self.shared

    @property
    def past_columns(self) -> int:
        return 0 if self.past_A is None else self.past_A.shape[0] * self.past_A.shape[1]


@lru_cache(maxsize=16)
def _order(rows: int) -> Tensor:
    return torch.arange(rows, device="cpu")


# x projected on the pairs [B, S, K] and on the past [B, S, C * Q]; if `joined` both in one [B, S, K + C * Q], and
# nothing. Empty if not asked for.
Lows = tuple[Tensor, Tensor]


def inject(
    x: Tensor,  # [B, S, d_in]
    weight: Tensor,  # [d_out, d_in]
    bias: Tensor | None,  # [d_out]
    given: Acting,
    save: bool,  # whether a backward pass will ask for what x was projected to
) -> tuple[Tensor, Tensor, Tensor]:
    low, past_low = projections(x, given)
    y = F.linear(x, weight, bias).contiguous()  # [B, S, d_out]; late, so that what is added next finds it in the cache
    add_(y, low, past_low, given)
    return y, *lows(low, past_low, given, save)


def inject_add(
    y: Tensor,  # [B, S, d_out]
    x: Tensor,  # [B, S, d_in]
    given: Acting,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    low, past_low = projections(x, given)
    total = y.clone(memory_format=torch.contiguous_format)
    add_(total, low, past_low, given)
    return total, *lows(low, past_low, given, save)


def projections(x: Tensor, given: Acting) -> tuple[Tensor, Tensor]:
    """x on the pairs, and on the past."""
    return shrink(x, given.A, given), past_projection(x, given)


def past_projection(x: Tensor, given: Acting) -> Tensor:
    return x.new_empty(0) if given.past_A is None else project(x, given.past_A)


def add_(y: Tensor, low: Tensor, past_low: Tensor, given: Acting) -> None:
    """Adds the increments to y."""
    add_past_(y, past_low, given)
    if given.by_sum:
        y.baddbmm_(low, as_dtype(sum_of_B(given), y.dtype))
    else:
        expand_(y, times(low, strength(given), y.dtype), given.B, given)


def add_past_(y: Tensor, past_low: Tensor, given: Acting) -> None:
    if given.past_B is not None:
        scaled = times(past_low, past_strength(given), y.dtype)
        y.flatten(0, 1).addmm_(scaled.flatten(0, 1), columns(given.past_B, y.dtype))


def lows(low: Tensor, past_low: Tensor, given: Acting, save: bool) -> Lows:
    if not save:
        return low.new_empty(0), low.new_empty(0)  # two, since results of an op must not be one tensor
    if given.joined:
        return torch.cat([low, past_low], 2), low.new_empty(0)
    return low, past_low


def split_lows(low: Tensor, past_low: Tensor, given: Acting) -> Lows:
    """Before `lows` joined them."""
    if not given.joined or low.dim() != 3:
        return low, past_low
    of_pairs, of_past = low.split([given.columns, given.past_columns], 2)
    return of_pairs, of_past


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
    to_x = to_A = to_B = to_coefficient = to_past = None
    grad = grad.contiguous()  # a reduction's gradient is expanded, and is read several times here
    low, past_low = split_lows(low, past_low, given)
    if any(needed[:4]):
        of_pairs = _backward_of_sums if given.by_sum else _backward_of_pairs
        low_grad, to_B, to_coefficient = of_pairs(grad, given, low, needed)
        if need_A:
            assert x is not None and low_grad is not None
            to_A = _sum_over_tokens(low_grad, x, given.A, given)
        if need_x:
            assert low_grad is not None
            to_x = grad.new_zeros(*grad.shape[:2], given.A.shape[2]) if weight is None else grad @ weight
            expand_(to_x, low_grad, given.A, given)
    if given.past_A is not None and given.past_B is not None and (need_x or need_past):
        low_grad = project(grad, given.past_B)  # [B, S, C * Q]
        if need_past:
            assert given.past_coefficient is not None
            rows, rank, _ = given.past_A.shape
            to_past = _sum_of_products(low_grad, past_low, rows, rank, given.scale)
            to_past = as_dtype(to_past, given.past_coefficient.dtype)
        if to_x is not None:
            scaled = times(low_grad, past_strength(given), grad.dtype)
            to_x.flatten(0, 1).addmm_(scaled.flatten(0, 1), columns(given.past_A, grad.dtype))
    return (
        grad.new_empty(0) if to_x is None else to_x,
        given.A.new_empty(0) if to_A is None else to_A,
        given.B.new_empty(0) if to_B is None else to_B,
        given.coefficient.new_empty(0) if to_coefficient is None else to_coefficient,
        grad.new_empty(0) if to_past is None else to_past,
    )


# gradients of what x was projected to [B, S, K] (None if neither x nor A has one), of B, of the coefficient
OfPairs = tuple[Tensor | None, Tensor | None, Tensor | None]


def _backward_of_pairs(grad: Tensor, given: Acting, low: Tensor, needed: list[bool]) -> OfPairs:
    need_x, need_A, need_B, need_coefficient, _ = needed
    strengths = strength(given)
    to_B = to_coefficient = None
    if need_B:
        to_B = _sum_over_tokens(times(low, strengths, grad.dtype), grad, given.B, given)
    if not (need_x or need_A or need_coefficient):
        return None, to_B, None
    low_grad = shrink(grad, given.B, given)  # of all rows if they share one A
    if need_coefficient:
        to_coefficient = _coefficient_grad(low_grad, low, given)
    if given.shared:
        return folded(low_grad, strengths, given.A.shape[1], grad.dtype), to_B, to_coefficient
    return times(low_grad, strengths, grad.dtype), to_B, to_coefficient


def _backward_of_sums(grad: Tensor, given: Acting, low: Tensor, needed: list[bool]) -> OfPairs:
    """The same where a sample's rows meet its tokens as one sum of their B."""
    need_x, need_A, need_B, need_coefficient, _ = needed
    to_B = to_coefficient = None
    if need_B or need_coefficient:
        to_sum = as_dtype(torch.bmm(low.transpose(1, 2), grad), exact_dtype(grad))  # [B, R, d_out]
        to_B, to_coefficient = sum_of_B_backward(to_sum, given, need_B, need_coefficient)
    if not (need_x or need_A):
        return None, to_B, to_coefficient
    return torch.bmm(grad, as_dtype(sum_of_B(given), grad.dtype).transpose(1, 2)), to_B, to_coefficient


def strength(given: Acting) -> Tensor:
    """Of each column, [B, 1, K] or [B, S, K]; of each row, [B, S, rows, 1], where tokens have their own and rows share
    one A."""
    of_rows = by_scale(_of_pool(given) if given.whole else given.coefficient, given.scale)
    return of_rows.unsqueeze(3) if given.shared else of_columns(of_rows, given.B.shape[1])


def past_strength(given: Acting) -> Tensor:  # [B, 1, C * Q]
    assert given.past_coefficient is not None and given.past_B is not None
    return of_columns(by_scale(given.past_coefficient, given.scale), given.past_B.shape[1])


def of_columns(of_rows: Tensor, rank: int) -> Tensor:  # to [B, 1, rows * R], or [B, S, rows * R]
    of_columns = of_rows.repeat_interleave(rank, -1)
    return of_columns.unsqueeze(1) if of_rows.dim() == 2 else of_columns


def by_scale(coefficient: Tensor, scale: float) -> Tensor:
    return coefficient if scale == 1 else coefficient * scale


def _of_pool(given: Acting) -> Tensor:  # -> [B, N], or [B, S, N]
    """Coefficients of the pool's rows, 0 where not selected. A row that appears twice in a sample counts twice."""
    return given.coefficient if given.in_order else over_pool(given.index, given.coefficient, given.B.shape[0])


def over_pool(index: Tensor, coefficient: Tensor, rows: int) -> Tensor:  # -> [B, rows], or [B, S, rows]
    chosen = index.unsqueeze(2) == torch.arange(rows, device=index.device)  # [B, P, rows]
    if coefficient.dim() == 3:
        return torch.bmm(coefficient, chosen.to(coefficient.dtype))
    return torch.where(chosen, coefficient.unsqueeze(2), 0).sum(1)


def times(low: Tensor, strength: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, S, K], or [B, S, R] that rows share, to [B, S, K]; in strength's precision."""
    if strength.dim() == 4:
        return as_dtype(_weighed(low.unsqueeze(2), strength).flatten(2), dtype)
    return as_dtype(_weighed(low, strength), dtype)


def folded(low_grad: Tensor, strength: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """The gradient of what all rows share: [B, S, rows * R] to [B, S, R]."""
    by_row = low_grad.view(*low_grad.shape[:2], strength.shape[2], rank)
    return as_dtype(_weighed(by_row, strength).sum(2), dtype)


def _weighed(low: Tensor, strength: Tensor) -> Tensor:
    weighed = low * strength
    # an overflow in a row that does not act stays there
    return torch.where(strength != 0, weighed, 0) if low.dtype == torch.float16 else weighed


def sum_of_B(given: Acting) -> Tensor:  # -> [B, R, d_out]
    """The sum of each sample's B times coefficients and scale, in full precision."""
    exact = torch.promote_types(given.B.dtype, given.coefficient.dtype)
    if given.whole:
        total = as_dtype(by_scale(_of_pool(given), given.scale), exact) @ as_dtype(given.B, exact).flatten(1)
    else:
        strength = as_dtype(by_scale(given.coefficient, given.scale), exact).unsqueeze(1)  # [B, 1, P]
        total = torch.cat([torch.bmm(part, _by_pair(rows, given)) for rows, part in _turns(given.B, given, strength)])
    return total.view(given.index.shape[0], *given.B.shape[1:])


def sum_of_B_backward(
    to_sum: Tensor, given: Acting, need_B: bool, need_coefficient: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of B and the coefficients, from the sums' own [B, R, d_out]."""
    to_B = to_coefficient = None
    to_sum = to_sum.flatten(1)
    if need_B:
        total = as_dtype(by_scale(_of_pool(given), given.scale), to_sum.dtype).t() @ to_sum  # [N, R * d_out]
        to_B = as_dtype(total.view(given.B.shape), given.B.dtype)
    if need_coefficient:
        if given.whole:
            found = to_sum @ as_dtype(given.B, to_sum.dtype).flatten(1).t()
            found = found if given.in_order else found.gather(1, given.index)
        else:
            turns = _turns(given.B, given, to_sum.unsqueeze(2))
            found = torch.cat([torch.bmm(_by_pair(rows, given), part) for rows, part in turns]).squeeze(2)
        to_coefficient = as_dtype(by_scale(found, given.scale), given.coefficient.dtype)
    return to_B, to_coefficient


def shrink(x: Tensor, factor: Tensor, given: Acting) -> Tensor:  # [B, S, d] -> [B, S, K]
    if given.all_act(factor):
        return project(x, factor)
    if _at_once(factor, given.index):
        return torch.bmm(x, _rows(factor, given.index, x.dtype).transpose(1, 2))
    return torch.cat([torch.bmm(part, rows.transpose(1, 2)) for rows, part in _turns(factor, given, x)])


def expand_(y: Tensor, low: Tensor, factor: Tensor, given: Acting) -> None:
    """[B, S, K] added to [B, S, d]."""
    if given.all_act(factor):
        y.flatten(0, 1).addmm_(low.flatten(0, 1), columns(factor, y.dtype))
    elif _at_once(factor, given.index):
        y.baddbmm_(low, _rows(factor, given.index, y.dtype))
    else:
        for rows, part, low_part in _turns(factor, given, y, low):
            part.baddbmm_(low_part, rows)


def project(x: Tensor, factor: Tensor, past: Tensor | None = None) -> Tensor:  # [B, S, d], [N, R, d] -> [B, S, N * R]
    return F.linear(x, columns(factor, x.dtype, past)).contiguous()


def columns(factor: Tensor, dtype: torch.dtype, past: Tensor | None = None) -> Tensor:  # [N, R, d] -> [N * R, d]
    """Behind them the past's, where there is one: a copy of a few rows, so that activations are read once for both."""
    rows = as_dtype(factor, dtype).flatten(0, 1)
    return rows if past is None else torch.cat([rows, columns(past, dtype)])


def sum_over_all_tokens(low: Tensor, x: Tensor, factor: Tensor) -> Tensor:  # [B, S, N * R], [B, S, d]
    """The gradient of `factor` [N, R, d], all of whose rows act on all samples."""
    return as_dtype((low.flatten(0, 1).t() @ x.flatten(0, 1)).view(factor.shape), factor.dtype)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _at_once(factor: Tensor, index: Tensor) -> bool:
    """Whether all samples' rows may be gathered together."""
    return index.numel() * factor.shape[1] * factor.shape[2] <= GATHERED or index.shape[0] == 1


def _rows(factor: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:  # [N, R, d], [b, P] -> [b, P * R, d]
    samples, pairs = index.shape
    if factor.shape[0] <= samples * pairs:  # whichever is smaller is cast
        factor = as_dtype(factor, dtype)
    # copies whole rows, where factor[index] goes through them entry by entry
    rows = factor.index_select(0, index.reshape(-1)).view(samples, pairs * factor.shape[1], factor.shape[2])
    return as_dtype(rows, dtype)


def _turns(factor: Tensor, given: Acting, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Of samples that are worked on together: the rows of `factor` that act on them, [b, K, d], and their parts of
    `tensors`, whose first one's dtype the rows have."""
    (samples, pairs), dtype = given.index.shape, tensors[0].dtype
    if factor.shape[0] <= samples * pairs:
        factor = as_dtype(factor, dtype)
    together = max(1, GATHERED // max(1, pairs * factor.shape[1] * factor.shape[2]))
    for first in range(0, max(1, samples), together):
        part = slice(first, first + together)
        yield _rows(factor, given.index[part], dtype), *(tensor[part] for tensor in tensors)


def _by_pair(rows: Tensor, given: Acting) -> Tensor:  # [b, P * R, d] -> [b, P, R * d]
    pairs, rank = given.index.shape[1], given.B.shape[1]
    return rows.view(rows.shape[0], pairs, rank * rows.shape[2])


def _sum_of_products(low_grad: Tensor, low: Tensor, rows: int, rank: int, scale: float) -> Tensor:  # -> [B, rows]
    """The gradient of a coefficient, before its dtype."""
    by_column = (as_dtype(low_grad, exact_dtype(low)) * low).sum(1)  # [B, K]
    return by_scale(by_column.view(low.shape[0], rows, rank).sum(2), scale)


def _coefficient_grad(low_grad: Tensor, low: Tensor, given: Acting) -> Tensor:  # -> like coefficient
    rank, rows = given.A.shape[1], given.B.shape[0] if given.whole else given.index.shape[1]
    if given.per_token:
        by_row = as_dtype(low_grad, exact_dtype(low)).view(*low.shape[:2], rows, rank)
        found = (by_row * (low.unsqueeze(2) if given.shared else low.view(by_row.shape))).sum(3)
        found = by_scale(found, given.scale)
    else:
        found = _sum_of_products(low_grad, low, rows, rank, given.scale)
    if given.whole and not given.in_order:
        at = given.index.unsqueeze(1).expand(-1, low.shape[1], -1) if given.per_token else given.index
        found = found.gather(-1, at)
    return as_dtype(found, given.coefficient.dtype)


def _sum_over_tokens(low: Tensor, x: Tensor, factor: Tensor, given: Acting) -> Tensor:
    """The gradient of `factor` [N, R, d], summed in one order."""
    if given.all_act(factor):
        return sum_over_all_tokens(low, x, factor)
    rows, rank, size = factor.shape
    exact = exact_dtype(x)
    by_pair = as_dtype(torch.bmm(low.transpose(1, 2), x), exact).view(given.index.numel(), rank * size)
    if x.device.type == "cpu":
        total = by_pair.new_zeros(rows, rank * size).index_add_(0, given.index.reshape(-1), by_pair)
    else:  # where index_add has atomics: a one-hot product
        chosen = (given.index.reshape(-1) == torch.arange(rows, device=x.device).unsqueeze(1)).to(exact)  # [N, B * P]
        total = chosen @ by_pair
    return as_dtype(total.view(factor.shape), factor.dtype)
