"""How many tokens a sample may have: beyond what a model was made for, it answers nonsense and says nothing of it."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from cllava_fast import distributed
from cllava_fast.data.encode import Example
from cllava_fast.data.stream import Sample
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


class Lengths(NamedTuple):
    """Tokens of each of a split's examples."""

    prompts: array[int]
    answers: array[int]  # the end-of-sequence token included
    unknown: list[int]  # places of answers that hold what the tokenizer does not know


def count_tokens(examples: Iterable[Example], tokenizer: Any) -> Lengths:
    found, unknown_id = Lengths(array("l"), array("l"), []), getattr(tokenizer, "unk_token_id", None)
    for place, example in enumerate(examples):
        found.prompts.append(len(example.prompt_ids))
        found.answers.append(len(example.answer_ids))
        if unknown_id in example.answer_ids[:-1]:
            found.unknown.append(place)
    return found


def warn_of_answers(lengths: Lengths, samples: Sequence[Sample], most: int | None, what: str) -> None:
    """Of answers that no evaluation meets: it generates ``most`` tokens, and none that the tokenizer does not know.
    None: these are learned."""
    count, said = len(samples), []
    if long := sum(most is not None and length - 1 > most for length in lengths.answers):
        said.append(
            f"{what}: {long} of {count} answers have more than max_new_tokens={most} tokens, the longest "
            f"{max(lengths.answers) - 1}; what a model answers is cut off there, and cannot equal them"
        )
    if lengths.unknown:
        said.append(
            f"{what}: {len(lengths.unknown)} of {count} answers hold what the base's tokenizer does not know, such as "
            f"{brief(samples[lengths.unknown[0]].answer)}; the model can neither learn nor give them"
        )
    for text in said if distributed.is_main() else []:
        warnings.warn(text, stacklevel=2)


def check_lengths(lengths: Lengths, samples: Sequence[Sample], limit: Limit | None, what: str, answers: bool) -> None:
    """Raises ValueError for samples that are longer than ``limit``, with their ``answers`` or by the prompt alone."""
    if limit is None:
        return
    tokens = [prompt + answers * answer for prompt, answer in zip(lengths.prompts, lengths.answers, strict=True)]
    long = [place for place, length in enumerate(tokens) if length > limit.tokens]
    if not long:
        return
    named = [
        f"{brief(name) if (name := samples[place].id) else f'number {place}'} has {tokens[place]} tokens"
        for place in long[:SHOWN]
    ]
    more = f", and {len(long) - SHOWN} others are too long" if len(long) > SHOWN else ""
    raise ValueError(
        f"{what}: {', '.join(named)}{more}, image and chat template included; expected {limit.tokens} at most, "
        f"{limit.name}: shorten or remove what is longer"
    )


def _positions(config: Any) -> int:
    """Positions of a text model, those that stretched rotary embeddings add included."""
    positions = getattr(config, "max_position_embeddings", None) or UNKNOWN
    rope = getattr(config, "rope_parameters", None) or {}
    each = [value for value in rope.values() if isinstance(value, Mapping)] or [rope]  # one for each kind of layer
    born = [one.get("original_max_position_embeddings") or positions for one in each]
    return max(positions, *(int(b * (one.get("factor") or 1)) for b, one in zip(born, each, strict=True)))
