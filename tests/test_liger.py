"""Liger's kernels in one model alone, and only while it is tuned. Liger itself needs a GPU; a stand-in does here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from transformers.models.llama import modeling_llama

import cllava_fast as cf
from cllava_fast.model import liger
from cllava_fast.model.liger import fused
from tests.base_models import new_model, new_processor
from tests.train_helpers import CONFIG, arguments, stream

NAME = "LlavaForConditionalGeneration"


@pytest.fixture
def model() -> Any:
    return new_model(NAME, new_processor(NAME))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stand-in was asked for; it patches as Liger does: classes of the module, and the model's own modules."""
    found: dict[str, Any] = {"calls": 0}

    class FusedNorm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found["calls"] += 1
            return modeling_llama.LlamaRMSNorm.forward(self, x)  # type: ignore[arg-type]

    def apply(
        rope: bool = True, cross_entropy: bool = False, fused_linear_cross_entropy: bool = True, model: Any = None
    ) -> None:
        found.update(rope=rope, losses=(cross_entropy, fused_linear_cross_entropy))
        modeling_llama.LlamaRMSNorm = FusedNorm  # type: ignore[misc]
        for layer in model.layers:
            if found.get("fails"):
                raise RuntimeError("no such kernel")
            layer.input_layernorm.in_place = True
            layer.input_layernorm.forward = MethodType(FusedNorm.forward, layer.input_layernorm)
            found["fails"] = found.get("later", False)

    name = "liger_kernel.transformers.monkey_patch"
    patching = ModuleType(name)
    patching.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, patching)
    return found


def state(model: Any) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in model.modules()] + [dict(vars(modeling_llama))]


class Watch(TrainerCallback):
    """How often the fused norms have run after each step."""

    def __init__(self, asked: dict[str, Any], calls: list[int]) -> None:
        self.asked, self.calls = asked, calls

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(self.asked["calls"])


def new_run(model: Any, output: Path, callbacks: Any = (), **values: Any) -> cf.ContinualTrainer:
    cf.patch(model, CONFIG, processor=new_processor(NAME))
    arguments_ = arguments(output, max_steps=2, align_steps=1, **values)
    return cf.ContinualTrainer(model, model.increments.processor, stream(2), arguments_, callbacks=callbacks)


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True)))


def test_this_model_alone_and_no_longer_than_asked(model: Any, asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    other, before, ids = new_model(NAME, new_processor(NAME)), state(model), torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    with fused(model):
        assert state(model)[-1] == before[-1], "the classes of transformers are its own again"
        assert torch.equal(model(input_ids=ids).logits, expected) and asked["calls"] == 2
        other(input_ids=ids)
        assert asked["calls"] == 2
    assert state(model) == before and asked["rope"] is False and asked["losses"] == (False, False)
    asked["later"] = True
    with pytest.raises(RuntimeError, match="no such kernel"), fused(model):
        pass
    assert state(model) == before


def test_what_liger_cannot_do_is_refused(model: Any, asked: Any) -> None:
    with pytest.raises(ValueError, match="need a GPU, and torch finds none"), fused(model):
        pass
    with pytest.raises(ValueError, match="no kernels for 'qwen2'; it has for llama"):
        with fused(new_model("Qwen2ForCausalLM", new_processor("Qwen2ForCausalLM"))):
            pass
    with pytest.raises(ValueError, match="use liger instead"):
        cf.ContinualArguments(output_dir="runs/x", trainer_options={"use_liger_kernel": True})


def test_it_is_for_tuning_alone(model: Any, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="need a GPU"):
        new_run(model, tmp_path / "run", liger=True)
    assert not (tmp_path / "run").exists()
    on_a_gpu(monkeypatch)
    calls = []
    trained = new_run(model, tmp_path / "run", liger=True, callbacks=[Watch(asked, calls)])
    trained.train()
    assert calls == [2 * step for step in range(1, 5)], "two layers in each of the steps, none in evaluation"
