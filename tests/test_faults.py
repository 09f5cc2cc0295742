"""A few of the kills and faults of `make faults`, in a process that nothing else has run in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_says_what_the_results_file_does() -> None:
    from tests.faults import DOCS, RESULTS, markdown

    found = json.loads(RESULTS.read_text())
    assert markdown(found) in DOCS.read_text(encoding="utf-8") and found["lost"] == 0 and found["tried"] >= 100
    assert sum(row["tried"] for row in found["faults"] if row["fault"].startswith("SIGKILL")) >= 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_end_the_same_whatever_happens_to_them(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    command = [sys.executable, "tests/faults.py", "--quick", "--kills", "4", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(out.read_text())
    assert found["lost"] == 0 and found["tried"] >= 14
    assert sum(row["tried"] for row in found["faults"] if row["fault"].startswith("SIGKILL")) >= 3
    # a signal behind the last step finds a run that is done
    assert all(row["message"] for row in found["faults"] if not row["fault"].startswith("SIG")), found["faults"]
