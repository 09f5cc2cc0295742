"""Pictures of a run: who knows what after which task, and who forgets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cllava_fast.environment import require
from cllava_fast.evaluate.wording import quantity, title_of
from cllava_fast.untrusted import printable

# Okabe and Ito's colours, told apart by colour-blind readers too
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"


def plot_accuracy_matrices(results: Mapping[str, Any], path: Path) -> None:
    """One heat map a method: accuracy on each task (columns) after each task (rows), all on one scale."""
    Figure = require("matplotlib.figure", "pictures of a report").Figure

    tasks, methods = [_plain(task) for task in results["stream"]], results["methods"]
    size = len(tasks)
    columns = math.ceil(math.sqrt(len(methods)))
    rows = math.ceil(len(methods) / columns)
    cell = min(0.62, 60 / (columns * size))  # inches
    figure = Figure(figsize=(columns * (cell * size + 1.5), rows * (cell * size + 1.7)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(methods) :]:
        axes.set_visible(False)
    for axes, (name, result) in zip(grid.flat, methods.items(), strict=False):
        values = [[math.nan if v is None else v for v in row] for row in result["accuracy_matrix"]]
        axes.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis")
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    color = "white" if value < 0.6 else "black"
                    axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color=color, fontsize=10)
        axes.set_xticks(range(size), tasks, rotation=30, ha="right")
        axes.set_yticks(range(size), tasks)
        axes.set_title(_with_average(name, result), fontsize=11)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    for axes in grid[:, 0]:
        axes.set_ylabel("after learning")
    figure.supxlabel(f"{quantity(results)} on (%)", fontsize=10)
    _save(figure, path)


def plot_forgetting(results: Mapping[str, Any], path: Path) -> None:
    """One panel a task: its accuracy as the stream goes on, one line a method, a band over the seeds."""
    Figure = require("matplotlib.figure", "pictures of a report").Figure

    tasks, methods = [_plain(task) for task in results["stream"]], results["methods"]
    columns = min(4, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure = Figure(figsize=(2.6 * columns + 1.2, 2.9 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    for task, (name, axes) in enumerate(zip(tasks, panels, strict=False)):
        for number, (method, result) in enumerate(methods.items()):
            color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
            steps = [i for i in range(task, len(tasks)) if result["accuracy_matrix"][i][task] is not None]
            line = [result["accuracy_matrix"][i][task] for i in steps]
            axes.plot(steps, line, color=color, marker=marker, markersize=5, label=_plain(title_of(method)), zorder=3)
            spread = [[seed["accuracy_matrix"][i][task] for seed in result.get("per_seed", [])] for i in steps]
            if steps and len(spread[0]) > 1:
                low, high = [min(v) for v in spread], [max(v) for v in spread]
                axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_title(name, fontsize=11)
        axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
        axes.set_xlim(-0.3, len(tasks) - 0.7)
        axes.set_ylim(-0.02, 1.02)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"{quantity(results)} (%)")
    figure.supxlabel("after learning", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(methods), frameon=False)
    _save(figure, path)


def plot_losses(results: Mapping[str, Any], path: Path) -> None:
    """One panel a method: the losses that were logged, task after task; a method without any has no panel."""
    Figure = require("matplotlib.figure", "pictures of a report").Figure

    methods = {name: result["losses"] for name, result in results["methods"].items() if result.get("losses")}
    figure = Figure(figsize=(3.4 * len(methods) + 0.6, 3.2), layout="constrained")
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for (method, losses), axes in zip(methods.items(), panels, strict=True):
        start = 1
        for number, (task, values) in enumerate(losses.items()):
            steps = range(start, start + len(values))
            start = steps.stop
            label = _plain(task) if len(losses) > 1 else "all tasks"
            axes.plot(steps, values, color=COLORS[number % len(COLORS)], linewidth=1.4, marker=".", label=label)
        axes.set_title(_plain(title_of(method)), fontsize=11)
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("loss")
    panels[0].set_ylim(bottom=0)  # once all are drawn: the panels share it
    figure.supxlabel("entries of the log, task after task", fontsize=10)
    _save(figure, path)


def _plain(text: str) -> str:
    """A stranger's text on one short line; between two dollars matplotlib would read mathematics."""
    text = printable(" ".join(text.split()))
    text = text if len(text) <= 20 else text[:19] + "…"
    return text.replace("$", r"\$")


def _with_average(name: str, result: Mapping[str, Any]) -> str:
    average = result["average_accuracy"]
    title = _plain(title_of(name))
    return title if average is None else f"{title}\naverage {100 * average:.1f} %"


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=140, format="png", facecolor="white", bbox_inches="tight")
