"""LLaVAs with random weights, what they have learned, and batches for them: what whole steps are measured on.

The ways of a comparison are copies of one base that share its frozen weights, so a 7B model is in memory once.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import cllava_fast as cf
from cllava_fast.model import paths

TOP_M, ROWS, RANK = 4, 8, 8  # of one task: rows selected for a sample, rows of the pool, rank of a row
CONFIG = cf.IncrementConfig(rows_per_task=ROWS, top_m=TOP_M, rank=RANK, surrogate="backbone")
TARGETS = r".*language_model\.layers\.\d+\.self_attn\.o_proj"  # where CONFIG puts increments, as PEFT says it
STRENGTH = 5e-3  # standard deviation of B: an increment is about a third of a random o_proj's output
SPECIAL = 64  # token ids at the end of the vocabulary; the first is the image's, the second is padding


class Vision(NamedTuple):
    """Widths of a CLIP tower, in transformers' words."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    projection_dim: int


class Size(NamedTuple):
    """Widths of a LLaVA, and the text of a sample: a question and an answer of `answers` tokens."""

    name: str
    d: int
    layers: int
    heads: int
    d_ff: int
    vocabulary: int
    vision: Vision
    text: int
    answers: tuple[int, int]

    @property
    def image_tokens(self) -> int:
        return (self.vision.image_size // self.vision.patch_size) ** 2


LARGE = Size(
    "LLaVA-1.5-7B", 4096, 32, 32, 11008, 32064, Vision(1024, 4096, 24, 16, 336, 14, 768), text=80, answers=(20, 56)
)
SMALL = Size("LLaVA-0.1B", 768, 12, 12, 2048, 8192, Vision(256, 512, 4, 4, 112, 14, 256), text=64, answers=(20, 48))
TINY = Size("LLaVA-tiny", 64, 2, 4, 128, 512, Vision(32, 64, 1, 2, 28, 14, 32), text=16, answers=(4, 8))


def size_for(device: str, quick: bool) -> Size:
    return TINY if quick else SMALL if device == "cpu" else LARGE


@functools.lru_cache(maxsize=1)
def base(size: Size, dtype: torch.dtype, device: str) -> Any:
    """The frozen model, made on its device and in its dtype, never in another."""
    image_token = size.vocabulary - SPECIAL
    special = {"pad_token_id": image_token + 1, "bos_token_id": 1, "eos_token_id": 2}
    text = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.d, intermediate_size=size.d_ff, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, max_position_embeddings=4096,
        rms_norm_eps=1e-5, tie_word_embeddings=False, **special,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size.vision._asdict()), text_config=text, image_token_index=image_token,
        image_seq_length=size.image_tokens, tie_word_embeddings=False, **special,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    # an answer without an end has a fixed length; random weights may say the image's token
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=image_token + 1, eos_token_id=None, suppress_tokens=[image_token]
    )
    return model.requires_grad_(False).eval()


def share(model: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy to patch: its modules are its own, its weights the model's very tensors (or new ones of `dtype`)."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for weight in model.parameters():
        memo[id(weight)] = weight if dtype is None else nn.Parameter(weight.detach().to(dtype), requires_grad=False)
    return copy.deepcopy(model, memo)


def takes_features(model: Any) -> Any:
    """Lets projected image features pass in place of pixels, as they do in a patched model."""
    model.model.get_image_features = _pass_features
    return model


def _pass_features(pixel_values: Tensor, *_: Any, **__: Any) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(pooler_output=list(pixel_values))


def adapted(model: Any) -> dict[str, nn.Module]:
    return paths.adapted_linears(model, CONFIG.targets)


def adapt(model: Any, function: Callable[[str, Tensor, Tensor], Tensor]) -> Any:
    """`function(path, weight, x)` in place of every adapted linear."""
    for path, linear in adapted(model).items():
        linear.forward = functools.partial(function, path, linear.weight)
    return model


def watch_embeddings(model: Any) -> Callable[[], list[Tensor]]:
    """Makes the input embeddings want a gradient; gives those of the last forward."""
    last: list[Tensor] = []

    def hook(module: nn.Module, args: Any, embeddings: Tensor) -> None:
        last[:] = [embeddings.requires_grad_()]

    model.get_input_embeddings().register_forward_hook(hook)
    return lambda: last


def checkpoint(model: Any, on: bool) -> None:
    """Activation checkpointing by its name in this version of transformers."""
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    if on:
        getattr(model, f"{name}_enable")({"use_reentrant": False})
    else:
        getattr(model, f"{name}_disable")()


@functools.lru_cache(maxsize=1)
def patched(model: Any, tasks: int, learning: bool) -> Any:
    """A patched copy that has learned `tasks` tasks; `learning`: and is somewhere in the middle of the next one."""
    model = cf.patch(share(model), CONFIG)
    pool, rng = model.increments.pool, torch.Generator().manual_seed(1)
    for task in range(tasks + learning):
        keys = nn.functional.normalize(torch.randn(ROWS, pool.key_dim, generator=rng), dim=1)
        pool.open_block(ROWS, keys=keys, a_std=CONFIG.a_std, context_init=CONFIG.context_init, generator=rng)
        with torch.no_grad():
            for factors in pool.layers.values():
                factors.block_B.copy_(STRENGTH * torch.randn(factors.block_B.shape, generator=rng))
        if task < tasks:
            pool.commit(f"task {task}", torch.rand(ROWS, generator=rng))
    pool.train_keys(False)
    return model.train(learning)


def batch(size: Size, samples: int, keys: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Keyword arguments of a patched model: unpadded, a label on each token of the answer, and a query near `TOP_M`
    of the keys `[N, D]`, others for each sample."""
    rng, device = torch.Generator().manual_seed(2), keys.device
    question = torch.randint(3, size.vocabulary - SPECIAL, (samples, size.text), generator=rng)
    image = torch.full((samples, size.image_tokens), size.vocabulary - SPECIAL)
    input_ids = torch.cat([question[:, :2], image, question[:, 2:]], 1)  # [B, S]
    answers = torch.randint(size.answers[0], size.answers[1] + 1, (samples, 1), generator=rng)
    asked = torch.arange(input_ids.shape[1]) < input_ids.shape[1] - answers
    near = torch.stack([torch.randperm(len(keys), generator=rng)[:TOP_M] for _ in range(samples)])  # [B, M]
    strength = torch.linspace(0.6, 1.0, TOP_M)[:, None].to(device)
    query = nn.functional.normalize((strength * keys[near.to(device)]).sum(1), dim=1)  # [B, D]
    features = torch.randn(samples, size.image_tokens, size.d, generator=rng) * 0.02  # as loud as the text
    found = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    found["labels"] = input_ids.masked_fill(asked, -100)
    found["image_features"] = features.to(dtype)
    return {name: tensor.to(device) for name, tensor in found.items()} | {"query": query}


def plain(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same for a model that `takes_features` and does not select."""
    rest = {name: tensor for name, tensor in inputs.items() if name not in ("image_features", "query")}
    return rest | {"pixel_values": inputs["image_features"]}
