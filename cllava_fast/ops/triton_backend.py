"""The Triton backend: whether it can run here, and what the kernels of all ops share.

An op's `triton.py` is imported when it first runs, so that neither triton nor a compiler is needed to import this
library. Under TRITON_INTERPRET=1 the kernels run on the CPU, slowly, and only when asked for by name: for tests.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from cllava_fast.ops import dispatch

# triton reads it when a kernel is decorated, so a later change has no effect
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def usable() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
    if torch.version.cuda is None:
        return "the kernels are for NVIDIA's GPUs"
    return dispatch.too_old() or _cannot_launch()


def _cannot_launch() -> str | None:
    """Triton compiles its driver for each machine, with the first kernel at the latest."""
    try:
        importlib.import_module("triton").runtime.driver.active  # noqa: B018
    except Exception as error:
        return f"triton cannot launch kernels, for which it needs a C compiler and Python's headers: {error}"
    return None


def accepts(op: str, site: dispatch.Site, asked: bool) -> str | None:
    refusal = dispatch.other_dtype(site.dtype)
    if refusal is not None:
        return refusal
    if site.device.type == "cuda":
        if INTERPRETED:
            return "this process interprets its kernels (TRITON_INTERPRET=1)"
        return dispatch.too_old(site.device)
    if not INTERPRETED:
        return f"the tensors are on {site.device}"
    return None if asked else "the interpreter runs only when asked for by name"


def register(module: str, *ops: str, accepts: dispatch.Accepts = accepts) -> None:
    """Registers the functions named `ops` of `module`, which is imported at the first call."""
    dispatch.register("triton", {op: _lazy(module, op) for op in ops}, usable=usable, accepts=accepts)


def _lazy(module: str, name: str) -> Callable[..., Any]:
    @functools.cache
    def function() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), name)

    def run(*args: Any) -> Any:
        # triton launches on the current device
        with torch.cuda.device_of(next(a for a in args if isinstance(a, torch.Tensor))):
            return function()(*args)

    return run


class Shipped(NamedTuple):
    """One configuration of a kernel that this library launches: what ahead-of-time compilation needs to know.

    Attributes:
        kernel: the function under `triton.jit`.
        signature: type of each argument that is no constant, such as `{"x": "*fp16", "rows": "i32"}`.
        constants: value of each `tl.constexpr` argument.
        num_warps, num_stages: as launched.
        tensor_cores: whether its products must run there.
        options: further options of the launch.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    options: Mapping[str, Any] = {"enable_fp_fusion": True}
