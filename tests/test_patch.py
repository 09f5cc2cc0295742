"""The patched model: what it leaves alone, and which rows act on whom."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cllava_fast as cf
from cllava_fast.data import chat_template, pad_to_square
from cllava_fast.methods.diki import DikiConfig
from cllava_fast.methods.lora import LoraConfig
from cllava_fast.model import get_increments, paths
from cllava_fast.model.caches import returned
from tests.helpers import QUESTIONS, at_once, cached, inputs, learn, take

CONFIG = cf.IncrementConfig(a_std=0.1)
BACKBONE = cf.IncrementConfig(a_std=0.1, surrogate="backbone")


def last_logits(model: Any, batch: dict[str, Any], **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **kwargs).logits[:, -1]


def selected(model: Any, batch: dict[str, Any], **kwargs: Any) -> Tensor:
    """``[B, M]`` rows that acted in the layers, recorded where they act."""
    seen = []
    increments = get_increments(model)
    inject = increments.inject

    def record(*args: Any) -> Tensor:
        seen.append(increments.call.active.index)
        return inject(*args)

    increments.inject = record  # type: ignore[method-assign]
    try:
        last_logits(model, batch, **kwargs)
    finally:
        del increments.inject
    return seen[0]


def test_bit_equal_until_a_task_is_learned(llava: Any, processor: Any, generator: torch.Generator) -> None:
    batch = inputs(processor, QUESTIONS, generator)
    before = last_logits(llava, batch)
    generated = llava.generate(**batch, max_new_tokens=4)
    cf.patch(llava, CONFIG, processor=processor)
    assert torch.equal(last_logits(llava, batch), before)
    assert torch.equal(llava.generate(**batch, max_new_tokens=4), generated)
    # an open block acts in training alone
    learn(llava, 1, generator, commit_last=False)
    assert torch.equal(last_logits(llava, batch), before)


def test_unpatch_restores_the_model_that_came_in(
    llava: Any, new_llava: Callable, processor: Any, generator: Any
) -> None:
    llava.model.vision_tower.requires_grad_(False)
    batch = inputs(processor, QUESTIONS, generator)
    before, state = last_logits(llava, batch), copy.deepcopy(llava.state_dict())
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in llava.modules()]
    attributes = {name: set(module.__dict__) for name, module in llava.named_modules()}
    grads = {name: p.requires_grad for name, p in llava.named_parameters()}
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator)
    assert not torch.equal(last_logits(llava, batch), before)
    assert not any(p.requires_grad for p in llava.parameters())
    cf.unpatch(llava)
    assert torch.equal(last_logits(llava, batch), before)
    assert {name: set(module.__dict__) for name, module in llava.named_modules()} == attributes
    assert {name: p.requires_grad for name, p in llava.named_parameters()} == grads
    assert all(torch.equal(tensor, state[name]) for name, tensor in llava.state_dict().items())
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in llava.modules()] == hooks
    with pytest.raises(ValueError, match="not patched"):
        cf.unpatch(llava)
    cf.unpatch(cf.patch(llava, CONFIG, processor=processor))


def test_base_names_in_the_state_dict_stay(llava: Any, processor: Any) -> None:
    before = list(llava.state_dict())
    cf.patch(llava, CONFIG, processor=processor)
    assert [name for name in llava.state_dict() if not name.startswith("increments.")] == before


def test_other_instances_are_untouched(new_llava: Callable, processor: Any, generator: torch.Generator) -> None:
    patched, other = new_llava(), new_llava()
    batch = inputs(processor, QUESTIONS, generator)
    before = last_logits(other, batch)
    learn(cf.patch(patched, CONFIG, processor=processor), 1, generator)
    assert torch.equal(last_logits(other, batch), before)


def test_patch_is_idempotent_and_refuses_another_config(llava: Any, processor: Any) -> None:
    assert cf.patch(llava, CONFIG, processor=processor) is llava
    increments = llava.increments
    assert cf.patch(llava, CONFIG, processor=processor).increments is increments
    assert cf.patch(llava).increments is increments
    with pytest.raises(ValueError, match="is patched with .*unpatch"):
        cf.patch(llava, cf.IncrementConfig(rank=3), processor=processor)
    speaking, padding = copy.deepcopy(processor), copy.deepcopy(processor)
    speaking.chat_template = chat_template("vicuna_v1")
    pad_to_square(padding)
    for other, what in ((speaking, "chat template"), (padding, "do_pad of images")):
        with pytest.raises(ValueError, match=f"another {what} than the one .*; unpatch"):
            cf.patch(llava, CONFIG, processor=other)
    assert llava.increments is increments


def test_only_language_layers_are_adapted(llava: Any, processor: Any) -> None:
    config = cf.IncrementConfig(targets=("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"))
    cf.patch(llava, config, processor=processor)
    adapted = [name for name, module in llava.named_modules() if "_adapter" in module.__dict__]
    assert len(adapted) == 9 and all(name.startswith("model.language_model.layers.") for name in adapted)


def test_everything_but_the_block_is_frozen_in_training(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, 2, generator, commit_last=False)
    increments.pool.train_keys(False)
    llava.train()
    batch = inputs(processor, QUESTIONS, generator, side="right")
    llava(**batch, labels=batch["input_ids"]).loss.backward()
    with_gradient = {name for name, p in llava.named_parameters() if p.grad is not None}
    assert {name.split(".")[-1] for name in with_gradient} == {"block_A", "block_B", "block_context"}
    assert all(name.startswith("increments.pool.") for name in with_gradient)
    assert not any(buffer.requires_grad for buffer in llava.buffers())
    assert all(float(p.grad.abs().sum()) > 0 for p in llava.parameters() if p.grad is not None)


@pytest.mark.parametrize("config", [CONFIG, cf.IncrementConfig(a_std=0.1, context="factor"), BACKBONE])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_what_its_samples_are(
    config: cf.IncrementConfig, side: str, llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, config, processor=processor)
    learn(llava, 3, generator)
    batch = inputs(processor, QUESTIONS, generator, side)
    rows = selected(llava, batch)
    assert len({tuple(sorted(row)) for row in rows.tolist()}) > 1, "every sample must get its own rows"
    with torch.no_grad():
        logits = llava(**batch).logits
    for i in range(len(QUESTIONS)):
        alone = take(batch, i)
        assert torch.equal(selected(llava, alone)[0], rows[i])
        single = llava(**alone).logits[0]
        torch.testing.assert_close(logits[i][batch["attention_mask"][i].bool()], single, atol=2e-4, rtol=1e-4)


def test_increments_are_the_formula(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """Against dense offsets added to the weights by hand, one sample at a time."""
    cf.patch(llava, cf.IncrementConfig(a_std=0.1, scale=1.5), processor=processor)
    increments = learn(llava, 3, generator)
    batch = inputs(processor, QUESTIONS[:3], generator)
    got = last_logits(llava, batch)
    pool, expected = increments.pool, []
    for i in range(3):
        query = increments.surrogate.query([increments.reader.canonical(QUESTIONS[i])])
        selection = increments.method.select(pool, query, 1, training=False)
        alpha = torch.zeros(pool.num_rows).index_add_(0, selection.past.index[0], selection.past.coefficient[0])
        alpha[: selection.context.shape[1]] += selection.context[0]
        plain = cf.unpatch(copy.deepcopy(llava))
        for path in pool.layers:
            factors = pool.factors(path.replace("/", "."))
            offset = torch.einsum("n,nro,nri->oi", alpha, factors.B, factors.A)
            plain.get_submodule(path.replace("/", ".")).weight.data += 1.5 * offset
        expected.append(last_logits(plain, take(batch, i))[0])
    torch.testing.assert_close(got, torch.stack(expected), atol=2e-4, rtol=1e-4)


def test_a_loss_of_ones_own_has_the_same_gradient(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """On what ``model.model`` returns, with activation checkpointing, as trainers with a head of their own go."""
    cf.patch(llava, CONFIG, processor=processor)
    pool = learn(llava, 2, generator, commit_last=False).pool
    pool.train_keys(False)
    parameters = [parameter for parameter in pool.parameters() if parameter.requires_grad]
    batch = inputs(processor, QUESTIONS, generator)
    labels = batch["input_ids"]
    llava.train().gradient_checkpointing_enable()
    expected = torch.autograd.grad(llava(**batch, labels=labels, logits_to_keep=0).loss, parameters)
    logits = llava.lm_head(llava.model(**batch, use_cache=False).last_hidden_state[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    for gradient, own in zip(expected, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(own, gradient, atol=1e-5, rtol=1e-4)


def test_no_part_of_the_model_answers_without_its_increments(
    llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    language = llava.model.language_model
    embeds = llava.get_input_embeddings()(inputs(processor, QUESTIONS, generator)["input_ids"])
    frozen = language(inputs_embeds=embeds).last_hidden_state
    learn(llava, 1, generator, b_std=0.1)
    with pytest.raises(RuntimeError, match="called from outside the model, and no increments would act; call the mod"):
        language(inputs_embeds=embeds)
    cf.merge(llava, task="task0")
    assert not torch.equal(language(inputs_embeds=embeds).last_hidden_state, frozen)
    cf.unmerge(llava)
    cf.unpatch(llava)
    assert torch.equal(language(inputs_embeds=embeds).last_hidden_state, frozen)


@pytest.mark.parametrize(
    "generation", [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_generate_in_mixed_batches(generation: dict, llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 3, generator, b_std=0.1)
    batch = inputs(processor, QUESTIONS, generator)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **generation}
    options["suppress_tokens"] = [llava.config.image_token_id]  # random weights may say it
    together = llava.generate(**batch, **options)[:, -5:]
    returned = generation.get("num_return_sequences", 1)
    for i in range(len(QUESTIONS)):
        alone = llava.generate(**take(batch, i), **options)[:, -5:]
        assert torch.equal(together[i * returned : (i + 1) * returned], alone)


def test_calls_in_two_threads_each_have_their_own_selection(
    llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 3, generator, b_std=0.3)
    batches = [inputs(processor, (question,), generator) for question in QUESTIONS[:2]]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options["suppress_tokens"] = [llava.config.image_token_id]  # random weights may say it
    for call in (last_logits, lambda model, batch: model.generate(**batch, **options)):
        alone = [call(llava, batch) for batch in batches]
        together = at_once(paths.attentions(llava), *(partial(call, llava, batch) for batch in batches))
        assert all(torch.equal(*results) for results in zip(together, alone, strict=True))


def test_a_question_within_generate_has_rows_of_its_own(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """Asked by a stopping criterion, of another number of samples, in one call, token by token, and by generate."""
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 3, generator, b_std=0.3)
    batch, other = inputs(processor, QUESTIONS[:2], generator), inputs(processor, QUESTIONS[3:], generator)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options["suppress_tokens"] = [llava.config.image_token_id]  # random weights may say it

    def asked() -> list[Tensor]:
        with torch.no_grad():
            prefill = llava(**other, use_cache=True)
            mask = torch.nn.functional.pad(other["attention_mask"], (0, 1), value=1)
            step = {"input_ids": torch.full((3, 1), 9), "attention_mask": mask}
            step = llava(**step, **cached(returned(prefill)))
        return [prefill.logits, step.logits, llava.generate(**other, **options)]

    found: list[list[Tensor]] = []

    def judge(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        found.append(asked())
        return torch.zeros(len(ids), dtype=torch.bool)

    wanted, answers = asked(), llava.generate(**batch, **options)
    assert torch.equal(llava.generate(**batch, **options, stopping_criteria=[judge]), answers)
    assert len(found) == 4
    assert all(torch.equal(*pair) for each in found for pair in zip(each, wanted, strict=True))


def test_a_decoding_loop_of_ones_own_has_the_rows_of_its_generate(
    llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 3, generator, b_std=0.3)
    batch = take(inputs(processor, QUESTIONS[:1], generator), 0)
    options = {"instructions": [QUESTIONS[4]], "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    wanted = llava.generate(**batch, **options, return_dict_in_generate=True, output_logits=True)
    found = []

    def loop(model: Any, input_ids: Tensor, pixel_values: Tensor, **_: Any) -> Tensor:
        for _ in range(3):
            found.append(model(input_ids=input_ids, pixel_values=pixel_values).logits[:, -1])
            input_ids = wanted.sequences[:, : input_ids.shape[1] + 1]
        return input_ids

    llava.generate(**batch, **options, custom_generate=loop)
    torch.testing.assert_close(torch.cat(found), torch.cat(wanted.logits), atol=2e-4, rtol=1e-3)


def test_said_outright_or_read_back_is_the_same(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, 2, generator)
    batch = inputs(processor, QUESTIONS, generator)
    read = last_logits(llava, batch)
    said = last_logits(llava, batch, instructions=[f" {q.upper()} " for q in QUESTIONS])
    query = increments.surrogate.query([increments.reader.canonical(q) for q in QUESTIONS])
    assert torch.equal(read, said) and torch.equal(read, last_logits(llava, batch, query=query))
    other = last_logits(llava, batch, instructions=list(reversed(QUESTIONS)))
    assert not torch.allclose(read, other)
    generated = llava.generate(**batch, instructions=list(reversed(QUESTIONS)), max_new_tokens=1, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
    torch.testing.assert_close(generated.logits[0], other, atol=1e-5, rtol=1e-5)


def test_image_features_stand_in_for_pixels(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 1, generator)
    batch = inputs(processor, QUESTIONS, generator)
    features = torch.stack(llava.get_image_features(batch["pixel_values"]).pooler_output)
    rest = {name: tensor for name, tensor in batch.items() if name != "pixel_values"}
    assert torch.equal(last_logits(llava, rest, image_features=features), last_logits(llava, batch))
    a, b = (llava.generate(**k, max_new_tokens=3) for k in (batch, {**rest, "image_features": features}))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="both given"):
        llava(**batch, image_features=features)
    expected = rf"image_features is .*; expected \[images, tokens, {features.shape[2]}\]"
    for wrong in (features[0], features[..., 1:]):
        with pytest.raises(ValueError, match=expected):
            llava(**rest, image_features=wrong)


def test_text_and_image_queries(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, cf.IncrementConfig(a_std=0.1, surrogate="text+image"), processor=processor)
    increments = get_increments(llava)
    same = inputs(processor, (QUESTIONS[0],) * 4, generator)
    for _ in range(3):
        pixels = torch.randn(30, 3, 64, 64, generator=generator)
        with torch.no_grad():
            pooled = llava.model.vision_tower(pixels).last_hidden_state.mean(1)
        queries = increments.surrogate.query([QUESTIONS[0]] * 30, pooled)
        increments.method.open_task(increments.pool, queries, generator)
        for factors in increments.pool.layers.values():
            torch.nn.init.normal_(factors.block_B, std=0.05, generator=generator)
        increments.close_task(f"t{_}", queries)
    rows = selected(llava, same)
    assert len({tuple(row) for row in rows.tolist()}) > 1, "equal questions about different images differ"
    for i in range(4):
        assert torch.equal(selected(llava, take(same, i))[0], rows[i])
    rest = {name: tensor for name, tensor in same.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="needs pixel_values"):
        llava(**rest)


def test_a_copied_model_is_a_model_of_its_own(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 1, generator)
    batch = inputs(processor, QUESTIONS, generator)
    twin = copy.deepcopy(llava)
    before = last_logits(llava, batch)
    assert torch.equal(last_logits(twin, batch), before)
    for factors in twin.increments.pool.layers.values():
        factors.B.zero_()
    assert not torch.equal(last_logits(twin, batch), before) and torch.equal(last_logits(llava, batch), before)
    cf.unpatch(twin)
    assert torch.equal(last_logits(llava, batch), before)


@pytest.mark.parametrize("config", [CONFIG, BACKBONE, DikiConfig(), LoraConfig()])
def test_a_patched_model_is_not_pickled(llava: Any, processor: Any, config: Any) -> None:
    """It would come back as the frozen base."""
    cf.patch(llava, config, processor=processor)
    parts = (llava, llava.model, llava.model.language_model.layers[0].self_attn.o_proj)
    for part in parts:
        with pytest.raises(TypeError, match="cannot be pickled.*save_pretrained"):
            pickle.dumps(part)
    with pytest.raises(TypeError, match="cannot be pickled"):
        torch.save(llava, io.BytesIO())
    cf.unpatch(llava)
    assert [type(pickle.loads(pickle.dumps(part))) for part in parts] == [type(part) for part in parts]


def test_activation_checkpointing_recomputes_with_its_own_selection(
    llava: Any, processor: Any, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, 2, generator, commit_last=False)
    increments.pool.train_keys(False)
    llava.train()
    batches = [inputs(processor, part, generator, side="right") for part in (QUESTIONS[:3], QUESTIONS[3:])]

    def gradients() -> dict[str, Tensor]:
        llava.zero_grad()
        # both forward passes before the backward pass
        sum(llava(**b, labels=b["input_ids"], use_cache=False).loss for b in batches).backward()
        return {name: p.grad.clone() for name, p in llava.named_parameters() if p.grad is not None}

    plain = gradients()
    enable = getattr(llava, "activation_checkpointing_enable", None) or llava.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    backward = Tensor.backward

    def elsewhere(loss: Tensor) -> None:  # as on a GPU, whose layers are computed again by a thread of its own
        with ThreadPoolExecutor(1) as threads:
            threads.submit(backward, loss).result()

    for where in (backward, elsewhere):
        monkeypatch.setattr(Tensor, "backward", where)
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5)
    copy.deepcopy(llava)


def test_a_base_layer_that_is_no_plain_linear(llava: Any, processor: Any, generator: torch.Generator) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for layer in llava.model.language_model.layers:
        layer.self_attn.o_proj.__class__ = Doubled
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, 1, generator)
    linear = llava.model.language_model.layers[0].self_attn.o_proj
    x = torch.randn(2, 3, 128, generator=generator)
    increments.call.active = increments.method.select(
        increments.pool, torch.randn(2, increments.pool.key_dim, generator=generator), 1, training=False
    )
    factors, pairs = (
        increments.pool.factors("model.language_model.layers.0.self_attn.o_proj"),
        increments.call.active.past,
    )
    zero = cf.ops.inject_add(torch.zeros(2, 3, 128), x, factors.A, factors.B, pairs.index, pairs.coefficient)
    torch.testing.assert_close(linear(x), 2 * x @ linear.weight.T + zero)


def test_a_model_cast_after_the_patch(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """Committed rows follow the model; keys, means and context keep their precision, and so does what trains."""
    cf.patch(llava, CONFIG, processor=processor)
    pool = learn(llava, 3, generator, commit_last=False).pool
    exact = {name: t.clone() for name, t in (*pool.named_buffers(), *pool.named_parameters())}
    batch = inputs(processor, QUESTIONS, generator)
    rows = selected(llava, batch)
    llava.to(torch.bfloat16)
    for name, tensor in (*pool.named_buffers(), *pool.named_parameters()):
        if name.endswith((".A", ".B")):
            assert tensor.dtype == torch.bfloat16
        else:
            assert torch.equal(tensor, exact[name]) and tensor.dtype == exact[name].dtype, name
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert torch.equal(selected(llava, batch), rows)
    assert last_logits(llava, batch).dtype == torch.bfloat16
    llava.train()
    pool.train_keys(False)
    llava(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 for p in pool.parameters() if p is not pool.block_keys
    )


def test_what_others_put_on_a_linear_keeps_its_part(llava: Any, processor: Any, generator: torch.Generator) -> None:
    linear = llava.model.language_model.layers[0].self_attn.o_proj
    linear.forward = lambda x: 2 * nn.functional.linear(x, linear.weight)
    batch = inputs(processor, QUESTIONS, generator)
    before = last_logits(llava, batch)
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 1, generator, b_std=0.0)
    torch.testing.assert_close(last_logits(llava, batch), before)


def test_the_base_is_not_saved_by_mistake(
    llava: Any, processor: Any, tmp_path: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    with pytest.raises(ValueError, match="cllava_fast.save_pretrained"):
        llava.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    cf.unpatch(llava)
    llava.save_pretrained(tmp_path / "out")
    assert type(llava).from_pretrained(tmp_path / "out") is not None


def test_continuous_batching_takes_one_selection_for_all(
    llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 1, generator)
    ids = inputs(processor, QUESTIONS[:1], generator)["input_ids"]
    for model in (llava, copy.deepcopy(llava)):
        for pack in (
            model.init_continuous_batching,
            model.continuous_batching_context_manager().__enter__,
            lambda model=model: model.generate_batch(ids.tolist()),
            lambda model=model: model.generate(ids, cache_implementation="paged", max_new_tokens=1),
        ):
            with pytest.raises(ValueError, match="one selection alone; call model.generate, or .*merge"):
                pack()
    cf.merge(llava, task="task0")
    assert llava.init_continuous_batching() is not None
    cf.unmerge(llava)
    cf.unpatch(llava)
    assert llava.init_continuous_batching() is not None


def test_bfloat16_model(llava: Any, processor: Any, generator: torch.Generator) -> None:
    batch = inputs(processor, QUESTIONS, generator)
    llava.to(torch.bfloat16)
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, 2, generator)
    assert increments.pool.factors("model.language_model.layers.0.self_attn.o_proj").A.dtype == torch.bfloat16
    assert increments.pool.keys.dtype == torch.float32
    assert torch.isfinite(last_logits(llava, {**batch, "pixel_values": batch["pixel_values"].bfloat16()})).all()


class TestRefusals:
    def test_a_model_that_is_no_llava(self, processor: Any) -> None:
        with pytest.raises(TypeError, match="model is a Linear; expected transformers.LlavaFor.*LlamaFor"):
            cf.patch(nn.Linear(2, 2), processor=processor)
        for wrapped in (nn.DataParallel(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2))):
            with pytest.raises(TypeError, match="pass the unwrapped model"):
                cf.patch(wrapped, processor=processor)

    def test_a_model_with_adapters_of_another_library(self, llava: Any, processor: Any) -> None:
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(llava, peft.LoraConfig(target_modules=["o_proj"]))
        with pytest.raises(TypeError, match="PEFT"):
            cf.patch(wrapped, CONFIG, processor=processor)
        with pytest.raises(ValueError, match="adapters of another patch"):
            cf.patch(llava, CONFIG, processor=processor)
        assert not hasattr(llava, "increments")

    def test_a_tokenizer_in_place_of_a_processor(self, llava: Any, processor: Any) -> None:
        for _ in range(2):  # and of a patched model
            with pytest.raises(TypeError, match="no image_processor; expected the whole processor of the LlavaFor"):
                cf.patch(llava, processor=processor.tokenizer)
            cf.patch(llava, processor=processor)

    def test_no_processor_anywhere(self, llava: Any) -> None:
        with pytest.raises(ValueError, match='needs a processor.*surrogate="backbone"'):
            cf.patch(llava)
        assert not hasattr(llava, "increments") and "forward" not in llava.__dict__
        cf.patch(llava, BACKBONE)

    def test_an_unknown_target_or_surrogate(self, llava: Any, processor: Any) -> None:
        with pytest.raises(ValueError, match="'out_proj' is not in .* expected one of .*self_attn.o_proj"):
            cf.patch(llava, cf.IncrementConfig(targets=("out_proj",)), processor=processor)
        with pytest.raises(FileNotFoundError, match="surrogate 'nobody' was not found"):
            cf.patch(llava, cf.IncrementConfig(surrogate="nobody"), processor=processor)
        assert not hasattr(llava, "increments")

    def test_no_instruction_to_be_found(self, llava: Any, processor: Any, generator: torch.Generator) -> None:
        cf.patch(llava, CONFIG, processor=processor)
        learn(llava, 1, generator)
        with pytest.raises(ValueError, match=r"no user turn \('USER:'\).*instructions="):
            llava(input_ids=torch.tensor([[9, 10, 11]]))
        empty = processor(text=["USER: ASSISTANT:"], return_tensors="pt")
        with pytest.raises(ValueError, match="last user turn of sample 0 is empty"):
            llava(**empty)
        embeds = torch.zeros(1, 3, 128)
        with pytest.raises(ValueError, match="input_ids is None"):
            llava(inputs_embeds=embeds)
        llava(inputs_embeds=embeds, instructions=["which bar?"])

    @pytest.mark.parametrize("call", ["forward", "generate"])
    def test_bad_queries_and_instructions(
        self, call: str, llava: Any, processor: Any, generator: torch.Generator
    ) -> None:
        cf.patch(llava, CONFIG, processor=processor)
        increments = learn(llava, 1, generator)
        batch = inputs(processor, QUESTIONS[:2], generator)
        run = getattr(llava, call)
        query = torch.randn(2, increments.pool.key_dim, generator=generator)
        query[1, 3] = float("nan")
        with pytest.raises(ValueError, match="query holds NaN or Inf"):
            run(**batch, query=query)
        for wrong in ([2, 3], [1, 384]):
            with pytest.raises(ValueError, match=re.escape(f"query is {wrong}; expected [2, 384]")):
                run(**batch, query=torch.randn(wrong))
        with pytest.raises(ValueError, match="query and instructions were both given; give one of them"):
            run(**batch, query=torch.randn(2, 384), instructions=["a", "b"])
        for texts in (["a"], ["a", "b", "c"], []):
            with pytest.raises(ValueError, match=f"instructions holds {len(texts)} texts; expected 2"):
                run(**batch, instructions=texts)
        with pytest.raises(TypeError, match="expected a list with one text"):
            run(**batch, instructions="what?")
        assert increments.call.active is None and increments.call.pending is None
