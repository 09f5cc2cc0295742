"""The report of a run: results.json, matrix.csv, pictures, report.md, report.html, and a table for the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cllava_fast.atomic import write_file, write_text
from cllava_fast.evaluate.metrics import learned_tasks
from cllava_fast.evaluate.page import html_page
from cllava_fast.evaluate.plots import plot_accuracy_matrices, plot_forgetting, plot_losses
from cllava_fast.evaluate.results import MAX_RESULTS_BYTES, check_results
from cllava_fast.evaluate.wording import explanations, finished, metric_title, only_exact, quantity, title_of
from cllava_fast.untrusted import parse_json, printable, read_file

RESULTS = "results.json"
PICTURES = {  # and what they show
    "accuracy_matrix.png": "{quantity} on each task after each task",
    "forgetting.png": "{quantity} on each task as the stream goes on",
    "losses.png": "Loss while each task is learned",
}
REPORT_FILES = (RESULTS, "matrix.csv", *PICTURES, "report.md", "report.html")


def write_report(results: Mapping[str, Any], directory: str | os.PathLike[str]) -> None:
    """Writes ``REPORT_FILES``, each whole or not at all; losses.png only where losses were logged."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESULTS, json.dumps(results, indent=2, allow_nan=False) + "\n")
    write_text(folder / "matrix.csv", _csv(results))
    write_file(folder / "accuracy_matrix.png", lambda path: plot_accuracy_matrices(results, path))
    write_file(folder / "forgetting.png", lambda path: plot_forgetting(results, path))
    if any(result.get("losses") for result in results["methods"].values()):
        write_file(folder / "losses.png", lambda path: plot_losses(results, path))
    else:
        (folder / "losses.png").unlink(missing_ok=True)
    what = quantity(results).capitalize()
    pictures = {name: text.format(quantity=what) for name, text in PICTURES.items() if (folder / name).is_file()}
    write_text(folder / "report.md", _markdown(results, pictures))
    images = {text: (folder / name).read_bytes() for name, text in pictures.items()}
    write_text(folder / "report.html", html_page(results, table(results), explanations(results), images))


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads ``results.json``. Raises ValueError where it is no results file, FileNotFoundError where there is none."""
    file = Path(path)
    if not os.path.exists(file):
        raise FileNotFoundError(f"{file} does not exist; give the folder of a run")
    results = parse_json(read_file(file, MAX_RESULTS_BYTES), str(file))
    check_results(results, str(file))
    return results


def print_table(results: Mapping[str, Any], console: Any = None) -> None:
    """The brief table on the terminal, a method a row where that fits, otherwise a task a row.

    80 columns hold streams of four tasks.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = console or Console()
    header, rows = table(results, brief=True)
    lines = [[name.replace(" ", "\n") for name in header]]
    lines += [row if row[0] != METRIC_ROW else [cell.replace(" ", "\n") for cell in row] for row in rows]
    widths = [max(len(part) for cell in column for part in cell.split("\n")) for column in zip(*lines, strict=True)]
    if sum(widths) + len(widths) > console.width:
        lines = [list(column) for column in zip(header, *rows, strict=True)]
    after = "after the last task" if finished(results) else "so far"
    title = f"{quantity(results)} in % {after}, {len(results['seeds'])} seed(s)"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for position, name in enumerate(lines[0]):
        shown.add_column(escape(printable(name)), justify="left" if position == 0 else "right", no_wrap=True)
    for line in lines[1:]:
        shown.add_row(*(escape(printable(cell)) for cell in line))
    console.print(shown)


METRIC_ROW = "metric"


