"""Decoding: straight to the native kernel, and compiled into one graph."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, StaticCache

import cllava_fast as cf
from cllava_fast.methods import METHODS, Pairs, Selection
from cllava_fast.model import acting, get_increments, paths
from cllava_fast.model.calls import STEP
from cllava_fast.ops import checks, native
from tests.helpers import QUESTIONS, cached, inputs, learn

CONFIG = cf.IncrementConfig(a_std=0.1)


def last_logits(model: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits[:, -1]


def test_native_decoding_is_the_same(
    llava: Any, processor: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a GPU decodes, the context goes as more pairs straight to the kernel; here told to, on the CPU."""
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 3, generator)
    batch = inputs(processor, QUESTIONS, generator)
    apart = last_logits(llava, batch)
    monkeypatch.setattr(acting, "native_pairs", lambda x, selection, factors: selection.joined)
    seen: list[int] = []
    decode = acting.decode

    def spy(*args: Any) -> Tensor:
        seen.append(args[5].shape[1])
        return decode(*args)

    monkeypatch.setattr(acting, "decode", spy)
    together = last_logits(llava, batch)
    earlier = get_increments(llava).pool.num_rows - CONFIG.rows_per_task  # of all tasks but the last
    assert set(seen) == {CONFIG.top_m + earlier} and len(seen) == 3
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    plain = last_logits(cf.unpatch(llava), batch)
    assert (together - plain).abs().max() > 100 * (together - apart).abs().max()


class Asked:
    """How often a function was called, and returned something."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.times, self.found = function, 0, 0

    def __call__(self, *args: Any) -> Any:
        self.times += 1
        returned = self.function(*args)
        self.found += returned is not None
        return returned


@pytest.fixture
def decoding(
    request: pytest.FixtureRequest,
    llava: Any,
    processor: Any,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Any, Asked, Asked, Callable[..., Tensor]]:
    """A model that decodes natively on the CPU; who is asked whether it may, and who does it; and its answers of so
    many tokens."""
    cf.patch(llava, getattr(request, "param", CONFIG), processor=processor)
    learn(llava, 3, generator)
    batch = inputs(processor, QUESTIONS, generator)
    single = lambda x: x.shape[1] == 1 and x.dtype == torch.float32  # noqa: E731
    asked = Asked(lambda x, selection, factors: selection.joined if single(x) else None)
    straight = Asked(acting.decode)
    monkeypatch.setattr(acting, "native_pairs", asked)
    monkeypatch.setattr(acting, "decode", straight)
    options = {"do_sample": False, "suppress_tokens": [llava.config.image_token_id]}
    return (
        llava,
        asked,
        straight,
        lambda new, **more: llava.generate(**batch, max_new_tokens=new, min_new_tokens=new, **options, **more),
    )


def test_whether_a_layer_decodes_natively_is_asked_once(decoding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, straight, answers = decoding
    layers = len(get_increments(model).linears(model))
    natively = answers(5)
    # for the prompt, and for the first of four tokens behind it
    assert (asked.times, straight.times) == (2 * layers, 4 * layers)
    asked.function = lambda *_: None
    assert torch.equal(answers(5), natively) and straight.times == 4 * layers


@pytest.mark.parametrize("more", [{"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("decoding", [CONFIG, METHODS["o_lora"][0](a_std=0.1)], indirect=True, ids=["queries", "none"])
def test_beams_ask_once(decoding: Any, more: dict[str, int]) -> None:
    """Each step's selection is the same one, repeated for the beams."""
    model, asked, straight, answers = decoding
    layers = len(get_increments(model).linears(model))
    natively = answers(5, **more)
    assert (asked.times, straight.times) == (2 * layers, 4 * layers)
    asked.function = lambda *_: None
    assert torch.equal(answers(5, **more), natively) and straight.times == 4 * layers


def test_a_loop_of_ones_own_asks_as_it_likes_without_a_query(
    llava: Any, processor: Any, generator: torch.Generator
) -> None:
    """Of fewer samples, since some are done; and with gradients, in inference mode, while a task is learned."""
    cf.patch(llava, METHODS["o_lora"][0](a_std=0.1), processor=processor)
    learn(llava, 2, generator, commit_last=False)
    batch = inputs(processor, QUESTIONS, generator)
    found = {}

    def loop(model: Any, input_ids: Tensor, pixel_values: Tensor, **_: Any) -> Tensor:
        few = {"input_ids": input_ids[:2], "pixel_values": pixel_values[:2], "use_cache": False}
        with torch.inference_mode():
            found["few"] = model(**few).logits[:, -1].clone()
        with torch.enable_grad():
            model.train()
            loss = model(**few, labels=few["input_ids"]).loss
            found["gradient"] = torch.autograd.grad(loss, next(p for p in model.parameters() if p.requires_grad))[0]
            model.eval()
        return input_ids

    llava.generate(**batch, custom_generate=loop, max_new_tokens=3)
    wanted = last_logits(llava, {"input_ids": batch["input_ids"][:2], "pixel_values": batch["pixel_values"][:2]})
    torch.testing.assert_close(found["few"], wanted)
    assert found["gradient"].abs().max() > 0


