"""DIKI: its attention in loops, which task acts and how strongly, what a new task leaves alone, decoding and files."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn import functional

import cllava_fast as cf
from cllava_fast.methods import calibration, config_from_dict, make_method
from cllava_fast.methods.calibration import MARGIN, NOISE, TEMPERATURE
from cllava_fast.methods.diki import DikiConfig, attend
from cllava_fast.model import get_increments, paths
from cllava_fast.model.caches import returned
from cllava_fast.pool import LinearShape, OwnTensors, Pool
from tests.base_models import new_model, new_processor
from tests.helpers import QUESTIONS, at_once, cached, inputs, take
from tests.method_helpers import check_life_cycle
from tests.routing_helpers import loss_gradients

D = 24


def clusters(rng: torch.Generator, samples: int = 60, distinct: int = 5) -> Tensor:
    """Unit vectors of a few wordings around a common direction, as a task's instructions are."""
    words = functional.normalize(torch.randn(1, D, generator=rng) + 0.5 * torch.randn(distinct, D, generator=rng))
    return words[torch.arange(samples) % distinct]


def patched(
    model: Any, processor: Any, tasks: int, rng: torch.Generator, leave_open: bool = False, **fields: Any
) -> Any:
    """Tasks with random prompts; each remembers queries around one of its own."""
    config = DikiConfig(rank=3, strength="likelihood", **fields)
    increments = get_increments(cf.patch(model, config, processor=processor))
    pool, method = increments.pool, increments.method
    for task in range(tasks):
        queries = torch.randn(1, pool.key_dim, generator=rng) + 0.1 * torch.randn(20, pool.key_dim, generator=rng)
        queries = functional.normalize(queries)
        method.open_task(pool, queries, rng)
        for factors in pool.layers.values():
            factors.block_B.data.normal_(std=4, generator=rng)
        if not leave_open or task < tasks - 1:
            increments.close_task(f"task{task}", queries)
    return increments


def language_hooks(model: Any) -> dict[str, int]:
    return {name: len(module._forward_hooks) for name, module in model.model.language_model.named_modules()}


def near(pool: Pool, tasks: list[int], rng: torch.Generator) -> Tensor:
    """Queries that each belong to a task of the pool."""
    off = 0.3 * torch.randn(len(tasks), pool.key_dim, generator=rng) / pool.key_dim**0.5
    return functional.normalize(pool.query_mean[tasks] + off)


