"""``cllava-fast ask RUN QUESTION``: an answer, and which rows of the pool it came from."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

EXAMPLE = """examples:
  cllava-fast ask runs/mine --image chart.png "which bar is the tallest?"
  cllava-fast ask runs/mine --after charts --quiet "what is two plus two?"

similarity: of the question to the row's key. weight: how strongly the row answers, in all 100 %. context: the share of
what the row brings that comes from the rows of earlier tasks."""


@dataclass(frozen=True)
class Row:
    """One row of the pool that answered. ``weight`` and ``context`` are shares in 0..1."""

    task: str
    number: int  # in the pool, as in a run's predictions
    similarity: float
    weight: float
    context: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="folder of a run, or of saved increments")
    parser.add_argument("question")
    parser.add_argument("--image", metavar="FILE", help="the picture that is asked about")
    parser.add_argument("--task", help="the question's task, for a method that must be told it")
    parser.add_argument("--after", metavar="TASK", help="as the model was after this task (default: after the last)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of the answer (default: as in training)")
    parser.add_argument("--quiet", action="store_true", help="print the answer alone")


def run(arguments: argparse.Namespace) -> int:
    from cllava_fast.cli.running import answer_tokens, check_positive, open_run
    from cllava_fast.data.encode import Collator, Encoder
    from cllava_fast.data.stream import Sample, check_texts
    from cllava_fast.evaluate.predict import predict
    from cllava_fast.untrusted import printable

    check_positive(arguments, "max_new_tokens")
    tokens = arguments.max_new_tokens or answer_tokens(arguments.run_dir)
    if not arguments.question.strip():
        raise ValueError("the question is blank; expected a text")
    sample = Sample(arguments.question, "", arguments.image)
    check_texts(replace(sample, answer="-"), "the question")
    sample.open_image()  # refused now, not behind the weights
    model, processor = open_run(arguments.run_dir, arguments.after)
    encoder = Encoder(processor)
    examples = encoder.encode([sample])
    collate = Collator(encoder, None, training=False)
    query = _told(model, arguments.task)
    (answer,) = predict(model, examples, query, collate, batch_size=1, max_new_tokens=tokens)
    print(printable(answer))
    if not arguments.quiet:
        method = model.increments.config.method
        why = "was told the task" if query is not None else "selects nothing: the same increments answer every question"
        _print(explain(model, collate(examples), arguments.question), f"({method} {why})")
    return 0


def _told(model: Any, task: str | None) -> Any:
    """The query of a method that is told the task ``[1, 1]``; None for one that finds out by itself."""
    increments = model.increments
    learned, method = increments.pool.task_names, increments.config.method
    if not increments.method.uses_task:
        if task is not None:
            raise ValueError(f"--task is {task!r}, but {method} is told no task; leave it out")
        return None
    if task not in learned:
        raise ValueError(f"--task is {task!r}; {method} must be told the question's task, one of {', '.join(learned)}")
    return increments.task_query([task])


def explain(model: Any, batch: dict[str, Any], question: str) -> list[Row]:
    """The rows that a patched model selects for the one sample of ``batch``, the strongest first.

    Empty for a method that does not select, or before anything is learned.
    """
    import torch

    from cllava_fast import ops
    from cllava_fast.model import get_increments
    from cllava_fast.model.increments import Request
    from cllava_fast.model.patching import pooled_image

    increments = get_increments(model)
    pool = increments.pool
    if increments.surrogate is None or not pool.num_rows:
        return []
    request = Request(
        batch=1,
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=None,
        pixel_values=batch.get("pixel_values"),
        instructions=[question],
        query=None,
    )
    with torch.no_grad():
        query = increments.query(request, partial(pooled_image, model)).to(pool.keys.device)
        top_m: int = 1 if pool.shared_rows else increments.config.top_m  # type: ignore[attr-defined]
        index, weight, similarity = ops.select(query, pool.keys, top_m, groups=increments.groups)  # [1, M] each
    # tasks that share rows are selected themselves
    tasks, rows = list(range(pool.num_tasks)) if pool.shared_rows else pool.row_task.tolist(), []
    for n, w, s in zip(index[0].tolist(), weight[0].tolist(), similarity[0].tolist(), strict=True):
        task = tasks[n]
        # every selected row brings w[task, l] * z[n] of the rows n of each earlier task l, beside its own 1
        brought = (pool.context[task][pool.row_task] * pool.row_mean)[: tasks.index(task)].abs().sum().item()
        rows.append(Row(pool.task_names[task], n, s, w, brought / (1.0 + brought)))
    return sorted(rows, key=lambda row: -row.weight)


def _print(rows: list[Row], otherwise: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from cllava_fast.untrusted import printable

    if not rows:
        print(otherwise)
        return
    shown = Table("task", "row", "similarity", "weight", "context", box=box.SIMPLE_HEAD, show_edge=False)
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        numbers = f"{row.similarity:.3f}", f"{row.weight:.1%}", f"{row.context:.1%}"
        shown.add_row(escape(printable(row.task)), str(row.number), *numbers)
    Console().print("", shown)
