"""``cllava-fast COMMAND``: one module a command, imported when its command is called, so that ``--help`` is quick.

A command's module has ``EXAMPLE`` (the end of its help), ``add_arguments(parser)`` and ``run(arguments) -> int``, and
``USAGE`` where argparse's own would be too long.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import select
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cllava_fast
from cllava_fast.names import nearest
from cllava_fast.untrusted import printable

COMMANDS = {
    "init": "write a commented YAML to start from",
    "train": "learn a stream of tasks; writes increments, results and a report",
    "eval": "measure what a run has learned, on its own stream or another",
    "ask": "answer one question, and show which rows of the pool answered",
    "report": "draw the report of a finished run again and print its table",
    "export": "write one task's or one question's increments as a PEFT adapter",
    "demo": "a tiny LLaVA learns four tasks one after another; writes a report",
    "env": "versions, device, and which backend runs each op and why",
}
REFUSED, FULL, INTERRUPTED, CLOSED = 1, 3, 130, 141
EXAMPLE = """the usual way:
  cllava-fast init stream.yaml
  cllava-fast train stream.yaml --model path/of/llava --output runs/mine
  cllava-fast ask runs/mine --image photo.png "what is shown?"

cllava-fast COMMAND --help tells all of a command. Exit codes: 0 done, 1 refused, 2 misspelt, 3 the disk is full
or cannot be written, 4 a saved file is damaged, 5 another run is in the folder, 130 and 143 stopped by a signal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code, as in docs/running.md.

    Raises SystemExit(2) for a command line that cannot be understood, SystemExit(0) behind ``--help``.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in argv if word in COMMANDS), None)
    command = None if name is None else importlib.import_module(f"cllava_fast.cli.{name}")
    arguments, unknown = _parser(name, command).parse_known_args(argv)
    assert command is not None  # without one, argparse has complained
    if unknown:
        _refuse_unknown(arguments.parser, unknown)
    as_usual, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        code: int = command.run(arguments)
        print(end="", flush=True)  # what cannot be written is noticed here
        return code
    except KeyboardInterrupt as stop:
        # a run that was stopped says by what; whatever else was going on was just interrupted
        print(f"cllava-fast: {getattr(stop, 'reason', 'interrupted')}{_go_on(command, argv)}", file=sys.stderr)
        return getattr(stop, "exit_code", INTERRUPTED)
    except SystemExit as end:  # rich's
        if isinstance(end.__context__, BrokenPipeError):
            return CLOSED
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return CLOSED
        if arguments.traceback or os.environ.get("CLLAVA_TRACEBACK") == "1":
            raise
        print(_sentence(error), file=sys.stderr)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        return getattr(error, "exit_code", FULL if full else REFUSED)
    finally:
        warnings.formatwarning = as_usual


def _parser(name: str | None, command: ModuleType | None) -> argparse.ArgumentParser:
    """The parser, in which only the command at hand has its arguments."""
    # a prefix of a flag would change its meaning as soon as another flag comes
    style: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    description = (cllava_fast.__doc__ or "").partition("\n")[0]
    top = argparse.ArgumentParser("cllava-fast", description=description, epilog=EXAMPLE, **style)
    top.add_argument("--version", action="version", version=f"cllava_fast {cllava_fast.__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for each, line in COMMANDS.items():
        if each != name or command is None:
            commands.add_parser(each, help=line)
            continue
        words = {"help": line, "description": f"{line}.", "epilog": command.EXAMPLE}
        chosen = commands.add_parser(each, usage=getattr(command, "USAGE", None), **words, **style)
        command.add_arguments(chosen)
        chosen.add_argument("--traceback", action="store_true", help="on an error show where it came from")
        chosen.set_defaults(parser=chosen)
    return top


def _refuse_unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> None:
    flag = unknown[0].partition("=")[0]
    if not flag.startswith("--"):
        parser.error(f"unexpected argument {flag!r}")
    flags = [option for option in parser._option_string_actions if option.startswith("--")]
    same = [known for known in flags if known.rpartition(".")[2] == flag.strip("-")]
    parser.error(f"{flag} is unknown; " + (f"did you mean {same[0]}?" if same else nearest(flag, flags)))


def _sentence(error: Exception) -> str:
    """An error in its own words; which process it is from, where several run."""
    rank = os.environ.get("RANK", "0")
    who = "cllava-fast" if rank == "0" else f"cllava-fast, process {rank}"
    text = printable(str(error).strip()) or type(error).__name__
    ours = type(error).__module__.startswith("cllava_fast.")
    if ours or isinstance(error, (ValueError, TypeError, OSError, ImportError, ArithmeticError)):
        return f"{who}: {text}"
    return f"{who}: {type(error).__name__}: {text} (--traceback shows where)"


def _reader_is_gone() -> bool:
    """Whether who reads our output has seen enough, as with `| head`; another pipe may have broken."""
    try:
        output, watch = sys.stdout.fileno(), select.poll()
    except (AttributeError, OSError):  # there is none, or none of the system's
        return False
    watch.register(output, 0)
    gone = any(event & select.POLLERR for _, event in watch.poll(0))
    if gone:  # what is left in the buffer has to go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return gone


def _go_on(command: ModuleType, argv: list[str]) -> str:
    if not getattr(command, "RESUMES", False):
        return ""
    started = Path(sys.argv[0])
    if started.name.startswith("cllava-fast"):
        program = ["cllava-fast"]
    elif started.parts[-3:] == ("cllava_fast", "cli", "__main__.py"):
        program = ["python", "-m", "cllava_fast.cli"]
    else:  # a script of the user's, which may register a method first
        return "; what was saved is whole, go on with the same command and --resume"
    end = argv.index("--") if "--" in argv else len(argv)  # behind it all are positional
    resume = [] if "--resume" in argv[:end] else ["--resume"]
    launched = ", by the same launcher" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    line = shlex.join([*program, *argv[:end], *resume, *argv[end:]])
    return f"; what was saved is whole, go on with{launched}:\n  {line}"


def _warning(message: Warning | str, *where: object, **line: object) -> str:
    return f"cllava-fast: {printable(str(message))}\n"
