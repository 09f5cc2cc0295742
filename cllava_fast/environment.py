"""What a result was measured with: versions, device, date; and what is missing for a feature that is used."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from types import ModuleType
from typing import Any

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "peft",
    "sentence-transformers",
    "safetensors",
    "flash-attn",
)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def require(module: str, feature: str) -> ModuleType:
    """Imports what only some features need; where it is not installed, the error says which and how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is there, and misses something of its own
        install = package.replace("_", "-")
        message = f"{feature}: needs {install}, which is not installed. Install it: pip install {install}"
        raise ModuleNotFoundError(message, name=error.name) from None


def environment() -> dict[str, Any]:
    """Versions of the packages that matter (None: not installed), the device, its tuned table, the date in UTC."""
    import torch

    import cllava_fast
    from cllava_fast.ops import tuned

    there = torch.cuda.is_available()
    return {
        "cllava_fast": cllava_fast.__version__,
        "python": platform.python_version(),
        **{name: version_of(name) for name in PACKAGES},
        "torch": torch.__version__,  # the package's version may leave out which build it is
        "platform": platform.platform(),
        "gpu": torch.cuda.get_device_name() if there else None,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if there else None,
        "cuda": torch.version.cuda,
        "tuned": tuned.describe(),
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
