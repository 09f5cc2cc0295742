"""Pictures of a run: who knows what after which task, and who forgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cllava_fast.environment import require
from cllava_fast.evaluate.metrics import mean_over_seeds, runs_by_order
from cllava_fast.evaluate.wording import quantity, title_of
from cllava_fast.untrusted import printable

# Okabe and Ito's colours, told apart by colour-blind readers too
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKERS = "osD^vPX*"
DASHES = ("-", "--", ":")  # where there are more methods than colours
METHOD = 30  # characters of a method's title

# A picture of many tasks leaves some out, to stay readable and be drawn in seconds
FEW = 12  # tasks that every picture shows in full
TEXTS = 1000  # cells with a text: those of one heat map of 31 tasks, or of three of 18
SIDE = 8.0  # inches, of a heat map without texts
PANELS = 24  # of forgetting
MAP_TICKS, PANEL_TICKS = 20, 6  # names at an axis
PERCENT = ([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])


def panels(
    count: int, columns: int, size: tuple[float, float], margin: tuple[float, float] = (0.0, 0.0), **shared: bool
) -> tuple[Any, Any]:
    """A figure of ``count`` panels in rows of ``columns``, and its axes ``[rows, columns]``, those behind the last one
    hidden; ``size`` of a panel and ``margin`` of all in inches, width and height."""
    Figure = require("matplotlib.figure", "pictures of a report").Figure
    rows = math.ceil(count / columns)
    figsize = (columns * size[0] + margin[0], rows * size[1] + margin[1])
    figure = Figure(figsize=figsize, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **shared)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, grid


def plot_accuracy_matrices(results: Mapping[str, Any], path: Path) -> None:
    """One heat map a method: accuracy on each task (columns) after each task (rows), all on one scale.

    Of several orders of the tasks, the first.
    """
    tasks, methods = [_plain(task) for task in results["stream"]], results["methods"]
    size = len(tasks)
    columns = math.ceil(math.sqrt(len(methods)))
    full = _is_full(size, len(methods))
    side = min(0.62 * size, 60 / columns if full else SIDE)  # inches
    figure, grid = panels(len(methods), columns, (side + 1.5, side + 1.7))
    for axes, (name, result) in zip(grid.flat, methods.items(), strict=False):
        shown = result
        if results.get("orders"):
            _, runs = next(iter(runs_by_order(results, result)))
            shown = mean_over_seeds(runs)
        _heat_map(axes, shown["accuracy_matrix"], tasks, full)
        axes.set_title(_with_average(name, shown), fontsize=11)
    for axes in grid[:, 0]:
        axes.set_ylabel("after learning")
    order = ", tasks in the first of several orders" if results.get("orders") else ""
    figure.supxlabel(f"{quantity(results)} on (%){order}", fontsize=10)
    _save(figure, path)


def _is_full(size: int, maps: int) -> bool:
    """Whether every cell has a text and every task a name at the axes."""
    return size <= FEW or maps * size**2 <= TEXTS


def _heat_map(axes: Any, matrix: Any, tasks: list[str], full: bool) -> None:
    """Fractions in 0..1 ``[T, T]`` in %; None is left blank. If not ``full``, colours alone tell them."""
    values = [[math.nan if v is None else v for v in row] for row in matrix]
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis")
    if full:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    color = "white" if value < 0.6 else "black"
                    axes.text(j, i, f"{round(100 * value)}", ha="center", va="center", color=color, fontsize=10)
    else:
        axes.figure.colorbar(image, ax=axes, shrink=0.6).ax.set_yticks(*PERCENT)
    places, names = _ticks(range(len(tasks)), tasks, len(tasks) if full else MAP_TICKS)
    axes.set_xticks(places, names, rotation=30, ha="right")
    axes.set_yticks(places, names)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _ticks(places: Sequence[int], names: Sequence[str], most: int) -> tuple[Sequence[int], Sequence[str]]:
    """All of few, otherwise evenly spread ones from the first on."""
    step = 1 if len(names) <= FEW else math.ceil(len(names) / most)
    return places[::step], names[::step]


def plot_selection(results: Mapping[str, Any], path: Path) -> None:
    """Two heat maps a method that selects: weight of each task's questions (rows) in each task's block, and overlap."""
    studies = {name: result["selection"] for name, result in results["methods"].items() if result.get("selection")}
    size = max(len(study["tasks"]) for study in studies.values())
    full = _is_full(size, 2 * len(studies))
    side = 0.62 * size if full else min(0.62 * size, SIDE)  # inches
    figure, grid = panels(2 * len(studies), 2, (side + 1.7, side + 1.7))
    for (blocks, shared), (name, study) in zip(grid, studies.items(), strict=True):
        tasks = [_plain(task) for task in study["tasks"]]
        _heat_map(blocks, study["block_weight"], tasks, full)
        blocks.set_title(f"{_plain(title_of(name), METHOD)}\nweight in rows of", fontsize=11)
        _heat_map(shared, study["overlap"], tasks, full)
        shared.set_title(f"{_plain(title_of(name), METHOD)}\nweight shared with", fontsize=11)
        blocks.set_ylabel("questions of")
    figure.supxlabel("% of the selection weight", fontsize=10)
    _save(figure, path)


def plot_forgetting(results: Mapping[str, Any], path: Path) -> None:
    """One panel a task: its accuracy as the stream goes on, one line a method, a band over the runs.

    Along the stream, or, where the tasks came in several orders, a line each along the number of tasks learned since.
    Of more than ``PANELS`` tasks, evenly spread ones.
    """
    names, methods, several = results["stream"], results["methods"], bool(results.get("orders"))
    every = math.ceil(len(names) / PANELS)
    tasks = names[::every]
    labels = [str(i) for i in range(len(names))] if several else [_plain(task) for task in names]
    places, ticks = _ticks(range(len(names)), labels, PANEL_TICKS)
    figure, grid = panels(len(tasks), min(4, len(tasks)), (2.6, 2.9), (1.2, 0.8), sharey=True)
    size = 5 if every == 1 else 2
    for task, axes in zip(tasks, grid.flat, strict=False):
        for number, (method, result) in enumerate(methods.items()):
            color = COLORS[number % len(COLORS)]
            marker = MARKERS[(number + number // len(COLORS)) % len(MARKERS)]  # another one in each round of colours
            dashes, label = DASHES[number // len(COLORS) % len(DASHES)], _plain(title_of(method), METHOD)
            curves = _curves_since(results, result, task) if several else [_curve(results, result, task)]
            style = {"color": color, "marker": marker, "markersize": size, "zorder": 3}
            for place, curve in enumerate(curves):
                steps, line = list(curve), [middle for middle, _ in curve.values()]
                axes.plot(steps, line, dashes, label=None if place else label, **style)
                if any(len(spread) > 1 for _, spread in curve.values()):
                    low, high = ([limit(spread) for _, spread in curve.values()] for limit in (min, max))
                    axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axes.set_title(_plain(task), fontsize=11)
        axes.set_xticks(places, ticks, rotation=0 if several else 30, ha="center" if several else "right")
        axes.set_xlim(-0.3, len(names) - 0.7)
        axes.set_ylim(-0.02, 1.02)
        axes.set_yticks(*PERCENT)
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(f"{quantity(results)} (%)")
    shown = f" (one task in {every} is shown)" if every > 1 else ""
    figure.supxlabel(("tasks learned since" if several else "after learning") + shown, fontsize=10)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(methods)), frameon=False)
    _save(figure, path)


Curve = dict[int, tuple[float, list[float]]]  # place on the x axis -> mean, and the runs' values


def _curve(results: Mapping[str, Any], result: Mapping[str, Any], task: str) -> Curve:
    column, runs = results["stream"].index(task), result.get("per_seed", [])
    return {
        i: (row[column], [run["accuracy_matrix"][i][column] for run in runs] or [row[column]])
        for i, row in enumerate(result["accuracy_matrix"])
        if i >= column and row[column] is not None
    }


def _curves_since(results: Mapping[str, Any], result: Mapping[str, Any], task: str) -> list[Curve]:
    """By the number of tasks learned after ``task``, a curve for each order: their mean would bend where one ends."""
    curves = []
    for order, runs in runs_by_order(results, result):
        place = order.index(task)
        columns = [[run["accuracy_matrix"][i][place] for run in runs] for i in range(place, len(order))]
        measured = {age: values for age, values in enumerate(columns) if values and None not in values}
        curves.append({age: (sum(values) / len(values), values) for age, values in measured.items()})
    return curves


def plot_losses(results: Mapping[str, Any], path: Path) -> None:
    """One panel a method: the losses that were logged, task after task; a method without any has no panel.

    Of many tasks, names at the axis tell where some of them begin, not a legend.
    """
    logged = {name: result.get("losses") or {} for name, result in results["methods"].items()}
    methods = {name: losses for name, losses in logged.items() if any(losses.values())}
    few = max(map(len, methods.values())) <= FEW
    inches, width, size = (3.4, 1.4, 6) if few else (6.8, 0.8, 2)  # of a panel, and points of a line and its markers
    figure, grid = panels(len(methods), min(4, len(methods)), (inches, 3.2), (0.6, 0.0), sharey=True)
    for (method, losses), axes in zip(methods.items(), grid.flat, strict=False):
        start, starts = 1, []
        for number, (task, values) in enumerate(losses.items()):
            starts.append(start)
            steps = range(start, start + len(values))
            start = steps.stop
            label = _plain(task) if len(losses) > 1 else "all tasks"
            color = COLORS[number % len(COLORS)]
            axes.plot(steps, values, color=color, linewidth=width, marker=".", markersize=size, label=label)
        axes.set_title(_plain(title_of(method), METHOD), fontsize=11)
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        if len(losses) <= FEW:
            axes.legend(frameon=False, fontsize=8)
        else:
            axes.set_xticks(*_ticks(starts, [_plain(task) for task in losses], PANEL_TICKS), rotation=30, ha="right")
    for axes in grid[:, 0]:
        axes.set_ylabel("loss")
    grid.flat[0].set_ylim(bottom=0)  # once all are drawn: the panels share it
    figure.supxlabel("entries of the log, task after task", fontsize=10)
    _save(figure, path)


def _plain(text: str, longest: int = 20) -> str:
    """A stranger's text on one short line; between two dollars matplotlib would read mathematics."""
    text = printable(" ".join(text.split()))
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return text.replace("$", r"\$")


def _with_average(name: str, result: Mapping[str, Any]) -> str:
    average = result["average_accuracy"]
    title = _plain(title_of(name), METHOD)
    return title if average is None else f"{title}\naverage {100 * average:.1f} %"


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=140, format="png", facecolor="white", bbox_inches="tight")
