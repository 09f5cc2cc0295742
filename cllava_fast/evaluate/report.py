"""The report of a run: results.json, matrix.csv, pictures, report.md, report.html, and a table for the terminal."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cllava_fast.atomic import DamagedError, make_folder, save_errors, write_file, write_text
from cllava_fast.evaluate.metrics import learned_tasks, mean_over_seeds, paired_p_value, runs_by_order
from cllava_fast.evaluate.page import html_page
from cllava_fast.evaluate.plots import plot_accuracy_matrices, plot_forgetting, plot_losses, plot_selection
from cllava_fast.evaluate.results import MAX_RESULTS_BYTES, check_results, results_json
from cllava_fast.evaluate.wording import (
    P_VALUE,
    cut_off,
    cuts_off,
    explanations,
    headline,
    learned,
    measures_base,
    measures_transfer,
    metric_title,
    only_exact,
    over_runs,
    quantity,
    selection_explanations,
    title_of,
    yardstick,
)
from cllava_fast.untrusted import parse_json, printable, read_file

RESULTS = "results.json"
PICTURES = {  # and what they show
    "accuracy_matrix.png": "{quantity} on each task after each task{order}",
    "forgetting.png": "{quantity} on each task as the stream goes on",
    "selection.png": "Selection weight of each task's questions by block, and what two tasks put on the same rows",
    "losses.png": "Loss while each task is learned{order}",
}
REPORT_FILES = (RESULTS, "matrix.csv", *PICTURES, "report.md", "report.html")


def write_report(results: Mapping[str, Any], directory: str | os.PathLike[str]) -> None:
    """Writes ``REPORT_FILES``, each whole or not at all: losses.png only where losses were logged, selection.png only
    where rows were selected.

    Args:
        results: what ``load_results`` reads.
        directory: is made; what it holds of an earlier report is replaced.

    Raises:
        ValueError: they are no results, or of more tasks or methods than pictures have room for.
        SaveError: there is no space or no permission.
    """
    check_results(results, "results")
    folder = Path(directory)
    with save_errors(folder):
        make_folder(folder)
    write_text(folder / RESULTS, results_json(results))
    write_text(folder / "matrix.csv", _csv(results))
    write_file(folder / "accuracy_matrix.png", lambda path: plot_accuracy_matrices(results, path))
    write_file(folder / "forgetting.png", lambda path: plot_forgetting(results, path))
    methods = results["methods"].values()
    logged = any(any((result.get("losses") or {}).values()) for result in methods)
    selected = any(result.get("selection") for result in methods)
    for kind, draw, wanted in (("losses", plot_losses, logged), ("selection", plot_selection, selected)):
        if wanted:
            write_file(folder / f"{kind}.png", functools.partial(draw, results))
        else:
            (folder / f"{kind}.png").unlink(missing_ok=True)
    words = {"quantity": quantity(results).capitalize(), "order": " (first order)" if results.get("orders") else ""}
    pictures = {name: text.format(**words) for name, text in PICTURES.items() if (folder / name).is_file()}
    write_text(folder / "report.md", _markdown(results, pictures))
    images = {text: (folder / name).read_bytes() for name, text in pictures.items()}
    page = html_page(results, table(results), explanations(results), images, selection_table(results))
    write_text(folder / "report.html", page)


def load_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads ``results.json``, for ``write_report``.

    Args:
        path: the file, or the folder of a run, an evaluation or a report, which holds one.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it was cut off.
        ValueError: it is no results file.
    """
    file = Path(path)
    if file.is_dir():
        file = file / RESULTS
    if not os.path.exists(file):
        from cllava_fast.train.runfile import RUN  # not above: runs write reports

        if (file.parent / RUN).is_file():
            raise no_task_yet(file.parent)
        raise FileNotFoundError(f"{file} does not exist; give the folder of a run")
    data = read_file(file, MAX_RESULTS_BYTES)
    try:
        results = parse_json(data, str(file))
    except ValueError as error:
        raise DamagedError(f"{error}; was it changed since it was saved?") from error
    check_results(results, str(file))
    return results


def no_task_yet(run: Path) -> FileNotFoundError:
    """What there is to say of a run's folder that holds neither results nor increments."""
    return FileNotFoundError(f"{run} has finished no task yet; cllava-fast train ... --resume goes on")


