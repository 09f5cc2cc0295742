"""MTL-LoRA: one A and several B for all tasks, and each task's own transformation and weights between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import cllava_fast as cf
from cllava_fast.methods import config_from_dict
from cllava_fast.methods.mtl_lora import MtlLora, MtlLoraConfig
from cllava_fast.model import get_increments, paths
from cllava_fast.pool import Factors, LinearShape, Pool
from tests import routing_helpers as check
from tests.helpers import QUESTIONS, inputs
from tests.train_helpers import trainer

CONFIG = MtlLoraConfig(ups=3, rank=4, a_std=0.1, scale=4.0, dropout=0.0)
TASKS = torch.tensor([[1.0], [0.0], [1.0]])  # mixed in one batch


@pytest.fixture(autouse=True)
def learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "born", born)


def born(model: Any, config: Any, processor: Any, rng: torch.Generator) -> Any:
    """Two tasks as if they had been trained."""
    cf.patch(model, config, processor=processor)
    increments = get_increments(model)
    for task in range(2):
        increments.method.open_task(increments.pool, None, rng)
        for factors in increments.pool.layers.values():
            torch.nn.init.normal_(factors.block_B, std=0.1, generator=rng)
            torch.nn.init.normal_(factors.block_lambda, std=0.5, generator=rng)
        increments.method.close_task(increments.pool, f"task{task}", None, 1)
    return increments


def by_loops(x: Tensor, linear: Any, factors: Factors, tasks: list[int], config: MtlLoraConfig) -> Tensor:
    """The formula, sample by sample and B by B."""
    lambdas = torch.cat([factors.lambdas, factors.block_lambda]).to(x.dtype)
    weights = torch.cat([factors.weights, factors.block_weights]).to(x.dtype)
    outputs = []
    for b, t in enumerate(tasks):
        low = (x[b] @ factors.block_A[0].to(x.dtype).T) @ lambdas[t].T
        strength = [(w / config.temperature).exp() for w in weights[t]]
        y = functional.linear(x[b], linear.weight, linear.bias)
        for i in range(config.ups):
            y = y + config.scale * strength[i] / sum(strength) * (low @ factors.block_B[i].to(x.dtype))
        outputs.append(y)
    return torch.stack(outputs)


def test_every_layer_computes_the_formula(llava: Any, processor: Any, rng: torch.Generator) -> None:
    increments = born(llava.double(), CONFIG, processor, rng)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    linears = paths.adapted_linears(llava, CONFIG.targets)
    assert {path.rpartition(".")[2] for path in linears} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for path, linear in linears.items():
        linear.register_forward_hook(lambda _, args, y, path=path: seen.update({path: (args[0], y)}))
    batch = inputs(processor, QUESTIONS[:3], rng)
    batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad():
        llava(**batch, query=TASKS)
        for path, (x, y) in seen.items():
            expected = by_loops(x, linears[path], increments.pool.factors(path), [1, 0, 1], CONFIG)
            # rows are made in float32, as they are kept
            torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(
                expected, by_loops(x, linears[path], increments.pool.factors(path), [0, 1, 0], CONFIG), atol=1e-2
            )


def test_gradients_reach_what_all_share_and_the_task_at_hand(llava: Any, processor: Any, rng: torch.Generator) -> None:
    increments = born(llava, CONFIG, processor, rng)
    increments.method.open_task(increments.pool, None, rng)
    path, linear = next(iter(paths.adapted_linears(llava, CONFIG.targets).items()))
    factors = increments.pool.factors(path)
    x = torch.randn(2, 5, linear.in_features, generator=rng, requires_grad=True)
    weight = torch.randn(2, 5, linear.out_features, generator=rng)
    increments.call.active = increments.method.select(increments.pool, torch.full((2, 1), 2.0), 1, True)
    wanted = [x, factors.block_A, factors.block_B, factors.block_lambda, factors.block_weights]
    found = torch.autograd.grad((increments.inject(x, linear, None, factors) * weight).sum(), wanted)
    expected = torch.autograd.grad((by_loops(x, linear, factors, [2, 2], CONFIG) * weight).sum(), wanted)
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-3)
    assert not factors.lambdas.requires_grad and not factors.weights.requires_grad


def test_a_task_is_born_without_a_transformation(generator: torch.Generator) -> None:
    method, pool = MtlLora(CONFIG), Pool(rank=4, key_dim=0, shapes={"o": LinearShape(6, 5)}, shares_A=True)
    method.open_task(pool, None, generator)
    factors = pool.factors("o")
    shared = factors.block_A, factors.block_B
    assert torch.equal(factors.block_lambda, torch.eye(4)[None]) and factors.block_A.shape == (1, 4, 6)
    assert 0 < factors.block_weights.abs().max() <= 3**-0.5 and factors.block_weights.shape == (1, 3)
    factors.block_lambda.data += 1
    first = factors.block_weights.detach().clone()
    method.close_task(pool, "a", None, 1)
    assert torch.equal(factors.lambdas, torch.eye(4)[None] + 1) and torch.equal(factors.weights, first)
    method.open_task(pool, None, generator)
    assert (factors.block_A, factors.block_B) == shared and torch.equal(factors.block_lambda, torch.eye(4)[None])
    assert pool.task_names == ["a"] and not torch.equal(factors.block_weights, first)
    with pytest.raises(ValueError, match="'a' is in the pool already"):
        method.close_task(pool, "a", None, 1)
    factors.block_B.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="left NaN or Inf"):
        method.close_task(pool, "b", None, 1)


def test_the_task_must_be_told(llava: Any, processor: Any, rng: torch.Generator) -> None:
    increments = born(llava, CONFIG, processor, rng)
    batch = inputs(processor, QUESTIONS[:3], rng)
    with pytest.raises(ValueError, match=r"mtl_lora must be told the task.*0: 'task0', 1: 'task1'"):
        llava(**batch)
    with pytest.raises(ValueError, match="expected task numbers from 0 to 2"):
        llava(**batch, query=TASKS + 2)
    assert increments.task_query(["task1", "task0", "new"]).tolist() == [[1.0], [0.0], [2.0]]


def test_files(new_llava: Callable, processor: Any, rng: torch.Generator, tmp_path: Path) -> None:
    check.check_files(new_llava, CONFIG, processor, rng, tmp_path / "saved", own="lambdas", query=TASKS[:2])


def test_decoding(llava: Any, processor: Any, rng: torch.Generator) -> None:
    check.check_decoding(llava, CONFIG, processor, rng, query=TASKS)


def test_checkpointed_layers_compute_the_same(llava: Any, processor: Any, rng: torch.Generator) -> None:
    config = MtlLoraConfig(ups=3, rank=4, a_std=0.1, dropout=0.3)
    check.check_checkpointing(llava, config, processor, rng, query=torch.full((3, 1), 2.0))


def test_a_run(new_llava: Callable, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check.check_run(new_llava, CONFIG, processor, tmp_path, monkeypatch, newborn=("block_lambda", "block_weights"))


def test_learned_tasks_keep_what_is_their_own(llava: Any, processor: Any, tmp_path: Path) -> None:
    run = trainer(llava, processor, tmp_path / "run", config=CONFIG, max_steps=4)
    learn, states = run._learn, []

    def spy(*args: Any) -> Any:
        found = learn(*args)
        states.append({name: t.clone() for name, t in get_increments(llava).pool.state().items()})
        return found

    run._learn = spy
    run.train()
    for name, before in states[0].items():
        leaf, after = name.rpartition(".")[2], states[1][name]
        if leaf in ("lambdas", "weights"):
            assert torch.equal(after[:1], before) and len(after) == 2 and not torch.equal(after[1:], before)
        if leaf in ("block_A", "block_B"):
            assert not torch.equal(after, before), "what tasks share goes on training"
    assert get_increments(llava).pool.task_names == ["task0", "task1"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ups": 0}, "ups is 0"),
        ({"temperature": 0.0}, "temperature is 0.0; expected a positive number"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"dropout": 1.5}, "dropout is 1.5"),
    ],
)
def test_a_config_refuses_what_it_cannot_do(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MtlLoraConfig(**fields)


def test_config_round_trip() -> None:
    assert config_from_dict(CONFIG.to_dict()) == CONFIG
