"""``cllava-fast ask RUN QUESTION``: an answer, and which rows of the pool it came from."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from functools import partial
from typing import Any

EXAMPLE = """examples:
  cllava-fast ask runs/mine --image chart.png "which bar is the tallest?"
  cllava-fast ask runs/mine --after charts --quiet "what is two plus two?"

similarity: of the question to the row's key (with DIKI, to the mean of its task's questions). weight: how strongly the
row answers, in all 100 %. context: the share of what the row brings that comes from the rows of earlier tasks.
strength, where calibration or DIKI holds some back: how much of all this acts; at 0 % the frozen model answers."""


@dataclass(frozen=True)
class Row:
    """One row of the pool that answered. ``weight``, ``context`` and ``strength`` are shares in 0..1."""

    task: str
    number: int  # in the pool, as in a run's predictions
    similarity: float
    weight: float
    context: float
    strength: float  # the same for all rows of a question


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="folder of a run, or of saved increments")
    parser.add_argument("question")
    parser.add_argument("--image", metavar="FILE", help="the picture that is asked about")
    parser.add_argument("--task", help="the question's task, for a method that must be told it")
    parser.add_argument("--after", metavar="TASK", help="as the model was after this task (default: after the last)")
    parser.add_argument("--model", metavar="PATH", help="folder or hub name of the base (default: what RUN names)")
    parser.add_argument("--chat-template", metavar="FILE", help="of increments that were learned with one of your own "
                        "(Jinja; a run knows its own)")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="of the answer (default: as in training)")
    parser.add_argument("--quiet", action="store_true", help="print the answer alone")


def run(arguments: argparse.Namespace) -> int:
    from cllava_fast.cli.running import answer_tokens, check_positive, open_run
    from cllava_fast.data.encode import Collator, Encoder
    from cllava_fast.data.lengths import check_lengths, count_tokens, token_limit
    from cllava_fast.data.stream import Sample, check_sample
    from cllava_fast.evaluate.predict import predict
    from cllava_fast.untrusted import printable

    check_positive(arguments, "max_new_tokens")
    tokens = arguments.max_new_tokens or answer_tokens(arguments.run_dir)
    if not arguments.question.replace("<image>", "").strip():
        raise ValueError("the question is blank; expected a text, and a picture as --image FILE")
    if arguments.image is not None and not os.path.isfile(arguments.image):
        raise FileNotFoundError(f"--image is {arguments.image!r}, which is no file; expected a picture")
    sample = Sample(arguments.question, "", arguments.image, id="the question")
    check_sample(sample, "the question", needs_answer=False)
    sample.open_image()  # refused now, not behind the weights
    model, processor = open_run(arguments.run_dir, arguments.after, arguments.model, arguments.chat_template)
    encoder = Encoder(processor)
    examples = encoder.encode([sample])
    limit = token_limit(encoder.tokenizer, model.config)
    check_lengths(count_tokens(examples, encoder.tokenizer), [sample], limit, "ask", answers=False)
    collate = Collator(encoder, None, training=False)
    query = _told(model, arguments.task)
    (answer,) = predict(model, examples, query, collate, batch_size=1, max_new_tokens=tokens)
    print(printable(answer.text))
    if not arguments.quiet:
        rows = explain(model, collate(examples))
        _print(rows, f"({model.increments.config.method} {_why_no_rows(model.increments.method)})")
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
        given = "missing" if task is None else repr(task)
        raise ValueError(f"--task is {given}; {method} must be told the question's task, one of {', '.join(learned)}")
    return increments.task_query([task])


def explain(model: Any, batch: dict[str, Any]) -> list[Row]:
    """The rows that a patched model selects for the one sample of ``batch``, the strongest first, by the same reading.

    Empty for a method that does not select by the question, or before anything is learned.
    """
    import torch
    from torch.nn.functional import cosine_similarity

    from cllava_fast.model import get_increments
    from cllava_fast.model.images import pooled_image
    from cllava_fast.model.selecting import Request, images_of, query_of

    increments = get_increments(model)
    pool = increments.pool
    if increments.surrogate is None:
        return []
    request = Request(
        batch=1,
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=batch.get("pixel_values"),
        image_grid_thw=batch.get("image_grid_thw"),
    )
    with torch.no_grad():
        images = images_of(increments, request, partial(pooled_image, model))
        query = query_of(increments, request, images).to(pool.keys.device)
        selection = increments.select_by_query(query)
    if selection is None or selection.index is None or selection.weight is None:
        return []
    index, weight = selection.index[0], selection.weight[0]  # [M] each
    q, keys = (vectors.unflatten(1, (increments.groups, -1)) for vectors in (query, pool.keys[index]))
    similarity = cosine_similarity(q, keys, dim=2).mean(1)  # [M]
    strength = 1.0 if selection.strength is None else selection.strength.item()
    # tasks that share rows are selected themselves
    tasks, rows = list(range(pool.num_tasks)) if pool.shared_rows else pool.row_task.tolist(), []
    for n, w, s in zip(index.tolist(), weight.tolist(), similarity.tolist(), strict=True):
        task = tasks[n]
        # every selected row brings w[task, l] * z[n] of the rows n of each earlier task l, beside its own 1
        brought = (pool.context[task][pool.row_task] * pool.row_mean)[: tasks.index(task)].abs().sum().item()
        rows.append(Row(pool.task_names[task], n, s, w, brought / (1.0 + brought), strength))
    return sorted(rows, key=lambda row: -row.weight)


def _why_no_rows(method: Any) -> str:
    if method.uses_task:
        return "was told the task"
    if method.uses_query:
        return "has learned nothing yet: the frozen model answers"
    if method.routes:
        return "selects no rows by the question: each linear weighs its increments anew for every token"
    return "selects nothing: the same increments answer every question"


def _print(rows: list[Row], otherwise: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from cllava_fast.untrusted import printable

    if not rows:
        print(otherwise)
        return
    held_back = ["strength"] * (rows[0].strength < 1.0)
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("task", overflow="fold", min_width=5)  # which makes room for the numbers in a narrow terminal
    for name in ("row", "similarity", "weight", "context", *held_back):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        numbers = [f"{row.similarity:.3f}", f"{row.weight:.1%}", f"{row.context:.1%}"]
        numbers += [f"{row.strength:.1%}"] * len(held_back)
        shown.add_row(escape(printable(row.task)), str(row.number), *numbers)
    Console().print("", shown)
