"""One task in a training loop of one's own, where ``ContinualTrainer`` does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cllava_fast.data.encode import Encoder, ImageFeatures
from cllava_fast.data.stream import Sample, check_name, check_sample
from cllava_fast.evaluate.predict import queries_of
from cllava_fast.model import get_increments
from cllava_fast.model.patching import check_not_merged
from cllava_fast.names import brief
from cllava_fast.train.align import align_keys
from cllava_fast.train.arguments import ContinualArguments
from cllava_fast.train.as_it_was import keeps_forward, same_mode
from cllava_fast.train.committed import CommittedRows


@contextmanager
def learning(
    model: Any, task: str, questions: Sequence[str] | Sequence[Sample] | Tensor | None = None, *, seed: int = 0
) -> Iterator[list[nn.Parameter]]:
    """Opens and aligns a task's rows, yields what trains, and commits it as ``task`` at the end of the block.

    Within, the model is in training mode, in which the new rows act; in evaluation mode they do not, where a task has
    rows of its own. If the block raises, what the task has learned is dropped. What accelerate wraps around the model's
    methods within the block (autocast, say) is taken off behind it.

    Args:
        model: a patched model.
        task: a name that it has not learned yet.
        questions: the training samples, or their instructions alone, or their queries ``[n, D]``; for methods that
            select by them. An instruction is the whole user turn, word for word as the prompts have it; a surrogate
            that looks at images needs the samples.
        seed: of the run; from it and the task's number those of the new rows and of alignment (three epochs) derive.

    Yields:
        The parameters: each task needs an optimizer of its own.

    Raises:
        ValueError, TypeError, FileNotFoundError: a sample that a ``Stream`` would refuse.
        ValueError: questions are missing, not what the method takes, or of a method that is told the task; the name
            is no text, or taken, where the method keeps names; a seed that no run takes; a selection is merged; a joint
            method has learned already.
        RuntimeError: a task is being learned already, or rows of an earlier task were changed.
    """
    increments = get_increments(model)
    pool, method = increments.pool, increments.method
    check_not_merged(increments)
    if increments.is_within_a_task:
        raise RuntimeError("a task is being learned already; learn one after another")
    check_name(task, "task")
    args = ContinualArguments(output_dir="nothing is written", seed=seed, progress=False)
    if task in pool.task_names:
        raise ValueError(f"task {task!r} is learned already; the model has learned {pool.task_names}")
    if method.joint and pool.block_rows:
        raise ValueError(f"{increments.config.method} learns all tasks at once, and has learned already")
    queries = _queries(model, questions)
    seed = args.seed * 10_000 + len(pool.task_names)  # a task's rows are not those that another was born with
    committed = CommittedRows(pool)
    try:
        with same_mode(model), keeps_forward(model):
            increments.open_task(queries, torch.Generator().manual_seed(seed))
            if method.aligns_keys and queries is not None:
                align_keys(pool, queries, increments.groups, args, seed, f"{task}: align", method.alignment_loss)
            pool.train_keys(False)
            model.train()
            yield [parameter for parameter in pool.parameters() if parameter.requires_grad]
            if not any(parameter.any() for name, parameter in pool.named_parameters() if name.endswith("block_B")):
                warnings.warn(
                    f"task {task!r} has learned nothing: every B is 0, as at birth; give an optimizer the parameters "
                    "that this task's `learning` yields",
                    stacklevel=3,
                )
            committed.check(task)
            increments.close_task(task, queries)
    except BaseException:
        increments.drop_task()
        raise


def _queries(model: Any, questions: Sequence[str] | Sequence[Sample] | Tensor | None) -> Tensor | None:
    increments = get_increments(model)
    method, surrogate = increments.config.method, increments.surrogate
    if increments.method.uses_task:
        raise ValueError(f"{method} is told the task of each sample, which ContinualTrainer does; use that")
    if surrogate is None:
        return None
    if isinstance(questions, Tensor):
        if questions.dim() != 2 or not len(questions) or questions.shape[1] != surrogate.dim:
            raise ValueError(f"questions is {list(questions.shape)}; expected queries [n, {surrogate.dim}]")
        return questions.float().cpu()
    given: list[Any] = [] if questions is None or isinstance(questions, str) else list(questions)
    if given and all(isinstance(question, Sample) for question in given):
        for position, sample in enumerate(given):
            check_sample(sample, f"questions[{position}]")
        features = ImageFeatures()
        if surrogate.uses_image:
            features.add(given, Encoder(increments.processor), model)
        return queries_of(model, given, features)
    if not given or not all(isinstance(question, str) for question in given):
        raise ValueError(
            f"questions is {brief(questions)}; {method} selects by them: give the training samples, or their "
            "instructions"
        )
    if surrogate.uses_image:
        raise ValueError(
            f"questions are texts, and surrogate {surrogate.name!r} looks at images, too; give the training samples, "
            f"or queries [n, {surrogate.dim}]"
        )
    if increments.reader:
        given = [increments.reader.canonical(text) for text in given]
    queries: Tensor = surrogate.query(given, batch_size=64)
    return queries
