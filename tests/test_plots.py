"""The pictures of a report."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from PIL import Image

from cllava_fast.evaluate import plots, report, wording
from cllava_fast.evaluate.results import MAX_METHODS, MAX_TASKS
from tests.report_helpers import long_stream, strange_tasks, two_orders, two_tasks


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Receives the figures as they are drawn; refuses a large one before it takes minutes to save."""
    drawn = []
    save = plots._save

    def keep(figure: Any, path: Path) -> None:
        assert math.prod(140 * figure.get_size_inches()) < 12e6  # pixels
        drawn.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return drawn


def test_every_order_has_a_line_of_what_was_measured(figures: list, tmp_path: Path) -> None:
    """A mean over orders would bend where one of them ends, though nothing was forgotten."""
    orders = two_orders()
    result = {"per_seed": [
        {"accuracy_matrix": [[0.9, None, None], [0.9, 0.5, None], [0.9, 0.5, 0.2]], "order": 0},  # chart, icon, digit
        {"accuracy_matrix": [[0.7, None, None], [0.7, 0.5, None], [0.5, 0.5, 0.2]], "order": 0},
        {"accuracy_matrix": [[0.4, None, None], [0.4, 0.7, None], [0.4, 0.6, 0.3]], "order": 1},  # digit, chart, icon
    ]}  # fmt: skip
    first, second = plots._curves_since(orders, result, "chart")
    assert {age: (round(middle, 6), values) for age, (middle, values) in first.items()} == {
        0: (0.8, [0.9, 0.7]), 1: (0.8, [0.9, 0.7]), 2: (0.7, [0.9, 0.5])
    }  # fmt: skip
    assert {age: middle for age, (middle, _) in second.items()} == {0: 0.7, 1: 0.6}
    once = {"per_seed": [{"accuracy_matrix": [[None] * 3, [None] * 3, [0.9, 0.8, 0.7]], "order": i} for i in (0, 1)]}
    assert [list(curve) for curve in plots._curves_since(orders, once, "chart")] == [[2], [1]]
    plots.plot_forgetting(orders, tmp_path / "a.png")
    lines = figures[0].axes[0].get_lines()
    assert len(lines) == len(orders["methods"]) * len(orders["orders"])
    labels = figures[0].legends[0].get_texts()
    assert len(labels) == len(orders["methods"]), "each method once"


def test_every_method_has_a_look_of_its_own(figures: list, tmp_path: Path) -> None:
    results = two_tasks()
    many = {**results, "methods": {f"run {i}": results["methods"]["continual_llava"] for i in range(MAX_METHODS)}}
    plots.plot_forgetting(many, tmp_path / "a.png")
    lines = figures[0].axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == MAX_METHODS


