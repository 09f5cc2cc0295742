"""``cllava-fast report RUN``, of one run or of several together."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """examples:
  cllava-fast report runs/mine --output paper/figures
  cllava-fast report runs/mine-seed0 runs/mine-seed1 runs/lora-seed0 runs/lora-seed1 --output paper/table
  cllava-fast report runs/mine rank16=runs/rank16 --output paper/ablation      # a method in two settings"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="[NAME=]RUN",
        help="folder that holds results.json; several of one name are its seeds and orders (default: the method's)",
    )  # fmt: skip
    parser.add_argument("--output", help="folder to write it to (default: that of a single run)")


def run(arguments: argparse.Namespace) -> int:
    from cllava_fast.atomic import check_replaceable
    from cllava_fast.evaluate.combine import Source, combine
    from cllava_fast.evaluate.report import REPORT_FILES, RESULTS, load_results, print_table, write_report

    sources = []
    for given in arguments.runs:
        name, is_named, folder = given.partition("=")
        if not is_named or Path(given).exists():
            name, folder = None, given
        sources.append(Source(folder, load_results(Path(folder) / RESULTS), name))
    is_single = len(sources) == 1 and sources[0].name is None
    if arguments.output is None and not is_single:
        raise ValueError("several runs, or one by another name, make a report of their own; give its --output")
    results = sources[0].results if is_single else combine(sources)
    output = Path(arguments.output or sources[0].where)
    if not is_single or output.resolve() != Path(sources[0].where).resolve():
        check_replaceable(output, REPORT_FILES, "a report")
    write_report(results, output)
    print_table(results)
    return 0
