"""MTL-LoRA (arXiv 2410.09437, eq. 5): one A and several B that tasks share, and a transformation of each task between.

    y = W0 x + scale * sum_i softmax(w_t / temperature)_i * B_i Lambda_t A dropout(x)

The source trains on all tasks at once. In a stream, A and all B go on training with every task; Lambda_t and w_t train
with their own task alone. The task t of a question must be told (``uses_task``): the source has no other way.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from cllava_fast.methods.base import Method, MethodConfig, Pairs, Selection, layers_of, register
from cllava_fast.ops import checks
from cllava_fast.pool import Factors, LinearShape, OwnTensors, Pool


@dataclass(frozen=True)
class MtlLoraConfig(MethodConfig):
    """MTL-LoRA; each field's help says what it is."""

    method: ClassVar[str] = "mtl_lora"
    title: ClassVar[str] = "MTL-LoRA (told the task)"
    demo = {"dropout": 0.0}  # a few hundred steps do not overfit

    ups: int = field(default=3, metadata={"help": "projections up, B, that a task weighs"})
    rank: int = field(default=8, metadata={"help": "rank of A and of each B"})
    temperature: float = field(default=0.1, metadata={"help": "of the softmax over a task's weights of B"})
    scale: float = field(default=2.0, metadata={"help": "factor on the increment (LoRA's alpha / r, 16 / 8)"})
    dropout: float = field(
        default=0.05, metadata={"help": "share of an adapted linear's input that A does not see in training"}
    )
    a_std: float = field(default=0.01, metadata={"help": "standard deviation of A at birth (B is born zero)"})
    targets: tuple[str, ...] = field(
        default=("self_attn.*_proj",), metadata={"help": "linears of each language layer that get increments"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ups < 1:
            raise ValueError(f"ups is {self.ups}; expected at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; expected a positive number")


@register(MtlLoraConfig)
class MtlLora(Method):
    """Each task acts through its own ``Lambda_t A`` and its own sum of all B."""

    uses_task = True
    shares_A = True
    config: MtlLoraConfig

    def open_task(self, pool: Pool, queries: Tensor | None, generator: torch.Generator) -> None:
        ups, rank, is_new = self.config.ups, self.config.rank, not pool.block_rows
        if is_new:
            pool.open_block(ups, a_std=self.config.a_std, generator=generator)
        for factors in layers_of(pool):
            if is_new:
                factors.keep("lambdas", torch.empty(0, rank, rank, device=factors.A.device, dtype=torch.float32))
                factors.keep("weights", torch.empty(0, ups, device=factors.A.device, dtype=torch.float32))
            drawn = (2 * torch.rand(1, ups, generator=generator, dtype=torch.float32) - 1) * ups**-0.5
            begin(factors, drawn)

    def close_task(self, pool: Pool, name: str, queries: Tensor | None, groups: int) -> None:
        pool.count_task(name)
        for factors in layers_of(pool):
            factors.keep("lambdas", torch.cat([factors.lambdas, factors.block_lambda]))
            factors.keep("weights", torch.cat([factors.weights, factors.block_weights]))
            begin(factors, torch.zeros(1, self.config.ups))

    def select(self, pool: Pool, query: Tensor | None, groups: int, training: bool) -> Selection | None:
        assert query is not None
        task = query.long()  # [B, 1]
        if checks.can_read(task, cuda=False) and not ((task >= 0) & (task <= pool.num_tasks)).all():
            raise ValueError(f"query is {task.flatten().tolist()}; expected task numbers from 0 to {pool.num_tasks}")
        return Selection(block=Pairs.ones(task.clamp(0, pool.num_tasks)))

    def route(self, selection: Selection, factors: Factors, x: Tensor) -> Selection:
        lambdas = torch.cat([factors.lambdas, factors.block_lambda])  # type: ignore[list-item]  # [T + 1, R, R]
        weights = torch.cat([factors.weights, factors.block_weights])  # type: ignore[list-item]  # [T + 1, N]
        assert factors.block_A is not None and factors.block_B is not None
        shares = (weights / self.config.temperature).softmax(1)
        return replace(
            selection, rows=(lambdas @ factors.block_A, torch.einsum("tn,nrd->trd", shares, factors.block_B))
        )

    def own_tensors(self, shape: LinearShape | None, tasks: int, rows: int, block_rows: int) -> OwnTensors:
        if shape is None or not block_rows:
            return {}
        rank = self.config.rank
        sizes = {"lambdas": [tasks, rank, rank], "weights": [tasks, block_rows]}
        sizes |= {"block_lambda": [1, rank, rank], "block_weights": [1, block_rows]}
        return {name: (size, torch.float32) for name, size in sizes.items()}


def begin(factors: Factors, weights: Tensor) -> None:
    """A task at its birth: a Lambda that changes nothing, and its weights of B ``[1, N]``."""
    factors.keep("block_lambda", torch.eye(factors.rank, device=factors.A.device)[None])
    factors.keep("block_weights", weights.to(factors.A.device))
