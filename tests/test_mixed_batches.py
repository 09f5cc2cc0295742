"""Batches whose samples have no image, one, and several of other sizes: each is answered as it is alone."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from cllava_fast.model.instructions import message
from tests.helpers import QUESTIONS
from tests.test_bases import of_image_bases, patched, pictures, processor_of, with_dense_offsets


def encoded(name: str, samples: list[tuple[str, list[Image.Image]]], side: str) -> dict[str, Any]:
    processor = processor_of(name)
    texts = [
        processor.apply_chat_template(
            [message(processor, "user", question, images=len(own))], add_generation_prompt=True, tokenize=False
        )
        for question, own in samples
    ]
    images = [image for _, own in samples for image in own]
    given = {"images": images} if images else {}
    return dict(processor(text=texts, **given, return_tensors="pt", padding=True, padding_side=side))


@of_image_bases
def test_samples_with_and_without_images_share_a_batch(name: str, generator: torch.Generator) -> None:
    one, two, three = pictures(generator)
    samples = list(zip(QUESTIONS, ([one], [], [two, three]), strict=False))
    model, options = patched(name, generator), {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
    together = model.generate(**encoded(name, samples, "left"), **options)[:, -4:]
    for side in ("left", "right"):
        batch = encoded(name, samples, side)
        with torch.no_grad():
            found = model(**batch).logits
        for i, sample in enumerate(samples):
            alone, dense = encoded(name, [sample], side), with_dense_offsets(model, i)
            with torch.no_grad():
                expected = dense(**alone).logits[0]
            torch.testing.assert_close(found[i, batch["attention_mask"][i].bool()], expected, atol=2e-4, rtol=1e-3)
            assert torch.equal(dense.generate(**alone, **options)[0, -4:], together[i])
