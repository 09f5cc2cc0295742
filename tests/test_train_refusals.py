"""What a run refuses, before a weight or a file is touched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainingArguments

import cllava_fast as cf
from cllava_fast.atomic import read_json, write_json
from cllava_fast.data import chat_template, pad_to_square
from cllava_fast.methods import SequentialLora
from cllava_fast.methods.o_lora import OLora, OLoraConfig
from cllava_fast.model import get_increments
from tests.helpers import learn
from tests.train_helpers import CONFIG, arguments, stream, trainer


def test_a_directory_with_another_run(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    trainer(new_llava(), processor, tmp_path / "run").train()
    before = {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    with pytest.raises(FileExistsError, match="holds another run, with arguments: seed 0, not 1; give"):
        trainer(new_llava(), processor, tmp_path / "run", seed=1)
    with pytest.raises(FileExistsError, match="set resume"):
        trainer(new_llava(), processor, tmp_path / "run")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="holds other files than a run's"):
        trainer(new_llava(), processor, tmp_path / "notes")
    with pytest.raises(FileExistsError, match="a.txt is a file; give a new output_dir"):
        trainer(new_llava(), processor, tmp_path / "notes" / "a.txt")
    assert {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()} == before


def test_a_stream_of_the_same_names_and_sizes(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    trainer(new_llava(), processor, tmp_path / "run").train()
    other = stream()
    task = other.tasks[1]
    changed = [*task.train[:-1], cf.Sample("which color?", task.train[-1].answer, task.train[-1].image)]
    other.tasks[1] = cf.Task(task.name, changed, task.test, task.validation)
    model = cf.patch(new_llava(), CONFIG, processor=processor)
    with pytest.raises(FileExistsError, match=r"holds another run, with other samples of task \['task1'\]; give"):
        cf.ContinualTrainer(model, processor, other, arguments(tmp_path / "run", resume=True))
    other.tasks.append(stream(3).tasks[2])  # one more task does not hide it
    with pytest.raises(FileExistsError, match=r"with other samples of task \['task1'\]; give"):
        cf.ContinualTrainer(model, processor, other, arguments(tmp_path / "run", resume=True))
    turned = cf.Stream(stream().tasks[::-1])
    with pytest.raises(FileExistsError, match=r"with tasks \['task0', 'task1'\], not \['task1', 'task0'\]; give"):
        cf.ContinualTrainer(model, processor, turned, arguments(tmp_path / "run", resume=True))


@pytest.mark.parametrize("change", [{"stream_sha256": ["a", "b"]}, {"metrics": None}, {"stream": []}], ids=str)
def test_a_run_of_another_version(change: dict, new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    trainer(new_llava(), processor, tmp_path / "run", max_steps=1, align_steps=1).train()
    old = read_json(tmp_path / "run" / "run.json")
    write_json(tmp_path / "run" / "run.json", {**old, **change})
    with pytest.raises(FileExistsError, match="holds a run of another version of cllava_fast; give a new output_dir"):
        trainer(new_llava(), processor, tmp_path / "run", resume=True)


def test_a_refused_run_leaves_the_model_alone(llava: Any, processor: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="holds other files than a run's"):
        cf.ContinualTrainer(llava, processor, stream(), arguments(tmp_path))
    assert not hasattr(llava, "increments") and all(p.requires_grad for p in llava.parameters())


def test_a_model_patched_without_a_processor(llava: Any, processor: Any, tmp_path: Path) -> None:
    cf.patch(llava, cf.IncrementConfig(surrogate="backbone"))
    with pytest.raises(ValueError, match="patched without a processor"):
        cf.ContinualTrainer(llava, processor, stream(), arguments(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_nothing_is_written_for_bad_input(llava: Any, processor: Any, tmp_path: Path) -> None:
    empty = cf.Stream([cf.Task("a", train=[cf.Sample("q", "a")], test=[cf.Sample("q", "a")])])
    with pytest.raises(ValueError, match="'a' has no validation sample"):
        cf.ContinualTrainer(llava, processor, empty, arguments(tmp_path / "run", eval_split="validation"))
    with pytest.raises(TypeError, match="expected transformers.LlavaForConditionalGeneration"):
        cf.ContinualTrainer(torch.nn.Linear(1, 1), processor, stream(), arguments(tmp_path / "run"))
    with pytest.raises(ValueError, match="early stopping evaluates within a task"):
        cf.ContinualTrainer(llava, processor, stream(), arguments(tmp_path / "run"), callbacks=[EarlyStoppingCallback])
    cf.ContinualTrainer(llava, processor, stream(), arguments(tmp_path / "run"), callbacks=None)
    assert not (tmp_path / "run").exists()


def test_another_chat_template_than_the_models(llava: Any, processor: Any, tmp_path: Path) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    other = copy.deepcopy(processor)
    other.chat_template = chat_template("vicuna_v1")
    with pytest.raises(ValueError, match="another chat template than the one that the model was patched with"):
        cf.ContinualTrainer(llava, other, stream(), arguments(tmp_path / "run"))
    padding = copy.deepcopy(processor)
    pad_to_square(padding)
    with pytest.raises(ValueError, match="another do_pad of images than the one that the model was patched with"):
        prepared = cf.PreparedStream(stream(), padding)
        cf.ContinualTrainer(llava, processor, prepared, arguments(tmp_path / "run"))


@pytest.mark.parametrize("ends", [None, 5, [5, 6]])
def test_a_base_that_runs_on_behind_answers(ends: Any, llava: Any, processor: Any, tmp_path: Path) -> None:
    end = processor.tokenizer.eos_token_id
    llava.generation_config.eos_token_id = ends
    with pytest.warns(UserWarning, match=rf"'</s>' at their end.*generate\(\.\.\., eos_token_id={end}\)"):
        trainer(llava, processor, tmp_path / "run")
    llava.generation_config.eos_token_id = end if ends is None else [5, end]
    with warnings.catch_warnings(action="error", category=UserWarning):
        trainer(llava, processor, tmp_path / "run")


def test_a_model_that_has_learned_already(llava: Any, processor: Any, tmp_path: Path) -> None:
    trainer(llava, processor, tmp_path / "run").train()
    with pytest.raises(ValueError, match=r"has learned \['task0', 'task1'\] already; leave them out"):
        trainer(llava, processor, tmp_path / "other", tasks=3)
    with pytest.raises(ValueError, match=r"already; give a freshly patched model, which loads"):
        trainer(llava, processor, tmp_path / "run", tasks=3, resume=True)
    get_increments(llava).pool.open_block(
        4, keys=torch.ones(4, 384), a_std=0.1, context_init=None, generator=torch.Generator()
    )
    with pytest.raises(ValueError, match="a part of a task"):
        trainer(llava, processor, tmp_path / "other")
    cf.unpatch(llava)
    run = trainer(llava, processor, tmp_path / "first")
    run.increments.pool.open_block(
        4, keys=torch.ones(4, 384), a_std=0.1, context_init=None, generator=torch.Generator()
    )
    with pytest.raises(ValueError, match="a part of a task"):
        trainer(llava, processor, tmp_path / "first")
    cf.unpatch(llava)
    trainer(llava, processor, tmp_path / "joint", config=cf.JointLoraConfig(rank=2)).train()
    with pytest.raises(ValueError, match="joint_lora learns all tasks at once"):
        trainer(llava, processor, tmp_path / "other", config=cf.JointLoraConfig(rank=2))


def test_a_model_with_a_merged_selection(llava: Any, processor: Any, tmp_path: Path) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 1, torch.Generator().manual_seed(0))
    cf.merge(llava, task="task0")
    with pytest.raises(ValueError, match=r"a selection is merged .*cllava_fast.unmerge\(model\) first"):
        cf.ContinualTrainer(llava, processor, cf.Stream(list(stream(2))[1:]), arguments(tmp_path / "run"))
    assert get_increments(llava).pristine and not (tmp_path / "run").exists()


def test_what_is_of_another_kind(llava: Any, processor: Any, tmp_path: Path) -> None:
    args, tokenizer = arguments(tmp_path / "run"), copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = processor.chat_template
    for given, message in (
        ((processor, stream(), TrainingArguments(str(tmp_path / "run"))), "args is a TrainingArguments; expected"),
        ((processor, stream().tasks, args), "stream is a list; expected cllava_fast.Stream"),
        ((tokenizer, stream(), args), "has no image_processor; expected the whole processor"),
    ):
        with pytest.raises(TypeError, match=message):
            cf.ContinualTrainer(llava, *given)
    with pytest.raises(TypeError, match=r"callbacks is \[5\]; expected a list of transformers.TrainerCallback objects"):
        cf.ContinualTrainer(llava, processor, stream(), args, callbacks=[5])  # type: ignore[list-item]
    assert not hasattr(llava, "increments") and not (tmp_path / "run").exists()


def test_logs_that_go_nowhere(llava: Any, processor: Any, tmp_path: Path, monkeypatch: Any) -> None:
    integrations = "transformers.integrations.integration_utils"
    monkeypatch.setattr(f"{integrations}.is_wandb_available", lambda: False)
    monkeypatch.setattr(f"{integrations}.get_available_reporting_integrations", lambda: [])
    for values, error, message in (
        ({"report_to": ["wandbb"]}, ValueError, "report_to: wandbb is not supported"),
        ({"report_to": ["wandb"]}, ImportError, "report_to: .*requires wandb to be installed"),
    ):
        with pytest.raises(error, match=message):
            cf.ContinualTrainer(llava, processor, stream(), arguments(tmp_path / "run", **values))
    assert not hasattr(llava, "increments") and not (tmp_path / "run").exists()
    cf.ContinualTrainer(llava, processor, stream(), arguments(tmp_path / "run", report_to=["all"]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("output_dir", ""),
        ("eval_split", "train"),
        ("learning_rate", float("nan")),
        ("eval_batch_size", 0),
        ("logging_steps", 0),
        ("trainer_options", {"label_smoothing_factor": 0.1}),
        ("trainer_options", {"dataloader_drop_last": True}),
        ("trainer_options", {"dataloader_persistent_workers": True}),
        ("trainer_options", {"ignore_data_skip": True}),
        ("trainer_options", {"enable_jit_checkpoint": True}),
        ("trainer_options", {"eval_strategy": "steps"}),
        ("trainer_options", {"load_best_model_at_end": True}),
        ("trainer_options", {"auto_find_batch_size": True}),
        ("lr_scheduler_type", "reduce_lr_on_plateau"),
        ("trainer_options", {"save_strategy": "epoch"}),
        ("trainer_options", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        ("trainer_options", {"activation_checkpointing_kwargs": '{"use_reentrant": true}'}),
        ("trainer_options", {"accelerator_config": {"split_batches": True}}),
        ("trainer_options", {"accelerator_config": "config.json"}),
        ("num_train_epochs", -1.0),
        ("max_steps", -5),
        ("align_max_grad_norm", -1.0),
        ("max_grad_norm", float("inf")),
        ("weight_decay", float("nan")),
        ("align_steps", -3),
        ("seed", -1),
        ("seed", 429_496),
        ("trainer_options", {"max_steps": 3}),
        ("trainer_options", {"output_dir": "elsewhere"}),
        ("trainer_options", {"per_device_eval_batch_size": 4}),
        ("trainer_options", {"push_to_hub": True}),
        ("trainer_options", {"do_train": True}),
        ("trainer_options", {"train_sampling_strategy": "group_by_length"}),
    ],  # fmt: skip
)
def test_arguments(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        cf.ContinualArguments(**{"output_dir": "x", field: value})


def test_a_method_that_leaves_its_block_open(
    llava: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SequentialLora, "keeps_block", False)
    with pytest.raises(RuntimeError, match="sequential_lora left task 'task0' open: close_task has to commit"):
        trainer(llava, processor, tmp_path / "run", config=cf.LoraConfig()).train()


def test_a_method_that_commits_under_another_name(
    llava: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OLora, "close_task", lambda self, pool, *_: pool.commit("x", torch.ones(1)))
    with pytest.raises(RuntimeError, match=r"o_lora closed task 'task0', and the pool has \['x'\]; close_task has to"):
        trainer(llava, processor, tmp_path / "run", config=OLoraConfig()).train()
    assert not list((tmp_path / "run").glob("increments/*"))


def test_a_method_that_opens_no_block(
    llava: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SequentialLora, "open_task", lambda *_: None)
    with pytest.raises(RuntimeError, match="sequential_lora opened no block for task 'task0'; its open_task has to"):
        trainer(llava, processor, tmp_path / "run", config=cf.LoraConfig()).train()
