"""MeteoRA, gates trained task by task: its formula in loops, what trains, decoding and files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cllava_fast as cf
from cllava_fast.methods import config_from_dict
from cllava_fast.methods.meteora import MeteoraConfig, weigh
from cllava_fast.model import get_increments
from tests.helpers import QUESTIONS, inputs, take
from tests.train_helpers import arguments, stream

CONFIG = MeteoraConfig(rank=3, scale=1.5, a_std=0.2, targets=("mlp.*_proj",))


def patched(model: Any, processor: Any, tasks: int, generator: torch.Generator, leave_open: bool = False) -> Any:
    """Tasks with random LoRAs and gates."""
    increments = get_increments(cf.patch(model, CONFIG, processor=processor))
    pool, method = increments.pool, increments.method
    for task in range(tasks):
        method.open_task(pool, None, generator)
        for factors in pool.layers.values():
            factors.block_B.data.normal_(std=0.2, generator=generator)
            factors.block_gate.data.normal_(generator=generator)
        if not leave_open or task < tasks - 1:
            method.close_task(pool, f"task{task}", None, 1)
    return increments


def weights_of(x: Tensor, gate: Tensor, top_k: int, keep_last: bool) -> list[float]:
    """One token's ``x [d]``, by loops."""
    logits = [sum(float(a) * float(b) for a, b in zip(x, row, strict=True)) for row in gate]
    last = len(logits) - 1
    best = sorted(range(len(logits)), key=lambda j: (not (keep_last and j == last), -logits[j]))[:top_k]
    powers = {j: float(torch.tensor(logits[j], dtype=torch.float64).exp()) for j in best}
    return [powers.get(j, 0.0) / sum(powers.values()) for j in range(len(logits))]


@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_a_tokens_weights(tasks: int, keep_last: bool, rng: torch.Generator) -> None:
    x = torch.randn(2, 6, 7, generator=rng, dtype=torch.float64)
    gate = torch.randn(tasks, 7, generator=rng, dtype=torch.float64)
    found = weigh(x, gate, 2, keep_last)
    expected = [[weights_of(token, gate, 2, keep_last) for token in sample] for sample in x]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("state", ["first task", "later task", "inference"])
def test_the_layer_and_its_gradients(state: str, llava: Any, processor: Any, rng: torch.Generator) -> None:
    """Token by token, LoRA by LoRA, in float64."""
    training = state != "inference"
    increments = patched(llava.double(), processor, 1 if state == "first task" else 4, rng, leave_open=training)
    path = "model.language_model.layers.1.mlp.down_proj"
    linear, factors = llava.get_submodule(path), increments.pool.factors(path)
    x = torch.randn(2, 5, linear.in_features, generator=rng, dtype=torch.float64, requires_grad=True)
    increments.call.active = increments.method.select(increments.pool, None, 1, training).expand(2)
    got = increments.inject(x, linear, None, factors)
    if training:
        earlier = getattr(factors, "gate", factors.block_gate[:0])
        gate = torch.cat([earlier, factors.block_gate]).double()
        A, B = (
            torch.cat([old, new]).double() for old, new in ((factors.A, factors.block_A), (factors.B, factors.block_B))
        )
    else:
        gate, A, B = factors.gate.double(), factors.A, factors.B
    rows = []
    for token in x.flatten(0, 1):
        logits = gate @ token
        kept = [float(weight) > 0 for weight in weights_of(token.detach(), gate.detach(), 2, training)]
        weights = logits.masked_fill(~torch.tensor(kept), -torch.inf).softmax(0)
        increment = sum(weight * (b.T @ (a @ token)) for weight, a, b in zip(weights, A, B, strict=True))
        rows.append(linear.weight @ token + 1.5 * increment)
    expected = torch.stack(rows).view_as(got)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-6)
    if not training:
        return
    probe = torch.randn(got.shape, generator=rng, dtype=torch.float64)
    parameters = {"x": x, "A": factors.block_A, "B": factors.block_B, "gate": factors.block_gate}
    found = torch.autograd.grad((got * probe).sum(), list(parameters.values()), allow_unused=True)
    wanted = torch.autograd.grad((expected * probe).sum(), list(parameters.values()), allow_unused=True)
    for name, one, other in zip(parameters, found, wanted, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * max(float(other.abs().max()), 1e-6), name


def test_earlier_loras_and_gates_stay_to_the_bit(llava: Any, processor: Any, tmp_path: Path) -> None:
    cf.patch(llava, MeteoraConfig(rank=2, a_std=0.1, scale=4.0), processor=processor)
    pool, method = get_increments(llava).pool, get_increments(llava).method
    close, states = method.close_task, list[dict[str, Tensor]]()

    def close_and_look(*given: Any) -> None:
        close(*given)
        states.append({name: tensor.clone() for name, tensor in pool.state().items()})

    method.close_task = close_and_look  # type: ignore[method-assign]
    cf.ContinualTrainer(llava, processor, stream(3), arguments(tmp_path / "run", weight_decay=0.5)).train()
    for path in pool.layers:
        for name in ("A", "B", "gate"):
            tensors = [state[f"layers.{path}.{name}"] for state in states]
            assert [len(tensor) for tensor in tensors] == [1, 2, 3]
            assert torch.equal(tensors[1][:1], tensors[0]) and torch.equal(tensors[2][:2], tensors[1])
        assert tensors[2][1].abs().max() > 0, "the gate must learn"
        assert not tensors[0].any(), "alone, it has no choice to learn from"


@pytest.mark.parametrize("generation", [{}, {"num_beams": 3}])
def test_generate_in_mixed_batches(generation: dict, llava: Any, processor: Any, rng: torch.Generator) -> None:
    patched(llava, processor, 3, rng)
    batch = inputs(processor, QUESTIONS, rng)
    no_image = [llava.config.image_token_id]  # which a random model may well say
    options = {
        "suppress_tokens": no_image,
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "num_beams": 1,
        **generation,
    }
    together = llava.generate(**batch, **options)[:, -4:]
    for i in range(len(QUESTIONS)):
        alone = llava.generate(**take(batch, i), **options, use_cache=False)[:, -4:]
        assert torch.equal(together[i : i + 1], alone)


def test_files_copies_and_unpatch(
    llava: Any, new_llava: Callable, processor: Any, tmp_path: Path, rng: torch.Generator
) -> None:
    increments = patched(llava, processor, 2, rng)
    batch = inputs(processor, QUESTIONS, rng)
    cf.save_pretrained(llava, tmp_path / "out")
    loaded, copied = cf.load_pretrained(new_llava(), tmp_path / "out", processor=processor), copy.deepcopy(llava)
    with torch.no_grad():
        logits = llava(**batch).logits
        assert torch.equal(loaded(**batch).logits, logits) and torch.equal(copied(**batch).logits, logits)
        increments.method.open_task(increments.pool, None, rng)
        assert torch.equal(llava(**batch).logits, logits), "a task that is being learned acts in training alone"
        increments.pool.drop_block()
        assert torch.equal(llava(**batch).logits, logits)
        assert torch.equal(cf.unpatch(llava)(**batch).logits, new_llava()(**batch).logits)
    with pytest.raises(ValueError, match="no one selection"):
        cf.merge(loaded)


@pytest.mark.parametrize(("fields", "message"), [({"top_k": 0}, "top_k is 0"), ({"rank": 0}, "rank is 0")])
def test_a_config_refuses_what_it_cannot_do(fields: dict, message: str) -> None:
    assert config_from_dict(CONFIG.to_dict()) == CONFIG
    with pytest.raises(ValueError, match=message):
        MeteoraConfig(**fields)
