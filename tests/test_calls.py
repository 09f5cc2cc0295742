"""What a call to the patched model does: which rows act on whom."""

from __future__ import annotations

import copy
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cllava_fast as cf
from cllava_fast.methods import config_from_dict
from cllava_fast.model import get_increments, paths
from cllava_fast.model.caches import returned
from tests.helpers import QUESTIONS, at_once, cached, inputs, last_logits, learn, selected, take

CONFIG = cf.IncrementConfig(a_std=0.1)
BACKBONE = cf.IncrementConfig(a_std=0.1, surrogate="backbone")


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
    enable = getattr(llava, "activation_checkpointing_enable", None) or llava.gradient_checkpointing_enable
    enable()
    llava.train()
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
    increments = learn(llava, 1, generator, b_std=0.1, commit_last=False)
    assert torch.equal(language(inputs_embeds=embeds).last_hidden_state, frozen)  # in evaluation, nothing acts yet
    llava.train()
    with pytest.raises(RuntimeError, match="called from outside the model"):
        language(inputs_embeds=embeds)
    llava.eval()
    increments.close_task("task0", torch.randn(40, increments.pool.key_dim, generator=generator))
    with pytest.raises(RuntimeError, match="called from outside the model, and no increments would act; call the mod"):
        language(inputs_embeds=embeds)
    cf.merge(llava, task="task0")
    assert not torch.equal(language(inputs_embeds=embeds).last_hidden_state, frozen)
    cf.unmerge(llava)
    cf.unpatch(llava)
    assert torch.equal(language(inputs_embeds=embeds).last_hidden_state, frozen)
    cf.patch(llava, config_from_dict({"method": "sequential_lora"}), processor=processor)
    learn(llava, 1, generator, commit_last=False)  # it does in evaluation, too
    with pytest.raises(RuntimeError, match="called from outside the model"):
        language(inputs_embeds=embeds)


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


def test_a_question_within_a_layer_leaves_the_rest_of_it_its_rows(
    llava: Any, processor: Any, generator: torch.Generator
) -> None:
    """Asked by a hook, while values and what goes into ``o_proj`` are still to come."""
    cf.patch(llava, cf.IncrementConfig(a_std=0.1, targets=("self_attn.*",)), processor=processor)
    learn(llava, 3, generator, b_std=0.3)
    batch, other = inputs(processor, QUESTIONS[:2], generator), inputs(processor, QUESTIONS[3:], generator)
    wanted, alone, found = last_logits(llava, batch), last_logits(llava, other), []

    def ask(*_: Any) -> None:
        hook.remove()
        with pytest.raises(TypeError, match="call the model itself, not model.model"):
            llava.model(**other)
        found.append(last_logits(llava, other))

    hook = llava.model.language_model.layers[0].self_attn.q_proj.register_forward_hook(ask)
    assert torch.equal(last_logits(llava, batch), wanted) and torch.equal(found[0], alone)


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


def test_no_instruction_to_be_found(llava: Any, processor: Any, generator: torch.Generator) -> None:
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
def test_bad_queries_and_instructions(call: str, llava: Any, processor: Any, generator: torch.Generator) -> None:
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
