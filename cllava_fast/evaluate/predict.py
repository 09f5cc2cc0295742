"""Answers to questions, by greedy generation in batches that mix tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cllava_fast.data.encode import Collator, Example


@torch.no_grad()
def predict(
    model: Any,
    examples: Sequence[Example],
    queries: Tensor | None,
    collate: Collator,
    *,
    batch_size: int,
    max_new_tokens: int,
    advance: Callable[[str], None] = lambda note: None,
) -> list[str]:
    """One answer for each example. No task id is given: the query alone decides what acts.

    Args:
        queries: ``[n, D]``, or None for a model without queries (a frozen one, say).
        collate: a collator that is not for training.
        advance: called after every batch.
    """
    tokenizer = collate.encoder.tokenizer
    device = next(model.parameters()).device
    model.eval()
    # prompts of one length waste nothing on padding
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    answers = [""] * len(examples)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch: dict[str, Any] = {name: t.to(device) for name, t in collate([examples[i] for i in rows]).items()}
        if queries is not None:
            batch["query"] = queries[rows].to(device)
        width = batch["input_ids"].shape[1]
        generated = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        for row, ids in zip(rows, generated[:, width:], strict=True):
            answers[row] = tokenizer.decode(ids, skip_special_tokens=True).strip()
        advance("")
    return answers
