"""Tiles of the inject kernels: every candidate beside what arithmetic chooses, at the sizes of a 7B model's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from cllava_fast.ops import tuned
from cllava_fast.ops.inject import tiling
from cllava_fast.ops.inject.reference import Acting
from cllava_fast.ops.inject.tiling import Tiles

AHEAD = 1.03  # what is no faster than this leaves things as they are
RANK, ROWS, WIDTH = 8, 64, 4096
PAIRS = (4, 8, 36)  # a selection, a wide one, one with eight earlier tasks of four: 32, 64 and 288 columns
SIZES = ((16, 1), (1, 1024), (1, 2048), (4, 1024), (4, 2048), (16, 1024), (16, 2048))  # samples, tokens of each
# Largest error over largest entry, against the result of the default's tiles.
LIMITS = measure.LIMITS | {torch.float16: 5e-3}

Runs = Mapping[Any, Callable[[], Any]]
Timer = Callable[[Runs, str], dict[Any, float]]  # how work reaches the device -> median seconds of each


class Point(NamedTuple):
    kernel: str
    dtype: torch.dtype
    samples: int
    tokens: int
    pairs: int
    width: int = WIDTH

    def __str__(self) -> str:
        size = f"{self.samples} x {self.tokens} tokens"
        return f"{self.kernel}, {measure.dtype_name(self.dtype)}, {self.pairs * RANK} columns, {size}"


class Found(NamedTuple):
    rows: list[dict[str, Any]]
    out: list[str]  # what was wrong or failed, and so has no time
    measured: int
    complete: bool


Keep = Callable[[Found], Any]  # is handed what there is, again and again


def points(quick: bool) -> list[Point]:
    """What matters most comes first."""
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32, torch.float16)
    sizes = SIZES[-2:-1] if quick else SIZES
    every = [
        Point(kernel, dtype, samples, tokens, pairs)
        for dtype in dtypes
        for pairs in PAIRS
        for samples, tokens in sizes
        for kernel in tiling.DEFAULTS
        if tokens > 1 or kernel != "outer"  # decoding has no gradient
    ]
    return [point for point in every if len(fitting(point)) > 1]


def find(
    wanted: Iterable[Point], device: str, timer: Timer, over: Callable[[], bool], keep: Keep = lambda found: None
) -> Found:
    """Rows of a tuned table: where a candidate is ahead of the default."""
    found = Found([], [], 0, False)
    for point in wanted:
        if over():
            return found
        try:
            default, run = default_of(point), runner(point, device)
            runs, out = sound({tiles: partial(run, tiles) for tiles in fitting(point)}, default, point.dtype)
            found.out.extend(f"{point}: {reason}" for reason in out)
            row = faster(timer(runs, measure.QUEUED), default, point)
        except Exception as reason:  # the others have their rows
            found.out.append(failed(point, reason))
            continue
        found.rows.extend([row] if row else [])
        found = found._replace(measured=found.measured + 1)
        keep(found)
    return found._replace(complete=True)


def failed(what: Any, reason: Exception) -> str:
    return f"{what} failed: {type(reason).__name__}: {reason}"


def default_of(point: Point) -> Tiles:
    return tiling.DEFAULTS[point.kernel](point.dtype, point.samples, point.tokens, point.pairs * RANK)


def fitting(point: Point) -> list[Tiles]:
    """The default, and the candidates that are no larger than the sizes that the row will stand for."""
    columns, tokens = tuned.columns_bucket(point.pairs * RANK), tuned.bucket(point.tokens)
    every = tiling.candidates(point.kernel, point.dtype)
    return list(dict.fromkeys([default_of(point), *(t for t in every if t.columns <= columns and t.tokens <= tokens)]))


def runner(point: Point, device: str) -> Callable[[Tiles], tuple[Tensor, ...]]:
    """The kernel with given tiles on random inputs; for `outer` with the sum after it, whose work depends on them."""
    from cllava_fast.ops.inject import triton_launch as launch  # not above: it needs triton

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device).to(point.dtype)

    rng = torch.Generator(device).manual_seed(0)
    samples, tokens, pairs, width = point.samples, point.tokens, point.pairs, point.width
    factor, wide = normal(ROWS, RANK, width), normal(samples, tokens, width)
    low = normal(samples, tokens, pairs * RANK)
    index = torch.randint(ROWS, (samples, pairs), generator=rng, device=device)
    coefficient = torch.randn(samples, pairs, generator=rng, device=device)
    given = Acting(factor, factor, index, coefficient, None, None, None, 1.0, False)

    def shrink(tiles: Tiles) -> tuple[Tensor, ...]:
        shrunk = launch.shrink(wide, factor, given, tiles, scaled=True, bare=True)
        return tuple(tensor for tensor in shrunk if tensor is not None)

    def expand(tiles: Tiles) -> tuple[Tensor, ...]:
        return (launch.expand(low, factor, index, tiles=tiles),)

    def outer(tiles: Tiles) -> tuple[Tensor, ...]:
        return (launch.sum_by_row(launch.outer(low, wide, tiles=tiles), factor, given, scaled=True),)

    return {"shrink": shrink, "expand": expand, "outer": outer}[point.kernel]


def sound(runs: Runs, right: Any, dtype: torch.dtype) -> tuple[dict[Any, Callable[[], Any]], list[str]]:
    """Those whose result is that of `right`, and why the others are out."""
    wanted = [tensor.double() if tensor.is_floating_point() else tensor for tensor in runs[right]()]
    kept, out = {right: runs[right]}, []
    for name, run in runs.items():
        if name == right:
            continue
        try:
            error = measure.error(run(), wanted)
        except Exception as reason:  # the others have their times
            out.append(failed(name, reason))
            continue
        if error <= LIMITS[dtype]:
            kept[name] = run
        else:
            out.append(f"{name} is wrong: relative error {error:.1e} exceeds {LIMITS[dtype]:.1e}")
    return kept, out


def faster(seconds: Mapping[Tiles, float], default: Tiles, point: Point) -> dict[str, Any] | None:
    """The fastest candidate's row, if it is far enough ahead."""
    best = min(seconds, key=lambda tiles: seconds[tiles])
    if seconds[default] < AHEAD * seconds[best]:
        return None
    return {
        "kernel": point.kernel,
        "dtype": measure.dtype_name(point.dtype),
        "columns": tuned.columns_bucket(point.pairs * RANK),
        "tokens": tuned.bucket(point.samples * point.tokens),
        "tiles": best._asdict(),
        "microseconds": round(1e6 * seconds[best], 2),
        "default_microseconds": round(1e6 * seconds[default], 2),
    }