def by_loops(q: Tensor, keys: Tensor, values: Tensor, head_dim: int) -> Tensor:
    """``[S, H * d]``: what queries ``[S, H * d]`` read from one sample's prompts ``[n, H * d]``, number by number."""
    found = []
    for token in q:
        parts = []
        for h in range(len(token) // head_dim):
            part = slice(h * head_dim, (h + 1) * head_dim)
            logits = torch.stack([(token[part] * key[part]).sum() / math.sqrt(head_dim) for key in keys])
            powers = (logits - logits.max()).exp()
            parts.append(sum(p / powers.sum() * value[part] for p, value in zip(powers, values, strict=True)))
        found.append(torch.cat(parts))
    return torch.stack(found)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_every_layer_and_its_gradients(name: str, training: bool, rng: torch.Generator) -> None:
    """In float64, with grouped queries, biases and normed queries, in the first layer alone or in both."""
    processor = new_processor(name)
    model = new_model(name, processor).double()
    attentions = paths.attentions(model)
    layers = 1 if name == "Qwen2ForCausalLM" else 2
    increments = patched(model, processor, 3, rng, leave_open=training, layers=layers, scale=1.5)
    pool = increments.pool
    assert len(attentions) == 2 and len(pool.layers) == layers
    seen: list[dict[str, Tensor]] = [{}, {}]
    for attention, found in zip(attentions, seen, strict=True):
        norm = getattr(attention, "q_norm", attention.q_proj)
        norm.register_forward_hook(lambda _, args, q, found=found: found.update(q=q))
        attention.o_proj.register_forward_hook(lambda _, args, y, found=found: found.update(x=args[0], y=y))
    model.train(training)
    tasks = [1, 0, 1] if not training else [2, 2, 2]
    query = near(pool, [task % pool.num_tasks for task in tasks], rng)
    model(input_ids=torch.randint(5, 60, (3, 5), generator=rng), query=query)
    selection = increments.method.select(pool, query, 1, training)
    strength = torch.ones(3, 1) if training else selection.past.coefficient
    assert training or (selection.index[:, 0].tolist() == tasks and (strength < 1).all() and (strength > 0.1).all())
    for number, (attention, found) in enumerate(zip(attentions, seen, strict=True)):
        joined = found["x"]
        if number < layers:
            factors = list(pool.layers.values())[number]
            A, B = (factors.block_A, factors.block_B) if training else (factors.A, factors.B)
            rows = [0, 0, 0] if training else tasks
            branch = [
                by_loops(q, A[row].double(), B[row].double(), attention.head_dim)
                for q, row in zip(found["q"].flatten(2), rows, strict=True)
            ]
            joined = joined + 1.5 * strength[:, :, None].double() * torch.stack(branch)
        expected = functional.linear(joined, attention.o_proj.weight, attention.o_proj.bias)
        # coefficients are float32
        torch.testing.assert_close(found["y"], expected, atol=1e-6 * expected.abs().max().item(), rtol=1e-6)
        if not training or number >= layers:
            continue
        probe = torch.randn(expected.shape, generator=rng, dtype=torch.float64)
        leaves = [A, B] if number == 0 else [A, B, found["q"]]  # nothing learns before the first layer's queries
        wanted = torch.autograd.grad((expected * probe).sum(), leaves, retain_graph=True)
        gradients = torch.autograd.grad((found["y"] * probe).sum(), leaves, retain_graph=True)
        for gradient, want in zip(gradients, wanted, strict=True):
            assert want.abs().max() > 1e-6
            torch.testing.assert_close(gradient, want, atol=1e-5 * want.abs().max().item(), rtol=1e-5)


def own_tensors(shape: LinearShape | None, tasks: int, rows: int, block_rows: int) -> OwnTensors:
    """As those of a patched model's pool."""
    return calibration.own_tensors(D, tasks) if shape is None else {}


@pytest.mark.parametrize("strength", ["likelihood", "familiarity"])
def test_the_likeliest_task_acts(strength: str, rng: torch.Generator) -> None:
    """Its Gaussian written out as a full covariance, in float64, sample by sample."""
    method, tasks = make_method(DikiConfig(strength=strength)), [clusters(rng) for _ in range(3)]
    pool = Pool(rank=8, key_dim=D, shapes={"o": LinearShape(6, 6)}, own_tensors=own_tensors)
    gaussians, levels = [], []
    for number, queries in enumerate(tasks):
        method.open_task(pool, queries, rng)
        torch.testing.assert_close(pool.block_keys.detach(), queries.mean(0)[None])
        method.close_task(pool, f"task{number}", queries, 1)
        calibration.keep(pool, calibration.gaussian(queries))
        exact = queries.double()
        covariance = torch.cov(exact.t(), correction=0) + NOISE / D * torch.eye(D, dtype=torch.float64)
        gaussians.append(MultivariateNormal(exact.mean(0), covariance))
        levels.append(float(gaussians[-1].log_prob(exact).mean()) / D)
    query = torch.cat([*(t[:5] for t in tasks), functional.normalize(torch.randn(5, D, generator=rng))])
    selection = method.select(pool, query, 1, False)
    for sample, index, weight in zip(query.double(), selection.index, selection.past.coefficient, strict=True):
        found = [float(gaussian.log_prob(sample)) / D for gaussian in gaussians]
        best = max(range(3), key=lambda t: found[t])
        above = found[best] - 1
        if strength == "familiarity":
            above = (found[best] - levels[best] + MARGIN) / TEMPERATURE
        assert int(index) == best
        expected = torch.tensor(above, dtype=torch.float64).sigmoid()
        # the Gaussian is kept in float32
        torch.testing.assert_close(weight[0].double(), expected, atol=1e-2, rtol=0)
    assert selection.index[:15, 0].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    strengths = selection.past.coefficient
    assert torch.equal(selection.strength, strengths[:, 0])
    assert strengths[:15].min() > strengths[15:].max() and (selection.weight == 1).all()
    assert torch.equal(selection.past.index, selection.index) and selection.block is None


@pytest.mark.parametrize("training", [False, True])
def test_a_new_task_changes_nothing(training: bool, llava: Any, processor: Any, rng: torch.Generator) -> None:
    batch = inputs(processor, QUESTIONS[:3], rng)
    with torch.no_grad():
        plain = llava(**batch).logits
        increments = patched(llava, processor, 1, rng)
        learned = llava(**batch).logits
        increments.method.open_task(increments.pool, torch.randn(9, 384, generator=rng), rng)
        llava.train(training)
        assert torch.equal(llava(**batch).logits, plain if training else learned)
        assert not torch.allclose(plain, learned, atol=1e-3)
        for factors in increments.pool.layers.values():
            assert torch.equal(factors.block_B, torch.zeros(1, 3, 128)) and factors.block_A.abs().mean() > 0.2


def test_samples_of_a_batch_read_their_own_tasks_prompts(llava: Any, processor: Any, rng: torch.Generator) -> None:
    increments = patched(llava, processor, 3, rng)
    batch, query = inputs(processor, QUESTIONS[:4], rng), near(increments.pool, [2, 0, 1, 2], rng)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options["suppress_tokens"] = [llava.config.image_token_id]  # random weights may say it
    with torch.no_grad():
        logits = llava(**batch, query=query).logits[:, -1]
        other = llava(**batch, query=query.roll(1, 0)).logits[:, -1]
        assert all(not torch.allclose(logits[i], other[i], atol=1e-2) for i in (1, 2, 3))
        for i in range(4):
            alone = llava(**take(batch, i), query=query[i : i + 1]).logits[:, -1]
            torch.testing.assert_close(alone[0], logits[i], atol=1e-4, rtol=1e-4)
    for more in ({}, {"num_beams": 2}):
        found = llava.generate(**batch, query=query, **options, **more)
        assert torch.equal(found, llava.generate(**batch, query=query, **options, **more, use_cache=False))
    with torch.no_grad():
        # token by token through a cache, the same logits as all at once
        whole = llava(input_ids=batch["input_ids"][:1, -9:], query=query[:1]).logits
        first = llava(input_ids=batch["input_ids"][:1, -9:-4], query=query[:1], use_cache=True)
        steps = [first.logits]
        for i in range(-4, 0):
            ids = batch["input_ids"][:1, i:][:, :1]
            steps.append(llava(input_ids=ids, **cached(returned(first))).logits)
        torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)
        exact = llava(**batch, query=query).logits
        half = llava.bfloat16()(**{**batch, "pixel_values": batch["pixel_values"].bfloat16()}, query=query).logits
    assert half.dtype == torch.bfloat16 and (half.float() - exact).norm() < 0.1 * exact.norm()


