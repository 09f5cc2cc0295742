"""Sequential and joint LoRA (Hu et al., arXiv 2106.09685) as one row that acts on every sample: the yardsticks.

``LoraForEachTask`` is what methods with a LoRA of its own for each task begin with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from cllava_fast.methods.base import Method, MethodConfig, Pairs, Selection, register
from cllava_fast.pool import Pool


@dataclass(frozen=True)
class LoraConfig(MethodConfig):
    """One LoRA, tuned on task after task; each field's help says what it is."""

    method: ClassVar[str] = "sequential_lora"
    title: ClassVar[str] = "Sequential LoRA"

    rank: int = field(
        default=32, metadata={"help": "32 equals the active rank of Continual LLaVA's defaults (4 rows of rank 8)"}
    )
    scale: float = field(default=1.0, metadata={"help": "factor on the increment (LoRA's alpha / r)"})
    a_std: float = field(default=1.0, metadata={"help": "standard deviation of A at birth (B is born zero)"})
    targets: tuple[str, ...] = field(
        default=("self_attn.o_proj",), metadata={"help": "linears of each language layer that get increments"}
    )


@dataclass(frozen=True)
class JointLoraConfig(LoraConfig):
    """One LoRA, tuned once on all tasks together."""

    method: ClassVar[str] = "joint_lora"
    title: ClassVar[str] = "Joint LoRA"


class LoraForEachTask(Method):
    """Pool row t is task t's LoRA, frozen behind its task. What acts is for ``select`` to say."""

    def open_task(self, pool: Pool, queries: Tensor | None, generator: torch.Generator) -> None:
        pool.open_block(1, a_std=self.config.a_std, generator=generator)

    def close_task(self, pool: Pool, name: str, queries: Tensor | None, groups: int) -> None:
        pool.commit(name, torch.ones(1))


@register(LoraConfig)
class SequentialLora(Method):
    """Every task goes on training the same row."""

    uses_query = False
    keeps_block = True

    def open_task(self, pool: Pool, queries: Tensor | None, generator: torch.Generator) -> None:
        if not pool.block_rows:
            pool.open_block(1, a_std=self.config.a_std, generator=generator)

    def close_task(self, pool: Pool, name: str, queries: Tensor | None, groups: int) -> None:
        """Nothing is frozen: the next task overwrites what it needs."""

    def select(self, pool: Pool, query: Tensor | None, groups: int, training: bool) -> Selection | None:
        if not pool.block_rows:
            return None
        return Selection(block=Pairs.ones(torch.arange(pool.block_rows, device=pool.row_task.device)[None]))  # [1, n]


@register(JointLoraConfig)
class JointLora(SequentialLora):
    """The upper yardstick: all tasks' data at once."""

    joint = True
