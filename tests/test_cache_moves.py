"""Samples of a cache that are moved, copied, edited by hand or taken back: whose rows act behind them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import cllava_fast as cf
from cllava_fast.model import caches
from cllava_fast.model.caches import returned
from tests.helpers import QUESTIONS, cached, inputs, last_logits, learn, selected
from tests.test_calls import CONFIG

MOVED = {
    "reorder_cache": (torch.tensor([2, 0, 1]), [2, 0, 1]),
    "batch_select_indices": (torch.tensor([2, 2, 0, 1, 0]), [2, 2, 0, 1, 0]),
    "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("by_layer", [False, True], ids=["cache", "layers"])
@pytest.mark.parametrize("moves", ["reorder_cache, static", *MOVED, "batch_repeat_interleave, batch_select_indices"])
def test_rows_follow_the_samples_of_a_cache(
    moves: str, by_layer: bool, llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 3, generator, b_std=0.1)
    batch = inputs(processor, QUESTIONS[:3], generator)
    tokens, ones = torch.tensor([[9], [10], [11]]), torch.ones(3, 1, dtype=torch.int64)
    mask = torch.cat([batch["attention_mask"], ones], 1)

    def step(cache: Any, samples: list[int]) -> Tensor:
        inputs = {"input_ids": tokens[samples], "attention_mask": mask[samples], **cached(cache)}
        return last_logits(llava, inputs, position_ids=mask[samples].sum(1, keepdim=True) - 1)

    names, static, _ = moves.partition(", static")
    caches, samples = [], [0, 1, 2]
    for _ in range(2):
        config = llava.config.text_config
        cache = StaticCache(config=config, max_cache_len=60) if static else DynamicCache(config=config)
        last_logits(llava, batch, **cached(cache), use_cache=True)
        caches.append(cache)
    for name in names.split(", "):
        given, order = MOVED[name]
        for moved in caches[1].layers if by_layer else [caches[1]]:
            getattr(moved, name)(given)
        samples = [samples[i] for i in order]
    expected = step(caches[0], [0, 1, 2])
    torch.testing.assert_close(step(caches[1], samples), expected[samples], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [3, 4])
def test_rows_of_a_cache_that_others_filled_are_not_guessed(
    rows: int, llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 1, generator)
    with torch.no_grad():
        cache = returned(llava(**inputs(processor, QUESTIONS[:2], generator), use_cache=True))
    for layer in cache.layers:
        layer.keys, layer.values = (part[:1].repeat(rows, 1, 1, 1) for part in (layer.keys, layer.values))
    cache.reorder_cache(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="its instruction is unknown"):
        llava(input_ids=torch.tensor([[9], [9]]), **cached(cache))


def test_a_cache_that_was_edited_by_hand_needs_instructions(
    llava: Any, processor: Any, generator: torch.Generator
) -> None:
    """Once: as one sample at a time, from then on."""
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 3, generator, b_std=0.1)
    batch = inputs(processor, QUESTIONS[:4], generator)
    tokens = torch.tensor([[9, 12], [10, 9], [11, 10], [12, 11]])
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)
    assert not mask.all(), "samples differ in length"

    def filled(samples: slice) -> Any:
        cache = DynamicCache(config=llava.config.text_config)
        last_logits(llava, {name: tensor[samples] for name, tensor in batch.items()}, **cached(cache))
        return cache

    def step(cache: Any, number: int, samples: Any = slice(4), **asked: Any) -> Tensor:
        so_far = mask[samples, : mask.shape[1] - 1 + number]
        at = {"attention_mask": so_far, "position_ids": so_far.sum(1, keepdim=True) - 1}
        return last_logits(llava, {"input_ids": tokens[samples, number : number + 1], **at}, **cached(cache), **asked)

    wanted = []
    for i in range(4):
        alone = filled(slice(i, i + 1))
        wanted.append([step(alone, number, slice(i, i + 1)) for number in (0, 1)])
    cache, other = filled(slice(2)), filled(slice(2, 4))
    for layer, others in zip(cache.layers, other.layers, strict=True):
        layer.keys, layer.values = torch.cat([layer.keys, others.keys]), torch.cat([layer.values, others.values])
    with pytest.raises(ValueError, match="its instruction is unknown"):
        step(cache, 0)
    # of as many samples as before, nobody can tell
    order, edited = [2, 0, 3, 3], filled(slice(4))
    for layer in edited.layers:
        layer.keys, layer.values = layer.keys[order], layer.values[order]
    for joined, samples in ((cache, [0, 1, 2, 3]), (edited, order)):
        asked = {"instructions": [QUESTIONS[i] for i in samples]}
        for number in (0, 1):
            found = step(joined, number, samples, **(asked if number == 0 else {}))
            expected = torch.cat([wanted[i][number] for i in samples])
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("way", ["by hand", "generate"])
def test_a_turn_that_was_taken_back_acts_no_more(
    way: str, static: bool, llava: Any, processor: Any, generator: torch.Generator
) -> None:
    if static and not hasattr(StaticLayer, "crop"):
        pytest.skip("transformers 5.17 cannot crop a static cache")
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator, b_std=0.1)
    first = inputs(processor, QUESTIONS[:1], generator)
    length = first["input_ids"].shape[1]
    turn = processor(text=[f"black USER: {QUESTIONS[3]} ASSISTANT:"], return_tensors="pt")["input_ids"]
    whole = torch.cat([first["input_ids"], turn], 1)
    options = {"max_new_tokens": 3, "suppress_tokens": [llava.config.image_token_id]}
    config, token = llava.config.get_text_config(), torch.tensor([[9]])

    def ask(cache: Any) -> None:
        if way == "generate":
            llava.generate(input_ids=whole, attention_mask=torch.ones_like(whole), **cached(cache), **options)
        else:
            last_logits(llava, {"input_ids": turn}, **cached(cache))

    def step(cache: Any) -> Tensor:
        return last_logits(llava, {"input_ids": token}, **cached(cache))

    found = []
    for takes_back in (None, length, length - 1, length + 2, length - 2):
        cache = StaticCache(config=config, max_cache_len=80) if static else DynamicCache(config=config)
        prompt = last_logits(llava, first, **cached(cache))
        if takes_back is not None:
            ask(cache)
            cache.crop(takes_back - int(cache.get_seq_length()))
        if takes_back == length - 1:
            again = last_logits(llava, {"input_ids": first["input_ids"][:, -1:]}, **cached(cache))
            torch.testing.assert_close(again, prompt, atol=2e-5, rtol=1e-4)
        if takes_back in (length + 2, length - 2):  # a part of the second prompt, and of the first
            with pytest.raises(ValueError, match="its instruction is unknown"):
                step(cache)
            last_logits(llava, {"input_ids": turn}, **cached(cache))  # a new turn is known
            step(cache)
        else:
            found.append(step(cache))
    torch.testing.assert_close(found[1], found[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[2], found[0], atol=2e-5, rtol=1e-4)


def test_an_image_that_was_taken_back_counts_no_more(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, cf.IncrementConfig(a_std=0.1, surrogate="text+image"), processor=processor)
    increments = learn(llava, 2, generator, b_std=0.1)
    asked: list[Tensor] = []
    pick = increments.select_by_query
    increments.select_by_query = lambda query: asked.append(query) or pick(query)  # type: ignore[method-assign]
    first = inputs(processor, QUESTIONS[:1], generator)
    seen = inputs(processor, QUESTIONS[1:2], generator)
    shown = {name: seen[name] for name in ("input_ids", "pixel_values")}
    text = dict(processor(text=[f"USER: {QUESTIONS[2]} ASSISTANT:"], return_tensors="pt"))
    length = first["input_ids"].shape[1]
    cache = DynamicCache(config=llava.config.get_text_config())
    last_logits(llava, first, **cached(cache))
    last_logits(llava, {"input_ids": text["input_ids"]}, **cached(cache))
    wanted = asked[-1]
    for turn, left in ((shown, 0), (text, 0), (text, 3), (shown, 3)):
        cache = DynamicCache(config=llava.config.get_text_config())
        last_logits(llava, first, **cached(cache))
        last_logits(llava, {"input_ids": turn["input_ids"], "pixel_values": turn.get("pixel_values")}, **cached(cache))
        cache.crop(length + left - cache.get_seq_length())
        if left and turn is shown:
            with pytest.raises(ValueError, match="which images lie in the cache is not known"):
                llava(input_ids=text["input_ids"], **cached(cache))
        else:
            last_logits(llava, {"input_ids": text["input_ids"]}, **cached(cache))
            assert torch.equal(asked[-1], wanted)


def test_an_image_before_what_was_said_counts_behind_a_crop(
    llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, cf.IncrementConfig(a_std=0.1, surrogate="text+image"), processor=processor)
    increments = learn(llava, 2, generator, b_std=0.1)
    asked: list[Tensor] = []
    pick = increments.select_by_query
    increments.select_by_query = lambda query: asked.append(query) or pick(query)  # type: ignore[method-assign]
    first, second = (inputs(processor, [question], generator) for question in QUESTIONS[:2])
    text = processor(text=[f"USER: {QUESTIONS[2]} ASSISTANT:"], return_tensors="pt")["input_ids"]
    for says in (False, True):
        cache = DynamicCache(config=llava.config.get_text_config())
        last_logits(llava, first, **cached(cache))
        last_logits(llava, {name: second[name] for name in ("input_ids", "pixel_values")}, **cached(cache))
        if says:
            last_logits(llava, {"input_ids": torch.tensor([[9]])}, **cached(cache), instructions=[QUESTIONS[3]])
            cache.crop(-1)
        last_logits(llava, {"input_ids": text}, **cached(cache))
    assert torch.equal(asked[-1], asked[2])


def test_what_was_said_holds_for_any_part_of_it(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """A draft is cut off, and where nothing of what it was said with is left, what stood before may be edited."""
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator, b_std=0.1)
    batch = inputs(processor, QUESTIONS[:2], generator)
    draft, said = {"input_ids": torch.full((2, 4), 9)}, list(QUESTIONS[3:5])
    wanted = selected(llava, batch, instructions=said)
    cache = DynamicCache(config=llava.config.get_text_config())
    last_logits(llava, batch, **cached(cache))
    last_logits(llava, draft, **cached(cache), instructions=said)
    cache.crop(-3)
    assert torch.equal(selected(llava, draft, **cached(cache)), wanted)
    cache.crop(-5)
    with pytest.raises(ValueError, match="its instruction is unknown"):
        llava(**draft, **cached(cache))


def test_images_before_a_turn_of_several_answers_are_known_without_its_end(
    llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, cf.IncrementConfig(a_std=0.1, surrogate="text+image"), processor=processor)
    learn(llava, 2, generator, b_std=0.1)
    first = inputs(processor, QUESTIONS[:2], generator)
    turn = processor(text=[f"USER: {QUESTIONS[2]} ASSISTANT:"] * 2, return_tensors="pt")["input_ids"]
    whole = torch.cat([first["input_ids"], turn], 1)
    mask = torch.cat([first["attention_mask"], torch.ones_like(turn)], 1)
    options = {"max_new_tokens": 1, "do_sample": True, "suppress_tokens": [llava.config.image_token_id]}
    cache = DynamicCache(config=llava.config.get_text_config())
    last_logits(llava, first, **cached(cache))
    wanted = selected(llava, {"input_ids": turn}, **cached(cache))
    cache.crop(-turn.shape[1])
    cache.batch_repeat_interleave(2)
    llava.generate(input_ids=whole, attention_mask=mask, **cached(cache), **options, num_return_sequences=2)
    cache.crop(whole.shape[1] - 4 - cache.get_seq_length())
    found = selected(llava, {"input_ids": turn.repeat_interleave(2, 0)}, **cached(cache))
    assert torch.equal(found, wanted.repeat_interleave(2, 0))


@pytest.mark.parametrize("surrogate", ["sentence", "text+image"])
def test_what_is_said_at_every_step_is_kept_once(
    surrogate: str, llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, cf.IncrementConfig(a_std=0.1, surrogate=surrogate), processor=processor)
    learn(llava, 2, generator, b_std=0.1)
    batch, step = inputs(processor, QUESTIONS[:2], generator), {"input_ids": torch.full((2, 1), 9)}
    cache = DynamicCache(config=llava.config.get_text_config())
    last_logits(llava, batch, **cached(cache))
    length, turns = cache.get_seq_length(), list[int]()
    for _ in range(4):
        last_logits(llava, step, **cached(cache), instructions=list(QUESTIONS[:2]))
        cache.reorder_cache(torch.tensor([1, 0]))
        turns.append(len(getattr(cache, caches.FILLED).turns))
    assert turns[1:] == turns[:1] * 3
    cache.crop(length + 2 - cache.get_seq_length())
    with pytest.raises(ValueError, match="its instruction is unknown"):
        llava(**step, **cached(cache))
    wanted = selected(llava, step, **cached(cache), instructions=list(QUESTIONS[:2]))
    assert torch.equal(selected(llava, step, **cached(cache)), wanted)


def test_more_samples_than_the_cache_was_asked_with_are_no_new_turn(
    llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator, b_std=0.1)
    batch = inputs(processor, QUESTIONS[:2], generator)
    step = {"input_ids": torch.full((4, 3), 9)}
    cache = DynamicCache(config=llava.config.get_text_config())
    options = {"max_new_tokens": 2, "do_sample": True, "suppress_tokens": [llava.config.image_token_id]}
    llava.generate(**batch, **cached(cache), **options, num_return_sequences=2)
    wanted = selected(llava, step, **cached(cache))
    cache.crop(-2)
    assert torch.equal(selected(llava, step, **cached(cache)), wanted)


@pytest.mark.parametrize("move", ["crop", "batch_select_indices"])
def test_a_shallow_copy_of_a_cache_moves_its_own_samples(
    move: str, llava: Any, processor: Any, generator: torch.Generator
) -> None:
    """Layers join new keys to the old ones, which a copy of the layers alone may share."""
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator, b_std=0.1)
    batch, step = inputs(processor, QUESTIONS[:2], generator), {"input_ids": torch.full((2, 1), 9)}
    cache, other = (DynamicCache(config=llava.config.get_text_config()) for _ in range(2))
    for filled in (cache, other):
        last_logits(llava, batch, **cached(filled))
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    shape = list(cache.layers[0].keys.shape)
    getattr(copied, move)(-3 if move == "crop" else torch.tensor([1]))
    shape[2 if move == "crop" else 0] -= 3 if move == "crop" else 1
    assert [list(layer.keys.shape) for layer in copied.layers] == [shape] * len(copied.layers)
    assert torch.equal(last_logits(llava, step, **cached(cache)), last_logits(llava, step, **cached(other)))
    del cache
    copied.reset()
    # transformers 5.17 keeps zeros
    assert not copied.get_seq_length() or not any(layer.keys.any() for layer in copied.layers)


def test_a_cache_that_was_emptied_stands_for_nothing(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, 2, generator, b_std=0.1)
    batch = inputs(processor, QUESTIONS, generator)
    cache = StaticCache(config=llava.config.get_text_config(), max_cache_len=batch["input_ids"].shape[1])
    with torch.no_grad():
        llava(**batch, **cached(cache))
        assert caches.remembered(cache, increments) is not None
        cache.reset()
        assert caches.remembered(cache, increments) is None
        with pytest.raises(ValueError, match="no instruction found"):
            llava(input_ids=torch.full((len(QUESTIONS), 1), 9), **cached(cache))
        cache = returned(llava(**batch))
        cache.crop(-cache.get_seq_length())
        with pytest.raises(ValueError, match="no instruction found"):
            llava(input_ids=torch.full((len(QUESTIONS), 1), 9), **cached(cache))
        cache = returned(llava(**batch))
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        with pytest.raises(ValueError, match="no instruction found"):
            llava(input_ids=torch.full((len(QUESTIONS), 1), 9), **cached(cache))
        with pytest.raises(ValueError, match="no instruction: input_ids is None"):
            llava(inputs_embeds=torch.ones(len(QUESTIONS), 2, 1), **cached(cache))
