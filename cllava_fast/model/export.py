"""``export_peft``: one selection as a plain PEFT LoRA, which anything that reads those files can serve."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cllava_fast.atomic import check_empty, new_folder
from cllava_fast.lowrank import truncate
from cllava_fast.model.card import as_code, peft_card
from cllava_fast.model.files import CARD, CONFIG, WEIGHTS, base_name
from cllava_fast.model.merging import acting_rows, choose_one
from cllava_fast.model.patching import get_increments
from cllava_fast.model.paths import vision_tower
from cllava_fast.model.processors import differing, find_processor, image_settings
from cllava_fast.names import brief


@dataclass(frozen=True)
class ExportReport:
    """What ``export_peft`` wrote.

    Attributes:
        path: the folder.
        rank: rank of the LoRA.
        error: relative error of the compression, ``|exported - exact| / |exact|`` (Frobenius) of the increment, by the
            path of each adapted linear; 0 where nothing was compressed.
    """

    path: Path
    rank: int
    error: dict[str, float]

    def __str__(self) -> str:
        worst = max(self.error.values())
        exact = "nothing compressed" if worst == 0 else f"compressed, largest relative error {worst:.1e}"
        return f"{self.path}: a LoRA of rank {self.rank} on {len(self.error)} linears; {exact}"


def export_peft(
    model: Any,
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    instruction: str | None = None,
    query: Tensor | None = None,
    rank: int | None = None,
) -> ExportReport:
    """Writes one selection as a PEFT LoRA, which stock PEFT loads onto the unpatched base. The model stays as it is.

    A LoRA acts on every input alike. That of an ``instruction`` answers it as the patched model does, up to rounding;
    that of a ``task`` is the mean over the task's training samples of what acted on them. Factors are float32, with
    coefficients folded into ``lora_B``. The rank is that of one row times the rows that act, earlier tasks' context
    among them.

    Args:
        model: a patched model.
        path: a new or an empty folder.
        task, instruction, query: as in ``merge``; none where the method does not select.
        rank: at most this rank, by a truncated singular value decomposition; the report says what it costs.

    Raises:
        ValueError: as ``merge``, or ``rank`` is no whole number of at least 1.
        TypeError: as ``merge`` for an instruction and a query.
        FileExistsError: ``path`` holds something.
    """
    if rank is not None and (not isinstance(rank, Integral) or rank < 1):
        raise ValueError(f"rank is {brief(rank)}; expected a whole number of at least 1, or None for all rows that act")
    increments = get_increments(model)
    target = Path(path)
    check_empty(target)
    selection = choose_one(model, task=task, instruction=instruction, query=query)
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    width = 0
    for name, factors in increments.pool.layers.items():
        linear = name.replace("/", ".")
        with torch.no_grad():
            A, B, coefficient = acting_rows(selection, factors)
            A = A.double().flatten(0, 1)  # [r, d_in]
            B = B.double() * (coefficient.double() * increments.config.scale)[:, None, None]
            B = B.flatten(0, 1)  # [r, d_out]
            A, B, errors[linear] = truncate(A, B, rank)
        width = len(A)
        tensors[f"base_model.model.{linear}.lora_A.weight"] = A.float().cpu().contiguous()
        tensors[f"base_model.model.{linear}.lora_B.weight"] = B.t().float().cpu().contiguous()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
        "r": width,
        "lora_alpha": width,  # PEFT scales by lora_alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(errors),  # whole paths: the vision tower has linears of the same names
    }
    said = _words(task, instruction, query)
    images = vision_tower(model) is not None
    learned_with = _learned_with(increments.processor, find_processor(model))
    card = peft_card(config, said, max(errors.values()), increments.config.targets, learned_with, images=images)
    with new_folder(target) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")
    return ExportReport(target, width, errors)


def _learned_with(processor: Any | None, of_base: Any | None) -> list[str]:
    """What the increments were learned with, in words, where the base's own processor has something else."""
    if processor is None or of_base is None:
        return []
    from cllava_fast.data.conversation import name_of  # which needs the model's reading of turns

    template, words = getattr(processor, "chat_template", None), []
    if template != getattr(of_base, "chat_template", None):
        name = name_of(template)
        words.append("chat template " + (f"`{name}` (cllava_fast.data.chat_template)" if name else "of its own"))
    images = differing(image_settings(processor), image_settings(of_base))
    return words + [f"images with {name} {as_code(str(value))}" for name, (value, _) in images.items()]


def _words(task: str | None, instruction: str | None, query: Tensor | None) -> str:
    if task is not None:
        return f"the mean over task {as_code(task)}"
    if instruction is not None:
        return f"of the instruction {as_code(instruction)}"
    return "of a query" if query is not None else "all that was learned; the method does not select"
