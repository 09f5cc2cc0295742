"""From samples to batches: prompts by the processor's chat template, labels on the answer alone, images once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from cllava_fast.data.conversation import SET_TEMPLATE, Conversation, Turns
from cllava_fast.data.lazy import LazySequence
from cllava_fast.data.stream import Sample, check_sample
from cllava_fast.data.workers import made_of
from cllava_fast.model import paths
from cllava_fast.model.answers import IGNORE
from cllava_fast.model.images import pooled_image, to_vision_tower
from cllava_fast.names import brief

TOKEN_TYPES = "mm_token_type_ids"  # what Qwen's models are told by: 1 where an image token stands


@dataclass(frozen=True, eq=False)
class Example:
    """An encoded sample: what training and evaluation need, without the image's pixels."""

    sample: Sample
    prompt_ids: list[int]
    answer_ids: list[int]  # with the end-of-sequence token
    instruction: str
    earlier_answers: tuple[tuple[int, int], ...] = ()  # ranges of prompt_ids that are learned too


class LazyExamples(LazySequence[Example]):
    """Examples of samples that are not in memory, encoded each time they are asked for."""

    def __init__(self, encoder: Encoder, samples: Sequence[Sample], where: str) -> None:
        self.encoder, self.samples, self.where = encoder, samples, where

    def __len__(self) -> int:
        return len(self.samples)

    def at(self, index: int) -> Example:
        return self.encoder.encode_one(self.samples[index], self.where)


class Encoder:
    """Encodes samples for one processor.

    The prompt is the chat template with the generation prompt, exactly what generation sees; the answer's ids follow
    it. So what is learned is what is asked later, token by token. Earlier turns stand in the prompt, as they will.

    Raises:
        ValueError: see ``Conversation``; a tokenizer without an eos_token.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._conversation = Conversation(processor)
        self.tokenizer = self._conversation.tokenizer
        image_token = getattr(processor, "image_token", None)
        # a tokenizer alone, of a model without images, has none; -1 is no token's id
        self.image_token_id: int = -1 if image_token is None else self.tokenizer.convert_tokens_to_ids(image_token)
        self.tells_images = TOKEN_TYPES in getattr(processor, "model_input_names", ())
        self._of_text = {*self.tokenizer.model_input_names, TOKEN_TYPES}
        # runs of equal ids: a data set may have as many sizes as images, of thousands of tokens each
        self._image_ids: dict[tuple[int, int], list[tuple[int, int]]] = {}
        if self.tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no eos_token; answers could not end")

    def encode(self, samples: Iterable[Sample], where: str = "") -> Sequence[Example]:
        """Examples at once of what is in memory, on demand of any other sequence; ``where`` is how errors begin."""
        if isinstance(samples, Sequence) and not isinstance(samples, (list, tuple)):
            return LazyExamples(self, samples, where)
        return [self.encode_one(sample, where) for sample in samples]

    def encode_one(self, sample: Sample, where: str = "") -> Example:
        """Raises ValueError for a chat template that does not write the sample's turns, with the sample."""
        try:
            return self._encode(sample)
        except ValueError as error:
            raise ValueError(f"{where}sample {brief(sample.id or sample.instruction)}: {error}") from error

    def _encode(self, sample: Sample) -> Example:
        turns = Turns(
            users=(*(user for user, _ in sample.history), sample.instruction),
            answers=(*(answer for _, answer in sample.history), sample.answer),
            system=sample.system,
            image=sample.image is not None,
        )
        encoded = self._conversation.encode(turns)
        if turns.image and self.processor is self.tokenizer:
            raise ValueError("it has an image, and a tokenizer alone, as of a model without images, takes none")
        places = sum(token.id == self.image_token_id for token in encoded.prompt)
        if places != turns.image:
            raise ValueError(
                f"the chat template writes {places} image tokens for a sample with {int(turns.image)} image; "
                f"{SET_TEMPLATE}"
            )
        ids: list[int] = []
        starts: list[int] = []  # where each token stands once the image has its many tokens
        for token in encoded.prompt:
            starts.append(len(ids))
            ids += self._ids_of_image(sample) if token.id == self.image_token_id else [token.id]
        starts.append(len(ids))
        earlier = tuple((starts[first], starts[end]) for first, end in encoded.earlier)
        return Example(sample, ids, [*encoded.answer, self.tokenizer.eos_token_id], sample.instruction, earlier)

    def _ids_of_image(self, sample: Sample) -> list[int]:
        """What the processor writes for an image, with its marks around it; it depends on the size alone."""
        size = sample.image_size()
        assert size is not None
        if size not in self._image_ids:
            mark = self.processor.image_token
            added = set(self.tokenizer(mark)["input_ids"]) - {self.image_token_id}  # by itself
            encoded = self.processor(text=mark, images=Image.new("RGB", size))
            ids = [i for i in torch.as_tensor(encoded["input_ids"]).flatten().tolist() if i not in added]
            others = set(ids) - set(self.processor.image_token_ids)
            if others:
                raise ValueError(
                    f"the processor writes {self.tokenizer.convert_ids_to_tokens(sorted(others))} beside an image's "
                    "tokens; expected those of its image_token_ids alone"
                )
            self._image_ids[size] = [(i, len(list(run))) for i, run in groupby(ids)]
        return [i for i, times in self._image_ids[size] for _ in range(times)]

    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """All that the processor says of images: ``pixel_values [n, 3, H, W]``, in views beside ``image_sizes``, in
        tiles (more of them than images), or the patches of all images as one sequence beside ``image_grid_thw``."""
        # some are cut into tiles by the processor's settings alone; one text, which needs no padding
        text = self.processor.image_token * len(images)
        given = self.processor(text=text, images=list(images), return_tensors="pt", text_kwargs={"verbose": False})
        return {name: value for name, value in given.items() if name not in self._of_text}


