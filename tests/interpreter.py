"""Triton's interpreter, as the tests use it: quicker, and with the hardware's rounding."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch


def patch_the_language_once() -> None:
    """Each launch, and each call of a function within a kernel, replaces the members of `triton.language` anew, for
    milliseconds; here each function does so once, and they stay replaced."""
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # an older one, which is as slow as it was
        return
    replace = functools.cache(interpreter._patch_lang)

    def replace_once(fn: Any) -> Any:
        replace(fn)
        return interpreter._LangPatchScope()  # which knows of nothing to restore

    interpreter._patch_lang = replace_once


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
