"""Which transformers models can be patched, and where their parts are. Nothing else in the tree knows module paths but
``clip.py``, of a CLIP.

A new base is one row of ``BASES``, if every language layer hands the forward's keyword arguments to its ``self_attn``;
the tests in ``tests/test_bases.py`` check the rest for every row.
"""

from __future__ import annotations

import fnmatch
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Base(NamedTuple):
    """Where a class of transformers keeps its parts.

    Attributes:
        layers: path of the language layers.
        vision_tower: path of the vision tower; None for a model that takes no images.
        takes_features: projected image features, all of one shape, may pass in place of pixels.
        packs_images: the tower takes the tiles or patches of all images as one sequence.
    """

    layers: str
    vision_tower: str | None = None
    takes_features: bool = False
    packs_images: bool = False


_LLAVA_LAYERS, _LLAVA_TOWER = "model.language_model.layers", "model.vision_tower"

BASES = {
    "LlavaForConditionalGeneration": Base(_LLAVA_LAYERS, _LLAVA_TOWER, takes_features=True),
    # these make another number of tokens of each image
    "LlavaNextForConditionalGeneration": Base(_LLAVA_LAYERS, _LLAVA_TOWER),
    "LlavaNextVideoForConditionalGeneration": Base(_LLAVA_LAYERS, _LLAVA_TOWER),
    "LlavaOnevisionForConditionalGeneration": Base(_LLAVA_LAYERS, _LLAVA_TOWER),
    # and this one wants its features as a tensor
    "VipLlavaForConditionalGeneration": Base(_LLAVA_LAYERS, _LLAVA_TOWER),
    "Qwen2VLForConditionalGeneration": Base(_LLAVA_LAYERS, "model.visual", packs_images=True),
    "Qwen2_5_VLForConditionalGeneration": Base(_LLAVA_LAYERS, "model.visual", packs_images=True),
    "Qwen3VLForConditionalGeneration": Base(_LLAVA_LAYERS, "model.visual", packs_images=True),
    "InternVLForConditionalGeneration": Base(_LLAVA_LAYERS, _LLAVA_TOWER, packs_images=True),
    "LlamaForCausalLM": Base("model.layers"),
    "MistralForCausalLM": Base("model.layers"),
    "Qwen2ForCausalLM": Base("model.layers"),
    "Qwen3ForCausalLM": Base("model.layers"),
}

HAND_NOTHING_ON = ("nemotron", "stablelm")  # language models whose layers keep a forward's keyword arguments


def base_of(model: object) -> Base:
    """The row of ``BASES`` for a model. Raises TypeError for one without a row, with what to do about it."""
    # by name, so that no modeling file is imported for the asking
    kinds = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models.")]
    for kind in kinds:
        if kind in BASES:
            return BASES[kind]
    name = type(model).__name__
    if hasattr(model, "peft_config"):
        raise TypeError(f"model is a {name} with PEFT adapters; merge_and_unload() them first, then patch the base")
    # by DistributedDataParallel and its like, or by torch.compile
    wrapped = any(isinstance(getattr(model, attribute, None), nn.Module) for attribute in ("module", "_orig_mod"))
    hint = "; pass the unwrapped model" if wrapped else ""
    if kinds:
        hint = "; another class with Llama-like layers is one row of cllava_fast.model.paths.BASES (docs/models.md)"
    *names, last = BASES
    raise TypeError(f"model is a {name}; expected transformers.{', '.join(names)} or {last}{hint}")


def check_supported(model: object) -> None:
    """Raises TypeError as ``base_of`` does, for language layers among ``HAND_NOTHING_ON``, for a vision tower that
    packs images into one sequence and for linears without tensors, and ValueError for weights that cannot be tuned
    through any more."""
    base_of(model)
    assert isinstance(model, nn.Module)
    language: Any = language_model(model)
    if language.config.model_type in HAND_NOTHING_ON:
        raise TypeError(
            f"the language model is a {type(language).__name__}, whose layers do not hand their keyword arguments to "
            "their self_attn, and no increments would act; expected Llama-like layers"
        )
    tower = vision_tower(model)
    if tower is not None and tower.config.model_type == "pixtral":
        raise TypeError(
            f"the vision tower is a {type(tower).__name__}, which packs images of all sizes into one sequence; "
            "expected one of CLIP's kind"
        )
    for path, module in model.named_modules():
        if _is_linear(module):
            execution_device(module)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has repacked {path} for inference on this CPU, and no gradient passes it any more; "
                "load the model again and patch it before it is first used"
            )


