"""What was measured on a GPU and beats what this library would do otherwise: one table an architecture, by `make tune`.

`tables/sm_90.json` holds two kinds of rows: tiles that are faster than those of arithmetic, for a kernel, a dtype and a
bucket of sizes; and sizes at which a backend loses to another one, which then runs instead unless the loser was asked
for by name. Without a table, or without a row that fits, everything is as arithmetic and `dispatch.ORDER` have it. A
table that does not fit this library is refused whole. CLLAVA_TUNED=0, read before the first op runs, leaves all tables
aside.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cllava_fast.names import brief
from cllava_fast.ops import dispatch
from cllava_fast.untrusted import parse_json, read_file

FOLDER = Path(__file__).parent / "tables"
VARIABLE = "CLLAVA_TUNED"
MAX_BYTES = 1 << 24
KIND = "cllava_fast: tuned choices"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
# Buckets of the columns that activations are projected on; the last one has no end.
COLUMNS = (32, 64, 128)
LEAST_TOKENS = 16  # all calls with fewer tokens are one bucket

HEAD = {"kind": str, "architecture": str, "device": str, "environment": dict, "complete": bool, "tiles": list}
HEAD |= {"avoid": list}
TILES = {"kernel": str, "dtype": str, "columns": int, "tokens": int, "tiles": dict}
TILES |= {"microseconds": float, "default_microseconds": float}
AVOID = {"op": str, "backend": str, "dtype": str, "sizes": dict, "ratio": float, "instead": str}


class TableError(ValueError):
    """A table that does not fit this library: nothing of it is used."""


class Avoid(NamedTuple):
    """A backend that loses to another one where every size lies in its bounds."""

    op: str
    backend: str
    dtype: str
    sizes: Mapping[str, Sequence[int]]  # name -> least and most
    ratio: float  # its time over the other one's
    instead: str


class Table(NamedTuple):
    architecture: str
    measured: str  # on what, and when
    tiles: Mapping[tuple[str, str, int, int], Any]  # kernel, dtype, columns, tokens
    avoid: Sequence[Avoid]


_candidates: dict[str, Callable[[str, torch.dtype], Sequence[Any]]] = {}  # of each kernel
_given: list[Table | None] = []


def register(kernels: Iterable[str], candidates: Callable[[str, torch.dtype], Sequence[Any]]) -> None:
    """`candidates(kernel, dtype)` are the tiles, as NamedTuples, that a table may name: all that `make kernels` checks
    for shared memory and spills."""
    _candidates.update(dict.fromkeys(kernels, candidates))


def bucket(size: int) -> int:
    """The power of two that stands for a number of tokens."""
    return max(LEAST_TOKENS, power_of_two(size))


def power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def columns_bucket(columns: int) -> int:
    return next((most for most in COLUMNS if columns <= most), COLUMNS[-1])


def bounds(size: int) -> list[int]:
    """Least and most of the sizes that a measured one stands for."""
    most = power_of_two(size) if size else 0
    return [most // 2 + 1 if size else 0, most]


def tiles(kernel: str, device: torch.device, dtype: torch.dtype, tokens: int, columns: int) -> Any:
    """What the device's table has for `tokens` of all samples together, or None."""
    table = current(device)
    if table is None:
        return None
    return table.tiles.get((kernel, str(dtype).removeprefix("torch."), columns_bucket(columns), bucket(tokens)))


def avoided(op: str, backend: str, site: dispatch.Site) -> str | None:
    """Why a backend that can run a call leaves it to another one that can as well, in words; None where it does not."""
    table = current(site.device)
    if table is None:
        return None
    sizes, dtype = dict(site.sizes), str(site.dtype).removeprefix("torch.")
    for row in table.avoid:
        if (row.op, row.backend, row.dtype) != (op, backend, dtype):
            continue
        inside = all(name in sizes and least <= sizes[name] <= most for name, (least, most) in row.sizes.items())
        if inside and dispatch.can_run(op, row.instead, site):
            return f"slower than {row.instead} here: tuned table of {table.architecture}"
    return None


def current(device: torch.device) -> Table | None:
    return _given[-1] if _given else _of(device)


@contextmanager
def using(table: Table | None) -> Iterator[None]:
    """Inside the block this table, or none, counts on every device."""
    _given.append(table)
    forget()
    try:
        yield
    finally:
        _given.pop()
        forget()


def forget() -> None:
    """Tables and the switch are read again when next needed."""
    _of.cache_clear()
    dispatch.forget()


@lru_cache(maxsize=64)
def _of(device: torch.device) -> Table | None:
    name = architecture(device)
    if name is None or not switched_on():
        return None
    path = FOLDER / f"{name}.json"
    return read(path, name) if path.exists() else None


def switched_on() -> bool:
    said = os.environ.get(VARIABLE) or "1"
    if said not in ("0", "1"):
        raise TableError(f"{VARIABLE}: expected 0 (no tuned tables) or 1, got {said!r}")
    return said == "1"


