"""What tests of the methods that weigh rows for every token share: each check takes a fresh LLaVA and a config."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import cllava_fast as cf
from cllava_fast.methods import MethodConfig
from cllava_fast.model import get_increments, paths
from cllava_fast.pool import Factors
from tests.helpers import QUESTIONS, inputs
from tests.train_helpers import trainer

STEPS = {"max_steps": 4}


def born(model: Any, config: MethodConfig, processor: Any, rng: torch.Generator, tasks: int = 1) -> Any:
    """The model patched, with increments as if they had been trained."""
    cf.patch(model, config, processor=processor)
    increments = get_increments(model)
    for task in range(tasks):
        increments.method.open_task(increments.pool, None, rng)
        for factors in increments.pool.layers.values():
            torch.nn.init.normal_(factors.block_B, std=0.05, generator=rng)
        increments.method.close_task(increments.pool, f"task{task}", None, 1)
    return increments


def by_loops(x: Tensor, linear: torch.nn.Linear, factors: Factors, gates: Tensor, scale: float, seen: Tensor) -> Tensor:
    """``W0 x + scale * sum_i gate_i B_i^T A_i seen``, of ``x [B, S, d_in]`` and ``gates [B, S, E]``, one by one."""
    y = functional.linear(x, linear.weight, linear.bias)
    for i in range(gates.shape[2]):
        low = seen @ factors.block_A[i].to(x.dtype).T  # [B, S, R]
        y = y + scale * gates[:, :, i, None] * (low @ factors.block_B[i].to(x.dtype))
    return y


def check_every_layer(model: Any, config: MethodConfig, processor: Any, rng: torch.Generator, gates_of: Any) -> None:
    """Outputs of all adapted linears in a forward pass of a float64 model, by their formula."""
    increments = born(model.double(), config, processor, rng)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    linears = paths.adapted_linears(model, config.targets)
    for path, linear in linears.items():
        linear.register_forward_hook(lambda _, args, y, path=path: seen.update({path: (args[0], y)}))
    batch = inputs(processor, QUESTIONS[:3], rng)
    batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad():
        model(**batch)
        assert set(seen) == set(linears)
        for path, (x, y) in seen.items():
            factors = increments.pool.factors(path)
            expected = by_loops(x, linears[path], factors, gates_of(factors, x), config.scale, x)
            torch.testing.assert_close(y, expected, atol=1e-9, rtol=1e-7)
            assert not torch.allclose(y, functional.linear(x, linears[path].weight, linears[path].bias), atol=1e-4)


def check_gradients(config: MethodConfig, model: Any, processor: Any, rng: torch.Generator, gates_of: Any) -> None:
    """Gradients of one linear's x, A, B and router, in float64, against autograd through the loops."""
    increments = born(model.double(), config, processor, rng).train(False)
    path, linear = next(iter(paths.adapted_linears(model, config.targets).items()))
    factors = increments.pool.factors(path)
    x = torch.randn(2, 5, linear.in_features, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, linear.out_features, generator=rng, dtype=torch.float64)
    increments.call.active = increments.method.select(increments.pool, None, 1, False).expand(2)
    wanted = [x, factors.block_A, factors.block_B, factors.block_router]
    found = torch.autograd.grad((increments.inject(x, linear, None, factors) * weight).sum(), wanted)
    expected = torch.autograd.grad(
        (by_loops(x, linear, factors, gates_of(factors, x), config.scale, x) * weight).sum(), wanted
    )
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-5)


def check_files(
    new_llava: Any, config: MethodConfig, processor: Any, rng: torch.Generator, folder: Path,
    own: str = "block_router", **extra: Tensor,
) -> None:  # fmt: skip
    """Saved and loaded, outputs are bit-equal; an own tensor of another shape is refused, and nothing changes then.
    ``extra`` is what the model is told beside the batch."""
    model = new_llava()
    increments = born(model, config, processor, rng)
    plain_batch = inputs(processor, QUESTIONS[:2], rng)
    batch = {**plain_batch, **extra}
    with torch.no_grad():
        before = model(**batch).logits
        cf.save_pretrained(model, folder)
        loaded = cf.load_pretrained(new_llava(), folder, processor=processor)
        assert torch.equal(loaded(**batch).logits, before)
        assert torch.equal(copy.deepcopy(model)(**batch).logits, before)
        plain = new_llava()(**plain_batch).logits
        assert not torch.allclose(before, plain, atol=1e-3)
        with pytest.raises(ValueError, match="looks at every input in every layer"):
            cf.merge(model)
        state = increments.pool.state()
        router = next(name for name in state if name.endswith(f".{own}"))
        with pytest.raises(ValueError, match=f"{own} is"):
            increments.pool.load_state({**state, router: state[router][:, :-1]}, increments.pool.task_names)
        with pytest.raises(ValueError, match="1 tensors are missing"):
            increments.pool.load_state({n: t for n, t in state.items() if n != router}, increments.pool.task_names)
        assert torch.equal(model(**batch).logits, before)
        assert torch.equal(cf.unpatch(model)(**plain_batch).logits, plain)


