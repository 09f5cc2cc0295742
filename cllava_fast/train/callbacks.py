"""Callbacks of a run: transformers' own, and what a run of several tasks adds to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback


class ContinualCallback(TrainerCallback):
    """A ``transformers.TrainerCallback`` that is told of tasks and their stages, too.

    Its other hooks (``on_step_end``, ``on_log``, ...) belong to the stage ``"tune"``, which transformers' ``Trainer``
    runs. Like those, all are called on every process.

    In each hook ``task`` is the task's name (names joined by ``+`` where a method learns tasks together), ``number``
    its place, from 0, behind those that the model had learned before the run where its method counts them, and
    ``stage`` one of ``"align"``, ``"tune"``, ``"commit"``, ``"evaluate"``. ``metrics`` are: of the first two the last
    ``loss``; of ``"commit"`` the largest relative error of the shortened context, ``context_error``, where there is
    one; of ``"evaluate"`` the ``accuracy/<task>`` of every task of the stream seen so far, and of those to come with
    ``eval_unseen``; of the whole task all of these, as ``<stage>/<name>``.
    What is learned by then can be saved or measured behind ``"commit"``, and not while a task is being learned.
    """

    def on_task_begin(self, task: str, number: int, **kwargs: Any) -> None:
        """A task is about to be learned."""

    def on_stage_begin(self, task: str, number: int, stage: str, **kwargs: Any) -> None:
        """A stage begins."""

    def on_stage_end(self, task: str, number: int, stage: str, metrics: dict[str, float], **kwargs: Any) -> None:
        """A stage is done."""

    def on_task_end(self, task: str, number: int, metrics: dict[str, float], **kwargs: Any) -> None:
        """A task is learned, measured and saved."""


class TaskEvents:
    """Tells the callbacks of one task what happens in it."""

    def __init__(self, callbacks: Sequence[TrainerCallback], task: str, number: int) -> None:
        self._listeners = [callback for callback in callbacks if isinstance(callback, ContinualCallback)]
        self._where: dict[str, Any] = {"task": task, "number": number}
        self.metrics: dict[str, float] = {}

    def begin(self) -> None:
        for listener in self._listeners:
            listener.on_task_begin(**self._where)

    @contextmanager
    def stage(self, stage: str) -> Iterator[dict[str, float]]:
        """Yields the dictionary that receives the stage's metrics."""
        metrics: dict[str, float] = {}
        for listener in self._listeners:
            listener.on_stage_begin(stage=stage, **self._where)
        yield metrics
        self.metrics.update({f"{stage}/{name}": value for name, value in metrics.items()})
        for listener in self._listeners:
            listener.on_stage_end(stage=stage, metrics=dict(metrics), **self._where)

    def end(self) -> None:
        for listener in self._listeners:
            listener.on_task_end(metrics=dict(self.metrics), **self._where)
