"""Metrics of continual learning, from an accuracy matrix.

``matrix[i][j]`` is the accuracy on task j after task i was learned, a fraction in 0..1; None was not measured (tasks to
come, unless that was asked for; all rows but the last of a model that was trained on all tasks at once). "Accuracy" is
whatever the task's metric measures, see ``scores``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from cllava_fast.evaluate.selection import reorder

Matrix = Sequence[Sequence[float | None]]


def average_accuracy(matrix: Matrix) -> float | None:
    """Mean accuracy over all tasks after the last one (Lopez-Paz & Ranzato 2017, ACC)."""
    return _mean(matrix[-1])


def average_forgetting(matrix: Matrix) -> float | None:
    """Mean over earlier tasks of the best accuracy before the last task minus the last one (Chaudhry et al. 2018).

    Negative where the last task helped. 0 for a stream of one task; None where earlier rows were not measured.
    """
    last = len(matrix) - 1
    drops: list[float | None] = []
    for task in range(last):
        best = _max(row[task] for row in matrix[task:last])
        drops.append(_minus(best, matrix[last][task]))
    return _mean(drops) if drops else 0.0


def backward_transfer(matrix: Matrix) -> float | None:
    """Mean over earlier tasks of the last accuracy minus the one just after learning (Lopez-Paz & Ranzato 2017)."""
    last = len(matrix) - 1
    gains = [_minus(matrix[last][task], matrix[task][task]) for task in range(last)]
    return _mean(gains) if gains else 0.0


def mean_average_accuracy(matrix: Matrix) -> float | None:
    """Mean over the steps of the mean accuracy on the tasks seen so far; None where a step was not measured."""
    return _mean([_mean(row[: step + 1]) for step, row in enumerate(matrix)])


def transfer(matrix: Matrix) -> float | None:
    """Mean over all tasks but the first of the mean accuracy on each before it was learned (Zheng et al. 2023, ZSCL).

    None for a stream of one task.
    """
    return _mean([_mean([row[task] for row in matrix[:task]]) for task in range(1, len(matrix))])


def learned_tasks(matrix: Matrix) -> int:
    """Number of tasks learned so far: the rows up to the last one that holds a measurement."""
    return max((step for step, row in enumerate(matrix, 1) if any(value is not None for value in row)), default=0)


def summarize(matrix: Matrix) -> dict[str, float | None]:
    """All metrics of a matrix by name; those of an unfinished run are over the tasks that it has learned so far."""
    functions = (average_accuracy, average_forgetting, backward_transfer, mean_average_accuracy, transfer)
    size = learned_tasks(matrix)
    learned = [row[:size] for row in matrix[:size]]
    return {function.__name__: function(learned) if learned else None for function in functions}


def mean_over_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of equally shaped (nested) numbers, entry by entry; None where any seed has None."""
    return {key: _mean_entry([result.get(key) for result in results]) for key in results[0]}


def mean_over_orders(
    runs: Sequence[Mapping[str, Any]], orders: Sequence[Sequence[str]], names: Sequence[str]
) -> dict[str, Any]:
    """Mean over runs that learned the same tasks in several orders.

    A run's ``"order"`` is a place in ``orders``, 0 without. In the mean, tasks stand in the order of ``names``, and row
    i of its accuracy matrix is what was measured after i + 1 tasks, whichever these were: None where not every run had
    learned the column's task by then. So its last row holds every task, and others few.
    """
    several = len(orders) > 1
    return mean_over_seeds([_by_name(run, orders[run.get("order", 0)], names, several) for run in runs])


def _by_name(run: Mapping[str, Any], order: Sequence[str], names: Sequence[str], several: bool) -> dict[str, Any]:
    places = [list(order).index(name) for name in names]
    values = {key: value for key, value in run.items() if key not in ("seed", "order", "train_samples")}
    values["accuracy_matrix"] = [
        [None if several and place > step else row[place] for place in places]
        for step, row in enumerate(run["accuracy_matrix"])
    ]
    if run.get("selection"):
        values["selection"] = reorder(run["selection"], names)
    return values


def runs_by_order(
    results: Mapping[str, Any], result: Mapping[str, Any]
) -> Iterator[tuple[list[str], Sequence[Mapping[str, Any]]]]:
    """A method's runs, for each order of the tasks: the order, and a run for each seed."""
    runs = result.get("per_seed", [])
    orders = results.get("orders") or [results["stream"]]
    for number, order in enumerate(orders):
        yield order, [run for run in runs if run.get("order", 0) == number]


MIN_PAIRS = 6  # below, no two-sided p value of a sign-flip test is under 0.05
RESAMPLES = 1 << 16


def paired_p_value(differences: Sequence[float]) -> float | None:
    """Two-sided p value of paired differences, by flipping their signs (Fisher 1935; Edgington 1969).

    Exact while there are at most ``RESAMPLES`` ways to sign them, otherwise of so many seeded draws. None below
    ``MIN_PAIRS``.
    """
    if len(differences) < MIN_PAIRS:
        return None
    from scipy.stats import permutation_test  # not above: it takes a second to import

    largest = max(map(abs, differences)) or 1.0

    def total(signed: np.ndarray, axis: int) -> np.ndarray:
        # rounded after the sum: sums that are equal but for floating point are ties. A power of two, so that none lies
        # halfway between two whole numbers
        return np.round(np.sum(signed, axis=axis) / largest * 2**30)

    test = permutation_test(
        (np.asarray(differences),), total, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES,
        batch=4096, rng=0,
    )  # fmt: skip
    return float(test.pvalue)


def _mean_entry(values: Sequence[Any]) -> Any:
    if any(value is None for value in values):
        return None
    if isinstance(values[0], Mapping):
        return mean_over_seeds(values)
    if isinstance(values[0], list):
        return [_mean_entry(entries) for entries in zip(*values, strict=True)]
    return values[0] if all(value == values[0] for value in values) else sum(values) / len(values)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _max(values: Any) -> float | None:
    known = list(values)
    return None if any(value is None for value in known) else max(known)


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
