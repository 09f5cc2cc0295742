"""MeteoRA (arXiv 2405.13053, ICLR 2025) for a stream: a frozen LoRA a task, and a gate that picks some for each token.

    y = W0 x + scale * sum_{j in top-k} g_j B_j A_j x,    g = softmax over the k highest of  W x,  W [T, d_in]

The paper has all LoRAs from elsewhere and then trains the gates of every linear on a mix of all tasks' data. A stream
keeps no old data: here a task trains its LoRA together with its own row of W, on its own samples, earlier LoRAs and
rows of W frozen. Its LoRA is then always among the k, or its row could not learn. Nothing tells a row which tokens of
earlier tasks are not its own. The loss that the authors' code (NJUDeepEngine/meteora) adds, the cross entropy of each
gate's logits with the number of the token's task, could not either, and is left out: the number is always the newest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cllava_fast.methods.base import MethodConfig, Pairs, Selection, layers_of, register
from cllava_fast.methods.lora import LoraForEachTask
from cllava_fast.methods.moe_lora import router_logits
from cllava_fast.pool import Factors, LinearShape, OwnTensors, Pool


@dataclass(frozen=True)
class MeteoraConfig(MethodConfig):
    """MeteoRA, gates trained task by task; each field's help says what it is."""

    method: ClassVar[str] = "meteora"
    title: ClassVar[str] = "MeteoRA (gates task by task)"
    # rank and targets as sequential LoRA's there
    demo = {"targets": ("self_attn.o_proj",), "top_k": 3, "rank": 32, "scale": 4.0}

    top_k: int = field(default=2, metadata={"help": "LoRAs that act on a token, in each linear"})
    rank: int = field(default=8, metadata={"help": "rank of a task's LoRA"})
    scale: float = field(default=2.0, metadata={"help": "factor on the increment (LoRA's alpha / r)"})
    a_std: float = field(default=0.01, metadata={"help": "standard deviation of A at birth (B is born zero)"})
    targets: tuple[str, ...] = field(
        default=("self_attn.*_proj", "mlp.*_proj"),
        metadata={"help": "linears of each language layer that get increments; by default all"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; expected at least 1")


@register(MeteoraConfig)
class Meteora(LoraForEachTask):
    """Pool row t is task t's LoRA; each linear keeps ``gate [T, d_in]`` beside them."""

    uses_query = False
    config: MeteoraConfig

    def open_task(self, pool: Pool, queries: Tensor | None, generator: torch.Generator) -> None:
        super().open_task(pool, queries, generator)
        for factors in layers_of(pool):
            factors.keep("block_gate", torch.zeros(1, factors.shape.d_in, device=factors.A.device))

    def close_task(self, pool: Pool, name: str, queries: Tensor | None, groups: int) -> None:
        gates = {factors: _gate(factors).detach() for factors in layers_of(pool)}
        super().close_task(pool, name, queries, groups)
        for factors, gate in gates.items():
            factors.keep("gate", gate)

    def select(self, pool: Pool, query: Tensor | None, groups: int, training: bool) -> Selection | None:
        """All rows, for ``route`` to weigh."""
        open_rows = pool.block_rows if training else 0
        block, past = (_all_rows(rows, pool.row_task.device) for rows in (open_rows, pool.num_rows))
        return Selection(block=block, past=past) if block or past else None

    def route(self, selection: Selection, factors: Factors, x: Tensor) -> Selection:
        gate = _gate(factors) if selection.block else factors.gate
        coefficient = weigh(x, gate, self.config.top_k, keep_last=selection.block is not None)
        rows = len(factors.B)
        return replace(
            selection,
            block=selection.block and Pairs(selection.block.index, coefficient[..., rows:].contiguous()),
            past=selection.past and Pairs(selection.past.index, coefficient[..., :rows].contiguous()),
        )

    def own_tensors(self, shape: LinearShape | None, tasks: int, rows: int, block_rows: int) -> OwnTensors:
        if shape is None:
            return {}
        counts = {"gate": rows, "block_gate": block_rows}
        return {name: ([count, shape.d_in], torch.float32) for name, count in counts.items() if count}


def weigh(x: Tensor, gate: Any, top_k: int, keep_last: bool) -> Tensor:
    """``[B, S, T]``: each token's softmax over its ``top_k`` highest of ``gate [T, d_in] x``, 0 for the others.
    ``keep_last`` has the last row always among them."""
    logits = router_logits(gate, x)  # [B, S, T]
    order = logits.detach().clone()
    if keep_last:
        order[..., -1] = torch.inf
    chosen = order.topk(min(top_k, order.shape[-1]), dim=-1).indices
    left_out = torch.ones_like(logits, dtype=torch.bool).scatter_(-1, chosen, False)
    return logits.masked_fill(left_out, -torch.inf).softmax(-1)


def _gate(factors: Any) -> Tensor:
    """``[T, d_in]``, the open task's row the last."""
    return torch.cat([factors.gate, factors.block_gate]) if len(factors.B) else factors.block_gate


def _all_rows(rows: int, device: torch.device) -> Pairs | None:
    return Pairs.ones(torch.arange(rows, device=device)[None]) if rows else None  # [1, rows]
