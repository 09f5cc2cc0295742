"""What a run measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cllava_fast.evaluate import metrics


@dataclass
class ContinualResult:
    """What a run measured; fractions in 0..1, ``matrix[i][j]`` = accuracy on task j after task i (None: not measured).

    ``selection_accuracy`` is the share of selection weight that falls into the right task's block at the end, over
    the evaluation samples; None for methods that do not select. ``examples`` are a few answers to each task's samples,
    right and wrong ones. ``seconds_of`` says how many of the ``seconds`` went into each task's ``learning``, and into
    ``evaluation`` behind it. ``selection`` says which rows the tasks use, see ``cllava_fast.evaluate.selection``, and
    ``bad_numbers`` what was skipped, by task (``ContinualArguments.on_bad_numbers``). See
    ``cllava_fast.evaluate.metrics`` for the others.
    """

    task_names: list[str]
    accuracy_matrix: list[list[float | None]]
    selection_accuracy: float | None
    trainable_parameters: int | None
    seconds: float
    losses: dict[str, list[float]] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False)  # pictures
    selection: dict[str, Any] | None = field(default=None, repr=False)
    bad_numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds_of: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        numbers = {
            "accuracy_matrix": self.accuracy_matrix,
            **metrics.summarize(self.accuracy_matrix),
            "selection_accuracy": self.selection_accuracy,
            "trainable_parameters": self.trainable_parameters,
            "seconds": self.seconds,
        }
        return numbers if self.selection is None else {**numbers, "selection": self.selection}

    @property
    def average_accuracy(self) -> float | None:
        return metrics.average_accuracy(self.accuracy_matrix)

    @property
    def average_forgetting(self) -> float | None:
        return metrics.average_forgetting(self.accuracy_matrix)


def result_of(progress: Mapping[str, Any], task_names: list[str], joint: bool) -> ContinualResult:
    """What ``run.json`` says of a run so far; ``joint``: its method learns all tasks at once."""
    return ContinualResult(
        task_names=task_names,
        accuracy_matrix=_square(progress["matrix"], len(task_names), joint),
        selection_accuracy=progress["selection_accuracy"],
        trainable_parameters=progress["parameters"],
        seconds=progress["seconds"],
        losses=progress["losses"],
        examples=progress["examples"],
        selection=progress["selection"],
        bad_numbers=progress["bad_numbers"],
        seconds_of=progress["seconds_of"],
    )


def _square(rows: list[list[float]], size: int, joint: bool) -> list[list[float | None]]:
    """T x T; None was not measured: tasks that were not seen yet, steps to come, a joint method's earlier rows."""
    measured = [[*row, *[None] * (size - len(row))] for row in rows]
    missing: list[list[float | None]] = [[None] * size for _ in range(size - len(rows))]
    return missing + measured if joint else measured + missing
