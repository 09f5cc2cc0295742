"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cllava_fast import cli
from cllava_fast.evaluate import metrics
from cllava_fast.evaluate.report import write_report


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder with the report of a run of one method."""
    matrix = [[0.75, None], [0.5, 0.25]]
    result = {
        "accuracy_matrix": matrix, **metrics.summarize(matrix), "selection_accuracy": None,
        "trainable_parameters": 10, "seconds": 1.0,
    }  # fmt: skip
    results = {
        "stream": ["chart", "icon"], "seeds": [0], "methods": {"frozen": {**result, "per_seed": [result]}},
        "environment": {"python": "3"},
    }  # fmt: skip
    write_report(results, tmp_path / "finished")
    return tmp_path / "finished"


def test_report_prints_the_table_and_draws_again(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "forgetting.png").unlink()
    assert cli.main(["report", str(finished)]) == 0
    assert (finished / "forgetting.png").is_file()
    printed = capsys.readouterr().out
    assert "37.5" in printed and "Frozen" in printed


def test_report_into_another_folder(finished: Path, tmp_path: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in finished.iterdir()}
    assert cli.main(["report", str(finished), "--output", str(tmp_path / "other")]) == 0
    assert {p.name: p.stat().st_mtime_ns for p in finished.iterdir()} == before
    assert {p.name for p in (tmp_path / "other").iterdir()} == set(before)
    assert json.loads((tmp_path / "other" / "results.json").read_text())["stream"] == ["chart", "icon"]


def test_a_report_is_not_written_over_other_files(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    assert cli.main(["report", str(finished), "--output", str(tmp_path / "other")]) == 1
    assert "thesis.txt" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_the_table_fits_a_terminal_of_80_columns(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    size = 4
    matrix = [[0.5] * size for _ in range(size)]
    method = {**results["methods"]["frozen"], "accuracy_matrix": matrix, **metrics.summarize(matrix), "per_seed": []}
    results.update(stream=["chart", "document", "icon", "digit"], seeds=[0, 1, 2])
    results["methods"] = {"continual_llava": method}
    write_report(results, finished)
    run = subprocess.run(
        [sys.executable, "-m", "cllava_fast.cli", "report", str(finished)],
        capture_output=True, text=True, check=True, env={"COLUMNS": "80", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    assert max(map(len, lines)) <= 80
    assert sum("Continual LLaVA" in line for line in lines) == 1, run.stdout
    for word in ("average", "forgetting", "document"):
        assert word in run.stdout, run.stdout


def test_env_names_versions_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    for word in ("torch", "transformers", "select", "aggregate", "inject", "reference"):
        assert word in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "{tmp}/nothing"], "does not exist"),
        (["demo", "--output", "{tmp}/demo", "--methods", "magic"], "methods is ['magic']"),
        (["demo", "--output", "{tmp}/demo", "--ambiguous", "1.5"], "ambiguous is 1.5"),
        (["demo", "--output", "{tmp}/demo", "--seeds", "0"], "seeds is 0"),
        (["demo", "--output", "{tmp}/demo", "--train", "0"], "train is 0"),
        (["demo", "--output", "{tmp}/demo", "--surrogate", "magic"], "surrogate"),
        (["demo", "--output", "{tmp}/demo", "--context", "magic"], "context is 'magic'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_1(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([argument.format(tmp=tmp_path) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("cllava-fast: ") and message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_backend_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CLLAVA_BACKEND", "magic")
    command = ["demo", "--output", str(tmp_path / "demo"), "--methods", "continual_llava", "--train", "32"]
    assert cli.main([*command, "--test", "4", "--steps", "1"]) == 1
    assert "unknown backend 'magic'" in capsys.readouterr().err


def test_help_and_version_need_no_torch() -> None:
    code = """
import sys
from cllava_fast import cli
for argument in ("--help", "--version"):
    try:
        cli.main([argument])
    except SystemExit as exit:
        assert exit.code == 0
assert "torch" not in sys.modules
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for command in ("demo", "report", "env"):
        assert command in run.stdout
