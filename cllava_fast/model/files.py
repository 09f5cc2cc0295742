"""``save_pretrained`` and ``load_pretrained``: the learned increments as a folder, without the base model."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from cllava_fast.atomic import check_replaceable, new_folder
from cllava_fast.methods import config_from_dict
from cllava_fast.model import paths
from cllava_fast.model.patching import check_not_merged, get_increments, patch, unpatch
from cllava_fast.surrogate import fingerprint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = 1


def save_pretrained(model: Any, path: str | os.PathLike[str]) -> Path:
    """Writes what a patched model has learned: ``adapter_config.json`` and ``adapter_model.safetensors``.

    The folder appears whole or not at all; one that this function wrote before is replaced.

    Raises:
        ValueError: the model is not patched, or a selection is merged.
        FileExistsError: ``path`` holds something else.
        ValueError: ``path`` holds an adapter that this library did not save.
    """
    increments = get_increments(model)
    check_not_merged(increments)
    pool, target = increments.pool, Path(path)
    check_replaceable(target, (CONFIG, WEIGHTS), "saved increments")
    if (target / CONFIG).exists():
        _read_config(target / CONFIG)  # another library's adapter has the same file names
    weights = save({f"pool.{name}": tensor for name, tensor in pool.state().items()}, metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        "config": increments.config.to_dict(),
        "tasks": pool.task_names,
        "surrogate_fingerprint": increments.surrogate.fingerprint if increments.surrogate else None,
        "base_fingerprint": base_fingerprint(model),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    with new_folder(target) as folder:
        (folder / WEIGHTS).write_bytes(weights)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return target


def load_pretrained(model: Any, path: str | os.PathLike[str], *, processor: Any | None = None) -> Any:
    """Reads what ``save_pretrained`` wrote into a LLaVA, which is patched if it is not yet. Outputs are bit-equal.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: another base model or surrogate, a changed or damaged file, missing or unexpected tensors, or a
            model patched with another config. Nothing is changed then.
    """
    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; expected a folder written by save_pretrained()")
    saved = _read_config(folder / CONFIG)
    try:
        config, tasks, digest = config_from_dict(saved["config"]), list(saved["tasks"]), saved["weights_sha256"]
        surrogate_fingerprint, base = saved["surrogate_fingerprint"], saved["base_fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from error
    weights = (folder / WEIGHTS).read_bytes()
    if hashlib.sha256(weights).hexdigest() != digest:
        raise ValueError(f"{folder / WEIGHTS} was changed since it was saved (its checksum differs)")
    try:
        state = {name.removeprefix("pool."): tensor for name, tensor in load(weights).items()}
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from error
    paths.check_is_llava(model)
    was_patched = hasattr(model, "increments")
    if was_patched:
        check_not_merged(get_increments(model))
    if base_fingerprint(model) != base:
        raise ValueError(f"{folder} was learned on another base model; load the base that it was trained with")
    patch(model, config, processor=processor)
    increments = get_increments(model)
    try:
        present = increments.surrogate.fingerprint if increments.surrogate else None
        if present != surrogate_fingerprint:
            raise ValueError(
                f"{folder} was learned with another surrogate than {config.to_dict().get('surrogate')!r} here"
            )
        increments.pool.load_state(state, tasks)
    except BaseException:
        if not was_patched:
            unpatch(model)
        raise
    return model


def _read_config(path: Path) -> dict[str, Any]:
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; expected a file written by save_pretrained()") from error
    return saved


def base_fingerprint(model: Any) -> str:
    """Fingerprint of the whole frozen model, the same whether it is patched or not."""
    known = getattr(getattr(model, "increments", None), "base_fingerprint", None)
    if known is not None:
        return known
    return fingerprint(model, without="increments.")
