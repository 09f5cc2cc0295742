"""SLM (arXiv 2404.07470), the ancestor of Continual LLaVA: keys in groups find weight increments (DTKR, JARe).

With q and k cut into G groups, the similarity of row n is ``s_n = mean_g cos(q^g, k_n^g)``; the top M rows act, with
weights ``w_m = s_m / sum_m s_m``, so the increment is ``sum_m w_m B_m^T A_m``.

``reduce="batch"`` is what was published (after L2P, arXiv 2112.08654): ``s_n`` is averaged over the batch first, so all
its samples share one selection, and an answer depends on what else is asked. ``reduce="sample"`` mends that.

Keys are born orthogonal in each group and aligned first, group by group: the loss is the negative mean cosine of each
query's group with the M nearest keys of that group, a random share of the rows masked (``key_dropout``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cllava_fast import ops
from cllava_fast.methods.base import Method, MethodConfig, Pairs, Selection, register
from cllava_fast.methods.continual_llava import KeyInit, mean_weight, sample_keys
from cllava_fast.pool import Pool


@dataclass(frozen=True)
class SlmConfig(MethodConfig):
    """Configuration of SLM, defaults of its public code for LLaMA-2; each field's help says what it is."""

    method: ClassVar[str] = "slm"
    title: ClassVar[str] = "SLM"
    # 60 steps align no orthogonal keys; two rows of rank 16 are as many columns as the others have there
    demo: ClassVar[dict[str, Any]] = {"groups": 4, "key_init": "instructions", "rank": 16}

    rows_per_task: int = field(default=4, metadata={"help": "rows that a task adds to the pool"})
    top_m: int = field(default=2, metadata={"help": "rows selected for each batch or sample"})
    rank: int = field(default=8, metadata={"help": "rank of one row's increment"})
    scale: float = field(default=1.0, metadata={"help": "factor on every increment"})
    a_std: float = field(default=1.0, metadata={"help": "standard deviation of A at birth (B is born zero)"})
    targets: tuple[str, ...] = field(
        default=("self_attn.o_proj",), metadata={"help": "linears of each language layer that get increments"}
    )
    reduce: Literal["batch", "sample"] = field(
        default="batch",
        metadata={"help": "batch: one selection for all samples of a batch, as published; sample: one for each"},
    )
    groups: int = field(default=6, metadata={"help": "equal parts of query and keys; a divisor of the query's width"})
    key_init: KeyInit = field(
        default="orthogonal",
        metadata={"help": "keys at birth: orthogonal in each group, as published, or embeddings of the instructions"},
    )
    key_dropout: float = field(default=0.25, metadata={"help": "share of the rows that alignment masks, at random"})
    surrogate: str = field(default="sentence", metadata={"help": "what turns an instruction into a query"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows_per_task < 1:
            raise ValueError(f"rows_per_task is {self.rows_per_task}; expected at least 1")
        if not 1 <= self.top_m <= self.rows_per_task:
            raise ValueError(f"top_m is {self.top_m}; expected 1 to {self.rows_per_task} (rows_per_task)")
        if self.groups < 1:
            raise ValueError(f"groups is {self.groups}; expected at least 1")
        if not 0.0 <= self.key_dropout < 1.0:
            raise ValueError(f"key_dropout is {self.key_dropout}; expected a share from 0 to below 1")


@register(SlmConfig)
class Slm(Method):
    """Top M rows by the mean cosine of G groups, for a batch or for each sample."""

    aligns_keys = True
    config: SlmConfig

    def __init__(self, config: SlmConfig) -> None:
        super().__init__(config)
        self.by_batch = config.reduce == "batch"

    def open_task(self, pool: Pool, queries: Tensor | None, generator: torch.Generator) -> None:
        config = self.config
        if config.key_init == "orthogonal":
            parts = torch.empty(config.groups, config.rows_per_task, pool.key_dim // config.groups, dtype=torch.float32)
            keys = torch.cat([torch.nn.init.orthogonal_(part, generator=generator) for part in parts], dim=1)
        else:
            assert queries is not None
            keys = sample_keys(queries, config.rows_per_task, generator)
        pool.open_block(config.rows_per_task, keys=keys, a_std=config.a_std, generator=generator)

    def alignment_loss(self, pool: Pool, query: Tensor, groups: int, generator: torch.Generator) -> Tensor:
        assert pool.block_keys is not None
        q = normalize(query.float().unflatten(1, (groups, -1)), dim=2)  # [B, G, D/G]
        k = normalize(pool.block_keys.unflatten(1, (groups, -1)), dim=2)  # [n, G, D/G]
        similarity = torch.einsum("bgc,ngc->bgn", q, k)
        masked = torch.rand(similarity.shape, generator=generator, dtype=torch.float32) < self.config.key_dropout
        # masked rows come behind all others, and are taken where none of those are left
        order = similarity.detach() - 4.0 * masked.to(similarity.device)
        return -similarity.gather(2, order.topk(self.config.top_m, dim=2).indices).mean()

    def close_task(self, pool: Pool, name: str, queries: Tensor | None, groups: int) -> None:
        """``z``: what acted on the task's training samples, taken together as one batch where batches select."""
        assert queries is not None and pool.block_keys is not None
        config = self.config
        pool.commit(name, mean_weight(queries, pool.block_keys.detach(), config.top_m, groups, config.reduce))

    def select(self, pool: Pool, query: Tensor | None, groups: int, training: bool) -> Selection | None:
        assert query is not None
        if training and pool.block_keys is not None:
            index, weight, _ = self._nearest(query, pool.block_keys.detach(), groups)
            return Selection(block=Pairs(index, weight), index=index + pool.num_rows, weight=weight)
        if not pool.num_rows:
            return None
        index, weight, _ = self._nearest(query, pool.keys, groups)
        return Selection(past=Pairs(index, weight), index=index, weight=weight)

    def _nearest(self, query: Tensor, keys: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        reduce = self.config.reduce
        return ops.select(query, keys, self.config.top_m, groups=groups, reduce=reduce, check_values=False)

    def task_mean(self, pool: Pool, task: int) -> Selection:
        index = (pool.row_task == task).nonzero().t()  # [1, rows_per_task]
        return Selection(past=Pairs(index, pool.row_mean[index]))