def print_table(results: Mapping[str, Any], console: Any = None) -> None:
    """The brief table on the terminal, a method a row where that fits or there are more methods than columns, otherwise
    a task a row.

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
    if _width(lines) > console.width and len(rows) < len(header):
        turned = [list(column) for column in zip(header, *rows, strict=True)]
        narrow = [[name.replace(" ", "\n") for name in turned[0]], *turned[1:]]
        lines = turned if _width(turned) <= console.width else min(narrow, lines, key=_width)
    count, tasks = learned(results)
    after = "after the last task" if count == tasks else f"after {count} of {tasks} tasks"
    split = results.get("config", {}).get("split", "test")
    where = "" if split == "test" else f" on the {escape(printable(split))} split"
    title = f"{quantity(results)} in %{where} {after}, {over_runs(results)}"
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    for position, name in enumerate(lines[0]):
        shown.add_column(escape(printable(name)), justify="left" if position == 0 else "right", no_wrap=True)
    for line in lines[1:]:
        shown.add_row(*(escape(printable(cell)) for cell in line))
    console.width = max(console.width, _width(lines))  # a number that is cut off would be another number
    console.print(title, style="italic", highlight=False)  # of a Table it would be as narrow as that
    console.print(shown)


def _width(lines: Sequence[Sequence[str]]) -> int:
    """Characters of a table's longest line; a cell may have several lines."""
    parts = [max(len(part) for cell in column for part in cell.split("\n")) for column in zip(*lines, strict=True)]
    return sum(parts) + len(parts)


METRIC_ROW = "metric"
Column = tuple[str, bool, Callable[[Mapping[str, Any]], str]]  # its name, whether it is always shown, a method's cell


