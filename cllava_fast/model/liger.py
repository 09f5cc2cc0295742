"""Liger's fused RMSNorm and SwiGLU in the frozen language layers of one model, for as long as it is tuned.

Liger's patch replaces classes of transformers for the whole process; here they are put back, and the instance's modules
too, at the end. What Liger could do beyond that is left out: its rotary embedding has no form for one model alone, and
its fused losses replace the model's forward, which carries the selection, to save logits that answers alone are few of.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cllava_fast.environment import require
from cllava_fast.model import paths

LEFT_OUT = ("rope", "cross_entropy", "fused_linear_cross_entropy")
ABSENT = object()


def kernels_for(model: nn.Module) -> Any:
    """Liger's function for the kind of language model.

    Raises:
        ModuleNotFoundError: Liger is not installed.
        ValueError: it does not know this kind, or there is no GPU.
    """
    liger: Any = require("liger_kernel.transformers.monkey_patch", "liger=True")
    language: Any = paths.language_model(model)
    apply = liger.MODEL_TYPE_TO_APPLY_LIGER_FN.get(language.config.model_type)
    if apply is None:
        known = ", ".join(sorted(liger.MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise ValueError(f"liger=True: Liger has no kernels for {language.config.model_type!r}; it has for {known}")
    if not torch.cuda.is_available():
        raise ValueError("liger=True: Liger's kernels need a GPU, and torch finds none")
    return apply


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Raises what ``kernels_for`` does."""
    apply, language = kernels_for(model), paths.language_model(model)
    off = {name: False for name in LEFT_OUT if name in inspect.signature(apply).parameters}
    modeling = vars(sys.modules[type(language).__module__])
    before = [(names, dict(names)) for names in (modeling, *(vars(module) for module in language.modules()))]
    changed: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        try:
            apply(model=language, **off)
        finally:
            changed = [(names, _differences(names, values)) for names, values in before]
            _undo(*changed[0])
        yield
    finally:
        for names, values in changed[1:]:
            _undo(names, values)


def _differences(names: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """What was there before under each name that is new or another now."""
    return {name: before.get(name, ABSENT) for name, value in names.items() if before.get(name, ABSENT) is not value}


def _undo(names: dict[str, Any], values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is ABSENT:
            del names[name]
        else:
            names[name] = value
