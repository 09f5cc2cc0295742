"""The report of a run: results.json, matrix.csv, pictures, report.md, and a table for the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cllava_fast.atomic import write_file, write_text
from cllava_fast.evaluate.plots import plot_accuracy_matrices, plot_forgetting, title_of

METRICS = ("accuracy_matrix", "average_accuracy", "average_forgetting", "backward_transfer", "mean_average_accuracy",
           "selection_accuracy", "trainable_parameters", "seconds")  # fmt: skip

REPORT_FILES = ("results.json", "matrix.csv", "accuracy_matrix.png", "forgetting.png", "report.md")


def write_report(results: Mapping[str, Any], directory: str | os.PathLike[str]) -> None:
    """Writes results.json, matrix.csv, accuracy_matrix.png, forgetting.png and report.md, each whole or not at all."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    write_text(folder / "matrix.csv", _csv(results))
    write_file(folder / "accuracy_matrix.png", lambda path: plot_accuracy_matrices(results, path))
    write_file(folder / "forgetting.png", lambda path: plot_forgetting(results, path))
    write_text(folder / "report.md", _markdown(results))


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads ``results.json``. Raises ValueError where it is no results file, FileNotFoundError where there is none."""
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; give the folder of a finished run")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    for key in ("stream", "seeds", "methods", "environment"):
        if not isinstance(results, dict) or not results.get(key):
            raise ValueError(f"{file} has no {key!r}; expected what a run writes as results.json")
    size = len(results["stream"])
    for name, result in results["methods"].items():
        missing = [metric for metric in METRICS if metric not in result]
        if missing:
            raise ValueError(f"{file}: method {name!r} lacks {missing}")
        if [len(row) for row in result["accuracy_matrix"]] != [size] * size:
            raise ValueError(f"{file}: accuracy_matrix of {name!r} is not {size} x {size}")
    return results


def print_table(results: Mapping[str, Any], console: Any = None) -> None:
    """The brief table on the terminal; it fits into 80 columns for streams of four tasks."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    header, rows = table(results, brief=True)
    title = f"accuracy in % after the last task, {len(results['seeds'])} seed(s)"
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for position, name in enumerate(header):
        shown.add_column(name.replace(" ", "\n"), justify="left" if position == 0 else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    (console or Console()).print(shown)


def table(results: Mapping[str, Any], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows as texts; ``brief`` leaves out what few look for."""
    columns: list[tuple[str, bool, Callable[[Mapping[str, Any]], str]]] = [
        ("average", True, lambda result: _percent(result["average_accuracy"], _spread(result))),
        ("forgetting", True, lambda result: _percent(result["average_forgetting"])),
        ("BWT", False, lambda result: _percent(result["backward_transfer"])),
        ("MAA", False, lambda result: _percent(result["mean_average_accuracy"])),
        *[(task, True, _last_accuracy(position)) for position, task in enumerate(results["stream"])],
        ("right block", True, lambda result: _percent(result["selection_accuracy"])),
        ("trainable", False, lambda result: f"{result['trainable_parameters']:,.0f}"),
        ("seconds", True, lambda result: f"{result['seconds']:.0f}"),
    ]
    shown = [(name, value) for name, always, value in columns if always or not brief]
    header = ["method", *[name for name, _ in shown]]
    rows = [[title_of(name), *[value(result) for _, value in shown]] for name, result in results["methods"].items()]
    return header, rows


def _last_accuracy(position: int) -> Callable[[Mapping[str, Any]], str]:
    return lambda result: _percent(result["accuracy_matrix"][-1][position])


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
                        writer.writerow([name, seed, after, on, f"{value:.6f}"])
    return out.getvalue()


def markdown_table(results: Mapping[str, Any], brief: bool = False) -> str:
    header, rows = table(results, brief)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown(results: Mapping[str, Any]) -> str:
    config = dict(results.get("config", {}))
    split = config.get("split", "test")
    settings = json.dumps(config, indent=2)
    versions = "\n".join(f"| {key} | {value} |" for key, value in results["environment"].items() if value is not None)
    return f"""# Continual tuning: {" → ".join(results["stream"])}

{markdown_table(results)}

Accuracies in %, measured on the {split} split over {len(results["seeds"])} seed(s), by greedy generation and exact
match, without telling the model which task a question belongs to. *average*: over all tasks after the last one.
*forgetting*: best accuracy ever had on a task minus the last, mean over the earlier tasks. *BWT*: last accuracy minus
the one just after learning. *MAA*: mean over the steps of the average on the tasks seen so far. *right block*: share of
the selection weight that falls into the rows of the question's own task. *trainable*: parameters with a gradient at a
time. – was not measured, or has no meaning for the method. Hyperparameters were chosen on the validation split, never
on the test split.

![Accuracy on each task after each task](accuracy_matrix.png)

![Accuracy on each task as the stream goes on](forgetting.png)

## Settings

```json
{settings}
```

## Environment

| what | value |
| --- | --- |
{versions}
"""
