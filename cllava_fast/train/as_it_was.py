"""A model is left as it was: what transformers' ``Trainer`` and accelerate leave on it is taken off again."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
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
        _quiet_trainer(),
        keeps_forward(model),
        _counts_as_adapted(model),
        _without_cache(model),
        _keeps_layers(model),
    ):
        yield


@contextmanager
def keeps_forward(model: Any) -> Iterator[None]:
    """Takes off what mixed precision and FSDP wrap around our methods within the block, and accelerate's marks, with
    which the next task would get none."""
    with _kept([vars(model)], "forward", "generate", "_original_forward", "_is_accelerate_prepared"):
        yield


@contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """No step fills a cache that nobody reads. The Trainer turns it off, for good, in the model's config alone, which a
    LLaVA's language layers do not look into."""
    whole, language = vars(model.config), vars(paths.language_model(model).config)
    with _kept([whole, language], "use_cache"):
        language["use_cache"] = False
        yield


@contextmanager
def _keeps_layers(model: Any) -> Iterator[None]:
    """The Trainer turns activation checkpointing on for good, with another hook on each embedding in every task, and
    leaves the strength of NEFTune's noise where a task fails."""
    names = (
        "gradient_checkpointing", "_gradient_checkpointing_func", "_require_grads_hook", "_require_grads_hooks",
        "neftune_noise_alpha",
    )  # fmt: skip
    hooks = vars(model).get("_require_grads_hooks")
    with _kept([vars(module) for module in model.modules()], *names):
        try:
            yield
        finally:
            present = vars(model).get("_require_grads_hooks")
            for hook in present if present is not None and present is not hooks else []:
                hook.remove()


@contextmanager
def _counts_as_adapted(model: Any) -> Iterator[None]:
    """The Trainer refuses a quantised base without adapters, and would know PEFT's alone."""
    with _kept([vars(model)], "_hf_peft_config_loaded"):
        if getattr(model, "is_quantized", False):
            model._hf_peft_config_loaded = True
        yield


@contextmanager
def _kept(attributes: Sequence[dict[str, Any]], *names: str) -> Iterator[None]:
    """Behind the block, the attributes of these names are what they were, or not there if they were not."""
    before = [{name: values[name] for name in names if name in values} for values in attributes]
    try:
        yield
    finally:
        for values, known in zip(attributes, before, strict=True):
            for name in names:
                values.pop(name, None)
            values.update(known)


@contextmanager
def _quiet_trainer() -> Iterator[None]:
    """Within the block the Trainer logs errors alone: it explains at length what is decided on purpose here."""
    logger = logging.getLogger("transformers.trainer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch 2.13 has a new name for it, accelerate knows the old one
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
