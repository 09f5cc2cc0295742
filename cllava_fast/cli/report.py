"""``cllava-fast report RUN``."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "example: cllava-fast report runs/mine --output paper/figures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="RUN", help="folder that holds results.json")
    parser.add_argument("--output", help="folder to write it to (default: the same)")


def run(arguments: argparse.Namespace) -> int:
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
