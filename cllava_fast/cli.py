"""``cllava-fast demo | report | env``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import cllava_fast


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for a refused input, 130 for an interrupt."""
    arguments = parser().parse_args(argv)
    from cllava_fast.ops.dispatch import BackendError  # not above: --help need not wait for torch

    try:
        return arguments.run(arguments)
    except (ValueError, TypeError, OSError, FloatingPointError, ModuleNotFoundError, BackendError) as error:
        print(f"cllava-fast: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cllava-fast: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="cllava-fast", description=cllava_fast.__doc__)
    top.add_argument("--version", action="version", version=f"cllava_fast {cllava_fast.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="a tiny LLaVA learns four tasks one after another; writes a report")
    demo.add_argument("--output", default="runs/demo", help="folder for the report (default: %(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo in that folder")
    demo.add_argument("--seeds", type=int, default=1, help="how many seeds to average over (default: %(default)s)")
    demo.add_argument("--methods", nargs="+", metavar="NAME", help="some of the methods (default: all)")
    demo.add_argument(
        "--ambiguous", type=float, default=0.0, metavar="SHARE",
        help="share of two tasks' questions that are word for word the same (default: %(default)s)",
    )  # fmt: skip
    demo.add_argument(
        "--surrogate", default="sentence",
        help='what selects rows: "sentence", "backbone" or "text+image" (default: %(default)s)',
    )  # fmt: skip
    demo.add_argument("--context", default="product", help="product, factor or none (default: %(default)s)")
    demo.add_argument("--steps", type=int, default=300, help="tuning steps for each task (default: %(default)s)")
    demo.add_argument("--train", type=int, default=1200, help="training samples of each task (default: %(default)s)")
    demo.add_argument("--test", type=int, default=200, help="test samples of each task (default: %(default)s)")
    demo.add_argument(
        "--split", default="test", choices=("test", "validation"),
        help="what is measured; choose hyperparameters on validation (default: %(default)s)",
    )  # fmt: skip
    demo.set_defaults(run=_demo)

    report = commands.add_parser("report", help="draw the report of a finished run again and print its table")
    report.add_argument("directory", help="folder that holds results.json")
    report.add_argument("--output", help="folder to write it to (default: the same)")
    report.set_defaults(run=_report)

    env = commands.add_parser("env", help="versions, device, and which backend runs each op and why")
    env.set_defaults(run=_env)
    return top


def _demo(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from cllava_fast.demo.run import METHODS, DemoConfig, run_demo
    from cllava_fast.evaluate.report import print_table

    config = DemoConfig(
        output=arguments.output,
        seeds=arguments.seeds,
        methods=tuple(arguments.methods or METHODS),
        ambiguous=arguments.ambiguous,
        surrogate=arguments.surrogate,
        context=arguments.context,
        steps=arguments.steps,
        split=arguments.split,
        train=arguments.train,
        test=arguments.test,
        overwrite=arguments.overwrite,
    )
    logging.disable_progress_bar()  # ours tell more
    results = run_demo(config)
    print_table(results)
    print(f"\nReport: {config.output}/report.md   Pictures: accuracy_matrix.png, forgetting.png in the same folder")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from cllava_fast.atomic import check_replaceable
    from cllava_fast.evaluate.report import REPORT_FILES, load_results, print_table, write_report

    directory = Path(arguments.directory)
    results = load_results(directory / "results.json")
    output = Path(arguments.output or directory)
    if output.resolve() != directory.resolve():
        check_replaceable(output, REPORT_FILES, "a report")
    write_report(results, output)
    print_table(results)
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from cllava_fast.environment import environment
    from cllava_fast.ops import dispatch

    console = Console()
    versions = Table("what", "value", title="environment")
    for name, value in environment().items():
        versions.add_row(name, "none" if value is None else str(value))
    console.print(versions)
    ops: dict[tuple[str, bool, str], list[str]] = {}
    for row in dispatch.table():
        reason = "not in this installation" if row.reason.startswith("not registered") else row.reason
        ops.setdefault((row.backend, row.available, reason), []).append(row.op)
    backends = Table("backend", "runs here", "why", "ops", title="backends, the first that can run a call does")
    for name in dispatch.ORDER:
        for (backend, available, reason), names in ops.items():
            if backend == name:
                backends.add_row(name, "yes" if available else "no", reason, ", ".join(names))
    console.print(backends)
    return 0


if __name__ == "__main__":
    sys.exit(main())
