"""What a user would write otherwise. Dense d_out x d_in offsets exist here, and in what results are held against.

Ways of injecting take x [B, S, d_in], the frozen weight [d_out, d_in], the trained block's factors A [N, R, d_in] and
B [N, R, d_out] with each sample's index and coefficient [B, P], and, where earlier tasks are in context, the past's A,
B and coefficient [B, C]: its rows all act on every sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def frozen(x: Tensor, weight: Tensor) -> Tensor:
    """The linear alone: the floor, not a rival."""
    return F.linear(x, weight)


def rows(factor: Tensor, index: Tensor) -> Tensor:
    """[N, R, d], [B, P] -> [B, P * R, d]; copies whole rows, which factor[index] goes through entry by entry."""
    return factor.index_select(0, index.reshape(-1)).view(len(index), -1, factor.shape[2])


def smart_eager(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, *past: Tensor
) -> Tensor:
    """Gather, two thin batched products, one add; gradients left to autograd. The past needs no gather."""
    low = torch.bmm(x, rows(A, index).transpose(1, 2)) * _strength(coefficient, A, x)  # [B, S, P * R]
    y = F.linear(x, weight)
    if past:
        past_A, past_B, past_coefficient = past
        past_low = (x @ past_A.flatten(0, 1).t()) * _strength(past_coefficient, past_A, x)
        y = torch.addmm(y.flatten(0, 1), past_low.flatten(0, 1), past_B.flatten(0, 1)).view_as(y)
    return torch.baddbmm(y, low, rows(B, index))


def expert_loop(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    """Routers as their users write them, one expert or branch after another; all rows act, in order."""
    y = F.linear(x, weight)
    lows = [F.linear(x, down) for down in A] * (len(B) // len(A))  # one, where rows share it
    for row, (low, up) in enumerate(zip(lows, B, strict=True)):
        y = y + _of_tokens(coefficient, x)[..., row, None] * (low @ up)
    return y


def one_product(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    """Routers by one product with all experts' A, a scaling, one product with all B; all rows act, in order."""
    low = F.linear(x, A.flatten(0, 1)).unflatten(2, (len(A), -1)) * _of_tokens(coefficient, x).unsqueeze(3)
    y = F.linear(x, weight)
    return torch.addmm(y.flatten(0, 1), low.flatten(2).flatten(0, 1), B.flatten(0, 1)).view_as(y)


