"""inject in plain PyTorch: the definition of right.

Pairs are gathered: the P of a sample are joined to K = P * R columns, and two thin batched products do the rest, so
nothing of the size of the frozen weight is ever allocated. Where many pairs act, samples take turns: their rows of
factors, gathered for all at once, would outweigh the activations. The past, and a pool that is projected on whole, need
no gathering: all their rows act on every sample, some with strength 0.

Rows may share one A: x is projected on its R columns once. Where coefficients are those of samples, their B are summed
up before they meet the tokens (`mixed`); where every token has its own, that projection is scaled for each row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

GATHERED = 2**21  # entries of a factor that may be gathered at once, if that is not less than one sample's


@dataclass(slots=True)
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
    shared = given.shared
    acting = mixed(given) if shared and not given.per_token else given
    low = shrink(x, given.A, given, shared)
    expand_(y, times(low, strength(acting), x.dtype, shared), acting.B, acting)
    return lows(low, past_low, given, save)


def lows(low: Tensor, past_low: Tensor, given: Acting, save: bool) -> Lows:
    if not save:
        return low.new_empty(0), low.new_empty(0)  # two, since results of an op must not be one tensor
    if given.joined:
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
    if given.joined and low.dim() == 3:
        low, past_low = low.split([given.columns, given.past_columns], 2)
    shared = given.shared
    mix = shared and not given.per_token
    acting = mixed(given) if mix else given
    strengths = strength(acting)
    if need_B or (mix and need_coefficient):
        to_B = _sum_over_tokens(times(low, strengths, grad.dtype, shared), grad, acting.B, acting)
        if mix:
            to_B, to_coefficient = unmixed(to_B, given, need_B, need_coefficient)
    if need_x or need_A or (need_coefficient and not mix):
        low_grad = shrink(grad, acting.B, acting)  # [B, S, K], of all rows if they share one A
        if need_coefficient and not mix:
            to_coefficient = _coefficient_grad(low_grad, low, given, shared)
        if shared:
            low_grad = folded(low_grad, strengths, given.A.shape[1], grad.dtype)
        else:
            low_grad = times(low_grad, strengths, grad.dtype)
        if need_A:
            assert x is not None
            to_A = _sum_over_tokens(low_grad, x, given.A, given, shared)
        if need_x:
            to_x = grad.new_zeros(*grad.shape[:2], given.A.shape[2]) if weight is None else grad @ weight
            expand_(to_x, low_grad, given.A, given, shared)
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
    """Of every row, one for its R columns: [B, 1, rows, 1], or [B, S, rows, 1]."""
    strength = (_of_pool(given) if given.whole else given.coefficient) * given.scale
    return strength.unsqueeze(3) if strength.dim() == 3 else strength[:, None, :, None]


def _of_pool(given: Acting) -> Tensor:  # -> [B, N], or [B, S, N]
    """Coefficients of the pool's rows, 0 where not selected. A row that appears twice in a sample counts twice."""
    if _in_order(given):
        return given.coefficient
    chosen = given.index.unsqueeze(2) == torch.arange(given.B.shape[0], device=given.index.device)  # [B, P, N]
    if given.per_token:
        return torch.bmm(given.coefficient, chosen.to(given.coefficient.dtype))
    return torch.where(chosen, given.coefficient.unsqueeze(2), 0).sum(1)


def _in_order(given: Acting) -> bool:
    """Whether a sample's pairs are seen to be the pool's rows one by one, as a router of all experts lists them."""
    rows, index = given.B.shape[0], given.index
    if index.shape[1] != rows or index.device.type != "cpu":  # a GPU would have to be waited for
        return False
    return torch.equal(index, torch.arange(rows, device=index.device).expand_as(index))


def past_strength(given: Acting) -> Tensor:  # [B, 1, C, 1]
    assert given.past_coefficient is not None
    return (given.past_coefficient * given.scale)[:, None, :, None]


