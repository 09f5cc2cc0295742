"""O-LoRA: all rows act, and a new one keeps away from those before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cllava_fast as cf
from cllava_fast.methods.o_lora import OLoraConfig
from cllava_fast.model import get_increments, paths
from tests.helpers import QUESTIONS, inputs, learn
from tests.method_helpers import check_layers, check_life_cycle, dense
from tests.train_helpers import arguments, stream

CONFIG = OLoraConfig(rank=4, a_std=0.1)


def overlap(pool: Any) -> float:
    """Mean ``|A_i A_t^T|`` of the newest committed row with those before it, in units of the rows' lengths."""
    total = []
    for factors in pool.layers.values():
        A = torch.nn.functional.normalize(factors.A.double(), dim=2)
        total.append((A[:-1].flatten(0, 1) @ A[-1].t()).abs().mean())
    return torch.stack(total).mean().item()


@pytest.mark.parametrize("tasks", [1, 3])
def test_all_committed_rows_act(tasks: int, llava: Any, processor: Any, rng: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, tasks, rng, b_std=0.1)
    selection = increments.method.select(increments.pool, None, 1, False)
    alpha = torch.ones(2, tasks, dtype=torch.float64)
    assert torch.equal(dense(selection, increments.pool, 2), alpha)
    check_layers(llava, selection, alpha, rng)


@pytest.mark.parametrize("tasks", [1, 3])
def test_in_training_the_open_row_acts_with_them(tasks: int, llava: Any, processor: Any, rng: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, tasks, rng, b_std=0.1, commit_last=False)
    selection = increments.method.select(increments.pool, None, 1, True)
    assert selection.past is None and (selection.context is None) == (tasks == 1)
    alpha = torch.ones(3, tasks, dtype=torch.float64)
    assert torch.equal(dense(selection, increments.pool, 3), alpha)
    check_layers(llava, selection, alpha, rng)
    evaluated = increments.method.select(increments.pool, None, 1, False)
    alpha[:, -1] = 0.0  # half a task never answers
    assert torch.equal(dense(evaluated, increments.pool, 3), alpha)


@pytest.mark.parametrize("weights", [(0.5, 0.0), (0.0, 0.3), (0.7, 0.2)])
def test_the_penalty_is_the_public_codes(
    weights: tuple[float, float], llava: Any, processor: Any, rng: torch.Generator
) -> None:
    config = OLoraConfig(rank=4, a_std=0.1, lambda_1=weights[0], lambda_2=weights[1])
    cf.patch(llava, config, processor=processor)
    increments = learn(llava, 3, rng, b_std=0.1, commit_last=False)
    exact = torch.zeros((), dtype=torch.float64)
    leaves, wanted = [], []
    for factors in increments.pool.layers.values():
        A, B = (t.detach().double()[0].requires_grad_() for t in (factors.block_A, factors.block_B))
        for earlier in factors.A.double():
            for j in range(4):
                for k in range(4):
                    exact = exact + weights[0] * (earlier[j] * A[k]).sum().abs()
        exact = exact + weights[1] * ((A**2).sum().sqrt() + (B**2).sum().sqrt())
        leaves += [factors.block_A, factors.block_B]
        wanted += [A, B]
    penalty = increments.method.penalty(increments.pool)
    torch.testing.assert_close(penalty.double(), exact, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(penalty, leaves, materialize_grads=True, allow_unused=True)
    exacts = torch.autograd.grad(exact, wanted, materialize_grads=True, allow_unused=True)
    for gradient, want in zip(gradients, exacts, strict=True):
        torch.testing.assert_close(gradient[0].double(), want, atol=1e-5, rtol=1e-4)


def test_the_first_task_has_no_penalty(llava: Any, processor: Any, rng: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, 1, rng, commit_last=False)
    assert increments.method.penalty(increments.pool) is None


def test_the_penalty_makes_rows_orthogonal(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    overlaps = {}
    for weight in (0.0, 0.5):
        model = cf.patch(new_llava(), OLoraConfig(rank=4, a_std=0.1, lambda_1=weight), processor=processor)
        args = arguments(tmp_path / str(weight), max_steps=30, learning_rate=3e-3)
        cf.ContinualTrainer(model, processor, stream(2), args).train()
        overlaps[weight] = overlap(get_increments(model).pool)
    assert overlaps[0.5] < 0.5 * overlaps[0.0], overlaps


def test_life_cycle(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    _, model = check_life_cycle(new_llava, processor, CONFIG, tmp_path)
    assert get_increments(model).pool.num_rows == 3


def test_generation_and_merging(llava: Any, processor: Any, rng: torch.Generator, tmp_path: Path) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    pool = learn(llava, 3, rng, b_std=0.1).pool
    batch = inputs(processor, QUESTIONS[:3], rng)
    images = [llava.config.image_token_id]  # a random model may write one, which no picture comes with
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "suppress_tokens": images}
    assert torch.equal(llava.generate(**batch, **options), llava.generate(**batch, use_cache=False, **options))
    with torch.no_grad():
        wanted = llava(**batch).logits
    linears = paths.adapted_linears(llava, CONFIG.targets)
    before = {path: linear.weight.double() for path, linear in linears.items()}
    cf.merge(llava)
    for path, linear in linears.items():
        factors = pool.factors(path)
        exact = before[path] + CONFIG.scale * torch.einsum("nro,nri->oi", factors.B.double(), factors.A.double())
        torch.testing.assert_close(linear.weight.double(), exact, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(llava(**batch).logits, wanted, atol=1e-4, rtol=1e-4)
    cf.unmerge(llava)
    assert cf.export_peft(llava, tmp_path / "lora").rank == 12
    with pytest.raises(ValueError, match="does not select; give none"):
        cf.merge(llava, task="task1")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lambda_1": -0.5}, "lambda_1 is -0.5; expected 0 or more"),
        ({"lambda_2": float("nan")}, "lambda_2 is nan"),
        ({"lambda_1": float("inf")}, "lambda_1 is inf"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OLoraConfig(**fields)