def test_what_a_graph_records_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    selection = Selection(past=Pairs(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)))
    with monkeypatch.context() as patched:
        patched.setattr(checks, "captured", true)
        assert selection.expand(4) is not selection.expand(4)
    assert selection.expand(4) is selection.expand(4) and selection.expand(6).batch_size == 6
    with torch.inference_mode():
        selection.expand(2 * 4)
    assert not selection.expand(2 * 4).past.coefficient.is_inference()  # which could not be used in training


def true(*_: Any) -> bool:
    return True


def pruned(linear: torch.nn.Linear) -> None:
    weight = linear.weight
    del linear.weight
    linear.weight = weight.detach()  # type: ignore[assignment]


WHATS = ["nothing", "gradients", "backend", "casts", "compiled", "looks at x", "wrapped", "tokens", "dtype", "pruned"]


@pytest.mark.parametrize("what", WHATS)
def test_what_makes_a_layer_ask_again(what: str, decoding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, straight, _ = decoding
    increments = get_increments(model)
    linear = next(iter(increments.linears(model).values()))
    x = torch.randn(len(QUESTIONS), 1, linear.in_features)
    query = torch.randn(len(QUESTIONS), increments.pool.key_dim)
    if what == "looks at x":
        monkeypatch.setattr(type(increments.method), "route", lambda self, selection, factors, x: selection)
    if what == "wrapped":
        monkeypatch.setattr(paths, "is_plain", lambda linear: False)
    increments.call.active = increments.method.select(increments.pool, query, increments.groups, False)
    with torch.no_grad():
        first = linear(x)
        asked.times = asked.found = straight.times = 0
        if what == "casts":
            monkeypatch.setattr(torch, "is_autocast_enabled", true)
        if what == "compiled":
            monkeypatch.setattr(torch.compiler, "is_compiling", true)
        if what == "tokens":
            x = torch.cat([x, x], 1)
        if what == "dtype":
            x = x.double()
            linear.double()
        if what == "pruned":
            pruned(linear)
        with cf.ops.backend("reference") if what == "backend" else nullcontext():
            again = torch.enable_grad()(linear)(x) if what == "gradients" else linear(x)
    assert straight.times - asked.found == (what == "nothing")
    assert asked.times == (what not in ("nothing", "wrapped", "pruned"))
    torch.testing.assert_close(again[:, -1:].detach().to(first.dtype), first)
    assert increments.call.active.arrived.equal(torch.zeros(len(QUESTIONS), dtype=torch.int32))


def test_a_selection_keeps_no_model_alive(decoding: Any) -> None:
    """A cache keeps its selection, for the next turn."""
    model, *_ = decoding
    increments = get_increments(model)
    factors = weakref.ref(next(iter(increments.pool.layers.values())))
    query = torch.randn(len(QUESTIONS), increments.pool.key_dim)
    increments.call.active = selection = increments.method.select(increments.pool, query, increments.groups, False)
    with torch.no_grad():
        for linear in increments.linears(model).values():
            linear(torch.randn(len(QUESTIONS), 1, linear.in_features))
    increments.call.active = None
    assert len(selection.native) == 3
    cf.unpatch(model)
    del increments, linear
    gc.collect()
    assert factors() is None and not selection.native


@pytest.mark.skipif(not native.EMULATED, reason="needs the emulated CUDA kernels")
def test_native_decoding_is_for_a_gpu_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors that say they are on a GPU; what else decides is turned around, one after the other."""
    rows, samples = torch.zeros(4, 2, 8), 3
    pairs = Pairs(torch.zeros(samples, 2, dtype=torch.int64), torch.ones(samples, 2))
    factors: Any = SimpleNamespace(A=rows, B=rows, shares_A=False)
    context = torch.ones(samples, 4)
    selection = Selection(past=pairs, context=context)

    def found(selection: Any = selection, factors: Any = factors, **changes: Any) -> Pairs | None:
        there = {"is_cuda": True, "shape": (samples, 1, 8), "device": rows.device, "dtype": torch.float32}
        return acting.native_pairs(SimpleNamespace(**{**there, **changes}), selection, factors)

    with cf.ops.backend("cuda"):  # whose emulation runs only when asked for
        assert found() is None, "gradients are on"
    with torch.no_grad():
        assert found() is None, "the native kernels are not what runs here"
        with cf.ops.backend("cuda"):
            joined = found()
            assert joined is selection.joined and joined is not None and joined.index.shape == (samples, 6)
            alone = found(Selection(past=pairs))
            assert alone is not None and alone.index is pairs.index and alone.coefficient is pairs.coefficient
            seen = found(Selection(past=pairs.map(lambda tensor: tensor[:1].expand(samples, -1))))
            assert seen is not None and seen.index.is_contiguous() and seen.coefficient.is_contiguous()
            assert found(is_cuda=False) is None and found(shape=(samples, 17, 8)) is None
            assert found(device=torch.device("meta")) is None
            assert found(factors=SimpleNamespace(A=rows, B=rows, shares_A=True)) is None
            for other in (
                Selection(block=pairs), replace(selection, block=pairs), replace(selection, mix=True),
                replace(selection, means=True), replace(selection, past=Pairs(pairs.index, torch.ones(samples, 1, 2))),
            ):  # fmt: skip
                assert found(other) is None, other
            for where, name in ((torch.compiler, "is_compiling"), (torch, "is_autocast_enabled")):
                with monkeypatch.context() as patched:
                    patched.setattr(where, name, lambda *_: True)
                    fresh = replace(selection)
                    assert found(fresh) is None and "joined" not in fresh.__dict__, name
            monkeypatch.setattr(acting, "NATIVE_BYTES", 1)
            assert found() is None


def kept_graphs() -> tuple[list[torch.fx.GraphModule], Callable[..., Any]]:
    """What is compiled, and a backend that runs it as it is."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    return graphs, backend


def test_decoding_compiles_into_one_graph(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """With a static cache, as transformers compiles it by itself on a GPU, where it is replayed as a CUDA graph."""
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 3, generator)
    batch = inputs(processor, QUESTIONS[:3], generator)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options["suppress_tokens"] = [llava.config.image_token_id]  # random weights may say it
    expected = llava.generate(**batch, **options)
    assert torch.equal(llava.generate(**batch, **options, cache_implementation="static"), expected)
    graphs, backend = kept_graphs()
    compiling = CompileConfig(backend=backend, mode=None, fullgraph=True)
    compiling._compile_all_devices = True
    torch._dynamo.reset()
    for turned in (batch, {name: tensor.flip(0) for name, tensor in batch.items()}):
        found = llava.generate(**turned, **options, cache_implementation="static", compile_config=compiling)
        assert torch.equal(found, expected if turned is batch else expected.flip(0))
    torch._dynamo.reset()
    (graph,) = graphs
    handed = [node for node in graph.graph.nodes if node.op == "placeholder"]
    # a CUDA graph is recorded anew where what counts as a weight lies elsewhere, as a request's own tensors do
    static = [node.name for node in handed if "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})]
    acting = [node.name for node in handed if STEP in node.name]
    assert static and acting and not any(STEP in name or "pending" in name for name in static)


def test_a_step_by_hand_does_not_ask_a_static_cache_for_its_length(
    llava: Any, processor: Any, generator: torch.Generator
) -> None:
    """Which lies on the device: a GPU would be waited for, and nothing could be compiled whole."""
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 3, generator)
    batch = inputs(processor, QUESTIONS[:3], generator)
    length = batch["input_ids"].shape[1]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    graphs, backend = kept_graphs()
    token = torch.full((3, 1), 9)

    def step(cache: StaticCache) -> Tensor:
        at = torch.full((3, 1), length)
        return llava(input_ids=token, attention_mask=mask, position_ids=at, **cached(cache)).logits

    def filled() -> StaticCache:
        cache = StaticCache(config=llava.config.get_text_config(), max_cache_len=length + 1)
        llava(**batch, **cached(cache))
        return cache

    def length_of(cache: StaticCache, *args: Any, **kwargs: Any) -> Any:
        asked.append(sys._getframe(1).f_globals["__name__"])
        return seq_length(cache, *args, **kwargs)

    asked: list[str] = []
    seq_length = StaticCache.get_seq_length
    with torch.no_grad():
        cache = filled()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(StaticCache, "get_seq_length", length_of)
            expected = step(cache)
        assert asked and not [name for name in asked if name.startswith("cllava_fast")]
        torch._dynamo.reset()
        compiled = torch.compile(step, backend=backend, fullgraph=True)
        for _ in range(2):  # whichever other caches there are
            torch.testing.assert_close(compiled(filled()), expected, atol=1e-5, rtol=1e-5)
        torch._dynamo.reset()
    assert len(graphs) == 1
