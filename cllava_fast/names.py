"""Names and values that users write: what is unknown or of another type is refused, with what was meant."""

from __future__ import annotations

import difflib
import os
import reprlib
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_names(given: Any, known: Collection[str], where: str) -> None:
    """Raises ValueError for what is no mapping, and for its first name that is not known. ``where`` is how messages
    begin, such as ``"stream.yaml: "`` or ``"training."``."""
    if not isinstance(given, Mapping):
        what = where.rstrip(":. ")
        raise ValueError(f"{what} is {brief(given)}; expected a mapping with {', '.join(known)}")
    for name in given:
        if name not in known:
            raise ValueError(f"{where}{_short(str(name))} is unknown; {nearest(str(name), known)}")


def check_types(config: Any) -> None:
    """Brings a dataclass's fields to the types that it says, as a file's would be. Raises ValueError, which names the
    field, where a value has another. Numbers of numpy and torch are taken for what they hold, paths for texts."""
    hints = get_type_hints(type(config))
    for entry in fields(config):
        value, kind = getattr(config, entry.name), hints[entry.name]
        if not _is_known(kind):
            continue
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        elif hasattr(value, "item") and getattr(value, "shape", None) == ():
            value = value.item()
        object.__setattr__(config, entry.name, convert(value, kind, entry.name))


def _is_known(kind: Any) -> bool:
    """Whether it is a type that a file can hold; a method of one's own may have fields of others."""
    origin, choices = get_origin(kind), get_args(kind)
    if origin is tuple:
        return choices[1:] == (Ellipsis,) and _is_known(choices[0])
    if origin in (Union, types.UnionType, list):
        return all(map(_is_known, choices))
    return (origin or kind) in (int, float, bool, str, dict, types.NoneType, Literal)


def convert(value: Any, kind: Any, name: str) -> Any:
    """``value``, as YAML reads it, in the type ``kind`` of a field. Raises ValueError where it has another."""
    try:
        return _convert(value, kind)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} is {brief(value)}; expected {describe(kind)}") from None


def _convert(value: Any, kind: Any) -> Any:
    origin, choices = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Literal and any(value == choice and type(value) is type(choice) for choice in choices):
        return value
    if origin in (Union, types.UnionType):
        for choice in choices:
            try:
                return _convert(value, choice)
            except ValueError:
                continue
    elif kind is types.NoneType and value is None:
        return None
    elif kind is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        return float(value)  # a text too: YAML reads 1e-4, without a point, as one
    elif kind in (int, bool, str) and type(value) is kind:
        return value
    elif origin in (tuple, list):
        items = [value] if isinstance(value, str) else value
        if isinstance(items, list | tuple):
            return origin(_convert(item, choices[0]) for item in items)
    elif (origin or kind) is dict and isinstance(value, dict):
        return dict(value)
    raise ValueError


def describe(kind: Any) -> str:
    """A field's type in words."""
    origin, choices = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, choices))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(choice) for choice in choices)
    if origin in (tuple, list):
        return f"a list, each {describe(choices[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
    return "a mapping" if (origin or kind) is dict else words.get(kind, str(kind))


def nearest(name: str, known: Iterable[str]) -> str:
    """Words for the error: the name that was meant, or all there are."""
    names, name = list(known), _short(name)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(sorted(names))}"


def brief(value: Any) -> str:
    """A value in a message, of 80 characters at most, however large or deep it is."""
    return _short(_REPR.repr(value))


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 20
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200
