"""LiNeS: factors that grow with the layer, on everything that was learned, and back again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cllava_fast as cf
from cllava_fast.methods import METHODS
from cllava_fast.model import get_increments, paths
from tests.helpers import QUESTIONS, inputs, learn, logits

CONFIG = cf.IncrementConfig(rank=4, a_std=0.1)
LAYERS = 3


CONFIGS = {
    "product": CONFIG,
    "factor": cf.IncrementConfig(rank=4, a_std=0.1, context="factor"),
    "means": cf.IncrementConfig(rank=4, a_std=0.1, context_rank=4),
    "sequential_lora": cf.LoraConfig(rank=4, a_std=0.1),
}


@pytest.fixture(params=CONFIGS)
def learned(request: pytest.FixtureRequest, llava: Any, processor: Any, rng: torch.Generator) -> Any:
    cf.patch(llava, CONFIGS[request.param], processor=processor)
    learn(llava, 2, rng, b_std=0.1)
    return llava


def increment(model: Any) -> dict[str, torch.Tensor]:
    """What one selection adds to each weight, as ``merge`` computes it."""
    linears = paths.adapted_linears(model, model.increments.config.targets)
    before = {path: linear.weight.detach().double().clone() for path, linear in linears.items()}
    cf.merge(model, **({"instruction": QUESTIONS[0]} if model.increments.method.uses_query else {}))
    added = {path: linear.weight.detach().double() - before[path] for path, linear in linears.items()}
    cf.unmerge(model)
    return added


def test_the_formula(learned: Any) -> None:
    before = increment(learned)
    scaled = cf.scale_layers(learned, alpha=0.25, beta=0.5)
    after = increment(learned)
    assert len(before) == LAYERS and set(scaled.scales) == set(before)
    for layer, path in enumerate(sorted(before)):
        factor = 0.25 + 0.5 * layer / (LAYERS - 1)
        assert scaled.scales[path] == factor and f".{layer}." in path
        torch.testing.assert_close(after[path], factor * before[path], atol=1e-6, rtol=1e-4)


def test_the_model_answers_as_the_scaled_weights_do(learned: Any, processor: Any, rng: torch.Generator) -> None:
    batch = inputs(processor, QUESTIONS[:1], rng)
    cf.scale_layers(learned, alpha=0.25, beta=0.5)
    wanted = logits(learned, batch)
    cf.merge(learned, **({"instruction": QUESTIONS[0]} if learned.increments.method.uses_query else {}))
    torch.testing.assert_close(logits(learned, batch), wanted, atol=1e-4, rtol=1e-4)


EVERY = {name: kind(**({"surrogate": "sentence"} if "surrogate" in kind.__dataclass_fields__ else {}))
         for name, (kind, _) in METHODS.items()}  # fmt: skip


@pytest.mark.parametrize("config", [*EVERY.values(), CONFIGS["means"]], ids=[*EVERY, "means"])
def test_a_scale_of_zero_leaves_the_base_of_any_method(
    config: Any, llava: Any, processor: Any, rng: torch.Generator
) -> None:
    batch = inputs(processor, QUESTIONS[:2], rng)
    base = logits(llava, batch)
    cf.patch(llava, config, processor=processor)
    if get_increments(llava).method.uses_task:
        batch["query"] = torch.tensor([[1.0], [0.0]])
    learn(llava, 2, rng, b_std=0.3)
    before = logits(llava, batch)
    assert (before - base).abs().max() > 1e-2
    with cf.scale_layers(llava, alpha=0.0, beta=0.0):
        torch.testing.assert_close(logits(llava, batch), base, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(llava, batch), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_undo_is_exact(dtype: torch.dtype, learned: Any) -> None:
    learned.to(dtype)
    before = get_increments(learned).pool.state()
    with cf.scale_layers(learned, alpha=0.3, beta=0.7):
        inside = get_increments(learned).pool.state()
        again = cf.scale_layers(learned, alpha=0.1, beta=0.0)
        again.undo()
        again.undo()
    after = get_increments(learned).pool.state()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    changed = {name for name, tensor in before.items() if not torch.equal(inside[name], tensor)}
    last = f"/{LAYERS - 1}/"  # where alpha + beta is 1
    assert changed == {n for n, tensor in before.items() if n.endswith("B") and last not in n and tensor.numel()}


def test_a_copy_and_its_original_are_apart(learned: Any) -> None:
    before, other = get_increments(learned).pool.state(), copy.deepcopy(learned)
    cf.scale_layers(other, alpha=0.0, beta=1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in get_increments(learned).pool.state().items())
    assert all(
        torch.count_nonzero(tensor) == 0 for name, tensor in get_increments(other).pool.state().items()
        if name.endswith("B") and "/0/" in name
    )  # fmt: skip


def test_files_hold_the_scaled_rows(
    learned: Any, new_llava: Callable, processor: Any, rng: torch.Generator, tmp_path: Path
) -> None:
    what = {"task": "task1"} if learned.increments.method.uses_query else {}
    if getattr(learned.increments.config, "context", None) == "factor":
        what = {"instruction": QUESTIONS[0]}  # which keeps no mean of a task
    cf.export_peft(learned, tmp_path / "plain", **what)
    cf.scale_layers(learned, alpha=0.5, beta=1.0)
    cf.export_peft(learned, tmp_path / "scaled", **what)
    plain, scaled = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "scaled"))
    for name, tensor in plain.items():
        layer = int(name.partition("layers.")[2].partition(".")[0])
        factor = 0.5 + layer / (LAYERS - 1) if "lora_B" in name else 1.0
        torch.testing.assert_close(scaled[name], factor * tensor, atol=1e-6, rtol=1e-5)
    cf.save_pretrained(learned, tmp_path / "saved")
    again = cf.load_pretrained(new_llava(), tmp_path / "saved", processor=processor)
    batch = inputs(processor, QUESTIONS[:2], rng)
    assert torch.equal(logits(again, batch), logits(learned, batch))


@pytest.mark.parametrize("method", ["o_lora", "meteora"])
def test_the_first_task_of_a_method_without_queries_is_a_task(
    method: str, llava: Any, processor: Any, rng: torch.Generator
) -> None:
    cf.patch(llava, EVERY[method], processor=processor)
    learn(llava, 1, rng, commit_last=False)
    with pytest.raises(ValueError, match="a task is being learned"):
        cf.scale_layers(llava, alpha=1.0, beta=0.0)
    get_increments(llava).close_task("task0", None)
    cf.scale_layers(llava, alpha=1.0, beta=0.0)


def test_refusals(llava: Any, processor: Any, rng: torch.Generator) -> None:
    with pytest.raises(ValueError, match="not patched"):
        cf.scale_layers(llava, alpha=1.0, beta=0.0)
    cf.patch(llava, CONFIG, processor=processor)
    with pytest.raises(ValueError, match="nothing has been learned yet"):
        cf.scale_layers(llava, alpha=1.0, beta=0.0)
    learn(llava, 1, rng)
    with pytest.raises(ValueError, match="beta is nan; expected a finite number"):
        cf.scale_layers(llava, alpha=1.0, beta=float("nan"))
    scaled = cf.scale_layers(llava, alpha=0.5, beta=0.5)
    cf.merge(llava, instruction=QUESTIONS[0])
    for act in (scaled.undo, lambda: cf.scale_layers(llava, alpha=1.0, beta=0.0)):
        with pytest.raises(ValueError, match="unmerge"):
            act()
    cf.unmerge(llava)
    learn(llava, 1, rng, commit_last=False)
    with pytest.raises(ValueError, match="a task is being learned"):
        cf.scale_layers(llava, alpha=1.0, beta=0.0)
    get_increments(llava).method.close_task(
        get_increments(llava).pool, "task1", torch.randn(4, 384, generator=rng), get_increments(llava).groups
    )
    state = get_increments(llava).pool.state()
    with pytest.raises(ValueError, match="were learned, loaded or cast since"):
        scaled.undo()
    assert all(torch.equal(tensor, state[name]) for name, tensor in get_increments(llava).pool.state().items())
