"""Triton's interpreter, as the tests use it: quicker, and with the hardware's rounding."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch


def patch_the_language_once() -> None:
    """Each launch, and each call of a function within a kernel, replaces the members of `triton.language` anew, for
    milliseconds; here the first one does, and they stay replaced."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # an older one, which is as slow as it was
        return
    replace, modules, functions = interpreter._patch_lang, set(), set()

    def replace_once(fn: Any) -> Any:
        if fn not in functions:
            used = {
                each.__name__ for each in fn.__globals__.values() if inspect.ismodule(each) and each in (tl, tl.core)
            }
            if not used or not used <= modules:
                replace(fn)  # of which nothing is restored, because the result is another
            modules.update(used)
            functions.add(fn)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)


def by_name(find: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """Finds numpy's dtype for each of the language's once, where `find` builds a table each time."""
    known: dict[str, np.dtype] = {}

    def found(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in known:
            known[name] = find(dtype)
        return known[name]

    return found


def round_bfloat16_like_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 off at bfloat16's last bit; hardware rounds to nearest even, as torch does."""
    from triton.language import bfloat16, float32
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source, target) != (float32, bfloat16):
            return convert(data, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
