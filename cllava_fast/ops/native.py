"""The native backends "cpu" and "cuda": the shared libraries that are built from csrc/, and whether they can run.

Loaded when an op first asks, never at import. Both implement the same ops, `torch.ops.cllava_fast_native.*`, whose
outputs are allocated in Python. With CLLAVA_EMULATE_CUDA=1 the CUDA kernels run on the CPU instead, slowly, and only
when asked for by name: for tests (`_native_cuda_emulated.so`, made by `python csrc/build.py emulated`).
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cllava_fast.ops import dispatch

FOLDER = Path(__file__).resolve().parents[1]
SCHEMAS = FOLDER.parent / "csrc" / "schemas.h"  # of a source tree
HOW = "build it with a C++ compiler: pip install --no-build-isolation . in the source tree"
HOW_CUDA = "build it with the CUDA toolkit: CLLAVA_BUILD_CUDA=1 pip install --no-build-isolation . in the source tree"
if not sys.platform.startswith("linux"):
    HOW = HOW_CUDA = "native kernels are for Linux"
EMULATED = os.environ.get("CLLAVA_EMULATE_CUDA", "0") == "1"


# What this library calls; one that was built from older sources may lack some.
OPS = (
    "select", "select_backward", "aggregate", "aggregate_backward", "select_aggregate", "mix_factors",
    "mix_factors_backward", "inject", "inject_add", "inject_backward",
)  # fmt: skip


@functools.cache
def cpu_usable() -> str | None:
    refusal = _load("_native_cpu.so", HOW)
    if refusal is not None:
        return refusal
    missing = [op for op in OPS if not hasattr(torch.ops.cllava_fast_native, op)]
    if missing:
        return f"_native_cpu.so is of older sources, without {', '.join(missing)}: {HOW}"
    built_with = _says("_native_cpu.so", "cllava_schemas", ctypes.c_uint)
    if SCHEMAS.exists() and built_with != zlib.crc32(SCHEMAS.read_bytes()):
        return f"_native_cpu.so is of other sources than {SCHEMAS}, and would misread arguments: {HOW}"
    return None


@functools.cache
def cuda_usable() -> str | None:
    refusal = cpu_usable()  # which holds the schemas
    if refusal is not None:
        return refusal
    if EMULATED:
        return _load_beside_cpu("_native_cuda_emulated.so", "python csrc/build.py emulated")
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not (FOLDER / "_native_cuda.so").exists():
        return f"_native_cuda.so is not built: {HOW_CUDA}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return dispatch.too_old() or _load_beside_cpu("_native_cuda.so", HOW_CUDA)


def _load_beside_cpu(name: str, how: str) -> str | None:
    """A library whose ops those of the CPU have defined."""
    refusal = _load(name, how)
    if refusal is not None:
        return refusal
    # which schemas.h each was built with
    if _says(name, "cllava_schemas", ctypes.c_uint) != _says("_native_cpu.so", "cllava_schemas", ctypes.c_uint):
        return f"{name} is of other sources than _native_cpu.so, and would misread arguments: {how}"
    why = _says(name, "cllava_cannot_run", ctypes.c_char_p)
    return why and f"{name} does not run on this GPU ({why.decode()}): {how}"


def _says(name: str, what: str, kind: Any) -> Any:
    """The answer of a library's function; None of one of older sources, which has none."""
    function = getattr(ctypes.CDLL(str(FOLDER / name)), what, None)
    if function is None:
        return None
    function.restype = kind
    return function()


def _load(name: str, how: str) -> str | None:
    path = FOLDER / name
    if not path.exists():
        return f"{name} is not built: {how}"
    try:
        torch.ops.load_library(str(path))
    except OSError as e:
        return f"{name} does not load ({e.__cause__ or e}): {how}"
    return None


def register(backend: str, kernels: Mapping[str, Callable[..., Any]], accepts: dispatch.Accepts) -> None:
    """Registers functions of (library, *arguments), where `library` holds the backend's native ops.

    `accepts` says what they take beyond device and dtype.
    """
    emulated = backend == "cuda" and EMULATED
    library = torch.ops.cllava_fast_emulated if emulated else torch.ops.cllava_fast_native
    bound = {op: functools.partial(run, library) for op, run in kernels.items()}
    if backend == "cuda":  # whose kernels have workspaces
        bound = {op: functools.partial(call, op, run) for op, run in bound.items()}
    dispatch.register(
        backend,
        bound,
        usable=cpu_usable if backend == "cpu" else cuda_usable,
        accepts=functools.partial(accepts_on, backend, accepts),
    )


def call(op: str, run: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return run(*arguments)
    except RuntimeError as error:
        refuse_without_memory(op, error)
        raise


def refuse_without_memory(op: str, error: RuntimeError) -> None:
    # a kernel's workspace: the stable ABI keeps neither the type nor the text of what torch raised
    if "aten::new_empty" in str(error):
        raise torch.OutOfMemoryError(f"no memory for a workspace of {op}: {error}") from error


def accepts_on(backend: str, accepts: dispatch.Accepts, op: str, site: dispatch.Site, asked: bool) -> str | None:
    """Device and dtype, and what `accepts` says beyond."""
    emulated = backend == "cuda" and EMULATED
    if site.device.type != ("cpu" if emulated else backend):
        return f"the tensors are on {site.device}"
    if emulated and not asked:
        return "the emulation runs only when asked for by name"
    refusal = dispatch.too_old(site.device) if site.device.type == "cuda" else None
    return refusal or dispatch.other_dtype(site.dtype) or accepts(op, site, asked)


def dense_rows(tensor: Tensor) -> Tensor:
    """Rows may lie apart (a slice of wider ones), their entries not."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def factors(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """With dense rows, in one dtype: `dtype` or float32."""
    if A.dtype != B.dtype or A.dtype not in (dtype, torch.float32):
        wanted = torch.float32 if torch.float32 in (A.dtype, B.dtype) else dtype
        A, B = A.to(wanted), B.to(wanted)
    return dense_rows(A), dense_rows(B)
