"""The continual-tuning loop and its stages.

Names only, imported when first used: the arguments need no ``Trainer``, which takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cllava_fast.train.arguments import ContinualArguments
    from cllava_fast.train.callbacks import ContinualCallback
    from cllava_fast.train.loop import ContinualResult, ContinualTrainer, PreparedStream

__all__ = ["ContinualArguments", "ContinualCallback", "ContinualResult", "ContinualTrainer", "PreparedStream"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = {"ContinualArguments": "arguments", "ContinualCallback": "callbacks"}.get(name, "loop")
    return getattr(importlib.import_module(f"cllava_fast.train.{home}"), name)
