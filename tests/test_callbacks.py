"""What callbacks and loggers are told of a run, and what they may do to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import cllava_fast as cf
from cllava_fast.model import get_increments
from cllava_fast.train.tune import check_engine, training_options
from tests.train_helpers import CONFIG, arguments, stream


class Logger(TrainerCallback):
    """Writes beside the run, as some loggers do, and may end it in its first step."""

    def __init__(self, folder: Path, fails: bool) -> None:
        self.folder, self.fails = folder, fails

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.folder.mkdir(exist_ok=True)
        if self.fails:
            raise KeyError("no more")


def test_a_run_goes_on_beside_what_its_loggers_wrote(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    def run(fails: bool) -> cf.ContinualTrainer:
        cf.patch(model, CONFIG, processor=processor)
        values = arguments(tmp_path / "run", resume=not fails)
        return cf.ContinualTrainer(
            model, processor, stream(1), values, callbacks=[Logger(tmp_path / "run" / "logs", fails)]
        )

    model = new_llava()
    with pytest.raises(KeyError):
        run(fails=True).train()
    assert not model.training, "what failed leaves the model as it was"
    model = new_llava()
    assert run(fails=False).train().accuracy_matrix[0][0] is not None


class Recorder(cf.ContinualCallback):
    """Writes down what a callback is told, in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.logs: list[dict[str, float]] = []
        self.steps = 0

    def on_task_begin(self, task: str, number: int, **kwargs: Any) -> None:
        self.events.append(("begin", task, number))

    def on_stage_begin(self, task: str, number: int, stage: str, **kwargs: Any) -> None:
        self.events.append(f"{stage}...")

    def on_stage_end(self, task: str, number: int, stage: str, metrics: dict[str, float], **kwargs: Any) -> None:
        self.events.append((stage, sorted(metrics)))

    def on_task_end(self, task: str, number: int, metrics: dict[str, float], **kwargs: Any) -> None:
        self.events.append(("end", task, number, metrics))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_callbacks_are_told_of_tasks_stages_and_steps(llava: Any, processor: Any, tmp_path: Path) -> None:
    recorder, plain = Recorder(), TrainerCallback()
    cf.patch(llava, CONFIG, processor=processor)
    run = cf.ContinualTrainer(
        llava, processor, stream(), arguments(tmp_path / "run", logging_steps=2), callbacks=[recorder, plain]
    )
    result = run.train()
    tasks = [
        [
            ("begin", f"task{number}", number),
            "align...", ("align", ["loss"]),
            "tune...", ("tune", ["loss"]),
            "commit...", ("commit", []),
            "evaluate...", ("evaluate", [f"accuracy/task{i}" for i in range(number + 1)]),
        ]
        for number in range(2)
    ]  # fmt: skip
    ends = [event for event in recorder.events if event[0] == "end"]
    assert [event for event in recorder.events if event not in ends] == tasks[0] + tasks[1]
    assert [end[:3] for end in ends] == [("end", "task0", 0), ("end", "task1", 1)]
    metrics = ends[1][3]
    assert metrics["evaluate/accuracy/task0"] == result.accuracy_matrix[1][0]
    assert metrics["tune/loss"] == result.losses["task1"][-1] and metrics["align/loss"] < 0
    assert recorder.steps == 2 * 6
    # what goes to report_to names its task: steps begin anew with each
    losses = [log["task1/loss"] for log in recorder.logs if "task1/loss" in log]
    assert losses == result.losses["task1"] and len(losses) == 3
    assert all(name.startswith(("task0/", "task1/")) or name == "epoch" for log in recorder.logs for name in log)
    assert sum("task1/evaluate/accuracy/task0" in log for log in recorder.logs) == 1


def test_a_callback_can_stop_a_run(llava: Any, processor: Any, tmp_path: Path) -> None:
    class Stop(cf.ContinualCallback):
        def on_stage_begin(self, task: str, number: int, stage: str, **kwargs: Any) -> None:
            if stage == "evaluate":
                raise KeyboardInterrupt

    cf.patch(llava, CONFIG, processor=processor)
    run = cf.ContinualTrainer(llava, processor, stream(), arguments(tmp_path / "run", max_steps=1), callbacks=[Stop])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert get_increments(llava).pool.task_names == ["task0"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["matrix"] == [], "learned, not measured"


def test_a_callback_can_end_a_task_and_save_behind_it(llava: Any, processor: Any, tmp_path: Path) -> None:
    class Short(cf.ContinualCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 2

        def on_stage_end(self, task: str, number: int, stage: str, **kwargs: Any) -> None:
            if stage == "tune":
                with pytest.raises(ValueError, match="a task is being learned; save before it begins, or once it is"):
                    cf.save_pretrained(llava, tmp_path / task)
            if stage == "commit":
                cf.save_pretrained(llava, tmp_path / task)

    cf.patch(llava, cf.LoraConfig(), processor=processor)
    args = arguments(tmp_path / "run", logging_steps=1)
    result = cf.ContinualTrainer(llava, processor, stream(), args, callbacks=[Short]).train()
    assert [len(losses) for losses in result.losses.values()] == [2, 2]
    for number, task in enumerate(result.losses, start=1):
        saved = tmp_path / task, tmp_path / "run" / "increments" / f"{number:02d}-{task}"
        mine, own = ((folder / "adapter_model.safetensors").read_bytes() for folder in saved)
        assert mine == own


def test_report_to_reaches_transformers() -> None:
    options = training_options(cf.ContinualArguments("x", report_to=["wandb"], fp16=True), torch.device("cuda"), seed=1)
    with pytest.raises(ValueError, match="fp16 is set, which takes a GPU"):
        check_engine(cf.ContinualArguments("x", fp16=True), torch.device("cpu"))
    assert options["report_to"] == ["wandb"] and options["fp16"] and options["data_seed"] == 1
    assert training_options(cf.ContinualArguments("x"), torch.device("cpu"), seed=1)["report_to"] == "none"
