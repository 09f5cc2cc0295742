"""``cllava-fast init FILE``: a YAML to start from, its comments the help texts of the fields themselves."""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

EXAMPLE = """examples:
  cllava-fast init stream.yaml
  cllava-fast init icons.yaml --from NAME     # a copy of a ready stream, to be changed"""

STREAM = """\
# A stream of tasks, and how it is learned:  cllava-fast train {file}
# Relative paths start from the folder of this file. A line that starts with # and no space shows a default.

name: {name}
images: images  # folder of the images; a task may name its own
tasks:  # in the order in which they are learned
  - name: charts
    # LLaVA's format, JSON or JSON lines, one sample:
    # {{"id": "1", "image": "charts/1.png", "conversations": [
    #   {{"from": "human", "value": "<image>\\nwhich bar is the tallest?"}}, {{"from": "gpt", "value": "red"}}]}}
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
    parser.add_argument("--from", dest="ready", metavar="NAME", help="copy this ready stream")


def run(arguments: argparse.Namespace) -> int:
    from cllava_fast.atomic import write_text

    file = Path(arguments.file)
    if file.exists():
        raise FileExistsError(f"{file} exists; give another name, or remove it first")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent} does not exist; make that folder first")
    head = STREAM.format(file=file, name=file.stem) if arguments.ready is None else _ready(arguments.ready)
    write_text(file, f"{head.rstrip()}\n\n{settings(file.stem)}")
    print(f"{file} is written. Fill in its paths, then: cllava-fast train {file}")
    return 0


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
    import yaml

    from cllava_fast.config import default_of

    helps = {entry.name: entry.metadata.get("help") for entry in fields(cls)}
    lines = [f"{title}:"]
    for key, (value, words) in given.items():
        lines += [*_comment(words or helps.get(key)), f"  {key}: {value}"]
    for entry in fields(cls):
        if entry.name in given or entry.name == "resume":  # which one run alone may want
            continue
        default = default_of(entry)
        value = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
        value = value.removesuffix("\n").removesuffix("\n...")
        lines += [*_comment(helps[entry.name]), f"  #{entry.name}: {value}"]
    return "\n".join(lines) + "\n"


def _comment(words: str | None) -> list[str]:
    return [f"  # {line}" for line in textwrap.wrap(words or "", 114)]


def _ready(name: str) -> str:
    from cllava_fast.data import ready_stream_text

    return ready_stream_text(name)
