"""SMoRA: a few rank-1 experts for every token, picked by a router whose load is balanced by a bias."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cllava_fast.methods import config_from_dict
from cllava_fast.methods.smora import Smora, SmoraConfig, balance
from cllava_fast.pool import Factors, LinearShape, Pool
from tests import routing_helpers as check
from tests.helpers import QUESTIONS, inputs
from tests.train_helpers import trainer

TARGETS = ("self_attn.v_proj", "mlp.*_proj")
CONFIG = SmoraConfig(experts=6, top_k=2, a_std=0.1, scale=4.0, targets=TARGETS, bias_update_rate=0.01)


def gates_of(factors: Factors, x: Tensor) -> Tensor:
    """Zero but for the top-k of sigmoid(W_g x) + u, and there each one's share of their sum."""
    router, bias = factors.block_router.to(x.dtype), factors.balance.double()
    gates = []
    for token in x.flatten(0, 1):
        scores = [1 / (1 + (-(row * token).sum()).exp()) + u for row, u in zip(router, bias, strict=True)]
        picked = sorted(range(len(router)), key=lambda i: -scores[i].item())[:2]
        total = sum(scores[i] for i in picked)
        gates.append(torch.stack([scores[i] / total if i in picked else 0 * scores[i] for i in range(6)]))
    return torch.stack(gates).view(*x.shape[:2], 6)


def biased(model: Any, rng: torch.Generator) -> None:
    for factors in model.increments.pool.layers.values():
        factors.balance += 0.5 * torch.randn(6, generator=rng)


@pytest.fixture(autouse=True)
def with_bias(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, rng: torch.Generator) -> None:
    """Increments are born with the bias of a router that has seen some load."""
    born = check.born

    def born_biased(model: Any, *args: Any) -> Any:
        increments = born(model, *args)
        biased(model, rng)
        return increments

    monkeypatch.setattr(check, "born", born_biased)


def test_every_layer_computes_the_formula(llava: Any, processor: Any, rng: torch.Generator) -> None:
    check.check_every_layer(llava, CONFIG, processor, rng, gates_of)


def test_gradients(llava: Any, processor: Any, rng: torch.Generator) -> None:
    check.check_gradients(CONFIG, llava, processor, rng, gates_of)


def test_files(new_llava: Callable, processor: Any, rng: torch.Generator, tmp_path: Path) -> None:
    check.check_files(new_llava, CONFIG, processor, rng, tmp_path / "saved")


def test_decoding(llava: Any, processor: Any, rng: torch.Generator) -> None:
    check.check_decoding(llava, CONFIG, processor, rng)


def test_checkpointed_layers_pick_the_same(llava: Any, processor: Any, rng: torch.Generator) -> None:
    check.check_checkpointing(llava, CONFIG, processor, rng)


def test_checkpointed_layers_count_once(llava: Any, processor: Any, rng: torch.Generator) -> None:
    increments = check.born(llava, CONFIG, processor, rng)
    batches = [inputs(processor, QUESTIONS[i : i + 2], rng) for i in (0, 2)]
    llava.train()
    # the name in transformers 5.23 and after, and before
    getattr(llava, "activation_checkpointing_enable", llava.gradient_checkpointing_enable)({"use_reentrant": False})
    loss = sum(llava(**batch, labels=batch["input_ids"]).loss for batch in batches)  # both before a backward pass
    layers = list(increments.pool.layers.values())
    before = [factors.load.clone() for factors in layers]
    loss.backward()
    assert all(torch.equal(factors.load, load) for factors, load in zip(layers, before, strict=True))


def test_a_global_batch_balances_alike_however_it_is_cut(new_llava: Callable, processor: Any, tmp_path: Path) -> None:
    ends = []
    for batch, steps in ((6, 1), (1, 6)):
        model = new_llava()
        trainer(
            model, processor, tmp_path / str(batch), config=CONFIG, max_steps=3, max_grad_norm=0.0,
            per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
        ).train()  # fmt: skip
        ends.append({n: t for n, t in model.increments.pool.state().items() if n.endswith((".balance", ".load"))})
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        assert tensor.any() != name.endswith(".load") and torch.equal(ends[1][name], tensor), name


