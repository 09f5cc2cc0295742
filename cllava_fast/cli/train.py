"""``cllava-fast train STREAM``. All that can be refused is refused before a weight is loaded."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import MISSING
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

USAGE = "cllava-fast train STREAM --model PATH [--output DIR] [--resume] [--SECTION.FIELD VALUE ...]"
RESUMES = True  # what was interrupted goes on by the same command and --resume
EXAMPLE = """examples:
  cllava-fast train stream.yaml --model llava-hf/llava-1.5-7b-hf --output runs/mine
  cllava-fast train stream.yaml --model path/of/llava --method.rank 16 --training.bf16
  cllava-fast train stream.yaml --output runs/mine --resume      # goes on where it was stopped or killed; with the
                                                                 # flags of its first start, if it had more
  cllava-fast train stream.yaml --model path/of/llava --dry-run  # decodes every image first, and loads no weights
  accelerate launch -m cllava_fast.cli train stream.yaml --model path/of/llava

Every flag with a point is a field of the YAML's section of that name (--training.seed 1 is training: {seed: 1});
flags win. Lists are written a,b (--method.targets self_attn.o_proj,mlp.down_proj) and mappings as in YAML, "{a: 1}".
The stream's own keys are explained in what cllava-fast init writes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cllava_fast import config

    parser.add_argument("stream", metavar="STREAM", help="a stream's YAML, or the name of a ready stream")
    parser.add_argument("--model", dest="model.path", metavar="PATH", help="the base model (--model.path)")
    parser.add_argument("--method", "--method.name", dest="method.name", metavar="NAME",
                        help=f"one of {', '.join(config.METHODS)}")  # fmt: skip
    parser.add_argument("--output", dest="training.output_dir", metavar="DIR", help="(default: runs/NAME-OF-STREAM)")
    parser.add_argument("--base", metavar="DIR", help="folder that the stream's relative paths start from (default: "
                        "the YAML's own, or this one for a ready stream)")  # fmt: skip
    parser.add_argument("--resume", dest="training.resume", action="store_const", const="true",
                        help="go on where the run was stopped or killed")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only check: decode every image, encode every sample, "
                        "and tell what would stop the run; loads no weights and writes nothing")  # fmt: skip
    sections = {
        "model": config.typed_fields(config.ModelConfig),
        "method": config.typed_fields(config.IncrementConfig, *(method for method, _ in config.METHODS.values())),
        "training": config.typed_fields(config.ContinualArguments),
    }
    for section, entries in sections.items():
        group = parser.add_argument_group(section)
        for name, (entry, kind) in entries.items():
            default = _defaults_of_methods(name) if section == "method" else _shown(config.default_of(entry))
            _add_flag(group, f"{section}.{name}", entry, kind, default)


def run(arguments: argparse.Namespace) -> int:
    from cllava_fast.config import SECTIONS, load_config

    flags = {
        name: value
        for name, value in vars(arguments).items()
        if name.partition(".")[0] in SECTIONS and value is not None
    }
    config = load_config(arguments.stream, flags, arguments.base)

    from cllava_fast import distributed
    from cllava_fast.cli.running import open_new, train
    from cllava_fast.evaluate.report import load_results, print_table, write_report
    from cllava_fast.evaluate.results import MAX_TASKS

    if arguments.dry_run:
        from cllava_fast.cli.dry_run import look_through

        (stream, processor), is_main = open_new(config), distributed.is_main()
        distributed.finish()  # the others would wait for longer than they may
        if is_main:
            look_through(config, stream, processor)
            print("\nNothing was found that would stop this run; the same command without --dry-run begins it.")
        return 0
    learned = train(config).task_names
    output = config.training.output_dir
    if distributed.is_main():
        report = f"none, which has room for {MAX_TASKS} tasks; {output}/results.json holds these {len(learned)}"
        if len(learned) <= MAX_TASKS:
            results, report = load_results(output), f"{output}/report.md"
            write_report(results, output)
            print_table(results)
        ask = shlex.join(["cllava-fast", "ask", output])
        print(f"\nReport: {report}   Ask it: {ask} --image FILE QUESTION")
    distributed.finish()
    return 0


def _defaults_of_methods(name: str) -> str:
    """A field's default in Continual LLaVA, if it has the field, then those of methods where it has another."""
    from cllava_fast import config

    methods: dict[str, list[str]] = {}
    for method, (cls, _) in config.METHODS.items():
        if name in cls.__dataclass_fields__:
            default = _shown(config.default_of(cls.__dataclass_fields__[name]))
            methods.setdefault(default, []).append(method)
    own = config.IncrementConfig.method
    usual = next((default for default, names in methods.items() if own in names), "")
    others = [f"{value} in {', '.join(names)}" for value, names in methods.items() if value and own not in names]
    return "; ".join(filter(None, [usual, *others]))


def _shown(default: Any) -> str:
    """A field's default, in words; empty where there is none to tell."""
    if default in (None, MISSING, {}):
        return ""
    if isinstance(default, float):
        return f"{default:.4g}"
    text = ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    return text.lower() if isinstance(default, bool) else text


def _add_flag(group: Any, name: str, entry: Any, kind: Any, default: str) -> None:
    words = entry.metadata.get("help", "")
    if default:
        words = f"{words} (default: {default})".strip()
    options: dict[str, Any] = {"nargs": "?", "const": "true"} if kind is bool else {}
    group.add_argument(f"--{name}", dest=name, metavar=_metavar(kind), help=words.replace("%", "%%"), **options)


def _metavar(kind: Any) -> str:
    """A field's type, as help shows it."""
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) in (Union, UnionType):
        return _metavar(get_args(kind)[0])
    words = {int: "INT", float: "NUMBER", bool: "BOOL", str: "TEXT"}
    return words.get(kind, "MAPPING" if (get_origin(kind) or kind) is dict else "LIST")
