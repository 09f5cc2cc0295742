"""The long stream and the soak: they measure, they notice growth, and the docs show what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import long_stream, soak, tiny_stream
from benchmarks.results import FOLDER

DOCS = tiny_stream.DOCS.read_text(encoding="utf-8")
MIB = 1 << 20


def part(mark: str) -> str:
    return re.findall(f"<!-- {mark} -->\n\n(.*?)\n\n<!-- end -->", DOCS, re.DOTALL)[0]


def test_the_docs_show_the_results_files() -> None:
    assert part("long stream") == long_stream.table(json.loads((FOLDER / "long-stream.json").read_text()))
    for mark, file in (("soak", "soak.json"), ("soak on a GPU", "soak-gpu.json")):
        assert part(mark) == soak.sentence(json.loads((FOLDER / file).read_text()))
    for picture in re.findall(r"\]\(([\w-]+\.png)\)", DOCS):
        assert (tiny_stream.DOCS.parent / picture).is_file(), picture


def page(folder: Path) -> Path:
    docs = folder / "page.md"
    docs.write_text("<!-- long stream -->\n<!-- end -->\n<!-- soak -->\nold\n<!-- end -->\n")
    return docs


def test_three_tasks_of_the_long_stream(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(long_stream, "select_seconds", lambda rows: 1e-3 * rows)
    run = "context_rank 4, eval_budget 32"
    learned = long_stream.learn(3, run)
    growth = {name: long_stream.growth(learned["points"], name) for name in learned["points"][0]}
    results = {"tasks": 3, "runs": {run: {**learned, "growth": growth}}, "select_seconds": {"100": 0.1}}
    assert long_stream.report(results, page(tmp_path)) == 0
    points = learned["points"]
    assert learned["rows"] == 24 and [p["evaluated_samples"] for p in points] == [2, 4, 6]
    assert points[2]["increments_bytes"] > points[2]["pool_bytes"] > points[1]["pool_bytes"]
    assert points[2]["all_folders_bytes"] > sum(p["increments_bytes"] for p in points)
    assert all(0 < p["context_error"] < 1 and p["step_seconds"] > 0 for p in points)
    text = (tmp_path / "page.md").read_text()
    assert "| samples evaluated | 4 → 4 |" in text and "100.00 ms of 100 rows" in text and "old" in text
    assert (tmp_path / "page.png").stat().st_size > 1000


def points(resident: list[int], files: list[int]) -> list[dict[str, Any]]:
    return [
        {"seconds": 10.0 * (i + 1), "resident": r * MIB, "files": f}
        for i, (r, f) in enumerate(zip(resident, files, strict=True))
    ]


@pytest.mark.parametrize(
    ("resident", "files", "passed"),
    [
        ([100, 300, *[500] * 20], [9, 9, *[6] * 20], True),  # a warm-up may grow
        ([500 + 3 * i for i in range(22)], [6] * 22, False),
        ([500] * 22, [6 + i // 6 for i in range(22)], False),
        ([500, 530] * 11, [6, 7] * 11, True),  # up and down
    ],
    ids=["warm-up", "memory", "files", "noise"],
)
def test_growth_after_the_warm_up_fails(resident: list[int], files: list[int], passed: bool) -> None:
    assert soak.verdict(points(resident, files), 32 * MIB)["passed"] is passed


def test_the_command_soaks_and_writes_what_it_saw(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    rounds: list[int] = []
    monkeypatch.setattr(soak, "one_round", lambda number, device, folder: rounds.append(number))
    monkeypatch.setattr(soak, "measure", lambda device: {"resident": 500 * MIB, "files": 6})
    options = ["--minutes", "0.01", "--out", str(tmp_path / "soak.json"), "--docs", str(page(tmp_path)), "--limit", "0"]
    assert soak.main([*options, "--device", "cpu"]) == 0
    results = json.loads((tmp_path / "soak.json").read_text())
    assert results["rounds"] == len(rounds) == len(results["points"]) > 1 and results["passed"]
    assert "passed" in capsys.readouterr().out and "open files by" in (tmp_path / "page.md").read_text()
    assert soak.main([*options, "--report"]) == 0 and len(rounds) == results["rounds"]


def test_a_round_of_the_soak(tmp_path: Path) -> None:
    import torch

    soak.one_round(0, torch.device("cpu"), tmp_path)
    measured = soak.measure(torch.device("cpu"))
    assert measured["resident"] > 10 * MIB and measured["files"] > 2
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
