"""What whole steps are held against: a dense weight for each sample at every adapted linear.

Straight from the formula, by none of the library's ops, one dtype finer than what is measured (transformers' norms and
loss stay float32).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import models

FINER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
Offset = Callable[[str], Tensor]  # path -> [B or 1, d_out, d_in]


class Rows(NamedTuple):
    """A pool, committed rows first, as fresh tensors of one dtype; those of the open block want gradients."""

    keys: Tensor  # [N, D]
    row_task: Tensor  # [N]
    row_mean: Tensor  # [N]
    context: Tensor  # [T, T]
    factors: dict[str, tuple[Tensor, Tensor]]  # path -> [N, R, d_in], [N, R, d_out]
    trained: list[Tensor]  # A and B of every path, then the context's newest row

    def offset(self, strength: Tensor) -> Offset:
        """`sum_n strength[b, n] B_n^T A_n`."""

        def of(path: str) -> Tensor:
            A, B = self.factors[path]
            scaled = strength[:, :, None, None] * B  # [B, N, R, d_out]
            return torch.einsum("bko,ki->boi", scaled.flatten(1, 2), A.flatten(0, 1))

        return of


def rows(pool: Any, dtype: torch.dtype) -> Rows:
    def fresh(tensor: Tensor, trained: bool = True) -> Tensor:
        return tensor.detach().to(dtype, copy=True).requires_grad_(trained)

    factors, trained = {}, []
    for path, layer in ((name.replace("/", "."), layer) for name, layer in pool.layers.items()):
        pair = [fresh(layer.A, False), fresh(layer.B, False)]
        if pool.block_rows:
            block = [fresh(layer.block_A), fresh(layer.block_B)]
            trained += block
            pair = [torch.cat([past, own]) for past, own in zip(pair, block, strict=True)]
        factors[path] = (pair[0], pair[1])
    keys, row_task, row_mean, context = pool.keys, pool.row_task, pool.row_mean.to(dtype), pool.context.to(dtype)
    if pool.block_rows:
        keys = torch.cat([keys, pool.block_keys.detach()])
        row_task = torch.cat([row_task, row_task.new_full((pool.block_rows,), pool.num_tasks)])
        row_mean = F.pad(row_mean, (0, pool.block_rows))
        context = F.pad(context, (0, 1, 0, 1))
        if pool.block_context is not None:
            trained.append(fresh(pool.block_context))
            context = torch.cat([context[:-1], F.pad(trained[-1], (0, 1))[None]])
    return Rows(keys.to(dtype), row_task, row_mean, context, factors, trained)


def strengths(query: Tensor, found: Rows, allowed: Tensor, top_m: int, by_batch: bool = False) -> Tensor:
    """`[B, N]`: how strongly each row acts on each sample. `by_batch`: the ancestor, one selection for all, by the mean
    cosine of four chunks."""
    groups = 4 if by_batch else 1
    pair = (F.normalize(t.to(found.keys.dtype).unflatten(1, (groups, -1)), dim=2) for t in (query, found.keys))
    similarity = torch.einsum("bgd,ngd->bn", *pair) / groups
    if by_batch:
        similarity = similarity.mean(0, keepdim=True)
    best = similarity.masked_fill(~allowed, -torch.inf).argsort(dim=1, descending=True)[:, :top_m]
    weight = torch.zeros_like(similarity).scatter(1, best, similarity.gather(1, best).clamp(min=0))
    weight = weight / weight.sum(1, keepdim=True)
    tasks = torch.arange(len(found.context), device=query.device)
    of_task = weight @ F.one_hot(found.row_task, len(tasks)).to(weight.dtype)  # [B, T]
    earlier = found.row_task < tasks[:, None]  # [T, N]
    return weight + of_task @ (found.context[:, found.row_task] * found.row_mean * earlier)


def model(base: Any, dtype: torch.dtype, offset: Offset | None) -> Any:
    """A finer copy of the base with a dense offset on every adapted linear."""

    def linear(path: str, weight: Tensor, x: Tensor) -> Tensor:
        assert offset is not None
        return torch.matmul(x, (weight + offset(path)).transpose(1, 2))

    finer = models.takes_features(models.share(base, FINER[dtype]))
    return finer if offset is None else models.adapt(finer, linear)


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    """On a GPU, eight times bfloat16's precision at a speed that 7B can wait for. float64 stays what it is."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def step(model: Any, inputs: Mapping[str, Tensor], trained: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    """The loss, and its gradients to what is trained."""
    models.checkpoint(model.train(), inputs["input_ids"].is_cuda)
    with _tf32():
        loss = model(**inputs, use_cache=False).loss
        return [loss.detach(), *torch.autograd.grad(loss, trained())]


@torch.no_grad()
def token_error(model: Any, inputs: Mapping[str, Tensor], sequences: Tensor) -> float:
    """How far the worst greedy token of `sequences` `[B, S + n]` lies below the best one, over the largest logit."""
    asked = inputs["input_ids"].shape[1]
    if sequences.shape[1] <= asked or not torch.equal(sequences[:, :asked], inputs["input_ids"]):
        return float("inf")
    answer = sequences[:, asked:]
    whole = {"input_ids": sequences, "attention_mask": torch.ones_like(sequences)}
    with _tf32():
        logits = model(**whole, pixel_values=inputs["pixel_values"], logits_to_keep=answer.shape[1] + 1).logits[:, :-1]
    logits[..., model.config.image_token_id] = logits.amin()  # which is suppressed
    below = logits.amax(2) - logits.gather(2, answer[:, :, None])[:, :, 0]  # [B, n]
    return (below.max() / logits.abs().max()).item()
