"""``cllava-fast export RUN``."""

from __future__ import annotations

import argparse

EXAMPLE = """examples:
  cllava-fast export runs/mine --task charts --output charts-lora
  cllava-fast export runs/mine --instruction "which bar is the tallest?" --output tallest-lora

PEFT loads it: PeftModel.from_pretrained(base, "charts-lora"). One adapter acts on every question, so it holds one
selection: what acted on a task on average, or what one question selects."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", help="folder of a run")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the adapter")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", help="the mean of what acted on this task")
    what.add_argument("--instruction", metavar="TEXT", help="what this question selects")
    parser.add_argument("--after", metavar="TASK", help="as the model was after this task (default: after the last)")


def run(arguments: argparse.Namespace) -> int:
    import cllava_fast as cf
    from cllava_fast.cli.running import open_run

    model, _, _ = open_run(arguments.run_dir, arguments.after)
    cf.export_peft(model, arguments.output, task=arguments.task, instruction=arguments.instruction)
    print(f"{arguments.output} is written. Load it: PeftModel.from_pretrained(base, {arguments.output!r})")
    return 0