def repacked_on_cpu(model: nn.Module) -> list[Any]:
    """4-bit linears of bitsandbytes that would repack their weight at their first use in evaluation on this CPU.

    A switch of theirs, ``support_avx512bf16_for_cpu``, keeps them from it.
    """
    return [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]


def adapted_linears(model: nn.Module, targets: tuple[str, ...], first: int | None = None) -> dict[str, nn.Module]:
    """The linears that ``targets`` name in every language layer, or in the ``first`` ones alone, by path.

    A target is the path behind the layer's number (``"self_attn.o_proj"``), a shell-style pattern of such paths
    (``"self_attn.*_proj"``, ``"mlp.*"``), or a linear's own name (``"q_proj"``). Only language layers are searched: the
    vision tower, which has ``q_proj`` and the like too, can never match.

    Raises:
        ValueError: a target that some layer lacks, or that is no linear.
        TypeError: as ``attentions`` does.
    """
    found: dict[str, nn.Module] = {}
    layers = base_of(model).layers
    for number, layer in enumerate(_layers(model)[:first]):
        modules = dict(layer.named_modules())
        linears = [path for path, module in modules.items() if _is_linear(module)]
        for target in targets:
            paths = [path for path in linears if target in (path, path.rpartition(".")[2])]
            paths = paths or fnmatch.filter(linears, target)
            if not paths and target and target in modules:
                raise ValueError(f"target {target!r} is a {type(modules[target]).__name__}; expected a linear layer")
            if not paths:
                raise ValueError(f"target {target!r} is not in {layers}.{number}; expected one of {linears}")
            found.update((f"{layers}.{number}.{path}", modules[path]) for path in paths)
    return found


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear is ``nn.Linear`` with an ordinary weight: not wrapped, and not quantised.

    Quantised weights come as a class of linear (bitsandbytes) or as a class of tensor (torchao).
    """
    return type(linear) is nn.Linear and type(linear.weight) is nn.Parameter


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weight is, or, if that is offloaded, where accelerate brings it.

    Raises TypeError for a module that holds no tensor.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):  # quantised, and packed under other names
        weight = next(chain(module.parameters(), module.buffers()), None)
    if weight is None:
        raise TypeError(f"a {type(module).__name__} holds no tensor, and no gradient would pass it; load another base")
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None) if weight.is_meta else None
    if device is None:
        return weight.device
    return torch.device(device)


def attentions(model: nn.Module) -> list[nn.Module]:
    """The self-attention of every language layer: the first module of a layer that is handed the forward's kwargs.

    Raises TypeError for a language model without any.
    """
    return [layer.get_submodule("self_attn") for layer in _layers(model)]


def _layers(model: nn.Module) -> list[nn.Module]:
    language, name = language_model(model), base_of(model).layers.rpartition(".")[2]
    if not hasattr(language, name):
        raise TypeError(
            f"language layers are not in {name} of the {type(language).__name__}; expected Llama-like layers"
        )
    layers = list(language.get_submodule(name).children())
    missing = [type(layer).__name__ for layer in layers if not hasattr(layer, "self_attn")]
    if missing:
        raise TypeError(f"language layers are {missing[0]}s without a self_attn; expected Llama-like layers")
    return layers


def query_projection(attention: nn.Module) -> nn.Module:
    """The module of an attention that puts out its queries, before positions are added.

    Raises TypeError for an attention that projects queries, keys and values by one linear.
    """
    if not hasattr(attention, "q_proj"):
        names = [name for name, _ in attention.named_children()]
        raise TypeError(f"a {type(attention).__name__} has no q_proj, but {names}; expected a linear for queries alone")
    # a norm of queries belongs to them
    return attention.get_submodule("q_norm" if hasattr(attention, "q_norm") else "q_proj")


def language_model(model: nn.Module) -> nn.Module:
    """The module that holds the language layers."""
    return model.get_submodule(base_of(model).layers.rpartition(".")[0])


def beside_language_model(model: Any) -> list[nn.Module]:
    """Vision tower, projector and parameters that no part has, such as the end of a row of an image; nothing of a plain
    language model."""
    language = language_model(model)
    if language is model.model:
        return []
    parts = [part for part in model.model.children() if part is not language]
    return [*parts, nn.ParameterList(model.model.parameters(recurse=False))]


def output_head(model: nn.Module) -> nn.Module:
    return model.get_output_embeddings()  # type: ignore[operator]


def vision_tower(model: nn.Module) -> Any:
    """None for a model that takes no images."""
    path = base_of(model).vision_tower
    return None if path is None else model.get_submodule(path)


def input_embedding(model: nn.Module) -> nn.Embedding:
    return model.get_input_embeddings()  # type: ignore[operator]
