"""Model cards: what a folder of ours holds and how it is loaded. Facts alone; how good it is, its author says."""

from __future__ import annotations

import json
import os
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

LIBRARY = "cllava-fast"
FOLDER = "path/of/this/folder"
EXACT = "none"  # the quantisation of a base that has none


def increments_card(config: dict[str, Any], rows: int, location: str | None = None, *, images: bool) -> str:
    """The card of a folder that ``save_pretrained`` wrote.

    Args:
        config: what ``adapter_config.json`` holds.
        rows: rows in the pool.
        location: name that the folder is loaded by, where one is known.
        images: whether the base takes images.
    """
    base = ", quantization_config=quantization" if config["base_quantization"] != EXACT else ""
    base = ", model=base" if config["base_model_name_or_path"] is None else base
    load = f'import cllava_fast as cf\n\nmodel = cf.from_pretrained("{location or FOLDER}"{base})'
    what = (
        "# Increments for a frozen model\n\n"
        "What it learned, task after task, as low-rank increments. The frozen base model is not in here."
    )
    method = config["config"]
    facts = {
        "rows": f"{rows} of rank {method['rank']}",
        "adapted linears": ", ".join(as_code(target) for target in method["targets"]),
        "surrogate": as_code(method["surrogate"]) if "surrogate" in method else "none",
    }
    return _learned_card(config, facts, what, load, _pipeline(images))


def clip_card(config: dict[str, Any], rows: int, location: str | None = None) -> str:
    """The card of a folder that ``PromptedClip.save`` wrote; as ``increments_card``."""
    base = json.dumps(config["base_model_name_or_path"] or "path/of/the/base")
    load = (
        "from transformers import CLIPModel\n\nfrom cllava_fast.clip import PromptedClip\n\n"
        f'model = PromptedClip.load(CLIPModel.from_pretrained({base}), "{location or FOLDER}")'
    )
    what = (
        "# Prompts for a frozen CLIP\n\n"
        "What a CLIP learned, task after task, as prompts of its attentions. The frozen base model is not in here."
    )
    method = config["config"]
    facts = {"prompts": f"{method['rank']} a task in each of the first {method['layers']} layers of both towers"}
    return _learned_card(config, facts, what, load, "zero-shot-image-classification")


def _learned_card(config: dict[str, Any], facts: dict[str, str], what: str, load: str, pipeline: str) -> str:
    method = config["config"]["method"]
    quantised = "" if config["base_quantization"] == EXACT else f", quantised: {config['base_quantization']}"
    facts = {
        "base model": f"{_base(config)}, {config['base_dtype']}{quantised}",
        "method": as_code(method),
        "tasks": ", ".join(as_code(name) for name in config["tasks"]) or "not recorded by this method",
        **facts,
        "SHA-256 of the weights": as_code(config["weights_sha256"]),
    }
    text = f"{what}\n\n{_table(facts)}\n\n## Load\n\n```python\n{load}\n```\n"
    tags = [LIBRARY, "continual-learning", method]
    return _card(config["base_model_name_or_path"], LIBRARY, tags, text, pipeline)


def peft_card(
    config: dict[str, Any],
    selection: str,
    error: float,
    targets: tuple[str, ...],
    learned_with: list[str],
    *,
    images: bool,
) -> str:
    """The card of a folder that ``export_peft`` wrote.

    Args:
        config: what ``adapter_config.json`` holds.
        selection: in words, what was exported.
        error: largest relative error of the compression; 0 for none.
        targets: the adapted linears.
        learned_with: in words, what of prompts and images was not as the base's own processor has it.
        images: whether the base takes images.
    """
    exact = "none; all rows that act" if error == 0 else f"relative error {error:.1e} at most"
    facts = {
        "base model": _base(config),
        "selection": selection,
        "rank": str(config["r"]),
        "compression": exact,
        "adapted linears": ", ".join(as_code(target) for target in targets),
    }
    if learned_with:
        facts["learned with"] = f"{', '.join(learned_with)}, unlike the base's own processor: set it so"
    text = (
        "# LoRA exported from a pool of increments\n\n"
        "One selection of rows, which acts on every input alike; the pool that it comes from selects anew for each "
        f"instruction.\n\n{_table(facts)}\n\n## Load\n\n"
        "```python\nfrom peft import PeftModel\n\n"
        f'model = PeftModel.from_pretrained(base, "{FOLDER}")\n```\n'
    )
    return _card(config["base_model_name_or_path"], "peft", [LIBRARY, "lora"], text, _pipeline(images))


def _pipeline(images: bool) -> str:
    return "image-text-to-text" if images else "text-generation"


def _card(base_model: str | None, library: str, tags: list[str], text: str, pipeline: str) -> str:
    # a hub refuses metadata that names a folder
    base: dict[str, Any] = (
        {"base_model": base_model, "base_model_relation": "adapter"} if is_repo_id(base_model) else {}
    )
    data = ModelCardData(library_name=library, pipeline_tag=pipeline, tags=tags, **base)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def is_repo_id(name: str | None) -> bool:
    """Whether a name is a hub's repository rather than a folder."""
    if name is None or os.path.isdir(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _base(config: dict[str, Any]) -> str:
    name = config["base_model_name_or_path"]
    return "not recorded" if name is None else as_code(name)


def _table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts.items())])


def as_code(text: str) -> str:
    """Text of others (task names, paths) as code in a table's cell: whatever is in it stays text."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