def test_a_method_without_a_loss_has_no_panel(figures: list, tmp_path: Path) -> None:
    results = two_tasks()
    shown = results["methods"]["continual_llava"]
    several = {f"run {i}": {**shown, "losses": {"chart": [2.0, 1.0] if i else []}} for i in range(7)}
    plots.plot_losses({**results, "methods": several}, tmp_path / "a.png")
    panels = [axes for axes in figures[0].axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == [f"run {i}" for i in range(1, 7)]
    assert len({round(axes.get_position().y0, 2) for axes in panels}) == 2, "in two rows"
    report.write_report({**results, "methods": {"run 0": several["run 0"]}}, tmp_path)
    assert not (tmp_path / "losses.png").exists()


def test_losses_have_a_picture_where_there_are_any(tmp_path: Path) -> None:
    report.write_report(strange_tasks(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(report.REPORT_FILES)
    report.write_report(two_tasks(), tmp_path)
    for name in ("losses.png", "selection.png"):
        assert not (tmp_path / name).exists()
        assert name not in (tmp_path / "report.md").read_text()
    assert "What is selected" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("methods", [1, 3])
@pytest.mark.filterwarnings("error")
def test_a_report_of_many_tasks_is_small_and_quick(methods: int, figures: list, tmp_path: Path) -> None:
    results = long_stream(MAX_TASKS, methods)
    start = time.process_time()
    report.write_report(results, tmp_path)
    assert time.process_time() - start < 30
    assert len(figures) == len(report.PICTURES)
    for figure in figures:
        panels = [axes for axes in figure.axes if axes.get_visible()]
        assert len(panels) <= 24 and not any(axes.texts or axes.get_legend() for axes in panels)
        assert all(len(axes.get_xticks()) <= 20 and len(axes.get_yticks()) <= 20 for axes in panels)
    matrices, _, losses, selection = figures
    bars = [sum(axes.get_label() == "<colorbar>" for axes in figure.axes) for figure in (matrices, selection)]
    assert bars == [methods, 2 * methods]
    named = [label.get_text() for label in losses.axes[0].get_xticklabels()]
    assert named[:2] == ["a long name of task…"] * 2 and 2 <= len(named) <= 6
    for name in report.PICTURES:
        with Image.open(tmp_path / name) as picture:
            assert math.prod(picture.size) < 12e6, (name, picture.size)
    assert (tmp_path / "report.html").stat().st_size < 8 << 20 > (tmp_path / "report.md").stat().st_size
    title = (tmp_path / "report.md").read_text().splitlines()[0]
    assert len(title) < 200 and title.endswith("… → a long name of task 199 (200 tasks)")


@pytest.mark.filterwarnings("error")
def test_a_report_of_few_tasks_leaves_nothing_out(figures: list, tmp_path: Path) -> None:
    size, methods = plots.FEW, 3
    results = long_stream(size, methods)
    report.write_report(results, tmp_path)
    matrices, forgetting, losses, selection = ([a for a in figure.axes if a.get_visible()] for figure in figures)
    for panels, count in ((matrices, methods), (forgetting, size), (selection, 2 * methods)):
        assert [len(axes.get_xticks()) for axes in panels] == [size] * count
    assert [len(axes.texts) for axes in matrices] == [size * (size + 1) // 2] * methods
    assert [len(axes.texts) for axes in selection] == [size**2] * 2 * methods
    assert [len(axes.get_legend().get_texts()) for axes in losses] == [size] * methods
    assert "…" not in wording.headline(results)


def test_a_map_says_its_average_where_it_was_measured(figures: list, tmp_path: Path) -> None:
    results = two_tasks()
    results["methods"]["joint_lora"]["average_accuracy"] = None
    plots.plot_accuracy_matrices(results, tmp_path / "a.png")
    titles = [axes.get_title() for axes in figures[0].axes[:3]]
    assert titles == ["Sequential LoRA\naverage 45.0 %", "Joint LoRA", "Continual LLaVA\naverage 80.0 %"]


@pytest.mark.parametrize(("size", "maps", "full"), [(12, 40, True), (13, 40, False), (30, 1, True), (32, 1, False)])
def test_cells_have_texts_where_there_is_room(size: int, maps: int, full: bool) -> None:
    assert plots._is_full(size, maps) == full


def test_a_cell_of_nearly_nothing_has_no_sign() -> None:
    axes = matplotlib.figure.Figure().subplots()
    plots._heat_map(axes, [[1.0, -1e-9], [0.004, 0.996]], ["a", "b"], full=True)
    assert [text.get_text() for text in axes.texts] == ["100", "0", "0", "100"]


def test_forgetting_tells_that_it_leaves_tasks_out(figures: list, tmp_path: Path) -> None:
    for size, panels, told in ((24, 24, False), (25, 13, True)):
        plots.plot_forgetting(long_stream(size, 1), tmp_path / "forgetting.png")
        figure = figures[-1]
        assert sum(axes.get_visible() for axes in figure.axes) == panels
        assert ("(one task in 2 is shown)" in figure.get_supxlabel()) == told