def table(results: Mapping[str, Any], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows as texts; ``brief`` leaves out what few look for.

    The first row names each task's metric, unless all are exact match.
    """
    tasks = results["stream"]
    columns: list[tuple[str, bool, Callable[[Mapping[str, Any]], str]]] = [
        ("average", True, lambda result: _percent(result["average_accuracy"], _spread(result))),
        ("forgetting", True, lambda result: _percent(result["average_forgetting"])),
        ("BWT", False, lambda result: _percent(result["backward_transfer"])),
        ("MAA", False, lambda result: _percent(result["mean_average_accuracy"])),
        *[(task, True, _last_accuracy(position)) for position, task in enumerate(tasks)],
        ("right block", True, lambda result: _percent(result["selection_accuracy"])),
        ("trainable", False, lambda result: f"{result['trainable_parameters']:,.0f}"),
        ("seconds", True, lambda result: f"{result['seconds']:.0f}"),
    ]
    shown = [(name, value) for name, always, value in columns if always or not brief]
    header = ["method", *[name for name, _ in shown]]
    rows = [[title_of(name), *[value(result) for _, value in shown]] for name, result in results["methods"].items()]
    if not only_exact(results):
        first = 3 if brief else 5  # behind the method and the averages
        titles = [metric_title(results["metrics"][task]) for task in tasks]
        rows.insert(0, [METRIC_ROW, *[""] * (first - 1), *titles, *[""] * (len(header) - first - len(tasks))])
    return header, rows


def _last_accuracy(position: int) -> Callable[[Mapping[str, Any]], str]:
    def last(result: Mapping[str, Any]) -> str:
        rows = result["accuracy_matrix"][: learned_tasks(result["accuracy_matrix"])]
        return _percent(rows[-1][position] if rows else None)

    return last


def _spread(result: Mapping[str, Any]) -> float | None:
    """Standard deviation of the average accuracy over the seeds."""
    values = [seed["average_accuracy"] for seed in result.get("per_seed", [])]
    if len(values) < 2 or None in values:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _percent(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _csv(results: Mapping[str, Any]) -> str:
    """Long form, one measured number a line; ``seed`` is "mean" for the mean over all."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["method", "seed", "after_task", "on_task", "accuracy"])
    tasks = results["stream"]
    for name, result in results["methods"].items():
        seeds = zip(results["seeds"], result.get("per_seed", []), strict=False)
        for seed, values in [("mean", result), *seeds]:
            for after, row in zip(tasks, values["accuracy_matrix"], strict=True):
                for on, value in zip(tasks, row, strict=True):
                    if value is not None:
                        writer.writerow([*map(printable, (name, str(seed), after, on)), f"{value:.6f}"])
    return out.getvalue()


def markdown_table(results: Mapping[str, Any], brief: bool = False) -> str:
    header, rows = table(results, brief)
    lines = [[_md(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---", *["---:"] * (len(header) - 1)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _md(text: str) -> str:
    """A stranger's text as plain text within a line or a table cell."""
    return re.sub(r"([\\`*_{}\[\]<>|$~])", r"\\\1", printable(" ".join(text.split())))


def _markdown(results: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    settings = json.dumps(results.get("config", {}), indent=2)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", settings)), default=0))
    versions = "\n".join(
        f"| {_md(str(key))} | {_md(str(value))} |" for key, value in results["environment"].items() if value is not None
    )
    meaning = "\n".join(f"- *{name}*: {text}" if name else f"- {_md(text)}" for name, text in explanations(results))
    images = "\n\n".join(f"![{text}]({name})" for name, text in pictures.items())
    examples = "".join(_markdown_examples(_md(title_of(name)), result) for name, result in results["methods"].items())
    return f"""# Continual tuning: {" → ".join(map(_md, results["stream"]))}

{markdown_table(results)}

{meaning}

{images}
{examples}
## Settings

{fence}json
{settings}
{fence}

## Environment

| what | value |
| --- | --- |
{versions}
"""


def _markdown_examples(method: str, result: Mapping[str, Any]) -> str:
    rows = [
        [task, example["question"], " / ".join(example["answers"]), example["prediction"], f"{example['score']:.2f}"]
        for task, examples in result.get("examples", {}).items()
        for example in examples
    ]
    if not rows:
        return ""
    lines = ["| " + " | ".join(map(_md, row)) + " |" for row in rows]
    head = "| task | question | expected | predicted | score |\n| --- | --- | --- | --- | ---: |"
    return "\n".join(["", f"## Answers of {method} at the end", "", head, *lines, ""])
