"""From samples to batches: prompts by the processor's chat template, labels on the answer alone, images once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from cllava_fast.data.stream import ImageSource, Sample
from cllava_fast.model import paths
from cllava_fast.model.answers import IGNORE
from cllava_fast.model.instructions import message
from cllava_fast.model.patching import pooled_image, to_vision_tower


@dataclass(frozen=True, eq=False)
class Example:
    """An encoded sample: what training and evaluation need, without the image's pixels."""

    sample: Sample
    prompt_ids: list[int]
    answer_ids: list[int]  # with the end-of-sequence token
    instruction: str


class Encoder:
    """Encodes samples for one processor.

    The prompt is the chat template with the generation prompt, exactly what generation sees; the answer's ids follow
    it. So what is learned is what is asked later, token by token.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        image_token = getattr(processor, "image_token", None)
        # a tokenizer alone, of a model without images, has none; -1 is no token's id
        self._image_token_id: int = -1 if image_token is None else self.tokenizer.convert_tokens_to_ids(image_token)
        self._image_tokens: dict[tuple[int, int], int] = {}
        if self.tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no eos_token; answers could not end")

    def encode(self, samples: Iterable[Sample]) -> list[Example]:
        return [self._encode(sample) for sample in samples]

    def _encode(self, sample: Sample) -> Example:
        turn = message(self.processor, "user", sample.instruction, images=int(sample.image is not None))
        prompt = self.processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        ids: list[int] = []
        # a template that writes its own beginning-of-sequence token must not get a second one
        bos = self.tokenizer.bos_token
        encoded = self.tokenizer(prompt, add_special_tokens=not (bos and prompt.startswith(bos)))["input_ids"]
        for token in encoded:
            ids += [token] * (self._tokens_of(sample) if token == self._image_token_id else 1)
        answer = self.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        return Example(sample, ids, [*answer, self.tokenizer.eos_token_id], sample.instruction)

    def _tokens_of(self, sample: Sample) -> int:
        """Image tokens that the processor makes of an image; they depend on its size alone."""
        size = image_size(sample.image)
        if size not in self._image_tokens:
            encoded = self.processor(text=self.processor.image_token, images=Image.new("RGB", size))
            ids = torch.as_tensor(encoded["input_ids"])
            self._image_tokens[size] = int((ids == self._image_token_id).sum())
        return self._image_tokens[size]

    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """All that the image processor says: ``pixel_values [n, 3, H, W]``, or in patches, beside ``image_sizes``."""
        return dict(self.processor.image_processor(list(images), return_tensors="pt"))


def image_size(image: ImageSource | None) -> tuple[int, int]:
    if image is None:
        raise ValueError("the chat template writes an image token for a sample without an image")
    if isinstance(image, Image.Image):
        return image.size
    with Image.open(image) as opened:
        return opened.size


@dataclass
class ImageFeatures:
    """What the frozen vision tower makes of each image, computed once for all epochs, tasks and methods.

    Args:
        limit: bytes of projected features to keep; beyond that, images are opened again for every batch. Pooled
            features ``[d]``, for surrogates that look at images, are always kept.
    """

    limit: int = 2 << 30
    _projected: dict[Any, Tensor] = field(default_factory=dict)
    _pooled: dict[Any, Tensor] = field(default_factory=dict)
    _alive: list[Any] = field(default_factory=list)  # a PIL image is known by its id, which must not be used again
    _bytes: int = 0

    @staticmethod
    def key(image: Any) -> Any:
        return id(image) if isinstance(image, Image.Image) else str(image)

    @torch.no_grad()
    def add(self, samples: Iterable[Sample], encoder: Encoder, model: Any, batch_size: int = 64) -> None:
        """Computes what is missing for the samples' images."""
        new = {self.key(s.image): s for s in samples if s.image is not None}
        new = {key: sample for key, sample in new.items() if key not in self._pooled}
        keys = list(new)
        if keys and paths.vision_tower(model) is None:
            raise ValueError(f"a sample has the image {keys[0]}, but a {type(model).__name__} takes no images")
        for start in range(0, len(keys), batch_size):
            part = keys[start : start + batch_size]
            images = [new[key].open_image() for key in part]
            given = encoder.images([image for image in images if image is not None])
            pixels, features = given["pixel_values"], list[Tensor | None]([None] * len(part))
            if paths.base_of(model).takes_features and len(given) == 1:
                output = model.get_image_features(to_vision_tower(model, pixels), return_dict=True)
                pooled, features = output.last_hidden_state.mean(1), output.pooler_output
            else:
                pooled = pooled_image(model, pixels)
            for key, projected, mean in zip(part, features, pooled.float().cpu(), strict=True):
                self._pooled[key] = mean.clone()
                self._alive.append(new[key].image)
                if projected is not None and self._bytes + projected.nbytes <= self.limit:
                    self._projected[key] = projected.cpu().clone()
                    self._bytes += projected.nbytes

    def projected(self, images: Sequence[Any]) -> Tensor | None:
        """``[n, tokens, d]``, or None if one of the images was not kept."""
        rows = [self._projected.get(self.key(image)) for image in images]
        kept = [row for row in rows if row is not None]
        return torch.stack(kept) if kept and len(kept) == len(rows) else None

    def pooled(self, samples: Sequence[Sample], width: int) -> Tensor:
        """``[n, width]``; zeros for samples without an image."""
        rows = [torch.zeros(width) if s.image is None else self._pooled[self.key(s.image)] for s in samples]
        return torch.stack(rows)


class Collator:
    """Batches of examples as keyword arguments of the model. ``training`` adds answers and labels."""

    def __init__(self, encoder: Encoder, features: ImageFeatures | None, training: bool) -> None:
        self.encoder = encoder
        self.features = features
        self.training = training

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        rows = [e.prompt_ids + e.answer_ids if self.training else e.prompt_ids for e in examples]
        pad = self.encoder.tokenizer.pad_token_id
        width = max(len(row) for row in rows)
        input_ids = torch.full((len(rows), width), 0 if pad is None else pad)  # [B, S]
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, IGNORE)
        for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
            # generation continues at the right edge
            where = slice(0, len(row)) if self.training else slice(width - len(row), width)
            input_ids[i, where] = torch.tensor(row)
            attention_mask[i, where] = 1
            labels[i, len(example.prompt_ids) : len(row)] = input_ids[i, len(example.prompt_ids) : len(row)]
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.training:
            batch["labels"] = labels
        return {**batch, **self._images([e.sample for e in examples])}

    def _images(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        images = [sample.image for sample in samples if sample.image is not None]
        if not images:
            return {}
        projected = self.features.projected(images) if self.features else None
        if projected is not None:
            return {"image_features": projected}
        opened = [sample.open_image() for sample in samples]
        return self.encoder.images([image for image in opened if image is not None])