def samples_of(examples: Sequence[Example]) -> Sequence[Sample]:
    """The samples, without encoding them again where examples are made on demand."""
    return examples.samples if isinstance(examples, LazyExamples) else [example.sample for example in examples]


@dataclass
class ImageFeatures:
    """What the frozen vision tower makes of each image, computed once for all epochs, tasks and methods.

    Args:
        limit: bytes of projected features to keep; beyond that, images are opened again for every batch. Pooled
            features ``[d]``, for surrogates that look at images, are kept for every image where they are wanted.
    """

    limit: int = 2 << 30
    _projected: dict[Any, Tensor] = field(default_factory=dict)
    _pooled: dict[Any, Tensor] = field(default_factory=dict)
    _alive: list[Any] = field(default_factory=list)  # a PIL image is known by its id, which must not be used again
    _bytes: int = 0
    _full: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """For another process, where a PIL image has another id, and its own may be of another image. Rows go as one
        tensor: each tensor is an open file, of which a process is sent 256 at most."""
        state = {**self.__dict__, "_alive": []}
        for name in ("_projected", "_pooled"):
            known = {key: row for key, row in state[name].items() if not isinstance(key, int)}
            rows = torch.stack([*known.values()]) if known else ()
            state[name] = list(known), rows
            getattr(self, name).update(zip(known, rows, strict=True))  # the file stays until it has been sent
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in ("_projected", "_pooled"):
            state[name] = dict(zip(*state[name], strict=True))
        self.__dict__.update(state)

    @staticmethod
    def key(image: Any) -> Any:
        return id(image) if isinstance(image, Image.Image) else str(image)

    def add(
        self, samples: Iterable[Sample], encoder: Encoder, model: Any, batch_size: int = 64, pooled: bool = True,
        workers: int = 0, advance: Callable[[int], None] = lambda samples: None,
    ) -> None:  # fmt: skip
        """Computes what is missing for the samples' images; without ``pooled``, no more than there is room for.

        Args:
            workers: processes that open images while others are computed.
            advance: called with how many more samples are done, after each batch of images.
        """
        if paths.base_of(model).packs_images:
            batch_size = 1  # of thousands of patches each
        batches: deque[tuple[dict[Any, Sample], int]] = deque()  # those that are being opened, and the samples so far
        missing = self._missing(samples, model, batch_size, pooled, batches)
        for opened in made_of(missing, partial(_opened, encoder), workers):
            batch, done = batches.popleft()
            self._compute(batch, opened, model, pooled)
            advance(done)
            if self._full and not pooled:
                return

    def _missing(
        self, samples: Iterable[Sample], model: Any, batch_size: int, pooled: bool, batches: deque[Any]
    ) -> Iterator[list[Sample]]:
        """Samples whose images are to be opened, a batch at a time, which is noted in ``batches``."""
        known, asked = self._pooled if pooled else self._projected, set[Any]()
        batch: dict[Any, Sample] = {}
        done = 0
        for sample in samples:
            done += 1
            key = self.key(sample.image)
            if sample.image is None or key in known or key in asked:
                continue
            if paths.vision_tower(model) is None:
                raise ValueError(f"a sample has the image {sample.image}, but a {type(model).__name__} takes no images")
            self._full |= not paths.base_of(model).takes_features  # then there is nothing to keep
            if self._full and not pooled:
                return
            asked.add(key)
            batch[key] = sample
            if len(batch) == batch_size:
                batches.append((batch, done))
                yield list(batch.values())
                batch, done = {}, 0
        if batch:
            batches.append((batch, done))
            yield list(batch.values())

    @torch.no_grad()
    def _compute(self, batch: dict[Any, Sample], opened: dict[str, Tensor], model: Any, pooled: bool) -> None:
        features = list[Tensor | None]([None] * len(batch))
        if paths.base_of(model).takes_features and len(opened) == 1:
            pixels = to_vision_tower(model, opened["pixel_values"])
            output = model.get_image_features(pixels, return_dict=True)
            means, features = output.last_hidden_state.mean(1), output.pooler_output
        else:
            self._full = True
            if not pooled:
                return
            means = _pooled(opened, model)
        for (key, sample), projected, mean in zip(batch.items(), features, means.float().cpu(), strict=True):
            if isinstance(sample.image, Image.Image):
                self._alive.append(sample.image)
            if pooled:
                self._pooled[key] = mean.clone()
            if projected is None or key in self._projected:
                continue
            if self._bytes + projected.nbytes <= self.limit:
                self._projected[key] = projected.cpu().clone()
                self._bytes += projected.nbytes
            else:
                self._full = True

    def projected(self, images: Sequence[Any]) -> Tensor | None:
        """``[n, tokens, d]``, or None if one of the images was not kept."""
        rows = [self._projected.get(self.key(image)) for image in images]
        kept = [row for row in rows if row is not None]
        return torch.stack(kept) if kept and len(kept) == len(rows) else None

    def pooled(self, samples: Iterable[Sample], width: int) -> Tensor:
        """``[n, width]``; zeros for samples without an image."""
        rows = [torch.zeros(width) if s.image is None else self._pooled[self.key(s.image)] for s in samples]
        return torch.stack(rows)


