"""Runs that are stopped, killed or damaged go on to the same end, to the bit; `make faults` tries many more."""

from __future__ import annotations

import copy
import dataclasses
import errno
import functools
import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch

import cllava_fast as cf
from cllava_fast import atomic, cli
from cllava_fast.atomic import DamagedError, SaveError
from cllava_fast.cli.running import increments_of
from cllava_fast.data import chat_template, pad_to_square
from cllava_fast.demo.base import new_base
from cllava_fast.methods import LoraConfig
from cllava_fast.methods.branch_lora import BranchLoraConfig
from cllava_fast.methods.smora import SmoraConfig
from cllava_fast.model import get_increments
from cllava_fast.train import checkpoint, loop
from cllava_fast.train.checkpoint import Checkpoints, TaskSaver, pack, unpack
from cllava_fast.train.lock import InUseError
from cllava_fast.train.loop import saved_increments
from cllava_fast.train.runfile import RunFile
from cllava_fast.train.signals import RunStopped
from tests.train_helpers import CONFIG, arguments, stream, trainer

OPTIONS: dict[str, Any] = dict(
    max_steps=-1, num_train_epochs=2, align_steps=5, align_batch_size=8, logging_steps=2, save_steps=3, save_minutes=0,
    eval_batch_size=3,
)  # fmt: skip


class At(cf.ContinualCallback):
    """Does something once, behind a step of a stage of the second task."""

    def __init__(self, stage: str, step: int, do: Callable[[], None]) -> None:
        self.stage, self.step, self.do, self.now = stage, step, do, ("", -1)

    def on_stage_begin(self, task: str, number: int, stage: str, **kwargs: Any) -> None:
        self.now = (stage, number)

    def reached(self, step: int) -> None:
        if self.now == (self.stage, 1) and step == self.step:
            self.do()


def learned(
    processor: Any, output: Path, at: At | None = None, config: Any = CONFIG, device: str = "cpu", **values: Any
) -> Any:
    """Runs two tasks on a base with dropout; ``at`` is told of every step and of every batch of evaluation."""
    model = new_base(processor, seed=0).eval().to(device)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.2
    cf.patch(model, config, processor=processor)
    args = arguments(output, **{**OPTIONS, **values})
    trainer = cf.ContinualTrainer(model, processor, stream(), args, callbacks=[at] if at else [])
    due, check, batches = TaskSaver.due, trainer._watch.check, iter(range(1, 100))

    def each_step(self: TaskSaver, step: int) -> int:
        if at is not None:
            at.reached(step)
        return due(self, step)

    def each_batch() -> None:
        if at is not None and at.now == ("evaluate", 1):
            at.reached(next(batches))
        check()

    with patch.object(TaskSaver, "due", each_step), patch.object(trainer._watch, "check", each_batch):
        result = trainer.train()
    return result, get_increments(model).pool.state()


@pytest.fixture
def learn(processor: Any) -> Callable[..., Any]:
    return functools.partial(learned, processor)


