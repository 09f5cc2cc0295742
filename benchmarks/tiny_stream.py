"""What the long stream and the soak learn: many small tasks for a LLaVA whose cost lies in the library, not in itself.

Task k asks for the colour of a plain image in words of its own, and every task reads the colours in another way.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import cllava_fast as cf
from cllava_fast.demo.images import SIZE
from cllava_fast.demo.tokenizer import PATCH, build_processor

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
THINGS = ("shape", "bar", "digit", "box", "form", "number", "chart", "circle", "square", "picture")
DOCS = Path(__file__).resolve().parents[1] / "docs" / "long-streams.md"
METHOD: dict[str, Any] = dict(rows_per_task=8, top_m=4, rank=4, a_std=0.1, scale=4.0, surrogate="backbone")


def new_model() -> tuple[Any, Any]:
    """A LLaVA with random weights, and its processor."""
    processor = build_processor()
    tokenizer = processor.tokenizer
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=SIZE,
        patch_size=PATCH, projection_dim=32, initializer_range=0.08,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, initializer_range=0.08,
        tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id, **special,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIZE // PATCH) ** 2, vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=False, **special,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval(), processor


def tiny_task(number: int, train: int = 16, test: int = 4) -> cf.Task:
    """Two words of its question are the task's own; the answers are the colours, turned around by its number."""
    thing, other = THINGS[number % 10], THINGS[number // 10 % 10]
    question = f"what color is the {thing} beside {other} {number // 100}?"
    names = list(COLORS)
    images = {name: Image.new("RGB", (SIZE, SIZE), rgb) for name, rgb in COLORS.items()}

    def sample(i: int) -> cf.Sample:
        return cf.Sample(question, names[(i + number) % 4], images[names[i % 4]])

    return cf.Task(f"task{number}", [sample(i) for i in range(train)], [sample(i) for i in range(test)])


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
