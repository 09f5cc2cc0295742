"""Continual tuning of frozen vision-language models, fast.

Names only; each is imported when it is first used, so that ``import cllava_fast`` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cllava_fast import ops
    from cllava_fast.data import DataCollator, Sample, Stream, Task, load_stream, read_samples
    from cllava_fast.evaluate.evaluation import evaluate_stream
    from cllava_fast.evaluate.report import load_results, write_report
    from cllava_fast.methods import IncrementConfig, JointLoraConfig, LoraConfig
    from cllava_fast.model import (
        export_peft,
        from_pretrained,
        load_pretrained,
        merge,
        patch,
        push_to_hub,
        save_pretrained,
        scale_layers,
        share,
        unmerge,
        unpatch,
    )
    from cllava_fast.pool import Pool
    from cllava_fast.train.arguments import ContinualArguments
    from cllava_fast.train.callbacks import ContinualCallback
    from cllava_fast.train.learning import learning
    from cllava_fast.train.loop import ContinualTrainer, PreparedStream
    from cllava_fast.train.result import ContinualResult

__all__ = [
    "ContinualArguments",
    "ContinualCallback",
    "ContinualResult",
    "ContinualTrainer",
    "DataCollator",
    "IncrementConfig",
    "JointLoraConfig",
    "LoraConfig",
    "Pool",
    "PreparedStream",
    "Sample",
    "Stream",
    "Task",
    "evaluate_stream",
    "export_peft",
    "from_pretrained",
    "learning",
    "load_pretrained",
    "load_results",
    "load_stream",
    "merge",
    "ops",
    "patch",
    "push_to_hub",
    "read_samples",
    "save_pretrained",
    "scale_layers",
    "share",
    "unmerge",
    "unpatch",
    "write_report",
]

_HOMES = {
    "data": ("DataCollator", "Sample", "Stream", "Task", "load_stream", "read_samples"),
    "evaluate.evaluation": ("evaluate_stream",),
    "evaluate.report": ("load_results", "write_report"),
    "methods": ("IncrementConfig", "JointLoraConfig", "LoraConfig"),
    "model": (
        "export_peft",
        "from_pretrained",
        "load_pretrained",
        "merge",
        "patch",
        "push_to_hub",
        "save_pretrained",
        "scale_layers",
        "share",
        "unmerge",
        "unpatch",
    ),
    "pool": ("Pool",),
    "train.arguments": ("ContinualArguments",),
    "train.callbacks": ("ContinualCallback",),
    "train.learning": ("learning",),
    "train.loop": ("ContinualTrainer", "PreparedStream"),
    "train.result": ("ContinualResult",),
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("cllava_fast.ops")
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"cllava_fast.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
