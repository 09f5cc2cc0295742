"""``cllava-fast demo``."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace

MOST_JOBS = 8  # unless more are asked for: each takes about a GB
EXAMPLE = "example: cllava-fast demo --setting capability --seeds 3 --orders 3 --output runs/capability"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="runs/demo", help="folder for the report (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo in that folder")
    parser.add_argument(
        "--setting", default="domain", choices=("domain", "capability", "dataset"),
        help="what changes from task to task (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to average over (default: %(default)s)")
    parser.add_argument(
        "--orders", type=int, default=1, metavar="K",
        help="how many orders of the tasks to average over, each with every seed (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME",
        help="which methods, or all (default: the yardsticks and Continual LLaVA)",
    )  # fmt: skip
    parser.add_argument(
        "--ambiguous", type=float, default=0.0, metavar="SHARE",
        help="share of two tasks' questions that are word for word the same (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--surrogate", default="sentence",
        help='what selects rows: "sentence", "backbone" or "text+image" (default: %(default)s)',
    )  # fmt: skip
    parser.add_argument("--context", default="product", help="product, factor or none (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="tuning steps for each task (default: %(default)s)")
    parser.add_argument("--train", type=int, default=1200, help="training samples of each task (default: %(default)s)")
    parser.add_argument("--test", type=int, default=200, help="test samples of each task (default: %(default)s)")
    parser.add_argument(
        "--split", default="test", choices=("test", "validation"),
        help="what is measured; choose hyperparameters on validation (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, metavar="N",
        help=f"runs at the same time, each in a process of its own (default: one for each CPU core, up to {MOST_JOBS}; "
        "one on a GPU)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    import torch
    from transformers.utils import logging

    from cllava_fast.demo.run import DemoConfig, run_demo
    from cllava_fast.evaluate.report import print_table

    given = {name: value for name, value in vars(arguments).items() if value is not None}
    config = DemoConfig(**{field.name: given[field.name] for field in fields(DemoConfig) if field.name in given})
    if arguments.jobs is None and not torch.cuda.is_available():
        runs = config.seeds * config.orders * len(config.methods)
        config = replace(config, jobs=min(torch.get_num_threads(), runs, MOST_JOBS))
    logging.disable_progress_bar()  # ours tell more
    results = run_demo(config)
    print_table(results)
    print(f"\nReport: {config.output}/report.html, or report.md and its pictures in the same folder")
    return 0
