"""Tiny random models of every class in ``paths.BASES``, and their processors.

Widths are multiples of 64, as 4-bit weights on a CPU want them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CLIPVisionConfig, GenerationConfig, SiglipVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from cllava_fast.demo.tokenizer import CHAT_TEMPLATE, build_tokenizer

SIDE, PATCH = 32, 16  # pixels: 4 tokens a view, and images of other sizes have more views
MERGE = 2  # patches on a side of one token, of a Qwen
VIEWS = [[32, 64], [64, 32], [64, 64]]
STD = 0.15  # of weights: loud enough that an increment moves the answer
TEXT_OF = {"LlavaOnevision": "Qwen2", "LlavaNextVideo": "Mistral", "InternVL": "Qwen2"}
VIDEO = "glyph"  # a word that no question of the tests holds
QWEN = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
QWEN_WORDS = {
    "image": "<image>", "video": VIDEO, "vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>",
}  # fmt: skip
QWEN_TEMPLATE = CHAT_TEMPLATE.replace("<image>", "<|vision_start|><image><|vision_end|>")
# of an InternVL, whose processor writes marks around an image's tokens
INTERN_WORDS = {"context_image": "<image>", "start_image": "<img>", "end_image": "</img>", "video": VIDEO}
FOR_IMAGES, FOR_TEXT = "ForConditionalGeneration", "ForCausalLM"


class _WithoutVideos:
    """Of a processor whose part for videos needs torchvision."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        return None if argument is None else super().check_argument_for_proper_class(name, argument)  # type: ignore[misc]


class _OnevisionImages(_WithoutVideos, transformers.LlavaOnevisionProcessor):
    pass


class _QwenImages(_WithoutVideos, transformers.Qwen2_5_VLProcessor):
    """Of every kind of Qwen, whose processors differ in videos alone."""


class _InternImages(_WithoutVideos, transformers.InternVLProcessor):
    pass


