"""What tasks to come gain from earlier ones (``ContinualArguments.eval_unseen``)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cllava_fast as cf
from cllava_fast.evaluate import metrics, report
from cllava_fast.methods.per_task_lora import PerTaskLoraConfig
from cllava_fast.train.result import begin, result_of
from tests.report_helpers import two_orders, two_tasks
from tests.train_helpers import CONFIG, arguments, stream


@pytest.mark.parametrize("config", [CONFIG, PerTaskLoraConfig(rank=2)], ids=lambda config: config.method)
def test_they_are_measured_after_each_task(config: Any, new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    def run(folder: Path, tasks: int, **values: Any) -> Any:
        model = cf.patch(new_llava(), config, processor=processor)
        args = arguments(folder, **{"max_steps": 12, "eval_unseen": True, **values})
        return cf.ContinualTrainer(model, processor, stream(tasks), args).train()

    whole, seen = run(tmp_path / "whole", 3), run(tmp_path / "seen", 3, eval_unseen=False)
    matrix = whole.accuracy_matrix
    assert all(row[: i + 1] == seen.accuracy_matrix[i][: i + 1] for i, row in enumerate(matrix))
    assert (whole.losses, whole.selection, whole.selection_accuracy) == (
        seen.losses, seen.selection, seen.selection_accuracy,
    )  # fmt: skip
    for step in range(2):
        model = cf.patch(new_llava(), config, processor=processor)
        cf.load_pretrained(model, tmp_path / "whole" / "increments" / f"0{step + 1}-task{step}")
        found = cf.evaluate_stream(model, processor, stream(3), max_new_tokens=3, progress=False)
        assert next(iter(found["methods"].values()))["accuracy_matrix"][-1] == matrix[step]
        assert seen.accuracy_matrix[step][step + 1 :] == [None] * (2 - step)
        written = tmp_path / "whole" / "predictions" / f"0{step + 1}-task{step}"
        assert sorted(file.stem for file in written.iterdir()) == ["task0", "task1", "task2"]
    assert any(matrix[0][1:] + matrix[1][2:]) == (config is CONFIG), "rows act on their like, and no other task's LoRA"
    saved = json.loads((tmp_path / "whole" / "results.json").read_text())["methods"][config.method]
    assert saved["transfer"] == metrics.transfer(matrix) is not None

    run(tmp_path / "grown", 2, eval_unseen=False)
    grown = run(tmp_path / "grown", 3, resume=True).accuracy_matrix
    assert grown[2] == matrix[2] and grown[:2] == seen.accuracy_matrix[:2], "what comes later is measured from now on"


def test_within_a_budget_they_share_with_earlier_tasks(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    model = cf.patch(new_llava(), CONFIG, processor=processor)
    args = arguments(tmp_path / "run", max_steps=1, align_steps=1, eval_budget=10, eval_unseen=True)
    cf.ContinualTrainer(model, processor, stream(3), args).train()
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["evaluated"] == [
        {"task0": 6, "task1": 2, "task2": 2}, {"task0": 2, "task1": 6, "task2": 2}, dict.fromkeys(saved["stream"], 6),
    ]  # fmt: skip
    assert [list(step) for step in saved["unseen"]] == [["task1", "task2"], ["task2"], []]


def test_what_was_measured_on_other_samples_does_not_count() -> None:
    def identity(tasks: dict[str, str], **metrics: str) -> dict[str, Any]:
        return {
            "stream": {name: [8, 4] for name in tasks}, "stream_sha256": [["0", sha256] for sha256 in tasks.values()],
            "metrics": {name: metrics.get(name, "anls") for name in tasks},
        }  # fmt: skip

    def matrix(saved: dict[str, Any] | None, now: dict[str, Any]) -> list[list[float | None]]:
        return result_of(begin(saved and json.dumps(saved), now), list(now["stream"]), joint=False).accuracy_matrix

    before = identity({"a": "1", "b": "2", "c": "3"})
    saved = {**before, "matrix": [[0.5]], "unseen": [{"b": 0.25, "c": 0.75}]}
    assert matrix(saved, before)[0] == [0.5, 0.25, 0.75]
    assert matrix(saved, identity({"a": "1", "c": "3", "b": "2"}))[0] == [0.5, 0.75, 0.25], "by name"
    assert matrix(saved, identity({"a": "1", "b": "4", "c": "3"}))[0] == [0.5, None, 0.75]
    assert matrix(saved, identity({"a": "1", "b": "2", "c": "3"}, c="rouge_l"))[0] == [0.5, 0.25, None]
    assert matrix(saved, identity({"a": "1", "d": "2"}))[0] == [0.5, None]
    assert result_of(begin(json.dumps(saved), before), ["a", "b", "c"], joint=False).to_dict()["cut_off"] is None
    del saved["unseen"]  # as earlier versions wrote it
    assert matrix(saved, before)[0] == [0.5, None, None]
    assert matrix(None, before) == [[None] * 3] * 3


def test_nothing_stays_of_tasks_to_come_that_are_others_now(
    new_llava: Callable, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(cf.ContinualCallback):
        def on_task_begin(self, task: str, number: int, **kwargs: Any) -> None:
            if number == 1:
                raise InterruptedError

    def run(folder: str, tasks: cf.Stream, **values: Any) -> Any:
        model = cf.patch(new_llava(), CONFIG, processor=processor)
        values |= {"max_steps": 1, "align_steps": 1, "eval_unseen": True, "eval_budget": 100}
        trainer = cf.ContinualTrainer(
            model, processor, tasks, arguments(tmp_path / folder, **values), callbacks=[Stop()]
        )
        trainer.train()

    def first_step(folder: str) -> tuple[list[str], dict[str, int]]:
        answers = (tmp_path / folder / "predictions" / "01-task0").iterdir()
        saved = json.loads((tmp_path / folder / "results.json").read_text())
        return sorted(file.stem for file in answers), saved["config"]["evaluated"][0]

    for folder in ("replaced", "cut"):
        with pytest.raises(InterruptedError):
            run(folder, stream(3))
        assert first_step(folder) == (["task0", "task1", "task2"], {"task0": 6, "task1": 6, "task2": 6})
    *same, last = stream(3).tasks
    with pytest.raises(InterruptedError):
        run("replaced", cf.Stream([*same, dataclasses.replace(last, test=last.test[:2])]), resume=True)
    assert first_step("replaced") == (["task0", "task1"], {"task0": 6, "task1": 6})
    monkeypatch.setattr("cllava_fast.evaluate.evaluation.evaluate_tasks", None)  # everything left has been measured
    run("cut", stream(1), resume=True)
    assert first_step("cut") == (["task0"], {"task0": 6})


def test_transfer() -> None:
    matrix = [[0.8, 0.1, 0.2], [0.9, 0.6, 0.4], [0.5, 0.7, 0.4]]
    # task 1 before it was learned: 0.1; task 2: 0.2 and 0.4
    assert metrics.transfer(matrix) == pytest.approx((0.1 + 0.3) / 2)
    assert metrics.transfer([[0.8, None, 0.2], *matrix[1:]]) is None and metrics.transfer([[0.8]]) is None
    unfinished = [*matrix[:2], [None, None, None]]
    assert metrics.summarize(unfinished)["transfer"] == pytest.approx(0.1), "over what was learned"
    below = [[None if j > i else value for j, value in enumerate(row)] for i, row in enumerate(matrix)]
    others = {**metrics.summarize(matrix), "transfer": None}
    assert metrics.summarize(below) == others, "tasks to come change no other number"


def test_a_mean_over_orders_is_of_learned_tasks_alone() -> None:
    runs = two_orders()["methods"]["lora"]["per_seed"][:2]
    orders = two_orders()["orders"]
    mean = metrics.mean_over_orders(runs, orders, orders[0])
    filled = [
        {**run, "accuracy_matrix": [[0.1 if v is None else v for v in row] for row in run["accuracy_matrix"]]}
        for run in runs
    ]
    assert metrics.mean_over_orders(filled, orders, orders[0]) == mean
    alone = metrics.mean_over_orders(filled[:1], orders[:1], orders[0])
    assert alone["accuracy_matrix"] == filled[0]["accuracy_matrix"]


def test_the_report_has_a_column_where_it_was_measured(tmp_path: Path) -> None:
    results = two_tasks()
    header, _ = report.table(results)
    assert "transfer" not in header
    result = next(iter(results["methods"].values()))
    result["transfer"] = 0.25
    for brief in (True, False):
        header, rows = report.table(results, brief)
        assert [row[header.index("transfer")] for row in rows] == ["25.0", *["–"] * (len(rows) - 1)]
    report.write_report(results, tmp_path)
    assert "before it was learned" in (tmp_path / "report.md").read_text()
    assert report.load_results(tmp_path)["methods"] == results["methods"]
    result["transfer"] = "much"
    with pytest.raises(ValueError, match="transfer of .* is 'much'; expected a number or null"):
        report.write_report(results, tmp_path)


def test_runs_of_earlier_versions_stand_beside_those_that_measured_it() -> None:
    results = two_tasks()
    lora, joint, ours = results["methods"].values()
    for each in (lora, *lora["per_seed"], ours["per_seed"][1]):
        del each["transfer"]
    joint["transfer"] = ours["per_seed"][0]["transfer"] = 0.25
    header, rows = report.table(results)
    assert [row[header.index("transfer")] for row in rows] == ["–", "25.0", "–"]


def test_an_unfinished_run_shows_no_task_to_come() -> None:
    results = two_tasks()
    tasks = results["stream"]
    for result in results["methods"].values():
        result["accuracy_matrix"] = [[0.5] * len(tasks), *[[None] * len(tasks) for _ in tasks[1:]]]
    header, rows = report.table(results)
    assert [rows[0][header.index(task)] for task in tasks] == ["50.0", *["–"] * (len(tasks) - 1)]
