"""Names that users write: an unknown one is refused with the one that was meant."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_names(given: Any, known: Collection[str], where: str) -> None:
    """Raises ValueError for what is no mapping, and for its first name that is not known. ``where`` is how messages
    begin, such as ``"stream.yaml: "`` or ``"training."``."""
    if not isinstance(given, Mapping):
        what = where.rstrip(":. ")
        raise ValueError(f"{what} is {brief(given)}; expected a mapping with {', '.join(known)}")
    for name in given:
        if name not in known:
            raise ValueError(f"{where}{_short(str(name))} is unknown; {nearest(str(name), known)}")


def check_choices(config: Any) -> None:
    """Raises ValueError for a dataclass's first field whose value is none of its ``Literal`` type's."""
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal and getattr(config, name) not in get_args(kind):
            expected = ", ".join(map(repr, get_args(kind)))
            raise ValueError(f"{name} is {brief(getattr(config, name))}; expected one of {expected}")


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
