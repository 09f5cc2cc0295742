"""What a task that fails leaves behind: what was learned before it, and nothing of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import Trainer

import cllava_fast as cf
from cllava_fast.methods.branch_lora import BranchLoraConfig
from cllava_fast.methods.mtl_lora import MtlLoraConfig
from cllava_fast.model import get_increments
from tests.train_helpers import CONFIG, arguments, stream, trainer


def test_a_task_that_fails_leaves_no_half_block(llava: Any, processor: Any, tmp_path: Path, monkeypatch: Any) -> None:
    run = trainer(llava, processor, tmp_path / "run")
    monkeypatch.setattr("cllava_fast.train.loop.tune", lambda *a, **k: (_ for _ in ()).throw(FloatingPointError("nan")))
    with pytest.raises(FloatingPointError):
        run.train()
    assert get_increments(llava).pool.block_rows == 0 and not (tmp_path / "run" / "run.json").exists()


def test_a_task_that_cannot_be_opened_leaves_no_half_block(
    llava: Any, processor: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    run, increments = trainer(llava, processor, tmp_path / "run"), get_increments(llava)
    open_task = increments.method.open_task

    def fails(*args: Any) -> None:
        open_task(*args)
        raise MemoryError("on purpose")

    monkeypatch.setattr(increments.method, "open_task", fails)
    with pytest.raises(MemoryError):
        run.train()
    assert increments.pool.block_rows == 0 and not increments.is_within_a_task


@pytest.mark.parametrize(
    "config",
    [
        CONFIG, cf.LoraConfig(rank=4, a_std=0.1), MtlLoraConfig(rank=4, a_std=0.1),
        BranchLoraConfig(rank=4, a_std=0.1, surrogate="sentence"),
    ],
    ids=lambda config: config.method,
)  # fmt: skip
@pytest.mark.parametrize("at", ["tune", "commit"])
def test_a_task_that_fails_leaves_what_was_learned(
    at: str, config: Any, llava: Any, processor: Any, tmp_path: Path
) -> None:
    learned: list[dict[str, Any]] = []

    class Fail(cf.ContinualCallback):
        def on_stage_end(self, task: str, number: int, stage: str, **kwargs: Any) -> None:
            if stage == "commit":
                learned.append({name: tensor.clone() for name, tensor in pool.state().items()})
            if (number, stage) == (1, at):
                raise RuntimeError("on purpose")

    pool = get_increments(cf.patch(llava, config, processor=processor)).pool
    run = cf.ContinualTrainer(llava, processor, stream(), arguments(tmp_path / "run"), callbacks=[Fail])
    with pytest.raises(RuntimeError, match="on purpose"):
        run.train()
    last, after = learned[-1], pool.state()
    assert last.keys() == after.keys() and all(torch.equal(last[name], after[name]) for name in last)
    assert not get_increments(llava).is_within_a_task


def test_a_task_that_fails_leaves_no_noise(llava: Any, processor: Any, tmp_path: Path) -> None:
    run = trainer(llava, processor, tmp_path / "run", trainer_options={"neftune_noise_alpha": 5.0})
    embedding, seen = llava.get_input_embeddings(), []

    def fail(self: Any, *args: Any) -> Any:
        seen.append(len(embedding._forward_hooks))
        raise FloatingPointError("nan")

    with patch.object(Trainer, "training_step", fail), pytest.raises(FloatingPointError):
        run.train()
    assert seen == [1] and not embedding._forward_hooks and not hasattr(embedding, "neftune_noise_alpha")


def test_a_diverging_run_stops(llava: Any, processor: Any, tmp_path: Path) -> None:
    config = cf.IncrementConfig(a_std=1e38)  # overflows in the first product
    run = trainer(llava, processor, tmp_path / "run", config=config, max_steps=30)
    with pytest.raises((FloatingPointError, ValueError), match="loss is nan|NaN or Inf"):
        run.train()
    assert get_increments(llava).pool.num_tasks == 0
