"""LLaVAs on language models and vision towers that their class allows and the patch cannot serve: refused."""

from __future__ import annotations

import pytest
import torch

import cllava_fast as cf
from tests.base_models import FOR_IMAGES, new_model
from tests.helpers import learn
from tests.test_bases import ASKED, batch_of, logits, processor_of, with_dense_offsets

NAME = "Llava" + FOR_IMAGES
CONFIG = cf.IncrementConfig(a_std=0.1, surrogate="backbone")


@pytest.mark.parametrize("language", ["StableLm", "Nemotron"])
def test_layers_that_hand_nothing_on_are_not_left_without_increments(language: str, generator: torch.Generator) -> None:
    """Merged, where nothing need be handed on, the same increments are dense offsets."""
    batch, model = batch_of(NAME, generator), new_model(NAME, processor_of(NAME), language)
    cf.patch(model, CONFIG, processor=processor_of(NAME))
    logits(model, batch)
    learn(model, 2, generator, b_std=0.1)
    for call in (model, model.generate):
        with pytest.raises(TypeError, match=f"a {language}Attention is not handed its layer's keyword arguments"):
            call(**batch)
    dense = with_dense_offsets(model, 0)
    cf.merge(model, instruction=ASKED[0])
    torch.testing.assert_close(logits(model, batch), logits(dense, batch), atol=1e-4, rtol=1e-3)
