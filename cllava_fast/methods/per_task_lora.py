"""One LoRA (arXiv 2106.09685) a task, and the task is told: an oracle, above every method that must find it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cllava_fast.methods.base import Pairs, Selection, register
from cllava_fast.methods.lora import LoraConfig, LoraForEachTask
from cllava_fast.ops import checks
from cllava_fast.pool import Pool


@dataclass(frozen=True)
class PerTaskLoraConfig(LoraConfig):
    """A LoRA of its own for each task; each field's help says what it is."""

    method: ClassVar[str] = "per_task_lora"
    title: ClassVar[str] = "LoRA per task (told the task)"


@register(PerTaskLoraConfig)
class PerTaskLora(LoraForEachTask):
    """The row of the task that is told. A number that no learned task has gets the frozen model."""

    uses_task = True

    def select(self, pool: Pool, query: Tensor | None, groups: int, training: bool) -> Selection | None:
        """``query [B, 1]`` holds task numbers. Raises ValueError for one that is not whole (on a GPU, where looking
        would wait for the device, it acts as an unknown task)."""
        assert query is not None
        if checks.can_read(query, cuda=False) and not torch.equal(query, query.round()):
            raise ValueError(f"query is {query.flatten().tolist()}; expected whole numbers, of tasks {pool.task_names}")
        if training and pool.block_rows:
            return Selection(block=_acting(query - pool.num_tasks, 1))  # the open task has the next number
        return Selection(past=_acting(query, pool.num_rows)) if pool.num_rows else None

    def task_mean(self, pool: Pool, task: int) -> Selection:
        """Exact: every sample of a task gets the same."""
        return Selection(past=_acting(torch.full((1, 1), task, device=pool.row_task.device), pool.num_rows))


def _acting(row: Tensor, rows: int) -> Pairs:
    """The row ``[B, 1]`` of each sample, coefficient 1; 0 where no row has that number."""
    index = row.long().clamp(0, rows - 1)
    return Pairs(index, (index == row).float())
