"""DIKI (arXiv 2407.05342, ECCV 2024): beside the frozen attention, one to a task's prompts.

    y = W_o [SDPA(q, k, v) + lambda * SDPA(q, P_k, P_v)] + b,    P_k, P_v [8, heads * head_dim]

A task trains prompts of its own in the first layers. ``P_v`` is born zero, so that a new task changes nothing, and
``lambda`` is 1 in training. At inference the task under whose Gaussian a sample's frozen feature is likeliest acts, and

    lambda = sigmoid(log p / D - 1)

That is ``strength="likelihood"``. Here, Gaussians are so wide (``calibration.NOISE``) that it hardly falls for what is
like no task, so by default ``lambda`` is calibration's score, which knows the task's own level.

The paper puts the branch into both towers of a CLIP, which is ``cllava_fast.clip``. ``patch`` puts it into the language
layers, and the features are the surrogate's queries. ``q`` is taken before positions are added: prompts have none.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cllava_fast.methods import calibration
from cllava_fast.methods.base import Method, MethodConfig, Pairs, Selection, register
from cllava_fast.pool import Factors, LinearShape, Pool


@dataclass(frozen=True)
class DikiConfig(MethodConfig):
    """DIKI with the defaults of its code, except for ``strength``; each field's help says what it is."""

    method: ClassVar[str] = "diki"
    title: ClassVar[str] = "DIKI"
    demo = {"scale": 64.0, "a_std": 4.0, "rank": 64}  # few steps at its learning rate move prompts by less than 1

    layers: int = field(default=8, metadata={"help": "language layers with prompts, from the first on"})
    rank: int = field(default=8, metadata={"help": "prompts of a task in each of these layers"})
    scale: float = field(default=1.0, metadata={"help": "factor on the branch; the paper has none"})
    a_std: float = field(
        default=3**-0.5,
        metadata={"help": "standard deviation of the prompts' keys at birth, as of the code's uniform -1..1"},
    )
    targets: tuple[str, ...] = field(
        default=("self_attn.o_proj",), metadata={"help": "where the branch joins its attention; no choice"}
    )
    strength: Literal["familiarity", "likelihood"] = field(
        default="familiarity",
        metadata={
            "help": "how strongly the likeliest task acts: familiarity, which knows how likely the task's own training "
            "samples are (methods/calibration.py), or likelihood, the paper's lambda"
        },
    )
    surrogate: str = field(
        default="sentence",
        metadata={
            "help": "whose features tell tasks apart: sentence, backbone, text+image, or the folder of a "
            "sentence-transformers model"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers is {self.layers}; expected at least 1")
        if self.targets != ("self_attn.o_proj",):
            raise ValueError(f"targets is {list(self.targets)}; a branch of attention joins at self_attn.o_proj alone")


@register(DikiConfig)
class Diki(Method):
    """Pool row t of a layer's ``o_proj`` is task t: its ``A`` is ``P_k``, its ``B`` is ``P_v``."""

    remembers_queries = True
    config: DikiConfig

    def row_shape(self, linear: LinearShape) -> LinearShape:
        return replace(linear, d_out=linear.d_in)

    def open_task(self, pool: Pool, queries: Tensor | None, generator: torch.Generator) -> None:
        assert queries is not None
        mean = queries.double().mean(0, keepdim=True).float()  # no key is compared with: it tells where the task lies
        pool.open_block(1, keys=mean, a_std=self.config.a_std, generator=generator)

    def close_task(self, pool: Pool, name: str, queries: Tensor | None, groups: int) -> None:
        pool.commit(name, torch.ones(1))

    def select(self, pool: Pool, query: Tensor | None, groups: int, training: bool) -> Selection | None:
        assert query is not None
        if training and pool.block_rows:
            return Selection(block=Pairs.ones(torch.zeros(len(query), 1, dtype=torch.int64, device=query.device)))
        if not pool.num_tasks:
            return None
        likelihood, above = calibration.likelihoods(pool, query)
        likelihood, task = likelihood.max(1, keepdim=True)  # [B, 1]
        if self.config.strength == "familiarity":
            strength = calibration.score(above.gather(1, task))
        else:
            strength = torch.sigmoid(likelihood - 1)
        weight = torch.ones_like(strength)
        return Selection(past=Pairs(task, strength), index=task, weight=weight, strength=strength[:, 0])

    def read(self, selection: Selection, factors: Factors, x: Tensor, queries: Tensor) -> Tensor:
        keys, values, chosen = factors.A, factors.B, selection.past
        if selection.block is not None:
            assert factors.block_A is not None and factors.block_B is not None
            keys, values, chosen = factors.block_A.to(x), factors.block_B.to(x), selection.block
        assert chosen is not None
        task, strength = chosen.index[:, 0].to(x.device), chosen.coefficient[:, :, None].to(x.device)  # [B], [B, 1, 1]
        found = attend(queries, keys[task], values[task])
        return x + (self.config.scale * strength * found).to(x.dtype)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """``SDPA(q, P_k, P_v)``, heads side by side ``[B, S, H * d]``, of queries ``[B, S, H, d]`` and prompts
    ``[B, n, H * d]``."""
    k, v = (prompts.to(queries.dtype).unflatten(2, queries.shape[2:]).transpose(1, 2) for prompts in (keys, values))
    return F.scaled_dot_product_attention(queries.transpose(1, 2), k, v).transpose(1, 2).flatten(2)
