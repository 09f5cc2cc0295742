"""A model's processor: the one that was saved beside the weights, and how it prepares images.

LLaVA-1.5 was trained on whole images, padded to squares; the processor of its checkpoints for transformers shows the
middle of an image alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from cllava_fast.model import paths

SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_pad", "image_grid_pinpoints", "min_patches", "max_patches",
)  # fmt: skip
EDGES = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}  # of a Qwen, where set they win over size
KINDS = ("CLIPImageProcessor", "LlavaImageProcessor")  # the second is the first, and pads where it is told to


def find_processor(model: Any, **options: Any) -> Any | None:
    """The processor, or a plain language model's tokenizer, saved beside the weights; None where there is none.

    ``options`` are for transformers; by default nothing is downloaded, and a hub's name is looked up in its cache.
    """
    return processor_beside(model.name_or_path or "", paths.vision_tower(model) is not None, **options)


def processor_beside(name: str, with_images: bool, **options: Any) -> Any | None:
    """As ``find_processor``, of a model that is not loaded yet: in its folder, or under its name on a hub."""
    files = ("processor_config.json", "preprocessor_config.json") if with_images else ("tokenizer_config.json",)
    is_folder = os.path.isdir(name)
    if not name or is_folder and not any(os.path.isfile(os.path.join(name, file)) for file in files):
        return None
    from transformers import AutoProcessor, AutoTokenizer

    kind = AutoProcessor if with_images else AutoTokenizer
    try:
        return from_files(kind, name, **{"local_files_only": True, **options})
    except (OSError, ValueError):  # a language model without a tokenizer is the latter
        if is_folder:
            raise
        return None


def from_files(kind: Any, name: str, **options: Any) -> Any:
    """What ``kind`` (AutoProcessor, say) makes of a folder or a hub's repository; no code from there is run.

    Raises ModuleNotFoundError where its part for videos needs torchvision, which is not installed.
    """
    try:
        return kind.from_pretrained(name, **{**options, "trust_remote_code": False})
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise
        raise ModuleNotFoundError(
            f"the processor of {name} needs torchvision, which is not installed; install the release that fits torch "
            f"{torch.__version__}",
            name="torchvision",
        ) from error


def check_processor(model: Any, processor: Any) -> None:
    if processor is None or paths.vision_tower(model) is None or hasattr(processor, "image_processor"):
        return
    raise TypeError(
        f"processor is a {type(processor).__name__}, which has no image_processor; expected the whole processor of the "
        f"{type(model).__name__}, as transformers.AutoProcessor.from_pretrained loads it"
    )


def image_settings(processor: Any) -> dict[str, Any] | None:
    """What decides the pixels that a vision tower sees, as JSON holds it; None where no images are prepared, or by code
    of one's own that does not say how."""
    prepares: Any = getattr(processor, "image_processor", None)
    if not hasattr(prepares, "to_json_string"):
        return None
    values = json.loads(prepares.to_json_string())
    for name, edge in EDGES.items():
        if values.get(name) is not None:
            values["size"] = {**values.get("size", {}), edge: values[name]}
    return {"do_pad": False} | {name: values[name] for name in SETTINGS if values.get(name) is not None}


def follows(processor: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether it prepares images by the settings that it was loaded with: transformers drops what it does not know."""
    has = image_settings(processor) or {}
    return all(
        (has.get("size", {}).get(EDGES[name]) if name in EDGES else has.get(name)) == value
        for name, value in wanted.items()
    )


def differing(settings: Mapping[str, Any] | None, others: Mapping[str, Any] | None) -> dict[str, tuple[Any, Any]]:
    """What both say, and say differently, by name: that of ``settings`` and that of ``others``."""
    if settings is None or others is None:
        return {}
    both = {name: (settings[name], others[name]) for name in SETTINGS if name in settings and name in others}
    return {name: (one, other) for name, (one, other) in both.items() if one != other}


def prepared_otherwise(processor: Any, patched: Any) -> str:
    """What a processor has that a model was not patched with, in words; empty for nothing."""
    if getattr(processor, "chat_template", None) != getattr(patched, "chat_template", None):
        return "chat template"
    other = next(iter(differing(image_settings(processor), image_settings(patched))), "")
    return other and f"{other} of images"


def takes_padding(processor: Any) -> bool:
    return type(getattr(processor, "image_processor", None)).__name__.startswith(KINDS)


def pad_to_square(processor: Any, pads: bool = True) -> None:
    """Lets a processor show whole images, padded to squares with the mean color, in place of their middle.

    LLaVA-1.5 was trained and evaluated so (``image_aspect_ratio: pad`` in its code). Call it before ``patch``.

    Args:
        processor: of a LLaVA with a CLIP tower; its ``image_processor`` is replaced by transformers'
            ``LlavaImageProcessor`` with the same settings.
        pads: False takes it back.

    Raises:
        ValueError: it prepares no images, or in a way that takes no padding, such as cutting them into views.
    """
    prepares: Any = getattr(processor, "image_processor", None)
    kind = type(prepares).__name__
    if not takes_padding(processor):
        given = "none" if prepares is None else f"a {kind}"
        raise ValueError(
            f"the processor's image_processor is {given}; to pad images expected one of {', '.join(KINDS)}"
        )
    cls: Any
    if kind.endswith("Pil"):  # without torchvision
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil as cls
    else:
        from transformers import LlavaImageProcessor as cls
    values = {name: value for name, value in prepares.to_dict().items() if name != "image_processor_type"}
    processor.image_processor = cls(**{**values, "do_pad": pads})