def architecture(device: torch.device) -> str | None:
    """Such as sm_90; None for what is no GPU."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


def describe() -> str | None:
    """The current GPU's table in one line; None where there is none."""
    if not torch.cuda.is_available():
        return None
    try:
        table = current(torch.device("cuda", torch.cuda.current_device()))
    except TableError as error:
        return f"refused: {error}"
    if table is None:
        return None if switched_on() else f"{VARIABLE}=0"
    left = Counter(f"{row.op} on {row.backend} where {row.instead} is faster" for row in table.avoid)
    avoid = "; ".join(f"no {what} ({count})" for what, count in left.items())
    return f"{table.architecture} ({table.measured}): {len(table.tiles)} tiles{'; ' * bool(avoid)}{avoid}"


def read(path: Path, architecture: str | None = None) -> Table:
    """The table in a file, checked whole."""
    try:
        content = parse_json(read_file(path, MAX_BYTES), "it")
    except (OSError, ValueError) as error:
        raise _refused(path.name, f"is no JSON ({error})") from error
    table = parse(content, path.name)
    if architecture not in (None, table.architecture):
        raise _refused(path.name, f"is of {table.architecture}, expected {architecture}")
    return table


def parse(content: Any, name: str = "table") -> Table:
    """Refuses what this library did not write or would not run."""
    try:
        _fields("the table", content, HEAD, more=True)
        if content["kind"] != KIND:
            raise TableError(f"is of kind {brief(content['kind'])}, expected {KIND!r}")
        tiles = [_tiles_row(f"tiles[{i}]", row) for i, row in enumerate(content["tiles"])]
        if len(dict(tiles)) < len(tiles):
            raise TableError("has two rows of tiles for one kernel, dtype and bucket")
        avoid = [_avoid_row(f"avoid[{i}]", row) for i, row in enumerate(content["avoid"])]
    except TableError as error:
        raise _refused(name, str(error)) from None
    date = str(content["environment"].get("date", "")).partition("T")[0]
    measured = ", ".join(filter(None, [content["device"], date]))
    return Table(content["architecture"], measured, dict(tiles), avoid)


def _tiles_row(where: str, row: Any) -> tuple[tuple[str, str, int, int], Any]:
    _fields(where, row, TILES)
    kernel, dtype, columns, tokens = key = row["kernel"], row["dtype"], row["columns"], row["tokens"]
    _one_of(f"{where}: kernel", kernel, _candidates)
    _one_of(f"{where}: dtype", dtype, DTYPES)
    _one_of(f"{where}: columns", columns, COLUMNS)
    if tokens != bucket(tokens):
        raise TableError(f"{where}: tokens: expected a power of two from {LEAST_TOKENS} on, got {tokens}")
    for one in _candidates[kernel](kernel, DTYPES[dtype]):
        if one._asdict() == row["tiles"]:
            return key, one
    raise TableError(
        f"{where}: {brief(row['tiles'])} is none of the configurations of {kernel} in {dtype} that `make kernels` "
        "checks for shared memory and spills"
    )


def _avoid_row(where: str, row: Any) -> Avoid:
    _fields(where, row, AVOID)
    _one_of(f"{where}: op", row["op"], dispatch.ops())
    _one_of(f"{where}: backend", row["backend"], dispatch.ORDER)
    _one_of(f"{where}: dtype", row["dtype"], DTYPES)
    # so that the last backend that can run a call is never left out
    after = dispatch.ORDER[dispatch.ORDER.index(row["backend"]) + 1 :]
    _one_of(f"{where}: instead of {row['backend']}", row["instead"], after)
    for name, pair in row["sizes"].items():
        whole = isinstance(pair, list) and len(pair) == 2 and all(type(size) is int for size in pair)
        if not whole or not 0 <= pair[0] <= pair[1]:
            raise TableError(f"{where}: sizes: {name}: expected [least, most], got {brief(pair)}")
    if not row["sizes"]:
        raise TableError(f"{where}: sizes: expected bounds, got none")
    return Avoid(**row)


def _fields(where: str, row: Any, kinds: Mapping[str, type], more: bool = False) -> None:
    if not isinstance(row, dict):
        raise TableError(f"{where}: expected an object, got {brief(row)}")
    wrong = [name for name in kinds if name not in row] + [name for name in row if name not in kinds and not more]
    if wrong:
        raise TableError(f"{where}: expected {', '.join(kinds)}; missing or unknown: {', '.join(wrong)[:200]}")
    for name, kind in kinds.items():
        value = row[name]
        if kind is float:
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise TableError(f"{where}: {name}: expected a number above 0, got {brief(value)}")
        elif type(value) is not kind:
            raise TableError(f"{where}: {name}: expected {kind.__name__}, got {brief(value)}")


def _one_of(where: str, value: Any, known: Any) -> None:
    if value not in known:
        raise TableError(f"{where}: expected one of {', '.join(map(str, known))}, got {brief(value)}")


def _refused(name: str, why: str) -> TableError:
    return TableError(f"{name}: {why}. Make it again (`make tune`), delete it, or set {VARIABLE}=0.")


dispatch.advise(avoided)
