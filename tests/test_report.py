"""The report's files, whole or not at all."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from cllava_fast.evaluate import metrics, report


def method(matrix: list[list[float | None]]) -> dict[str, Any]:
    one = {
        "accuracy_matrix": matrix, **metrics.summarize(matrix), "selection_accuracy": None,
        "trainable_parameters": 24576, "seconds": 12.3,
    }  # fmt: skip
    lower = [[None if v is None else v - 0.1 for v in row] for row in matrix]
    two = {**one, "accuracy_matrix": lower, **metrics.summarize(lower)}
    return {**metrics.mean_over_seeds([one, two]), "per_seed": [one, two]}


@pytest.fixture
def results() -> dict[str, Any]:
    return {
        "stream": ["chart", "icon"],
        "seeds": [0, 1],
        "methods": {
            "sequential_lora": method([[0.9, None], [0.2, 0.8]]),
            "joint_lora": method([[None, None], [0.85, 0.75]]),
            "continual_llava": method([[0.9, None], [0.9, 0.8]]),
        },
        "environment": {"torch": "2.13.0", "gpu": None},
        "config": {"split": "test"},
    }


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


def test_the_table_holds_the_numbers(results: dict, tmp_path: Path) -> None:
    report.write_report(results, tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| Continual LLaVA |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:7] == ["Continual LLaVA", "80.0 ± 7.1", "0.0", "0.0", "82.5", "85.0", "75.0"]
    joint = next(line for line in lines if line.startswith("| Joint LoRA |"))
    assert [c.strip() for c in joint.strip("|").split("|")][2] == "–"
    console = Console(record=True, width=160, file=open("/dev/null", "w"))
    report.print_table(results, console)
    assert "80.0 ± 7.1" in console.export_text()


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


@pytest.mark.parametrize(
    ("damage", "message"),
    [("json", "is no JSON"), ("key", "has no 'seeds'"), ("metric", "lacks"), ("shape", "is not 2 x 2")],
)
def test_a_wrong_results_file_is_refused(damage: str, message: str, results: dict, tmp_path: Path) -> None:
    if damage == "key":
        del results["seeds"]
    elif damage == "metric":
        del results["methods"]["joint_lora"]["seconds"]
    elif damage == "shape":
        results["methods"]["joint_lora"]["accuracy_matrix"] = [[0.5]]
    file = tmp_path / "results.json"
    file.write_text("{" if damage == "json" else json.dumps(results))
    with pytest.raises(ValueError, match=message):
        report.load_results(file)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        report.load_results(tmp_path / "none.json")
