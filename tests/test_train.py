"""The loop on a tiny stream: stages, what they may touch, resume."""

from __future__ import annotations

import dataclasses
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import HfArgumentParser, Trainer

import cllava_fast as cf
from cllava_fast import distributed, ops
from cllava_fast.methods.base import layers_of
from cllava_fast.model import get_increments
from cllava_fast.model.caches import returned
from cllava_fast.train.align import align_keys
from cllava_fast.train.garbage import nothing_old_collected
from cllava_fast.train.tune import training_options
from tests.train_helpers import arguments, stream, trainer


def test_learns_and_keeps_what_it_learned(llava: Any, processor: Any, tmp_path: Path) -> None:
    """A random base that says nothing useful answers both tasks after tuning their increments alone."""
    result = trainer(llava, processor, tmp_path / "run", max_steps=80).train()
    losses = list(result.losses.values())
    assert all(loss[-1] < 0.7 * loss[0] for loss in losses)
    matrix = result.accuracy_matrix
    assert matrix[0][1] is None and matrix[0][0] is not None
    assert result.average_accuracy is not None and result.average_accuracy > 0.6
    assert matrix[1][0] == matrix[0][0], "the first task must not be forgotten"
    assert result.selection_accuracy is not None and result.selection_accuracy > 0.9
    block = 4 * 2 * (128 + 128) * 3 + 4 * 384
    assert result.trainable_parameters == block + 1  # and one w
    spent = result.seconds_of
    assert list(spent) == list(result.losses) and {tuple(parts) for parts in spent.values()} == {
        ("learning", "evaluation")
    }
    assert sum(sum(parts.values()) for parts in spent.values()) == pytest.approx(result.seconds)
    (saved,) = json.loads((tmp_path / "run" / "results.json").read_text())["methods"].values()
    assert saved["seconds_of"] == spent


def test_base_and_committed_rows_stay_to_the_bit(llava: Any, processor: Any, tmp_path: Path, monkeypatch: Any) -> None:
    run = trainer(llava, processor, tmp_path / "run", tasks=3)
    base = {name: tensor.clone() for name, tensor in llava.state_dict().items()}
    pool = get_increments(llava).pool
    committed: list[dict[str, torch.Tensor]] = []
    commit = pool.commit

    def spy(*args: Any) -> None:
        commit(*args)
        committed.append({name: tensor.clone() for name, tensor in pool.named_buffers()})

    monkeypatch.setattr(pool, "commit", spy)
    run.train()
    after = llava.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in base.items() if not name.startswith("increments."))
    for early in committed[:-1]:
        for name, tensor in early.items():
            last = committed[-1][name]
            kept = last[: len(tensor), : len(tensor)] if name == "context" else last[: len(tensor)]
            assert torch.equal(kept, tensor), name
    w = committed[-1]["context"]
    assert w[1, 0] != 0.25 and torch.count_nonzero(w.triu()) == 0, "w of a task is learned"


def test_garbage_collection_leaves_out_what_was_there_before(llava: Any, processor: Any, tmp_path: Path) -> None:
    class Watch(cf.ContinualCallback):
        def __init__(self) -> None:
            self.frozen, self.fails = list[int](), False

        def on_stage_begin(self, stage: str, **kwargs: Any) -> None:
            self.frozen.append(gc.get_freeze_count())
            if self.fails:
                raise RuntimeError("on purpose")

    gc.unfreeze()  # what the tests have frozen
    watch = Watch()
    run = trainer(llava, processor, tmp_path / "run", tasks=1, max_steps=1, align_steps=1)
    run.callbacks = [watch]
    run.train()
    assert min(watch.frozen) > 100_000 and gc.get_freeze_count() == 0
    watch.fails = True
    other = trainer(cf.unpatch(llava), processor, tmp_path / "other", tasks=1)
    other.callbacks = [watch]
    with pytest.raises(RuntimeError, match="on purpose"):
        other.train()
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        old = weakref.ref(_Cycle())
        assert old() is not None
        with nothing_old_collected():
            assert old() is None, "garbage was frozen"
    finally:
        gc.enable()
    gc.freeze()
    with nothing_old_collected():
        pass
    assert gc.get_freeze_count() > 0, "the program's own stays"


class _Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_the_tuning_optimizer_holds_the_block_alone(
    llava: Any, processor: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from transformers import Trainer

    run = trainer(llava, processor, tmp_path / "run")
    seen: list[set[str]] = []
    create = Trainer.create_optimizer

    def spy(self: Any, *args: Any) -> Any:
        optimizer = create(self, *args)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        seen.append({name.split(".")[-1] for name, p in llava.named_parameters() if id(p) in held})
        return optimizer

    monkeypatch.setattr(Trainer, "create_optimizer", spy)
    run.train()
    assert seen == [{"block_A", "block_B"}, {"block_A", "block_B", "block_context"}]


def test_alignment_moves_keys_to_their_queries_and_nothing_else(llava: Any, processor: Any, tmp_path: Path) -> None:
    cf.patch(llava, cf.IncrementConfig(key_init="orthogonal"), processor=processor)
    increments = get_increments(llava)
    generator = torch.Generator().manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(40, 384, generator=generator) + 3 * torch.randn(384), dim=1)
    increments.method.open_task(increments.pool, queries, generator)
    before = {name: p.detach().clone() for name, p in increments.pool.named_parameters()}

    def mean_similarity() -> float:
        return ops.select(queries, increments.pool.block_keys.detach(), 4)[2].mean().item()

    start = mean_similarity()
    args = arguments(tmp_path, align_steps=60, align_learning_rate=1e-2)
    align_keys(increments.pool, queries, 1, args, 0, "align", increments.method.alignment_loss)
    assert mean_similarity() > start + 0.2
    changed = {n for n, p in increments.pool.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"block_keys"}