def gathered(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    """Rows that share one A: x on its R columns, scaled for each of the sample's rows, and on their B."""
    low = F.linear(x, A.flatten(0, 1)).unsqueeze(2) * _of_tokens(coefficient, x).unsqueeze(3)  # [B, S, P, R]
    return torch.baddbmm(F.linear(x, weight), low.flatten(2), rows(B, index))


def _of_tokens(coefficient: Tensor, x: Tensor) -> Tensor:  # -> [B, S, P] or [B, 1, P]
    return (coefficient if coefficient.dim() == 3 else coefficient.unsqueeze(1)).to(x.dtype)


def grouped(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, *past: Tensor
) -> Tensor:
    """The thin products as grouped ones, a group a sample."""
    A, B, index, coefficient = _joined(A, B, index, coefficient, *past)
    samples, tokens, _ = x.shape
    ends = torch.arange(1, samples + 1, device=x.device, dtype=torch.int32) * tokens
    low = grouped_mm()(x.flatten(0, 1), rows(A, index).transpose(1, 2), offs=ends)  # [B * S, P * R]
    low = (low.view(samples, tokens, -1) * _strength(coefficient, A, x)).flatten(0, 1)
    return F.linear(x, weight) + grouped_mm()(low, rows(B, index), offs=ends).view(samples, tokens, -1)


def grouped_mm() -> Callable[..., Any] | None:
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def framed(x: Tensor, frame: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, *past: Tensor) -> Tensor:
    """All rows by one product each way: [x, u] [W, B]^T and [g, v] [W; A], of u = x A^T and v = g B^T, both weighed.

    `frame` [d_out + K, d_in + K] is [[W, B^T], [A, 0]], where the frozen weight lies for good.
    """
    every = coefficient.new_zeros(len(x), len(A)).scatter(1, index, coefficient)  # [B, N]
    down, up, strength = A.flatten(0, 1), B.flatten(0, 1), _strength(every, A, x)
    if past:
        past_A, past_B, past_coefficient = past
        down, up = torch.cat([down, past_A.flatten(0, 1)]), torch.cat([up, past_B.flatten(0, 1)])
        strength = torch.cat([strength, _strength(past_coefficient, past_A, x)], 2)
    y: Tensor = _Framed.apply(x, frame, down, up, strength)
    return y


def frame_of(weight: Tensor, columns: int) -> Tensor:
    return F.pad(weight, (0, columns, 0, columns))


class _Framed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frame: Tensor, down: Tensor, up: Tensor, strength: Tensor) -> Tensor:
        d_in, d_out = down.shape[1], up.shape[1]
        frame[:d_out, d_in:] = up.t()
        frame[d_out:, :d_in] = down
        low = F.linear(x, down)
        wide = _beside(x, low, strength)
        ctx.save_for_backward(wide, frame, down, up, strength, low)
        return F.linear(wide, frame[:d_out])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide, frame, down, up, strength, low = ctx.saved_tensors
        d_in, d_out = down.shape[1], up.shape[1]
        low_grad = F.linear(grad, up)
        wide_grad = _beside(grad, low_grad, strength)
        to_x = (wide_grad.flatten(0, 1) @ frame[:, :d_in]).view(*grad.shape[:2], d_in)
        to_up = wide[..., d_in:].flatten(0, 1).t() @ grad.flatten(0, 1)
        to_down = wide_grad[..., d_out:].flatten(0, 1).t() @ wide[..., :d_in].flatten(0, 1)
        to_strength = (low_grad.float() * low).sum(1, keepdim=True).to(strength.dtype)
        return to_x, None, to_down, to_up, to_strength


def _beside(tokens: Tensor, low: Tensor, strength: Tensor) -> Tensor:
    """[tokens, low * strength], with no copy of the latter."""
    width = tokens.shape[2]
    wide = tokens.new_empty(*tokens.shape[:2], width + low.shape[2])
    wide[..., :width] = tokens
    torch.mul(low, strength, out=wide[..., width:])
    return wide


def dense_by_sample(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, *past: Tensor
) -> Tensor:
    """A dense weight for each sample."""
    A, B, index, coefficient = _joined(A, B, index, coefficient, *past)
    scaled = _strength(coefficient, B, x).transpose(1, 2) * rows(B, index)  # [B, P * R, d_out]
    offset = torch.bmm(scaled.transpose(1, 2), rows(A, index))  # [B, d_out, d_in]
    return torch.bmm(x, (weight + offset).transpose(1, 2))


def dense_by_batch(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, *past: Tensor
) -> Tensor:
    """The ancestor: one selection for the whole batch, the first sample's, added to the frozen weight."""
    A, B, index, coefficient = _joined(A, B, index, coefficient, *past)
    offset = torch.einsum("p,pro,pri->oi", coefficient[0].to(x.dtype), B[index[0]], A[index[0]])  # [d_out, d_in]
    return F.linear(x, weight + offset)


def peft_lora(weight: Tensor, A: Tensor, B: Tensor) -> torch.nn.Module:
    """PEFT's own layer around a frozen linear; A [K, d_in], B [d_out, K]."""
    layer, _ = peft_mixed_batch(weight, [(A, B)])
    return layer


