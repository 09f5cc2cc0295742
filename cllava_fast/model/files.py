"""``save_pretrained`` and ``load_pretrained``: the learned increments as a folder, without the base model."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor
from transformers import BitsAndBytesConfig

from cllava_fast import distributed
from cllava_fast.atomic import DamagedError, MissingError, check_replaceable, new_folder
from cllava_fast.methods import MethodConfig, config_from_dict
from cllava_fast.model import paths
from cllava_fast.model.card import EXACT, increments_card, is_repo_id
from cllava_fast.model.patching import (
    check_not_merged,
    check_nothing_over,
    get_increments,
    patch,
    unpatch,
)
from cllava_fast.model.processors import differing, find_processor, image_settings, pad_to_square, takes_padding
from cllava_fast.names import brief, check_names, check_types
from cllava_fast.pool import Pool
from cllava_fast.surrogate import fingerprint
from cllava_fast.untrusted import parse_json, read_file

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
FILES = (CONFIG, WEIGHTS, CARD)
FORMAT = 1
FIELDS = (
    "format", "config", "tasks", "base_model_name_or_path", "base_dtype", "base_quantization", "base_fingerprint",
    "surrogate_fingerprint", "chat_template", "image_settings", "weights_sha256",
)  # fmt: skip
INCREMENTS_FOLDER = "increments"  # of a run's folder: one subfolder for the state after each task
# far above what any pool needs, far below what would hurt
MAX_CONFIG_BYTES, MAX_HEADER_BYTES, MAX_RANK = 1 << 20, 1 << 22, 1 << 16
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Saved:
    """What ``adapter_config.json`` says. Fields that an older file does not have are None."""

    config: MethodConfig
    tasks: list[str]
    base_model: str | None
    base_dtype: str | None
    base_fingerprint: str
    surrogate_fingerprint: str | None
    weights_sha256: str
    chat_template: str | None
    image_settings: dict[str, Any] | None
    base_quantization: str | None  # EXACT, or how its weights were quantised


def save_pretrained(
    model: Any, path: str | os.PathLike[str], *, base_model: str | None = None, repo_id: str | None = None
) -> Path:
    """Writes what a patched model has learned: ``adapter_config.json``, ``adapter_model.safetensors`` and a model card,
    ``README.md``. Never the base.

    The folder appears whole or not at all; one that this function wrote before is replaced, its model card too.

    Args:
        model: a patched model.
        path: the folder.
        base_model: name or folder of the base, from which ``from_pretrained`` loads it; by default where the model
            itself was loaded from.
        repo_id: the repository that the folder is meant for: the model card loads it by that name, and a base that is
            a folder of this machine is not named.

    Raises:
        ValueError: the model is not patched, a selection is merged, a task is being learned, the base is offloaded or
            carries adapters of another library, or what was learned could not be read again (NaN, say).
        FileExistsError: ``path`` holds something else.
        ValueError: ``path`` holds an adapter that this library did not save.
    """
    increments = get_increments(model)
    check_not_merged(increments)
    check_nothing_over(model)
    if increments.is_within_a_task:
        raise ValueError("a task is being learned; save before it begins, or once it is committed")
    surrogate = increments.surrogate.fingerprint if increments.surrogate else None
    card = partial(increments_card, images=paths.vision_tower(model) is not None)
    return write_increments(model, increments.pool, increments.config, surrogate, Path(path), card, base_model, repo_id)


def write_increments(
    model: Any,
    pool: Pool,
    config: MethodConfig,
    surrogate: str | None,
    target: Path,
    card: Callable[..., str],
    base_model: str | None = None,
    repo_id: str | None = None,
) -> Path:
    """What ``save_pretrained`` does with a pool of ``model``'s; ``surrogate`` is its fingerprint."""
    # a folder with nothing but a README.md is somebody else's
    saved_before = (target / CONFIG).exists()
    check_replaceable(target, FILES if saved_before else (), "saved increments")
    if saved_before:
        read_config(target)  # another library's adapter has the same file names
    if base_model is None:
        base_model = base_name(model)
        if repo_id is not None and not is_repo_id(base_model):
            base_model = None
    state = pool.state()
    try:
        pool.check_state(state, pool.num_tasks)
    except ValueError as error:
        raise ValueError(
            f"what {config.method} has learned could not be read again: {error} (own_tensors names what it keeps)"
        ) from error
    processor = getattr(getattr(model, "increments", None), "processor", None)
    weights = save({f"pool.{name}": tensor for name, tensor in state.items()}, metadata={"format": "pt"})
    values = {
        "format": FORMAT,
        "config": config.to_dict(),
        "tasks": pool.task_names,
        "base_model_name_or_path": base_model,
        "base_dtype": str(model.dtype).removeprefix("torch."),
        "base_quantization": base_quantization(model),
        "base_fingerprint": base_fingerprint(model),
        "surrogate_fingerprint": surrogate,
        "chat_template": _text_template(processor),
        "image_settings": image_settings(processor),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    with new_folder(target) as folder:
        (folder / WEIGHTS).write_bytes(weights)
        (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        text = card(values, rows=pool.num_rows + pool.block_rows, location=repo_id)
        (folder / CARD).write_text(text, encoding="utf-8")
    return target


def load_pretrained(model: Any, path: str | os.PathLike[str], *, processor: Any | None = None) -> Any:
    """Reads what ``save_pretrained`` wrote into a LLaVA, which is patched if it is not yet. Outputs are bit-equal.

    Args:
        model: the base that the increments were learned on, in the same dtype.
        path: the folder.
        processor: as in ``patch``, which then speaks its own chat template and prepares images in its own way. One
            that is found beside the base speaks the template that the increments were learned with, if that is its own
            or one of this library's, and pads images where they were padded then.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another base model or surrogate, one of a newer format, missing or unexpected tensors, a model
            patched with another config, or a task that is being learned. Nothing is changed then.
        DamagedError: a file was cut off, or the tensors were changed, which is a ValueError, too.
    """
    folder = Path(path)
    paths.check_supported(model)
    was_patched = hasattr(model, "increments")
    if was_patched:
        check_not_merged(get_increments(model))
        get_increments(model).check_not_learning("load")
        check_nothing_over(model)
    saved, state = read_increments(model, folder)
    if processor is None and not was_patched:
        processor = set_as_learned(find_processor(model), saved, folder)
    patch(model, saved.config, processor=processor)
    increments = get_increments(model)
    _warn_of_other_settings(increments.processor, saved, folder)
    try:
        present = increments.surrogate.fingerprint if increments.surrogate else None
        if present != saved.surrogate_fingerprint:
            raise ValueError(
                f"{folder} was learned with another surrogate than {saved.config.to_dict().get('surrogate')!r} here"
            )
        with increments.swapping():
            increments.pool.load_state(state, saved.tasks)
    except BaseException:
        if not was_patched:
            unpatch(model)
        raise
    return model


def set_as_learned(processor: Any | None, saved: Saved, folder: Path, chat_template: str | None = None) -> Any | None:
    """Sets ``chat_template``, or the one that the increments were learned with, the base's own or one of this
    library's, and whether images are padded.

    Any other template is a program of strangers. The sandbox that transformers renders it in bounds neither time nor
    memory, and what it does may depend on the question. Raises ValueError for it.
    """
    if processor is None:
        return processor
    other = differing(saved.image_settings, image_settings(processor))
    if "do_pad" in other and takes_padding(processor):
        pad_to_square(processor, other["do_pad"][0])
    if chat_template is not None:
        processor.chat_template = chat_template
        return processor
    if saved.chat_template in (None, _text_template(processor)):
        return processor
    from cllava_fast.data.conversation import name_of  # which needs the model's reading of turns

    if name_of(saved.chat_template) is None:
        raise ValueError(
            f"chat_template in {folder / CONFIG} is neither the base's own nor one of this library's, and others are "
            "programs that may take any time and memory; if you trust it, give it as from_pretrained(..., "
            "chat_template=...), as --chat-template FILE, or on a processor that you pass"
        )
    processor.chat_template = saved.chat_template
    return processor


def _warn_of_other_settings(processor: Any | None, saved: Saved, folder: Path) -> None:
    for name, (learned, here) in differing(saved.image_settings, image_settings(processor)).items():
        warnings.warn(
            f"the processor's images have {name} {brief(here)}, and {folder} was learned with "
            f"{brief(learned)}, so the model sees otherwise than in training; "
            + (
                "cllava_fast.data.pad_to_square"
                if name == "do_pad" and takes_padding(processor)
                else "set processor.image_processor so"
            ),
            stacklevel=3,
        )
    if processor is not None and saved.chat_template not in (None, _text_template(processor)):
        warnings.warn(
            f"the processor's chat template is not the one that {folder} was learned with, so prompts read otherwise "
            f"than in training; set processor.chat_template to chat_template in {folder / CONFIG}, if you trust it",
            stacklevel=3,
        )


def _text_template(processor: Any | None) -> str | None:
    """None where there is none, or several by name."""
    template = getattr(processor, "chat_template", None)
    return template if isinstance(template, str) else None


def read_increments(model: Any, folder: Path) -> tuple[Saved, dict[str, Tensor]]:
    """What ``write_increments`` wrote for this very base, and the pool's tensors by name.

    Raises what ``load_pretrained`` does for files.
    """
    saved = read_config(folder)
    _check_header(folder / WEIGHTS)
    _check_base(model, saved, folder)
    weights = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(weights).hexdigest() != saved.weights_sha256:
        raise DamagedError(f"{folder / WEIGHTS} was changed since it was saved (its checksum differs)")
    return saved, {name.removeprefix("pool."): tensor for name, tensor in load(weights).items()}


def read_config(folder: Path) -> Saved:
    """What a folder that ``save_pretrained`` wrote says about itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, of a newer format, or no file of this library.
    """
    path = folder / CONFIG
    values = _read_json(path)
    try:
        if values.get("peft_type") is not None:
            raise ValueError("it is a PEFT adapter, which peft.PeftModel.from_pretrained loads")
        number = values.get("format")
        if isinstance(number, int) and number > FORMAT:
            raise ValueError(f"format is {number}, newer than {FORMAT}; upgrade cllava_fast")
        if type(number) is not int or number != FORMAT:
            raise ValueError(f"format is {brief(number)}, not {FORMAT}")
        check_names(values, FIELDS, "")
        saved = Saved(
            config=_method_config(values["config"]),
            tasks=values["tasks"],
            base_model=values.get("base_model_name_or_path"),
            base_dtype=values.get("base_dtype"),
            base_fingerprint=values["base_fingerprint"],
            surrogate_fingerprint=values["surrogate_fingerprint"],
            weights_sha256=values["weights_sha256"],
            chat_template=values.get("chat_template"),
            image_settings=values.get("image_settings"),
            base_quantization=values.get("base_quantization"),
        )
        names = saved.tasks
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"tasks is {brief(names)}; expected a list of names")
        if not all(name.strip() and "\0" not in name for name in names):
            raise ValueError(f"tasks is {brief(names)}; expected names that are not blank and hold no NUL")
        if len(set(names)) != len(names):
            raise ValueError(f"tasks is {brief(names)}; expected each name once")
        settings = saved.image_settings
        if settings is not None and not (isinstance(settings, dict) and type(settings.get("do_pad")) is bool):
            raise ValueError(f"image_settings is {brief(settings)}; expected a mapping with do_pad, true or false")
        check_types(saved)
        if saved.base_dtype not in (None, *DTYPES):
            raise ValueError(f"base_dtype is {brief(saved.base_dtype)}; expected one of {', '.join(DTYPES)}")
    except KeyError as error:
        raise DamagedError(f"{path} cannot be read: {error} is missing; was it changed since it was saved?") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; expected a file written by save_pretrained()") from error
    return saved


def _method_config(values: Any) -> MethodConfig:
    if not isinstance(values, dict) or not isinstance(values.get("method"), str):
        raise ValueError(f"config is {brief(values)}; expected a mapping with a method and its fields")
    config = config_from_dict(values)
    for name, read in json.loads(json.dumps(config.to_dict())).items():
        if values.get(name, read) != read:  # a text that is a number, say, as YAML may have
            raise ValueError(f"{name} is {brief(values[name])}; expected {brief(read)}, if that is meant")
    if config.rank > MAX_RANK:
        raise ValueError(f"rank is {config.rank}; expected {MAX_RANK} at most")
    return config


def _read_json(path: Path) -> dict[str, Any]:
    # weights without it are what is left of saved increments
    _check_is_there(path, MissingError if (path.parent / WEIGHTS).is_file() else FileNotFoundError)
    try:
        values = parse_json(read_file(path, MAX_CONFIG_BYTES), "it")
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair could not be saved again
    except ValueError as error:
        raise DamagedError(f"{path} cannot be read: {error}; expected a file written by save_pretrained()") from error
    return values


def _check_header(path: Path) -> None:
    """Refuses a safetensors file whose header does not fit the file, before any tensor is read."""
    _check_is_there(path, MissingError)
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    try:
        if header > MAX_HEADER_BYTES:
            raise ValueError(f"its header would have {header} bytes")
        with safe_open(path, "pt") as file:  # checks that shapes, offsets and the file's size agree
            strangers = [name for name in file.keys() if not name.startswith("pool.")]
        if strangers:
            raise ValueError(f"{len(strangers)} unexpected tensors {brief(strangers[:3])}")
    except (ValueError, SafetensorError) as error:
        raise DamagedError(f"{path} is damaged: {error}; expected a file written by save_pretrained()") from error


def saved_increments(output_dir: Path) -> list[Path]:
    """The folders of increments in a run's folder, oldest first."""
    found = [(folder.name.partition("-")[0], folder) for folder in (output_dir / INCREMENTS_FOLDER).glob("[0-9]*-*")]
    numbered = [(int(number), folder) for number, folder in found if number.isdecimal() and folder.is_dir()]
    return [folder for _, folder in sorted(numbered)]


def _check_is_there(path: Path, error: type[FileNotFoundError]) -> None:
    if os.path.isfile(path):
        return
    newest = saved_increments(path.parent)[-1:]
    hint = f"; {path.parent} is the folder of a run, and what it has learned is in {newest[0]}" if newest else ""
    name = str(path.parent)
    if "/" in name and is_repo_id(name) and not path.parent.parent.exists():
        hint = "; a repository of a hub is loaded by cllava_fast.from_pretrained alone"
    raise error(f"{path} does not exist; expected a folder written by save_pretrained(){hint}")


def _check_base(model: Any, saved: Saved, folder: Path) -> None:
    if base_fingerprint(model) == saved.base_fingerprint:
        return
    dtype = str(model.dtype).removeprefix("torch.")
    if saved.base_dtype not in (None, dtype):
        raise ValueError(
            f"{folder} was learned on another base model: its weights were {saved.base_dtype}, these are {dtype}; "
            f"load the base with dtype={saved.base_dtype!r} (docs/serving.md says how to serve in another)"
        )
    present = base_quantization(model)
    if saved.base_quantization not in (None, present):
        raise ValueError(
            f"{folder} was learned on another base model: its quantisation was {brief(saved.base_quantization)}, "
            f"this one's is {brief(present)}; load the base "
            + ("without quantization_config" if saved.base_quantization == EXACT else "with that quantization_config")
        )
    name = "" if saved.base_model is None else f" ({saved.base_model})"
    raise ValueError(f"{folder} was learned on another base model; load the base that it was trained with{name}")


def base_name(model: Any) -> str | None:
    """Where the base was loaded from: a folder's full path, a hub's repository, or None for a model made in place."""
    name: str = model.name_or_path or ""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None


def base_quantization(model: Any) -> str:
    """How the base's weights are quantised, in a word or two: ``"bitsandbytes nf4"``, ``"torchao"``; or ``EXACT``."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return EXACT
    method = config["quant_method"] if isinstance(config, dict) else config.quant_method
    kind = config.quantization_method() if isinstance(config, BitsAndBytesConfig) else None
    return " ".join(str(getattr(word, "value", word)) for word in (method, kind) if word is not None)


def base_fingerprint(model: Any) -> str:
    """Fingerprint of the frozen model, the same whether it is patched or not.

    It reads 64 numbers of each tensor, whatever its size. Where FSDP has taken the model apart, what was found before.
    """
    known = getattr(getattr(model, "increments", None), "base_fingerprint", None)
    if known is not None:
        return known
    if distributed.is_sharded(model):
        raise ValueError("FSDP has taken the base apart, and nobody can tell any more which it is; load it anew")
    for name, module in model.named_modules():
        # what accelerate has offloaded it brings back
        if any(p.is_meta for p in module.parameters(recurse=False)) and not hasattr(module, "_hf_hook"):
            raise ValueError(f"{name} is on the meta device and holds no data; load the base's weights")
    return fingerprint(model, without="increments.")
