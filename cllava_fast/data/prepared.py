"""A stream made ready for one base model: token ids, and what the frozen vision tower makes of each image."""

from __future__ import annotations

from typing import Any

from cllava_fast.data.encode import Encoder, Example, ImageFeatures
from cllava_fast.data.stream import Stream


class PreparedStream:
    """A stream encoded for one base model: ids, and what the frozen vision tower makes of each image.

    Several runs on equal base models (methods that are compared, seeds) can share one.
    """

    def __init__(self, stream: Stream, processor: Any, image_feature_bytes: int = 2 << 30) -> None:
        self.stream = stream
        self.encoder = Encoder(processor)
        self.features = ImageFeatures(image_feature_bytes)
        self._examples: dict[tuple[str, str], list[Example]] = {}

    def examples(self, task: str, split: str, model: Any | None) -> list[Example]:
        """The encoded samples; ``model`` computes features of images that are new, None leaves them out."""
        samples = next(getattr(t, split) for t in self.stream if t.name == task)
        if model is not None:
            self.features.add(samples, self.encoder, model)
        key = (task, split)
        if key not in self._examples:
            self._examples[key] = self.encoder.encode(samples)
        return self._examples[key]
