"""Answers to questions, by greedy generation in batches that mix tasks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from cllava_fast import distributed
from cllava_fast.data.encode import Collator, Example, ImageFeatures
from cllava_fast.data.stream import Sample
from cllava_fast.data.workers import made_of
from cllava_fast.model.paths import execution_device, input_embedding


class Answer(NamedTuple):
    """What a model said, and whether it would have gone on behind ``max_new_tokens``."""

    text: str
    is_cut_off: bool


@torch.no_grad()
def predict(
    model: Any,
    examples: Sequence[Example],
    queries: Tensor | None,
    collate: Collator,
    *,
    batch_size: int,
    max_new_tokens: int,
    workers: int = 0,
    advance: Callable[[str], None] = lambda note: None,
    together: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """One answer for each example. The query alone decides what acts.

    Several processes share the batches, which hold the same samples on any number of them; each returns all answers.

    Args:
        queries: ``[n, D]``, or None for a model without queries (a frozen one, say).
        collate: a collator that is not for training.
        workers: processes that open images and make batches while others are answered; 0 makes them in between.
        advance: called after every batch of this process.
        together: called after every batch that each process has, so that it may wait for the others.
    """
    tokenizer = collate.encoder.tokenizer
    device = execution_device(input_embedding(model))
    model.eval()
    batches = batches_of(examples, batch_size)
    share = batches[distributed.rank() :: distributed.count()]
    sharded = distributed.is_sharded(model)
    if sharded and len(share) < len(batches[:: distributed.count()]):
        share.append(batches[0])  # no process may leave the others alone in a forward pass
    made = made_of(share, partial(_batch, examples, collate), min(workers, len(share)))
    mine: dict[int, Answer] = {}
    for turn, (rows, tensors) in enumerate(zip(share, made, strict=True)):
        batch = {name: tensor.to(device) for name, tensor in tensors.items()}
        if queries is not None:
            batch["query"] = queries[rows].to(device)
        width = batch["input_ids"].shape[1]
        with _greedy(model, tokenizer):
            generated = model.generate(**batch, max_new_tokens=max_new_tokens, synced_gpus=sharded)[:, width:].cpu()
            cut_off = ~torch.isin(generated, torch.tensor(_ends(model))).any(1)
        for row, ids, is_cut_off in zip(rows, generated, cut_off.tolist(), strict=True):
            mine[row] = Answer(tokenizer.decode(ids, skip_special_tokens=True).strip(), is_cut_off)
        advance("")
        if turn < len(batches) // distributed.count():
            together()
    answers = {row: answer for share in distributed.gather(mine) for row, answer in share.items()}
    return [answers[i] for i in range(len(examples))]


def _batch(examples: Sequence[Example], collate: Collator, rows: Sequence[int]) -> dict[str, Tensor]:
    return collate([examples[i] for i in rows])


@contextmanager
def _greedy(model: Any, tokenizer: Any) -> Iterator[None]:
    """Of the model's generation config, leaves what says nothing about which token is best; an answer ends where
    training ended it, too."""
    whole = model.generation_config
    kept = (
        "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "cache_implementation", "cache_config",
        "compile_config", "disable_compile", "prefill_chunk_size",
    )  # fmt: skip
    model.generation_config = GenerationConfig(**{name: getattr(whole, name, None) for name in kept})
    if not ends_answers(model, tokenizer):
        model.generation_config.eos_token_id = [*_ends(model), tokenizer.eos_token_id]
    try:
        yield
    finally:
        model.generation_config = whole


def ends_answers(model: Any, tokenizer: Any) -> bool:
    """Whether plain ``model.generate`` ends at the token that training puts behind every answer."""
    return tokenizer.eos_token_id in _ends(model)


def _ends(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def batches_of(examples: Sequence[Example], batch_size: int) -> list[list[int]]:
    """The examples that share a batch: prompts of one length, which waste nothing on padding."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def queries_of(
    model: Any, samples: Sequence[Sample], features: ImageFeatures, tasks: Sequence[str] = ()
) -> Tensor | None:
    """``[n, D]`` on the CPU, by the same reading of instructions as in the model; None where no query selects.

    Args:
        features: hold the samples' images, for surrogates that look at them.
        tasks: the task of each sample, which a method with ``uses_task`` is told, and no other.

    Raises:
        ValueError: the model was patched without a processor.
    """
    increments = getattr(model, "increments", None)
    if increments is not None and increments.method.uses_task and not increments.pristine:
        return increments.task_query(tasks)
    if increments is None or increments.surrogate is None or increments.pristine:
        return None
    if increments.reader is None:
        raise ValueError("the model is patched without a processor; unpatch(model) and patch it with one")
    texts, systems = [], False
    for sample in samples:
        texts.append(increments.reader.canonical(sample.instruction))
        systems |= bool(sample.system)
    if systems and increments.reader.mixes_system and distributed.is_main():
        warnings.warn(
            "the chat template writes a system prompt into the user's turn, and nothing tells it from the instruction "
            "there: training and evaluation select by the instruction alone, generate by both unless it is passed "
            "instructions=[...]",
            stacklevel=2,
        )
    image = None
    if increments.surrogate.uses_image:
        image = features.pooled(samples, increments.surrogate.image_dim)
    return distributed.from_main(increments.surrogate.query(texts, image, batch_size=64))