def check_decoding(model: Any, config: MethodConfig, processor: Any, rng: torch.Generator, **extra: Tensor) -> None:
    """A cache, padding on the left, beams and bfloat16 change no answer."""
    born(model, config, processor, rng)
    batch = {**inputs(processor, QUESTIONS[:3], rng), **extra}
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    options["suppress_tokens"] = [model.config.image_token_id]  # random weights may say it
    cached = model.generate(**batch, **options)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    for i in range(3):
        mask = batch["attention_mask"][i].bool()
        alone = model.generate(
            input_ids=batch["input_ids"][i : i + 1, mask], attention_mask=batch["attention_mask"][i : i + 1, mask],
            pixel_values=batch["pixel_values"][i : i + 1], **options,
            **{name: value[i : i + 1] for name, value in extra.items()},
        )  # fmt: skip
        new = alone[0, int(mask.sum()) :]
        assert torch.equal(new, cached[i, batch["input_ids"].shape[1] :][: len(new)])
    beams = model.generate(**batch, **options, num_beams=2)
    assert torch.equal(beams, model.generate(**batch, **options, num_beams=2, use_cache=False))
    exact = model(**batch).logits
    half = model.bfloat16()(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()}).logits
    assert half.dtype == torch.bfloat16 and (half.float() - exact).norm() < 0.3 * exact.norm()


def loss_gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(5)  # of dropout
    model.zero_grad()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def check_checkpointing(
    model: Any, config: MethodConfig, processor: Any, rng: torch.Generator, **extra: Tensor
) -> None:
    """Layers that are computed again route, and drop, as they did the first time."""
    born(model, config, processor, rng)
    batch = {**inputs(processor, QUESTIONS[:3], rng), **extra}
    model.train()
    again = copy.deepcopy(model)
    # the name in transformers 5.23 and after, and before
    enable = getattr(again, "activation_checkpointing_enable", again.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for _ in range(2):  # what the first step leaves must be the same, too
        expected, found = loss_gradients(model, batch), loss_gradients(again, batch)
        for increments in (model.increments, again.increments):
            increments.method.end_step(increments.pool)
        assert len(found) == sum(1 for _ in model.increments.pool.parameters())
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(found[name], gradient, atol=0, rtol=0, msg=name)


def check_run(
    new_llava: Any, config: MethodConfig, processor: Any, folder: Path, monkeypatch: Any, newborn: tuple[str, ...] = ()
) -> None:
    """Two tasks train every tensor of the block, but those that are ``newborn`` after each, and nothing else; a run
    that was cut goes on to the same end."""
    whole = new_llava()
    run = trainer(whole, processor, folder / "whole", config=config, **STEPS)
    base = {name: t.clone() for name, t in whole.state_dict().items() if not name.startswith("increments.")}
    states: list[dict[str, Tensor]] = []
    learn = run._learn

    def spy(number: int, *rest: Any) -> Any:
        found = learn(number, *rest)
        states.append({name: t.clone() for name, t in get_increments(whole).pool.state().items()})
        return found

    monkeypatch.setattr(run, "_learn", spy)
    expected = run.train()
    assert all(torch.equal(whole.state_dict()[name], t) for name, t in base.items())
    trained = [name for name in states[0] if ".block_" in name and not name.endswith(newborn)]
    assert trained and all(not torch.equal(states[0][name], states[1][name]) for name in trained)

    cut = trainer(new_llava(), processor, folder / "cut", config=config, **STEPS)
    learn_one = cut._learn

    def power_cut(number: int, *rest: Any) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return learn_one(number, *rest)

    monkeypatch.setattr(cut, "_learn", power_cut)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    model = new_llava()
    result = trainer(model, processor, folder / "cut", config=config, resume=True, **STEPS).train()
    assert result.accuracy_matrix == expected.accuracy_matrix
    again = get_increments(model).pool.state()
    assert set(again) == set(states[1])
    for name, tensor in states[1].items():
        torch.testing.assert_close(again[name], tensor, atol=0, rtol=0, msg=name)
