"""BranchLoRA (arXiv 2506.02041, ACL 2025): branches B on one shared A; a router for each task, branches that freeze.

    y = W0 x + scale * sum_{j in top-k} g_j B_j (A x),    g = softmax over the k highest of  W_t x_first

``x_first`` is the sample's first token as the linear sees it, ``W_t [N, d_in]`` the linear's router of task t: the open
task's in training; at inference that of the task whose key is most similar to the sample. After a task, the k branches
of each linear that were most active freeze. Later tasks may choose them, but train only the others, the shared A, and
their own router; where all branches are frozen, only A and the router. So A keeps on moving under old tasks, as in the
paper.

Task keys have one part for the text and, with ``surrogate="text+image"``, one for the image. The paper trains them by
``sum_i 1 - cos(key, e_i)`` over the frozen features e of the task's samples. That loss has no parameter in common with
the language model's, whatever its weight, and its minimum is known: the mean of the normalised features. It is taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cllava_fast import distributed, ops
from cllava_fast.methods.base import Begun, Method, MethodConfig, Pairs, Selection, layers_of, pool_version, register
from cllava_fast.methods.moe_lora import new_router
from cllava_fast.pool import Factors, LinearShape, OwnTensors, Pool

MOMENTUM = 0.99  # of a branch's activity: about the last hundred steps count, in which the router has found its form


@dataclass(frozen=True)
class BranchLoraConfig(MethodConfig):
    """BranchLoRA with the paper's defaults; each field's help says what it is."""

    method: ClassVar[str] = "branch_lora"
    title: ClassVar[str] = "BranchLoRA"
    demo = {"targets": ("self_attn.o_proj",), "rank": 32}  # as sequential LoRA there: one A is all the rank there is

    branches: int = field(default=8, metadata={"help": "branches B of each linear, all tasks together"})
    top_k: int = field(
        default=2, metadata={"help": "branches that act on a sample, and that freeze after a task, in each linear"}
    )
    rank: int = field(default=16, metadata={"help": "rank of A and of one branch (the paper's 128 is that of all 8)"})
    scale: float = field(default=2.0, metadata={"help": "factor on the increment: the paper's alpha / r, 256 / 128"})
    a_std: float = field(default=0.01, metadata={"help": "standard deviation of A at birth (B is born zero)"})
    targets: tuple[str, ...] = field(
        default=("self_attn.*_proj", "mlp.*_proj"),
        metadata={"help": "linears of each language layer that get increments; by default all"},
    )
    surrogate: str = field(
        default="text+image",
        metadata={
            "help": "what task keys are compared with: text+image (one key each), sentence or backbone (text alone), "
            "or the folder of a sentence-transformers model"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches < 1:
            raise ValueError(f"branches is {self.branches}; expected at least 1")
        if not 1 <= self.top_k <= self.branches:
            raise ValueError(
                f"top_k is {self.top_k}; expected 1 to {self.branches}, since each linear has {self.branches} branches"
            )


@register(BranchLoraConfig)
class BranchLora(Method):
    """Pool row j of a linear is its branch j. Beside them, each linear keeps ``router [T, N, d_in]``, one for each
    committed task, ``frozen [N]``, and ``activity [N]`` of the newest task."""

    by_first_token = True
    shares_A = True
    shared_rows = True
    config: BranchLoraConfig

    def __init__(self, config: BranchLoraConfig) -> None:
        super().__init__(config)
        self.step_gates: dict[Factors, Tensor] = {}  # [N] by linear: the sum over the step's samples
        self.step: int | None = None  # the pool's version while it is summed

    def open_task(self, pool: Pool, queries: Tensor | None, generator: torch.Generator) -> None:
        assert queries is not None
        self.step_gates.clear()
        N = self.config.branches
        keys = task_key(queries, groups=2 if self.config.surrogate == "text+image" else 1)
        pool.open_block(N, keys=keys, a_std=self.config.a_std, generator=generator)
        for factors in layers_of(pool):
            factors.keep("block_router", new_router(N, factors, generator))
            factors.keep("activity", torch.zeros(N, device=factors.A.device, dtype=torch.float32))

    def close_task(self, pool: Pool, name: str, queries: Tensor | None, groups: int) -> None:
        self.end_step(pool)
        learned: list[tuple[Factors, Tensor, Tensor]] = []
        for factors in layers_of(pool):
            assert factors.block_B is not None
            activity: Tensor = factors.activity
            most_active = activity.sort(descending=True, stable=True).indices[: self.config.top_k]
            router, frozen = factors.block_router.detach()[None], torch.zeros_like(activity, dtype=torch.bool)
            if pool.num_tasks:
                router, frozen = torch.cat([factors.router, router]), factors.frozen
                # weight decay moves what has no gradient, too
                factors.block_B.data[frozen] = factors.B[frozen].to(factors.block_B.dtype)
            learned.append((factors, router, frozen.index_fill(0, most_active, True)))
        pool.commit(name, torch.zeros(pool.block_rows))
        for factors, router, frozen in learned:
            factors.keep("router", router)
            factors.keep("frozen", frozen)

    def select(self, pool: Pool, query: Tensor | None, groups: int, training: bool) -> Selection | None:
        """The task ``[B, 1]`` whose routers will choose branches, in the place of the pairs that they choose."""
        assert query is not None
        if training and pool.block_rows:
            step = pool_version(pool)
            if self.step != step:
                self.end_step(pool)  # of a loop that does not say so
            self.step = step
            task = torch.full((len(query), 1), pool.num_tasks, device=query.device)
            return Selection(block=Pairs.ones(task))
        if not pool.num_tasks:
            return None
        task, weight, _ = ops.select(query, pool.keys, 1, groups=groups, check_values=False)
        return Selection(past=Pairs(task, weight), index=task, weight=weight)

    def route(self, selection: Selection, factors: Factors, x: Tensor) -> Selection:
        if selection.past is not None:
            return replace(selection, past=_remembered(selection, factors, x, self.config.top_k))
        first = _first(x, selection.first)
        router, frozen = factors.block_router, getattr(factors, "frozen", None)
        assert isinstance(router, Tensor)
        chosen = choose(first, router.expand(len(first), -1, -1), self.config.top_k)
        self._observe(factors, chosen, selection.present)
        if frozen is None:
            return replace(selection, block=chosen)
        fixed = frozen[chosen.index]  # [B, k]
        block, past = (Pairs(chosen.index, chosen.coefficient.masked_fill(off, 0.0)) for off in (fixed, ~fixed))
        return replace(selection, block=block, past=past)

    @torch.no_grad()
    def _observe(self, factors: Factors, chosen: Pairs, present: Tensor | None) -> None:
        """Sums gates; of layers that are recomputed twice, which leaves their shares as they are."""
        gates = chosen.coefficient.new_zeros(len(chosen.index), self.config.branches)  # [B, N]
        gates = gates.scatter_(1, chosen.index, chosen.coefficient).float()
        if present is not None:  # without the samples that fill up a batch
            gates *= present.unsqueeze(1).to(gates.device)
        before = self.step_gates.get(factors)
        self.step_gates[factors] = gates.sum(0) if before is None else before + gates.sum(0)

    @torch.no_grad()
    def end_step(self, pool: Pool) -> None:
        """Moves each linear's running mean of gates by that of the step's samples, on all processes together."""
        if not self.step_gates:
            return
        device = pool.row_task.device
        layers = [factors for factors in layers_of(pool) if factors in self.step_gates]
        gates = torch.stack([self.step_gates[factors].to(device) for factors in layers])  # [L, N]
        self.step_gates.clear()
        distributed.average(gates)
        samples = gates.sum(1, keepdim=True)  # the gates of one add up to 1
        weight = torch.where(samples > 0, 1 - MOMENTUM, 0.0)
        for factors, share, one in zip(layers, gates / samples.clamp(min=1e-6), weight, strict=True):
            factors.activity.lerp_(share.to(factors.activity.device), one.to(factors.activity.device))

    def own_tensors(self, shape: LinearShape | None, tasks: int, rows: int, block_rows: int) -> OwnTensors:
        if shape is None:
            return {}
        own: OwnTensors = {}
        if rows or block_rows:
            own["activity"] = [max(rows, block_rows)], torch.float32
        if rows:
            own["router"] = [tasks, rows, shape.d_in], torch.float32
            own["frozen"] = [rows], torch.bool
        if block_rows:
            own["block_router"] = [block_rows, shape.d_in], torch.float32
        return own


def task_key(queries: Tensor, groups: int) -> Tensor:
    """``[1, D]``: what minimises ``sum_i 1 - cos(key, e_i)`` over queries ``[n, D]``, in each of ``groups`` parts."""
    parts = F.normalize(queries.double().unflatten(1, (groups, -1)), dim=-1)  # [n, groups, D / groups]
    return F.normalize(parts.mean(0), dim=-1).flatten()[None].float()


def choose(first: Tensor, router: Tensor, top_k: int) -> Pairs:
    """The ``top_k`` branches of each sample and their gates, from first tokens ``[B, d_in]`` and each sample's router
    ``[B, N, d_in]``. Ties go to the lowest branch."""
    first = first if first.dtype == torch.float64 else first.float()
    logits = (first[:, None] * router).sum(-1)  # [B, N]; no matmul, which autocast would round
    best, index = logits.sort(dim=-1, descending=True, stable=True)
    return Pairs(index[:, :top_k], best[:, :top_k].softmax(-1))


def _remembered(selection: Selection, factors: Factors, x: Tensor, top_k: int) -> Pairs:
    """What the tasks' routers choose for a prompt, and go on with for the tokens behind it."""
    assert selection.past is not None
    memory = {} if selection.memory is None else selection.memory
    chosen = memory.get(factors)
    if chosen is None:
        router: Tensor = factors.router  # type: ignore[assignment]
        task = selection.past.index[:, 0].to(router.device)
        tokens, complete = _beginning(selection, factors, x)
        chosen = choose(tokens.to(task.device), router[task], top_k)
        if complete:
            memory[factors] = chosen.map(Tensor.detach)
    return chosen.map(lambda tensor: _for_beams(tensor, len(x)))


