"""Tasks that come later: a run that goes on with new ones, or begins with what was learned before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cllava_fast as cf
from cllava_fast.methods.branch_lora import BranchLoraConfig
from cllava_fast.methods.smora import SmoraConfig
from cllava_fast.model import get_increments
from tests.test_train import CONFIG, arguments, stream, trainer

LEARNED_TASK_BY_TASK = [
    CONFIG,
    dataclasses.replace(CONFIG, context_rank=2),
    cf.LoraConfig(rank=4, a_std=0.1),
    SmoraConfig(experts=4, top_k=2, a_std=0.1, balance_rate=0.1),
    BranchLoraConfig(rank=4, a_std=0.1, surrogate="sentence"),
]


def of(whole: cf.Stream, first: int, last: int) -> cf.Stream:
    return cf.Stream(whole.tasks[first:last])


@pytest.mark.parametrize("config", LEARNED_TASK_BY_TASK, ids=lambda config: config.method)
def test_new_tasks_come_after_those_that_were_learned(
    config: Any, new_llava: Callable, processor: Any, tmp_path: Path
) -> None:
    """In a run that goes on, or in one that begins with saved increments and without old data: as in one run."""
    every = stream(3)

    def run(name: str, tasks: cf.Stream, increments: Path | None = None, **values: Any) -> Any:
        model = cf.patch(new_llava(), config, processor=processor)
        if increments is not None:
            cf.load_pretrained(model, increments)
        args = arguments(tmp_path / name, max_steps=2, align_steps=2, **values)
        result = cf.ContinualTrainer(model, processor, tasks, args).train()
        return result, get_increments(model).pool.state()

    def same(found: dict[str, torch.Tensor]) -> bool:
        return found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)

    whole, state = run("whole", every)
    run("run", of(every, 0, 2))
    with pytest.raises(FileExistsError, match="set resume"):
        run("run", every)
    grown, found = run("run", every, resume=True)
    assert grown.accuracy_matrix == whole.accuracy_matrix and grown.losses == whole.losses and same(found)
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert list(saved["stream"]) == every.task_names
    with pytest.raises(FileExistsError, match=r"with tasks \[.*'task2'\], not \['task0', 'task1'\]; give"):
        run("run", of(every, 0, 2), resume=True)

    begun = tmp_path / "whole" / "increments" / "02-task1"
    alone, found = run("alone", of(every, 2, 3), begun)
    (saved,) = (tmp_path / "alone" / "increments").iterdir()
    if json.loads((begun / "adapter_config.json").read_text())["tasks"]:
        assert alone.accuracy_matrix == [whole.accuracy_matrix[2][2:]] and same(found) and saved.name == "03-task2"
    else:  # shared rows that nobody counts tasks in: other random numbers
        assert not same(found) and saved.name == "01-task2"
    state = found
    again, found = run("alone", of(every, 2, 3), begun, resume=True)
    assert again.accuracy_matrix == alone.accuracy_matrix and same(found)
    with pytest.raises(FileExistsError, match="another learned_before"):
        run("alone", of(every, 2, 3), tmp_path / "whole" / "increments" / "01-task0", resume=True)


def test_a_joint_method_does_not_go_on(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    def run(tasks: int, **values: Any) -> cf.ContinualTrainer:
        return trainer(new_llava(), processor, tmp_path / "run", tasks, cf.JointLoraConfig(rank=2), **values)

    run(2, max_steps=1).train()
    with pytest.raises(FileExistsError, match=r"with tasks \['task0', 'task1'\], not \[.*'task2'\]; give"):
        run(3, max_steps=1, resume=True)
