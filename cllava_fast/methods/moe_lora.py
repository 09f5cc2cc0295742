"""MoELoRA as in CoIN (arXiv 2403.08350, section 4.2): experts that a router of each linear weighs for every token.

    y = W0 x + scale * sum_i softmax(W_g x)_i * B_i A_i dropout(x)

No expert is ever frozen: task after task goes on training all of them, and the routers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cllava_fast.methods.base import MethodConfig, Pairs, Selection, layers_of, register
from cllava_fast.methods.lora import SequentialLora
from cllava_fast.pool import Factors, LinearShape, OwnTensors, Pool


@dataclass(frozen=True)
class MoeLoraConfig(MethodConfig):
    """MoELoRA with the defaults of CoIN; each field's help says what it is."""

    method: ClassVar[str] = "moe_lora"
    title: ClassVar[str] = "MoELoRA"
    # the linears and all experts' rank as sequential LoRA's there; a few hundred steps do not overfit
    demo = {"targets": ("self_attn.o_proj",), "rank": 4, "scale": 16.0, "dropout": 0.0}

    experts: int = field(default=8, metadata={"help": "experts of each linear"})
    rank: int = field(default=16, metadata={"help": "rank of one expert (CoIN's 128 is that of all 8 together)"})
    scale: float = field(
        default=2.0,
        metadata={"help": "factor on the increment: CoIN's alpha / r, 256 / 128, r being that of all experts"},
    )
    dropout: float = field(
        default=0.05, metadata={"help": "share of an adapted linear's input that experts do not see in training"}
    )
    a_std: float = field(default=0.01, metadata={"help": "standard deviation of A at birth (B is born zero)"})
    targets: tuple[str, ...] = field(
        default=("self_attn.*_proj", "mlp.*_proj"),
        metadata={"help": "linears of each language layer that get increments; by default all"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts < 1:
            raise ValueError(f"experts is {self.experts}; expected at least 1")


@register(MoeLoraConfig)
class MoeLora(SequentialLora):
    """Every expert acts on every token, as strongly as the softmax of the linear's router says."""

    config: MoeLoraConfig

    def open_task(self, pool: Pool, queries: Tensor | None, generator: torch.Generator) -> None:
        if pool.block_rows:
            return
        experts = self.config.experts
        pool.open_block(experts, a_std=self.config.a_std, generator=generator)
        for factors in layers_of(pool):
            factors.keep("block_router", new_router(experts, factors, generator))

    def route(self, selection: Selection, factors: Factors, x: Tensor) -> Selection:
        assert selection.block is not None
        gates = self.gates(factors, router_logits(factors.block_router, x), selection)  # type: ignore[arg-type]
        return replace(selection, block=Pairs(selection.block.index, gates))

    def gates(self, factors: Factors, logits: Tensor, selection: Selection) -> Tensor:
        """Coefficients ``[B, S, E]`` of the experts, from the router's logits of the same shape."""
        return logits.softmax(-1)

    def own_tensors(self, shape: LinearShape | None, tasks: int, rows: int, block_rows: int) -> OwnTensors:
        if shape is None or not block_rows:
            return {}
        return {"block_router": ([block_rows, shape.d_in], torch.float32)}


def new_router(experts: int, factors: Factors, generator: torch.Generator) -> Tensor:
    """``[E, d_in]``, born as ``nn.Linear`` is."""
    d_in = factors.shape.d_in
    drawn = torch.rand(experts, d_in, generator=generator, dtype=torch.float32)  # on the CPU: the same on every device
    return ((2 * drawn - 1) * d_in**-0.5).to(factors.A.device)


def router_logits(router: Tensor, x: Tensor) -> Tensor:
    """``[B, S, E]`` of ``router [E, d_in]``, computed as a linear of the model would and returned in full precision."""
    logits = F.linear(x, router.to(x.dtype))
    return logits if logits.dtype == torch.float64 else logits.float()
