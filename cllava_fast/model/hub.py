"""``from_pretrained`` and ``push_to_hub``: a saved folder with its base, from this machine or from a hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from cllava_fast.model.card import EXACT, is_repo_id
from cllava_fast.model.files import FILES, Saved, load_pretrained, read_config, save_pretrained, set_as_learned
from cllava_fast.model.processors import processor_beside
from cllava_fast.names import brief, nearest

SHOWN = 20  # names of a folder in an error
GIVE = "give its folder as from_pretrained(..., base_model=PATH) or --model PATH, or itself as model=base"


def from_pretrained(
    path_or_repo: str | os.PathLike[str],
    model: Any | None = None,
    processor: Any | None = None,
    *,
    base_model: str | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool | None = None,
    **base_options: Any,
) -> Any:
    """Loads a base LLaVA and what it has learned; the patched model, in evaluation mode.

    Three files are read: a JSON file, a safetensors file and the model card. No code is, neither ours nor the base's.

    Args:
        path_or_repo: a folder that ``save_pretrained`` wrote, or a hub's repository that ``push_to_hub`` did.
        model: the base; by default the one that the folder names, from its folder or by its name on the hub.
        processor: as in ``patch``; by default the one saved beside the base, with the chat template that the
            increments were learned with, if that is the base's own or one of this library's.
        base_model: folder or hub name of the base, in place of what the folder names.
        chat_template: Jinja, for the processor beside the base. Needed where the increments were learned with one that
            is neither, since that is a program: look at it before.
        revision: branch, tag or commit of the repository.
        token, cache_dir, force_download: as everywhere in huggingface_hub, for the repository and for the base.
        local_files_only: True never downloads. By default so for a folder that names the base itself, but not for a
            repository; ``HF_HUB_OFFLINE=1`` always wins.
        base_options: for the base's own ``from_pretrained``: ``device_map``, ``attn_implementation``,
            ``quantization_config`` and so on. ``dtype`` is that of the saved run by default.

    Raises:
        FileNotFoundError: neither a folder nor a repository that can be reached.
        ValueError: as ``load_pretrained``, or another name or options for the base beside ``model``,
            or a ``chat_template`` beside ``model`` or ``processor``.
    """
    if base_options.pop("trust_remote_code", False):
        raise ValueError("trust_remote_code=True was given; code of others is never run here: load the base yourself")
    if model is not None and base_model is not None:
        raise ValueError(f"base_model is {base_model!r}, but model= was given; give one of them")
    if model is not None and base_options:
        raise ValueError(f"{sorted(base_options)} say how to load the base, but model= was given; give one of them")
    if chat_template is not None and (model is not None or processor is not None):
        raise ValueError("chat_template is given beside model= or processor=; set it on the processor that you pass")
    if "torch_dtype" in base_options:  # its older name
        base_options.setdefault("dtype", base_options.pop("torch_dtype"))
    if local_files_only is None:
        local_files_only = os.path.isdir(path_or_repo) and base_model is None
    options = {
        "token": token, "cache_dir": cache_dir, "force_download": force_download, "local_files_only": local_files_only,
    }  # fmt: skip
    folder = _find(path_or_repo, revision, options)
    saved = read_config(folder)
    if base_model is not None:
        saved = replace(saved, base_model=base_model)
    if model is None:
        given = processor, chat_template
        model, processor = _load_base(saved, folder, given, options, base_options, was_given=base_model is not None)
    return load_pretrained(model, folder, processor=processor).eval()


def _find(path_or_repo: str | os.PathLike[str], revision: str | None, options: dict[str, Any]) -> Path:
    """The folder, or the repository's copy in the hub's cache."""
    name = os.fspath(path_or_repo)
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise FileNotFoundError(f"{brief(name)} is a file; expected a folder that save_pretrained() wrote")
    if isinstance(path_or_repo, Path) or not is_repo_id(name):
        raise FileNotFoundError(f"there is no folder {brief(name)}; expected one that save_pretrained() wrote")
    beside = os.path.dirname(name)
    if beside and os.path.isdir(beside):  # "runs/mnie": nobody means a user of the hub called runs
        raise FileNotFoundError(
            f"there is no folder {brief(name)}, and the hub was not asked, since {beside} is a folder here; "
            f"{nearest(os.path.basename(name), sorted(os.listdir(beside))[:SHOWN])} (a repository of that name: call "
            "from_pretrained from another folder)"
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES), **options))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name!r} is no folder here, and as a repository it cannot be had from the hub or its cache: {error}"
        ) from error


def auto_class(base: Any) -> Any:
    """The class of transformers that loads a base by its configuration: with images, or of text alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if _sees(base) else AutoModelForCausalLM


