"""What a method's selection does: how many rows a task's questions use, and how much two tasks share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

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
    totals = {task: sum(row) for task, row in weights.items()}
    if not totals or min(totals.values()) <= 0:
        return None
    shares = {task: [value / totals[task] for value in row] for task, row in weights.items()}
    tasks = list(shares)
    own = {task: [n for n, owner in enumerate(owners) if owner == task] for task in tasks}
    return {
        "tasks": tasks,
        "block_rows": [len(own[task]) for task in tasks],
        "rows_used": [sum(shares[task][n] > USED for n in own[task]) for task in tasks],
        "effective_rows": [math.exp(-sum(w * math.log(w) for w in shares[task] if w > 0)) for task in tasks],
        "block_weight": [[sum(shares[task][n] for n in own[other]) for other in tasks] for task in tasks],
        "overlap": [
            [sum(map(min, shares[task], shares[other])) if task != other else 1.0 for other in tasks] for task in tasks
        ],
    }


def reorder(study: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """The same study with the tasks in another order."""
    places = [study["tasks"].index(task) for task in tasks]
    lists = {name: [study[name][p] for p in places] for name in ("block_rows", "rows_used", "effective_rows")}
    squares = {name: [[study[name][p][q] for q in places] for p in places] for name in ("block_weight", "overlap")}
    return {"tasks": list(tasks), **lists, **squares}
