"""What a run has measured, as ``run.json`` holds it and as it is returned."""

from __future__ import annotations

import json
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
    ``bad_numbers`` what was skipped, by task (``ContinualArguments.on_bad_numbers``). ``cut_off`` is for each task the
    share of the last answers that ``max_new_tokens`` cut off. See ``cllava_fast.evaluate.metrics`` for the others.
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
    cut_off: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        numbers = {
            "accuracy_matrix": self.accuracy_matrix,
            **metrics.summarize(self.accuracy_matrix),
            "selection_accuracy": self.selection_accuracy,
            "trainable_parameters": self.trainable_parameters,
            "seconds": self.seconds,
            "cut_off": self.cut_off or None,  # of a run that an earlier version measured
        }
        return numbers if self.selection is None else {**numbers, "selection": self.selection}

    @property
    def average_accuracy(self) -> float | None:
        return metrics.average_accuracy(self.accuracy_matrix)

    @property
    def average_forgetting(self) -> float | None:
        return metrics.average_forgetting(self.accuracy_matrix)


NOTHING_YET: dict[str, Any] = {
    "matrix": [], "unseen": [], "selection_accuracy": None, "selection": None, "examples": {}, "cut_off": {},
    "losses": {}, "seconds": 0.0, "seconds_of": {}, "parameters": 0, "files": {}, "bad_numbers": {}, "evaluated": [],
}  # fmt: skip


def keep_measured(progress: dict[str, Any], steps: int) -> None:
    """What was measured after the first ``steps`` tasks alone."""
    for name in ("matrix", "unseen", "evaluated"):
        progress[name] = progress[name][:steps]


def begin(saved: str | None, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a run goes on with: ``saved`` is what ``run.json`` says, None without; ``identity`` may be of other tasks to
    come."""
    before = {**identity, **NOTHING_YET, **json.loads(saved or "{}")}  # an earlier version's run.json lacks some
    then, now = _samples(before), _samples(identity)
    same = {name for name in now if now[name] == then.get(name)}
    of_tasks = {
        kind: [{name: value for name, value in step.items() if name in same} for step in before[kind]]
        for kind in ("unseen", "evaluated")
    }
    of_tasks["unseen"] += [{}] * (len(before["matrix"]) - len(of_tasks["unseen"]))
    return json.loads(json.dumps({**before, **identity, **of_tasks}))


def _samples(run: Mapping[str, Any]) -> dict[str, Any]:
    """Of each task of a run's identity what it is measured on, and by which metric."""
    tasks = zip(run["stream"], run["stream_sha256"], strict=True)
    return {name: (sha256, run["metrics"][name]) for name, (_, sha256) in tasks}


def result_of(progress: Mapping[str, Any], task_names: list[str], joint: bool) -> ContinualResult:
    """What ``run.json`` says of a run so far; ``joint``: its method learns all tasks at once."""
    return ContinualResult(
        task_names=task_names,
        accuracy_matrix=_square(progress, task_names, joint),
        selection_accuracy=progress["selection_accuracy"],
        trainable_parameters=progress["parameters"],
        seconds=progress["seconds"],
        losses=progress["losses"],
        examples=progress["examples"],
        selection=progress["selection"],
        bad_numbers=progress["bad_numbers"],
        seconds_of=progress["seconds_of"],
        cut_off=progress["cut_off"],
    )


def _square(progress: Mapping[str, Any], names: list[str], joint: bool) -> list[list[float | None]]:
    """T x T; None was not measured: tasks to come without ``eval_unseen``, steps to come, a joint method's earlier
    rows."""
    measured = [
        [*row, *(unseen.get(name) for name in names[len(row) :])]
        for row, unseen in zip(progress["matrix"], progress["unseen"], strict=True)
    ]
    missing: list[list[float | None]] = [[None] * len(names) for _ in range(len(names) - len(measured))]
    return missing + measured if joint else measured + missing
