"""Continual LLaVA (arXiv 2411.02564): instructions pick rows of a pool; what earlier tasks picked is context.

The coefficient of row n for sample b, with c and i the weights and rows that ``select`` returned:

    alpha[b, n] = sum_m c[b,m] * ( [n == i[b,m]]  +  w[task(i[b,m]), task(n)] * z[n] * [task(n) < task(i[b,m])] )

In training every selected row belongs to the task at hand. At inference no task is named: all committed rows compete,
and each selected row brings the context that it was trained with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cllava_fast import ops
from cllava_fast.methods.base import Method, MethodConfig, Pairs, Selection, register
from cllava_fast.pool import Pool

KeyInit = Literal["instructions", "orthogonal"]


@dataclass(frozen=True)
class IncrementConfig(MethodConfig):
    """Configuration of Continual LLaVA; each field's help says what it is."""

    method: ClassVar[str] = "continual_llava"
    title: ClassVar[str] = "Continual LLaVA"

    rows_per_task: int = field(default=8, metadata={"help": "rows that a task adds to the pool"})
    top_m: int = field(default=4, metadata={"help": "rows selected for each sample"})
    rank: int = field(default=8, metadata={"help": "rank of one row's increment"})
    scale: float = field(default=1.0, metadata={"help": "factor on every increment"})
    a_std: float = field(default=1.0, metadata={"help": "standard deviation of A at birth (B is born zero)"})
    targets: tuple[str, ...] = field(
        default=("self_attn.o_proj",), metadata={"help": "linears of each language layer that get increments"}
    )
    context: Literal["product", "factor", "none"] = field(
        default="product",
        metadata={
            "help": "what earlier tasks add: product is the sum of c B^T A over their rows; factor sums A and B "
            "separately and multiplies afterwards, as the method's public ancestors do; none leaves it out"
        },
    )
    context_init: float = field(
        default=0.25, metadata={"help": "weight of an earlier task's context at birth, unless context is none"}
    )
    context_rank: int | None = field(
        default=None,
        metadata={
            "help": "shortens each earlier task's mean increment, which is its context, to this rank when the task is "
            "committed, and says what that costs; null is exact, with rows_per_task x rank columns for each task"
        },
    )
    surrogate: str = field(
        default="sentence",
        metadata={
            "help": "what turns an instruction into a query: sentence, backbone (needs no second model), text+image "
            "(also looks at the picture), or the folder of a sentence-transformers model"
        },
    )
    key_init: KeyInit = field(
        default="instructions",
        metadata={"help": "keys at birth: embeddings of the task's instructions, or orthogonal random vectors"},
    )

    calibrate: bool = field(
        default=False,
        metadata={"help": "leave the frozen model alone where an instruction is unlike every learned task's"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows_per_task < 1:
            raise ValueError(f"rows_per_task is {self.rows_per_task}; expected at least 1")
        if not 1 <= self.top_m <= self.rows_per_task:
            raise ValueError(
                f"top_m is {self.top_m}; expected 1 to {self.rows_per_task}, since a task's block has "
                f"{self.rows_per_task} rows (rows_per_task)"
            )
        if self.context_rank is not None:
            if self.context != "product":
                raise ValueError(f"context_rank is set, but context is {self.context!r}; expected 'product' with it")
            most = self.rows_per_task * self.rank - 1
            if not 1 <= self.context_rank <= most:
                raise ValueError(
                    f"context_rank is {self.context_rank}; expected 1 to {most}, below rows_per_task x rank, or null"
                )


@register(IncrementConfig)
class ContinualLlava(Method):
    """The coefficient policy of Continual LLaVA."""

    aligns_keys = True
    config: IncrementConfig

    def open_task(self, pool: Pool, queries: Tensor | None, generator: torch.Generator) -> None:
        config = self.config
        assert queries is not None
        if config.key_init == "orthogonal":
            keys = torch.empty(config.rows_per_task, pool.key_dim, dtype=torch.float32)
            torch.nn.init.orthogonal_(keys, generator=generator)
        else:
            keys = sample_keys(queries, config.rows_per_task, generator)
        context_init = None if config.context == "none" else config.context_init
        pool.open_block(
            config.rows_per_task, keys=keys, a_std=config.a_std, context_init=context_init, generator=generator
        )

    def alignment_loss(self, pool: Pool, query: Tensor, groups: int, generator: torch.Generator) -> Tensor:
        """``-mean(similarity of a query with its top_m keys)``."""
        assert pool.block_keys is not None
        return -ops.select(query, pool.block_keys, self.config.top_m, groups=groups, check_values=False)[2].mean()

    def close_task(self, pool: Pool, name: str, queries: Tensor | None, groups: int) -> None:
        assert queries is not None and pool.block_keys is not None
        pool.commit(name, mean_weight(queries, pool.block_keys.detach(), self.config.top_m, groups))

    def select(self, pool: Pool, query: Tensor | None, groups: int, training: bool) -> Selection | None:
        assert query is not None
        if training and pool.block_rows:
            assert pool.block_keys is not None
            return self._select_block(pool, query, pool.block_keys.detach(), groups)
        if not pool.num_rows:
            return None
        top_m = self.config.top_m
        context_rows = 0 if self.config.context == "none" else pool.last_block_start
        means = bool(self.config.context_rank)
        if means or not context_rows:
            index, weight, _ = ops.select(query, pool.keys, top_m, groups=groups, check_values=False)
            past, context = self._with_context(pool, index, weight, context_rows)
        else:
            tasks = pool.row_task, pool.row_mean, pool.context
            found = ops.select_aggregate(query, pool.keys, top_m, *tasks, groups=groups, check_values=False)
            past, context = split(*found, top_m, context_rows)  # later rows are the context of no one
        return Selection(
            past=past,
            context=context,
            index=past.index,
            weight=past.coefficient,
            mix=self.config.context == "factor",
            means=means,
        )

    def _select_block(self, pool: Pool, query: Tensor, keys: Tensor, groups: int) -> Selection:
        """Training: the open block alone is allowed, and all earlier rows are its context."""
        top_m, first = self.config.top_m, pool.num_rows
        index, weight, _ = ops.select(query, keys, top_m, groups=groups, check_values=False)
        # every row looks back from this task, and a sample's weights add up to 1: what holds for one holds for all
        _, context = self._with_context(pool, index[:1] + first, weight[:1], context_rows=first)
        return Selection(
            block=Pairs(index, weight),
            context=context,
            index=index + first,
            weight=weight,
            mix=self.config.context == "factor",
            means=bool(self.config.context_rank),
        )

    def task_mean(self, pool: Pool, task: int) -> Selection:
        """Exact in the product form, where the mean of the increments is the increment of the mean weights."""
        if self.config.context == "factor":
            return super().task_mean(pool, task)
        index = (pool.row_task == task).nonzero().t()  # [1, rows_per_task]
        past, context = self._with_context(pool, index, pool.row_mean[index], pool.last_block_start)
        return Selection(past=past, context=context, means=bool(self.config.context_rank))

    def _with_context(
        self, pool: Pool, index: Tensor, weight: Tensor, context_rows: int
    ) -> tuple[Pairs, Tensor | None]:
        """The selected pairs ``[B, M]``, and the coefficients ``[B, C]`` of the first ``context_rows`` rows, or of
        their tasks' means."""
        if self.config.context == "none" or not context_rows:
            return Pairs(index, weight), None
        row_task, row_mean, block = pool.row_task, pool.row_mean, pool.block_rows
        if block:
            row_task = torch.cat([row_task, row_task.new_full((block,), pool.num_tasks)])
            row_mean = torch.cat([row_mean, row_mean.new_zeros(block)])
        top_m = index.shape[1]
        if self.config.context_rank:
            # z is in the means: tasks take the rows' place, and each acts as strongly as those who look back say
            tasks = pool.num_tasks - (context_rows < pool.num_rows)
            every = torch.arange(pool.num_tasks + bool(block), device=row_task.device)
            ones = torch.ones(len(every), device=row_task.device, dtype=torch.float32)
            _, by_task = ops.aggregate(row_task[index], weight, every, ones, pool.context_matrix())
            return Pairs(index, weight), by_task[:, top_m : top_m + tasks].contiguous()
        index, coefficient = ops.aggregate(index, weight, row_task, row_mean, pool.context_matrix())
        return split(index, coefficient, top_m, context_rows)


def split(index: Tensor, coefficient: Tensor, top_m: int, context_rows: int) -> tuple[Pairs, Tensor]:
    """What ``aggregate`` returned, as selected pairs and the coefficients of the first ``context_rows`` rows; those of
    later rows are zero. In one piece each, since every layer reads them."""
    pairs = Pairs(index[:, :top_m].contiguous(), coefficient[:, :top_m].contiguous())
    return pairs, coefficient[:, top_m : top_m + context_rows].contiguous()


def sample_keys(queries: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """``[rows, D]``: distinct queries among those of samples ``[n, D]`` drawn at random, so the frequent ones first.

    Where two tasks share instructions, both then put keys there, and neither task takes them all.
    A task with fewer distinct instructions than rows uses them again with a little noise: equal keys would be selected
    together for ever.
    """
    drawn = queries.float().cpu()[torch.randperm(len(queries), generator=generator)]
    distinct, inverse = torch.unique(drawn, dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(drawn)).scatter_reduce(0, inverse, torch.arange(len(drawn)), "amin")
    order = first.argsort()
    keys = distinct[order.repeat(rows // len(order) + 1)[:rows]]
    noise = torch.randn(keys.shape, generator=generator, dtype=torch.float32) * (0.01 * keys.std())
    noise[: len(order)] = 0.0
    return keys + noise


def mean_weight(queries: Tensor, keys: Tensor, top_m: int, groups: int, reduce: Any = "sample") -> Tensor:
    """``z [n]``: mean selection weight of every key over ``queries [Q, D]``; not selected counts as 0."""
    index, weight, _ = ops.select(queries.to(keys.device), keys, top_m, groups=groups, reduce=reduce)
    total = torch.zeros(len(index), len(keys), dtype=torch.float64, device=keys.device)
    return total.scatter_(1, index, weight.double()).mean(0).float()
