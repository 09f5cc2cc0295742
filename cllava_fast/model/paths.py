"""Where the parts of a transformers LLaVA are. Nothing else in the tree knows module paths."""

from __future__ import annotations

import transformers
from torch import nn

LAYERS = "model.language_model.layers"


def check_is_llava(model: object) -> None:
    """Raises TypeError for anything but a ``LlavaForConditionalGeneration``, with what to do about it."""
    if isinstance(model, transformers.LlavaForConditionalGeneration):
        return
    name = type(model).__name__
    if hasattr(model, "peft_config"):
        raise TypeError(f"model is a {name} with PEFT adapters; merge_and_unload() them first, then patch the base")
    hint = "; pass the unwrapped model" if isinstance(getattr(model, "module", None), nn.Module) else ""
    raise TypeError(f"model is a {name}; expected transformers.LlavaForConditionalGeneration{hint}")


def adapted_linears(model: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """The linears that ``targets`` name in every language layer, by path.

    A target is the path behind the layer's number, such as ``"self_attn.o_proj"``: the vision tower, which has
    ``q_proj`` and the like too, can never match.

    Raises:
        ValueError: a target that some layer lacks, or that is no linear.
    """
    found: dict[str, nn.Module] = {}
    for number, layer in enumerate(model.get_submodule(LAYERS).children()):
        names = dict(layer.named_modules())
        for target in targets:
            if target not in names or not target:
                linears = [name for name, module in names.items() if hasattr(module, "in_features")]
                raise ValueError(f"target {target!r} is not in {LAYERS}.{number}; expected one of {linears}")
            module = names[target]
            if not hasattr(module, "in_features") or not hasattr(module, "out_features"):
                raise ValueError(f"target {target!r} is a {type(module).__name__}; expected a linear layer")
            found[f"{LAYERS}.{number}.{target}"] = module
    return found


def attentions(model: nn.Module) -> list[nn.Module]:
    """The self-attention of every language layer: the first module of a layer that is handed the forward's kwargs."""
    return [layer.get_submodule("self_attn") for layer in model.get_submodule(LAYERS).children()]


def language_model(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.language_model")


def output_head(model: nn.Module) -> nn.Module:
    return model.get_submodule("lm_head")


def vision_tower(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.vision_tower")


def vision_width(model: nn.Module) -> int:
    """Width of the vision tower's last hidden state."""
    return vision_tower(model).config.hidden_size  # type: ignore[union-attr,return-value]


def input_embedding(model: nn.Module) -> nn.Embedding:
    return model.get_input_embeddings()  # type: ignore[operator]
