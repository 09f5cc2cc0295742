"""The native backends "cpu" and "cuda": the shared libraries that setup.py builds from csrc/, and whether they can run.

Loaded when an op first asks, never at import. Both implement the same ops, `torch.ops.cllava_fast_native.*`, whose
outputs are allocated here in Python.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from cllava_fast.ops import dispatch

FOLDER = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOWEST_CAPABILITY = (8, 0)
HOW = "build it with a C++ compiler and ninja: pip install --no-build-isolation, from the source tree"
HOW_CUDA = "build it with the CUDA toolkit: CLLAVA_BUILD_CUDA=1 pip install --no-build-isolation, from the source tree"

ops: Any = torch.ops.cllava_fast_native


@functools.cache
def cpu_usable() -> str | None:
    return _load("_native_cpu.so", HOW)


@functools.cache
def cuda_usable() -> str | None:
    refusal = cpu_usable()  # which holds the schemas
    if refusal is not None:
        return refusal
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not (FOLDER / "_native_cuda.so").exists():
        return f"_native_cuda.so is not built: {HOW_CUDA}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < LOWEST_CAPABILITY:
        return f"compute capability {capability} is below {LOWEST_CAPABILITY}"
    return _load("_native_cuda.so", HOW_CUDA)


def _load(name: str, how: str) -> str | None:
    path = FOLDER / name
    if not path.exists():
        return f"{name} is not built: {how}"
    try:
        torch.ops.load_library(str(path))
    except OSError as e:
        return f"{name} does not load ({e}): {how}"
    return None


Accepts = Callable[[str, dispatch.Site, bool], str | None]


def register(kernels: Mapping[str, Callable[..., Any]], cpu: Accepts, cuda: Accepts) -> None:
    """Registers the same functions for both devices; `cpu` and `cuda` say what each takes beyond device and dtype."""
    for backend, usable, accepts in (("cpu", cpu_usable, cpu), ("cuda", cuda_usable, cuda)):
        dispatch.register(backend, kernels, usable=usable, accepts=functools.partial(_accepts, backend, accepts))


def _accepts(device: str, accepts: Accepts, op: str, site: dispatch.Site, asked: bool) -> str | None:
    if site.device.type != device:
        return f"the tensors are on {site.device}"
    if site.dtype not in DTYPES:
        return f"{site.dtype} is not one of {', '.join(str(dtype) for dtype in DTYPES)}"
    return accepts(op, site, asked)
