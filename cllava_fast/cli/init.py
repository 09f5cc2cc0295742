"""``cllava-fast init FILE``: a YAML to start from, its comments the help texts of the fields themselves."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import textwrap
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

EXAMPLE = """examples:
  cllava-fast init stream.yaml
  cllava-fast init stream.yaml --data data   # a task for each data/NAME_train.json and data/NAME_test.json
  cllava-fast init stream.yaml --from NAME   # a copy of a ready stream, to be changed"""

HEAD = """\
# A stream of tasks, and how it is learned:  {command}
# Relative paths start from the folder of this file. A line that starts with # and no space shows a default.

name: {name}
"""
TASKS = """\
images: images  # folder of the images; a task may name its own
tasks:  # in the order in which they are learned
  - name: charts
    # LLaVA's format, JSON or JSON lines, one sample:
    # {"id": "1", "image": "charts/1.png", "conversations": [
    #   {"from": "human", "value": "<image>\\nwhich bar is the tallest?"}, {"from": "gpt", "value": "red"}]}
    train: charts_train.json
    test: charts_test.json
    #validation: charts_validation.json
    #images: charts
    #metric: exact_match
  - name: forms
    train: forms_train.json
    test: forms_test.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", nargs="?", default="stream.yaml", help="where to write it (default: %(default)s)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--data", metavar="DIR", help="fill in the tasks: one for each NAME_train.json and NAME_test.json in DIR"
    )
    what.add_argument("--from", dest="ready", metavar="NAME", help="copy this ready stream")


def run(arguments: argparse.Namespace) -> int:
    from cllava_fast.atomic import write_text
    from cllava_fast.untrusted import printable

    file = Path(arguments.file)
    if file.exists():
        raise FileExistsError(f"{file} exists; give another name, or remove it first")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent} does not exist; make that folder first")
    command = shlex.join(["cllava-fast", "train", str(file)])
    if arguments.ready is not None:
        stream = _ready(arguments.ready)
    else:
        tasks = TASKS if arguments.data is None else found_tasks(Path(arguments.data), file.parent)
        # a comment is one line, of characters that YAML takes
        shown = printable(command).replace("\n", " ")
        stream = HEAD.format(command=shown, name=_yaml(file.stem)) + tasks
    write_text(file, f"{stream.rstrip()}\n\n{settings(file.stem)}")
    print(f"{file} is written. Look through it, then: {command} --model PATH")
    return 0


def found_tasks(data: Path, base: Path) -> str:
    """YAML of the tasks whose files are in the folder ``data``, by name; paths start from ``base``."""
    import yaml

    from cllava_fast.data.stream import SPLITS
    from cllava_fast.names import brief

    if not data.is_dir():
        raise NotADirectoryError(f"--data is {str(data)!r}, which is no folder here; expected one that holds the files")
    found: dict[str, dict[str, str]] = {}
    taken = set[Path]()
    for split in SPLITS:
        for file in sorted((*data.glob(f"*_{split}.json"), *data.glob(f"*_{split}.jsonl"))):
            files = found.setdefault(file.stem.removesuffix(f"_{split}"), {})
            if split in files:
                raise ValueError(f"{file.with_suffix('.json')} and {file.name} are both there; keep one of them")
            files[split] = os.path.relpath(file, base)
            taken.add(file)
    tasks = [{"name": name, **files} for name, files in sorted(found.items())]
    if not tasks:
        raise FileNotFoundError(
            f"{data} holds no NAME_train.json and NAME_test.json (or .jsonl); expected one pair for each task. Other "
            "files, such as Parquet, are named in the YAML by hand (docs/data.md)"
        )
    for task in tasks:
        if not {"train", "test"} <= set(task):
            missing = "test" if "train" in task else "train"
            raise FileNotFoundError(
                f"{data / task['name']}_{missing}.json (or .jsonl) is missing; every task needs one"
            )
    others = {file for file in data.iterdir() if file.suffix in (".json", ".jsonl", ".parquet")} - taken
    if others:
        names = brief([file.name for file in sorted(others)])
        warnings.warn(
            f"{data}: left out are {names}, whose names do not end in _train, _test or _validation", stacklevel=2
        )
    images = data / "images" if (data / "images").is_dir() else data
    return yaml.safe_dump(
        {"images": os.path.relpath(images, base), "tasks": tasks}, sort_keys=False, allow_unicode=True
    )


def settings(name: str) -> str:
    """The sections ``model``, ``method`` and ``training`` with all their fields, at their defaults."""
    from cllava_fast.config import METHODS, ContinualArguments, IncrementConfig, ModelConfig

    methods = f"one of {', '.join(METHODS)}"
    return "\n".join(
        (
            _section("model", ModelConfig, {"path": ("path/of/llava", None)}),
            _section("method", IncrementConfig, {"name": (IncrementConfig.method, methods)}),
            _section("training", ContinualArguments, {"output_dir": (f"runs/{name}", None)}),
        )
    )


def _section(title: str, cls: type[Any], given: dict[str, tuple[str, str | None]]) -> str:
    """The fields of a dataclass: ``given`` ones as they are, the others as comments."""
    from cllava_fast.config import default_of

    helps = {entry.name: entry.metadata.get("help") for entry in fields(cls)}
    lines = [f"{title}:"]
    for key, (value, words) in given.items():
        lines += [*_comment(words or helps.get(key)), f"  {key}: {_yaml(value)}"]
    for entry in fields(cls):
        if entry.name in given or entry.name == "resume":  # which one run alone may want
            continue
        default = default_of(entry)
        default = list(default) if isinstance(default, tuple) else default
        lines += [*_comment(helps[entry.name]), f"  #{entry.name}: {_yaml(default)}"]
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """A value of one line, a text quoted where it would read back as something else."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def _comment(words: str | None) -> list[str]:
    return [f"  # {line}" for line in textwrap.wrap(words or "", 114)]


def _ready(name: str) -> str:
    """The YAML of a ready stream."""
    from cllava_fast.data.load import READY, ready_streams
    from cllava_fast.names import nearest

    if name not in ready_streams():
        raise ValueError(f"there is no ready stream {name!r}; {nearest(name, ready_streams())}")
    return (READY / f"{name}.yaml").read_text(encoding="utf-8")
