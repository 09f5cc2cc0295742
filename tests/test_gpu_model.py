"""A patched model on a GPU: as on the CPU, on every backend, captured in a graph, trained, and resumed to the bit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig

import cllava_fast as cf
from benchmarks import measure
from cllava_fast import ops
from cllava_fast.model import acting, get_increments
from cllava_fast.model.caches import returned
from cllava_fast.ops import native
from cllava_fast.ops.inject import few_calls
from tests.helpers import QUESTIONS, cached, inputs, learn, take
from tests.test_checkpoint import At, killed, learned, same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CONFIG = cf.IncrementConfig(rows_per_task=4, top_m=2, rank=2, a_std=0.1, scale=8.0, surrogate="backbone")


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def pair(llava: Any, processor: Any, generator: torch.Generator) -> tuple[Any, Any, dict[str, Tensor]]:
    """The same model in the middle of its third task on CPU and GPU, and a batch."""
    llava.set_attn_implementation("eager")
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 3, generator, commit_last=False)
    get_increments(llava).pool.train_keys(False)
    return llava, copy.deepcopy(llava).to("cuda"), inputs(processor, QUESTIONS, generator)


def on_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to("cuda") for name, value in batch.items()}


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    loss = model(**batch, labels=batch["input_ids"]).loss
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    found = {name: g.cpu() for name, g in zip(trained, gradients, strict=True) if g is not None}
    return {"loss": loss.detach().cpu(), **found}


@pytest.mark.parametrize("backend", ["auto", "triton", "cuda,triton", "reference"])
@pytest.mark.parametrize("training", [True, False])
def test_same_as_on_the_cpu(backend: str, training: bool, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, moved, batch = pair
    by_columns = Mock(wraps=few_calls.inject)
    monkeypatch.setattr(few_calls, "inject", by_columns)
    for one in pair[:2]:
        one.train(training)
    with ops.backend(backend):
        found = loss_and_gradients(moved, on_gpu(batch)) if training else {"logits": logits(moved, on_gpu(batch))}
    layers = len(get_increments(model).pool.layers)
    assert by_columns.call_count == (layers if training and backend == "auto" else 0)
    with ops.backend("reference"):
        wanted = loss_and_gradients(model, batch) if training else {"logits": logits(model, batch)}
    assert found.keys() == wanted.keys() and (len(found) > 6 or not training)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-4 * float(tensor.abs().max()), rtol=1e-3, msg=name)


def logits(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits.cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_of_a_batch_are_those_alone(dtype: torch.dtype, pair: Any) -> None:
    _, model, batch = pair
    model.eval().to(dtype)
    batch = on_gpu(batch)
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    together = logits(model, batch).float()
    for i in range(len(QUESTIONS)):
        alone = logits(model, take(batch, i)).float()
        limit = 1e-3 if dtype == torch.float32 else 0.1
        assert (alone[0, -1] - together[i, -1]).abs().max() < limit * together[i, -1].abs().max()
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [model.config.image_token_id]}
    assert model.generate(**batch, **options).shape[0] == len(QUESTIONS)


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_token_by_token_as_all_at_once(backend: str, pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, batch = pair
    model.eval()
    decode = Mock(wraps=acting.decode)
    monkeypatch.setattr(acting, "decode", decode)
    query = torch.randn(len(QUESTIONS), get_increments(model).pool.key_dim)
    batch = on_gpu(batch | {"query": query})
    with torch.no_grad(), ops.backend(backend):
        whole = model(**batch).logits
        ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
        first = model(input_ids=ids[:, :-3], attention_mask=mask[:, :-3], **batch, use_cache=True)
        for i in (-3, -2, -1):
            seen = mask[:, : mask.shape[1] + i + 1]
            step = model(input_ids=ids[:, i:][:, :1], attention_mask=seen, **cached(returned(first)))
            torch.testing.assert_close(step.logits[:, 0], whole[:, i], atol=1e-4, rtol=1e-3)
    natively = backend == "auto" and native.cuda_usable() is None
    assert decode.call_count == (3 * len(get_increments(model).linears(model)) if natively else 0)


def test_autocast_and_layers_computed_again(pair: Any) -> None:
    _, model, batch = pair
    model.train()
    batch = on_gpu(batch)
    exact = loss_and_gradients(model, batch)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    again = loss_and_gradients(model, batch)
    for name, tensor in exact.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    with torch.autocast("cuda", torch.bfloat16):
        half = loss_and_gradients(model, batch)
    for name, tensor in exact.items():
        assert (half[name].float() - tensor).norm() < 0.15 * tensor.norm(), name


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layer_is_captured_in_a_graph_forward_and_backward(dtype: torch.dtype, few: bool, pair: Any) -> None:
    """What a CUDA graph of training needs of a patched linear: nothing waits, no size depends on data."""
    _, model, _ = pair
    model.train().to(dtype)
    increments = get_increments(model)
    pool, scale = increments.pool, increments.config.scale
    layer = model.model.language_model.layers[0].self_attn.o_proj
    x = torch.randn(len(QUESTIONS), 33, layer.in_features, device="cuda", dtype=dtype, requires_grad=True)
    query = torch.randn(len(QUESTIONS), increments.pool.key_dim, device="cuda")
    factors = [p for p in increments.pool.parameters() if p.requires_grad and p.dim() == 3][:2]

    def step() -> tuple[Tensor, ...]:
        selection = increments.method.select(pool, query, increments.groups, True)
        strength = acting.column_strength(selection, pool, scale) if few else None
        assert few == (strength is not None)
        increments.call.active = dataclasses.replace(selection, column_strength=strength)
        return torch.autograd.grad(layer(x).square().sum(), [x, *factors])

    replay = measure.captured(step)
    with torch.no_grad():
        x.normal_()
        query.normal_()
    for replayed, eager in zip(replay(), step(), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.parametrize("stage, step", [("align", 4), ("tune", 4), ("evaluate", 2)])
def test_a_killed_run_ends_as_one_that_was_not(
    stage: str, step: int, processor: Any, tmp_path: Path, deterministic: None
) -> None:
    def run(folder: str, at: Any = None, **more: Any) -> Any:
        return learned(processor, tmp_path / folder, at, CONFIG, "cuda", **more)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", At(stage, step, killed))
    same(run("cut", resume=True), whole)


def test_learns_in_bfloat16(new_llava: Callable[[], Any], processor: Any, tmp_path: Path) -> None:
    from tests.train_helpers import arguments, stream

    model = cf.patch(new_llava().to("cuda", torch.bfloat16), dataclasses.replace(CONFIG, rank=4), processor=processor)
    result = cf.ContinualTrainer(model, processor, stream(), arguments(tmp_path / "run", max_steps=60)).train()
    assert all(loss[-1] < 0.8 * loss[0] for loss in result.losses.values())
    assert result.accuracy_matrix[1][0] == result.accuracy_matrix[0][0], "the first task must not be forgotten"


def test_decoding_is_replayed_as_a_graph(pair: Any) -> None:
    _, model, batch = pair
    model.eval().set_attn_implementation("sdpa")
    batch = on_gpu(batch)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options["suppress_tokens"] = [model.config.image_token_id]
    expected = model.generate(**batch, **options)
    for backend in ("cudagraphs", "inductor"):
        torch._dynamo.reset()
        counters.clear()
        compiling = CompileConfig(backend=backend, mode="reduce-overhead" if backend == "inductor" else None)
        for _ in range(2):  # captured, and replayed for the next request
            found = model.generate(**batch, **options, cache_implementation="static", compile_config=compiling)
            assert torch.equal(found, expected), backend
        captured = counters["inductor"]
        assert counters["stats"]["unique_graphs"] == 1 and captured["cudagraph_skips"] == 0, backend
        # inductor may leave a graph uncaptured without counting it as skipped; what is captured has inputs of its own
        assert captured["cudagraph_recorded_non_static_inputs"] > 0, backend
    torch._dynamo.reset()
