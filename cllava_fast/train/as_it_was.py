"""A model is left as it was: what transformers' ``Trainer`` and accelerate leave on it is taken off again."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cllava_fast.model import paths


@contextmanager
def same_mode(model: Any) -> Iterator[None]:
    """Behind the block, every module is in training or evaluation as it was before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def as_it_was(model: Any) -> Iterator[None]:
    """Behind the block, a task's engine has left nothing on ``model``, whether it came to its end or not."""
    with (
        _quiet("transformers.trainer"),
        keeps_forward(model),
        _counts_as_adapted(model),
        _without_cache(model),
        _keeps_activations(model),
    ):
        yield


@contextmanager
def keeps_forward(model: Any) -> Iterator[None]:
    """Takes off what mixed precision and FSDP wrap around our methods within the block, and accelerate's marks, with
    which the next task would get none."""
    names = ("forward", "generate", "_original_forward", "_is_accelerate_prepared")
    before = {name: model.__dict__[name] for name in names if name in model.__dict__}
    try:
        yield
    finally:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)


@contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """No step fills a cache that nobody reads. The Trainer turns it off, for good, in the model's config alone, which a
    LLaVA's language layers do not look into."""
    configs = [vars(model.config)]
    language = vars(paths.language_model(model).config)
    if language is not configs[0]:
        configs.append(language)
    before = [{"use_cache": values["use_cache"]} if "use_cache" in values else {} for values in configs]
    language["use_cache"] = False
    try:
        yield
    finally:
        for values, known in zip(configs, before, strict=True):
            values.pop("use_cache", None)
            values.update(known)


@contextmanager
def _keeps_activations(model: Any) -> Iterator[None]:
    """The Trainer turns activation checkpointing on for good, with another hook on each embedding in every task."""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", "_require_grads_hook", "_require_grads_hooks")
    before = [(vars(module), {name: vars(module)[name] for name in names if name in vars(module)})
              for module in model.modules()]  # fmt: skip
    hooks = vars(model).get("_require_grads_hooks")
    try:
        yield
    finally:
        present = vars(model).get("_require_grads_hooks")
        for hook in present if present is not None and present is not hooks else []:
            hook.remove()
        for values, known in before:
            for name in names:
                values.pop(name, None)
            values.update(known)


@contextmanager
def _counts_as_adapted(model: Any) -> Iterator[None]:
    """The Trainer refuses a quantised base without adapters, and would know PEFT's alone."""
    if not getattr(model, "is_quantized", False):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps a logger to errors for a while: the Trainer explains at length what is decided on purpose here."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch 2.13 has a new name for it, accelerate knows the old one
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
