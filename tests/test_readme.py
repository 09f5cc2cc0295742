"""The README tells the truth: its tables are those of the results files, its pictures exist, its code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import cllava_fast as cf
from cllava_fast.evaluate.report import load_results, markdown_table
from tests.helpers import inputs
from tests.train_helpers import stream

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
TABLES = re.findall(r"<!-- table of (\S+) -->\n\n(.*?)\n\n<!-- end -->", PAGES, re.DOTALL)


def test_there_are_tables() -> None:
    assert len(TABLES) == PAGES.count("<!-- table of") == 5


@pytest.mark.parametrize(("file", "table"), TABLES, ids=[file for file, _ in TABLES])
def test_a_table_is_that_of_its_results_file(file: str, table: str) -> None:
    assert table == markdown_table(load_results(ROOT / file), brief=True)


def test_pictures_and_links_exist() -> None:
    local = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert any(target.endswith(".png") for target in local)
    for target in local:
        assert (ROOT / target).is_file(), target


def test_the_code_runs(
    llava: Any, processor: Any, rng: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) == 6  # an import and five lines
    monkeypatch.chdir(tmp_path)
    batch = inputs(processor, ("which bar is the tallest?", "is the box ticked?"), rng)
    batch["max_new_tokens"] = 2
    names = {"model": llava, "processor": processor, "stream": stream(2, samples=8), "inputs": batch}
    exec(code, names)
    assert 0.0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1.0
    assert names["answer"].shape[0] == 2
    cf.unpatch(llava)
    cf.load_pretrained(llava, "mine", processor=processor)
    assert llava.increments.pool.num_tasks == 2