def peft_mixed_batch(weight: Tensor, adapters: list[tuple[Tensor, Tensor]]) -> tuple[torch.nn.Module, list[str]]:
    """PEFT's layer with one adapter a sample, and their names, as its forward wants them."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    model = torch.nn.Sequential(linear)
    names = [f"sample{b}" for b in range(len(adapters))]
    for name, (A, B) in zip(names, adapters, strict=True):
        config = LoraConfig(r=len(A), lora_alpha=len(A), lora_dropout=0.0, target_modules=["0"])
        inject_adapter_in_model(config, model, adapter_name=name)
        model[0].lora_A[name].weight = torch.nn.Parameter(A)
        model[0].lora_B[name].weight = torch.nn.Parameter(B)
    return model[0], names


def _strength(coefficient: Tensor, factor: Tensor, x: Tensor) -> Tensor:  # [B, P] -> [B, 1, P * R]
    return coefficient.to(x.dtype).repeat_interleave(factor.shape[1], dim=1).unsqueeze(1)


def _joined(A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
    if not past:
        return A, B, index, coefficient
    past_A, past_B, past_coefficient = past
    every = torch.arange(len(past_A), device=index.device).expand(len(index), -1)
    indices = torch.cat([index, every + A.shape[0]], 1)
    return torch.cat([A, past_A]), torch.cat([B, past_B]), indices, torch.cat([coefficient, past_coefficient], 1)


Selection = tuple[Tensor, Tensor, Tensor]


def normalise_matmul_topk(query: Tensor, keys: Tensor, top_m: int) -> Selection:
    """similarity, weight, index, each [B, M]; in float32 whatever the keys are, or the ranks would be wrong."""
    cosine = F.normalize(query.float(), dim=1) @ F.normalize(keys.float(), dim=1).t()
    similarity, index = cosine.topk(top_m, dim=1)
    positive = similarity.clamp(min=0)
    return similarity, positive / positive.sum(1, keepdim=True), index


def repeat_cosine_topk(query: Tensor, keys: Tensor, top_m: int, groups: int) -> Selection:
    """The ancestor: the query repeated for every key, cosine per chunk, mean over chunks and batch. Each [M]."""
    pairs = query.float().unsqueeze(1).repeat(1, keys.shape[0], 1).unflatten(2, (groups, -1))  # [B, N, G, D / G]
    cosine = F.cosine_similarity(pairs, keys.float().unflatten(1, (groups, -1)).unsqueeze(0), dim=-1)
    similarity, index = cosine.mean(2).mean(0).topk(top_m)
    return similarity, similarity / similarity.sum(), index


def aggregate_pairwise(index: Tensor, weight: Tensor, row_task: Tensor, row_mean: Tensor, context: Tensor) -> Tensor:
    """Every (sample, selected row, row) at once, straight from the formula: [B, M + N]."""
    of, by = row_task[index].unsqueeze(2), row_task.expand(*index.shape, -1)  # [B, M, 1], [B, M, N]
    past = torch.where(by < of, weight.unsqueeze(2) * context[of, by] * row_mean, 0).sum(1)
    return torch.cat([weight, past], 1)


def gathered_sums(A: Tensor, B: Tensor, coefficient: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Gather, then one weighted sum for each factor: [B, R, d_in], [B, R, d_out]."""
    strength = coefficient.unsqueeze(1)
    sums = (torch.bmm(strength.to(factor.dtype), rows(factor, index).view(*index.shape, -1)) for factor in (A, B))
    return tuple(mix.view(-1, *factor.shape[1:]) for mix, factor in zip(sums, (A, B), strict=True))


def whole_pool_sums(A: Tensor, B: Tensor, coefficient: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """One product with the whole pool; what is not selected counts 0 times."""
    chosen = index.unsqueeze(2) == torch.arange(A.shape[0], device=index.device)  # [B, P, N]
    strength = (coefficient.unsqueeze(2) * chosen).sum(1)  # [B, N]
    return tuple((strength.to(f.dtype) @ f.flatten(1)).view(-1, *f.shape[1:]) for f in (A, B))


def merge_by_gather(weight: Tensor, A: Tensor, B: Tensor, index: Tensor, coefficient: Tensor) -> Tensor:
    strength = coefficient.to(weight.dtype)[:, None, None]
    scaled = strength * B.index_select(0, index)  # [P, R, d_out]
    return torch.addmm(weight, scaled.flatten(0, 1).t(), A.index_select(0, index).flatten(0, 1))