def table(results: Mapping[str, Any], brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows as texts; ``brief`` leaves out what few look for.

    The first row names each task's metric, unless all are exact match.
    """
    tasks, compared_with = results["stream"], yardstick(results)
    significance = functools.partial(_significance, results["methods"].get(compared_with))
    averages: list[Column] = [
        ("average", True, _summary("average_accuracy", spread=True)),
        *([] if compared_with is None else [(P_VALUE, False, significance)]),
        ("forgetting", True, _summary("average_forgetting", spread=not brief)),
        ("BWT", False, _summary("backward_transfer", spread=True)),
        ("MAA", False, _summary("mean_average_accuracy", spread=True)),
        *([("transfer", True, _summary("transfer", spread=not brief))] if measures_transfer(results) else []),
    ]
    columns: list[Column] = [
        *averages,
        *[(task, True, _last_accuracy(position)) for position, task in enumerate(tasks)],
        ("right block", True, lambda result: _percent(result["selection_accuracy"])),
        *([("base kept", True, lambda result: _percent(result.get("base_kept")))] if measures_base(results) else []),
        *([("cut off", False, lambda result: _percent(cut_off(result)))] if cuts_off(results) else []),
        ("trainable", False, _trainable),
        ("seconds", True, lambda result: f"{result['seconds']:.0f}"),
    ]
    shown = [(name, value) for name, always, value in columns if always or not brief]
    header = ["method", *[name for name, _ in shown]]
    rows = [[title_of(name), *[value(result) for _, value in shown]] for name, result in results["methods"].items()]
    if not only_exact(results):
        first = 1 + sum(always or not brief for _, always, _ in averages)  # behind the method and the averages
        titles = [metric_title(results["metrics"][task]) for task in tasks]
        rows.insert(0, [METRIC_ROW, *[""] * (first - 1), *titles, *[""] * (len(header) - first - len(tasks))])
    return header, rows


def selection_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows of what the tasks' questions select, a method and a task a row; None where nothing selects."""
    rows = [
        [title_of(name), task, _percent(study["block_weight"][i][i]),
         f"{study['rows_used'][i]:.1f} of {study['block_rows'][i]:.0f}", f"{study['effective_rows'][i]:.1f}",
         _percent(max((shared for j, shared in enumerate(study["overlap"][i]) if j != i), default=0.0))]
        for name, result in results["methods"].items() if (study := result.get("selection"))
        for i, task in enumerate(study["tasks"])
    ]  # fmt: skip
    return (["method", "task", "right block", "rows used", "effective rows", "largest overlap"], rows) if rows else None


def _summary(name: str, spread: bool) -> Callable[[Mapping[str, Any]], str]:
    return lambda result: _percent(result.get(name), _spread(result, name) if spread else None)


def _trainable(result: Mapping[str, Any]) -> str:
    return "–" if result["trainable_parameters"] is None else f"{result['trainable_parameters']:,.0f}"


def _significance(yardstick: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The p value of a method's averages against the yardstick's, run by run."""
    pairs = [
        [run["average_accuracy"] for run in pair]
        for pair in zip(result.get("per_seed", []), yardstick["per_seed"], strict=False)
    ]
    if result is yardstick or len(pairs) < len(yardstick["per_seed"]) or any(None in pair for pair in pairs):
        return "–"
    p = paired_p_value([a - b for a, b in pairs])
    return "n too small" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _last_accuracy(position: int) -> Callable[[Mapping[str, Any]], str]:
    def last(result: Mapping[str, Any]) -> str:
        rows = result["accuracy_matrix"][: learned_tasks(result["accuracy_matrix"])]
        return _percent(rows[-1][position] if position < len(rows) else None)

    return last


def _spread(result: Mapping[str, Any], name: str) -> float | None:
    """Standard deviation of a summary over the runs."""
    values = [run.get(name) for run in result.get("per_seed", [])]  # earlier versions' lack some
    return None if len(values) < 2 or None in values else statistics.stdev(values)


def _percent(value: float | None, spread: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _csv(results: Mapping[str, Any]) -> str:
    """Long form, one measured number a line; ``seed`` is "mean" for the mean over all seeds of an order."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    several = bool(results.get("orders"))
    writer.writerow(["method", *(["order"] if several else []), "seed", "after_task", "on_task", "accuracy"])
    for name, result in results["methods"].items():
        for number, (tasks, runs) in enumerate(runs_by_order(results, result)):
            mean = [("mean", mean_over_seeds(runs) if several else result)] if runs or not several else []
            for seed, values in [*mean, *zip(results["seeds"], runs, strict=False)]:
                for after, row in zip(tasks, values["accuracy_matrix"], strict=True):
                    for on, value in zip(tasks, row, strict=True):
                        if value is not None:
                            where = [str(number), str(seed)] if several else [str(seed)]
                            writer.writerow([*map(printable, (name, *where, after, on)), f"{value:.6f}"])
    return out.getvalue()


def markdown_table(results: Mapping[str, Any], brief: bool = False) -> str:
    return _markdown_rows(*table(results, brief))


def _markdown_rows(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """The first ``texts`` columns are flush left."""
    lines = [[_md(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, [*["---"] * texts, *["---:"] * (len(header) - texts)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown_list(named: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- *{name}*: {_md(text)}" if name else f"- {_md(text)}" for name, text in named)


def _md(text: str) -> str:
    """A stranger's text as plain text within a line or a table cell."""
    return re.sub(r"([\\`*_{}\[\]<>|$~])", r"\\\1", printable(" ".join(text.split())))


def _markdown(results: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    settings = json.dumps(results.get("config", {}), indent=2)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", settings)), default=0))
    versions = "\n".join(
        f"| {_md(str(key))} | {_md(str(value))} |" for key, value in results["environment"].items() if value is not None
    )
    images = "\n\n".join(f"![{text}]({name})" for name, text in pictures.items())
    examples = "".join(_markdown_examples(_md(title_of(name)), result) for name, result in results["methods"].items())
    return f"""# {_md(headline(results))}

{markdown_table(results)}

{_markdown_list(explanations(results))}

{images}
{_markdown_selection(results)}{examples}
## Settings

{fence}json
{settings}
{fence}

## Environment

| what | value |
| --- | --- |
{versions}
"""


def _markdown_selection(results: Mapping[str, Any]) -> str:
    found = selection_table(results)
    if found is None:
        return ""
    meaning = _markdown_list(selection_explanations())
    return f"\n## What is selected\n\n{_markdown_rows(*found, texts=2)}\n\n{meaning}\n"


def _markdown_examples(method: str, result: Mapping[str, Any]) -> str:
    rows = [
        [task, example["question"], " / ".join(example["answers"]), example["prediction"], f"{example['score']:.2f}"]
        for task, examples in result.get("examples", {}).items()
        for example in examples
    ]
    if not rows:
        return ""
    table = _markdown_rows(["task", "question", "expected", "predicted", "score"], rows, texts=4)
    return f"\n## Answers of {method} at the end\n\n{table}\n"
