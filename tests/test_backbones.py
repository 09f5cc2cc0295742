"""LLaVAs on language models and vision towers that their class allows and the patch cannot serve: refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import cllava_fast as cf
from cllava_fast.data.encode import Encoder
from cllava_fast.methods.diki import DikiConfig
from cllava_fast.model import paths
from tests.base_models import FOR_IMAGES, new_model
from tests.helpers import learn
from tests.test_bases import ASKED, batch_of, logits, model_of, pictures, processor_of, with_dense_offsets

NAME = "Llava" + FOR_IMAGES
CONFIG = cf.IncrementConfig(a_std=0.1, surrogate="backbone")


@pytest.mark.parametrize("language", ["StableLm", "Nemotron"])
def test_layers_that_hand_nothing_on_are_not_left_without_increments(
    language: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused at once, and those that nobody knows at the first call with a selection. Merged, where nothing need be
    handed on, the same increments are dense offsets."""
    batch, model = batch_of(NAME, generator), new_model(NAME, processor_of(NAME), language)
    with pytest.raises(TypeError, match=f"language model is a {language}Model, .*; expected Llama-like layers"):
        cf.patch(model, CONFIG, processor=processor_of(NAME))
    assert not hasattr(model, "increments")
    monkeypatch.setattr(paths, "HAND_NOTHING_ON", ())
    cf.patch(model, CONFIG, processor=processor_of(NAME))
    logits(model, batch)
    learn(model, 2, generator, b_std=0.1)
    for call in (model, model.generate):
        with pytest.raises(TypeError, match=f"a {language}Attention is not handed its layer's keyword arguments"):
            call(**batch)
    dense = with_dense_offsets(model, 0)
    cf.merge(model, instruction=ASKED[0])
    torch.testing.assert_close(logits(model, batch), logits(dense, batch), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("language", ["OPT", "Mpt", "Bloom", "GPT2", "GPTNeoX"])
def test_a_language_model_that_is_not_llama_like(language: str) -> None:
    model = new_model(NAME, processor_of(NAME), language)
    for refused in (lambda: cf.patch(model, CONFIG), lambda: paths.adapted_linears(model, CONFIG.targets)):
        with pytest.raises(TypeError, match=f"language layers are .*{language}.*; expected Llama-like layers"):
            refused()
    assert not hasattr(model, "increments")


def test_queries_whose_heads_stand_before_tokens_are_not_read(generator: torch.Generator) -> None:
    """As where Gemma 3 norms them; DIKI attends with them."""
    batch, model = batch_of(NAME, generator), new_model(NAME, processor_of(NAME), "Gemma3Text")
    cf.patch(model, DikiConfig(), processor=processor_of(NAME))
    learn(model, 1, generator)
    heads, tokens = model.config.text_config.num_attention_heads, batch["input_ids"].shape[1]
    with pytest.raises(TypeError, match=rf"queries are \[3, {heads}, {tokens}, 16\] beside x \[3, {tokens}, 64\]"):
        model(**batch)


def test_a_class_without_a_row_is_told_how_to_get_one(generator: torch.Generator, monkeypatch: Any) -> None:
    name = "GemmaForCausalLM"
    tokenizer = processor_of(name)
    model, ids = new_model(name, tokenizer), tokenizer(f"USER: {ASKED[0]} ASSISTANT:", return_tensors="pt")["input_ids"]
    with pytest.raises(TypeError, match="another class with Llama-like layers is one row of cllava_fast.model.paths.B"):
        cf.patch(model, CONFIG, processor=tokenizer)
    monkeypatch.setitem(paths.BASES, name, paths.Base("model.layers"))
    cf.patch(model, CONFIG, processor=tokenizer)
    before = logits(model, {"input_ids": ids})
    learn(model, 1, generator, b_std=0.1)
    assert not torch.equal(logits(model, {"input_ids": ids}), before)


def test_a_tower_that_packs_images_into_one_sequence() -> None:
    text = model_of(NAME).config.text_config
    vision = transformers.PixtralVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))
    with pytest.raises(TypeError, match="vision tower is a PixtralVisionModel, .*; expected one of CLIP's kind"):
        cf.patch(model, CONFIG, processor=processor_of(NAME))


def test_other_tokens_within_an_image(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Pixtral's processor writes between the rows of patches, and at their end."""
    processor = processor_of(NAME)
    image, sample = processor.image_token, cf.Sample(ASKED[0], "red", pictures(generator)[0])

    def in_rows(self: Any, images: Any, text: str) -> dict[str, Any]:
        return dict(processor.tokenizer(text.replace(image, f"{image * 2} bar {image * 2} digit")))

    assert Encoder(processor).encode_one(sample)
    monkeypatch.setattr(type(processor), "__call__", in_rows)
    with pytest.raises(ValueError, match=r"writes \['bar', 'digit'\] beside an image's tokens"):
        Encoder(processor).encode_one(sample)
