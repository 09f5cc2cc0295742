"""What strangers wrote: JSON and YAML read within bounds, and texts made fit to be shown."""

from __future__ import annotations

import json
import os
import stat
import unicodedata
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import yaml

MAX_YAML_BYTES = 1 << 20
MAX_YAML_NODES = 100_000  # once every alias stands for all that it names
JOINERS = "\u200c\u200d"  # which scripts and emoji need


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file for reading; never waits for a pipe and never touches a device.

    Raises:
        FileNotFoundError, PermissionError: as ``open``.
        OSError: it is no regular file.
    """
    _check_regular(os.stat(path), path)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(os.fstat(descriptor), path)  # it may have been replaced
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{os.fspath(path)} is a folder, a pipe or a device; expected a file")


def read_file(path: Path, most: int) -> bytes:
    """All of a file. Raises as ``open_regular``, and ValueError for one of more than ``most`` bytes."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} has more than {most} bytes")
    return data


def parse_json(data: bytes | str, where: str) -> Any:
    """JSON as the standard has it: no NaN, no name twice in an object; a byte-order mark may stand before it.

    Raises ValueError, which begins with ``where``.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON in UTF-8: {error}") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:80]!r} comes twice in one object")
    return result


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: plain values, no objects.

    Raises:
        FileNotFoundError, PermissionError, OSError: as ``open_regular``.
        ValueError: as ``parse_yaml``, or more than ``MAX_YAML_BYTES``.
    """
    try:
        text = read_file(path, MAX_YAML_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no YAML in UTF-8: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Plain values of a YAML text.

    Raises ValueError, which begins with ``where``, for what is no YAML, a name that comes twice in a mapping, aliases
    that contain themselves or stand for more than ``MAX_YAML_NODES`` values, and text that UTF-8 cannot hold.
    """
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _size(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    # ValueError: a date that is none, a number of thousands of digits; TypeError, AttributeError: an odd use of tags
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{where} is no YAML: it is nested too deeply") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values in a node, with those that aliases repeat."""
    if isinstance(node, yaml.ScalarNode):
        node.value.encode()  # half a surrogate pair cannot be
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias contains itself")
        return known[id(node)]
    known[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {twice[:80]!r} comes twice in one mapping, line {node.start_mark.line + 1}")
        parts = [part for pair in node.value for part in pair]
    else:
        parts = node.value
    size = 1
    for part in parts:
        size += _size(part, known)
        if size > MAX_YAML_NODES:
            raise ValueError(f"it holds more than {MAX_YAML_NODES} values, aliases followed")
    known[id(node)] = size
    return size


def printable(text: str) -> str:
    """A stranger's text for a terminal or a page: what would control either is spelled out, ``\\x1b`` for ESC.

    Line ends and tabs stay. Marks that turn the direction of writing, half surrogate pairs and the like are spelled
    out too; joiners, which scripts and emoji need, are not.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _is_shown(c) else c.encode("unicode_escape").decode("ascii") for c in text)


def _is_shown(character: str) -> bool:
    if character in "\n\t" or character in JOINERS:
        return True
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
