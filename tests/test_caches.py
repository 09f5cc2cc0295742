"""A cache that a patched model filled: whose rows act on what comes behind it."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import cllava_fast as cf
from cllava_fast.model.caches import returned
from tests.helpers import CACHE_NAMES, QUESTIONS, cached, inputs, last_logits, learn, prompt, selected
from tests.helpers import image as picture
from tests.test_calls import CONFIG


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_cached_decoding_by_hand_keeps_the_prompts_selection(
    name: str, llava: Any, processor: Any, generator: torch.Generator
) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator, b_std=0.1)
    batch = inputs(processor, QUESTIONS, generator)
    with torch.no_grad():
        prefill = llava(**batch, use_cache=True)
        token = torch.full((len(QUESTIONS), 1), 9)  # a word: what the model would say may be the start of a turn
        mask = torch.cat([batch["attention_mask"], torch.ones_like(token)], 1)
        step = llava(input_ids=token, attention_mask=mask, **{name: returned(prefill)})
        full = {**batch, "input_ids": torch.cat([batch["input_ids"], token], 1), "attention_mask": mask}
        whole = llava(**full)
        # the same by hidden states, which a head of one's own may read
        hidden = llava.model(**batch, use_cache=True)
        hidden = llava.model(input_ids=token, attention_mask=mask, **{name: returned(hidden)})
    torch.testing.assert_close(step.logits[:, -1], whole.logits[:, -1], atol=2e-4, rtol=1e-4)
    assert torch.equal(llava.lm_head(hidden.last_hidden_state), step.logits)


def test_a_prompt_that_comes_in_parts_by_hand(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """Rows by half of a question come with a warning; with the whole of it, or from generate, they are right."""
    batch = inputs(processor, QUESTIONS[:2], generator)
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    chunked = llava.generate(**batch, prefill_chunk_size=5, **options).logits[0]
    reads_images = torch.allclose(chunked, last_logits(llava, batch), atol=1e-3)  # transformers 5.17 does not
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator, b_std=0.1)
    wanted = last_logits(llava, batch)
    at = batch["input_ids"].shape[1] - 4
    first = {**batch, "input_ids": batch["input_ids"][:, :at], "attention_mask": batch["attention_mask"][:, :at]}
    second = {**batch, "input_ids": batch["input_ids"][:, at:]}
    del second["pixel_values"]

    def parts(**asked: Any) -> Tensor:
        cache = DynamicCache(config=llava.config.get_text_config())
        last_logits(llava, first, **cached(cache), **asked)
        positions = batch["attention_mask"].cumsum(1)[:, at:] - 1
        return last_logits(llava, second, **cached(cache), position_ids=positions)

    def shown(**asked: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(parts(**asked))
        return [f"{warning.filename} {warning.message}" for warning in caught]

    found: list[Tensor] = []
    half = shown()
    assert len(half) == 1 and "helpers.py" in half[0] and "input_ids end within a user turn, at '" in half[0]
    assert not shown(instructions=list(QUESTIONS[:2]))
    torch.testing.assert_close(found[1], wanted, atol=2e-4, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        last_logits(llava, batch, use_cache=True)  # a whole prompt
        last_logits(llava, first)  # no cache was asked for
        chunked = llava.generate(**batch, prefill_chunk_size=5, **options).logits[0]
    if reads_images:
        torch.testing.assert_close(chunked, wanted, atol=2e-4, rtol=1e-4)


def test_a_picture_that_is_computed_once(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """Alone in a cache it has no question; its features have the rows of whichever question comes with them."""
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator, b_std=0.1)
    batch = inputs(processor, QUESTIONS[:1], generator)
    end = int((batch["input_ids"][0] == llava.config.image_token_id).nonzero().max()) + 1
    prefix = {"input_ids": batch["input_ids"][:, :end], "pixel_values": batch["pixel_values"]}
    cache = DynamicCache(config=llava.config.get_text_config())
    with pytest.raises(ValueError, match="the last user turn of sample 0 is empty"):
        llava(**prefix, **cached(cache))
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        features = torch.stack(list(llava.get_image_features(batch["pixel_values"]).pooler_output))
        llava(**prefix, **cached(cache), instructions=[QUESTIONS[0]])
    for question in QUESTIONS[:3]:
        text = {"text": [prompt(processor, question)], "images": [picture(generator)], "return_tensors": "pt"}
        asked = processor(**text)
        texts = {name: asked[name] for name in ("input_ids", "attention_mask")}
        wanted = last_logits(llava, {**texts, "pixel_values": batch["pixel_values"]})
        found = llava.generate(**texts, image_features=features, **options).logits[0]
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-4)
        kept = llava.generate(**texts, **cached(copy.deepcopy(cache)), **options).logits[0]
        assert torch.allclose(kept, wanted, atol=2e-4, rtol=1e-4) == (question == QUESTIONS[0])


def test_a_merge_between_two_steps_by_hand(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """Steps behind it have what is merged, and behind cf.unmerge again what the cache was filled with."""
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator, b_std=0.1)
    batch, step = inputs(processor, QUESTIONS[:2], generator), {"input_ids": torch.full((2, 1), 9)}
    filled = [DynamicCache(config=llava.config.get_text_config()) for _ in range(3)]
    for cache in filled:
        last_logits(llava, batch, **cached(cache))
    own = last_logits(llava, step, **cached(filled[0]))
    said = last_logits(llava, step, **cached(filled[1]), instructions=[QUESTIONS[4]] * 2)
    cf.merge(llava, instruction=QUESTIONS[4])
    merged = last_logits(llava, step, **cached(filled[2]))
    torch.testing.assert_close(merged, said, atol=2e-4, rtol=1e-4)
    assert (merged - own).abs().max() > 1e-2
    cf.unmerge(llava)
    filled[2].crop(-1)
    torch.testing.assert_close(last_logits(llava, step, **cached(filled[2])), own, atol=2e-4, rtol=1e-4)


def test_a_cache_goes_when_it_is_let_go(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 1, generator)
    batch = inputs(processor, QUESTIONS[:2], generator)
    with torch.no_grad():
        cache = returned(llava(**batch, use_cache=True))
    keys = cache.layers[0].keys
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), copy.copy(cache)]
    for copied in copies:
        with pytest.raises(ValueError, match="its instruction is unknown"):
            llava(input_ids=torch.full((2, 1), 9), **cached(copied))
    del copies[2]  # whose layers are those of the cache
    for copied in copies:
        copied.reorder_cache(torch.tensor([1, 0]))
        assert torch.equal(copied.layers[0].keys, keys.flip(0)) and torch.equal(cache.layers[0].keys, keys)
    gone = [weakref.ref(each) for each in (cache, *copies)]
    gc.disable()  # the memory of a GPU cannot wait for it
    try:
        del cache, copies, copied
        assert [each() for each in gone] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("drafts", ["the prompt's own words", "another model"])
def test_speculative_decoding_says_what_greedy_does(
    drafts: str, new_llava: Callable[[], Any], processor: Any, generator: torch.Generator
) -> None:
    """Drafted tokens come several at a time, and those that are wrong are cut off the cache."""
    llava = new_llava()
    batch = inputs(processor, QUESTIONS[:1], generator)
    options = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": [llava.config.image_token_id]}
    frozen = llava.generate(**batch, **options)
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator, b_std=1.0)
    wanted = llava.generate(**batch, **options)
    assert not torch.equal(wanted, frozen)
    by = {"assistant_model": new_llava()} if drafts == "another model" else {"prompt_lookup_num_tokens": 3}
    assert torch.equal(llava.generate(**batch, **options, **by), wanted)


def test_beams_of_a_cache_that_was_filled_before(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 3, generator, b_std=0.1)
    batch = inputs(processor, QUESTIONS[:2], generator)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
    options["suppress_tokens"] = [llava.config.image_token_id]  # random weights may say it
    wanted = llava.generate(**batch, **options)
    part = {**batch, "input_ids": batch["input_ids"][:, :-2], "attention_mask": batch["attention_mask"][:, :-2]}
    with torch.no_grad():
        cache = returned(llava(**part, use_cache=True, instructions=list(QUESTIONS[:2])))
    cache.batch_repeat_interleave(3)
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(llava.generate(**texts, **cached(cache), **options), wanted)


def test_a_foreign_cache_needs_instructions(llava: Any, processor: Any, generator: torch.Generator) -> None:
    batch = inputs(processor, QUESTIONS[:2], generator)
    with torch.no_grad():
        cache = returned(llava(**batch, use_cache=True))
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 1, generator)
    token = torch.full((2, 1), 9)
    with pytest.raises(ValueError, match="its instruction is unknown"):
        llava(input_ids=token, **cached(cache))
    llava(input_ids=token, **cached(cache), instructions=list(QUESTIONS[:2]))


def test_a_cache_outlives_a_commit_and_no_other_rows(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """Rows are counted from the first task on: one more leaves their numbers, other increments do not."""
    cf.patch(llava, CONFIG, processor=processor)
    increments = learn(llava, 2, generator, b_std=0.1)
    state, names = increments.pool.state(), list(increments.pool.task_names)
    batch, token = inputs(processor, QUESTIONS[:2], generator), torch.full((2, 1), 9)

    def cache() -> Any:
        with torch.no_grad():
            return returned(llava(**batch, use_cache=True))

    filled = [cache() for _ in range(4)]
    wanted = last_logits(llava, {"input_ids": token}, **cached(filled[0]))
    learn(llava, 2, generator, b_std=0.1)
    assert torch.equal(last_logits(llava, {"input_ids": token}, **cached(filled[1])), wanted)
    increments.pool.load_state(state, names)
    with pytest.raises(ValueError, match="its instruction is unknown"):
        llava(input_ids=token, **cached(filled[2]))
    with cf.scale_layers(llava, alpha=0.5, beta=0.5):
        filled.append(cache())
    for scaled_since in filled[3:]:
        with pytest.raises(ValueError, match="its instruction is unknown"):
            llava(input_ids=token, **cached(scaled_since))
    assert torch.equal(last_logits(llava, {"input_ids": token}, **cached(cache())), wanted)


def test_a_new_turn_on_an_old_cache_asks_anew(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator)
    first = processor(text=[f"USER: {QUESTIONS[0]} ASSISTANT:"], return_tensors="pt")
    second = processor(text=[f"USER: {QUESTIONS[3]} ASSISTANT:"], return_tensors="pt")
    wanted = selected(llava, dict(second))
    assert not torch.equal(selected(llava, dict(first)), wanted)
    with torch.no_grad():
        cache = returned(llava(**first, use_cache=True))
    rows = selected(llava, {"input_ids": second["input_ids"]}, **cached(cache))
    assert torch.equal(rows, wanted)
    # and the next token goes on with the new turn
    assert torch.equal(selected(llava, {"input_ids": torch.tensor([[9]])}, **cached(cache)), wanted)


def test_a_cache_that_generate_was_handed_is_known(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """Though what comes out are tokens alone."""
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator)
    cache = DynamicCache(config=llava.config.get_text_config())
    batch = processor(text=[f"USER: {QUESTIONS[0]} ASSISTANT:"], return_tensors="pt")
    ids = llava.generate(**batch, **cached(cache), max_new_tokens=2, do_sample=False)
    rows = selected(llava, {"input_ids": ids[:, -1:]}, **cached(cache))
    assert torch.equal(rows, selected(llava, dict(batch)))


def test_later_turns_are_asked_about_earlier_images(llava: Any, processor: Any, generator: torch.Generator) -> None:
    """As without a cache, by hand and by generate, wherever samples are moved; or an error where none are known."""
    cf.patch(llava, cf.IncrementConfig(a_std=0.1, surrogate="text+image"), processor=processor)
    increments = learn(llava, 2, generator, b_std=0.1)
    asked: list[Tensor] = []
    pick = increments.select_by_query

    def spy(query: Tensor) -> Any:
        asked.append(query)
        return pick(query)

    increments.select_by_query = spy  # type: ignore[method-assign]
    first = inputs(processor, QUESTIONS[:2], generator)
    later = [  # about the same images; about a second image; about both
        dict(processor(text=[f"USER: {image} {QUESTIONS[q]} ASSISTANT:"] * 2, **images, return_tensors="pt"))
        for q, image, images in (
            (2, "", {}),
            (3, "<image>", {"images": [picture(generator) for _ in range(2)]}),
            (4, "", {}),
        )  # fmt: skip
    ]
    mask = [first["attention_mask"], *(torch.ones_like(turn["input_ids"]) for turn in later)]
    ids = [first["input_ids"], *(turn["input_ids"] for turn in later)]
    pixels = [first["pixel_values"], later[1]["pixel_values"]]

    def whole(turn: int, samples: list[int]) -> dict[str, Tensor]:
        """The conversation up to ``turn``."""
        texts = {"input_ids": torch.cat(ids[: turn + 1], 1), "attention_mask": torch.cat(mask[: turn + 1], 1)}
        return {name: tensor[samples] for name, tensor in texts.items()}

    both = [torch.stack([pixels[0][i], pixels[1][i]]) for i in range(2)]
    for turn in (1, 2, 3):
        seen = {"pixel_values": pixels[0] if turn < 2 else torch.cat(both)}
        last_logits(llava, {**whole(turn, [0, 1]), **seen})
    wanted = list(asked)
    assert float((wanted[0] - wanted[1])[:, wanted[0].shape[1] // 2 :].abs().amax(1).min()) > 1e-3, "images must matter"

    def same(found: Tensor, turn: int, samples: list[int]) -> None:
        torch.testing.assert_close(found, wanted[turn - 1][samples], atol=1e-5, rtol=1e-4)

    samples = [0, 1]
    with torch.no_grad():
        cache = returned(llava(**first, use_cache=True))
        for turn in (1, 2, 3):
            cache.batch_select_indices(torch.tensor([1, 0]))
            samples.reverse()
            step = {"input_ids": ids[turn][samples], "attention_mask": whole(turn, samples)["attention_mask"]}
            images = {"pixel_values": pixels[1][samples]} if turn == 2 else {}
            llava(**step, **images, **cached(cache))
            same(asked[-1], turn, samples)
    options = {"max_new_tokens": 1, "suppress_tokens": [llava.config.image_token_id], "return_dict_in_generate": True}
    cache = returned(llava.generate(**first, **options))
    llava.generate(**whole(1, [0, 1]), **cached(cache), **options)
    same(asked[-1], 1, [0, 1])
    cache.batch_repeat_interleave(2)
    llava.generate(**whole(2, [0, 1]), pixel_values=pixels[1], **cached(cache), **options,
                   num_return_sequences=2, do_sample=True)  # fmt: skip
    same(asked[-1], 2, [0, 1])
    step = {"input_ids": ids[1], "attention_mask": whole(1, [0, 1])["attention_mask"]}
    with torch.no_grad():
        copied = copy.deepcopy(returned(llava(**first, use_cache=True)))
        asking = {"instructions": list(QUESTIONS[2:4])}
        for call, given in ((llava, step), (llava.generate, whole(1, [0, 1])), (llava.generate, step)):
            with pytest.raises(ValueError, match="which images lie in the cache is not known"):
                call(**given, **cached(copied), **asking)
        llava(**step, **cached(copied), query=wanted[0])
        cache = returned(llava(**first, use_cache=True))
        llava(input_ids=ids[2][:, 1:17], pixel_values=pixels[1], **cached(cache))  # an image alone asks nothing
        with pytest.raises(ValueError, match="which images lie in the cache is not known"):
            llava(input_ids=ids[1], **cached(cache))
        texts = {name: tensor[:, :1] for name, tensor in whole(0, [0, 1]).items()}
        assert not (texts["input_ids"] == llava.config.image_token_id).any()
        copied = copy.deepcopy(returned(llava(**texts, **asking, use_cache=True)))
        llava.generate(**whole(1, [0, 1]), pixel_values=pixels[0], **cached(copied), **options)
        same(asked[-1], 1, [0, 1])


class Gone(Exception):
    """A client hung up."""


@pytest.mark.parametrize("static", [False, True])
def test_a_turn_that_is_cut_off_is_what_its_cache_holds(
    static: bool, llava: Any, processor: Any, generator: torch.Generator
) -> None:
    """Before anything is in the cache, it goes on with the turn before."""
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator, b_std=0.1)
    config = llava.config.get_text_config()
    cache = StaticCache(config=config, max_cache_len=60) if static else DynamicCache(config=config)
    first, second = (processor(text=[f"USER: {QUESTIONS[i]} ASSISTANT:"], return_tensors="pt") for i in (0, 3))
    wanted = [selected(llava, dict(batch)) for batch in (first, second)]
    assert not torch.equal(*wanted)
    step = {"input_ids": torch.tensor([[9]])}

    def hang_up(*_: Any, **__: Any) -> None:
        raise Gone

    with pytest.raises(Gone):
        llava.generate(**first, **cached(cache), stopping_criteria=[hang_up])
    ids = torch.cat([first["input_ids"], second["input_ids"]], 1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **cached(cache)}
    with pytest.raises(ValueError, match="max_new_tokens"):
        llava.generate(**turn, max_new_tokens=0)
    assert torch.equal(selected(llava, step, **cached(cache)), wanted[0])
    with pytest.raises(Gone):
        llava.generate(**turn, stopping_criteria=[hang_up])
    assert torch.equal(selected(llava, step, **cached(cache)), wanted[1])
    with pytest.raises(ValueError, match="batch_size"):  # by the loss, behind the layers
        llava(input_ids=first["input_ids"], labels=torch.zeros(2, 5, dtype=torch.int64), **cached(cache))
    assert torch.equal(selected(llava, step, **cached(cache)), wanted[0])


def test_a_cache_from_a_tuple_is_known(llava: Any, processor: Any, generator: torch.Generator) -> None:
    cf.patch(llava, CONFIG, processor=processor)
    learn(llava, 2, generator)
    batch = inputs(processor, QUESTIONS[:2], generator)
    wanted = selected(llava, batch)
    with torch.no_grad():
        _, cache, *_ = llava(**batch, use_cache=True, return_dict=False)
    assert torch.equal(selected(llava, {"input_ids": torch.tensor([[9], [10]])}, **cached(cache)), wanted)
