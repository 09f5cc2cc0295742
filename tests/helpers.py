"""What tests of the patched model share: inputs, and pools that have learned something."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from cllava_fast.model import get_increments

_before_5_24 = "cache" not in inspect.signature(LlavaForConditionalGeneration.forward).parameters
CACHE_NAMES = ("cache", "past_key_values")[_before_5_24:]  # that the installed transformers takes

QUESTIONS = (
    "which bar is the tallest?",
    "what color is the shape?",
    "which digit is written here?",
    "is the box ticked?",
    "how many bars are there?",
    "is the number shown greater than five?",
)


def cached(cache: Any) -> dict[str, Any]:
    """The cache as a model's argument, under the name that the installed transformers has for it."""
    return {CACHE_NAMES[0]: cache}


def image(generator: torch.Generator) -> Any:
    from PIL import Image

    pixels = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def prompt(processor: Any, question: str, with_image: bool = True) -> str:
    content = [{"type": "text", "text": question}]
    if with_image:
        content.insert(0, {"type": "image"})
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )


def inputs(
    processor: Any, questions: tuple[str, ...], generator: torch.Generator, side: str = "left"
) -> dict[str, Any]:
    """One random image and one question a sample, padded on ``side``."""
    return dict(
        processor(
            text=[prompt(processor, question) for question in questions],
            images=[image(generator) for _ in questions],
            return_tensors="pt",
            padding=True,
            padding_side=side,
        )
    )


def take(batch: dict[str, Any], i: int) -> dict[str, Any]:
    """Sample i without its padding."""
    mask = batch["attention_mask"][i].bool()
    return {
        "input_ids": batch["input_ids"][i : i + 1, mask],
        "attention_mask": batch["attention_mask"][i : i + 1, mask],
        "pixel_values": batch["pixel_values"][i : i + 1],
    }


def logits(model: Any, batch: dict[str, Any], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **options).logits


def last_logits(model: Any, batch: dict[str, Any], **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **kwargs).logits[:, -1]


def selected(model: Any, batch: dict[str, Any], **kwargs: Any) -> Tensor:
    """``[B, M]`` rows that acted in the layers, recorded where they act."""
    seen = []
    increments = get_increments(model)
    inject = increments.inject

    def record(*args: Any) -> Tensor:
        seen.append(increments.call.active.index)
        return inject(*args)

    increments.inject = record  # type: ignore[method-assign]
    try:
        last_logits(model, batch, **kwargs)
    finally:
        del increments.inject
    return seen[0]


def learn(model: Any, tasks: int, generator: torch.Generator, b_std: float = 0.02, commit_last: bool = True) -> Any:
    """Commits tasks with random increments, with keys at the questions, as if they had been trained."""
    increments = get_increments(model)
    for _ in range(tasks):
        task = increments.pool.num_tasks
        queries = torch.randn(40, increments.pool.key_dim, generator=generator)
        if increments.surrogate is not None and increments.reader is not None:
            texts = [increments.reader.canonical(q) for q in QUESTIONS]
            queries = increments.surrogate.query(texts)[:, : increments.pool.key_dim]
        increments.method.open_task(increments.pool, queries, generator)
        pool = increments.pool
        if pool.block_keys is not None:
            pool.block_keys.data += 0.3 * torch.randn(pool.block_keys.shape, generator=generator) / pool.key_dim**0.5
        if pool.block_context is not None:
            torch.nn.init.normal_(pool.block_context, std=0.5, generator=generator)
        for factors in pool.layers.values():
            torch.nn.init.normal_(factors.block_B, std=b_std, generator=generator)
        if commit_last or task < tasks - 1:
            increments.close_task(f"task{task}", queries)
    return increments


def at_once(attentions: list[Any], *calls: Callable[[], Any]) -> list[Any]:
    """What ``calls`` return in a thread each, which wait for each other in the middle of every attention."""
    barrier = Barrier(len(calls), timeout=20)

    def wait(*_: Any) -> None:
        barrier.wait()

    hooks = [part.v_proj.register_forward_pre_hook(wait) for part in attentions]
    try:
        with ThreadPoolExecutor(len(calls)) as threads:
            return [future.result() for future in [threads.submit(call) for call in calls]]
    finally:
        for hook in hooks:
            hook.remove()
