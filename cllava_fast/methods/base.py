"""What a method is: a policy that decides which rows act on a sample, and how strongly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cllava_fast.pool import Pool


@dataclass(frozen=True)
class Pairs:
    """Rows and how strongly they act: ``index [B, P]`` int64, ``coefficient [B, P]`` float32.

    ``mix=True`` sums the factors first and multiplies once, ``(sum c B)^T (sum c A)``, instead of ``sum c B^T A``.
    """

    index: Tensor
    coefficient: Tensor

    def map(self, function: Any) -> Pairs:
        return Pairs(function(self.index), function(self.coefficient))


@dataclass(frozen=True)
class Selection:
    """What acts on each sample of a batch.

    Attributes:
        block: pairs over the open block's rows, which train; None if none acts.
        past: pairs over the committed rows, which get no factor gradient; None if none acts.
        context: ``[B, C]`` float32, coefficients of the first C committed rows, which all act on every sample; None if
            none acts.
        means: the columns of ``context`` stand for the first C tasks' shortened mean increments instead.
        index, weight: ``[B, M]`` the rows that were selected (committed row numbers at inference) and their weights,
            for reports; None for methods that do not select.
        mix: sum the factors before multiplying them (``context="factor"``).
    """

    block: Pairs | None = None
    past: Pairs | None = None
    context: Tensor | None = None
    index: Tensor | None = None
    weight: Tensor | None = None
    mix: bool = False
    means: bool = False

    @property
    def batch_size(self) -> int:
        pairs = self.block or self.past
        assert pairs is not None
        return pairs.index.shape[0]

    def expand(self, batch: int) -> Selection:
        """Repeats every sample for its beams or returned sequences: ``[B, ...]`` to ``[batch, ...]``."""
        size = self.batch_size
        if batch == size:
            return self
        if size == 0 or batch % size:
            raise ValueError(f"the batch holds {batch} samples; instructions were selected for {size}: give one each")
        times = batch // size

        def repeat(tensor: Tensor) -> Tensor:
            return tensor.repeat_interleave(times, dim=0)

        return replace(
            self,
            block=self.block and self.block.map(repeat),
            past=self.past and self.past.map(repeat),
            context=None if self.context is None else repeat(self.context),
            index=None if self.index is None else repeat(self.index),
            weight=None if self.weight is None else repeat(self.weight),
        )


@dataclass(frozen=True)
class MethodConfig:
    """What every method decides; see the methods' own configs."""

    method: ClassVar[str]

    rank: int
    scale: float
    a_std: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        # JSON has lists only
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected at least 1")
        if not self.targets:
            raise ValueError("targets is empty; name at least one linear, such as 'self_attn.o_proj'")

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, **asdict(self)}


class Method(ABC):
    """A coefficient policy and the life-cycle of its rows. One object serves one patched model.

    The loop calls, for every task: ``open_task``, alignment if ``aligns_keys``, tuning, ``close_task``.
    """

    config: MethodConfig
    aligns_keys: ClassVar[bool] = False
    joint: ClassVar[bool] = False  # trained once on all tasks together
    uses_query: ClassVar[bool] = True

    @abstractmethod
    def open_task(self, pool: Pool, queries: Tensor | None, generator: torch.Generator) -> None:
        """Makes ready what the task will train. ``queries [n, D]`` are the task's training instructions."""

    @abstractmethod
    def close_task(self, pool: Pool, name: str, queries: Tensor | None, groups: int) -> None:
        """Called once the task is trained."""

    @abstractmethod
    def select(self, pool: Pool, query: Tensor | None, groups: int, training: bool) -> Selection | None:
        """What acts on the samples of ``query [B, D]``; None where nothing does (the frozen model answers alone)."""

    def task_mean(self, pool: Pool, task: int) -> Selection:
        """What acted on the training samples of a committed task, on average: one sample's selection."""
        raise ValueError(f"{self.config.method} keeps no mean of a task; name an instruction instead")
