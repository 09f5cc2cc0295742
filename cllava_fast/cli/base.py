"""The base model and its processor, by transformers' own Auto classes. Code that comes with weights is never run."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, BitsAndBytesConfig

from cllava_fast import distributed
from cllava_fast.config import ModelConfig
from cllava_fast.data.conversation import chat_template
from cllava_fast.data.encode import Encoder
from cllava_fast.environment import require
from cllava_fast.methods import MethodConfig
from cllava_fast.model.card import is_repo_id
from cllava_fast.model.hub import auto_class
from cllava_fast.model.paths import BASES, adapted_linears, check_supported
from cllava_fast.model.processors import follows, from_files, image_settings, pad_to_square


def check_base(config: ModelConfig, method: MethodConfig) -> None:
    """Refuses what ``load_base`` could not load or ``method`` not adapt, by the model's configuration alone.

    Raises:
        FileNotFoundError: neither a folder nor a model of the hub.
        ValueError: no model that transformers knows, the method's targets are no linears of it, or it is to be loaded
            on a GPU that is not here.
        TypeError: a model that ``cllava_fast.patch`` does not take.
        ModuleNotFoundError: the quantisation needs a package that is not installed.
    """
    base = model_config(config)
    if any(name.startswith("LlavaLlama") for name in base.architectures or ()):
        raise TypeError(
            f"model.path is {config.path!r}, a checkpoint in the format of LLaVA's own code; expected one in that of "
            "transformers, such as llava-hf/llava-1.5-7b-hf"
        )
    cls = auto_class(base)._model_mapping.get(type(base), None)
    if cls is None or cls.__name__ not in BASES:
        name = base.model_type if cls is None else cls.__name__
        raise TypeError(f"model.path is {config.path!r}, a {name}; expected one of {', '.join(BASES)}")
    gpu = re.fullmatch(r"cuda(?::(\d+))?", config.device_map or "")
    present = torch.cuda.device_count()
    if gpu and int(gpu[1] or 0) >= present:
        raise ValueError(
            f"model.device_map is {config.device_map!r}, and torch finds {present} CUDA devices here; leave it out for "
            "the first of them, or the CPU without any"
        )
    if config.quantization is not None:
        require("bitsandbytes", f"model.quantization={config.quantization}")
    with torch.device("meta"):
        model = auto_class(base).from_config(base)
    check_supported(model)
    adapted_linears(model, method.targets)


def load_base(config: ModelConfig, processor: Any = None) -> tuple[Any, Any]:
    """The model in evaluation mode, and its processor (a tokenizer, for a text-only model), the given one if any.

    Raises:
        ValueError: a processor that cannot encode, such as one without a chat template; before weights are loaded.
    """
    processor = load_processor(config) if processor is None else processor
    Encoder(processor)
    options: dict[str, Any] = {
        "dtype": config.dtype,
        "trust_remote_code": False,
        "use_safetensors": True,
        "device_map": config.device_map or {"": default_device()},
    }
    if config.attn_implementation is not None:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization == "8bit":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif config.quantization == "4bit":
        compute = torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
        )
    model = auto_class(model_config(config)).from_pretrained(_path(config), **options)
    return model.eval(), processor


def load_processor(config: ModelConfig) -> Any:
    """With the template and the images that ``config`` asks for. Raises ValueError for one that cannot be loaded, or
    lacks what is asked for, ModuleNotFoundError for one that needs torchvision where that is not installed."""
    try:
        # copied: a Qwen's writes max_pixels into the size that it is given
        processor = from_files(AutoProcessor, _path(config), **copy.deepcopy(config.image_settings))
    except (OSError, ValueError) as error:
        _refuse_code(config, error)
        raise ValueError(
            f"model.path is {config.path!r}, and its processor cannot be loaded: {_first_sentence(error)}; expected "
            "the files that processor.save_pretrained writes, beside the model's config.json"
        ) from error
    if not follows(processor, config.image_settings):
        raise ValueError(
            f"model.image_settings is {config.image_settings}, and the base's image processor has "
            f"{image_settings(processor)}; expected other values of what stands there"
        )
    if config.conversation != "template":
        # set here, training, the reading of instructions and serving all speak it
        processor.chat_template = chat_template(config.conversation)
    if config.image_aspect_ratio == "pad":
        pad_to_square(processor)
    if config.image_settings:
        _check_prepares(processor, config)
    return processor


def _check_prepares(processor: Any, config: ModelConfig) -> None:
    """Transformers looks at settings when an image is prepared, in a run behind the weights."""
    image = Image.new("RGB", (448, 224), "gray")  # sides of whole patches for a Qwen that does not resize
    try:
        pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
        problem = None if pixels.isfinite().all() else "pixels that are no finite numbers"
    except Exception as error:  # whatever its arithmetic meets
        problem = f"{type(error).__name__}: {_first_sentence(error)}"
    if problem is not None:
        raise ValueError(
            f"model.image_settings is {config.image_settings}, and an image prepared so ends in {problem}; expected "
            "values such as those in the base's processor_config.json or preprocessor_config.json"
        )


def default_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    return distributed.device() if torch.cuda.is_available() else torch.device("cpu")


def _path(config: ModelConfig) -> str:
    """A hub's name, or a folder's in full: what a run saves says which base it belongs to."""
    path = Path(os.path.expanduser(config.path))
    return config.path if is_repo_id(config.path) and not path.is_dir() else str(path.resolve())


def model_config(config: ModelConfig) -> Any:
    path = _path(config)
    if Path(path).is_absolute() and not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(
            f"model.path: {path}/config.json does not exist; expected a model's folder: give --model PATH"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except ValueError as error:
        _refuse_code(config, error)
        raise ValueError(
            f"model.path is {config.path!r}, and transformers makes no model of its config.json: "
            f"{_first_sentence(error)}; expected one of {', '.join(BASES)}"
        ) from error
    except OSError as error:
        if Path(path).is_absolute():
            raise ValueError(f"model.path: {path}/config.json cannot be read: {_first_sentence(error)}") from error
        raise FileNotFoundError(
            f"model.path is {config.path!r}, which is no folder here, and the hub does not give it: "
            f"{_first_sentence(error)}"
        ) from error


def _refuse_code(config: ModelConfig, error: Exception) -> None:
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"model.path is {config.path!r}, which brings code of its own (auto_map), and code of others is never run "
            f"here; expected one of transformers' own classes, {', '.join(BASES)}: give a checkpoint in their format"
        ) from None


def _first_sentence(error: Exception) -> str:
    return re.split(r"\.\s|\n", str(error).strip(), maxsplit=1)[0].rstrip(".: ")