def test_the_order_of_alignment_is_a_function_of_its_seed(llava: Any, processor: Any, tmp_path: Path) -> None:
    increments = get_increments(cf.patch(llava, processor=processor))
    queries, keys = torch.randn(40, 384), []
    for seed in (3, 3, 4):
        increments.open_task(queries, torch.Generator().manual_seed(0))
        args = arguments(tmp_path, align_steps=3, align_batch_size=8)
        align_keys(increments.pool, queries, 1, args, seed, "align", increments.method.alignment_loss)
        keys.append(increments.pool.block_keys.detach().clone())
        increments.drop_task()
    assert torch.equal(keys[0], keys[1]) and not torch.equal(keys[0], keys[2])


def test_a_run_is_a_function_of_its_seed(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    states = []
    for i, seed in enumerate((3, 3, 4)):
        model = new_llava()
        torch.manual_seed(i)  # whatever went on before
        trainer(model, processor, tmp_path / str(i), seed=seed).train()
        states.append(get_increments(model).pool.state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["keys"], states[2]["keys"])


def test_an_interrupted_run_goes_on_to_the_same_end(
    new_llava: Callable, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = new_llava()
    expected = trainer(whole, processor, tmp_path / "whole", tasks=3).train()
    cut = new_llava()
    run = trainer(cut, processor, tmp_path / "cut", tasks=3)
    learn = run._learn

    def power_cut(number: int, *rest: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return learn(number, *rest)

    monkeypatch.setattr(run, "_learn", power_cut)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    model = new_llava()
    result = trainer(model, processor, tmp_path / "cut", tasks=3, resume=True).train()
    assert result.accuracy_matrix == expected.accuracy_matrix
    state, again = get_increments(whole).pool.state(), get_increments(model).pool.state()
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_joint_and_sequential_lora(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    joint = trainer(new_llava(), processor, tmp_path / "j", config=cf.JointLoraConfig(rank=4, a_std=0.1)).train()
    assert joint.accuracy_matrix[0] == [None, None] and None not in joint.accuracy_matrix[1]
    assert joint.average_forgetting is None and joint.selection_accuracy is None
    model = new_llava()
    sequential = trainer(model, processor, tmp_path / "s", config=cf.LoraConfig(rank=4, a_std=0.1)).train()
    assert sequential.accuracy_matrix[0][0] is not None
    assert sequential.trainable_parameters == 4 * 256 * 3 and get_increments(model).pool.num_tasks == 0


@pytest.mark.parametrize(
    "option",
    [
        {"bf16": True},
        {"activation_checkpointing": True},
        {"trainer_options": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"debug": False}}},
        {"gradient_accumulation_steps": 2},
        {"lr_scheduler_type": "constant_with_warmup", "dataloader_num_workers": 1},
    ],
)
def test_trainer_options(option: dict, llava: Any, processor: Any, tmp_path: Path) -> None:
    run = trainer(llava, processor, tmp_path / "run", **option)
    known, embedding = [set(vars(module)) for module in llava.modules()], llava.get_input_embeddings()
    filled: list[bool] = []
    hook = llava.model.language_model.register_forward_hook(
        lambda language, x, output: filled.append(returned(output) is not None) if language.training else None
    )
    run.train()
    hook.remove()
    assert filled and not any(filled), "no step fills a cache"
    # nothing of the engine stays on the model
    assert not hasattr(llava.config, "use_cache") and llava.config.text_config.use_cache
    added = set().union(*(set(vars(m)) - before for m, before in zip(llava.modules(), known, strict=True)))
    assert (
        not any("checkpointing" in name or "require_grads" in name for name in added) and not embedding._forward_hooks
    )
    assert not any(getattr(module, "gradient_checkpointing", False) for module in llava.modules())
    cf.unpatch(llava)


def test_what_the_last_steps_came_to_is_logged_and_shown(
    llava: Any, processor: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = trainer(llava, processor, tmp_path / "run", max_steps=3, logging_steps=2, progress=True).train()
    lines = [line.split() for line in capsys.readouterr().err.splitlines() if ": tune" in line]
    for (task, losses), line in zip(result.losses.items(), lines, strict=True):
        assert len(losses) == 2 and line == [f"{task}:", "tune", "3", "steps", "loss", f"{losses[-1]:.4f}"]


def test_a_compiled_run_learns_the_same(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    """And however many tasks there are: without a reset, torch would compile no more after the eighth."""
    plain, compiled = new_llava(), new_llava()
    trainer(plain, processor, tmp_path / "plain", max_steps=2).train()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    run = trainer(compiled, processor, tmp_path / "compiled", max_steps=2, trainer_options=options)
    counters.clear()
    with patch.object(torch.compiler, "reset", wraps=torch.compiler.reset) as reset:
        run.train()
    assert reset.call_count == 2
    assert counters["stats"]["unique_graphs"] >= 2
    found, wanted = (get_increments(model).pool.state() for model in (compiled, plain))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_task_is_tuned_in_the_precision_asked_for(
    dtype: torch.dtype, llava: Any, processor: Any, tmp_path: Path
) -> None:
    run = trainer(llava, processor, tmp_path / "run", bf16=dtype == torch.bfloat16)
    linear, seen = llava.model.language_model.layers[0].self_attn.q_proj, []
    linear.register_forward_hook(lambda module, x, y: seen.append(y.dtype) if llava.training else None)
    run.train()
    assert seen == [dtype] * 12
    cf.unpatch(llava)
    assert not hasattr(llava, "_is_accelerate_prepared"), "another trainer's own precision would not reach it"


def test_what_an_optimizer_averages_is_what_is_learned(
    llava: Any, processor: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    class Averaging(torch.optim.SGD):
        def eval(self) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(0.25)

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda *args: (Averaging, {"lr": 1e-3}))
    trainer(llava, processor, tmp_path / "run", tasks=1).train()
    assert all((factors.B == 0.25).all() for factors in layers_of(get_increments(llava).pool))


@pytest.mark.parametrize("sharded", [True, False])
def test_several_processes_move_the_model_to_their_device(
    sharded: bool, llava: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not a language model that FSDP is about to shard."""
    run = trainer(llava, processor, tmp_path / "run")
    monkeypatch.setattr(distributed, "device", lambda: torch.device("meta"))
    run._place()  # one process: the model stays where it is
    assert llava.device.type == "cpu"
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(sharded).lower())
    run._place()
    moved = {name.split(".")[1] for name, tensor in llava.state_dict().items() if tensor.device.type == "meta"}
    stayed = {name.split(".")[1] for name, tensor in llava.state_dict().items() if tensor.device.type == "cpu"}
    assert {"vision_tower", "multi_modal_projector", "pool"} <= moved and bool(stayed) == sharded
    assert ("language_model" in stayed) == sharded and ("language_model" in moved) != sharded


def test_what_transformers_calls_the_same_is_handed_on() -> None:
    given = {
        "num_train_epochs": 2.5, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
        "learning_rate": 0.5, "lr_scheduler_type": "linear", "warmup_steps": 7.0, "weight_decay": 0.25,
        "max_grad_norm": 0.125, "bf16": True, "dataloader_num_workers": 3, "logging_steps": 4, "max_steps": 5,
    }  # fmt: skip
    options = training_options(cf.ContinualArguments("x", **given), torch.device("cpu"), seed=1)
    assert given.items() <= options.items()


def test_every_argument_has_help_and_an_option() -> None:
    assert all(field.metadata.get("help", "").endswith(".") for field in dataclasses.fields(cf.ContinualArguments))
    parser = HfArgumentParser(cf.ContinualArguments)
    (parsed,) = parser.parse_args_into_dataclasses(
        "--output_dir x --align_steps 3 --report_to wandb tensorboard --eval_split validation --no_progress".split()
    )
    expected = cf.ContinualArguments(
        "x", align_steps=3, report_to=["wandb", "tensorboard"], eval_split="validation", progress=False
    )
    assert parsed == expected
    assert cf.ContinualArguments("x", report_to="none").report_to == []  # type: ignore[arg-type]
    assert "report_to" not in expected.identity() and expected.identity() != cf.ContinualArguments("x").identity()


def test_an_unpatched_model_is_patched(llava: Any, processor: Any, tmp_path: Path) -> None:
    run = cf.ContinualTrainer(llava, processor, stream(), arguments(tmp_path / "run"))
    assert run.model is llava and get_increments(llava).config == cf.IncrementConfig()


def test_validation_split_is_what_is_measured_when_asked(llava: Any, processor: Any, tmp_path: Path) -> None:
    run = trainer(llava, processor, tmp_path / "run", eval_split="validation")
    assert [len(measured.records) for measured in run._evaluate(2)] == [3, 3]


def test_run_json_is_readable(llava: Any, processor: Any, tmp_path: Path) -> None:
    trainer(llava, processor, tmp_path / "run").train()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["method"]["method"] == "continual_llava" and run["arguments"]["max_steps"] == 6
    assert len(run["matrix"]) == 2 and run["stream"] == {"task0": [24, 6], "task1": [24, 6]}
    assert sorted(p.name for p in (tmp_path / "run" / "increments").iterdir()) == ["01-task0", "02-task1"]