def _opened(encoder: Encoder, samples: Sequence[Sample]) -> dict[str, Tensor]:
    return encoder.images([image for sample in samples if (image := sample.open_image()) is not None])


def _pooled(opened: dict[str, Tensor], model: Any) -> Tensor:
    """``[images, d]``, as a call to the model pools them."""
    pooled = pooled_image(model, opened["pixel_values"], opened.get("image_grid_thw"))
    # one image; the mean over tiles is taken in float32
    return pooled.float().mean(0, keepdim=True) if paths.base_of(model).packs_images else pooled


class Collator:
    """Batches of examples as keyword arguments of the model. ``training`` adds answers and labels."""

    def __init__(self, encoder: Encoder, features: ImageFeatures | None, training: bool) -> None:
        self.encoder = encoder
        self.features = features
        self.training = training

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        rows = [torch.tensor(e.prompt_ids + e.answer_ids if self.training else e.prompt_ids) for e in examples]
        # generation continues at the right edge
        padded = partial(pad_sequence, batch_first=True, padding_side="right" if self.training else "left")
        batch = {
            "input_ids": padded(rows, padding_value=self.encoder.tokenizer.pad_token_id or 0),  # [B, S]
            "attention_mask": padded([torch.ones_like(row) for row in rows]),
        }
        if self.training:
            labels = [torch.full_like(row, IGNORE) for row in rows]
            for label, row, example in zip(labels, rows, examples, strict=True):
                for start, end in (*example.earlier_answers, (len(example.prompt_ids), len(row))):
                    label[start:end] = row[start:end]
            batch["labels"] = padded(labels, padding_value=IGNORE)
        if self.encoder.tells_images:
            batch[TOKEN_TYPES] = (batch["input_ids"] == self.encoder.image_token_id).long()
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


class DataCollator:
    """The ``collate_fn`` of a ``DataLoader`` over samples, for a training loop of one's own: batches as the trainer's.

    A prompt is the processor's chat template; the answer and the end-of-sequence token stand behind it, padding on the
    right, labels on answers alone. With ``training=False``, prompts alone, padding on the left, for ``model.generate``;
    their samples' answers may be empty.

    Args:
        processor: the model's; a tokenizer, where the model takes no images.
        training: with answers and labels.

    Returns:
        Of a list of samples, what the model takes: ``model(**batch.to(model.device))``.

    Raises:
        ValueError: a chat template that does not write a sample's turns, a tokenizer without an eos_token, or an empty
            batch.
        ValueError, TypeError, FileNotFoundError: a sample that a ``Stream`` would refuse.
    """

    def __init__(self, processor: Any, training: bool = True) -> None:
        self._encoder, self._training = Encoder(processor), training
        self._collate = Collator(self._encoder, None, training)

    def __call__(self, samples: Sequence[Sample]) -> BatchFeature:
        if not hasattr(samples, "__len__") or len(samples) == 0:
            raise ValueError(f"the batch is {brief(samples)}; expected a list of at least one cllava_fast.Sample")
        for position, sample in enumerate(samples):
            check_sample(sample, f"batch[{position}]", needs_answer=self._training)
        return BatchFeature(self._collate(self._encoder.encode(samples)))
