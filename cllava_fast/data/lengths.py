"""How many tokens a sample may have: beyond what a model was made for, it answers nonsense and says nothing of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cllava_fast import distributed
from cllava_fast.data.encode import Example
from cllava_fast.names import brief

UNKNOWN = 10**20  # a tokenizer's model_max_length from here on means that nobody said
SHOWN = 5  # of many samples


class Limit(NamedTuple):
    tokens: int
    name: str


def token_limit(tokenizer: Any, config: Any) -> Limit | None:
    """What the model's configuration says, and only where it does not, the tokenizer; None where neither does."""
    limits = (
        Limit(_positions(config.get_text_config()), "the model's max_position_embeddings"),
        Limit(tokenizer.model_max_length, "the tokenizer's model_max_length"),
    )
    return next((limit for limit in limits if limit.tokens < UNKNOWN), None)


def warn_of_answers(examples: Iterable[Example], most: int | None, tokenizer: Any, what: str) -> None:
    """Of answers that no evaluation meets: it generates ``most`` tokens, and none that the tokenizer does not know.
    None: these are learned."""
    lengths, unknown, unknown_id = [], [], getattr(tokenizer, "unk_token_id", None)
    for example in examples:
        ids = example.answer_ids[:-1]  # without the end
        lengths.append(len(ids))
        if unknown_id in ids:
            unknown.append(example.sample.answer)
    said = []
    if long := sum(most is not None and length > most for length in lengths):
        said.append(
            f"{what}: {long} of {len(lengths)} answers have more than max_new_tokens={most} tokens, the longest "
            f"{max(lengths)}; what a model answers is cut off there, and cannot equal them"
        )
    if unknown:
        said.append(
            f"{what}: {len(unknown)} of {len(lengths)} answers hold what the base's tokenizer does not know, such as "
            f"{brief(unknown[0])}; the model can neither learn nor give them"
        )
    for text in said if distributed.is_main() else []:
        warnings.warn(text, stacklevel=2)


def _positions(config: Any) -> int:
    """Positions of a text model, those that stretched rotary embeddings add included."""
    positions = getattr(config, "max_position_embeddings", None) or UNKNOWN
    rope = getattr(config, "rope_parameters", None) or {}
    each = [value for value in rope.values() if isinstance(value, Mapping)] or [rope]  # one for each kind of layer
    born = [one.get("original_max_position_embeddings") or positions for one in each]
    return max(positions, *(int(b * (one.get("factor") or 1)) for b, one in zip(born, each, strict=True)))


def check_lengths(examples: Iterable[Example], limit: Limit | None, what: str, answers: bool) -> None:
    """Raises ValueError for examples that are longer than ``limit``, with their ``answers`` or by the prompt alone."""
    if limit is None:
        return
    long = []
    for number, example in enumerate(examples):
        tokens = len(example.prompt_ids) + answers * len(example.answer_ids)
        if tokens > limit.tokens:
            name = brief(example.sample.id) if example.sample.id else f"number {number}"
            long.append(f"{name} has {tokens} tokens")
    if long:
        more = f", and {len(long) - SHOWN} others are too long" if len(long) > SHOWN else ""
        raise ValueError(
            f"{what}: {', '.join(long[:SHOWN])}{more}, image and chat template included; expected {limit.tokens} at "
            f"most, {limit.name}: shorten or remove what is longer"
        )