def test_layers_computed_again_read_the_same(llava: Any, processor: Any, rng: torch.Generator) -> None:
    increments = patched(llava, processor, 2, rng, leave_open=True)
    batch = {**inputs(processor, QUESTIONS[:2], rng), "query": torch.randn(2, 384, generator=rng)}
    increments.pool.train_keys(False)
    llava.train()
    again = copy.deepcopy(llava)
    # the name in transformers 5.23 and after, and before
    enable = getattr(again, "activation_checkpointing_enable", again.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for _ in range(2):
        expected, found = loss_gradients(llava, batch), loss_gradients(again, batch)
        assert len(found) == 2 * 3
        for name, gradient in expected.items():
            assert gradient.abs().max() > 0, name
            torch.testing.assert_close(found[name], gradient, atol=0, rtol=0, msg=name)
    assert increments.call.queries is None and get_increments(again).call.queries is None


def test_calls_in_two_threads_each_read_their_own_queries(llava: Any, processor: Any, rng: torch.Generator) -> None:
    increments = patched(llava, processor, 2, rng)
    batches = [
        {**inputs(processor, (question,), rng), "query": near(increments.pool, [task], rng)}
        for task, question in enumerate(QUESTIONS[:2])
    ]

    def logits(batch: dict[str, Any]) -> Tensor:
        with torch.no_grad():
            return llava(**batch).logits

    alone = [logits(batch) for batch in batches]
    together = at_once(paths.attentions(llava), *(partial(logits, batch) for batch in batches))
    assert all(torch.equal(*results) for results in zip(together, alone, strict=True))


def test_life_cycle(new_llava: Callable[[], Any], processor: Any, tmp_path: Path) -> None:
    check_life_cycle(new_llava, processor, DikiConfig(layers=2), tmp_path)


def test_files_copies_and_unpatch(
    llava: Any, new_llava: Callable[[], Any], processor: Any, tmp_path: Path, rng: torch.Generator
) -> None:
    hooks = language_hooks(llava)
    increments = patched(llava, processor, 2, rng, layers=2)
    batch = inputs(processor, QUESTIONS[:3], rng)
    cf.save_pretrained(llava, tmp_path / "out")
    loaded, copied = cf.load_pretrained(new_llava(), tmp_path / "out", processor=processor), copy.deepcopy(llava)
    query = near(increments.pool, [1, 0, 1], rng)
    with torch.no_grad():
        logits = llava(**batch, query=query).logits
        assert torch.equal(loaded(**batch, query=query).logits, logits)
        get_increments(copied).pool.layers.apply(lambda m: m.B.mul_(2) if hasattr(m, "B") else None)
        assert not torch.allclose(copied(**batch, query=query).logits, logits, atol=1e-3)
        assert torch.equal(llava(**batch, query=query).logits, logits)
        with cf.scale_layers(llava, alpha=2.0, beta=0.0):
            torch.testing.assert_close(llava(**batch, query=query).logits, copied(**batch, query=query).logits)
    with pytest.raises(ValueError, match="no one selection"):
        cf.merge(loaded, task="task0")
    with pytest.raises(ValueError, match="no one selection"):
        cf.export_peft(loaded, tmp_path / "peft", task="task0")
    state = increments.pool.state()
    with pytest.raises(ValueError, match="query_level"):
        increments.pool.load_state({n: t for n, t in state.items() if n != "query_level"}, ["task0", "task1"])

    def stumble(*args: Any) -> None:
        raise RuntimeError("between a layer's queries and its output")

    handle = paths.attentions(llava)[1].v_proj.register_forward_hook(stumble)
    with pytest.raises(RuntimeError, match="between"):
        llava(**batch, query=query)
    handle.remove()
    assert increments.call.queries is None and increments.call.active is None
    with torch.no_grad():
        assert torch.equal(cf.unpatch(llava)(**batch).logits, new_llava()(**batch).logits)
    assert language_hooks(llava) == hooks


def test_an_attention_without_queries_of_its_own_is_refused(llava: Any, processor: Any, rng: torch.Generator) -> None:
    attention = paths.attentions(llava)[0]
    attention.qkv_proj = attention.__dict__["_modules"].pop("q_proj")
    before = dict(llava.named_modules()), {name: p.requires_grad for name, p in llava.named_parameters()}
    with pytest.raises(TypeError, match="LlamaAttention has no q_proj"):
        cf.patch(llava, DikiConfig(), processor=processor)
    assert dict(llava.named_modules()) == before[0]
    assert {name: p.requires_grad for name, p in llava.named_parameters()} == before[1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llava.modules())


def test_attend_is_torchs_attention_for_each_head(rng: torch.Generator) -> None:
    q, k, v = (torch.randn(2, n, 12, generator=rng, dtype=torch.float64) for n in (5, 3, 3))
    found = attend(q.unflatten(2, (4, 3)), k, v)
    expected = torch.stack([by_loops(*sample, 3) for sample in zip(q, k, v, strict=True)])
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"targets": ("self_attn.q_proj",)}, "joins at self_attn.o_proj alone"),
        ({"strength": "loud"}, "strength is 'loud'; expected one of"),
    ],
)
def test_a_config_refuses_what_it_cannot_do(fields: dict, message: str) -> None:
    config = DikiConfig(layers=3, strength="likelihood")
    assert config_from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=message):
        DikiConfig(**fields)