def _beginning(selection: Selection, factors: Factors, x: Tensor) -> tuple[Tensor, bool]:
    """First tokens ``[B, d_in]``, and whether all have come: a long prompt comes in parts, and some of a batch begin
    behind padding. Those that have not are any, since what acts on padding does not matter."""
    if selection.begun is None:
        return _first(x, selection.first), True
    known, first = selection.begun.get(factors), selection.first
    if known is not None and selection.last < known.seen:
        return _for_beams(known.tokens, len(x)), True
    seen = 0 if known is None else known.seen
    tokens = _first(x, None if first is None else first - seen)
    if known is not None and first is not None:
        here = (first >= seen).to(x.device)[:, None]  # [B, 1]
        tokens = torch.where(here, tokens, _for_beams(known.tokens, len(x)).to(x.device))
    selection.begun[factors] = Begun(tokens.detach(), seen + x.shape[1])
    return tokens, selection.last < seen + x.shape[1]


def _for_beams(tensor: Tensor, batch: int) -> Tensor:
    """Rows ``[B, ...]`` for beams that were added since: ``[batch, ...]``."""
    times = batch // len(tensor)
    return tensor if times == 1 else tensor.repeat_interleave(times, 0)


def _first(x: Tensor, first: Tensor | None) -> Tensor:  # [B, S, d_in] -> [B, d_in]
    if first is None:
        return x[:, 0]
    return x[torch.arange(len(x), device=x.device), first.to(x.device).clamp(0, x.shape[1] - 1)]