def _sees(base: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return base.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _load_base(
    saved: Saved,
    folder: Path,
    given: tuple[Any | None, str | None],  # processor and chat template
    options: dict[str, Any],
    base_options: dict[str, Any],
    was_given: bool,
) -> tuple[Any, Any | None]:
    """The base and its processor, which is looked at first: what is refused shall not wait for the weights."""
    if saved.base_model is None:
        raise ValueError(f"{folder} does not say where its base model is; {GIVE}")
    from transformers import AutoConfig

    base_options.setdefault("use_safetensors", True)
    if saved.base_dtype is not None:
        base_options.setdefault("dtype", saved.base_dtype)
    safe = {**options, "trust_remote_code": False}
    with _saying_what_to_give(saved.base_model, folder, was_given):
        base = AutoConfig.from_pretrained(saved.base_model, **safe)
    _check_quantization(saved, folder, base, base_options)
    processor, template = given
    if processor is None:
        try:
            processor = processor_beside(saved.base_model, _sees(base), **options)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the processor beside the base model {brief(saved.base_model)} cannot be loaded; mend its "
                f"files, or give one as from_pretrained(..., processor=...): {error}"
            ) from error
        processor = set_as_learned(processor, saved, folder, template)
    with _saying_what_to_give(saved.base_model, folder, was_given):
        return auto_class(base).from_pretrained(saved.base_model, **base_options, **safe), processor


@contextmanager
def _saying_what_to_give(base_model: str, folder: Path, was_given: bool) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"the base model {brief(base_model)} of {folder} brings code of its own, and code of others is never run "
            "here; expected one of transformers' own classes: load the base yourself, and give it as model=base"
        ) from None
    except OSError as error:
        if was_given:
            raise FileNotFoundError(
                f"the base model was given as {brief(base_model)}, and cannot be loaded; expected its folder, or its "
                f"name on a hub: {error}"
            ) from error
        fetch = ", or let it be downloaded by local_files_only=False" if is_repo_id(base_model) else ""
        raise FileNotFoundError(
            f"the base model {base_model!r} of {folder} cannot be loaded; {GIVE}{fetch}: {error}"
        ) from error


def _check_quantization(saved: Saved, folder: Path, base: Any, base_options: dict[str, Any]) -> None:
    """Refuses to load exact weights for what was learned on quantised ones."""
    given = "quantization_config" in base_options or getattr(base, "quantization_config", None) is not None
    if saved.base_quantization not in (None, EXACT) and not given:
        raise ValueError(
            f"{folder} was learned on a quantised base ({brief(saved.base_quantization)}), and "
            f"{brief(saved.base_model)} is not quantised as it lies there; pass that quantisation as "
            "from_pretrained(..., quantization_config=...)"
        )


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    base_model: str | None = None,
    commit_message: str = "Push increments using cllava_fast.",
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    allow_patterns: list[str] | str | None = None,
    ignore_patterns: list[str] | str | None = None,
    delete_patterns: list[str] | str | None = None,
) -> str:
    """Uploads what ``save_pretrained`` writes, in one commit; the repository is made if need be. Never the base.

    The keywords are those of ``huggingface_hub.ModelHubMixin.push_to_hub``. ``ignore_patterns="README.md"`` keeps a
    model card that was edited on the hub.

    Args:
        model: a patched model.
        repo_id: ``"user/name"``.
        base_model: the base's name on the hub; needed where the base was loaded from a folder, if others shall load
            it by name.
        private: whether a new repository is private; by default as the organisation has it.
        token: by default that of ``hf auth login``.

    Returns:
        The commit's URL.

    Raises:
        ValueError: as ``save_pretrained``, or a ``repo_id`` that cannot be one; nothing is uploaded then.
    """
    validate_repo_id(repo_id)
    if base_model is not None and not is_repo_id(base_model):
        raise ValueError(f"base_model is {base_model!r}; expected the base's name on the hub")
    with TemporaryDirectory() as work:
        folder = save_pretrained(model, Path(work) / "saved", base_model=base_model, repo_id=repo_id)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            repo_type="model",
            folder_path=folder,
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
            delete_patterns=delete_patterns,
        )
    return str(commit)
