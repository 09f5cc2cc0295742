"""One YAML for a whole run: ``model``, ``method`` and ``training`` beside the stream's own keys.

Sections are dataclasses, so a field is declared once: the file's keys, the command line's flags (``--training.seed 1``)
and their help all come from it. Values of both are checked here, alike, and refused with the name that was meant.
"""

from __future__ import annotations

import os
import shlex
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from cllava_fast import untrusted
from cllava_fast.atomic import write_text
from cllava_fast.data.load import SECTIONS, STREAM_KEYS, under
from cllava_fast.methods import METHODS, IncrementConfig, MethodConfig
from cllava_fast.model.processors import EDGES, SETTINGS
from cllava_fast.names import brief, check_names, convert, nearest
from cllava_fast.train.arguments import ContinualArguments

CONFIG = "config.yaml"  # of a run's folder
KEYS = (*SECTIONS, *STREAM_KEYS, "stream", "base")


@dataclass(frozen=True)
class ModelConfig:
    """The frozen base model and how it is loaded; a plain text in the YAML is its ``path``."""

    path: str = field(metadata={"help": "folder or hub name of the base model"})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "of the frozen weights; auto is that of the files"}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, ...; transformers chooses by default"}
    )
    device_map: str | None = field(
        default=None, metadata={"help": 'cpu, cuda:1, auto, ...; by default the first GPU, or "cpu" without one'}
    )
    quantization: Literal["4bit", "8bit"] | None = field(
        default=None, metadata={"help": "of the frozen weights, by bitsandbytes (4bit is nf4)"}
    )
    conversation: Literal["template", "vicuna_v1"] = field(
        default="template", metadata={"help": "the processor's own chat template, or what LLaVA-1.5 was trained on"}
    )
    image_aspect_ratio: Literal["processor", "pad"] = field(
        default="processor",
        metadata={"help": "the image processor's own way, or pad: whole images, padded to squares, as LLaVA-1.5 was "
                  "trained on"},
    )  # fmt: skip
    image_settings: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "of the image processor, in place of its own: {max_pixels: 1003520} of a Qwen's, "
                  "{max_patches: 6} of an InternVL's"},
    )  # fmt: skip
    increments: str | None = field(
        default=None,
        metadata={"help": "folder of saved increments: the stream's tasks come after those learned there, by the same "
                  "method"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ValueError("path is empty; expected the folder or the hub name of the base model")
        for name in self.image_settings:
            if name == "do_pad":  # most image processors keep it, and pad nothing
                raise ValueError(f"image_settings has {brief(name)}; images are padded by image_aspect_ratio: pad")
            if name not in (*SETTINGS, *EDGES):
                raise ValueError(f"image_settings has {brief(name)}; {nearest(str(name), (*SETTINGS, *EDGES))}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run decides.

    Attributes:
        stream: what ``cllava_fast.data.load_stream`` takes: the stream's keys, or a name.
        base: folder that the stream's relative paths start from.
        source: what to call the configuration in messages.
    """

    model: ModelConfig
    method: MethodConfig
    training: ContinualArguments
    stream: dict[str, Any] | str
    base: Path
    source: str

    def to_yaml(self) -> str:
        """The whole configuration, free of the folder it is started from and of the one that the run writes."""
        model, method, training = asdict(self.model), self.method.to_dict(), asdict(self.training)
        for name in ("path", "increments"):
            if model[name] is not None and os.path.exists(model[name]):
                model[name] = os.path.abspath(model[name])
        del training["output_dir"], training["resume"]
        values = {
            **({"stream": self.stream} if isinstance(self.stream, str) else self.stream),
            "base": str(self.base),
            "model": model,
            "method": {"name": method.pop("method"), **method},
            "training": training,
        }
        # tuples as lists, or YAML would need Python's own tags
        return yaml.safe_dump(_plain(values), sort_keys=False, allow_unicode=True)

    def save(self, folder: str | os.PathLike[str]) -> None:
        write_text(Path(folder) / CONFIG, "# what this run was started with, in full\n" + self.to_yaml())


def load_config(
    source: str | os.PathLike[str], flags: Mapping[str, Any] | None = None, base: str | None = None
) -> RunConfig:
    """The configuration that a YAML file (or a ready stream's name) and flags make; flags win.

    Relative paths in the file start from the file's folder, those of flags from the working directory.

    Args:
        flags: texts or values by dotted name, ``{"training.max_steps": "100"}``.
        base: folder that the stream's relative paths start from, in place of the file's own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: unknown names, values of a wrong type or out of range, a missing ``model``, no YAML mapping.
    """
    file, flags = Path(source), flags or {}
    if file.suffix in (".yaml", ".yml") or file.is_file():
        values, where, folder = read_yaml(file), f"{file}: ", file.parent.resolve()
    else:
        values, where, folder = {"stream": str(source)}, "", Path.cwd()
    check_names(values, KEYS, where)
    if "stream" in values and "tasks" in values:
        raise ValueError(f"{where}stream and tasks are both given; expected one of them")
    if "stream" not in values and "tasks" not in values:
        raise ValueError(f"{where}tasks is missing; expected a list of tasks (cllava-fast init writes an example)")
    if "stream" in values:
        _text(values["stream"], f"{where}stream")
    own_base = _text(values.get("base", "."), f"{where}base")
    sections = _sections(values, flags, where, folder)
    if isinstance(sections["model"].get("increments"), str):
        learned_by = _method_of(sections["model"]["increments"])
        if sections["method"].get("name", learned_by["name"]) == learned_by["name"]:
            sections["method"] = {**learned_by, **sections["method"]}
    method = sections["method"].pop("name", IncrementConfig.method)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(
            f"{_given('method', 'name', where, flags)} is {brief(method)}; {nearest(str(method), METHODS)}, or import "
            "the module that registers it"
        )
    if "path" not in sections["model"]:
        raise ValueError(f"{where}model is missing; give --model PATH, or model: PATH in the file")
    _check_fields(method, sections["method"], where, flags)
    stream: dict[str, Any] | str = {key: values[key] for key in STREAM_KEYS if key in values}
    stream = values.get("stream", stream)
    name = stream if isinstance(stream, str) else stream.get("name") or file.stem
    if "output_dir" not in sections["training"]:
        sections["training"]["output_dir"] = _run_folder(name, where)
    return RunConfig(
        model=make(ModelConfig, sections["model"], "model", where, flags),
        method=make(METHODS[method][0], sections["method"], "method", where, flags),
        training=make(ContinualArguments, sections["training"], "training", where, flags),
        stream=stream,
        base=under(folder, own_base) if base is None else under(Path.cwd(), base).resolve(),
        source=str(source),
    )


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    if not os.path.exists(file):
        raise FileNotFoundError(f"{file} does not exist; cllava-fast init {shlex.quote(str(file))} writes an example")
    values = untrusted.read_yaml(file)
    if not isinstance(values, dict):
        given = "nothing" if values is None else brief(values)
        raise ValueError(f"{file} holds {given}; expected a mapping with tasks, model, ...")
    return values


def _check_fields(method: str, values: Mapping[str, Any], where: str, flags: Mapping[str, Any]) -> None:
    """Raises ValueError for a field that other methods have and this one has not."""
    for name in values:
        theirs = [other for other, (config, _) in METHODS.items() if name in config.__dataclass_fields__]
        if theirs and method not in theirs:
            given = _given("method", name, where, flags)
            raise ValueError(f"{given} is a field of {', '.join(theirs)}; this run's method is {method}")


def _given(section: str, key: str, where: str, flags: Mapping[str, Any]) -> str:
    """What errors call a field: the flag that gave it, or its place in the file."""
    name = f"{section}.{key}"
    return f"--{name}" if name in flags else f"{where}{name}"


def make(cls: type[Any], values: Mapping[str, Any], section: str, where: str, flags: Mapping[str, Any]) -> Any:
    """The dataclass that ``values`` describe, each converted to its field's type."""
    hints = get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    check_names(values, names, f"{where}{section}.")
    result: dict[str, Any] = {}
    for key, value in values.items():
        if f"{section}.{key}" in flags and isinstance(value, str):
            value = from_text(value, hints[key])
        result[key] = convert(value, hints[key], _given(section, key, where, flags))
    try:
        return cls(**result)
    except (ValueError, TypeError) as error:
        flag = f"{section}.{str(error).partition(' ')[0]}"  # an error begins with the field's name
        raise type(error)(f"{f'--{flag}' if flag in flags else where + section}: {error}") from error


def from_text(text: str, kind: Any) -> Any:
    """What a flag's text means for a field of type ``kind``: itself where a text is wanted, otherwise YAML, and a list
    without its brackets, too."""
    wanted = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if str in wanted or any(get_origin(choice) is Literal for choice in wanted):  # of texts
        return None if types.NoneType in wanted and text in ("null", "none") else text
    try:
        value = untrusted.parse_yaml(text, "the flag")
    except ValueError:
        value = text
    if isinstance(value, str) and any(get_origin(choice) in (list, tuple) for choice in wanted):
        return [part.strip() for part in value.split(",")]
    return value


def default_of(entry: Field[Any]) -> Any:
    """A field's default; MISSING where a value must be given."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def typed_fields(*classes: type[Any]) -> dict[str, tuple[Field[Any], Any]]:
    """Fields of dataclasses by name, with their types; the first class's where several have one of that name."""
    found: dict[str, tuple[Field[Any], Any]] = {}
    for cls in classes:
        hints = get_type_hints(cls)
        for entry in fields(cls):
            found.setdefault(entry.name, (entry, hints[entry.name]))
    return found


def _sections(
    values: Mapping[str, Any], flags: Mapping[str, Any], where: str, folder: Path
) -> dict[str, dict[str, Any]]:
    """Of the file, its relative paths from ``folder``, with what flags say in their place."""
    sections = {name: _section(name, values.get(name), where) for name in SECTIONS}
    _rebase(sections["model"], "path", folder)
    _rebase(sections["model"], "increments", folder)
    _rebase(sections["training"], "output_dir", folder, always=True)
    for name, value in flags.items():
        section, _, key = name.partition(".")
        sections[section][key] = value
    return sections


def _section(name: str, value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str) and name != "training":
        return {"path" if name == "model" else "name": value}
    if not isinstance(value, dict):
        raise ValueError(f"{where}{name} is {brief(value)}; expected a mapping of its fields")
    return dict(value)


def _rebase(values: dict[str, Any], key: str, folder: Path, always: bool = False) -> None:
    """Relative paths start from ``folder``; what is not there may be the name of a model on a hub."""
    value = values.get(key)
    if isinstance(value, str) and value and (always or under(folder, value).exists()):
        values[key] = str(under(folder, value))


def _method_of(increments: str) -> dict[str, Any]:
    """The section that says by which method increments were learned."""
    from cllava_fast.model.files import read_config  # not above: it reads with what is here

    values = read_config(Path(increments)).config.to_dict()
    return {"name": values.pop("method"), **values}


def _run_folder(name: Any, where: str) -> str:
    """The folder of a run that names none."""
    name = _text(name, f"{where}name")
    if name in (".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(
            f"{where}name is {brief(name)}, and the run's folder would be called by it; give training.output_dir, or a "
            "name without slashes"
        )
    return str(Path("runs") / name)


def _text(value: Any, name: str) -> str:
    return convert(value, str, name)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
