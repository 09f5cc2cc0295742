"""A stream made ready for one base model: token ids, and what the frozen vision tower makes of each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cllava_fast.data.encode import Encoder, Example, ImageFeatures, samples_of
from cllava_fast.data.lengths import Lengths, check_lengths, count_tokens, token_limit, warn_of_answers
from cllava_fast.data.stream import Stream


class PreparedStream:
    """A stream encoded for one base model: ids, and what the frozen vision tower makes of each image.

    Several runs on equal base models (methods that are compared, seeds) can share one.

    Args:
        image_feature_bytes: memory for projected image features.
        dataloader_num_workers: processes that open images while others are computed, and batches while others are
            answered in evaluation.
    """

    def __init__(
        self, stream: Stream, processor: Any, image_feature_bytes: int = 2 << 30, dataloader_num_workers: int = 0
    ) -> None:
        if not isinstance(stream, Stream):
            raise TypeError(f"stream is a {type(stream).__name__}; expected cllava_fast.Stream([task, ...])")
        self.stream = stream
        self.encoder = Encoder(processor)
        self.features = ImageFeatures(image_feature_bytes)
        self.workers = dataloader_num_workers
        self._examples: dict[tuple[str, str], Sequence[Example]] = {}
        self._lengths: dict[tuple[str, str], Lengths] = {}
        self._seen: set[tuple[str, str, bool]] = set()

    def examples(
        self, task: str, split: str, model: Any, with_features: bool = True,
        advance: Callable[[int], None] = lambda samples: None,
    ) -> Sequence[Example]:  # fmt: skip
        """The encoded samples; ``model`` says how long they may be and computes features of images that are new, and
        ``advance`` is told of how many more samples.

        Raises:
            ValueError: a sample is longer than tokenizer or model allow, or the chat template does not write its turns.
        """
        samples = next(getattr(t, split) for t in self.stream if t.name == task)
        key = (task, split)
        surrogate = getattr(getattr(model, "increments", None), "surrogate", None)
        pooled = surrogate is not None and surrogate.uses_image
        if with_features and (*key, pooled) not in self._seen:
            self.features.add(samples, self.encoder, model, pooled=pooled, workers=self.workers, advance=advance)
            self._seen.add((*key, pooled))
        where = f"task {task!r}, {split}"
        if key not in self._examples:
            examples = self.encoder.encode(samples, f"{where}: ")
            self._lengths[key] = count_tokens(examples, self.encoder.tokenizer)
            self._examples[key] = examples
        limit = token_limit(self.encoder.tokenizer, model.config)
        check_lengths(self._lengths[key], samples, limit, where, answers=split == "train")
        return self._examples[key]

    def warn_of_answers(self, task: str, split: str, most: int | None) -> None:
        """Of the answers of what ``examples`` has returned, see ``lengths.warn_of_answers``."""
        key = (task, split)
        warn_of_answers(self._lengths[key], samples_of(self._examples[key]), most, f"task {task!r}, {split}")
