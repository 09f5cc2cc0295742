"""The report's files, whole or not at all."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from cllava_fast.evaluate import report, wording
from cllava_fast.evaluate.results import MAX_METHODS, MAX_RESULTS_BYTES, MAX_TASKS, results_json
from cllava_fast.evaluate.selection import selection_study
from tests.report_helpers import EVIL, LAST, method, strange_tasks, two_orders, two_tasks


@pytest.fixture
def results() -> dict[str, Any]:
    return two_tasks()


@pytest.fixture
def strange() -> dict[str, Any]:
    return strange_tasks()


@pytest.fixture
def orders() -> dict[str, Any]:
    return two_orders()


class Page(HTMLParser):
    """Collects what a page holds, and checks that its tags match."""

    VOID = ("meta", "img", "!doctype")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_writes_everything(results: dict, tmp_path: Path) -> None:
    report.write_report(results, tmp_path)
    names = {"results.json", "matrix.csv", "accuracy_matrix.png", "forgetting.png", "report.md", "report.html"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert report.load_results(tmp_path / "results.json") == json.loads(json.dumps(results))
    for name in ("accuracy_matrix.png", "forgetting.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()
            assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    rows = list(csv.DictReader((tmp_path / "matrix.csv").open()))
    mean = {(r["method"], r["after_task"], r["on_task"]): float(r["accuracy"]) for r in rows if r["seed"] == "mean"}
    assert mean["sequential_lora", "icon", "chart"] == pytest.approx(0.15)
    assert ("joint_lora", "chart", "chart") not in mean
    assert {r["seed"] for r in rows} == {"mean", "0", "1"}


def test_what_is_no_results_is_refused_before_anything_is_written(results: dict, tmp_path: Path) -> None:
    too_many = {**results, "stream": [f"task {i}" for i in range(MAX_TASKS + 1)]}
    for wrong, message in (({}, "results has no 'stream'"), (too_many, f"{MAX_TASKS} different names at most")):
        with pytest.raises(ValueError, match=message):
            report.write_report(wrong, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_the_table_holds_the_numbers(results: dict, tmp_path: Path) -> None:
    report.write_report(results, tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| Continual LLaVA |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    spread = ["80.0 ± 7.1", "–", "0.0 ± 0.0", "0.0 ± 0.0", "82.5 ± 7.1"]
    assert cells[:8] == ["Continual LLaVA", *spread, "85.0", "75.0"]
    joint = next(line for line in lines if line.startswith("| Joint LoRA |"))
    assert [c.strip() for c in joint.strip("|").split("|")][2:4] == ["n too small", "–"]
    explained = {name for name, _ in wording.explanations(results)}
    assert {*report.table(results)[0]} - explained == {"method", "chart", "icon"}
    console = Console(record=True, width=160, file=open("/dev/null", "w"))
    report.print_table(results, console)
    assert "80.0 ± 7.1" in console.export_text()


def test_the_page_stands_alone(strange: dict, tmp_path: Path) -> None:
    report.write_report(strange, tmp_path)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags and "link" not in page.tags and "http://" not in source
    for name, value in page.attributes:
        assert name not in ("href", "srcset", "onerror", "onload") and "url(" not in (value or "")
    assert EVIL in page.text and "(nothing)" in page.text and "✗ wrong" in page.text and "✓ right, 0.75" in page.text
    assert "by ANLS" in page.text and "learned 2 of 3 tasks" in page.text and "validation split" in page.text
    assert "prefers-color-scheme: dark" in source and 'name="viewport"' in source
    # four pictures, and of the three small ones the one that is one
    assert len(page.images) == 5
    for address in page.images:
        kind, _, data = address.partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as picture:
            picture.load()
            assert kind == f"data:image/{picture.format.lower()}"  # type: ignore[union-attr]
    embedded = [base64.b64decode(address.partition(",")[2]) for address in page.images]
    assert embedded[:4] == [(tmp_path / name).read_bytes() for name in report.PICTURES]


def test_strange_names_break_no_table(strange: dict, tmp_path: Path) -> None:
    report.write_report(strange, tmp_path)
    lines = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| method |"))
    cells = [line.replace("\\|", "").count("|") for line in lines[start : start + 5]]
    assert len(set(cells)) == 1, lines[start : start + 5]
    assert not any("<script" in line.replace("\\<", "") for line in lines if not line.startswith(" "))
    assert lines.count("````json") == lines.count("````") == 1  # the settings cannot end their block
    console = Console(record=True, width=200, file=open("/dev/null", "w"))
    report.print_table(strange, console)
    printed = console.export_text()
    assert "[/red]" in printed and "score in % on the validation split after " in printed


@pytest.mark.parametrize(("kept", "behind"), [(None, ["75.0", "–"]), (0.25, ["75.0", "–", "25.0"])])
def test_a_task_named_as_a_column_has_its_own(kept: float | None, behind: list[str], results: dict) -> None:
    results["stream"] = ["chart", "base kept"]
    for result in results["methods"].values():
        result["base_kept"] = kept
    header, rows = report.table(results)
    first = header.index("base kept")
    assert rows[0][first : first + len(behind)] == behind and header.count("base kept") == len(behind) - 1
    assert all(len(row) == len(header) for row in rows)


def test_answers_that_were_cut_off_have_a_column(results: dict, tmp_path: Path) -> None:
    for result in results["methods"].values():
        result["cut_off"] = {"chart": 0.0, "icon": 0.0}
    assert "cut off" not in report.table(results)[0], "there are none"
    results["methods"]["joint_lora"]["cut_off"]["icon"] = 0.5
    results["methods"]["sequential_lora"]["cut_off"] = None  # as a mean with files that do not say it
    header, rows = report.table(results)
    assert {row[0]: row[header.index("cut off")] for row in rows} == {
        "Sequential LoRA": "–", "Joint LoRA": "25.0", "Continual LLaVA": "0.0",
    }  # fmt: skip
    assert "cut off" not in report.table(results, brief=True)[0]
    report.write_report(results, tmp_path)
    assert "- *cut off*: share of the last answers" in (tmp_path / "report.md").read_text()
    for wrong in ([1], {"chart": "all"}):
        results["methods"]["joint_lora"]["cut_off"] = wrong
        with pytest.raises(ValueError, match=r"cut_off of 'joint_lora' is .*; expected a"):
            report.write_report(results, tmp_path)


def test_the_wording_follows_the_metrics(results: dict, strange: dict, tmp_path: Path) -> None:
    report.write_report(results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Accuracies in %" in text and "exact match" in text and "| metric |" not in text
    header, rows = report.table(strange)
    first = header.index("icon") - 1
    assert rows[0][first : first + 3] == ["ANLS", "VQA accuracy", "exact match"] and rows[0][0] == "metric"
    brief, brief_rows = report.table(strange, brief=True)
    assert brief_rows[0][brief.index("icon")] == "VQA accuracy" and len(brief_rows[0]) == len(brief)
    report.write_report(strange, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Scores in %" in text and "each task's metric" in text and "Accuracies" not in text


def test_an_unfinished_run_shows_what_it_has_learned(strange: dict) -> None:
    header, rows = report.table(strange)
    row = dict(zip(header, rows[1], strict=True))
    assert [row["average"], row[EVIL], row["icon"], row[LAST]] == ["65.0", "50.0", "80.0", "–"]
    assert row["forgetting"] == "40.0"


def test_a_long_stream_fits_a_narrow_terminal(results: dict) -> None:
    tasks = [f"task number {i}" for i in range(8)]
    matrix: list[list[float | None]] = [[0.5] * 8 for _ in tasks]
    long = {**results, "stream": tasks, "methods": {"continual_llava": method(matrix)}}
    long["metrics"] = dict.fromkeys(tasks, "relaxed_accuracy")
    console = Console(record=True, width=80, file=open("/dev/null", "w"))
    report.print_table(long, console)
    printed = console.export_text()
    assert "…" not in printed and all(f"task number {i}" in printed for i in range(8))
    assert printed.count("relaxed accuracy") == 8 and "Continual LLaVA" in printed


def test_a_title_is_not_as_narrow_as_its_table(results: dict) -> None:
    narrow = {**results, "stream": ["a"], "orders": [["a"]] * 3, "methods": {"slm": method([[0.5]])}}
    console = Console(record=True, width=80, file=open("/dev/null", "w"))
    report.print_table({**narrow, "metrics": {"a": "exact_match"}}, console)
    title, *table = console.export_text().splitlines()
    assert title == "accuracy in % after the last task, 2 seed(s) and 3 orders of the tasks"
    assert max(map(len, table)) < len(title)


@pytest.mark.parametrize("tasks", [4, 8])
@pytest.mark.parametrize("width", [30, 80])
def test_no_number_and_no_name_is_cut_off(results: dict, tasks: int, width: int) -> None:
    """Six methods, some with long titles, on a terminal or a log that has no room for them."""
    names = [f"task number {i}" for i in range(tasks)]
    matrix: list[list[float | None]] = [[0.511] * (i + 1) + [None] * (tasks - i - 1) for i in range(tasks)]
    methods = ["continual_llava", "sequential_lora", "moe_lora", "per_task_lora", "meteora", "slm"]
    wide = {**results, "stream": names, "methods": dict.fromkeys(methods, method(matrix))}
    wide["metrics"] = dict.fromkeys(names, "relaxed_accuracy")
    console = Console(record=True, width=width, file=open("/dev/null", "w"))
    report.print_table(wide, console)
    printed = console.export_text()
    assert "…" not in printed and len(re.findall(r"\d\d\.\d ± \d\.\d", printed)) == len(methods)
    assert printed.count("46.1") == len(methods) * (1 + tasks)
    for word in ("average", "forgetting", "Sequential", "MoELoRA", "SLM", "7"):
        assert word in printed, word


def test_a_label_is_shown_as_it_was_given() -> None:
    named = {"mine": "mine", "rank16 a": "rank16 a", "frozen": "Frozen", "slm": "SLM"}
    named |= {
        "continual_llava+rank16": "Continual LLaVA, rank16",
        "continual_llava+calibrate": "Continual LLaVA, calibrated",
    }
    assert {name: wording.title_of(name) for name in named} == named


def test_an_evaluation_of_half_a_run_says_what_its_numbers_are_over(results: dict) -> None:
    results["config"] = {"learned": 1, "tasks": 2}
    results["methods"]["continual_llava"]["trainable_parameters"] = None
    texts = [text for _, text in wording.explanations(results)]
    assert "The run has learned 1 of 2 tasks; all numbers are over all 2 that were measured." in texts
    header, rows = report.table(results)
    (row,) = [row for row in rows if row[0] == "Continual LLaVA"]
    assert row[header.index("trainable")] == "–"
    results["methods"] = {"continual_llava": method([[0.5, None], [None, None]])}
    texts = [text for _, text in wording.explanations({**results, "config": {}})]
    assert "The run has learned 1 of 2 tasks; all numbers are over these." in texts


def test_a_run_without_results_is_a_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="has finished no task yet; cllava-fast train ... --resume goes on"):
        report.load_results(tmp_path / "results.json")


def test_a_failing_write_leaves_the_old_file(results: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write_report(results, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def half(_: Any, path: Path) -> None:
        path.write_bytes(b"half a picture")
        raise OSError("disk full")

    monkeypatch.setattr(report, "plot_forgetting", half)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(results, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_lists_of_numbers_stand_on_one_line(strange: dict) -> None:
    strange["note"] = "[\n  1,\n  2\n] [1,2]"
    text = results_json(strange)
    assert json.loads(text) == strange and "[0.9, null, null]" in text
    assert not re.search(r"\n *[\d.]+,?\n", text)
    assert text == results_json(json.loads(text))
    assert results_json({"a": [], "b": {}}) == '{\n  "a": [],\n  "b": {}\n}\n'
    for value in ([1, {"a": [2]}], {1: {2.5: 3}, None: [{True: []}]}, [{}, 1, [[]]], {"ä\n": (1, "\u2028")}, "a", None):
        assert json.loads(results_json(value)) == json.loads(json.dumps(value))
    with pytest.raises(ValueError, match="Out of range"):
        results_json({"a": [{"b": float("nan")}]})


def test_the_largest_results_are_read_again() -> None:
    """Of as many tasks and methods as there may be, after several seeds, with a selection and examples."""
    size, seeds = 20, 3
    draw = random.Random(0).random
    names = [f"task number {i}" for i in range(size)]
    matrix: list[list[float | None]] = [[draw() if j <= i else None for j in range(size)] for i in range(size)]
    study = selection_study({name: [draw() for _ in names] for name in names}, names)
    run = {"accuracy_matrix": matrix, "selection": study}
    growth = (MAX_TASKS / size) ** 2 * MAX_METHODS
    assert len(results_json({**run, "per_seed": [run] * seeds})) * growth < 0.6 * MAX_RESULTS_BYTES


def test_the_selection_has_a_table(strange: dict, tmp_path: Path) -> None:
    header, rows = report.selection_table(strange)  # type: ignore[misc]
    assert header[:2] == ["method", "task"] and [row[1] for row in rows] == [EVIL, "icon"]
    # of the first task 80 % is in its own two rows; the two share 0.25 of row 0 and 0.2 of row 3
    assert rows[0][2:] == ["80.0", "2.0 of 2", "2.8", "45.0"]
    assert rows[1][2:] == ["75.0", "1.0 of 2", "1.8", "45.0"]
    report.write_report(strange, tmp_path)
    assert "| 2.0 of 2 |" in (tmp_path / "report.md").read_text()
    assert "2.0 of 2" in Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    with Image.open(tmp_path / "selection.png") as picture:
        assert min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 24) or []) > 50
    three = selection_study({"a": [1.0, 1.0, 0.0], "b": [1.0, 0.0, 1.0], "c": [0.0, 0.0, 1.0]}, ["a", "b", "c"])
    strange["methods"]["continual_llava"]["selection"] = three
    _, rows = report.selection_table(strange)  # type: ignore[misc]
    assert [row[-1] for row in rows] == ["50.0"] * 3, "a shares nothing with c"


def test_orders_are_averaged_by_task(orders: dict, tmp_path: Path) -> None:
    report.write_report(orders, tmp_path)
    results = report.load_results(tmp_path / "results.json")
    header, rows = report.table(results)
    row = dict(zip(header, rows[0], strict=True))
    # chart: 0.6 first and 0.8 in the other order; icon 0.5 and 0.7; digit 0.4 and 0.3
    assert [row[task] for task in ("chart", "icon", "digit")] == ["70.0", "60.0", "35.0"]
    assert row["average"] == "55.0 ± 5.5" and row["p"] == "–"
    # five losses of one sign: 2 of the 32 ways to sign them reach as far
    assert dict(zip(header, rows[1], strict=True))["p"] == "0.062"
    text = (tmp_path / "report.md").read_text()
    assert "over 3 seed(s) and 2 orders of the tasks" in text and "Order 1: digit → chart → icon." in text
    assert text.startswith("# Continual tuning: chart, icon, digit\n")
    lines = list(csv.DictReader((tmp_path / "matrix.csv").open()))
    mean = {(r["order"], r["after_task"], r["on_task"]): float(r["accuracy"]) for r in lines
            if r["method"] == "continual_llava" and r["seed"] == "mean"}  # fmt: skip
    assert len(mean) == 12 and mean["1", "icon", "digit"] == 0.3 and mean["0", "icon", "chart"] == 0.8
    assert len(lines) == 2 * 2 * 6 * 4


def test_without_continual_llava_the_first_is_compared_with(orders: dict, tmp_path: Path) -> None:
    _, expected = report.table(orders)
    orders["methods"] = {"rank_16": orders["methods"].pop("continual_llava"), **orders["methods"]}
    header, rows = report.table(orders)
    assert [row[header.index("p")] for row in rows] == ["–", "0.062"]
    assert sorted(row[1:] for row in rows) == sorted(row[1:] for row in expected)
    report.write_report(orders, tmp_path)
    assert "- *p*: of a difference in average from rank\\_16 as" in (tmp_path / "report.md").read_text()


def test_one_run_is_not_compared(results: dict) -> None:
    assert "p" in report.table(results)[0] and "p" not in report.table(results, brief=True)[0]
    for result in results["methods"].values():
        result["per_seed"] = result["per_seed"][:1]
    assert "p" not in report.table(results)[0]
    assert "n too small" not in json.dumps(wording.explanations(results))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("json", "is no JSON"),
        ("key", "has no 'seeds'"),
        ("metric", "lacks"),
        ("shape", "is not 2 x 2"),
        ("example", r"an example of 'joint_lora' on 'chart' lacks \['score'\]"),
        ("metrics", "expected one for each task"),
        ("orders", "expected the tasks of the stream"),
        ("selection", "selection of 'joint_lora'"),
    ],
)
def test_a_wrong_results_file_is_refused(damage: str, message: str, results: dict, tmp_path: Path) -> None:
    if damage == "key":
        del results["seeds"]
    elif damage == "metric":
        del results["methods"]["joint_lora"]["seconds"]
    elif damage == "shape":
        results["methods"]["joint_lora"]["accuracy_matrix"] = [[0.5]]
    elif damage == "example":
        example = {"question": "q", "answers": ["a"], "prediction": "p"}
        results["methods"]["joint_lora"]["examples"] = {"chart": [example]}
    elif damage == "orders":
        results["orders"] = [["chart", "icon"], ["chart", "chart"]]
    elif damage == "selection":
        results["methods"]["joint_lora"]["selection"] = {"tasks": ["chart"]}
    elif damage == "metrics":
        results["metrics"] = {"chart": "anls"}
    file = tmp_path / "results.json"
    file.write_text("{" if damage == "json" else json.dumps(results))
    with pytest.raises(ValueError, match=message):
        report.load_results(file)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report.load_results(tmp_path / "none.json")
