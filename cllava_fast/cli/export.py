"""``cllava-fast export RUN``."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """examples:
  cllava-fast export runs/mine --task charts --output charts-lora
  cllava-fast export runs/mine --instruction "which bar is the tallest?" --output tallest-lora

PEFT loads it: PeftModel.from_pretrained(base, "charts-lora"). One adapter acts on every question, so it holds one
selection: what acted on a task on average, or what one question selects."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="folder of a run, or of saved increments")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the adapter")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--task", help="the mean of what acted on this task's training samples")
    what.add_argument(
        "--instruction",
        metavar="TEXT",
        help="what this question selects, unless the method is told the task; neither for one that does not select",
    )
    parser.add_argument("--rank", type=int, metavar="N", help="at most this rank; the answer says what it costs")
    parser.add_argument("--after", metavar="TASK", help="as the model was after this task (default: after the last)")
    parser.add_argument("--model", metavar="PATH", help="folder or hub name of the base (default: what RUN names)")
    parser.add_argument("--chat-template", metavar="FILE", help="of increments that were learned with one of your own "
                        "(Jinja; a run knows its own)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    import cllava_fast as cf
    from cllava_fast.atomic import check_empty
    from cllava_fast.cli.running import check_positive, open_run
    from cllava_fast.untrusted import printable

    check_positive(arguments, "rank")
    check_empty(Path(arguments.output))  # before the model is loaded
    model, _ = open_run(arguments.run_dir, arguments.after, arguments.model, arguments.chat_template)
    method = model.increments.method
    if method.uses_query and not method.routes and arguments.task is None and arguments.instruction is None:
        wanted = "--task" if method.uses_task else "--task or --instruction"
        raise ValueError(f"{method.config.method} selects, and nothing says what; expected {wanted}")
    report = cf.export_peft(
        model, arguments.output, task=arguments.task, instruction=arguments.instruction, rank=arguments.rank
    )
    print(printable(str(report)))
    print(f"Load it: peft.PeftModel.from_pretrained(base, {arguments.output!r})")
    return 0
