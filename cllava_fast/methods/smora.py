"""SMoRA (arXiv 2501.15103): every rank of a LoRA is an expert, and a router picks a few of them for every token.

    y = W0 x + scale * sum_{i in top-k(s)} g_i * B_i A_i x,   s = sigmoid(W_g x) + u,   g_i = s_i / sum_{j in top-k} s_j

``u`` keeps the experts busy without a loss of its own: once a training step, ``u_i`` of an expert that was picked less
often than the mean over the step's tokens rises by ``bias_update_rate``, and that of the others falls.

This is the authors' code (StyxXuan/smora), which multiplies g by k and divides LoRA's alpha by k: ``scale`` is alpha.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from cllava_fast import distributed
from cllava_fast.methods.base import Selection, layers_of, pool_version, register
from cllava_fast.methods.moe_lora import MoeLora, MoeLoraConfig
from cllava_fast.pool import Factors, LinearShape, OwnTensors, Pool

LEAST = 1e-12  # of what weighs a picked expert: a bias may push it below zero, and all may round to zero


@dataclass(frozen=True)
class SmoraConfig(MoeLoraConfig):
    """SMoRA with the defaults of its code; each field's help says what it is."""

    method: ClassVar[str] = "smora"
    title: ClassVar[str] = "SMoRA"
    # the linears and all experts' rank as sequential LoRA's there; a few hundred steps balance nothing at the default
    demo = {"targets": ("self_attn.o_proj",), "experts": 32, "top_k": 16, "bias_update_rate": 0.001}

    experts: int = field(default=64, metadata={"help": "experts of each linear: the rank of the LoRA that they are"})
    rank: int = field(default=1, metadata={"help": "rank of one expert"})
    scale: float = field(default=16.0, metadata={"help": "factor on the increment, whose gates add up to 1 (alpha)"})
    dropout: float = field(
        default=0.0, metadata={"help": "share of an adapted linear's input that experts do not see in training"}
    )
    top_k: int = field(default=8, metadata={"help": "experts that act on one token"})
    # not the name of when the gate was a softmax: what was learned with that is refused
    bias_update_rate: float = field(
        default=1e-5, metadata={"help": "step by which the bias of idle experts rises; 0 for no balance of load"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k is {self.top_k}; expected 1 to {self.experts} (experts)")
        if self.bias_update_rate < 0:
            raise ValueError(f"bias_update_rate is {self.bias_update_rate}; expected a number of at least 0")


@register(SmoraConfig)
class Smora(MoeLora):
    """A token's top-k experts act on it; all others have a coefficient of zero."""

    config: SmoraConfig
    counted_at: int | None = None  # what ``pool_version`` was when the step that is counted began; None between steps

    def open_task(self, pool: Pool, queries: Tensor | None, generator: torch.Generator) -> None:
        is_new, self.counted_at = not pool.block_rows, None
        super().open_task(pool, queries, generator)
        for factors in layers_of(pool):
            idle = torch.zeros(self.config.experts, device=factors.A.device, dtype=torch.float32)
            factors.keep("load", idle)  # of a task that failed, nothing counts
            if is_new:
                factors.keep("balance", idle.clone())

    def close_task(self, pool: Pool, name: str, queries: Tensor | None, groups: int) -> None:
        self.end_step(pool)
        super().close_task(pool, name, queries, groups)

    def select(self, pool: Pool, query: Tensor | None, groups: int, training: bool) -> Selection | None:
        selection = super().select(pool, query, groups, training)
        if selection is None or not training or not self.config.bias_update_rate:
            return selection
        version = pool_version(pool)
        if self.counted_at not in (None, version):
            self.end_step(pool)  # of a loop that does not say so
        self.counted_at = version
        return replace(selection, seen=set())

    def end_step(self, pool: Pool) -> None:
        if self.counted_at is not None:
            balance(pool, self.config.bias_update_rate)
            self.counted_at = None

    def gates(self, factors: Factors, logits: Tensor, selection: Selection) -> Tensor:
        bias: Tensor = factors.balance  # type: ignore[assignment]
        scores = logits.sigmoid() + bias  # [B, S, E]
        picked = scores.detach().topk(self.config.top_k, sorted=False).indices  # [B, S, k]
        if selection.seen is not None and factors not in selection.seen:
            selection.seen.add(factors)
            taken = torch.zeros_like(logits, dtype=torch.float32).scatter_(2, picked, 1.0)
            if selection.mask is not None:  # padding is no work
                taken *= (selection.mask != 0).to(taken.device).unsqueeze(2)
            factors.load += taken.sum((0, 1))  # type: ignore[operator]
        weight = scores.gather(2, picked).clamp(min=LEAST)
        return torch.zeros_like(scores).scatter(2, picked, weight / weight.sum(-1, keepdim=True))

    def own_tensors(self, shape: LinearShape | None, tasks: int, rows: int, block_rows: int) -> OwnTensors:
        own = super().own_tensors(shape, tasks, rows, block_rows)
        return {**own, **dict.fromkeys(("balance", "load"), ([block_rows], torch.float32))} if own else {}


def balance(pool: Pool, rate: float) -> None:
    """Moves each linear's bias by what its experts had to do since the last time, on all processes together."""
    layers = layers_of(pool)
    loads = torch.stack([factors.load.to(pool.row_task.device) for factors in layers])  # [L, E]
    distributed.average(loads)
    loads = (loads * distributed.count()).round()  # whole numbers: a tie is one on any number of processes
    steps = rate * (loads.mean(1, keepdim=True) - loads).sign()
    for factors, step in zip(layers, steps, strict=True):
        factors.balance += step.to(factors.balance.device)
        factors.load.zero_()
