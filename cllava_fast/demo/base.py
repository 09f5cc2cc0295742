"""The demo's base model: a LLaVA of about a million parameters, loaded from the files beside this one."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from cllava_fast.demo.images import SIZE
from cllava_fast.demo.tokenizer import PATCH

FOLDER = Path(__file__).resolve().parent / "base"


def load_base(path: str | Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The base model, in evaluation mode on the CPU, and its processor.

    Args:
        path: a folder that ``cllava_fast.demo.pretrain`` wrote; by default the one that comes with the package.
    """
    folder = Path(path) if path is not None else FOLDER
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"no base model in {folder}; write one by python -m cllava_fast.demo.pretrain")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), LlavaProcessor.from_pretrained(folder, local_files_only=True)


def new_base(processor: LlavaProcessor, seed: int) -> LlavaForConditionalGeneration:
    """The base before it has learned anything."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, image_size=SIZE,
        patch_size=PATCH, projection_dim=128, initializer_range=0.08,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, initializer_range=0.08, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, **special,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIZE // PATCH) ** 2, vision_feature_layer=-1, vision_feature_select_strategy="default",
        tie_word_embeddings=False, **special,
    )  # fmt: skip
    config.initializer_range = 0.08
    model = LlavaForConditionalGeneration(config)
    # patches look alike to a young tower: where they are must be loud
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.4)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, max_new_tokens=16, do_sample=False, **special
    )
    return model
