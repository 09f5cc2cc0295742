"""Evaluation within a budget of samples (``ContinualArguments.eval_budget``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cllava_fast as cf
from cllava_fast.evaluate.budget import within_budget
from tests.train_helpers import CONFIG, arguments, stream


def test_everything_is_measured_while_it_fits() -> None:
    everything = {"a": [0, 1, 2], "b": [0, 1]}
    assert within_budget({"a": 3, "b": 2}, "b", None) == within_budget({"a": 3, "b": 2}, "b", 5) == everything


def test_the_newest_stays_whole_and_the_others_share(rng: torch.Generator) -> None:
    for _ in range(50):
        tasks = int(torch.randint(2, 12, (), generator=rng))
        sizes = {f"t{i}": int(torch.randint(1, 40, (), generator=rng)) for i in range(tasks)}
        newest = f"t{tasks - 1}"
        budget = int(torch.randint(1, sum(sizes.values()) + 1, (), generator=rng))
        chosen = within_budget(sizes, newest, budget)
        assert list(chosen) == list(sizes) and len(chosen[newest]) == sizes[newest]
        counts = {name: len(set(places)) for name, places in chosen.items()}
        assert all(1 <= counts[name] <= size for name, size in sizes.items())
        assert all(0 <= i < sizes[name] for name, places in chosen.items() for i in places)
        spent, least = sum(counts.values()), sizes[newest] + tasks - 1
        assert spent <= max(budget, least)
        if budget >= least:
            assert spent == min(budget, sum(sizes.values())), "what is there is used"
        most = max((counts[name] for name in counts if name != newest), default=0)
        cut = [counts[name] for name, size in sizes.items() if name != newest and counts[name] < size]
        assert all(most - count <= 1 for count in cut), "evenly"


def test_a_smaller_share_is_a_part_of_a_larger_one() -> None:
    shares = [set(within_budget({"a": 50, "b": 10}, "b", budget)["a"]) for budget in range(11, 60)]
    assert all(small < large for small, large in zip(shares, shares[1:], strict=False))
    assert shares[10] != set(range(len(shares[10]))), "drawn, not the first ones"


def test_a_run_within_its_budget(new_llava: Any, processor: Any, tmp_path: Path) -> None:
    def run(name: str, budget: int | None) -> tuple[Any, dict[str, Any], Path]:
        folder = tmp_path / name
        model = cf.patch(new_llava(), CONFIG, processor=processor)
        result = cf.ContinualTrainer(model, processor, stream(3), arguments(folder, eval_budget=budget)).train()
        return result, json.loads((folder / "run.json").read_text()), folder

    (whole, everything, full), (part, kept, folder) = run("whole", None), run("part", 8)
    assert everything["evaluated"] == []
    assert kept["evaluated"] == [
        {"task0": 6}, {"task0": 2, "task1": 6}, {"task0": 6, "task1": 6, "task2": 6},
    ]  # fmt: skip
    assert json.loads((folder / "results.json").read_text())["config"]["evaluated"] == kept["evaluated"]
    assert part.accuracy_matrix[2] == whole.accuracy_matrix[2], "the end is measured on everything"

    def records(where: Path) -> dict[str, Any]:
        lines = (next((where / "predictions").glob("02-*")) / "task0.jsonl").read_text().splitlines()
        return {record["id"]: record for record in map(json.loads, lines)}

    chosen = records(folder)
    places = within_budget({"task0": 6, "task1": 6}, "task1", 8)["task0"]
    assert list(chosen) == [str(place) for place in places]
    assert all(record == records(full)[name] for name, record in chosen.items()), "ids are those of the whole split"


def test_refused() -> None:
    with pytest.raises(ValueError, match="eval_budget is 0"):
        cf.ContinualArguments(output_dir="x", eval_budget=0)