def new_processor(name: str) -> Any:
    """A processor, or for a model without images a tokenizer whose template knows text alone."""
    tokenizer = build_tokenizer()
    if name.endswith(FOR_TEXT):
        tokenizer.chat_template = (
            "{% for m in messages %}{{ ('USER: ' if m['role'] == 'user' else 'ASSISTANT: ') + m['content'] + ' ' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
        )
        return tokenizer
    looks = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    square = dict(height=SIDE, width=SIDE)
    if name.startswith("LlavaOnevision"):
        images = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=VIEWS, **looks)
        return _OnevisionImages(
            images, tokenizer, num_image_tokens=(SIDE // PATCH) ** 2, vision_feature_select_strategy="full",
            chat_template=CHAT_TEMPLATE,
        )  # fmt: skip
    if name.startswith(QWEN):
        marks = [f"<|{name}|>" for name in ("vision_start", "vision_end")]
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
        tokenizer.video_token = VIDEO
        # pixels: two tokens on a side at least, so that what stands behind an image moves up, and several windows
        bounds = dict(shortest_edge=4 * SIDE**2, longest_edge=16 * SIDE**2)
        images = Qwen2VLImageProcessorPil(size=bounds, patch_size=PATCH, merge_size=MERGE, **looks)
        return _QwenImages(images, tokenizer, chat_template=QWEN_TEMPLATE)
    if name.startswith("InternVL"):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<img>", "</img>"]})
        for kind, word in INTERN_WORDS.items():
            setattr(tokenizer, f"{kind}_token", word)
            setattr(tokenizer, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(word))
        images = GotOcr2ImageProcessorPil(size=square, max_patches=4, **looks)
        tokens = (SIDE // PATCH) ** 2 // MERGE**2
        return _InternImages(images, tokenizer, image_seq_length=tokens, chat_template=CHAT_TEMPLATE)
    many = name.startswith("LlavaNext")
    views = dict(image_grid_pinpoints=VIEWS) if many else {}
    kind = LlavaNextImageProcessorPil if many else CLIPImageProcessorPil
    images = kind(size=square, crop_size=square, do_center_crop=False, **looks, **views)
    processor = transformers.LlavaNextProcessor if many else transformers.LlavaProcessor
    return processor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def new_model(name: str, processor: Any, language: str | None = None) -> Any:
    """The same random weights each time; grouped queries; two layers; of another language model where one is named."""
    torch.manual_seed(0)
    tokenizer = getattr(processor, "tokenizer", processor)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    stem = name.removesuffix(FOR_IMAGES).removesuffix(FOR_TEXT)
    language = language or (stem if name.endswith(FOR_TEXT) else TEXT_OF.get(stem, "Llama"))
    sizes = dict(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        initializer_range=STD, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id, **special,
    )  # fmt: skip
    text = getattr(transformers, f"{language}Config")(**sizes)
    if stem in QWEN:
        config = _qwen(stem, sizes, tokenizer, special)
    elif stem == "InternVL":
        config = _intern(text, tokenizer, special)
    else:
        config = text if name.endswith(FOR_TEXT) else _with_vision(stem, text, tokenizer, special)
    model = getattr(transformers, name)(config)
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, do_sample=False, **special)
    return model.eval()


def _qwen(stem: str, text: Any, tokenizer: Any, special: dict[str, int]) -> Any:
    vision: dict[str, Any] = dict(
        depth=2, num_heads=2, patch_size=PATCH, spatial_merge_size=MERGE, initializer_range=STD
    )
    if stem == "Qwen2VL":
        vision |= dict(embed_dim=128, hidden_size=64, mlp_ratio=2)
    else:
        vision |= dict(hidden_size=64, intermediate_size=128, out_hidden_size=64)
    if stem == "Qwen3VL":
        vision |= dict(num_position_embeddings=16, deepstack_visual_indexes=[0])
    if stem == "Qwen2_5_VL":
        vision |= dict(window_size=2 * MERGE * PATCH, fullatt_block_indexes=[1])
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}  # halves of a head
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(word) for kind, word in QWEN_WORDS.items()}
    return getattr(transformers, f"{stem}Config")(
        vision_config=vision, text_config={**text, "rope_parameters": rope}, tie_word_embeddings=False, **ids, **special
    )


def _intern(text: Any, tokenizer: Any, special: dict[str, int]) -> Any:
    vision = transformers.InternVLVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, initializer_range=STD, layer_scale_init_value=1.0,
    )  # fmt: skip
    return transformers.InternVLConfig(
        vision_config=vision, text_config=text, downsample_ratio=1 / MERGE, tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), **special,
    )  # fmt: skip


def _with_vision(stem: str, text: Any, tokenizer: Any, special: dict[str, int]) -> Any:
    siglip = stem == "LlavaOnevision"
    vision = (SiglipVisionConfig if siglip else CLIPVisionConfig)(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, initializer_range=STD, **({"vision_use_head": False} if siglip else {"projection_dim": 64}),
    )  # fmt: skip
    options: dict[str, Any] = {"vision_feature_layer": -1}
    if stem in ("Llava", "LlavaNext", "LlavaNextVideo"):
        options.update(vision_feature_select_strategy="default", image_seq_length=(SIDE // PATCH) ** 2)
    if stem not in ("Llava", "VipLlava"):
        options["image_grid_pinpoints"] = VIEWS
    if stem in ("LlavaNextVideo", "LlavaOnevision"):
        options["video_token_index"] = tokenizer.convert_tokens_to_ids(VIDEO)
    if stem == "VipLlava":
        old = "vision_feature_layers"  # its name in older releases of transformers
        name = old if old in transformers.VipLlavaConfig.__annotations__ else "vision_feature_layer"
        options = {name: [-2, -1]}
    return getattr(transformers, f"{stem}Config")(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False, initializer_range=STD, **options, **special,
    )  # fmt: skip
