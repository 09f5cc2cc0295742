"""Logits of answers alone: in training, only positions whose next token carries a label go through ``lm_head``.

A prompt has many tokens and a label on none of them; their logits, ``[B, S, vocab]`` in float32 and their gradient,
would be the largest tensors of a step. The loss and all gradients stay what transformers computes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from cllava_fast.model import paths
from cllava_fast.ops import checks

IGNORE = -100  # label of positions without a loss, as in transformers


def next_labels(labels: Tensor) -> Tensor:
    """What every position is to predict: ``[B, S]``; nothing follows the last one."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def answer_positions(labels: Tensor) -> Tensor:
    """``[B, K]`` int64: where the next token carries a label, in order.

    Rows with fewer than ``K`` go on with positions that predict nothing. On a GPU it waits, since ``K`` depends on
    values: a collator calls it on the CPU, and hands the result to the model.
    """
    predicts = next_labels(labels) != IGNORE  # [B, S]
    most = max(1, int(predicts.sum(1).max()))  # of no logits at all, transformers' loss would have no gradient
    return predicts.to(labels.dtype).argsort(dim=1, descending=True, stable=True)[:, :most]


def for_loss_alone(model: Any, kwargs: dict[str, Any], positions: Tensor | None) -> AbstractContextManager[Any]:
    """While it is open, answer positions alone pass ``lm_head``, and ``kwargs`` hold what the loss then needs.

    All positions do outside training, without labels, where the caller chose (``logits_to_keep``, ``shift_labels``),
    and for another loss than transformers' own.
    """
    labels = kwargs.get("labels")
    chosen = "logits_to_keep" in kwargs or "shift_labels" in kwargs
    if labels is None or chosen or not model.training or model.loss_function is not ForCausalLMLoss:
        return nullcontext()
    if positions is None:
        positions = answer_positions(labels)
    elif positions.dim() != 2 or len(positions) != len(labels):
        raise ValueError(f"answer_positions is {list(positions.shape)}; expected [{len(labels)}, K]")
    wanted = next_labels(labels)
    kept = wanted.gather(1, positions)  # [B, K]
    if checks.can_read(labels, cuda=False) and not _names_each_once(positions, kept, wanted):
        raise ValueError(
            "answer_positions does not name each position before a label once; "
            "use cllava_fast.model.answers.answer_positions(labels), or leave it out"
        )
    kwargs["shift_labels"] = kept
    # looked up now: resizing the vocabulary replaces it
    return paths.output_head(model).register_forward_pre_hook(partial(_keep, positions))


def _names_each_once(positions: Tensor, kept: Tensor, wanted: Tensor) -> bool:
    missed = wanted.scatter(1, positions, IGNORE) != IGNORE
    return not missed.any() and bool((kept != IGNORE).sum() == (wanted != IGNORE).sum())


def _keep(positions: Tensor, head: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    (hidden,) = arguments  # [B, S, d]
    return (torch.take_along_dim(hidden, positions.to(hidden.device).unsqueeze(2), dim=1),)  # [B, K, d]