def times(low: Tensor, strength: Tensor, dtype: torch.dtype, shared: bool = False) -> Tensor:
    """[B, S, rows * R], or [B, S, R] that all rows share, to [B, S, rows * R]; in strength's precision."""
    samples, tokens, columns = low.shape
    rows = strength.shape[2]
    by_row = low.unsqueeze(2) if shared else low.view(samples, tokens, rows, columns // rows if rows else 0)
    return as_dtype(_weighed(by_row, strength).flatten(2), dtype)


def folded(low_grad: Tensor, strength: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """The gradient of what all rows share: [B, S, rows * R] to [B, S, R]."""
    by_row = low_grad.view(*low_grad.shape[:2], strength.shape[2], rank)
    return as_dtype(_weighed(by_row, strength).sum(2), dtype)


def _weighed(by_row: Tensor, strength: Tensor) -> Tensor:
    scaled = by_row * strength
    # an overflow in a row that does not act stays there
    return torch.where(strength != 0, scaled, 0) if by_row.dtype == torch.float16 else scaled


def mixed(given: Acting) -> Acting:
    """Rows that share one A as one row a sample, the sum of its B times coefficients and scale, in full precision: x's
    tokens then meet R columns where they would have met P * R."""
    exact = torch.promote_types(given.B.dtype, given.coefficient.dtype)
    (samples, pairs), size = given.index.shape, given.B.shape[1] * given.B.shape[2]
    if given.whole:
        total = as_dtype(_of_pool(given) * given.scale, exact) @ as_dtype(given.B, exact).flatten(1)
    else:
        strength = as_dtype(given.coefficient * given.scale, exact)
        turns = _turns(strength.unsqueeze(1), given.B, given.index)
        total = torch.cat([torch.bmm(part, rows.view(len(rows), pairs, size)) for part, rows in turns])
    return replace(
        given,
        B=total.view(samples, *given.B.shape[1:]),
        index=torch.arange(samples, device=given.index.device).unsqueeze(1),
        coefficient=given.coefficient.new_ones(samples, 1),
        scale=1.0,
        whole=False,
    )


def unmixed(to_mix: Tensor, given: Acting, need_B: bool, need_coefficient: bool) -> tuple[Tensor, Tensor]:
    """Gradients of B and the coefficients, from that of what `mixed` made of them: [B, R, d_out]."""
    to_B, to_coefficient = given.B.new_empty(0), given.coefficient.new_empty(0)
    to_mix = to_mix.flatten(1)
    if need_B:
        total = as_dtype(_of_pool(given) * given.scale, to_mix.dtype).t() @ to_mix  # [N, R * d_out]
        to_B = as_dtype(total.view(given.B.shape), given.B.dtype)
    if need_coefficient:
        if given.whole:
            found = (to_mix @ as_dtype(given.B, to_mix.dtype).flatten(1).t()).gather(1, given.index)
        else:
            pairs, size = given.index.shape[1], to_mix.shape[1]
            turns = _turns(to_mix.unsqueeze(2), given.B, given.index)
            found = torch.cat([torch.bmm(rows.view(len(rows), pairs, size), part) for part, rows in turns]).squeeze(2)
        to_coefficient = as_dtype(found * given.scale, given.coefficient.dtype)
    return to_B, to_coefficient


# `all_rows`: of a factor whose rows all act on every sample, as those of a whole pool do


def shrink(x: Tensor, factor: Tensor, given: Acting, all_rows: bool = False) -> Tensor:  # [B, S, d] -> [B, S, K]
    if given.whole or all_rows:
        return project(x, factor)
    parts = [torch.bmm(part, rows.transpose(1, 2)) for part, rows in _turns(x, factor, given.index)]
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)


def expand_(y: Tensor, low: Tensor, factor: Tensor, given: Acting, all_rows: bool = False) -> None:
    """[B, S, K] added to [B, S, d]."""
    if given.whole or all_rows:
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


def _coefficient_grad(low_grad: Tensor, low: Tensor, given: Acting, shared: bool) -> Tensor:  # -> like coefficient
    if given.per_token:
        rank, like = given.A.shape[1], given.B if given.whole else given.index.t()
        by_row = as_dtype(low_grad, _exact(low)).view(*low.shape[:2], len(like), rank)
        found = (by_row * (low.unsqueeze(2) if shared else low.view(by_row.shape))).sum(3) * given.scale
        at = given.index.unsqueeze(1).expand(-1, low.shape[1], -1)  # [B, S, P]
    else:
        found, at = _sum_of_products(low_grad, low, given.A.shape[1], given), given.index
    if given.whole and not _in_order(given):
        found = found.gather(-1, at)
    return as_dtype(found, given.coefficient.dtype)


def _sum_over_tokens(low: Tensor, x: Tensor, factor: Tensor, given: Acting, all_rows: bool = False) -> Tensor:
    """The gradient of `factor` [N, R, d], summed in one order."""
    if given.whole or all_rows:
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
