"""One task in a training loop of one's own, where ``ContinualTrainer`` does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cllava_fast.model import get_increments
from cllava_fast.model.patching import check_not_merged
from cllava_fast.train.align import align_keys
from cllava_fast.train.arguments import ContinualArguments
from cllava_fast.train.as_it_was import same_mode
from cllava_fast.train.committed import CommittedRows


@contextmanager
def learning(
    model: Any, task: str, instructions: Sequence[str] | Tensor | None = None, *, seed: int = 0
) -> Iterator[list[nn.Parameter]]:
    """Opens and aligns a task's rows, yields what trains, and commits it as ``task`` at the end of the block.

    Within, the model is in training mode, in which the new rows act; with ``model.eval()`` only those of earlier tasks
    do. If the block raises, the model is left as it was before.

    Args:
        model: a patched model.
        task: a name that it has not learned yet.
        instructions: those of the training samples, or their queries ``[n, D]``; for methods that select by them.
        seed: of the new rows, and of alignment (three epochs; ``docs/method.md``).

    Yields:
        The parameters: each task needs an optimizer of its own.

    Raises:
        ValueError: instructions are missing, not what the method takes, or of a method that is told the task; the name
            is taken; a selection is merged.
        RuntimeError: a task is being learned already, or rows of an earlier task were changed.
    """
    increments = get_increments(model)
    pool, method = increments.pool, increments.method
    check_not_merged(increments)
    if increments.is_within_a_task:
        raise RuntimeError("a task is being learned already; learn one after another")
    if task in pool.task_names:
        raise ValueError(f"task {task!r} is learned already; the model has learned {pool.task_names}")
    queries = _queries(increments, instructions)
    committed = CommittedRows(pool)
    names, before = list(pool.task_names), None
    if pool.block_rows or pool.shared_rows:  # what earlier tasks learned changes, too
        before = {name: tensor.clone() for name, tensor in pool.state().items()}
    try:
        with same_mode(model):
            method.open_task(pool, queries, torch.Generator().manual_seed(seed))
            if method.aligns_keys and queries is not None:
                args = ContinualArguments(output_dir="nothing is written", progress=False)
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
        if before is None:
            pool.drop_block()
        else:
            pool.load_state(before, names)
        raise


def _queries(increments: Any, instructions: Sequence[str] | Tensor | None) -> Tensor | None:
    method = increments.config.method
    if increments.method.uses_task:
        raise ValueError(f"{method} is told the task of each sample, which ContinualTrainer does; use that")
    surrogate = increments.surrogate
    if surrogate is None:
        return None
    if isinstance(instructions, Tensor):
        if instructions.dim() != 2 or not len(instructions) or instructions.shape[1] != surrogate.dim:
            raise ValueError(f"instructions is {list(instructions.shape)}; expected queries [n, {surrogate.dim}]")
        return instructions.float().cpu()
    if instructions is None or isinstance(instructions, str) or not instructions:
        raise ValueError(f"instructions is {instructions!r}; {method} selects by them: give the training samples'")
    if surrogate.uses_image:
        raise ValueError(
            f"instructions are texts, and surrogate {surrogate.name!r} looks at images, too; give queries "
            f"[n, {surrogate.dim}]: model.increments.surrogate.query(texts, pooled vision features)"
        )
    texts = [increments.reader.canonical(text) for text in instructions] if increments.reader else list(instructions)
    queries: Tensor = surrogate.query(texts, batch_size=64)
    return queries
