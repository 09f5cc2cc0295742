"""Tasks that come later: a run that goes on with new ones, or begins with what was learned before."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cllava_fast as cf
from cllava_fast.methods.branch_lora import BranchLoraConfig
from cllava_fast.methods.smora import SmoraConfig
from cllava_fast.model import get_increments
from tests.train_helpers import CONFIG, arguments, stream, trainer

LEARNED_TASK_BY_TASK = [
    CONFIG,
    dataclasses.replace(CONFIG, context_rank=2),
    cf.LoraConfig(rank=4, a_std=0.1),
    SmoraConfig(experts=4, top_k=2, a_std=0.1, bias_update_rate=0.1),
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


class Fails(cf.ContinualCallback):
    """In a stage of the second task."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_stage_begin(self, number: int, stage: str, **kwargs: Any) -> None:
        if number == 1 and stage == self.stage:
            raise OSError("an image cannot be decoded")


def trainer_failing(
    model: Any, processor: Any, folder: Path, tasks: list[cf.Task], stage: str = "", **values: Any
) -> cf.ContinualTrainer:
    cf.patch(model, CONFIG, processor=processor)
    args = arguments(folder, max_steps=2, align_steps=2, save_minutes=0, **values)
    return cf.ContinualTrainer(model, processor, cf.Stream(tasks), args, callbacks=[Fails(stage)])


def test_what_is_still_to_come_may_be_mended(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    """A sample that cannot be read once other tasks are learned does not cost what they have learned."""

    def run(stream: cf.Stream, stage: str = "", **values: Any) -> Any:
        trainer = trainer_failing(new_llava(), processor, tmp_path / "run", stream.tasks, stage, **values)
        trainer.train()
        return trainer.increments.pool.state()

    def mended(number: int, split: str, stream: cf.Stream) -> cf.Stream:
        tasks = list(stream)
        samples = getattr(tasks[number], split)
        tasks[number] = dataclasses.replace(tasks[number], **{split: samples[1:]})
        return cf.Stream(tasks)

    broken = stream(3)
    with pytest.raises(OSError, match="decoded"):
        run(broken, "tune", save_steps=2)  # a checkpoint of alignment lies there
    another = mended(1, "train", broken)
    with pytest.raises(FileExistsError, match=r"of task \['task1'\]; .* without the folder .*/checkpoints, what"):
        run(another, resume=True)
    with pytest.raises(FileExistsError, match=r"of task \['task0', 'task1'\]; give .*\(--output\)$"):
        run(mended(0, "train", another), resume=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(OSError, match="decoded"):
        run(another, "evaluate", resume=True)
    for wrong, names in ((mended(1, "train", another), "task1"), (mended(0, "test", another), "task0")):
        with pytest.raises(FileExistsError, match=rf"with other samples of task \['{names}'\]; give"):
            run(wrong, resume=True)
    last = mended(2, "train", mended(2, "test", mended(1, "test", another)))
    state = run(last, resume=True)
    shutil.rmtree(tmp_path / "run")
    whole = run(last)
    assert state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in whole)


def test_a_task_that_has_not_begun_may_be_left_out(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    every = stream(3)

    def run(tasks: list[cf.Task], stage: str = "", **values: Any) -> list[list[float | None]]:
        trainer = trainer_failing(new_llava(), processor, tmp_path / "run", tasks, stage, **values)
        return trainer.train().accuracy_matrix

    with pytest.raises(OSError, match="decoded"):
        run(every.tasks, "tune")
    assert len(run([every.tasks[0], every.tasks[2]], resume=True)) == 2
    assert json.loads((tmp_path / "run" / "results.json").read_text())["stream"] == ["task0", "task2"]
    with pytest.raises(FileExistsError, match=r"with tasks \['task0', 'task2'\], not \['task0', 'task1'\]; give"):
        run(every.tasks, resume=True)


def test_a_task_that_was_mended_goes_on_within_it(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    """A checkpoint is of the samples that it was learned from, and of no others; nothing of the old task stays."""
    old, first = stream(2).tasks, stream(2).tasks[0]
    new = [first, dataclasses.replace(old[1], name="mended", train=old[1].train[1:])]

    def run(folder: str, tasks: list[cf.Task], stage: str = "", **values: Any) -> Any:
        trainer = trainer_failing(new_llava(), processor, tmp_path / folder, tasks, stage, save_steps=2, **values)
        return trainer.train().losses, trainer.increments.pool.state()

    with pytest.raises(OSError, match="decoded"):
        run("run", old, "align")
    (tmp_path / "run" / "increments" / "02-task1").mkdir()  # saved, but not counted: the process died in between
    with pytest.raises(OSError, match="decoded"):
        run("run", new, "tune", resume=True)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["0002-align-000002"]
    assert [folder.name for folder in (tmp_path / "run" / "increments").iterdir()] == ["01-task0"]
    with pytest.raises(FileExistsError, match=r"tasks \['task0', 'mended'\], not \['task0', 'task1'\]"):
        run("run", old, resume=True)
    (tmp_path / "run" / "run.json").write_text("{")  # the one before it is of the same tasks
    with pytest.warns(UserWarning, match=r"going on from run.previous.json"):
        losses, state = run("run", new, resume=True)
    wanted, whole = run("whole", new)
    assert losses == wanted and all(torch.equal(state[name], whole[name]) for name in whole)


def test_a_checkpoint_of_a_task_that_is_learned_is_no_half_task(
    new_llava: Callable, processor: Any, tmp_path: Path
) -> None:
    every = stream(2)
    with pytest.raises(OSError, match="decoded"):
        trainer_failing(new_llava(), processor, tmp_path / "run", every.tasks, "align").train()
    (tmp_path / "run" / "checkpoints" / "0001-tune-000002").mkdir(parents=True)  # a process died before it was removed
    mended = dataclasses.replace(every.tasks[1], train=every.tasks[1].train[1:])
    assert trainer_failing(new_llava(), processor, tmp_path / "run", [every.tasks[0], mended], resume=True).train()


def test_what_is_the_end_now_is_measured_on_everything(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    every, budget = stream(3).tasks, {"eval_budget": 4}
    model = cf.patch(new_llava(), CONFIG, processor=processor)
    args = arguments(tmp_path / "run", max_steps=2, align_steps=2, **budget)

    class Late(cf.ContinualCallback):
        def on_task_begin(self, number: int, **kwargs: Any) -> None:
            if number == 2:
                raise OSError("an image cannot be decoded")

    with pytest.raises(OSError, match="decoded"):
        cf.ContinualTrainer(model, processor, cf.Stream(every), args, callbacks=[Late]).train()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["evaluated"][-1] == {"task0": 1, "task1": 6}
    trainer_failing(new_llava(), processor, tmp_path / "run", every[:2], resume=True, **budget).train()
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["evaluated"] == [{"task0": 6}, {"task0": 6, "task1": 6}] and len(saved["matrix"]) == 2


def test_a_joint_method_does_not_go_on(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    def run(tasks: int, **values: Any) -> cf.ContinualTrainer:
        return trainer(new_llava(), processor, tmp_path / "run", tasks, cf.JointLoraConfig(rank=2), **values)

    run(2, max_steps=1).train()
    with pytest.raises(FileExistsError, match=r"with tasks \['task0', 'task1'\], not \[.*'task2'\]; give"):
        run(3, max_steps=1, resume=True)