@pytest.fixture(scope="module")
def whole(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run that nothing happened to."""
    return learned(processor, tmp_path_factory.mktemp("whole") / "run")


def same(found: Any, expected: Any) -> None:
    (result, state), (other, expected_state) = found, expected
    assert result.accuracy_matrix == other.accuracy_matrix and result.losses == other.losses
    assert result.examples == other.examples and result.trainable_parameters == other.trainable_parameters
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(tensor, expected_state[name]) for name, tensor in state.items())


def killed() -> None:
    raise KeyboardInterrupt


# steps of tuning: 3 in an epoch, 6 in all; saved at 3, the end of an epoch; losses are logged at 2 and 4
@pytest.mark.parametrize("stage, step", [("align", 4), ("tune", 2), ("tune", 4), ("tune", 5), ("evaluate", 2)])
def test_a_killed_run_ends_as_one_that_was_not(
    stage: str, step: int, learn: Callable[..., Any], whole: Any, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "cut", At(stage, step, killed))
    told: list[str] = []

    class Told(At):
        def on_stage_begin(self, task: str, number: int, stage: str, **kwargs: Any) -> None:
            told.append(stage)

    same(learn(tmp_path / "cut", Told("", 0, killed), resume=True), whole)
    # what was finished is not done again
    first = {"align": "align", "tune": "align" if step < 3 else "tune", "evaluate": "evaluate"}[stage]
    assert told[0] == first and told[-1] == "evaluate"


@pytest.mark.parametrize("save_steps", [1, 2])
def test_within_an_epoch_and_between_two_logs(
    save_steps: int, learn: Callable[..., Any], whole: Any, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "cut", At("tune", 5, killed), save_steps=save_steps)
    same(learn(tmp_path / "cut", resume=True, save_steps=save_steps), whole)


@pytest.mark.parametrize("save_steps", [2, 3])  # 3 steps in an epoch
def test_losses_of_epochs(save_steps: int, learn: Callable[..., Any], tmp_path: Path) -> None:
    options: dict[str, Any] = dict(trainer_options={"logging_strategy": "epoch"}, save_steps=save_steps)
    whole = learn(tmp_path / "whole", **options)
    assert [len(losses) for losses in whole[0].losses.values()] == [2, 2]
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "cut", At("tune", 4, killed), **options)
    same(learn(tmp_path / "cut", resume=True, **options), whole)


def test_accumulated_batches_and_workers(learn: Callable[..., Any], tmp_path: Path) -> None:
    options: dict[str, Any] = dict(
        per_device_train_batch_size=3, gradient_accumulation_steps=2, dataloader_num_workers=1, save_steps=1
    )
    whole = learn(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "cut", At("tune", 6, killed), **options)  # 4 in an epoch
    same(learn(tmp_path / "cut", resume=True, **options), whole)


@pytest.mark.parametrize("stage, step, saved", [("tune", 2, ["0002-tune-000002"]), ("evaluate", 1, [])])
def test_workers_outlive_sigterm_to_all_processes(
    stage: str, step: int, saved: list[str], learn: Callable[..., Any], whole: Any, tmp_path: Path
) -> None:
    workers: list[Any] = []
    outlived: list[bool] = []

    def tell() -> None:
        workers.extend(multiprocessing.active_children())
        # by another process, since the main one's own ends its workers
        subprocess.run(["kill", *(str(process) for process in (os.getpid(), *(worker.pid for worker in workers)))])
        for worker in workers:
            worker.join(0.2)
        outlived.extend(worker.is_alive() for worker in workers)

    options: dict[str, Any] = dict(save_steps=0, dataloader_num_workers=2)
    with pytest.raises(RunStopped, match="stopped by SIGTERM"):
        learn(tmp_path / "cut", At(stage, step, tell), **options)
    assert outlived == [True, True] and Checkpoints(tmp_path / "cut").names() == saved
    same(learn(tmp_path / "cut", resume=True, **options), whole)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage, step", [("align", 2), ("tune", 2), ("evaluate", 1)])
def test_a_signal_ends_the_step_and_saves(
    signum: signal.Signals, stage: str, step: int, learn: Callable[..., Any], whole: Any, tmp_path: Path
) -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    at = At(stage, step, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(RunStopped, match=f"stopped by {signum.name}") as stopped:
        learn(tmp_path / "cut", at, save_steps=0)
    assert stopped.value.exit_code == 128 + signum
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    saved = Checkpoints(tmp_path / "cut").names()
    assert saved == ([] if stage == "evaluate" else [f"0002-{stage}-{step:06d}"])
    same(learn(tmp_path / "cut", resume=True), whole)
    assert not Checkpoints(tmp_path / "cut").names() and not (tmp_path / "cut" / ".lock").exists()


@pytest.mark.parametrize(
    "config",
    [
        cf.LoraConfig(rank=4, a_std=0.1), cf.JointLoraConfig(rank=4, a_std=0.1),
        # with what no gradient trains
        SmoraConfig(experts=6, top_k=2, a_std=0.1, scale=4.0, bias_update_rate=0.1),
        BranchLoraConfig(rank=4, a_std=0.1, surrogate="sentence"),
    ],
    ids=lambda config: config.method,
)  # fmt: skip
def test_other_methods(config: Any, learn: Callable[..., Any], tmp_path: Path) -> None:
    whole = learn(tmp_path / "whole", config=config)
    at = At("tune", 4, killed)
    if config.method == "joint_lora":
        at.reached = lambda step: killed() if step == 4 else None  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "cut", at, config=config)
    same(learn(tmp_path / "cut", config=config, resume=True), whole)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    learn: Callable[..., Any], whole: Any, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "cut", At("tune", 5, killed), save_steps=1)
    names = Checkpoints(tmp_path / "cut").names()
    assert names == ["0002-tune-000003", "0002-tune-000004"]
    weights = tmp_path / "cut" / "checkpoints" / names[-1] / "state.safetensors"
    content = bytearray(weights.read_bytes())
    content[random.randrange(len(content))] ^= 1
    weights.write_bytes(content)
    with pytest.warns(UserWarning, match="000004/state.safetensors is damaged .*going on from what was saved before"):
        same(learn(tmp_path / "cut", resume=True), whole)


def test_damaged_increments_fall_back_to_the_task_before(learn: Callable[..., Any], whole: Any, tmp_path: Path) -> None:
    learn(tmp_path / "run", eval_budget=100)
    weights = tmp_path / "run" / "increments" / "02-task1" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.warns(
        UserWarning, match="02-task1/adapter_model.safetensors is damaged .*going on from the task before"
    ):
        same(learn(tmp_path / "run", eval_budget=100, resume=True), whole)
    found = RunFile(tmp_path / "run").read()
    assert found is not None and len(found["evaluated"]) == len(found["matrix"]) == 2
    for file in (tmp_path / "run" / "increments").glob("*/adapter_config.json"):
        file.unlink()
    with warnings.catch_warnings(), pytest.raises(DamagedError, match="holds no increments that can be read"):
        warnings.simplefilter("ignore")
        learn(tmp_path / "run", eval_budget=100, resume=True)


def test_a_run_that_died_before_it_tidied_up_does_so_when_it_goes_on(learn: Callable[..., Any], tmp_path: Path) -> None:
    clear, run = Checkpoints.clear, tmp_path / "run"

    def die(self: Checkpoints, *tasks: int) -> None:
        if any(name.startswith("0002") for name in self.names()):
            raise KeyboardInterrupt
        clear(self, *tasks)

    with patch.object(Checkpoints, "clear", die), pytest.raises(KeyboardInterrupt):
        learn(run)
    assert list((run / "checkpoints").iterdir())
    learn(run, resume=True)
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize("name, value", [("keep_increments", 1), ("save_minutes", -1), ("save_steps", -1)])
def test_arguments_that_make_no_sense(name: str, value: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        arguments(tmp_path, **{name: value})


def test_three_tasks_keep_two(llava: Any, processor: Any, tmp_path: Path) -> None:
    trainer(llava, processor, tmp_path / "run", tasks=3, max_steps=1, align_steps=1, keep_increments=2).train()
    assert sorted(p.name for p in (tmp_path / "run" / "increments").iterdir()) == ["02-task1", "03-task2"]


def test_tasks_of_any_name_are_saved_and_found(new_llava: Any, processor: Any, tmp_path: Path) -> None:
    names = ["a b", "日" * 90, "a_b"]  # the second is longer than a file's name may be
    tasks = [dataclasses.replace(task, name=name) for task, name in zip(stream(3).tasks, names, strict=True)]
    for resume in (False, True):
        model = cf.patch(new_llava(), CONFIG, processor=processor)
        args = arguments(tmp_path / "run", max_steps=1, align_steps=1, resume=resume)
        cf.ContinualTrainer(model, processor, cf.Stream(tasks), args).train()
        assert get_increments(model).pool.task_names == names
    found = [increments_of(tmp_path / "run", name) for name in names]
    assert [json.loads((folder / "adapter_config.json").read_text())["tasks"][-1] for folder in found] == names
    with pytest.raises(ValueError, match="no state after task 'c'; expected one of a b, 日+, a_b"):
        increments_of(tmp_path / "run", "c")


@pytest.mark.parametrize("keep", [2, 3])
def test_tasks_beyond_the_hundredth_are_the_newest(keep: int, llava: Any, processor: Any, tmp_path: Path) -> None:
    run = trainer(llava, processor, tmp_path / "run", keep_increments=keep)
    for number in (9, 10, 99, 100, 101):
        (tmp_path / "run" / "increments" / f"{number:02d}-task{number}").mkdir(parents=True)
    assert increments_of(tmp_path / "run", None).name == "101-task101"
    assert increments_of(tmp_path / "run", "task99").name == "99-task99"
    run._tidy(101)
    left = ["99-task99", "100-task100", "101-task101"][-keep:]
    assert [folder.name for folder in saved_increments(tmp_path / "run")] == left


def test_checkpoints_beyond_six_digits_are_the_newest(tmp_path: Path) -> None:
    names = ["0002-align-000004", "0002-tune-000003", "0002-tune-999999", "0002-tune-1000000", "10000-align-000001"]
    for name in (*reversed(names), "0009-notes"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert Checkpoints(tmp_path).names() == names


def test_a_damaged_checkpoint_takes_no_place_of_a_whole_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (3, 6):
        checkpoints.write(1, "tune", step, {}, {})
    (tmp_path / "checkpoints" / "0002-tune-000006" / "checkpoint.json").unlink()
    with pytest.warns(UserWarning, match="000006/checkpoint.json is missing; going on from what was saved before"):
        assert checkpoints.newest(1) == "0002-tune-000003"
    checkpoints.write(1, "tune", 5, {}, {})
    assert checkpoints.names() == ["0002-tune-000003", "0002-tune-000005"]


@pytest.mark.parametrize("config", [CONFIG, LoraConfig(rank=4, a_std=0.1)], ids=lambda config: config.method)
def test_a_first_task_that_could_not_be_saved_is_learned_anew(
    config: Any, new_llava: Callable[[], Any], processor: Any, tmp_path: Path
) -> None:
    def run(name: str) -> cf.ContinualTrainer:
        return trainer(new_llava(), processor, tmp_path / name, config=config, max_steps=2, align_steps=2)

    whole, cut = run("whole"), run("cut")
    expected = whole.train(), whole.increments.pool.state()
    with patch.object(loop, "save_pretrained", side_effect=SaveError("the disk is full")), pytest.raises(SaveError):
        cut.train()
    same((cut.train(), cut.increments.pool.state()), expected)


@pytest.mark.parametrize(
    "other", ["base_fingerprint", "surrogate_fingerprint", "chat_template_sha256", "image_settings"]
)
def test_another_base_or_template_does_not_go_on(
    other: str, new_llava: Callable[..., Any], processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(base: Any, its_processor: Any, **values: Any) -> cf.ContinualTrainer:
        return trainer(base, its_processor, tmp_path / "run", max_steps=2, align_steps=2, **values)

    with patch.object(loop.ContinualTrainer, "_evaluate", side_effect=KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            run(new_llava(), processor).train()
    model, its_processor = new_llava(), copy.deepcopy(processor)
    if other == "base_fingerprint":
        model.model.language_model.norm.weight.data += 1
    elif other == "chat_template_sha256":
        its_processor.chat_template = chat_template("vicuna_v1")
    elif other == "image_settings":
        pad_to_square(its_processor)
    cf.patch(model, CONFIG, processor=its_processor)
    told = "image_settings: do_pad False, not True" if other == "image_settings" else f"another {other}"
    with monkeypatch.context() as changed:
        if other == "surrogate_fingerprint":
            changed.setattr(get_increments(model).surrogate, "_fingerprint", "another one")
        with pytest.raises(FileExistsError, match=f"with {told}; give what it was started with, or a new output_dir"):
            run(model, its_processor, resume=True)
    file = tmp_path / "run" / "run.json"
    values = atomic.read_json(file)
    del values["image_settings"]  # as runs of earlier versions
    atomic.write_json(file, values)
    run(new_llava(), processor, resume=True).train()


def test_a_full_disk_is_one_sentence_and_loses_nothing(
    learn: Callable[..., Any], whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_disk = atomic._to_disk

    def full(path: Path) -> None:
        if "0002-tune" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        to_disk(path)

    monkeypatch.setattr(atomic, "_to_disk", full)
    with pytest.raises(SaveError, match="0002-tune-000003 cannot be written: No space left on device; what was saved"):
        learn(tmp_path / "run")
    monkeypatch.setattr(atomic, "_to_disk", to_disk)
    same(learn(tmp_path / "run", resume=True), whole)


def test_state_goes_through_json_and_safetensors(rng: torch.Generator) -> None:
    state = {
        0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(3, 4, generator=rng).T},
        "betas": (0.9, 0.999), "none": None, "loss": [0.1 + 0.2, float("inf")],
        "half": torch.ones(2, dtype=torch.bfloat16),
    }  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    values = json.loads(json.dumps(pack(state, tensors)))
    again = unpack(values, tensors)
    assert list(again) == list(state) and again["betas"] == [0.9, 0.999] and again["loss"] == state["loss"]
    assert torch.equal(again[0]["exp_avg"], state[0]["exp_avg"]) and again["half"].dtype == torch.bfloat16
    with pytest.raises(TypeError):
        pack({"fn": killed}, {})


def test_random_states_come_back() -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item()]

    draw()
    tensors: dict[str, torch.Tensor] = {}
    values = json.loads(json.dumps(pack(checkpoint.random_state(), tensors)))
    first = draw()
    assert draw() != first
    checkpoint.set_random_state(unpack(values, tensors))
    assert draw() == first


@pytest.mark.parametrize(
    "error, code, words",
    [
        (ValueError("no"), 1, "cllava-fast: no"),
        (SaveError("the disk is full"), 3, "cllava-fast: the disk is full"),
        (DamagedError("it is cut off"), 4, "cllava-fast: it is cut off"),
        (InUseError("it is in use"), 5, "cllava-fast: it is in use"),
        (OSError(errno.ENOSPC, "no space"), 3, "no space"),  # behind a redirected output
        (KeyboardInterrupt(), 130, "interrupted; what was saved is whole, go on with"),
        (RunStopped(signal.SIGTERM), 143, "stopped by SIGTERM; what was saved"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cllava_fast.cli import train

    def run(arguments: Any) -> int:
        raise error

    monkeypatch.setattr(train, "run", run)
    assert cli.main(["train", "a b.yaml", "--output", "x"]) == code
    said = capsys.readouterr().err
    assert words in said and said.rstrip().endswith("--resume") == (code > 100)


@pytest.mark.parametrize(
    ("started", "printed"),
    [
        ("/usr/bin/cllava-fast", "go on with:\n  cllava-fast train 'a b.yaml' --resume\n"),
        ("lib/cllava_fast/cli/__main__.py", "go on with:\n  python -m cllava_fast.cli train 'a b.yaml' --resume\n"),
        ("mine.py", "go on with the same command and --resume\n"),  # which may have registered a method
    ],
)
def test_a_run_goes_on_as_it_was_started(
    started: str, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cllava_fast.cli.train.run", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(sys, "argv", [started, "train", "a b.yaml"])
    assert cli.main() == 130
    assert capsys.readouterr().err.endswith(printed)


def test_the_command_that_goes_on_is_understood(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cllava_fast.cli import train

    def run(arguments: Any) -> int:
        if getattr(arguments, "training.resume"):
            return 0
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(sys, "argv", ["cllava-fast"])
    assert cli.main(["train", "--output", "x", "--", "a b.yaml"]) == 130
    _, _, printed = capsys.readouterr().err.partition("\n  cllava-fast ")
    assert cli.main(shlex.split(printed)) == 0