def test_a_run(new_llava: Callable, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check.check_run(new_llava, CONFIG, processor, tmp_path, monkeypatch)


def test_training_alone_counts_and_a_step_balances(llava: Any, processor: Any, rng: torch.Generator) -> None:
    """A step is as many batches as there are before its end, and a loop need not say where that is."""
    increments = check.born(llava, CONFIG, processor, rng)
    pool, layers = increments.pool, list(increments.pool.layers.values())
    batch = inputs(processor, [*QUESTIONS[:2], f"{QUESTIONS[2]} {QUESTIONS[1]}"], rng)
    before = [factors.balance.clone() for factors in layers]
    llava(**batch)
    llava.train()
    llava(**batch)
    one = [factors.load.clone() for factors in layers]
    llava(**batch)
    loads = [factors.load.clone() for factors in layers]
    assert all(torch.equal(load, 2 * first) for load, first in zip(loads, one, strict=True))
    assert all(torch.equal(factors.balance, bias) for factors, bias in zip(layers, before, strict=True))
    tokens = int(batch["attention_mask"].sum())
    assert tokens < batch["input_ids"].numel(), "some of it is padding"
    assert all(load.sum() == 2 * tokens for load in one), "two experts for each token"
    with torch.no_grad():
        next(pool.parameters()).mul_(1.0)  # as an optimizer does
    llava(**batch)
    for factors, load, bias, first in zip(layers, loads, before, one, strict=True):
        for i in range(6):
            step = 0.01 if load[i] < 4 * tokens / 6 else -0.01 if load[i] > 4 * tokens / 6 else 0.0
            assert float(factors.balance[i] - bias[i]) == pytest.approx(step, abs=1e-6)
        assert factors.load.sum() == first.sum(), "the new step's alone"
    for _ in range(2):
        moved = [factors.balance.clone() for factors in layers]
        increments.method.end_step(pool)
        assert not any(factors.load.any() for factors in layers)
    assert all(torch.equal(factors.balance, bias) for factors, bias in zip(layers, moved, strict=True)), "once"
    labels = batch["input_ids"].clone()
    labels[0] = -100  # as of a sample that fills up a batch
    llava(**batch, labels=labels)
    tokens = int(batch["attention_mask"][1:].sum())
    assert all(factors.load.sum() == 2 * tokens for factors in layers)
    llava.eval()
    after = [factors.balance.clone() for factors in layers]
    llava(**batch)
    assert all(torch.equal(factors.balance, bias) for factors, bias in zip(layers, after, strict=True))


def test_the_defaults_are_those_of_the_authors_code() -> None:
    """Rank 64, 8 of them active, all linears; alpha 16, of which each active rank gets a kth when gates are even."""
    config = SmoraConfig()
    assert (config.experts, config.rank, config.top_k, config.dropout) == (64, 1, 8, 0.0)
    assert config.scale / config.top_k == 16 / 8 and config.bias_update_rate == 1e-5
    assert config.targets == ("self_attn.*_proj", "mlp.*_proj")


def test_what_was_learned_with_a_gate_of_softmax_is_refused() -> None:
    """It would load, and answer by another gate."""
    values = SmoraConfig().to_dict()
    values["balance_rate"] = values.pop("bias_update_rate")
    with pytest.raises(ValueError, match=r"unknown fields \['balance_rate'\] for method 'smora'"):
        config_from_dict(values)


def test_weights_stay_a_share_whatever_the_bias(generator: torch.Generator) -> None:
    """An expert that its bias pushed below zero weighs nothing, and where all scores round to zero all weigh alike."""
    method = Smora(SmoraConfig(experts=3, top_k=2))
    pool = Pool(rank=1, key_dim=0, shapes={"o": LinearShape(4, 5)})
    method.open_task(pool, None, generator)
    factors, selection = pool.factors("o"), method.select(pool, None, 1, training=False)
    cases = [([0.0, -0.6, -2.0], 0.0, [1.0, 0.0, 0.0]), ([0.0, 0.0, 0.0], -200.0, [0.5, 0.5])]
    for bias, logit, expected in cases:
        factors.balance = torch.tensor(bias)
        gates = method.gates(factors, torch.full((1, 1, 3), logit), selection)[0, 0]
        found = gates if len(expected) == 3 else gates[gates > 0]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)


def test_balance_makes_an_idle_expert_work(generator: torch.Generator) -> None:
    method = Smora(SmoraConfig(experts=6, top_k=1, bias_update_rate=0.05))
    pool = Pool(rank=1, key_dim=0, shapes={"o": LinearShape(8, 5)})
    method.open_task(pool, None, generator)
    factors = pool.factors("o")
    x = torch.randn(8, generator=generator).expand(4, 16, 8)  # all tokens alike: one expert takes them all
    picked = []
    for _ in range(300):
        selection = method.select(pool, None, 1, training=True).expand(4)
        gates = method.route(selection, factors, x).block.coefficient
        method.end_step(pool)
        picked.append(int(gates[0, 0].argmax()))
    late = torch.tensor(picked[-120:]).bincount(minlength=6) / 120
    assert late.max() < 0.5 and late.min() > 0.05
    method.open_task(pool, None, generator)
    assert not factors.load.any(), "a task begins without what the last one counted"
    bias = factors.balance.clone()
    balance(pool, 1.0)
    assert torch.equal(factors.balance, bias)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k is 0; expected 1 to 64"),
        ({"top_k": 65}, "top_k is 65; expected 1 to 64"),
        ({"experts": 0}, "experts is 0"),
        ({"bias_update_rate": -0.1}, "bias_update_rate is -0.1"),
        ({"bias_update_rate": float("nan")}, "bias_update_rate is nan"),
    ],
)
def test_a_config_refuses_what_it_cannot_do(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmoraConfig(**fields)


def test_config_round_trip() -> None:
    assert config_from_dict(CONFIG.to_dict()) == CONFIG
