"""O-LoRA (arXiv 2310.14152): a new LoRA for each task, kept orthogonal to the earlier ones, and all of them summed.

While task t trains, its loss grows, over the adapted linears, by

    lambda_1 * sum_(i < t) sum_jk |A_i A_t^T|_jk  +  lambda_2 * (||A_t||_2 + ||B_t||_2)

The paper squares the entries of ``A_i A_t^T``. This is the public code (cmnfriend/O-LoRA), which takes their absolute
values and has the norms: ``lambda_1 = 0.5`` and ``lambda_2 = 0`` were chosen with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from cllava_fast.methods.base import MethodConfig, Pairs, Selection, layers_of, register
from cllava_fast.methods.lora import LoraForEachTask
from cllava_fast.pool import Pool


@dataclass(frozen=True)
class OLoraConfig(MethodConfig):
    """Configuration of O-LoRA; each field's help says what it is."""

    method: ClassVar[str] = "o_lora"
    title: ClassVar[str] = "O-LoRA"
    # rank as sequential LoRA's there, whose many overlaps would outweigh the answers' loss at the default
    demo = {"rank": 32, "lambda_1": 0.002}

    rank: int = field(default=8, metadata={"help": "rank of one task's LoRA"})
    scale: float = field(default=4.0, metadata={"help": "factor on every increment (LoRA's alpha / r, 32 / 8)"})
    a_std: float = field(
        default=0.009,
        metadata={
            "help": "standard deviation of A at birth (B is born zero); LoRA's own is 1 / sqrt(3 * width), 0.009 at a "
            "width of 4096, and lambda_1 is chosen for it"
        },
    )
    targets: tuple[str, ...] = field(
        default=("self_attn.o_proj",), metadata={"help": "linears of each language layer that get increments"}
    )
    lambda_1: float = field(default=0.5, metadata={"help": "weight of the overlap with earlier tasks' A in the loss"})
    lambda_2: float = field(default=0.0, metadata={"help": "weight of the norms of the new A and B in the loss"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_1", "lambda_2"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")


@register(OLoraConfig)
class OLora(LoraForEachTask):
    """Every row acts on every sample."""

    uses_query = False
    config: OLoraConfig

    def select(self, pool: Pool, query: Tensor | None, groups: int, training: bool) -> Selection | None:
        learns, device = training and pool.block_rows > 0, pool.row_task.device
        before = pool.num_rows if learns else pool.num_rows - 1
        if before < 0:
            return None
        # the newest row is selected, all before it come as context, which needs no gathering
        newest = Pairs.ones(torch.full((1, 1), 0 if learns else before, device=device))
        context = torch.ones(1, before, device=device, dtype=torch.float32) if before else None
        return Selection(block=newest, context=context) if learns else Selection(past=newest, context=context)

    def penalty(self, pool: Pool) -> Tensor | None:
        config, terms = self.config, []
        for factors in layers_of(pool):
            if config.lambda_1 and pool.num_rows:
                overlap = factors.A.float().flatten(0, 1) @ factors.block_A[0].t()  # [tasks * R, R]
                terms.append(config.lambda_1 * overlap.abs().sum())
            if config.lambda_2:
                norms = torch.linalg.vector_norm(factors.block_A) + torch.linalg.vector_norm(factors.block_B)
                terms.append(config.lambda_2 * norms)
        return torch.stack([term.to(pool.row_task.device) for term in terms]).sum() if terms else None
