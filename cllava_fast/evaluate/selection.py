"""What a method's selection does: how many rows a task's questions use, and how much two tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

USED = 0.01  # share of a task's weight from which on a row counts as used

STUDY = ("block_rows", "rows_used", "effective_rows", "block_weight", "overlap")


def selection_study(weights: Mapping[str, Sequence[float]], owners: Sequence[str]) -> dict[str, Any] | None:
    """The study that ``results.json`` holds; None where a task's questions selected nothing.

    Args:
        weights: for each task the mean selection weight ``[N]`` of every committed row over the task's questions.
        owners: ``[N]``, the task that each row was learned for.

    Returns:
        Lists in the order of ``tasks``; a task's weights are scaled to sum to 1:

        - ``block_rows``: rows learned for the task.
        - ``rows_used``: how many of these get more than ``USED`` of its questions' weight.
        - ``effective_rows``: ``exp`` of the entropy of its questions' weights over all rows (Hill 1973): 1 where one
          row takes all, n where n rows share alike.
        - ``block_weight[t][u]``: share of task t's weight in the rows of task u; the diagonal is the right block.
        - ``overlap[t][u]``: weight that both tasks put on the same rows, ``sum_n min(w_t[n], w_u[n])``, 0..1.
    """
    if not weights:
        return None
    tasks = list(weights)
    weight = torch.tensor([list(weights[task]) for task in tasks], dtype=torch.float64)  # [T, N]
    totals = weight.sum(1, keepdim=True)
    if totals.min() <= 0:
        return None
    shares = weight / totals
    number = {task: t for t, task in enumerate(tasks)}
    owner = torch.tensor([number.get(task, -1) for task in owners])
    owns = owner == torch.arange(len(tasks)).unsqueeze(1)  # [T, N]
    return {
        "tasks": tasks,
        "block_rows": owns.sum(1).tolist(),
        "rows_used": ((shares > USED) & owns).sum(1).tolist(),
        "effective_rows": torch.special.entr(shares).sum(1).exp().tolist(),
        "block_weight": _rounded(shares @ owns.double().t()),
        "overlap": _rounded(1 - torch.cdist(shares, shares, p=1) / 2),  # min(a, b) is (a + b - |a - b|) / 2
    }


def _rounded(shares: Tensor) -> Any:
    """As lists of what can be told apart: a long stream has many."""
    return shares.round(decimals=6).tolist()


def reorder(study: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """The same study with the tasks in another order."""
    places = [study["tasks"].index(task) for task in tasks]
    lists = {name: [study[name][p] for p in places] for name in ("block_rows", "rows_used", "effective_rows")}
    squares = {name: [[study[name][p][q] for q in places] for p in places] for name in ("block_weight", "overlap")}
    return {"tasks": list(tasks), **lists, **squares}
